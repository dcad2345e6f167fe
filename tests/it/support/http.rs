//! An HTTP/1.1 client that sends the bytes it is told to, well-formed or not.

use std::io;
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::PATIENCE;
use super::upstream::Echo;

/// A request as it goes onto the wire.
#[derive(Clone)]
pub(crate) struct Request {
    head: Vec<u8>,
    body: Vec<u8>,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// Names in lower case; repeated ones apart, in order.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    pub(crate) fn post(path: &str, body: &str) -> Self {
        Self::post_as("application/json", path, body)
    }

    pub(crate) fn post_as(content_type: &str, path: &str, body: &str) -> Self {
        let mut request = Self::new("POST", path)
            .header("content-type", content_type)
            .header("content-length", body.len().to_string());
        request.body = body.as_bytes().to_vec();
        request
    }

    /// One connection for one request, so that the answer ends with it.
    pub(crate) fn new(method: &str, path: &str) -> Self {
        Self::raw(method, path.as_bytes())
    }

    /// The same with a target that need not be text.
    pub(crate) fn raw(method: &str, target: &[u8]) -> Self {
        let rest = b" HTTP/1.1\r\nhost: api.example.com\r\nconnection: close\r\n";
        Self { head: [method.as_bytes(), b" ", target, rest].concat(), body: Vec::new() }
    }

    /// One more header line; nothing is checked or escaped.
    pub(crate) fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        for part in [name.as_bytes(), b": ", value.as_ref(), b"\r\n"] {
            self.head.extend_from_slice(part);
        }
        self
    }

    /// `Authorization: Bearer KEY`.
    pub(crate) fn bearer(self, key: &str) -> Self {
        self.header("authorization", format!("Bearer {key}"))
    }

    /// Sends it; no answer is a failure.
    pub(crate) async fn send(self, addr: SocketAddr) -> Response {
        let head = String::from_utf8_lossy(&self.head).lines().next().unwrap_or_default().to_owned();
        self.try_send(addr).await.unwrap_or_else(|error| panic!("{head}: {error}"))
    }

    pub(crate) async fn try_send(self, addr: SocketAddr) -> io::Result<Response> {
        tokio::time::timeout(PATIENCE, async {
            exchange(TcpStream::connect(addr).await?, &self.bytes()).await
        })
        .await?
    }

    /// Sends it from one of this machine's own addresses.
    pub(crate) async fn send_from(self, source: IpAddr, addr: SocketAddr) -> Response {
        let socket = if source.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let socket = socket.expect("make a socket");
        socket.bind((source, 0).into()).unwrap_or_else(|error| panic!("bind to {source}: {error}"));
        self.send_over(socket.connect(addr).await.expect("connect")).await
    }

    /// Sends it over a connection that stands.
    pub(crate) async fn send_over(self, stream: impl AsyncRead + AsyncWrite + Unpin) -> Response {
        let bytes = self.bytes();
        let answer = tokio::time::timeout(PATIENCE, exchange(stream, &bytes));
        answer.await.expect("an answer in time").expect("an answer")
    }

    fn bytes(self) -> Vec<u8> {
        [self.head, b"\r\n".to_vec(), self.body].concat()
    }
}

impl Response {
    /// The values of a header, in order.
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(own, _)| own == name).map(|(_, value)| value.as_str()).collect()
    }

    /// The value of a header that is there once, or not at all.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        let values = self.values(name);
        assert!(values.len() < 2, "{name} is there more than once");
        values.first().copied()
    }

    /// `x-keyward-reason`, empty where there is none.
    pub(crate) fn reason(&self) -> &str {
        self.value("x-keyward-reason").unwrap_or_default()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in the body of a {}: {}", self.status, self.text()))
    }

    /// What the upstream saw; only for a request that reached it.
    pub(crate) fn echo(&self) -> Echo {
        assert_eq!(self.status, 200, "should have reached the upstream: {} {}", self.reason(), self.text());
        Echo::from_json(&self.json())
    }
}

/// Writes `bytes` and reads one answer. Not until the connection ends: Envoy keeps one open for a second after it has
/// refused a request.
async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> io::Result<Response> {
    stream.write_all(bytes).await?;
    let mut answer = Vec::new();
    loop {
        // A server that refuses the request may close with a reset behind its answer.
        let end = stream.read_buf(&mut answer).await;
        let has_ended = matches!(end, Ok(0) | Err(_));
        if let Some(response) = parse(&answer, has_ended) {
            return Ok(response);
        }
        if has_ended {
            end?;
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "no whole HTTP answer"));
        }
    }
}

/// `None` while the answer is not complete.
fn parse(answer: &[u8], has_ended: bool) -> Option<Response> {
    let (head, body) = split_head(answer)?;
    let head = String::from_utf8_lossy(head);
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let value = |wanted: &str| headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| &**value);
    let body = match (value("transfer-encoding"), value("content-length")) {
        (Some("chunked"), _) => unchunk(body)?,
        (_, Some(length)) => body.get(..length.parse().ok()?)?.to_vec(),
        (_, None) if has_ended => body.to_vec(),
        (_, None) => return None,
    };
    Some(Response { status, headers, body })
}

/// The head of a message without its last line end, and what follows it.
pub(super) fn split_head(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some((bytes.get(..end)?, bytes.get(end + 4..)?))
}

/// The contents of a chunked body; `None` while it is not complete.
pub(super) fn unchunk(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line_end = bytes.windows(2).position(|window| window == b"\r\n")?;
        let size = std::str::from_utf8(bytes.get(..line_end)?).ok()?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        let chunk = bytes.get(line_end + 2..)?;
        if size == 0 {
            return chunk.starts_with(b"\r\n").then_some(body);
        }
        body.extend_from_slice(chunk.get(..size)?);
        bytes = chunk.get(size + 2..)?;
    }
}

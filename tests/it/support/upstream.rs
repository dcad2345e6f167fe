//! The service behind Envoy: answers every request with what it saw of it, as JSON.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::http::{split_head, unchunk};

/// A listening echo; its connections end with it.
pub(crate) struct Upstream {
    addr: SocketAddr,
    requests: Arc<AtomicUsize>,
    _server: JoinSet<()>,
}

/// One request as the upstream saw it.
#[derive(Debug)]
pub(crate) struct Echo {
    pub(crate) method: String,
    /// As sent, with its query.
    pub(crate) path: String,
    /// Names in lower case; repeated ones apart, in order. Bytes that are not ASCII as the characters of their number.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen on loopback");
        let addr = listener.local_addr().expect("a listener has an address");
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&requests);
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let counter = Arc::clone(&counter);
                connections.spawn(async move {
                    // Envoy may hang up at any time; its own answer shows that.
                    let _ = answer(stream, &counter).await;
                });
            }
        });
        Self { addr, requests, _server: server }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many requests have come this far.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

impl Echo {
    pub(super) fn from_json(json: &Value) -> Self {
        Self::try_from_json(json).expect("the echo's form")
    }

    /// `None` where it is somebody else's answer.
    pub(crate) fn try_from_json(json: &Value) -> Option<Self> {
        let text = |value: Option<&Value>| Some(value?.as_str()?.to_owned());
        let headers = json.get("headers")?.as_array()?;
        Some(Self {
            method: text(json.get("method"))?,
            path: text(json.get("path"))?,
            headers: headers
                .iter()
                .map(|pair| Some((text(pair.get(0))?, text(pair.get(1))?)))
                .collect::<Option<_>>()?,
            body: text(json.get("body"))?,
        })
    }

    /// All values of a header.
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(own, _)| own == name).map(|(_, value)| value.as_str()).collect()
    }
}

/// One request, one answer, then the connection ends.
async fn answer(mut stream: TcpStream, requests: &AtomicUsize) -> io::Result<()> {
    let mut bytes = Vec::new();
    let echo = loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
        if let Some(echo) = parse(&bytes) {
            break echo.to_string();
        }
    };
    requests.fetch_add(1, Ordering::SeqCst);
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        echo.len()
    );
    stream.write_all(&[head.as_bytes(), echo.as_bytes()].concat()).await?;
    stream.shutdown().await
}

/// `None` while the request is not complete.
fn parse(bytes: &[u8]) -> Option<Value> {
    let (head, body) = split_head(bytes)?;
    let head = one_character_a_byte(head);
    let mut lines = head.split("\r\n");
    let mut request_line = lines.next()?.split(' ');
    let headers: Vec<(String, &str)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim()))
        .collect();
    let value = |wanted: &str| headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| *value);
    let body = if value("transfer-encoding").is_some() {
        unchunk(body)?
    } else {
        let length = value("content-length").map_or(Some(0), |length| length.parse().ok())?;
        body.get(..length)?.to_vec()
    };
    Some(json!({
        "method": request_line.next()?,
        "path": request_line.next()?,
        "headers": headers,
        "body": one_character_a_byte(&body),
    }))
}

fn one_character_a_byte(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

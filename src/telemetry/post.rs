//! One HTTP/1.1 request over a connection of its own.

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use opentelemetry_http::HttpError;
use tokio::net::TcpStream;

/// A collector's answer is a few bytes.
const MOST_BYTES: usize = 64 << 10;

/// Sends a request with a whole URL.
pub(super) async fn send(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut parts, body) = request.into_parts();
    let authority = parts.uri.authority().cloned().ok_or("the URL names no host")?;
    let port = authority.port_u16().unwrap_or(80);
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let moving = tokio::spawn(connection);
    parts.headers.insert(HOST, authority.as_str().parse()?);
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    parts.uri = path.parse()?;
    let response = sender.send_request(Request::from_parts(parts, Full::new(body))).await?;
    let (parts, body) = response.into_parts();
    let bytes = Limited::new(body, MOST_BYTES).collect().await?.to_bytes();
    moving.abort();
    Ok(Response::from_parts(parts, bytes))
}

//! One question to the admin port of a running sidecar.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, anyhow};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::failure::Failure;

const CONNECT: Duration = Duration::from_secs(2);
const WHOLE_ANSWER: Duration = Duration::from_secs(10);
/// The longest answer is a full deny list.
const MOST_BYTES: usize = 32 << 20;

/// What the sidecar said to a question that it accepted.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) body: String,
}

/// Asks. No connection or no answer is unreachable; any status but 2xx is a refusal.
pub(super) async fn ask(listen: SocketAddr, method: &str, path: &str) -> Result<Answer, Failure> {
    ask_with(listen, method, path, Bytes::new()).await
}

/// Asks with a body, which is JSON where there is one.
pub(super) async fn ask_with(
    listen: SocketAddr,
    method: &str,
    path: &str,
    body: Bytes,
) -> Result<Answer, Failure> {
    let limits = Limits { connect: CONNECT, whole_answer: WHOLE_ANSWER };
    let (status, body) = answered(listen, limits, method, path, body).await?;
    if !status.is_success() {
        let address = reachable(listen);
        let reason: String = body.chars().filter(|c| !c.is_control()).take(200).collect();
        return Err(Failure::refused(anyhow!("{address} answered {status} to {method} {path}: {reason}")));
    }
    Ok(Answer { body })
}

/// Reads one page within a time limit, whatever status it has.
pub(super) async fn page_within(
    listen: SocketAddr,
    limit: Duration,
    path: &str,
) -> Result<(StatusCode, String), Failure> {
    let limits = Limits { connect: limit, whole_answer: limit };
    let page = timeout(limit, answered(listen, limits, "GET", path, Bytes::new())).await;
    page.unwrap_or_else(|_| Err(no_answer(reachable(listen), late("answer", limit))))
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    connect: Duration,
    whole_answer: Duration,
}

async fn answered(
    listen: SocketAddr,
    limits: Limits,
    method: &str,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, String), Failure> {
    let address = reachable(listen);
    let stream = match timeout(limits.connect, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(no_answer(address, error.into())),
        Err(_) => return Err(no_answer(address, late("connection", limits.connect))),
    };
    match timeout(limits.whole_answer, exchange(stream, address, method, path, body)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(no_answer(address, error)),
        Err(_) => Err(no_answer(address, late("answer", limits.whole_answer))),
    }
}

fn late(what: &str, limit: Duration) -> anyhow::Error {
    anyhow!("no {what} within {}", humantime::format_duration(limit))
}

fn no_answer(address: SocketAddr, error: anyhow::Error) -> Failure {
    Failure::unreachable(error.context(format!(
        "no answer from a running keyward at {address} (set --admin-listen to where its admin port is)"
    )))
}

/// A sidecar that listens on every address is reached on the loopback one.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let address = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(address, listen.port())
}

async fn exchange(
    stream: TcpStream,
    address: SocketAddr,
    method: &str,
    path: &str,
    body: Bytes,
) -> anyhow::Result<(StatusCode, String)> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", address.to_string())
        .header("accept", "application/json");
    if !body.is_empty() {
        request = request.header("content-type", "application/json");
    }
    let request = request.body(Full::new(body))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MOST_BYTES).collect().await;
        let bytes = body.map_err(|error| anyhow!(error)).context("read the answer")?.to_bytes();
        anyhow::Ok((status, String::from_utf8_lossy(&bytes).into_owned()))
    };
    // The connection moves the bytes; it ends after the answer or with the error that kept it away.
    let mut connection = std::pin::pin!(connection);
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        ended = &mut connection => {
            ended?;
            answer.await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_is_reached_on_loopback() {
        let of = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(of("0.0.0.0:9193"), "127.0.0.1:9193");
        assert_eq!(of("[::]:9193"), "[::1]:9193");
        assert_eq!(of("10.0.0.1:9193"), "10.0.0.1:9193");
    }
}

//! Calls of gRPC as bytes: what is not exactly one whole plain message gets a status, and never an allow.

use std::convert::Infallible;
use std::net::SocketAddr;

use envoy_types::pb::envoy::service::auth::v3::CheckResponse;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use tokio::net::TcpStream;
use tonic::Code;

use crate::support::PATIENCE;
use crate::support::grpc::{Check, Encoding};
use crate::support::keyward::Keyward;

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// Status and message, sent in these pieces.
async fn call(addr: SocketAddr, path: &str, pieces: &[&[u8]]) -> (Code, Vec<u8>) {
    let stream = TcpStream::connect(addr).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let frames: Vec<Result<Frame<Bytes>, Infallible>> =
        pieces.iter().map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
    let request = Request::post(format!("http://{addr}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(tokio_stream::iter(frames)))
        .unwrap();
    let exchange = async {
        let response: Response<_> = sender.send_request(request).await.unwrap();
        assert_eq!(response.headers()["content-type"], "application/grpc");
        let of_head = response.headers().get("grpc-status").cloned();
        let collected = response.into_body().collect().await.unwrap();
        let of_trailers = collected.trailers().and_then(|trailers| trailers.get("grpc-status").cloned());
        let status = of_head.or(of_trailers).unwrap();
        (Code::from_bytes(status.as_bytes()), collected.to_bytes().to_vec())
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap()
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0][..], &length, message].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_answered_in_however_many_pieces_it_comes() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let check = Check::new("GET", "/v1/models").bearer(&key.secret).build(Encoding::Raw);
    let whole = framed(&check.encode_to_vec());
    let (first, second) = whole.split_at(3);
    let each: Vec<&[u8]> = whole.chunks(1).collect();
    for pieces in [&[&whole[..]][..], &[first, second], &[&[], first, &[], second, &[]], &each] {
        let (status, answer) = call(keyward.grpc_addr(), CHECK, pieces).await;
        assert_eq!(status, Code::Ok);
        let length = u32::try_from(answer.len() - 5).unwrap().to_be_bytes();
        assert_eq!(answer[..5], [&[0][..], &length].concat());
        assert_eq!(CheckResponse::decode(&answer[5..]).unwrap().status.unwrap().code, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_exactly_one_plain_message_is_a_status() {
    let keyward = Keyward::new().arg("--max-check-bytes", "1KiB").start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let check = Check::new("GET", "/v1/models").bearer(&key.secret).build(Encoding::Raw).encode_to_vec();
    let whole = framed(&check);
    let compressed = [&[1][..], &whole[1..]].concat();
    let large = framed(&[b'x'; 1025]);
    let twice = [&whole[..], &whole].concat();
    for (pieces, expected) in [
        (&[][..], Code::Internal),
        (&[&whole[..3]], Code::Internal),
        (&[&whole[..whole.len() - 1]], Code::Internal),
        (&[&twice], Code::Internal),
        (&[&framed(b"\x0a")], Code::Internal),
        (&[&compressed], Code::Unimplemented),
        (&[&large], Code::OutOfRange),
        (&[&large[..500], &large[500..]], Code::OutOfRange),
    ] {
        let (status, answer) = call(keyward.grpc_addr(), CHECK, pieces).await;
        assert_eq!((status, answer.len()), (expected, 0), "{pieces:?}");
    }
    let (status, _) =
        call(keyward.grpc_addr(), "/envoy.service.auth.v3.Authorization/Other", &[&whole]).await;
    assert_eq!(status, Code::Unimplemented);
}

/// Reflection would tell whoever reaches the port what it takes.
#[tokio::test(flavor = "multi_thread")]
async fn the_grpc_port_describes_nothing_of_itself() {
    let keyward = Keyward::new().start().await;
    // ServerReflectionRequest { list_services: "" }
    let list_services = framed(b"\x3a\x00");
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let answer = call(keyward.grpc_addr(), &path, &[&list_services]).await;
        assert_eq!(answer, (Code::Unimplemented, Vec::new()), "{version}");
    }
}

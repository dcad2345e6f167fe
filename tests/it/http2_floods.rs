//! Peers on the gRPC port that use HTTP/2 against it. Whatever one does, another one is answered, the process lives, and its
//! memory stays bounded.

use std::net::SocketAddr;

use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::PATIENCE;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PREFACE, RST_STREAM, SETTINGS, frame,
    header_block,
};
use crate::support::keyward::{Key, Keyward};

/// What a debug build may take, in KiB: idle it is half of that.
const MOST_RESIDENT: u64 = 120 << 10;

struct Rig {
    keyward: Keyward,
    key: Key,
}

impl Rig {
    async fn start() -> Self {
        let keyward = Keyward::new().start().await;
        keyward.create_user("ada", &[]);
        let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
        Self { keyward, key }
    }

    /// A message of gRPC with a check that is allowed.
    fn message(&self) -> Vec<u8> {
        let check =
            Check::new("GET", "/v1/models").bearer(&self.key.secret).build(Encoding::Raw).encode_to_vec();
        let length = u32::try_from(check.len()).unwrap().to_be_bytes();
        [&[0][..], &length, &check].concat()
    }

    /// Others are served, and it takes no more than it may.
    async fn assert_well(&self) {
        let check = Check::new("GET", "/v1/models").bearer(&self.key.secret).build(Encoding::Raw);
        let authorizer = Authorizer::connect(self.keyward.grpc_addr()).await;
        let answer = timeout(PATIENCE, authorizer.check(check)).await.expect("another one is answered");
        assert!(answer.allows(), "{answer:?}");
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.keyward.id())).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(resident < MOST_RESIDENT, "keyward takes {resident} KiB");
        assert!(!self.keyward.log().contains("panicked"), "{}", self.keyward.log());
    }
}

/// A connection that has said hello, with these settings.
async fn connect(addr: SocketAddr, settings: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let mut hello = PREFACE.to_vec();
    frame(&mut hello, SETTINGS, 0, 0, settings);
    stream.write_all(&hello).await.unwrap();
    stream
}

fn call_head() -> Vec<u8> {
    header_block(&[
        (":method", b"POST"),
        (":scheme", b"http"),
        (":path", b"/envoy.service.auth.v3.Authorization/Check"),
        (":authority", b"keyward"),
        ("content-type", b"application/grpc"),
        ("te", b"trailers"),
    ])
}

/// Sends frame after frame and reads whatever comes; whether the peer has ended the connection before the last one.
async fn flood(mut stream: TcpStream, count: u32, mut frames: impl FnMut(&mut Vec<u8>, u32)) -> bool {
    let (mut from, mut to) = stream.split();
    let reads = async {
        let mut sink = vec![0; 1 << 16];
        while from.read(&mut sink).await.is_ok_and(|length| length > 0) {}
    };
    let writes = async {
        let mut bytes = Vec::new();
        for number in 0..count {
            frames(&mut bytes, number);
            if bytes.len() > 1 << 16 {
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
                bytes.clear();
            }
        }
        let _ = to.write_all(&bytes).await;
        std::future::pending::<()>().await;
    };
    let ended = async {
        tokio::select! {
            () = reads => {}
            () = writes => {}
        }
    };
    timeout(PATIENCE, ended).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_opened_and_reset_at_once_end_the_connection() {
    let rig = Rig::start().await;
    let stream = connect(rig.keyward.grpc_addr(), &[]).await;
    let head = call_head();
    let is_ended = flood(stream, 200_000, |bytes, number| {
        frame(bytes, HEADERS, END_HEADERS, number * 2 + 1, &head);
        frame(bytes, RST_STREAM, 0, number * 2 + 1, &[0, 0, 0, 8]);
    });
    assert!(is_ended.await, "200,000 calls were opened and reset");
    rig.assert_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_without_end_end_the_connection() {
    let rig = Rig::start().await;
    let stream = connect(rig.keyward.grpc_addr(), &[]).await;
    let piece = header_block(&[("x-filler", &[b'x'; 16_000])]);
    let is_ended = flood(stream, 20_000, |bytes, number| {
        if number == 0 {
            frame(bytes, HEADERS, 0, 1, &call_head());
        }
        frame(bytes, CONTINUATION, 0, 1, &piece);
    });
    assert!(is_ended.await, "320 MB of headers were taken");
    rig.assert_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_pieces_of_a_message_end_the_connection() {
    let rig = Rig::start().await;
    let stream = connect(rig.keyward.grpc_addr(), &[]).await;
    let is_ended = flood(stream, 2_000_000, |bytes, number| {
        if number == 0 {
            frame(bytes, HEADERS, END_HEADERS, 1, &call_head());
        }
        frame(bytes, DATA, 0, 1, &[]);
    });
    assert!(is_ended.await, "two million empty pieces were taken");
    rig.assert_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_reads_nothing_is_in_nobodys_way() {
    let rig = Rig::start().await;
    // The shipped window, and none at all for answers.
    for settings in [&[][..], &[0, 4, 0, 0, 0, 0]] {
        let mut stream = connect(rig.keyward.grpc_addr(), settings).await;
        let (head, message) = (call_head(), rig.message());
        let mut bytes = Vec::new();
        for number in 0..20_000 {
            frame(&mut bytes, HEADERS, END_HEADERS, number * 2 + 1, &head);
            frame(&mut bytes, DATA, END_STREAM, number * 2 + 1, &message);
        }
        // It stops taking them at some point, so this does not end.
        let sent = timeout(std::time::Duration::from_secs(3), stream.write_all(&bytes)).await;
        rig.assert_well().await;
        drop((sent, stream));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_never_ends_gets_its_status() {
    let rig = Rig::start().await;
    let message = rig.message();
    let mut stream = connect(rig.keyward.grpc_addr(), &[]).await;
    let mut bytes = Vec::new();
    for (call, piece) in [(1, &[][..]), (3, &message[..4]), (5, &message[..message.len() - 1])] {
        frame(&mut bytes, HEADERS, END_HEADERS, call, &call_head());
        if !piece.is_empty() {
            frame(&mut bytes, DATA, 0, call, piece);
        }
    }
    stream.write_all(&bytes).await.unwrap();
    let mut answered = Vec::new();
    let heard = timeout(PATIENCE, async {
        while answered.len() < 3 {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let [a, b, c, kind, _, call @ ..] = head;
            let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap()];
            stream.read_exact(&mut payload).await.unwrap();
            assert_ne!(kind, GOAWAY);
            if kind == HEADERS {
                answered.push(u32::from_be_bytes(call));
            }
        }
    });
    assert!(heard.await.is_ok(), "only {answered:?} of 1, 3 and 5 were answered");
    rig.assert_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_say_hello_is_let_go() {
    let rig = Rig::start().await;
    for said in [&b""[..], &PREFACE[..10], PREFACE] {
        let mut stream = TcpStream::connect(rig.keyward.grpc_addr()).await.unwrap();
        stream.write_all(said).await.unwrap();
        let mut rest = Vec::new();
        let ended = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "after {said:?} it waits for ever");
    }
    rig.assert_well().await;
}

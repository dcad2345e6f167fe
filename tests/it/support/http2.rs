//! One HTTP/2 request with prior knowledge, header values as the bytes that they are: HTTP/1.1 has no way to send some of
//! them, and Envoy reads paths of the two by different rules.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::PATIENCE;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// What a client says first.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the peer accepts as long as it has not said more.
const MAX_FRAME: usize = 16384;

/// The answer's body; `None` where the stream or the connection was refused without an answer.
pub(crate) async fn get(addr: SocketAddr, path: &[u8], bearer: &str) -> io::Result<Option<Vec<u8>>> {
    let bearer = format!("Bearer {bearer}");
    let fields: [(&str, &[u8]); 5] = [
        (":method", b"GET"),
        (":scheme", b"http"),
        (":authority", b"api.example.com"),
        (":path", path),
        ("authorization", bearer.as_bytes()),
    ];
    let block = header_block(&fields);
    let mut bytes = PREFACE.to_vec();
    frame(&mut bytes, SETTINGS, 0, 0, &[]);
    let last = block.len().div_ceil(MAX_FRAME) - 1;
    for (position, part) in block.chunks(MAX_FRAME).enumerate() {
        let (kind, flags) = if position == 0 { (HEADERS, END_STREAM) } else { (CONTINUATION, 0) };
        frame(&mut bytes, kind, flags | if position == last { END_HEADERS } else { 0 }, 1, part);
    }
    tokio::time::timeout(PATIENCE, exchange(addr, &bytes)).await?
}

/// Headers as literals that go into no table.
pub(crate) fn header_block(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        string(&mut block, name.as_bytes());
        string(&mut block, value);
    }
    block
}

async fn exchange(addr: SocketAddr, bytes: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut stream = TcpStream::connect(addr).await?;
    stream.write_all(bytes).await?;
    let mut body = Vec::new();
    loop {
        let mut head = [0; 9];
        if stream.read_exact(&mut head).await.is_err() {
            return Ok(None);
        }
        let [a, b, c, kind, flags, ..] = head;
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).expect("24 bits")];
        stream.read_exact(&mut payload).await?;
        match kind {
            RST_STREAM | GOAWAY => return Ok(None),
            DATA => body.append(&mut payload),
            _ => {}
        }
        if matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
            return Ok(Some(body));
        }
    }
}

pub(crate) fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("a frame is short");
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Without Huffman coding; the length in HPACK's form with a prefix of seven bits.
fn string(out: &mut Vec<u8>, text: &[u8]) {
    if let Ok(length @ 0..127) = u8::try_from(text.len()) {
        out.push(length);
    } else {
        out.push(127);
        let mut rest = text.len() - 127;
        while rest >= 128 {
            out.push(u8::try_from(rest % 128).expect("seven bits") | 128);
            rest /= 128;
        }
        out.push(u8::try_from(rest).expect("seven bits"));
    }
    out.extend_from_slice(text);
}

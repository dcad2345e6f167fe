//! A bound on what Redis can make us hold: so many bytes per request sent, and none for nothing.
//!
//! redis-rs reads as long as the other side writes, also while no request is out, and keeps an unfinished value of any
//! announced length in memory. A hostile server could fill the process that way.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes that are read between two requests on one connection: the largest entry under every name of a fetch.
pub(super) const RATION: usize = 16 * 1024 * 1024;

/// A stream that breaks once more has been read than was asked for.
#[derive(Debug)]
pub(super) struct Rationed<S> {
    stream: S,
    left: usize,
}

impl<S> Rationed<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, left: RATION }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rationed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let read = buffer.filled().len().saturating_sub(before);
        match self.left.checked_sub(read) {
            Some(left) => {
                self.left = left;
                polled
            }
            None => Poll::Ready(Err(io::Error::other("more was sent than any reply has"))),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rationed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.left = RATION;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

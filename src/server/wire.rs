//! The two ends of one connection's bytes, moved in pieces that suit many small answers.
//!
//! HTTP/2 hands every frame to the socket by itself, and an allow is three of them: a system call each here, and for Envoy
//! as many times waking up. So what is written waits until the connection has nothing more to write, and goes in one piece.
//! And HTTP/2 reads as long as there is something to read before anything is answered, so that Envoy would wait while
//! Keyward works and then Keyward for Envoy: after each piece that was read, what has arrived is answered first.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What may wait at most, in bytes: answers to some twenty checks. A peer that does not read stops us there.
const WAITING: usize = 32 << 10;

/// Both are the same wire: one goes into the connection, the other sends what it has written.
pub(super) struct Wire<S>(Arc<Mutex<Inner<S>>>);

struct Inner<S> {
    stream: S,
    waiting: Vec<u8>,
    /// How much of it is sent.
    sent: usize,
    /// Whether something was sent that the stream may still hold, as TLS does.
    is_unflushed: bool,
    /// In this turn: HTTP/2 asks again after each call that it has taken in.
    has_read: bool,
    /// How many bytes were read so far.
    heard: usize,
    /// Why nothing can be sent any more.
    broken: Option<io::ErrorKind>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// The connection's end, and the one that sends.
    pub(super) fn pair(stream: S) -> (Self, Self) {
        let inner = Inner {
            stream,
            waiting: Vec::new(),
            sent: 0,
            is_unflushed: false,
            has_read: false,
            heard: 0,
            broken: None,
        };
        let inner = Arc::new(Mutex::new(inner));
        (Self(Arc::clone(&inner)), Self(inner))
    }

    /// Polls what uses the other end, which reads one piece at most, and sends what that has written.
    pub(super) fn turn<C: Future>(
        &self,
        connection: Pin<&mut C>,
        context: &mut Context<'_>,
    ) -> Poll<C::Output> {
        self.lock().has_read = false;
        let polled = connection.poll(context);
        if polled.is_pending()
            && let Poll::Ready(Err(_)) = self.lock().poll_send(context)
        {
            // So that the connection hears of it.
            context.waker().wake_by_ref();
        }
        polled
    }

    /// How many bytes the peer has sent that were read.
    pub(super) fn heard(&self) -> usize {
        self.lock().heard
    }

    /// Nobody else ever has it at the same time.
    fn lock(&self) -> MutexGuard<'_, Inner<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: AsyncWrite + Unpin> Inner<S> {
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.refuse_if_broken()?;
        let sent = self.poll_send_waiting(context);
        if let Poll::Ready(Err(error)) = &sent {
            self.broken = Some(error.kind());
        }
        sent
    }

    fn poll_send_waiting(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.waiting.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let written = ready!(Pin::new(&mut self.stream).poll_write(context, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent = self.sent.saturating_add(written);
            self.is_unflushed = true;
        }
        self.sent = 0;
        self.waiting.clear();
        if self.is_unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(context))?;
            self.is_unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.refuse_if_broken()?;
        if self.waiting.len() < WAITING { Poll::Ready(Ok(())) } else { self.poll_send(context) }
    }

    fn refuse_if_broken(&self) -> io::Result<()> {
        self.broken.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.lock();
        inner.refuse_if_broken()?;
        if inner.has_read {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = to.filled().len();
        ready!(Pin::new(&mut inner.stream).poll_read(context, to))?;
        let read = to.filled().len().saturating_sub(before);
        inner.has_read = read > 0;
        inner.heard = inner.heard.saturating_add(read);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.lock();
        ready!(inner.poll_room(context))?;
        let before = inner.waiting.len();
        for slice in slices {
            inner.waiting.extend_from_slice(slice);
        }
        Poll::Ready(Ok(inner.waiting.len().saturating_sub(before)))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Done already: it is sent when the connection's turn ends.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.lock().refuse_if_broken())
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.lock();
        ready!(inner.poll_send(context))?;
        Pin::new(&mut inner.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// Runs what uses one end, as a connection is run.
    async fn run<T>(wire: Wire<DuplexStream>, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        poll_fn(|context| wire.turn(work.as_mut(), context)).await
    }

    async fn read_once(from: &mut DuplexStream) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let length = from.read(&mut bytes).await.unwrap();
        bytes.truncate(length);
        bytes
    }

    #[tokio::test]
    async fn what_is_written_in_one_turn_arrives_in_one_piece() {
        let (near, mut far) = duplex(1 << 20);
        let (mut connection, wire) = Wire::pair(near);
        let writes = async {
            for part in [&b"head"[..], b"data", b"trailers"] {
                connection.write_all(part).await.unwrap();
                connection.flush().await.unwrap();
            }
            connection.read_u8().await
        };
        let reads = async {
            assert_eq!(read_once(&mut far).await, b"headdatatrailers");
            far.write_all(b"!").await.unwrap();
        };
        assert_eq!(tokio::join!(run(wire, writes), reads).0.unwrap(), b'!');
    }

    #[tokio::test]
    async fn a_slow_peer_gets_everything_and_little_waits_for_it() {
        let (near, mut far) = duplex(1000);
        let (mut connection, wire) = Wire::pair(near);
        let sent: Vec<u8> = (0..200_000_u32).flat_map(u32::to_be_bytes).collect();
        let writes = async {
            for piece in sent.chunks(1400) {
                connection.write_all(piece).await.unwrap();
                assert!(connection.lock().waiting.len() <= WAITING + 1400);
            }
            connection.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let reads = async { far.read_to_end(&mut received).await.unwrap() };
        tokio::join!(run(wire, writes), reads);
        assert_eq!(received, sent);
    }

    #[tokio::test]
    async fn a_connection_hears_that_its_peer_is_gone_although_it_only_waits() {
        let (near, mut far) = duplex(10);
        let (mut connection, wire) = Wire::pair(near);
        let writes = async {
            connection.write_all(&[b'x'; 100]).await.unwrap();
            // Nothing is read ahead of the error, because nothing is ever sent.
            connection.read_u8().await.unwrap_err()
        };
        let leaves = async {
            far.read_u8().await.unwrap();
            drop(far);
        };
        let (error, ()) = tokio::join!(run(wire, writes), leaves);
        assert!(matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof), "{error}");
    }

    /// The connection itself may ask as often as it likes.
    #[tokio::test]
    async fn between_two_pieces_that_are_read_everything_else_has_its_turn() {
        let (near, mut far) = duplex(1 << 20);
        let (mut connection, wire) = Wire::pair(near);
        far.write_all(b"abc").await.unwrap();
        let mut turns = Vec::new();
        let mut read = Vec::new();
        let mut reading = std::pin::pin!(poll_fn(|context| {
            let before = read.len();
            for _ in 0..3 {
                let mut byte = [0];
                if Pin::new(&mut connection).poll_read(context, &mut ReadBuf::new(&mut byte))?.is_ready() {
                    read.extend(byte);
                }
            }
            turns.push(read.len() - before);
            if read.len() == 3 { Poll::Ready(io::Result::Ok(())) } else { Poll::Pending }
        }));
        poll_fn(|context| wire.turn(reading.as_mut(), context)).await.unwrap();
        assert_eq!((read.as_slice(), turns), (&b"abc"[..], vec![1, 1, 1]));
    }
}

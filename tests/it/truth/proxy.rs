//! A TCP proxy between one sidecar and Postgres, whose faults are switched by the test.
//!
//! What arrives during a silence is kept and delivered when it ends, as TCP does after a real one: late heartbeats and
//! late notifications are part of what a sidecar has to bear.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// What happens to all connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Mode {
    #[default]
    Pass,
    /// Connections stay open and new ones are taken, and nothing comes through.
    Blackhole,
    /// Open connections are closed, new ones are closed at once.
    Refuse,
    /// What clients send arrives this much later.
    Delay(Duration),
    /// Replies are cut off after so many bytes of each piece, and the connection with them.
    Cut(usize),
    /// Replies are bytes that no server would send.
    Garble(&'static [u8]),
}

impl Mode {
    /// Whether anything comes through, whatever becomes of it.
    fn passes(self) -> bool {
        !matches!(self, Self::Blackhole | Self::Refuse)
    }
}

#[derive(Debug, Clone, Default)]
struct Rules {
    mode: Mode,
    /// Connections that are silent whatever the mode is, by their local port towards Postgres.
    silent: BTreeSet<u16>,
}

impl Rules {
    fn pass(&self, port: u16) -> bool {
        self.mode.passes() && !self.silent.contains(&port)
    }
}

/// A running proxy; gone when dropped, with its connections.
pub(crate) struct Proxy {
    addr: SocketAddr,
    rules: watch::Sender<Rules>,
    /// The open connections' local ports towards Postgres: what Postgres calls `client_port`.
    ports: Arc<Mutex<BTreeSet<u16>>>,
    accepting: AbortHandle,
}

impl Proxy {
    /// Listens on a free port and forwards to this port of loopback.
    pub(crate) async fn start(to: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let rules = watch::Sender::new(Rules::default());
        let ports = Arc::<Mutex<BTreeSet<u16>>>::default();
        let accept =
            accept(listener, SocketAddr::from((Ipv4Addr::LOCALHOST, to)), rules.clone(), ports.clone());
        let accepting = tokio::spawn(accept).abort_handle();
        Self { addr, rules, ports, accepting }
    }

    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Changes what happens to all connections from now on.
    pub(crate) fn switch(&self, mode: Mode) {
        self.rules.send_modify(|rules| rules.mode = mode);
    }

    /// Silences one connection.
    pub(crate) fn silence(&self, port: u16) {
        self.rules.send_modify(|rules| {
            rules.silent.insert(port);
        });
    }

    /// Ends all silences of single connections.
    pub(crate) fn unsilence(&self) {
        self.rules.send_modify(|rules| rules.silent.clear());
    }

    /// Whether this `client_port` of Postgres is one of ours.
    pub(crate) fn has_port(&self, port: u16) -> bool {
        self.ports.lock().unwrap().contains(&port)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        // Connections end themselves by it.
        self.switch(Mode::Refuse);
    }
}

async fn accept(
    listener: TcpListener,
    to: SocketAddr,
    rules: watch::Sender<Rules>,
    ports: Arc<Mutex<BTreeSet<u16>>>,
) {
    loop {
        let Ok((downstream, _)) = listener.accept().await else { continue };
        if rules.borrow().mode == Mode::Refuse {
            continue;
        }
        let (mut refused, rules, ports) = (rules.subscribe(), rules.subscribe(), Arc::clone(&ports));
        tokio::spawn(async move {
            tokio::select! {
                _ = refused.wait_for(|rules| rules.mode == Mode::Refuse) => {}
                () = forward(downstream, to, rules, ports) => {}
            }
        });
    }
}

/// Removes a port from the open ones, however its connection ends.
struct Open(u16, Arc<Mutex<BTreeSet<u16>>>);

impl Drop for Open {
    fn drop(&mut self) {
        if let Ok(mut ports) = self.1.lock() {
            ports.remove(&self.0);
        }
    }
}

async fn forward(
    downstream: TcpStream,
    to: SocketAddr,
    mut rules: watch::Receiver<Rules>,
    ports: Arc<Mutex<BTreeSet<u16>>>,
) {
    if rules.wait_for(|rules| rules.mode.passes()).await.is_err() {
        return;
    }
    let Ok(upstream) = TcpStream::connect(to).await else { return };
    // Small packets both ways: waiting to fill them would be measured as the program's own slowness.
    if downstream.set_nodelay(true).is_err() || upstream.set_nodelay(true).is_err() {
        return;
    }
    let Ok(port) = upstream.local_addr().map(|addr| addr.port()) else { return };
    ports.lock().unwrap().insert(port);
    let _open = Open(port, ports);
    let (from_client, to_client) = downstream.into_split();
    let (from_server, to_server) = upstream.into_split();
    tokio::join!(
        pump(from_client, to_server, rules.clone(), port, Direction::ToServer),
        pump(from_server, to_client, rules, port, Direction::ToClient),
    );
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

/// One direction, to its end. The end too is held back by a silence.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut rules: watch::Receiver<Rules>,
    port: u16,
    direction: Direction,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let length = from.read(&mut buffer).await.unwrap_or(0);
        let mode = match rules.wait_for(|rules| rules.pass(port)).await {
            Ok(rules) => rules.mode,
            Err(_) => return,
        };
        let piece = &buffer[..length];
        let written = match (mode, direction) {
            (Mode::Delay(time), Direction::ToServer) => {
                tokio::time::sleep(time).await;
                to.write_all(piece).await
            }
            (Mode::Garble(bytes), Direction::ToClient) if length > 0 => to.write_all(bytes).await,
            (Mode::Cut(at), Direction::ToClient) if length > at => {
                let _ = to.write_all(&piece[..at]).await;
                // Both halves have to go, so that the connection is reset and not only ended.
                let _ = to.shutdown().await;
                return;
            }
            _ => to.write_all(piece).await,
        };
        if length == 0 || written.is_err() {
            // The other side may be gone already.
            let _ = to.shutdown().await;
            return;
        }
    }
}

/// A server that says back what it hears, and a proxy before it.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::eventually;

    /// Long enough that a byte that comes through is there.
    const SILENCE: Duration = Duration::from_millis(100);

    async fn echo() -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = socket.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        Proxy::start(port).await
    }

    async fn say(client: &mut TcpStream, byte: u8) -> Option<u8> {
        client.write_all(&[byte]).await.ok()?;
        hear(client).await
    }

    /// `None` after a while, and at the end of the connection.
    async fn hear(client: &mut TcpStream) -> Option<u8> {
        tokio::time::timeout(SILENCE, client.read_u8()).await.ok()?.ok()
    }

    async fn connect(proxy: &Proxy) -> TcpStream {
        TcpStream::connect(proxy.addr).await.unwrap()
    }

    #[tokio::test]
    async fn a_blackhole_keeps_connections_and_delivers_late() {
        let proxy = echo().await;
        let mut client = connect(&proxy).await;
        assert_eq!(say(&mut client, 1).await, Some(1));
        proxy.switch(Mode::Blackhole);
        assert_eq!(say(&mut client, 2).await, None);
        let mut newcomer = connect(&proxy).await;
        assert_eq!(say(&mut newcomer, 3).await, None);
        proxy.switch(Mode::Pass);
        assert_eq!((hear(&mut client).await, hear(&mut newcomer).await), (Some(2), Some(3)));
    }

    #[tokio::test]
    async fn refusing_closes_what_is_open_and_what_comes() {
        let proxy = echo().await;
        let mut client = connect(&proxy).await;
        assert_eq!(say(&mut client, 1).await, Some(1));
        proxy.switch(Mode::Refuse);
        assert!(client.read_u8().await.is_err());
        assert!(connect(&proxy).await.read_u8().await.is_err());
        proxy.switch(Mode::Pass);
        assert_eq!(say(&mut connect(&proxy).await, 2).await, Some(2));
    }

    #[tokio::test]
    async fn replies_are_cut_off_or_replaced() {
        let proxy = echo().await;
        let mut client = connect(&proxy).await;
        proxy.switch(Mode::Garble(b"?"));
        assert_eq!(say(&mut client, 1).await, Some(b'?'));
        proxy.switch(Mode::Cut(1));
        client.write_all(&[1, 2, 3]).await.unwrap();
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, [1]);
    }

    #[tokio::test]
    async fn one_connection_is_silenced_by_its_port() {
        let proxy = echo().await;
        let (mut first, mut second) = (connect(&proxy).await, connect(&proxy).await);
        assert_eq!(say(&mut first, 1).await, Some(1));
        let ports = proxy.ports.lock().unwrap().clone();
        assert_eq!(say(&mut second, 1).await, Some(1));
        let both = proxy.ports.lock().unwrap().clone();
        let newer = *both.iter().find(|port| !ports.contains(port)).unwrap_or(both.iter().next().unwrap());
        assert!(proxy.has_port(newer));
        proxy.silence(newer);
        let heard = (say(&mut first, 2).await, say(&mut second, 2).await);
        assert!(matches!(heard, (Some(2), None) | (None, Some(2))), "{heard:?}");
        proxy.unsilence();
        let late = if heard.0.is_none() { &mut first } else { &mut second };
        assert_eq!(hear(late).await, Some(2));
        drop((first, second));
        let closed = eventually(async || proxy.ports.lock().unwrap().is_empty().then_some(())).await;
        assert!(closed.is_some());
    }
}

//! Listening sockets: TCP, unix and abstract ones.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

use super::options::Unexpected;

/// Connections that wait to be accepted; the kernel takes less where it allows less.
const BACKLOG: u32 = 1024;

/// How long a TCP connection is silent until the kernel asks whether the peer is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_mins(1);
/// How long it waits for an answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// How often it asks.
const KEEPALIVE_COUNT: u32 = 4;

/// A listening address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// `127.0.0.1:9191`
    Tcp(SocketAddr),
    /// `unix:/path`
    Unix(PathBuf),
    /// `unix:@name`: in the network's name space, without a file, and so without a mode.
    Abstract(String),
}

impl FromStr for Listen {
    type Err = Unexpected;

    fn from_str(text: &str) -> Result<Self, Unexpected> {
        // What a socket's address has room for, less the zero before a name and behind a path.
        const MOST: usize = 107;
        match text.strip_prefix("unix:") {
            Some("" | "@") => Err(Unexpected("a path or @name behind unix:".to_owned())),
            Some(name) if name.len() > MOST || name.contains('\0') => {
                Err(Unexpected(format!("a path or @name of at most {MOST} bytes behind unix:")))
            }
            Some(name) => Ok(match name.strip_prefix('@') {
                Some(name) => Self::Abstract(name.to_owned()),
                None => Self::Unix(PathBuf::from(name)),
            }),
            None => text.parse().map(Self::Tcp).map_err(|_| {
                Unexpected(
                    "an IP address and port such as 127.0.0.1:9191, unix:/path or unix:@name".to_owned(),
                )
            }),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Abstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

/// The mode of a unix socket's file (`--socket-mode`): who may connect is who may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(u32);

impl SocketMode {
    /// The owner and the group, so that Envoy in the same pod can under its own user.
    pub const DEFAULT: Self = Self(0o660);
}

impl FromStr for SocketMode {
    type Err = Unexpected;

    fn from_str(text: &str) -> Result<Self, Unexpected> {
        let is_octal = matches!(text.len(), 3 | 4) && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| is_octal && *mode <= 0o777);
        // Without this bit Keyward's own health command could not get in.
        mode.filter(|mode| mode & 0o200 != 0).map(Self).ok_or_else(|| {
            Unexpected("three octal digits with which the owner may write, such as 0660".to_owned())
        })
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// How sockets are opened.
#[derive(Debug, Clone, Copy)]
pub struct SocketOptions {
    /// Whether other processes that do the same can listen on the same TCP address.
    pub reuse_port: bool,
    /// Who may connect to a unix socket that has a file.
    pub mode: SocketMode,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self { reuse_port: false, mode: SocketMode::DEFAULT }
    }
}

/// An open socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP
    Tcp(TcpListener),
    /// A unix socket, and its file if it has one.
    Unix(UnixListener, Option<SocketFile>),
}

/// An accepted connection.
#[derive(Debug)]
pub enum Accepted {
    /// TCP, with the peer's address.
    Tcp(TcpStream, SocketAddr),
    /// A unix socket.
    Unix(UnixStream),
}

impl Accepted {
    /// The same on the runtime that this is called on.
    pub fn move_here(self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream, peer) => Ok(Self::Tcp(TcpStream::from_std(stream.into_std()?)?, peer)),
            Self::Unix(stream) => Ok(Self::Unix(UnixStream::from_std(stream.into_std()?)?)),
        }
    }
}

impl Listener {
    /// Opens it.
    pub async fn open(listen: &Listen, options: SocketOptions) -> io::Result<Self> {
        match listen {
            Listen::Tcp(address) => Ok(Self::Tcp(tcp(*address, options.reuse_port)?)),
            Listen::Unix(path) => {
                let (listener, file) = unix(path, options.mode).await?;
                Ok(Self::Unix(listener, Some(file)))
            }
            Listen::Abstract(name) => {
                let listener = UnixListener::bind(format!("\0{name}"));
                Ok(Self::Unix(listener.map_err(|error| named(&error, &listen.to_string()))?, None))
            }
        }
    }

    /// The next connection, set up.
    pub async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                set_up(&stream);
                Ok(Accepted::Tcp(stream, peer))
            }
            Self::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0)),
        }
    }

    /// Closes the socket. Returned is who had been let in by the kernel and not been accepted yet.
    pub fn close(self) -> Vec<Accepted> {
        let mut last = Vec::new();
        match self {
            Self::Tcp(listener) => {
                // As a socket of std, which asks the kernel and not the runtime's memory of it, and does not wait.
                let Ok(listener) = listener.into_std() else { return last };
                while let Ok((stream, peer)) = listener.accept() {
                    if stream.set_nonblocking(true).is_ok()
                        && let Ok(stream) = TcpStream::from_std(stream)
                    {
                        set_up(&stream);
                        last.push(Accepted::Tcp(stream, peer));
                    }
                }
            }
            Self::Unix(listener, file) => {
                // The name first, so that a successor can have it and nobody else comes here.
                if let Some(file) = file {
                    file.remove();
                }
                let Ok(listener) = listener.into_std() else { return last };
                while let Ok((stream, _)) = listener.accept() {
                    if stream.set_nonblocking(true).is_ok()
                        && let Ok(stream) = UnixStream::from_std(stream)
                    {
                        last.push(Accepted::Unix(stream));
                    }
                }
            }
        }
        last
    }
}

/// Small answers go out at once, and a peer that is gone without a word is noticed. Nothing that a connection could not
/// do without.
fn set_up(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE);
    let _ = sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL);
    let _ = sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT);
}

/// Listens on a TCP address.
pub fn tcp(address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let open = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A restart does not wait for connections of the one before.
        socket.set_reuseaddr(true)?;
        if reuse_port {
            socket.set_reuseport(true)?;
        }
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().map_err(|error| named(&error, &address.to_string()))
}

/// The file of a socket that we listen on.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Unless another process has put its own there.
    pub fn remove(&self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(metadata: &std::fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Listens on a unix socket. A socket file that nobody listens on any more is replaced; any other file is left alone.
async fn unix(path: &Path, SocketMode(mode): SocketMode) -> io::Result<(UnixListener, SocketFile)> {
    let shown = path.display().to_string();
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            let text = format!("{shown} exists and is not a socket");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        if UnixStream::connect(path).await.is_ok() {
            let text = format!("{shown} is in use by another process");
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        std::fs::remove_file(path).map_err(|error| named(&error, &shown))?;
    }
    let finish = || {
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        let identity = identity(&std::fs::symlink_metadata(path)?);
        Ok((listener, SocketFile { path: path.to_owned(), identity }))
    };
    finish().map_err(|error: io::Error| named(&error, &shown))
}

fn named(error: &io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_shown_alike() {
        for text in ["127.0.0.1:9191", "[::1]:1", "unix:/run/k.sock", "unix:@keyward"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        assert_eq!("unix:@k".parse::<Listen>(), Ok(Listen::Abstract("k".into())));
        for bad in ["", "unix:", "unix:@", "localhost:1", "127.0.0.1", &format!("unix:/{}", "x".repeat(107))]
        {
            assert!(bad.parse::<Listen>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn an_accepted_connection_sends_at_once_and_notices_a_peer_that_is_gone() {
        let listener =
            Listener::open(&"127.0.0.1:0".parse().unwrap(), SocketOptions::default()).await.unwrap();
        let Listener::Tcp(tcp) = &listener else { panic!("{listener:?}") };
        let address = tcp.local_addr().unwrap();
        let _early = TcpStream::connect(address).await.unwrap();
        let accepted = listener.accept().await.unwrap();
        // Not accepted by the time that the socket is closed, and still not lost.
        let _late = TcpStream::connect(address).await.unwrap();
        let mut all = listener.close();
        assert_eq!(all.len(), 1);
        all.push(accepted);
        for accepted in all {
            let Accepted::Tcp(stream, _) = accepted else { panic!("{accepted:?}") };
            assert!(stream.nodelay().unwrap());
            assert!(sockopt::socket_keepalive(&stream).unwrap());
            assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), KEEPALIVE_IDLE);
        }
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_used_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.sock");
        let (first, file) = unix(&path, SocketMode::DEFAULT).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(unix(&path, SocketMode::DEFAULT).await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        let (_second, own) = unix(&path, SocketMode::DEFAULT).await.unwrap();
        // The first's process comes to its end only now.
        if file.identity != own.identity {
            file.remove();
            assert!(path.exists());
        }
        own.remove();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_socket_has_the_mode_that_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        for (text, mode) in [("0600", 0o600), ("660", 0o660), ("0666", 0o666)] {
            let path = folder.path().join(text);
            let _listening = unix(&path, text.parse().unwrap()).await.unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
        }
        for bad in ["", "0", "66", "0888", "1777", "00660", "0460", "-660", "+660", "rw-rw----"] {
            assert!(bad.parse::<SocketMode>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(unix(&path, SocketMode::DEFAULT).await.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_port_in_use_names_the_address_unless_it_is_shared() {
        let first = tcp("127.0.0.1:0".parse().unwrap(), false).unwrap();
        let address = first.local_addr().unwrap();
        assert!(tcp(address, true).unwrap_err().to_string().contains(&address.to_string()));
        drop(first);
        let _first = tcp(address, true).unwrap();
        let _second = tcp(address, true).unwrap();
        assert!(tcp(address, false).is_err());
    }
}

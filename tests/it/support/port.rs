//! Free ports, without the usual race between finding one and using it.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Mutex;

/// The locks of all ports that this process has handed out, held until it ends.
static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Below the range from which the kernel takes ports for outgoing connections, which would otherwise steal one now and
/// then.
const FIRST: u16 = 12_000;
const COUNT: u32 = 18_000;

/// A loopback address that nothing listens on, and that no other test process is given while this one runs.
pub(crate) fn free_addr() -> SocketAddr {
    let folder = std::env::temp_dir().join("keyward-test-ports");
    std::fs::create_dir_all(&folder).expect("make the folder of port locks");
    let mut held = HELD.lock().expect("no holder of this lock panics");
    // Processes begin at different places; the lock settles the rest.
    let start = std::process::id().wrapping_mul(97);
    for step in 0..COUNT {
        let offset = u16::try_from(start.wrapping_add(step) % COUNT).expect("COUNT fits");
        let port = FIRST + offset;
        let lock = File::create(folder.join(port.to_string())).expect("open a port lock");
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if lock.try_lock().is_ok() && TcpListener::bind(addr).is_ok() {
            held.push(lock);
            return addr;
        }
    }
    panic!("no free port");
}

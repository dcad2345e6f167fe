//! The decision log: one line a decision, written by a thread of its own.
//!
//! Whoever reads the log may be slow, stopped or gone, and a disk may be full. So a check only ever puts a line into a
//! bounded queue, and a line that finds it full is counted and dropped. The thread is never joined: one that hangs in a
//! write must not keep the process from its end.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::mem;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Lines that wait for the writer. Each is a few hundred bytes, 4 KiB where a caller does its worst.
const MAX_WAITING: usize = 4096;

/// What goes out in one write.
const BATCH_BYTES: usize = 64 << 10;

/// How long somebody waits for the writer to open a file: a FIFO that nobody reads takes for ever.
const OPEN_LIMIT: Duration = Duration::from_secs(1);

/// Pause before the next attempt where standard output was made non-blocking by whoever shares it.
const RETRY_WRITE: Duration = Duration::from_millis(10);

/// Where the lines go (`--decision-log`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// Appended to this file.
    File(PathBuf),
}

/// As it is read.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("stdout"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            // Nobody who writes such a word means a file of that name.
            "" | "on" | "true" | "false" | "stderr" => Err("off, stdout or the path of a file".to_owned()),
            "stdout" => Ok(Self::Stdout),
            path => Ok(Self::File(PathBuf::from(path))),
        }
    }
}

impl Target {
    fn open(&self) -> io::Result<File> {
        match self {
            // Not std's handle: it has a lock and a buffer that others would wait for.
            Self::Stdout => io::stdout().as_fd().try_clone_to_owned().map(File::from),
            Self::File(path) => OpenOptions::new().append(true).create(true).mode(0o600).open(path),
        }
    }
}

/// Which share of the allowed requests is written (`--decision-log-sample`), in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample(u32);

/// All of them.
const WHOLE: u32 = 1_000_000;

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self(WHOLE) => f.write_str("all"),
            Self(0) => f.write_str("denials"),
            Self(millionths) => write!(f, "{}%", f64::from(millionths) / 10_000.0),
        }
    }
}

impl FromStr for Sample {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "all, denials, or a share from 0.0001% to 100%".to_owned();
        match text {
            "all" => return Ok(Self(WHOLE)),
            "denials" => return Ok(Self(0)),
            _ => {}
        }
        let number = text.strip_suffix('%').ok_or_else(expected)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        let are_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.len() > 3 || fraction.len() > 4 || !are_digits(whole) || !are_digits(fraction) {
            return Err(expected());
        }
        let parts = format!("{whole}{fraction:0<4}").parse::<u32>().map_err(|_| expected())?;
        if (1..=WHOLE).contains(&parts) { Ok(Self(parts)) } else { Err(expected()) }
    }
}

/// Something that the writer does between two batches, and tells when it is done.
enum Order {
    Reopen(oneshot::Sender<io::Result<()>>),
    Finish(oneshot::Sender<()>),
}

enum Message {
    Line(Vec<u8>),
    /// There are orders. They don't go through the queue, which may be full.
    LookAtOrders,
}

type Orders = Arc<Mutex<VecDeque<Order>>>;

/// The log's near end. Dropping it ends the writer.
pub struct DecisionLog {
    queue: SyncSender<Message>,
    orders: Orders,
    sample: Sample,
    /// Allowed requests so far, for drawing lots.
    allowed: AtomicU64,
    dropped: Counter,
}

impl DecisionLog {
    /// Opens the log and starts its writer. A file that can't be opened is an error; one that can't be opened yet (a FIFO
    /// that nobody reads) is not.
    pub async fn start(target: Target, sample: Sample, dropped: Counter) -> io::Result<Arc<Self>> {
        let (queue, lines) = sync_channel(MAX_WAITING);
        let orders = Orders::default();
        let (opened, opening) = oneshot::channel();
        let name = target.to_string();
        let writer = Writer { target, orders: Arc::clone(&orders), dropped: dropped.clone(), trouble: None };
        thread::Builder::new().name("decision-log".to_owned()).spawn(move || writer.run(&lines, opened))?;
        match timeout(OPEN_LIMIT, opening).await {
            Ok(Ok(Err(error))) => return Err(error),
            Ok(Ok(Ok(())) | Err(_)) => {}
            Err(_) => tracing::warn!(log = name, "nobody reads the decision log yet"),
        }
        Ok(Arc::new(Self { queue, orders, sample, allowed: AtomicU64::new(0), dropped }))
    }

    /// Whether a line about this decision is wanted. `is_plain_allow`: nothing was or would have been denied.
    pub fn wants(&self, is_plain_allow: bool) -> bool {
        let Sample(share) = self.sample;
        if !is_plain_allow || share == WHOLE {
            return true;
        }
        if share == 0 {
            return false;
        }
        // Scattered, so that traffic with a rhythm of its own is not always caught on the same beat.
        let lot = scatter(self.allowed.fetch_add(1, Ordering::Relaxed)) % u64::from(WHOLE);
        lot < u64::from(share)
    }

    /// Hands over a line, with its newline. Never waits.
    pub fn write(&self, line: Vec<u8>) {
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.dropped.inc();
        }
    }

    /// Opens the file anew, for whoever has renamed it; the old one stays in use if that fails.
    pub async fn reopen(&self) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        self.order(Order::Reopen(done));
        match timeout(OPEN_LIMIT, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(io::Error::other("the writer of the decision log has ended")),
            Err(_) => Err(io::Error::new(ErrorKind::TimedOut, "it is not being read; done as soon as it is")),
        }
    }

    /// Waits until everything so far is written, or until `limit`. Whether it was.
    pub async fn finish(&self, limit: Duration) -> bool {
        let (done, answer) = oneshot::channel();
        self.order(Order::Finish(done));
        matches!(timeout(limit, answer).await, Ok(Ok(())))
    }

    fn order(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push_back(order);
        // A full queue means that the writer is at work, and it looks at its orders after each batch.
        let _ = self.queue.try_send(Message::LookAtOrders);
    }
}

/// The finalizer of `SplitMix64`.
fn scatter(number: u64) -> u64 {
    let mut bits = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

struct Writer {
    target: Target,
    orders: Orders,
    dropped: Counter,
    /// What the last write failed with, so that a full disk is logged once and not a million times.
    trouble: Option<String>,
}

/// An open log.
struct Sink {
    file: File,
    /// The last write ended within a line.
    is_torn: bool,
}

impl Writer {
    fn run(mut self, lines: &Receiver<Message>, opened: oneshot::Sender<io::Result<()>>) {
        let mut sink = match self.target.open() {
            Ok(file) => Sink { file, is_torn: false },
            Err(error) => {
                let _ = opened.send(Err(error));
                return;
            }
        };
        let _ = opened.send(Ok(()));
        let mut batch = Vec::new();
        while let Ok(first) = lines.recv() {
            take(first, &mut batch);
            self.write_waiting(lines, &mut sink, &mut batch);
            self.follow_orders(lines, &mut sink, &mut batch);
        }
    }

    /// One write; whether nothing waited besides.
    fn write_waiting(&mut self, lines: &Receiver<Message>, sink: &mut Sink, batch: &mut Vec<u8>) -> bool {
        let is_all = fill(lines, batch);
        self.write(sink, batch);
        batch.clear();
        is_all
    }

    fn follow_orders(&mut self, lines: &Receiver<Message>, sink: &mut Sink, batch: &mut Vec<u8>) {
        let orders = mem::take(&mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner));
        for order in orders {
            match order {
                Order::Reopen(done) => {
                    let opened = self.target.open().map(|file| *sink = Sink { file, is_torn: false });
                    let _ = done.send(opened);
                }
                Order::Finish(done) => {
                    while !self.write_waiting(lines, sink, batch) {}
                    let _ = done.send(());
                }
            }
        }
    }

    fn write(&mut self, sink: &mut Sink, batch: &[u8]) {
        match sink.write(batch) {
            Ok(()) => {
                if self.trouble.take().is_some() {
                    tracing::info!("the decision log can be written again");
                }
            }
            Err(Unwritten { error, lines }) => {
                self.dropped.inc_by(lines);
                let trouble = error.to_string();
                if self.trouble.as_ref() != Some(&trouble) {
                    tracing::warn!(log = %self.target, error = trouble, "the decision log can't be written; lines are dropped");
                    self.trouble = Some(trouble);
                }
            }
        }
    }
}

struct Unwritten {
    error: io::Error,
    lines: u64,
}

impl Sink {
    fn write(&mut self, batch: &[u8]) -> Result<(), Unwritten> {
        if batch.is_empty() {
            return Ok(());
        }
        // So that the half line of a disk that was full spoils no whole one.
        if self.is_torn && self.file.write_all(b"\n").is_ok() {
            self.is_torn = false;
        }
        let mut rest = batch;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(self.give_up(batch, rest, ErrorKind::WriteZero.into())),
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_WRITE),
                Err(error) => return Err(self.give_up(batch, rest, error)),
            }
        }
        Ok(())
    }

    fn give_up(&mut self, batch: &[u8], rest: &[u8], error: io::Error) -> Unwritten {
        let written = batch.get(..batch.len().saturating_sub(rest.len())).unwrap_or_default();
        self.is_torn |= written.last().is_some_and(|last| *last != b'\n');
        let lines = rest.split_inclusive(|byte| *byte == b'\n').count();
        Unwritten { error, lines: u64::try_from(lines).unwrap_or(u64::MAX) }
    }
}

fn take(message: Message, batch: &mut Vec<u8>) {
    match message {
        Message::Line(line) => batch.extend(line),
        Message::LookAtOrders => {}
    }
}

/// Adds what waits, as far as it goes into one write; whether nothing waits any more.
fn fill(lines: &Receiver<Message>, batch: &mut Vec<u8>) -> bool {
    while batch.len() < BATCH_BYTES {
        match lines.try_recv() {
            Ok(message) => take(message, batch),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_and_shown() {
        for (text, millionths, shown) in [
            ("all", WHOLE, "all"),
            ("denials", 0, "denials"),
            ("100%", WHOLE, "all"),
            ("1%", 10_000, "1%"),
            ("0.5%", 5_000, "0.5%"),
            ("0.0001%", 1, "0.0001%"),
            ("12.25%", 122_500, "12.25%"),
        ] {
            let sample: Sample = text.parse().unwrap();
            assert_eq!(sample, Sample(millionths), "{text}");
            assert_eq!(sample.to_string(), shown);
            assert_eq!(shown.parse(), Ok(sample));
        }
        for text in ["", "%", "0%", "101%", "1", "-1%", "1.%", ".5%", "0.00001%", "1,5%", "none", "1e1%"] {
            assert!(text.parse::<Sample>().is_err(), "{text}");
        }
    }

    #[test]
    fn words_that_are_no_files_are_refused() {
        assert_eq!("stdout".parse(), Ok(Target::Stdout));
        assert_eq!("./on".parse(), Ok(Target::File("./on".into())));
        for word in ["", "on", "true", "stderr"] {
            assert!(word.parse::<Target>().is_err(), "{word}");
        }
    }

    #[test]
    fn a_share_is_about_that_share() {
        let taken = (0..100_000_u64).filter(|n| scatter(*n) % u64::from(WHOLE) < 100_000).count();
        assert!((9_500..10_500).contains(&taken), "{taken}");
    }

    /// `/dev/full` is a disk that is full.
    #[tokio::test]
    async fn a_full_disk_is_counted_and_nobody_waits() {
        let dropped = Counter::default();
        let full = Target::File("/dev/full".into());
        let log = DecisionLog::start(full, Sample(WHOLE), dropped.clone()).await.unwrap();
        for _ in 0..10 {
            log.write(b"{}\n".to_vec());
        }
        assert!(log.finish(Duration::from_secs(30)).await);
        assert_eq!(dropped.get(), 10);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_opened_is_said_at_once() {
        let nowhere = Target::File("/nonexistent/decisions".into());
        assert!(DecisionLog::start(nowhere, Sample(0), Counter::default()).await.is_err());
    }

    #[test]
    fn a_half_line_is_ended_before_the_next_whole_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let file = Target::File(path.clone()).open().unwrap();
        let mut sink = Sink { file, is_torn: false };
        let batch = b"one\ntwo\nthree\n";
        assert!(sink.write(&batch[..6]).is_ok());
        let unwritten = sink.give_up(batch, &batch[6..], ErrorKind::StorageFull.into());
        assert_eq!(unwritten.lines, 2);
        assert!(sink.write(b"four\n").is_ok());
        assert_eq!(std::fs::read_to_string(path).unwrap(), "one\ntw\nfour\n");
    }
}

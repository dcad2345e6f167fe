//! Logs: to standard error, as text or JSON lines, level per module.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, reload};

use super::traces::Traces;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Changes what is logged while the process runs.
pub struct Level(Box<dyn Fn(EnvFilter) -> bool + Send + Sync>);

impl Level {
    /// From now on. Whether that could be done.
    pub fn set(&self, filter: &str) -> bool {
        EnvFilter::try_new(filter).is_ok_and(&self.0)
    }
}

/// Starts logging, and spans where they are exported. `filter` is a level or a list such as `info,keyward::cache=debug`;
/// it has been checked by [`is_filter`]. A second call in one process (tests) changes nothing.
pub fn start(format: LogFormat, filter: &str, traces: Option<&Traces>) -> Level {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    // https://no-color.org: set and not empty.
    let may_color = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(may_color && std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let (filter, handle) = reload::Layer::new(filter);
    let lines = lines.with_filter(filter);
    let _ = tracing_subscriber::registry().with(lines).with(traces.map(Traces::layer)).try_init();
    Level(Box::new(move |filter| handle.reload(filter).is_ok()))
}

/// Whether the text is a log filter.
pub fn is_filter(text: &str) -> bool {
    EnvFilter::try_new(text).is_ok()
}

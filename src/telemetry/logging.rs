//! Logs: to standard error, as text or JSON lines, level per module.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

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

/// Starts logging. `filter` is a level or a list such as `info,keyward::cache=debug`; it has been checked by
/// [`is_filter`]. A second call in one process (tests) changes nothing.
pub fn start(format: LogFormat, filter: &str) -> Level {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    // https://no-color.org: set and not empty.
    let may_color = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(may_color && std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            let _ = builder.try_init();
            Level(Box::new(move |filter| handle.reload(filter).is_ok()))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            let _ = builder.try_init();
            Level(Box::new(move |filter| handle.reload(filter).is_ok()))
        }
    }
}

/// Whether the text is a log filter.
pub fn is_filter(text: &str) -> bool {
    EnvFilter::try_new(text).is_ok()
}

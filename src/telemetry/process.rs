//! The process as the kernel sees it, under the names that Prometheus' own clients use. Read from `/proc` when asked for;
//! what can't be read is left out.

use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

/// Fields of `/proc/self/stat` after the name in parentheses, which may hold anything; counted from 0.
const USER_TICKS: usize = 11;
const SYSTEM_TICKS: usize = 12;
const THREADS: usize = 17;
const START_TICKS: usize = 19;
const RESIDENT_PAGES: usize = 21;

/// Prints the process' numbers.
#[derive(Debug)]
pub(super) struct Process {
    /// When the machine was started, in seconds since 1970: the beginning that starts of processes are counted from.
    booted_at: Option<u64>,
}

impl Process {
    pub(super) fn new() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let booted_at = stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok());
        Self { booted_at }
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let found = Stat::parse(&stat);
        let gauges = [
            (
                "process_resident_memory_bytes",
                "Memory that the process holds",
                found.resident_pages.map(|pages| pages.saturating_mul(bytes_per_page())),
            ),
            ("process_threads", "Threads of the process", found.threads),
            ("process_open_fds", "Open files and sockets", open_files()),
            ("process_max_fds", "Open files and sockets that the process may have", open_files_limit()),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let gauge = ConstGauge::new(value);
                gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
            }
        }
        if let (Some(booted_at), Some(ticks)) = (self.booted_at, found.start_ticks) {
            let gauge = ConstGauge::new(float(booted_at) + seconds(ticks));
            let help = "When the process was started, in seconds since 1970";
            let kind = gauge.metric_type();
            gauge.encode(encoder.encode_descriptor("process_start_time_seconds", help, None, kind)?)?;
        }
        if let Some(ticks) = found.cpu_ticks {
            let counter = ConstCounter::new(seconds(ticks));
            let help = "CPU time that the process has used";
            let kind = counter.metric_type();
            counter.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, kind)?)?;
        }
        Ok(())
    }
}

/// What is used of `/proc/self/stat`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Stat {
    cpu_ticks: Option<u64>,
    threads: Option<u64>,
    start_ticks: Option<u64>,
    resident_pages: Option<u64>,
}

impl Stat {
    fn parse(text: &str) -> Self {
        let Some((_, rest)) = text.rsplit_once(") ") else {
            return Self::default();
        };
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        Self {
            cpu_ticks: number(USER_TICKS)
                .zip(number(SYSTEM_TICKS))
                .map(|(user, sys)| user.saturating_add(sys)),
            threads: number(THREADS),
            start_ticks: number(START_TICKS),
            resident_pages: number(RESIDENT_PAGES),
        }
    }
}

fn bytes_per_page() -> u64 {
    u64::try_from(page_size()).unwrap_or(4096)
}

fn open_files() -> Option<u64> {
    // Less the one that is looked through.
    u64::try_from(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1)).ok()
}

fn open_files_limit() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

fn seconds(ticks: u64) -> f64 {
    float(ticks) / float(clock_ticks_per_second().max(1))
}

/// Exact up to 2^53, as all numbers of Prometheus.
#[allow(clippy::as_conversions, clippy::cast_precision_loss, reason = "metrics are floating-point numbers")]
fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_blanks_and_parentheses_moves_no_field() {
        let text =
            "42 (a) b) S 1 2 3 4 5 6 7 8 9 10 700 50 0 0 20 0 9 0 123456 1000000 512 18446744073709551615 1";
        let expected = Stat {
            cpu_ticks: Some(750),
            threads: Some(9),
            start_ticks: Some(123_456),
            resident_pages: Some(512),
        };
        assert_eq!(Stat::parse(text), expected);
        assert_eq!(Stat::parse(""), Stat::default());
        assert_eq!(Stat::parse("42 (keyward) S 1"), Stat::default());
    }

    #[test]
    fn this_process_has_memory_threads_and_files() {
        let found = Stat::parse(&fs::read_to_string("/proc/self/stat").unwrap());
        assert!(found.threads.unwrap() > 0 && found.resident_pages.unwrap() > 0);
        assert!(open_files().unwrap() > 0);
        assert!(Process::new().booted_at.unwrap() > 1_000_000_000);
    }
}

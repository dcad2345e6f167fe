//! Counters and a histogram that threads do not fight over: each adds to a stripe of its own, and who reads adds the
//! stripes up. What every check counts is counted here; one number for all would travel between the cores' caches, and a
//! histogram behind a lock would let them wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// More threads than that share stripes.
const STRIPES: usize = 8;

/// Bounds that a histogram may have at most.
const MAX_BOUNDS: usize = 23;

/// Two cache lines: processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line<T>(T);

fn stripe() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: usize = NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES;
    }
    // Threads that are ending count where the first one does.
    OWN.try_with(|own| *own).unwrap_or_default()
}

/// A number that only grows. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct StripedCounter(Arc<[Line<AtomicU64>; STRIPES]>);

impl StripedCounter {
    /// One more.
    pub(super) fn inc(&self) {
        if let Some(Line(count)) = self.0.get(stripe()) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The number.
    pub(super) fn get(&self) -> u64 {
        self.0.iter().map(|Line(count)| count.load(Ordering::Relaxed)).fold(0, u64::wrapping_add)
    }
}

impl TypedMetric for StripedCounter {
    const TYPE: MetricType = MetricType::Counter;
}

impl EncodeMetric for StripedCounter {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.encode_counter::<NoLabelSet, _, u64>(&self.get(), None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// Durations by their length. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct StripedHistogram(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Upper bounds of all buckets but the last one: nanoseconds, and seconds as they are shown.
    bounds: Vec<(u64, f64)>,
    stripes: [Line<Stripe>; STRIPES],
}

#[derive(Debug, Default)]
struct Stripe {
    counts: [AtomicU64; MAX_BOUNDS + 1],
    nanoseconds: AtomicU64,
}

impl StripedHistogram {
    /// With upper bounds in seconds, from small to large; those over the limit are left out.
    pub(super) fn new(bounds: impl IntoIterator<Item = f64>) -> Self {
        let nanoseconds = |seconds: f64| as_nanoseconds(Duration::from_secs_f64(seconds));
        let bounds = bounds.into_iter().take(MAX_BOUNDS).map(|bound| (nanoseconds(bound), bound)).collect();
        Self(Arc::new(Inner { bounds, stripes: Default::default() }))
    }

    /// Adds one duration.
    pub(super) fn observe(&self, duration: Duration) {
        let Inner { bounds, stripes } = &*self.0;
        let taken = as_nanoseconds(duration);
        let bucket = bounds.iter().position(|(bound, _)| taken <= *bound).unwrap_or(bounds.len());
        let Some(Line(stripe)) = stripes.get(stripe()) else { return };
        if let Some(count) = stripe.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        stripe.nanoseconds.fetch_add(taken, Ordering::Relaxed);
    }
}

impl TypedMetric for StripedHistogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for StripedHistogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Inner { bounds, stripes } = &*self.0;
        let added = |number: &dyn Fn(&Stripe) -> u64| {
            stripes.iter().map(|Line(stripe)| number(stripe)).fold(0, u64::wrapping_add)
        };
        let in_bucket = |bucket: usize| {
            added(&|stripe| stripe.counts.get(bucket).map_or(0, |count| count.load(Ordering::Relaxed)))
        };
        let shown = bounds.iter().map(|(_, bound)| *bound).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> =
            shown.enumerate().map(|(bucket, bound)| (bound, in_bucket(bucket))).collect();
        let count = buckets.iter().map(|(_, count)| *count).fold(0, u64::wrapping_add);
        let sum = Duration::from_nanos(added(&|stripe| stripe.nanoseconds.load(Ordering::Relaxed)));
        encoder.encode_histogram::<NoLabelSet>(sum.as_secs_f64(), count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

fn as_nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    /// More threads than stripes.
    fn from_threads(work: impl Fn() + Sync) {
        std::thread::scope(|scope| {
            for _ in 0..=STRIPES * 2 {
                scope.spawn(|| (0..100).for_each(|_| work()));
            }
        });
    }

    fn text(register: impl FnOnce(&mut Registry)) -> String {
        let (mut registry, mut text) = (Registry::default(), String::new());
        register(&mut registry);
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        let (counter, histogram) = (StripedCounter::default(), StripedHistogram::new([0.001, 0.1]));
        from_threads(|| {
            counter.inc();
            histogram.observe(Duration::from_millis(50));
        });
        assert_eq!(counter.get(), 1700);
        let text = text(|registry| {
            registry.register("c", "c", counter);
            registry.register("h", "h", histogram);
        });
        assert!(text.contains("c_total 1700\n"), "{text}");
        assert!(text.contains("h_count 1700\n") && text.contains("h_sum 85.0\n"), "{text}");
    }

    #[test]
    fn a_bound_belongs_to_its_bucket_and_what_is_above_all_is_in_the_last() {
        let histogram = StripedHistogram::new([0.001, 0.1]);
        for microseconds in [0, 1000, 1001, 100_000, 100_001, 5_000_000] {
            histogram.observe(Duration::from_micros(microseconds));
        }
        let text = text(|registry| registry.register("h", "h", histogram));
        for line in ["h_bucket{le=\"0.001\"} 2", "h_bucket{le=\"0.1\"} 4", "h_bucket{le=\"+Inf\"} 6"] {
            assert!(text.contains(&format!("{line}\n")), "{line}: {text}");
        }
    }
}

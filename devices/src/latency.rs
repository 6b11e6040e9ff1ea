//! How long something took, by powers of two.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How many classes there are.
pub const CLASSES: usize = 16;
/// Class 0 is up to 2^10 ns, about a microsecond.
const FIRST: u32 = 10;

/// What a class holds at most, in nanoseconds; `None` for the last, which holds the rest.
#[must_use]
pub const fn bound_ns(class: usize) -> Option<u64> {
    match class {
        _ if class + 1 < CLASSES => Some(1 << (class + FIRST as usize)),
        _ => None,
    }
}

/// Durations, as they are counted. One thread writes, any may read.
#[derive(Debug, Default)]
pub(crate) struct Latency {
    total_ns: AtomicU64,
    classes: [AtomicU64; CLASSES],
}

/// How many of a kind of event took how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    /// Nanoseconds of all together.
    pub total_ns: u64,
    /// Events, by class ([`bound_ns`]).
    pub classes: [u64; CLASSES],
}

impl Latency {
    pub(crate) fn add(&self, time: Duration) {
        // Centuries fit into 64 bits.
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.total_ns.fetch_add(ns, Ordering::Relaxed);
        let bits = u64::BITS - ns.saturating_sub(1).leading_zeros();
        let class = usize::try_from(bits.saturating_sub(FIRST)).unwrap_or(CLASSES);
        if let Some(count) = self.classes.get(class.min(CLASSES - 1)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn read(&self) -> Latencies {
        Latencies {
            total_ns: self.total_ns.load(Ordering::Relaxed),
            classes: self.classes.each_ref().map(|c| c.load(Ordering::Relaxed)),
        }
    }
}

impl Latencies {
    /// How many events there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.classes.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_what_is_above_the_one_before_and_not_above_its_bound() {
        let latency = Latency::default();
        for ns in [
            0,
            1,
            1024,
            1025,
            2048,
            2049,
            1 << 24,
            (1 << 24) + 1,
            u64::MAX >> 1,
        ] {
            latency.add(Duration::from_nanos(ns));
        }
        let mut expected = [0; CLASSES];
        (expected[0], expected[1], expected[2]) = (3, 2, 1);
        (expected[14], expected[15]) = (1, 2);
        assert_eq!(latency.read().classes, expected);
        assert_eq!(latency.read().count(), 9);
        assert_eq!(
            (bound_ns(0), bound_ns(14), bound_ns(15)),
            (Some(1024), Some(1 << 24), None)
        );
    }
}

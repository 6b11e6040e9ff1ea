//! A bound on how often a guest or a peer can make the VMM write a log line.

use std::time::{Duration, Instant};

/// Lets one line pass in each interval and counts the others.
#[derive(Debug)]
pub struct RateLimit {
    interval: Duration,
    last: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// A limit of one line an `interval`.
    #[must_use]
    pub const fn new(interval: Duration) -> Self {
        Self {
            interval,
            last: None,
            suppressed: 0,
        }
    }

    /// `Some` where a line may be written at `now`, with the number of lines that were not since the last one.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        if let Some(last) = self.last
            && now.saturating_duration_since(last) < self.interval
        {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_passes_in_each_interval_and_tells_how_many_did_not() {
        let start = Instant::now();
        let mut limit = RateLimit::new(Duration::from_secs(1));
        assert_eq!(limit.allow(start), Some(0));
        for ms in [1, 500, 999] {
            assert_eq!(limit.allow(start + Duration::from_millis(ms)), None);
        }
        assert_eq!(limit.allow(start + Duration::from_millis(1000)), Some(3));
        assert_eq!(limit.allow(start + Duration::from_millis(2001)), Some(0));
    }
}

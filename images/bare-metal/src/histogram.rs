//! Latencies: a log-linear histogram that needs no allocation, exact to 1/64.

const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
/// Values up to 2^40 ticks: minutes.
const BUCKETS: usize = SUB * (40 - SUB_BITS as usize + 1);

/// Counts of values.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: [u32; BUCKETS],
    total: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: [0; BUCKETS],
            total: 0,
            max: 0,
        }
    }
}

impl Histogram {
    /// Adds a value.
    #[inline]
    pub fn add(&mut self, value: u64) {
        if let Some(count) = self.counts.get_mut(bucket(value)) {
            *count = count.saturating_add(1);
        }
        self.total += 1;
        self.max = self.max.max(value);
    }

    /// How many values were added.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The largest value.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that `per_mille` of 1000 values do not exceed, to the upper edge of its bucket; 0 where there is none.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> u64 {
        let wanted = (self.total * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if seen >= wanted {
                return upper_edge(index).min(self.max);
            }
        }
        self.max
    }
}

fn bucket(value: u64) -> usize {
    let shift = (u64::BITS - value.leading_zeros()).saturating_sub(SUB_BITS + 1);
    // The shifted value has seven bits.
    let index = (shift as usize) * SUB + usize::try_from(value >> shift).unwrap_or(0);
    index.min(BUCKETS - 1)
}

fn upper_edge(index: usize) -> u64 {
    let shift = (index / SUB).saturating_sub(1);
    let sub = index - shift * SUB;
    ((sub as u64 + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_within_a_64th_of_its_buckets_edge() {
        for value in (0..100_000).chain((17..39).map(|bit| 1 << bit)) {
            let edge = upper_edge(bucket(value));
            assert!(
                edge >= value && edge - value <= value / 64,
                "{value} -> {edge}"
            );
        }
    }

    #[test]
    fn quantiles_of_a_known_distribution() {
        let mut histogram = Histogram::default();
        for value in 1..=1000 {
            histogram.add(value);
        }
        let close = |got: u64, want: u64| got >= want && got <= want + want / 64 + 1;
        assert!(close(histogram.quantile(500), 500));
        assert!(close(histogram.quantile(990), 990));
        assert_eq!(histogram.quantile(1000), 1000);
        assert_eq!(histogram.max(), 1000);
    }

    #[test]
    fn huge_values_do_not_panic() {
        let mut histogram = Histogram::default();
        histogram.add(u64::MAX);
        assert_eq!(histogram.max(), u64::MAX);
        assert_eq!(histogram.count(), 1);
    }
}

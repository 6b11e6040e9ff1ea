//! Median and spread.

use serde::Serialize;

/// The median; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some((sorted.get(middle.checked_sub(1)?)? + upper) / 2.0)
}

/// Four decimals (seven for what is below 0.1): more than a measurement is good for, and short enough to read.
pub fn round(value: f64) -> f64 {
    let scale = if value.abs() < 0.1 { 1e7 } else { 1e4 };
    (value * scale).round() / scale
}

/// A figure with its spread, and every sample in the order in which they were taken.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// All of them.
    pub samples: Vec<f64>,
}

impl Spread {
    /// `None` of nothing.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let samples: Vec<f64> = values.into_iter().map(round).collect();
        Some(Self {
            median: round(median(&samples)?),
            min: samples.iter().copied().reduce(f64::min)?,
            max: samples.iter().copied().reduce(f64::max)?,
            samples,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_halfway_between_the_two() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn a_spread_keeps_the_samples_in_order() {
        let spread = Spread::of([2.0, 1.0, 4.00004]).unwrap();
        assert_eq!(spread.samples, [2.0, 1.0, 4.0]);
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 1.0, 4.0));
        assert_eq!(Spread::of([]), None);
    }
}

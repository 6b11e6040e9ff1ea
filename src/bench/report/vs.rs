//! The part about a second pair of VMs.

use serde::Serialize;

use super::{Entry, Report, entries, speed, turns};
use crate::bench::Setup;
use crate::bench::pairs::Measured;
use crate::bench::plan::Case;
use crate::bench::probe::Distance;
use crate::bench::stats::Spread;
use crate::cli::Direction;
use crate::cli::frames::Size;

/// What was measured with other flags, in turn with the rest.
#[derive(Debug, Serialize)]
pub struct Vs {
    /// The flags.
    pub flags: String,
    /// Its figures.
    pub results: Vec<Entry>,
    /// One entry a case and distance.
    pub ratios: Vec<VsRatio>,
}

/// The first pair beside the second.
#[derive(Clone, Debug, Serialize)]
pub struct VsRatio {
    pub direction: Direction,
    pub frame_size: Size,
    pub batch: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_percent: Option<u8>,
    pub distance: Distance,
    /// Rate without the other flags to the rate with them (round trip: p50 with to without): above 1 the first is the faster.
    pub speed: Spread,
}

impl Report {
    /// With what was measured of a second pair, which was booted with these flags.
    pub fn with_vs(
        mut self,
        flags: &str,
        setup: &Setup,
        first: &[Measured],
        second: &[Measured],
    ) -> Self {
        self.vs = Some(Vs {
            flags: flags.to_owned(),
            results: second.iter().flat_map(|it| entries(setup, it)).collect(),
            ratios: ratios(first, second),
        });
        self
    }
}

/// Round by round. A round counts where the cores were as far apart for both.
fn ratios(first: &[Measured], second: &[Measured]) -> Vec<VsRatio> {
    let of = |case: &Case| (case.direction, case.size, case.batch, case.load);
    let mut all = Vec::new();
    for one in first {
        let Some(other) = second.iter().find(|other| of(&other.case) == of(&one.case)) else {
            continue;
        };
        let turns = turns(one, other);
        for distance in [Distance::Near, Distance::Far] {
            let here = turns.iter().filter(|(pair, _)| pair.distance() == distance);
            let ratio = Spread::of(here.filter_map(|(one, other)| speed(one, other)));
            all.extend(ratio.map(|speed| VsRatio {
                direction: one.case.direction,
                frame_size: one.case.size,
                batch: one.case.batch,
                load_percent: one.case.load,
                distance,
                speed,
            }));
        }
    }
    all
}

#[cfg(test)]
mod tests;

//! The part about what the guests do with frames.

use serde::Serialize;

use super::{speed, turns};
use crate::bench::pairs::Measured;
use crate::bench::plan::Case;
use crate::bench::probe::Distance;
use crate::bench::stats::Spread;
use crate::cli::frames::{How, Size};
use crate::cli::iommu::Iommu;
use crate::cli::rings::Ring;
use crate::cli::{Direction, Path};

/// What the guests do, beside what was asked for first.
#[derive(Clone, Debug, Serialize)]
pub struct VariantEntry {
    pub direction: Direction,
    pub path: Path,
    #[serde(flatten)]
    pub ring: Ring,
    pub iommu: Iommu,
    pub frame_size: Size,
    pub batch: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_percent: Option<u8>,
    #[serde(flatten)]
    pub how: How,
    over: How,
    pub distance: Distance,
    /// Its rate to that of the first (round trip: p50 of the first to its own).
    pub speed: Spread,
}

/// Each case beside the first that differs in what the guests do only, round by round. A round counts where the cores were as far apart for both.
pub fn entries(measured: &[Measured]) -> Vec<VariantEntry> {
    let mut entries = Vec::new();
    for one in measured {
        let case = one.case;
        let same = |it: &&Measured| {
            let how = it.case.how;
            it.case == Case { how, ..case }
        };
        let Some(first) = measured.iter().find(same).filter(|it| it.case != case) else {
            continue;
        };
        let turns = turns(one, first);
        for distance in [Distance::Near, Distance::Far] {
            let here = turns.iter().filter(|(pair, _)| pair.distance() == distance);
            let speed = Spread::of(here.filter_map(|(pair, first)| speed(pair, first)));
            entries.extend(speed.map(|speed| VariantEntry {
                direction: case.direction,
                path: case.path,
                ring: case.ring,
                iommu: case.iommu,
                frame_size: case.size,
                batch: case.batch,
                load_percent: case.load,
                how: case.how,
                over: first.case.how,
                distance,
                speed,
            }));
        }
    }
    entries
}

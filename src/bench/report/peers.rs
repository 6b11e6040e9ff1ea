//! The part about peers.

use serde::Serialize;

use super::{Dropped, Report};
use crate::bench::pairs::{LEAST_SHARE, Measured, moved};
use crate::bench::peers::{PeerCase, PeerMeasured, PeerRound};
use crate::bench::probe::Distance;
use crate::bench::stats::{Spread, median, round};
use crate::cli::bench::PeerName;
use crate::cli::frames::How;
use crate::cli::iommu::Iommu;
use crate::cli::rings::Ring;
use crate::cli::{Direction, Path};

/// One figure of a peer; the keys are those of a figure of the VMs, as far as they mean something. Nobody checks a peer's frames.
#[derive(Clone, Debug, Serialize)]
pub struct PeerEntry {
    pub name: PeerName,
    pub direction: Direction,
    pub frame_size: u32,
    pub batch: u16,
    /// What it does with frames.
    #[serde(flatten)]
    pub how: How,
    queue_pairs: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_size: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance: Option<Distance>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probe_ns: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mpps: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbps: Option<Spread>,
    frames: u64,
    dropped_samples: Dropped,
    /// What each end had to have of its core for a sample to count; absent where they have to share.
    #[serde(skip_serializing_if = "Option::is_none")]
    least_core_share: Option<f64>,
    /// Of all processes together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_ns_per_frame: Option<Spread>,
    /// How its processes were called, the relay first where there is one, then the back-end.
    command: Vec<String>,
    /// What each was told on its standard input.
    input: Vec<Vec<String>>,
}

/// The window beside a peer.
#[derive(Clone, Debug, Serialize)]
pub struct ToPeerEntry {
    pub name: PeerName,
    pub direction: Direction,
    #[serde(flatten)]
    pub ring: Ring,
    pub iommu: Iommu,
    pub frame_size: u32,
    pub batch: u16,
    /// What the guests do with frames.
    #[serde(flatten)]
    pub how: How,
    pub distance: Distance,
    /// Rate through the window to the peer's.
    pub speed: Spread,
}

impl Report {
    /// With what was measured of peers, and the guests beside them.
    pub fn with_peers(mut self, measured: &[Measured], peers: &[PeerMeasured]) -> Self {
        self.peers = peers.iter().flat_map(entries).collect();
        self.to_peers = peers
            .iter()
            .flat_map(|peer| to_peer(measured, peer))
            .collect();
        self
    }
}

/// An entry a distance; the dropped samples stand in the first.
fn entries(peer: &PeerMeasured) -> Vec<PeerEntry> {
    let mut entries: Vec<PeerEntry> = [Distance::Near, Distance::Far]
        .into_iter()
        .filter_map(|distance| {
            let here = |round: &&PeerRound| round.distance() == distance;
            let rounds: Vec<&PeerRound> = peer.rounds.iter().filter(here).collect();
            (!rounds.is_empty()).then(|| entry(peer, Some(distance), &rounds))
        })
        .collect();
    if entries.is_empty() {
        entries.push(entry(peer, None, &[]));
    }
    if let Some(first) = entries.first_mut() {
        first.dropped_samples = Dropped {
            cores_moved: peer.moved,
            core_not_had: peer.disturbed,
        };
    }
    entries
}

fn entry(peer: &PeerMeasured, distance: Option<Distance>, rounds: &[&PeerRound]) -> PeerEntry {
    let PeerCase { way, size, batch } = peer.case;
    let bits = f64::from(size) * 8.0;
    let rates = || rounds.iter().map(|round| round.sample.mpps);
    let probes: Vec<f64> = rounds.iter().map(|round| round.probe_ns).collect();
    let shared = rounds.first().map(|round| round.sample.shares.is_none());
    let cpu = rounds.iter().filter(|round| round.sample.mpps > 0.0);
    PeerEntry {
        name: peer.name,
        direction: way.direction(),
        frame_size: size,
        batch,
        how: peer.how,
        queue_pairs: 1,
        queue_size: peer.ring,
        distance,
        probe_ns: median(&probes).map(round),
        mpps: Spread::of(rates()),
        gbps: Spread::of(rates().map(|mpps| mpps * bits / 1000.0)),
        frames: rounds.iter().map(|round| round.sample.frames).sum(),
        dropped_samples: Dropped {
            cores_moved: 0,
            core_not_had: 0,
        },
        least_core_share: shared.is_none_or(|shared| !shared).then_some(LEAST_SHARE),
        cpu_ns_per_frame: Spread::of(
            cpu.map(|round| round.sample.busy_cores * 1000.0 / round.sample.mpps),
        ),
        command: peer.commands.clone(),
        input: peer.inputs.clone(),
    }
}

/// Each case of the window beside the peer, round by round. A round counts where the cores were as far apart for both.
fn to_peer(measured: &[Measured], peer: &PeerMeasured) -> Vec<ToPeerEntry> {
    let mut entries = Vec::new();
    let same =
        |it: &&Measured| it.case.path == Path::Window && PeerCase::of(&it.case) == Some(peer.case);
    for window in measured.iter().filter(same) {
        let case = window.case;
        for distance in [Distance::Near, Distance::Far] {
            let here = window.pairs.iter().filter(|it| it.distance() == distance);
            let speed = here.filter_map(|pair| {
                let mut rounds = peer.rounds.iter();
                let other = rounds.find(|other| other.round == pair.round)?;
                let rate = other.sample.mpps;
                (rate > 0.0 && !moved(&[pair.probe_ns, other.probe_ns]))
                    .then(|| pair.vm.result.mpps / rate)
            });
            entries.extend(Spread::of(speed).map(|speed| ToPeerEntry {
                name: peer.name,
                direction: case.direction,
                ring: case.ring,
                iommu: case.iommu,
                frame_size: peer.case.size,
                batch: case.batch,
                how: case.how,
                distance,
                speed,
            }));
        }
    }
    entries
}

#[cfg(test)]
mod tests;

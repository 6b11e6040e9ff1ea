use super::*;
use crate::bench::pairs::{Measured, measure};
use crate::bench::record::SampleResult;
use crate::cli::frames::How;
use crate::cli::rings::{Layout, Ring};
use crate::cli::{Direction, Path};

/// A case of the guests.
pub fn case(direction: Direction) -> Case {
    Case {
        ring: Ring {
            layout: Layout::Packed,
            in_order: true,
            size: 256,
        },
        iommu: crate::cli::iommu::Iommu::Off,
        path: Path::Window,
        direction,
        size: Size::Bytes(64),
        batch: 32,
        how: How::USUAL,
        load: None,
    }
}

/// Guests that are never disturbed.
#[derive(Default)]
struct Quiet {
    probes: usize,
    far_from: usize,
}

impl Lab for Quiet {
    fn probe(&mut self) -> Result<f64> {
        self.probes += 1;
        Ok(if self.far_from > 0 && self.probes >= self.far_from {
            400.0
        } else {
            100.0
        })
    }

    fn guests(&mut self, _: &Case) -> Result<VmSample> {
        let result = SampleResult {
            mpps: 80.0,
            timed: true,
            ..SampleResult::default()
        };
        Ok(VmSample {
            result,
            ..VmSample::default()
        })
    }

    fn bound(&mut self, case: &Case) -> Result<BoundSample> {
        Ok(BoundSample {
            result: self.guests(case)?.result,
            ..BoundSample::default()
        })
    }
}

/// A peer that plays back shares, and makes 10 Mpps the first time, 20 the next, ….
struct Played {
    name: PeerName,
    shares: Vec<f64>,
    turn: usize,
}

impl Rival for Played {
    fn name(&self) -> PeerName {
        self.name
    }

    fn how(&self) -> How {
        self.name.how()
    }

    fn ring(&self) -> Option<u16> {
        Some(256)
    }

    fn sample(&mut self, _: &PeerCase) -> Result<PeerSample> {
        let share = self.shares.get(self.turn).copied().unwrap_or(1.0);
        self.turn += 1;
        Ok(PeerSample {
            mpps: 10.0 * self.turn as f64,
            frames: 1000,
            shares: Some([1.0, share]),
            busy_cores: 1.0 + share,
            timed: true,
        })
    }

    fn commands(&self) -> Vec<String> {
        ["a", "b"].map(str::to_owned).to_vec()
    }

    fn inputs(&self, _: &PeerCase) -> Vec<Vec<String>> {
        vec![vec!["start".to_owned()], vec![]]
    }
}

/// Measures three samples of a case beside two peers, the second with these shares.
pub fn played(direction: Direction, shares: &[f64]) -> (Vec<Measured>, Vec<PeerMeasured>) {
    run(&mut Quiet::default(), direction, shares)
}

fn run(
    lab: &mut Quiet,
    direction: Direction,
    shares: &[f64],
) -> (Vec<Measured>, Vec<PeerMeasured>) {
    let rival = |name, shares: &[f64]| -> Box<dyn Rival> {
        Box::new(Played {
            name,
            shares: shares.to_vec(),
            turn: 0,
        })
    };
    let mut peers = Peers {
        running: vec![
            rival(PeerName::DpdkVhost, &[]),
            rival(PeerName::Memif, shares),
        ],
        measured: Vec::new(),
    };
    let mut with = WithPeers {
        lab,
        peers: &mut peers,
    };
    let cases = [case(direction)];
    let measured = measure(&mut with, &cases, 3, &mut || true, &mut |_| ()).unwrap();
    (measured, peers.finish())
}

#[test]
fn each_peer_is_sampled_once_a_round_behind_the_guests() {
    let mut lab = Quiet::default();
    let (guests, peers) = run(&mut lab, Direction::BeToFe, &[]);
    assert_eq!((guests[0].pairs.len(), peers.len()), (3, 2));
    for peer in peers {
        let rounds: Vec<usize> = peer.rounds.iter().map(|it| it.round).collect();
        assert_eq!(rounds, [0, 1, 2]);
        assert_eq!(peer.case.way, Way::BeToFe);
    }
    let (_, peers) = run(&mut Quiet::default(), Direction::Echo, &[]);
    assert_eq!(peers[0].case.way, Way::Echo);
    // Three for a pair of the guests, and one before and one behind each peer.
    assert_eq!(lab.probes, 3 * (3 + 2 + 2));
}

#[test]
fn a_round_with_a_disturbed_peer_is_repeated_for_all() {
    let (guests, peers) = played(Direction::FeToBe, &[1.0, 0.5]);
    assert_eq!(guests[0].pairs.len(), 4);
    assert_eq!((peers[0].rounds.len(), peers[0].disturbed), (4, 0));
    assert_eq!((peers[1].rounds.len(), peers[1].disturbed), (3, 1));
    let rounds: Vec<usize> = peers[1].rounds.iter().map(|it| it.round).collect();
    assert_eq!(rounds, [0, 2, 3]);
    // And not for ever.
    let (guests, peers) = played(Direction::FeToBe, &[0.5; 100]);
    assert_eq!(guests[0].pairs.len(), 9);
    assert_eq!((peers[1].rounds.len(), peers[1].disturbed), (0, 9));
}

#[test]
fn a_peer_s_sample_during_which_the_cores_moved_does_not_count() {
    // The probe behind the first peer's first sample.
    let mut lab = Quiet {
        far_from: 5,
        ..Quiet::default()
    };
    let (_, peers) = run(&mut lab, Direction::BeToFe, &[]);
    assert_eq!(peers[0].moved, 1);
    assert!(peers[0].rounds.iter().all(|it| it.round > 0));
    assert!(
        peers[1]
            .rounds
            .iter()
            .all(|it| it.distance() == Distance::Far)
    );
}

#[test]
fn what_goes_both_ways_has_no_peer() {
    for direction in [Direction::Both, Direction::RoundTrip, Direction::Idle] {
        let mut lab = Quiet::default();
        let (guests, peers) = run(&mut lab, direction, &[]);
        assert!(peers.is_empty());
        assert_eq!((guests[0].pairs.len(), lab.probes), (3, 9));
    }
}

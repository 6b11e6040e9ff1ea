//! Peers: other ways to exchange frames, on the same two cores, sampled in turn with the guests.

use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use vmm::HugePages;

use super::Setup;
use super::pairs::{BoundSample, Lab, VmSample, had_not_its_core, moved};
use super::plan::{Case, Way};
use super::probe::Distance;
use super::relayed::Relayed;
use super::stats::median;
use super::testpmd::{Config, Pair, Programs};
use super::veth::Veth;
use crate::cli::bench::{BenchArgs, PeerName};
use crate::cli::frames::{How, Size};
use crate::sys::Signals;

/// What a peer is measured with: all of a [`Case`] that means something to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCase {
    /// Which way frames go.
    pub way: Way,
    /// Bytes of a frame, without FCS.
    pub size: u32,
    /// Frames a burst.
    pub batch: u16,
}

impl PeerCase {
    /// `None` where frames go both ways, or are of several lengths: no peer can do that.
    pub fn of(case: &Case) -> Option<Self> {
        let Size::Bytes(size) = case.size else {
            return None;
        };
        Some(Self {
            way: Way::of(case.direction)?,
            size,
            batch: case.batch,
        })
    }
}

/// One sample of a peer.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerSample {
    /// Million frames received in a second.
    pub mpps: f64,
    /// Frames received.
    pub frames: u64,
    /// How much of its core each end had, back-end first, where each should have all of it.
    pub shares: Option<[f64; 2]>,
    /// How many cores all of it kept busy.
    pub busy_cores: f64,
    /// Whether something was timed.
    pub timed: bool,
}

/// A peer that runs; the tests have one of their own.
pub trait Rival {
    /// Which.
    fn name(&self) -> PeerName;
    /// What it does with frames.
    fn how(&self) -> How;
    /// Entries of its rings, where it has some.
    fn ring(&self) -> Option<u16>;
    /// One sample.
    fn sample(&mut self, case: &PeerCase) -> Result<PeerSample>;
    /// How its processes were called, back-end first.
    fn commands(&self) -> Vec<String>;
    /// What each is told for a case.
    fn inputs(&self, case: &PeerCase) -> Vec<Vec<String>>;
}

/// A sample that counts.
#[derive(Clone, Copy, Debug)]
pub struct PeerRound {
    /// What was measured.
    pub sample: PeerSample,
    /// Median of the probes before and behind it, in ns.
    pub probe_ns: f64,
    /// In which turn of its group: it belongs to the guests' pairs with the same number.
    pub round: usize,
}

impl PeerRound {
    /// How far apart the cores were.
    pub fn distance(&self) -> Distance {
        Distance::of(self.probe_ns)
    }
}

/// Everything about one case of a peer.
#[derive(Clone, Debug)]
pub struct PeerMeasured {
    /// Which peer.
    pub name: PeerName,
    /// What it does with frames.
    pub how: How,
    /// Entries of its rings, where it has some.
    pub ring: Option<u16>,
    /// Which case.
    pub case: PeerCase,
    /// How its processes were called.
    pub commands: Vec<String>,
    /// What they were told.
    pub inputs: Vec<Vec<String>>,
    /// The samples that count.
    pub rounds: Vec<PeerRound>,
    /// Samples in which the cores moved.
    pub moved: usize,
    /// Samples in which an end did not get its core, or nothing was timed.
    pub disturbed: usize,
}

/// The peers of a run, and what was measured of them.
#[derive(Default)]
pub struct Peers {
    running: Vec<Box<dyn Rival>>,
    measured: Vec<PeerMeasured>,
}

impl Peers {
    /// Starts those that were asked for.
    pub fn start(args: &BenchArgs, setup: Rc<Setup>, signals: &Rc<Signals>) -> Result<Self> {
        let mut peers = Self::default();
        let names = args.peer_list()?;
        let config = Config {
            cores: setup.cores,
            ring: args.peer_ring,
            // Memory of the guests' kind.
            huge: setup.memory.hugepages != HugePages::Off,
            length: Duration::from_millis(setup.ms),
            warmup: Duration::from_millis(setup.warmup_ms),
        };
        for (index, &name) in names.iter().enumerate() {
            if names[..index].contains(&name) {
                continue;
            }
            let rival: Box<dyn Rival> = match name {
                PeerName::DpdkVhost
                | PeerName::DpdkSwitch
                | PeerName::Memif
                | PeerName::MemifZc => {
                    let programs = Programs::find(std::env::var_os("PATH").as_deref())?;
                    Box::new(Pair::start(&programs, name, config, Some(signals))?)
                }
                PeerName::Relay => {
                    let rings = args.ring_list()?;
                    let ring = *rings.first().context("there are no rings")?;
                    let (setup, memory) = (Rc::clone(&setup), &args.both.memory);
                    Box::new(Relayed::start(setup, ring, memory, signals)?)
                }
                PeerName::Veth => Box::new(Veth::start(&setup, Some(signals))?),
            };
            peers.running.push(rival);
        }
        Ok(peers)
    }

    /// Ends them, and returns what was measured.
    pub fn finish(self) -> Vec<PeerMeasured> {
        self.measured
    }

    /// A sample of each, in turn.
    fn round(
        &mut self,
        probe: &mut dyn FnMut() -> Result<f64>,
        case: PeerCase,
        round: usize,
    ) -> Result<()> {
        for rival in &mut self.running {
            let first = probe()?;
            let sample = rival.sample(&case)?;
            let probes = [first, probe()?];
            let name = rival.name();
            let PeerSample { mpps, shares, .. } = sample;
            log::info!(
                "{name:?} {case:?}: {mpps:.2} Mpps, probes {probes:.0?} ns, shares {shares:.2?}"
            );
            let same = |it: &PeerMeasured| (it.name, it.case) == (name, case);
            let index = match self.measured.iter().position(same) {
                Some(index) => index,
                None => {
                    self.measured.push(PeerMeasured {
                        name,
                        how: rival.how(),
                        ring: rival.ring(),
                        case,
                        commands: rival.commands(),
                        inputs: rival.inputs(&case),
                        rounds: Vec::new(),
                        moved: 0,
                        disturbed: 0,
                    });
                    self.measured.len() - 1
                }
            };
            let measured = &mut self.measured[index];
            if moved(&probes) {
                measured.moved += 1;
            } else if !sample.timed || shares.into_iter().flatten().any(had_not_its_core) {
                measured.disturbed += 1;
            } else {
                measured.rounds.push(PeerRound {
                    sample,
                    probe_ns: median(&probes).unwrap_or_default(),
                    round,
                });
            }
        }
        Ok(())
    }

    fn all_good(&self, case: PeerCase, round: usize) -> bool {
        self.running.iter().all(|rival| {
            self.measured.iter().any(|it| {
                (it.name, it.case) == (rival.name(), case)
                    && it.rounds.iter().any(|it| it.round == round)
            })
        })
    }
}

/// The guests, and the peers beside them.
pub struct WithPeers<'a> {
    /// The guests.
    pub lab: &'a mut dyn Lab,
    /// The others.
    pub peers: &'a mut Peers,
}

impl Lab for WithPeers<'_> {
    fn probe(&mut self) -> Result<f64> {
        self.lab.probe()
    }

    fn guests(&mut self, case: &Case) -> Result<VmSample> {
        self.lab.guests(case)
    }

    fn bound(&mut self, case: &Case) -> Result<BoundSample> {
        self.lab.bound(case)
    }

    fn has_others(&self, case: &Case) -> bool {
        !self.peers.running.is_empty() && PeerCase::of(case).is_some()
    }

    fn others(&mut self, case: &Case, round: usize) -> Result<()> {
        let lab = &mut *self.lab;
        match PeerCase::of(case) {
            Some(case) => self.peers.round(&mut || lab.probe(), case, round),
            None => Ok(()),
        }
    }

    fn others_good(&self, case: &Case, round: usize) -> bool {
        PeerCase::of(case).is_none_or(|case| self.peers.all_good(case, round))
    }
}

#[cfg(test)]
pub mod tests;

//! `--vs`: a second pair of VMs, booted with other flags, sampled in turn with the first.

use std::rc::Rc;

use anyhow::Result;

use super::Setup;
use super::pairs::{BoundSample, Lab, Measured, VmSample};
use super::plan::Case;
use super::session::Sessions;
use crate::cli::bench::{BenchArgs, Kind};
use crate::sys::Signals;

/// The second pair, and what was measured of it.
pub struct Vs<L = Sessions> {
    lab: L,
    kind: Kind,
    measured: Vec<Measured>,
}

impl Vs {
    /// Boots it.
    pub fn start(
        args: &BenchArgs,
        setup: Setup,
        kind: Kind,
        signals: &Rc<Signals>,
    ) -> Result<Self> {
        Ok(Self {
            lab: Sessions::start(setup, &[kind], &args.both.memory, signals)?,
            kind,
            measured: Vec::new(),
        })
    }

    /// Lets its guests power off, and returns what was measured.
    pub fn finish(self) -> Result<Vec<Measured>> {
        self.lab.finish()?;
        Ok(self.measured)
    }
}

impl<L: Lab> Vs<L> {
    /// The same case for this pair.
    fn own(&self, case: &Case) -> Case {
        let Kind { ring, iommu, path } = self.kind;
        Case {
            ring,
            iommu,
            path,
            ..*case
        }
    }

    fn attempt(&mut self, case: &Case, round: usize) -> Result<()> {
        let case = self.own(case);
        let index = match self.measured.iter().position(|it| it.case == case) {
            Some(index) => index,
            None => {
                self.measured.push(Measured::new(case));
                self.measured.len() - 1
            }
        };
        self.measured[index].attempt(&mut self.lab, round)
    }

    fn good(&self, case: &Case, round: usize) -> bool {
        let case = self.own(case);
        self.measured
            .iter()
            .any(|it| it.case == case && it.pairs.iter().any(|pair| pair.round == round))
    }
}

/// A pair of VMs with what is sampled beside it, and the second pair beside both.
pub struct WithVs<'a, L = Sessions> {
    /// The first.
    pub lab: &'a mut dyn Lab,
    /// The second, if there is one.
    pub vs: Option<&'a mut Vs<L>>,
}

impl<L: Lab> Lab for WithVs<'_, L> {
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
        self.vs.is_some() || self.lab.has_others(case)
    }

    fn others(&mut self, case: &Case, round: usize) -> Result<()> {
        if let Some(vs) = &mut self.vs {
            vs.attempt(case, round)?;
        }
        self.lab.others(case, round)
    }

    fn others_good(&self, case: &Case, round: usize) -> bool {
        self.vs.as_ref().is_none_or(|vs| vs.good(case, round)) && self.lab.others_good(case, round)
    }
}

#[cfg(test)]
mod tests;

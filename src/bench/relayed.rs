//! The relay as a peer: two VMs with a network device each, and a process of the host that copies from ring to ring.

use std::rc::Rc;

use anyhow::{Result, ensure};

use super::Setup;
use super::pairs::Lab;
use super::peers::{PeerCase, PeerSample, Rival};
use super::plan::Case;
use super::session::Session;
use crate::cli::Path;
use crate::cli::bench::{Kind, PeerName};
use crate::cli::frames::{How, Size};
use crate::cli::iommu::Iommu;
use crate::cli::rings::Ring;
use crate::sys::Signals;

/// It and its VMs.
pub struct Relayed {
    session: Session,
    kind: Kind,
    how: How,
    ring: u16,
}

impl Relayed {
    /// Boots them.
    pub fn start(
        setup: Rc<Setup>,
        ring: Ring,
        memory: &str,
        signals: &Rc<Signals>,
    ) -> Result<Self> {
        let kind = Kind {
            ring,
            iommu: Iommu::Off,
            path: Path::Relay,
        };
        Ok(Self {
            kind,
            how: setup.how,
            ring: setup.rings.size,
            session: Session::start(setup, kind, memory, signals.clone())?,
        })
    }

    fn case(&self, case: &PeerCase) -> Case {
        let direction = case.way.direction();
        let Kind { ring, iommu, path } = self.kind;
        Case {
            ring,
            iommu,
            path,
            direction,
            size: Size::Bytes(case.size),
            batch: case.batch,
            how: self.how.in_direction(direction),
            load: None,
        }
    }
}

impl Rival for Relayed {
    fn name(&self) -> PeerName {
        PeerName::Relay
    }

    fn how(&self) -> How {
        self.how
    }

    fn ring(&self) -> Option<u16> {
        Some(self.ring)
    }

    fn sample(&mut self, case: &PeerCase) -> Result<PeerSample> {
        let case = self.case(case);
        let sample = self.session.guests(&case)?;
        let result = sample.result;
        ensure!(
            !result.faults.any(),
            "--peers relay: frames were lost or damaged ({:?})",
            result.faults
        );
        Ok(PeerSample {
            mpps: result.mpps,
            frames: result.frames,
            // Three share two cores: that is part of the figure.
            shares: None,
            busy_cores: sample.busy_cores,
            timed: result.timed,
        })
    }

    fn commands(&self) -> Vec<String> {
        self.session.commands().to_vec()
    }

    fn inputs(&self, case: &PeerCase) -> Vec<Vec<String>> {
        let case = self.case(case);
        [0, 1]
            .map(|side| vec![self.session.command(&case, side, None)])
            .to_vec()
    }
}

//! How far apart two cores are: one cache line, bounced between them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use crate::sys;

/// Round trips of a probe.
const ROUND_TRIPS: u32 = 1000;
/// Round trips between two looks at the clock, which itself takes a fraction of one.
const GROUP: u32 = 10;
/// Round trips before the first look, in which both threads arrive.
const WARM_UP: u32 = 100;
/// Below this, in ns, two cores are near.
const NEAR_NS: f64 = 250.0;

/// Whether the two cores share a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Distance {
    /// They do.
    Near,
    /// They do not.
    Far,
}

impl Distance {
    /// What a probe's result means.
    pub fn of(probe_ns: f64) -> Self {
        if probe_ns < NEAR_NS {
            Self::Near
        } else {
            Self::Far
        }
    }

    /// As it is in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
        }
    }
}

#[repr(align(128))]
struct Line(AtomicU32);

/// The median time of a round trip, in ns.
pub fn probe(cores: [usize; 2]) -> Result<f64> {
    let line = Line(AtomicU32::new(0));
    let pin =
        |core| sys::pin_to(core).with_context(|| format!("cannot pin a thread to core {core}"));
    // Odd values go there, even ones come back. A thread that cannot be pinned plays on, so that the other ends.
    thread::scope(|scope| {
        let there = scope.spawn(|| {
            let pinned = pin(cores[1]);
            for turn in 0..WARM_UP + ROUND_TRIPS {
                wait_for(&line.0, 2 * turn + 1);
                line.0.store(2 * turn + 2, Ordering::Release);
            }
            pinned
        });
        let here = scope.spawn(|| {
            let pinned = pin(cores[0]);
            let mut groups = Vec::with_capacity((ROUND_TRIPS / GROUP) as usize);
            let mut turn = 0;
            let mut bounce = |count: u32| {
                for _ in 0..count {
                    line.0.store(2 * turn + 1, Ordering::Release);
                    wait_for(&line.0, 2 * turn + 2);
                    turn += 1;
                }
            };
            bounce(WARM_UP);
            for _ in 0..ROUND_TRIPS / GROUP {
                let start = Instant::now();
                bounce(GROUP);
                groups.push(start.elapsed().as_nanos() as f64 / f64::from(GROUP));
            }
            pinned.map(|()| groups)
        });
        let lost = |_| anyhow!("a probe thread was lost");
        there.join().map_err(lost)??;
        let groups = here.join().map_err(lost)??;
        Ok(super::stats::median(&groups).unwrap_or_default())
    })
}

fn wait_for(line: &AtomicU32, value: u32) {
    while line.load(Ordering::Acquire) != value {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_of_two_cores_takes_time_and_ends() {
        let cores = sys::allowed_cores().unwrap();
        if let [a, b, ..] = cores[..] {
            let ns = probe([a, b]).unwrap();
            assert!(ns > 1.0 && ns.is_finite(), "{ns}");
        }
    }

    #[test]
    fn a_core_that_is_not_there_is_an_error_and_no_hang() {
        let first = sys::allowed_cores().unwrap()[0];
        assert!(probe([first, 100_000]).is_err());
    }

    #[test]
    fn the_border_lies_between_what_was_seen_near_and_far() {
        assert_eq!(Distance::of(110.0), Distance::Near);
        assert_eq!(Distance::of(410.0), Distance::Far);
    }
}

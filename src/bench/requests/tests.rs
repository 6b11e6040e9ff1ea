use std::cell::Cell;

use super::*;
use crate::cli::frames::How;
use vmm::{HugePages, MemoryConfig};

fn setup(size: u16) -> Option<Setup> {
    let [a, b, ..] = sys::allowed_cores().unwrap()[..] else {
        return None;
    };
    Some(Setup {
        back_iommu: false,
        ms: 3,
        warmup_ms: 1,
        how: How::USUAL,
        cores: [a, b],
        rings: RingSetup {
            size,
            ..RingSetup::default()
        },
        memory: MemoryConfig {
            size: 1 << 20,
            hugepages: HugePages::Off,
            prefault: false,
            dma: 0,
        },
        vms: crate::cli::vms::VmsArgs::default(),
    })
}

fn rings(layouts: &[Layout]) -> Vec<Ring> {
    let both = |&layout| {
        [false, true].map(|in_order| Ring {
            layout,
            in_order,
            size: 256,
        })
    };
    layouts.iter().flat_map(both).collect()
}

#[test]
fn every_ring_and_batch_has_a_time_on_one_core_and_between_two() {
    for (size, layouts) in [
        (64, &[Layout::Split, Layout::Packed][..]),
        (100, &[Layout::Packed]),
    ] {
        let Some(setup) = setup(size) else { return };
        for ring in rings(layouts) {
            let bed = Bed::new(&setup, &setup.rings.with(ring), ring.layout).unwrap();
            for place in [Where::SameCore, Where::CrossCore] {
                for batch in [1, 7, 64] {
                    let case = RequestCase { ring, batch, place };
                    // Twice: a ring starts anew in used memory. Losing a request is an error.
                    for _ in 0..2 {
                        let timed = bed.sample(&setup, &case).unwrap();
                        assert!(timed.ns > 0.1 && timed.ns.is_finite(), "{case:?} {timed:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_sample_in_which_nothing_came_back_does_not_count() {
    let (start, end) = (Watch::look(None).unwrap(), Watch::look(None).unwrap());
    assert!(had_not_its_core(timed(&start, &end, 0, false).share));
}

#[test]
fn a_batch_that_does_not_fit_is_an_error_and_no_hang() {
    let Some(setup) = setup(16) else { return };
    let ring = Ring {
        size: 16,
        ..rings(&[Layout::Split])[0]
    };
    let bed = Bed::new(&setup, &setup.rings.with(ring), ring.layout).unwrap();
    let case = RequestCase {
        ring,
        batch: 17,
        place: Where::CrossCore,
    };
    assert!(bed.sample(&setup, &case).is_err());
}

#[test]
fn a_core_that_is_not_there_is_an_error_and_no_hang() {
    let Some(mut setup) = setup(16) else { return };
    let ring = rings(&[Layout::Split])[0];
    let bed = Bed::new(&setup, &setup.rings.with(ring), ring.layout).unwrap();
    setup.cores[1] = 100_000;
    let case = RequestCase {
        ring,
        batch: 1,
        place: Where::CrossCore,
    };
    assert!(bed.sample(&setup, &case).is_err());
}

#[test]
fn a_ring_that_gives_back_nothing_is_an_error_and_one_that_gives_too_much_as_well() {
    /// Takes everything, and reports what it is told to.
    struct Odd(Cell<usize>);
    impl DriverRing for Odd {
        fn free(&self) -> u16 {
            8
        }
        fn add(&mut self, _: &[Buffer]) -> Option<u16> {
            Some(0)
        }
        fn add_indirect(&mut self, _: u64, _: &[Buffer]) -> Option<u16> {
            None
        }
        fn publish(&mut self) -> bool {
            false
        }
        fn take(&mut self, _: &mut [Used]) -> Result<usize, virtqueue::Error> {
            self.take_each(0, |_| ())
        }
        fn take_each(&mut self, _: usize, _: impl FnMut(Used)) -> Result<usize, virtqueue::Error> {
            Ok(self.0.get())
        }
        fn disable_calls(&mut self) {}
        fn enable_calls(&mut self) -> bool {
            false
        }
    }
    let mut half = DriverHalf::new(Odd(Cell::new(0)), 0, 4);
    half.submit();
    assert_eq!(half.in_flight, 4);
    assert_eq!(half.reap().unwrap(), 0);
    half.ring.0.set(5);
    assert!(half.reap().is_err());
}

#[test]
fn measuring_yields_every_figure_in_turn() {
    let Some(setup) = setup(64) else { return };
    let rings = rings(&[Layout::Split, Layout::Packed]);
    let signals = Signals::install().unwrap();
    let mut seen = Vec::new();
    let all = measure(&setup, &rings, &[1, 8], 1, &signals, &mut |case| {
        seen.push(*case);
    })
    .unwrap();
    assert_eq!(all.len(), 2 * 2 * 4);
    // Four rings before the batch changes, if none had to be sampled again.
    assert!(seen.len() >= 16 && seen[0].batch == 1);
    for (requests, ring) in all.iter().zip(rings.iter().cycle()) {
        assert_eq!(requests.case.ring, *ring);
        assert!(requests.samples.len() <= 1);
        assert!(requests.samples.len() == 1 || requests.dropped == TRIES);
    }
}

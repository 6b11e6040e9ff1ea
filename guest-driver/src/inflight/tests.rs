//! Back-ends that end at any store of a burst, and the next one.
#![allow(unsafe_code)] // memory that is copied as a whole

extern crate std;

use std::vec;
use std::vec::Vec;

use virtqueue::packed::Packed;
use virtqueue::{Buffer, DeviceRing, DriverRing, Layout, Used};

use super::*;

const SIZE: u16 = 8;
const AREA: Area = Area {
    queues: 2,
    queue_size: SIZE,
};
/// Rings, buffers.
const PAGES: u64 = 4;

fn memory(pages: u64) -> Linear {
    let words = vec![[0u64; 512]; usize::try_from(pages).unwrap() + 1].leak();
    let base = words.as_mut_ptr().cast::<u8>();
    // SAFETY: leaked, and reached through this only.
    unsafe { Linear::new(base.add(base.align_offset(4096)), 0, pages * 4096) }
}

fn config() -> RingConfig {
    RingConfig {
        size: SIZE,
        desc: 0,
        driver: 4096,
        device: 8192,
        event_idx: false,
        in_order: false,
        indirect: false,
    }
}

/// A front-end's ring, which outlives its back-ends.
struct Front {
    window: Linear,
    area: Linear,
    driver: <Packed as Layout>::Driver<Linear>,
    /// Chains that were made available, and those that came back used.
    added: u64,
    used: u64,
}

/// At which step a back-end ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Taken,
    Written,
    Recorded,
    Published,
    Settled,
}

impl Front {
    fn new() -> Self {
        let window = memory(PAGES);
        Self {
            driver: Packed::driver(window, &config()).unwrap(),
            area: memory(1),
            window,
            added: 0,
            used: 0,
        }
    }

    fn fill(&mut self, most: u64) {
        for _ in 0..most {
            let buffer = Buffer {
                addr: 12288,
                len: 64,
                device_writes: true,
            };
            self.added += u64::from(self.driver.add(&[buffer]).is_some());
        }
        self.driver.publish();
    }

    fn take(&mut self) {
        let mut out = [Used::default(); SIZE as usize];
        self.used += self.driver.take(&mut out).unwrap() as u64;
    }

    /// A back-end that goes on where the last one was: one burst of up to `count`, which ends early.
    fn serve(&mut self, count: usize, end: End) -> u64 {
        let (record, base) =
            Record::open(self.area, AREA, 1, self.window, &config(), Packed::FRESH).unwrap();
        let mut ring = Packed::device_at(self.window, &config(), base).unwrap();
        let mut chains = [virtqueue::Chain::default(); SIZE as usize];
        let mut buffers = [Buffer::default(); SIZE as usize];
        let before = ring.base();
        let n = ring.get(&mut chains[..count], &mut buffers).unwrap();
        record.taken(before, ring.base());
        if end == End::Taken {
            return 0;
        }
        for chain in &chains[..n] {
            ring.put(chain.id, 64);
        }
        if end == End::Written {
            return 0;
        }
        let base = ring.base();
        record.publishing(base);
        if end == End::Recorded {
            return 0;
        }
        ring.publish();
        if end == End::Settled {
            record.published(base);
        }
        n as u64
    }
}

#[test]
fn a_ring_goes_on_wherever_its_back_end_ended_and_every_chain_is_used_once() {
    let ends = [
        End::Taken,
        End::Written,
        End::Recorded,
        End::Published,
        End::Settled,
    ];
    // The driver looks at the ring before the next back-end comes, and uses it again, or does not.
    for refill in 0..4 {
        let mut front = Front::new();
        let mut published = 0;
        for round in 0..400usize {
            if round % 4 != 0 || refill == 0 {
                front.fill(1 + round as u64 % 5);
            }
            published += front.serve(1 + round % 6, ends[(round / 3 + refill) % 5]);
            if round % (refill + 1) == 0 {
                front.take();
                front.fill(refill as u64 * 3);
            }
        }
        front.take();
        assert!(published > 200, "{published}");
        assert_eq!(front.used, published, "what was published came, once");
        // Everything else is still to be had.
        while front.used < front.added {
            let before = front.used;
            front.serve(SIZE.into(), End::Settled);
            front.take();
            assert!(front.used > before, "{} of {}", front.used, front.added);
        }
        assert_eq!(front.used, front.added);
    }
}

#[test]
fn a_new_record_is_as_the_specification_has_it_and_starts_at_the_base() {
    let front = Front::new();
    let base = 0x8003_8003;
    let (_, at) = Record::open(front.area, AREA, 1, front.window, &config(), base).unwrap();
    assert_eq!(at, base);
    let stride = 320; // 32 + 8 * 32, in whole lines of 64
    let region = front.area.region(stride, 288, 8).unwrap();
    let words: Vec<u16> = (8..24)
        .step_by(2)
        .map(|at| region.load_u16(at, Relaxed))
        .collect();
    assert_eq!(words, [1, 8, 0, 0, 3, 3, 0x0101, 0]);
    let lists: Vec<u16> = (34..288)
        .step_by(32)
        .map(|at| region.load_u16(at, Relaxed))
        .collect();
    assert_eq!(lists, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(
        front.area.region(0, 320, 8).unwrap().load_u64(8, Relaxed),
        0
    );
    let again = Record::open(front.area, AREA, 1, front.window, &config(), 0).unwrap();
    assert_eq!(again.1, base, "the record is what counts");
}

#[test]
fn what_cannot_be_a_record_of_ours_is_not_continued() {
    let at = |field: usize| 320 + field;
    type Break = (usize, u16);
    let breaks: [Break; 7] = [
        (VERSION, 2),
        (DESC_NUM, 7),
        (POSITIONS, 8),
        (POSITIONS + 2, 0xffff),
        (POSITIONS + 4, 0x0102),
        (POSITIONS + 4, 0xff01),
        (64, 1), // an entry in flight
    ];
    for (field, value) in breaks {
        let front = Front::new();
        let open = || Record::open(front.area, AREA, 1, front.window, &config(), 0x8000_8000);
        assert!(open().is_some());
        let all = front.area.region(0, 4096, 8).unwrap();
        all.store_u16(at(field), value, Relaxed);
        assert!(open().is_none(), "{field}: {value:x}");
    }
    let front = Front::new();
    let open = |area, index| Record::open(front.area, area, index, front.window, &config(), 0);
    assert!(open(AREA, 2).is_none());
    assert!(open(Area { queues: 1, ..AREA }, 1).is_none());
    let small = Area {
        queue_size: 7,
        ..AREA
    };
    assert!(open(small, 0).is_none());
    let beyond = Area {
        queues: 100,
        ..AREA
    };
    assert!(
        open(beyond, 99).is_none(),
        "the area is longer than what is shown"
    );
}

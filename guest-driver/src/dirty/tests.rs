//! What the log says, against what has changed in memory: the oracle compares the bytes of each page before and after a burst.
#![allow(unsafe_code)] // tests look at shared memory

extern crate std;

use std::collections::BTreeSet;
use std::vec;
use std::vec::Vec;

use virtqueue::net::{F_CSUM, F_GUEST_CSUM, F_MRG_RXBUF};
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{DriverRing, Layout, RingConfig, Used};

use super::*;
use crate::joined::Silent;
use crate::peer::{PeerPort, Vring};
use crate::port::Port;

const PAGE: u64 = 4096;
/// Pages of the front-end's memory: rings, then buffers.
const PAGES: u64 = 96;
const BUFFERS: u64 = 16;
/// Bytes of the log.
const LOG: usize = 12;
/// Where the front-end says that the used areas are, for the log: elsewhere than in the window.
const LOGGED_AT: [u64; 2] = [80 * PAGE, 90 * PAGE];
const RING: u16 = 32;

/// Zeroed pages that nobody else has, at device address 0.
struct Pages {
    _words: Vec<[u64; 512]>,
    memory: Linear,
}

impl Pages {
    fn new(count: u64) -> Self {
        let mut words = vec![[0u64; 512]; usize::try_from(count).unwrap() + 1];
        let base = words.as_mut_ptr().cast::<u8>();
        let skip = base.align_offset(4096);
        // SAFETY: the vector lives as long as the result and is not touched otherwise.
        let memory = unsafe { Linear::new(base.add(skip), 0, count * PAGE) };
        Self {
            _words: words,
            memory,
        }
    }

    fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        // SAFETY: `ptr` checked the range; nobody writes it now.
        unsafe { std::slice::from_raw_parts(self.memory.ptr(addr, len).unwrap(), len) }.to_vec()
    }

    fn put(&self, addr: u64, bytes: &[u8]) {
        let to = self.memory.ptr(addr, bytes.len()).unwrap();
        // SAFETY: `ptr` checked the range; nobody else touches it now.
        unsafe { to.copy_from(bytes.as_ptr(), bytes.len()) };
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % bound
    }
}

/// A front-end that keeps a log, and its back-end.
struct Bench<L: Layout> {
    memory: Pages,
    log: Pages,
    configs: [RingConfig; 2],
    rx: L::Driver<Linear>,
    tx: L::Driver<Linear>,
    back: PeerPort<L::Device<Linear>, Silent>,
    random: Random,
    /// Pages of the buffers that the back-end may write.
    writable: BTreeSet<u64>,
}

impl<L: Layout> Bench<L> {
    fn new(packed: bool, features: u64) -> Self {
        let (memory, log) = (Pages::new(PAGES), Pages::new(1));
        let configs = [0, 8].map(|page| RingConfig {
            size: RING,
            desc: page * PAGE,
            driver: (page + 2) * PAGE,
            device: (page + 4) * PAGE,
            event_idx: false,
            in_order: false,
            indirect: false,
        });
        let vring = |config| Vring {
            ring: L::device(memory.memory, config).unwrap(),
            call: Silent,
            kicks: true,
            record: None,
        };
        let [rx, tx] = &configs;
        let mut back = PeerPort::new(memory.memory, features, vring(rx), vring(tx));
        let [desc, _, device] = L::area_sizes(RING).unwrap();
        let desc = if packed { desc as u64 } else { 0 };
        let ranges = |i: usize| [(LOGGED_AT[i], device as u64), (configs[i].desc, desc)];
        back.set_log(Some(PortLog {
            log: DirtyLog::new(log.memory, LOG as u64),
            rings: [ranges(0), ranges(1)],
        }));
        Self {
            rx: L::driver(memory.memory, rx).unwrap(),
            tx: L::driver(memory.memory, tx).unwrap(),
            back,
            memory,
            log,
            configs,
            random: Random(1),
            writable: BTreeSet::new(),
        }
    }

    /// The pages that are marked; the log is empty then.
    fn take_log(&self) -> BTreeSet<u64> {
        let bits = self.log.bytes(0, LOG);
        self.log.put(0, &[0; LOG]);
        assert_eq!(self.log.bytes(LOG as u64, 100), [0; 100], "beyond the log");
        let marked = |page: &u64| bits[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1;
        (0..8 * LOG as u64).filter(marked).collect()
    }

    /// Buffers somewhere, `total` bytes at least, in up to three pieces.
    fn pieces(&mut self, total: u64, device_writes: bool) -> Vec<Buffer> {
        let count = 1 + self.random.below(3);
        (0..count)
            .map(|_| {
                let len = total.div_ceil(count) + self.random.below(300);
                let addr = BUFFERS * PAGE + self.random.below((78 - BUFFERS) * PAGE - len);
                if device_writes {
                    self.writable.extend(addr / PAGE..=(addr + len) / PAGE);
                }
                Buffer {
                    addr,
                    len: u32::try_from(len).unwrap(),
                    device_writes,
                }
            })
            .collect()
    }

    /// Runs what the back-end does, and compares the log with what has changed.
    fn compare(&mut self, what: impl FnOnce(&mut PeerPort<L::Device<Linear>, Silent>)) -> usize {
        self.take_log();
        let all = usize::try_from(PAGES * PAGE).unwrap();
        let before = self.memory.bytes(0, all);
        what(&mut self.back);
        let after = self.memory.bytes(0, all);
        let changed: BTreeSet<u64> = (0..)
            .zip(before.chunks(4096).zip(after.chunks(4096)))
            .filter(|(_, (before, after))| before != after)
            .map(|(page, _)| page)
            .collect();
        let marked = self.take_log();
        for page in &changed {
            let used = self.configs.iter().position(|c| c.device / PAGE == *page);
            // The log has the used areas where the front-end said.
            let page = used.map_or(*page, |ring| LOGGED_AT[ring] / PAGE);
            assert!(
                marked.contains(&page),
                "{page} of {changed:?} is not in {marked:?}"
            );
        }
        let ring = |page: &u64| *page < BUFFERS || LOGGED_AT.iter().any(|at| at / PAGE == *page);
        let others: Vec<_> = marked
            .iter()
            .filter(|page| !ring(page) && !self.writable.contains(page))
            .collect();
        assert_eq!(
            others,
            Vec::<&u64>::new(),
            "marked, and nobody could write there"
        );
        changed.len()
    }
}

fn drain(ring: &mut impl DriverRing) {
    let mut used = [Used::default(); RING as usize];
    ring.take(&mut used).unwrap();
}

fn every_page_that_changes_is_marked<L: Layout>(packed: bool) {
    let offloads = F_CSUM | F_GUEST_CSUM;
    for features in [0, F_MRG_RXBUF, offloads, offloads | F_MRG_RXBUF] {
        let mut bench = Bench::<L>::new(packed, features);
        let mut changed = 0;
        for round in 0..400u32 {
            let len = [60, 700, 1518][usize::try_from(bench.random.below(3)).unwrap()];
            let mergeable = features & F_MRG_RXBUF != 0;
            let least = if mergeable { 200 } else { 1530 };
            for _ in 0..bench.random.below(12) {
                let pieces = bench.pieces(least, true);
                bench.rx.add(&pieces);
            }
            bench.rx.publish();
            let byte = round.to_le_bytes()[0];
            changed += bench.compare(|back| {
                back.tx_burst(5, len, |i, slot| {
                    slot.write(0, &[byte ^ i.to_le_bytes()[0]; 1518][..len]);
                })
                .unwrap();
            });
            drain(&mut bench.rx);
            for _ in 0..bench.random.below(8) {
                let pieces = bench.pieces(64, false);
                bench.tx.add(&pieces);
            }
            bench.tx.publish();
            changed += bench.compare(|back| {
                back.rx_burst(8, |_| ()).unwrap();
            });
            drain(&mut bench.tx);
            changed += bench.compare(|back| {
                back.arm(true, true);
            });
            changed += bench.compare(PeerPort::disarm);
        }
        assert!(changed > 1000, "{changed}");
    }
}

#[test]
fn every_page_of_buffers_and_split_rings_that_changes_is_marked_and_no_other() {
    every_page_that_changes_is_marked::<Split>(false);
}

#[test]
fn every_page_of_buffers_and_packed_rings_that_changes_is_marked_and_no_other() {
    every_page_that_changes_is_marked::<Packed>(true);
}

#[test]
fn what_the_log_has_no_bits_for_is_not_marked() {
    let pages = Pages::new(1);
    let log = DirtyLog::new(pages.memory, 3);
    for range in [
        (24 * PAGE, 1),
        (24 * PAGE, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (5 * PAGE, 0),
        (8 * 4096 * PAGE, PAGE),
    ] {
        log.mark(range);
        assert_eq!(pages.bytes(0, 4096), [0; 4096], "{range:x?}");
    }
    // Over the end: the part that is inside.
    log.mark((23 * PAGE - 1, 10 * PAGE));
    assert_eq!(pages.bytes(0, 4), [0, 0, 0xc0, 0]);
    // A log that says that it is longer than its memory.
    let log = DirtyLog::new(pages.memory, u64::MAX);
    log.mark((8 * 4095 * PAGE, 16 * PAGE));
    assert_eq!(pages.bytes(4092, 4), [0, 0, 0, 0xff]);
}

#[test]
fn nothing_is_marked_that_was_not_negotiated() {
    let mut bench = Bench::<Split>::new(false, 0);
    bench.take_log();
    bench.back.set_log(None);
    let pieces = bench.pieces(1530, true);
    bench.rx.add(&pieces);
    bench.rx.publish();
    bench.back.tx_burst(1, 64, |_, _| ()).unwrap();
    assert_eq!(bench.take_log(), BTreeSet::new());
}

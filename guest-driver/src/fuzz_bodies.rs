//! What a peer leaves in memory for the drivers, as a byte string: the bodies of the fuzz targets, and of tests that make the strings up. They panic where a
//! promise is broken.
//!
//! Unsafe code: the memory that both sides share.
#![allow(unsafe_code)]

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;

use virtqueue::linear::Linear;
use virtqueue::packed::Packed;
use virtqueue::{Buffer, Chain, DeviceRing, Layout, Memory, Region, RingConfig};

use crate::dirty::{DirtyLog, PortLog};
use crate::inflight::{Area, Record};

const BURST: usize = 16;

/// What lies next to it is nobody's.
#[derive(Clone)]
#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "it is memory, reached by address")] [u8; 4096]);

fn linear(pages: &mut Vec<Page>) -> Linear {
    let len = pages.len() * 4096;
    // SAFETY: the pages live as long as the body runs, and are reached through this only.
    unsafe { Linear::new(pages.as_mut_ptr().cast(), 0, len as u64) }
}

/// The rest of the byte string. Behind its end everything is 0.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
}

/// A packed ring whose driver and whose area for what is in flight say anything, at any time, and back-ends that go on there one behind the other, with a log of
/// what they write. Each goes on at a place of the ring, or not at all, and reaches nothing else.
pub fn fuzz_inflight(data: &[u8]) {
    let mut input = Input(data);
    let [mut window, mut area, mut log] = [4, 2, 1].map(|n| vec![Page([0; 4096]); n]);
    let (window, memory) = (linear(&mut window), linear(&mut area));
    let log = DirtyLog::new(linear(&mut log), input.half().into());
    let size = 1 + u16::from(input.byte() % 64);
    let area = Area {
        queues: (input.byte() % 8).into(),
        queue_size: (input.byte() % 128).into(),
    };
    let index = usize::from(input.byte() % 8);
    let fresh = u32::from(input.half()) | u32::from(input.half()) << 16;
    let config = RingConfig {
        size,
        desc: 0,
        driver: 4096,
        device: 8192,
        event_idx: false,
        in_order: false,
        indirect: true,
    };
    let log = PortLog {
        log,
        rings: [[(0, u64::from(size) * 16), (8192, 4)]; 2],
    };
    let open = |fresh| Record::open(memory, area, index, window, &config, fresh);
    let mut back_end = None;
    while !input.0.is_empty() {
        let operation = input.byte();
        match operation % 8 {
            shared @ 0..4 => {
                let whole = match shared {
                    0 | 1 => memory.region(0, 8192, 8),
                    _ => window.region(0, 16384, 8),
                };
                let at = usize::from(input.half() % 4096) & !1;
                let value = input.half();
                whole.expect("it is there").store_u16(at, value, Relaxed);
            }
            4 => {
                let fresh = if operation & 8 == 0 {
                    Packed::FRESH
                } else {
                    fresh
                };
                back_end = open(fresh).and_then(|(record, base)| {
                    let ring = Packed::device_at(window, &config, base).ok()?;
                    for half in [base, base >> 16] {
                        assert!(half & 0x7fff < size.into(), "{base:#x} is no place of it");
                    }
                    Some((record, ring))
                });
            }
            _ => {
                let Some((record, ring)) = &mut back_end else {
                    continue;
                };
                let mut chains = [Chain::default(); BURST];
                let mut buffers = [Buffer::default(); 64];
                let count = 1 + usize::from(operation >> 4);
                let before = ring.base();
                let Ok(taken) = ring.get(&mut chains[..count], &mut buffers) else {
                    back_end = None;
                    continue;
                };
                record.taken(before, ring.base());
                // It ends at any of these.
                let steps = input.byte() % 5;
                if steps == 0 {
                    back_end = None;
                    continue;
                }
                for chain in &chains[..taken] {
                    ring.put(chain.id, 64);
                }
                record.publishing(ring.base());
                if steps > 1 {
                    ring.publish();
                    log.sent(&chains[..taken], &buffers, 64);
                    log.ring(1);
                }
                if steps > 2 {
                    record.published(ring.base());
                } else {
                    back_end = None;
                }
            }
        }
    }
}

//! The bodies of the fuzz targets of the devices for a fixed number of pseudo-random byte strings, without a fuzzer.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use devices::fuzz_bodies::{fuzz_function, fuzz_iommu, fuzz_messages};

/// The strings are the same in each run.
const SEED: u64 = 0x6465_7669_6365_7321;
/// How many strings a body gets.
const ITERATIONS: u64 = if cfg!(debug_assertions) { 500 } else { 10_000 };
/// Longest string.
const LONGEST: u64 = 2048;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

fn iterate(name: &str, body: fn(&[u8]), shape: fn(&mut Random, &mut [u8])) {
    let mut random = Random(SEED);
    for n in 0..ITERATIONS {
        // Some of small numbers only: they are choices of the body more often than they are data.
        let mask = if random.next().is_multiple_of(4) {
            0x0f
        } else {
            0xff
        };
        let len = random.next() % LONGEST;
        let mut data: Vec<u8> = (0..len).map(|_| random.byte() & mask).collect();
        shape(&mut random, &mut data);
        if let Err(failure) = catch_unwind(AssertUnwindSafe(|| body(&data))) {
            eprintln!("{name}, string {n}, fails: {data:02x?}");
            resume_unwind(failure);
        }
    }
}

/// Headers of messages one behind the other, most of which are whole, so that there is more than one.
fn conversation(random: &mut Random, data: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = data.get_mut(at..at + 12) {
        let size = random.byte() % 80;
        let request = random.byte() % 45;
        header.copy_from_slice(&[request, 0, 0, 0, 1 | request & 12, 0, 0, 0, size, 0, 0, 0]);
        if random.byte() == 0 {
            header[usize::from(random.byte() % 12)] ^= 0x80;
        }
        at += 12 + usize::from(size);
    }
}

#[test]
fn a_function_survives_any_access_and_stays_what_it_is() {
    iterate("function", fuzz_function, |_, _| {});
}

#[test]
fn a_virtio_iommu_answers_whatever_it_is_asked() {
    iterate("iommu", fuzz_iommu, |_, _| {});
}

#[test]
fn a_connection_hands_out_whole_messages_whatever_is_sent() {
    iterate("messages", fuzz_messages, |_, _| {});
    iterate("messages", fuzz_messages, conversation);
}

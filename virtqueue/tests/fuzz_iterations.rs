//! The bodies of the fuzz targets for a fixed number of pseudo-random byte strings, and for the corpus of `fuzz/`, without a fuzzer.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use virtqueue::fuzz_bodies::{fuzz_device, fuzz_driver};
use virtqueue::packed::Packed;
use virtqueue::split::Split;

mod common;
use common::Random;

/// The strings are the same in each run.
const SEED: u64 = 0x7669_7274_7175_6575;

/// How many strings a body gets.
const ITERATIONS: u64 = if cfg!(debug_assertions) {
    2_000
} else {
    30_000
};

/// Longest piece of noise.
const LONGEST: u64 = 1024;
/// What a string says before its first operation.
const HEADER: usize = 15;

/// Runs one string, and says which it was where it fails.
fn run(what: &str, body: fn(&[u8]), data: &[u8]) {
    if let Err(failure) = catch_unwind(AssertUnwindSafe(|| body(data))) {
        eprintln!("{what} fails: {data:02x?}");
        resume_unwind(failure);
    }
}

/// A string that nobody thought of.
fn noise(random: &mut Random) -> Vec<u8> {
    let len = random.below(LONGEST);
    // Some of small numbers only: they are choices of the body more often than they are data.
    let mask = if random.below(4) == 0 { 0x0f } else { 0xff };
    (0..len).map(|_| byte(random) & mask).collect()
}

/// A string of the corpus with a few bytes changed, and something behind it: most noise breaks a ring with the first thing that it does, so what comes
/// later is reached from here.
fn mutated(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut pick = || &seeds[index(random, seeds.len())];
    let (mut data, more) = (pick().clone(), pick().clone());
    for _ in 0..random.below(4) {
        let at = index(random, data.len());
        data[at] = byte(random);
    }
    match random.below(4) {
        0 => data.extend(noise(random)),
        // The same or another's operations, without what sets up its ring.
        1 => data.extend(&more[HEADER..]),
        2 => data.truncate(index(random, data.len())),
        _ => {}
    }
    data
}

fn byte(random: &mut Random) -> u8 {
    (random.next() >> 32).to_le_bytes()[0]
}

fn index(random: &mut Random, len: usize) -> usize {
    let len = len.try_into().unwrap();
    random.below(len).try_into().unwrap()
}

fn iterate(name: &str, body: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let files = fs::read_dir(corpus.join(name)).unwrap();
    let mut paths: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    for (path, seed) in paths.iter().zip(&seeds) {
        run(&path.display().to_string(), body, seed);
    }
    println!("{name}: {ITERATIONS} strings from seed {SEED:#x}");
    let mut random = Random(SEED);
    for n in 0..ITERATIONS {
        let data = match n % 4 {
            0 => noise(&mut random),
            _ => mutated(&mut random, &seeds),
        };
        run(&format!("{name}, string {n}"), body, &data);
    }
}

#[test]
fn split_device_keeps_its_promises_to_its_user() {
    iterate("split_device", |data| fuzz_device(Split, data));
}

#[test]
fn split_driver_keeps_its_promises_to_its_user() {
    iterate("split_driver", |data| fuzz_driver(Split, data));
}

#[test]
fn packed_device_keeps_its_promises_to_its_user() {
    iterate("packed_device", |data| fuzz_device(Packed, data));
}

#[test]
fn packed_driver_keeps_its_promises_to_its_user() {
    iterate("packed_driver", |data| fuzz_driver(Packed, data));
}

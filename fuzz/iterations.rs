//! The body of a fuzz target for its corpus, and for a fixed number of strings made from that, without a fuzzer: the tests of the crates include this file.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::{env, fs};

/// The strings are the same in each run.
const SEED: u64 = 0x6465_7669_6365_7321;
/// Longest piece of noise.
const LONGEST: usize = 1024;

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

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }
}

fn corpus(name: &str) -> PathBuf {
    // Of the crate that includes this file: the tool's, or one in a directory of its own.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let roots = [here.join("fuzz"), here.join("../fuzz")];
    let root = roots.iter().find(|root| root.is_dir()).unwrap();
    root.join("corpus").join(name)
}

/// The corpus has these files, just like this; with WRITE_SEEDS in the environment it gets them first.
pub fn seeds(name: &str, files: &[(&str, Vec<u8>)]) {
    let directory = corpus(name);
    for (file, bytes) in files {
        let path = directory.join(file);
        if env::var_os("WRITE_SEEDS").is_some() {
            fs::create_dir_all(&directory).unwrap();
            fs::write(&path, bytes).unwrap();
        }
        assert!(
            fs::read(&path).unwrap() == *bytes,
            "{} is another one: run this with WRITE_SEEDS=1",
            path.display()
        );
    }
}

/// Runs the corpus, and `count` strings.
pub fn iterate(name: &str, count: usize, body: impl Fn(&[u8])) {
    let run = |what: &dyn std::fmt::Display, data: &[u8]| {
        if let Err(failure) = catch_unwind(AssertUnwindSafe(|| body(data))) {
            eprintln!("{name}, {what}, fails: {data:02x?}");
            resume_unwind(failure);
        }
    };
    let files = fs::read_dir(corpus(name)).unwrap();
    let mut paths: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(!seeds.is_empty());
    for (path, seed) in paths.iter().zip(&seeds) {
        run(&path.display(), seed);
    }
    let mut random = Random(SEED);
    for n in 0..count {
        let data = match n % 4 {
            0 => noise(&mut random),
            _ => mutated(&mut random, &seeds),
        };
        run(&n, &data);
    }
}

/// A string that nobody thought of.
fn noise(random: &mut Random) -> Vec<u8> {
    // Some of small numbers only: they are choices of the body more often than they are data.
    let mask = if random.below(4) == 0 { 0x0f } else { 0xff };
    (0..random.below(LONGEST))
        .map(|_| random.byte() & mask)
        .collect()
}

/// A string of the corpus with a few bytes changed, and something behind it: most noise ends a conversation at once, so what comes later is reached from here.
fn mutated(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = seeds[random.below(seeds.len())].clone();
    let more = &seeds[random.below(seeds.len())];
    for _ in 0..random.below(4) {
        let at = random.below(data.len());
        data[at] = random.byte();
    }
    match random.below(4) {
        0 => data.extend(noise(random)),
        1 => data.extend(&more[random.below(more.len())..]),
        2 => data.truncate(random.below(data.len())),
        _ => {}
    }
    data
}

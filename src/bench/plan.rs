//! What is measured, and in which order.

use crate::cli::Direction;
use crate::cli::bench::BenchArgs;

/// One figure to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Which way frames go.
    pub direction: Direction,
    /// Bytes of a frame, without FCS.
    pub size: u16,
    /// Frames a burst; 1 for a round trip.
    pub batch: u16,
}

/// RFC 2544, section 9.1, for Ethernet.
const SIZES: [u16; 7] = [64, 128, 256, 512, 1024, 1280, 1518];
const QUICK_SIZES: [u16; 2] = [64, 1518];
const BATCH: u16 = 32;
/// What the smallest size is measured with besides.
const OTHER_BATCHES: [u16; 5] = [1, 4, 8, 16, 64];

/// The cases that the flags ask for, none twice.
pub fn plan(args: &BenchArgs) -> Vec<Case> {
    let sizes = match &args.sizes {
        Some(sizes) => sizes.as_slice(),
        None if args.quick => &QUICK_SIZES,
        None => &SIZES,
    };
    let mut cases = Vec::new();
    for &size in sizes {
        let batches = match &args.batches {
            Some(batches) => batches.clone(),
            None if args.quick || size != SIZES[0] => vec![BATCH],
            None => [&[BATCH], &OTHER_BATCHES[..]].concat(),
        };
        for batch in batches {
            for &direction in &args.directions {
                let case = Case {
                    direction,
                    size,
                    // One frame is on its way at a time, so a batch means nothing.
                    batch: if direction == Direction::RoundTrip {
                        1
                    } else {
                        batch
                    },
                };
                if !cases.contains(&case) {
                    cases.push(case);
                }
            }
        }
    }
    cases
}

/// How often each is sampled.
pub fn samples(args: &BenchArgs) -> usize {
    usize::from(args.samples.unwrap_or(if args.quick { 5 } else { 10 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use clap::ValueEnum;

    fn planned(args: &[&str]) -> (Vec<Case>, usize) {
        match Cli::try_parse_from([&["vhost-pci", "bench"], args].concat()) {
            Ok(Cli {
                command: Command::Bench(args),
                ..
            }) => (plan(&args), samples(&args)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn quick_is_two_sizes_in_every_direction() {
        let (cases, samples) = planned(&["--quick"]);
        assert_eq!((cases.len(), samples), (8, 5));
        for &direction in Direction::value_variants() {
            for size in [64, 1518] {
                let found = cases
                    .iter()
                    .any(|case| case.direction == direction && case.size == size);
                assert!(found, "{direction:?} {size}");
            }
        }
    }

    #[test]
    fn the_default_has_all_sizes_at_one_batch_and_all_batches_at_one_size() {
        let (cases, samples) = planned(&[]);
        assert_eq!(samples, 10);
        assert_eq!(cases.len(), 7 * 4 + 5 * 3);
        assert!(
            cases
                .iter()
                .all(|case| case.size == 64 || case.batch == 32 || case.batch == 1)
        );
    }

    #[test]
    fn what_is_given_is_crossed_and_nothing_is_measured_twice() {
        let (cases, samples) = planned(&[
            "--sizes",
            "64,256",
            "--batches",
            "1,8",
            "--directions",
            "both,round-trip",
            "--samples",
            "3",
        ]);
        assert_eq!(samples, 3);
        assert_eq!(cases.len(), 2 * 2 + 2);
    }
}

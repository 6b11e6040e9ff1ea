use std::cell::RefCell;
use std::ffi::OsString;

use clap::Parser;

use super::*;
use crate::bench::pairs::measure;
use crate::bench::peers::tests::case;
use crate::bench::record::SampleResult;
use crate::cli::iommu::Iommu;
use crate::cli::rings::{Layout, Ring};
use crate::cli::{Cli, Command, Direction, Path};

fn parsed(words: &[&str]) -> (BenchArgs, Vec<OsString>) {
    let all: Vec<OsString> = ["vhost-pci", "bench"]
        .iter()
        .chain(words)
        .map(OsString::from)
        .collect();
    match Cli::try_parse_from(&all) {
        Ok(Cli {
            command: Command::Bench(args),
            ..
        }) => (*args, all),
        other => panic!("{other:?}"),
    }
}

fn other(words: &[&str]) -> Result<Option<BenchArgs>, String> {
    let (args, words) = parsed(words);
    args.other(words).map_err(|why| why.to_string())
}

#[test]
fn the_second_pair_has_the_flags_of_the_first_but_for_those_that_are_given() {
    let flags = "--ring split --queue-size 512 --memory=size=64M";
    let first = [
        "--ring",
        "packed",
        "--in-order",
        "on",
        "--sizes",
        "64,128",
        "--mode",
        "irq",
    ];
    for vs in [vec!["--vs", flags], vec![&*format!("--vs={flags}")]] {
        let (args, words) = parsed(&[&first[..], &vs].concat());
        let other = args.other(words).unwrap().unwrap();
        let rings = |args: &BenchArgs| args.one_kind().unwrap().ring;
        let in_order = true;
        let layout = Layout::Packed;
        assert_eq!(
            rings(&args),
            Ring {
                layout,
                in_order,
                size: 256
            }
        );
        let layout = Layout::Split;
        assert_eq!(
            rings(&other),
            Ring {
                layout,
                in_order,
                size: 512
            }
        );
        assert_eq!(args.ring_setup().unwrap().size, 256);
        assert_eq!(other.ring_setup().unwrap().size, 512);
        assert_eq!(other.both.memory, "size=64M");
        assert_ne!(args.both.memory, "size=64M");
        // What was not given is as it was.
        assert_eq!((&other.sizes, other.mode), (&args.sizes, args.mode));
    }
    assert!(other(&["--ring", "packed"]).unwrap().is_none());
}

#[test]
fn what_cannot_differ_is_refused_and_so_is_what_is_wrong() {
    for (flags, want) in [
        ("--sizes 64", "--sizes cannot differ; --ring,"),
        ("--ring split --cores 0:1", "--cores cannot differ"),
        ("-v", "-v cannot differ"),
        ("--ring oval", "oval"),
        ("--ring", "--ring"),
        ("word", "word"),
    ] {
        let error = other(&["--vs", flags]).unwrap_err();
        assert!(
            error.starts_with(&format!("--vs '{flags}': ")) && error.contains(want),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1);
    }
    let two = other(&["--vs", "--ring split,packed"]).unwrap().unwrap();
    assert!(two.one_kind().is_err());
    assert!(Cli::try_parse_from(["vhost-pci", "bench", "--vs", "", "--sweep", "rings"]).is_err());
}

/// Guests whose virtual CPUs had these shares, in turn; it notes who was sampled.
struct Played<'a> {
    name: char,
    shares: Vec<f64>,
    turn: usize,
    calls: &'a RefCell<String>,
}

impl Lab for Played<'_> {
    fn probe(&mut self) -> Result<f64> {
        Ok(100.0)
    }

    fn guests(&mut self, case: &Case) -> Result<VmSample> {
        let split = case.ring.layout == Layout::Split;
        assert_eq!(split, self.name == 'b', "{case:?}");
        self.calls.borrow_mut().push(self.name);
        let share = self.shares.get(self.turn).copied().unwrap_or(1.0);
        self.turn += 1;
        let result = SampleResult {
            mpps: 8.0,
            timed: true,
            ..SampleResult::default()
        };
        Ok(VmSample {
            result,
            shares: Some([share, 1.0]),
            ..VmSample::default()
        })
    }

    fn bound(&mut self, _: &Case) -> Result<BoundSample> {
        let result = SampleResult {
            timed: true,
            ..SampleResult::default()
        };
        Ok(BoundSample {
            result,
            ..BoundSample::default()
        })
    }
}

#[test]
fn both_pairs_are_sampled_in_turn_and_a_round_that_was_not_good_for_both_is_repeated_for_both() {
    let calls = RefCell::new(String::new());
    let lab = |name, shares: &[f64]| Played {
        name,
        shares: shares.to_vec(),
        turn: 0,
        calls: &calls,
    };
    let mut first = lab('a', &[]);
    let ring = Ring {
        layout: Layout::Split,
        in_order: false,
        size: 256,
    };
    let mut vs = Vs {
        lab: lab('b', &[1.0, 0.2]),
        kind: Kind {
            ring,
            iommu: Iommu::Off,
            path: Path::Window,
        },
        measured: Vec::new(),
    };
    let mut with = WithVs {
        lab: &mut first,
        vs: Some(&mut vs),
    };
    let cases = [case(Direction::Both)];
    let measured = measure(&mut with, &cases, 3, &mut || true, &mut |_| ()).unwrap();
    assert_eq!(*calls.borrow(), "abababab");
    let rounds = |measured: &Measured| -> Vec<usize> {
        measured.pairs.iter().map(|pair| pair.round).collect()
    };
    assert_eq!(rounds(&measured[0]), [0, 1, 2, 3]);
    assert_eq!(rounds(&vs.measured[0]), [0, 2, 3]);
    assert_eq!(vs.measured[0].case.ring, ring);
    assert_eq!(vs.measured[0].disturbed, 1);
}

//! What is measured, and in which order.

use crate::cli::bench::{BenchArgs, Kind, Sweep};
use crate::cli::frames::{How, Size};
use crate::cli::iommu::Iommu;
use crate::cli::rings::Ring;
use crate::cli::{Direction, Mode, Path};

/// One figure to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Which rings carry the frames.
    pub ring: Ring,
    /// What stands between the front-end's memory and the window.
    pub iommu: Iommu,
    /// How they get from VM to VM.
    pub path: Path,
    /// Which way frames go.
    pub direction: Direction,
    /// Bytes of a frame, without FCS.
    pub size: Size,
    /// Frames a burst; 1 for a round trip.
    pub batch: u16,
    /// What the guests do with them.
    pub how: How,
    /// Round trips of frames that are sent when they are due: at so many percent of the rate that an echo reaches. Otherwise a frame is sent
    /// when the one before it has come back.
    pub load: Option<u8>,
}

impl Case {
    /// Which VMs it is measured with.
    pub fn kind(&self) -> Kind {
        Kind {
            ring: self.ring,
            iommu: self.iommu,
            path: self.path,
        }
    }

    /// What a load is a part of.
    pub fn whole_load(&self) -> Self {
        Self {
            direction: Direction::Echo,
            load: None,
            ..*self
        }
    }

    /// Frames that are due in a second, where an echo brings back `mpps` million.
    pub fn rate(&self, mpps: f64) -> Option<u64> {
        match (self.load?, self.how.mode) {
            (0, Mode::Poll) => Some(IDLE_RATE),
            (0, Mode::Irq | Mode::Adaptive) => Some(SLEEPY_RATE),
            (load, _) => {
                #[expect(clippy::cast_possible_truncation, reason = "whole frames are meant")]
                let rate = (mpps * f64::from(load) * 1e4).max(1.0) as u64;
                Some(rate)
            }
        }
    }
}

/// What no load is: so many frames a second, each of which is back before the next is due.
const IDLE_RATE: u64 = 100_000;
/// The same where an interrupt has to come first.
const SLEEPY_RATE: u64 = 500;

/// Which way frames go, where each that arrives is one that was sent for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Back-end to front-end.
    BeToFe,
    /// Front-end to back-end.
    FeToBe,
    /// Back-end to front-end and back.
    Echo,
}

impl Way {
    /// `None` where they go both ways at once, one at a time, or not at all.
    pub fn of(direction: Direction) -> Option<Self> {
        match direction {
            Direction::BeToFe => Some(Self::BeToFe),
            Direction::FeToBe => Some(Self::FeToBe),
            Direction::Echo => Some(Self::Echo),
            Direction::Both | Direction::RoundTrip | Direction::Idle => None,
        }
    }

    /// As it is in the JSON.
    pub fn direction(self) -> Direction {
        match self {
            Self::BeToFe => Direction::BeToFe,
            Self::FeToBe => Direction::FeToBe,
            Self::Echo => Direction::Echo,
        }
    }
}

/// RFC 2544, section 9.1, for Ethernet.
const SIZES: [u32; 7] = [64, 128, 256, 512, 1024, 1280, 1518];
const QUICK_SIZES: [u32; 2] = [64, 1518];
const BATCH: u16 = 32;
/// What the smallest size is measured with besides.
const OTHER_BATCHES: [u16; 5] = [1, 4, 8, 16, 64];
const SWEEP_SIZES: [u32; 1] = [64];
const SWEEP_BATCHES: [u16; 7] = [1, 2, 4, 8, 16, 32, 64];
const DIRECTIONS: [Direction; 4] = [
    Direction::BeToFe,
    Direction::FeToBe,
    Direction::Both,
    Direction::RoundTrip,
];
const SWEEP_DIRECTIONS: [Direction; 2] = [Direction::BeToFe, Direction::FeToBe];

/// The cases that the flags ask for, none twice. Those of a group differ in the VMs, in what the guests do, and in the load only: they are
/// sampled in turn, so that each sees the same minutes of the machine.
pub fn plan(args: &BenchArgs, kinds: &[Kind]) -> Vec<Vec<Case>> {
    let sweep = args.sweep == Some(Sweep::Rings);
    let usual = |sizes: &[u32]| sizes.iter().map(|&size| Size::Bytes(size)).collect();
    let sizes = match &args.sizes {
        Some(sizes) => sizes.clone(),
        None if sweep => usual(&SWEEP_SIZES),
        None if args.quick => usual(&QUICK_SIZES),
        None => usual(&SIZES),
    };
    let directions = match &args.directions {
        Some(directions) => directions.as_slice(),
        None if sweep => &SWEEP_DIRECTIONS,
        None => &DIRECTIONS,
    };
    let hows = args.hows();
    let mut groups: Vec<Vec<Case>> = Vec::new();
    let mut add = |direction: Direction, size: Size, batch: u16, loads: &[Option<u8>]| {
        let mut group: Vec<Case> = Vec::new();
        for &load in loads {
            for how in hows.iter().map(|how| how.in_direction(direction)) {
                let cases = kinds.iter().map(|&Kind { ring, iommu, path }| Case {
                    ring,
                    iommu,
                    path,
                    direction,
                    size,
                    batch,
                    how,
                    load,
                });
                for case in cases {
                    if !group.contains(&case) {
                        group.push(case);
                    }
                }
            }
        }
        if !groups.contains(&group) {
            groups.push(group);
        }
    };
    let loads: Vec<Option<u8>> = args
        .latency_load
        .iter()
        .flatten()
        .copied()
        .map(Some)
        .collect();
    for &size in &sizes {
        for batch in batches(args, size) {
            for &direction in directions {
                match direction {
                    // One frame is on its way at a time in a round trip, so a batch means nothing.
                    Direction::RoundTrip if size != Size::Imix => add(direction, size, 1, &[None]),
                    // Nor does a size where nobody sends.
                    Direction::Idle => add(direction, Size::Bytes(SIZES[0]), 1, &[None]),
                    // What comes back is of one length.
                    Direction::RoundTrip | Direction::Echo if size == Size::Imix => {}
                    _ => add(direction, size, batch, &[None]),
                }
            }
            let asked = args.batches.is_some() || batch == BATCH;
            if !loads.is_empty() && asked && size != Size::Imix {
                add(Direction::RoundTrip, size, batch, &loads);
            }
        }
    }
    groups
}

fn batches(args: &BenchArgs, size: Size) -> Vec<u16> {
    match &args.batches {
        Some(batches) => batches.clone(),
        None if args.sweep.is_some() => SWEEP_BATCHES.to_vec(),
        None if args.quick || size != Size::Bytes(SIZES[0]) => vec![BATCH],
        None => [&[BATCH], &OTHER_BATCHES[..]].concat(),
    }
}

/// The batches of the request times that a sweep measures besides, none twice; of no other run any.
pub fn request_batches(args: &BenchArgs) -> Vec<u16> {
    let mut all = Vec::new();
    if args.sweep == Some(Sweep::Rings) {
        for batch in batches(args, Size::Bytes(SWEEP_SIZES[0])) {
            if !all.contains(&batch) {
                all.push(batch);
            }
        }
    }
    all
}

/// How often each is sampled.
pub fn samples(args: &BenchArgs) -> usize {
    let few = args.quick || args.sweep.is_some();
    usize::from(args.samples.unwrap_or(if few { 5 } else { 10 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::frames::{Payload, Source};
    use crate::cli::rings::{Layout, Tx};
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn bench(args: &[&str]) -> BenchArgs {
        match Cli::try_parse_from([&["vhost-pci", "bench"], args].concat()) {
            Ok(Cli {
                command: Command::Bench(args),
                ..
            }) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn grouped(args: &BenchArgs) -> Vec<Vec<Case>> {
        plan(args, &args.kinds().unwrap())
    }

    fn planned(args: &[&str]) -> (Vec<Case>, usize) {
        let args = bench(args);
        (grouped(&args).concat(), samples(&args))
    }

    #[test]
    fn quick_is_two_sizes_in_every_direction() {
        let (cases, samples) = planned(&["--quick"]);
        assert_eq!((cases.len(), samples), (8, 5));
        for direction in DIRECTIONS {
            for size in [64, 1518].map(Size::Bytes) {
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
                .all(|case| case.size == Size::Bytes(64) || case.batch == 32 || case.batch == 1)
        );
        assert!(cases.iter().all(|case| case.ring.name() == "split"));
        assert!(request_batches(&bench(&[])).is_empty());
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

    #[test]
    fn rings_are_crossed_with_everything_and_take_turns() {
        let args = [
            "--ring",
            "packed,split",
            "--in-order",
            "on,off,on",
            "--quick",
        ];
        let groups = grouped(&bench(&args));
        assert_eq!(groups.len(), 8);
        for group in groups {
            let names: Vec<String> = group.iter().map(|case| case.ring.name()).collect();
            assert_eq!(
                names,
                ["packed+in-order", "packed", "split+in-order", "split"]
            );
            let first = group[0];
            assert!(group.iter().all(|case| Case {
                ring: first.ring,
                ..*case
            } == first));
        }
    }

    #[test]
    fn sizes_of_rings_are_crossed_with_the_layouts_and_take_turns() {
        let sizes = ["--queue-size", "64,256,64", "--ring", "packed,split"];
        let groups = grouped(&bench(&[&sizes[..], &["--quick"]].concat()));
        assert_eq!(groups.len(), 8);
        for group in groups {
            let names: Vec<String> = group.iter().map(|case| case.ring.name()).collect();
            assert_eq!(names, ["packed/64", "split/64", "packed", "split"]);
        }
        let odd = ["--queue-size", "256,768", "--ring", "packed,split"];
        let error = bench(&odd).kinds().unwrap_err().to_string();
        assert!(error.starts_with("--queue-size 768: "), "{error}");
    }

    #[test]
    fn iommus_are_crossed_with_the_rings_and_take_turns_with_none() {
        let args = bench(&[
            "--iommu",
            "off,static,off",
            "--ring",
            "split,packed",
            "--quick",
        ]);
        let groups = grouped(&args);
        assert_eq!(groups.len(), 8);
        for group in groups {
            let kinds: Vec<_> = group
                .iter()
                .map(|case| (case.ring.layout, case.iommu))
                .collect();
            assert_eq!(
                kinds,
                [
                    (Layout::Split, Iommu::Off),
                    (Layout::Split, Iommu::Static),
                    (Layout::Packed, Iommu::Off),
                    (Layout::Packed, Iommu::Static)
                ]
            );
        }
        assert!(
            grouped(&bench(&[]))
                .concat()
                .iter()
                .all(|case| case.iommu == Iommu::Off)
        );
    }

    #[test]
    fn the_relay_takes_turns_with_the_window_and_has_no_iommu() {
        let paths = |args: &[&str]| -> Vec<_> {
            let groups = grouped(&bench(&[args, &["--quick"]].concat()));
            let first = groups[0].iter().map(|case| (case.iommu, case.path));
            first.collect()
        };
        let (window, relay) = (Path::Window, Path::Relay);
        let all = ["--path", "window,relay", "--iommu", "off,static"];
        assert_eq!(
            paths(&all),
            [
                (Iommu::Off, window),
                (Iommu::Static, window),
                (Iommu::Off, relay)
            ]
        );
        assert_eq!(paths(&["--path", "relay"]), [(Iommu::Off, relay)]);
        assert_eq!(paths(&[]), [(Iommu::Off, window)]);
        let no_back_end = bench(&["--path", "relay", "--iommu-back", "on"]);
        assert!(no_back_end.kinds().is_err());
    }

    #[test]
    fn what_guests_do_takes_turns_as_far_as_it_means_something() {
        let args = bench(&[
            "--payload",
            "every-byte,headers",
            "--source",
            "build,copy",
            "--mode",
            "poll,adaptive",
            "--sizes",
            "64",
            "--batches",
            "32",
            "--directions",
            "be-to-fe,round-trip,echo,idle",
        ]);
        let groups = grouped(&args);
        let sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
        assert_eq!(sizes, [8, 4, 8, 2]);
        let hows: Vec<How> = groups[1].iter().map(|case| case.how).collect();
        let poll = How::USUAL;
        let headers = How {
            payload: Payload::Headers,
            ..poll
        };
        let adaptive = |how| How {
            mode: Mode::Adaptive,
            ..how
        };
        assert_eq!(hows, [poll, headers, adaptive(poll), adaptive(headers)]);
        assert!(
            groups[1]
                .iter()
                .all(|case| case.how.source == Source::Build)
        );
        assert!(
            grouped(&bench(&[]))
                .concat()
                .iter()
                .all(|case| case.how == poll)
        );
    }

    #[test]
    fn a_mix_goes_one_way_or_both_and_does_not_come_back() {
        let args = ["--sizes", "imix", "--batches", "32", "--latency-load", "50"];
        let ways: Vec<Direction> = planned(&args).0.iter().map(|case| case.direction).collect();
        assert_eq!(
            ways,
            [Direction::BeToFe, Direction::FeToBe, Direction::Both]
        );
    }

    #[test]
    fn loads_take_turns_and_are_parts_of_what_an_echo_reaches() {
        let of = [
            "--directions",
            "be-to-fe",
            "--sizes",
            "64",
            "--latency-load",
            "0,10,90",
        ];
        let groups = grouped(&bench(&of));
        let (last, others) = groups.split_last().unwrap();
        // The usual batch only, where no other is asked for.
        assert!(groups.len() == 7 && last.len() == 1);
        let loaded = others.iter().find(|group| group.len() == 3).unwrap();
        assert!(
            loaded
                .iter()
                .all(|case| case.direction == Direction::RoundTrip && case.batch == 32)
        );
        let rates: Vec<_> = loaded.iter().map(|case| case.rate(20.0)).collect();
        assert_eq!(rates, [Some(100_000), Some(2_000_000), Some(18_000_000)]);
        assert_eq!(last[0].rate(20.0), None);
        let whole = loaded[1].whole_load();
        assert_eq!(
            (whole.direction, whole.load, whole.batch),
            (Direction::Echo, None, 32)
        );
        let asleep = Case {
            how: How {
                mode: Mode::Irq,
                ..How::USUAL
            },
            ..loaded[0]
        };
        assert_eq!(asleep.rate(20.0), Some(500));
        assert!(Cli::try_parse_from(["vhost-pci", "bench", "--latency-load", "101"]).is_err());
    }

    #[test]
    fn the_sweep_has_four_rings_seven_batches_and_two_directions() {
        let args = bench(&["--sweep", "rings"]);
        let groups = grouped(&args);
        assert_eq!((groups.len(), samples(&args)), (14, 5));
        assert!(groups.iter().all(|group| group.len() == 4));
        assert!(
            groups
                .concat()
                .iter()
                .all(|case| case.size == Size::Bytes(64))
        );
        assert_eq!(request_batches(&args), SWEEP_BATCHES);
        assert_eq!(args.sample_ms(), 50);

        let args = bench(&["--sweep", "rings", "--batches", "8,8", "--ring", "packed"]);
        assert_eq!(grouped(&args).concat().len(), 2 * 2);
        assert_eq!(request_batches(&args), [8]);
        assert!(
            Cli::try_parse_from(["vhost-pci", "bench", "--sweep", "rings", "--quick"]).is_err()
        );
    }

    #[test]
    fn a_figure_is_of_features_that_are_known() {
        let setup = |args: &[&str]| bench(args).ring_setup();
        let of = |args: &[&str]| {
            let setup = setup(args).unwrap();
            (setup.event_idx, setup.mrg_rxbuf, setup.indirect, setup.tx)
        };
        let (on, off) = (Some(true), Some(false));
        assert_eq!(of(&[]), (off, off, off, Some(Tx::Direct)));
        assert_eq!(of(&["--mode", "irq"]).0, on);
        assert_eq!(of(&["--mode", "poll,adaptive"]).0, on);
        assert_eq!(of(&["--mode", "irq", "--event-idx", "off"]).0, off);
        assert_eq!(of(&["--rx-buffer", "512"]).1, on);
        assert_eq!(of(&["--indirect", "on"]).3, Some(Tx::Indirect));
        assert_eq!(of(&["--tx", "indirect"]).2, on);
        assert_eq!(
            of(&["--tx", "chain", "--indirect", "on"]).3,
            Some(Tx::Chain)
        );
        assert!(setup(&["--tx", "indirect", "--indirect", "off"]).is_err());
        let long = setup(&["--sizes", "64,65536"]).unwrap();
        assert_eq!((long.offload, long.mrg_rxbuf), (on, on));
        assert_eq!(setup(&["--sizes", "1518"]).unwrap().offload, off);
        assert_eq!(setup(&["--offload", "on"]).unwrap().offload, on);
        assert!(setup(&["--sizes", "1519", "--offload", "off"]).is_err());
        assert!(
            bench(&["--sizes", "1519", "--path", "relay"])
                .kinds()
                .is_err()
        );
        assert!(setup(&["--queue-size", "768"]).is_err());
        assert!(setup(&["--queue-size", "768", "--ring", "split,packed"]).is_err());
        let packed = setup(&["--queue-size", "768", "--ring", "packed"]).unwrap();
        assert_eq!(packed.size, 768);
        assert_eq!(bench(&[]).ring_list().unwrap()[0].layout, Layout::Split);
    }
}

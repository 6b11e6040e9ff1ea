extern crate std;
use super::*;
use guest_driver::net_port::TxShape;
use guest_driver::vhost_pci::Offer;
use std::vec::Vec;
use virtqueue::net::{GUEST_OFFLOADS, HOST_OFFLOADS};

#[test]
fn a_run_command_takes_every_key() {
    let line = "run id=7 work=round-trip size=1518 batch=8 ms=20 warmup_ms=1 count=9 mode=irq timeout_ms=30 churn=1000 end=back-end queues=16 flips=50 flows=64 turns=9 offload=on payload=headers source=copy rate=1000 delay_ms=3 mac=02:00:00:00:0a:ff addr=192.168.7.9/16";
    let want = Run {
        id: 7,
        work: Work::RoundTrip,
        size: 1518,
        imix: false,
        payload: Payload::Headers,
        source: Source::Copy,
        batch: 8,
        ms: 20,
        warmup_ms: 1,
        count: 9,
        mode: Mode::Irq,
        rate: 1000,
        delay_ms: 3,
        timeout_ms: 30,
        churn: 1000,
        queues: 16,
        flips: 50,
        flows: 64,
        turns: 9,
        offload: true,
        end: Some(End::BackEnd),
        address: Address {
            mac: [2, 0, 0, 0, 0x0a, 0xff],
            ip: [192, 168, 7, 9],
            prefix: 16,
        },
    };
    assert_eq!(Command::parse(line), Ok(Some(Command::Run(want))));
    assert_eq!(Command::parse("exit code=9"), Ok(Some(Command::Exit(9))));
    assert_eq!(Command::parse("reset-rings"), Ok(Some(Command::ResetRings)));
    assert_eq!(
        Command::parse("reset-device"),
        Ok(Some(Command::ResetDevice))
    );
    assert_eq!(Command::parse("  "), Ok(None));
    let line = "rss table=0,3,1,2 key=6d5aFF types=0x5 unclassified=1";
    let want = rss::Config::new(5, 1, &[0, 3, 1, 2], 4, &[0x6d, 0x5a, 0xff], 4).unwrap();
    assert_eq!(Command::parse(line), Ok(Some(Command::Rss(Box::new(want)))));
}

#[test]
fn a_mix_is_a_size_and_the_bytes_of_its_frames_are_those_of_the_average() {
    let run = |line| match Command::parse(line) {
        Ok(Some(Command::Run(run))) => run,
        other => panic!("{other:?}"),
    };
    let mix = run("run work=source size=imix");
    assert!(mix.imix);
    assert_eq!(mix.bytes(48), 28 * 64 + 16 * 570 + 4 * 1518);
    let one = run("run work=source size=imix size=65");
    assert!(!one.imix);
    assert_eq!(one.bytes(3), 195);
}

#[test]
fn an_adaptive_end_sleeps_when_it_has_polled_in_vain_for_a_while() {
    let run = |mode| Run {
        mode,
        ..Run::default()
    };
    let sleeps =
        |mode| [0, ADAPTIVE_TURNS - 1, ADAPTIVE_TURNS, u32::MAX].map(|n| run(mode).sleeps(n));
    assert_eq!(sleeps(Mode::Poll), [false; 4]);
    assert_eq!(sleeps(Mode::Irq), [true; 4]);
    assert_eq!(sleeps(Mode::Adaptive), [false, false, true, true]);
}

#[test]
fn every_step_of_the_study_is_understood_and_keeps_its_name() {
    let sweep = Sweep {
        offset: 0x1000,
        len: 64,
        step: 16,
        width: 4,
        seed: 9,
    };
    for (line, want) in [
        ("pages count=16", Study::Pages { count: 16 }),
        ("attach", Study::Attach),
        ("detach", Study::Detach),
        (
            "map iova=0x1000 gpa=0x2000 len=4096 perm=rw",
            Study::Map {
                iova: 0x1000,
                gpa: 0x2000,
                len: 4096,
                flags: 3,
            },
        ),
        (
            "map perm=none len=1 gpa=2 iova=3",
            Study::Map {
                iova: 3,
                gpa: 2,
                len: 1,
                flags: 0,
            },
        ),
        (
            "unmap iova=0x1000 len=0xffffffffffffffff",
            Study::Unmap {
                iova: 0x1000,
                len: u64::MAX,
            },
        ),
        (
            "fill gpa=1 len=2 seed=3",
            Study::Fill {
                gpa: 1,
                len: 2,
                seed: 3,
            },
        ),
        (
            "check gpa=1 len=2 seed=3",
            Study::Check {
                gpa: 1,
                len: 2,
                seed: 3,
            },
        ),
        ("faults", Study::Faults),
        ("start", Study::Start),
        (
            "windows live=8192 count=100",
            Study::Windows {
                live: 8192,
                count: 100,
            },
        ),
        (
            "race rounds=10 iova=1 gpa=2 sync=3",
            Study::Victim {
                rounds: 10,
                iova: 1,
                gpa: 2,
                sync: 3,
            },
        ),
        ("kicks count=7", Study::Kicks { count: 7 }),
        (
            "peek offset=0x1000 len=64 step=16 width=4 seed=9",
            Study::Peek(sweep),
        ),
        (
            "poke offset=0x1000 len=64",
            Study::Poke(Sweep {
                step: 8,
                width: 8,
                seed: 0,
                ..sweep
            }),
        ),
        (
            "race offset=1 sync=2 ms=3",
            Study::Attacker {
                offset: 1,
                sync: 2,
                ms: 3,
            },
        ),
        ("calls count=7", Study::Calls { count: 7 }),
        (
            "messages what=garbage count=2",
            Study::Messages {
                what: Junk::Garbage,
                count: 2,
            },
        ),
    ] {
        assert_eq!(Command::parse(line), Ok(Some(Command::Study(want))));
        assert!(line.starts_with(want.name()));
    }
    for device in [false, true] {
        for &what in Scribble::of(device) {
            let line = std::format!("scribble what={} count=5 seed=1", what.name());
            let want = Study::Scribble {
                what,
                count: 5,
                seed: 1,
            };
            assert_eq!(Command::parse(&line), Ok(Some(Command::Study(want))));
        }
    }
}

#[test]
fn the_command_line_says_how_the_iommu_is_used() {
    for (word, mode) in [
        ("", IommuMode::Static),
        ("iommu=static", IommuMode::Static),
        ("iommu=dynamic", IommuMode::Dynamic),
        ("iommu=batch", IommuMode::Batch),
        ("iommu=manual", IommuMode::Manual),
    ] {
        let boot = Boot::parse(word, |word| panic!("{word}"));
        assert_eq!((boot.iommu, boot.iova), (mode, 0x1_0000_0000));
    }
    let boot = Boot::parse("iova=0x200000000", |word| panic!("{word}"));
    assert_eq!(boot.iova, 0x2_0000_0000);
    let mut unknown = Vec::new();
    Boot::parse("iommu=perhaps iova=far", |word| unknown.push(word));
    assert_eq!(unknown, ["iommu=perhaps", "iova=far"]);
}

#[test]
fn what_is_wrong_is_named() {
    for (line, word) in [
        ("run work=source size=59", "size=59"),
        ("run work=source size=65550", "size=65550"),
        ("run work=source offload=perhaps", "offload=perhaps"),
        ("run work=source size=simix", "size=simix"),
        ("run work=source payload=none", "payload=none"),
        ("run work=source source=clone", "source=clone"),
        ("run work=source rate=1000000001", "rate=1000000001"),
        ("run work=source batch=0", "batch=0"),
        ("run work=source batch=257", "batch=257"),
        ("run work=dance", "work=dance"),
        ("run work=source mode=maybe", "mode=maybe"),
        ("run work=source id=65536", "id=65536"),
        ("run size=64", "run size=64"),
        ("stop", "stop"),
        ("exit now", "now"),
        ("reset-rings now", "now"),
        ("reset-device now", "now"),
        ("exit code=256", "code=256"),
        ("attach now", "now"),
        ("map iova=0 gpa=0 len=0 perm=r", "len=0"),
        ("map iova=0 gpa=0 len=1 perm=x", "perm=x"),
        ("map iova=0 gpa=0 len=1", "map iova=0 gpa=0 len=1"),
        ("peek offset=0 len=8 width=3", "width=3"),
        ("peek offset=0 len=8 step=0", "step=0"),
        ("poke offset=0 len=8 color=red", "color=red"),
        ("windows live=8193 count=1", "live=8193"),
        ("race rounds=1048577 iova=0 gpa=0 sync=0", "rounds=1048577"),
        ("race offset=0 sync=0", "race offset=0 sync=0"),
        ("scribble what=nothing count=1 seed=0", "what=nothing"),
        ("kicks count=0", "count=0"),
        ("kicks count=1 seed=0", "seed=0"),
        ("messages what=reply", "messages what=reply"),
        ("run work=source churn=100001", "churn=100001"),
        ("run work=source end=middle", "end=middle"),
        ("run work=respond addr=10.0.0.1", "addr=10.0.0.1"),
        ("run work=respond addr=10.0.0.1/33", "addr=10.0.0.1/33"),
        ("run work=respond addr=10.0.0/24", "addr=10.0.0/24"),
        ("run work=respond addr=0.0.0.0/8", "addr=0.0.0.0/8"),
        ("run work=respond addr=224.0.0.1/8", "addr=224.0.0.1/8"),
        (
            "run work=respond mac=01:00:00:00:00:01",
            "mac=01:00:00:00:00:01",
        ),
        (
            "run work=respond mac=00:00:00:00:00:00",
            "mac=00:00:00:00:00:00",
        ),
        ("run work=respond mac=02:00:00:00:01", "mac=02:00:00:00:01"),
        (
            "run work=respond mac=02:00:00:00:00:+1",
            "mac=02:00:00:00:00:+1",
        ),
        ("run work=source queues=0", "queues=0"),
        ("run work=source queues=17", "queues=17"),
        ("run work=source flips=1001", "flips=1001"),
        ("run work=source flows=65", "flows=65"),
        ("run work=source turns=1001", "turns=1001"),
        ("rss key=00", "rss key=00"),
        ("rss table=0", "rss table=0"),
        ("rss table=0,x key=00", "table=0,x"),
        ("rss table=0 key=0", "key=0"),
        ("rss table=0 key=+1", "key=+1"),
        ("rss table=0 key=00 types=4294967296", "types=4294967296"),
        ("rss table=0 key=00 tx=1", "tx=1"),
        // No power of two, a pair that no workload has, a hash type that there is not.
        ("rss table=0,1,2 key=00", "rss table=0,1,2 key=00"),
        ("rss table=16 key=00", "rss table=16 key=00"),
        ("rss table=0 key=00 types=64", "rss table=0 key=00 types=64"),
    ] {
        assert_eq!(Command::parse(line), Err(BadWord(word)));
    }
}

#[test]
fn the_command_line_keeps_what_it_knows_and_reports_the_rest() {
    let mut unknown = Vec::new();
    let boot = Boot::parse(
        "work=sink quiet ms=5 ecam=0xe0000000 tsc_khz=2596000 size=1",
        |word| unknown.push(word),
    );
    assert_eq!((boot.ecam, boot.tsc_khz), (0xe000_0000, 2_596_000));
    assert_eq!(
        boot.run,
        Some(Run {
            work: Work::Sink,
            ms: 5,
            ..Run::default()
        })
    );
    assert_eq!(unknown, ["quiet", "size=1"]);
    let boot = Boot::parse("tx=indirect rx_buffer=512", |word| panic!("{word}"));
    assert_eq!(
        (boot.shape.tx, boot.shape.rx_buffer),
        (TxShape::Indirect, 512)
    );
    let boot = Boot::parse("indirect=off rss=off", |word| panic!("{word}"));
    let (indirect, rss) = (false, false);
    assert_eq!(
        boot.offer,
        Offer {
            indirect,
            rss,
            ..Boot::default().offer
        }
    );
    // What the workloads can make use of.
    let all = HOST_OFFLOADS | GUEST_OFFLOADS;
    assert_eq!((boot.offer.offloads, boot.shape.offloads), (all, all));
    let mut unknown = Vec::new();
    Boot::parse("tx=fast rx_buffer=127 rx_buffer=1531", |word| {
        unknown.push(word)
    });
    assert_eq!(unknown, ["tx=fast", "rx_buffer=127", "rx_buffer=1531"]);
    assert_eq!(Boot::parse("work=control", |_| ()).run, None);
    let boot = Boot::parse("capture=1000 snaplen=96", |word| panic!("{word}"));
    assert_eq!((boot.capture.frames, boot.capture.snaplen), (1000, 96));
    assert_eq!(Boot::parse("", |_| ()).capture.frames, 0);
    let mut unknown = Vec::new();
    let words = "capture=65537 capture=-1 snaplen=0 snaplen=16385";
    Boot::parse(words, |word| unknown.push(word));
    assert_eq!(unknown, words.split(' ').collect::<Vec<_>>());
    let boot = Boot::parse("queues=4 work=both", |word| panic!("{word}"));
    assert_eq!((boot.queues, boot.run.map(|run| run.queues)), (4, Some(4)));
}

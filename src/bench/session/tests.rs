//! The session against guests that are threads of the test.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::*;
use crate::cli::frames::{How, Size};
use crate::cli::rings::{Layout, Ring};
use vmm::{HugePages, MemoryConfig};

const RING: Ring = Ring {
    layout: Layout::Split,
    in_order: false,
    size: 256,
};
const CASE: Case = Case {
    ring: RING,
    iommu: Iommu::Off,
    path: Path::Window,
    direction: Direction::BeToFe,
    size: Size::Bytes(64),
    batch: 32,
    how: How::USUAL,
    load: None,
};

fn setup() -> Setup {
    Setup {
        ms: 10,
        back_iommu: false,
        warmup_ms: 1,
        how: How::USUAL,
        cores: [0, 1],
        rings: RingSetup {
            size: 256,
            ..RingSetup::default()
        },
        memory: MemoryConfig {
            size: 1 << 20,
            hugepages: HugePages::Off,
            prefault: false,
            dma: 0,
        },
        vms: crate::cli::vms::VmsArgs::default(),
    }
}

/// A session whose guests answer each line with what `guest(side, line)` returns; `None` closes the channel.
fn session(
    guest: impl Fn(usize, &str) -> Option<String> + Clone + Send + 'static,
) -> (Session, [thread::JoinHandle<Vec<String>>; 2]) {
    let mut threads = Vec::new();
    let sides = [0, 1].map(|side| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guest = guest.clone();
        threads.push(thread::spawn(move || {
            let mut seen = Vec::new();
            let mut out = theirs.try_clone().unwrap();
            for line in BufReader::new(theirs).lines() {
                let line = line.unwrap();
                let Some(answer) = guest(side, &line) else {
                    break;
                };
                seen.push(line);
                // The session may have given up already.
                let _ = out.write_all(answer.as_bytes());
            }
            seen
        }));
        Guest::played(NAMES[side], ours)
    });
    let session = Session {
        sides,
        relay: None,
        waiting: VecDeque::new(),
        signals: None,
        setup: Rc::new(setup()),
        rings: RingSetup {
            event_idx: Some(true),
            ..setup().rings.with(RING)
        },
        kind: CASE.kind(),
        tsc_khz: 1_000_000,
        bound: None,
        id: 0,
        commands: Vec::new(),
        churn: 0,
        _directory: None,
    };
    (session, threads.try_into().unwrap())
}

fn word<'a>(line: &'a str, key: &str) -> &'a str {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .unwrap()
}

/// A guest of docs/bare-metal.md, and its VMM, whose counter grows by 100 from one question to the next.
fn good() -> impl Fn(usize, &str) -> Option<String> + Clone + Send + 'static {
    let asked = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    move |side, line| {
        if line == "vmm stats" {
            let asked = asked[side].fetch_add(1, Ordering::Relaxed);
            return Some(format!(
                "{{\"record\":\"vmm\",\"vcpus\":[{{\"tid\":1,\"exits\":{{\"io_out\":{}}},\
                 \"kvm\":{{\"exits\":9,\"halt_wait\":{asked}}}}}]}}\n",
                100 * asked
            ));
        }
        assert!(line.starts_with("run "));
        let (id, work) = (word(line, "id"), word(line, "work"));
        // At 1 GHz, 5000 frames in a millisecond.
        let received = "\"rx_frames\":5000,\"rx_ticks\":1000000,\"lost\":0,\"duplicated\":0,\
                        \"reordered\":0,\"corrupted\":0,\"verified\":6000,";
        let part = if work == "source" { "" } else { received };
        Some(format!(
            "{{\"record\":\"hello\"}}\n\n{{\"record\":\"result\",\"id\":{id},{part}\"timeout\":0}}\n"
        ))
    }
}

#[test]
fn of_two_front_ends_one_sends_what_a_back_end_sends() {
    let (mut session, threads) = session(good());
    let case = Case {
        path: Path::Relay,
        ..CASE
    };
    session.guests(&CASE).unwrap();
    session.kind = case.kind();
    session.guests(&case).unwrap();
    drop(session);
    let [first, second]: [Vec<bool>; 2] = threads.map(|thread| {
        let lines = thread.join().unwrap();
        let runs = lines.into_iter().filter(|line| line.starts_with("run "));
        runs.map(|line| line.contains(" end=back-end")).collect()
    });
    assert_eq!((first, second), (vec![false, true], vec![false, false]));
}

#[test]
fn a_sample_is_put_together_from_both_guests() {
    let (mut session, threads) = session(good());
    let sample = session.guests(&CASE).unwrap();
    assert!((sample.result.mpps - 5.0).abs() < 1e-9);
    assert_eq!(sample.result.verified, 6000);
    assert_eq!(sample.exits["io_out"], 200);
    assert_eq!(sample.kvm_exits.keys().collect::<Vec<_>>(), ["exits"]);
    drop(session);
    let [back, front] = threads.map(|thread| thread.join().unwrap());
    assert_eq!(word(&back[1], "work"), "source");
    assert_eq!(word(&front[1], "work"), "sink");
    assert_eq!(word(&back[1], "ms"), "10");
}

#[test]
fn a_load_is_a_part_of_what_an_echo_has_just_reached() {
    let good = good();
    let (mut session, threads) = session(move |side, line| {
        let answer = good(side, line)?;
        let trips = "\"rtt\":{\"count\":9,\"p50\":1,\"p90\":2,\"p99\":3,\"p999\":4,\"max\":5},";
        Some(match line.contains("work=round-trip") {
            true => answer.replace("\"timeout\"", &format!("{trips}\"timeout\"")),
            false => answer,
        })
    });
    let case = Case {
        direction: Direction::RoundTrip,
        load: Some(90),
        ..CASE
    };
    let sample = session.guests(&case).unwrap();
    assert_eq!(sample.offered_mpps, Some(4.5));
    assert_eq!((sample.result.frames, sample.result.verified), (9, 24_000));
    let idle = Case {
        direction: Direction::Idle,
        load: None,
        ..CASE
    };
    session.guests(&idle).unwrap();
    drop(session);
    let [back, front] = threads.map(|thread| {
        let lines = thread.join().unwrap();
        let runs = lines.into_iter().filter(|line| line.starts_with("run "));
        runs.collect::<Vec<_>>()
    });
    let works = |lines: &[String]| -> Vec<String> {
        lines
            .iter()
            .map(|line| word(line, "work").to_owned())
            .collect()
    };
    assert_eq!(works(&back), ["both", "round-trip", "source"]);
    assert_eq!(works(&front), ["echo", "echo", "sink"]);
    assert!(!back[0].contains("rate="));
    assert_eq!(word(&back[1], "rate"), "4500000");
    assert_eq!(word(&back[2], "rate"), "1");
    assert!(front.iter().all(|line| !line.contains("rate=")));
    assert!(
        back.iter()
            .all(|line| line.contains(" payload=every-byte source=build mode=poll "))
    );
}

#[test]
fn a_result_of_an_earlier_run_is_not_taken_for_this_one() {
    let good = good();
    let (mut session, _threads) = session(move |side, line| {
        let answer = good(side, line)?;
        if line == "vmm stats" {
            return Some(answer);
        }
        let stale = "{\"record\":\"result\",\"id\":60000,\"rx_frames\":1,\"rx_ticks\":1}\n";
        Some(format!("{stale}{answer}"))
    });
    let sample = session.guests(&CASE).unwrap();
    assert_eq!(sample.result.frames, 5000);
}

#[test]
fn a_guest_that_dies_reports_or_loses_its_peer_ends_the_session_at_once() {
    type Guest = fn(usize, &str) -> Option<String>;
    let cases: [(Guest, &str); 4] = [
        (|_, _| None, "VM closed its control channel"),
        (
            |_, _| Some("{\"record\":\"error\",\"what\":\"no device\"}\n".into()),
            "guest: no device",
        ),
        (
            |_, _| Some("{\"record\":\"down\"}\n".into()),
            "lost its peer",
        ),
        (
            |_, _| Some("Segmentation fault\n".into()),
            "sent no record: Segm",
        ),
    ];
    for (guest, want) in cases {
        let (mut session, _threads) = session(guest);
        let start = Instant::now();
        let error = format!("{:#}", session.guests(&CASE).unwrap_err());
        assert!(error.contains(want), "{error}");
        assert!(start.elapsed() < ANSWER, "{want}");
    }
}

#[test]
fn a_guest_that_says_nothing_is_not_waited_for_for_ever() {
    let (mut session, _threads) = session(|_, _| Some(String::new()));
    let deadline = Instant::now() + Duration::from_millis(30);
    let error = session.wait_until_ready(deadline).unwrap_err().to_string();
    assert!(error.contains("back-end guest to be ready"), "{error}");
    assert!(Instant::now() >= deadline);
}

#[test]
fn both_guests_have_to_be_ready_and_stay_so() {
    let (mut session, _threads) = session(|side, _| {
        // What the back-end says of itself is no matter: EVENT_IDX (bit 29) is the front-end's to have.
        let features = (side as u64) << 29;
        let ready = &format!(
            "{{\"record\":\"ready\",\"role\":\"x\",\"tsc_khz\":2000000,\"features\":{features}}}\n"
        );
        Some(match side {
            0 => format!("{ready}{{\"record\":\"down\"}}\n{ready}"),
            _ => ready.to_owned(),
        })
    });
    session.send(0, "go").unwrap();
    session.send(1, "go").unwrap();
    session.wait_until_ready(Instant::now() + ANSWER).unwrap();
    assert_eq!(session.tsc_khz, 2_000_000);
}

#[test]
fn guests_that_agreed_on_other_features_are_not_measured() {
    for (features, want) in [
        (0_u64, "VIRTIO_F_EVENT_IDX"),
        (1 << 29 | 1 << 34, "packed=off"),
    ] {
        let (mut session, _threads) = session(move |_, _| {
            Some(format!(
                "{{\"record\":\"ready\",\"tsc_khz\":1,\"features\":{features}}}\n"
            ))
        });
        session.send(FRONT_END, "go").unwrap();
        let error = session.wait_until_ready(Instant::now() + ANSWER);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn an_endless_line_is_refused() {
    let (mut session, _threads) = session(|_, _| Some("x".repeat(70 << 10)));
    let error = session.guests(&CASE).unwrap_err().to_string();
    assert!(error.contains("line of more than"), "{error}");
}

#[test]
fn shares_are_what_the_vcpu_had_without_the_other_threads() {
    let at = Instant::now();
    let first = Cpu {
        at,
        all: [1_000_000; 2],
        others: [500_000; 2],
        relay: 2_000_000,
    };
    let second = Cpu {
        at: at + Duration::from_millis(100),
        all: [97_000_000, 51_000_000],
        others: [1_500_000, 500_000],
        relay: 34_000_000,
    };
    let (shares, others) = first.between(&second);
    assert!((shares[0] - 0.95).abs() < 1e-9 && (shares[1] - 0.5).abs() < 1e-9);
    assert!((others[0] - 1.0).abs() < 1e-9 && others[1] == 0.0);
    // 96 + 50 + 32 ms in 100.
    assert!((first.busy(&second) - 1.78).abs() < 1e-9);
}

use serde_json::Value;

use super::*;
use crate::bench::pairs::{BoundSample, VmSample};
use crate::bench::plan::Case;
use crate::bench::record::SampleResult;
use crate::bench::requests::{Request, RequestCase};
use crate::cli::rings::Layout;
use crate::json::JsonFile;
use crate::tempdir::TempDir;
use vmm::MemoryConfig;

pub fn pair(mpps: f64, bound: f64, probe_ns: f64) -> Pair {
    let result = |mpps| SampleResult {
        mpps,
        frames: 1_000_000,
        verified: 1_100_000,
        ..SampleResult::default()
    };
    Pair {
        vm: VmSample {
            result: result(mpps),
            shares: Some([0.99, 0.98]),
            others_percent: [0.01, 0.02],
            exits: [("io_out".to_owned(), 300)].into(),
            kvm_exits: [("exits".to_owned(), 400)].into(),
            busy_cores: 2.0,
            offered_mpps: None,
        },
        bound: BoundSample {
            result: result(bound),
            ..BoundSample::default()
        },
        probe_ns,
        round: 0,
    }
}

pub fn measured(direction: Direction, pairs: Vec<Pair>) -> Measured {
    Measured {
        case: Case {
            ring: Ring {
                layout: Layout::Split,
                in_order: false,
                size: 256,
            },
            iommu: Iommu::Off,
            path: Path::Window,
            direction,
            size: Size::Bytes(64),
            batch: 32,
            how: How::USUAL,
            load: None,
        },
        pairs,
        moved: 2,
        disturbed: 1,
        faults: Faults::default(),
        bound_faults: Faults::default(),
        verified: 7,
    }
}

pub fn setup() -> Setup {
    Setup {
        ms: 100,
        back_iommu: false,
        warmup_ms: 5,
        how: How::USUAL,
        cores: [0, 1],
        rings: RingSetup {
            size: 256,
            tx: Some(Tx::Direct),
            ..RingSetup::default()
        },
        memory: MemoryConfig {
            size: 1 << 28,
            hugepages: HugePages::Size2M,
            prefault: true,
            dma: 0,
        },
        vms: crate::cli::vms::VmsArgs::default(),
    }
}

fn json(measured: &[Measured]) -> Value {
    serde_json::to_value(Report::new(&setup(), 2_596_000, measured, &[])).unwrap()
}

#[test]
fn what_guests_do_stands_beside_what_they_did_first_round_by_round() {
    let at = |mpps, round| {
        let mut pair = pair(mpps, 20.0, 100.0);
        pair.round = round;
        pair
    };
    let first = measured(Direction::BeToFe, vec![at(10.0, 0), at(8.0, 1)]);
    let mut adaptive = measured(Direction::BeToFe, vec![at(4.0, 1), at(5.0, 2)]);
    adaptive.case.how.mode = Mode::Adaptive;
    let mut other_size = adaptive.clone();
    other_size.case.size = Size::Imix;
    let json = json(&[first, adaptive, other_size]);
    let entry = &json["variants"][0];
    assert_eq!(entry["speed"]["samples"].to_string(), "[0.5]");
    assert_eq!(
        (&entry["mode"], &entry["over"]["mode"]),
        (&"adaptive".into(), &"poll".into())
    );
    assert!(json["variants"].get(1).is_none());
    assert_eq!(json["results"][0]["payload"], "every-byte");
    assert_eq!(json["results"][1]["mode"], "adaptive");
    // The bits of a mix are those of its average frame.
    assert_eq!(json["results"][2]["frame_size"], "imix");
    let mean = 16984.0 / 48.0;
    let gbps = json["results"][2]["gbps"]["max"].as_f64().unwrap();
    assert!((gbps - 5.0 * mean * 8.0 / 1000.0).abs() < 1e-3);
}

#[test]
fn a_load_is_of_round_trips_and_what_waits_has_no_rate() {
    let mut loaded = pair(0.0, 0.0, 100.0);
    (loaded.vm.offered_mpps, loaded.bound.offered_mpps) = (Some(2.5), Some(3.0));
    let mut trips = measured(Direction::RoundTrip, vec![loaded]);
    trips.case.load = Some(50);
    let mut idle = pair(0.0, 0.0, 100.0);
    idle.vm.busy_cores = 0.002;
    let json = json(&[trips, measured(Direction::Idle, vec![idle])]);
    let [trips, idle] = [&json["results"][0], &json["results"][1]];
    assert_eq!(trips["load_percent"], 50);
    assert_eq!(trips["offered_mpps"]["median"], 2.5);
    assert_eq!(trips["bound_offered_mpps"]["median"], 3.0);
    assert!(trips.get("idle_cpu_percent").is_none() && idle.get("load_percent").is_none());
    assert_eq!(idle["idle_cpu_percent"]["median"], 0.2);
    for key in ["mpps", "gbps", "bound_mpps"] {
        assert!(trips.get(key).is_none() && idle.get(key).is_none(), "{key}");
    }
}

#[test]
fn the_window_stands_beside_the_relay_round_by_round() {
    let at = |mpps, busy_cores, round| {
        let mut pair = pair(mpps, 20.0, 100.0);
        (pair.vm.busy_cores, pair.round) = (busy_cores, round);
        pair
    };
    let window = measured(Direction::BeToFe, vec![at(12.0, 2.0, 0), at(10.0, 2.0, 1)]);
    let mut relay = measured(Direction::BeToFe, vec![at(4.0, 1.6, 1), at(5.0, 2.0, 2)]);
    relay.case.path = Path::Relay;
    let json = json(&[window, relay]);
    let entry = &json["paths"][0];
    assert_eq!(entry["speed"]["samples"].to_string(), "[2.5]");
    assert_eq!(entry["cpu"]["samples"].to_string(), "[0.5]");
    assert_eq!(entry["distance"], "near");
    assert!(json["paths"].get(1).is_none());
    assert_eq!(json["results"][1]["path"], "relay");
    assert_eq!(json["results"][1]["cpu_ns_per_frame"]["median"], 400.0);
    assert!(json["results"][1].get("least_vcpu_share").is_none());
}

#[test]
fn every_key_of_the_contract_is_there() {
    let pairs = vec![
        pair(10.0, 12.5, 100.0),
        pair(8.0, 16.0, 110.0),
        pair(9.0, 10.0, 120.0),
    ];
    let json = json(&[measured(Direction::BeToFe, pairs)]);
    assert_eq!(json["schema_version"], 1);
    assert!(json["command"].is_array());
    let environment = &json["environment"];
    for key in [
        "kernel",
        "cpu_model",
        "hugepages_2m",
        "kvm_modules",
        "cores",
    ] {
        assert!(environment.get(key).is_some(), "{key}");
    }
    let report = Report::new(&setup(), 1, &[], &[]).with_core_distance([100.00001, 412.0]);
    let distance = serde_json::to_value(report).unwrap()["environment"]["core_distance_ns"].take();
    assert_eq!(distance.to_string(), "[100.0,412.0]");
    assert_eq!(environment["tsc_khz"], 2_596_000);
    assert_eq!(environment["memory"]["hugepages"], "2M");
    let result = &json["results"][0];
    let want = [
        ("direction", "\"be-to-fe\""),
        ("path", "\"window\""),
        ("ring", "\"split\""),
        ("in_order", "false"),
        ("event_idx", "false"),
        ("mrg_rxbuf", "false"),
        ("indirect", "false"),
        ("offload", "false"),
        ("tx", "\"direct\""),
        ("queue_size", "256"),
        ("iommu", "\"off\""),
        ("frame_size", "64"),
        ("batch", "32"),
        ("queue_pairs", "1"),
        ("distance", "\"near\""),
        ("probe_ns", "110.0"),
        ("ratio", "0.8"),
        ("frames", "3000000"),
        ("verified", "7"),
        ("lost", "0"),
        ("duplicated", "0"),
        ("reordered", "0"),
        ("corrupted", "0"),
    ];
    for (key, value) in want {
        assert_eq!(result[key].to_string(), value, "{key}");
    }
    for key in ["mpps", "gbps", "bound_mpps"] {
        let spread = &result[key];
        assert!(
            spread["median"].is_number() && spread["min"].is_number() && spread["max"].is_number()
        );
        assert_eq!(spread["samples"].as_array().unwrap().len(), 3, "{key}");
    }
    assert_eq!(result["mpps"]["median"], 9.0);
    assert_eq!(result["gbps"]["median"], 4.608);
    assert_eq!(result["exits"]["io_out"], 900);
    assert_eq!(result["exits"]["per_frame"], 0.0003);
    assert_eq!(result["exits"]["kvm"]["exits"], 1200);
    assert_eq!(result["cpu"]["vcpu_share"][1], 0.98);
    assert_eq!(result["cpu"]["other_threads_percent"][0], 0.01);
    assert_eq!(result["dropped_samples"]["cores_moved"], 2);
    assert!(result.get("latency_ns").is_none());
    assert!(json.get("requests").is_none() && json.get("counters").is_none());
}

#[test]
fn the_rings_that_were_asked_for_are_in_the_entry() {
    let mut case = measured(Direction::BeToFe, vec![]);
    case.case.ring = Ring {
        layout: Layout::Packed,
        in_order: true,
        size: 768,
    };
    let mut setup = setup();
    setup.rings.mrg_rxbuf = Some(true);
    setup.rings.rx_buffer = Some(512);
    let json = serde_json::to_value(Report::new(&setup, 1, &[case], &[])).unwrap();
    let result = &json["results"][0];
    for (key, value) in [
        ("ring", "\"packed\""),
        ("in_order", "true"),
        ("event_idx", "false"),
        ("mrg_rxbuf", "true"),
        ("rx_buffer", "512"),
        ("queue_size", "768"),
    ] {
        assert_eq!(result[key].to_string(), value, "{key}");
    }
}

fn requests(place: Where, samples: &[(f64, f64)]) -> Requests {
    let sample = |&(ns, probe_ns)| Request {
        ns,
        misses: None,
        probe_ns,
    };
    Requests {
        case: RequestCase {
            ring: Ring {
                layout: Layout::Packed,
                in_order: true,
                size: 256,
            },
            batch: 8,
            place,
        },
        samples: samples.iter().map(sample).collect(),
        dropped: 2,
    }
}

#[test]
fn request_times_have_a_distance_between_two_cores_and_none_on_one() {
    let samples = [(10.0, 100.0), (30.0, 110.0), (99.0, 400.0), (20.0, 90.0)];
    let all = [
        requests(Where::SameCore, &samples),
        requests(Where::CrossCore, &samples),
        requests(Where::CrossCore, &[]),
    ];
    let json = serde_json::to_value(Report::new(&setup(), 1, &[], &all)).unwrap();
    let [same, near, far, none] = &json["requests"].as_array().unwrap()[..] else {
        panic!("{json}");
    };
    for (key, value) in [
        ("ring", "\"packed\""),
        ("in_order", "true"),
        ("batch", "8"),
        ("where", "\"cross-core\""),
        ("distance", "\"near\""),
        ("probe_ns", "100.0"),
    ] {
        assert_eq!(near[key].to_string(), value, "{key}");
    }
    assert_eq!(near["ns"]["median"], 20.0);
    assert_eq!(near["ns"]["min"], 10.0);
    assert_eq!(near["ns"]["max"], 30.0);
    assert_eq!(near["ns"]["samples"].as_array().unwrap().len(), 3);
    assert_eq!(
        (&far["distance"], &far["ns"]["median"]),
        (&"far".into(), &99.0.into())
    );
    assert_eq!(same["where"], "same-core");
    assert_eq!(same["ns"]["median"], 25.0);
    assert!(same.get("distance").is_none() && same.get("probe_ns").is_none());
    assert!(none.get("ns").is_none() && none.get("distance").is_none());
    assert_eq!(none["dropped_samples"], 2);
    let counters = json["counters"].as_str().unwrap();
    assert!(counters.starts_with("not available: ") || counters.starts_with("cache-misses"));
}

#[test]
fn the_table_has_a_column_for_the_ring_where_there_is_more_than_one() {
    let pairs = || vec![pair(10.0, 12.5, 100.0)];
    let split = measured(Direction::BeToFe, pairs());
    let mut packed = measured(Direction::BeToFe, pairs());
    packed.case.ring.layout = Layout::Packed;
    let text = |measured: &[Measured], requests: &[Requests]| {
        crate::bench::table::render(&Report::new(&setup(), 1, measured, requests))
    };
    let one = text(std::slice::from_ref(&split), &[]);
    assert!(!one.contains("ring") && !one.contains("split"), "{one}");
    let two = text(&[split, packed], &[]);
    assert!(two.contains(" ring ") && two.contains(" split ") && two.contains(" packed "));
    let times = text(&[], &[requests(Where::CrossCore, &[(12.5, 100.0)])]);
    let line = times.lines().find(|line| line.starts_with("cross-core"));
    assert_eq!(
        line.unwrap().split_whitespace().collect::<Vec<_>>(),
        ["cross-core", "packed+in-order", "near", "12.5"]
    );
}

#[test]
fn a_round_trip_has_latencies_and_no_rates() {
    let times = |p50| {
        Some(Latency {
            p50,
            p90: p50,
            p99: 2.0 * p50,
            p999: 3.0 * p50,
            max: 9.0 * p50,
        })
    };
    let pairs = [100.0, 300.0, 200.0].map(|p50| {
        let mut pair = pair(0.0, 0.0, 100.0);
        pair.vm.result.latency = times(p50);
        pair.bound.result.latency = times(p50 / 2.0);
        pair
    });
    let json = json(&[measured(Direction::RoundTrip, pairs.to_vec())]);
    let result = &json["results"][0];
    assert_eq!(result["latency_ns"]["p50"], 200.0);
    assert_eq!(result["latency_ns"]["max"], 2700.0);
    assert_eq!(result["bound_latency_ns"]["p999"], 300.0);
    assert_eq!(result["ratio"], 0.5);
    for key in ["mpps", "gbps", "bound_mpps"] {
        assert!(result.get(key).is_none(), "{key}");
    }
}

#[test]
fn near_and_far_are_never_mixed() {
    let pairs = vec![
        pair(10.0, 10.0, 100.0),
        pair(2.0, 4.0, 450.0),
        pair(12.0, 12.0, 101.0),
    ];
    let mut all = measured(Direction::Both, pairs);
    all.faults.lost = 5;
    let json = json(&[all]);
    let [near, far] = &json["results"].as_array().unwrap()[..] else {
        panic!("two entries");
    };
    assert_eq!(
        (near["distance"].as_str(), far["distance"].as_str()),
        (Some("near"), Some("far"))
    );
    assert_eq!(near["mpps"]["median"], 11.0);
    assert_eq!(far["ratio"], 0.5);
    // What was counted over all of them is counted once.
    let lost = |entry: &Value| entry["lost"].as_u64().unwrap();
    assert_eq!(lost(near) + lost(far), 5);
}

#[test]
fn a_case_without_a_good_sample_still_says_what_happened_to_the_frames() {
    let mut none = measured(Direction::BeToFe, vec![]);
    none.faults.corrupted = 3;
    let json = json(&[none]);
    let result = &json["results"][0];
    assert_eq!(result["corrupted"], 3);
    for key in ["mpps", "ratio", "distance", "probe_ns", "exits", "cpu"] {
        assert!(result.get(key).is_none(), "{key}");
    }
}

#[test]
fn the_file_appears_complete_or_not_at_all() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("out.json");
    let file = JsonFile::create(&path).unwrap();
    assert!(!path.exists());
    drop(file);
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);

    let report = Report::new(&setup(), 1, &[], &[]);
    JsonFile::create(&path).unwrap().write(&report).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let _: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(directory.path().read_dir().unwrap().count(), 1);

    assert!(JsonFile::create(directory.path()).is_err());
    assert!(JsonFile::create(&directory.path().join("no/such.json")).is_err());
}

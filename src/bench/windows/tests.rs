use serde_json::json;

use super::*;

fn stats(iommu: Value, net: Value, window: Value) -> [VmmStats; 2] {
    let of = |value: Value| serde_json::from_value::<Counters>(value).unwrap();
    [
        VmmStats {
            window: of(window),
            ..VmmStats::default()
        },
        VmmStats {
            iommu: of(iommu),
            net: of(net),
            ..VmmStats::default()
        },
    ]
}

#[test]
fn the_parts_of_a_pair_of_requests_add_up_to_the_whole() {
    let clock = Clock {
        requests: 20,
        request_ns: 20 * 40,
        messages: 20,
        message_ns: 20 * 25,
        changes: 20,
        change_ns: 20 * 10,
    };
    let split = Clock::default().split(&clock, 100.0, 16, 10).unwrap();
    assert_eq!(split.guest_exit, 20.0);
    assert_eq!((split.vmm, split.wire, split.window), (30.0, 30.0, 20.0));
    let sum = split.guest_exit + split.vmm + split.wire + split.window;
    assert_eq!(sum, split.total);
}

#[test]
fn vms_that_do_not_count_give_no_split_and_no_zero() {
    let clock = Clock::read(&stats(json!({}), json!({}), json!({})));
    assert_eq!(clock, Clock::default());
    assert_eq!(clock.split(&clock, 100.0, 16, 10), None);
}

#[test]
fn the_growth_is_of_the_last_to_the_first() {
    let sample = |ns: f64| {
        let both = Percentiles {
            p50: ns,
            p99: 10.0 * ns,
        };
        [both, both]
    };
    let latencies = [
        (16, vec![sample(100.0), sample(200.0)]),
        (64, vec![sample(1.0), sample(1.0)]),
        (8192, vec![sample(150.0), sample(300.0)]),
    ];
    assert_eq!(growth(&latencies).unwrap().median, 1.5);
    assert!(growth(&[]).is_none());
    let entry = latency_entry(16, &latencies[0].1).unwrap();
    assert_eq!((entry.map.p50.median, entry.unmap.p99.max), (150.0, 2000.0));
}

#[test]
fn a_record_without_percentiles_is_an_error_that_names_them() {
    let done = |text: &str| serde_json::from_str::<Done>(text).unwrap();
    let good =
        done(r#"{"command":"windows","map":{"count":1,"p50":2000,"p90":1,"p99":4000,"max":1}}"#);
    let found = percentiles(&good, "map", 2_000_000).unwrap();
    assert_eq!((found.p50, found.p99), (1000.0, 2000.0));
    let error = percentiles(&good, "unmap", 1).unwrap_err().to_string();
    assert!(error.contains("p50 of unmap"), "{error}");
}

fn churn(ratio: Option<f64>, faults: Faults) -> ChurnEntry {
    ChurnEntry {
        direction: Direction::BeToFe,
        frame_size: Size::Bytes(64),
        batch: 32,
        windows_per_second: CHURN,
        distance: None,
        mpps: None,
        mpps_without: None,
        ratio: ratio.and_then(|ratio| Spread::of([ratio])),
        reached_per_second: None,
        completion_ns: None,
        faults,
        verified: 0,
        dropped_samples: 0,
        least_vcpu_share: LEAST_SHARE,
    }
}

#[test]
fn lost_frames_and_missing_figures_decide_the_exit_code() {
    let none = Faults::default();
    let lost = Faults { lost: 1, ..none };
    assert_eq!(judge(&[churn(Some(0.9), none)], 1), exit::OK);
    assert_eq!(judge(&[churn(Some(0.9), lost)], 1), exit::FRAMES);
    assert_eq!(judge(&[churn(None, none)], 1), exit::HOST);
}

#[test]
fn the_table_shows_every_part_and_a_dash_where_there_is_no_figure() {
    let sample = [Percentiles {
        p50: 50_000.0,
        p99: 90_000.0,
    }; 2];
    let report = WindowsReport {
        schema_version: 1,
        environment: Environment::of(&super::super::report::tests::setup(), 1),
        command: Vec::new(),
        windows: vec![latency_entry(16, &[sample]).unwrap()],
        growth: Spread::of([1.25]),
        split: None,
        churn: vec![churn(None, Faults::default())],
    };
    let text = render(&report);
    for part in [
        "16",
        "50.0",
        "90.0",
        "8192 windows to 16: 1.25",
        "be-to-fe",
        "-",
    ] {
        assert!(text.contains(part), "no {part} in\n{text}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["windows"][0]["map"]["p50"]["median"], 50_000.0);
    assert!(json.get("split").is_none());
}

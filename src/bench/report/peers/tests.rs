use serde_json::Value;

use super::super::tests::setup;
use super::*;
use crate::bench::peers::tests::played;
use crate::bench::table;

fn report(shares: &[f64]) -> Report {
    let (guests, peers) = played(Direction::BeToFe, shares);
    Report::new(&setup(), 1, &guests, &[]).with_peers(&guests, &peers)
}

#[test]
fn a_peer_has_the_keys_of_a_result_and_says_how_it_was_called() {
    let json = serde_json::to_value(report(&[1.0, 0.1])).unwrap();
    assert_eq!(json["peers"].as_array().unwrap().len(), 2);
    let peer = &json["peers"][1];
    for (key, value) in [
        ("name", "\"memif\""),
        ("direction", "\"be-to-fe\""),
        ("frame_size", "64"),
        ("batch", "32"),
        ("queue_pairs", "1"),
        ("queue_size", "256"),
        ("distance", "\"near\""),
        ("probe_ns", "100.0"),
        ("frames", "3000"),
        ("command", r#"["a","b"]"#),
        ("input", r#"[["start"],[]]"#),
        ("dropped_samples", r#"{"core_not_had":1,"cores_moved":0}"#),
    ] {
        assert_eq!(peer[key].to_string(), value, "{key}");
    }
    // The second was dropped.
    assert_eq!(peer["mpps"]["samples"].to_string(), "[10.0,30.0,40.0]");
    assert_eq!(peer["gbps"]["median"], 15.36);
    assert_eq!(peer["cpu_ns_per_frame"]["samples"][0], 200.0);
    // What nobody counted is not zero but absent.
    for key in ["lost", "verified", "bound_mpps", "ratio"] {
        assert!(peer.get(key).is_none(), "{key}");
    }
}

#[test]
fn the_window_stands_beside_each_peer_round_by_round() {
    let json = serde_json::to_value(report(&[1.0, 0.1])).unwrap();
    let [dpdk, memif] = &json["to_peers"].as_array().unwrap()[..] else {
        panic!("{json}");
    };
    assert_eq!(dpdk["name"], "dpdk-vhost");
    assert_eq!(dpdk["speed"]["samples"].to_string(), "[8.0,4.0,2.6667,2.0]");
    assert_eq!(memif["speed"]["samples"].to_string(), "[8.0,2.6667,2.0]");
    assert_eq!(
        (&memif["ring"], &memif["in_order"]),
        (&"packed".into(), &true.into())
    );
}

#[test]
fn a_peer_that_never_had_its_core_is_no_figure_but_is_there() {
    let json = serde_json::to_value(report(&[0.1; 50])).unwrap();
    let peer = &json["peers"][1];
    assert!(peer.get("mpps").is_none() && peer.get("distance").is_none());
    assert_eq!(peer["dropped_samples"]["core_not_had"], 9);
    assert_eq!(json["to_peers"].as_array().unwrap().len(), 1);
}

#[test]
fn without_peers_nothing_is_said_of_them() {
    let (guests, _) = played(Direction::BeToFe, &[]);
    let report = Report::new(&setup(), 1, &guests, &[]);
    assert!(!table::render(&report).contains("peer"));
    let json: Value = serde_json::to_value(report).unwrap();
    assert!(json.get("peers").is_none() && json.get("to_peers").is_none());
}

#[test]
fn the_table_has_the_peers_behind_the_guests_and_a_line_of_ratios_each() {
    let text = table::render(&report(&[]));
    let row = |start: &[&str]| {
        let found = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|words| start.iter().all(|word| words.contains(word)));
        found.unwrap_or_else(|| panic!("{start:?} in {text}"))
    };
    let words = row(&["memif", "64", "[10.0"]);
    assert_eq!(
        words.join(" "),
        "be-to-fe memif 64 32 headers copy 20.0 [10.0 .. 30.0] 10.2 100.0 - - near -"
    );
    let words = row(&["memif", "packed+in-order"]);
    assert_eq!(
        words.join(" "),
        "be-to-fe packed+in-order off 64 32 every-byte build poll memif 4.000 [2.667 .. 8.000] 3 near"
    );
}

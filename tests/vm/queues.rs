//! Several queue pairs: a flow over each, and pairs that go out of use and come back under traffic.

use std::fs;

use serde_json::Value;

use super::{machine, start};
use crate::common::told::Told;
use crate::common::{Dir, Ended, run};

/// What a guest says that received `count` frames over each of `queues` pairs.
fn whole(queues: u64, count: u64) -> String {
    let frames = queues * count;
    format!(
        "received {frames} frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
    )
}

/// Runs `pair` over so many pairs and expects that `count` frames of each arrived at each receiver, whole.
#[track_caller]
pub(crate) fn pair(queues: u64, args: &[&str], receivers: usize, count: u64) {
    let (queues_text, count_text) = (queues.to_string(), count.to_string());
    let mut all = vec!["pair", "--queues", &queues_text, "--count", &count_text];
    all.extend(args);
    let ended = run(&all);
    ended.expect_code(0);
    let found = ended.stdout.matches(&whole(queues, count)).count();
    assert_eq!(found, receivers, "{ended:?}");
}

const RINGS: [&[&str]; 3] = [
    &["--ring", "split", "--in-order", "off"],
    &["--ring", "split"],
    &["--ring", "packed"],
];

#[test]
fn each_of_several_pairs_carries_its_flow_both_ways_and_in_order() {
    let _machine = machine();
    for queues in [2, 4] {
        for rings in RINGS {
            pair(queues, rings, 2, 20_000);
        }
    }
    pair(16, &["--queue-size", "64"], 2, 2_000);
    pair(2, &["--direction", "be-to-fe", "--size", "1518"], 1, 10_000);
    pair(2, &["--direction", "fe-to-be", "--batch", "1"], 1, 10_000);
}

#[test]
fn guests_that_sleep_are_woken_by_any_pair() {
    let _machine = machine();
    pair(3, &["--mode", "irq"], 2, 500);
    pair(2, &["--mode", "irq", "--ring", "packed"], 2, 500);
}

#[test]
fn all_pairs_and_the_control_queue_can_be_behind_an_iommu() {
    let _machine = machine();
    for rings in ["split", "packed"] {
        let args = ["--iommu", "static", "--ring", rings];
        pair(4, &[&args[..], &["--iommu-back", "on"]].concat(), 2, 5_000);
        pair(2, &["--iommu", "batch", "--ring", rings], 2, 1_000);
    }
}

/// Two VMs, each with its device's keys and its guest's words; back-end, front-end.
fn two(back: [&str; 2], front: [&str; 2]) -> [Ended; 2] {
    let dir = Dir::new();
    let vm = |flag, [keys, words]: [&str; 2]| {
        let device = format!("socket={}{keys}", dir.file("s"));
        let args = ["run", "--console", "output", flag, &device];
        start(&[&args[..], &["--cmdline", words]].concat())
    };
    let (back, front) = (vm("--vhost-pci", back), vm("--net", front));
    [back.end(), front.end()]
}

#[test]
fn pairs_that_go_out_of_use_and_come_back_lose_nothing_of_their_flows() {
    let _machine = machine();
    for (queues, keys) in [(4, ""), (4, ",packed=on"), (2, ",in-order=off"), (16, "")] {
        let keys = format!(",queues={queues}{keys}");
        let words = format!("work=both queues={queues} count=100000 timeout_ms=30000");
        let flips = format!("{words} flips=1000");
        let ends = two(["", &words], [&keys, &flips]);
        for end in &ends {
            end.expect_code(0);
            assert!(end.stdout.contains(&whole(queues, 100_000)), "{ends:?}");
        }
        let times = ends[1].stdout.split("came back ").nth(1);
        let times = times.and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        assert!(times.is_some_and(|times| times >= 2), "{ends:?}");
    }
}

#[test]
fn a_front_end_with_more_pairs_than_the_back_end_has_one_and_says_so() {
    let _machine = machine();
    let words = "work=both count=5000 timeout_ms=30000";
    let ends = two([",queues=4", words], [",queues=4", words]);
    for end in &ends {
        end.expect_code(0);
        assert!(end.stdout.contains(&whole(1, 5_000)), "{ends:?}");
    }
    let line = "4 queue pairs were asked for and the back-end serves 2: there is one";
    assert!(ends[1].stderr.contains(line), "{ends:?}");
}

/// Runs a workload at both ends; `count` frames go over each of `queues` pairs, both ways.
#[track_caller]
fn both_ways(ends: &mut [Told; 2], id: u64, queues: u64, count: u64) {
    for end in &mut *ends {
        end.send(&format!(
            "run id={id} work=both queues={queues} count={count} timeout_ms=30000"
        ));
    }
    for end in ends {
        let result = end.next("result");
        assert_eq!(result["id"], id);
        assert_eq!(result["verified"], queues * count, "{result}");
        for key in ["lost", "duplicated", "reordered", "corrupted", "timeout"] {
            assert_eq!(result[key], 0, "{key}: {result}");
        }
    }
}

#[test]
fn pairs_are_added_and_removed_at_run_time_and_survive_resets_of_rings_and_device() {
    let _machine = machine();
    for keys in ["", ",packed=on"] {
        let dir = Dir::new();
        let socket = format!("socket={}", dir.file("s"));
        let back = Told::start("--vhost-pci", &socket, "");
        let front = format!("{socket},queues=4{keys}");
        let mut ends = [back, Told::start("--net", &front, "queues=4")];
        for end in &mut ends {
            let features = end.next("ready")["features"].as_u64().unwrap();
            assert_ne!(features & 1 << 22, 0, "VIRTIO_NET_F_MQ");
        }
        let mut id = 0;
        for reset in ["", "reset-rings", "reset-device"] {
            if !reset.is_empty() {
                ends[1].send(reset);
                for end in &mut ends {
                    end.next("ready");
                }
            }
            for queues in [1, 4, 2, 3, 1, 4] {
                id += 1;
                both_ways(&mut ends, id, queues, 3_000);
            }
        }
        for end in &mut ends {
            end.send("exit");
            assert!(end.child.wait().unwrap().success());
        }
    }
}

#[test]
fn bench_measures_over_as_many_pairs_as_it_was_asked_for() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let what = ["--sizes", "64", "--batches", "32"];
    let how = ["--directions", "both,round-trip", "--ms", "10"];
    let args = ["bench", "--queues", "2", "--samples", "1", "--json", &path];
    let ended = run(&[&args[..], &what, &how].concat());
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    for (entry, pairs) in json["results"].as_array().unwrap().iter().zip([2, 1]) {
        assert_eq!(entry["queue_pairs"], pairs, "{entry}");
        for key in ["lost", "duplicated", "reordered", "corrupted"] {
            assert_eq!(entry[key], 0, "{key}: {entry}");
        }
    }
}

//! `isolation`: the study and its report.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::machine;
use crate::common::{Dir, Running, processes_with, tool};

/// How long a study may take: a minute on a quiet machine.
const STUDY: Duration = Duration::from_secs(300);

/// Runs the study; its report.
fn isolation(args: &[&str]) -> (i32, Value) {
    let dir = Dir::new();
    let path = dir.file("iso.json");
    let command = ["isolation", "--rounds", "500", "--json", &path];
    let ended = Running::start(tool(&[&command[..], args].concat())).end_within(STUDY);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert!(json.get("failed").is_none(), "{json}");
    for attack in json["attacks"].as_array().unwrap() {
        let from = &attack["from"];
        assert!(from == "back-end" || from == "front-end", "{attack}");
        assert!(attack["tries"].as_u64().unwrap() > 0, "{attack}");
        assert!(attack["noticed"].is_string(), "{attack}");
    }
    (ended.code(), json)
}

fn got_through(json: &Value) -> Vec<(&str, u64)> {
    let attacks = json["attacks"].as_array().unwrap().iter();
    attacks
        .map(|attack| {
            (
                attack["name"].as_str().unwrap(),
                attack["got_through"].as_u64().unwrap(),
            )
        })
        .filter(|(_, got)| *got > 0)
        .collect()
}

#[test]
fn nothing_gets_through_windows_that_follow_the_iommu() {
    let _machine = machine();
    let (code, json) = isolation(&[]);
    assert_eq!(got_through(&json), []);
    assert_eq!((code, &json["mode"]), (0, &"windows".into()));
    assert!(json["attacks"].as_array().unwrap().len() >= 40);
}

#[test]
fn the_same_attacks_read_and_write_what_is_shown_as_a_whole() {
    let _machine = machine();
    let memory = [
        "--mode",
        "whole",
        "--only",
        "read",
        "write",
        "page-used-again",
        "race",
    ];
    let (code, json) = isolation(&memory);
    assert_eq!((code, &json["mode"]), (2, &"whole".into()));
    let got = got_through(&json);
    // What is not shared at all cannot be seen however it is shown.
    let kept = "read-ram-beside-memory-for-devices";
    let mut attacks = json["attacks"].as_array().unwrap().iter();
    assert!(attacks.any(|attack| attack["name"] == kept), "{json}");
    assert!(got.iter().all(|(found, _)| *found != kept), "{json}");
    for name in [
        "read-before-attach",
        "read-between-windows",
        "write-read-only",
        "read-after-unmap",
        "write-after-unmap",
        "page-used-again-after-unmap",
        "race-for-an-unmapped-page",
    ] {
        assert!(
            got.iter().any(|(found, _)| *found == name),
            "{name}: {json}"
        );
    }
}

#[test]
fn what_is_mapped_for_writing_only_can_be_read_where_the_front_end_says_so_and_nothing_else_can() {
    let _machine = machine();
    let (code, json) = isolation(&["--mode", "readable", "--only", "read", "write", "access"]);
    assert_eq!((code, &json["mode"]), (2, &"readable".into()));
    let got = got_through(&json);
    let names: Vec<&str> = got.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["read-write-only", "read-write-only-vector"]);
}

#[test]
fn with_no_front_end_there_is_nothing_to_see() {
    let _machine = machine();
    let (code, json) = isolation(&["--mode", "none", "--only", "read", "write", "sweep"]);
    assert_eq!((code, &json["mode"]), (0, &"none".into()));
    assert_eq!(got_through(&json), []);
}

#[test]
fn a_study_that_is_interrupted_leaves_no_file_and_no_vm() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("iso.json");
    let mut command = tool(&["isolation", "--json", &path]);
    command.env("TMPDIR", dir.path());
    let mut running = Running::start(command);
    let name = dir.file("vhost-pci-");
    running.wait_for("two VMs", |_| processes_with(&name) == 2);
    running.signal("TERM");
    running.end().expect_code(143);
    assert_eq!(processes_with(&name), 0);
    assert!(dir.is_empty());
}

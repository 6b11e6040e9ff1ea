//! `bench` and what it writes.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::machine;
use crate::common::{Dir, Running, processes_with, run, tool};

/// What scripts rely on (docs and the tool's module `report`).
fn check_entry(entry: &Value) {
    assert!(
        entry["frame_size"].is_u64() || entry["frame_size"] == "imix",
        "{entry}"
    );
    assert!(
        entry["payload"] == "every-byte" || entry["payload"] == "headers",
        "{entry}"
    );
    assert!(
        entry["source"] == "build" || entry["source"] == "copy",
        "{entry}"
    );
    assert!(["poll", "irq", "adaptive"].contains(&entry["mode"].as_str().unwrap()));
    for key in [
        "batch",
        "queue_pairs",
        "frames",
        "lost",
        "duplicated",
        "reordered",
        "corrupted",
    ] {
        assert!(entry[key].is_u64(), "{key}: {entry}");
    }
    for key in ["lost", "duplicated", "reordered", "corrupted"] {
        assert_eq!(entry[key], 0, "{key}: {entry}");
    }
    assert!(entry["path"] == "window" || entry["path"] == "relay");
    assert!(entry["ring"] == "split" || entry["ring"] == "packed");
    for key in ["in_order", "event_idx", "mrg_rxbuf", "indirect", "offload"] {
        assert!(entry[key].is_boolean(), "{key}: {entry}");
    }
    assert!(entry["queue_size"].is_u64() && entry["tx"].is_string());
    assert!(["off", "static", "dynamic", "batch"].contains(&entry["iommu"].as_str().unwrap()));
    let gated = entry["path"] == "window"
        && (entry["iommu"] == "off" || entry["iommu"] == "static")
        && entry["mode"] == "poll";
    assert_eq!(entry.get("least_vcpu_share").is_some(), gated, "{entry}");
    // Where no sample was fit to be reported there is no figure at all.
    let Some(distance) = entry.get("distance") else {
        assert!(entry.get("mpps").is_none() && entry.get("ratio").is_none());
        return;
    };
    assert!(distance == "near" || distance == "far", "{entry}");
    assert!(entry["probe_ns"].as_f64().unwrap() > 0.0);
    let idle = entry["direction"] == "idle";
    assert_eq!(
        entry
            .get("ratio")
            .is_some_and(|ratio| ratio.as_f64().unwrap() > 0.0),
        !idle,
        "{entry}"
    );
    assert_eq!(entry.get("idle_cpu_percent").is_some(), idle, "{entry}");
    if idle {
        assert!(entry.get("mpps").is_none() && entry["verified"].as_u64().unwrap() > 0);
        return;
    }
    assert!(
        entry["exits"].is_object() && entry["cpu"].is_object(),
        "{entry}"
    );
    if entry["direction"] == "round-trip" {
        let times = ["p50", "p90", "p99", "p999", "max"]
            .map(|key| entry["latency_ns"][key].as_f64().unwrap());
        assert!(times[0] > 0.0 && times.is_sorted(), "{entry}");
        let loaded = entry.get("load_percent").is_some();
        assert_eq!(
            entry.get("offered_mpps").is_some() && entry.get("bound_offered_mpps").is_some(),
            loaded
        );
        assert!(entry.get("mpps").is_none());
        return;
    }
    assert!(entry.get("latency_ns").is_none());
    for key in ["mpps", "gbps", "bound_mpps"] {
        let [median, min, max] =
            ["median", "min", "max"].map(|part| entry[key][part].as_f64().unwrap());
        assert!(
            0.0 < min && min <= median && median <= max,
            "{key}: {entry}"
        );
        assert!(!entry[key]["samples"].as_array().unwrap().is_empty());
    }
    let size = entry["frame_size"].as_f64().unwrap_or(16984.0 / 48.0);
    let gbps = entry["mpps"]["median"].as_f64().unwrap() * size * 8.0 / 1000.0;
    assert!((gbps - entry["gbps"]["median"].as_f64().unwrap()).abs() < 0.01 * gbps + 0.001);
}

#[test]
fn a_report_without_a_file_has_stdout_to_itself() {
    let _machine = machine();
    let ended = run(&[
        "bench",
        "--sizes",
        "64",
        "--batches",
        "32",
        "--directions",
        "be-to-fe",
        "--samples",
        "1",
        "--ms",
        "20",
        "--json",
    ]);
    let json: Value =
        serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    assert_eq!(json["results"].as_array().unwrap().len(), 1, "{ended:?}");
    assert!(ended.stderr.contains("Mpps"), "{ended:?}");
}

#[test]
fn bench_writes_the_json_of_the_contract() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let start = Instant::now();
    let ended = run(&[
        "bench",
        "--quick",
        "--ms",
        "20",
        "--samples",
        "1",
        "--json",
        &path,
    ]);
    assert!(start.elapsed() < Duration::from_secs(20));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert!(
        json["command"]
            .as_array()
            .unwrap()
            .iter()
            .any(|word| word == "--quick")
    );
    assert!(json["environment"]["tsc_khz"].as_u64().unwrap() > 0);
    let results = json["results"].as_array().unwrap();
    for direction in ["be-to-fe", "fe-to-be", "both", "round-trip"] {
        for size in [64, 1518] {
            let found = results
                .iter()
                .filter(|entry| entry["direction"] == direction && entry["frame_size"] == size);
            assert!(found.count() >= 1, "no {direction} at {size}: {json}");
        }
    }
    results.iter().for_each(check_entry);
    for entry in results {
        assert_eq!(
            (&entry["ring"], &entry["in_order"]),
            (&"split".into(), &false.into())
        );
    }
    // A host so busy that a figure has no sample at all is a failure, and the only one there may be.
    let complete = results.iter().all(|entry| entry.get("distance").is_some());
    ended.expect_code(if complete { 0 } else { 1 });
    assert!(
        ended
            .stdout
            .contains("0 lost, 0 duplicated, 0 reordered, 0 corrupted"),
        "{ended:?}"
    );
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "only the file is left"
    );
}

#[test]
fn a_sweep_over_the_rings_writes_every_figure_and_can_be_drawn() {
    let _machine = machine();
    let dir = Dir::new();
    let (path, svg) = (dir.file("rings.json"), dir.file("rings.svg"));
    let ended = run(&[
        "bench",
        "--sweep",
        "rings",
        "--ms",
        "3",
        "--samples",
        "1",
        "--batches",
        "1,64",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let results = json["results"].as_array().unwrap();
    results.iter().for_each(check_entry);
    let requests = json["requests"].as_array().unwrap();
    for ring in ["split", "packed"] {
        for in_order in [false, true] {
            for batch in [1, 64] {
                let is = |entry: &&Value| {
                    entry["ring"] == ring
                        && entry["in_order"] == in_order
                        && entry["batch"] == batch
                };
                for direction in ["be-to-fe", "fe-to-be"] {
                    let mut found = results.iter().filter(is);
                    assert!(
                        found.any(|entry| entry["direction"] == direction),
                        "no {ring} {in_order} {batch} {direction}: {json}"
                    );
                }
                for place in ["same-core", "cross-core"] {
                    let mut found = requests.iter().filter(is);
                    let entry = found.find(|entry| entry["where"] == place);
                    let entry = entry.unwrap_or_else(|| panic!("no {ring} {batch} {place}"));
                    if let Some(ns) = entry.get("ns") {
                        assert!(ns["median"].as_f64().unwrap() > 0.0, "{entry}");
                        assert_eq!(entry.get("distance").is_some(), place == "cross-core");
                    }
                }
            }
        }
    }
    assert!(json["counters"].is_string());
    // A host so busy that a figure has no sample at all is a failure, and the only one there may be.
    let complete = results.iter().all(|entry| entry.get("distance").is_some())
        && requests.iter().all(|entry| entry.get("ns").is_some());
    ended.expect_code(if complete { 0 } else { 1 });

    if complete {
        run(&["plot", &path, "--out", &svg]).expect_code(0);
        let svg = fs::read_to_string(&svg).unwrap();
        assert!(svg.starts_with("<svg ") && svg.contains("packed + in-order"));
    }
}

#[test]
fn the_window_and_the_relay_are_measured_in_turn() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let ended = run(&[
        "bench",
        "--path",
        "window,relay",
        "--sizes",
        "64",
        "--batches",
        "8",
        "--ms",
        "20",
        "--samples",
        "1",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let results = json["results"].as_array().unwrap();
    results.iter().for_each(check_entry);
    for path in ["window", "relay"] {
        for direction in ["be-to-fe", "fe-to-be", "both", "round-trip"] {
            let found = |entry: &Value| {
                let frames = entry["verified"].as_u64().unwrap() > 0;
                entry["direction"] == direction && entry["path"] == path && frames
            };
            assert!(results.iter().any(found), "{direction} {path}: {json}");
        }
    }
    for entry in results.iter().filter(|it| it.get("mpps").is_some()) {
        let cpu = entry["cpu_ns_per_frame"]["median"].as_f64().unwrap();
        assert!(cpu > 0.0, "{entry}");
    }
    let complete = results.iter().all(|entry| entry.get("distance").is_some());
    ended.expect_code(if complete { 0 } else { 1 });
    if complete {
        assert!(ended.stdout.contains("window to relay"), "{ended:?}");
    }
}

#[test]
fn bench_measures_the_features_that_it_was_asked_for() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let ended = run(&[
        "bench",
        "--ring",
        "packed",
        "--in-order",
        "on",
        "--event-idx",
        "on",
        "--mrg-rxbuf",
        "on",
        "--indirect",
        "on",
        "--offload",
        "on",
        "--queue-size",
        "768,300",
        "--sizes",
        "64",
        "--batches",
        "32",
        "--directions",
        "both",
        "--ms",
        "10",
        "--samples",
        "1",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    for (index, size) in [768, 300].into_iter().enumerate() {
        let entry = &json["results"][index];
        check_entry(entry);
        assert_eq!(entry["ring"], "packed");
        for key in ["in_order", "event_idx", "mrg_rxbuf", "indirect", "offload"] {
            assert_eq!(entry[key], true, "{key}");
        }
        assert_eq!(
            (&entry["queue_size"], &entry["tx"]),
            (&size.into(), &"indirect".into())
        );
    }
}

#[test]
fn what_guests_do_with_frames_is_measured_in_turn() {
    let _machine = machine();
    let dir = Dir::new();
    let (path, html) = (dir.file("out.json"), dir.file("out.html"));
    let bench = |words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        let usual = [
            "bench",
            "--batches",
            "32",
            "--samples",
            "1",
            "--ms",
            "20",
            "--json",
            &path,
        ];
        let ended = run(&[&usual[..], &words].concat());
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
        fs::remove_file(&path).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let results = json["results"].as_array().unwrap().clone();
        results.iter().for_each(check_entry);
        let complete = results.iter().all(|entry| entry.get("distance").is_some());
        ended.expect_code(if complete { 0 } else { 1 });
        (text, results)
    };
    let (_, results) = bench(
        "--payload every-byte,headers --source build,copy --sizes 256,imix --directions be-to-fe,fe-to-be,echo --ring packed",
    );
    for payload in ["every-byte", "headers"] {
        for source in ["build", "copy"] {
            for (direction, size) in [
                ("be-to-fe", Value::from(256)),
                ("fe-to-be", "imix".into()),
                ("echo", 256.into()),
            ] {
                let found = results.iter().any(|entry| {
                    (&entry["payload"], &entry["source"]) == (&payload.into(), &source.into())
                        && (&entry["direction"], &entry["frame_size"]) == (&direction.into(), &size)
                        && entry["verified"].as_u64().unwrap() > 0
                });
                assert!(found, "{payload} {source} {direction} {size}: {results:?}");
            }
        }
    }
    let (text, results) =
        bench("--mode adaptive,irq --sizes 64 --directions be-to-fe,idle --latency-load 0,50");
    for mode in ["adaptive", "irq"] {
        let of = |direction: &'static str| {
            results
                .iter()
                .filter(move |it| it["mode"] == mode && it["direction"] == direction)
        };
        assert!(of("be-to-fe").count() >= 1);
        for load in [0, 50] {
            assert!(
                of("round-trip").any(|it| it["load_percent"] == load),
                "{mode} {load}: {text}"
            );
        }
        // Both guests sleep: far from the two cores that they would take if they polled.
        for idle in of("idle").filter(|it| it.get("distance").is_some()) {
            let percent = idle["idle_cpu_percent"]["median"].as_f64().unwrap();
            assert!(percent < 50.0, "{mode}: {idle}");
        }
    }
    let drawn =
        |entry: &Value| entry.get("load_percent").is_some() && entry.get("latency_ns").is_some();
    if results.iter().any(drawn) {
        fs::write(&path, &text).unwrap();
        run(&["plot", &path, "--html", &html]).expect_code(0);
        assert!(
            fs::read_to_string(&html)
                .unwrap()
                .contains("Round trip by load")
        );
    }
}

#[test]
fn bench_compares_an_iommu_with_none_round_by_round() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let ended = run(&[
        "bench",
        "--iommu",
        "off,static,batch",
        "--sizes",
        "64",
        "--batches",
        "32",
        "--directions",
        "be-to-fe",
        "--ms",
        "20",
        "--samples",
        "2",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let results = json["results"].as_array().unwrap();
    results.iter().for_each(check_entry);
    for iommu in ["off", "static", "batch"] {
        assert!(
            results.iter().any(|entry| entry["iommu"] == iommu),
            "{json}"
        );
    }
    // A host so busy that no round was whole has no ratio to show.
    if results.iter().all(|entry| entry.get("distance").is_some()) {
        for entry in json["ratios"].as_array().into_iter().flatten() {
            assert_eq!(entry["over"], "off");
            assert!(entry["ratio"]["median"].as_f64().unwrap() > 0.0, "{entry}");
        }
    }
}

#[test]
fn a_sweep_over_the_windows_times_them_splits_the_time_and_measures_traffic() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("windows.json");
    let ended = run(&[
        "bench",
        "--sweep",
        "windows",
        "--samples",
        "1",
        "--ms",
        "50",
        "--json",
        &path,
    ]);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let windows = json["windows"].as_array().unwrap();
    let live: Vec<u64> = windows
        .iter()
        .map(|it| it["live"].as_u64().unwrap())
        .collect();
    assert_eq!(live, [16, 64, 256, 1024, 4096, 8192]);
    for entry in windows {
        for what in ["map", "unmap"] {
            let p50 = entry[what]["p50"]["median"].as_f64().unwrap();
            let p99 = entry[what]["p99"]["median"].as_f64().unwrap();
            assert!(0.0 < p50 && p50 <= p99, "{entry}");
        }
    }
    let split = &json["split"];
    let part = |name: &str| {
        split[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {json}"))
    };
    for name in ["total", "vmm", "wire", "window"] {
        assert!(part(name) > 0.0, "{split}");
    }
    let churn = json["churn"].as_array().unwrap();
    assert_eq!(churn.len(), 2);
    for entry in churn {
        assert_eq!(entry["corrupted"], 0);
        if let Some(ratio) = entry.get("ratio") {
            assert!(ratio["median"].as_f64().unwrap() > 0.0);
        }
    }
    let complete = churn.iter().all(|entry| entry.get("ratio").is_some());
    ended.expect_code(if complete { 0 } else { 1 });
}

#[test]
fn bench_that_is_interrupted_leaves_no_file_and_no_vm() {
    let _machine = machine();
    let dir = Dir::new();
    let path = dir.file("out.json");
    let mut command = tool(&["bench", "--json", &path]);
    command.env("TMPDIR", dir.path());
    let mut running = Running::start(command);
    let name = dir.file("vhost-pci-");
    running.wait_for("two VMs", |_| processes_with(&name) == 2);
    std::thread::sleep(Duration::from_millis(500));
    running.signal("TERM");
    running.end().expect_code(143);
    assert_eq!(processes_with(&name), 0);
    assert!(dir.is_empty());
}

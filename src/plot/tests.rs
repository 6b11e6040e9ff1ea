use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;
use crate::tempdir::TempDir;
use panels::Line;

const RINGS: [(&str, bool); 4] = [
    ("split", false),
    ("split", true),
    ("packed", false),
    ("packed", true),
];

fn spread(median: f64) -> Value {
    json!({"median": median, "min": median * 0.9, "max": median * 1.1, "samples": [median]})
}

fn entry(ring: (&str, bool), direction: &str, size: u32, batch: u32) -> Value {
    json!({
        "direction": direction, "ring": ring.0, "in_order": ring.1, "frame_size": size, "batch": batch,
        "distance": "near", "mpps": spread(f64::from(batch)), "bound_mpps": spread(f64::from(batch) * 1.2),
    })
}

fn report(results: Vec<Value>, requests: Vec<Value>) -> Value {
    json!({
        "schema_version": 1,
        "environment": {
            "version": "0.1.0", "commit": "abc", "cpu_model": "A <fast> & odd \"CPU\"", "cores": [0, 1],
            "memory": {"hugepages": "off"}, "queue_size": 256, "mode": "poll", "sample_ms": 50,
        },
        "results": results, "requests": requests,
    })
}

/// What a sweep writes, as far as it is drawn.
fn sweep() -> Value {
    let mut results = Vec::new();
    let mut requests = Vec::new();
    for ring in RINGS {
        for batch in [1, 2, 4, 8, 16, 32, 64] {
            for direction in ["be-to-fe", "fe-to-be"] {
                results.push(entry(ring, direction, 64, batch));
            }
            for (place, distance) in [("same-core", None), ("cross-core", Some("near"))] {
                requests.push(json!({
                    "ring": ring.0, "in_order": ring.1, "batch": batch, "where": place, "distance": distance,
                    "ns": spread(100.0 / f64::from(batch)),
                }));
            }
        }
    }
    report(results, requests)
}

fn parsed(report: &Value) -> Report {
    Report::parse(report.to_string().as_bytes()).unwrap()
}

/// Checks that a text is XML with every element closed, and returns the texts of its `text` elements.
fn texts(svg: &str) -> Vec<String> {
    let mut open: Vec<String> = Vec::new();
    let mut texts = Vec::new();
    let mut rest = svg.trim();
    while let Some(start) = rest.find('<') {
        let (before, tag) = rest.split_at(start);
        assert!(!before.contains('>') || open.last().is_some_and(|name| name == "style"));
        if open.last().is_some_and(|name| name == "text") {
            for part in before.split('&').skip(1) {
                let (name, _) = part.split_once(';').expect("an entity has an end");
                assert!(
                    ["lt", "gt", "amp", "quot", "apos"].contains(&name),
                    "&{name};"
                );
            }
            texts.push(before.trim().to_owned());
        }
        let end = tag.find('>').expect("a tag has an end");
        let inside = &tag[1..end];
        assert_eq!(inside.matches('"').count() % 2, 0, "<{inside}>");
        if let Some(name) = inside.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
        } else if !inside.ends_with('/') {
            assert!(
                !open.is_empty() || texts.is_empty(),
                "a second root: <{inside}>"
            );
            open.push(inside.split_whitespace().next().unwrap().to_owned());
        }
        rest = &tag[end + 1..];
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
    texts
}

#[test]
fn a_sweep_is_four_charts_with_every_ring_and_every_bound() {
    let panels = panels::panels(&parsed(&sweep()));
    let slugs: Vec<&str> = panels.iter().map(|panel| panel.slug.as_str()).collect();
    assert_eq!(
        slugs,
        [
            "request-time-same-core",
            "request-time-cross-core",
            "rate-be-to-fe-by-batch",
            "rate-fe-to-be-by-batch"
        ]
    );
    let rings = [
        Line::Split,
        Line::SplitInOrder,
        Line::Packed,
        Line::PackedInOrder,
    ];
    for panel in &panels {
        assert_eq!(panel.ticks, [1, 2, 4, 8, 16, 32, 64]);
        let kinds = if panel.slug.starts_with("rate") { 2 } else { 1 };
        assert_eq!(panel.series.len(), kinds * rings.len(), "{}", panel.slug);
        for ring in rings {
            let own = panel.series.iter().filter(|series| series.line == ring);
            assert_eq!(own.clone().filter(|series| !series.bound).count(), 1);
            assert!(own.clone().all(|series| series.points.len() == 7));
        }
    }
}

#[test]
fn the_picture_is_well_formed_and_labels_everything() {
    let report = parsed(&sweep());
    let svg = draw::figure(&panels::panels(&report), &report.caption()).unwrap();
    let texts = texts(&svg);
    let wanted = [
        "split",
        "split + in-order",
        "packed",
        "packed + in-order",
        "from VM to VM",
        "upper bound: two host threads",
        "ns a request",
        "million frames a second",
        "requests published at once",
        "frames a burst",
        "Request time, both halves on one core",
        "Request time, a half on each core, cores near",
        "Back-end to front-end, 64 B, cores near",
        "Front-end to back-end, 64 B, cores near",
        "64",
    ];
    for text in wanted {
        assert!(
            texts.iter().any(|it| it == text),
            "no {text:?} in {texts:?}"
        );
    }
    let caption = texts.iter().find(|text| text.contains("CPU")).unwrap();
    assert!(caption.starts_with("A &lt;fast&gt; &amp; odd"), "{caption}");
    assert!(texts.iter().any(|text| text.contains("(abc)")));
    // Each line of each chart: 7 marks a line of figures, and those of the legend.
    assert_eq!(svg.matches("<circle").count(), 4 * 4 * 7 + 4);
    // Every colour has its counterpart for a dark page.
    for colour in svg.split("=\"#").skip(1).map(|part| &part[..6]) {
        assert!(svg.contains(&format!("[fill=\"#{colour}\"]")), "{colour}");
    }
    assert!(!svg.contains("NaN") && !svg.contains("inf\""));
}

#[test]
fn a_run_over_sizes_is_a_chart_over_sizes() {
    let sizes = [64, 128, 256, 512, 1024, 1280, 1518];
    let results = sizes.map(|size| entry(RINGS[0], "both", size, 32)).to_vec();
    let report = parsed(&report(results, vec![]));
    let panels = panels::panels(&report);
    let [panel] = &panels[..] else {
        panic!("{panels:?}");
    };
    assert_eq!(panel.slug, "rate-both-by-size");
    assert_eq!(panel.title, "Both directions, bursts of 32, cores near");
    assert_eq!(panel.ticks, sizes);
    let svg = draw::figure(&panels, &report.caption()).unwrap();
    assert!(
        !texts(&svg).iter().any(|text| text == "1518"),
        "it would overlap"
    );
}

#[test]
fn a_run_over_sizes_of_rings_is_a_chart_over_them_and_others_draw_the_first() {
    let mut results = Vec::new();
    for ring in [256, 64, 1024] {
        for batch in [8, 32, 64] {
            let mut entry = entry(("packed", true), "be-to-fe", 64, batch);
            entry["queue_size"] = json!(ring);
            entry["mpps"] = spread(f64::from(ring + batch));
            results.push(entry);
        }
    }
    let panels = panels::panels(&parsed(&report(results, Vec::new())));
    let drawn = |slug: &str| -> Vec<(u32, f64)> {
        let panel = panels.iter().find(|panel| panel.slug == slug).unwrap();
        let series = panel.series.iter().find(|series| !series.bound).unwrap();
        series.points.iter().map(|it| (it.x, it.y)).collect()
    };
    assert_eq!(panels.len(), 2);
    let by_batch = [(8, 264.0), (32, 288.0), (64, 320.0)];
    assert_eq!(drawn("rate-be-to-fe-by-batch"), by_batch);
    // Of the bursts that come first where none is more frequent.
    let by_ring = [(64, 72.0), (256, 264.0), (1024, 1032.0)];
    assert_eq!(drawn("rate-be-to-fe-by-ring"), by_ring);
}

#[test]
fn near_and_far_are_never_on_one_line() {
    let mut results: Vec<Value> = [1, 2, 4].map(|n| entry(RINGS[2], "both", 64, n)).to_vec();
    let mut far = entry(RINGS[2], "both", 64, 1);
    far["distance"] = "far".into();
    results.push(far);
    let mut none = entry(RINGS[2], "both", 64, 8);
    for key in ["distance", "mpps", "bound_mpps"] {
        none.as_object_mut().unwrap().remove(key);
    }
    results.push(none);
    let report = report(results, vec![]);
    let directory = TempDir::new().unwrap();
    plot(&directory, &report.to_string(), "out.svg").unwrap();
    let svg = fs::read_to_string(directory.path().join("out.svg")).unwrap();
    assert!(
        texts(&svg)
            .iter()
            .any(|text| text.starts_with("Not drawn: 1 "))
    );
    let panels = panels::panels(&parsed(&report));
    assert_eq!(panels.len(), 1);
    assert_eq!(
        (&panels[0].ticks[..], panels[0].left_out),
        (&[1, 2, 4][..], 1)
    );
    assert!(
        panels[0]
            .series
            .iter()
            .all(|series| series.points.len() == 3)
    );
}

fn plot(directory: &TempDir, text: &str, out: &str) -> Result<u8> {
    let path = directory.path().join("report.json");
    fs::write(&path, text).unwrap();
    run(&PlotArgs {
        report: path,
        out: Some(directory.path().join(out)),
        html: None,
    })
}

#[test]
fn one_file_holds_all_charts_and_a_directory_a_file_each() {
    let directory = TempDir::new().unwrap();
    let text = sweep().to_string();
    assert_eq!(plot(&directory, &text, "all.svg").unwrap(), exit::OK);
    assert_eq!(plot(&directory, &text, "some/charts").unwrap(), exit::OK);
    let charts = directory.path().join("some/charts");
    let names: Vec<PathBuf> = fs::read_dir(&charts)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(names.len(), 4);
    for path in names.iter().chain([&directory.path().join("all.svg")]) {
        texts(&fs::read_to_string(path).unwrap());
        assert_eq!(path.extension().unwrap(), "svg");
    }
}

#[test]
fn what_is_no_report_is_the_users_mistake_and_what_cannot_be_reached_the_hosts() {
    let directory = TempDir::new().unwrap();
    let mut later = sweep();
    later["schema_version"] = 2.into();
    let one_point = report(vec![entry(RINGS[0], "both", 64, 32)], vec![]);
    for (text, want) in [
        ("no JSON".to_owned(), "no report"),
        ("{}".to_owned(), "missing field"),
        (json!([1, 2]).to_string(), "no report"),
        (later.to_string(), "schema_version is 2"),
        (one_point.to_string(), "no chart in it"),
    ] {
        let error = plot(&directory, &text, "out.svg").unwrap_err();
        assert_eq!(exit::of_error(&error), exit::USAGE, "{error}");
        let error = error.to_string();
        assert!(
            error.contains(want) && error.contains("report.json"),
            "{error}"
        );
    }
    let error = plot(&directory, &sweep().to_string(), "no/such/out.svg").unwrap_err();
    assert_eq!(exit::of_error(&error), exit::HOST);
    let missing = run(&PlotArgs {
        report: directory.path().join("missing.json"),
        out: Some(directory.path().join("out.svg")),
        html: None,
    });
    assert_eq!(exit::of_error(&missing.unwrap_err()), exit::HOST);
}

/// A report with everything that there are charts for.
fn everything() -> Value {
    let mut results = Vec::new();
    for size in [64, 256, 1518] {
        results.push(entry(RINGS[3], "be-to-fe", size, 32));
        let mut trip = entry(RINGS[3], "round-trip", size, 1);
        trip.as_object_mut().unwrap().remove("mpps");
        for (key, p50) in [("latency_ns", 130.0), ("bound_latency_ns", 120.0)] {
            trip[key] = json!({"p50": p50, "p99": 2.0 * p50, "p999": 9.0 * p50, "max": 1e6});
        }
        results.push(trip);
        // Not what the charts of rates are about.
        for (key, value) in [("iommu", "static"), ("path", "relay")] {
            let mut other = entry(RINGS[3], "be-to-fe", size, 32);
            other[key] = value.into();
            results.push(other);
        }
    }
    let of = |more: Value| {
        let mut all = json!({
            "direction": "be-to-fe", "ring": "packed", "in_order": true, "frame_size": 64, "batch": 32, "distance": "near",
        });
        let fields = all.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        all
    };
    let peer = |name: &str, size: u32, distance: &str| {
        json!({
            "name": name, "direction": "be-to-fe", "frame_size": size, "batch": 32, "distance": distance, "mpps": spread(20.0),
            "command": [format!("{name} <back>"), format!("{name} front")],
        })
    };
    let mut report = report(results, vec![]);
    report["command"] = json!(["vhost-pci", "bench", "--peers", "a&b"]);
    report["ratios"] = json!([
        of(json!({"iommu": "static", "ratio": spread(1.01)})),
        of(json!({"iommu": "dynamic", "ratio": spread(0.0001)})),
        of(json!({"iommu": "static", "ratio": spread(0.9), "distance": "far"})),
    ]);
    report["paths"] = json!([of(json!({"speed": spread(9.0), "cpu": spread(0.25)}))]);
    report["peers"] = json!([
        peer("dpdk-vhost", 64, "near"),
        peer("dpdk-vhost", 1518, "near"),
        peer("memif", 64, "far")
    ]);
    report["to_peers"] = json!([
        of(json!({"name": "dpdk-vhost", "iommu": "off", "speed": spread(2.5)})),
        of(json!({"name": "memif-zc", "iommu": "off", "speed": spread(1.5)})),
        of(json!({"name": "memif-zc", "iommu": "static", "speed": spread(1.4)})),
    ]);
    report
}

#[test]
fn each_kind_of_figure_is_a_chart_and_none_is_mixed_with_another() {
    let panels = panels::panels(&parsed(&everything()));
    let slugs: Vec<&str> = panels.iter().map(|panel| panel.slug.as_str()).collect();
    assert_eq!(
        slugs,
        [
            "rate-be-to-fe-by-size",
            "latency-64-packed-in-order",
            "latency-256-packed-in-order",
            "latency-1518-packed-in-order",
            "iommu-be-to-fe",
            "relay-be-to-fe",
            "relay-cpu-be-to-fe",
            "to-peers-be-to-fe",
        ]
    );
    let lines: Vec<(Line, bool, usize)> = panels[0]
        .series
        .iter()
        .map(|it| (it.line, it.bound, it.points.len()))
        .collect();
    // The figures of the relay, of the IOMMU, and of a peer at another distance are not among them.
    assert_eq!(
        lines,
        [
            (Line::PackedInOrder, true, 3),
            (Line::PackedInOrder, false, 3),
            (Line::DpdkVhost, false, 2),
        ]
    );
    let labels = |slug: &str| -> Vec<(String, f64)> {
        let panel = panels.iter().find(|panel| panel.slug == slug).unwrap();
        let bars = panel.bars.iter();
        bars.map(|bar| (bar.label.clone(), bar.value)).collect()
    };
    let of = |label: &str, value| (format!("64 B x32 packed+in-order{label}"), value);
    assert_eq!(
        labels("iommu-be-to-fe"),
        [of(", static", 1.01), of(", dynamic", 0.0001)]
    );
    assert_eq!(panels[4].left_out, 1);
    assert_eq!(labels("relay-be-to-fe"), [of("", 9.0)]);
    assert_eq!(labels("relay-cpu-be-to-fe"), [of("", 0.25)]);
    assert_eq!(
        labels("to-peers-be-to-fe"),
        [of(", dpdk-vhost", 2.5), of(", memif-zc", 1.5)]
    );
    let latency = labels("latency-64-packed-in-order");
    assert_eq!(latency.len(), 8);
    assert_eq!(latency[0], ("p50, VMs".to_owned(), 130.0));
    assert_eq!(latency[1], ("p50, bound".to_owned(), 120.0));
}

#[test]
fn latencies_stand_by_load_and_what_guests_did_otherwise_or_with_a_mix_is_not_among_them() {
    let trip = |load: Option<u32>, p50: f64| {
        let mut it = entry(("packed", true), "round-trip", 64, 32);
        it.as_object_mut().unwrap().remove("mpps");
        it["payload"] = json!("headers");
        it["mode"] = json!("poll");
        let times =
            json!({"p50": p50, "p90": 2.0 * p50, "p99": 3.0 * p50, "p999": 4.0 * p50, "max": 9.0});
        (it["latency_ns"], it["bound_latency_ns"]) = (times.clone(), times);
        it["load_percent"] = json!(load);
        it
    };
    let mut adaptive = trip(Some(50), 7000.0);
    adaptive["mode"] = json!("adaptive");
    let rate = |size: Value, payload: &str| {
        let mut it = entry(("packed", true), "echo", 64, 32);
        (it["frame_size"], it["payload"]) = (size, json!(payload));
        it
    };
    let results = vec![
        rate(json!(64), "every-byte"),
        rate(json!(1518), "every-byte"),
        rate(json!("imix"), "every-byte"),
        rate(json!(1518), "headers"),
        trip(Some(0), 100.0),
        trip(Some(90), 300.0),
        adaptive,
        trip(None, 50.0),
    ];
    let panels = panels::panels(&parsed(&report(results, vec![])));
    let slugs: Vec<&str> = panels.iter().map(|panel| panel.slug.as_str()).collect();
    let ring = "64-x32-packed-in-order";
    let loads = ["p50", "p90", "p99", "p999"].map(|name| format!("load-{name}-{ring}"));
    let trips = "latency-64-packed-in-order";
    assert_eq!(slugs[..2], ["rate-echo-by-size", trips]);
    assert_eq!(slugs[2..], loads);
    let sizes: Vec<usize> = panels[0].series.iter().map(|it| it.points.len()).collect();
    assert_eq!(sizes, [2, 2]);
    let bars = |index: usize| -> Vec<(&str, f64)> {
        let bars = panels[index].bars.iter();
        bars.map(|bar| (bar.label.as_str(), bar.value)).collect()
    };
    let of = |low, high| {
        [
            ("0 %, VMs", low),
            ("0 %, bound", low),
            ("90 %, VMs", high),
            ("90 %, bound", high),
        ]
    };
    assert_eq!(bars(2), of(100.0, 300.0));
    assert_eq!(bars(5), of(400.0, 1200.0));
}

/// The x, y, width and height of the coloured rectangles of a picture.
fn rectangles(svg: &str) -> Vec<[f64; 4]> {
    let tags = svg.split("<rect ").skip(1);
    // The first is the background.
    let tags = tags.skip(1).map(|rest| rest.split('>').next().unwrap());
    let of = |tag: &str, key: &str| -> f64 {
        let (_, rest) = tag.split_once(&format!("{key}=\"")).unwrap();
        rest.split('"').next().unwrap().parse().unwrap()
    };
    tags.map(|tag| ["x", "y", "width", "height"].map(|key| of(tag, key)))
        .collect()
}

#[test]
fn bars_are_as_long_as_their_values_and_stay_in_the_picture() {
    let bar = |value: f64| panels::Bar {
        label: "x".to_owned(),
        value,
        min: value,
        max: value,
        colour: panels::Colour::Quiet,
    };
    let drawn = |values: &[f64]| {
        let panels = panels::panels(&parsed(&everything()));
        let mut panel = panels.last().unwrap().clone();
        panel.bars = values.iter().map(|&value| bar(value)).collect();
        let svg = draw::figure(&[panel], &[]).unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("inf\""));
        rectangles(&svg)
    };
    let lengths = |all: &[[f64; 4]]| all.iter().map(|it| it[2]).collect::<Vec<_>>();
    let linear = lengths(&drawn(&[1.0, 2.0, 4.0]));
    assert!((linear[1] - 2.0 * linear[0]).abs() < 3.0 && (linear[2] - 2.0 * linear[1]).abs() < 3.0);
    // Far apart: a decade is as long as the next.
    let wide = lengths(&drawn(&[0.01, 0.1, 1.0]));
    assert!(
        (wide[2] - 2.0 * wide[1]).abs() < 3.0 && wide[0] >= 1.0,
        "{wide:?}"
    );
    let many = drawn(&[3.0; 12]);
    assert_eq!(many.len(), 12);
    for [x, y, width, height] in many {
        assert!(x >= 0.0 && x + width <= 520.0 && y >= 0.0 && y + height <= 380.0);
    }
}

#[test]
fn the_page_holds_every_chart_the_environment_and_the_commands_and_asks_nothing_of_the_network() {
    let directory = TempDir::new().unwrap();
    let (report, html) = (
        directory.path().join("r.json"),
        directory.path().join("r.html"),
    );
    fs::write(&report, everything().to_string()).unwrap();
    let args = PlotArgs {
        report,
        out: None,
        html: Some(html.clone()),
    };
    assert_eq!(run(&args).unwrap(), exit::OK);
    let page = fs::read_to_string(html).unwrap();
    let (doctype, page) = page.split_once('\n').unwrap();
    assert_eq!(doctype, "<!DOCTYPE html>");
    // Well formed, and every text within an element of the picture is escaped.
    let texts = texts(page);
    assert!(texts.iter().any(|text| text == "DPDK vhost"));
    assert_eq!(page.matches("<svg ").count(), 8);
    assert_eq!(page.matches("<figure ").count(), 8);
    for part in [
        "<code>vhost-pci bench --peers a&amp;b</code>",
        "<tr><th>cpu model</th><td>A &lt;fast&gt; &amp; odd &quot;CPU&quot;</td></tr>",
        "<tr><th>cores</th><td>0, 1</td></tr>",
        "<tr><th>memory hugepages</th><td>off</td></tr>",
        "<pre>dpdk-vhost &lt;back&gt;\ndpdk-vhost front</pre>",
        "Not drawn: 1 figures",
    ] {
        assert!(page.contains(part), "no {part}");
    }
    assert_eq!(page.matches("<pre>dpdk-vhost").count(), 1);
    let foreign = [
        "<script", "<link", "<img", "@import", "url(", " src=", "href=",
    ];
    for part in foreign {
        assert!(!page.contains(part), "{part}");
    }
    // The only address is the name space of the pictures.
    assert_eq!(
        page.matches("://").count(),
        page.matches("http://www.w3.org/2000/svg").count()
    );
}

//! Checksums and segmentation that one guest leaves to the other: frames of 64 KiB, of which every byte and the header are checked.

use super::pair::pair;
use super::{machine, queues, start};
use crate::common::run;

const LONG: [&str; 2] = ["--size", "65536"];

#[test]
fn frames_of_64_kib_pass_over_every_kind_of_ring_and_shape_and_none_is_lost() {
    let _machine = machine();
    for rings in [
        &["--ring", "split", "--in-order", "off"][..],
        &["--ring", "split", "--tx", "chain"],
        &["--ring", "packed", "--tx", "indirect"],
        &["--ring", "packed", "--queue-size", "300", "--tx", "chain"],
        &["--ring", "split", "--queue-size", "64"],
        // 129 buffers a frame.
        &["--ring", "packed", "--rx-buffer", "512"],
    ] {
        pair(&[&LONG, rings].concat(), 2, 5_000);
    }
    pair(&["--size", "65549", "--batch", "1"], 2, 5_000);
    pair(&["--size", "1519"], 2, 20_000);
}

#[test]
fn frames_of_64_kib_pass_through_windows_over_several_pairs_to_guests_that_sleep_and_back() {
    let _machine = machine();
    for how in [
        &["--iommu", "static"][..],
        &["--mode", "irq"],
        &["--mode", "irq", "--ring", "packed"],
        &["--direction", "round-trip"],
    ] {
        pair(&[&LONG, how].concat(), 2, 2_000);
    }
    queues::pair(3, &LONG, 2, 2_000);
    for direction in ["be-to-fe", "fe-to-be"] {
        pair(&[&LONG[..], &["--direction", direction]].concat(), 1, 5_000);
    }
}

/// A guest whose device does not have what a run needs says so and ends.
#[test]
fn what_was_not_negotiated_is_not_sent_and_the_guest_says_why() {
    let _machine = machine();
    let dir = crate::common::Dir::new();
    let socket = dir.file("s");
    let mut back = start(&[
        "run",
        "--console",
        "output",
        "--vhost-pci",
        &format!("socket={socket}"),
        "--cmdline",
        "work=sink",
    ]);
    back.wait_for("its socket", |_| std::path::Path::new(&socket).exists());
    let front = run(&[
        "run",
        "--console",
        "output",
        "--net",
        &format!("socket={socket},csum=off"),
        "--cmdline",
        "work=source size=65536",
    ]);
    assert!(
        front
            .stdout
            .contains("the two ends did not agree to leave UDP checksums"),
        "{front:?}"
    );
    front.expect_code(101);
}

#[test]
fn bench_measures_frames_of_64_kib_beside_their_bound() {
    let _machine = machine();
    let sizes = ["bench", "--sizes", "64,65536", "--batches", "32"];
    let short = ["--samples", "3", "--ms", "20"];
    let directions = ["--directions", "be-to-fe,fe-to-be,both,round-trip"];
    let ended = run(&[&sizes[..], &short, &directions].concat());
    for direction in ["be-to-fe", "fe-to-be", "both"] {
        let found = ended.stdout.lines().any(|line| {
            let line = line.trim_start();
            line.starts_with(direction) && line.contains(" 65536 ") && line.ends_with("0/0/0/0")
        });
        assert!(found, "{direction}: {ended:?}");
    }
    assert!(
        ended
            .stdout
            .contains("0 lost, 0 duplicated, 0 reordered, 0 corrupted"),
        "{ended:?}"
    );
}

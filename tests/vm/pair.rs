//! `pair`: frames that pass between two guests, over every kind of ring and through every kind of window.

use super::machine;
use crate::common::run;

/// Runs `pair` and expects that `count` frames arrived at each receiver, whole.
#[track_caller]
pub(crate) fn pair(args: &[&str], receivers: usize, count: u64) {
    let count_text = count.to_string();
    let mut all = vec!["pair", "--count", &count_text];
    all.extend(args);
    let ended = run(&all);
    ended.expect_code(0);
    let whole = format!(
        "received {count} frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
    );
    assert_eq!(ended.stdout.matches(&whole).count(), receivers, "{ended:?}");
    assert!(ended.stdout.contains("back-end  | ") && ended.stdout.contains("front-end | "));
    // Whoever ends last may say that the other is gone; there is nothing else to say.
    let other = ended.stderr.lines().find(|line| !line.contains("is gone"));
    assert_eq!(other, None, "{ended:?}");
}

#[test]
fn frames_go_both_ways_and_none_is_lost_when_the_indices_wrap() {
    let _machine = machine();
    pair(&["--direction", "both"], 2, 200_000);
}

#[test]
fn frames_go_either_way_and_none_is_lost() {
    let _machine = machine();
    pair(
        &["--direction", "be-to-fe", "--queue-size", "64"],
        1,
        100_000,
    );
    pair(
        &["--direction", "fe-to-be", "--queue-size", "64"],
        1,
        100_000,
    );
}

#[test]
fn a_round_trip_brings_every_frame_back() {
    let _machine = machine();
    pair(&["--direction", "round-trip"], 2, 10_000);
}

#[test]
fn the_largest_and_the_smallest_frames_and_batches_arrive() {
    let _machine = machine();
    pair(&["--size", "1518", "--batch", "256"], 2, 20_000);
    pair(&["--size", "60", "--batch", "1"], 2, 20_000);
}

#[test]
fn guests_that_sleep_are_woken_and_lose_none() {
    let _machine = machine();
    pair(&["--mode", "irq", "--direction", "both"], 2, 5_000);
    pair(&["--mode", "irq", "--direction", "round-trip"], 2, 200);
}

/// Frames enough for the indices of a ring to pass 2^16 and for a packed ring of 768 to go round 90 times.
const WRAPPING: u64 = 70_001;

#[test]
fn packed_rings_of_any_size_carry_frames_both_ways_in_order_or_not() {
    let _machine = machine();
    for in_order in ["off", "on"] {
        let rings = ["--ring", "packed", "--in-order", in_order];
        pair(
            &[&rings[..], &["--queue-size", "768"]].concat(),
            2,
            WRAPPING,
        );
        // A ring that is shorter than a burst, of a length that divides nothing.
        pair(&[&rings[..], &["--queue-size", "7"]].concat(), 2, 20_000);
        pair(
            &[&rings[..], &["--direction", "round-trip"]].concat(),
            2,
            2_000,
        );
    }
}

#[test]
fn split_rings_carry_frames_both_ways_in_order_or_not() {
    let _machine = machine();
    for in_order in ["off", "on"] {
        let rings = ["--ring", "split", "--in-order", in_order];
        pair(&rings, 2, WRAPPING);
        pair(&[&rings[..], &["--batch", "1"]].concat(), 2, 20_000);
    }
}

/// Both layouts, with VIRTIO_F_IN_ORDER and without.
const RINGS: [&[&str]; 4] = [
    &["--ring", "split", "--in-order", "off"],
    &["--ring", "split", "--in-order", "on"],
    &["--ring", "packed", "--in-order", "off"],
    &["--ring", "packed", "--in-order", "on"],
];

#[test]
fn frames_that_are_longer_than_a_buffer_arrive_in_several() {
    let _machine = machine();
    for rings in RINGS {
        let merged = ["--mrg-rxbuf", "on", "--rx-buffer", "512", "--size", "1518"];
        pair(&[rings, &merged].concat(), 2, 20_000);
        // As many buffers as a frame can need, and frames that fit exactly: 116 bytes and a header of 12.
        let small = ["--mrg-rxbuf", "on", "--rx-buffer", "128"];
        pair(
            &[rings, &small, &["--size", "1518", "--batch", "3"]].concat(),
            2,
            5_000,
        );
        pair(&[rings, &small, &["--size", "116"]].concat(), 2, 5_000);
    }
}

#[test]
fn frames_in_chains_and_in_indirect_tables_arrive() {
    let _machine = machine();
    for rings in RINGS {
        for size in ["60", "1518"] {
            let frames = ["--size", size, "--tx"];
            pair(&[rings, &frames, &["chain"]].concat(), 2, 20_000);
            let tables = ["indirect", "--indirect", "on"];
            pair(&[rings, &frames, &tables].concat(), 2, 20_000);
        }
    }
}

#[test]
fn guests_that_sleep_are_woken_over_every_ring_with_event_indices_and_without() {
    let _machine = machine();
    for rings in RINGS {
        for event_idx in ["on", "off"] {
            let irq = ["--mode", "irq", "--event-idx", event_idx];
            pair(&[rings, &irq].concat(), 2, 3_000);
            pair(
                &[rings, &irq, &["--direction", "round-trip"]].concat(),
                2,
                100,
            );
        }
    }
}

#[test]
fn frames_arrive_through_windows_that_follow_the_iommu_however_it_is_used() {
    let _machine = machine();
    for iommu in ["static", "dynamic", "batch"] {
        // Where each frame is mapped and unmapped, a frame takes as long as some system calls.
        let count = if iommu == "static" { 50_000 } else { 3_000 };
        for rings in [RINGS[0], RINGS[3]] {
            pair(&[rings, &["--iommu", iommu]].concat(), 2, count);
        }
        pair(&["--iommu", iommu, "--size", "1518"], 2, count);
        pair(&["--iommu", iommu, "--mode", "irq"], 2, 1_000);
    }
}

#[test]
fn both_guests_can_be_behind_an_iommu_at_once() {
    let _machine = machine();
    pair(&["--iommu", "static", "--iommu-back", "on"], 2, 50_000);
    pair(&["--iommu", "batch", "--iommu-back", "on"], 2, 3_000);
    pair(&["--iommu-back", "on"], 2, 50_000);
}

#[test]
fn an_end_that_is_slow_to_take_its_buffers_back_misses_nothing_of_a_peer_that_leaves() {
    let _machine = machine();
    for iommu in ["dynamic", "batch"] {
        for mode in ["poll", "irq"] {
            for direction in ["round-trip", "both"] {
                let args = ["--iommu", iommu, "--mode", mode, "--direction", direction];
                for _ in 0..3 {
                    pair(&args, 2, 300);
                }
            }
            let args = ["--iommu", iommu, "--mode", mode, "--direction", "be-to-fe"];
            pair(&args, 1, 300);
        }
    }
}

#[test]
fn frames_pass_where_only_the_memory_for_devices_is_shared() {
    let _machine = machine();
    let memory = ["--memory", "size=64M,dma=16M"];
    pair(&memory, 2, 50_000);
    pair(&[&memory[..], &["--iommu", "static"]].concat(), 2, 50_000);
    pair(&[&memory[..], &["--iommu", "batch"]].concat(), 2, 3_000);
}

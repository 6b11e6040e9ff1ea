use super::super::tests::{measured, pair, setup};
use super::*;
use crate::bench::table;
use crate::cli::rings::Layout;

fn at(mpps: f64, probe_ns: f64, round: usize) -> crate::bench::pairs::Pair {
    let mut pair = pair(mpps, 20.0, probe_ns);
    pair.round = round;
    pair
}

#[test]
fn the_second_pair_has_figures_of_its_own_and_the_ratio_is_of_rounds_at_one_distance() {
    let first = measured(
        Direction::BeToFe,
        vec![at(12.0, 100.0, 0), at(10.0, 100.0, 1), at(4.0, 400.0, 2)],
    );
    let mut second = measured(
        Direction::BeToFe,
        vec![at(5.0, 100.0, 1), at(8.0, 100.0, 2), at(1.0, 100.0, 7)],
    );
    second.case.ring.layout = Layout::Packed;
    second.case.ring.size = 512;
    let (first, second) = ([first], [second]);
    let report = Report::new(&setup(), 1, &first, &[]).with_vs(
        "--ring packed --queue-size 512",
        &setup(),
        &first,
        &second,
    );
    let text = table::render(&report);
    let json = serde_json::to_value(&report).unwrap();
    let vs = &json["vs"];
    assert_eq!(vs["flags"], "--ring packed --queue-size 512");
    assert_eq!(vs["ratios"].as_array().unwrap().len(), 1);
    // Round 1 only: in 2 the cores were elsewhere, and nobody shares 0 and 7.
    assert_eq!(vs["ratios"][0]["speed"]["samples"].to_string(), "[2.0]");
    assert_eq!(vs["ratios"][0]["distance"], "near");
    let sizes = |results: &serde_json::Value| results[0]["queue_size"].as_u64();
    assert_eq!(
        (sizes(&json["results"]), sizes(&vs["results"])),
        (Some(256), Some(512))
    );
    assert_eq!(vs["results"][0]["ring"], "packed");
    assert_eq!(vs["results"][0]["mpps"]["median"], 5.0);
    let line = text
        .lines()
        .position(|line| line == "with --ring packed --queue-size 512:");
    let below: Vec<&str> = text.lines().skip(line.unwrap()).collect();
    assert!(
        below
            .iter()
            .any(|line| line.contains("5.00 [1.00 .. 8.00]")),
        "{text}"
    );
    assert!(
        below
            .iter()
            .any(|line| line.contains("2.000 [2.000 .. 2.000]")),
        "{text}"
    );
}

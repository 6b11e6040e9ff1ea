//! The table on stdout.

use super::probe::Distance;
use super::record::{Faults, Latency};
use super::report::Entry;
use super::stats::Spread;
use crate::cli::Direction;

/// What stands below the table.
pub const LEGEND: &str = "\
Mpps: million frames received in a second, median [min .. max]; both: the sum of the two directions.
Gbit/s: bits of the frames as they lie in the buffers, without FCS, preamble and gap.
bound: the same ring code between two host threads on the same cores, sampled in turn with the guests.
ratio: guests to bound, pair of samples by pair, median (round trip: bound to guests, p50).
distance: near if a cache line goes from core to core and back in less than 250 ns, else far; compare only like with like.";

fn number(value: f64) -> String {
    let digits = if value >= 1000.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$}")
}

fn spread(spread: &Spread) -> String {
    format!(
        "{} [{} .. {}]",
        number(spread.median),
        number(spread.min),
        number(spread.max)
    )
}

fn faults(faults: &Faults) -> String {
    let Faults {
        lost,
        duplicated,
        reordered,
        corrupted,
        ..
    } = faults;
    format!("{lost}/{duplicated}/{reordered}/{corrupted}")
}

fn times(times: &Latency) -> String {
    [times.p50, times.p99, times.p999, times.max]
        .map(number)
        .join(" / ")
}

fn or_dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

fn common(entry: &Entry) -> (String, String, String) {
    (
        or_dash(entry.ratio, |ratio| format!("{ratio:.2}")),
        or_dash(entry.distance, |distance: Distance| {
            distance.name().to_owned()
        }),
        faults(&entry.faults),
    )
}

/// The entries as text: rates first, then latencies.
pub fn render(entries: &[Entry]) -> String {
    let loss = "lost/dup/reord/corrupt";
    let rates: Vec<Vec<String>> = entries
        .iter()
        .filter(|entry| entry.direction != Direction::RoundTrip)
        .map(|entry| {
            let (ratio, distance, faults) = common(entry);
            vec![
                entry.direction.name().to_owned(),
                entry.frame_size.to_string(),
                entry.batch.to_string(),
                or_dash(entry.mpps.as_ref(), spread),
                or_dash(entry.gbps.as_ref(), |gbps| number(gbps.median)),
                or_dash(entry.bound_mpps.as_ref(), |bound| number(bound.median)),
                ratio,
                distance,
                faults,
            ]
        })
        .collect();
    let trips: Vec<Vec<String>> = entries
        .iter()
        .filter(|entry| entry.direction == Direction::RoundTrip)
        .map(|entry| {
            let (ratio, distance, faults) = common(entry);
            vec![
                entry.direction.name().to_owned(),
                entry.frame_size.to_string(),
                or_dash(entry.latency_ns.as_ref(), times),
                or_dash(entry.bound_latency_ns.as_ref(), times),
                ratio,
                distance,
                faults,
            ]
        })
        .collect();
    let mut parts = Vec::new();
    if !rates.is_empty() {
        let head = [
            "direction",
            "size",
            "batch",
            "Mpps",
            "Gbit/s",
            "bound",
            "ratio",
            "distance",
            loss,
        ];
        parts.push(align(&head, &rates));
    }
    if !trips.is_empty() {
        let head = [
            "direction",
            "size",
            "p50 / p99 / p99.9 / max ns",
            "bound",
            "ratio",
            "distance",
            loss,
        ];
        parts.push(align(&head, &trips));
    }
    parts.join("\n")
}

/// Columns as wide as their widest cell; the first to the left, the others to the right.
fn align(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&title| title.to_owned()).collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| match column {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["be-to-fe".to_owned(), "64".to_owned()],
            vec!["both".to_owned(), "1518".to_owned()],
        ];
        assert_eq!(
            align(&["direction", "size"], &rows),
            "direction  size\nbe-to-fe     64\nboth       1518\n"
        );
    }

    #[test]
    fn numbers_show_no_more_digits_than_they_are_worth() {
        assert_eq!(number(0.1234), "0.12");
        assert_eq!(number(38.46), "38.5");
        assert_eq!(number(12345.6), "12346");
    }
}

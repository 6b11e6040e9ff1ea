//! The table on stdout.

use super::probe::Distance;
use super::record::{Faults, Latency};
use super::report::{
    Entry, PathEntry, PeerEntry, RatioEntry, Report, RequestEntry, ToPeerEntry, VariantEntry, Vs,
};
use super::stats::Spread;
use crate::cli::frames::{How, Size};
use crate::cli::iommu::Iommu;
use crate::cli::{Direction, Path};

/// What stands below the table.
pub const LEGEND: &str = "\
Mpps: million frames received in a second, median [min .. max]; both: the sum of the two directions.
Gbit/s: bits of the frames as they lie in the buffers, without FCS, preamble and gap.
bound: the same ring code between two host threads on the same cores, sampled in turn with the guests.
ratio: guests to bound, pair of samples by pair, median (round trip: bound to guests, p50).
to off: with the IOMMU to without, samples taken in turn, pair by pair, median [min .. max] (round trip: p50 without to with).
to vs: the first pair of VMs to the one with the flags of --vs, taken in turn, pair by pair, median [min .. max].
to first: what the guests do with frames to what they do in the first line of it, taken in turn, pair by pair, median [min .. max].
bytes: every-byte: every byte is written and compared; headers: the first 64. from: build: written in place; copy: copied from memory of the sender's own.
load: frames are sent when they are due, and timed from then, at so many percent of what an echo (sent back in bursts) reaches; of the bound's own for the bound.
peers: no virtual machines; frames that arrived, by the peer's own counters; nobody looked at their bytes.
CPU ns: time a frame of all processes together; window to relay: taken in turn, pair by pair, median [min .. max].
ns a request: through the ring alone, no payload touched; xN: N requests at once.
distance: near if a cache line goes from core to core and back in less than 250 ns, else far; compare only like with like.";

/// A number with as many digits as it is worth.
pub fn number(value: f64) -> String {
    let digits = if value >= 1000.0 {
        0
    } else if value >= 10.0 {
        1
    } else if value >= 0.1 {
        2
    } else {
        4
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

fn five_times(times: &Latency) -> String {
    [times.p50, times.p90, times.p99, times.p999, times.max]
        .map(number)
        .join(" / ")
}

/// What the guests do, in columns: those in which the figures differ, or are not as usual.
#[derive(Clone, Copy)]
struct HowColumns {
    payload: bool,
    source: bool,
    mode: bool,
}

impl HowColumns {
    fn of(hows: impl Iterator<Item = How> + Clone) -> Self {
        let usual = How::USUAL;
        Self {
            payload: hows.clone().any(|how| how.payload != usual.payload),
            source: hows.clone().any(|how| how.source != usual.source),
            mode: hows.clone().any(|how| how.mode != usual.mode),
        }
    }

    fn cells(self, how: How) -> [Option<String>; 3] {
        [
            self.payload.then(|| how.payload.name().to_owned()),
            self.source.then(|| how.source.name().to_owned()),
            self.mode.then(|| how.mode.name().to_owned()),
        ]
    }
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

/// Column titles and rows; `None` is a column that this table does not have.
type Row = Vec<Option<String>>;

/// The report as text: rates, latencies, request times.
pub fn render(report: &Report) -> String {
    let mut parts = figures(&report.results, &report.peers);
    if let Some(vs) = &report.vs {
        parts.push(format!("with {}:\n", vs.flags));
        parts.extend(figures(&vs.results, &[]));
        parts.extend(vs_ratios(vs));
    }
    parts.extend(ratios(&report.ratios));
    parts.extend(paths(&report.paths));
    parts.extend(variants(&report.variants));
    parts.extend(to_peers(&report.to_peers));
    parts.extend(requests(&report.requests));
    if let Some(counters) = &report.counters {
        parts.push(format!("cache-miss counters: {counters}\n"));
    }
    parts.join("\n")
}

/// Rates and latencies.
fn figures(entries: &[Entry], peers: &[PeerEntry]) -> Vec<String> {
    let first = entries.first().map(|entry| entry.ring.ring.name());
    let one_ring = entries
        .iter()
        .all(|entry| Some(entry.ring.ring.name()) == first);
    // One ring is no column.
    let ring = |entry: &Entry| (!one_ring).then(|| entry.ring.ring.name());
    let any_iommu = entries.iter().any(|entry| entry.iommu != Iommu::Off);
    let iommu = |entry: &Entry| any_iommu.then(|| entry.iommu.name().to_owned());
    let any_relay = entries.iter().any(|entry| entry.path == Path::Relay);
    let any_peer = !peers.is_empty();
    let path = |entry: &Entry| (any_relay || any_peer).then(|| entry.path.name().to_owned());
    let hows = entries.iter().map(|entry| entry.how);
    let hows = HowColumns::of(hows.chain(peers.iter().map(|peer| peer.how)));
    let kept = |wanted: &dyn Fn(&Entry) -> bool| -> Vec<&Entry> {
        entries.iter().filter(|entry| wanted(entry)).collect()
    };
    let is_trip = |entry: &Entry| entry.direction == Direction::RoundTrip;
    let is_idle = |entry: &Entry| entry.direction == Direction::Idle;
    let rates = kept(&|entry| !is_trip(entry) && !is_idle(entry));
    let trips = kept(&|entry| is_trip(entry) && entry.load_percent.is_none());
    let loaded = kept(&|entry| is_trip(entry) && entry.load_percent.is_some());
    let idle = kept(&is_idle);
    let rates: Vec<Row> = rates
        .iter()
        .enumerate()
        .flat_map(|(index, entry)| {
            let (ratio, distance, faults) = common(entry);
            let [payload, source, mode] = hows.cells(entry.how);
            let row = vec![
                Some(entry.direction.name().to_owned()),
                ring(entry),
                iommu(entry),
                path(entry),
                Some(entry.frame_size.to_string()),
                Some(entry.batch.to_string()),
                payload,
                source,
                mode,
                Some(or_dash(entry.mpps.as_ref(), spread)),
                Some(or_dash(entry.gbps.as_ref(), |gbps| number(gbps.median))),
                (any_relay || any_peer)
                    .then(|| or_dash(entry.cpu_ns_per_frame.as_ref(), |cpu| number(cpu.median))),
                Some(or_dash(entry.bound_mpps.as_ref(), |bound| {
                    number(bound.median)
                })),
                Some(ratio),
                Some(distance),
                Some(faults),
            ];
            // The peers stand behind the last line of what they were sampled with.
            let more = rates
                .iter()
                .skip(index + 1)
                .any(|next| case(next) == case(entry));
            let here = |peer: &&PeerEntry| {
                let size = Size::Bytes(peer.frame_size);
                !more && (peer.direction, size, peer.batch) == case(entry)
            };
            let peers = peers.iter().filter(here);
            let peers = peers.map(|peer| peer_row(peer, !one_ring, any_iommu, hows));
            std::iter::once(row).chain(peers).collect::<Vec<Row>>()
        })
        .collect();
    let trips: Vec<Row> = trips
        .into_iter()
        .map(|entry| {
            let (ratio, distance, faults) = common(entry);
            let [payload, _, mode] = hows.cells(entry.how);
            vec![
                Some(entry.direction.name().to_owned()),
                ring(entry),
                iommu(entry),
                path(entry),
                Some(entry.frame_size.to_string()),
                payload,
                mode,
                Some(or_dash(entry.latency_ns.as_ref(), times)),
                Some(or_dash(entry.bound_latency_ns.as_ref(), times)),
                Some(ratio),
                Some(distance),
                Some(faults),
            ]
        })
        .collect();
    let loaded: Vec<Row> = loaded
        .into_iter()
        .map(|entry| {
            let (ratio, distance, faults) = common(entry);
            let [payload, _, mode] = hows.cells(entry.how);
            vec![
                Some(entry.direction.name().to_owned()),
                ring(entry),
                iommu(entry),
                path(entry),
                Some(entry.frame_size.to_string()),
                payload,
                mode,
                Some(or_dash(entry.load_percent, |load| format!("{load} %"))),
                Some(or_dash(entry.offered_mpps.as_ref(), |mpps| {
                    number(mpps.median)
                })),
                Some(or_dash(entry.latency_ns.as_ref(), five_times)),
                Some(or_dash(entry.bound_latency_ns.as_ref(), five_times)),
                Some(ratio),
                Some(distance),
                Some(faults),
            ]
        })
        .collect();
    let idle: Vec<Row> = idle
        .into_iter()
        .map(|entry| {
            let (_, distance, faults) = common(entry);
            vec![
                Some(entry.direction.name().to_owned()),
                ring(entry),
                iommu(entry),
                path(entry),
                Some(entry.how.mode.name().to_owned()),
                Some(or_dash(entry.idle_cpu_percent.as_ref(), spread)),
                Some(distance),
                Some(faults),
            ]
        })
        .collect();
    let loss = "lost/dup/reord/corrupt";
    let mut parts = Vec::new();
    if !rates.is_empty() {
        let head = [
            "direction",
            "ring",
            "iommu",
            "path",
            "size",
            "batch",
            "bytes",
            "from",
            "mode",
            "Mpps",
            "Gbit/s",
            "CPU ns",
            "bound",
            "ratio",
            "distance",
            loss,
        ];
        parts.push(table(&head, rates));
    }
    if !trips.is_empty() {
        let head = [
            "direction",
            "ring",
            "iommu",
            "path",
            "size",
            "bytes",
            "mode",
            "p50 / p99 / p99.9 / max ns",
            "bound",
            "ratio",
            "distance",
            loss,
        ];
        parts.push(table(&head, trips));
    }
    if !loaded.is_empty() {
        let head = [
            "direction",
            "ring",
            "iommu",
            "path",
            "size",
            "bytes",
            "mode",
            "load",
            "Mpps",
            "p50 / p90 / p99 / p99.9 / max ns",
            "bound",
            "ratio",
            "distance",
            loss,
        ];
        parts.push(table(&head, loaded));
    }
    if !idle.is_empty() {
        let head = [
            "direction",
            "ring",
            "iommu",
            "path",
            "mode",
            "CPU of all processes, % of a core",
            "distance",
            loss,
        ];
        parts.push(table(&head, idle));
    }
    parts
}

/// What a figure shares with those of the peers beside it.
fn case(entry: &Entry) -> (Direction, Size, u16) {
    (entry.direction, entry.frame_size, entry.batch)
}

/// A peer's line among those of the VMs.
fn peer_row(peer: &PeerEntry, ring: bool, iommu: bool, hows: HowColumns) -> Row {
    let dash = || "-".to_owned();
    let [payload, source, mode] = hows.cells(peer.how);
    vec![
        Some(peer.direction.name().to_owned()),
        ring.then(dash),
        iommu.then(dash),
        Some(peer.name.name().to_owned()),
        Some(peer.frame_size.to_string()),
        Some(peer.batch.to_string()),
        payload,
        source,
        mode,
        Some(or_dash(peer.mpps.as_ref(), spread)),
        Some(or_dash(peer.gbps.as_ref(), |gbps| number(gbps.median))),
        Some(or_dash(peer.cpu_ns_per_frame.as_ref(), |cpu| {
            number(cpu.median)
        })),
        Some(dash()),
        Some(dash()),
        Some(or_dash(peer.distance, |distance| {
            distance.name().to_owned()
        })),
        Some(dash()),
    ]
}

/// A table without the columns that its rows do not have.
fn table(head: &[&str], rows: Vec<Row>) -> String {
    let there = |column: usize| rows.iter().all(|row| row[column].is_some());
    let head: Vec<&str> = head
        .iter()
        .enumerate()
        .filter(|(column, _)| there(*column))
        .map(|(_, title)| *title)
        .collect();
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|row| row.into_iter().flatten().collect())
        .collect();
    align(&head, &rows)
}

/// A ratio: of interest is by how much it is off 1, or, where it is very small, what it is.
fn ratio(value: f64) -> String {
    if value < 0.01 {
        format!("{value:.5}")
    } else {
        format!("{value:.3}")
    }
}

fn ratio_spread(spread: &Spread) -> String {
    let [median, min, max] = [spread.median, spread.min, spread.max].map(ratio);
    format!("{median} [{min} .. {max}]")
}

/// A table with a line an entry; none where there is nothing to show.
fn rows<T>(head: &[&str], entries: &[T], row: impl FnMut(&T) -> Vec<String>) -> Option<String> {
    let rows: Vec<Vec<String>> = entries.iter().map(row).collect();
    (!rows.is_empty()).then(|| align(head, &rows))
}

/// What the window spares: a line a case and distance.
fn paths(entries: &[PathEntry]) -> Option<String> {
    let head = [
        "direction",
        "ring",
        "size",
        "batch",
        "bytes",
        "from",
        "mode",
        "speed, window to relay",
        "CPU a frame, window to relay",
        "pairs",
        "distance",
    ];
    let hows = HowColumns::of(entries.iter().map(|entry| entry.how));
    let rows = entries.iter().map(|entry| {
        let [payload, source, mode] = hows.cells(entry.how);
        vec![
            Some(entry.direction.name().to_owned()),
            Some(entry.ring.name()),
            Some(entry.frame_size.to_string()),
            Some(entry.batch.to_string()),
            payload,
            source,
            mode,
            Some(ratio_spread(&entry.speed)),
            Some(or_dash(entry.cpu.as_ref(), ratio_spread)),
            Some(entry.speed.samples.len().to_string()),
            Some(entry.distance.name().to_owned()),
        ]
    });
    (!entries.is_empty()).then(|| table(&head, rows.collect()))
}

/// What the guests do: a line a case and distance.
fn variants(entries: &[VariantEntry]) -> Option<String> {
    let head = [
        "direction",
        "ring",
        "size",
        "batch",
        "load",
        "bytes",
        "from",
        "mode",
        "speed, to first",
        "pairs",
        "distance",
    ];
    rows(&head, entries, |entry| {
        vec![
            entry.direction.name().to_owned(),
            entry.ring.name(),
            entry.frame_size.to_string(),
            entry.batch.to_string(),
            or_dash(entry.load_percent, |load| format!("{load} %")),
            entry.how.payload.name().to_owned(),
            entry.how.source.name().to_owned(),
            entry.how.mode.name().to_owned(),
            ratio_spread(&entry.speed),
            entry.speed.samples.len().to_string(),
            entry.distance.name().to_owned(),
        ]
    })
}

/// The first pair of VMs beside the second: a line a case and distance.
fn vs_ratios(vs: &Vs) -> Option<String> {
    let head = [
        "direction",
        "size",
        "batch",
        "speed, to vs",
        "pairs",
        "distance",
    ];
    rows(&head, &vs.ratios, |entry| {
        vec![
            entry.direction.name().to_owned(),
            entry.frame_size.to_string(),
            entry.batch.to_string(),
            ratio_spread(&entry.speed),
            entry.speed.samples.len().to_string(),
            entry.distance.name().to_owned(),
        ]
    })
}

/// The window beside the peers: a line a case, peer and distance.
fn to_peers(entries: &[ToPeerEntry]) -> Option<String> {
    let head = [
        "direction",
        "ring",
        "iommu",
        "size",
        "batch",
        "bytes",
        "from",
        "mode",
        "peer",
        "speed, window to peer",
        "pairs",
        "distance",
    ];
    rows(&head, entries, |entry| {
        vec![
            entry.direction.name().to_owned(),
            entry.ring.name(),
            entry.iommu.name().to_owned(),
            entry.frame_size.to_string(),
            entry.batch.to_string(),
            entry.how.payload.name().to_owned(),
            entry.how.source.name().to_owned(),
            entry.how.mode.name().to_owned(),
            entry.name.name().to_owned(),
            ratio_spread(&entry.speed),
            entry.speed.samples.len().to_string(),
            entry.distance.name().to_owned(),
        ]
    })
}

/// What the IOMMU costs: a line a case and distance.
fn ratios(entries: &[RatioEntry]) -> Option<String> {
    let head = [
        "direction",
        "ring",
        "size",
        "batch",
        "bytes",
        "from",
        "mode",
        "iommu",
        "to off",
        "pairs",
        "distance",
    ];
    let hows = HowColumns::of(entries.iter().map(|entry| entry.how));
    let rows = entries.iter().map(|entry| {
        let [payload, source, mode] = hows.cells(entry.how);
        vec![
            Some(entry.direction.name().to_owned()),
            Some(entry.ring.name()),
            Some(entry.frame_size.to_string()),
            Some(entry.batch.to_string()),
            payload,
            source,
            mode,
            Some(entry.iommu.name().to_owned()),
            Some(ratio_spread(&entry.ratio)),
            Some(entry.ratio.samples.len().to_string()),
            Some(entry.distance.name().to_owned()),
        ]
    });
    (!entries.is_empty()).then(|| table(&head, rows.collect()))
}

/// The request times: a line a place, ring and distance, a column a batch.
fn requests(entries: &[RequestEntry]) -> Option<String> {
    let line = |entry: &RequestEntry| {
        [
            entry.place.name().to_owned(),
            entry.ring.name(),
            or_dash(entry.distance, |distance| distance.name().to_owned()),
        ]
    };
    let mut lines: Vec<[String; 3]> = Vec::new();
    let mut batches: Vec<u16> = Vec::new();
    for entry in entries {
        if !lines.contains(&line(entry)) {
            lines.push(line(entry));
        }
        if !batches.contains(&entry.batch) {
            batches.push(entry.batch);
        }
    }
    if lines.is_empty() {
        return None;
    }
    let titles: Vec<String> = batches.iter().map(|batch| format!("x{batch}")).collect();
    let mut head = vec!["ns a request", "ring", "distance"];
    head.extend(titles.iter().map(String::as_str));
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|it| {
            let mut row = it.to_vec();
            row.extend(batches.iter().map(|&batch| {
                let found = entries
                    .iter()
                    .find(|entry| entry.batch == batch && line(entry) == *it);
                or_dash(found.and_then(|entry| entry.ns.as_ref()), |ns| {
                    number(ns.median)
                })
            }));
            row
        })
        .collect();
    Some(align(&head, &rows))
}

/// Columns as wide as their widest cell; the first to the left, the others to the right.
pub fn align(head: &[&str], rows: &[Vec<String>]) -> String {
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
    fn only_what_is_not_as_usual_everywhere_is_a_column() {
        let mut other = How::USUAL;
        let cells = |hows: &[How]| HowColumns::of(hows.iter().copied()).cells(How::USUAL);
        assert_eq!(cells(&[other]), [None, None, None]);
        other.payload = crate::cli::frames::Payload::Headers;
        let name = Some("every-byte".to_owned());
        assert_eq!(cells(&[How::USUAL, other]), [name, None, None]);
    }

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

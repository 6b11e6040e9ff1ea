//! What the guest's drivers say that they moved. The VMM sees no frame that goes from guest to guest; the built-in guest reports each of its runs on the
//! control channel (docs/bare-metal.md), and those are added up here. A guest can claim anything: its numbers are its word.

use std::sync::Mutex;

use crate::lines::Lines;
use crate::sys::lock;

/// The fields that are added up.
const FIELDS: [&str; 13] = [
    "tx_frames",
    "tx_bytes",
    "tx_full",
    "rx_frames",
    "rx_bytes",
    "lost",
    "duplicated",
    "reordered",
    "corrupted",
    "tx_notified",
    "tx_suppressed",
    "rx_notified",
    "rx_suppressed",
];

/// What it reported so far.
#[derive(Default)]
pub(crate) struct Reports {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lines: Lines,
    runs: u64,
    sums: [u64; FIELDS.len()],
}

impl Reports {
    /// What the guest writes.
    pub(crate) fn take(&self, bytes: &[u8]) {
        let mut guard = lock(&self.state);
        let mut lines = std::mem::take(&mut guard.lines);
        lines.take(bytes, |line| guard.add(line));
        guard.lines = lines;
    }

    /// How many runs it reported, and the sums of their fields.
    pub(crate) fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let state = lock(&self.state);
        let sums = FIELDS.into_iter().zip(state.sums);
        [("runs", state.runs)].into_iter().chain(sums)
    }
}

impl State {
    fn add(&mut self, line: &[u8]) {
        let Ok(line) = std::str::from_utf8(line) else {
            return;
        };
        let of_a_run = ["{\"record\":\"result\"", "{\"record\":\"stopped\""];
        if !of_a_run.iter().any(|start| line.starts_with(start)) {
            return;
        }
        self.runs = self.runs.saturating_add(1);
        for (name, sum) in FIELDS.iter().zip(&mut self.sums) {
            *sum = sum.saturating_add(number(line, name).unwrap_or(0));
        }
    }
}

/// The number of the first field of that name.
pub(crate) fn number(line: &str, name: &str) -> Option<u64> {
    let (_, behind) = line.split_once(&format!("\"{name}\":"))?;
    let end = behind.find(|c: char| !c.is_ascii_digit());
    behind.get(..end.unwrap_or(behind.len()))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lines::LINE_LIMIT;

    fn sums(reports: &Reports) -> Vec<u64> {
        reports.read().map(|(_, sum)| sum).collect()
    }

    #[test]
    fn runs_are_added_up_whatever_pieces_they_come_in() {
        let reports = Reports::default();
        let line = b"{\"record\":\"result\",\"id\":1,\"work\":\"both\",\"tx_frames\":5,\"tx_bytes\":320,\"tx_ticks\":9,\"tx_full\":1,\"rx_frames\":7,\"rx_bytes\":448,\"lost\":0,\"tx_notified\":3,\"tx_suppressed\":4,\"rx_notified\":5,\"rx_suppressed\":6,\"queues\":[{\"tx_notified\":1}]}\n";
        for piece in line.chunks(7) {
            reports.take(piece);
        }
        reports.take(b"{\"record\":\"ready\",\"tx_frames\":100}\n");
        reports.take(b"{\"record\":\"stopped\",\"rx_frames\":1,\"corrupted\":2}\n");
        assert_eq!(
            sums(&reports),
            [2, 5, 320, 1, 8, 448, 0, 0, 0, 2, 3, 4, 5, 6]
        );
    }

    #[test]
    fn a_guest_that_writes_nonsense_gets_no_further_than_its_own_numbers() {
        let reports = Reports::default();
        reports.take(&[b'x'; 3 * LINE_LIMIT]);
        reports.take(b"\",\"tx_frames\":9\n");
        reports.take(b"{\"record\":\"result\",\"tx_frames\":99999999999999999999,\"rx_frames\":-1,\"lost\":\"7\"}\n");
        reports.take(b"{\"record\":\"result\",\"tx_frames\":18446744073709551615}\n");
        reports.take(b"{\"record\":\"result\",\"tx_frames\":18446744073709551615\n");
        reports.take(b"\xff\xfe\n");
        let mut expected = [0; 1 + FIELDS.len()];
        expected[..2].copy_from_slice(&[3, u64::MAX]);
        assert_eq!(sums(&reports), expected);
    }
}

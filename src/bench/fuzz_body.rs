//! What a guest writes on its control channel, as a byte string: the body of a fuzz target, which includes this file, and of a test that makes strings up.

use super::record::{Lines, Record, SampleResult, WorkResult};
use crate::cli::Direction;

/// Reads records from these bytes, in pieces of the length that the first one says, and makes samples of them. Where they were cut makes no difference.
pub fn fuzz_records(data: &[u8]) {
    let Some((&piece, bytes)) = data.split_first() else {
        return;
    };
    let (whole, fine) = records(&[bytes]);
    let pieces: Vec<_> = bytes.chunks(usize::from(piece).max(1)).collect();
    let (cut, cut_fine) = records(&pieces);
    assert_eq!(fine, cut_fine);
    // What came in one piece with something that is no record is not looked at.
    assert!(!fine || format!("{whole:?}") == format!("{cut:?}"));
    let results: Vec<_> = cut
        .into_iter()
        .filter_map(|record| match record {
            Record::Result(result) => Some(result),
            Record::Done(done) => {
                let _ = done.number("status");
                None
            }
            _ => None,
        })
        .collect();
    for pair in results.chunks(2) {
        let other = pair.get(1).cloned().unwrap_or_else(WorkResult::default);
        let ends = [pair[0].clone(), other];
        for direction in [
            Direction::BeToFe,
            Direction::FeToBe,
            Direction::Both,
            Direction::RoundTrip,
            Direction::Echo,
            Direction::Idle,
        ] {
            let tsc_khz = ends[1].rx_frames;
            if let Ok(sample) = SampleResult::new(direction, &ends, tsc_khz) {
                assert!(sample.mpps.is_finite() && sample.mpps >= 0.0);
                assert!(!sample.timed || direction == Direction::Idle || sample.frames > 0);
            }
        }
    }
}

/// The records of these pieces up to one that has something else in it, and whether there was none.
fn records(pieces: &[&[u8]]) -> (Vec<Record>, bool) {
    let mut lines = Lines::default();
    let mut all = Vec::new();
    for piece in pieces {
        match lines.take(piece) {
            Ok(records) => all.extend(records),
            Err(_) => return (all, false),
        }
    }
    (all, true)
}

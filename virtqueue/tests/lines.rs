//! How many cache lines travel between two cores for a request, counted in a model: what the layouts differ in most, and no clock shows alone.

use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Layout, RingConfig};

mod common;
#[path = "common/turns.rs"]
mod turns;
use common::place_at;
use turns::{Lines, SIZE, Turns};

const BATCHES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Turns around the ring that are counted.
const ROUNDS: usize = 8;

/// Lines that both sides fetch in a turn around the ring.
fn lines<L: Layout>(in_order: bool, written: bool, batch: usize, waiting: usize) -> usize {
    let (config, data) = place_at::<L>(0, SIZE);
    let config = RingConfig { in_order, ..config };
    let [of_driver, of_device] = Lines::pair(data.try_into().unwrap());
    let driver = L::driver(of_driver.clone(), &config).unwrap();
    let device = L::device(of_device, &config).unwrap();
    let mut turns = Turns::new(driver, device, batch, data, written, waiting);
    let around = usize::from(SIZE);
    turns.run(2 * around);
    of_driver.fetched();
    turns.run(ROUNDS * around);
    let [by_driver, by_device] = of_driver.fetched();
    usize::try_from(by_driver + by_device).unwrap() / ROUNDS
}

/// Both ends of how full a ring can be.
fn waiting(batch: usize) -> [usize; 2] {
    [0, usize::from(SIZE) - batch]
}

#[test]
fn a_packed_request_moves_a_quarter_line_each_way_and_unbatched_a_whole_one() {
    for batch in BATCHES {
        for written in [false, true] {
            for waiting in waiting(batch) {
                let batches = usize::from(SIZE) / batch;
                let there = batches.max(usize::from(SIZE) / 4);
                let got = lines::<Packed>(false, written, batch, waiting);
                assert_eq!(got, 2 * there, "{batch} {written} {waiting}");
            }
        }
    }
}

#[test]
fn a_packed_batch_that_is_read_in_order_moves_one_line_back() {
    for batch in BATCHES {
        for waiting in waiting(batch) {
            let batches = usize::from(SIZE) / batch;
            let there = batches.max(usize::from(SIZE) / 4);
            let got = lines::<Packed>(true, false, batch, waiting);
            assert_eq!(got, there + batches, "{batch} {waiting}");
        }
    }
}

#[test]
fn order_saves_no_line_where_every_length_is_reported() {
    for batch in BATCHES {
        for waiting in waiting(batch) {
            for [with, without] in [
                [true, false].map(|order| lines::<Split>(order, true, batch, waiting)),
                [true, false].map(|order| lines::<Packed>(order, true, batch, waiting)),
            ] {
                assert_eq!(with, without, "{batch} {waiting}");
            }
        }
    }
}

#[test]
fn a_split_request_moves_two_and_a_half_times_the_lines_unbatched() {
    // Five places; entries that share a line with an index and elements that lie across two make it a little less and a little more.
    let five = 5 * usize::from(SIZE);
    for written in [false, true] {
        for waiting in waiting(1) {
            let got = lines::<Split>(false, written, 1, waiting);
            assert!(got.abs_diff(five) <= usize::from(SIZE) / 32, "{got}");
        }
    }
}

#[test]
fn packed_and_in_order_moves_the_fewest_lines_where_the_device_reads() {
    for batch in BATCHES {
        let best = lines::<Packed>(true, false, batch, 0);
        assert!(best <= lines::<Packed>(false, false, batch, 0), "{batch}");
        for in_order in [false, true] {
            assert!(best < lines::<Split>(in_order, false, batch, 0), "{batch}");
        }
    }
}

//! The bodies of the drivers' fuzz targets for a fixed number of byte strings, without a fuzzer; and what the strings are made from.

#[path = "../../fuzz/iterations.rs"]
mod iterations;

use guest_driver::fuzz_bodies::fuzz_inflight;
use iterations::{iterate, seeds};

#[test]
fn a_back_end_goes_on_in_its_ring_whatever_the_area_says() {
    /// A log of 16 bytes; 4 descriptors; an area for two rings of 8, of which this is the second.
    const RING: [u8; 10] = [16, 0, 3, 2, 8, 1, 0, 0x80, 0, 0x80];
    const OPEN: u8 = 4;
    const SERVE: u8 = 0x15;
    /// What a back-end ends with: nothing, what was published, or it goes on.
    const TAKEN: u8 = 0;
    const PUBLISHED: u8 = 2;
    const ON: u8 = 3;
    let area = |at: u16, value: u16| {
        let [at, value] = [at, value].map(u16::to_le_bytes);
        vec![0, at[0], at[1], value[0], value[1]]
    };
    // A buffer of 64 bytes that is written, available in the first round.
    let available = |slot: u16| {
        let field = |at: u16, value: u16| {
            let [at, value] = [slot * 16 + at, value].map(u16::to_le_bytes);
            vec![2, at[0], at[1], value[0], value[1]]
        };
        [
            field(0, 0x3000),
            field(8, 64),
            field(12, slot),
            field(14, 0x82),
        ]
        .concat()
    };
    let both = [available(0), available(1)].concat();
    seeds(
        "inflight",
        &[
            (
                "goes-on",
                [&RING[..], &both, &[OPEN, SERVE, ON, SERVE, ON]].concat(),
            ),
            (
                "taken",
                [&RING[..], &both, &[OPEN, SERVE, TAKEN, OPEN, SERVE, ON]].concat(),
            ),
            (
                "published",
                [&RING[..], &both, &[OPEN, SERVE, PUBLISHED, OPEN, SERVE, ON]].concat(),
            ),
            (
                "spoilt",
                [
                    &RING[..],
                    &both,
                    &[OPEN],
                    &area(320 + 16, 9),
                    &[OPEN, SERVE, ON],
                ]
                .concat(),
            ),
            (
                "flying",
                [&RING[..], &[OPEN], &area(320 + 32, 1), &[OPEN, SERVE, ON]].concat(),
            ),
        ],
    );
    let count = if cfg!(debug_assertions) {
        2_000
    } else {
        50_000
    };
    iterate("inflight", count, fuzz_inflight);
}

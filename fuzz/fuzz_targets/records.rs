//! What a guest writes on its control channel.
#![no_main]
// The tool is a program, not a library: these are its files.
#![allow(dead_code)]

#[path = "../../src/cli"]
mod cli {
    mod direction;
    pub use direction::Direction;
}

#[path = "../../src/bench"]
mod bench {
    pub mod fuzz_body;
    pub mod record;
}

use bench::fuzz_body::fuzz_records;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_records(data));

//! A hostile area for what is in flight, and a hostile driver of the ring.
#![no_main]

use guest_driver::fuzz_bodies::fuzz_inflight;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_inflight(data));

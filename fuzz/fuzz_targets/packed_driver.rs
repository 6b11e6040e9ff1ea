//! The driver's side of a packed ring against a hostile device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtqueue::fuzz_bodies::fuzz_driver;
use virtqueue::packed::Packed;

fuzz_target!(|data: &[u8]| fuzz_driver(Packed, data));

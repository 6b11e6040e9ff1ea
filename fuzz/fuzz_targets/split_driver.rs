//! The driver's side of a split ring against a hostile device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtqueue::fuzz_bodies::fuzz_driver;
use virtqueue::split::Split;

fuzz_target!(|data: &[u8]| fuzz_driver(Split, data));

//! The device's side of a split ring against a hostile driver.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtqueue::fuzz_bodies::fuzz_device;
use virtqueue::split::Split;

fuzz_target!(|data: &[u8]| fuzz_device(Split, data));

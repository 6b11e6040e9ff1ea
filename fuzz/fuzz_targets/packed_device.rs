//! The device's side of a packed ring against a hostile driver.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtqueue::fuzz_bodies::fuzz_device;
use virtqueue::packed::Packed;

fuzz_target!(|data: &[u8]| fuzz_device(Packed, data));

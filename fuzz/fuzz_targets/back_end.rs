//! A hostile back-end, and driver, of a virtio-net.
#![no_main]

use devices::fuzz_bodies::fuzz_back_end;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_back_end(data));

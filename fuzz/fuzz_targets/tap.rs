//! A hostile driver of a virtio-net over a tap, and a hostile host network.
#![no_main]

use devices::fuzz_bodies::fuzz_tap;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_tap(data));

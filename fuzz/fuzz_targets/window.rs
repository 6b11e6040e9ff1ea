//! A hostile peer's memory in a window.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::fuzz_bodies::fuzz_window;

fuzz_target!(|data: &[u8]| fuzz_window(data));

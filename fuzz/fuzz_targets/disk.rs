//! A hostile driver of a disk.
#![no_main]

use devices::fuzz_bodies::fuzz_disk;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_disk(data));

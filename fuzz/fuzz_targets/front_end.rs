//! A hostile front-end, and driver, of a vhost-pci device.
#![no_main]

use devices::fuzz_bodies::fuzz_front_end;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_front_end(data));

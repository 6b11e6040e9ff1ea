//! A hostile guest at the registers of virtio-pci functions: configuration space, MSI-X, BARs, with memory to match.
#![no_main]

use devices::fuzz_bodies::fuzz_function;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_function(data));

//! The headers of a kernel: ELF or bzImage.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::fuzz_bodies::fuzz_kernel;

fuzz_target!(|data: &[u8]| fuzz_kernel(data));

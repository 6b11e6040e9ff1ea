//! A hostile driver's requests to a virtio-iommu.
#![no_main]

use devices::fuzz_bodies::fuzz_iommu;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_iommu(data));

//! The bodies of the fuzz targets, with byte strings made up here.

use proptest::collection::vec as vec_of;
use proptest::prelude::*;

use super::*;
use crate::fuzz_bodies::{fuzz_device, fuzz_driver};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_device_survives_every_driver(data in vec_of(any::<u8>(), 0..1500)) {
        fuzz_device(Split, &data);
        fuzz_device(Packed, &data);
    }

    #[test]
    fn a_driver_survives_every_device(data in vec_of(any::<u8>(), 0..1500)) {
        fuzz_driver(Split, &data);
        fuzz_driver(Packed, &data);
    }
}

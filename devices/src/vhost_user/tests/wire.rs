//! Payloads.

use proptest::prelude::*;

use crate::vhost_user::{
    DecodeError, MAX_FDS, MemoryRegion, MemoryTable, Payload, SingleMemoryRegion, U64, VringAddr,
    VringFd, VringState, requests,
};

fn region() -> impl Strategy<Value = MemoryRegion> {
    any::<[u64; 4]>().prop_map(
        |[guest_address, size, user_address, mmap_offset]| MemoryRegion {
            guest_address,
            size,
            user_address,
            mmap_offset,
        },
    )
}

/// What was encoded decodes to the same, and no other length does.
fn survives<T: Payload + PartialEq + std::fmt::Debug>(payload: &T) {
    let bytes = payload.encode();
    assert_eq!(T::decode(&bytes).as_ref(), Ok(payload));
    for len in 0..bytes.len() {
        let result = T::decode(&bytes[..len]);
        assert!(matches!(result, Err(DecodeError::Length { got, .. }) if got == len));
    }
    for more in [1, 8, 32] {
        let longer = [&bytes[..], &vec![0; more]].concat();
        assert!(matches!(
            T::decode(&longer),
            Err(DecodeError::Length { .. })
        ));
    }
}

proptest! {
    #[test]
    fn numbers_survive_the_wire_and_no_other_length_does(value: u64) {
        survives(&U64(value));
    }

    #[test]
    fn memory_tables_survive_the_wire_and_no_other_length_does(
        regions in prop::collection::vec(region(), 0..=MAX_FDS),
    ) {
        survives(&MemoryTable(regions));
    }

    #[test]
    fn single_regions_survive_the_wire_and_no_other_length_does(region in region()) {
        survives(&SingleMemoryRegion(region));
    }

    #[test]
    fn vring_states_survive_the_wire_and_no_other_length_does(index: u32, num: u32) {
        survives(&VringState { index, num });
    }

    #[test]
    fn vring_addresses_survive_the_wire_and_no_other_length_does(
        [index, flags] in any::<[u32; 2]>(),
        [desc, used, avail, log] in any::<[u64; 4]>(),
    ) {
        survives(&VringAddr { index, flags, desc, used, avail, log });
    }

    #[test]
    fn vring_descriptors_survive_the_wire_and_no_other_length_does(index: u8, no_fd: bool) {
        survives(&VringFd { index, no_fd });
    }

    #[test]
    fn no_bytes_make_the_decoders_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = MemoryTable::decode(&bytes);
        let _ = SingleMemoryRegion::decode(&bytes);
        let _ = VringAddr::decode(&bytes);
        let _ = VringState::decode(&bytes);
        let _ = VringFd::decode(&bytes);
        let _ = U64::decode(&bytes);
    }
}

#[test]
fn fields_lie_where_the_specification_puts_them() {
    let addr = VringAddr {
        index: 1,
        flags: 2,
        desc: 3,
        used: 4,
        avail: 5,
        log: 6,
    };
    let mut expected = Vec::new();
    expected.extend_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
    for field in 3..=6 {
        expected.extend_from_slice(&[field, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(addr.encode(), expected);

    let region = MemoryRegion {
        guest_address: 0x0102_0304_0506_0708,
        size: 0x10,
        user_address: 0x20,
        mmap_offset: 0x30,
    };
    let table = MemoryTable(vec![region]).encode();
    assert_eq!(table[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(table[8..16], [8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!((table[16], table[24], table[32]), (0x10, 0x20, 0x30));
    assert_eq!(SingleMemoryRegion(region).encode()[8..], table[8..]);
    let fd = VringFd {
        index: 7,
        no_fd: true,
    };
    assert_eq!(fd.encode(), [7, 1, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_table_of_more_regions_than_descriptors_can_come_with_is_refused_whatever_its_length() {
    for count in [33, 127, u32::MAX] {
        let mut bytes = vec![0; 8 + 32 * 33];
        bytes[..4].copy_from_slice(&count.to_le_bytes());
        assert_eq!(
            MemoryTable::decode(&bytes),
            Err(DecodeError::Regions(count))
        );
    }
}

#[test]
fn requests_are_named_for_log_lines_and_unknown_ones_do_no_harm() {
    assert_eq!(requests::name(requests::GET_VRING_BASE), "GET_VRING_BASE");
    assert_eq!(requests::name(u32::MAX), "an unknown request");
}

//! Payloads.

use proptest::prelude::*;

use crate::vhost_user::{
    DecodeError, Iotlb, IotlbKind, Log, MAX_FDS, MemoryRegion, MemoryTable, Payload,
    SingleMemoryRegion, U64, VringAddr, VringFd, VringState, requests,
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

const KINDS: [IotlbKind; 4] = [
    IotlbKind::Miss,
    IotlbKind::Update,
    IotlbKind::Invalidate,
    IotlbKind::AccessFail,
];

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
    fn logs_survive_the_wire_and_no_other_length_does(mmap_size: u64, mmap_offset: u64) {
        survives(&Log { mmap_size, mmap_offset });
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
    fn iotlb_messages_survive_the_wire_and_no_other_length_does(
        [iova, size, user_address] in any::<[u64; 3]>(),
        [read, write] in any::<[bool; 2]>(),
        kind in prop::sample::select(&KINDS[..]),
    ) {
        survives(&Iotlb { iova, size, user_address, read, write, kind });
    }

    #[test]
    fn no_bytes_make_the_decoders_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = MemoryTable::decode(&bytes);
        let _ = SingleMemoryRegion::decode(&bytes);
        let _ = VringAddr::decode(&bytes);
        let _ = Iotlb::decode(&bytes);
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

#[test]
fn iotlb_messages_lie_as_the_specification_and_the_padding_of_c_put_them() {
    let message = Iotlb {
        iova: 0x0102_0304_0506_0708,
        size: 0x1000,
        user_address: 0x1112_1314_1516_1718,
        read: true,
        write: false,
        kind: IotlbKind::Update,
    };
    let mut expected = vec![8, 7, 6, 5, 4, 3, 2, 1];
    expected.extend_from_slice(&[0, 0x10, 0, 0, 0, 0, 0, 0]);
    expected.extend_from_slice(&[0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11]);
    // VHOST_ACCESS_RO and VHOST_IOTLB_UPDATE, and six bytes of nothing.
    expected.extend_from_slice(&[1, 2, 0, 0, 0, 0, 0, 0]);
    assert_eq!(message.encode(), expected);
    // VHOST_ACCESS_WO, VHOST_ACCESS_RW; the kinds are counted from 1.
    for (permission, read, write) in [(0, false, false), (2, false, true), (3, true, true)] {
        expected[24] = permission;
        for (number, kind) in (1..).zip(KINDS) {
            expected[25] = number;
            // What is in the padding means nothing.
            let mut dirty = expected.clone();
            dirty[26..].fill(0xff);
            let decoded = Iotlb::decode(&dirty).unwrap();
            assert_eq!(
                (decoded.read, decoded.write, decoded.kind),
                (read, write, kind)
            );
            assert_eq!(decoded.encode(), expected);
        }
    }
    for number in [0, 5, 6, 0xff] {
        expected[25] = number;
        assert_eq!(Iotlb::decode(&expected), Err(DecodeError::Iotlb(number)));
    }
}

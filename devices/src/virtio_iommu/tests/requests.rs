//! Every request, and every status that it can have.

use super::*;
use crate::fake::MEMORY_SIZE;
use crate::host::Access;

#[test]
fn a_configuration_that_cannot_be_is_refused() {
    let make = |config| VirtioIommu::new(config, FakeHost::new()).err();
    let base = IommuConfig::default();
    for page_size in [0, 2048, 4097, 12288] {
        let config = IommuConfig { page_size, ..base };
        assert!(matches!(make(config), Some(Error::PageSize(p)) if p == page_size));
    }
    for input_range_end in [0, 0x1000, u64::MAX] {
        let config = IommuConfig {
            input_range_end,
            ..base
        };
        assert!(matches!(make(config), Some(Error::InputRange { .. })));
    }
    let config = IommuConfig {
        max_domains: 0,
        ..base
    };
    assert!(matches!(make(config), Some(Error::NoDomains)));
    assert!(make(base).is_none());
}

#[test]
fn the_driver_finds_type_features_and_configuration() {
    let rig = Rig::idle(IommuConfig {
        page_size: 2 << 20,
        max_domains: 7,
        ..IommuConfig::default()
    });
    assert_eq!(rig.driver.config(0) >> 16, 0x1040 + 23);
    assert_eq!(rig.driver.offered() & 0xff, 0b101_0111);
    let config: [u8; 40] = rig.driver.read(DEVICE);
    let long = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(long(0), !0x1f_ffff);
    assert_eq!((long(8), long(16)), (0, (64 << 30) - 1));
    assert_eq!((word(24), word(28)), (0, 6));
    assert_eq!(word(32), 64);
    assert_eq!(config[36..], [0; 4]);
}

#[test]
fn an_attached_endpoint_reaches_what_is_mapped_and_a_detached_one_nothing() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&map(1, 0x1000, 0x2fff, 0x8000, READ)), OK);
    assert_eq!(
        rig.net.translate(0x1010, 0x1000, Access::Read),
        Some(0x8010)
    );
    assert_eq!(rig.net.translate(0x1010, 1, Access::Write), None);
    assert_eq!(rig.other.translate(0x1010, 1, Access::Read), None);
    assert_eq!(rig.ask(&detach(1, NET)), OK);
    assert_eq!(rig.net.lookup(0x1000), None);
    // The domain ended with its last endpoint, and its mappings with it.
    assert_eq!(rig.ask(&unmap(1, 0x1000, 0x2fff)), NOENT);
    assert_eq!(rig.device.stats().mappings, 0);
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.net.lookup(0x1000), None);
}

#[test]
fn every_permission_is_what_the_flags_say() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    for (flags, read, write) in [(1, true, false), (2, false, true), (3, true, true)] {
        let at = 0x1000 * u64::from(flags);
        assert_eq!(rig.ask(&map(1, at, at + 0xfff, 0, flags)), OK);
        assert_eq!(
            rig.net.lookup(at).map(|m| m.permission),
            Some(Permission { read, write })
        );
    }
    // No access: nothing is shown, and the range is taken.
    assert_eq!(rig.ask(&map(1, 0x8000, 0x8fff, 0, 0)), OK);
    assert_eq!(rig.net.lookup(0x8000), None);
    assert_eq!(rig.device.stats().mappings, 4);
    assert_eq!(rig.ask(&map(1, 0x8000, 0x8fff, 0, READ)), INVAL);
    assert_eq!(rig.ask(&unmap(1, 0x8000, 0x8fff)), OK);
    assert_eq!(rig.ask(&map(1, 0x8000, 0x8fff, 0, READ)), OK);
}

#[test]
fn what_is_mapped_for_writing_can_be_read_where_the_user_says_so_and_nothing_else_changes() {
    let mut rig = Rig::with(
        IommuConfig {
            write_only_readable: true,
            ..IommuConfig::default()
        },
        ALL,
    );
    // Before and after the attachment: both ways on which an endpoint learns of a mapping.
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    for (flags, read, write) in [(1, true, false), (2, true, true), (3, true, true)] {
        let at = 0x1000 * u64::from(flags);
        assert_eq!(rig.ask(&map(1, at, at + 0xfff, 0x8000, flags)), OK);
        assert_eq!(rig.ask(&attach(1, OTHER)), OK);
        for endpoint in [&rig.net, &rig.other] {
            let permission = endpoint.lookup(at).map(|mapping| mapping.permission);
            assert_eq!(permission, Some(Permission { read, write }));
        }
        assert_eq!(rig.ask(&detach(1, OTHER)), OK);
    }
    assert_eq!(rig.ask(&map(1, 0x8000, 0x8fff, 0, 0)), OK);
    assert_eq!(rig.net.lookup(0x8000), None);
}

#[test]
fn an_attach_that_cannot_be_is_refused_and_changes_nothing() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&map(1, 0x1000, 0x1fff, 0, READ)), OK);
    assert_eq!(rig.ask(&attach_with(2, OTHER, 1, 0)), OK);
    for (bytes, status) in [
        (attach(1, 0x99), NOENT),
        (attach(256, NET), RANGE),
        (attach(u32::MAX, NET), RANGE),
        (attach_with(3, NET, 2, 0), INVAL),
        (attach_with(3, NET, 1 << 31, 0), INVAL),
        (attach_with(3, NET, 0, 1), INVAL),
        // A bypass domain, and one that is none.
        (attach_with(2, NET, 0, 0), INVAL),
        (attach_with(1, NET, 1, 0), INVAL),
        (attach_with(1, OTHER, 1, 0), INVAL),
    ] {
        assert_eq!(rig.ask(&bytes), status, "{bytes:?}");
        assert!(rig.net.lookup(0x1000).is_some());
    }
    assert_eq!(rig.device.stats().errors, 9);
    // Domain 3 was never made.
    assert_eq!(rig.ask(&map(3, 0x1000, 0x1fff, 0, READ)), NOENT);
    assert_eq!(rig.ask(&attach(255, NET)), OK);
}

#[test]
fn an_attach_moves_an_endpoint_and_again_to_the_same_domain_does_nothing() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&map(1, 0x1000, 0x1fff, 0, READ)), OK);
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert!(rig.net.lookup(0x1000).is_some());
    assert_eq!(rig.ask(&attach(2, OTHER)), OK);
    assert_eq!(rig.ask(&map(2, 0x5000, 0x5fff, 0x3000, READ)), OK);
    assert_eq!(rig.ask(&map(2, 0x9000, 0x9fff, 0x3000, 0)), OK);
    assert_eq!(rig.ask(&attach(2, NET)), OK);
    assert_eq!(rig.net.lookup(0x1000), None);
    assert_eq!(
        rig.net.lookup(0x5000),
        Some(mapping(0x5000, 0x3000, 0x1000, Permission::READ))
    );
    assert_eq!(rig.net.lookup(0x9000), None);
    assert_eq!(rig.device.stats().mappings, 2);
    // Both see what comes and goes; the domain ends with the last of them.
    assert_eq!(rig.ask(&map(2, 0x6000, 0x6fff, 0x4000, READ)), OK);
    assert!(rig.net.lookup(0x6000).is_some() && rig.other.lookup(0x6000).is_some());
    assert_eq!(rig.ask(&detach(2, NET)), OK);
    assert!(rig.net.lookup(0x6000).is_none() && rig.other.lookup(0x6000).is_some());
    assert_eq!(rig.ask(&unmap(2, 0x6000, 0x6fff)), OK);
    assert_eq!(rig.other.lookup(0x6000), None);
    assert_eq!(rig.ask(&detach(2, OTHER)), OK);
    assert_eq!(rig.ask(&unmap(2, 0x5000, 0x5fff)), NOENT);
}

#[test]
fn a_detach_of_what_is_not_attached_there_is_refused() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&detach(1, 0x99)), NOENT);
    assert_eq!(rig.ask(&detach(1, OTHER)), INVAL);
    assert_eq!(rig.ask(&detach(2, NET)), INVAL);
    assert_eq!(rig.ask(&detach(1, NET)), OK);
    assert_eq!(rig.ask(&detach(1, NET)), INVAL);
}

#[test]
fn a_mapping_that_cannot_be_is_refused_and_shows_nothing() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&attach_with(2, OTHER, 1, 0)), OK);
    assert_eq!(rig.ask(&map(1, 0x4000, 0x5fff, 0, READ)), OK);
    let end = (64u64 << 30) - 1;
    for (bytes, status) in [
        // The domain.
        (map(3, 0x1000, 0x1fff, 0, READ), NOENT),
        (map(u32::MAX, 0x1000, 0x1fff, 0, READ), NOENT),
        (map(2, 0x1000, 0x1fff, 0, READ), INVAL),
        // The flags: MMIO has not been offered.
        (map(1, 0x1000, 0x1fff, 0, READ | 4), INVAL),
        (map(1, 0x1000, 0x1fff, 0, 8), INVAL),
        (map(1, 0x1000, 0x1fff, 0, 1 << 31), INVAL),
        // Nothing, less than nothing, and everything.
        (map(1, 0x1000, 0xfff, 0, READ), INVAL),
        (map(1, 0x2000, 0x1000, 0, READ), INVAL),
        (map(1, u64::MAX, 0, 0, READ), INVAL),
        (map(1, 0, u64::MAX, 0, READ), RANGE),
        // Alignment.
        (map(1, 0x1001, 0x1fff, 0, READ), RANGE),
        (map(1, 0x1000, 0x1ffe, 0, READ), RANGE),
        (map(1, 0x1000, 0x2000, 0, READ), RANGE),
        (map(1, 0x1000, 0x1000, 0, READ), RANGE),
        (map(1, 0x1000, 0x1fff, 0x800, READ), RANGE),
        // The input range.
        (map(1, end + 1, end + 0x1000, 0, READ), RANGE),
        (map(1, end - 0xfff, end + 0x1000, 0, READ), RANGE),
        (map(1, u64::MAX - 0xfff, u64::MAX, 0, READ), RANGE),
        // What is there, from below, from above, within, and around.
        (map(1, 0x3000, 0x4fff, 0, READ), INVAL),
        (map(1, 0x5000, 0x6fff, 0, READ), INVAL),
        (map(1, 0x4000, 0x4fff, 0, READ), INVAL),
        (map(1, 0x4000, 0x5fff, 0, READ), INVAL),
        (map(1, 0x3000, 0x6fff, 0, READ), INVAL),
        // The interrupts' addresses, at both ends.
        (map(1, 0xfee0_0000, 0xfee0_0fff, 0, READ), INVAL),
        (map(1, 0xfeef_f000, 0xfeef_ffff, 0, READ), INVAL),
        (map(1, 0xfedf_f000, 0xfee0_0fff, 0, READ), INVAL),
        // What is no memory.
        (map(1, 0x1000, 0x1fff, MEMORY_SIZE, READ), INVAL),
        (map(1, 0x1000, 0x2fff, MEMORY_SIZE - 0x1000, READ), INVAL),
        (map(1, 0x1000, 0x2fff, u64::MAX - 0xfff, READ), INVAL),
        (map(1, 0x1000, 0x1fff, MEMORY_SIZE, 0), INVAL),
    ] {
        assert_eq!(rig.ask(&bytes), status, "{bytes:?}");
        assert_eq!(rig.device.stats().mappings, 1);
    }
    for at in [0x1000, 0x3000, 0x6000, 0xfee0_0000, end] {
        assert_eq!(rig.net.lookup(at), None);
    }
    // And right beside all of these.
    for (first, last, gpa) in [
        (0x3000, 0x3fff, 0),
        (0x6000, 0x6fff, MEMORY_SIZE - 0x1000),
        (0xfedf_f000, 0xfedf_ffff, 0),
        (0xfef0_0000, 0xfef0_0fff, 0),
        (end - 0xfff, end, 0),
    ] {
        assert_eq!(rig.ask(&map(1, first, last, gpa, READ)), OK, "{first:#x}");
    }
}

#[test]
fn the_page_size_is_the_granularity() {
    let config = IommuConfig {
        page_size: 2 << 20,
        ..IommuConfig::default()
    };
    let mut rig = Rig::with(config, ALL);
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&map(1, 0, 0xfff, 0, READ)), RANGE);
    assert_eq!(rig.ask(&map(1, 0, 0x1f_ffff, 0x1000, READ)), RANGE);
    assert_eq!(rig.ask(&map(1, 0, 0x1f_ffff, 0x20_0000, READ)), OK);
}

#[test]
fn an_unmap_removes_whole_mappings_or_nothing() {
    // What is mapped, in pages from first to last; what is unmapped; whether that succeeds, and what remains.
    type Pages = (u64, u64);
    let cases: [(&[Pages], Pages, u8, u64); 9] = [
        (&[], (0, 4), OK, 0),
        (&[(0, 9)], (0, 9), OK, 0),
        (&[(0, 4), (5, 9)], (0, 9), OK, 0),
        (&[(0, 9)], (0, 4), RANGE, 1),
        (&[(0, 4), (5, 9)], (0, 4), OK, 1),
        (&[(0, 4)], (0, 9), OK, 0),
        (&[(0, 4), (10, 14)], (0, 14), OK, 0),
        (&[(0, 9)], (5, 9), RANGE, 1),
        (&[(0, 4), (5, 9)], (0, 6), RANGE, 2),
    ];
    for (mapped, (first, last), status, left) in cases {
        let mut rig = Rig::new();
        assert_eq!(rig.ask(&attach(1, NET)), OK);
        let bytes = |(first, last): Pages| (first << 12, (last << 12) + 0xfff);
        for &pages in mapped {
            let (first, last) = bytes(pages);
            assert_eq!(rig.ask(&map(1, first, last, 0, READ)), OK);
        }
        let (first, last) = bytes((first, last));
        assert_eq!(rig.ask(&unmap(1, first, last)), status);
        assert_eq!(rig.device.stats().mappings, left);
        let reachable = mapped
            .iter()
            .filter(|m| rig.net.lookup(m.0 << 12).is_some());
        assert_eq!(reachable.count() as u64, left, "{mapped:?}");
    }
}

#[test]
fn an_unmap_that_cannot_be_is_refused() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&attach_with(2, OTHER, 1, 0)), OK);
    assert_eq!(rig.ask(&map(1, 0x1000, 0x1fff, 0, READ)), OK);
    let mut reserved = unmap(1, 0x1000, 0x1fff);
    reserved[27] = 1;
    for (bytes, status) in [
        (unmap(3, 0x1000, 0x1fff), NOENT),
        (unmap(2, 0x1000, 0x1fff), INVAL),
        (unmap(1, 0x2000, 0x1fff), INVAL),
        (unmap(1, 0x1001, 0x1fff), RANGE),
        (unmap(1, 0x1000, 0x1ffe), RANGE),
        (reserved, INVAL),
    ] {
        assert_eq!(rig.ask(&bytes), status, "{bytes:?}");
        assert!(rig.net.lookup(0x1000).is_some());
    }
    // It may spill over what is not mapped, as far as it likes.
    assert_eq!(rig.ask(&unmap(1, 0, u64::MAX)), OK);
    assert_eq!(rig.net.lookup(0x1000), None);
}

#[test]
fn a_probe_tells_where_the_interrupts_are() {
    let mut rig = Rig::new();
    let answer = rig.answer(&probe(NET), 68);
    let mut expected = vec![1, 0, 20, 0, 1, 0, 0, 0];
    expected.extend(0xfee0_0000u64.to_le_bytes());
    expected.extend(0xfeef_ffffu64.to_le_bytes());
    expected.resize(68, 0);
    assert_eq!(answer, expected);
    // More room than properties is filled with zeroes.
    let answer = rig.answer(&probe(OTHER), 100);
    expected.resize(100, 0);
    assert_eq!(answer, expected);
    let answer = rig.answer(&probe(0x99), 68);
    assert_eq!(answer[..64], [0; 64]);
    assert_eq!(answer[64..], [NOENT, 0, 0, 0]);
    // Less room than `probe_size`: the status is where a driver that believes in its size looks for it.
    let answer = rig.answer(&probe(NET), 67);
    assert_eq!(answer[..63], [0; 63]);
    assert_eq!(answer[63..], [INVAL, 0, 0, 0]);
    assert_eq!(rig.ask(&probe(NET)), INVAL);
}

#[test]
fn a_request_that_is_not_known_or_not_whole_has_a_status_too() {
    let mut rig = Rig::new();
    for kind in [0, 6, 0x80, 255] {
        assert_eq!(rig.ask(&request(kind, &[&[0; 64]])), UNSUPP);
    }
    assert_eq!(rig.device.stats().unknown, 4);
    for whole in [
        attach(1, NET),
        detach(1, NET),
        map(1, 0, 0xfff, 0, READ),
        unmap(1, 0, 0xfff),
        probe(NET),
    ] {
        for len in [1, 3, 4, whole.len() - 1] {
            assert_eq!(rig.ask(&whole[..len]), INVAL, "{len} of {whole:?}");
        }
    }
    // Nothing of these was carried out.
    assert_eq!(rig.ask(&detach(1, NET)), INVAL);
}

#[test]
fn a_request_in_many_pieces_is_a_request() {
    let mut rig = Rig::new();
    let bytes = attach(1, NET);
    let (at, table) = (rig.requests.buffer(0), rig.requests.buffer(1));
    rig.requests.put(at, &bytes);
    rig.requests.put(at + 100, &[0x55; 4]);
    // Eleven buffers in an indirect table: bytes 0, 1, … one by one, the rest, an empty one, and the tail in two.
    let mut pieces: Vec<(u64, u32, u16)> = (0..7).map(|n| (at + n, 1, NEXT)).collect();
    pieces.push((at + 7, 13, NEXT));
    pieces.push((u64::MAX, 0, NEXT));
    pieces.push((at + 100, 1, NEXT | WRITE));
    pieces.push((at + 101, 3, WRITE));
    for ((address, len, flags), n) in pieces.into_iter().zip(0u16..) {
        let entry = table + 16 * u64::from(n);
        rig.requests.put(entry, &address.to_le_bytes());
        rig.requests.put(entry + 8, &len.to_le_bytes());
        rig.requests.put(entry + 12, &flags.to_le_bytes());
        rig.requests.put(entry + 14, &(n + 1).to_le_bytes());
    }
    rig.requests.set_desc(0, table, 16 * 11, INDIRECT, 0);
    rig.requests.publish(0);
    rig.kick();
    assert_eq!(rig.used(0), Some((0, 4)));
    assert_eq!(rig.requests.get(at + 100, 4), [OK, 0, 0, 0]);
    rig.made = 2;
    assert_eq!(rig.ask(&detach(1, NET)), OK);
}

#[test]
fn mappings_are_limited_in_all_and_a_domain_that_ends_gives_its_own_back() {
    let config = IommuConfig {
        max_mappings: 3,
        ..IommuConfig::default()
    };
    let mut rig = Rig::with(config, ALL);
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&attach(2, OTHER)), OK);
    let page = |domain, n: u64| map(domain, n << 12, (n << 12) + 0xfff, 0, READ);
    assert_eq!(rig.ask(&page(1, 0)), OK);
    assert_eq!(rig.ask(&page(1, 1)), OK);
    assert_eq!(rig.ask(&page(2, 0)), OK);
    assert_eq!(rig.ask(&page(2, 1)), NOMEM);
    assert_eq!(rig.other.lookup(0x1000), None);
    assert_eq!(rig.ask(&unmap(1, 0, 0xfff)), OK);
    assert_eq!(rig.ask(&page(2, 1)), OK);
    assert_eq!(rig.ask(&page(2, 2)), NOMEM);
    assert_eq!(rig.ask(&detach(2, OTHER)), OK);
    assert_eq!(rig.device.stats().mappings, 1);
    assert_eq!(rig.ask(&page(1, 5)), OK);
}

#[test]
fn a_feature_that_was_not_accepted_is_not_there() {
    let mut rig = Rig::with(IommuConfig::default(), F_VERSION_1);
    assert_eq!(rig.ask(&attach_with(1, NET, 1, 0)), INVAL);
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.ask(&map(1, 0, 0xfff, 0, READ)), UNSUPP);
    assert_eq!(rig.ask(&unmap(1, 0, 0xfff)), UNSUPP);
    rig.driver.write(DEVICE + 36, &[1]);
    assert_eq!(rig.driver.u8(DEVICE + 36), 0);
}

#[test]
fn requests_are_counted_by_what_they_are() {
    let mut rig = Rig::new();
    rig.ask(&attach(1, NET));
    rig.ask(&map(1, 0, 0xfff, 0, READ));
    rig.ask(&map(1, 0x1000, 0x1fff, 0, READ));
    rig.ask(&map(1, 0x1000, 0x1fff, 0, READ));
    rig.ask(&unmap(1, 0, 0xfff));
    rig.ask(&detach(2, NET));
    rig.answer(&probe(NET), 68);
    rig.ask(&request(9, &[]));
    let stats = rig.device.stats();
    let kinds = (stats.attach, stats.detach, stats.map, stats.unmap);
    assert_eq!(kinds, (1, 1, 3, 1));
    assert_eq!((stats.probe, stats.unknown, stats.errors), (1, 1, 3));
    assert_eq!((stats.mappings, stats.malformed), (1, 0));
    assert_eq!((stats.map_time.count, stats.unmap_time.count), (3, 1));
}

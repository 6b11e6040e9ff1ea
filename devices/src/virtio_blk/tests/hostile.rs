//! Drivers that mean no good, disks that fail, and an IOMMU in between: an error for the request where there is a place for it, and no panic.

use super::*;
use crate::host::Access;

#[test]
fn what_cannot_be_done_is_an_error_of_that_request_alone() {
    let mut rig = Rig::new();
    let sectors = SIZE / SECTOR;
    for (sector, len) in [
        (sectors, 512),
        (sectors - 1, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (u64::MAX / SECTOR, 512),
        (0, 511),
        (0, 513),
        (0, MAX_DATA + 512),
    ] {
        assert_eq!(rig.read(sector, len).1, IOERR, "{sector} {len}");
        assert_eq!(rig.write(sector, &vec![0; len]), IOERR, "{sector} {len}");
    }
    for kind in [2, 3, 5, 11, 13, 1 << 31, u32::MAX] {
        assert_eq!(rig.ask(&[&header(kind, 0)], &[512, 1]).1, UNSUPP);
    }
    assert_eq!(rig.ask(&[&header(IN, 0)[..15]], &[512, 1]).1, IOERR);
    assert_eq!(rig.ask(&[], &[512, 1]).1, IOERR);
    assert_eq!(rig.ask(&[&header(GET_ID, 0)], &[19, 1]).1, IOERR);
    assert_eq!(rig.device.stats().errors, 26);
    assert_eq!(rig.read(3, 512), (patterns(1536, 512), OK));
    let whole = usize::try_from(SIZE).unwrap();
    assert_eq!(rig.on_disk(0, whole), patterns(0, whole));
}

#[test]
fn a_file_that_was_cut_off_is_an_error_and_gives_nothing() {
    let mut rig = Rig::new();
    rig.file.set_len(1024).unwrap();
    let (bytes, status) = rig.read(1, 1024);
    assert_eq!((bytes, status), (vec![0; 1024], IOERR));
    assert_eq!(rig.read(1, 512), (patterns(512, 512), OK));
    assert_eq!(fs::metadata(&rig.path).unwrap().len(), 1024);
}

#[test]
fn a_request_that_nobody_can_be_told_of_needs_a_reset() {
    type Make = fn(&mut Rig);
    let cases: &[(&str, Make)] = &[
        ("no place for the status", |rig| {
            rig.post(&[&header(FLUSH, 0)], &[]);
        }),
        ("a place of no length", |rig| {
            rig.post(&[&header(FLUSH, 0)], &[0]);
        }),
        ("a status that is nowhere", |rig| {
            let at = rig.room(16);
            rig.ring.put(at, &header(7, 0));
            rig.chain(&[(at, 16, false), (MEMORY_SIZE, 1, true)]);
        }),
        ("a status at the end of all addresses", |rig| {
            let at = rig.room(16);
            rig.ring.put(at, &header(IN, 0));
            rig.chain(&[(at, 16, false), (u64::MAX, 2, true)]);
        }),
        ("a table that is longer than the ring", |rig| {
            let (at, table) = (rig.room(16), rig.room(16 * 200));
            for index in 0..200u16 {
                let entry = table + 16 * u64::from(index);
                rig.ring.put(entry, &at.to_le_bytes());
                rig.ring.put(entry + 8, &16u32.to_le_bytes());
                rig.ring.put(entry + 12, &(NEXT | WRITE).to_le_bytes());
                rig.ring.put(entry + 14, &(index + 1).to_le_bytes());
            }
            rig.ring.set_desc(0, table, 16 * 200, INDIRECT, 0);
            rig.ring.publish(0);
        }),
        ("more than there can be", |rig| {
            rig.ring.set_avail_index(QUEUE_SIZE + 1);
        }),
    ];
    for (name, make) in cases {
        let mut rig = Rig::new();
        make(&mut rig);
        rig.kick();
        let start = Instant::now();
        while !rig.needs_reset() {
            assert!(start.elapsed() < Duration::from_secs(20), "{name}");
            rig.events.run_with_timeout(10).unwrap();
        }
        rig.driver.write(STATUS, &[0]);
        rig.turn();
        assert_eq!(rig.driver.u8(STATUS), 0, "{name}");
    }
}

#[test]
fn a_chain_that_bites_its_tail_ends_and_is_an_error() {
    let mut rig = Rig::new();
    let at = rig.room(16);
    rig.ring.set_desc(0, at, 16, NEXT | WRITE, 1);
    rig.ring.set_desc(1, at, 16, NEXT | WRITE, 0);
    rig.ring.publish(0);
    rig.kick();
    assert_eq!(rig.used(), (0, 1));
    assert_eq!(rig.ring.get(at + 15, 1), [IOERR]);
}

#[test]
fn data_that_is_nowhere_is_an_error_and_reaches_neither_memory_nor_disk() {
    let mut rig = Rig::new();
    for (kind, write) in [(IN, true), (OUT, false)] {
        let (sent, status) = (rig.room(16), rig.room(1));
        rig.ring.put(sent, &header(kind, 1));
        for at in [MEMORY_SIZE, MEMORY_SIZE - 256, u64::MAX - 100] {
            rig.ring.put(status, &[0x55]);
            rig.chain(&[(sent, 16, false), (at, 512, write), (status, 1, true)]);
            rig.kick();
            assert_eq!(rig.used().1, 1);
            assert_eq!(rig.ring.get(status, 1), [IOERR]);
        }
    }
    assert_eq!(rig.on_disk(512, 512), patterns(512, 512));
    assert!(!rig.needs_reset());
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[test]
fn random_requests_are_answered_or_need_a_reset_and_leave_the_size_of_the_file() {
    let mut state = 5;
    let mut rig = Rig::new();
    let (mut answered, mut resets) = (0, 0);
    for _ in 0..3000 {
        let mut pick = |n: u64| random(&mut state) % n;
        let kind = u32::try_from(pick(10)).unwrap();
        let sector = [pick(16), SIZE / SECTOR - pick(4), u64::MAX - pick(4)];
        let sector = sector[usize::try_from(pick(3)).unwrap()];
        let mut bytes = header(kind, sector);
        bytes.truncate(usize::try_from(pick(4) * 8).unwrap());
        bytes.resize(bytes.len() + usize::try_from(pick(3) * 512).unwrap(), 0x77);
        let at = rig.room(4096);
        rig.ring.put(at, &bytes);
        let count = pick(5);
        let mut buffers = vec![(at, u32::try_from(bytes.len()).unwrap(), false)];
        for _ in 0..count {
            let at = [
                DATA,
                MEMORY_SIZE - pick(1024),
                pick(1 << 20),
                u64::MAX - pick(600),
            ];
            let at = at[usize::try_from(pick(4)).unwrap()];
            // Not into the rings.
            let at = if at < RINGS + 0x10_0000 { DATA } else { at };
            let len = [0, 1, 512, 513, u32::MAX][usize::try_from(pick(5)).unwrap()];
            buffers.push((at, len, pick(3) > 0));
        }
        rig.chain(&buffers);
        rig.kick();
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < Duration::from_secs(20), "{buffers:?}");
            if rig.ring.get(rig.ring.used() + 2, 2) != rig.seen.to_le_bytes() {
                rig.used();
                answered += 1;
                break;
            }
            if rig.needs_reset() {
                resets += 1;
                rig.driver.write(STATUS, &[0]);
                rig.turn();
                for address in [rig.ring.avail(), rig.ring.used()] {
                    rig.ring.put(address, &[0; 4]);
                }
                let host = rig.driver.host.clone();
                (rig.ring, rig.seen, rig.next) = (Ring::new(&host, RINGS, QUEUE_SIZE), 0, 0);
                rig.start(F_VERSION_1 | F_FLUSH);
                break;
            }
            rig.events.run_with_timeout(1).unwrap();
        }
    }
    assert!(answered > 500 && resets > 500, "{answered} {resets}");
    assert_eq!(fs::metadata(&rig.path).unwrap().len(), SIZE);
}

fn behind() -> (Rig, Arc<Endpoint>) {
    let endpoint = Endpoint::new().unwrap();
    let identity = |gpa, len| Mapping {
        iova: gpa,
        gpa,
        len,
        permission: Permission::READ_WRITE,
    };
    endpoint.map(identity(RINGS, 0x10_0000));
    endpoint.map(identity(DATA, 0x10_0000));
    let features = F_VERSION_1 | F_FLUSH | F_ACCESS_PLATFORM;
    (Rig::with(false, Some(endpoint.clone()), features), endpoint)
}

#[test]
fn behind_an_iommu_data_goes_where_it_is_mapped_with_the_access_that_is_allowed() {
    let (mut rig, endpoint) = behind();
    assert!(!rig.device.accepts(F_VERSION_1));
    let page = |iova, gpa, permission| Mapping {
        iova,
        gpa,
        len: 0x1000,
        permission,
    };
    // One buffer over two pages that lie elsewhere.
    endpoint.map(page(0xa000_0000, 0x40_0000, Permission::WRITE));
    endpoint.map(page(0xa000_1000, 0x60_0000, Permission::WRITE));
    endpoint.map(page(0xb000_0000, 0x50_0000, Permission::READ));
    let (sent, status) = (rig.room(16), rig.room(1));
    let ask = |rig: &mut Rig, kind, at, len, write| {
        rig.ring.put(sent, &header(kind, 4));
        rig.chain(&[(sent, 16, false), (at, len, write), (status, 1, true)]);
        rig.kick();
        rig.used();
        rig.ring.get(status, 1)[0]
    };
    assert_eq!(ask(&mut rig, IN, 0xa000_0e00, 1024, true), OK);
    let found = [rig.ring.get(0x40_0e00, 512), rig.ring.get(0x60_0000, 512)];
    assert_eq!(found.concat(), patterns(4 * SECTOR, 1024));
    for (kind, at, access) in [
        (IN, 0xb000_0000, Access::Write),
        (OUT, 0xa000_0000, Access::Read),
        (IN, 0xc000_0000, Access::Write),
    ] {
        assert_eq!(ask(&mut rig, kind, at, 512, kind == IN), IOERR);
        let fault = std::iter::from_fn(|| endpoint.take_fault())
            .last()
            .unwrap()
            .0;
        assert_eq!((fault.iova, fault.access), (at, access));
    }
    assert_eq!(rig.ring.get(0x50_0000, 512), [0; 512]);
    assert_eq!(rig.on_disk(4 * SECTOR, 512), patterns(4 * SECTOR, 512));
    assert!(!rig.needs_reset());
}

#[test]
fn what_is_unmapped_while_the_disk_reads_is_not_written_any_more() {
    let (mut rig, endpoint) = behind();
    endpoint.map(Mapping {
        iova: 0xa000_0000,
        gpa: 0x40_0000,
        len: 0x1000,
        permission: Permission::READ_WRITE,
    });
    let (sent, status) = (rig.room(16), rig.room(1));
    rig.ring.put(sent, &header(IN, 4));
    let data = (0xa000_0000, 512, true);
    rig.chain(&[(sent, 16, false), data, (status, 1, true)]);
    // The disk gets the job in this turn, and its answer is taken in a later one.
    rig.kick();
    endpoint.unmap(0xa000_0000, 0x1000);
    rig.used();
    assert_eq!(rig.ring.get(status, 1), [IOERR]);
    assert_eq!(rig.ring.get(0x40_0000, 512), [0; 512]);
}

#[test]
fn a_ring_that_is_mapped_no_more_needs_a_reset() {
    let (mut rig, endpoint) = behind();
    endpoint.unmap(RINGS, 0x10_0000);
    rig.kick();
    assert!(rig.needs_reset());
    assert!(rig.is_idle());
}

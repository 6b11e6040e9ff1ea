//! The device behind an IOMMU of its own machine: the control queues lie at device addresses.

use super::*;
use crate::host::{Access, Permission};
use crate::virtio::F_ACCESS_PLATFORM;
use crate::virtio_iommu::{Fault, Mapping};

/// From an address in memory to the device's.
const SHIFT: u64 = 1 << 32;
const RX: u64 = 0x10_0000;
const TX: u64 = 0x20_0000;

fn stopped() -> (Rig, Arc<Endpoint>) {
    let dir = TempDir::new().unwrap();
    let endpoint = Endpoint::new().unwrap();
    let config = config(&dir, SocketRole::Listen);
    let mut rig = Rig::stopped(config, dir, Some(endpoint.clone()));
    (rig.rx.shift, rig.tx.shift) = (SHIFT, SHIFT);
    (rig, endpoint)
}

fn map(endpoint: &Endpoint, gpa: u64, len: u64, permission: Permission) {
    endpoint.map(Mapping {
        iova: gpa + SHIFT,
        gpa,
        len,
        permission,
    });
}

/// Everything that a driver of two rings maps: rings, and buffers a page at a time.
fn map_all(endpoint: &Endpoint) {
    for ring in [RX, TX] {
        for area in [0, 0x1000] {
            map(endpoint, ring + area, 0x1000, Permission::READ);
        }
        map(endpoint, ring + 0x2000, 0x1000, Permission::READ_WRITE);
    }
    for slot in 0..64 {
        let at = 0x1_0000 + 0x1000 * slot;
        map(endpoint, RX + at, 0x1000, Permission::WRITE);
        map(endpoint, TX + at, 0x1000, Permission::READ);
    }
}

fn start(rig: &Rig) {
    rig.driver.enable_msix();
    assert!(rig.driver.negotiate(F_VERSION_1 | F_ACCESS_PLATFORM));
    rig.go();
}

fn needs_reset(rig: &Rig) -> bool {
    rig.driver.u8(STATUS) & status::NEEDS_RESET != 0
}

#[test]
fn a_driver_that_would_use_guest_physical_addresses_is_not_accepted() {
    let (rig, _) = stopped();
    assert_eq!(rig.driver.offered(), F_VERSION_1 | F_ACCESS_PLATFORM);
    assert!(!rig.driver.negotiate(F_VERSION_1));
    assert!(rig.driver.negotiate(F_VERSION_1 | F_ACCESS_PLATFORM));
    let without = Rig::new(SocketRole::Listen);
    assert_eq!(without.driver.offered(), F_VERSION_1);
}

#[test]
fn rings_and_buffers_are_reached_through_the_iommu() {
    let (rig, endpoint) = stopped();
    map_all(&endpoint);
    start(&rig);
    let (mut rig, mut peer) = Rig::connect_to(rig);
    rig.request(&mut peer, &Message::bare(requests::GET_QUEUE_NUM));
    assert_eq!(rig.received().unwrap().0, requests::GET_QUEUE_NUM);
    rig.reply(requests::GET_QUEUE_NUM, &U64(7));
    assert_eq!(peer.receive().unwrap().unwrap().payload, U64(7).encode());
    assert!(!needs_reset(&rig));
    assert_eq!(endpoint.take_fault(), None);
}

#[test]
fn a_buffer_may_lie_in_pages_that_are_mapped_apart() {
    let (rig, endpoint) = stopped();
    map_all(&endpoint);
    start(&rig);
    let (mut rig, _peer) = Rig::connect_to(rig);
    // Two pages in a row for the device, in another order in memory.
    let iova = SHIFT + 0x80_0000;
    for (page, gpa) in [(0, 0x91_0000), (0x1000, 0x90_0000)] {
        endpoint.map(Mapping {
            iova: iova + page,
            gpa,
            len: 0x1000,
            permission: Permission::READ,
        });
    }
    let message = [7; 16];
    rig.tx.put(0x91_0ff8, &message[..8]);
    rig.tx.put(0x90_0000, &message[8..]);
    rig.tx.set_desc(0, iova + 0xff8, 16, 0, 0);
    rig.tx.publish(0);
    rig.driver.notify(1);
    rig.pump();
    assert_eq!(
        rig.device.stats().dropped,
        1,
        "it was read, and means nothing"
    );
    assert!(!needs_reset(&rig));
}

#[test]
fn a_ring_that_is_not_mapped_needs_a_reset_and_is_a_fault_at_its_address() {
    let areas = [
        (RX, Access::Read),
        (TX + 0x1000, Access::Read),
        (TX + 0x2000, Access::Write),
    ];
    for (missing, access) in areas {
        for forbidden in [false, true] {
            let (mut rig, endpoint) = stopped();
            map_all(&endpoint);
            let page = missing + SHIFT;
            let around = endpoint.lookup(page).unwrap();
            endpoint.unmap(around.iova, around.len);
            for at in (around.iova..around.iova + around.len).step_by(0x1000) {
                let permission = match access {
                    Access::Read => Permission::WRITE,
                    Access::Write => Permission::READ,
                };
                if at != page {
                    map(&endpoint, at - SHIFT, 0x1000, Permission::READ_WRITE);
                } else if forbidden {
                    map(&endpoint, at - SHIFT, 0x1000, permission);
                }
            }
            start(&rig);
            rig.backend_up();
            assert!(needs_reset(&rig));
            let fault = Fault {
                iova: page,
                access,
                mapped: forbidden,
            };
            assert_eq!(endpoint.take_fault(), Some((fault, 0)));
            rig.driver.write(STATUS, &[0]);
            rig.pump();
            assert_eq!(rig.driver.u8(STATUS), 0, "a reset mends it");
        }
    }
}

#[test]
fn what_is_unmapped_while_the_device_runs_is_not_touched_any_more() {
    type Break = (u64, u64, Access, fn(&mut Rig));
    let send: fn(&mut Rig) = |rig| {
        rig.tx.send(&[0; 16]);
        rig.driver.notify(1);
    };
    let breaks: [Break; 6] = [
        (TX, 0x1000, Access::Read, send),
        (RX, 0x1000, Access::Read, |_| ()),
        (TX + 0x1000, 0x1000, Access::Read, send),
        (TX + 0x2000, 0x1000, Access::Write, send),
        (TX + 0x1_0000, 0x1000, Access::Read, send),
        (RX + 0x1_0000, 0x1000, Access::Write, |_| ()),
    ];
    for (at, len, access, provoke) in breaks {
        let (rig, endpoint) = stopped();
        map_all(&endpoint);
        start(&rig);
        let (mut rig, mut peer) = Rig::connect_to(rig);
        endpoint.unmap(at + SHIFT, len);
        if access == Access::Write {
            rig.rx.put(at, &[0x55; 8]);
        }
        provoke(&mut rig);
        rig.request(&mut peer, &Message::bare(requests::SET_OWNER));
        assert!(needs_reset(&rig), "{at:x}");
        let (fault, _) = endpoint.take_fault().expect("a fault is reported");
        assert_eq!((fault.access, fault.mapped), (access, false), "{at:x}");
        assert!((at + SHIFT..at + SHIFT + len).contains(&fault.iova));
        if access == Access::Write {
            assert_eq!(rig.rx.get(at, 8), [0x55; 8], "nothing was written there");
        }
        rig.assert_gone(&mut peer);
    }
}

#[test]
fn a_ring_that_is_unmapped_in_part_does_not_look_empty() {
    let (mut rig, endpoint) = stopped();
    map_all(&endpoint);
    // The available ring goes on in the next page, with its entry 6.
    rig.tx = Ring::new(&rig.host, 0x30_0ff0, 64);
    rig.tx.shift = SHIFT;
    map(&endpoint, 0x30_0000, 0x2000, Permission::READ);
    map(&endpoint, 0x30_2000, 0x2000, Permission::READ_WRITE);
    map(&endpoint, 0x31_0000, 0x4_2000, Permission::READ);
    start(&rig);
    let (mut rig, mut peer) = Rig::connect_to(rig);
    for _ in 0..6 {
        rig.tx.send(&[0; 16]);
    }
    rig.driver.notify(1);
    rig.pump();
    assert_eq!(rig.device.stats().dropped, 6, "they mean nothing");
    endpoint.unmap(0x30_2000 + SHIFT, 0x2000);
    rig.tx.send(&[0; 16]);
    rig.driver.notify(1);
    rig.assert_gone(&mut peer);
    assert!(needs_reset(&rig));
    let (fault, _) = endpoint.take_fault().expect("a fault is reported");
    assert_eq!(
        (fault.iova, fault.access),
        (0x30_2000 + SHIFT, Access::Read)
    );
}

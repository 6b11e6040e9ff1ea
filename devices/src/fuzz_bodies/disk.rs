//! A disk.

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::fake::MEMORY_SIZE;
use crate::virtio::harness::STATUS;
use crate::virtio_blk::{BlkConfig, VirtioBlk};

const RING_SIZE: u16 = 128;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Length of the file.
const SIZE: u64 = 64 << 10;
/// How long the disk may take, in waits of a millisecond.
const WAITS: usize = 20_000;

/// A driver that asks whatever of a disk, with buffers that are anywhere. Each request is answered or the device needs a reset, which mends it; the file keeps its
/// length.
pub fn fuzz_disk(data: &[u8]) {
    let mut input = Input(data);
    let host = FakeHost::new();
    let file = TempFile::new().expect("a file");
    file.as_file().set_len(SIZE).expect("room");
    let config = BlkConfig {
        path: file.as_path().into(),
        readonly: false,
    };
    let disk = VirtioBlk::new(&config, None, host.clone()).expect("a disk");
    let mut events: Events = EventManager::new().expect("epoll");
    events.add_subscriber(disk.subscriber());
    events.add_subscriber(disk.file_subscriber());
    let function = VirtioPci::new(disk, host.clone()).expect("a device");
    let driver = Driver::new(function, host.clone());
    driver.enable_msix();
    let mut ring = Ring::new(&host, RINGS, RING_SIZE);
    let features = driver.offered();
    start(&driver, &ring, features);
    let (mut sent, mut slot) = (0u16, 0);
    while !input.over() {
        let head = slot;
        let buffers = 1 + u16::from(input.byte() % 6);
        for index in 0..buffers {
            let (kind, shape) = (input.byte(), input.byte());
            let own = ring.buffer(slot);
            let len = input.byte() % 64;
            ring.put(own, input.slice(len.into()));
            let at = match kind {
                0..0xc0 => own,
                0xc0..0xe0 => MEMORY_SIZE - (u64::from(kind & 0x1f) << 8),
                _ => u64::MAX - u64::from(kind & 0x1f),
            };
            let len = match shape >> 3 {
                n @ 0..8 => u32::from(n) << 9,
                8 => 1,
                9 => u32::MAX,
                10 => 1 << 20,
                n => u32::from(n),
            };
            let flags = if index + 1 < buffers { NEXT } else { 0 }
                | if shape & 1 != 0 { WRITE } else { 0 }
                | if shape & 6 == 6 { INDIRECT } else { 0 };
            let next = (slot + 1) % RING_SIZE;
            ring.set_desc(slot, at, len, flags, next);
            slot = next;
        }
        ring.publish(head);
        sent = sent.wrapping_add(1);
        driver.notify(0);
        let answered = |ring: &Ring| ring.get(ring.used() + 2, 2) == sent.to_le_bytes();
        let broken = || driver.u8(STATUS) & status::NEEDS_RESET != 0;
        let mut waits = 0;
        while !answered(&ring) && !broken() {
            assert!(waits < WAITS, "a request is never answered");
            events.run_with_timeout(1).expect("epoll works");
            waits += 1;
        }
        if broken() {
            driver.write(STATUS, &[0]);
            turn(&mut events);
            ring.put(ring.desc(), &[0; 0x3000]);
            ring = Ring::new(&host, RINGS, RING_SIZE);
            start(&driver, &ring, features);
            (sent, slot) = (0, 0);
        }
    }
    let len = file.as_file().metadata().expect("a file").len();
    assert_eq!(len, SIZE, "the disk has another size");
}

fn start(driver: &Driver, ring: &Ring, features: u64) {
    assert!(driver.negotiate(features));
    driver.setup_queue(0, ring, 1);
    driver.set_status(status::DRIVER_OK);
}

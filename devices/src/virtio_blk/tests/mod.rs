//! One machine for all tests of the device, and what an ordinary driver sees.

mod hostile;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use vmm_sys_util::tempdir::TempDir;

use super::{QUEUE_SIZE, *};
use crate::fake::{FakeHost, MEMORY_SIZE};
use crate::host::Permission;
use crate::virtio::harness::*;
use crate::virtio::{VirtioPci, status};
use crate::virtio_iommu::Mapping;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

// VIRTIO_BLK_T_*.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

// VIRTIO_BLK_S_*.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const SIZE: u64 = 4 << 20;
const RINGS: u64 = 0x10_0000;
/// Where headers, data and status bytes of the tests lie.
const DATA: u64 = 0x80_0000;

/// The byte at a place of a new file.
fn pattern(at: u64) -> u8 {
    (at / SECTOR * 7 + at % 251).to_le_bytes()[0]
}

/// What a new file has from a byte on.
fn patterns(at: u64, len: usize) -> Vec<u8> {
    (at..).take(len).map(pattern).collect()
}

fn disk_file(directory: &TempDir) -> std::path::PathBuf {
    let path = directory.as_path().join("a-disk-with-a-long-name.img");
    fs::write(&path, patterns(0, usize::try_from(SIZE).unwrap())).unwrap();
    path
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0xaa; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// A machine with the device, a driver, and the event loop, all on the test's thread.
struct Rig {
    device: Arc<VirtioBlk>,
    driver: Driver,
    ring: Ring,
    events: EventManager<Box<dyn MutEventSubscriber + Send>>,
    file: File,
    path: PathBuf,
    _directory: TempDir,
    /// The next descriptor, the next free byte, used elements seen.
    next: u16,
    free: u64,
    seen: u16,
}

impl Rig {
    fn new() -> Self {
        Self::with(false, None, F_VERSION_1 | F_FLUSH | F_INDIRECT_DESC)
    }

    fn with(readonly: bool, endpoint: Option<Arc<Endpoint>>, features: u64) -> Self {
        let directory = TempDir::new().unwrap();
        let path = disk_file(&directory);
        let config = BlkConfig {
            path: path.clone(),
            readonly,
        };
        let host = FakeHost::new();
        let device = VirtioBlk::new(&config, endpoint, host.clone()).unwrap();
        let function = VirtioPci::new(device.clone(), host.clone()).unwrap();
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.subscriber());
        events.add_subscriber(device.file_subscriber());
        let mut rig = Self {
            device,
            driver: Driver::new(function, host.clone()),
            ring: Ring::new(&host, RINGS, QUEUE_SIZE),
            events,
            file: File::options().read(true).write(true).open(&path).unwrap(),
            path,
            _directory: directory,
            next: 0,
            free: DATA,
            seen: 0,
        };
        rig.start(features);
        rig
    }

    fn start(&mut self, features: u64) {
        self.driver.enable_msix();
        assert!(self.driver.negotiate(features));
        self.driver.setup_queue(0, &self.ring, 1);
        self.driver.set_status(status::DRIVER_OK);
        self.turn();
    }

    fn turn(&mut self) {
        self.events.run_with_timeout(0).unwrap();
    }

    /// Turns until a used element is there.
    fn used(&mut self) -> (u16, u32) {
        let start = Instant::now();
        loop {
            let index = self.ring.get(self.ring.used() + 2, 2);
            if index != self.seen.to_le_bytes() {
                let at = self.ring.used() + 4 + 8 * u64::from(self.seen % QUEUE_SIZE);
                let element = self.ring.get(at, 8);
                self.seen = self.seen.wrapping_add(1);
                let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
                return (u16::try_from(word(0)).unwrap(), word(4));
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no answer");
            self.events.run_with_timeout(10).unwrap();
        }
    }

    fn is_idle(&mut self) -> bool {
        for _ in 0..20 {
            self.events.run_with_timeout(1).unwrap();
        }
        self.ring.get(self.ring.used() + 2, 2) == self.seen.to_le_bytes()
    }

    fn needs_reset(&mut self) -> bool {
        self.turn();
        self.driver.u8(STATUS) & status::NEEDS_RESET != 0
    }

    /// Room in memory.
    fn room(&mut self, len: usize) -> u64 {
        let at = self.free;
        self.free += len as u64;
        if self.free > MEMORY_SIZE {
            self.free = DATA + len as u64;
            return DATA;
        }
        at
    }

    /// Makes a chain of these buffers (address, length, whether the device writes) available.
    fn chain(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next % QUEUE_SIZE;
        for (index, &(at, len, write)) in buffers.iter().enumerate() {
            let slot = self.next % QUEUE_SIZE;
            self.next = self.next.wrapping_add(1);
            let more = if index + 1 < buffers.len() { NEXT } else { 0 };
            let flags = more | if write { WRITE } else { 0 };
            let next = self.next % QUEUE_SIZE;
            self.ring.set_desc(slot, at, len, flags, next);
        }
        self.ring.publish(head);
        head
    }

    /// Makes a request: bytes that the device reads, in pieces, and room for what it writes, in pieces. Returns its head and where those lie.
    fn post(&mut self, sent: &[&[u8]], room: &[usize]) -> (u16, Vec<(u64, usize)>) {
        let mut buffers = Vec::new();
        for bytes in sent {
            let at = self.room(bytes.len());
            self.ring.put(at, bytes);
            buffers.push((at, u32::try_from(bytes.len()).unwrap(), false));
        }
        let mut places = Vec::new();
        for &len in room {
            let at = self.room(len);
            self.ring.put(at, &vec![0x55; len]);
            buffers.push((at, u32::try_from(len).unwrap(), true));
            places.push((at, len));
        }
        (self.chain(&buffers), places)
    }

    fn kick(&mut self) {
        self.driver.notify(0);
        self.turn();
    }

    fn gather(&self, places: &[(u64, usize)]) -> Vec<u8> {
        let parts = places.iter().map(|&(at, len)| self.ring.get(at, len));
        parts.flatten().collect()
    }

    /// Makes a request and waits for its answer: what the device wrote before the status, and the status. All of it is used.
    fn ask(&mut self, sent: &[&[u8]], room: &[usize]) -> (Vec<u8>, u8) {
        let (head, places) = self.post(sent, room);
        self.kick();
        let (used, len) = self.used();
        assert_eq!(used, head);
        let mut bytes = self.gather(&places);
        let status = bytes.pop().unwrap();
        let written = if status == OK { bytes.len() + 1 } else { 1 };
        // A read that fails is answered with zeros, all of them.
        let all = u32::try_from(bytes.len() + 1).unwrap();
        assert!(len == u32::try_from(written).unwrap() || (status != OK && len == all));
        (bytes, status)
    }

    fn read(&mut self, sector: u64, len: usize) -> (Vec<u8>, u8) {
        self.ask(&[&header(IN, sector)], &[len, 1])
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.ask(&[&header(OUT, sector), data], &[1]).1
    }

    fn on_disk(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

#[test]
fn the_driver_finds_the_disk_with_its_capacity_and_its_limits() {
    let rig = Rig::new();
    assert_eq!(rig.driver.config(0) >> 16, 0x1040 + 2);
    assert_eq!(u64::from_le_bytes(rig.driver.read(DEVICE)), SIZE / SECTOR);
    assert_eq!(rig.driver.u32(DEVICE + 8), SIZE_MAX);
    assert_eq!(rig.driver.u32(DEVICE + 12), SEG_MAX);
    // What the limits allow is never too much, and has a place in the ring.
    assert_eq!(u64::from(SEG_MAX * SIZE_MAX), MAX_DATA as u64);
    assert!(SEG_MAX + 2 <= u32::from(QUEUE_SIZE));
    assert_eq!(rig.driver.offered() & F_RO, 0);
    let rig = Rig::with(true, None, F_VERSION_1 | F_RO);
    assert_ne!(rig.driver.offered() & F_RO, 0);
    assert_eq!(rig.driver.offered() & F_ACCESS_PLATFORM, 0);
}

#[test]
fn sectors_are_read_and_written_however_the_request_is_cut_into_buffers() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(3, 1024), (patterns(1536, 1024), OK));
    let last = SIZE / SECTOR - 1;
    assert_eq!(rig.read(last, 512), (patterns(SIZE - 512, 512), OK));
    let data: Vec<u8> = (0..1536u16).map(|n| n.to_le_bytes()[0] ^ 0xc3).collect();
    assert_eq!(rig.write(5, &data), OK);
    assert_eq!(rig.on_disk(5 * SECTOR, 1536), data);
    assert_eq!(rig.on_disk(4 * SECTOR, 512), patterns(4 * SECTOR, 512));
    assert_eq!(rig.on_disk(8 * SECTOR, 512), patterns(8 * SECTOR, 512));

    // The header in two buffers, the second of which has data, too; the status behind data in one buffer.
    let mut bytes = header(OUT, 9);
    bytes.extend(&data[..512]);
    let (first, second) = bytes.split_at(7);
    assert_eq!(rig.ask(&[first, second], &[1]), (vec![], OK));
    assert_eq!(rig.on_disk(9 * SECTOR, 512), data[..512]);
    let read = header(IN, 9);
    let (first, second) = read.split_at(13);
    let answer = rig.ask(&[first, &[], second], &[100, 0, 413]);
    assert_eq!(answer, (data[..512].to_vec(), OK));
    let stats = rig.device.stats();
    assert_eq!((stats.reads, stats.writes, stats.errors), (3, 2, 0));
    assert!(rig.driver.interrupts().contains(&1));
}

#[test]
fn many_requests_are_at_work_at_a_time_and_each_gets_its_own_answer() {
    let mut rig = Rig::new();
    let mut places = std::collections::BTreeMap::new();
    for sector in 0..42u64 {
        let (head, place) = rig.post(&[&header(IN, sector * 3)], &[512, 1]);
        places.insert(head, (sector * 3, place));
    }
    rig.kick();
    for _ in 0..42 {
        let (head, len) = rig.used();
        let (sector, place) = places.remove(&head).unwrap();
        let mut bytes = rig.gather(&place);
        assert_eq!((len, bytes.pop()), (513, Some(OK)));
        assert_eq!(bytes, patterns(sector * SECTOR, 512));
    }
    assert_eq!(rig.device.stats().reads, 42);
}

#[test]
fn more_data_than_may_be_at_work_waits_in_the_ring_and_is_done_all_the_same() {
    let mut rig = Rig::new();
    // The same room again and again: it is all one content.
    let at = rig.room(MAX_DATA);
    let read = rig.room(16);
    rig.ring.put(read, &header(IN, 0));
    let status = rig.room(1);
    let len = u32::try_from(MAX_DATA).unwrap();
    for _ in 0..40 {
        rig.chain(&[(read, 16, false), (at, len, true), (status, 1, true)]);
    }
    rig.kick();
    for _ in 0..40 {
        assert_eq!(rig.used().1, len + 1);
    }
    assert_eq!(rig.ring.get(at, MAX_DATA), patterns(0, MAX_DATA));
    const { assert!(MAX_BYTES < 40 * MAX_DATA) };
}

#[test]
fn an_indirect_table_is_a_request_like_any_other() {
    let mut rig = Rig::new();
    let (table, sent) = (rig.room(48), rig.room(16));
    let (data, status) = (rig.room(512), rig.room(1));
    rig.ring.put(sent, &header(IN, 2));
    let descriptors = [
        (sent, 16u32, NEXT, 1u16),
        (data, 512, NEXT | WRITE, 2),
        (status, 1, WRITE, 0),
    ];
    for (at, (address, len, flags, next)) in (table..).step_by(16).zip(descriptors) {
        rig.ring.put(at, &address.to_le_bytes());
        rig.ring.put(at + 8, &len.to_le_bytes());
        rig.ring.put(at + 12, &flags.to_le_bytes());
        rig.ring.put(at + 14, &next.to_le_bytes());
    }
    rig.ring.set_desc(0, table, 48, INDIRECT, 0);
    rig.ring.publish(0);
    rig.kick();
    assert_eq!(rig.used(), (0, 513));
    assert_eq!(rig.ring.get(data, 512), patterns(1024, 512));
}

#[test]
fn a_flush_is_answered_behind_the_writes_before_it_and_the_name_is_told() {
    let mut rig = Rig::new();
    rig.post(&[&header(OUT, 1), &[0x11; 512]], &[1]);
    let (flush, place) = rig.post(&[&header(FLUSH, 0)], &[1]);
    rig.kick();
    rig.used();
    assert_eq!(rig.used(), (flush, 1));
    assert_eq!(rig.gather(&place), [OK]);
    assert_eq!(rig.device.stats().flushes, 1);
    assert_eq!(rig.on_disk(512, 512), [0x11; 512]);
    let (id, status) = rig.ask(&[&header(GET_ID, 0)], &[20, 1]);
    assert_eq!((&id[..], status), (&b"a-disk-with-a-long-n"[..], OK));
}

#[test]
fn a_driver_without_flushes_gets_writes_that_are_on_the_medium() {
    let durably = |features| {
        let mut rig = Rig::with(false, None, features);
        rig.write(0, &[1; 512]);
        let worker = rig.device.worker.lock().unwrap();
        worker.limits.durably
    };
    assert!(durably(F_VERSION_1));
    assert!(!durably(F_VERSION_1 | F_FLUSH));
}

#[test]
fn a_disk_that_is_only_read_is_not_written() {
    let mut rig = Rig::with(true, None, F_VERSION_1 | F_RO | F_FLUSH);
    assert_eq!(rig.write(1, &[0xff; 512]), IOERR);
    assert_eq!(rig.on_disk(512, 512), patterns(512, 512));
    assert_eq!(rig.read(1, 512), (patterns(512, 512), OK));
    assert_eq!(rig.ask(&[&header(FLUSH, 0)], &[1]).1, OK);
}

#[test]
fn after_a_reset_nothing_of_before_reaches_memory_and_the_disk_goes_on() {
    let mut rig = Rig::new();
    let mut places = Vec::new();
    for _ in 0..20 {
        places.extend(rig.post(&[&header(IN, 0)], &[65536, 1]).1);
    }
    rig.driver.notify(0);
    rig.driver.write(STATUS, &[0]);
    rig.turn();
    let start = Instant::now();
    while rig.driver.u8(STATUS) != 0 {
        assert!(start.elapsed() < Duration::from_secs(20));
        rig.turn();
    }
    let before = rig.gather(&places);
    for address in [rig.ring.avail(), rig.ring.used()] {
        rig.ring.put(address, &[0; 4]);
    }
    let host = rig.driver.host.clone();
    (rig.ring, rig.seen, rig.next) = (Ring::new(&host, RINGS, QUEUE_SIZE), 0, 0);
    rig.free = DATA + 0x40_0000;
    rig.start(F_VERSION_1 | F_FLUSH);
    // The jobs of before are done first: behind this answer none is left.
    assert_eq!(rig.read(7, 512), (patterns(7 * SECTOR, 512), OK));
    assert_eq!(rig.gather(&places), before);
}

fn open(path: &Path, readonly: bool) -> Result<(), String> {
    disk::open(path, readonly)
        .map(drop)
        .map_err(|error| error.to_string())
}

#[test]
fn what_is_no_disk_is_refused_in_words() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("x");
    assert!(open(&path, true).unwrap_err().contains("No such file"));
    fs::write(&path, [0; 511]).unwrap();
    assert!(open(&path, true).unwrap_err().contains("511 bytes"));
    fs::write(&path, []).unwrap();
    assert!(open(&path, false).unwrap_err().contains("0 bytes"));
    let error = open(directory.as_path(), true).unwrap_err();
    assert!(
        error.contains("neither a file nor a block device"),
        "{error}"
    );
}

#[test]
fn one_vm_writes_a_disk_or_several_read_it() {
    let directory = TempDir::new().unwrap();
    let path = disk_file(&directory);
    let writer = disk::open(&path, false).unwrap();
    for readonly in [false, true] {
        assert!(open(&path, readonly).unwrap_err().contains("locked"));
    }
    drop(writer);
    let _reader = disk::open(&path, true).unwrap();
    assert!(open(&path, true).is_ok());
    assert!(open(&path, false).unwrap_err().contains("locked"));
}

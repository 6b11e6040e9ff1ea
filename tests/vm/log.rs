//! A front-end that no VMM stands behind, which compares the dirty log with what our back-end guest has changed in its memory: the log has every page whose bytes
//! are others than before, and none that the guest had no business with.
#![allow(unsafe_code)] // memory that a VM shares with the test

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use devices::vhost_user::{
    Connection, Log, MemoryRegion, MemoryTable, Message, Payload, U64,
    VHOST_USER_F_PROTOCOL_FEATURES, VringAddr, VringFd, VringState, protocol_features, requests,
};
use virtqueue::linear::Linear;
use virtqueue::net::features;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, DriverRing, Layout, RingConfig, Used};
use vm_memory::{FileOffset, MmapRegion};

use super::{machine, vm};
use crate::common::{Dir, PATIENCE, Running};

const F_LOG_ALL: u64 = 1 << 26;
const PAGE: u64 = 4096;
const PAGES: u64 = 256;
const RING: u16 = 32;
/// Questions that are answered, each by a frame.
const FRAMES: u16 = 16;
/// Where buffers are: a page each, the receive buffers first.
const RX_PAGE: u64 = 32;
const TX_PAGE: u64 = 128;
const USER: u64 = 0x7f12_3456_7000;

/// A sealed file of zeros.
fn sealed(len: u64) -> File {
    // SAFETY: the name is a constant; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(c"front-end".as_ptr(), libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0);
    // SAFETY: a new descriptor, which nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    // SAFETY: a call with integers only.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    assert_eq!(done, 0);
    file
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn fd(file: &File) -> OwnedFd {
    file.try_clone().unwrap().into()
}

/// The connection to our VM.
struct Peer(Connection);

impl Peer {
    fn connect(path: &str) -> Self {
        Self(Connection::new(UnixStream::connect(path).unwrap()).unwrap())
    }

    #[track_caller]
    fn answer(&mut self) -> Message {
        let start = Instant::now();
        loop {
            if let Some(message) = self.0.receive().unwrap() {
                return message;
            }
            assert!(start.elapsed() < PATIENCE, "no answer");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    fn ask(&mut self, message: &Message) -> Message {
        self.0.send(message).unwrap();
        let answer = self.answer();
        assert_eq!(answer.request, message.request);
        answer
    }

    #[track_caller]
    fn number(&mut self, request: u32) -> u64 {
        let U64(number) = U64::decode(&self.ask(&Message::bare(request)).payload).unwrap();
        number
    }

    /// A message that is acknowledged.
    #[track_caller]
    fn tell(&mut self, message: Message) {
        let answer = self.ask(&message.with_need_reply(true));
        assert_eq!(answer.payload, U64(0).encode(), "{}", answer.request);
    }
}

fn config(index: u64) -> RingConfig {
    RingConfig {
        size: RING,
        desc: 8 * index * PAGE,
        driver: (8 * index + 2) * PAGE,
        device: (8 * index + 4) * PAGE,
        event_idx: false,
        in_order: false,
        indirect: false,
    }
}

/// Who has 10.0.0.1? Tell 10.0.0.2.
fn question() -> Vec<u8> {
    let mac = [2, 0, 0, 0, 0, 2];
    let mut packet = vec![0; 12];
    packet.extend([0xff; 6]);
    packet.extend(mac);
    packet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    packet.extend(mac);
    packet.extend([10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
    packet
}

fn drain(ring: &mut impl DriverRing) -> usize {
    let mut used = [Used::default(); RING as usize];
    ring.take(&mut used).unwrap()
}

/// Has our guest answer questions. Returns which pages have changed, and which are in the log.
fn exchanged<L: Layout>(vm: &mut Running, socket: &str, negotiated: u64) -> [BTreeSet<u64>; 2] {
    let (memory, log) = (sealed(PAGES * PAGE), sealed(PAGES / 8));
    let noise: Vec<u8> = (0..PAGES * PAGE)
        .map(|at| (at * 7 + at / 251).to_le_bytes()[0])
        .collect();
    memory.write_all_at(&noise, 0).unwrap();
    let len = usize::try_from(PAGES * PAGE).unwrap();
    let mapped = MmapRegion::<()>::from_file(FileOffset::new(memory.try_clone().unwrap(), 0), len);
    let mapped = mapped.unwrap();
    // SAFETY: mapped until the end of this function, and reached by atomics alone.
    let linear = unsafe { Linear::new(mapped.as_ptr(), 0, PAGES * PAGE) };
    let mut rx = L::driver(linear, &config(0)).unwrap();
    let mut tx = L::driver(linear, &config(1)).unwrap();
    for n in 0..u64::from(RING) {
        // Some lie across two pages.
        let addr = (RX_PAGE + 2 * n) * PAGE + 300 * n;
        rx.add(&[Buffer {
            addr,
            len: 2048,
            device_writes: true,
        }])
        .unwrap();
    }
    let question = question();
    for n in 0..u64::from(FRAMES) {
        let addr = (TX_PAGE + n) * PAGE + 64;
        memory.write_all_at(&question, addr).unwrap();
        tx.add(&[Buffer {
            addr,
            len: u32::try_from(question.len()).unwrap(),
            device_writes: false,
        }])
        .unwrap();
    }
    rx.publish();
    tx.publish();
    let before = bytes(&memory);

    let mut peer = Peer::connect(socket);
    let offered = peer.number(requests::GET_FEATURES);
    let wanted = negotiated | features::VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES;
    assert_eq!(offered & wanted, wanted);
    let protocol = protocol_features::REPLY_ACK | protocol_features::LOG_SHMFD;
    assert_eq!(
        peer.number(requests::GET_PROTOCOL_FEATURES) & protocol,
        protocol
    );
    let message = Message::request(requests::SET_PROTOCOL_FEATURES, &U64(protocol));
    peer.0.send(&message).unwrap();
    let region = MemoryRegion {
        guest_address: 0,
        size: PAGES * PAGE,
        user_address: USER,
        mmap_offset: 0,
    };
    let table = MemoryTable(vec![region]);
    let log_of = Log {
        mmap_size: PAGES / 8,
        mmap_offset: 0,
    };
    peer.ask(&Message::request(requests::SET_LOG_BASE, &log_of).with_fds(vec![fd(&log)]));
    peer.tell(Message::request(requests::SET_MEM_TABLE, &table).with_fds(vec![fd(&memory)]));
    peer.tell(Message::request(requests::SET_FEATURES, &U64(wanted)));
    for index in 0..2u8 {
        let of = config(index.into());
        let state = |num| VringState {
            index: index.into(),
            num,
        };
        let address = VringAddr {
            index: index.into(),
            flags: 1,
            desc: USER + of.desc,
            used: USER + of.device,
            avail: USER + of.driver,
            log: of.device,
        };
        let polled = VringFd { index, no_fd: true };
        for message in [
            Message::request(requests::SET_VRING_NUM, &state(RING.into())),
            Message::request(requests::SET_VRING_BASE, &state(L::FRESH)),
            Message::request(requests::SET_VRING_ADDR, &address),
            Message::request(requests::SET_VRING_CALL, &polled),
            Message::request(requests::SET_VRING_KICK, &polled),
            Message::request(requests::SET_VRING_ENABLE, &state(1)),
        ] {
            peer.tell(message);
        }
    }
    let (mut answers, mut taken) = (0, 0);
    vm.wait_for("the answers", |_| {
        answers += drain(&mut rx);
        taken += drain(&mut tx);
        (answers, taken) == (FRAMES.into(), FRAMES.into())
    });
    for index in 0..2 {
        let state = VringState { index, num: 0 };
        peer.ask(&Message::request(requests::GET_VRING_BASE, &state));
    }
    let pages = |first: &[u8], second: &[u8]| {
        let both = first.chunks(4096).zip(second.chunks(4096));
        let changed = (0..).zip(both).filter(|(_, (a, b))| a != b);
        changed.map(|(page, _)| page).collect()
    };
    let changed = pages(&before, &bytes(&memory));
    let bits = bytes(&log);
    let is_set = |page: &u64| bits[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1;
    [changed, (0..PAGES).filter(is_set).collect()]
}

fn the_log_has_what_changed<L: Layout>(layout: u64) {
    let _machine = machine();
    let dir = Dir::new();
    let socket = dir.file("s");
    let device = format!("{socket},log=on");
    let mut vm = vm("--vhost-pci", &device, "work=respond addr=10.0.0.1/24");
    vm.wait_for("its socket", |_| Path::new(&socket).exists());
    let [changed, logged] = exchanged::<L>(&mut vm, &socket, layout | F_LOG_ALL);
    // The rings, and a buffer for each answer, some of which lie across two pages.
    assert!(changed.len() > usize::from(FRAMES), "{changed:?}");
    assert!(
        changed.is_subset(&logged),
        "changed: {changed:?}, logged: {logged:?}"
    );
    let buffers = RX_PAGE..RX_PAGE + 2 * u64::from(RING);
    let ours = |page: &u64| *page < 16 || buffers.contains(page);
    assert!(logged.iter().all(ours), "{logged:?}");
    assert!(
        logged.len() <= changed.len() + 8,
        "changed: {changed:?}, logged: {logged:?}"
    );
    // Without the feature nothing is logged, and as much changes.
    let [changed, logged] = exchanged::<L>(&mut vm, &socket, layout);
    assert!(changed.len() > usize::from(FRAMES), "{changed:?}");
    assert_eq!(logged, BTreeSet::new());
}

#[test]
fn the_dirty_log_has_every_page_that_our_back_end_changes_with_split_rings() {
    the_log_has_what_changed::<Split>(0);
}

#[test]
fn the_dirty_log_has_every_page_that_our_back_end_changes_with_packed_rings() {
    the_log_has_what_changed::<Packed>(features::RING_PACKED);
}

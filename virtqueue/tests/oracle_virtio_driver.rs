//! Our device side, both layouts, under the driver side of the `virtio-driver` crate (libblkio's).
//!
//! The crate lets nobody make a queue without a translator of addresses, and has none without a transport: a back-end that knows five messages of
//! vhost-user gets us one. The queue is then used as it is, over memory that both sides have mapped.

// The driver wants slices of shared memory; ours is mapped twice for that.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread;

use virtio_driver::virtqueue::Virtqueue;
use virtio_driver::{
    IovaTranslator, VhostUser, VirtioBlkConfig, VirtioFeatureFlags, VirtioTransport, iovec,
};
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, Chain, DeviceRing, Layout, RingConfig};

mod common;
use common::{Random, Shared, read_words, write_words};

/// What the driver keeps in shared memory for each request: its number, and something made of it.
type Request = [u64; 2];

const QUEUE_BYTES: usize = 4 << 20;
const DATA_BYTES: usize = 4 << 20;

/// Answers what a front-end asks before it sets up queues.
fn serve(listener: &UnixListener) {
    const PROTOCOL_FEATURES: u64 = 1 << 30;
    const REPLY_ACK_CONFIG_SLOTS: u64 = 1 << 3 | 1 << 9 | 1 << 15;
    let (mut stream, _) = listener.accept().unwrap();
    let mut header = [0; 12];
    while stream.read_exact(&mut header).is_ok() {
        let word = |n: usize| u32::from_le_bytes(header[4 * n..4 * n + 4].try_into().unwrap());
        let mut payload = vec![0; word(2).try_into().unwrap()];
        stream.read_exact(&mut payload).unwrap();
        let value = match word(0) {
            1 => PROTOCOL_FEATURES,
            15 => REPLY_ACK_CONFIG_SLOTS,
            36 => 8,
            // SET_FEATURES, SET_OWNER, SET_PROTOCOL_FEATURES.
            2 | 3 | 16 => continue,
            other => panic!("request {other}"),
        };
        let reply = [word(0), 1 | 4, 8].map(u32::to_le_bytes).concat();
        stream.write_all(&reply).unwrap();
        stream.write_all(&u64::to_le_bytes(value)).unwrap();
    }
}

/// A translator for which device addresses are addresses of the process.
fn translator(name: &str) -> Box<dyn IovaTranslator> {
    let name = format!("virtqueue-oracle-{}-{name}.sock", std::process::id());
    let path = std::env::temp_dir().join(name);
    let listener = UnixListener::bind(&path).unwrap();
    let peer = thread::spawn(move || serve(&listener));
    let transport = VhostUser::<VirtioBlkConfig, Request>::new(path.to_str().unwrap(), 0).unwrap();
    let translator = transport.iova_translator();
    drop(transport);
    peer.join().unwrap();
    std::fs::remove_file(path).unwrap();
    translator
}

struct Bench<D> {
    driver: Virtqueue<'static, Request>,
    device: D,
    shared: Shared,
    data: u64,
    random: Random,
    /// Buffers of what is outstanding, by request number.
    outstanding: HashMap<u64, (u16, Vec<Buffer>)>,
    /// Descriptors that the driver has left.
    free: usize,
    /// The shortest chain that the driver can make: in a packed ring it leaves VIRTQ_DESC_F_NEXT set in a chain of one descriptor.
    shortest: usize,
    next: u64,
}

fn bench<L: Layout>(
    name: &str,
    size: u16,
    event_idx: bool,
) -> Bench<L::Device<virtqueue::linear::Linear>> {
    let packed = std::any::type_name::<L>() == std::any::type_name::<Packed>();
    let shared = Shared::new(QUEUE_BYTES + DATA_BYTES);
    let mut features = VirtioFeatureFlags::VERSION_1;
    features.set(VirtioFeatureFlags::RING_PACKED, packed);
    features.set(VirtioFeatureFlags::RING_EVENT_IDX, event_idx);
    let at = shared.driver.as_ptr();
    // SAFETY: the driver's mapping, of which nobody else has this part; the device has its own.
    let memory = unsafe { std::slice::from_raw_parts_mut(at, QUEUE_BYTES) };
    let name = format!("{name}-{size}-{event_idx}");
    let driver = Virtqueue::new(translator(&name), memory, size, features).unwrap();
    let address = |pointer: *const u8| u64::try_from(pointer.addr()).unwrap();
    let config = RingConfig {
        size,
        desc: address(driver.desc_table_ptr()),
        driver: address(driver.driver_area_ptr()),
        device: address(driver.device_area_ptr()),
        event_idx,
        in_order: false,
        indirect: false,
    };
    Bench {
        driver,
        device: L::device(shared.of_device(), &config).unwrap(),
        shared,
        data: shared.addr() + u64::try_from(QUEUE_BYTES).unwrap(),
        random: Random(0x5eed_0000 + u64::from(size)),
        outstanding: HashMap::new(),
        free: size.into(),
        shortest: if packed { 2 } else { 1 },
        next: 0,
    }
}

fn request(number: u64) -> Request {
    [number, number.wrapping_mul(0x9e37_79b9_7f4a_7c15)]
}

fn written(buffers: &[Buffer]) -> u32 {
    let writable = buffers.iter().filter(|buffer| buffer.device_writes);
    writable.map(|buffer| buffer.len).sum()
}

impl<D: DeviceRing> Bench<D> {
    /// Adds a chain: the request itself, which the device reads, and up to four buffers more. False where there is no room.
    fn add(&mut self) -> bool {
        if self.free < self.shortest {
            return false;
        }
        let number = self.next;
        let least = u64::try_from(self.shortest).unwrap() - 1;
        let more = least + self.random.below(5 - least);
        let readable = self.random.below(more + 1);
        let mut buffers: Vec<Buffer> = (0..more)
            .map(|n| Buffer {
                addr: self.data + 64 * self.random.below(60_000),
                len: (8 + 8 * self.random.below(4)).try_into().unwrap(),
                device_writes: n >= readable,
            })
            .collect();
        // The driver does not clean up behind a chain that does not fit.
        buffers.truncate(self.free - 1);
        let mut own = 0;
        let id = self
            .driver
            .add_request(|place, add| {
                *place = request(number);
                own = std::ptr::from_mut(place).addr();
                let mut descriptor = |addr: usize, len: u32, device_writes| {
                    let iov_base = std::ptr::without_provenance_mut(addr);
                    let iov_len = len.try_into().unwrap();
                    add(iovec { iov_base, iov_len }, device_writes)
                };
                descriptor(own, 16, false)?;
                for b in &buffers {
                    descriptor(b.addr.try_into().unwrap(), b.len, b.device_writes)?;
                }
                Ok(())
            })
            .unwrap();
        let first = Buffer {
            addr: own.try_into().unwrap(),
            len: 16,
            device_writes: false,
        };
        buffers.insert(0, first);
        self.free -= buffers.len();
        let old = self.outstanding.insert(number, (id, buffers));
        assert!(old.is_none());
        self.next += 1;
        true
    }

    /// What the device gets, verified against what was added.
    fn get(&mut self, limit: usize) -> Vec<(u64, Chain)> {
        let mut chains = vec![Chain::default(); limit];
        let mut buffers = vec![Buffer::default(); 5 * limit];
        let count = self.device.get(&mut chains, &mut buffers).unwrap();
        let got = chains[..count].iter().map(|chain| {
            let first = usize::from(chain.first);
            let got = &buffers[first..first + usize::from(chain.count)];
            let seen: Request = read_words(&self.shared.of_device(), got[0].addr);
            assert_eq!(seen, request(seen[0]), "the request is whole");
            assert_eq!(got, self.outstanding[&seen[0]].1);
            (seen[0], *chain)
        });
        got.collect()
    }

    /// Uses a chain, with all that it lets the device write (the driver wants no less), and answers in the request's own place.
    fn put(&mut self, number: u64, chain: &Chain) {
        let buffers = &self.outstanding[&number].1;
        self.device.put(chain.id, written(buffers));
        let [n, mixed] = request(number);
        write_words(&self.shared.of_device(), buffers[0].addr, &[n, !mixed]);
    }

    /// What the driver completes, in its order.
    fn complete(&mut self) -> Vec<u64> {
        let mut done = Vec::new();
        for completion in self.driver.completions() {
            let [number, mixed] = completion.req;
            assert_eq!([number, !mixed], request(number), "the answer is whole");
            let (id, buffers) = self.outstanding.remove(&number).unwrap();
            assert_eq!(completion.id, id);
            self.free += buffers.len();
            done.push(number);
        }
        done
    }
}

/// Random bursts, used in random order, until the indices have wrapped.
fn chains_arrive_whole<L: Layout>(size: u16, event_idx: bool) {
    let mut bench = bench::<L>("chains", size, event_idx);
    let mut held: Vec<(u64, Chain)> = Vec::new();
    let mut completed = 0;
    let mut expected = 0;
    let rounds = if cfg!(debug_assertions) {
        3_000
    } else {
        30_000
    };
    for _ in 0..rounds {
        for _ in 0..bench.random.below(8) {
            bench.add();
        }
        let limit = 1 + bench.random.below(8);
        for (number, chain) in bench.get(limit.try_into().unwrap()) {
            assert_eq!(number, expected, "in the order in which they were added");
            expected += 1;
            held.push((number, chain));
        }
        let mut put = Vec::new();
        for _ in 0..bench.random.below(8).min(held.len().try_into().unwrap()) {
            let at = bench.random.below(held.len().try_into().unwrap());
            let (number, chain) = held.swap_remove(at.try_into().unwrap());
            bench.put(number, &chain);
            put.push(number);
        }
        if bench.random.below(16) > 0 {
            // Nothing may be seen before.
            assert!(bench.complete().is_empty(), "not published");
        }
        bench.device.publish();
        assert_eq!(
            bench.complete(),
            put,
            "in the order in which they were used"
        );
        completed += put.len();
    }
    assert!(completed > rounds / 4, "{completed}");
}

/// The driver asks for a notification exactly when our device asked it to, and our device when the driver did.
fn notifications_are_as_asked_for<L: Layout>(size: u16, event_idx: bool) {
    let mut bench = bench::<L>("notifications", size, event_idx);
    for round in 0..5_000u32 {
        let kicks = round.is_multiple_of(3);
        if kicks {
            assert!(!bench.device.enable_kicks(), "everything was taken");
        } else {
            bench.device.disable_kicks();
        }
        // The crate sets the event on every completion, but only where it wants calls.
        let calls = round.is_multiple_of(2);
        bench.driver.set_used_notif_enabled(calls);
        assert!(bench.add());
        assert_eq!(bench.driver.avail_notif_needed(), kicks, "round {round}");
        for (number, chain) in bench.get(1) {
            bench.put(number, &chain);
        }
        let called = bench.device.publish();
        // With event indices in a split ring the crate has no "never": it leaves the event where it is.
        let never = !event_idx || std::any::type_name::<L>() == std::any::type_name::<Packed>();
        assert!(called == calls || (called && !never), "round {round}");
        assert_eq!(bench.complete().len(), 1);
    }
}

#[test]
fn split_chains_of_another_driver_arrive_whole_and_come_back() {
    for size in [1, 2, 64, 256, 32768] {
        for event_idx in [false, true] {
            chains_arrive_whole::<Split>(size, event_idx);
        }
    }
}

#[test]
fn packed_chains_of_another_driver_arrive_whole_and_come_back() {
    for size in [2, 3, 7, 64, 255, 768, 32768] {
        for event_idx in [false, true] {
            chains_arrive_whole::<Packed>(size, event_idx);
        }
    }
}

#[test]
fn split_notifications_of_another_driver_are_as_asked_for() {
    for size in [1, 8, 256] {
        for event_idx in [false, true] {
            notifications_are_as_asked_for::<Split>(size, event_idx);
        }
    }
}

#[test]
fn packed_notifications_of_another_driver_are_as_asked_for() {
    for size in [2, 7, 768] {
        for event_idx in [false, true] {
            notifications_are_as_asked_for::<Packed>(size, event_idx);
        }
    }
}

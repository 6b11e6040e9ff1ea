//! Our device side of a split ring under the driver side of the `virtio-drivers` crate, direct and with indirect tables.
//!
//! Its buffers and tables are in ordinary memory and bounced through a shared one, as under an IOMMU that shows nothing else: what our device
//! reaches beyond what was shared is another buffer's or nobody's, and the contents tell.

// The crate's memory interface is unsafe to implement and its `add` and `pop_used` are unsafe to call.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ptr::NonNull;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};
use virtqueue::linear::Linear;
use virtqueue::split::{Device, Split};
use virtqueue::{Buffer, Chain, DeviceRing, Layout, RingConfig};
use zerocopy::{FromBytes, Immutable, IntoBytes};

mod common;
use common::{Random, Shared};

const PAGE: usize = 4096;
/// Pages of shared memory.
const PAGES: usize = 2048;

/// The shared memory of the test that this thread runs: pages that are free.
struct Arena {
    shared: Shared,
    free: Vec<u64>,
}

thread_local! {
    static ARENA: RefCell<Option<Arena>> = const { RefCell::new(None) };
}

fn arena<T>(act: impl FnOnce(&mut Arena) -> T) -> T {
    ARENA.with_borrow_mut(|arena| act(arena.as_mut().unwrap()))
}

impl Arena {
    /// The lowest run of pages, which is contiguous as long as nothing was freed.
    fn take(&mut self, pages: usize) -> u64 {
        let taken = self.free.split_off(self.free.len() - pages);
        let lowest = *taken.last().unwrap();
        assert!(
            taken
                .iter()
                .rev()
                .zip(0u64..)
                .all(|(at, n)| *at == lowest + 4096 * n)
        );
        lowest
    }
}

/// The place of a device address in the driver's mapping.
fn place(addr: PhysAddr, len: usize) -> NonNull<u8> {
    let linear = arena(|arena| arena.shared.of_driver());
    NonNull::new(linear.ptr(addr, len).unwrap()).unwrap()
}

struct Bounce;

// SAFETY: pages are given to one at a time, zeroed when the test begins, and stay mapped.
unsafe impl Hal for Bounce {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let addr = arena(|arena| {
            // From the other end, where no bounce page has been used: they must be zeroed and contiguous.
            let rest = arena.free.split_off(pages);
            let taken = std::mem::replace(&mut arena.free, rest);
            *taken.last().unwrap()
        });
        (addr, place(addr, pages * PAGE))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("no device registers here")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        let addr = arena(|arena| arena.take(buffer.len().div_ceil(PAGE)));
        let to = place(addr, buffer.len());
        // SAFETY: the caller promises that the buffer is valid; the page is ours.
        unsafe { to.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        addr
    }

    unsafe fn unshare(addr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let from = place(addr, buffer.len());
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: as in `share`.
            unsafe { buffer.cast().copy_from_nonoverlapping(from, buffer.len()) };
        }
        assert!(buffer.len() <= PAGE);
        // Whoever still reads it gets nonsense.
        // SAFETY: as in `share`.
        unsafe { from.write_bytes(0xdd, buffer.len()) };
        arena(|arena| arena.free.push(addr));
    }
}

/// Notes where a queue is.
#[derive(Default)]
struct Wires {
    areas: Option<[PhysAddr; 3]>,
}

impl Transport for Wires {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }
    fn read_device_features(&mut self) -> u64 {
        0
    }
    fn write_driver_features(&mut self, _: u64) {}
    fn max_queue_size(&mut self, _: u16) -> u32 {
        32768
    }
    fn notify(&mut self, _: u16) {}
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::empty()
    }
    fn set_status(&mut self, _: DeviceStatus) {}
    fn set_guest_page_size(&mut self, _: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(
        &mut self,
        _: u16,
        _: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.areas = Some([descriptors, driver_area, device_area]);
    }
    fn queue_unset(&mut self, _: u16) {}
    fn queue_used(&mut self, _: u16) -> bool {
        false
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, _: usize) -> virtio_drivers::Result<T> {
        Err(virtio_drivers::Error::Unsupported)
    }
    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> virtio_drivers::Result<()> {
        Err(virtio_drivers::Error::Unsupported)
    }
}

/// A chain as the driver has it.
struct Request {
    readable: Vec<Vec<u8>>,
    writable: Vec<Vec<u8>>,
}

struct Bench<const SIZE: usize> {
    driver: VirtQueue<Bounce, SIZE>,
    device: Device<Linear>,
    memory: Linear,
    random: Random,
    outstanding: HashMap<u16, Request>,
}

fn bench<const SIZE: usize>(indirect: bool, event_idx: bool) -> Bench<SIZE> {
    let shared = Shared::new(PAGES * PAGE);
    let pages = u64::try_from(PAGES).unwrap();
    let free = (0..pages).rev().map(|n| shared.addr() + 4096 * n).collect();
    ARENA.set(Some(Arena { shared, free }));
    let mut wires = Wires::default();
    let driver = VirtQueue::new(&mut wires, 0, indirect, event_idx).unwrap();
    let [desc, driver_area, device_area] = wires.areas.unwrap();
    let config = RingConfig {
        size: SIZE.try_into().unwrap(),
        desc,
        driver: driver_area,
        device: device_area,
        event_idx,
        in_order: false,
        indirect,
    };
    let memory = shared.of_device();
    Bench {
        driver,
        device: Split::device(memory, &config).unwrap(),
        memory,
        random: Random(0xd15c_0000 + u64::try_from(SIZE).unwrap()),
        outstanding: HashMap::new(),
    }
}

/// What the device sees of a buffer.
fn contents(memory: &Linear, buffer: &Buffer) -> Vec<u8> {
    let len = buffer.len.try_into().unwrap();
    let from = memory.ptr(buffer.addr, len).unwrap();
    // SAFETY: mapped, and the driver touches it when the chain is used, which the caller has not done yet.
    (0..len).map(|n| unsafe { from.add(n).read() }).collect()
}

fn fill(memory: &Linear, buffer: &Buffer, byte: u8, len: usize) {
    let to = memory.ptr(buffer.addr, len).unwrap();
    // SAFETY: as in `contents`.
    unsafe { to.write_bytes(byte, len) };
}

impl<const SIZE: usize> Bench<SIZE> {
    fn vectors(&mut self, count: u64) -> Vec<Vec<u8>> {
        (0..count)
            .map(|_| {
                let len = 1 + self.random.below(200);
                (0..len)
                    .map(|_| self.random.next().to_le_bytes()[0])
                    .collect()
            })
            .collect()
    }

    /// Adds a random chain; the token, or `None` where the ring is full.
    fn add(&mut self) -> Option<u16> {
        let most = self.driver.available_desc().min(5).try_into().unwrap();
        if most == 0 {
            return None;
        }
        let count = 1 + self.random.below(most);
        let readable = self.random.below(count + 1);
        let readable = self.vectors(readable);
        let writable = count - u64::try_from(readable.len()).unwrap();
        let mut writable = self.vectors(writable);
        let token = {
            let inputs: Vec<&[u8]> = readable.iter().map(Vec::as_slice).collect();
            let mut outputs: Vec<&mut [u8]> = writable.iter_mut().map(Vec::as_mut_slice).collect();
            // SAFETY: the vectors stay as they are until the chain is popped. Nobody but `Bounce` touches them.
            unsafe { self.driver.add(&inputs, &mut outputs) }.unwrap()
        };
        let old = self
            .outstanding
            .insert(token, Request { readable, writable });
        assert!(old.is_none());
        Some(token)
    }

    /// What the device gets, verified against what was added.
    fn get(&mut self, limit: usize) -> Vec<(Chain, Vec<Buffer>)> {
        let mut chains = vec![Chain::default(); limit];
        let mut buffers = vec![Buffer::default(); 5 * limit];
        let count = self.device.get(&mut chains, &mut buffers).unwrap();
        let mut got = Vec::new();
        for chain in &chains[..count] {
            let first = usize::from(chain.first);
            let buffers = &buffers[first..first + usize::from(chain.count)];
            let request = &self.outstanding[&chain.id];
            let (readable, writable) = buffers.split_at(request.readable.len());
            for (buffer, expected) in readable.iter().zip(&request.readable) {
                assert!(!buffer.device_writes);
                assert_eq!(&contents(&self.memory, buffer), expected);
            }
            let lengths = writable.iter().map(|b| usize::try_from(b.len).unwrap());
            assert!(lengths.eq(request.writable.iter().map(Vec::len)));
            assert!(writable.iter().all(|buffer| buffer.device_writes));
            got.push((*chain, buffers.to_vec()));
        }
        got
    }

    /// Writes the beginning of what the chain lets the device write, and uses it. What the driver should find.
    fn put(&mut self, chain: &Chain, buffers: &[Buffer]) -> (u32, u8) {
        let byte = self.random.next().to_le_bytes()[0];
        let writable = || buffers.iter().filter(|buffer| buffer.device_writes);
        let room: u32 = writable().map(|buffer| buffer.len).sum();
        let len = u32::try_from(self.random.below(u64::from(room) + 1)).unwrap();
        let mut left = len;
        for buffer in writable() {
            let part = left.min(buffer.len);
            fill(&self.memory, buffer, byte, part.try_into().unwrap());
            left -= part;
        }
        self.device.put(chain.id, len);
        (len, byte)
    }

    /// Pops the next used chain, if there is one, and verifies what was written.
    fn pop(&mut self, expected: &HashMap<u16, (u32, u8)>) -> Option<u16> {
        let token = self.driver.peek_used()?;
        let mut request = self.outstanding.remove(&token).unwrap();
        let before = request.writable.concat();
        let inputs: Vec<&[u8]> = request.readable.iter().map(Vec::as_slice).collect();
        let mut outputs: Vec<&mut [u8]> =
            request.writable.iter_mut().map(Vec::as_mut_slice).collect();
        // SAFETY: the buffers with which the chain was added.
        let len = unsafe { self.driver.pop_used(token, &inputs, &mut outputs) }.unwrap();
        let (written, byte) = expected[&token];
        assert_eq!(len, written);
        let written = usize::try_from(written).unwrap();
        let after = request.writable.concat();
        assert!(after[..written].iter().all(|b| *b == byte));
        assert_eq!(
            after[written..],
            before[written..],
            "nothing else was written"
        );
        Some(token)
    }
}

/// Random bursts, used in random order, beyond the wrap of the indices.
fn chains_arrive_whole<const SIZE: usize>(indirect: bool, event_idx: bool) {
    let mut bench = bench::<SIZE>(indirect, event_idx);
    let mut held = Vec::new();
    let mut expected = HashMap::new();
    let mut added = 0u32;
    let total = if cfg!(debug_assertions) {
        3_000
    } else {
        70_000
    };
    while added < total {
        let mut tokens = Vec::new();
        for _ in 0..bench.random.below(8) {
            tokens.extend(bench.add());
        }
        added += u32::try_from(tokens.len()).unwrap();
        let got = bench.get(8);
        // All at once: the bursts are no longer than what `get` was asked for.
        assert!(got.iter().map(|(chain, _)| chain.id).eq(tokens));
        held.extend(got);
        let mut put = Vec::new();
        for _ in 0..bench.random.below(10).min(held.len().try_into().unwrap()) {
            let at = bench.random.below(held.len().try_into().unwrap());
            let (chain, buffers) = held.swap_remove(at.try_into().unwrap());
            expected.insert(chain.id, bench.put(&chain, &buffers));
            put.push(chain.id);
        }
        assert!(!bench.driver.can_pop(), "not published");
        bench.device.publish();
        for id in put {
            assert_eq!(bench.pop(&expected), Some(id));
        }
        assert_eq!(bench.pop(&expected), None);
    }
}

/// One chain back and forth, `rounds` times: what our device asks for is what the driver does, and the other way round.
fn notifications_are_as_asked_for<const SIZE: usize>(event_idx: bool, rounds: u32) {
    let mut bench = bench::<SIZE>(false, event_idx);
    for round in 0..rounds {
        let kicks = round.is_multiple_of(3);
        if kicks {
            assert!(!bench.device.enable_kicks(), "everything was taken");
        } else {
            bench.device.disable_kicks();
        }
        let calls = event_idx || round.is_multiple_of(2);
        bench.driver.set_dev_notify(calls);
        bench.add().unwrap();
        let kicked = bench.driver.should_notify();
        // With event indices it has no "not": it kicks for every event that lies behind.
        assert!(kicked == kicks || (kicked && event_idx), "round {round}");
        let mut expected = HashMap::new();
        for (chain, buffers) in bench.get(1) {
            expected.insert(chain.id, bench.put(&chain, &buffers));
        }
        assert_eq!(bench.device.publish(), calls, "round {round}");
        bench.pop(&expected).unwrap();
    }
}

#[test]
fn direct_chains_of_another_driver_arrive_whole_and_come_back() {
    for event_idx in [false, true] {
        chains_arrive_whole::<1>(false, event_idx);
        chains_arrive_whole::<8>(false, event_idx);
        chains_arrive_whole::<256>(false, event_idx);
    }
}

#[test]
fn indirect_chains_of_another_driver_arrive_whole_and_come_back() {
    for event_idx in [false, true] {
        chains_arrive_whole::<8>(true, event_idx);
        chains_arrive_whole::<128>(true, event_idx);
    }
}

#[test]
fn notifications_of_another_driver_are_as_asked_for() {
    // Beyond the wrap of the indices, and one chain at a time: the driver's comparison with the event is not modular, and where a batch crosses
    // the wrap it would stay silent.
    notifications_are_as_asked_for::<8>(false, 70_000);
    notifications_are_as_asked_for::<8>(true, 70_000);
}

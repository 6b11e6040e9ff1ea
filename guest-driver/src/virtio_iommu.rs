//! The virtio-iommu driver (VIRTIO 1.3, section 5.13).
//!
//! It polls: a request is short, and its completion is what a caller waits for. Its own rings and buffers are never translated.

use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::arch::x86_64::_rdtsc;
use core::cell::RefCell;
use core::fmt;

use virtqueue::linear::Linear;
use virtqueue::net::features::VERSION_1;
use virtqueue::split::{self, Split};
use virtqueue::{Buffer, DriverRing, Used};

use crate::Platform;
use crate::pci::Function;
use crate::port::{Frame, Slot as Room};
use crate::virtio_pci::{self, Doorbell, Notify, Transport};

/// Device type of virtio-iommu.
pub const DEVICE_TYPE: u16 = 23;

const F_INPUT_RANGE: u64 = 1 << 0;
const F_DOMAIN_RANGE: u64 = 1 << 1;
const F_MAP_UNMAP: u64 = 1 << 2;
const F_PROBE: u64 = 1 << 4;

const REQUESTS: u16 = 0;
const EVENTS: u16 = 1;
/// Most descriptors of the request queue that are used: two a request.
const REQUEST_QUEUE_SIZE: u16 = 1024;
const EVENT_QUEUE_SIZE: u16 = 64;

/// Where the device-writable part of a request begins in its buffer; the longest readable part (PROBE) has 72 bytes.
const ANSWER: usize = 128;
/// The longest readable part.
const MAX_REQUEST: usize = 72;
/// Status and three reserved bytes.
const TAIL: usize = 4;
/// Longest list of properties that there is room for.
const MAX_PROBE: usize = 4096;
/// A fault report, and from one to the next.
const EVENT: usize = 24;
const EVENT_32: u32 = 24;
const _: () = assert!(EVENT_32 as usize == EVENT);
const EVENT_STRIDE: usize = 64;

/// What a device may do with a mapping (VIRTIO_IOMMU_MAP_F_*).
pub mod access {
    /// It may read.
    pub const READ: u32 = 1;
    /// It may write.
    pub const WRITE: u32 = 2;
}

/// How a request ended (VIRTIO_IOMMU_S_*).
pub mod status {
    #![allow(missing_docs)] // their names are those of the specification
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
    pub const DEVERR: u8 = 3;
    pub const INVAL: u8 = 4;
    pub const RANGE: u8 = 5;
    pub const NOENT: u8 = 6;
    pub const FAULT: u8 = 7;
    pub const NOMEM: u8 = 8;
}

/// Why a request has no answer, or not the one that was needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The device broke a ring rule.
    Ring(virtqueue::Error),
    /// The device did not answer in time.
    Timeout,
    /// All buffers are with the device.
    Full,
    /// The device refused it, with this status.
    Refused(u8),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => write!(f, "virtio-iommu: ring: {error}"),
            Self::Timeout => f.write_str("virtio-iommu: no answer in time"),
            Self::Full => f.write_str("virtio-iommu: too many requests at once"),
            Self::Refused(status) => write!(f, "virtio-iommu: refused with status {status}"),
        }
    }
}

impl core::error::Error for Error {}

impl From<virtqueue::Error> for Error {
    fn from(error: virtqueue::Error) -> Self {
        Self::Ring(error)
    }
}

impl Error {
    /// The number by which records report it: the status, or [`NO_STATUS`].
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::Refused(status) => u16::from(status),
            _ => NO_STATUS,
        }
    }
}

/// Stands for a status where the device gave none.
pub const NO_STATUS: u16 = 256;

/// The number by which records report how a request ended.
#[must_use]
pub fn status_of(result: Result<u8, Error>) -> u16 {
    result.map_or_else(Error::status, u16::from)
}

/// What a driver can ask for (section 5.13.6). Lengths are in bytes and not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Puts an endpoint into a domain.
    Attach {
        /// The domain, which need not exist.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
    },
    /// Takes an endpoint out of a domain.
    Detach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
    },
    /// Makes memory reachable for the endpoints of a domain.
    Map {
        /// The domain.
        domain: u32,
        /// First device address.
        iova: u64,
        /// First guest physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// Of [`access`].
        flags: u32,
    },
    /// Takes away all mappings in a range.
    Unmap {
        /// The domain.
        domain: u32,
        /// First device address.
        iova: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Asks for the properties of an endpoint.
    Probe {
        /// The endpoint.
        endpoint: u32,
    },
}

impl Request {
    /// Writes the device-readable part; returns its length.
    fn encode(&self, bytes: &mut [u8; MAX_REQUEST]) -> usize {
        let mut at = 0;
        let mut put = |field: &[u8]| {
            if let Some(to) = bytes.get_mut(at..at + field.len()) {
                to.copy_from_slice(field);
            }
            at += field.len();
        };
        let last = |first: u64, len: u64| first.wrapping_add(len).wrapping_sub(1);
        let head = |kind: u8| [kind, 0, 0, 0];
        match *self {
            Self::Attach { domain, endpoint } => {
                put(&head(1));
                put(&domain.to_le_bytes());
                put(&endpoint.to_le_bytes());
                put(&[0; 8]);
            }
            Self::Detach { domain, endpoint } => {
                put(&head(2));
                put(&domain.to_le_bytes());
                put(&endpoint.to_le_bytes());
                put(&[0; 8]);
            }
            Self::Map {
                domain,
                iova,
                gpa,
                len,
                flags,
            } => {
                put(&head(3));
                put(&domain.to_le_bytes());
                put(&iova.to_le_bytes());
                put(&last(iova, len).to_le_bytes());
                put(&gpa.to_le_bytes());
                put(&flags.to_le_bytes());
            }
            Self::Unmap { domain, iova, len } => {
                put(&head(4));
                put(&domain.to_le_bytes());
                put(&iova.to_le_bytes());
                put(&last(iova, len).to_le_bytes());
                put(&[0; 4]);
            }
            Self::Probe { endpoint } => {
                put(&head(5));
                put(&endpoint.to_le_bytes());
                put(&[0; 64]);
            }
        }
        at
    }
}

/// A request that was submitted; to be given to [`Iommu::poll`] or [`Iommu::wait`].
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket(u16);

impl Ticket {
    /// A ticket with a number, for whoever implements [`Iommu`].
    #[must_use]
    pub fn new(number: u16) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.0
    }
}

/// What is known of a request buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// With the device; nobody waits where it is `abandoned`.
    Pending {
        abandoned: bool,
    },
    Done(u8),
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    state: State,
    /// Bytes of the device-writable part, status included.
    answer: usize,
}

/// The request queue with its buffers.
#[derive(Debug)]
struct Requests<D, N> {
    ring: D,
    doorbell: N,
    memory: Linear,
    pool: u64,
    probe_size: usize,
    /// How long to wait for an answer, in ticks of the time-stamp counter.
    patience: u64,
    cells: Vec<Cell>,
    free: Vec<u16>,
    /// Which buffer a descriptor id stands for.
    buffer_of: Vec<u16>,
    batch: Vec<Ticket>,
}

impl<D: DriverRing, N: Notify> Requests<D, N> {
    /// Bytes that the buffers for a ring of `size` descriptors need.
    fn pool_len(size: u16, probe_size: usize) -> usize {
        usize::from(size / 2) * Self::stride(probe_size)
    }

    fn stride(probe_size: usize) -> usize {
        (ANSWER + probe_size + TAIL).next_multiple_of(64)
    }

    /// Requests over an empty ring, with buffers at device address `pool`.
    fn new(
        (mut ring, doorbell): (D, N),
        memory: Linear,
        pool: u64,
        probe_size: usize,
        patience: u64,
    ) -> Self {
        ring.disable_calls();
        let descriptors = ring.free();
        let count = descriptors / 2;
        let cell = Cell {
            state: State::Free,
            answer: 0,
        };
        Self {
            ring,
            doorbell,
            memory,
            pool,
            probe_size,
            patience,
            cells: vec![cell; usize::from(count)],
            free: (0..count).rev().collect(),
            buffer_of: vec![0; usize::from(descriptors)],
            batch: Vec::with_capacity(usize::from(count)),
        }
    }

    fn addr(&self, buffer: u16) -> u64 {
        self.pool + (usize::from(buffer) * Self::stride(self.probe_size)) as u64
    }

    /// Carries out a PROBE.
    fn probe(&mut self, endpoint: u32, to: &mut [u8]) -> Result<u8, Error> {
        if self.probe_size == 0 {
            return Ok(status::UNSUPP);
        }
        let ticket = self.submit(&Request::Probe { endpoint })?;
        let from = self.addr(ticket.0) + ANSWER as u64;
        self.flush();
        let status = self.wait(ticket)?;
        // The buffer is free, but nobody fills it before this returns.
        let len = to.len().min(self.probe_size);
        if let Some(to) = to.get_mut(..len) {
            read(self.memory, from, to);
        }
        Ok(status)
    }

    /// Waits for the whole batch; the first status that is not OK goes to `worst`, where that is OK.
    fn settle(&mut self, worst: &mut u8) -> Result<(), Error> {
        self.flush();
        let mut result = Ok(());
        let mut batch = core::mem::take(&mut self.batch);
        for ticket in batch.drain(..) {
            match self.wait(ticket) {
                Ok(status) if *worst == status::OK => *worst = status,
                Ok(_) => {}
                Err(error) => result = Err(error),
            }
        }
        self.batch = batch;
        result
    }

    /// Takes the answers that are there.
    fn collect(&mut self) -> Result<(), Error> {
        loop {
            let mut used = [Used::default(); 16];
            let n = self.ring.take(&mut used)?;
            for used in used.iter().take(n) {
                let id = usize::from(used.id);
                let buffer = self.buffer_of.get(id).copied().unwrap_or(u16::MAX);
                let addr = self.addr(buffer);
                let Some(cell) = self.cells.get_mut(usize::from(buffer)) else {
                    continue;
                };
                let tail = cell.answer - TAIL;
                // An answer that is too short has no status.
                let mut status = [status::IOERR];
                if used.len as usize >= cell.answer {
                    read(self.memory, addr + (ANSWER + tail) as u64, &mut status);
                }
                if cell.state == (State::Pending { abandoned: true }) {
                    cell.state = State::Free;
                    self.free.push(buffer);
                } else {
                    cell.state = State::Done(status[0]);
                }
            }
            if n < used.len() {
                return Ok(());
            }
        }
    }

    fn submit(&mut self, request: &Request) -> Result<Ticket, Error> {
        let buffer = match self.free.last() {
            Some(&buffer) => buffer,
            None => {
                self.collect()?;
                *self.free.last().ok_or(Error::Full)?
            }
        };
        let mut bytes = [0; MAX_REQUEST];
        let len = request.encode(&mut bytes);
        let answer = match request {
            Request::Probe { .. } => self.probe_size + TAIL,
            _ => TAIL,
        };
        let addr = self.addr(buffer);
        let pieces = [
            Buffer {
                addr,
                len: u32::try_from(len).unwrap_or(0),
                device_writes: false,
            },
            Buffer {
                addr: addr + ANSWER as u64,
                len: u32::try_from(answer).unwrap_or(0),
                device_writes: true,
            },
        ];
        write(self.memory, addr, &bytes);
        let id = self.ring.add(&pieces).ok_or(Error::Full)?;
        self.free.pop();
        if let Some(slot) = self.buffer_of.get_mut(usize::from(id)) {
            *slot = buffer;
        }
        if let Some(cell) = self.cells.get_mut(usize::from(buffer)) {
            *cell = Cell {
                state: State::Pending { abandoned: false },
                answer,
            };
        }
        Ok(Ticket(buffer))
    }

    fn flush(&mut self) {
        if self.ring.publish() {
            self.doorbell.notify();
        }
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<u8>, Error> {
        self.collect()?;
        let cell = self.cells.get_mut(usize::from(ticket.0));
        Ok(cell.and_then(|cell| {
            let State::Done(status) = cell.state else {
                return None;
            };
            cell.state = State::Free;
            self.free.push(ticket.0);
            Some(status)
        }))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<u8, Error> {
        let start = ticks();
        loop {
            if let Some(status) = self.poll(&ticket)? {
                return Ok(status);
            }
            if ticks().wrapping_sub(start) > self.patience {
                if let Some(cell) = self.cells.get_mut(usize::from(ticket.0)) {
                    cell.state = State::Pending { abandoned: true };
                }
                return Err(Error::Timeout);
            }
            core::hint::spin_loop();
        }
    }

    fn batch(&mut self, requests: &mut dyn Iterator<Item = Request>) -> Result<u8, Error> {
        let mut worst = status::OK;
        for request in requests {
            let mut ticket = self.submit(&request);
            if ticket == Err(Error::Full) {
                self.settle(&mut worst)?;
                ticket = self.submit(&request);
            }
            self.batch.push(ticket?);
        }
        self.settle(&mut worst)?;
        Ok(worst)
    }
}

/// A fault report (section 5.13.6.9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// VIRTIO_IOMMU_FAULT_R_*.
    pub reason: u8,
    /// VIRTIO_IOMMU_FAULT_F_*.
    pub flags: u32,
    /// Which endpoint.
    pub endpoint: u32,
    /// The device address, where the flags say that it is there.
    pub address: u64,
}

/// The event queue with its buffers.
#[derive(Debug)]
struct Events<D, N> {
    ring: D,
    doorbell: N,
    memory: Linear,
    pool: u64,
    /// Which buffer a descriptor id stands for.
    buffer_of: Vec<u16>,
}

impl<D: DriverRing, N: Notify> Events<D, N> {
    /// Events over an empty ring, with buffers at device address `pool`: all of them go to the device.
    fn new((mut ring, doorbell): (D, N), memory: Linear, pool: u64) -> Self {
        ring.disable_calls();
        let count = ring.free();
        let mut events = Self {
            ring,
            doorbell,
            memory,
            pool,
            buffer_of: vec![0; usize::from(count)],
        };
        for buffer in 0..count {
            events.add(buffer);
        }
        events.publish();
        events
    }

    fn addr(&self, buffer: u16) -> u64 {
        self.pool + (usize::from(buffer) * EVENT_STRIDE) as u64
    }

    fn add(&mut self, buffer: u16) {
        let piece = Buffer {
            addr: self.addr(buffer),
            len: EVENT_32,
            device_writes: true,
        };
        let id = self.ring.add(&[piece]);
        if let Some(slot) = id.and_then(|id| self.buffer_of.get_mut(usize::from(id))) {
            *slot = buffer;
        }
    }

    fn publish(&mut self) {
        if self.ring.publish() {
            self.doorbell.notify();
        }
    }

    /// Shows the reports that are there and gives their buffers back; at most a ringful.
    fn drain(&mut self, mut show: impl FnMut(Fault)) -> Result<usize, Error> {
        let mut count = 0;
        while count < self.buffer_of.len() {
            let mut used = [Used::default()];
            if self.ring.take(&mut used)? == 0 {
                break;
            }
            let buffer = self.buffer_of.get(usize::from(used[0].id)).copied();
            let buffer = buffer.unwrap_or(0);
            let mut bytes = [0; EVENT];
            if used[0].len as usize >= EVENT && read(self.memory, self.addr(buffer), &mut bytes) {
                let frame = Frame::of(&bytes);
                show(Fault {
                    reason: bytes[0],
                    flags: frame.u32(4).unwrap_or(0),
                    endpoint: frame.u32(8).unwrap_or(0),
                    address: frame.u64(16).unwrap_or(0),
                });
                count += 1;
            }
            self.add(buffer);
        }
        self.publish();
        Ok(count)
    }
}

/// What the device says of itself (section 5.13.4).
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Bit n: pages of 2^n bytes can be mapped.
    pub page_size_mask: u64,
    /// First and last device address that can be mapped.
    pub input_range: (u64, u64),
    /// First and last domain.
    pub domain_range: (u32, u32),
    /// Bytes of the list of properties that PROBE gives; 0 without PROBE.
    pub probe_size: usize,
}

impl Config {
    /// Bytes of the smallest page.
    #[must_use]
    pub fn granule(&self) -> u64 {
        1u64.checked_shl(self.page_size_mask.trailing_zeros())
            .unwrap_or(4096)
    }
}

/// Something that carries out virtio-iommu requests.
pub trait Iommu: fmt::Debug {
    /// Hands over a request, which the device need not see before [`Iommu::flush`]. [`Error::Full`] where there is no buffer for it.
    fn submit(&mut self, request: &Request) -> Result<Ticket, Error>;
    /// Tells the device of all that was submitted, with one notification.
    fn flush(&mut self);
    /// The status of a request where it is there; the ticket is used up then.
    fn poll(&mut self, ticket: &Ticket) -> Result<Option<u8>, Error>;
    /// Waits for a request; an error where that takes too long.
    fn wait(&mut self, ticket: Ticket) -> Result<u8, Error>;

    /// Carries out one request.
    fn request(&mut self, request: &Request) -> Result<u8, Error> {
        let ticket = self.submit(request)?;
        self.flush();
        self.wait(ticket)
    }

    /// Carries out many requests, if it can with one notification for as many as there are buffers. Returns the first status that is not OK,
    /// or OK.
    fn batch(&mut self, requests: &mut dyn Iterator<Item = Request>) -> Result<u8, Error>;
    /// Shows the faults that were reported since the last time, at most a ringful; returns how many.
    fn faults(&mut self, show: &mut dyn FnMut(Fault)) -> Result<usize, Error>;
    /// What the device says of itself.
    fn config(&self) -> &Config;
}

/// The driver of a virtio-iommu device.
#[derive(Debug)]
pub struct VirtioIommu {
    config: Config,
    requests: Requests<split::Driver<Linear>, Doorbell>,
    events: Events<split::Driver<Linear>, Doorbell>,
}

/// A driver that several users share; one thread.
pub type Shared = Rc<RefCell<dyn Iommu>>;

impl VirtioIommu {
    /// Sets the device up and starts it. `memory` is how the driver reaches the memory that [`Platform::dma`] gives; `patience` is how
    /// long it waits for an answer, in ticks of the time-stamp counter.
    pub fn new<P: Platform>(
        platform: &P,
        function: Function,
        memory: Linear,
        patience: u64,
    ) -> Result<Self, virtio_pci::Error> {
        let transport = Transport::new(platform, function)?;
        let usable = VERSION_1 | F_INPUT_RANGE | F_DOMAIN_RANGE | F_MAP_UNMAP | F_PROBE;
        let needed = VERSION_1 | F_MAP_UNMAP;
        let features = transport
            .negotiate(|offered| (offered & needed == needed).then_some(offered & usable))?;
        let config = read_config(&transport, features);
        let queue = |index, size| {
            let config = transport.add_queue::<P, Split>(platform, index, size)?;
            transport.disconnect_vector(index);
            let ring = split::Driver::new(memory, &config)?;
            Ok::<_, virtio_pci::Error>((config.size, (ring, transport.doorbell(index)?)))
        };
        let pool = |len| {
            let dma = platform.dma(len, 64).ok_or(virtio_pci::Error::Memory)?;
            Ok::<_, virtio_pci::Error>(dma.addr)
        };
        let (requests_size, requests) = queue(REQUESTS, REQUEST_QUEUE_SIZE)?;
        let (events_size, events) = queue(EVENTS, EVENT_QUEUE_SIZE)?;
        let len =
            Requests::<split::Driver<Linear>, Doorbell>::pool_len(requests_size, config.probe_size);
        let requests_pool = pool(len)?;
        let events_pool = pool(usize::from(events_size) * EVENT_STRIDE)?;
        transport.start();
        Ok(Self {
            config,
            requests: Requests::new(requests, memory, requests_pool, config.probe_size, patience),
            events: Events::new(events, memory, events_pool),
        })
    }

    /// Asks for the properties of an endpoint (section 5.13.6.7), as many bytes as `to` has. Returns the status.
    pub fn probe(&mut self, endpoint: u32, to: &mut [u8]) -> Result<u8, Error> {
        self.requests.probe(endpoint, to)
    }
}

impl Iommu for VirtioIommu {
    fn submit(&mut self, request: &Request) -> Result<Ticket, Error> {
        self.requests.submit(request)
    }

    fn flush(&mut self) {
        self.requests.flush();
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<u8>, Error> {
        self.requests.poll(ticket)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<u8, Error> {
        self.requests.wait(ticket)
    }

    fn batch(&mut self, requests: &mut dyn Iterator<Item = Request>) -> Result<u8, Error> {
        self.requests.batch(requests)
    }

    fn faults(&mut self, show: &mut dyn FnMut(Fault)) -> Result<usize, Error> {
        self.events.drain(show)
    }

    fn config(&self) -> &Config {
        &self.config
    }
}

fn read_config(transport: &Transport, features: u64) -> Config {
    let device = transport.device();
    let wide = |at| u64::from(device.read_u32(at)) | u64::from(device.read_u32(at + 4)) << 32;
    let has = |bit| features & bit != 0;
    let probe_size = usize::try_from(device.read_u32(32)).unwrap_or(usize::MAX);
    Config {
        page_size_mask: wide(0),
        input_range: if has(F_INPUT_RANGE) {
            (wide(8), wide(16))
        } else {
            (0, u64::MAX)
        },
        domain_range: if has(F_DOMAIN_RANGE) {
            (device.read_u32(24), device.read_u32(28))
        } else {
            (0, u32::MAX)
        },
        probe_size: if has(F_PROBE) && probe_size <= MAX_PROBE {
            probe_size
        } else {
            0
        },
    }
}

/// The time-stamp counter.
#[allow(unsafe_code)] // one instruction
fn ticks() -> u64 {
    // SAFETY: every x86-64 has it; where it is forbidden to processes, the workloads' clock is gone too.
    unsafe { _rdtsc() }
}

/// Copies out of a buffer; `false` where it is not in memory.
#[allow(unsafe_code)] // one block: a range that `Linear` checked
fn read(memory: Linear, addr: u64, to: &mut [u8]) -> bool {
    let Some(from) = memory.ptr(addr, to.len()) else {
        return false;
    };
    // SAFETY: `ptr` checked the range, which stays mapped.
    unsafe { Frame::new(from, to.len()) }.read(0, to)
}

/// Copies into a buffer that is not with the device.
#[allow(unsafe_code)] // one block: a range that `Linear` checked
fn write(memory: Linear, addr: u64, from: &[u8]) {
    if let Some(to) = memory.ptr(addr, from.len()) {
        // SAFETY: `ptr` checked the range, which stays mapped; the buffer is not with the device.
        unsafe { Room::new(to, from.len()) }.write(0, from);
    }
}

#[cfg(test)]
mod tests;

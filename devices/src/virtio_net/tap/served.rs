//! The rings are served by the thread that this runs on: a frame is copied between the guest and a buffer, and a read or a write of the tap takes it
//! from or to there.
//!
//! The thread sleeps in epoll. A queue that has nothing to do asks for a kick; the tap is watched for frames while the guest has buffers for
//! them, and for room while a frame waits for it. An event is followed by a bounded amount of work.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, EventSet, Events};
use virtqueue::net::{F_GUEST_CSUM, F_MRG_RXBUF, HEADER_LEN, Header, Offloads, features};
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, Chain, DeviceRing, Layout, RingConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::memory::Ram;
use super::{Counters, Engine, Fault, Port};
use crate::virtio::{QueueSetup, event};

/// The longest packet, with its header: 64 KiB behind an Ethernet header with a VLAN tag.
pub(super) const MAX_PACKET: usize = HEADER_LEN + 18 + 65536;
/// Frames at a time, and how often at most after one event.
const BURST: usize = 64;
const ROUNDS: usize = 4;

const TAP: u32 = 1;
const KICK: [u32; 2] = [2, 3];
/// The queues.
const TO_GUEST: u16 = 0;
const FROM_GUEST: u16 = 1;

/// One queue at work.
struct Lane {
    ring: Box<dyn DeviceRing + Send>,
    size: usize,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    chains: [Chain; BURST],
    /// As long as a chain can be.
    buffers: Vec<Buffer>,
    /// To the guest: for buffers. From it: for room in the tap.
    waits: bool,
}

impl Lane {
    fn new(setup: &QueueSetup, negotiated: u64, ram: Ram) -> Result<Self, Fault> {
        let has = |bit| negotiated & bit != 0;
        let config = RingConfig {
            size: setup.size,
            desc: setup.desc,
            driver: setup.driver,
            device: setup.device,
            event_idx: has(features::EVENT_IDX),
            in_order: has(features::IN_ORDER),
            indirect: has(features::INDIRECT_DESC),
        };
        let ring: Box<dyn DeviceRing + Send> = if has(features::RING_PACKED) {
            Box::new(Packed::device(ram, &config)?)
        } else {
            Box::new(Split::device(ram, &config)?)
        };
        let size = usize::from(setup.size);
        Ok(Self {
            ring,
            size,
            kick: setup.kick.clone(),
            call: setup.call.clone(),
            chains: [Chain::default(); BURST],
            buffers: vec![Buffer::default(); size],
            waits: false,
        })
    }

    fn publish(&mut self) {
        if self.ring.publish() {
            event::signal(&self.call);
        }
    }
}

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Gone,
    Dropped,
    /// It waits where it is.
    Waits,
}

/// Chains that were taken for one frame.
#[derive(Default)]
struct Taken {
    /// The id of each, and how many bytes may be written there.
    chains: Vec<(u16, usize)>,
    /// Where, one behind the other.
    pieces: Vec<(GuestAddress, usize)>,
}

pub(super) struct Served {
    port: Port,
    ram: Ram,
    counters: Arc<Counters>,
    features: u64,
    to_guest: Option<Lane>,
    from_guest: Option<Lane>,
    taken: Taken,
    /// A frame from the guest.
    outgoing: Box<[u8]>,
    /// A frame to the guest, and how long it is; 0 where there is none.
    incoming: Box<[u8]>,
    pending: usize,
    /// What the tap is watched for.
    watched: EventSet,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn cannot_watch(error: event_manager::Error) -> Fault {
    Fault::Tap(io::Error::other(error.to_string()))
}

impl Served {
    pub(super) fn new(port: Port, memory: GuestMemoryMmap, counters: Arc<Counters>) -> Self {
        let buffer = || vec![0; MAX_PACKET].into_boxed_slice();
        Self {
            port,
            ram: Ram(memory),
            counters,
            features: 0,
            to_guest: None,
            from_guest: None,
            taken: Taken::default(),
            outgoing: buffer(),
            incoming: buffer(),
            pending: 0,
            watched: EventSet::empty(),
        }
    }

    fn lane(&mut self, index: u16) -> Option<&mut Option<Lane>> {
        match index {
            TO_GUEST => Some(&mut self.to_guest),
            FROM_GUEST => Some(&mut self.from_guest),
            _ => None,
        }
    }

    /// Watches the tap for what is wanted of it. It is not watched at all where that is nothing: an error would be reported all the same.
    fn watch_tap(&mut self, ops: &mut EventOps) -> Result<(), Fault> {
        let mut wanted = EventSet::empty();
        if self.to_guest.as_ref().is_some_and(|lane| !lane.waits) {
            wanted |= EventSet::IN;
        }
        if self.from_guest.as_ref().is_some_and(|lane| lane.waits) {
            wanted |= EventSet::OUT;
        }
        let events = Events::with_data(&self.port, TAP, wanted);
        let result = match (self.watched.is_empty(), wanted.is_empty()) {
            (true, true) => return Ok(()),
            (true, false) => ops.add(events),
            (false, true) => ops.remove(events),
            (false, false) if wanted == self.watched => return Ok(()),
            (false, false) => ops.modify(events),
        };
        self.watched = wanted;
        result.map_err(cannot_watch)
    }

    // ---- from the guest ----

    fn serve_from_guest(&mut self) -> Result<(), Fault> {
        let Some(mut lane) = self.from_guest.take() else {
            return Ok(());
        };
        let result = self.send_some(&mut lane);
        self.from_guest = Some(lane);
        result
    }

    fn send_some(&mut self, lane: &mut Lane) -> Result<(), Fault> {
        lane.waits = false;
        for _ in 0..ROUNDS {
            lane.ring.disable_kicks();
            let there = lane.ring.get(&mut lane.chains, &mut lane.buffers)?;
            if there == 0 && !lane.ring.enable_kicks() {
                return Ok(());
            }
            let (mut done, mut result) = (0, Ok(()));
            for chain in lane.chains.iter().take(there) {
                match self.send(pieces(&lane.buffers, chain)) {
                    Ok(Fate::Waits) => {
                        lane.waits = true;
                        break;
                    }
                    Ok(Fate::Gone) => count(&self.counters.sent),
                    Ok(Fate::Dropped) => count(&self.counters.sent_dropped),
                    Err(fault) => {
                        result = Err(fault);
                        break;
                    }
                }
                done += 1;
            }
            lane.ring
                .put_read(lane.chains.get(..done).unwrap_or_default());
            lane.ring.unget(there - done);
            lane.publish();
            result?;
            if lane.waits {
                return Ok(());
            }
        }
        // There may be more, and others have their turn first.
        event::signal(&lane.kick);
        Ok(())
    }

    fn send(&mut self, packet: &[Buffer]) -> Result<Fate, Fault> {
        let mut len = 0usize;
        for piece in packet.iter().filter(|piece| !piece.device_writes) {
            let more = len_of(piece);
            let Some(part) = self.outgoing.get_mut(len..len.saturating_add(more)) else {
                return Ok(Fate::Dropped);
            };
            self.ram
                .0
                .read_slice(part, GuestAddress(piece.addr))
                .map_err(|_| Fault::Buffer)?;
            len += more;
        }
        let Some((head, frame)) = self
            .outgoing
            .get_mut(..len)
            .and_then(|packet| packet.split_first_chunk_mut::<HEADER_LEN>())
        else {
            return Ok(Fate::Dropped);
        };
        let offloads = Offloads::of_driver(self.features);
        let Some(checked) = offloads.check(&Header::decode(*head), frame.len()) else {
            return Ok(Fate::Dropped);
        };
        *head = checked.encode();
        let packet = self.outgoing.get(..len).unwrap_or_default();
        match self.port.write(packet) {
            Ok(()) => Ok(Fate::Gone),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(Fate::Waits),
                Some(libc::EBADFD | libc::EBADF) => Err(Fault::Tap(error)),
                // The interface is down (EIO), or the kernel does not like the frame.
                _ => Ok(Fate::Dropped),
            },
        }
    }

    // ---- to the guest ----

    fn serve_to_guest(&mut self) -> Result<(), Fault> {
        let Some(mut lane) = self.to_guest.take() else {
            return Ok(());
        };
        let result = self.receive_some(&mut lane);
        lane.publish();
        self.to_guest = Some(lane);
        result
    }

    fn receive_some(&mut self, lane: &mut Lane) -> Result<(), Fault> {
        lane.waits = false;
        for _ in 0..BURST {
            if self.pending == 0 {
                match self.port.read(&mut self.incoming) {
                    Ok(len) => self.pending = len,
                    Err(error) => {
                        return match error.kind() {
                            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                            _ => Err(Fault::Tap(error)),
                        };
                    }
                }
            }
            match self.deliver(lane)? {
                Fate::Gone => count(&self.counters.received),
                Fate::Dropped => count(&self.counters.received_dropped),
                Fate::Waits => {
                    lane.waits = true;
                    return Ok(());
                }
            }
            self.pending = 0;
        }
        Ok(())
    }

    /// Puts the frame that is there into buffers of the guest.
    fn deliver(&mut self, lane: &mut Lane) -> Result<Fate, Fault> {
        let Some((head, _)) = self
            .incoming
            .get_mut(..self.pending)
            .and_then(|packet| packet.split_first_chunk_mut::<HEADER_LEN>())
        else {
            return Ok(Fate::Dropped);
        };
        let fate = self.taken.take(lane, self.pending, self.features)?;
        let (true, Ok(count)) = (fate == Fate::Gone, u16::try_from(self.taken.chains.len())) else {
            return Ok(fate);
        };
        let mut header = Header::decode(*head);
        header.num_buffers = count;
        if self.features & F_GUEST_CSUM == 0 {
            header.flags = 0;
        }
        *head = header.encode();
        let mut rest = self.incoming.get(..self.pending).unwrap_or_default();
        for &(address, room) in &self.taken.pieces {
            let (part, behind) = rest.split_at(room.min(rest.len()));
            self.ram
                .0
                .write_slice(part, address)
                .map_err(|_| Fault::Buffer)?;
            rest = behind;
        }
        let mut left = self.pending;
        for &(id, room) in &self.taken.chains {
            let written = room.min(left);
            left -= written;
            // A packet's length fits.
            lane.ring.put(id, u32::try_from(written).unwrap_or(0));
        }
        Ok(Fate::Gone)
    }
}

impl Taken {
    /// Takes chains that have room for `len` bytes together: one, or as many as it takes where buffers are mergeable. Takes none otherwise, and has
    /// asked for a kick where more may come.
    fn take(&mut self, lane: &mut Lane, len: usize, features: u64) -> Result<Fate, Fault> {
        let most = if features & F_MRG_RXBUF == 0 {
            1
        } else {
            lane.size
        };
        self.chains.clear();
        self.pieces.clear();
        let mut room = 0;
        let mut retried = false;
        lane.ring.disable_kicks();
        while room < len {
            let taken = self.chains.len();
            let mut chain = [Chain::default()];
            if taken == most {
                lane.ring.unget(taken);
                return Ok(Fate::Dropped);
            }
            if lane.ring.get(&mut chain, &mut lane.buffers)? == 0 {
                if lane.ring.enable_kicks() {
                    if !retried {
                        retried = true;
                        continue;
                    }
                    // A driver that says so again and again waits for its next turn.
                    event::signal(&lane.kick);
                }
                lane.ring.unget(taken);
                return Ok(Fate::Waits);
            }
            let [chain] = chain;
            let mut here = 0;
            for piece in pieces(&lane.buffers, &chain) {
                if piece.device_writes {
                    here += len_of(piece);
                    self.pieces.push((GuestAddress(piece.addr), len_of(piece)));
                }
            }
            self.chains.push((chain.id, here));
            room += here;
        }
        Ok(Fate::Gone)
    }
}

/// The buffers of a chain.
fn pieces<'a>(buffers: &'a [Buffer], chain: &Chain) -> &'a [Buffer] {
    let first = usize::from(chain.first);
    let end = first + usize::from(chain.count);
    buffers.get(first..end).unwrap_or_default()
}

fn len_of(piece: &Buffer) -> usize {
    // 32 bits fit.
    usize::try_from(piece.len).unwrap_or(usize::MAX)
}

impl Engine for Served {
    fn ring_features(&self) -> u64 {
        u64::MAX
    }

    fn configure(&mut self, features: u64) -> Result<(), Fault> {
        self.features = features;
        self.port.set_offloads(features).map_err(Fault::Tap)
    }

    fn start(&mut self, index: u16, queue: &QueueSetup, ops: &mut EventOps) -> Result<(), Fault> {
        let lane = Lane::new(queue, self.features, self.ram.clone())?;
        let kick: RawFd = lane.kick.as_raw_fd();
        let what = KICK.get(usize::from(index)).copied().unwrap_or_default();
        let Some(place) = self.lane(index).filter(|place| place.is_none()) else {
            return Ok(());
        };
        *place = Some(lane);
        ops.add(Events::with_data_raw(kick, what, EventSet::IN))
            .map_err(cannot_watch)?;
        // What the driver made available before it started the device may have come without a kick.
        self.event(what, ops)
    }

    fn stop(&mut self, index: u16, ops: &mut EventOps) {
        let Some(lane) = self.lane(index).and_then(Option::take) else {
            return;
        };
        if let Err(error) = ops.remove(Events::empty(&*lane.kick)) {
            log::error!("tap: cannot forget a descriptor: {error}");
        }
        if index == TO_GUEST {
            self.pending = 0;
        }
        if let Err(fault) = self.watch_tap(ops) {
            log::error!("tap: {fault}");
        }
    }

    fn event(&mut self, what: u32, ops: &mut EventOps) -> Result<(), Fault> {
        let [to_guest, from_guest] = KICK;
        if what == to_guest || what == TAP {
            if let Some(lane) = self.to_guest.as_ref().filter(|_| what != TAP) {
                event::clear(&lane.kick);
            }
            self.serve_to_guest()?;
        }
        if what == from_guest || what == TAP {
            if let Some(lane) = self.from_guest.as_ref().filter(|_| what != TAP) {
                event::clear(&lane.kick);
            }
            let waits = self.from_guest.as_ref().is_some_and(|lane| lane.waits);
            if what != TAP || waits {
                self.serve_from_guest()?;
            }
        }
        self.watch_tap(ops)
    }
}

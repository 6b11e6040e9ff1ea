//! The data path: frames go from the transmit ring of one front-end into the receive ring of the other, in one copy.
//!
//! A frame that has no room waits where it is, in its sender's ring.
//!
//! Unsafe code: payload is copied between addresses that the ring code checked against the front-ends' memory tables; the front-ends may write there at
//! the same time.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use guest_driver::bulk;
use virtqueue::net::HEADER_LEN;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, Chain, DeviceRing, Error, Layout};

use super::memory::Table;

/// Frames a turn.
const BURST: usize = 32;
/// Most chains that the frames of a turn can be spread over: mergeable buffers may be short.
const SPREAD: usize = 128;
/// Most buffers that the chains of a turn can have.
const MAX_BUFFERS: usize = 1024;
/// The longest packet, with its header: 64 KiB of payload behind an Ethernet header with a VLAN tag.
const MAX_PACKET: usize = HEADER_LEN + 18 + 65536;

/// Where le16 `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// What stands before a frame: no offload, one buffer (VIRTIO 1.3, section 5.1.6).
const HEADER: [u8; HEADER_LEN] = {
    let mut header = [0; HEADER_LEN];
    header[NUM_BUFFERS] = 1;
    header
};

/// One ring of a front-end and its eventfds, which never block.
#[derive(Debug)]
pub struct Queue<V> {
    /// The device side.
    pub ring: V,
    /// Descriptors.
    pub size: u16,
    /// Interrupts the driver; `None`: it polls.
    pub call: Option<File>,
    /// Where its kicks arrive; `None`: the ring has to be polled.
    pub kick: Option<File>,
}

impl<V: DeviceRing> Queue<V> {
    fn publish(&mut self) {
        if self.ring.publish()
            && let Some(call) = &mut self.call
        {
            // Where it is full there is a signal in it already.
            let _ = call.write(&1_u64.to_ne_bytes());
        }
    }

    /// Asks for a kick; whether there is something to look at already.
    fn arm(&mut self) -> Armed {
        match (self.ring.enable_kicks(), &self.kick) {
            (true, _) => Armed::Ready,
            (false, Some(_)) => Armed::Sleep,
            (false, None) => Armed::Nap,
        }
    }

    /// Asks for no more kicks, and forgets those that came.
    fn disarm(&mut self) {
        self.ring.disable_kicks();
        if let Some(kick) = &mut self.kick {
            let _ = kick.read(&mut [0; 8]);
        }
    }
}

/// Both rings of a front-end.
#[derive(Debug)]
pub struct Ends<V> {
    /// What their addresses are in.
    pub memory: Table,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated.
    pub mergeable: bool,
    /// The front-end's receive ring (vring 0).
    pub to_guest: Queue<V>,
    /// Its transmit ring (vring 1).
    pub from_guest: Queue<V>,
}

/// Both rings, over the layout that was negotiated.
#[derive(Debug)]
pub enum Rings {
    /// Split.
    Split(Ends<<Split as Layout>::Device<Table>>),
    /// Packed.
    Packed(Ends<<Packed as Layout>::Device<Table>>),
}

/// Runs the same code for either layout.
macro_rules! either {
    ($rings:expr, $ends:ident => $body:expr) => {
        match $rings {
            Rings::Split($ends) => $body,
            Rings::Packed($ends) => $body,
        }
    };
}

impl Rings {
    /// Where the two rings are (VHOST_USER_GET_VRING_BASE).
    pub fn bases(&self) -> [u32; 2] {
        either!(self, ends => [ends.to_guest.ring.base(), ends.from_guest.ring.base()])
    }

    /// Asks for no kicks.
    pub fn disarm(&mut self) {
        either!(self, ends => {
            ends.to_guest.disarm();
            ends.from_guest.disarm();
        });
    }

    /// Where kicks arrive.
    pub fn kicks(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let kicks = either!(self, ends => [&ends.to_guest.kick, &ends.from_guest.kick]);
        kicks.into_iter().flatten().map(AsFd::as_fd)
    }
}

/// How long a side may be left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Armed {
    /// Not at all.
    Ready,
    /// For a moment: nobody will say when there is something to do.
    Nap,
    /// Until a kick comes.
    Sleep,
}

/// Why no more frames went over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// There may be more.
    Not,
    /// The sender has sent no more.
    Empty,
    /// The receiver has no buffer.
    Full,
    /// The receiver has buffers, but too few for the next frame.
    Short,
}

/// Which front-end broke a rule of its rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The sender.
    Sender(Error),
    /// The receiver.
    Receiver(Error),
}

/// One direction.
#[derive(Debug)]
pub struct Lane {
    sent: [Chain; BURST],
    sent_buffers: Box<[Buffer]>,
    room: [Chain; SPREAD],
    room_buffers: Box<[Buffer]>,
    /// Frames are spread over several chains: there have to be more chains than frames.
    spreading: bool,
    /// Frames that went over.
    pub frames: u64,
    /// Packets that were no frames, or that no buffers of the receiver could ever hold.
    pub dropped: u64,
}

impl Lane {
    /// A direction in which nothing has gone yet.
    pub fn new() -> Self {
        let buffers = || vec![Buffer::default(); MAX_BUFFERS].into_boxed_slice();
        Self {
            sent: [Chain::default(); BURST],
            sent_buffers: buffers(),
            room: [Chain::default(); SPREAD],
            room_buffers: buffers(),
            spreading: false,
            frames: 0,
            dropped: 0,
        }
    }

    /// Carries over up to a burst of frames.
    pub fn forward(&mut self, from: &mut Rings, to: &mut Rings) -> Result<Stop, Broken> {
        either!(from, from => either!(to, to => self.turn(from, to)))
    }

    /// Says that there is nothing to do until a kick comes, as `stop` has it.
    pub fn arm(stop: Stop, from: &mut Rings, to: &mut Rings) -> Armed {
        match stop {
            Stop::Not => Armed::Ready,
            Stop::Empty => either!(from, from => from.from_guest.arm()),
            Stop::Full => either!(to, to => to.to_guest.arm()),
            // A kick says that there is a buffer, not how many.
            Stop::Short => Armed::Nap,
        }
    }

    fn turn<A: DeviceRing, B: DeviceRing>(
        &mut self,
        from: &mut Ends<A>,
        to: &mut Ends<B>,
    ) -> Result<Stop, Broken> {
        let sender = &mut from.from_guest.ring;
        let sent = sender
            .get(&mut self.sent, &mut self.sent_buffers)
            .map_err(Broken::Sender)?;
        if sent == 0 {
            return Ok(Stop::Empty);
        }
        let wanted = if self.spreading { SPREAD } else { sent };
        let receiver = &mut to.to_guest.ring;
        let room = match receiver.get(&mut self.room[..wanted], &mut self.room_buffers) {
            Ok(room) => room,
            Err(error) => {
                sender.unget(sent);
                return Err(Broken::Receiver(error));
            }
        };
        self.spreading = false;
        let all = room >= SPREAD || room >= usize::from(to.to_guest.size);
        let (mut done, mut used) = (0, 0);
        let mut stop = Stop::Not;
        while done < sent {
            let packet = pieces(&self.sent_buffers, &self.sent[done]);
            let len: usize = packet.iter().filter(|p| !p.device_writes).map(len_of).sum();
            if len <= HEADER_LEN || len > MAX_PACKET {
                self.dropped += 1;
                done += 1;
                continue;
            }
            let Some(chains) = self.chains(to.mergeable, used, room, len) else {
                // Those that are there all at once are too few, or one is all that a frame gets: it fits never.
                if used < room && (!to.mergeable || all && used == 0) {
                    self.dropped += 1;
                    done += 1;
                    continue;
                }
                stop = match used < room {
                    true => Stop::Short,
                    false => Stop::Full,
                };
                self.spreading |= to.mergeable && wanted < SPREAD && room == wanted;
                if self.spreading {
                    stop = Stop::Not;
                }
                break;
            };
            let target = &self.room[used..used + chains];
            let fits = match (packet, target) {
                ([frame], [chain]) => match pieces(&self.room_buffers, chain) {
                    [whole] => place(&from.memory, &to.memory, frame, whole, len),
                    _ => None,
                },
                _ => None,
            };
            if let Some((target, source)) = fits {
                // SAFETY: `place` checked `len` bytes, the header's among them, in either front-end's memory, which `from` and `to` keep mapped; they are
                // different mappings.
                unsafe {
                    if !bulk::equal(target, HEADER.as_ptr(), HEADER_LEN) {
                        bulk::copy(target, HEADER.as_ptr(), HEADER_LEN);
                    }
                    let (target, source) = (target.add(HEADER_LEN), source.add(HEADER_LEN));
                    bulk::copy(target, source, len - HEADER_LEN);
                }
                let written = u32::try_from(len).unwrap_or(0);
                to.to_guest.ring.put(target_id(&self.room, used), written);
            } else {
                self.spreading |= chains > 1;
                let mut header = HEADER;
                let count = u16::try_from(chains).unwrap_or(1);
                header[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
                let mut left = len;
                for chain in target {
                    let room: usize = room_of(pieces(&self.room_buffers, chain));
                    let written = room.min(left);
                    left -= written;
                    let written = u32::try_from(written).unwrap_or(0);
                    to.to_guest.ring.put(chain.id, written);
                }
                let target = target
                    .iter()
                    .flat_map(|chain| pieces(&self.room_buffers, chain))
                    .filter(|piece| piece.device_writes);
                let mut target = Cursor::new(&to.memory, target);
                let start = header.as_mut_ptr();
                target.write(start, HEADER_LEN);
                let mut skip = HEADER_LEN;
                for piece in packet.iter().filter(|piece| !piece.device_writes) {
                    let len = len_of(piece);
                    let skipped = skip.min(len);
                    skip -= skipped;
                    if let Some(source) = from.memory.ptr(piece.addr, len) {
                        target.write(source.wrapping_add(skipped), len - skipped);
                    }
                }
            }
            self.frames += 1;
            done += 1;
            used += chains;
        }
        let (sender, receiver) = (&mut from.from_guest, &mut to.to_guest);
        if used < room {
            receiver.ring.unget(room - used);
        }
        receiver.publish();
        sender.ring.put_read(&self.sent[..done]);
        if done < sent {
            sender.ring.unget(sent - done);
        }
        sender.publish();
        Ok(stop)
    }

    /// How many chains from the one at `used` on hold `len` bytes; `None` where not enough are there.
    fn chains(&self, mergeable: bool, used: usize, room: usize, len: usize) -> Option<usize> {
        let mut total = 0;
        for (count, chain) in (1..).zip(self.room.get(used..room)?) {
            total += room_of(pieces(&self.room_buffers, chain));
            if total >= len {
                return Some(count);
            }
            if !mergeable {
                return None;
            }
        }
        None
    }
}

/// Writes into the buffers of a frame, one behind the other.
struct Cursor<'a, I> {
    memory: &'a Table,
    rest: I,
    at: *mut u8,
    left: usize,
}

impl<'a, I: Iterator<Item = &'a Buffer>> Cursor<'a, I> {
    fn new(memory: &'a Table, rest: I) -> Self {
        Self {
            memory,
            rest,
            at: std::ptr::null_mut(),
            left: 0,
        }
    }

    /// Copies `len` bytes, or as many as there is room for. All of `from` is checked memory of the other front-end, or our own.
    fn write(&mut self, mut from: *const u8, mut len: usize) {
        while len > 0 {
            if self.left == 0 {
                let Some(next) = self.rest.next() else { return };
                let Some(at) = self.memory.ptr(next.addr, len_of(next)) else {
                    return;
                };
                (self.at, self.left) = (at, len_of(next));
                continue;
            }
            let now = len.min(self.left);
            // SAFETY: `now` bytes are left at both places; the ring code checked the buffers, and `ptr` where they are.
            unsafe { bulk::copy(self.at, from, now) };
            self.at = self.at.wrapping_add(now);
            self.left -= now;
            from = from.wrapping_add(now);
            len -= now;
        }
    }
}

/// Where a packet that is in one piece goes as a whole: target, source.
#[inline]
fn place(
    from: &Table,
    to: &Table,
    frame: &Buffer,
    whole: &Buffer,
    len: usize,
) -> Option<(*mut u8, *const u8)> {
    let fits = !frame.device_writes && whole.device_writes && len_of(whole) >= len;
    if !fits {
        return None;
    }
    Some((
        to.ptr(whole.addr, len)?,
        from.ptr(frame.addr, len)?.cast_const(),
    ))
}

fn target_id(room: &[Chain], at: usize) -> u16 {
    room.get(at).map_or(0, |chain| chain.id)
}

/// The buffers of a chain.
#[inline]
fn pieces<'a>(buffers: &'a [Buffer], chain: &Chain) -> &'a [Buffer] {
    let first = usize::from(chain.first);
    let end = first + usize::from(chain.count);
    buffers.get(first..end).unwrap_or(&[])
}

fn len_of(piece: &Buffer) -> usize {
    piece.len as usize
}

/// How many bytes may be written into a chain.
fn room_of(pieces: &[Buffer]) -> usize {
    let writable = pieces.iter().filter(|piece| piece.device_writes);
    writable.map(len_of).sum()
}

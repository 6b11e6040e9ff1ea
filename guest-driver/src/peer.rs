//! The back-end's data path: the device side of the front-end's rings, reached through the window.
//!
//! Unsafe code: buffers are reached by the front-end's addresses; each was checked against the window by the ring code and again, with the
//! length that is used, by [`Linear::ptr`].
#![allow(unsafe_code)]

mod offload;

use alloc::boxed::Box;
use alloc::vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed};
use core::sync::atomic::fence;

use virtqueue::linear::{Linear, LinearRegion};
use virtqueue::net::{F_MRG_RXBUF, HEADER_LEN, Header, Offloads};
use virtqueue::{Buffer, Chain, DeviceRing, Error as RingError, Region as _};

use crate::bulk;
use crate::dirty::PortLog;
use crate::inflight::Record;
use crate::port::{Error, Frame, GROUP, MAX_BURST, MAX_FRAME, Notices, Port, Slot};
use crate::virtio_pci::Notify;

/// Most buffers that a burst's chains can have.
const MAX_BUFFERS: usize = 2 * MAX_BURST;
const MAX_PACKET: usize = HEADER_LEN + MAX_FRAME;

/// Where le16 `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// What stands before a frame: no offload, one buffer (VIRTIO 1.3, section 5.1.6).
const HEADER: [u8; HEADER_LEN] = {
    let mut header = [0; HEADER_LEN];
    header[NUM_BUFFERS] = 1;
    header
};
/// What reads where nothing may be read. (No device writes such a header.)
const ONES: [u8; HEADER_LEN] = [0xFF; HEADER_LEN];

/// One of the front-end's rings and its call.
#[derive(Debug)]
pub struct Vring<V, N> {
    /// The device side of the ring.
    pub ring: V,
    /// Interrupts the front-end.
    pub call: N,
    /// Whether the front-end's kicks arrive as interrupts; otherwise the ring has to be polled.
    pub kicks: bool,
    /// Where the next back-end finds how far the ring has been used.
    pub record: Option<Record>,
}

impl<V: DeviceRing, N: Notify> Vring<V, N> {
    /// Takes available chains in one of the ways of [`DeviceRing`], and records that.
    #[inline(always)]
    fn taking(
        &mut self,
        how: impl FnOnce(&mut V) -> Result<usize, RingError>,
    ) -> Result<usize, RingError> {
        let before = self.ring.base();
        let taken = how(&mut self.ring)?;
        if let Some(record) = &self.record {
            record.taken(before, self.ring.base());
        }
        Ok(taken)
    }

    /// Makes what was used visible to the front-end ([`DeviceRing::publish`]). Nothing is taken and not used then, where there is a record.
    #[inline(always)]
    fn publish(&mut self) -> bool {
        let base = self.ring.base();
        if let Some(record) = &self.record {
            record.publishing(base);
        }
        let wanted = self.ring.publish();
        if let Some(record) = &self.record {
            record.published(base);
        }
        wanted
    }
}

/// The word that changes before the window is taken away, and what it was when the rings were started.
#[derive(Debug)]
pub struct Generation {
    word: LinearRegion,
    started: u64,
}

impl Generation {
    /// The word at the start of a region.
    #[must_use]
    pub fn new(word: LinearRegion) -> Self {
        let started = word.load_u64(0, Relaxed);
        Self { word, started }
    }

    /// Whether what was read of the window before this is what the peer has there.
    #[inline(always)]
    fn holds(&self) -> bool {
        // Not before the frames are read.
        fence(Acquire);
        self.word.load_u64(0, Relaxed) == self.started
    }
}

/// A chain of one buffer that was taken and is not used yet.
#[derive(Clone, Copy, Debug)]
struct Whole {
    /// Where the buffer is.
    ptr: *mut u8,
    /// Its length; 0 where it is not in the window, or not for this direction.
    len: u32,
    id: u16,
}

const NOTHING: Whole = Whole {
    ptr: core::ptr::null_mut(),
    len: 0,
    id: 0,
};

/// Takes up to `count` chains of one buffer into `list`, and shows where each buffer is to `fetch`, so that the lines of all travel at the same time.
#[inline(always)]
fn take(
    vring: &mut Vring<impl DeviceRing, impl Notify>,
    window: Linear,
    list: &mut [Whole; MAX_BURST],
    (count, device_writes): (usize, bool),
    fetch: impl Fn(*mut u8, usize),
) -> Result<usize, RingError> {
    let mut places = list.iter_mut();
    vring.taking(|ring| {
        ring.get_each(count, |id, buffer| {
            let ptr = window.ptr(buffer.addr, buffer.len as usize);
            let len = match ptr.is_some() && buffer.device_writes == device_writes {
                true => buffer.len,
                false => 0,
            };
            let ptr = ptr.unwrap_or(core::ptr::null_mut());
            fetch(ptr, len as usize);
            if let Some(place) = places.next() {
                *place = Whole { ptr, len, id };
            }
        })
    })
}

/// Asks for the frame in a buffer.
#[inline(always)]
fn fetch_to_read(from: *mut u8, len: usize) {
    bulk::fetch(
        from.wrapping_add(HEADER_LEN),
        len.saturating_sub(HEADER_LEN),
    );
}

/// The data path of a back-end for virtio-net.
#[derive(Debug)]
pub struct PeerPort<V, N> {
    window: Linear,
    /// The front-end's receive ring (vring 0), into which we send.
    to_peer: Vring<V, N>,
    /// The front-end's transmit ring (vring 1), from which we receive.
    from_peer: Vring<V, N>,
    /// The burst's chains, where each is one buffer.
    whole: Box<[Whole; MAX_BURST]>,
    /// Received chains of one buffer, where fewer were asked for than a group, and how many they are.
    came: [Whole; GROUP],
    got: usize,
    /// The first so many of them have been shown; when all have, they go back.
    shown: usize,
    /// The burst's chains, of any shape: those from `at` on, up to `taken`, are still to be used.
    chains: [Chain; MAX_BURST],
    buffers: [Buffer; MAX_BUFFERS],
    at: usize,
    taken: usize,
    /// A packet whose buffers are in pieces is put together here.
    scratch: Box<[u8]>,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated: a frame may be spread over several chains.
    mergeable: bool,
    /// Frames were spread in the last burst: it takes more chains than frames.
    spreading: bool,
    /// The front-end has its receive buffers mapped for writing only: looking at them is in vain, slow, and told to its guest as a fault.
    unreadable: bool,
    /// What is written is logged there.
    log: Option<PortLog>,
    generation: Option<Generation>,
    dropped: u64,
    /// Of the ring that sends, of the one that receives.
    notices: [Notices; 2],
    /// Where checksums or segmentation were negotiated, all frames go another way.
    offload: Option<Box<offload::Offload>>,
}

// SAFETY: the pointers are into the window, which belongs to no thread; the port is used by one at a time.
unsafe impl<V: Send, N: Send> Send for PeerPort<V, N> {}

impl<V: DeviceRing, N: Notify> PeerPort<V, N> {
    /// A data path over the front-end's rings; the addresses in them are offsets of `window`. Of the `features` that were negotiated, those count that say
    /// what frames and their headers are like.
    pub fn new(
        window: Linear,
        features: u64,
        to_peer: Vring<V, N>,
        from_peer: Vring<V, N>,
    ) -> Self {
        let mut port = Self {
            window,
            to_peer,
            from_peer,
            whole: Box::new([NOTHING; MAX_BURST]),
            came: [NOTHING; GROUP],
            got: 0,
            shown: 0,
            chains: [Chain::default(); MAX_BURST],
            buffers: [Buffer::default(); MAX_BUFFERS],
            at: 0,
            taken: 0,
            scratch: vec![0; MAX_PACKET].into_boxed_slice(),
            mergeable: features & F_MRG_RXBUF != 0,
            spreading: false,
            unreadable: false,
            log: None,
            generation: None,
            dropped: 0,
            notices: Default::default(),
            offload: offload::Offload::new(features),
        };
        port.disarm();
        port
    }

    /// Has [`Port::whole`] look at this word.
    pub fn watch(&mut self, generation: Option<Generation>) {
        self.generation = generation;
    }

    /// Logs what is written from now on, and that both rings were; or nothing any more.
    pub fn set_log(&mut self, log: Option<PortLog>) {
        self.log = log;
        self.log_rings();
    }

    /// Both rings were written.
    fn log_rings(&self) {
        if let Some(log) = &self.log {
            log.ring(0);
            log.ring(1);
        }
    }

    /// Packets that did not fit their buffers, or were no frames.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Room to build a frame in that takes a chain in pieces, or several chains; `None` where there are none for it. [`PeerPort::send_staged`] sends it.
    #[cold]
    fn stage(&mut self, len: usize) -> Result<Option<*mut u8>, RingError> {
        if self.at == self.taken {
            let (chains, buffers) = (&mut self.chains, &mut self.buffers);
            let taken = self.to_peer.taking(|ring| ring.get(chains, buffers))?;
            (self.at, self.taken) = (0, taken);
        }
        let enough = self.needed(len).is_some();
        self.spreading |= enough && self.mergeable;
        let frame = self.scratch.get_mut(HEADER_LEN..HEADER_LEN + len);
        Ok(frame.filter(|_| enough).map(|frame| frame.as_mut_ptr()))
    }

    /// How many chains a frame takes, from the one at `at` on, and how much they hold.
    fn needed(&self, len: usize) -> Option<(usize, usize)> {
        let chains = self.chains.get(self.at..self.taken)?;
        let mut total = 0;
        let last = chains.iter().position(|chain| {
            total += room(pieces(&self.buffers, chain));
            !self.mergeable || total >= HEADER_LEN + len
        })?;
        Some((last + 1, total))
    }

    /// Puts the frame that was built into the chains that there were for it.
    #[cold]
    fn send_staged(&mut self, len: usize) {
        let packet = HEADER_LEN + len;
        let Some((count, total)) = self.needed(len) else {
            return;
        };
        let chains = self.chains.get(self.at..self.at + count).unwrap_or(&[]);
        let mut rest: &[u8] = &[];
        if let (Some(scratch), true) = (self.scratch.get_mut(..packet), total >= packet) {
            let (header, _) = scratch.split_at_mut(HEADER_LEN);
            header.copy_from_slice(&HEADER);
            let count = u16::try_from(count).unwrap_or(1);
            header[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
            rest = scratch;
        } else {
            // Too short for any frame of this length, now and ever: back it goes, and the frame is lost.
            self.dropped += 1;
        }
        for chain in chains {
            let left = scatter(self.window, pieces(&self.buffers, chain), rest);
            let written = u32::try_from(rest.len() - left.len()).unwrap_or(0);
            self.to_peer.ring.put(chain.id, written);
            rest = left;
        }
        if let Some(log) = &self.log {
            log.sent(chains, &self.buffers, packet);
        }
        self.at += count;
    }

    /// Takes chains of any shape from the front-end's transmit ring.
    #[cold]
    fn take_pieces(&mut self, count: usize) -> Result<usize, RingError> {
        let chains = self.chains.get_mut(..count).unwrap_or_default();
        let buffers = &mut self.buffers;
        self.from_peer.taking(|ring| ring.get(chains, buffers))
    }

    /// Where the frame in such a chain is; `None` where it holds none.
    #[cold]
    fn piece(&mut self, at: usize) -> Option<(*const u8, usize)> {
        let pieces = pieces(&self.buffers, self.chains.get(at)?);
        match *pieces {
            [header, frame] if header.len as usize == HEADER_LEN => {
                let len = frame.len as usize;
                let from = place(self.window, frame, len, false)?;
                (len <= MAX_FRAME).then_some((from.cast_const(), len))
            }
            _ => {
                let len = gather(self.window, pieces, &mut self.scratch)?;
                let frame = self.scratch.get(HEADER_LEN..len)?;
                Some((frame.as_ptr(), frame.len()))
            }
        }
    }

    /// Writes the header into a buffer. One that is there already is left alone: its line need not travel.
    ///
    /// # Safety
    /// [`HEADER_LEN`] bytes from `to` on are mapped.
    #[inline(always)]
    unsafe fn head(&mut self, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.unreadable || !bulk::equal(to, HEADER.as_ptr(), HEADER_LEN) {
                self.unreadable = self.unreadable || bulk::equal(to, ONES.as_ptr(), HEADER_LEN);
                bulk::copy(to, HEADER.as_ptr(), HEADER_LEN);
            }
        }
    }

    /// Puts back the first `filled` of `ready` whole buffers with a packet in each, and the others as they were.
    #[inline(always)]
    fn put_whole(&mut self, filled: usize, ready: usize, packet: usize) {
        let written = u32::try_from(packet).unwrap_or(0);
        let ids = self.whole.iter().take(filled).map(|whole| whole.id);
        self.to_peer.ring.put_each(ids, written);
        if let Some(log) = &self.log {
            let filled = self.whole.iter().take(filled);
            log.wrote(self.window, filled.map(|whole| whole.ptr), packet);
        }
        if filled < ready {
            self.to_peer.ring.unget(ready - filled);
        }
    }

    /// Shows the frame in a buffer, and asks for the one in the next.
    #[inline(always)]
    fn show(&mut self, this: Whole, next: Option<Whole>, receive: &mut impl FnMut(&Frame)) {
        let len = (this.len as usize).saturating_sub(HEADER_LEN);
        if let Some(next) = next {
            bulk::fetch_next(next.ptr.wrapping_add(HEADER_LEN), len);
        }
        if (1..=MAX_FRAME).contains(&len) {
            // SAFETY: `take` found the whole buffer in the window.
            receive(&unsafe { Frame::new(this.ptr.wrapping_add(HEADER_LEN), len) });
        } else {
            self.dropped += 1;
        }
    }

    /// Receives frames that are in pieces.
    #[inline(never)]
    fn rx_pieces(
        &mut self,
        count: usize,
        receive: &mut impl FnMut(&Frame),
    ) -> Result<usize, Error> {
        let n = self.take_pieces(count)?;
        if n == 0 {
            return Ok(0);
        }
        for i in 0..n {
            match self.piece(i) {
                Some((from, len)) if (1..=MAX_FRAME).contains(&len) => {
                    // SAFETY: `len` bytes are there, in the window or in our own memory.
                    receive(&unsafe { Frame::new(from, len) });
                }
                _ => self.dropped += 1,
            }
        }
        let ring = &mut self.from_peer.ring;
        ring.put_read(self.chains.get(..n).unwrap_or_default());
        self.received();
        Ok(n)
    }

    /// Receives fewer frames than a group. Beside the path of bursts, whose code it would spread.
    #[inline(never)]
    fn rx_group(&mut self, count: usize, receive: &mut impl FnMut(&Frame)) -> Result<usize, Error> {
        if self.shown == self.got {
            let vring = &mut self.from_peer;
            let most = (GROUP, false);
            let got = take(vring, self.window, &mut self.whole, most, fetch_to_read)?;
            if got == 0 {
                return self.rx_pieces(count, receive);
            }
            for (came, whole) in self.came.iter_mut().zip(self.whole.iter()) {
                *came = *whole;
            }
            (self.shown, self.got) = (0, got);
        }
        let first = self.shown;
        let end = self.got.min(first + count);
        while self.shown < end {
            let at = self.shown;
            let next = self.came.get(at + 1).filter(|_| at + 1 < self.got);
            if let Some(&this) = self.came.get(at) {
                self.show(this, next.copied(), receive);
            }
            self.shown += 1;
        }
        if self.shown == self.got {
            self.put_shown();
        }
        Ok(self.shown - first)
    }

    /// Puts the chains back that were shown.
    #[inline(always)]
    fn put_shown(&mut self) {
        let shown = self.came.iter().take(self.shown);
        let ring = &mut self.from_peer.ring;
        ring.put_read_each(shown.map(|whole| whole.id));
        self.received();
    }

    /// Frames were looked at, and their chains put back.
    #[inline(always)]
    fn received(&mut self) {
        let wanted = self.from_peer.publish();
        if wanted {
            self.from_peer.call.notify();
        }
        self.notices[1].count(wanted);
        if let Some(log) = &self.log {
            log.ring(1);
        }
    }

    /// Ends the use of both rings: chains that were shown go back, those that were not are left to whoever comes next. Returns where the rings are
    /// (VHOST_USER_GET_VRING_BASE).
    pub fn end(&mut self) -> [u32; 2] {
        if self.shown < self.got {
            self.from_peer.ring.unget(self.got - self.shown);
            self.put_shown();
            (self.shown, self.got) = (0, 0);
        }
        [self.to_peer.ring.base(), self.from_peer.ring.base()]
    }
}

/// Where `len` bytes are that a buffer of the peer must hold.
#[inline(always)]
fn place(window: Linear, buffer: Buffer, len: usize, device_writes: bool) -> Option<*mut u8> {
    let fits = buffer.len as usize >= len && buffer.device_writes == device_writes;
    if fits {
        window.ptr(buffer.addr, len)
    } else {
        None
    }
}

/// The buffers of a chain.
#[inline(always)]
pub(crate) fn pieces<'a>(buffers: &'a [Buffer], chain: &Chain) -> &'a [Buffer] {
    let first = usize::from(chain.first);
    let end = first + usize::from(chain.count);
    buffers.get(first..end).unwrap_or(&[])
}

/// How many bytes the device may write into a chain.
fn room(pieces: &[Buffer]) -> usize {
    let writable = pieces.iter().filter(|piece| piece.device_writes);
    writable.map(|piece| piece.len as usize).sum()
}

/// Copies into the pieces of a chain; returns what did not fit.
fn scatter<'a>(window: Linear, pieces: &[Buffer], mut packet: &'a [u8]) -> &'a [u8] {
    for piece in pieces.iter().filter(|piece| piece.device_writes) {
        let (now, rest) = packet.split_at(packet.len().min(piece.len as usize));
        // The ring code checked the whole piece already.
        if let Some(to) = window.ptr(piece.addr, now.len()) {
            // SAFETY: `ptr` checked the range; `now` is our own memory.
            unsafe { bulk::copy(to, now.as_ptr(), now.len()) };
        }
        packet = rest;
    }
    packet
}

/// Copies a packet out of the pieces of a chain; `None` where it is longer than `packet`.
fn gather(window: Linear, pieces: &[Buffer], packet: &mut [u8]) -> Option<usize> {
    let mut at = 0usize;
    for piece in pieces.iter().filter(|piece| !piece.device_writes) {
        let len = piece.len as usize;
        let to = packet.get_mut(at..at.checked_add(len)?)?;
        let from = window.ptr(piece.addr, len)?;
        // SAFETY: `ptr` checked the range; `to` is our own memory.
        unsafe { bulk::copy(to.as_mut_ptr(), from, len) };
        at += len;
    }
    Some(at)
}

impl<V: DeviceRing, N: Notify> Port for PeerPort<V, N> {
    #[inline(always)]
    fn tx_burst(
        &mut self,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        let (len, count) = (len.min(MAX_FRAME), count.min(MAX_BURST));
        if self.offload.is_some() {
            return self.tx_with_header(Header::NONE, count, len, &mut build);
        }
        let packet = HEADER_LEN + len;
        let fetch = |to: *mut u8, _| {
            bulk::fetch(to, HEADER_LEN);
            bulk::fetch_to_write(to.wrapping_add(HEADER_LEN), len);
        };
        let vring = &mut self.to_peer;
        let ready = match self.spreading {
            // One chain a frame was not enough last time.
            true => 0,
            false => take(vring, self.window, &mut self.whole, (count, true), fetch)?,
        };
        self.spreading = false;
        let mut sent = 0;
        // As long as each frame fits into the next whole buffer.
        let mut fits = true;
        while sent < count {
            let next = self.whole.get(sent).copied().unwrap_or(NOTHING);
            let to = if fits && sent < ready && next.len as usize >= packet {
                // SAFETY: `take` found the whole buffer in the window, and header and frame fit in it.
                unsafe { self.head(next.ptr) };
                next.ptr.wrapping_add(HEADER_LEN)
            } else {
                if fits {
                    fits = false;
                    self.put_whole(sent, ready, packet);
                    if sent == ready && ready > 0 {
                        break;
                    }
                }
                match self.stage(len)? {
                    Some(to) => to,
                    None => break,
                }
            };
            if let Some(next) = self.whole.get(sent + 1).filter(|_| sent + 1 < ready) {
                bulk::fetch_next_to_write(next.ptr.wrapping_add(HEADER_LEN), len);
            }
            // SAFETY: `len` bytes from `to` on are in a buffer of the peer or in our own memory.
            build(sent, &mut unsafe { Slot::new(to, len) });
            sent += 1;
            if !fits {
                self.send_staged(len);
            }
        }
        if fits {
            self.put_whole(sent, ready, packet);
        }
        self.to_peer.ring.unget(self.taken - self.at);
        (self.at, self.taken) = (0, 0);
        let wanted = self.to_peer.publish();
        if wanted {
            self.to_peer.call.notify();
        }
        if sent > 0 {
            self.notices[0].count(wanted);
        }
        if let Some(log) = &self.log {
            log.ring(0);
        }
        Ok(sent)
    }

    fn offloads(&self) -> Offloads {
        let offload = self.offload.as_ref();
        offload.map_or(Offloads::default(), |offload| offload.send)
    }

    // Beside the path of frames that leave nothing to the peer, whose code it would spread.
    #[inline(never)]
    fn tx_offloaded(
        &mut self,
        header: &Header,
        count: usize,
        len: usize,
        mut build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, Error> {
        let header = self.offloads().check_segment(header, len);
        self.tx_with_header(header.ok_or(Error::Offload)?, count, len, &mut build)
    }

    #[inline(always)]
    fn rx_burst(&mut self, count: usize, mut receive: impl FnMut(&Frame)) -> Result<usize, Error> {
        if self.offload.is_some() {
            return self.rx_with_headers(count, &mut receive);
        }
        let count = count.min(MAX_BURST);
        if (1..GROUP).contains(&count) || self.shown < self.got {
            return self.rx_group(count, &mut receive);
        }
        let vring = &mut self.from_peer;
        let most = (count, false);
        let n = take(vring, self.window, &mut self.whole, most, fetch_to_read)?;
        if n == 0 {
            return self.rx_pieces(count, &mut receive);
        }
        for i in 0..n {
            let this = self.whole.get(i).copied().unwrap_or(NOTHING);
            let next = self.whole.get(i + 1).filter(|_| i + 1 < n).copied();
            self.show(this, next, &mut receive);
        }
        let ring = &mut self.from_peer.ring;
        ring.put_read_each(self.whole.iter().take(n).map(|whole| whole.id));
        self.received();
        Ok(n)
    }

    fn whole(&self) -> bool {
        match &self.generation {
            Some(generation) => generation.holds(),
            None => self.from_peer.ring.present(),
        }
    }

    fn drained(&mut self) -> Result<bool, Error> {
        Ok(true) // what was sent lies in the front-end's own memory
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        // A ring whose kicks do not arrive has to be polled: say that there is something to look at.
        let left = self.shown < self.got;
        let rx = rx && (left || self.from_peer.ring.enable_kicks() || !self.from_peer.kicks);
        let tx = tx && (self.to_peer.ring.enable_kicks() || !self.to_peer.kicks);
        self.log_rings();
        rx || tx
    }

    fn disarm(&mut self) {
        self.from_peer.ring.disable_kicks();
        self.to_peer.ring.disable_kicks();
        self.log_rings();
    }

    fn notices(&self) -> [Notices; 2] {
        self.notices
    }
}

//! The vhost-pci driver: plays the vhost-user back-end of a virtio-net front-end (docs/device.md, and the vhost-user
//! specification).

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;

use virtqueue::linear::{Linear, LinearRegion};
use virtqueue::net::{
    F_CTRL_VQ, F_GUEST_ANNOUNCE, F_MQ, F_MRG_RXBUF, F_STATUS, GUEST_OFFLOADS, HOST_OFFLOADS,
    features,
};
use virtqueue::packed::Packed;
use virtqueue::rss;
use virtqueue::split::{self, Split};
use virtqueue::{Buffer, DriverRing, Layout, Memory, Region as _, RingConfig, Used};

use crate::dirty::{self, DirtyLog, F_LOG_ALL, PortLog};
use crate::inflight::{self, Record};
use crate::pci::Function;
use crate::peer::{Generation, PeerPort, Vring};
use crate::port::{Either, Frame};
use crate::steering;
use crate::vhost_user::{self as proto, MAX_MESSAGE, Message, request};
use crate::virtio_pci::{Doorbell, Error, Notify, Transport};
use crate::{Dma, Platform};

/// Device type of vhost-pci.
pub const DEVICE_TYPE: u16 = 61;

const CONFIG_STATUS: usize = 0;
const CONFIG_MAX_QUEUES: usize = 4;
const STATUS_BACKEND_UP: u32 = 1 << 0;
const STATUS_FRONTEND_UP: u32 = 1 << 1;

const RXQ: u16 = 0;
const TXQ: u16 = 1;
const CONTROL_QUEUE_SIZE: u16 = 16;
const REPLY_LEN: usize = proto::HEADER + 8;
/// From one transmit buffer to the next: a reply needs less, [`Junk`] takes it all.
const TX_STRIDE: usize = 64;

/// The most queue pairs that this driver serves.
pub const MAX_PAIRS: usize = 16;
/// Vrings of these: rx and tx of each.
const VRINGS: usize = 2 * MAX_PAIRS;
/// Most regions of a front-end's memory table.
const MAX_REGIONS: usize = 32;

/// In the first page of the second window, each a le64: first the generation; where the record of what is in flight is, and how long it can be.
const RECORDS_PAGE: usize = 4096;
const RECORDS_INFLIGHT: usize = 8;
const RECORDS_INFLIGHT_LEN: usize = 16;
/// The same of the log.
const RECORDS_LOG: usize = 24;
const RECORDS_LOG_LEN: usize = 32;

/// What a front-end may negotiate with this back-end, whoever uses it.
const FEATURES: u64 = features::VERSION_1
    | features::EVENT_IDX
    | features::IN_ORDER
    | features::RING_PACKED
    | features::ACCESS_PLATFORM
    | F_MRG_RXBUF
    | F_STATUS
    | F_CTRL_VQ
    | F_MQ
    | F_GUEST_ANNOUNCE
    | proto::F_PROTOCOL_FEATURES;
const PROTOCOL_FEATURES: u64 = proto::PROTOCOL_F_MQ
    | proto::PROTOCOL_F_RARP
    | proto::PROTOCOL_F_REPLY_ACK
    | proto::PROTOCOL_F_CONFIGURE_MEM_SLOTS;

/// What a caller decides of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// How many queue pairs at most; at least one is served, and the front-end is told so.
    pub pairs: usize,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// That frames to a front-end with several pairs go where [`VhostPci::steer`] says.
    pub rss: bool,
    /// What the caller can make of frames whose checksum or segmentation is left to it, and what it would like to leave to the front-end: any of
    /// [`HOST_OFFLOADS`] and [`GUEST_OFFLOADS`].
    pub offloads: u64,
}

impl Default for Offer {
    /// What a caller can leave to this driver.
    fn default() -> Self {
        Self {
            pairs: MAX_PAIRS,
            indirect: true,
            rss: false,
            offloads: 0,
        }
    }
}

impl Offer {
    /// What a front-end may negotiate.
    fn features(&self) -> u64 {
        let indirect = if self.indirect {
            features::INDIRECT_DESC
        } else {
            0
        };
        FEATURES | indirect | self.offloads & (HOST_OFFLOADS | GUEST_OFFLOADS)
    }
}

/// The data path over rings of one layout.
pub type Ports<L> = PeerPort<<L as Layout>::Device<Linear>, Doorbell>;
/// The data path over rings of the layout that was negotiated.
pub type VhostPciPort = Either<Ports<Split>, Ports<Packed>>;

/// Junk for the front-end, for whoever studies what it does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Junk {
    /// A reply to a request that was not made.
    Reply,
    /// A request.
    Request,
    /// Less than a header.
    Short,
    /// A header that says more than comes.
    Long,
    /// Random bytes.
    Garbage,
}

/// A region of the front-end's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    guest: u64,
    size: u64,
    user: u64,
}

impl Region {
    const BYTES: usize = 32;

    fn parse(message: &Message, offset: usize) -> Option<Self> {
        let word = |i: usize| message.u64(offset + 8 * i);
        Some(Self {
            guest: word(0)?,
            size: word(1)?,
            user: word(2)?,
        })
    }
}

/// What the front-end has said of one of its rings.
#[derive(Clone, Copy, Debug, Default)]
struct VringState {
    size: u32,
    base: Option<u32>,
    /// User addresses of the descriptor, used and available areas.
    addr: Option<[u64; 3]>,
    /// Where the used area is in the log, if it is to be logged.
    log: Option<u64>,
    /// A kick message has come; and whether kicks interrupt.
    started: Option<bool>,
    enabled: bool,
}

/// What a look at the control path found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Nothing new.
    Same,
    /// The rings can be used: [`VhostPci::port`] is there.
    Up,
    /// The rings are gone.
    Down,
}

/// Everything that belongs to one connection; a new one starts from nothing.
#[derive(Debug, Default)]
struct Connection {
    regions: Vec<Region>,
    vrings: [VringState; VRINGS],
    features: u64,
    /// How the front-end wants frames to be steered.
    rss: Option<Box<rss::Config>>,
    /// Bytes of the log that the second window shows.
    log: Option<u64>,
    /// What the record of what is in flight is for.
    inflight: Option<inflight::Area>,
}

/// The driver of a vhost-pci device.
#[derive(Debug)]
pub struct VhostPci {
    transport: Transport,
    window: Linear,
    /// The page of the device's in the second window.
    page: Option<LinearRegion>,
    /// Where the device shows the front-end's log.
    log: Option<Linear>,
    /// Where it shows the record of what is in flight.
    inflight: Option<Linear>,
    /// The address of a front-end that has moved, and of which the network is to hear.
    announcement: Option<[u8; 6]>,
    rxq: Control,
    txq: Control,
    /// For each vring that the device has, where its doorbells are: call and error.
    doorbells: Vec<[u16; 2]>,
    offer: Offer,
    connection: Connection,
    /// The data path of each pair, while its rings are started and enabled.
    ports: Box<[Option<VhostPciPort>]>,
    message: Vec<u8>,
}

/// A control queue with its buffers, one for each descriptor.
#[derive(Debug)]
struct Control {
    ring: split::Driver<Linear>,
    pool: Dma,
    memory: Linear,
    stride: usize,
    doorbell: Doorbell,
    /// Which buffer a descriptor id stands for.
    buffer_of: Vec<u16>,
    free: Vec<u16>,
}

impl Control {
    fn new<P: Platform>(
        platform: &P,
        transport: &Transport,
        memory: Linear,
        index: u16,
        stride: usize,
    ) -> Result<Self, Error> {
        let config = transport.add_queue::<P, Split>(platform, index, CONTROL_QUEUE_SIZE)?;
        let size = config.size;
        let pool = platform
            .dma(usize::from(size) * stride, 64)
            .ok_or(Error::Memory)?;
        Ok(Self {
            ring: split::Driver::new(memory, &config)?,
            pool,
            memory,
            stride,
            doorbell: transport.doorbell(index)?,
            buffer_of: vec![0; usize::from(size)],
            free: (0..size).collect(),
        })
    }

    fn addr(&self, buffer: u16) -> u64 {
        self.pool.addr + (usize::from(buffer) * self.stride) as u64
    }

    fn add(&mut self, buffer: u16, len: usize, device_writes: bool) {
        let piece = Buffer {
            addr: self.addr(buffer),
            len: u32::try_from(len).unwrap_or(0),
            device_writes,
        };
        match self
            .ring
            .add(&[piece])
            .and_then(|id| self.buffer_of.get_mut(usize::from(id)))
        {
            Some(slot) => *slot = buffer,
            None => self.free.push(buffer),
        }
    }

    fn publish(&mut self) {
        if self.ring.publish() {
            self.doorbell.notify();
        }
    }

    /// Takes one used buffer: its number and how much was written.
    fn take(&mut self) -> Result<Option<(u16, usize)>, virtqueue::Error> {
        let mut used = [Used::default()];
        let n = self.ring.take(&mut used)?;
        let buffer = self
            .buffer_of
            .get(usize::from(used[0].id))
            .copied()
            .unwrap_or(0);
        Ok((n == 1).then_some((buffer, used[0].len as usize)))
    }

    /// Gives all free buffers to the device.
    fn fill(&mut self) {
        while let Some(buffer) = self.free.pop() {
            self.add(buffer, self.stride, true);
        }
        self.publish();
    }
}

impl VhostPci {
    /// Sets the device up and starts it; from then on [`VhostPci::service`] has to be called when there are interrupts, or often.
    ///
    /// `memory` is how the driver reaches the memory that [`Platform::dma`] gives, by device address.
    pub fn new<P: Platform>(
        platform: &P,
        function: Function,
        memory: Linear,
    ) -> Result<Self, Error> {
        Self::with_offer(platform, function, memory, Offer::default())
    }

    /// As [`VhostPci::new`], with an offer of the caller's.
    #[allow(unsafe_code)] // one block: the window becomes memory that rings can lie in
    pub fn with_offer<P: Platform>(
        platform: &P,
        function: Function,
        memory: Linear,
        offer: Offer,
    ) -> Result<Self, Error> {
        let transport = Transport::new(platform, function)?;
        transport.negotiate(|offered| {
            let usable = features::VERSION_1 | features::ACCESS_PLATFORM;
            (offered & features::VERSION_1 != 0).then_some(offered & usable)
        })?;
        let mapped = |id| {
            let bar = transport.shared_memory(id)?;
            let base = platform.map(bar.addr, bar.size)?;
            // SAFETY: the platform mapped the whole window, for ever; it holds nothing of Rust's.
            Some(unsafe { Linear::new(base.as_ptr(), 0, bar.size) })
        };
        let window = mapped(0).ok_or(Error::Structure("window"))?;
        let records = mapped(1);
        let page = records.and_then(|records| records.region(0, RECORDS_PAGE, 8));
        let part = |at, len| records.and_then(|records| part_of(records, at, len));
        let log = part(RECORDS_LOG, RECORDS_LOG_LEN);
        let inflight = part(RECORDS_INFLIGHT, RECORDS_INFLIGHT_LEN);
        let mut rxq = Control::new(platform, &transport, memory, RXQ, MAX_MESSAGE)?;
        let txq = Control::new(platform, &transport, memory, TXQ, TX_STRIDE)?;
        let vrings = transport.device().read_u32(CONFIG_MAX_QUEUES);
        let pairs = usize::try_from(vrings).map_or(MAX_PAIRS, |n| (n / 2).min(MAX_PAIRS));
        let pairs = pairs.min(offer.pairs);
        if pairs == 0 {
            return Err(Error::Structure("second vhost queue"));
        }
        let doorbells = (0u16..).take(2 * pairs).map(|i| [2 + 2 * i, 3 + 2 * i]);
        let doorbells: Vec<_> = doorbells.collect();
        for &[call, _] in &doorbells {
            transport.connect_vector(call)?;
        }
        transport.start();
        rxq.fill();
        let device = Self {
            transport,
            window,
            page,
            log,
            inflight,
            announcement: None,
            rxq,
            txq,
            doorbells,
            offer,
            connection: Connection::default(),
            ports: (0..pairs).map(|_| None).collect(),
            message: vec![0; MAX_MESSAGE],
        };
        device.invite();
        Ok(device)
    }

    /// The data path of the first pair, while the front-end's rings can be used.
    pub fn port(&mut self) -> Option<&mut VhostPciPort> {
        self.pair(0)
    }

    /// The data path of a pair, while its rings can be used: the front-end may take a pair out of use and put it back.
    pub fn pair(&mut self, index: usize) -> Option<&mut VhostPciPort> {
        self.ports.get_mut(index)?.as_mut()
    }

    /// On which pair a frame that begins so goes to the front-end ([`steering::pair`]); `None` where the front-end leaves that to its back-end.
    #[inline(always)]
    #[must_use]
    pub fn steer(&self, headers: &[u8]) -> Option<usize> {
        let config = self.connection.rss.as_deref()?;
        Some(steering::pair(config, headers).into())
    }

    /// How many pairs this driver serves on this device.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.ports.len()
    }

    /// What the front-end's driver negotiated.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.connection.features
    }

    /// The Ethernet address that the back-end is to announce in its network with a RARP frame, because its front-end has moved
    /// (VHOST_USER_SEND_RARP); once each time.
    pub fn take_announcement(&mut self) -> Option<[u8; 6]> {
        self.announcement.take()
    }

    /// Deals with what has come. `config_changed`: a configuration interrupt came since the last call; without one, this costs
    /// one look at a line of our own memory.
    pub fn service(&mut self, config_changed: bool) -> Result<Link, Error> {
        let before = self.is_up();
        let mut dropped = false;
        if config_changed {
            if self.transport.needs_reset() {
                return Err(Error::Reset);
            }
            let status = self.transport.device().read_u32(CONFIG_STATUS);
            if status & (STATUS_BACKEND_UP | STATUS_FRONTEND_UP) == 0 {
                self.forget()?;
                dropped = true;
            }
        }
        let mut handled = false;
        // Not more than a ringful at a time, however fast the front-end talks.
        for _ in 0..CONTROL_QUEUE_SIZE {
            // A message stays where it is until there is a buffer for its reply.
            if !self.can_reply()? {
                break;
            }
            let Some((buffer, len)) = self.rxq.take()? else {
                break;
            };
            self.handle(buffer, len)?;
            self.rxq.add(buffer, MAX_MESSAGE, true);
            handled = true;
        }
        if handled {
            self.rxq.publish();
        }
        Ok(match (before, self.is_up()) {
            (false, true) => Link::Up,
            (true, false) => Link::Down,
            (true, true) if dropped => Link::Up,
            _ => Link::Same,
        })
    }

    /// Takes the rings out of use because the front-end broke a rule, and tells it (VHOST_USER_SET_VRING_ERR).
    pub fn give_up(&mut self) {
        self.stop();
        for ([_, error], vring) in self.doorbells.iter().zip(&self.connection.vrings) {
            if vring.started.is_some()
                && let Ok(doorbell) = self.transport.doorbell(*error)
            {
                doorbell.notify();
            }
        }
    }

    /// Ends the connection and resets the device: it touches no memory of the driver's any more, and shows nothing.
    pub fn shut_down(self) -> Result<(), Error> {
        self.transport.reset()
    }

    /// Whether the first pair can be used: without it there is no connection to speak of.
    fn is_up(&self) -> bool {
        self.ports.first().is_some_and(Option::is_some)
    }

    /// Where the rings of the front-end's first pair lie in the window: receive, transmit. `None` where it has not said.
    #[must_use]
    pub fn rings(&self) -> Option<[RingConfig; 2]> {
        if self.packed() {
            Some([self.ring::<Packed>(0)?, self.ring::<Packed>(1)?])
        } else {
            Some([self.ring::<Split>(0)?, self.ring::<Split>(1)?])
        }
    }

    /// Whether the front-end's rings are packed.
    #[must_use]
    pub fn packed(&self) -> bool {
        self.connection.features & features::RING_PACKED != 0
    }

    /// The window, by its offsets.
    #[must_use]
    pub fn window(&self) -> Linear {
        self.window
    }

    /// The register that interrupts the front-end for a ring: 2p for the receive ring of pair p, 2p + 1 for its transmit ring.
    pub fn call(&self, ring: usize) -> Result<Doorbell, Error> {
        let [call, _] = self.doorbells.get(ring).ok_or(Error::Queue(u16::MAX))?;
        self.transport.doorbell(*call)
    }

    /// Sends junk where the front-end expects messages; `random` is what varies in it. `false` where no buffer is free now.
    pub fn send_junk(&mut self, junk: Junk, random: u64) -> Result<bool, Error> {
        let mut bytes = [0; TX_STRIDE];
        for (i, chunk) in (0u32..).zip(bytes.chunks_exact_mut(8)) {
            chunk.copy_from_slice(&random.rotate_left(7 * i).to_le_bytes());
        }
        let (request, flags, len) = match junk {
            Junk::Reply => (
                request::GET_FEATURES,
                proto::VERSION | proto::REPLY,
                REPLY_LEN,
            ),
            Junk::Request => (request::SET_FEATURES, proto::VERSION, REPLY_LEN),
            Junk::Short => (request::GET_FEATURES, proto::VERSION, proto::HEADER - 5),
            Junk::Long => (request::GET_FEATURES, proto::VERSION, TX_STRIDE),
            Junk::Garbage => (0, 0, TX_STRIDE),
        };
        if junk != Junk::Garbage {
            let size: u32 = if junk == Junk::Long { u32::MAX / 3 } else { 8 };
            for (to, field) in bytes.chunks_exact_mut(4).zip([request, flags, size]) {
                to.copy_from_slice(&field.to_le_bytes());
            }
        }
        self.send(bytes.get(..len).unwrap_or(&bytes))
    }

    /// Lets the device connect to a front-end.
    fn invite(&self) {
        self.transport
            .device()
            .write_u32(CONFIG_STATUS, STATUS_BACKEND_UP);
    }

    /// The front-end is gone: its messages and rings with it. Ready for the next.
    fn forget(&mut self) -> Result<(), Error> {
        self.stop();
        while let Some((buffer, _)) = self.rxq.take()? {
            self.rxq.free.push(buffer);
        }
        self.rxq.fill();
        self.connection = Connection::default();
        self.invite();
        Ok(())
    }

    /// Takes all rings out of use, remembering where they were.
    fn stop(&mut self) {
        for pair in 0..self.ports.len() {
            self.stop_pair(pair);
        }
    }

    /// Takes the rings of the pair of a vring out of use.
    fn stop_vring(&mut self, index: u32) {
        if let Ok(index) = usize::try_from(index) {
            self.stop_pair(index / 2);
        }
    }

    fn stop_pair(&mut self, pair: usize) {
        let Some(mut port) = self.ports.get_mut(pair).and_then(Option::take) else {
            return;
        };
        let bases = match &mut port {
            Either::Split(port) => port.end(),
            Either::Packed(port) => port.end(),
        };
        let vrings = self.connection.vrings.iter_mut().skip(2 * pair);
        for (vring, base) in vrings.zip(bases) {
            vring.base = Some(base);
        }
    }

    /// Copies a message out of its buffer and does what it says.
    fn handle(&mut self, buffer: u16, len: usize) -> Result<(), Error> {
        let mut bytes = core::mem::take(&mut self.message);
        let len = len.min(MAX_MESSAGE);
        let copied = read(self.rxq.memory, self.rxq.addr(buffer), &mut bytes[..len]);
        // What is no message cannot be answered: the device lets none through.
        let reply = if copied {
            Message::parse(&bytes[..len]).and_then(|message| self.answer(&message))
        } else {
            None
        };
        self.message = bytes;
        match reply {
            Some(reply) => self.send(&reply).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Does what a message asks; the reply, where it gets one.
    fn answer(&mut self, message: &Message) -> Option<[u8; REPLY_LEN]> {
        let value = |value: u64| Some(proto::reply(message.request, &value.to_le_bytes()));
        match message.request {
            request::GET_FEATURES => {
                value(self.offer.features() | where_there(self.log, F_LOG_ALL))
            }
            request::GET_PROTOCOL_FEATURES => {
                let rss = if self.offer.rss {
                    proto::PROTOCOL_F_RSS
                } else {
                    0
                };
                value(
                    PROTOCOL_FEATURES
                        | rss
                        | where_there(self.log, proto::PROTOCOL_F_LOG_SHMFD)
                        | where_there(self.inflight, proto::PROTOCOL_F_INFLIGHT_SHMFD),
                )
            }
            // Of a network device's queues, pairs are counted.
            request::GET_QUEUE_NUM => value(self.ports.len() as u64),
            request::SET_LOG_BASE => {
                self.connection.log = message.u64(0);
                self.follow_log();
                value(0)
            }
            request::GET_VRING_BASE => {
                let index = message.u32(0)?;
                self.stop_vring(index);
                let base = self.vring(index).map_or(0, |vring| {
                    vring.started = None;
                    vring.base.unwrap_or(0)
                });
                Some(proto::reply(
                    message.request,
                    &(u64::from(base) << 32 | u64::from(index)).to_le_bytes(),
                ))
            }
            _ => {
                let done = self.apply(message).is_some();
                self.try_start();
                if message.wants_ack() {
                    value(u64::from(!done))
                } else {
                    None
                }
            }
        }
    }

    /// Does what a message without a reply of its own asks; `None` where it cannot be done.
    fn apply(&mut self, message: &Message) -> Option<()> {
        match message.request {
            request::SET_FEATURES => {
                self.connection.features = message.u64(0)?;
                self.follow_log();
            }
            request::SET_INFLIGHT_FD => {
                self.connection.inflight = Some(inflight::Area {
                    queues: message.u16(16)?,
                    queue_size: message.u16(18)?,
                });
            }
            request::SEND_RARP => {
                let [address @ .., _, _] = message.u64(0)?.to_le_bytes();
                self.announcement = Some(address);
            }
            request::SET_OWNER
            | request::SET_LOG_FD
            | request::SET_PROTOCOL_FEATURES
            | request::SET_VRING_CALL
            | request::SET_VRING_ERR => {}
            request::SET_MEM_TABLE => {
                let count = usize::try_from(message.u32(0)?)
                    .ok()
                    .filter(|&count| count <= MAX_REGIONS)?;
                self.connection.regions = (0..count)
                    .map(|i| Region::parse(message, 8 + i * Region::BYTES))
                    .collect::<Option<_>>()?;
            }
            request::ADD_MEM_REG => {
                let region = Region::parse(message, 8)?;
                let regions = &mut self.connection.regions;
                // Some front-ends say it once for each queue pair.
                if !regions.contains(&region) {
                    if regions.len() == MAX_REGIONS {
                        return None;
                    }
                    regions.push(region);
                }
            }
            request::REM_MEM_REG => {
                // The device has seen to it that there is none like it but this.
                let region = Region::parse(message, 8)?;
                self.connection.regions.retain(|&known| known != region);
            }
            request::SET_VRING_NUM => self.vring(message.u32(0)?)?.size = message.u32(4)?,
            request::SET_VRING_BASE => {
                self.stop_vring(message.u32(0)?);
                self.vring(message.u32(0)?)?.base = Some(message.u32(4)?);
            }
            request::SET_VRING_ADDR => {
                self.stop_vring(message.u32(0)?);
                let addr = [message.u64(8)?, message.u64(16)?, message.u64(24)?];
                let logged = message.u32(4)? & dirty::VRING_F_LOG != 0;
                let log = logged.then_some(message.u64(32)?);
                let vring = self.vring(message.u32(0)?)?;
                (vring.addr, vring.log) = (Some(addr), log);
            }
            request::SET_VRING_KICK => {
                let value = message.u64(0)?;
                let index = u32::try_from(value & 0xff).ok()?;
                self.vring(index)?.started = Some(value & proto::VRING_NO_FD == 0);
            }
            request::SET_VRING_ENABLE => {
                let enabled = message.u32(4)? != 0;
                if !enabled {
                    self.stop_vring(message.u32(0)?);
                }
                self.vring(message.u32(0)?)?.enabled = enabled;
            }
            request::SET_RSS if self.offer.rss => {
                let pairs = u16::try_from(self.ports.len()).ok()?;
                self.connection.rss = message.rss(pairs)?.map(Box::new);
            }
            _ => return None,
        }
        Some(())
    }

    fn vring(&mut self, index: u32) -> Option<&mut VringState> {
        let index = usize::try_from(index).ok()?;
        let known = self.doorbells.len();
        let vring = self.connection.vrings.get_mut(index);
        vring.filter(|_| index < known)
    }

    /// Makes the data path of each pair whose rings are both complete.
    fn try_start(&mut self) {
        for pair in 0..self.ports.len() {
            let made = match self.ports.get(pair) {
                Some(None) => self.make_port(pair),
                _ => None,
            };
            if let (Some(port), Some(made)) = (self.ports.get_mut(pair), made) {
                *port = Some(made);
            }
        }
    }

    fn make_port(&self, pair: usize) -> Option<VhostPciPort> {
        if self.connection.features & features::RING_PACKED != 0 {
            self.make_ports::<Packed>(pair).map(Either::Packed)
        } else {
            self.make_ports::<Split>(pair).map(Either::Split)
        }
    }

    fn make_ports<L: Layout>(&self, pair: usize) -> Option<Ports<L>> {
        let features = self.connection.features;
        let to_peer = self.make_vring::<L>(2 * pair)?;
        let from_peer = self.make_vring::<L>(2 * pair + 1)?;
        let mut port = PeerPort::new(self.window, features, to_peer, from_peer);
        port.watch(self.page.map(Generation::new));
        port.set_log(self.port_log::<L>(pair));
        Some(port)
    }

    /// Has the data paths log what they write, or not, as the front-end has said.
    fn follow_log(&mut self) {
        for pair in 0..self.ports.len() {
            let logs = [self.port_log::<Split>(pair), self.port_log::<Packed>(pair)];
            let [split, packed] = logs;
            match self.ports.get_mut(pair) {
                Some(Some(Either::Split(port))) => port.set_log(split),
                Some(Some(Either::Packed(port))) => port.set_log(packed),
                _ => {}
            }
        }
    }

    /// What the data path of a pair logs.
    fn port_log<L: Layout>(&self, pair: usize) -> Option<PortLog> {
        let len = self.connection.log?;
        if self.connection.features & F_LOG_ALL == 0 {
            return None;
        }
        let log = DirtyLog::new(self.log?, len);
        let ring = |index| self.logged_ranges::<L>(index).unwrap_or_default();
        Some(PortLog {
            log,
            rings: [ring(2 * pair), ring(2 * pair + 1)],
        })
    }

    /// What of a ring is logged.
    fn logged_ranges<L: Layout>(&self, index: usize) -> Option<[dirty::Range; 2]> {
        let config = self.ring::<L>(index)?;
        let used = self.connection.vrings.get(index)?.log?;
        let [desc, _, device] = L::area_sizes(config.size)?;
        // Used descriptors of a packed ring lie in the descriptor area, of whose address in the log no message speaks: it is the one in the window.
        let desc = if self.packed() { desc as u64 } else { 0 };
        Some([(used, device as u64), (config.desc, desc)])
    }

    fn make_vring<L: Layout>(&self, index: usize) -> Option<Vring<L::Device<Linear>, Doorbell>> {
        let state = self.connection.vrings.get(index)?;
        let negotiated = |bit| self.connection.features & bit != 0;
        let kicks = state.started?;
        if negotiated(proto::F_PROTOCOL_FEATURES) && !state.enabled {
            return None;
        }
        let config = self.ring::<L>(index)?;
        // A front-end that never sets a base means the start, which packed rings write in another way than zero.
        let base = match state.base {
            None => L::FRESH,
            Some(base) if negotiated(features::RING_PACKED) => both_halves(base),
            Some(base) => base,
        };
        // A split ring says itself how far it has been used.
        let (record, base) = match (self.inflight, self.connection.inflight) {
            (Some(memory), Some(area)) if self.packed() => {
                let window = self.window;
                let (record, base) = Record::open(memory, area, index, window, &config, base)?;
                (Some(record), base)
            }
            _ => (None, base),
        };
        let ring = L::device_at(self.window, &config, base).ok()?;
        let [call, _] = *self.doorbells.get(index)?;
        Some(Vring {
            ring,
            call: self.transport.doorbell(call).ok()?,
            kicks,
            record,
        })
    }

    /// Where a ring lies in the window, as far as the front-end has said.
    fn ring<L: Layout>(&self, index: usize) -> Option<RingConfig> {
        let state = self.connection.vrings.get(index)?;
        let negotiated = |bit| self.connection.features & bit != 0;
        let size = u16::try_from(state.size).ok()?;
        let areas = L::area_sizes(size)?;
        let [desc, used, avail] = state.addr?;
        // Behind an IOMMU, a ring's addresses are device addresses: offsets of the window, which the ring code checks.
        let area = |addr, len: usize| match negotiated(features::ACCESS_PLATFORM) {
            true => Some(addr),
            false => self.translate(addr, u64::try_from(len).ok()?),
        };
        Some(RingConfig {
            size,
            desc: area(desc, areas[0])?,
            driver: area(avail, areas[1])?,
            device: area(used, areas[2])?,
            event_idx: negotiated(features::EVENT_IDX),
            in_order: negotiated(features::IN_ORDER),
            indirect: negotiated(features::INDIRECT_DESC),
        })
    }

    /// The window's offset for a range of the front-end's user addresses.
    fn translate(&self, user: u64, len: u64) -> Option<u64> {
        self.connection.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.user)?;
            (offset.checked_add(len)? <= region.size).then(|| region.guest.checked_add(offset))?
        })
    }

    /// Whether a buffer is free for a message to send.
    fn can_reply(&mut self) -> Result<bool, Error> {
        if self.txq.free.is_empty() {
            while let Some((buffer, _)) = self.txq.take()? {
                self.txq.free.push(buffer);
            }
        }
        Ok(!self.txq.free.is_empty())
    }

    /// Sends a message; `false` where no buffer is free.
    fn send(&mut self, message: &[u8]) -> Result<bool, Error> {
        self.can_reply()?;
        let Some(buffer) = self.txq.free.pop() else {
            return Ok(false);
        };
        let written = write(self.txq.memory, self.txq.addr(buffer), message);
        if written {
            self.txq.add(buffer, message.len(), false);
            self.txq.publish();
        }
        Ok(written)
    }
}

/// Feature bits that are there where there is a place for what they need.
fn where_there(place: Option<Linear>, bits: u64) -> u64 {
    place.map_or(0, |_| bits)
}

/// The part of the second window of which these fields of its first page say where it is and how long.
#[allow(unsafe_code)] // one block: a part of it becomes memory of its own
fn part_of(records: Linear, at: usize, len: usize) -> Option<Linear> {
    let page = records.region(0, RECORDS_PAGE, 8)?;
    let [at, len] = [at, len].map(|field| page.load_u64(field, Relaxed));
    if len == 0 {
        return None;
    }
    let start = records.ptr(at, usize::try_from(len).ok()?)?;
    // SAFETY: `ptr` checked the range, which is as mapped as the whole is.
    Some(unsafe { Linear::new(start, 0, len) })
}

/// Copies out of a control buffer.
#[allow(unsafe_code)] // one block: a range that `Linear` checked
fn read(memory: Linear, addr: u64, to: &mut [u8]) -> bool {
    let Some(from) = memory.ptr(addr, to.len()) else {
        return false;
    };
    // SAFETY: `ptr` checked the range, which stays mapped.
    unsafe { Frame::new(from, to.len()) }.read(0, to)
}

/// Copies into a control buffer.
#[allow(unsafe_code)] // one block: a range that `Linear` checked
fn write(memory: Linear, addr: u64, from: &[u8]) -> bool {
    let Some(to) = memory.ptr(addr, from.len()) else {
        return false;
    };
    // SAFETY: `ptr` checked the range, which stays mapped; the buffer is not with the device.
    unsafe { crate::Slot::new(to, from.len()) }.write(0, from)
}

/// The base of a packed ring from a front-end that may have said only where the available half is.
///
/// DPDK's virtio-user leaves the upper half zero. No ring is there when the counter of the available half is set, unless
/// all its descriptors are with the device: then the halves are the same.
fn both_halves(base: u32) -> u32 {
    const WRAP: u32 = 1 << 15;
    if base >> 16 == 0 && base & WRAP != 0 {
        base | base << 16
    } else {
        base
    }
}

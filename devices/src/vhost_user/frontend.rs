//! The front-end's side of the protocol: a state machine over a [`Connection`] that never waits.
//!
//! Requests are sent ahead and a queue remembers which replies are owed, in the order in which they were asked for (the
//! protocol answers in order). Each reply is checked against the head of that queue; one that does not fit is a
//! [`Violation`] and the connection is to be dropped. How long a peer may take is the caller's decision:
//! [`Frontend::waits`] says whether something is owed.
//!
//! # Addresses
//!
//! The protocol gives ring addresses in "user addresses" of the front-end. Those that are sent here are **guest physical
//! addresses**, in the memory table and for the rings alike: a back-end needs no more than a consistent space, and the VMM's
//! own virtual addresses are none of its business.
//!
//! Where VIRTIO_F_ACCESS_PLATFORM was negotiated ring addresses are IO virtual, and [`Frontend::iotlb`] tells the back-end what those
//! lead to: guest physical addresses again, as user addresses of the memory table. The order on the wire is: features, the back-end's channel,
//! memory, translations, rings; a back-end may touch a ring as soon as it has its kick.

mod error;
mod iotlb;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtqueue::rss;
use vmm_sys_util::eventfd::EventFd;

pub use self::error::{Error, Violation};
pub use self::iotlb::MAX_IOTLB_OWED;
use super::channel::Channel;
use super::connection::Connection;
use super::wire::{
    MemoryRegion, MemoryTable, Message, Payload, SingleMemoryRegion, U64, VringAddr, VringFd,
    VringState, protocol_features, requests,
};
use super::{Inflight, InflightArea, VHOST_USER_F_PROTOCOL_FEATURES, sys};
use crate::host;
use crate::virtio::{F_ACCESS_PLATFORM, F_RING_PACKED};

/// The base of a packed ring that nobody has used yet (payload "vring descriptor indices for packed virtqueues"): the index of the
/// next available descriptor in bits 0 to 14 and that of the next used one in bits 16 to 30, both 0; the driver's wrap counter
/// in bit 15 and the device's in bit 31, both 1 (VIRTIO 1.3, section 2.8.1).
pub const PACKED_BASE: u32 = 0x8000_8000;

/// The protocol features that this front-end makes use of.
const PROTOCOL_FEATURES: u64 = protocol_features::MQ
    | protocol_features::REPLY_ACK
    | protocol_features::BACKEND_REQ
    | protocol_features::INFLIGHT_SHMFD
    | protocol_features::CONFIGURE_MEM_SLOTS
    | protocol_features::RSS;

/// How many regions SET_MEM_TABLE may have ("Multiple memory regions description").
const MAX_TABLE_REGIONS: u64 = 8;

/// What the handshake found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The back-end's feature bits, without VHOST_USER_F_PROTOCOL_FEATURES.
    pub features: u64,
    /// How many queues it serves as GET_QUEUE_NUM says (back-ends for a network device count pairs); 1 where it was
    /// not asked.
    pub queues: u64,
    /// Whether it steers frames by RSS ([`Frontend::steer`]).
    pub rss: bool,
}

/// A vring to start. Addresses are the device's: guest physical ones, or IO virtual ones where ACCESS_PLATFORM was negotiated. They are checked
/// to lead to memory that is shared.
#[derive(Clone, Debug)]
pub struct Vring {
    /// Its index.
    pub index: u8,
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor area.
    pub desc: u64,
    /// Driver area.
    pub driver: u64,
    /// Device area.
    pub device: u64,
    /// Where the back-end starts. Split layout: the next entry of the available ring, 16 bits; packed layout: see [`PACKED_BASE`].
    pub base: u32,
    /// Signalled by the driver.
    pub kick: Arc<EventFd>,
    /// Signalled by the back-end.
    pub call: Arc<EventFd>,
    /// Whether the back-end may use it from the start (SET_VRING_ENABLE); it has no meaning for one without protocol features.
    pub enabled: bool,
}

/// What [`Frontend::process`] reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The handshake is done: [`Frontend::start`] is possible.
    Ready(Offer),
    /// The back-end has taken everything that [`Frontend::start`] sent.
    Started,
    /// The back-end has stopped; for each vring its index and the base from which it would go on.
    Stopped(Vec<(u8, u32)>),
    /// The back-end has stopped the vring of this index ([`Frontend::stop_vring`]), and would go on from this base.
    VringStopped(u8, u32),
    /// The back-end has done what [`Frontend::enable_vrings`] asked for last.
    Enabled,
    /// Changes of translations are done.
    Iotlb(IotlbDone),
}

/// How far the back-end has carried out what [`Frontend::iotlb`] sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IotlbDone {
    /// The highest number among those that are done, which are all that were sent before the last of them.
    pub number: u64,
    /// How many answers of the back-end this is about.
    pub answers: u64,
    /// For those answers, the times from sending to answer, added up.
    pub waited: Duration,
}

/// A reply that is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owed {
    Features,
    ProtocolFeatures,
    QueueNum,
    MaxMemSlots,
    /// An acknowledgement of this request.
    Ack(u32),
    /// GET_FEATURES for the sake of its place in the order.
    Barrier,
    /// This request answers for vrings that are enabled or disabled, and is the last of them.
    Enabled(u32),
    /// The base of this vring, as one of all.
    Base(u8),
    /// The base of this vring, by itself.
    SingleBase(u8),
    /// The area for what is in flight.
    Inflight,
    /// A change of translations: this request answers for it and all before.
    Iotlb {
        request: u32,
        number: u64,
        since: Instant,
    },
}

impl Owed {
    fn request(self) -> u32 {
        match self {
            Self::Features | Self::Barrier => requests::GET_FEATURES,
            Self::ProtocolFeatures => requests::GET_PROTOCOL_FEATURES,
            Self::QueueNum => requests::GET_QUEUE_NUM,
            Self::MaxMemSlots => requests::GET_MAX_MEM_SLOTS,
            Self::Ack(request) | Self::Enabled(request) | Self::Iotlb { request, .. } => request,
            Self::Base(_) | Self::SingleBase(_) => requests::GET_VRING_BASE,
            Self::Inflight => requests::GET_INFLIGHT_FD,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Handshake,
    Ready,
    Starting,
    Running,
    Stopping,
}

/// The front-end's end of a connection. Dropping it closes the connection.
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    state: State,
    owed: VecDeque<Owed>,
    /// How many of those are about translations.
    iotlb_owed: usize,
    /// What is done and has not been reported.
    iotlb_done: Option<IotlbDone>,
    offer: Offer,
    /// VHOST_USER_F_PROTOCOL_FEATURES was offered.
    has_protocol_features: bool,
    /// The protocol features in use.
    protocol_features: u64,
    max_mem_slots: u64,
    /// The features that the back-end was told since the vrings stopped last.
    told: Option<u64>,
    memory_sent: bool,
    channel_sent: bool,
    /// Until its owner takes it.
    channel: Option<Channel>,
    /// The vrings that were started.
    vrings: Vec<u8>,
    /// Their layout.
    packed: bool,
    bases: Vec<(u8, u32)>,
    /// The vring that has just been stopped by itself.
    stopped: Option<(u8, u32)>,
    /// The back-end was told how to steer frames.
    steered: bool,
    /// The vrings have just been enabled and disabled as the caller wanted.
    enabled: bool,
    /// Where the back-end keeps what is in flight.
    inflight: Option<InflightArea>,
    /// Vrings that are to be started when that has come.
    waiting: Vec<Vring>,
}

impl AsRawFd for Frontend {
    fn as_raw_fd(&self) -> RawFd {
        self.connection.as_raw_fd()
    }
}

impl Frontend {
    /// Begins the handshake on a new connection.
    pub fn new(connection: Connection) -> Result<Self, Error> {
        let mut frontend = Self {
            connection,
            state: State::Handshake,
            owed: VecDeque::new(),
            iotlb_owed: 0,
            iotlb_done: None,
            offer: Offer {
                features: 0,
                queues: 1,
                rss: false,
            },
            has_protocol_features: false,
            protocol_features: 0,
            max_mem_slots: 0,
            told: None,
            memory_sent: false,
            channel_sent: false,
            channel: None,
            vrings: Vec::new(),
            packed: false,
            bases: Vec::new(),
            stopped: None,
            steered: false,
            enabled: false,
            inflight: None,
            waiting: Vec::new(),
        };
        frontend.ask(&Message::bare(requests::GET_FEATURES), Owed::Features)?;
        Ok(frontend)
    }

    /// What the back-end offers; `None` before [`Event::Ready`].
    #[must_use]
    pub fn offer(&self) -> Option<Offer> {
        (self.state != State::Handshake).then_some(self.offer)
    }

    /// Whether vrings are started, or about to be.
    #[must_use]
    pub fn is_started(&self) -> bool {
        matches!(self.state, State::Starting | State::Running)
    }

    /// Whether the back-end is still taking up what [`Frontend::start`] sent.
    #[must_use]
    pub fn is_starting(&self) -> bool {
        self.state == State::Starting
    }

    /// Whether this vring is started, or about to be.
    #[must_use]
    pub fn has_vring(&self, index: u8) -> bool {
        self.vrings.contains(&index) || self.waiting.iter().any(|vring| vring.index == index)
    }

    /// Whether the back-end keeps what is in flight where the next one finds it (INFLIGHT_SHMFD). Known after [`Event::Ready`].
    #[must_use]
    pub fn keeps_inflight(&self) -> bool {
        self.uses(protocol_features::INFLIGHT_SHMFD)
    }

    /// Hands over what the last back-end left, before [`Frontend::start`]. Where there is nothing the back-end is asked for a new area.
    pub fn resume(&mut self, inflight: InflightArea) {
        self.inflight = Some(inflight);
    }

    /// What the next back-end may be given, once this one is of no more use; `None` where it kept nothing, or where a vring was stopped by itself since: the
    /// area is about all of them.
    pub fn take_inflight(&mut self) -> Option<InflightArea> {
        self.inflight.take()
    }

    /// Whether the back-end owes a reply.
    #[must_use]
    pub fn waits(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Whether [`Frontend::process`] is to be called when the socket becomes writable, too.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Gets the back-end as far as it can get without vrings: it is told the driver's features and given `memory`, all of the guest's, which must
    /// not change as long as the connection lasts: it is sent once. So is the channel for the back-end's requests, where it is behind an
    /// IOMMU: [`Frontend::take_channel`]. May be called again; what has been said is not repeated.
    pub fn set_up(&mut self, features: u64, memory: &[host::MemoryRegion]) -> Result<(), Error> {
        if self.state != State::Ready {
            return Err(Error::State("setting up"));
        }
        let mut features = features & self.offer.features;
        self.packed = features & F_RING_PACKED != 0;
        if self.has_protocol_features {
            features |= VHOST_USER_F_PROTOCOL_FEATURES;
        }
        if self.told != Some(features) {
            self.told = Some(features);
            self.step(Message::request(requests::SET_FEATURES, &U64(features)))?;
        }
        let asks = features & F_ACCESS_PLATFORM != 0 && self.uses(protocol_features::BACKEND_REQ);
        if asks && !self.channel_sent {
            self.channel_sent = true;
            let (ours, theirs) = UnixStream::pair().map_err(Error::Channel)?;
            let ours = Connection::new(ours).map_err(Error::Channel)?;
            let message = Message::bare(requests::SET_BACKEND_REQ_FD);
            self.step(message.with_fds(vec![theirs.into()]))?;
            self.channel = Some(Channel::new(ours));
        }
        if !self.memory_sent {
            self.memory_sent = true;
            self.send_memory(memory)?;
        }
        Ok(())
    }

    /// The channel that [`Frontend::set_up`] opened, once.
    pub fn take_channel(&mut self) -> Option<Channel> {
        self.channel.take()
    }

    /// Starts vrings, after [`Frontend::set_up`], which it does by itself where it has not been done with these features.
    ///
    /// Where REPLY_ACK was negotiated every step is acknowledged and a refusal is a [`Violation::Refused`]; elsewhere a
    /// GET_FEATURES at the end tells that the back-end got that far.
    pub fn start(
        &mut self,
        features: u64,
        memory: &[host::MemoryRegion],
        vrings: &[Vring],
    ) -> Result<(), Error> {
        if self.state != State::Ready {
            return Err(Error::State("starting vrings"));
        }
        self.set_up(features, memory)?;
        self.state = State::Starting;
        if !self.keeps_inflight() {
            return self.start_all(vrings);
        }
        let description = Inflight {
            num_queues: vrings
                .iter()
                .map(|v| u16::from(v.index) + 1)
                .max()
                .unwrap_or(0),
            queue_size: vrings.iter().map(|v| v.size).max().unwrap_or(0),
            ..Inflight::default()
        };
        if self.inflight.is_some() {
            self.give_inflight()?;
            return self.start_all(vrings);
        }
        self.waiting = vrings.to_vec();
        let message = Message::request(requests::GET_INFLIGHT_FD, &description);
        self.ask(&message, Owed::Inflight)
    }

    fn start_all(&mut self, vrings: &[Vring]) -> Result<(), Error> {
        for vring in vrings {
            self.start_vring(vring)?;
        }
        if !self.acks() {
            self.ask(&Message::bare(requests::GET_FEATURES), Owed::Barrier)?;
        }
        Ok(())
    }

    /// Tells the back-end where to keep what is in flight.
    fn give_inflight(&mut self) -> Result<(), Error> {
        let Some(area) = &self.inflight else {
            return Ok(());
        };
        let fds = vec![duplicate(&*area.file)?];
        let message = Message::request(requests::SET_INFLIGHT_FD, &area.description);
        self.step(message.with_fds(fds))
    }

    /// The answer to GET_INFLIGHT_FD. An area without a length is none.
    fn got_inflight(&mut self, message: &mut Message) -> Result<(), Error> {
        let description: Inflight = decode(message)?;
        let mut fds = std::mem::take(&mut message.fds);
        let file = fds.pop();
        if !fds.is_empty() || file.is_some() != (description.mmap_size > 0) {
            return Err(Violation::Fds(message.request).into());
        }
        let waiting = std::mem::take(&mut self.waiting);
        // The vrings may have been stopped again meanwhile.
        if self.state != State::Starting {
            return Ok(());
        }
        self.inflight = file.map(|file| InflightArea {
            description,
            file: Arc::new(file),
        });
        self.give_inflight()?;
        self.start_all(&waiting)
    }

    /// Stops the vrings; [`Event::Stopped`] follows when the back-end has answered.
    pub fn stop(&mut self) -> Result<(), Error> {
        if !self.is_started() {
            return Err(Error::State("stopping vrings"));
        }
        self.state = State::Stopping;
        self.told = None;
        self.inflight = None;
        self.waiting.clear();
        let vrings = std::mem::take(&mut self.vrings);
        if self.has_protocol_features {
            for &index in &vrings {
                self.connection.send(&enable(index, false))?;
            }
        }
        for &index in &vrings {
            self.ask(&get_base(index), Owed::Base(index))?;
        }
        Ok(())
    }

    /// Stops one of the vrings while the others go on; [`Event::VringStopped`] follows when the back-end has answered. Then
    /// [`Frontend::start_vring`] may start it again.
    pub fn stop_vring(&mut self, index: u8) -> Result<(), Error> {
        if let Some(at) = self.waiting.iter().position(|vring| vring.index == index) {
            let vring = self.waiting.swap_remove(at);
            self.stopped = Some((index, vring.base));
            return Ok(());
        }
        let at = self.vrings.iter().position(|&vring| vring == index);
        let Some(at) = at.filter(|_| self.is_started()) else {
            return Err(Error::State("stopping a vring"));
        };
        self.inflight = None;
        self.vrings.swap_remove(at);
        if self.has_protocol_features {
            self.connection.send(&enable(index, false))?;
        }
        self.ask(&get_base(index), Owed::SingleBase(index))
    }

    /// Has the back-end steer frames by RSS, or as it likes: VIRTIO_NET_CTRL_MQ_RSS_CONFIG and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET on their way to where they mean something. What is
    /// asked for next is done behind it. Where [`Offer::rss`] is not set, there is nothing to do but for a caller who asks for RSS all the same.
    pub fn steer(&mut self, config: Option<&rss::Config>) -> Result<(), Error> {
        if config.is_none() && !self.steered {
            return Ok(());
        }
        if !self.uses(protocol_features::RSS) || self.state == State::Handshake {
            return Err(Error::State("steering frames"));
        }
        self.steered = config.is_some();
        let mut bytes = [0; rss::MAX_LEN];
        let payload = config.map_or(&[][..], |config| config.encode(&mut bytes));
        let mut message = Message::bare(requests::SET_RSS);
        message.payload = payload.to_vec();
        self.step(message)
    }

    /// Enables and disables vrings that are started; [`Event::Enabled`] follows when the back-end has done it: where REPLY_ACK was negotiated it
    /// says so, and elsewhere it answers a GET_FEATURES behind. A back-end without protocol features has nothing to enable
    /// ("Ring states"), which is an error of the caller.
    pub fn enable_vrings(&mut self, changes: &[(u8, bool)]) -> Result<(), Error> {
        if !self.is_started() || !self.has_protocol_features {
            return Err(Error::State("enabling vrings"));
        }
        for &(index, enabled) in changes {
            match self.waiting.iter_mut().find(|vring| vring.index == index) {
                Some(vring) => vring.enabled = enabled,
                None => self.step(enable(index, enabled))?,
            }
        }
        match self.owed.back_mut() {
            Some(last @ Owed::Ack(requests::SET_VRING_ENABLE)) if !changes.is_empty() => {
                *last = Owed::Enabled(requests::SET_VRING_ENABLE);
                Ok(())
            }
            _ => {
                let barrier = Message::bare(requests::GET_FEATURES);
                self.ask(&barrier, Owed::Enabled(requests::GET_FEATURES))
            }
        }
    }

    /// Sends and receives what is possible now. To be called again until it returns `None`.
    ///
    /// Any error but [`Error::State`] ends the conversation. The number of messages taken from the back-end is bounded by
    /// what it was asked.
    pub fn process(&mut self) -> Result<Option<Event>, Error> {
        self.connection.flush()?;
        loop {
            if let Some(event) = self.advance() {
                return Ok(Some(event));
            }
            match self.connection.receive()? {
                Some(message) => self.reply(message)?,
                // Together, for all that have come.
                None => return Ok(self.iotlb_done.take().map(Event::Iotlb)),
            }
        }
    }

    /// The state change that is due when nothing is owed any more but answers to changes of translations, which have no end.
    fn advance(&mut self) -> Option<Event> {
        if let Some((index, base)) = self.stopped.take() {
            return Some(Event::VringStopped(index, base));
        }
        if std::mem::take(&mut self.enabled) {
            return Some(Event::Enabled);
        }
        if self.owed.len() > self.iotlb_owed {
            return None;
        }
        match self.state {
            State::Handshake => {
                self.state = State::Ready;
                Some(Event::Ready(self.offer))
            }
            State::Starting => {
                self.state = State::Running;
                Some(Event::Started)
            }
            State::Stopping => {
                self.state = State::Ready;
                Some(Event::Stopped(std::mem::take(&mut self.bases)))
            }
            State::Ready | State::Running => None,
        }
    }

    /// Takes a message of the back-end, which must be the reply that is owed.
    fn reply(&mut self, mut message: Message) -> Result<(), Error> {
        let request = message.request;
        let owed = self.owed.pop_front().ok_or(Violation::Unasked(request))?;
        if matches!(owed, Owed::Iotlb { .. }) {
            self.iotlb_owed -= 1;
        }
        if request != owed.request() || !message.is_reply() {
            return Err(Violation::WrongReply {
                owed: owed.request(),
                got: request,
                flags: message.flags,
            }
            .into());
        }
        if !message.fds.is_empty() && owed != Owed::Inflight {
            return Err(Violation::Fds(request).into());
        }
        let message = &mut message;
        match owed {
            Owed::Features => self.got_features(decode::<U64>(message)?.0)?,
            Owed::ProtocolFeatures => self.got_protocol_features(decode::<U64>(message)?.0)?,
            Owed::QueueNum => match decode::<U64>(message)?.0 {
                0 => return Err(Violation::Value { request, value: 0 }.into()),
                queues => self.offer.queues = queues,
            },
            Owed::MaxMemSlots => self.max_mem_slots = decode::<U64>(message)?.0,
            Owed::Ack(_) => match decode::<U64>(message)?.0 {
                0 => {}
                value => {
                    if request == requests::SET_INFLIGHT_FD {
                        // It would be refused for ever.
                        self.inflight = None;
                    }
                    return Err(Violation::Refused { request, value }.into());
                }
            },
            Owed::Barrier => {
                decode::<U64>(message)?;
            }
            Owed::Enabled(_) => {
                let value = decode::<U64>(message)?.0;
                if request == requests::SET_VRING_ENABLE && value != 0 {
                    return Err(Violation::Refused { request, value }.into());
                }
                self.enabled = true;
            }
            Owed::Inflight => self.got_inflight(message)?,
            Owed::Base(index) => {
                let base = self.base(index, message)?;
                self.bases.push((index, base));
            }
            Owed::SingleBase(index) => self.stopped = Some((index, self.base(index, message)?)),
            Owed::Iotlb { number, since, .. } => {
                let value = decode::<U64>(message)?.0;
                if request == requests::IOTLB_MSG && value != 0 {
                    return Err(Violation::Refused { request, value }.into());
                }
                let done = self.iotlb_done.get_or_insert_default();
                done.number = done.number.max(number);
                done.answers += 1;
                done.waited += since.elapsed();
            }
        }
        Ok(())
    }

    /// The base in the reply to GET_VRING_BASE. That of a packed ring may be any: the specification calls its indices free-running.
    fn base(&self, index: u8, message: &Message) -> Result<u32, Violation> {
        let state = decode::<VringState>(message)?;
        let known = self.packed || u16::try_from(state.num).is_ok();
        if known && state.index == u32::from(index) {
            Ok(state.num)
        } else {
            Err(Violation::Value {
                request: message.request,
                value: u64::from(state.index) << 32 | u64::from(state.num),
            })
        }
    }

    fn got_features(&mut self, features: u64) -> Result<(), Error> {
        self.offer.features = features & !VHOST_USER_F_PROTOCOL_FEATURES;
        self.has_protocol_features = features & VHOST_USER_F_PROTOCOL_FEATURES != 0;
        if self.has_protocol_features {
            let message = Message::bare(requests::GET_PROTOCOL_FEATURES);
            self.ask(&message, Owed::ProtocolFeatures)
        } else {
            Ok(self.connection.send(&Message::bare(requests::SET_OWNER))?)
        }
    }

    fn got_protocol_features(&mut self, offered: u64) -> Result<(), Error> {
        self.protocol_features = offered & PROTOCOL_FEATURES;
        self.offer.rss = self.uses(protocol_features::RSS);
        let features = U64(self.protocol_features);
        let message = Message::request(requests::SET_PROTOCOL_FEATURES, &features);
        self.connection.send(&message)?;
        if self.uses(protocol_features::MQ) {
            self.ask(&Message::bare(requests::GET_QUEUE_NUM), Owed::QueueNum)?;
        }
        if self.uses(protocol_features::CONFIGURE_MEM_SLOTS) {
            let message = Message::bare(requests::GET_MAX_MEM_SLOTS);
            self.ask(&message, Owed::MaxMemSlots)?;
        }
        Ok(self.connection.send(&Message::bare(requests::SET_OWNER))?)
    }

    fn send_memory(&mut self, memory: &[host::MemoryRegion]) -> Result<(), Error> {
        let one_by_one = self.uses(protocol_features::CONFIGURE_MEM_SLOTS);
        let limit = if one_by_one {
            self.max_mem_slots
        } else {
            MAX_TABLE_REGIONS
        };
        let count = memory.len();
        if count as u64 > limit {
            return Err(Error::TooManyRegions { limit, count });
        }
        if one_by_one {
            for region in memory {
                let payload = SingleMemoryRegion(wire_region(region));
                let fds = vec![duplicate(&*region.shared.file)?];
                self.step(Message::request(requests::ADD_MEM_REG, &payload).with_fds(fds))?;
            }
            Ok(())
        } else {
            let table = MemoryTable(memory.iter().map(wire_region).collect());
            let fds = memory.iter().map(|region| duplicate(&*region.shared.file));
            let fds = fds.collect::<Result<_, _>>()?;
            self.step(Message::request(requests::SET_MEM_TABLE, &table).with_fds(fds))
        }
    }

    /// Starts one more vring beside those of [`Frontend::start`], with the same features and memory. A back-end that refuses a
    /// step is a [`Violation::Refused`] where REPLY_ACK was negotiated; there is no event for its success.
    pub fn start_vring(&mut self, vring: &Vring) -> Result<(), Error> {
        if !self.is_started() || self.has_vring(vring.index) {
            return Err(Error::State("starting a vring"));
        }
        if self.owed.contains(&Owed::Inflight) {
            self.waiting.push(vring.clone());
            return Ok(());
        }
        self.vrings.push(vring.index);
        let index = u32::from(vring.index);
        let state = |num: u32| VringState { index, num };
        let fd = VringFd {
            index: vring.index,
            no_fd: false,
        };
        let addr = VringAddr {
            index,
            flags: 0,
            desc: vring.desc,
            used: vring.device,
            avail: vring.driver,
            log: 0,
        };
        let kick = vec![duplicate(&*vring.kick)?];
        let call = vec![duplicate(&*vring.call)?];
        self.step(Message::request(
            requests::SET_VRING_NUM,
            &state(vring.size.into()),
        ))?;
        self.step(Message::request(
            requests::SET_VRING_BASE,
            &state(vring.base),
        ))?;
        self.step(Message::request(requests::SET_VRING_ADDR, &addr))?;
        // The call comes first: a back-end starts a ring with its kick and may have to call at once.
        self.step(Message::request(requests::SET_VRING_CALL, &fd).with_fds(call))?;
        self.step(Message::request(requests::SET_VRING_KICK, &fd).with_fds(kick))?;
        if self.has_protocol_features {
            self.step(enable(vring.index, vring.enabled))?;
        }
        Ok(())
    }

    fn uses(&self, protocol_feature: u64) -> bool {
        self.protocol_features & protocol_feature != 0
    }

    fn acks(&self) -> bool {
        self.uses(protocol_features::REPLY_ACK)
    }

    /// Sends a request that has no reply of its own, with an acknowledgement where there can be one.
    fn step(&mut self, message: Message) -> Result<(), Error> {
        let acks = self.acks();
        let message = message.with_need_reply(acks);
        if acks {
            self.owed.push_back(Owed::Ack(message.request));
        }
        Ok(self.connection.send(&message)?)
    }

    /// Sends a request that has a reply.
    fn ask(&mut self, message: &Message, owed: Owed) -> Result<(), Error> {
        self.owed.push_back(owed);
        Ok(self.connection.send(message)?)
    }
}

fn get_base(index: u8) -> Message {
    let state = VringState {
        index: index.into(),
        num: 0,
    };
    Message::request(requests::GET_VRING_BASE, &state)
}

fn enable(index: u8, enabled: bool) -> Message {
    let state = VringState {
        index: index.into(),
        num: enabled.into(),
    };
    Message::request(requests::SET_VRING_ENABLE, &state)
}

fn wire_region(region: &host::MemoryRegion) -> MemoryRegion {
    MemoryRegion {
        guest_address: region.gpa,
        size: region.shared.len,
        user_address: region.gpa,
        mmap_offset: region.shared.file_offset,
    }
}

fn duplicate(source: &impl AsRawFd) -> Result<OwnedFd, Error> {
    sys::duplicate(source).map_err(Error::Duplicate)
}

/// The payload of a reply.
fn decode<T: Payload>(message: &Message) -> Result<T, Violation> {
    T::decode(&message.payload).map_err(|error| Violation::Payload {
        request: message.request,
        error,
    })
}

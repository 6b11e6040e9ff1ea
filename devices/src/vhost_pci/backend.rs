//! What each message of the front-end does (docs/device.md, section 4), without sockets, queues or a machine: those are behind
//! [`Machine`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use thiserror::Error;

use super::iotlb::{Translation, Translations};
use crate::host::{Access, Permission, SharedRegion};
use crate::vhost_user::{
    DecodeError, Inflight, Iotlb, IotlbKind, Log, MAX_PAYLOAD, MemoryRegion, MemoryTable, Message,
    Payload, SingleMemoryRegion, U64, VringFd, flags, protocol_features, requests,
};
use crate::virtio::F_ACCESS_PLATFORM;

/// How many regions a memory table may have.
pub(super) const MAX_REGIONS: usize = 32;
/// How many answers may be outstanding before no more messages are read.
const MAX_OUTSTANDING: usize = 32;
/// How many translations a front-end may have at one time; one that leads into two regions counts as two.
pub(super) const MAX_TRANSLATIONS: usize = 32768;
/// What memory is shared in.
pub(super) const PAGE: u64 = 4096;
const HEADER: usize = 12;

/// Protocol features of the driver's that pass. BACKEND_REQ is the device's own.
const PROTOCOL_FEATURES: u64 = protocol_features::MQ
    | protocol_features::LOG_SHMFD
    | protocol_features::RARP
    | protocol_features::REPLY_ACK
    | protocol_features::INFLIGHT_SHMFD
    | protocol_features::CONFIGURE_MEM_SLOTS
    | protocol_features::RSS;
/// VHOST_F_LOG_ALL: what is written to the front-end's memory is logged.
const F_LOG_ALL: u64 = 1 << 26;

/// Where the effects of messages go.
pub(super) trait Machine {
    /// Shows a region at its offset, for these accesses.
    fn map(&mut self, offset: u64, region: &SharedRegion, permission: Permission)
    -> io::Result<()>;
    /// Takes away what is shown in `len` bytes from `offset` on.
    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Connects or disconnects one of a queue's eventfds.
    fn connect(&mut self, what: Line, queue: u16, fd: Option<OwnedFd>) -> io::Result<()>;
    /// Takes the socket on which the front-end can be asked, in place of the one before.
    fn set_channel(&mut self, socket: OwnedFd) -> io::Result<()>;
    /// Shows the log in the file, in place of the one before.
    fn set_log(&mut self, file: OwnedFd, log: Log) -> io::Result<()>;
    /// Memory for what is in flight in so many rings of such a size; none where that is too much.
    fn new_inflight(&mut self, wanted: Inflight) -> io::Result<Option<(Inflight, OwnedFd)>>;
    /// Shows what the front-end has kept of that, in place of what was there before.
    fn set_inflight(&mut self, file: OwnedFd, area: Inflight) -> io::Result<()>;
}

/// The eventfds of a vring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// From the front-end's driver to the guest.
    Kick,
    /// From the guest to the front-end's driver.
    Call,
    /// From the guest to the front-end.
    Error,
}

/// A fault of the peer that ends the connection.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error("{}: {}", requests::name(*.0), .1)]
    Payload(u32, #[source] DecodeError),
    #[error("{}: {got} file descriptors where {expected} belong", requests::name(*.request))]
    Descriptors {
        request: u32,
        expected: usize,
        got: usize,
    },
    #[error("{}: it has the flags of a reply ({:#x})", requests::name(*.0), .1)]
    Reply(u32, u32),
    #[error("{}: it needs a feature that was not offered", requests::name(*.0))]
    NotOffered(u32),
    #[error("{}: feature bits {:#x} were not offered", requests::name(*.0), .1)]
    Features(u32, u64),
    #[error("{}: {}", requests::name(*.0), .1)]
    Refused(u32, #[source] Refusal),
    #[error("the window cannot be restored: {0}")]
    Window(#[source] io::Error),
}

/// What the device cannot do: an answer where one is asked for, else a [`Fault`].
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("queue {0} is beyond the {1} that there are")]
    Queue(u8, u16),
    #[error("region {0:#x?} is empty, not made of whole pages, or out of the address space")]
    Shape(MemoryRegion),
    #[error("region {0:#x?} lies beyond the window of {1:#x} bytes")]
    BeyondWindow(MemoryRegion, u64),
    #[error("regions overlap at {0:#x}")]
    Overlap(u64),
    #[error("more than {MAX_REGIONS} regions")]
    TooMany,
    #[error("there is no such region: {0:#x?}")]
    NoRegion(MemoryRegion),
    #[error("region {0:#x?} cannot be shown: {1}")]
    Map(MemoryRegion, #[source] io::Error),
    #[error("translations were not negotiated (feature bit 33)")]
    NoTranslations,
    #[error("{0:x?} is for the other direction")]
    Direction(Iotlb),
    #[error(
        "{0:x?} is empty, not made of whole pages, or beyond the window of {1:#x} bytes or the address space"
    )]
    TranslationShape(Iotlb, u64),
    #[error("{0:x?} leads out of the memory table at {1:#x}")]
    Nowhere(Iotlb, u64),
    #[error("more than {MAX_TRANSLATIONS} translations")]
    TooManyTranslations,
    #[error("{0:x?} cannot be shown: {1}")]
    Translate(Iotlb, #[source] io::Error),
    #[error("the channel for requests is no connected socket: {0}")]
    Channel(#[source] io::Error),
    #[error("the log {0:x?} cannot be shown: {1}")]
    Log(Log, #[source] io::Error),
    #[error("the area for what is in flight {0:x?} cannot be had: {1}")]
    Inflight(Inflight, #[source] io::Error),
    #[error("the {0:?} eventfd of queue {1} cannot be used: {2}")]
    EventFd(Line, u16, #[source] io::Error),
}

/// Why a message of the driver went nowhere.
#[derive(Debug, PartialEq, Eq, Error)]
pub(super) enum Dropped {
    #[error("its header does not fit its length")]
    Header,
    #[error("it is no reply of version 1")]
    Flags,
    #[error("nobody asked for a reply to {}", requests::name(*.0))]
    Unasked(u32),
    #[error("the payload of its reply to {} is not 8 bytes long", requests::name(*.0))]
    Payload(u32),
}

/// What becomes of a message of the front-end.
#[derive(Debug)]
pub(super) enum Step {
    /// It goes to the driver; it has no descriptors left.
    Pass(Message),
    /// The device has dealt with it; see [`Backend::answer`].
    Done,
    /// The same: it has refused this request.
    Refused(u32, Refusal),
    /// The same, and these device addresses have a new translation (or are said to have none).
    Updated(Range<u64>),
    /// The same, and translations are gone.
    Invalidated,
}

enum Error {
    Fault(Fault),
    Refusal(Refusal),
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

/// What an applied message leaves to do.
enum Applied {
    Pass,
    Answer(Message),
    /// The driver does not see it, and the device answers where an answer is wanted.
    Consumed(Step),
}

/// An answer that the front-end waits for, in the order of its requests.
#[derive(Debug)]
enum Outstanding {
    /// The driver's.
    Driver(u32),
    /// The device's own; it waits for the driver's earlier ones.
    Ready(Message),
}

/// A region of the memory table, with its file.
struct Shown {
    region: MemoryRegion,
    shared: SharedRegion,
}

impl Shown {
    fn new(region: MemoryRegion, fd: OwnedFd) -> Self {
        let file = Arc::new(File::from(fd));
        let shared = SharedRegion {
            file,
            file_offset: region.mmap_offset,
            len: region.size,
        };
        Self { region, shared }
    }

    /// Whether both are the same bytes at the same place.
    fn same(&self, other: &Self) -> bool {
        let place = |shown: &Self| {
            let MemoryRegion {
                guest_address,
                size,
                mmap_offset,
                ..
            } = shown.region;
            (guest_address, size, mmap_offset)
        };
        let identity = |shown: &Self| {
            shown
                .shared
                .file
                .metadata()
                .map(|m| (m.dev(), m.ino()))
                .ok()
        };
        place(self) == place(other)
            && identity(self).is_some_and(|file| identity(other) == Some(file))
    }

    fn end(&self) -> u64 {
        self.region.guest_address.saturating_add(self.region.size)
    }
}

/// One connection's state, from its first message to its last.
pub(super) struct Backend {
    window: u64,
    queues: u16,
    reply_ack: bool,
    /// The driver offers ACCESS_PLATFORM.
    driver_translates: bool,
    /// BACKEND_REQ was put into the answer to GET_PROTOCOL_FEATURES.
    offers_channel: bool,
    /// BACKEND_REQ was negotiated.
    has_channel: bool,
    /// RSS was negotiated.
    has_rss: bool,
    /// LOG_SHMFD was negotiated.
    has_log: bool,
    /// INFLIGHT_SHMFD was negotiated.
    has_inflight: bool,
    /// RARP was negotiated.
    has_rarp: bool,
    /// The front-end may have what is written logged; then it may not be behind an IOMMU, for the driver does not know the addresses by which the log goes.
    logs: bool,
    /// What the window shows: `table` at its guest addresses, or, where ACCESS_PLATFORM was negotiated, `translations` into it.
    translating: bool,
    table: Vec<Shown>,
    translations: Translations,
    outstanding: VecDeque<Outstanding>,
}

impl Backend {
    /// A connection that has said nothing yet, for a window of `window` bytes and `queues` queue indices; with `logs`, of a front-end that may have what is
    /// written logged, and not be behind an IOMMU.
    pub(super) fn new(window: u64, queues: u16, logs: bool) -> Self {
        Self {
            window,
            queues,
            reply_ack: false,
            driver_translates: false,
            offers_channel: false,
            has_channel: false,
            has_rss: false,
            has_log: false,
            has_inflight: false,
            has_rarp: false,
            logs,
            translating: false,
            table: Vec::new(),
            translations: Translations::default(),
            outstanding: VecDeque::new(),
        }
    }

    /// Whether another message may be read: not before the driver has answered some of those that it has.
    pub(super) fn accepts(&self) -> bool {
        self.outstanding.len() < MAX_OUTSTANDING
    }

    /// Whether the window shows translations, not the memory table.
    pub(super) fn translates(&self) -> bool {
        self.translating
    }

    /// Whether a request of the device's own may ask for a reply.
    pub(super) fn acknowledges(&self) -> bool {
        self.reply_ack
    }

    /// How many translations there are.
    pub(super) fn translations(&self) -> usize {
        self.translations.len()
    }

    /// The first byte of a range that this access cannot have.
    pub(super) fn first_missing(&self, range: &Range<u64>, access: Access) -> Option<u64> {
        self.translations
            .first_missing(range.start, range.end, access)
    }

    /// Takes a message of the front-end.
    pub(super) fn front_end(
        &mut self,
        mut message: Message,
        machine: &mut impl Machine,
    ) -> Result<Step, Fault> {
        let request = message.request;
        if message.is_reply() {
            return Err(Fault::Reply(request, message.flags));
        }
        let acknowledge = self.reply_ack && message.needs_reply();
        match self.apply(&mut message, machine) {
            Ok(Applied::Pass) => {
                if acknowledge || has_reply(request) {
                    self.outstanding.push_back(Outstanding::Driver(request));
                }
                Ok(Step::Pass(message))
            }
            Ok(Applied::Answer(message)) => {
                self.outstanding.push_back(Outstanding::Ready(message));
                Ok(Step::Done)
            }
            Ok(Applied::Consumed(step)) => {
                if acknowledge {
                    self.own_answer(request, U64(0));
                }
                Ok(step)
            }
            Err(Error::Refusal(refusal)) if acknowledge => {
                self.own_answer(request, U64(1));
                Ok(Step::Refused(request, refusal))
            }
            Err(Error::Refusal(refusal)) => Err(Fault::Refused(request, refusal)),
            Err(Error::Fault(fault)) => Err(fault),
        }
    }

    /// Takes what the driver put on its txq; returns the message to send.
    pub(super) fn driver(&mut self, bytes: &[u8]) -> Result<Message, Dropped> {
        let (header, payload) = bytes.split_first_chunk::<HEADER>().ok_or(Dropped::Header)?;
        let (words, _) = header.as_chunks::<4>();
        let [request, word, size] = [0, 1, 2].map(|i: usize| u32::from_le_bytes(words[i]));
        if size as usize != payload.len() || payload.len() > MAX_PAYLOAD {
            return Err(Dropped::Header);
        }
        if word & flags::VERSION_MASK != flags::VERSION || word & flags::REPLY == 0 {
            return Err(Dropped::Flags);
        }
        if !matches!(self.outstanding.front(), Some(Outstanding::Driver(asked)) if *asked == request)
        {
            return Err(Dropped::Unasked(request));
        }
        let mut message = Message {
            request,
            flags: flags::VERSION | flags::REPLY,
            payload: payload.to_vec(),
            fds: Vec::new(),
        };
        let number = || U64::decode(payload).map_err(|_| Dropped::Payload(request));
        match request {
            requests::GET_FEATURES => {
                let features = number()?.0 & !self.withheld();
                self.driver_translates = features & F_ACCESS_PLATFORM != 0;
                message.payload = U64(features).encode();
            }
            requests::GET_PROTOCOL_FEATURES => {
                let U64(features) = number()?;
                self.offers_channel = self.driver_translates;
                message.payload =
                    U64(features & self.protocol_features() | self.channel_bit()).encode();
            }
            _ => {}
        }
        self.outstanding.pop_front();
        Ok(message)
    }

    /// The device's own answer whose turn it is. To be called until it is `None`, after each message of either side.
    pub(super) fn answer(&mut self) -> Option<Message> {
        match self.outstanding.pop_front()? {
            Outstanding::Ready(message) => Some(message),
            driver => {
                self.outstanding.push_front(driver);
                None
            }
        }
    }

    /// The feature bit that the front-end cannot have.
    fn withheld(&self) -> u64 {
        if self.logs {
            F_ACCESS_PLATFORM
        } else {
            F_LOG_ALL
        }
    }

    /// Protocol features of the driver's that pass.
    fn protocol_features(&self) -> u64 {
        if self.logs {
            PROTOCOL_FEATURES
        } else {
            PROTOCOL_FEATURES & !protocol_features::LOG_SHMFD
        }
    }

    /// The protocol feature that the device has by itself.
    fn channel_bit(&self) -> u64 {
        if self.offers_channel {
            protocol_features::BACKEND_REQ
        } else {
            0
        }
    }

    fn own_answer(&mut self, request: u32, value: U64) {
        self.outstanding
            .push_back(Outstanding::Ready(Message::reply(request, &value)));
    }

    fn apply(
        &mut self,
        message: &mut Message,
        machine: &mut impl Machine,
    ) -> Result<Applied, Error> {
        let fds = std::mem::take(&mut message.fds);
        let request = message.request;
        match request {
            requests::SET_MEM_TABLE => {
                let MemoryTable(regions) = decode(message)?;
                expect(request, regions.len(), &fds)?;
                let table = regions
                    .into_iter()
                    .zip(fds)
                    .map(|(region, fd)| Shown::new(region, fd));
                self.set_table(table.collect(), machine)?;
            }
            requests::ADD_MEM_REG => {
                let SingleMemoryRegion(region) = decode(message)?;
                expect(request, 1, &fds)?;
                for fd in fds {
                    self.add_region(Shown::new(region, fd), machine)?;
                }
            }
            requests::REM_MEM_REG => {
                let SingleMemoryRegion(region) = decode(message)?;
                // Some front-ends send the region's descriptor along; it means nothing here.
                expect(request, fds.len().min(1), &fds)?;
                self.remove_region(region, machine)?;
            }
            requests::GET_MAX_MEM_SLOTS => {
                expect(request, 0, &fds)?;
                let answer = Message::reply(request, &U64(MAX_REGIONS as u64));
                return Ok(Applied::Answer(answer));
            }
            requests::SET_VRING_KICK => self.set_line(Line::Kick, message, fds, machine)?,
            requests::SET_VRING_CALL => self.set_line(Line::Call, message, fds, machine)?,
            requests::SET_VRING_ERR => self.set_line(Line::Error, message, fds, machine)?,
            requests::SET_FEATURES => {
                expect(request, 0, &fds)?;
                let U64(features) = decode(message)?;
                let withheld = features & self.withheld();
                if withheld != 0 {
                    return Err(Fault::Features(request, withheld).into());
                }
                self.set_translating(features & F_ACCESS_PLATFORM != 0, machine)?;
            }
            requests::SET_PROTOCOL_FEATURES => {
                expect(request, 0, &fds)?;
                let U64(features) = decode(message)?;
                let unknown = features & !(self.protocol_features() | self.channel_bit());
                if unknown != 0 {
                    return Err(Fault::Features(request, unknown).into());
                }
                self.reply_ack = features & protocol_features::REPLY_ACK != 0;
                self.has_channel = features & protocol_features::BACKEND_REQ != 0;
                self.has_rss = features & protocol_features::RSS != 0;
                self.has_log = features & protocol_features::LOG_SHMFD != 0;
                self.has_inflight = features & protocol_features::INFLIGHT_SHMFD != 0;
                self.has_rarp = features & protocol_features::RARP != 0;
                // The driver has not offered it.
                message.payload = U64(features & PROTOCOL_FEATURES).encode();
            }
            requests::IOTLB_MSG => {
                let iotlb = decode(message)?;
                expect(request, 0, &fds)?;
                return Ok(Applied::Consumed(self.translate(&iotlb, machine)?));
            }
            requests::SET_LOG_BASE if self.has_log => {
                let log = decode(message)?;
                expect(request, 1, &fds)?;
                for fd in fds {
                    machine
                        .set_log(fd, log)
                        .map_err(|error| Refusal::Log(log, error))?;
                }
            }
            // Who logs need not say so: a front-end looks at the log when it wants to know.
            requests::SET_LOG_FD if self.has_log => expect(request, 1, &fds)?,
            requests::GET_INFLIGHT_FD if self.has_inflight => {
                let wanted: Inflight = decode(message)?;
                expect(request, 0, &fds)?;
                let made = machine
                    .new_inflight(wanted)
                    .map_err(|error| Refusal::Inflight(wanted, error))?;
                // An area without a length is none.
                let (area, fds) = match made {
                    Some((area, file)) => (area, vec![file]),
                    None => (Inflight::default(), Vec::new()),
                };
                let answer = Message::reply(request, &area).with_fds(fds);
                return Ok(Applied::Answer(answer));
            }
            requests::SET_INFLIGHT_FD if self.has_inflight => {
                let area: Inflight = decode(message)?;
                expect(request, 1, &fds)?;
                for fd in fds {
                    machine
                        .set_inflight(fd, area)
                        .map_err(|error| Refusal::Inflight(area, error))?;
                }
            }
            requests::SEND_RARP if self.has_rarp => expect(request, 0, &fds)?,
            requests::SET_BACKEND_REQ_FD => {
                if !self.has_channel {
                    return Err(Fault::NotOffered(request).into());
                }
                expect(request, 1, &fds)?;
                for fd in fds {
                    machine.set_channel(fd).map_err(Refusal::Channel)?;
                }
                return Ok(Applied::Consumed(Step::Done));
            }
            requests::SET_RSS if !self.has_rss => return Err(Fault::NotOffered(request).into()),
            _ if needs_withheld_feature(request) => return Err(Fault::NotOffered(request).into()),
            _ => expect(request, 0, &fds)?,
        }
        Ok(Applied::Pass)
    }

    fn set_line(
        &mut self,
        what: Line,
        message: &Message,
        mut fds: Vec<OwnedFd>,
        machine: &mut impl Machine,
    ) -> Result<(), Error> {
        let VringFd { index, no_fd } = decode(message)?;
        expect(message.request, usize::from(!no_fd), &fds)?;
        let queue = u16::from(index);
        if queue >= self.queues {
            return Err(Refusal::Queue(index, self.queues).into());
        }
        machine
            .connect(what, queue, fds.pop())
            .map_err(|e| Refusal::EventFd(what, queue, e).into())
    }

    fn check(&self, region: &MemoryRegion) -> Result<(), Refusal> {
        let MemoryRegion {
            guest_address,
            size,
            mmap_offset,
            ..
        } = *region;
        let whole_pages = [guest_address, size, mmap_offset]
            .iter()
            .all(|n| n.is_multiple_of(PAGE));
        let in_file = mmap_offset
            .checked_add(size)
            .is_some_and(|end| i64::try_from(end).is_ok());
        let Some(end) = guest_address
            .checked_add(size)
            .filter(|_| size != 0 && whole_pages && in_file)
        else {
            return Err(Refusal::Shape(*region));
        };
        // Translations lead to regions by user address; where the guest has them does not matter then.
        if end > self.window && !self.translating {
            Err(Refusal::BeyondWindow(*region, self.window))
        } else {
            Ok(())
        }
    }

    /// Shows a region of the table, where it is what the window shows.
    fn show(&self, shown: &Shown, machine: &mut impl Machine) -> io::Result<()> {
        if self.translating {
            return Ok(());
        }
        let start = shown.region.guest_address;
        machine.map(start, &shown.shared, Permission::READ_WRITE)
    }

    /// Takes away whatever the window shows of a region.
    fn hide(&mut self, shown: &Shown, machine: &mut impl Machine) -> Result<(), Fault> {
        let start = shown.region.guest_address;
        if !self.translating {
            return machine
                .unmap(start, shown.region.size)
                .map_err(Fault::Window);
        }
        for (start, end) in self.translations.leading_to(start) {
            self.revoke(start, end, machine)?;
        }
        Ok(())
    }

    /// Nothing between two device addresses is shown any more.
    fn revoke(&mut self, start: u64, end: u64, machine: &mut impl Machine) -> Result<(), Fault> {
        if let Some((first, behind)) = self.translations.span(start, end) {
            machine
                .unmap(first, behind - first)
                .map_err(Fault::Window)?;
            self.translations.remove(start, end);
        }
        Ok(())
    }

    /// Shows the table or translations of it. The window shows nothing in between; what there was to translate is forgotten.
    fn set_translating(&mut self, on: bool, machine: &mut impl Machine) -> Result<(), Error> {
        if on == self.translating {
            return Ok(());
        }
        let table = std::mem::take(&mut self.table);
        let result = self.switch(&table, machine);
        self.table = table;
        result
    }

    fn switch(&mut self, table: &[Shown], machine: &mut impl Machine) -> Result<(), Error> {
        if !self.translating {
            for shown in table {
                self.hide(shown, machine)?;
            }
            self.translating = true;
            return Ok(());
        }
        if let Some(shown) = table.iter().find(|shown| shown.end() > self.window) {
            return Err(Refusal::BeyondWindow(shown.region, self.window).into());
        }
        self.revoke(0, self.window, machine)?;
        self.translating = false;
        for shown in table {
            self.show(shown, machine).map_err(Fault::Window)?;
        }
        Ok(())
    }

    fn translate(&mut self, iotlb: &Iotlb, machine: &mut impl Machine) -> Result<Step, Error> {
        if !self.translating {
            return Err(Refusal::NoTranslations.into());
        }
        let Iotlb { iova, size, .. } = *iotlb;
        let shape = Refusal::TranslationShape(*iotlb, self.window);
        if size == 0 || !iova.is_multiple_of(PAGE) {
            return Err(shape.into());
        }
        match iotlb.kind {
            IotlbKind::Update => {
                let end = iova.checked_add(size);
                let Some(end) = end.filter(|&end| end <= self.window && end.is_multiple_of(PAGE))
                else {
                    return Err(shape.into());
                };
                self.update(iotlb, end, machine)?;
                Ok(Step::Updated(iova..end))
            }
            IotlbKind::Invalidate => {
                // A range may be as large as a number can say, for everything.
                let end = iova.saturating_add(size).min(self.window);
                if !end.is_multiple_of(PAGE) {
                    return Err(shape.into());
                }
                if iova < end {
                    if self.translations.count_without(iova, end) > MAX_TRANSLATIONS {
                        return Err(Refusal::TooManyTranslations.into());
                    }
                    self.revoke(iova, end, machine)?;
                }
                Ok(Step::Invalidated)
            }
            IotlbKind::Miss | IotlbKind::AccessFail => Err(Refusal::Direction(*iotlb).into()),
        }
    }

    /// Where the addresses from an update's `iova` to `end` lead. One that allows nothing leads nowhere.
    fn pieces(&self, iotlb: &Iotlb, end: u64) -> Result<Vec<Translation>, Refusal> {
        let permission = Permission {
            read: iotlb.read,
            write: iotlb.write,
        };
        let mut pieces = Vec::new();
        if !(iotlb.read || iotlb.write) {
            return Ok(pieces);
        }
        if iotlb.user_address.checked_add(iotlb.size).is_none() {
            return Err(Refusal::TranslationShape(*iotlb, self.window));
        }
        let mut next = iotlb.iova;
        // Each turn goes to the end of another region.
        while next < end {
            let user = iotlb.user_address + (next - iotlb.iova);
            let found = self.table.iter().find_map(|shown| {
                let region = &shown.region;
                let offset = user.checked_sub(region.user_address)?;
                (offset < region.size).then_some((region, offset))
            });
            let (region, offset) = found.ok_or(Refusal::Nowhere(*iotlb, user))?;
            if !offset.is_multiple_of(PAGE) {
                return Err(Refusal::TranslationShape(*iotlb, self.window));
            }
            let len = (region.size - offset).min(end - next);
            pieces.push(Translation {
                iova: next,
                len,
                region: region.guest_address,
                offset,
                permission,
            });
            next += len;
        }
        Ok(pieces)
    }

    /// Replaces whatever there was. Where it cannot be shown, nothing is left in its range.
    fn update(&mut self, iotlb: &Iotlb, end: u64, machine: &mut impl Machine) -> Result<(), Error> {
        let pieces = self.pieces(iotlb, end)?;
        // Front-ends repeat themselves, as an answer to a miss for instance; a window in use must not blink then.
        if !pieces.is_empty() && pieces.iter().all(|piece| self.translations.has(piece)) {
            return Ok(());
        }
        let others = self.translations.count_without(iotlb.iova, end);
        if others + pieces.len() > MAX_TRANSLATIONS {
            return Err(Refusal::TooManyTranslations.into());
        }
        self.revoke(iotlb.iova, end, machine)?;
        for piece in pieces {
            let region = self
                .table
                .iter()
                .find(|shown| shown.region.guest_address == piece.region)
                .ok_or(Refusal::Nowhere(*iotlb, piece.region))?;
            let part = SharedRegion {
                file_offset: region.shared.file_offset + piece.offset,
                len: piece.len,
                ..region.shared.clone()
            };
            if let Err(error) = machine.map(piece.iova, &part, piece.permission) {
                self.revoke(iotlb.iova, end, machine)?;
                return Err(Refusal::Translate(*iotlb, error).into());
            }
            self.translations.insert(piece);
        }
        Ok(())
    }

    /// Makes `table` the memory table: what the window shows, or what translations lead into, and nothing else. What is there already stays. Nothing
    /// has changed where it refuses.
    fn set_table(
        &mut self,
        mut table: Vec<Shown>,
        machine: &mut impl Machine,
    ) -> Result<(), Error> {
        if table.len() > MAX_REGIONS {
            return Err(Refusal::TooMany.into());
        }
        for shown in &table {
            self.check(&shown.region)?;
        }
        table.sort_by_key(|shown| shown.region.guest_address);
        if let Some([_, second]) = table
            .array_windows()
            .find(|[a, b]| a.end() > b.region.guest_address)
        {
            return Err(Refusal::Overlap(second.region.guest_address).into());
        }

        let translating = self.translating;
        let is_in = |shown: &Shown, table: &[Shown]| {
            table.iter().any(|other| {
                // A user address is what a translation has been made from.
                let moved = other.region.user_address != shown.region.user_address;
                !(translating && moved) && other.same(shown)
            })
        };
        let (mut kept, removed): (Vec<_>, Vec<_>) =
            self.table.drain(..).partition(|old| is_in(old, &table));
        let (same, added): (Vec<_>, Vec<_>) = table.into_iter().partition(|new| is_in(new, &kept));
        for old in &mut kept {
            // A region may move in the front-end's own address space.
            if let Some(new) = same
                .iter()
                .find(|new| new.region.guest_address == old.region.guest_address)
            {
                old.region = new.region;
            }
        }
        self.table = kept;
        for old in &removed {
            self.hide(old, machine)?;
        }
        for (done, new) in added.iter().enumerate() {
            if let Err(error) = self.show(new, machine) {
                for undo in &added[..done] {
                    self.hide(undo, machine)?;
                }
                for old in removed {
                    self.show(&old, machine).map_err(Fault::Window)?;
                    self.table.push(old);
                }
                return Err(Refusal::Map(new.region, error).into());
            }
        }
        self.table.extend(added);
        Ok(())
    }

    fn add_region(&mut self, new: Shown, machine: &mut impl Machine) -> Result<(), Refusal> {
        self.check(&new.region)?;
        // QEMU before 8.0 says everything about memory once for each queue pair.
        let user = new.region.user_address;
        if (self.table.iter()).any(|old| old.same(&new) && old.region.user_address == user) {
            return Ok(());
        }
        if self.table.len() >= MAX_REGIONS {
            return Err(Refusal::TooMany);
        }
        let start = new.region.guest_address;
        if self
            .table
            .iter()
            .any(|old| old.region.guest_address < new.end() && start < old.end())
        {
            return Err(Refusal::Overlap(start));
        }
        self.show(&new, machine)
            .map_err(|error| Refusal::Map(new.region, error))?;
        self.table.push(new);
        Ok(())
    }

    fn remove_region(
        &mut self,
        region: MemoryRegion,
        machine: &mut impl Machine,
    ) -> Result<(), Error> {
        // The specification identifies a region by these three; the offset into the file is not among them.
        let key = |r: &MemoryRegion| (r.guest_address, r.size, r.user_address);
        let at = self
            .table
            .iter()
            .position(|old| key(&old.region) == key(&region));
        let Some(at) = at else {
            // Gone already, as with the second queue pair of such a QEMU; or one that never was like that.
            let end = region.guest_address.saturating_add(region.size);
            return match self
                .table
                .iter()
                .any(|old| old.region.guest_address < end && region.guest_address < old.end())
            {
                true => Err(Refusal::NoRegion(region).into()),
                false => Ok(()),
            };
        };
        let old = self.table.swap_remove(at);
        self.hide(&old, machine)?;
        Ok(())
    }
}

fn decode<T: Payload>(message: &Message) -> Result<T, Fault> {
    T::decode(&message.payload).map_err(|error| Fault::Payload(message.request, error))
}

fn expect(request: u32, expected: usize, fds: &[OwnedFd]) -> Result<(), Fault> {
    let got = fds.len();
    if got == expected {
        Ok(())
    } else {
        Err(Fault::Descriptors {
            request,
            expected,
            got,
        })
    }
}

/// Whether the protocol wants an answer to a message that passes, whatever its flags say.
fn has_reply(request: u32) -> bool {
    matches!(
        request,
        requests::GET_FEATURES
            | requests::GET_PROTOCOL_FEATURES
            | requests::GET_QUEUE_NUM
            | requests::GET_VRING_BASE
            | requests::SET_LOG_BASE
    )
}

/// Whether a message belongs to a feature that is taken out of the replies.
fn needs_withheld_feature(request: u32) -> bool {
    matches!(
        request,
        requests::SET_LOG_BASE
            | requests::SET_LOG_FD
            | requests::SEND_RARP..=requests::VRING_KICK
            | requests::SET_STATUS..=requests::GET_SHMEM_CONFIG
    )
}

//! What each message of the front-end does (docs/device.md, section 4), without sockets, queues or a machine: those are behind
//! [`Machine`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use thiserror::Error;

use crate::host::SharedRegion;
use crate::vhost_user::{
    DecodeError, MAX_PAYLOAD, MemoryRegion, MemoryTable, Message, Payload, SingleMemoryRegion, U64,
    VringFd, flags, protocol_features, requests,
};

/// How many regions a memory table may have.
pub(super) const MAX_REGIONS: usize = 32;
/// How many answers may be outstanding before no more messages are read.
const MAX_OUTSTANDING: usize = 32;
const PAGE: u64 = 4096;
const HEADER: usize = 12;

/// Protocol features that pass.
const PROTOCOL_FEATURES: u64 =
    protocol_features::MQ | protocol_features::REPLY_ACK | protocol_features::CONFIGURE_MEM_SLOTS;
/// Feature bits that the device cannot carry: VHOST_F_LOG_ALL and VIRTIO_F_ACCESS_PLATFORM.
const WITHHELD_FEATURES: u64 = 1 << 26 | 1 << 33;

/// Where the effects of messages go.
pub(super) trait Machine {
    /// Shows a region at its offset.
    fn map(&mut self, offset: u64, region: &SharedRegion) -> io::Result<()>;
    /// Takes the region at `offset` away.
    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Connects or disconnects one of a queue's eventfds.
    fn connect(&mut self, what: Line, queue: u16, fd: Option<OwnedFd>) -> io::Result<()>;
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
    Answer(U64),
}

/// An answer that the front-end waits for, in the order of its requests.
#[derive(Debug)]
enum Outstanding {
    /// The driver's.
    Driver(u32),
    /// The device's own; it waits for the driver's earlier ones.
    Ready(Message),
}

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
    shown: Vec<Shown>,
    outstanding: VecDeque<Outstanding>,
}

impl Backend {
    /// A connection that has said nothing yet, for a window of `window` bytes and `queues` queue indices.
    pub(super) fn new(window: u64, queues: u16) -> Self {
        Self {
            window,
            queues,
            reply_ack: false,
            shown: Vec::new(),
            outstanding: VecDeque::new(),
        }
    }

    /// Whether another message may be read: not before the driver has answered some of those that it has.
    pub(super) fn accepts(&self) -> bool {
        self.outstanding.len() < MAX_OUTSTANDING
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
            Ok(Applied::Answer(value)) => {
                self.own_answer(request, value);
                Ok(Step::Done)
            }
            Err(Error::Refusal(refusal)) if acknowledge => {
                log::debug!("vhost-pci: refused {}: {refusal}", requests::name(request));
                self.own_answer(request, U64(1));
                Ok(Step::Done)
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
        let mask = match request {
            requests::GET_FEATURES => Some(!WITHHELD_FEATURES),
            requests::GET_PROTOCOL_FEATURES => Some(PROTOCOL_FEATURES),
            _ => None,
        };
        let mut message = Message {
            request,
            flags: flags::VERSION | flags::REPLY,
            payload: payload.to_vec(),
            fds: Vec::new(),
        };
        if let Some(mask) = mask {
            let U64(features) = U64::decode(payload).map_err(|_| Dropped::Payload(request))?;
            message.payload = U64(features & mask).encode();
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
                return Ok(Applied::Answer(U64(MAX_REGIONS as u64)));
            }
            requests::SET_VRING_KICK => self.set_line(Line::Kick, message, fds, machine)?,
            requests::SET_VRING_CALL => self.set_line(Line::Call, message, fds, machine)?,
            requests::SET_VRING_ERR => self.set_line(Line::Error, message, fds, machine)?,
            requests::SET_FEATURES => {
                expect(request, 0, &fds)?;
                let U64(features) = decode(message)?;
                if features & WITHHELD_FEATURES != 0 {
                    return Err(Fault::Features(request, features & WITHHELD_FEATURES).into());
                }
            }
            requests::SET_PROTOCOL_FEATURES => {
                expect(request, 0, &fds)?;
                let U64(features) = decode(message)?;
                if features & !PROTOCOL_FEATURES != 0 {
                    return Err(Fault::Features(request, features & !PROTOCOL_FEATURES).into());
                }
                self.reply_ack = features & protocol_features::REPLY_ACK != 0;
            }
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
        if end > self.window {
            Err(Refusal::BeyondWindow(*region, self.window))
        } else {
            Ok(())
        }
    }

    /// Makes the window show `table` and nothing else. What is shown already stays. Nothing has changed where it refuses.
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

        let is_in = |shown: &Shown, table: &[Shown]| table.iter().any(|other| other.same(shown));
        let (mut kept, removed): (Vec<_>, Vec<_>) =
            self.shown.drain(..).partition(|old| is_in(old, &table));
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
        self.shown = kept;
        for old in &removed {
            machine
                .unmap(old.region.guest_address, old.region.size)
                .map_err(Fault::Window)?;
        }
        for (done, new) in added.iter().enumerate() {
            if let Err(error) = machine.map(new.region.guest_address, &new.shared) {
                for undo in &added[..done] {
                    machine
                        .unmap(undo.region.guest_address, undo.region.size)
                        .map_err(Fault::Window)?;
                }
                for old in removed {
                    machine
                        .map(old.region.guest_address, &old.shared)
                        .map_err(Fault::Window)?;
                    self.shown.push(old);
                }
                return Err(Refusal::Map(new.region, error).into());
            }
        }
        self.shown.extend(added);
        Ok(())
    }

    fn add_region(&mut self, new: Shown, machine: &mut impl Machine) -> Result<(), Refusal> {
        self.check(&new.region)?;
        if self.shown.len() >= MAX_REGIONS {
            return Err(Refusal::TooMany);
        }
        let start = new.region.guest_address;
        if self
            .shown
            .iter()
            .any(|old| old.region.guest_address < new.end() && start < old.end())
        {
            return Err(Refusal::Overlap(start));
        }
        machine
            .map(start, &new.shared)
            .map_err(|error| Refusal::Map(new.region, error))?;
        self.shown.push(new);
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
            .shown
            .iter()
            .position(|old| key(&old.region) == key(&region));
        let at = at.ok_or(Refusal::NoRegion(region))?;
        let old = self.shown.swap_remove(at);
        machine
            .unmap(old.region.guest_address, old.region.size)
            .map_err(Fault::Window)?;
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

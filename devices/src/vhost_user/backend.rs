//! The back-end's side of the conversation as a state machine, for a network device with one queue pair that is served in this process.
//!
//! It knows no sockets and maps nothing: messages go in, answers come out, and what they do to memory and rings is behind [`Served`].
//!
//! A fault of the front-end ends the connection. Nothing is half done then: rings are stopped before anything changes under them.

use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

use super::wire::{
    DecodeError, MemoryRegion, MemoryTable, Message, Payload, U64, VringAddr, VringFd, VringState,
    protocol_features, requests,
};
use super::{VHOST_USER_F_PROTOCOL_FEATURES, flags};

/// Vrings of one queue pair: the front-end's receive ring, then its transmit ring.
pub const VRINGS: usize = 2;
/// Most regions of a memory table.
pub const MAX_REGIONS: usize = 32;

/// VIRTIO_F_RING_PACKED.
const F_RING_PACKED: u64 = 1 << 34;
const PROTOCOL_FEATURES: u64 = protocol_features::REPLY_ACK;

/// What the front-end got wrong, or what it asked for that the host refused.
#[derive(Debug, Error)]
pub enum Fault {
    /// The payload is not what the request has.
    #[error("{}: {}", requests::name(*.0), .1)]
    Payload(u32, #[source] DecodeError),
    /// A reply, though nothing was asked.
    #[error("{} came as a reply", requests::name(*.0))]
    Reply(u32),
    /// Too many descriptors, or too few.
    #[error("{}: {got} file descriptors where {expected} belong", requests::name(*.request))]
    Descriptors {
        /// The request.
        request: u32,
        /// How many belong to it.
        expected: usize,
        /// How many came.
        got: usize,
    },
    /// Feature bits that were not offered.
    #[error("{}: feature bits {:#x} were not offered", requests::name(*.0), .1)]
    Features(u32, u64),
    /// A request that is unknown or needs a feature that was not offered.
    #[error("request {0} ({name}) is not served here", name = requests::name(*.0))]
    NotServed(u32),
    /// A vring beyond the two that there are.
    #[error("{}: vring {} is beyond the {VRINGS} that are served", requests::name(*.0), .1)]
    Vring(u32, u32),
    /// A table with more than [`MAX_REGIONS`] regions.
    #[error("a memory table of {0} regions, of at most {MAX_REGIONS}")]
    TooManyRegions(usize),
    /// The memory cannot be used.
    #[error("memory region {region:#x?}: {source}")]
    Memory {
        /// The region.
        region: MemoryRegion,
        /// Why.
        source: io::Error,
    },
    /// An eventfd cannot be used.
    #[error("{}: {}", requests::name(*.0), .1)]
    EventFd(u32, #[source] io::Error),
}

/// What the front-end has said of one vring.
#[derive(Debug, Default)]
pub struct Vring {
    /// Descriptors.
    pub size: u32,
    /// Where it goes on, as VHOST_USER_SET_VRING_BASE has it; `None`: at the start.
    pub base: Option<u32>,
    /// User addresses of the descriptor, driver and device areas.
    pub areas: Option<[u64; 3]>,
    /// A kick message has come.
    pub started: bool,
    /// Where kicks arrive; `None`: the vring has to be polled.
    pub kick: Option<OwnedFd>,
    /// What interrupts the driver; `None`: it polls.
    pub call: Option<OwnedFd>,
    /// What tells the front-end that the vring is broken.
    pub error: Option<OwnedFd>,
    /// Enabled by message.
    pub enabled: bool,
}

/// Memory and data path of a connection.
pub trait Served {
    /// Takes the rings out of use. Where they were, if they were in use.
    fn stop(&mut self) -> Option<[u32; VRINGS]>;
    /// Makes this the memory table, in place of what was there. Only while the rings are out of use. On an error, which names the region by its
    /// place, nothing of it is mapped.
    fn set_memory(&mut self, table: Vec<(MemoryRegion, OwnedFd)>)
    -> Result<(), (usize, io::Error)>;
    /// Whether a descriptor can be used to signal; a front-end may send anything.
    fn check_eventfd(&mut self, fd: &OwnedFd) -> io::Result<()>;
}

/// One connection's state, from its first message to its last.
#[derive(Debug)]
pub struct Backend {
    offered: u64,
    features: u64,
    protocol: u64,
    regions: Vec<MemoryRegion>,
    vrings: [Vring; VRINGS],
}

impl Backend {
    /// A connection that has said nothing yet; `offered` are the feature bits of device and rings.
    #[must_use]
    pub fn new(offered: u64) -> Self {
        Self {
            offered: offered | VHOST_USER_F_PROTOCOL_FEATURES,
            features: 0,
            protocol: 0,
            regions: Vec::new(),
            vrings: Default::default(),
        }
    }

    /// What was negotiated.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The vrings, where the front-end has started and enabled both.
    #[must_use]
    pub fn ready(&self) -> Option<&[Vring; VRINGS]> {
        let by_message = self.features & VHOST_USER_F_PROTOCOL_FEATURES != 0;
        let ready = |vring: &Vring| {
            vring.started && vring.areas.is_some() && (vring.enabled || !by_message)
        };
        self.vrings.iter().all(ready).then_some(&self.vrings)
    }

    /// The guest physical address of `len` bytes at one of the front-end's user addresses; `None` where they are not all in one region.
    #[must_use]
    pub fn translate(&self, user: u64, len: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.user_address)?;
            (offset.checked_add(len)? <= region.size)
                .then(|| region.guest_address.checked_add(offset))?
        })
    }

    /// Does what a message asks. The answer to send, where it gets one. After a fault the connection is to be dropped.
    pub fn handle(
        &mut self,
        mut message: Message,
        served: &mut impl Served,
    ) -> Result<Option<Message>, Fault> {
        let request = message.request;
        if message.is_reply() {
            return Err(Fault::Reply(request));
        }
        let acknowledge = self.protocol & protocol_features::REPLY_ACK != 0
            && message.flags & flags::NEED_REPLY != 0;
        let fds = std::mem::take(&mut message.fds);
        let answer = match request {
            requests::SET_MEM_TABLE => {
                self.set_table(&message, fds, served)?;
                None
            }
            requests::SET_VRING_KICK | requests::SET_VRING_CALL | requests::SET_VRING_ERR => {
                self.set_eventfd(&message, fds, served)?;
                None
            }
            _ => {
                expect(request, 0, fds.len())?;
                self.plain(&message, served)?
            }
        };
        Ok(match answer {
            Some(answer) => Some(answer),
            None => acknowledge.then(|| Message::reply(request, &U64(0))),
        })
    }

    /// A request that carries no descriptor.
    fn plain(
        &mut self,
        message: &Message,
        served: &mut impl Served,
    ) -> Result<Option<Message>, Fault> {
        let request = message.request;
        let value = |value| Ok(Some(Message::reply(request, &U64(value))));
        match request {
            requests::GET_FEATURES => return value(self.offered),
            requests::GET_PROTOCOL_FEATURES => return value(PROTOCOL_FEATURES),
            requests::SET_FEATURES => {
                let features = chosen(message, self.offered)?;
                self.stop(served);
                self.features = features;
            }
            requests::SET_PROTOCOL_FEATURES => {
                self.protocol = chosen(message, PROTOCOL_FEATURES)?;
            }
            requests::SET_OWNER => {}
            requests::RESET_OWNER => {
                self.stop(served);
                for vring in &mut self.vrings {
                    vring.enabled = false;
                }
            }
            requests::SET_VRING_NUM => {
                let VringState { index, num } = decode(message)?;
                self.halted(request, index, served)?.size = num;
            }
            requests::SET_VRING_BASE => {
                let VringState { index, num } = decode(message)?;
                self.halted(request, index, served)?.base = Some(num);
            }
            requests::SET_VRING_ADDR => {
                let addr: VringAddr = decode(message)?;
                self.halted(request, addr.index, served)?.areas =
                    Some([addr.desc, addr.avail, addr.used]);
            }
            requests::SET_VRING_ENABLE => {
                let VringState { index, num } = decode(message)?;
                self.halted(request, index, served)?.enabled = num != 0;
            }
            requests::GET_VRING_BASE => {
                let VringState { index, .. } = decode(message)?;
                let fresh = self.fresh();
                let vring = self.halted(request, index, served)?;
                vring.started = false;
                vring.kick = None;
                let num = vring.base.unwrap_or(fresh);
                return Ok(Some(Message::reply(request, &VringState { index, num })));
            }
            _ => return Err(Fault::NotServed(request)),
        }
        Ok(None)
    }

    /// The position of a ring that has not been used: a packed one starts with its wrap counters at 1 (VIRTIO 1.3, section 2.8.1).
    fn fresh(&self) -> u32 {
        match self.features & F_RING_PACKED {
            0 => 0,
            _ => 0x8000_8000,
        }
    }

    fn set_table(
        &mut self,
        message: &Message,
        fds: Vec<OwnedFd>,
        served: &mut impl Served,
    ) -> Result<(), Fault> {
        let MemoryTable(regions) = decode(message)?;
        expect(message.request, regions.len(), fds.len())?;
        if regions.len() > MAX_REGIONS {
            return Err(Fault::TooManyRegions(regions.len()));
        }
        self.stop(served);
        self.regions.clear();
        let table = regions.iter().copied().zip(fds).collect();
        served.set_memory(table).map_err(|(at, source)| {
            let region = regions.get(at).copied().unwrap_or_default();
            Fault::Memory { region, source }
        })?;
        self.regions = regions;
        Ok(())
    }

    fn set_eventfd(
        &mut self,
        message: &Message,
        fds: Vec<OwnedFd>,
        served: &mut impl Served,
    ) -> Result<(), Fault> {
        let request = message.request;
        let VringFd { index, no_fd } = decode(message)?;
        expect(request, usize::from(!no_fd), fds.len())?;
        let fd = fds.into_iter().next();
        if let Some(fd) = &fd {
            served
                .check_eventfd(fd)
                .map_err(|error| Fault::EventFd(request, error))?;
        }
        let vring = self.halted(request, index.into(), served)?;
        match request {
            requests::SET_VRING_KICK => {
                vring.started = true;
                vring.kick = fd;
            }
            requests::SET_VRING_CALL => vring.call = fd,
            _ => vring.error = fd,
        }
        Ok(())
    }

    /// A vring, out of use so that it can be changed.
    fn halted(
        &mut self,
        request: u32,
        index: u32,
        served: &mut impl Served,
    ) -> Result<&mut Vring, Fault> {
        self.stop(served);
        usize::try_from(index)
            .ok()
            .and_then(|index| self.vrings.get_mut(index))
            .ok_or(Fault::Vring(request, index))
    }

    /// Takes the rings out of use, remembering where they were.
    fn stop(&mut self, served: &mut impl Served) {
        if let Some(bases) = served.stop() {
            for (vring, base) in self.vrings.iter_mut().zip(bases) {
                vring.base = Some(base);
            }
        }
    }
}

fn decode<T: Payload>(message: &Message) -> Result<T, Fault> {
    T::decode(&message.payload).map_err(|error| Fault::Payload(message.request, error))
}

/// The feature bits of a message, all of which must have been offered.
fn chosen(message: &Message, offered: u64) -> Result<u64, Fault> {
    let U64(features) = decode(message)?;
    match features & !offered {
        0 => Ok(features),
        others => Err(Fault::Features(message.request, others)),
    }
}

fn expect(request: u32, expected: usize, got: usize) -> Result<(), Fault> {
    if got == expected {
        return Ok(());
    }
    Err(Fault::Descriptors {
        request,
        expected,
        got,
    })
}

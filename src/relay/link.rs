//! One front-end: its socket, its connection, its memory and its rings.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use devices::vhost_user::backend::{Backend, Fault, Served, VRINGS, Vring};
use devices::vhost_user::{
    self, Connection, MemoryRegion, RateLimit, Socket, SocketError, VHOST_USER_F_PROTOCOL_FEATURES,
};
use virtqueue::net::{F_MRG_RXBUF, F_STATUS, features};
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Layout, RingConfig};

use super::fds;
use super::memory::Table;
use super::path::{Ends, Queue, Rings};
use crate::cli::relay::PortConfig;

/// What a front-end may negotiate.
const FEATURES: u64 = features::VERSION_1
    | features::EVENT_IDX
    | features::IN_ORDER
    | features::INDIRECT_DESC
    | features::RING_PACKED
    | F_MRG_RXBUF
    | F_STATUS
    | VHOST_USER_F_PROTOCOL_FEATURES;

/// How long to wait between two tries to connect, and after a connection that was dropped.
pub const RETRY: Duration = Duration::from_millis(100);
/// How many messages are dealt with before frames get their turn again.
const MESSAGES: usize = 32;

/// Why a connection was dropped.
#[derive(Debug)]
pub enum Lost {
    /// It failed, or was closed.
    Connection(vhost_user::Error),
    /// A message that makes no sense.
    Fault(Fault),
    /// A ring that cannot be used, and its size.
    Ring(usize, u32),
    /// A feature that there is no way to do without.
    Legacy,
    /// A rule of the rings was broken while frames went over.
    Broken(virtqueue::Error),
    /// The host failed.
    Host(io::Error),
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(error) => error.fmt(f),
            Self::Fault(error) => error.fmt(f),
            Self::Ring(index, size) => write!(
                f,
                "ring {index}: its size ({size}), its addresses or its base do not fit the layout or the memory table"
            ),
            Self::Legacy => f.write_str("it did not negotiate VIRTIO_F_VERSION_1"),
            Self::Broken(error) => error.fmt(f),
            Self::Host(error) => write!(f, "host: {error}"),
        }
    }
}

impl From<vhost_user::Error> for Lost {
    fn from(error: vhost_user::Error) -> Self {
        Self::Connection(error)
    }
}

impl From<Fault> for Lost {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<io::Error> for Lost {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// Memory and rings of a connection.
#[derive(Debug, Default)]
struct Host {
    memory: Option<Table>,
    rings: Option<Rings>,
}

impl Served for Host {
    fn stop(&mut self) -> Option<[u32; VRINGS]> {
        self.rings.take().map(|rings| rings.bases())
    }

    fn set_memory(
        &mut self,
        table: Vec<(MemoryRegion, OwnedFd)>,
    ) -> Result<(), (usize, io::Error)> {
        self.memory = None;
        self.memory = Some(Table::map(table)?);
        Ok(())
    }

    fn check_eventfd(&mut self, fd: &OwnedFd) -> io::Result<()> {
        let what = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if what.to_str() != Some("anon_inode:[eventfd]") {
            return Err(io::Error::other("it is no eventfd"));
        }
        // Both sides share the flag. Who takes it back holds up nothing but this link, which no frame crosses without it anyway.
        fds::set_nonblocking(fd)
    }
}

/// A connection and what came of it.
#[derive(Debug)]
struct Session {
    connection: Connection,
    backend: Backend,
    served: Host,
}

/// A front-end, or the place where it is met.
#[derive(Debug)]
pub struct Link {
    name: &'static str,
    socket: Socket,
    session: Option<Session>,
    /// Not to be tried before.
    next: Instant,
    limit: RateLimit,
}

impl Link {
    /// A place where no front-end has come yet. `name` is for log lines.
    pub fn new(name: &'static str, config: PortConfig) -> Result<Self, SocketError> {
        Ok(Self {
            name,
            socket: Socket::new(config.path, config.role)?,
            session: None,
            next: Instant::now(),
            limit: RateLimit::new(Duration::from_secs(1)),
        })
    }

    /// The rings, while they can be used.
    pub fn rings(&mut self) -> Option<&mut Rings> {
        self.session.as_mut()?.served.rings.as_mut()
    }

    /// What becomes readable when there is something for [`Link::service`] to do; `None` where it has to be tried.
    pub fn control(&self) -> Option<BorrowedFd<'_>> {
        match &self.session {
            Some(session) if session.connection.wants_write() => None,
            Some(session) => Some(fds::lend(&session.connection, AsRawFd::as_raw_fd)),
            None if Instant::now() < self.next => None,
            None => self
                .socket
                .listener()
                .map(|fd| fds::lend(&self.socket, |_| fd)),
        }
    }

    /// Where kicks arrive.
    pub fn kicks(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let rings = self.session.as_ref().and_then(|s| s.served.rings.as_ref());
        rings.into_iter().flat_map(Rings::kicks)
    }

    /// Deals with what has come, and looks for a front-end where none is there.
    pub fn service(&mut self) {
        if self.session.is_none() && Instant::now() >= self.next {
            match self.socket.try_connect() {
                Ok(Some(connection)) => {
                    log::info!("{}: connected", self.name);
                    self.session = Some(Session {
                        connection,
                        backend: Backend::new(FEATURES),
                        served: Host::default(),
                    });
                }
                Ok(None) if self.socket.listener().is_some() => {}
                Ok(None) => self.next = Instant::now() + RETRY,
                Err(error) => {
                    self.next = Instant::now() + RETRY;
                    self.warn(&error);
                }
            }
        }
        if let Some(session) = &mut self.session
            && let Err(lost) = session.service(self.name)
        {
            self.lose(&lost);
        }
    }

    /// Drops the connection; the next front-end may come.
    pub fn lose(&mut self, lost: &Lost) {
        if let Some(session) = self.session.take() {
            session.report(lost);
        }
        self.next = Instant::now() + RETRY;
        match lost {
            Lost::Connection(error) if error.is_disconnect() => {
                log::info!("{}: the front-end is gone", self.name);
            }
            lost => self.warn(&format_args!("the front-end is dropped: {lost}")),
        }
    }

    fn warn(&mut self, what: &dyn std::fmt::Display) {
        if let Some(more) = self.limit.allow(Instant::now()) {
            let name = self.name;
            match more {
                0 => log::warn!("{name}: {what}"),
                _ => log::warn!("{name}: {what} (and {more} more lines that were left out)"),
            }
        }
    }
}

impl Session {
    fn service(&mut self, name: &str) -> Result<(), Lost> {
        self.connection.flush()?;
        for _ in 0..MESSAGES {
            // Nothing is taken from a peer that does not read the answers.
            if self.connection.wants_write() {
                break;
            }
            let Some(message) = self.connection.receive()? else {
                break;
            };
            if let Some(answer) = self.backend.handle(message, &mut self.served)? {
                self.connection.send(&answer)?;
            }
        }
        if self.served.rings.is_none()
            && let Some(vrings) = self.backend.ready()
        {
            let mut rings = start(&self.backend, vrings, self.served.memory.as_ref())?;
            rings.disarm();
            log::info!(
                "{name}: serving {} rings of {} and {}, features {:#x}",
                match &rings {
                    Rings::Split(_) => "split",
                    Rings::Packed(_) => "packed",
                },
                vrings[0].size,
                vrings[1].size,
                self.backend.features(),
            );
            self.served.rings = Some(rings);
        }
        Ok(())
    }

    /// Tells a front-end that broke its rings (VHOST_USER_SET_VRING_ERR).
    fn report(&self, lost: &Lost) {
        let (Lost::Broken(_) | Lost::Ring(..), Some(vrings)) = (lost, self.backend.ready()) else {
            return;
        };
        for error in vrings.iter().filter_map(|vring| vring.error.as_ref()) {
            if let Ok(copy) = error.try_clone() {
                let _ = File::from(copy).write(&1_u64.to_ne_bytes());
            }
        }
    }
}

/// The data path over rings that the front-end has started.
fn start(
    backend: &Backend,
    vrings: &[Vring; VRINGS],
    memory: Option<&Table>,
) -> Result<Rings, Lost> {
    if backend.features() & features::VERSION_1 == 0 {
        return Err(Lost::Legacy);
    }
    let memory = memory.ok_or(Lost::Ring(0, vrings[0].size))?;
    Ok(if backend.features() & features::RING_PACKED == 0 {
        Rings::Split(ends::<Split>(backend, vrings, memory)?)
    } else {
        Rings::Packed(ends::<Packed>(backend, vrings, memory)?)
    })
}

fn ends<L: Layout>(
    backend: &Backend,
    vrings: &[Vring; VRINGS],
    memory: &Table,
) -> Result<Ends<L::Device<Table>>, Lost> {
    let queue = |index: usize| queue::<L>(backend, index, &vrings[index], memory);
    Ok(Ends {
        memory: memory.clone(),
        mergeable: backend.features() & F_MRG_RXBUF != 0,
        to_guest: queue(0)?,
        from_guest: queue(1)?,
    })
}

fn queue<L: Layout>(
    backend: &Backend,
    index: usize,
    vring: &Vring,
    memory: &Table,
) -> Result<Queue<L::Device<Table>>, Lost> {
    let config = config::<L>(backend, vring);
    // A front-end that never sets a base means the start.
    let base = vring.base.unwrap_or(L::FRESH);
    let ring = config.and_then(|config| {
        let ring = L::device_at(memory.clone(), &config, base).ok()?;
        Some((ring, config.size))
    });
    let (ring, size) = ring.ok_or(Lost::Ring(index, vring.size))?;
    let copy = |fd: &Option<OwnedFd>| -> io::Result<Option<File>> {
        let copy = fd.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(copy.map(File::from))
    };
    Ok(Queue {
        ring,
        size,
        call: copy(&vring.call)?,
        kick: copy(&vring.kick)?,
    })
}

/// Where a ring lies, as far as the front-end has said.
fn config<L: Layout>(backend: &Backend, vring: &Vring) -> Option<RingConfig> {
    let negotiated = |bit| backend.features() & bit != 0;
    let size = u16::try_from(vring.size).ok()?;
    let lens = L::area_sizes(size)?;
    let areas = vring.areas?;
    let area = |at: usize| backend.translate(areas[at], u64::try_from(lens[at]).ok()?);
    Some(RingConfig {
        size,
        desc: area(0)?,
        driver: area(1)?,
        device: area(2)?,
        event_idx: negotiated(features::EVENT_IDX),
        in_order: negotiated(features::IN_ORDER),
        indirect: negotiated(features::INDIRECT_DESC),
    })
}

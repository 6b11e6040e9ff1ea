//! Accesses of the guest that wait for a translation.
//!
//! A vCPU files what it needs and waits for a bounded time; the device thread asks the front-end (on the channel of SET_BACKEND_REQ_FD) and looks at
//! each translation that comes. A vCPU has one access at a time, so there are few.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::backend::{Backend, PAGE};
use super::{Counters, count};
use crate::host::Access;
use crate::vhost_user::{
    self, Connection, DecodeError, Iotlb, IotlbKind, Message, Payload, U64, backend_requests,
};

/// How many accesses may wait, and how many questions the front-end may owe an answer to.
const MAX_OUTSTANDING: usize = 64;

/// What the front-end did on the channel that is not in the protocol. The channel closes; the connection does not.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error("{0}")]
    Connection(#[from] vhost_user::Error),
    #[error("a message that answers no question ({} with flags {:#x} and {} file descriptors)", .0, .1, .2)]
    Unasked(u32, u32, usize),
    #[error("an answer with {0}")]
    Payload(#[from] DecodeError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Filed,
    /// The front-end was asked for this page.
    Asked(u64),
    /// Whether the access is allowed now.
    Answered(bool),
}

struct Waiting {
    range: Range<u64>,
    access: Access,
    progress: Progress,
}

#[derive(Default)]
struct State {
    /// There is somebody to ask.
    open: bool,
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
}

/// What vCPUs wait for.
#[derive(Default)]
pub(super) struct Misses {
    state: Mutex<State>,
    answered: Condvar,
}

impl Misses {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until an access (in window offsets) is allowed, refused, or nobody is there to say, at most for `timeout`. Returns whether it is
    /// worth another try. `wake` tells the device thread.
    pub(super) fn wait(
        &self,
        range: Range<u64>,
        access: Access,
        timeout: Duration,
        wake: impl FnOnce(),
    ) -> bool {
        let mut state = self.state();
        if !state.open || timeout.is_zero() || state.waiting.len() >= MAX_OUTSTANDING {
            return false;
        }
        let ticket = state.next;
        state.next += 1;
        let progress = Progress::Filed;
        state.waiting.insert(
            ticket,
            Waiting {
                range,
                access,
                progress,
            },
        );
        wake();
        let is_waiting = |state: &mut State| {
            let waiting = state.waiting.get(&ticket);
            waiting.is_some_and(|waiting| !matches!(waiting.progress, Progress::Answered(_)))
        };
        let (mut state, _) = self
            .answered
            .wait_timeout_while(state, timeout, is_waiting)
            .unwrap_or_else(PoisonError::into_inner);
        let done = state.waiting.remove(&ticket);
        done.is_some_and(|waiting| waiting.progress == Progress::Answered(true))
    }

    /// Whether there is somebody to ask from now on. Where not, nobody waits any longer.
    pub(super) fn set_open(&self, open: bool) {
        let mut state = self.state();
        state.open = open;
        if !open {
            for waiting in state.waiting.values_mut() {
                if !matches!(waiting.progress, Progress::Answered(_)) {
                    waiting.progress = Progress::Answered(false);
                }
            }
            self.answered.notify_all();
        }
    }

    /// The front-end has no mapping for a page that it was asked for.
    fn refuse(&self, ticket: u64, page: u64) {
        if let Some(waiting) = self.state().waiting.get_mut(&ticket)
            && waiting.progress == Progress::Asked(page)
        {
            waiting.progress = Progress::Answered(false);
            self.answered.notify_all();
        }
    }
}

/// The device's end of the channel.
pub(super) struct Channel {
    connection: Connection,
    /// The questions that an answer is owed to, in order: whose, and about which page.
    owed: VecDeque<(u64, u64)>,
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.connection.as_raw_fd()
    }
}

impl Channel {
    /// Takes a connected Unix socket. What lies behind other descriptors is not waited for.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        let stream = UnixStream::from(socket);
        stream.peer_addr()?;
        Ok(Self {
            connection: Connection::new(stream)?,
            owed: VecDeque::new(),
        })
    }

    pub(super) fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Takes the answers that have come, `budget` at most.
    pub(super) fn receive(&mut self, misses: &Misses, budget: usize) -> Result<(), Fault> {
        self.connection.flush()?;
        for _ in 0..budget {
            let Some(message) = self.connection.receive()? else {
                break;
            };
            let Message {
                request,
                flags,
                payload,
                fds,
            } = &message;
            let fits =
                message.is_reply() && *request == backend_requests::IOTLB_MSG && fds.is_empty();
            let asked = self.owed.pop_front().filter(|_| fits);
            let (ticket, page) = asked.ok_or(Fault::Unasked(*request, *flags, fds.len()))?;
            // 0 says that an update is on its way; it may have been here before this answer.
            if U64::decode(payload)? != U64(0) {
                misses.refuse(ticket, page);
            }
        }
        Ok(())
    }

    /// Looks at every access that waits: whether it can go on, or what the front-end is to be asked. `updated` are the addresses whose translation has
    /// come since the last time.
    pub(super) fn ask(
        &mut self,
        misses: &Misses,
        backend: &Backend,
        updated: &[Range<u64>],
        counters: &Counters,
    ) -> Result<(), Fault> {
        let mut state = misses.state();
        let mut any = false;
        for (&ticket, waiting) in &mut state.waiting {
            if matches!(waiting.progress, Progress::Answered(_)) {
                continue;
            }
            let page = backend
                .first_missing(&waiting.range, waiting.access)
                .map(|missing| missing & !(PAGE - 1));
            waiting.progress = match (page, waiting.progress) {
                (None, progress) => {
                    if matches!(progress, Progress::Asked(_)) {
                        count(&counters.misses_answered);
                    }
                    Progress::Answered(true)
                }
                (Some(page), Progress::Asked(asked)) if asked == page => {
                    if !updated.iter().any(|range| range.contains(&page)) {
                        continue;
                    }
                    // That was the answer, and it does not allow this access.
                    Progress::Answered(false)
                }
                (Some(_), _) if self.owed.len() >= MAX_OUTSTANDING || self.wants_write() => {
                    Progress::Answered(false)
                }
                (Some(page), _) => {
                    let needs_reply = backend.acknowledges();
                    let message = miss(page, waiting.access).with_need_reply(needs_reply);
                    self.connection.send(&message)?;
                    count(&counters.misses);
                    if needs_reply {
                        self.owed.push_back((ticket, page));
                    }
                    Progress::Asked(page)
                }
            };
            any |= matches!(waiting.progress, Progress::Answered(_));
        }
        if any {
            misses.answered.notify_all();
        }
        Ok(())
    }
}

fn miss(page: u64, access: Access) -> Message {
    let iotlb = Iotlb {
        iova: page,
        size: PAGE,
        user_address: 0,
        read: access == Access::Read,
        write: access == Access::Write,
        kind: IotlbKind::Miss,
    };
    Message::request(backend_requests::IOTLB_MSG, &iotlb)
}

//! The channel on which a back-end asks something of the front-end ("Backend communication").
//!
//! It lives beside the main connection and does not take it along: a back-end that talks nonsense here loses this channel only.

use std::os::fd::{AsRawFd, RawFd};

use thiserror::Error;

use super::connection::{self, Connection};
use super::wire::{Iotlb, IotlbKind, Message, Payload, U64, backend_requests};

/// Why a channel is of no more use.
#[derive(Debug, Error)]
pub enum Error {
    /// The connection failed.
    #[error(transparent)]
    Connection(#[from] connection::Error),
    /// A reply came, and nothing is ever asked here.
    #[error("{} came as a reply", backend_requests::name(*.0))]
    Reply(u32),
}

/// What a back-end asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// It has no translation for an address.
    Miss(Iotlb),
    /// A translation does not allow its access.
    AccessFail(Iotlb),
    /// A request that this front-end knows nothing of, or one that makes no sense.
    Unknown,
}

/// A request of a back-end, to be handed to [`Channel::answer`].
#[derive(Debug)]
pub struct Asked {
    /// What it asks.
    pub ask: Ask,
    /// The request's number, of [`backend_requests`].
    pub request: u32,
    needs_reply: bool,
}

/// The front-end's end of the channel. Dropping it closes the channel.
#[derive(Debug)]
pub struct Channel(Connection);

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Channel {
    pub(super) fn new(connection: Connection) -> Self {
        Self(connection)
    }

    /// Sends what waits, and returns the next request where one is there. Nothing is taken from a back-end that does not read the
    /// answers. Any error ends the channel.
    pub fn receive(&mut self) -> Result<Option<Asked>, Error> {
        self.0.flush()?;
        if self.wants_write() {
            return Ok(None);
        }
        let Some(message) = self.0.receive()? else {
            return Ok(None);
        };
        if message.is_reply() {
            return Err(Error::Reply(message.request));
        }
        Ok(Some(Asked {
            ask: understand(&message),
            request: message.request,
            needs_reply: message.needs_reply(),
        }))
    }

    /// Answers a request, where the back-end wants an answer: whether what it asked for was done.
    pub fn answer(&mut self, asked: &Asked, done: bool) -> Result<(), Error> {
        if asked.needs_reply {
            let value = U64(u64::from(!done));
            self.0.send(&Message::reply(asked.request, &value))?;
        }
        Ok(())
    }

    /// Whether [`Channel::receive`] is to be called when the socket becomes writable, in place of readable.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.0.wants_write()
    }
}

fn understand(message: &Message) -> Ask {
    if message.request != backend_requests::IOTLB_MSG || !message.fds.is_empty() {
        return Ask::Unknown;
    }
    match Iotlb::decode(&message.payload) {
        Ok(iotlb) if iotlb.kind == IotlbKind::Miss => Ask::Miss(iotlb),
        Ok(iotlb) if iotlb.kind == IotlbKind::AccessFail => Ask::AccessFail(iotlb),
        _ => Ask::Unknown,
    }
}

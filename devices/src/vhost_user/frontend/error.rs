//! What goes wrong.

use std::io;

use thiserror::Error;

use super::super::connection;
use super::super::wire::{DecodeError, requests};

/// What the back-end did that the protocol does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Violation {
    /// A message came while none was owed.
    #[error("{} came unasked", requests::name(*.0))]
    Unasked(u32),
    /// A message came that is no reply to the oldest request, or no reply at all.
    #[error("{} (flags {flags:#x}) came where the reply to {} was owed", requests::name(*.got), requests::name(*.owed))]
    WrongReply {
        /// The request that waits longest.
        owed: u32,
        /// The request that the message names.
        got: u32,
        /// The flags of the message.
        flags: u32,
    },
    /// A reply came with file descriptors.
    #[error("file descriptors came with the reply to {}", requests::name(*.0))]
    Fds(u32),
    /// A reply has the wrong length.
    #[error("the reply to {}: {error}", requests::name(*.request))]
    Payload {
        /// What was asked.
        request: u32,
        /// What is wrong.
        error: DecodeError,
    },
    /// A value in a reply makes no sense.
    #[error("{} answers {value:#x}", requests::name(*.request))]
    Value {
        /// What was asked.
        request: u32,
        /// What it says.
        value: u64,
    },
    /// The back-end acknowledges with a failure.
    #[error("it refuses {} ({value:#x})", requests::name(*.request))]
    Refused {
        /// What was asked.
        request: u32,
        /// The acknowledgement, not zero.
        value: u64,
    },
}

/// Why the conversation ended, or could not go on.
#[derive(Debug, Error)]
pub enum Error {
    /// The connection failed.
    #[error(transparent)]
    Connection(#[from] connection::Error),
    /// The back-end broke the protocol.
    #[error("the back-end broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The back-end cannot take all of the memory.
    #[error("the back-end takes at most {limit} memory regions, this machine has {count}")]
    TooManyRegions {
        /// What the back-end takes.
        limit: u64,
        /// What there is.
        count: usize,
    },
    /// A call that does not fit the state: a fault of the caller.
    #[error("{0} is not possible now")]
    State(&'static str),
    /// The host failed.
    #[error("cannot share a file descriptor: {0}")]
    Duplicate(#[source] io::Error),
    /// The host gives no socket.
    #[error("cannot make a channel for the back-end's requests: {0}")]
    Channel(#[source] io::Error),
}

impl Error {
    /// Whether the peer went away, as opposed to a fault of the peer or of the host.
    #[must_use]
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::Connection(error) if error.is_disconnect())
    }
}

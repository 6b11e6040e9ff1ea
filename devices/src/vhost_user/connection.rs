//! Messages over a stream socket.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::sys;
use super::wire::{HEADER_SIZE, MAX_FDS, MAX_PAYLOAD, Message, flags};

/// How many bytes may wait for a peer that does not read.
const MAX_BACKLOG: usize = 64 << 10;

/// What a peer did that the framing of the protocol does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Violation {
    /// The version bits of the flags are not 1.
    #[error("flags {0:#x}: not version 1 of the protocol")]
    Version(u32),
    /// The header announces more than [`MAX_PAYLOAD`] bytes.
    #[error("a payload of {0} bytes (at most {MAX_PAYLOAD})")]
    PayloadSize(u32),
    /// More than [`MAX_FDS`] descriptors came with one message.
    #[error("more than {MAX_FDS} file descriptors with one message")]
    FdCount,
}

/// Why a connection is of no more use (but for [`Error::Unsendable`], which is refused before anything is sent).
#[derive(Debug, Error)]
pub enum Error {
    /// The peer closed the connection between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection in the middle of a message.
    #[error("the peer closed the connection in the middle of a message")]
    Truncated,
    /// The peer broke the framing.
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The peer does not read what is sent to it.
    #[error("the peer does not read: more than {MAX_BACKLOG} bytes wait for it")]
    Overflow,
    /// The message to send is longer or has more descriptors than the protocol carries.
    #[error("a message of {payload} bytes and {fds} file descriptors cannot be sent")]
    Unsendable {
        /// Length of its payload.
        payload: usize,
        /// Number of its descriptors.
        fds: usize,
    },
    /// The host failed.
    #[error("socket: {0}")]
    Io(#[source] io::Error),
}

impl Error {
    /// Whether the peer went away, as opposed to a fault of the peer or of the host.
    #[must_use]
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::Closed | Self::Truncated)
    }
}

/// Bytes that wait, and the descriptors that go with the first of them.
#[derive(Debug)]
struct Pending {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

/// A non-blocking stream socket that carries [`Message`]s. A message may arrive and leave in pieces of any size.
///
/// After an error the connection is to be dropped; whatever it held (pieces of messages, descriptors) closes with it.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    header: [u8; HEADER_SIZE],
    /// Bytes of header and payload that are here.
    filled: usize,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
    queue: VecDeque<Pending>,
    backlog: usize,
    blocked: bool,
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Connection {
    /// Takes over a connected stream and makes it non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            header: [0; HEADER_SIZE],
            filled: 0,
            payload: Vec::new(),
            fds: Vec::new(),
            queue: VecDeque::new(),
            backlog: 0,
            blocked: false,
        })
    }

    /// The next message, or `None` where it is not complete yet.
    ///
    /// Descriptors belong to the message in whose bytes they came, with whichever piece of it.
    pub fn receive(&mut self) -> Result<Option<Message>, Error> {
        while self.filled < HEADER_SIZE {
            match read(&self.stream, &mut self.header[self.filled..], &mut self.fds) {
                Ok(Some(0)) if self.filled == 0 => return Err(Error::Closed),
                Ok(Some(0)) => return Err(Error::Truncated),
                Ok(Some(len)) => self.filled += len,
                Ok(None) => return Ok(None),
                Err(Error::Closed) if self.filled > 0 => return Err(Error::Truncated),
                Err(error) => return Err(error),
            }
        }
        self.payload.resize(self.payload_size()?, 0);
        let end = HEADER_SIZE + self.payload.len();
        while self.filled < end {
            let rest = &mut self.payload[self.filled - HEADER_SIZE..];
            match read(&self.stream, rest, &mut self.fds) {
                Ok(Some(0)) | Err(Error::Closed) => return Err(Error::Truncated),
                Ok(Some(len)) => self.filled += len,
                Ok(None) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        self.filled = 0;
        Ok(Some(Message {
            request: self.field(0),
            flags: self.field(4),
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
        }))
    }

    fn field(&self, at: usize) -> u32 {
        let mut field = [0; 4];
        field.copy_from_slice(&self.header[at..at + 4]);
        u32::from_le_bytes(field)
    }

    /// The payload's size as the header has it, checked before anything is allocated for it.
    fn payload_size(&self) -> Result<usize, Violation> {
        let flags = self.field(4);
        if flags & flags::VERSION_MASK != flags::VERSION {
            return Err(Violation::Version(flags));
        }
        let size = self.field(8);
        if size as usize > MAX_PAYLOAD {
            return Err(Violation::PayloadSize(size));
        }
        Ok(size as usize)
    }

    /// Sends a message, or as much of it as the socket takes; the rest waits for [`Connection::flush`].
    pub fn send(&mut self, message: &Message) -> Result<(), Error> {
        let bytes = sendable(message)?;
        let mut sent = 0;
        if self.queue.is_empty() {
            sent = write(&self.stream, &bytes, &message.fds)?;
            if sent == bytes.len() {
                return Ok(());
            }
        }
        if self.backlog + bytes.len() - sent > MAX_BACKLOG {
            return Err(Error::Overflow);
        }
        let fds = if sent == 0 {
            let copies = message.fds.iter().map(OwnedFd::try_clone);
            copies.collect::<io::Result<_>>().map_err(Error::Io)?
        } else {
            Vec::new()
        };
        self.backlog += bytes.len() - sent;
        self.queue.push_back(Pending { bytes, sent, fds });
        self.flush()
    }

    /// As [`Connection::send`], but the message waits for [`Connection::flush`] in any case: many small ones go in one piece, and wake
    /// the peer once.
    pub fn post(&mut self, message: &Message) -> Result<(), Error> {
        if !message.fds.is_empty() {
            return self.send(message);
        }
        let bytes = sendable(message)?;
        if self.backlog + bytes.len() > MAX_BACKLOG {
            return Err(Error::Overflow);
        }
        self.backlog += bytes.len();
        match self.queue.back_mut() {
            // One that is on its way is left alone: it would grow for ever if the peer were just slow enough.
            Some(last) if last.sent == 0 => last.bytes.extend_from_slice(&bytes),
            _ => self.queue.push_back(Pending {
                bytes,
                sent: 0,
                fds: Vec::new(),
            }),
        }
        Ok(())
    }

    /// Sends what waits, as far as the socket takes it.
    pub fn flush(&mut self) -> Result<(), Error> {
        while let Some(pending) = self.queue.front_mut() {
            let rest = pending.bytes.get(pending.sent..).unwrap_or_default();
            let sent = write(&self.stream, rest, &pending.fds)?;
            if sent == 0 {
                self.blocked = true;
                return Ok(());
            }
            pending.fds.clear();
            pending.sent += sent;
            self.backlog -= sent;
            if pending.sent == pending.bytes.len() {
                self.queue.pop_front();
            }
        }
        self.blocked = false;
        Ok(())
    }

    /// Whether the socket took less than there was for it the last time.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Whether something waits for the socket to become writable.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.queue.is_empty()
    }
}

/// The bytes of a message, where it can be sent.
fn sendable(message: &Message) -> Result<Vec<u8>, Error> {
    if message.payload.len() > MAX_PAYLOAD || message.fds.len() > MAX_FDS {
        return Err(Error::Unsendable {
            payload: message.payload.len(),
            fds: message.fds.len(),
        });
    }
    Ok([&message.header()[..], &message.payload].concat())
}

/// One read; `None` where nothing is there. New descriptors join `fds`.
fn read(
    stream: &UnixStream,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, Error> {
    let received = loop {
        match sys::receive(stream, buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result,
        }
    };
    match received {
        Ok(received) => {
            if received.truncated && received.fds.len() < MAX_FDS {
                // There was room for more in the buffer, so it is this process that has room for no more.
                return Err(Error::Io(io::Error::from_raw_os_error(libc::EMFILE)));
            }
            fds.extend(received.fds);
            if received.truncated || fds.len() > MAX_FDS {
                return Err(Violation::FdCount.into());
            }
            Ok(Some(received.len))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(gone(error)),
    }
}

/// One write; 0 where the socket takes nothing now. The descriptors go with the first byte.
fn write(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Error> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    loop {
        // What carries descriptors is a front-end's; its socket is its own.
        let result = if fds.is_empty() {
            sys::send(stream, bytes)
        } else {
            stream
                .send_with_fds(&[bytes], &fds)
                .map_err(io::Error::from)
        };
        match result {
            Ok(sent) => return Ok(sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(gone(error)),
        }
    }
}

/// Tells a peer that went away from a failure of the host.
fn gone(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Closed,
        _ => Error::Io(error),
    }
}

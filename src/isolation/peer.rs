//! A front-end that is no VM of ours: messages that a proper one would never send, files that change under the back-end, and
//! descriptors that are not what they are said to be.

mod attacks;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use devices::vhost_user::{
    Connection, Iotlb, IotlbKind, MemoryRegion, MemoryTable, Message, Payload, U64,
    VHOST_USER_F_PROTOCOL_FEATURES, protocol_features, requests,
};

use super::lab::{Lab, Tried, Trouble};
use crate::sys;

pub use attacks::attacks;

/// VIRTIO_F_ACCESS_PLATFORM.
const ACCESS_PLATFORM: u64 = 1 << 33;
/// How long the back-end may take to serve the next front-end after it has lost one.
const SERVE: Duration = Duration::from_secs(8);
/// How long it may take to answer one message.
const REPLY: Duration = Duration::from_secs(2);
/// After so long a back-end that reads nothing is taken to have stopped reading.
const FULL: Duration = Duration::from_millis(500);

/// What came of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// A number: 0 means that it was done.
    Number(u64),
    /// The back-end closed the connection.
    Closed,
    /// Nothing.
    Silence,
}

impl Answer {
    /// Whether the back-end refused what it had to refuse.
    fn refused(self) -> bool {
        match self {
            Self::Number(value) => value != 0,
            Self::Closed => true,
            Self::Silence => false,
        }
    }
}

/// The connection of a front-end that the study plays.
struct Peer {
    connection: Connection,
    /// The same socket, to wait for it.
    stream: UnixStream,
}

impl Peer {
    /// Connects, and waits until the back-end's guest answers: it may still be busy with the loss of the one before.
    fn connect(lab: &Lab) -> Tried<(Self, u64)> {
        let deadline = Instant::now() + SERVE;
        let mut last = Answer::Silence;
        while Instant::now() < deadline {
            if let Ok(stream) = UnixStream::connect(lab.socket()) {
                let mut peer = Self {
                    stream: stream.try_clone().context("dup")?,
                    connection: Connection::new(stream).context("a socket")?,
                };
                last = peer.ask(&Message::bare(requests::GET_FEATURES))?;
                if let Answer::Number(features) = last {
                    return Ok((peer, features));
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(Trouble::Victim(format!(
            "the back-end does not serve a front-end that comes ({last:?})"
        )))
    }

    /// The same with features negotiated; the window shows translations, or the memory table.
    fn negotiate(lab: &Lab, translations: bool) -> Tried<Self> {
        let (mut peer, features) = Self::connect(lab)?;
        if features & VHOST_USER_F_PROTOCOL_FEATURES == 0 {
            return Err(anyhow!("the back-end has no protocol features").into());
        }
        peer.send(&Message::bare(requests::SET_OWNER))?;
        let answer = peer.ask(&Message::bare(requests::GET_PROTOCOL_FEATURES))?;
        let Answer::Number(offered) = answer else {
            return Err(Trouble::Victim(format!(
                "the back-end does not name its protocol features ({answer:?})"
            )));
        };
        let wanted = protocol_features::REPLY_ACK
            | protocol_features::BACKEND_REQ
            | protocol_features::CONFIGURE_MEM_SLOTS;
        let chosen = U64(offered & wanted);
        peer.send(&Message::request(requests::SET_PROTOCOL_FEATURES, &chosen))?;
        let mut features = features & !ACCESS_PLATFORM;
        if translations {
            features |= ACCESS_PLATFORM;
        }
        peer.send(&Message::request(requests::SET_FEATURES, &U64(features)))?;
        Ok(peer)
    }

    /// Sends; that the back-end has closed the connection meanwhile is no error, since the next answer says so.
    fn send(&mut self, message: &Message) -> Tried<()> {
        let _ = self.connection.send(message);
        self.flush()
    }

    /// Waits until all has gone out.
    fn flush(&mut self) -> Tried<()> {
        let deadline = Instant::now() + REPLY;
        while self.connection.wants_write() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            if self.connection.flush().is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Bytes that need not be messages; returns how many the back-end took before it closed the connection or stopped reading.
    fn raw(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        let mut deadline = Instant::now() + FULL;
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            match (&self.stream).write(rest) {
                Ok(n) => {
                    sent += n;
                    deadline = Instant::now() + FULL;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if Instant::now() >= deadline {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(_) => break,
            }
        }
        sent
    }

    /// The next answer with a number; other messages are passed over.
    fn answer(&mut self, patience: Duration) -> Tried<Answer> {
        let deadline = Instant::now() + patience;
        loop {
            match self.connection.receive() {
                Ok(Some(message)) if message.is_reply() => {
                    if let Ok(U64(value)) = U64::decode(&message.payload) {
                        return Ok(Answer::Number(value));
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(Answer::Silence);
                    }
                    sys::poll(&[self.stream.as_fd()], Some(left)).context("poll")?;
                }
                Err(_) => return Ok(Answer::Closed),
            }
        }
    }

    /// A message and what comes of it.
    fn ask(&mut self, message: &Message) -> Tried<Answer> {
        self.send(message)?;
        self.answer(REPLY)
    }

    /// A request that is answered with 0 or another number.
    fn request(
        &mut self,
        request: u32,
        payload: &impl Payload,
        fds: Vec<OwnedFd>,
    ) -> Tried<Answer> {
        let message = Message::request(request, payload);
        self.ask(&message.with_fds(fds).with_need_reply(true))
    }

    /// A memory table with these files.
    fn table(&mut self, regions: &[MemoryRegion], files: &[&File]) -> Tried<Answer> {
        let table = MemoryTable(regions.to_vec());
        self.request(requests::SET_MEM_TABLE, &table, descriptors(files)?)
    }

    /// A translation.
    fn update(&mut self, iova: u64, size: u64, user_address: u64) -> Tried<Answer> {
        let update = Iotlb {
            iova,
            size,
            user_address,
            read: true,
            write: true,
            kind: IotlbKind::Update,
        };
        self.request(requests::IOTLB_MSG, &update, Vec::new())
    }

    /// Whether the back-end still answers this front-end.
    fn is_served(&mut self) -> Tried<bool> {
        let answer = self.ask(&Message::bare(requests::GET_FEATURES))?;
        Ok(matches!(answer, Answer::Number(_)))
    }
}

fn descriptors(files: &[&File]) -> Tried<Vec<OwnedFd>> {
    let copies = files.iter().map(|file| file.try_clone().map(OwnedFd::from));
    Ok(copies.collect::<Result<_, _>>().context("dup")?)
}

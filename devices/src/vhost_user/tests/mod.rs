//! Tests of the protocol: the codec by itself, the state machine with a scripted peer, and both against the `vhost` crate.

mod backend;
mod connection;
mod frontend;
mod inflight;
pub(crate) mod interop;
mod iotlb;
pub(crate) mod noise;
mod socket;
mod wire;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::tempfile::TempFile;

use super::{Connection, Message};

/// A connection and the raw stream at its other end, which blocks.
fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(ours).unwrap(), theirs)
}

/// Both ends of a connection.
fn connections() -> (Connection, Connection) {
    let (ours, theirs) = pair();
    (ours, Connection::new(theirs).unwrap())
}

/// Gives a stream the smallest send buffer there is, so that it takes long messages in pieces.
fn shrink_send_buffer(stream: &impl AsRawFd) {
    let size: libc::c_int = 1;
    #[allow(unsafe_code)] // The standard library has no such setting.
    // SAFETY: the option's value is one int, which is valid for the call.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            (&raw const size).cast(),
            4,
        )
    };
    assert_eq!(result, 0);
}

/// `count` descriptors of a new file.
fn descriptors(count: usize) -> Vec<OwnedFd> {
    let file: File = TempFile::new().unwrap().into_file();
    (0..count)
        .map(|_| file.try_clone().unwrap().into())
        .collect()
}

/// A pipe tells whether all copies of its writing end are closed: then reading from it ends.
struct Leash {
    reader: std::io::PipeReader,
}

impl Leash {
    fn new() -> (Self, OwnedFd) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Self { reader }, writer.into())
    }

    /// Whether nobody holds the writing end any more, not even a socket's queue.
    fn is_free(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.reader.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        #[allow(unsafe_code)] // A test's look at a pipe.
        // SAFETY: one pollfd, which is valid for the call, and no waiting.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        ready == 1 && poll.revents & libc::POLLHUP != 0
    }
}

/// The bytes of a message on the wire.
fn bytes(message: &Message) -> Vec<u8> {
    [&message.header()[..], &message.payload].concat()
}

/// A new empty directory, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vhost-user-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

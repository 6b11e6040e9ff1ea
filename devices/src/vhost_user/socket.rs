//! Where a peer is found.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::connection::Connection;
use super::sys;

/// Who makes the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketRole {
    /// This side makes the socket and waits.
    Listen,
    /// The peer makes the socket, this side connects to it.
    Connect,
}

/// Why a socket cannot be used. All of it is the host's or its user's doing; a peer has no part in it.
#[derive(Debug, Error)]
pub enum Error {
    /// Somebody listens there already.
    #[error("{}: another process listens on this socket", .0.display())]
    InUse(PathBuf),
    /// There is a file that is no socket; it is left alone.
    #[error("{}: exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// A socket address has no room for the path.
    #[error("{}: {} bytes are too long for a socket's path (at most {max})", .path.display(), .path.as_os_str().len(), max = sys::MAX_PATH)]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The host refused.
    #[error("{}: cannot {action}: {source}", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// A path at which a peer is met.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: Option<Listener>,
}

/// A bound socket and the identity (device, inode) of its file.
#[derive(Debug)]
struct Listener {
    socket: UnixListener,
    identity: Option<(u64, u64)>,
}

impl Socket {
    /// `Listen` makes the socket now and listens on it; a socket file that nobody listens on any more is replaced. `Connect`
    /// only checks the path.
    pub fn new(path: impl Into<PathBuf>, role: SocketRole) -> Result<Self, Error> {
        let path = path.into();
        if path.as_os_str().as_bytes().len() > sys::MAX_PATH {
            return Err(Error::PathTooLong { path });
        }
        let listener = match role {
            SocketRole::Listen => Some(listen(&path)?),
            SocketRole::Connect => None,
        };
        Ok(Self { path, listener })
    }

    /// The path, for log lines.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts a waiting peer, or tries once to connect. `None` where there is no peer yet.
    pub fn try_connect(&mut self) -> Result<Option<Connection>, Error> {
        let (action, result) = match &self.listener {
            Some(listener) => ("accept", listener.socket.accept().map(|(stream, _)| stream)),
            None => ("connect", sys::connect(&self.path)),
        };
        let error = |source| Error::Io {
            path: self.path.clone(),
            action,
            source,
        };
        match result {
            Ok(stream) => Connection::new(stream).map(Some).map_err(error),
            Err(source) if nobody(&source) => Ok(None),
            Err(source) => Err(error(source)),
        }
    }

    /// Accepts whoever waits, as [`SocketRole::Listen`]; `None` where there is nobody.
    pub fn accept(&self) -> Result<Option<UnixStream>, Error> {
        let Some(listener) = &self.listener else {
            return Ok(None);
        };
        match listener.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(source) if nobody(&source) => Ok(None),
            Err(source) => Err(Error::Io {
                path: self.path.clone(),
                action: "accept",
                source,
            }),
        }
    }

    /// The descriptor that becomes readable when a peer waits; `None` for `Connect`.
    #[must_use]
    pub fn listener(&self) -> Option<RawFd> {
        self.listener
            .as_ref()
            .map(|listener| listener.socket.as_raw_fd())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // The path may lead to somebody else's socket by now; that one stays.
        if let Some(listener) = &self.listener
            && listener.identity.is_some()
            && identity(&self.path) == listener.identity
        {
            // There is nobody to tell about a failure; a file that stays behind is replaced by the next user.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether an error only says that there is no peer at the moment.
fn nobody(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound
            | Kind::ConnectionRefused
            | Kind::WouldBlock
            | Kind::ConnectionAborted
            | Kind::Interrupted
    )
}

/// Device and inode of the socket file at `path`.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    metadata
        .file_type()
        .is_socket()
        .then(|| (metadata.dev(), metadata.ino()))
}

fn listen(path: &Path) -> Result<Listener, Error> {
    let error = |action| {
        move |source| Error::Io {
            path: path.to_path_buf(),
            action,
            source,
        }
    };
    let socket = match UnixListener::bind(path) {
        Err(busy) if busy.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path)
        }
        result => result,
    };
    let socket = socket.map_err(|source| match source.kind() {
        // Somebody was faster between the removal and the second try.
        io::ErrorKind::AddrInUse => Error::InUse(path.to_path_buf()),
        _ => error("listen")(source),
    })?;
    socket.set_nonblocking(true).map_err(error("listen"))?;
    Ok(Listener {
        identity: identity(path),
        socket,
    })
}

/// Removes a socket file that nobody listens on. Only trying tells: the file outlives its process.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let before = identity(path).ok_or_else(|| Error::NotASocket(path.to_path_buf()))?;
    match sys::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // Connected, or a backlog that is full: somebody is there. Where it cannot be told, nothing is deleted.
        _ => return Err(Error::InUse(path.to_path_buf())),
    }
    if identity(path) != Some(before) {
        return Err(Error::InUse(path.to_path_buf()));
    }
    fs::remove_file(path).map_err(|source| Error::Io {
        path: path.to_path_buf(),
        action: "remove the stale socket",
        source,
    })
}

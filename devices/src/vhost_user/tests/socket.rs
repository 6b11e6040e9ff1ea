//! Where peers meet.

use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::Directory;
use crate::vhost_user::{Message, Socket, SocketError, SocketRole, requests};

fn listen(path: &Path) -> Result<Socket, SocketError> {
    Socket::new(path, SocketRole::Listen)
}

#[test]
fn the_two_roles_meet_and_messages_pass() {
    let directory = Directory::new();
    let path = directory.join("s");
    let mut connecting = Socket::new(&path, SocketRole::Connect).unwrap();
    assert!(connecting.listener().is_none());
    assert!(connecting.try_connect().unwrap().is_none(), "no file yet");
    let mut listening = listen(&path).unwrap();
    assert!(listening.listener().is_some());
    assert!(listening.try_connect().unwrap().is_none(), "no peer yet");
    let mut one = connecting.try_connect().unwrap().unwrap();
    let mut other = listening.try_connect().unwrap().unwrap();
    one.send(&Message::bare(requests::GET_FEATURES)).unwrap();
    let received = other.receive().unwrap().unwrap();
    assert_eq!(received.request, requests::GET_FEATURES);
    assert!(listening.try_connect().unwrap().is_none());
}

#[test]
fn a_path_that_somebody_listens_on_is_refused_and_left_alone() {
    let directory = Directory::new();
    let path = directory.join("s");
    let first = listen(&path).unwrap();
    let error = listen(&path).unwrap_err();
    assert!(matches!(error, SocketError::InUse(_)), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()));
    assert!(UnixStream::connect(&path).is_ok());
    drop(first);
}

#[test]
fn a_listener_with_a_full_backlog_counts_as_in_use_and_does_not_block_us() {
    let directory = Directory::new();
    let path = directory.join("s");
    let _listening = listen(&path).unwrap();
    let mut connecting = Socket::new(&path, SocketRole::Connect).unwrap();
    let mut waiting = Vec::new();
    while let Some(connection) = connecting.try_connect().unwrap() {
        waiting.push(connection);
        assert!(waiting.len() < 100_000, "the backlog has no end");
    }
    assert!(!waiting.is_empty());
    assert!(matches!(listen(&path), Err(SocketError::InUse(_))));
}

#[test]
fn a_stale_socket_file_is_replaced() {
    let directory = Directory::new();
    let path = directory.join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "the standard library leaves the file");
    let mut socket = listen(&path).unwrap();
    let _peer = UnixStream::connect(&path).unwrap();
    assert!(socket.try_connect().unwrap().is_some());
}

#[test]
fn a_file_that_is_no_socket_is_refused_and_left_alone() {
    let directory = Directory::new();
    let path = directory.join("precious");
    std::fs::write(&path, "data").unwrap();
    let error = listen(&path).unwrap_err();
    assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
}

#[test]
fn a_missing_directory_is_an_error_for_listen_and_nobody_yet_for_connect() {
    let directory = Directory::new();
    let path = directory.join("missing").join("s");
    let error = listen(&path).unwrap_err();
    assert!(
        matches!(&error, SocketError::Io { source, .. } if source.kind() == ErrorKind::NotFound),
        "{error}"
    );
    assert!(error.to_string().contains(path.to_str().unwrap()));
    let mut socket = Socket::new(&path, SocketRole::Connect).unwrap();
    assert!(socket.try_connect().unwrap().is_none());
}

#[test]
fn a_path_of_107_bytes_works_and_one_of_108_is_refused_in_both_roles() {
    let directory = Directory::new();
    let room = 107 - directory.0.as_os_str().len() - 1;
    let longest = directory.join("x".repeat(room));
    assert_eq!(longest.as_os_str().len(), 107);
    let _listening = listen(&longest).unwrap();
    let mut connecting = Socket::new(&longest, SocketRole::Connect).unwrap();
    assert!(connecting.try_connect().unwrap().is_some());
    let longer = directory.join("x".repeat(room + 1));
    for role in [SocketRole::Listen, SocketRole::Connect] {
        let error = Socket::new(&longer, role).unwrap_err();
        assert!(matches!(error, SocketError::PathTooLong { .. }), "{error}");
        assert!(error.to_string().contains("108"));
    }
}

#[test]
fn the_file_goes_with_its_listener() {
    let directory = Directory::new();
    let path = directory.join("s");
    let socket = listen(&path).unwrap();
    assert!(path.exists());
    drop(socket);
    assert!(!path.exists());
}

#[test]
fn a_file_that_somebody_else_put_there_since_stays() {
    let directory = Directory::new();
    let path = directory.join("s");
    let socket = listen(&path).unwrap();
    // Renamed, not removed: the number of its inode must not be free for the next file.
    std::fs::rename(&path, directory.join("old")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(socket);
    assert!(path.exists());
    assert!(UnixStream::connect(&path).is_ok());
}

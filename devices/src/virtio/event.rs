//! Eventfds and sockets that are shared with another process: nothing here waits for it.
#![allow(unsafe_code)] // poll(2), write(2) and taking over a descriptor have no safe form

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// Takes a descriptor as an eventfd. Nothing is checked here: who registers it finds out.
pub fn from_owned(fd: OwnedFd) -> EventFd {
    // SAFETY: `into_raw_fd` gives up the only owner of an open descriptor, and `EventFd` becomes the new one.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

/// The descriptor of an eventfd, as a peer would send it.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn into_owned(event: EventFd) -> OwnedFd {
    // SAFETY: as in `from_owned`, the other way round.
    unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }
}

/// Whether a read would return a count.
pub fn is_signalled(event: &EventFd) -> bool {
    ready(event, libc::POLLIN)
}

/// Signals an eventfd whose other holders are not trusted.
///
/// One whose counter is full is signalled already and left alone, because writing to it could block. A holder that fills the counter
/// between the check and the write stalls this thread until a signal or a read ends the wait; the write is not repeated then.
pub fn signal(event: &EventFd) {
    if ready(event, libc::POLLOUT) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the buffer is 8 readable bytes and the descriptor is open while `event` is borrowed.
        let _ = unsafe { libc::write(event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// Sets the counter to zero without waiting for a signal.
pub fn clear(event: &EventFd) {
    if ready(event, libc::POLLIN) {
        let mut count = [0u8; 8];
        // SAFETY: the buffer is 8 writable bytes and the descriptor is open while `event` is borrowed.
        let _ = unsafe { libc::read(event.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

/// Whether the other end of a socket is closed, whatever may still be there to read.
pub fn hung_up(socket: &impl AsRawFd) -> bool {
    ready(socket, libc::POLLHUP | libc::POLLERR)
}

/// A new eventfd that does not block and is not inherited.
pub fn new() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn ready(file: &impl AsRawFd, events: libc::c_short) -> bool {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one valid pollfd, and no waiting.
    let n = unsafe { libc::poll(&mut poll, 1, 0) };
    n == 1 && poll.revents & events != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_counter_does_not_block_the_one_who_signals() {
        let event = EventFd::new(0).unwrap();
        event.write(u64::MAX - 1).unwrap();
        signal(&event);
        assert_eq!(event.read().unwrap(), u64::MAX - 1);
    }

    #[test]
    fn clearing_an_idle_blocking_eventfd_does_not_block() {
        let event = EventFd::new(0).unwrap();
        clear(&event);
        signal(&event);
        assert!(is_signalled(&event));
        clear(&event);
        assert!(!is_signalled(&event));
    }
}

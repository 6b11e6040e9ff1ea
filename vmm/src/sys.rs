//! Small helpers that several modules share.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; a thread that panicked with the lock held does not take the others with it.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An I/O error that says what was wrong with the request.
pub(crate) fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

/// The same error with a few words in front that say what was being done.
pub(crate) fn context(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// A KVM call's errno with a few words in front.
pub(crate) fn kvm(what: &str, error: kvm_ioctls::Error) -> io::Error {
    context(what, error.into())
}

/// `bytes` for people: in the largest unit that divides it.
pub(crate) fn size_text(bytes: u64) -> String {
    match bytes {
        0 => "0 bytes".into(),
        n if n % (1 << 30) == 0 => format!("{} GiB", n >> 30),
        n if n % (1 << 20) == 0 => format!("{} MiB", n >> 20),
        n if n % (1 << 10) == 0 => format!("{} KiB", n >> 10),
        n => format!("{n} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_in_the_largest_whole_unit() {
        assert_eq!(size_text(3 << 30), "3 GiB");
        assert_eq!(size_text(1536 << 20), "1536 MiB");
        assert_eq!(size_text(4096), "4 KiB");
        assert_eq!(size_text(4097), "4097 bytes");
    }
}

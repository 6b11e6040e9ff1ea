//! Memory and rings for the integration tests.

// Test memory is mapped by hand. Not every test uses everything.
#![allow(unsafe_code, dead_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use virtqueue::linear::Linear;
use virtqueue::{Layout, Memory, Region, RingConfig};

/// A memory file, mapped twice, as two processes would: a driver that holds references to its mapping and a device that writes through its own
/// do not meet in one allocation. Device addresses are those of the driver's mapping. It stays mapped to the end of the process.
#[derive(Clone, Copy)]
pub struct Shared {
    pub driver: NonNull<u8>,
    pub len: usize,
    device: NonNull<u8>,
}

// SAFETY: addresses of memory that is never unmapped; what threads do with it is theirs to promise.
unsafe impl Send for Shared {}
// SAFETY: as for `Send`.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(len: usize) -> Self {
        // SAFETY: a call with a literal name.
        let fd = unsafe { libc::memfd_create(c"virtqueue-test".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a descriptor that was just made and is nobody else's.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(len.try_into().unwrap()).unwrap();
        Self {
            driver: map(&file, len),
            len,
            device: map(&file, len),
        }
    }

    /// The device address of the first byte.
    pub fn addr(&self) -> u64 {
        self.driver.addr().get().try_into().unwrap()
    }

    /// As the driver reaches it.
    pub fn of_driver(&self) -> Linear {
        self.linear(self.driver)
    }

    /// As the device reaches it.
    pub fn of_device(&self) -> Linear {
        self.linear(self.device)
    }

    fn linear(&self, base: NonNull<u8>) -> Linear {
        let len = self.len.try_into().unwrap();
        // SAFETY: mapped for good by `new`, outside of what Rust allocates; tests reach what they share through atomics, or hand a mapping to
        // code of others that does as it does.
        unsafe { Linear::new(base.as_ptr(), self.addr(), len) }
    }
}

fn map(file: &File, len: usize) -> NonNull<u8> {
    // SAFETY: a new mapping, wherever there is room.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    NonNull::new(at.cast()).unwrap()
}

/// A ring of a layout at the start of `shared`, and where what it needs ends.
pub fn place<L: Layout>(shared: &Shared, size: u16) -> (RingConfig, u64) {
    place_at::<L>(shared.addr(), size)
}

/// The same at a device address. Each area has cache lines of its own.
pub fn place_at<L: Layout>(start: u64, size: u16) -> (RingConfig, u64) {
    let mut next = start;
    let [desc, driver, device] = L::area_sizes(size).unwrap().map(|len| {
        let at = next;
        next = (at + u64::try_from(len).unwrap()).next_multiple_of(64);
        at
    });
    let config = RingConfig {
        size,
        desc,
        driver,
        device,
        event_idx: false,
        in_order: false,
        indirect: false,
    };
    (config, next)
}

/// Payload, a word at a time.
pub fn write_words(memory: &Linear, addr: u64, words: &[u64]) {
    let region = memory.region(addr, 8 * words.len(), 8).unwrap();
    for (n, word) in words.iter().enumerate() {
        region.store_u64(8 * n, *word, Ordering::Relaxed);
    }
}

/// Payload, a word at a time.
pub fn read_words<const N: usize>(memory: &Linear, addr: u64) -> [u64; N] {
    let region = memory.region(addr, 8 * N, 8).unwrap();
    std::array::from_fn(|n| region.load_u64(8 * n, Ordering::Relaxed))
}

/// Pseudo-random numbers (xorshift): the same for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

//! What a device asks of the VMM that runs it.
//!
//! Addresses carry their space in their name: `gpa` is guest physical; a window `offset` is
//! relative to the BAR that shows the window.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// The address and data that a message-signalled interrupt writes (PCI 3.0, section 6.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// One message-signalled interrupt: any number of eventfds that raise it, and the message that
/// is delivered. No thread of the VMM stands between an eventfd and the guest.
pub trait Interrupt: Send + Sync {
    /// Connects (`Some`) or masks (`None`) the interrupt. What is signalled while it is masked
    /// stays pending in the eventfds and is delivered when a message is set again.
    fn set_message(&self, message: Option<MsiMessage>) -> io::Result<()>;
    /// Lets `source` raise this interrupt too. Fails where `source` is no eventfd.
    fn attach(&self, source: &Arc<EventFd>) -> io::Result<()>;
    /// Takes back [`Interrupt::attach`]; nothing happens where `source` (the same `Arc`) is not attached.
    fn detach(&self, source: &Arc<EventFd>);
    /// Raises the interrupt from the VMM itself.
    fn trigger(&self);
    /// Whether a signal waits in a masked interrupt (the pending bit of MSI-X).
    fn pending(&self) -> bool;
}

/// A range of a file that another process shares.
#[derive(Clone, Debug)]
pub struct SharedRegion {
    /// The file, usually a sealed memfd.
    pub file: Arc<File>,
    /// Where the range starts in it, in bytes; a multiple of the page size.
    pub file_offset: u64,
    /// Its length in bytes; a multiple of the page size, not zero.
    pub len: u64,
}

/// What one access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It reads.
    Read,
    /// It writes.
    Write,
}

/// Which accesses a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
}

impl Permission {
    /// Reads only.
    pub const READ: Self = Self {
        read: true,
        write: false,
    };
    /// Writes only.
    pub const WRITE: Self = Self {
        read: false,
        write: true,
    };
    /// Both.
    pub const READ_WRITE: Self = Self {
        read: true,
        write: true,
    };

    /// Whether it allows `access`.
    #[must_use]
    pub fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
        }
    }
}

/// Which files a window shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Files {
    /// Those that their owner cannot shrink: memfds with F_SEAL_SHRINK.
    #[default]
    Sealed,
    /// All that are memory (memfds, and files of tmpfs and hugetlbfs). What its owner cuts off is taken out of the window when the guest touches it.
    Unsealed,
}

/// What a BAR shows of somebody else's memory. An access that the window does not let through reaches the function's `bar_read` or
/// `bar_write`, which ask [`Window::read`] and [`Window::write`] first: what is mapped can always be reached, by memory where the host
/// manages it and through these two where not.
pub trait Window: Send + Sync {
    /// Puts the BAR at a guest physical address, or takes it off the bus.
    fn place(&self, gpa: Option<u64>) -> io::Result<()>;
    /// Shows `region` at `offset`, for the accesses that `permission` allows. Fails on an overlap with what is mapped, on a range beyond the
    /// window or the file, and on a file that is not among the window's [`Files`].
    fn map(&self, offset: u64, region: &SharedRegion, permission: Permission) -> io::Result<()>;
    /// Takes away whatever is shown in `len` bytes from `offset` on, parts of mappings too (whole pages). When it returns, the guest cannot
    /// reach any of it; it is no error where nothing was shown.
    fn unmap(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Takes everything away. When it returns, the guest can reach none of it.
    fn clear(&self);
    /// Reads what is mapped at `offset`; `false`, and nothing read, where not all of it may be read.
    fn read(&self, offset: u64, data: &mut [u8]) -> bool;
    /// Writes to what is mapped at `offset`; `false`, and nothing written, where not all of it may be written.
    fn write(&self, offset: u64, data: &[u8]) -> bool;
}

/// A part of the VM's own memory, as a back-end has to map it.
#[derive(Clone, Debug)]
pub struct MemoryRegion {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// The memory itself.
    pub shared: SharedRegion,
}

/// The machine that a device is plugged into.
pub trait Host: Send + Sync {
    /// A new interrupt, masked, with nothing attached.
    fn interrupt(&self) -> io::Result<Arc<dyn Interrupt>>;
    /// A guest write of any size to `gpa` signals `event` without leaving the kernel.
    fn add_doorbell(&self, gpa: u64, event: &Arc<EventFd>) -> io::Result<()>;
    /// Takes back [`Host::add_doorbell`] (same address, same eventfd).
    fn remove_doorbell(&self, gpa: u64, event: &Arc<EventFd>) -> io::Result<()>;
    /// A window of `size` bytes (a power of two) for `files`, not placed, showing nothing.
    fn window(&self, size: u64, files: Files) -> io::Result<Arc<dyn Window>>;
    /// New memory of `size` bytes, zeroed, in a file that can neither shrink nor grow: to show in a window, or to give to another process.
    fn shared_memory(&self, size: u64) -> io::Result<File>;
    /// The guest's memory, as the VMM reaches it.
    fn memory(&self) -> &GuestMemoryMmap;
    /// The guest's memory, as another process can map it.
    fn memory_regions(&self) -> &[MemoryRegion];
    /// How many bits a guest physical address has on this machine.
    fn physical_address_bits(&self) -> u8;
}

//! PCI: configuration space, MSI-X, and the root of the one bus.
//!
//! A device model implements [`PciFunction`] with the help of [`ConfigSpace`] and [`Msix`]; [`PciRoot`] routes the
//! guest's accesses to it. Every offset, size and value of an access is the guest's choice, so nothing here fails on one:
//! what cannot be read reads as all-ones or zero, what cannot be written is dropped.

mod config;
mod msix;
mod root;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use config::{BarKind, Command, ConfigSpace, Identity};
pub use msix::Msix;
pub use root::PciRoot;

/// How many BARs a type-0 function has.
pub const BARS: usize = 6;

/// Why the machine could not be put together. The guest has no part in it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A BAR's index, kind and size do not go together or it is there already.
    #[error("BAR {0} cannot be of this kind and size")]
    Bar(u8),
    /// The capabilities do not fit the configuration space.
    #[error("no room for another PCI capability")]
    Capabilities,
    /// All 32 slots are taken.
    #[error("the PCI bus is full")]
    BusFull,
    /// The address range is too small for what is plugged in.
    #[error("no room for BAR {bar} ({size:#x} bytes) of PCI device 00:{slot:02x}.0")]
    NoSpace {
        /// The device.
        slot: u8,
        /// Its BAR.
        bar: u8,
        /// The BAR's size in bytes.
        size: u64,
    },
    /// The host refused an interrupt.
    #[error("cannot get an interrupt for an MSI-X vector: {0}")]
    Interrupt(#[source] std::io::Error),
}

/// One function on the bus. Its methods are called from vCPU threads.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space. Bytes behind the function's space read as zero.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space; the effects (moved BARs, masked interrupts) are complete when it returns.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The guest physical range that each memory BAR decodes now: `None` where there is no such BAR, where it has no
    /// address, or where memory decoding is off. A 64-bit BAR is at its lower index.
    fn bars(&self) -> [Option<Range<u64>>; BARS];
    /// Reads from a BAR. An access may have any size and may reach beyond the end of the BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes to a BAR, as [`PciFunction::bar_read`].
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
}

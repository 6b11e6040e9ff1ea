//! What the drivers need from where they run.

use core::ptr::NonNull;

/// Memory that a device can reach.
#[derive(Clone, Copy, Debug)]
pub struct Dma {
    /// Where the driver reaches it.
    pub ptr: NonNull<u8>,
    /// The device address of its first byte.
    pub addr: u64,
    /// Length in bytes.
    pub len: usize,
}

/// Why a device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A ring made progress.
    Queue,
    /// The device's configuration or connection changed.
    Config,
}

/// The address and data that a device writes to interrupt this processor.
#[derive(Clone, Copy, Debug)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Who connects a device's MSI-X vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// The driver, with the messages that [`Platform::message`] gives.
    Driver,
    /// The platform has done it: vector 0 stands for [`Event::Config`], vector 1 for [`Event::Queue`].
    Platform,
    /// Nobody: no interrupts arrive, and the device is polled.
    Nobody,
}

/// Where a driver runs: bare metal, or a process that was given the device.
pub trait Platform {
    /// Reads an aligned dword of a function's configuration space (`function` is its number on bus 0: device * 8 + function).
    fn config_read(&self, function: u8, offset: u16) -> u32;
    /// Writes an aligned dword of configuration space.
    fn config_write(&self, function: u8, offset: u16, value: u32);
    /// Maps `len` bytes of BAR memory at bus address `addr`; `None` where that cannot be.
    fn map(&self, addr: u64, len: u64) -> Option<NonNull<u8>>;
    /// Zeroed memory for a device, `align` a power of two; it is never given back. `None` when there is no more.
    fn dma(&self, len: usize, align: usize) -> Option<Dma>;
    /// Memory for the buffers of a data path; where that maps them itself ([`Mapper`](crate::mapper::Mapper)), the device cannot reach it yet.
    fn pool(&self, len: usize, align: usize) -> Option<Dma> {
        self.dma(len, align)
    }
    /// Who connects the device's vectors.
    fn vectors(&self) -> Vectors {
        Vectors::Driver
    }
    /// The message by which a device reports `event`; asked for only where the driver connects the vectors.
    fn message(&self, event: Event) -> MsiMessage;
}

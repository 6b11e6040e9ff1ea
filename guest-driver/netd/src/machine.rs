//! The [`Platform`] of a process that was given one PCI function.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use guest_driver::pci::Function;
use guest_driver::{Dma, Event, MsiMessage, Platform, Vectors};
use virtqueue::linear::Linear;

use crate::dma::Arena;
use crate::pci::Bars;
use crate::sys;
use crate::wait::Interrupts;

const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u32 = 1 << 1;
const BAR0: u16 = 0x10;
const BARS: u16 = 6;

/// Where the bytes of a function are in files.
#[derive(Debug)]
pub(crate) struct Files {
    /// Configuration space.
    pub(crate) config: (File, u64),
    /// The BARs that can be mapped.
    pub(crate) bars: [Option<(File, u64)>; 6],
}

/// One PCI function, and memory for it.
#[derive(Debug)]
pub struct Machine {
    number: u8,
    files: Files,
    bars: Bars,
    /// Where BARs are mapped.
    mapped: RefCell<[Option<NonNull<u8>>; 6]>,
    arena: Arena,
    interrupts: Option<Interrupts>,
    /// Why the last BAR could not be mapped, and which it was.
    failed: RefCell<Option<(usize, io::Error)>>,
}

impl Machine {
    pub(crate) fn new(
        number: u8,
        files: Files,
        bars: Bars,
        arena: Arena,
        interrupts: Option<Interrupts>,
    ) -> Self {
        Self {
            number,
            files,
            bars,
            mapped: RefCell::default(),
            arena,
            interrupts,
            failed: RefCell::default(),
        }
    }

    /// The function, as its configuration space names it.
    #[must_use]
    pub fn function(&self) -> Function {
        let [a, b, c, d] = self.config_read(self.number, 0).to_le_bytes();
        Function {
            number: self.number,
            vendor: u16::from_le_bytes([a, b]),
            device: u16::from_le_bytes([c, d]),
        }
    }

    /// The memory that [`Platform::dma`] gives, by device address.
    #[must_use]
    pub fn memory(&self) -> Linear {
        self.arena.memory()
    }

    /// What interrupts raise; `None` where none arrive. They are given away once.
    pub fn take_interrupts(&mut self) -> Option<Interrupts> {
        self.interrupts.take()
    }

    /// Why a BAR could not be mapped since this was asked, and which it was: the driver only knows that it could not be.
    pub fn take_failure(&self) -> Option<(usize, io::Error)> {
        self.failed.try_borrow_mut().ok()?.take()
    }

    /// Maps a whole BAR, once.
    fn map_bar(&self, index: usize) -> Option<NonNull<u8>> {
        let mut mapped = self.mapped.try_borrow_mut().ok()?;
        let slot = mapped.get_mut(index)?;
        if slot.is_none() {
            let size = self.bars.get(index)?.size;
            let result = match self.files.bars.get(index)? {
                Some((file, offset)) => sys::map_file(file, *offset, size),
                None => Err(io::ErrorKind::Unsupported.into()),
            };
            match result {
                Ok(base) => *slot = Some(base),
                Err(error) => *self.failed.try_borrow_mut().ok()? = Some((index, error)),
            }
        }
        *slot
    }
}

impl Platform for Machine {
    fn config_read(&self, function: u8, offset: u16) -> u32 {
        if function != self.number {
            return u32::MAX;
        }
        let offset = offset & !3;
        if let Some(index) = bar_register(offset) {
            return self.bars.read(index);
        }
        let (file, start) = &self.files.config;
        let mut bytes = [0; 4];
        match file.read_exact_at(&mut bytes, start + u64::from(offset)) {
            Ok(()) => u32::from_le_bytes(bytes),
            Err(_) => u32::MAX,
        }
    }

    fn config_write(&self, function: u8, offset: u16, value: u32) {
        if function != self.number {
            return;
        }
        let offset = offset & !3;
        if let Some(index) = bar_register(offset) {
            return self.bars.write(index, value);
        }
        let bytes = match offset {
            // The BARs stay on the bus: nobody sizes the real ones, and mappings of them are in use. The status register above stays as it is.
            COMMAND => &(value | COMMAND_MEMORY).to_le_bytes()[..2],
            _ => &value.to_le_bytes(),
        };
        let (file, start) = &self.files.config;
        // As on the bus, a write that cannot be made vanishes; the driver reads back what matters.
        let _ = file.write_all_at(bytes, start + u64::from(offset));
    }

    fn map(&self, addr: u64, len: u64) -> Option<NonNull<u8>> {
        let (index, offset) = self.bars.find(addr, len)?;
        let base = self.map_bar(index)?.as_ptr();
        NonNull::new(base.wrapping_add(usize::try_from(offset).ok()?))
    }

    fn dma(&self, len: usize, align: usize) -> Option<Dma> {
        self.arena.take(len, align)
    }

    fn vectors(&self) -> Vectors {
        match self.interrupts {
            Some(_) => Vectors::Platform,
            None => Vectors::Nobody,
        }
    }

    fn message(&self, _event: Event) -> MsiMessage {
        // The kernel's matter; nobody asks, as `vectors` says.
        MsiMessage {
            address: 0,
            data: 0,
        }
    }
}

/// Which BAR a register of configuration space is.
fn bar_register(offset: u16) -> Option<usize> {
    let index = offset.checked_sub(BAR0)? / 4;
    (index < BARS).then(|| usize::from(index))
}

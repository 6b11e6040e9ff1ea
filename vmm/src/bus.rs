//! Where a vCPU's accesses go that the kernel does not answer itself.

use std::sync::Arc;

use devices::pci::PciRoot;

use crate::Outcome;
use crate::console::ConsoleOutput;
use crate::control::ControlOutput;
use crate::layout::{ECAM_BASE, ECAM_SIZE};
use crate::serial::{COM1, COM2, PORTS, Uart};
use crate::vcpu::refused::Mmio;

/// A one-byte write ends the VM with that exit code.
pub const POWER_OFF_PORT: u16 = 0xF4;
const KEYBOARD_DATA: u16 = 0x60;
pub(crate) const KEYBOARD_CONTROL: u16 = 0x64;
pub(crate) const KEYBOARD_RESET: u8 = 0xFE;
/// ACPI's sleep control register (ACPI 6.5, section 4.8.3.7): the sleep type in bits 2 to 4, and bit 5 to enter it.
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
/// ACPI's sleep status register: nothing ever wakes.
pub(crate) const SLEEP_STATUS: u16 = 0x601;
/// The sleep type of S5, soft off.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;

/// I/O ports and memory-mapped registers of a VM.
pub(crate) struct Bus {
    pub(crate) pci: Arc<PciRoot>,
    pub(crate) com1: Arc<Uart<ConsoleOutput>>,
    pub(crate) com2: Arc<Uart<ControlOutput>>,
}

/// The register of the UART at `base` that `port` is.
fn register(port: u16, base: u16) -> Option<u8> {
    port.checked_sub(base)
        .filter(|offset| *offset < PORTS)
        .and_then(|offset| u8::try_from(offset).ok())
}

impl Bus {
    /// An OUT instruction; `data` holds several values where it was a string instruction. Returns how the VM ends by it.
    pub(crate) fn io_write(&self, port: u16, data: &[u8]) -> Option<Outcome> {
        if let Some(offset) = register(port, COM1) {
            data.iter().for_each(|byte| self.com1.write(offset, *byte));
        } else if let Some(offset) = register(port, COM2) {
            data.iter().for_each(|byte| self.com2.write(offset, *byte));
        } else if port == POWER_OFF_PORT {
            return data.first().map(|code| Outcome::PowerOff { code: *code });
        } else if port == SLEEP_CONTROL {
            let off = SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE;
            return (data.first() == Some(&off)).then_some(Outcome::PowerOff { code: 0 });
        } else if port == KEYBOARD_CONTROL {
            return (data.first() == Some(&KEYBOARD_RESET)).then_some(Outcome::Reset);
        } else {
            self.pci.io_write(port, data);
        }
        None
    }

    /// An IN instruction; all-ones where there is nothing.
    pub(crate) fn io_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some(offset) = register(port, COM1) {
            data.iter_mut()
                .for_each(|byte| *byte = self.com1.read(offset));
        } else if let Some(offset) = register(port, COM2) {
            data.iter_mut()
                .for_each(|byte| *byte = self.com2.read(offset));
        } else if matches!(
            port,
            KEYBOARD_CONTROL | KEYBOARD_DATA | SLEEP_CONTROL | SLEEP_STATUS
        ) {
            // A keyboard controller with empty buffers; and no wake event.
            data.fill(0);
        } else {
            self.pci.io_read(port, data);
        }
    }
}

impl Mmio for Bus {
    /// A read of memory that no memory slot shows; all-ones where there is nothing.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xFF);
        match gpa
            .checked_sub(ECAM_BASE)
            .filter(|offset| *offset < ECAM_SIZE)
        {
            Some(offset) => self.pci.ecam_read(offset, data),
            None => {
                self.pci.mmio_read(gpa, data);
            }
        }
    }

    /// A write to memory that no memory slot shows.
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        match gpa
            .checked_sub(ECAM_BASE)
            .filter(|offset| *offset < ECAM_SIZE)
        {
            Some(offset) => self.pci.ecam_write(offset, data),
            None => {
                self.pci.mmio_write(gpa, data);
            }
        }
    }
}

//! What the VMM has to know of a vCPU to look at one instruction of it: registers, and the guest's page tables.

use std::io;

use iced_x86::Register;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::general::general;
use crate::layout::PAGE_SIZE;
use crate::sys::kvm;

/// Longest instruction there is.
const LONGEST: u64 = 15;
const LONG_MODE_ACTIVE: u64 = 1 << 10;
const WRITE_PROTECT: u64 = 1 << 16;
const FIVE_LEVELS: u64 = 1 << 12;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const FRAME: u64 = 0x000F_FFFF_FFFF_F000;

/// A stopped vCPU.
pub(super) struct View<'a> {
    memory: &'a GuestMemoryMmap,
    regs: kvm_regs,
    sregs: kvm_sregs,
}

/// The part of an access that lies in one page.
pub(super) struct Part {
    pub(super) gpa: u64,
    /// Where it lies in the access.
    pub(super) start: usize,
    pub(super) len: usize,
}

impl<'a> View<'a> {
    pub(super) fn of(vcpu: &VcpuFd, memory: &'a GuestMemoryMmap) -> io::Result<Self> {
        Ok(View {
            memory,
            regs: vcpu.get_regs().map_err(|e| kvm("KVM_GET_REGS", e))?,
            sregs: vcpu.get_sregs().map_err(|e| kvm("KVM_GET_SREGS", e))?,
        })
    }

    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        self.memory
    }

    pub(super) fn regs(&self) -> kvm_regs {
        self.regs
    }

    /// Whether it runs at CPL 3.
    pub(super) fn is_user(&self) -> bool {
        self.sregs.cs.selector & 3 == 3
    }

    /// The bytes at the instruction pointer, as many as there are up to the longest instruction; none outside 64-bit mode.
    pub(super) fn instruction(&self) -> Vec<u8> {
        if self.sregs.cs.l == 0 || self.sregs.efer & LONG_MODE_ACTIVE == 0 {
            return Vec::new();
        }
        let mut bytes = Vec::new();
        for at in 0..LONGEST {
            let mut byte = [0];
            let Some(gpa) = self.translate(self.regs.rip.wrapping_add(at), false) else {
                break;
            };
            if self
                .memory
                .read_slice(&mut byte, GuestAddress(gpa))
                .is_err()
            {
                break;
            }
            bytes.extend(byte);
        }
        bytes
    }

    /// Guest physical address, as the guest's page tables have it for this privilege level; `None` where they do not allow the access (which the
    /// processor would tell the guest), or do not lie in RAM.
    pub(super) fn translate(&self, address: u64, write: bool) -> Option<u64> {
        let levels = if self.sregs.cr4 & FIVE_LEVELS != 0 {
            5
        } else {
            4
        };
        let mut table = self.sregs.cr3 & FRAME;
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let at = GuestAddress(table + (address >> shift & 0x1FF) * 8);
            let entry: u64 = self.memory.read_obj(at).ok()?;
            let denied = write
                && entry & WRITABLE == 0
                && (self.is_user() || self.sregs.cr0 & WRITE_PROTECT != 0);
            if entry & PRESENT == 0 || denied || self.is_user() && entry & USER == 0 {
                return None;
            }
            if level == 0 || level <= 2 && entry & LARGE != 0 {
                let offset = (1 << shift) - 1;
                return Some(entry & FRAME & !offset | address & offset);
            }
            table = entry & FRAME;
        }
        None
    }

    /// The pages of an access; `None` where the guest's page tables do not allow all of it.
    pub(super) fn parts(&self, address: u64, len: usize, write: bool) -> Option<Vec<Part>> {
        let mut parts = Vec::new();
        let mut start = 0;
        while start < len {
            let at = address.wrapping_add(start as u64);
            let room = usize::try_from(PAGE_SIZE - at % PAGE_SIZE).ok()?;
            let part = Part {
                gpa: self.translate(at, write)?,
                start,
                len: room.min(len - start),
            };
            start += part.len;
            parts.push(part);
        }
        Some(parts)
    }

    /// The value of a general register, or a segment's base.
    pub(super) fn register(&self, register: Register) -> Option<u64> {
        let value = match register {
            Register::FS => self.sregs.fs.base,
            Register::GS => self.sregs.gs.base,
            // They are zero in 64-bit mode, whatever they say.
            Register::CS | Register::DS | Register::ES | Register::SS => 0,
            _ => *general(&mut self.regs(), register)?,
        };
        Some(if register.size() == 4 {
            value & 0xFFFF_FFFF
        } else {
            value
        })
    }
}

//! Accesses to a window that the host's memory did not let through, and that KVM cannot turn into an exit with an address.
//!
//! A touch of a hole under a memory slot ends KVM_RUN with EFAULT, which names no address on most kernels. Plain moves of general and vector registers are carried
//! out here, through the BAR's function: they are nearly all there is, and KVM's emulator knows few of the latter. Everything else runs again with
//! the slots hidden: now KVM emulates the instruction and exits with its address, size and data. What it cannot emulate either is helped to a page of
//! all-ones if it reads, and skipped if it writes.

use std::io;
use std::sync::Arc;

use devices::host::Access;
use iced_x86::{
    Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess, UsedMemory,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use log::{debug, warn};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::general::Plain;
use super::guest::{Part, View};
use super::vector::{LONGEST, Move, State};
use crate::sys::kvm;
use crate::windows::{Hidden, SlotWindow, Windows};

/// How often in a row KVM_RUN may fail for one instruction. A window that changes at the same time costs another try; more than a few
/// mean that the host's memory itself is at fault.
const MOST_TRIES: u32 = 16;

/// Where accesses go that leave the guest.
pub(crate) trait Mmio {
    /// Reads at a guest physical address; all-ones where there is nothing.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// Writes at a guest physical address.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
}

/// What becomes of the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It runs on.
    Run,
    /// The guest is to be told that the instruction does not exist.
    Undefined,
    /// Its memory is really not there, or KVM really cannot emulate what it does.
    Real,
}

/// Whether KVM_RUN ended because the host's memory refused an access; with its guest physical address where the kernel says that. Every kernel
/// fails with EFAULT then. Newer ones annotate it (KVM_EXIT_MEMORY_FAULT), and kvm-ioctls makes an exit of that.
pub(crate) fn refused_at(result: &Result<VcpuExit, kvm_ioctls::Error>) -> Option<Option<u64>> {
    match result {
        Ok(VcpuExit::MemoryFault { gpa, .. }) => Some(Some(*gpa)),
        Err(error) if error.errno() == libc::EFAULT => Some(None),
        _ => None,
    }
}

/// A vCPU's accesses that were refused.
pub(crate) struct Refused {
    windows: Arc<Windows>,
    memory: GuestMemoryMmap,
    hidden: Hidden,
    patched: Vec<(Arc<SlotWindow>, u64)>,
    tries: u32,
}

/// A memory operand, as far as it lies in windows.
struct Location {
    access: OpAccess,
    parts: Vec<Part>,
}

impl Refused {
    pub(crate) fn new(windows: &Arc<Windows>, memory: &GuestMemoryMmap) -> Self {
        Refused {
            windows: Arc::clone(windows),
            memory: memory.clone(),
            hidden: Hidden::default(),
            patched: Vec::new(),
            tries: 0,
        }
    }

    /// After an exit to a device has been answered. While slots are hidden the instruction has to be completed without a step further:
    /// KVM_RUN with `immediate_exit` does that, and returns either with the rest of its accesses or with EINTR.
    pub(crate) fn answered(&mut self, vcpu: &mut VcpuFd) {
        self.tries = 0;
        self.unpatch();
        if !self.hidden.is_empty() {
            vcpu.set_kvm_immediate_exit(1);
        }
    }

    /// After any other return of KVM_RUN: shows what was hidden.
    pub(crate) fn returned(&mut self, vcpu: &mut VcpuFd) {
        self.tries = 0;
        self.unpatch();
        if !self.hidden.is_empty() {
            // Where the vCPU was told to end at the same time, its thread sees that before it runs the guest again.
            vcpu.set_kvm_immediate_exit(0);
            self.hidden.show();
        }
    }

    fn unpatch(&mut self) {
        for (window, offset) in self.patched.drain(..) {
            window.remove_patch(offset);
        }
    }

    /// KVM_RUN has failed with EFAULT.
    pub(crate) fn fault(&mut self, vcpu: &mut VcpuFd, bus: &dyn Mmio) -> Next {
        vcpu.set_kvm_immediate_exit(0);
        self.unpatch();
        let next = self.try_fault(vcpu, bus).unwrap_or_else(|error| {
            warn!("a refused access: {error}");
            Next::Real
        });
        if next != Next::Run {
            self.hidden.show();
        }
        next
    }

    fn try_fault(&mut self, vcpu: &VcpuFd, bus: &dyn Mmio) -> io::Result<Next> {
        let view = View::of(vcpu, &self.memory)?;
        let instruction = decode(&view);
        if let Some(instruction) = &instruction
            && self.carry_out(vcpu, &view, instruction, bus)?
        {
            self.tries = 0;
            self.hidden.show();
            return Ok(Next::Run);
        }
        let mut addresses = Vec::new();
        if let Some(instruction) = &instruction {
            let locations = self.locations(&view, instruction);
            let parts = locations.iter().flat_map(|location| &location.parts);
            addresses.extend(parts.map(|part| part.gpa));
        }
        self.tries += 1;
        if self.tries > MOST_TRIES {
            debug!("a refused access was tried {MOST_TRIES} times: {instruction:?}");
            let stubborn = view.is_user() && !addresses.is_empty();
            return Ok(if stubborn {
                Next::Undefined
            } else {
                Next::Real
            });
        }
        // The decoder sees one access of a string instruction, and there are instructions that it does not know.
        if addresses.is_empty() || !self.windows.hide(&addresses, &mut self.hidden) {
            self.windows.hide(&[], &mut self.hidden);
        }
        Ok(Next::Run)
    }

    /// KVM cannot emulate an instruction.
    pub(crate) fn unemulated(&mut self, vcpu: &mut VcpuFd, bus: &dyn Mmio) -> Next {
        vcpu.set_kvm_immediate_exit(0);
        self.unpatch();
        let next = self.try_unemulated(vcpu, bus).unwrap_or_else(|error| {
            warn!("an instruction that KVM cannot emulate: {error}");
            Next::Real
        });
        if next != Next::Run {
            self.hidden.show();
        }
        next
    }

    fn try_unemulated(&mut self, vcpu: &VcpuFd, bus: &dyn Mmio) -> io::Result<Next> {
        let view = View::of(vcpu, &self.memory)?;
        let otherwise = if view.is_user() {
            Next::Undefined
        } else {
            Next::Real
        };
        let Some(instruction) = decode(&view) else {
            return Ok(otherwise);
        };
        if self.carry_out(vcpu, &view, &instruction, bus)? {
            self.tries = 0;
            self.hidden.show();
            return Ok(Next::Run);
        }
        let locations = self.locations(&view, &instruction);
        self.tries += 1;
        if locations.is_empty() || self.tries > MOST_TRIES {
            return Ok(otherwise);
        }
        if self.hidden.is_empty() {
            // An exchange, say, with a hole under a slot: without the slot KVM can.
            let parts = locations.iter().flat_map(|location| &location.parts);
            let addresses: Vec<u64> = parts.map(|part| part.gpa).collect();
            if self.windows.hide(&addresses, &mut self.hidden) {
                return Ok(Next::Run);
            }
        }
        self.hidden.show();
        // A file that is cut off and made whole all the time could be whole whenever it is looked at, and never when the guest is.
        let tired = self.tries > MOST_TRIES / 2;
        for part in locations.iter().flat_map(|location| &location.parts) {
            if let Some((window, offset)) = self.windows.find(part.gpa) {
                window.settle(offset, part.len as u64, tired);
            }
        }
        let done = match locations.first().map(|location| location.access) {
            Some(OpAccess::Read | OpAccess::CondRead) => self.help_read(&locations, bus),
            Some(OpAccess::Write) => self.drop_write(vcpu, &view, &instruction, &locations, bus)?,
            _ => false,
        };
        Ok(if done { Next::Run } else { otherwise })
    }

    /// The memory operands that lie in windows, at least with one byte.
    fn locations(&self, view: &View, instruction: &Instruction) -> Vec<Location> {
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(instruction);
        let mut locations = Vec::new();
        for memory in info.used_memory() {
            let write = !matches!(memory.access(), OpAccess::Read | OpAccess::CondRead);
            let len = memory.memory_size().size().clamp(1, LONGEST);
            let parts = address(view, memory)
                .and_then(|address| view.parts(address, len, write))
                .filter(|parts| parts.iter().any(|p| self.windows.find(p.gpa).is_some()));
            locations.extend(parts.map(|parts| Location {
                access: memory.access(),
                parts,
            }));
        }
        locations
    }

    /// Does what a plain move does, where it touches a window. Each page of it goes by its own rule.
    fn carry_out(
        &self,
        vcpu: &VcpuFd,
        view: &View,
        instruction: &Instruction,
        bus: &dyn Mmio,
    ) -> io::Result<bool> {
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(instruction);
        let Some(start) = info
            .used_memory()
            .first()
            .and_then(|memory| address(view, memory))
        else {
            return Ok(false);
        };
        if let Some(plain) = Plain::of(instruction) {
            return self.carry_out_plain(vcpu, view, instruction, &plain, start, bus);
        }
        let Some(transfer) = Move::of(instruction) else {
            return Ok(false);
        };
        let mut state = State::get(vcpu)?;
        let mut all = Vec::new();
        for run in transfer.runs(&state) {
            let at = start.wrapping_add(run.start as u64);
            let Some(parts) = view.parts(at, run.len(), transfer.store) else {
                // The guest's own tables forbid it: that is for the processor to say.
                return Ok(false);
            };
            all.extend(parts.into_iter().map(|part| Part {
                start: part.start + run.start,
                ..part
            }));
        }
        let mut data = if transfer.store {
            transfer.value(&state)
        } else {
            [0xFF; LONGEST]
        };
        if !self.exchange(view, &all, &mut data, transfer.store, bus) {
            return Ok(false);
        }
        if !transfer.store {
            transfer.load(&mut state, &data);
            state.set(vcpu)?;
        }
        skip(vcpu, view, instruction)?;
        Ok(true)
    }

    fn carry_out_plain(
        &self,
        vcpu: &VcpuFd,
        view: &View,
        instruction: &Instruction,
        plain: &Plain,
        start: u64,
        bus: &dyn Mmio,
    ) -> io::Result<bool> {
        let value = if plain.store {
            plain.value(view)
        } else {
            Some([0xFF; 8])
        };
        let (Some(mut data), Some(parts)) = (value, view.parts(start, plain.len, plain.store))
        else {
            return Ok(false);
        };
        if !self.exchange(view, &parts, &mut data, plain.store, bus) {
            return Ok(false);
        }
        let mut regs = view.regs();
        if !plain.store && plain.load(view, &mut regs, data).is_none() {
            return Ok(false);
        }
        regs.rip = instruction.next_ip();
        vcpu.set_regs(&regs)
            .map_err(|e| kvm("KVM_SET_REGS", e))
            .map(|()| true)
    }

    /// Has each part read or written where it lies; `false`, and nothing done, where none lies in a window.
    fn exchange(
        &self,
        view: &View,
        parts: &[Part],
        data: &mut [u8],
        store: bool,
        bus: &dyn Mmio,
    ) -> bool {
        let inside = |part: &Part| self.windows.find(part.gpa).is_some();
        if !parts.iter().any(inside) {
            return false;
        }
        for part in parts {
            let Some(bytes) = data.get_mut(part.start..part.start + part.len) else {
                continue;
            };
            let at = GuestAddress(part.gpa);
            // Of what is not all in a window, only RAM is reached: no register is meant to be touched in part.
            match (inside(part), store) {
                (true, true) => bus.mmio_write(part.gpa, bytes),
                (true, false) => bus.mmio_read(part.gpa, bytes),
                (false, true) => drop(view.memory().write_slice(bytes, at)),
                (false, false) => {
                    if view.memory().read_slice(bytes, at).is_err() {
                        bytes.fill(0xFF);
                    }
                }
            }
        }
        true
    }

    /// Lets an instruction that reads go on by memory: what the device has an answer for is there after it was asked, and where nothing may be read there are
    /// pages of all-ones until the vCPU stops again. Fails where memory may be read and yet is not natively there.
    fn help_read(&mut self, locations: &[Location], bus: &dyn Mmio) -> bool {
        let mut asked = Vec::new();
        for part in locations.iter().flat_map(|location| &location.parts) {
            let Some((window, offset)) = self.windows.find(part.gpa) else {
                continue;
            };
            if !window.allows(offset, Access::Read) && !asked.contains(&part.gpa) {
                let mut data = [0xFF; LONGEST];
                if let Some(data) = data.get_mut(..part.len) {
                    bus.mmio_read(part.gpa, data);
                }
                asked.push(part.gpa);
            }
            match window.patch(offset) {
                Some(true) => self.patched.push((window, offset)),
                Some(false) => {}
                None => return false,
            }
        }
        true
    }

    /// Has an instruction that only writes counted, and steps over it where it may still not write. Fails where it may and yet cannot do it by memory: what
    /// it writes is not known here.
    fn drop_write(
        &self,
        vcpu: &VcpuFd,
        view: &View,
        instruction: &Instruction,
        locations: &[Location],
        bus: &dyn Mmio,
    ) -> io::Result<bool> {
        let mut native = true;
        for part in locations.iter().flat_map(|location| &location.parts) {
            let Some((window, offset)) = self.windows.find(part.gpa) else {
                continue;
            };
            if !window.allows(offset, Access::Write) {
                if let Some(data) = [0; LONGEST].get(..part.len) {
                    bus.mmio_write(part.gpa, data);
                }
            } else if !window.is_native(offset, Access::Write) {
                return Ok(false);
            }
            native &= window.is_native(offset, Access::Write);
        }
        if !native {
            skip(vcpu, view, instruction)?;
        }
        Ok(true)
    }
}

fn decode(view: &View) -> Option<Instruction> {
    let bytes = view.instruction();
    let mut decoder = Decoder::with_ip(64, &bytes, view.regs().rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// The address of a memory operand. Those of gathers and scatters (an address an element, in a vector register) are not computed.
fn address(view: &View, memory: &UsedMemory) -> Option<u64> {
    memory.virtual_address(0, |register, _, _| view.register(register))
}

/// Puts the vCPU behind the instruction.
fn skip(vcpu: &VcpuFd, view: &View, instruction: &Instruction) -> io::Result<()> {
    let mut regs = view.regs();
    regs.rip = instruction.next_ip();
    vcpu.set_regs(&regs).map_err(|e| kvm("KVM_SET_REGS", e))
}

/// Raises #UD in the guest.
pub(crate) fn raise_undefined(vcpu: &VcpuFd) -> io::Result<()> {
    const INVALID_OPCODE: u8 = 6;
    let mut events = vcpu
        .get_vcpu_events()
        .map_err(|e| kvm("KVM_GET_VCPU_EVENTS", e))?;
    events.exception.injected = 1;
    events.exception.nr = INVALID_OPCODE;
    events.exception.has_error_code = 0;
    vcpu.set_vcpu_events(&events)
        .map_err(|e| kvm("KVM_SET_VCPU_EVENTS", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_access_is_one_whether_or_not_the_kernel_says_where() {
        let annotated = VcpuExit::MemoryFault {
            flags: 8,
            gpa: 0x10_0000_2000,
            size: 4096,
        };
        assert_eq!(refused_at(&Ok(annotated)), Some(Some(0x10_0000_2000)));
        let error = |errno| Err(kvm_ioctls::Error::new(errno));
        assert_eq!(refused_at(&error(libc::EFAULT)), Some(None));
        for other in [libc::EINTR, libc::EAGAIN, libc::EHWPOISON] {
            assert_eq!(refused_at(&error(other)), None);
        }
        assert_eq!(refused_at(&Ok(VcpuExit::Hlt)), None);
    }
}

//! Plain moves between memory and a general register, the most usual of all accesses.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::kvm_regs;

use super::guest::View;

/// A `mov` with one operand in memory.
pub(super) struct Plain {
    pub(super) store: bool,
    /// Bytes of memory: 1, 2, 4 or 8.
    pub(super) len: usize,
    operand: Operand,
}

enum Operand {
    Register(Register),
    Immediate(u64),
}

impl Plain {
    /// `None` for every other instruction, and for the registers AH, CH, DH and BH.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        if instruction.mnemonic() != Mnemonic::Mov {
            return None;
        }
        let usable = |register: Register| {
            let high = matches!(
                register,
                Register::AH | Register::BH | Register::CH | Register::DH
            );
            (register.is_gpr() && !high).then_some(Operand::Register(register))
        };
        let (store, operand) = match (instruction.op0_kind(), instruction.op1_kind()) {
            (OpKind::Memory, OpKind::Register) => (true, usable(instruction.op1_register())?),
            (OpKind::Register, OpKind::Memory) => (false, usable(instruction.op0_register())?),
            (OpKind::Memory, _) => (true, Operand::Immediate(instruction.immediate(1))),
            _ => return None,
        };
        let len = instruction.memory_size().size();
        matches!(len, 1 | 2 | 4 | 8).then_some(Plain {
            store,
            len,
            operand,
        })
    }

    /// What a store writes, in its first bytes.
    pub(super) fn value(&self, view: &View) -> Option<[u8; 8]> {
        let value = match self.operand {
            Operand::Register(register) => view.register(register.full_register())?,
            Operand::Immediate(value) => value,
        };
        Some(value.to_le_bytes())
    }

    /// Completes a load: 32 bits clear the upper half of the register, fewer leave the rest of it as it is.
    pub(super) fn load(&self, view: &View, regs: &mut kvm_regs, data: [u8; 8]) -> Option<()> {
        let Operand::Register(register) = self.operand else {
            return None;
        };
        let old = view.register(register.full_register())?;
        let data = u64::from_le_bytes(data);
        let value = match self.len {
            1 => old & !0xFF | data & 0xFF,
            2 => old & !0xFFFF | data & 0xFFFF,
            4 => data & 0xFFFF_FFFF,
            _ => data,
        };
        *general(regs, register)? = value;
        Some(())
    }
}

/// The 64-bit register that `register` is a part of.
pub(super) fn general(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut regs.rax,
        Register::RBX => &mut regs.rbx,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::RBP => &mut regs.rbp,
        Register::RSP => &mut regs.rsp,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}

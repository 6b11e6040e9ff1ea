//! Vector registers in the format of XSAVE, and the instructions that move whole ones from and to memory.
#![allow(unsafe_code)] // KVM_SET_XSAVE takes a structure of variable length

use std::arch::x86_64::__cpuid_count;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;

use crate::sys::kvm;

/// Bytes of the longest register.
pub(super) const LONGEST: usize = 64;
const XSTATE_BV: usize = 512;
const SSE: u32 = 1;
const AVX: u32 = 2;
const OPMASK: u32 = 5;
const ZMM_HIGH: u32 = 6;
const HIGH_ZMM: u32 = 7;

/// A plain move between memory and a vector register.
pub(super) struct Move {
    pub(super) store: bool,
    /// Bytes of memory.
    pub(super) len: usize,
    register: usize,
    /// Legacy SSE leaves what is above 128 bits as it is; everything else clears it.
    legacy: bool,
    mask: Option<Mask>,
}

struct Mask {
    register: usize,
    element: usize,
    zeroing: bool,
}

impl Move {
    /// `None` for every other instruction.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        let (legacy, element) = match instruction.mnemonic() {
            M::Movups | M::Movupd | M::Movaps | M::Movapd | M::Movdqu | M::Movdqa | M::Lddqu => {
                (true, 0)
            }
            M::Movntdqa | M::Movntdq | M::Movntps | M::Movntpd => (true, 0),
            M::Movss | M::Movsd | M::Movd | M::Movq => (true, 0),
            M::Vmovdqu | M::Vmovdqa | M::Vlddqu => (false, 0),
            M::Vmovntdqa | M::Vmovntdq | M::Vmovntps | M::Vmovntpd => (false, 0),
            M::Vmovss | M::Vmovsd | M::Vmovd | M::Vmovq => (false, 0),
            M::Vmovdqu8 => (false, 1),
            M::Vmovdqu16 => (false, 2),
            M::Vmovups | M::Vmovaps | M::Vmovdqu32 | M::Vmovdqa32 => (false, 4),
            M::Vmovupd | M::Vmovapd | M::Vmovdqu64 | M::Vmovdqa64 => (false, 8),
            _ => return None,
        };
        if instruction.op_count() != 2 {
            return None;
        }
        let (store, register) = match (instruction.op0_kind(), instruction.op1_kind()) {
            (OpKind::Memory, OpKind::Register) => (true, instruction.op1_register()),
            (OpKind::Register, OpKind::Memory) => (false, instruction.op0_register()),
            _ => return None,
        };
        if !(register.is_xmm() || register.is_ymm() || register.is_zmm()) {
            return None;
        }
        let len = instruction.memory_size().size();
        if len == 0 || len > register.size() {
            return None;
        }
        let mask = match instruction.op_mask() {
            Register::None => None,
            k if element > 0 => Some(Mask {
                register: k.number(),
                element,
                zeroing: instruction.zeroing_masking(),
            }),
            _ => return None,
        };
        Some(Move {
            store,
            len,
            register: register.number(),
            legacy,
            mask,
        })
    }

    /// The bytes of memory that the move touches, in runs.
    pub(super) fn runs(&self, state: &State) -> Vec<Range<usize>> {
        let Some(mask) = &self.mask else {
            return std::iter::once(0..self.len).collect();
        };
        let bits = state.mask(mask.register);
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (bit, start) in (0..self.len).step_by(mask.element).enumerate() {
            if bits >> bit & 1 == 0 {
                continue;
            }
            let end = start + mask.element;
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = end,
                _ => runs.push(start..end),
            }
        }
        runs
    }

    /// What a store writes.
    pub(super) fn value(&self, state: &State) -> [u8; LONGEST] {
        state.vector(self.register)
    }

    /// Completes a load that has brought `data` (only the bytes of [`Move::runs`] count).
    pub(super) fn load(&self, state: &mut State, data: &[u8; LONGEST]) {
        let mut value = [0; LONGEST];
        if let Some(mask) = &self.mask
            && !mask.zeroing
        {
            let old = state.vector(self.register);
            copy_range(&mut value, &old, 0..self.len);
        }
        for run in self.runs(state) {
            copy_range(&mut value, data, run);
        }
        state.set_vector(
            self.register,
            &value,
            if self.legacy { 16 } else { LONGEST },
        );
    }
}

fn copy_range(to: &mut [u8; LONGEST], from: &[u8; LONGEST], range: Range<usize>) {
    if let (Some(to), Some(from)) = (to.get_mut(range.clone()), from.get(range)) {
        to.copy_from_slice(from);
    }
}

/// Asked once: a hypervisor below this one may take its time over CPUID.
static STARTS: OnceLock<[usize; 8]> = OnceLock::new();

fn starts() -> [usize; 8] {
    let mut starts = [0; 8];
    for (component, start) in (0u32..).zip(&mut starts).skip(2) {
        *start = usize::try_from(__cpuid_count(0xD, component).ebx).unwrap_or(0);
    }
    // The legacy area has a fixed layout.
    starts[1] = 160;
    starts
}

/// The extended state of a vCPU.
pub(super) struct State {
    bytes: Vec<u8>,
    /// Where a component starts (CPUID leaf 0xD); zero where the processor has none.
    starts: [usize; 8],
}

impl State {
    pub(super) fn get(vcpu: &VcpuFd) -> io::Result<Self> {
        let xsave = vcpu.get_xsave().map_err(|e| kvm("KVM_GET_XSAVE", e))?;
        Ok(State {
            bytes: xsave.region.iter().flat_map(|w| w.to_le_bytes()).collect(),
            starts: *STARTS.get_or_init(starts),
        })
    }

    pub(super) fn set(&self, vcpu: &VcpuFd) -> io::Result<()> {
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(self.bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        // SAFETY: the kernel reads more than the 4096 bytes of the structure only where the process has asked for larger dynamic
        // components (arch_prctl), which nobody here does; KVM_GET_XSAVE would have failed then.
        unsafe { vcpu.set_xsave(&xsave) }.map_err(|e| kvm("KVM_SET_XSAVE", e))
    }

    fn word(&self, at: usize) -> u64 {
        let bytes = self.bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    }

    fn has(&self, component: u32) -> bool {
        self.word(XSTATE_BV) >> component & 1 == 1
    }

    fn start(&self, component: u32) -> Option<usize> {
        let start = usize::try_from(component)
            .ok()
            .and_then(|component| self.starts.get(component));
        start.copied().filter(|start| *start > 0)
    }

    fn mask(&self, register: usize) -> u64 {
        match self.start(OPMASK).filter(|_| self.has(OPMASK)) {
            Some(start) => self.word(start + 8 * register),
            None => 0,
        }
    }

    /// Component, offset in it, and which bytes of the register are there.
    fn parts(register: usize) -> Vec<(u32, usize, Range<usize>)> {
        match register.checked_sub(16) {
            Some(high) => vec![(HIGH_ZMM, high * 64, 0..64)],
            None => vec![
                (SSE, register * 16, 0..16),
                (AVX, register * 16, 16..32),
                (ZMM_HIGH, register * 32, 32..64),
            ],
        }
    }

    fn vector(&self, register: usize) -> [u8; LONGEST] {
        let mut value = [0; LONGEST];
        for (component, offset, range) in Self::parts(register) {
            // What is in its initial state is zero.
            if let Some(start) = self.start(component).filter(|_| self.has(component))
                && let Some(to) = value.get_mut(range)
                && let Some(from) = self
                    .bytes
                    .get(start + offset..)
                    .and_then(|b| b.get(..to.len()))
            {
                to.copy_from_slice(from);
            }
        }
        value
    }

    fn set_vector(&mut self, register: usize, value: &[u8; LONGEST], bytes: usize) {
        for (component, offset, range) in Self::parts(register) {
            let Some(from) = value.get(range.clone()).filter(|_| range.start < bytes) else {
                continue;
            };
            let initial = !self.has(component);
            if initial && from.iter().all(|byte| *byte == 0) {
                continue;
            }
            // Of a component in its initial state, KVM hands out zeroes; the others of its registers stay that way.
            if let Some(start) = self.start(component)
                && let Some(to) = self
                    .bytes
                    .get_mut(start + offset..)
                    .and_then(|b| b.get_mut(..from.len()))
            {
                to.copy_from_slice(from);
                if let Some(bits) = self.bytes.get_mut(XSTATE_BV) {
                    *bits |= 1 << component;
                }
            }
        }
    }
}

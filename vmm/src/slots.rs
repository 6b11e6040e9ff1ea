//! KVM memory slots: the numbers, shared by RAM and windows, and the one call.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION gives the guest host memory by address

use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, VmFd};

use crate::sys::{kvm, lock};

/// No VM uses more slots than this, whatever KVM offers: what windows may take, and some for the RAM.
pub const LIMIT: u32 = crate::windows::MAX_CHUNKS + 64;
const WORDS: usize = (LIMIT as usize).div_ceil(64);

/// The memory slots of a VM.
pub struct Slots {
    vm: Arc<VmFd>,
    limit: u32,
    /// Bit n of all: slot n is taken.
    used: Mutex<[u64; WORDS]>,
}

impl Slots {
    /// All slots of `vm`, free.
    pub fn new(vm: Arc<VmFd>) -> Self {
        let offered = u32::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        Slots {
            vm,
            limit: offered.min(LIMIT),
            used: Mutex::new([0; WORDS]),
        }
    }

    /// Takes a number. Fails where [`LIMIT`] (or what KVM offers) is reached.
    pub fn allocate(&self) -> io::Result<u32> {
        let mut used = lock(&self.used);
        for (base, word) in (0u32..).step_by(64).zip(used.iter_mut()) {
            let free = base + word.trailing_ones();
            if *word != u64::MAX && free < self.limit {
                *word |= 1 << (free - base);
                return Ok(free);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::QuotaExceeded,
            format!("all {} memory slots of the VM are in use", self.limit),
        ))
    }

    /// Gives a number back; its slot shows nothing any more.
    pub fn release(&self, slot: u32) {
        let word = usize::try_from(slot / 64).unwrap_or(usize::MAX);
        if let Some(word) = lock(&self.used).get_mut(word) {
            *word &= !(1 << (slot % 64));
        }
    }

    /// Shows `len` bytes of host memory at `hva` to the guest at `gpa`.
    ///
    /// # Safety
    ///
    /// The caller keeps `hva..hva + len` mapped for the guest alone (inaccessible parts are allowed), until [`Slots::hide`]
    /// succeeds or the VM runs no more.
    pub unsafe fn show(&self, slot: u32, gpa: u64, hva: u64, len: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: hva,
        };
        // SAFETY: the caller keeps the memory mapped while the slot shows it.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| {
            kvm(
                &format!("a memory slot of {len:#x} bytes at guest physical {gpa:#x}"),
                e,
            )
        })
    }

    /// Shows nothing in the slot any more: when it returns, no vCPU reaches the memory.
    pub fn hide(&self, slot: u32) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            ..Default::default()
        };
        // SAFETY: a length of zero deletes the slot; no memory is given.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|e| kvm("taking a memory slot away", e))
    }
}

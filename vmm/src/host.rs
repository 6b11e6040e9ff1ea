//! The machine as its devices see it: [`devices::host::Host`] over KVM.

use std::fs::File;
use std::io;
use std::sync::Arc;

use devices::host::{Files, Host, Interrupt, MemoryRegion, Window};
use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::doorbells::Doorbells;
use crate::interrupts::Router;
use crate::layout;
use crate::memory::{Memory, shared_file};
use crate::slots::Slots;
use crate::sys::{kvm, size_text};
use crate::windows::Windows;

/// Why KVM cannot run a VM here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no /dev/kvm.
    #[error(
        "there is no /dev/kvm: load the kvm_intel or kvm_amd module, or enable virtualisation in the firmware (in a VM: nested virtualisation)"
    )]
    NoKvm,
    /// /dev/kvm is not ours to open.
    #[error(
        "no permission to open /dev/kvm: add yourself to the group that owns it (as root: usermod -aG kvm NAME, then log in again)"
    )]
    Permission,
    /// KVM is too old or lacks something.
    #[error("this kernel's KVM lacks {0}: a kernel from 4.12 on has it")]
    Lacks(&'static str),
    /// A KVM call failed.
    #[error("{0}")]
    System(#[from] io::Error),
    /// The guest physical address space is too small.
    #[error("{} of RAM leave no room for PCI in the {bits} bits of a guest physical address", size_text(*.ram))]
    AddressSpace {
        /// Bytes of RAM.
        ram: u64,
        /// Bits of an address.
        bits: u8,
    },
}

/// A virtual machine without its processors.
pub struct Machine {
    vm: Arc<VmFd>,
    cpuid: CpuId,
    address_bits: u8,
    router: Arc<Router>,
    windows: Arc<Windows>,
    doorbells: Doorbells,
    /// Dropped after the VM's users: memory slots refer to it. (Vcpus are joined before a machine is dropped.)
    memory: Memory,
}

/// Opens /dev/kvm and checks what the VMM needs of it.
pub fn open_kvm() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm,
        libc::EACCES | libc::EPERM => Error::Permission,
        _ => Error::System(crate::sys::kvm("/dev/kvm", e)),
    })?;
    let needed = [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::UserMemory, "memory slots"),
        (Cap::ImmediateExit, "immediate_exit"),
    ];
    for (cap, name) in needed {
        if !kvm.check_extension(cap) {
            return Err(Error::Lacks(name));
        }
    }
    Ok(kvm)
}

impl Machine {
    /// A VM with `memory` as its RAM and in-kernel interrupt controllers.
    pub fn new(kvm_fd: &Kvm, memory: Memory) -> Result<Self, Error> {
        let vm = kvm_fd.create_vm().map_err(|e| kvm("KVM_CREATE_VM", e))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(|e| kvm("KVM_SET_IDENTITY_MAP_ADDR", e))?;
        let tss = usize::try_from(layout::KVM_TSS).map_err(io::Error::other)?;
        vm.set_tss_address(tss)
            .map_err(|e| kvm("KVM_SET_TSS_ADDR", e))?;
        vm.create_irq_chip()
            .map_err(|e| kvm("KVM_CREATE_IRQCHIP", e))?;
        report_unemulated(&vm)?;
        let cpuid = kvm_fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| kvm("KVM_GET_SUPPORTED_CPUID", e))?;
        let address_bits = address_bits(&cpuid);

        let vm = Arc::new(vm);
        let slots = Arc::new(Slots::new(Arc::clone(&vm)));
        for region in memory.mapped().iter() {
            let hva = region.as_ptr().expose_provenance() as u64;
            show_ram(&slots, region.start_addr().0, hva, region.len())?;
        }
        let router = Router::new(Arc::clone(&vm));
        let doorbells = Doorbells::new(Arc::clone(&vm));
        Ok(Machine {
            vm,
            cpuid,
            address_bits,
            router,
            windows: Windows::new(slots),
            doorbells,
            memory,
        })
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The windows of all devices.
    pub(crate) fn windows(&self) -> &Arc<Windows> {
        &self.windows
    }

    /// What KVM can offer its guests by CPUID.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Bytes of RAM.
    pub fn ram_size(&self) -> u64 {
        self.memory.size()
    }

    /// The memory for devices beside the RAM: address and length; a length of zero where there is none.
    pub fn dma(&self) -> (u64, u64) {
        self.memory.dma()
    }

    /// Where 64-bit BARs go.
    pub fn pci_window64(&self) -> Result<std::ops::Range<u64>, Error> {
        let ram = self.memory.size();
        let bits = self.address_bits;
        let end = match self.memory.dma() {
            (_, 0) => layout::ram_end(ram),
            (start, len) => start + len,
        };
        layout::pci_window64(end, bits).ok_or(Error::AddressSpace { ram, bits })
    }
}

/// Asks KVM to return where the guest's user mode executes what it cannot emulate, rather than to tell the guest that there is no such
/// instruction. Kernels before 5.14 cannot; an access by a vector register that a window refuses is an undefined instruction there.
fn report_unemulated(vm: &VmFd) -> io::Result<()> {
    if vm.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) <= 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        ..Default::default()
    };
    cap.args[0] = 1;
    vm.enable_cap(&cap)
        .map_err(|e| kvm("KVM_CAP_EXIT_ON_EMULATION_FAILURE", e))
}

#[allow(unsafe_code)] // RAM is given to the guest by address
fn show_ram(slots: &Slots, gpa: u64, hva: u64, len: u64) -> io::Result<()> {
    let slot = slots.allocate()?;
    // SAFETY: the range is one mapping of `Memory`, made for the guest, which the machine keeps until after its last
    // vCPU has stopped.
    unsafe { slots.show(slot, gpa, hva, len) }
}

/// Guest physical address bits; 36 where the processor does not tell.
fn address_bits(cpuid: &CpuId) -> u8 {
    let leaf = cpuid.as_slice().iter().find(|e| e.function == 0x8000_0008);
    leaf.map(|e| e.eax.to_le_bytes()[0])
        .filter(|bits| (32..=52).contains(bits))
        .unwrap_or(36)
}

impl Host for Machine {
    fn interrupt(&self) -> io::Result<Arc<dyn Interrupt>> {
        let interrupt: Arc<dyn Interrupt> = self.router.interrupt()?;
        Ok(interrupt)
    }

    fn add_doorbell(&self, gpa: u64, event: &Arc<EventFd>) -> io::Result<()> {
        self.doorbells.add(gpa, event)
    }

    fn remove_doorbell(&self, gpa: u64, event: &Arc<EventFd>) -> io::Result<()> {
        self.doorbells.remove(gpa, event)
    }

    fn window(&self, size: u64, files: Files) -> io::Result<Arc<dyn Window>> {
        let window: Arc<dyn Window> = self.windows.add(size, files)?;
        Ok(window)
    }

    fn shared_memory(&self, size: u64) -> io::Result<File> {
        shared_file(size)
    }

    fn memory(&self) -> &GuestMemoryMmap {
        self.memory.mapped()
    }

    fn memory_regions(&self) -> &[MemoryRegion] {
        self.memory.regions()
    }

    fn physical_address_bits(&self) -> u8 {
        self.address_bits
    }
}

//! Virtual processors: their set-up, their threads, and the loop around KVM_RUN.
#![allow(unsafe_code)] // sched_setaffinity, pthread_kill, kvm_run's immediate_exit flag and its union of exit data

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use devices::host::Host;
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd, VmFd};
use log::debug;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use self::refused::{Mmio, Next, Refused};
use crate::bus::Bus;
use crate::host::Machine;
use crate::sandbox::{self, Seccomp};
use crate::stats::VcpuStats;
use crate::stop::Stop;
use crate::sys::{context, kvm};
use crate::{Error, Outcome};

mod general;
mod guest;
pub(crate) mod refused;
mod vector;

/// KVM_RUN's reason in an exit for an internal error: it met an instruction that it cannot emulate.
const KVM_INTERNAL_ERROR_EMULATION: u32 = 1;

/// Most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 8;

/// Why a vCPU stopped though nobody asked it to.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The guest met an exception while it handled a double fault.
    #[error("the guest died of a triple fault (rip {rip:#x}, cr2 {cr2:#x})")]
    TripleFault {
        /// Instruction pointer, as far as the processor kept it.
        rip: u64,
        /// Last page-fault address.
        cr2: u64,
    },
    /// KVM cannot emulate what the guest did.
    #[error("KVM gave up on the guest (internal error {suberror}, rip {rip:#x})")]
    Internal {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// Instruction pointer.
        rip: u64,
    },
    /// The processor refused the guest's state.
    #[error("the processor refused to enter the guest (hardware reason {reason:#x}, rip {rip:#x})")]
    FailEntry {
        /// What the hardware said.
        reason: u64,
        /// Instruction pointer.
        rip: u64,
    },
    /// Memory of the guest is not there.
    #[error("the host could not provide a page that the guest touched{} (rip {rip:#x}): out of memory, or a peer took the page out of its file", .gpa.map(|g| format!(" at guest physical {g:#x}")).unwrap_or_default())]
    NoMemory {
        /// Guest physical address, where KVM tells it.
        gpa: Option<u64>,
        /// Instruction pointer.
        rip: u64,
    },
    /// KVM_RUN failed.
    #[error("KVM_RUN failed: {0}")]
    Run(io::Error),
    /// An exit that the VMM does not handle.
    #[error("an exit that the VMM does not handle: {what} (rip {rip:#x})")]
    Unexpected {
        /// The exit.
        what: String,
        /// Instruction pointer.
        rip: u64,
    },
    /// A defect of the VMM.
    #[error("the vCPU's thread panicked")]
    Panic,
}

/// Gives vCPU `id` of `count` its CPUID, and the state that a reset gives it.
pub(crate) fn set_up(
    vm: &VmFd,
    supported: &CpuId,
    vcpu: &VcpuFd,
    id: u8,
    count: u8,
) -> io::Result<()> {
    let deadline = vm.check_extension(Cap::TscDeadlineTimer);
    let entries = cpuid(supported.as_slice(), id, count, deadline);
    let cpuid = CpuId::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(|e| kvm("KVM_SET_CPUID2", e))?;

    // Fast string operations on; memory is write-back where the MTRRs say nothing.
    const MISC_ENABLE: u32 = 0x1A0;
    const MTRR_DEFAULT_TYPE: u32 = 0x2FF;
    for (index, data) in [(MISC_ENABLE, 1), (MTRR_DEFAULT_TYPE, 0x806)] {
        let msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }])
        .map_err(|e| io::Error::other(format!("{e:?}")))?;
        // Not every processor has them.
        if !matches!(vcpu.set_msrs(&msrs), Ok(1)) {
            debug!("vCPU {id}: MSR {index:#x} cannot be set");
        }
    }
    let fpu = kvm_fpu {
        fcw: 0x37F,
        mxcsr: 0x1F80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(|e| kvm("KVM_SET_FPU", e))?;

    // The PIC on LINT0 and NMIs on LINT1, as firmware leaves it.
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const EXTINT: i8 = 7;
    const NMI: i8 = 4;
    let mut lapic = vcpu.get_lapic().map_err(|e| kvm("KVM_GET_LAPIC", e))?;
    for (register, mode) in [(LINT0, EXTINT), (LINT1, NMI)] {
        // Delivery mode in bits 8..10, unmasked.
        if let Some([_, second, third, _]) = lapic.regs.get_mut(register..register + 4) {
            *second = *second & !7 | mode;
            *third &= !1;
        }
    }
    vcpu.set_lapic(&lapic).map_err(|e| kvm("KVM_SET_LAPIC", e))
}

/// What KVM supports, with this vCPU's place among the others.
fn cpuid(
    supported: &[kvm_cpuid_entry2],
    id: u8,
    count: u8,
    deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    const X2APIC: u32 = 1 << 21;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const HTT: u32 = 1 << 28;
    let (apic, count) = (u32::from(id), u32::from(count));
    let core_bits = count.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|e| !matches!(e.function, 0xB | 0x1F))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xFFFF | count << 16 | apic << 24;
                entry.ecx |= X2APIC | HYPERVISOR;
                entry.ecx = if deadline {
                    entry.ecx | TSC_DEADLINE
                } else {
                    entry.ecx & !TSC_DEADLINE
                };
                entry.edx = if count > 1 {
                    entry.edx | HTT
                } else {
                    entry.edx & !HTT
                };
            }
            // Cores that share a cache, cores of the package, each less one.
            4 if entry.eax & 0x1F != 0 => entry.eax = entry.eax & 0x3FFF | (count - 1) << 26,
            0x8000_0008 => entry.ecx = core_bits << 12 | (count - 1),
            0x8000_001E => (entry.eax, entry.ebx, entry.ecx) = (apic, apic, 0),
            _ => {}
        }
    }
    // Extended topology: one thread a core, one package.
    let highest = supported
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    if highest >= 0xB {
        let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
            function: 0xB,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: index | kind << 8,
            edx: apic,
            ..Default::default()
        };
        entries.push(level(0, 0, 1, 1));
        entries.push(level(1, core_bits, count, 2));
        entries.push(level(2, 0, 0, 0));
    }
    entries
}

/// The vCPUs of a VM, each on a thread of its own.
pub(crate) struct Vcpus {
    threads: Vec<VcpuThread>,
}

struct VcpuThread {
    /// Gives the vCPU back, so that `immediate_exit` is there until the thread is joined.
    handle: JoinHandle<VcpuFd>,
    immediate_exit: ImmediateExit,
    /// Runs the guest when something is sent, ends when it is dropped.
    start: Option<Sender<()>>,
}

/// The flag in the shared kvm_run page that makes the next KVM_RUN return at once.
struct ImmediateExit(*mut u8);

impl ImmediateExit {
    fn set(&self) {
        // SAFETY: the page is mapped as long as the VcpuFd lives, which the thread keeps and gives back to its join; kernel
        // and VMM only ever access the byte as a whole.
        unsafe { AtomicU8::from_ptr(self.0) }.store(1, Ordering::SeqCst);
    }
}

fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Starts the threads, pinned to `affinity` (empty: not pinned), waiting for [`Vcpus::run`].
    pub(crate) fn spawn(
        vcpus: Vec<(VcpuFd, Arc<VcpuStats>)>,
        affinity: &[usize],
        bus: &Arc<Bus>,
        machine: &Machine,
        stop: &Arc<Stop>,
        seccomp: Seccomp,
    ) -> Result<Self, Error> {
        static HANDLER: Once = Once::new();
        let mut registered = Ok(());
        HANDLER.call_once(|| registered = register_signal_handler(kick_signal(), on_kick));
        registered.map_err(|e| Error::System(context("sigaction", e.into())))?;

        let mut all = Vcpus {
            threads: Vec::new(),
        };
        for (id, (mut vcpu, stats)) in vcpus.into_iter().enumerate() {
            let core = affinity.get(id).copied();
            let immediate_exit = ImmediateExit(&raw mut vcpu.get_kvm_run().immediate_exit);
            let (start, started) = mpsc::channel();
            let (ready, was_ready) = mpsc::channel();
            let thread = Thread {
                id,
                vcpu,
                stats,
                bus: Arc::clone(bus),
                refused: Refused::new(machine.windows(), machine.memory()),
                stop: Arc::clone(stop),
            };
            let handle = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || {
                    let _ = ready.send(thread.prepare(core, seccomp));
                    thread.main(&started)
                })
                .map_err(|e| Error::System(context("a vCPU's thread", e)))?;
            all.threads.push(VcpuThread {
                handle,
                immediate_exit,
                start: Some(start),
            });
            was_ready.recv().unwrap_or(Err(Error::Vcpu {
                id,
                fault: Fault::Panic,
            }))?;
        }
        Ok(all)
    }

    /// Lets the guest run.
    pub(crate) fn run(&self) {
        for start in self.threads.iter().filter_map(|t| t.start.as_ref()) {
            let _ = start.send(());
        }
    }
}

impl Drop for Vcpus {
    /// Ends the threads. The caller has ended the VM, or never let it run.
    fn drop(&mut self) {
        for thread in &mut self.threads {
            thread.start = None;
            thread.immediate_exit.set();
        }
        for thread in self.threads.drain(..) {
            while !thread.handle.is_finished() {
                // The flag is set before: the signal either finds KVM_RUN and ends it, or KVM_RUN finds the flag. It is repeated
                // for a thread that waits elsewhere.
                // SAFETY: the thread has not been joined, so its handle is valid.
                unsafe { libc::pthread_kill(thread.handle.as_pthread_t(), kick_signal()) };
                thread::sleep(Duration::from_millis(1));
            }
            // The thread catches its panics.
            let _ = thread.handle.join();
        }
    }
}

struct Thread {
    id: usize,
    vcpu: VcpuFd,
    stats: Arc<VcpuStats>,
    bus: Arc<Bus>,
    refused: Refused,
    stop: Arc<Stop>,
}

impl Thread {
    /// Goes to its core and gives up what it does not need.
    fn prepare(&self, core: Option<usize>, seccomp: Seccomp) -> Result<(), Error> {
        // SAFETY: a call without arguments.
        let tid = unsafe { libc::gettid() };
        self.stats.tid.store(tid, Ordering::Relaxed);
        if let Some(core) = core {
            pin(core).map_err(|source| Error::Affinity {
                vcpu: self.id,
                core,
                source,
            })?;
        }
        Ok(seccomp.enter(sandbox::Thread::Vcpu)?)
    }

    fn main(mut self, started: &Receiver<()>) -> VcpuFd {
        if started.recv().is_ok() {
            let result = catch_unwind(AssertUnwindSafe(|| self.run())).unwrap_or(Err(Fault::Panic));
            match result {
                Ok(None) => {}
                Ok(Some(outcome)) => self.stop.end(Ok(outcome)),
                Err(fault) => self.stop.end(Err(Error::Vcpu { id: self.id, fault })),
            }
        }
        self.vcpu
    }

    /// Runs the guest until the VM ends; returns how, where this vCPU ended it.
    fn run(&mut self) -> Result<Option<Outcome>, Fault> {
        while !self.stop.requested() {
            let exits = &self.stats.exits;
            let result = self.vcpu.run();
            if let Some(gpa) = refused::refused_at(&result) {
                exits.refused.bump();
                match self.refused.fault(&mut self.vcpu, &*self.bus) {
                    Next::Run => {}
                    Next::Undefined => self.raise_undefined()?,
                    Next::Real => return Err(self.no_memory(gpa)),
                }
                continue;
            }
            let result = match result {
                Ok(VcpuExit::MmioRead(gpa, data)) => {
                    exits.mmio_read.bump();
                    self.bus.mmio_read(gpa, data);
                    self.refused.answered(&mut self.vcpu);
                    continue;
                }
                Ok(VcpuExit::MmioWrite(gpa, data)) => {
                    exits.mmio_write.bump();
                    self.bus.mmio_write(gpa, data);
                    self.refused.answered(&mut self.vcpu);
                    continue;
                }
                Ok(VcpuExit::InternalError) => {
                    exits.refused.bump();
                    // SAFETY: KVM fills this member of the union for this exit reason.
                    let suberror =
                        unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
                    let next = match suberror {
                        KVM_INTERNAL_ERROR_EMULATION => {
                            self.refused.unemulated(&mut self.vcpu, &*self.bus)
                        }
                        _ => Next::Real,
                    };
                    match next {
                        Next::Run => {}
                        Next::Undefined => self.raise_undefined()?,
                        Next::Real => {
                            let rip = self.rip();
                            return Err(Fault::Internal { suberror, rip });
                        }
                    }
                    continue;
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    exits.io_out.bump();
                    if let Some(outcome) = self.bus.io_write(port, data) {
                        return Ok(Some(outcome));
                    }
                    Ok(())
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    exits.io_in.bump();
                    self.bus.io_read(port, data);
                    Ok(())
                }
                Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {
                    exits.other.bump();
                    Ok(())
                }
                Ok(VcpuExit::Shutdown) => {
                    let cr2 = self.vcpu.get_sregs().map_or(0, |s| s.cr2);
                    let rip = self.rip();
                    Err(Fault::TripleFault { rip, cr2 })
                }
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    let rip = self.rip();
                    Err(Fault::FailEntry { reason, rip })
                }
                Ok(other) => {
                    let what = format!("{other:?}");
                    let rip = self.rip();
                    Err(Fault::Unexpected { what, rip })
                }
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    exits.other.bump();
                    Ok(())
                }
                Err(e) if e.errno() == libc::EHWPOISON => Err(self.no_memory(None)),
                Err(e) => Err(Fault::Run(e.into())),
            };
            self.refused.returned(&mut self.vcpu);
            result?;
        }
        Ok(None)
    }

    fn no_memory(&self, gpa: Option<u64>) -> Fault {
        let rip = self.rip();
        Fault::NoMemory { gpa, rip }
    }

    fn raise_undefined(&self) -> Result<(), Fault> {
        refused::raise_undefined(&self.vcpu).map_err(Fault::Run)
    }

    fn rip(&self) -> u64 {
        self.vcpu.get_regs().map_or(0, |regs| regs.rip)
    }
}

/// Pins the calling thread to one core.
fn pin(core: usize) -> io::Result<()> {
    if core >= usize::try_from(libc::CPU_SETSIZE).unwrap_or(0) {
        return Err(io::Error::other("there are no cores with such numbers"));
    }
    // SAFETY: all bit patterns are valid for a CPU set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the core's number is within the set.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: the set is initialised and its size is told; 0 is the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

//! The system calls of each kind of thread. What a thread does before it enters its filter (open, bind, start threads) is not in here.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Thread;

/// What the language, its allocator and its locks use anywhere, also in a panic or an abort.
const EVERY: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What waits on descriptors.
const LOOP: &[c_long] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
];

/// What looks at a file, by its descriptor or its name, and takes a socket's name away.
const FILES: &[c_long] = &[
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_unlink,
];

/// What meets a peer and talks to it. (`socket` is below: Unix sockets only.)
const SOCKETS: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

// _IOC numbers of linux/kvm.h.
const KVM_RUN: u64 = 0xAE80;
const KVM_CHECK_EXTENSION: u64 = 0xAE03;
const KVM_GET_REGS: u64 = 0x8090_AE81;
const KVM_SET_REGS: u64 = 0x4090_AE82;
const KVM_GET_SREGS: u64 = 0x8138_AE83;
const KVM_TRANSLATE: u64 = 0xC018_AE85;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_AE9F;
const KVM_SET_VCPU_EVENTS: u64 = 0x4040_AEA0;
const KVM_GET_XSAVE: u64 = 0x9000_AEA4;
const KVM_SET_XSAVE: u64 = 0x5000_AEA5;
const KVM_GET_XSAVE2: u64 = 0x9000_AECF;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_AE46;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_AE6A;
const KVM_IRQFD: u64 = 0x4020_AE76;
const KVM_IOEVENTFD: u64 = 0x4040_AE79;

/// Windows, doorbells and interrupts: what any thread that handles a device's registers or messages asks of KVM.
const VM: &[u64] = &[
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_GSI_ROUTING,
    KVM_IRQFD,
    KVM_IOEVENTFD,
];

/// Its own vCPU.
const VCPU: &[u64] = &[
    KVM_RUN,
    KVM_CHECK_EXTENSION,
    KVM_GET_REGS,
    KVM_SET_REGS,
    KVM_GET_SREGS,
    KVM_TRANSLATE,
    KVM_GET_VCPU_EVENTS,
    KVM_SET_VCPU_EVENTS,
    KVM_GET_XSAVE,
    KVM_SET_XSAVE,
    KVM_GET_XSAVE2,
];

/// TCGETS and TCSETS, and their successors: a panic anywhere gives the console's terminal its settings back.
const TERMINAL: &[u64] = &[0x5401, 0x5402, 0x802C_542A, 0x402C_542B];
/// FIONBIO: a stream that was accepted does not block.
const STREAM: &[u64] = &[0x5421];
/// TUNSETOFFLOAD, and VHOST_* and VHOST_NET_SET_BACKEND of linux/vhost.h but for VHOST_SET_OWNER.
const TAP: &[u64] = &[
    0x4004_54D0,
    0x8008_AF00,
    0x4008_AF00,
    0x4008_AF03,
    0x4008_AF10,
    0x4028_AF11,
    0x4008_AF12,
    0xC008_AF12,
    0x4008_AF20,
    0x4008_AF21,
    0x4008_AF22,
    0x4008_AF30,
];

#[derive(Default)]
struct Rules(BTreeMap<i64, Vec<SeccompRule>>);

impl Rules {
    fn allow(&mut self, calls: &[c_long]) {
        for call in calls {
            self.0.insert(*call, Vec::new());
        }
    }

    /// Allows the call where its argument compares with one of these values.
    fn only(
        &mut self,
        call: c_long,
        argument: u8,
        compare: SeccompCmpOp,
        values: &[u64],
    ) -> Result<(), BackendError> {
        let rules = self.0.entry(call).or_default();
        for value in values {
            let condition = SeccompCondition::new(argument, Dword, compare.clone(), *value)?;
            rules.push(SeccompRule::new(vec![condition])?);
        }
        Ok(())
    }
}

fn wide(number: libc::c_int) -> u64 {
    u64::from(number.unsigned_abs())
}

/// The filter of a thread: what it has no use for meets `action`.
pub(super) fn program(thread: Thread, action: SeccompAction) -> Result<BpfProgram, BackendError> {
    let own = u64::from(std::process::id());
    let mut rules = Rules::default();
    rules.allow(EVERY);
    // No memory becomes a program.
    let executable = MaskedEq(wide(libc::PROT_EXEC));
    rules.only(libc::SYS_mmap, 2, executable.clone(), &[0])?;
    rules.only(libc::SYS_mprotect, 2, executable, &[0])?;
    // A vCPU is kicked, an abort raises SIGABRT; no other process gets a signal.
    rules.only(libc::SYS_tgkill, 0, Eq, &[own])?;
    // The handler of stack overflows gives way to the default action.
    let faults = [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT].map(wide);
    rules.only(libc::SYS_rt_sigaction, 0, Eq, &faults)?;
    let ioctls = match thread {
        Thread::Vcpu => {
            rules.allow(FILES);
            // It copies what a window refuses, within this process.
            rules.only(libc::SYS_process_vm_readv, 0, Eq, &[own])?;
            rules.only(libc::SYS_process_vm_writev, 0, Eq, &[own])?;
            rules.allow(&[libc::SYS_eventfd2]);
            [VCPU, VM].concat()
        }
        Thread::Devices => {
            rules.allow(LOOP);
            rules.allow(FILES);
            rules.allow(SOCKETS);
            let unix = [wide(libc::AF_UNIX)];
            rules.only(libc::SYS_socket, 0, Eq, &unix)?;
            rules.only(libc::SYS_socketpair, 0, Eq, &unix)?;
            let files = [libc::F_DUPFD_CLOEXEC, libc::F_GET_SEALS, libc::F_ADD_SEALS].map(wide);
            rules.only(libc::SYS_fcntl, 1, Eq, &files)?;
            // Windows are looked at, counters read, deadlines set; a page of the device's is written, and memory is made for what is in flight.
            rules.allow(&[
                libc::SYS_eventfd2,
                libc::SYS_fstatfs,
                libc::SYS_ftruncate,
                libc::SYS_memfd_create,
                libc::SYS_pread64,
                libc::SYS_pwrite64,
                libc::SYS_timerfd_settime,
            ]);
            [VM, STREAM].concat()
        }
        Thread::Tap => {
            rules.allow(LOOP);
            // A device that is reset gets new ones.
            rules.allow(&[libc::SYS_eventfd2]);
            [VM, TAP].concat()
        }
        Thread::Disk => {
            rules.allow(LOOP);
            rules.allow(&[libc::SYS_fdatasync, libc::SYS_pread64, libc::SYS_pwrite64]);
            Vec::new()
        }
        // It writes a file that is open.
        Thread::Capture => Vec::new(),
        Thread::Metrics => {
            rules.allow(FILES);
            rules.allow(&[
                libc::SYS_accept4,
                libc::SYS_pread64,
                libc::SYS_recvfrom,
                libc::SYS_sendto,
                libc::SYS_setsockopt,
            ]);
            STREAM.to_vec()
        }
        Thread::Main => {
            // It plugs the devices in when their back-ends are there.
            rules.allow(FILES);
            rules.allow(&[libc::SYS_eventfd2, libc::SYS_sendto]);
            VM.to_vec()
        }
    };
    rules.only(libc::SYS_ioctl, 1, Eq, TERMINAL)?;
    rules.only(libc::SYS_ioctl, 1, Eq, &ioctls)?;
    SeccompFilter::new(rules.0, action, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

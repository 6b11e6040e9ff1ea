//! The few system calls that the standard library does not offer: pinning, CPU clocks, `poll`,
//! signals, limits, and shared memory.
//!
//! `unsafe` is open here, and only here in the tool, because each of these is a C call.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use virtqueue::linear::Linear;
use vmm::HugePages;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The cores that this process may run on, ascending.
pub fn allowed_cores() -> io::Result<Vec<usize>> {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: the pointer and the length describe `set`; the kernel writes no more than that.
    check(unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) })?;
    // SAFETY: a cpu_set_t is an array of integers, for which zeroes and what the kernel wrote are valid.
    let set = unsafe { set.assume_init() };
    // SAFETY: the index stays below CPU_SETSIZE, the number of bits in the set.
    Ok((0..libc::CPU_SETSIZE.unsigned_abs() as usize)
        .filter(|&core| unsafe { libc::CPU_ISSET(core, &set) })
        .collect())
}

/// Pins the calling thread to one core.
pub fn pin_to(core: usize) -> io::Result<()> {
    if core >= libc::CPU_SETSIZE.unsigned_abs() as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: a cpu_set_t is an array of integers; all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: `core` was checked to be below the number of bits in the set.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: the pointer and the length describe `set`, which outlives the call.
    check(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) })?;
    Ok(())
}

fn clock_ns(clock: libc::clockid_t) -> io::Result<u64> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec that outlives the call.
    check(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
}

/// CPU time that a process has used, all threads together, in ns. Unlike schedstat this is exact for threads that are
/// running now.
pub fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut clock = 0;
    // SAFETY: `clock` is valid for a write.
    match unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) } {
        0 => clock_ns(clock),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// CPU time that the calling thread has used, in ns.
pub fn thread_cpu_ns() -> io::Result<u64> {
    clock_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Gives the calling thread a network namespace of its own, in which nothing is up yet.
pub fn own_network() -> io::Result<()> {
    // SAFETY: no memory is passed; only this thread's namespace changes.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    Ok(())
}

/// The calling thread's number.
pub fn thread_id() -> libc::pid_t {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// Asks for SIGTERM when the process `parent` ends; fails if it already has.
pub fn die_with_parent(parent: u32) -> io::Result<()> {
    // SAFETY: this option takes a signal number and touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) })?;
    if std::os::unix::process::parent_id() == parent {
        Ok(())
    } else {
        Err(io::Error::other(
            "the process that started this one is gone",
        ))
    }
}

/// Takes ownership of a file descriptor that this process was started with.
pub fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl with these commands only reads and sets the descriptor's flags; a bad `fd` is an error.
    unsafe {
        check(libc::fcntl(fd, libc::F_GETFD))?;
        check(libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC))?;
    }
    // SAFETY: the descriptor is open. The process that started this one handed it over by number for this purpose, and
    // it is called once, so nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor that becomes readable when the process ends.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    let fd = check(c_int::try_from(fd).map_err(|_| io::ErrorKind::Other)?)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to a child that has not been waited for (its pid cannot have been reused).
pub fn signal(pid: u32, signal: c_int) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: kill takes two integers and touches no memory.
    check(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// Waits until one of `fds` is readable or closed, or the time is over; says which. `None` waits for ever.
pub fn poll(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut set: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // Rounded up: a wait of less than a millisecond must not become a busy loop.
    let timeout = timeout.map_or(-1, |time| {
        c_int::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX)
    });
    // SAFETY: the pointer and the length describe `set`; the descriptors are borrowed for the call.
    let result = unsafe { libc::poll(set.as_mut_ptr(), set.len() as libc::nfds_t, timeout) };
    match check(result) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        Err(_) => Ok(vec![false; set.len()]),
        Ok(_) => Ok(set.iter().map(|entry| entry.revents != 0).collect()),
    }
}

static CAUGHT: AtomicI32 = AtomicI32::new(0);
static WAKE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(number: c_int) {
    let _ = CAUGHT.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
    let one = 1_u64;
    // SAFETY: errno is thread-local and the handler runs on its thread; write is async-signal-safe, and the eventfd stays
    // open for the rest of the process (`Signals::install` never closes it).
    unsafe {
        let errno = *libc::__errno_location();
        let _ = libc::write(
            WAKE.load(Ordering::Relaxed),
            (&raw const one).cast(),
            size_of::<u64>(),
        );
        *libc::__errno_location() = errno;
    }
}

/// SIGINT, SIGTERM and SIGHUP as a descriptor to poll, so that whoever waits can clean up and return.
#[derive(Debug)]
pub struct Signals {
    event: OwnedFd,
}

impl Signals {
    /// From here on these signals end nothing by themselves. A child gets the default action back when it is executed.
    pub fn install() -> io::Result<Self> {
        let event = eventfd()?;
        // The handler keeps a duplicate of its own that is never closed.
        let kept = std::os::fd::IntoRawFd::into_raw_fd(event.try_clone()?);
        WAKE.store(kept, Ordering::Relaxed);
        for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: an all-zero sigaction is a valid one: no flags, an empty mask.
            let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            // SAFETY: `action` outlives the call, and the handler does only what is async-signal-safe.
            check(unsafe { libc::sigaction(number, &raw const action, ptr::null_mut()) })?;
        }
        Ok(Self { event })
    }

    /// The first signal that arrived.
    pub fn caught(&self) -> Option<c_int> {
        match CAUGHT.load(Ordering::Relaxed) {
            0 => None,
            number => Some(number),
        }
    }
}

impl std::os::fd::AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// What KVM_GET_API_VERSION returns for an open /dev/kvm.
pub fn kvm_api_version(kvm: &File) -> io::Result<c_int> {
    const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00;
    // SAFETY: this ioctl takes no argument and touches no memory.
    check(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) })
}

fn memfd(flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: the name is a NUL-terminated constant.
    let fd =
        check(unsafe { libc::memfd_create(c"vhost-pci".as_ptr(), flags | libc::MFD_CLOEXEC) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn seal(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: fcntl with F_ADD_SEALS takes an integer and touches no memory.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) })?;
    Ok(())
}

/// Whether a memfd can be sealed against shrinking.
pub fn memfd_can_be_sealed() -> io::Result<()> {
    seal(&memfd(libc::MFD_ALLOW_SEALING)?)
}

/// A file of `len` bytes of memory, sealed against shrinking or not.
pub fn memory_file(len: u64, sealed: bool) -> io::Result<File> {
    let fd = memfd(libc::MFD_ALLOW_SEALING)?;
    let file = File::from(fd.try_clone()?);
    file.set_len(len)?;
    if sealed {
        seal(&fd)?;
    }
    Ok(file)
}

/// An eventfd.
pub fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: eventfd takes two integers and touches no memory.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A resource limit of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Open files, a number.
    Files,
    /// Locked memory, in bytes.
    LockedMemory,
}

/// The soft limit; `u64::MAX` is none.
pub fn limit(what: Limit) -> io::Result<u64> {
    let resource = match what {
        Limit::Files => libc::RLIMIT_NOFILE,
        Limit::LockedMemory => libc::RLIMIT_MEMLOCK,
    };
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is valid for a write.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
    Ok(limit.rlim_cur)
}

/// Shared memory of the kind that a guest gets: zeroed, present, its first byte at device address 0. It stays mapped for the rest
/// of the process. `len` is rounded up to whole pages of the kind that `hugepages` names.
pub fn shared_memory(len: u64, hugepages: HugePages) -> io::Result<Linear> {
    let flags = match hugepages {
        HugePages::Off => 0,
        HugePages::Size2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        HugePages::Size1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    };
    let len = len.max(1).next_multiple_of(hugepages.page_size());
    let size = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let file = File::from(memfd(flags)?);
    file.set_len(len)?;
    // SAFETY: a new mapping at an address that the kernel chooses; it replaces nothing. The file was just made and is known to
    // nobody else, so it cannot shrink under the mapping.
    let base = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            file.as_raw_fd(),
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `len` bytes were mapped for reading and writing, and nothing unmaps them; there is no reference to them, and
    // only the rings, which keep what `Region` asks for, and their ports get at them.
    Ok(unsafe { Linear::new(base.cast(), 0, len) })
}

/// A counter of the cache misses of the calling thread, in user mode.
#[derive(Debug)]
pub struct CacheMisses(File);

impl CacheMisses {
    /// Starts to count; fails where the processor, the kernel or the hypervisor offers no such counter.
    pub fn start() -> io::Result<Self> {
        /// struct perf_event_attr, version 0.
        #[repr(C)]
        struct Attr {
            kind: u32,
            size: u32,
            config: u64,
            sample_period: u64,
            sample_type: u64,
            read_format: u64,
            flags: u64,
            wakeup: u32,
            bp_type: u32,
            bp_addr: u64,
        }
        const HARDWARE: u32 = 0;
        const CACHE_MISSES: u64 = 3;
        const EXCLUDE_KERNEL: u64 = 1 << 5;
        const EXCLUDE_HV: u64 = 1 << 6;
        const FLAG_CLOEXEC: libc::c_ulong = 8;
        const _: () = assert!(size_of::<Attr>() == 64);
        let attr = Attr {
            kind: HARDWARE,
            size: 64,
            config: CACHE_MISSES,
            sample_period: 0,
            sample_type: 0,
            read_format: 0,
            flags: EXCLUDE_KERNEL | EXCLUDE_HV,
            wakeup: 0,
            bp_type: 0,
            bp_addr: 0,
        };
        let (this_thread, any_core, no_group): (c_int, c_int, c_int) = (0, -1, -1);
        // SAFETY: `attr` is the first version of the structure, as long as its field `size` says, and outlives the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attr,
                this_thread,
                any_core,
                no_group,
                FLAG_CLOEXEC,
            )
        };
        let fd = check(c_int::try_from(fd).map_err(|_| io::ErrorKind::Other)?)?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// How many so far.
    pub fn count(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        (&self.0).read_exact(&mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction; it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::time::Instant;

    #[test]
    fn a_pinned_thread_may_run_on_that_core_only() {
        let core = allowed_cores().unwrap()[0];
        let seen = std::thread::spawn(move || {
            pin_to(core).unwrap();
            allowed_cores().unwrap()
        });
        assert_eq!(seen.join().unwrap(), [core]);
        assert!(pin_to(100_000).is_err());
    }

    #[test]
    fn the_process_clock_sees_a_running_thread() {
        let pid = std::process::id();
        let before = process_cpu_ns(pid).unwrap();
        let start = thread_cpu_ns().unwrap();
        while thread_cpu_ns().unwrap() - start < 3_000_000 {}
        assert!(process_cpu_ns(pid).unwrap() - before >= 3_000_000);
    }

    #[test]
    fn a_counter_that_there_is_counts_and_one_that_is_not_is_an_error() {
        match CacheMisses::start() {
            Ok(counter) => {
                let before = counter.count().unwrap();
                let bytes = vec![1_u8; 1 << 24];
                assert!(bytes.iter().step_by(64).map(|&b| u32::from(b)).sum::<u32>() > 0);
                assert!(counter.count().unwrap() > before);
            }
            Err(error) => assert!(error.raw_os_error().is_some(), "{error}"),
        }
    }

    #[test]
    fn poll_waits_no_less_than_it_is_told_and_sees_a_closed_end() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let start = Instant::now();
        let ready = poll(&[a.as_fd()], Some(Duration::from_micros(1500))).unwrap();
        assert!(!ready[0] && start.elapsed() >= Duration::from_micros(1500));
        drop(b);
        assert!(poll(&[a.as_fd()], None).unwrap()[0]);
    }

    #[test]
    fn shared_memory_is_rounded_up_to_pages_and_no_more() {
        let memory = shared_memory(5000, HugePages::Off).unwrap();
        assert!(memory.ptr(0, 8192).is_some());
        assert!(memory.ptr(0, 8193).is_none());
        let last = memory.ptr(8191, 1).unwrap();
        // SAFETY: the last byte of memory that stays mapped.
        assert_eq!(unsafe { last.read_volatile() }, 0);
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_not_taken() {
        assert!(inherited_fd(1_000_000).is_err());
    }
}

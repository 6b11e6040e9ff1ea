//! Doorbells: guest writes that signal an eventfd without leaving the kernel (KVM_IOEVENTFD).

use std::io;
use std::sync::{Arc, Mutex};

use devices::vhost_pci::MAX_QUEUES;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::sys::{invalid, kvm, lock};

/// How many doorbells a vhost-pci device can have: two control queues, and a call and an error for each vhost-user queue.
const LARGEST_DEVICE: usize = 2 + 2 * MAX_QUEUES as usize;
/// How many doorbells a VM can have: enough for a few of the largest devices. (KVM's own limit is on other things of its bus: to
/// doorbells it gives as many as there are descriptors.)
pub const LIMIT: usize = 4 * LARGEST_DEVICE;

/// The doorbells of a VM.
pub struct Doorbells {
    vm: Arc<VmFd>,
    /// The eventfds are kept: KVM finds a doorbell to remove by its descriptor, which must not mean another file by then.
    all: Mutex<Vec<(u64, Arc<EventFd>)>>,
}

impl Doorbells {
    /// None yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Doorbells {
            vm,
            all: Mutex::new(Vec::new()),
        }
    }

    /// A write of any size and value to `gpa` signals `event`. Fails where there is one at `gpa`, where `event` is no
    /// eventfd, and beyond [`LIMIT`].
    pub fn add(&self, gpa: u64, event: &Arc<EventFd>) -> io::Result<()> {
        let mut all = lock(&self.all);
        if all.iter().any(|(at, _)| *at == gpa) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("there is a doorbell at {gpa:#x} already"),
            ));
        }
        if all.len() >= LIMIT {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("all {LIMIT} doorbells of the VM are in use"),
            ));
        }
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(|e| kvm(&format!("a doorbell at guest physical {gpa:#x}"), e))?;
        all.push((gpa, Arc::clone(event)));
        Ok(())
    }

    /// Takes the doorbell at `gpa` with this `event` (the same `Arc`) away. Fails where there is none.
    pub fn remove(&self, gpa: u64, event: &Arc<EventFd>) -> io::Result<()> {
        let mut all = lock(&self.all);
        let index = all
            .iter()
            .position(|(at, e)| *at == gpa && Arc::ptr_eq(e, event))
            .ok_or_else(|| invalid(format!("there is no such doorbell at {gpa:#x}")))?;
        self.vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(|e| {
                kvm(
                    &format!("taking the doorbell at guest physical {gpa:#x} away"),
                    e,
                )
            })?;
        all.swap_remove(index);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use devices::host::Host;

    use super::*;
    use crate::testing::Monitor;

    const GPA: u64 = 0xC000_4000;

    fn eventfd() -> Arc<EventFd> {
        Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn a_guest_write_signals_the_eventfd_and_does_not_reach_the_vmm() {
        let mut monitor = Monitor::new();
        let event = eventfd();
        monitor.machine.add_doorbell(GPA, &event).unwrap();
        monitor.poke(GPA, 5);
        assert_eq!(event.read().unwrap(), 1);
        assert!(monitor.missed.is_empty());
        monitor.poke(GPA + 4, 5);
        assert!(event.read().is_err());
        assert_eq!(monitor.missed, [GPA + 4]);
    }

    #[test]
    fn a_removed_doorbell_is_an_ordinary_write_again() {
        let mut monitor = Monitor::new();
        let (event, other) = (eventfd(), eventfd());
        monitor.machine.add_doorbell(GPA, &event).unwrap();
        assert!(monitor.machine.remove_doorbell(GPA, &other).is_err());
        assert!(monitor.machine.remove_doorbell(GPA + 4, &event).is_err());
        monitor.machine.remove_doorbell(GPA, &event).unwrap();
        monitor.poke(GPA, 5);
        assert!(event.read().is_err());
        assert_eq!(monitor.missed, [GPA]);
        monitor.machine.add_doorbell(GPA, &other).unwrap();
    }

    #[test]
    fn one_address_has_one_doorbell_and_their_number_is_bounded() {
        let monitor = Monitor::new();
        let event = eventfd();
        monitor.machine.add_doorbell(GPA, &event).unwrap();
        let error = monitor.machine.add_doorbell(GPA, &eventfd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        for index in 1..LIMIT as u64 {
            monitor
                .machine
                .add_doorbell(GPA + index * 4, &event)
                .unwrap();
        }
        let error = monitor
            .machine
            .add_doorbell(GPA + 0x10_0000, &event)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
    }

    #[test]
    fn a_file_that_is_no_eventfd_is_refused() {
        use std::os::fd::{FromRawFd, IntoRawFd};
        let monitor = Monitor::new();
        let null = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        // SAFETY: the descriptor was given away by the file.
        #[allow(unsafe_code)]
        let odd = Arc::new(unsafe { EventFd::from_raw_fd(null) });
        assert!(monitor.machine.add_doorbell(GPA, &odd).is_err());
    }
}

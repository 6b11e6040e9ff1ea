//! The calls to vhost-net, against a stand-in that writes them down.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionBase};
use virtqueue::net::{F_CSUM, F_MAC, F_MRG_RXBUF, features};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::event;

/// What vhost-net was asked, in order.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Owner,
    Features(u64),
    /// Guest physical address, address here, length.
    Memory(Vec<(u64, u64, u64)>),
    Num(usize, u16),
    Base(usize, u16),
    /// Descriptors, driver area, device area.
    Addr(usize, u64, u64, u64),
    Kick(usize, RawFd),
    Call(usize, RawFd),
    Backend(usize, Option<RawFd>),
}

#[derive(Clone, Default)]
struct Fake {
    log: Arc<Mutex<Vec<Asked>>>,
    /// It does not take a queue of this size.
    refuses: u16,
}

impl Fake {
    fn note(&self, call: Asked) -> vhost::Result<()> {
        self.log.lock().unwrap().push(call);
        Ok(())
    }
    fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

impl VhostBackend for Fake {
    fn get_features(&self) -> vhost::Result<u64> {
        Ok(features::VERSION_1 | features::EVENT_IDX | F_MRG_RXBUF | NOT_OF_RINGS)
    }
    fn set_features(&self, features: u64) -> vhost::Result<()> {
        self.note(Asked::Features(features))
    }
    fn set_owner(&self) -> vhost::Result<()> {
        self.note(Asked::Owner)
    }
    fn reset_owner(&self) -> vhost::Result<()> {
        Err(vhost::Error::InvalidOperation)
    }
    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegionInfo],
    ) -> vhost::Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = regions
            .iter()
            .map(|r| (r.guest_phys_addr, r.userspace_addr, r.memory_size));
        self.note(Asked::Memory(regions.collect()))?;
        Ok(None)
    }
    fn set_log_base(&self, _: u64, _: Option<VhostUserDirtyLogRegion>) -> vhost::Result<()> {
        Err(vhost::Error::InvalidOperation)
    }
    fn set_log_fd(&self, _: RawFd) -> vhost::Result<()> {
        Err(vhost::Error::InvalidOperation)
    }
    fn set_vring_num(&self, index: usize, num: u16) -> vhost::Result<()> {
        if num == self.refuses {
            return Err(vhost::Error::InvalidQueue);
        }
        self.note(Asked::Num(index, num))
    }
    fn set_vring_addr(&self, index: usize, ring: &VringConfigData) -> vhost::Result<()> {
        let (driver, device) = (ring.avail_ring_addr, ring.used_ring_addr);
        self.note(Asked::Addr(index, ring.desc_table_addr, driver, device))
    }
    fn set_vring_base(&self, index: usize, base: u16) -> vhost::Result<()> {
        self.note(Asked::Base(index, base))
    }
    fn get_vring_base(&self, _: usize) -> vhost::Result<u32> {
        Ok(0)
    }
    fn set_vring_call(&self, index: usize, fd: &EventFd) -> vhost::Result<()> {
        self.note(Asked::Call(index, fd.as_raw_fd()))
    }
    fn set_vring_kick(&self, index: usize, fd: &EventFd) -> vhost::Result<()> {
        self.note(Asked::Kick(index, fd.as_raw_fd()))
    }
    fn set_vring_err(&self, _: usize, _: &EventFd) -> vhost::Result<()> {
        Err(vhost::Error::InvalidOperation)
    }
}

impl VhostNet for Fake {
    fn set_backend(&self, index: usize, fd: Option<&File>) -> vhost::Result<()> {
        self.note(Asked::Backend(index, fd.map(AsRawFd::as_raw_fd)))
    }
}

/// Runs `f` with the operations of an event manager that nothing is to be asked of.
fn with_ops(f: impl FnOnce(&mut EventOps) + Send + 'static) {
    struct Once<F>(Option<F>);
    impl<F: FnOnce(&mut EventOps)> MutEventSubscriber for Once<F> {
        fn process(&mut self, _: event_manager::Events, _: &mut EventOps) {}
        fn init(&mut self, ops: &mut EventOps) {
            if let Some(f) = self.0.take() {
                f(ops);
            }
        }
    }
    let mut manager = EventManager::new().unwrap();
    let once: Box<dyn MutEventSubscriber> = Box::new(Once(Some(f)));
    manager.add_subscriber(once);
}

fn queue(size: u16) -> QueueSetup {
    QueueSetup {
        size,
        desc: 0x1000,
        driver: 0x2000,
        device: 0x3000,
        enabled: true,
        kick: Arc::new(event::new().unwrap()),
        call: Arc::new(event::new().unwrap()),
    }
}

fn kernel(fake: &Fake) -> (Kernel<Fake>, GuestMemoryMmap) {
    let ranges = [
        (GuestAddress(0), 0x10_0000),
        (GuestAddress(1 << 32), 0x1000),
    ];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let tap = Port::stand_in(File::open("/dev/null").unwrap().into());
    let kernel = Kernel::new(fake.clone(), tap, &memory).unwrap();
    (kernel, memory)
}

#[test]
fn the_kernel_gets_memory_then_each_ring_and_the_tap_last() {
    let fake = Fake::default();
    let (mut kernel, memory) = kernel(&fake);
    assert_eq!(fake.take(), [Asked::Owner]);
    let known = features::VERSION_1 | features::EVENT_IDX | F_MRG_RXBUF;
    assert_eq!(kernel.ring_features(), known);
    with_ops(move |ops| {
        let negotiated = known | F_CSUM | F_MAC | features::RING_RESET;
        kernel.configure(negotiated).unwrap();
        let here = |address| {
            memory
                .get_host_address(GuestAddress(address))
                .unwrap()
                .addr() as u64
        };
        let regions = vec![(0, here(0), 0x10_0000), (1 << 32, here(1 << 32), 0x1000)];
        // What is the tap's and the device's is none of the kernel's business.
        assert_eq!(
            fake.take(),
            [Asked::Features(known), Asked::Memory(regions)]
        );
        let (queue, tap) = (queue(256), kernel.tap.file().as_raw_fd());
        kernel.start(1, &queue, ops).unwrap();
        assert_eq!(
            fake.take(),
            [
                Asked::Num(1, 256),
                Asked::Base(1, 0),
                Asked::Addr(1, 0x1000, 0x2000, 0x3000),
                Asked::Call(1, queue.call.as_raw_fd()),
                Asked::Kick(1, queue.kick.as_raw_fd()),
                Asked::Backend(1, Some(tap)),
            ]
        );
    });
}

#[test]
fn only_a_queue_that_was_started_is_stopped_and_only_once() {
    let fake = Fake {
        refuses: 128,
        ..Fake::default()
    };
    let (mut kernel, _memory) = kernel(&fake);
    with_ops(move |ops| {
        kernel.start(0, &queue(64), ops).unwrap();
        assert!(kernel.start(1, &queue(128), ops).is_err());
        fake.take();
        for index in [0, 1, 0, 2, u16::MAX] {
            kernel.stop(index, ops);
        }
        assert_eq!(fake.take(), [Asked::Backend(0, None)]);
    });
}

use event_manager::{EventManager, SubscriberOps};

use super::{QUEUE_SIZE, *};
use crate::fake::{FakeHost, MEMORY_SIZE};
use crate::host::{Access, Permission};
use crate::virtio::harness::*;
use crate::virtio::{VirtioPci, status};
use crate::virtio_iommu::Mapping;

struct Rig {
    driver: Driver,
    ring: Ring,
    events: EventManager<Box<dyn MutEventSubscriber + Send>>,
}

impl Rig {
    fn new(endpoint: Option<Arc<Endpoint>>) -> Self {
        let host = FakeHost::new();
        let features = F_VERSION_1 | endpoint.as_ref().map_or(0, |_| F_ACCESS_PLATFORM);
        let device = VirtioRng::new(endpoint, host.clone()).unwrap();
        let function = VirtioPci::new(device.clone(), host.clone()).unwrap();
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.subscriber());
        let driver = Driver::new(function, host.clone());
        let ring = Ring::new(&host, 0x10_0000, QUEUE_SIZE);
        driver.enable_msix();
        assert!(driver.negotiate(features));
        driver.setup_queue(0, &ring, 1);
        driver.set_status(status::DRIVER_OK);
        let mut rig = Self {
            driver,
            ring,
            events,
        };
        rig.pump();
        rig
    }

    fn pump(&mut self) {
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device thread never comes to rest");
    }

    fn kick(&mut self) {
        self.driver.notify(0);
        self.pump();
    }

    fn needs_reset(&self) -> bool {
        self.driver.u8(STATUS) & status::NEEDS_RESET != 0
    }
}

#[test]
fn the_driver_finds_an_entropy_device_that_is_behind_an_iommu_or_not() {
    let rig = Rig::new(None);
    assert_eq!(rig.driver.config(0) >> 16, 0x1040 + 4);
    assert_eq!(rig.driver.offered() & F_ACCESS_PLATFORM, 0);
    let device = VirtioRng::new(Some(Endpoint::new().unwrap()), FakeHost::new()).unwrap();
    assert!(!device.accepts(F_VERSION_1));
    assert!(device.accepts(F_VERSION_1 | F_ACCESS_PLATFORM));
}

#[test]
fn every_buffer_is_filled_up_to_its_end_or_a_page_and_no_two_are_alike() {
    let mut rig = Rig::new(None);
    // More than one turn's worth.
    for _ in 0..40 {
        rig.ring.offer(64);
    }
    rig.kick();
    let all: Vec<_> = std::iter::from_fn(|| rig.ring.take()).collect();
    assert_eq!(all.len(), 40);
    assert!(all.iter().all(|bytes| bytes.len() == 64));
    let different: std::collections::BTreeSet<_> = all.iter().collect();
    assert_eq!(different.len(), 40);
    assert!(rig.driver.interrupts().contains(&1));
    // Bits are as often set as not: of 20480 within 8 standard deviations.
    let ones: u32 = all.iter().flatten().map(|byte| byte.count_ones()).sum();
    assert!((9668..=10812).contains(&ones), "{ones}");

    rig.ring.put(rig.ring.buffer(40) + 4096, &[0x55; 64]);
    rig.ring.offer(8192);
    rig.kick();
    assert_eq!(rig.ring.take().unwrap().len(), 4096);
    assert_eq!(rig.ring.get(rig.ring.buffer(40) + 4096, 64), [0x55; 64]);
    assert!(!rig.needs_reset());
}

#[test]
fn a_buffer_with_no_room_comes_back_empty_and_one_that_is_nowhere_needs_a_reset() {
    let mut rig = Rig::new(None);
    rig.ring.send(b"nobody reads this");
    rig.kick();
    assert_eq!(rig.ring.take().unwrap(), []);
    rig.ring.set_desc(1, MEMORY_SIZE - 8, 64, 2, 0);
    rig.ring.publish(1);
    rig.kick();
    assert_eq!(rig.ring.take(), None);
    assert!(rig.needs_reset());
    rig.driver.write(STATUS, &[0]);
    rig.pump();
    assert_eq!(rig.driver.u8(STATUS), 0);
}

#[test]
fn behind_an_iommu_only_what_is_mapped_for_writing_is_filled() {
    let endpoint = Endpoint::new().unwrap();
    let page = |iova, gpa, permission| Mapping {
        iova,
        gpa,
        len: 0x10_0000,
        permission,
    };
    endpoint.map(page(0x10_0000, 0x10_0000, Permission::READ_WRITE));
    endpoint.map(page(0x40_0000, 0x80_0000, Permission::WRITE));
    endpoint.map(page(0x50_0000, 0x90_0000, Permission::READ));
    let mut rig = Rig::new(Some(endpoint.clone()));
    rig.ring.set_desc(0, 0x40_0000, 32, 2, 0);
    rig.ring.publish(0);
    rig.kick();
    assert_ne!(rig.ring.get(0x80_0000, 32), [0; 32]);
    rig.ring.set_desc(1, 0x50_0000, 32, 2, 0);
    rig.ring.publish(1);
    rig.kick();
    assert!(rig.needs_reset());
    assert_eq!(rig.ring.get(0x90_0000, 32), [0; 32]);
    let (fault, _) = endpoint.take_fault().unwrap();
    assert_eq!((fault.iova, fault.access), (0x50_0000, Access::Write));
}

//! Sizes of packed rings, and queues that are reset by themselves (VIRTIO 1.3, sections 2.6.1 and 4.1.4.3).

use super::*;

const ALL: u64 = FEATURE | F_RING_PACKED | F_RING_RESET;

/// A live driver that has accepted `features` of a device whose queues have up to 768 and 64 entries.
fn live_with(features: u64) -> (Arc<Device>, Driver) {
    let (device, driver) = rig_with(ALL, [768, 64]);
    device.eager.store(false, Ordering::Relaxed);
    driver.enable_msix();
    assert!(driver.negotiate(F_VERSION_1 | features));
    for queue in 0..2u16 {
        driver.setup_queue(queue, &ring(&driver, queue), queue + 1);
    }
    driver.set_status(status::DRIVER_OK);
    (device, driver)
}

fn ring(driver: &Driver, queue: u16) -> Ring {
    Ring::new(&driver.host, 0x10_0000 * u64::from(queue + 1), 64)
}

impl Device {
    /// The queues whose resets were asked for.
    fn queue_resets(&self) -> Vec<u16> {
        let orders = self.orders.lock().unwrap();
        let resets = orders.iter().filter(|(_, queue)| queue.is_none());
        resets.map(|(index, _)| *index).collect()
    }

    /// The queues that were enabled by themselves.
    fn enabled(&self) -> Vec<(u16, QueueSetup)> {
        let orders = self.orders.lock().unwrap();
        let enabled = orders.iter().cloned();
        enabled.filter_map(|(i, queue)| Some((i, queue?))).collect()
    }

    /// What the device was given at DRIVER_OK.
    fn given(&self, queue: usize) -> QueueSetup {
        self.activations.lock().unwrap()[0].queues[queue].clone()
    }
}

impl Driver {
    fn reset_queue(&self, queue: u16) {
        self.select(queue);
        self.write(QUEUE_RESET, &1u16.to_le_bytes());
    }

    /// `queue_reset` and `queue_enable` of a queue.
    fn state(&self, queue: u16) -> (u16, u16) {
        self.select(queue);
        (self.u16(QUEUE_RESET), self.u16(QUEUE_ENABLE))
    }
}

// ---- sizes ----

#[test]
fn packed_rings_have_any_size_up_to_the_maximum() {
    let (_, driver) = rig_with(ALL, [768, 32768]);
    assert!(driver.negotiate(F_VERSION_1 | F_RING_PACKED));
    driver.select(0);
    assert_eq!(driver.u16(QUEUE_SIZE), 768);
    for (size, result) in [
        (767u16, 767u16),
        (0, 767),
        (769, 767),
        (32768, 767),
        (32769, 767),
        (65535, 767),
        (1, 1),
        (768, 768),
    ] {
        driver.write(QUEUE_SIZE, &size.to_le_bytes());
        assert_eq!(driver.u16(QUEUE_SIZE), result, "wrote {size}");
    }
    driver.select(1);
    for (size, result) in [(32768u16, 32768u16), (32769, 32768), (0, 32768)] {
        driver.write(QUEUE_SIZE, &size.to_le_bytes());
        assert_eq!(driver.u16(QUEUE_SIZE), result, "wrote {size}");
    }
}

#[test]
fn a_driver_of_split_rings_never_sees_or_gets_a_size_that_is_no_power_of_two() {
    for features in [0, F_RING_RESET] {
        let (device, driver) = rig_with(ALL, [768, 1]);
        driver.select(0);
        assert_eq!(driver.u16(QUEUE_SIZE), 512, "before the features");
        assert!(driver.negotiate(F_VERSION_1 | features));
        for (size, result) in [(768u16, 512u16), (513, 512), (0, 512), (256, 256)] {
            driver.write(QUEUE_SIZE, &size.to_le_bytes());
            assert_eq!(driver.u16(QUEUE_SIZE), result, "wrote {size}");
        }
        driver.write(QUEUE_SIZE, &512u16.to_le_bytes());
        driver.write(QUEUE_ENABLE, &[1, 0]);
        driver.set_status(status::DRIVER_OK);
        assert_eq!((device.given(0).size, device.given(1).size), (512, 1));
    }
}

#[test]
fn a_size_chosen_for_packed_rings_is_rounded_when_the_driver_changes_its_mind() {
    let (device, driver) = rig_with(ALL, [768, 64]);
    driver.accept(F_VERSION_1 | F_RING_PACKED);
    driver.select(0);
    driver.write(QUEUE_SIZE, &700u16.to_le_bytes());
    driver.write(QUEUE_ENABLE, &[1, 0]);
    assert!(driver.negotiate(F_VERSION_1));
    driver.set_status(status::DRIVER_OK);
    assert_eq!(driver.u16(QUEUE_SIZE), 512);
    assert_eq!(device.given(0).size, 512);
}

#[test]
fn a_device_that_asks_for_longer_rings_than_there_are_gets_the_longest() {
    let (_, driver) = rig_with(ALL, [u16::MAX, 32769]);
    assert!(driver.negotiate(F_VERSION_1 | F_RING_PACKED));
    for queue in [0, 1] {
        driver.select(queue);
        assert_eq!(driver.u16(QUEUE_SIZE), 32768);
    }
}

#[test]
fn packed_rings_that_were_not_offered_are_not_to_be_had() {
    let (_, driver) = rig_with(FEATURE, [768, 64]);
    assert!(!driver.negotiate(F_VERSION_1 | F_RING_PACKED));
    driver.select(0);
    driver.write(QUEUE_SIZE, &768u16.to_le_bytes());
    assert_eq!(driver.u16(QUEUE_SIZE), 512);
    driver.set_status(status::DRIVER_OK);
    assert_eq!(driver.u8(STATUS) & status::DRIVER_OK, 0);
}

// ---- resetting a queue ----

#[test]
fn queue_reset_reads_one_until_the_device_is_done_and_then_the_queue_is_as_after_power_on() {
    let (device, driver) = live_with(F_RING_RESET);
    assert_eq!(driver.state(0), (0, 1));
    driver.reset_queue(0);
    assert_eq!(driver.u16(QUEUE_RESET), 1);
    assert_eq!(device.queue_resets(), [0]);
    // Nothing changes while it goes on, and nothing is asked for twice.
    driver.reset_queue(0);
    let before: [u8; 40] = driver.read(24);
    for offset in [QUEUE_SIZE, QUEUE_ENABLE, 32, 40, 48, QUEUE_RESET] {
        driver.write(offset, &[0, 0]);
        driver.write(offset, &[1, 0]);
    }
    assert_eq!(driver.read::<40>(24), before);
    assert_eq!(driver.state(1), (0, 1), "the other one does not notice");

    device.transport().queue_reset_done(0);
    assert_eq!(driver.state(0), (0, 0));
    assert_eq!(device.queue_resets(), [0]);
    assert_eq!(driver.u16(QUEUE_SIZE), 512);
    assert_eq!(driver.u16(QUEUE_VECTOR), 0xffff);
    assert_eq!(driver.read::<24>(32), [0; 24]);
    assert_eq!(driver.state(1), (0, 1));
    assert_ne!(driver.u8(STATUS) & status::DRIVER_OK, 0);
    assert!(device.enabled().is_empty());
}

#[test]
fn a_queue_that_was_reset_is_set_up_anew_and_enabled_with_other_values() {
    let (device, driver) = live_with(F_RING_RESET | F_RING_PACKED);
    let old = device.given(0);
    driver.reset_queue(0);
    device.transport().queue_reset_done(0);
    let ring = Ring::new(&driver.host, 0x50_0000, 700);
    driver.setup_queue(0, &ring, 3);
    assert_eq!(driver.state(0), (0, 1));
    let [(0, new)] = &device.enabled()[..] else {
        panic!("{:?}", device.enabled());
    };
    assert_eq!(
        (new.size, new.desc, new.driver, new.device, new.enabled),
        (700, ring.desc(), ring.avail(), ring.used(), true)
    );
    driver.interrupts();
    old.call.write(1).unwrap();
    assert_eq!(driver.interrupts(), NONE);
    new.call.write(1).unwrap();
    assert_eq!(driver.interrupts(), [3]);
    assert!(!driver.notify(0));
    assert!(event::is_signalled(&new.kick) && !event::is_signalled(&old.kick));
    // The other queue keeps what it has.
    let other = device.given(1);
    other.call.write(1).unwrap();
    assert_eq!(driver.interrupts(), [2]);
    assert!(!driver.notify(1));
    assert!(event::is_signalled(&other.kick));
    // And round again.
    driver.reset_queue(0);
    assert_eq!(device.queue_resets(), [0, 0]);
}

#[test]
fn a_queue_in_its_reset_still_has_its_old_eventfds_and_afterwards_they_reach_nothing() {
    let (device, driver) = live_with(F_RING_RESET);
    let old = device.given(0);
    driver.reset_queue(0);
    assert!(!driver.notify(0));
    assert!(event::is_signalled(&old.kick));
    event::clear(&old.kick);
    device.transport().queue_reset_done(0);
    driver.interrupts();
    old.call.write(1).unwrap();
    assert_eq!(driver.interrupts(), NONE);
    assert!(!driver.notify(0));
    assert!(!event::is_signalled(&old.kick));
    assert_eq!(
        driver.host.doorbells(),
        [BAR0 + NOTIFY, BAR0 + NOTIFY + 4],
        "both are there"
    );
}

#[test]
fn queue_reset_without_the_feature_does_nothing_and_a_live_device_takes_no_more_queues() {
    let (device, driver) = live_with(F_RING_PACKED);
    driver.reset_queue(0);
    assert_eq!(driver.state(0), (0, 1));
    assert!(device.queue_resets().is_empty());
    let (device, driver) = rig_with(ALL, [768, 64]);
    assert!(driver.negotiate(F_VERSION_1));
    driver.set_status(status::DRIVER_OK);
    driver.setup_queue(0, &ring(&driver, 0), 1);
    assert_eq!(driver.state(0), (0, 0));
    assert!(device.enabled().is_empty());
}

#[test]
fn queue_reset_before_the_features_are_agreed_or_not_offered_does_nothing() {
    let (device, driver) = rig_with(ALL, [768, 64]);
    driver.accept(F_VERSION_1 | F_RING_RESET);
    driver.setup_queue(0, &ring(&driver, 0), 1);
    driver.reset_queue(0);
    assert_eq!(driver.state(0), (0, 1));
    assert!(device.queue_resets().is_empty());

    let (_, driver) = rig();
    assert!(!driver.negotiate(F_VERSION_1 | F_RING_RESET));
    driver.setup_queue(0, &ring(&driver, 0), 1);
    driver.reset_queue(0);
    assert_eq!(driver.state(0), (0, 1));
}

#[test]
fn queue_reset_of_a_queue_that_is_not_there_does_nothing() {
    let (device, driver) = live_with(F_RING_RESET);
    driver.set_vector(2, 3);
    // Special indices, and beyond all of them.
    for queue in [2, 5, 6, 1000, u16::MAX] {
        driver.reset_queue(queue);
        assert_eq!(driver.state(queue), (0, 0));
        driver.write(QUEUE_ENABLE, &[1, 0]);
        assert_eq!(driver.state(queue), (0, 0));
    }
    driver.select(2);
    assert_eq!(driver.u16(QUEUE_VECTOR), 3);
    assert!(device.orders.lock().unwrap().is_empty());
    for index in [0, 2, u16::MAX] {
        device.transport().queue_reset_done(index);
    }
    assert_eq!(driver.state(0), (0, 1), "nobody asked for it");
}

#[test]
fn values_other_than_one_do_not_reset_a_queue() {
    let (device, driver) = live_with(F_RING_RESET);
    driver.select(0);
    for value in [0u16, 2, 0x100, 0xffff] {
        driver.write(QUEUE_RESET, &value.to_le_bytes());
        assert_eq!(driver.state(0), (0, 1), "wrote {value}");
    }
    assert!(device.queue_resets().is_empty());
}

#[test]
fn a_queue_that_the_device_has_not_got_is_reset_at_once_and_can_come_late() {
    let (device, driver) = rig_with(ALL, [768, 64]);
    device.eager.store(false, Ordering::Relaxed);
    driver.enable_msix();
    assert!(driver.negotiate(F_VERSION_1 | F_RING_RESET));
    driver.setup_queue(0, &ring(&driver, 0), 1);
    driver.reset_queue(0);
    assert_eq!(driver.state(0), (0, 0), "before DRIVER_OK");
    assert_eq!(driver.u16(QUEUE_VECTOR), 0xffff);
    driver.set_status(status::DRIVER_OK);
    driver.reset_queue(1);
    assert_eq!(driver.state(1), (0, 0), "never enabled");
    assert!(device.queue_resets().is_empty());
    driver.setup_queue(1, &ring(&driver, 1), 2);
    assert_eq!(device.enabled().len(), 1);
    assert_eq!(driver.state(1), (0, 1));
}

#[test]
fn a_device_reset_ends_a_queue_reset_and_a_late_answer_means_nothing() {
    let (device, driver) = live_with(F_RING_RESET);
    driver.reset_queue(0);
    driver.write(STATUS, &[0]);
    driver.reset_queue(1);
    assert_eq!(
        device.queue_resets(),
        [0],
        "resetting: nothing is asked for"
    );
    device.transport().reset_done();
    assert_eq!(driver.u8(STATUS), 0);
    assert_eq!(driver.state(0), (0, 0));
    assert!(driver.negotiate(F_VERSION_1 | F_RING_RESET));
    driver.setup_queue(0, &ring(&driver, 0), 1);
    driver.set_status(status::DRIVER_OK);
    device.transport().queue_reset_done(0);
    assert_eq!(driver.state(0), (0, 1));
}

#[test]
fn the_registers_of_the_queue_reset_can_be_reached_in_any_width() {
    let (device, driver) = live_with(F_RING_RESET);
    driver.select(1);
    driver.write(QUEUE_RESET, &[1]);
    assert_eq!(device.queue_resets(), [1]);
    assert_eq!(driver.u32(56), 1 << 16);
    driver.select(0);
    driver.write(56, &[0xff, 0xff, 1, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(device.queue_resets(), [1, 0]);
}

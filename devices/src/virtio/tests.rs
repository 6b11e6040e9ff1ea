mod queues;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use proptest::prelude::*;

use super::harness::*;
use super::*;
use crate::fake::{Event, FakeHost};
use crate::host::{Files, Host};
use crate::pci::PciFunction;

const FEATURE: u64 = 1 << 5;
const WINDOW: u64 = 1 << 30;
/// No interrupts.
const NONE: [u32; 0] = [];

/// Two queues, four special indices, a window; resets are finished by the test or at once.
struct Device {
    features: u64,
    sizes: [u16; 2],
    window: Arc<dyn Window>,
    transport: OnceLock<Weak<dyn Transport>>,
    activations: Mutex<Vec<Activation>>,
    resets: Mutex<u32>,
    /// Single queues that are to be reset (`None`) or that were enabled.
    orders: Mutex<Vec<(u16, Option<QueueSetup>)>>,
    config_writes: Mutex<Vec<(u64, Vec<u8>)>>,
    /// Whether `reset` calls `reset_done` from inside.
    eager: AtomicBool,
}

impl Device {
    fn transport(&self) -> Arc<dyn Transport> {
        self.transport.get().unwrap().upgrade().unwrap()
    }
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u16 {
        61
    }
    fn pci_class(&self) -> u32 {
        0xff_0000
    }
    fn queue_sizes(&self) -> Vec<u16> {
        self.sizes.to_vec()
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn accepts(&self, features: u64) -> bool {
        features & F_ACCESS_PLATFORM != 0 || self.features & F_ACCESS_PLATFORM == 0
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..16).zip(data) {
            *byte = u8::try_from(at).unwrap() + 1;
        }
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        self.config_writes
            .lock()
            .unwrap()
            .push((offset, data.to_vec()));
        self.transport().config_changed();
    }
    fn bind(&self, transport: Weak<dyn Transport>) {
        assert!(self.transport.set(transport).is_ok(), "bound once");
    }
    fn activate(&self, activation: Activation) {
        self.activations.lock().unwrap().push(activation);
        self.transport().config_changed();
    }
    fn reset(&self) {
        *self.resets.lock().unwrap() += 1;
        if self.eager.load(Ordering::Relaxed) {
            self.transport().reset_done();
        }
    }
    fn reset_queue(&self, index: u16) {
        self.orders.lock().unwrap().push((index, None));
        if self.eager.load(Ordering::Relaxed) {
            self.transport().queue_reset_done(index);
        }
    }
    fn enable_queue(&self, index: u16, queue: QueueSetup) {
        self.orders.lock().unwrap().push((index, Some(queue)));
    }
    fn special_queues(&self) -> SpecialQueues {
        SpecialQueues {
            indices: 4,
            vectors: 2,
        }
    }
    fn windows(&self) -> Vec<(u64, Arc<dyn Window>)> {
        vec![(WINDOW, self.window.clone())]
    }
}

fn rig() -> (Arc<Device>, Driver) {
    rig_with(FEATURE, [256, 64])
}

fn rig_with(features: u64, sizes: [u16; 2]) -> (Arc<Device>, Driver) {
    let host = FakeHost::new();
    let device = Arc::new(Device {
        features,
        sizes,
        window: host.window(WINDOW, Files::Sealed).unwrap(),
        transport: OnceLock::new(),
        activations: Mutex::default(),
        resets: Mutex::default(),
        orders: Mutex::default(),
        config_writes: Mutex::default(),
        eager: AtomicBool::new(true),
    });
    let function = VirtioPci::new(device.clone(), host.clone()).unwrap();
    host.log.take();
    (device, Driver::new(function, host))
}

fn eventfd() -> Arc<EventFd> {
    Arc::new(event::new().unwrap())
}

fn live(driver: &Driver) {
    driver.enable_msix();
    assert!(driver.negotiate(F_VERSION_1 | FEATURE));
    for queue in 0..2u16 {
        let ring = Ring::new(&driver.host, 0x10_0000 * u64::from(queue + 1), 64);
        driver.setup_queue(queue, &ring, queue + 1);
    }
    driver.set_status(status::DRIVER_OK);
    assert!(driver.u8(STATUS) & status::DRIVER_OK != 0);
}

#[test]
fn identity_and_structures_are_where_the_capabilities_say() {
    let (_, driver) = rig();
    assert_eq!(driver.config(0), 0x107d_1af4);
    assert_eq!(driver.config(8), 0xff00_0001);
    let mut found = Vec::new();
    for cap in driver.capabilities(9) {
        let [_, _, len, kind] = driver.config(cap).to_le_bytes();
        let [bar, id, ..] = driver.config(cap + 4).to_le_bytes();
        found.push((
            kind,
            len,
            bar,
            id,
            driver.config(cap + 8),
            driver.config(cap + 12),
        ));
    }
    found.sort_unstable();
    let expected = [
        (1, 16, 0, 0, 0, 64),
        (2, 20, 0, 0, 0x4000, 0x1000),
        (3, 16, 0, 0, 0x1000, 1),
        (4, 16, 0, 0, 0x2000, 0x1000),
        (5, 20, 0, 0, 0, 0),
        (8, 24, 2, 0, 0, 1 << 30),
    ];
    assert_eq!(found, expected);
    let notify = driver
        .capabilities(9)
        .into_iter()
        .find(|&cap| driver.config(cap) >> 24 == 2)
        .unwrap();
    assert_eq!(driver.config(notify + 16), 4, "multiplier");
    let msix = driver.capabilities(0x11)[0];
    assert_eq!(driver.config(msix) >> 16, 4, "five vectors");
    assert_eq!(
        (driver.config(msix + 4), driver.config(msix + 8)),
        (0x8000, 0xc000)
    );
    assert_eq!(driver.config(0x3c) >> 8 & 0xff, 0, "no interrupt pin");
    assert_eq!(driver.u16(18), 2, "special indices are no virtqueues");
}

#[test]
fn features_are_agreed_only_if_offered_and_with_version_1() {
    for (features, agreed) in [
        (F_VERSION_1, true),
        (F_VERSION_1 | FEATURE, true),
        (FEATURE, false),
        (F_VERSION_1 | FEATURE | 1 << 7, false),
        (0, false),
    ] {
        let (device, driver) = rig();
        assert_eq!(driver.offered(), F_VERSION_1 | FEATURE);
        assert_eq!(driver.negotiate(features), agreed, "{features:#x}");
        driver.set_status(status::DRIVER_OK);
        assert_eq!(
            device.activations.lock().unwrap().len(),
            usize::from(agreed),
            "{features:#x}"
        );
    }
}

#[test]
fn a_device_that_cannot_do_without_a_feature_keeps_features_ok_clear() {
    let (device, driver) = rig_with(F_ACCESS_PLATFORM | FEATURE, [256, 64]);
    assert!(!driver.negotiate(F_VERSION_1 | FEATURE));
    driver.set_status(status::DRIVER_OK);
    assert_eq!(device.activations.lock().unwrap().len(), 0);
    // The driver may think again.
    assert!(driver.negotiate(F_VERSION_1 | F_ACCESS_PLATFORM));
    driver.set_status(status::DRIVER_OK);
    assert_eq!(device.activations.lock().unwrap().len(), 1);
}

#[test]
fn features_are_frozen_when_agreed_and_queues_when_live() {
    let (device, driver) = rig();
    live(&driver);
    driver.accept(F_VERSION_1);
    driver.write(8, &0u32.to_le_bytes());
    assert_eq!(driver.u32(12), u32::try_from(FEATURE).unwrap());
    driver.select(0);
    let before: [u8; 34] = driver.read(24);
    for offset in [24, 28, 32, 40, 48] {
        driver.write(offset, &[0x40, 0]);
    }
    assert_eq!(driver.read::<34>(24), before);
    let activation = device.activations.lock().unwrap()[0].clone();
    assert_eq!(activation.features, F_VERSION_1 | FEATURE);
    let queue = &activation.queues[1];
    assert_eq!(
        (queue.size, queue.desc, queue.driver, queue.device),
        (64, 0x20_0000, 0x20_1000, 0x20_2000)
    );
    assert!(queue.enabled);
    driver.set_status(status::DRIVER_OK);
    assert_eq!(
        device.activations.lock().unwrap().len(),
        1,
        "activated once"
    );
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_maximum() {
    let (_, driver) = rig();
    driver.select(1);
    assert_eq!(driver.u16(24), 64);
    for (size, result) in [
        (32u16, 32u16),
        (0, 32),
        (33, 32),
        (128, 32),
        (64, 64),
        (1, 1),
    ] {
        driver.write(24, &size.to_le_bytes());
        assert_eq!(driver.u16(24), result, "wrote {size}");
    }
    driver.select(2);
    driver.write(24, &[4, 0]);
    driver.write(28, &[1, 0]);
    assert_eq!(
        (driver.u16(24), driver.u16(28)),
        (0, 0),
        "a special index has no ring"
    );
    driver.select(6);
    assert_eq!(
        (driver.u16(24), driver.u16(30)),
        (0, 0),
        "there is no such index"
    );
}

#[test]
fn a_queue_that_was_not_enabled_is_activated_as_such() {
    let (device, driver) = rig();
    assert!(driver.negotiate(F_VERSION_1));
    driver.set_status(status::DRIVER_OK);
    let activations = device.activations.lock().unwrap();
    assert!(activations[0].queues.iter().all(|queue| !queue.enabled));
}

#[test]
fn status_only_gains_bits_and_reads_the_old_value_until_the_reset_is_done() {
    let (device, driver) = rig();
    device.eager.store(false, Ordering::Relaxed);
    live(&driver);
    let before = driver.u8(STATUS);
    driver.write(STATUS, &[status::ACKNOWLEDGE]);
    assert_eq!(driver.u8(STATUS), before);
    driver.write(STATUS, &[status::ACKNOWLEDGE | status::NEEDS_RESET]);
    assert_eq!(driver.u8(STATUS), before, "NEEDS_RESET is the device's");

    driver.write(STATUS, &[0]);
    driver.write(STATUS, &[0]);
    driver.set_status(status::FAILED);
    driver.write(DEVICE, &[1]);
    assert_eq!(driver.u8(STATUS), before, "resetting: nothing changes");
    assert_eq!(*device.resets.lock().unwrap(), 1);
    assert!(device.config_writes.lock().unwrap().is_empty());
    device.transport().reset_done();
    assert_eq!(driver.u8(STATUS), 0);
    driver.select(0);
    assert_eq!(
        (driver.u16(24), driver.u16(28), driver.u16(QUEUE_VECTOR)),
        (256, 0, 0xffff)
    );
    live(&driver);
    assert_eq!(device.activations.lock().unwrap().len(), 2);
}

#[test]
fn a_reset_before_anything_started_needs_no_device() {
    let (device, driver) = rig();
    device.eager.store(false, Ordering::Relaxed);
    driver.set_vector(0, 1);
    driver.write(STATUS, &[0]);
    assert_eq!(driver.u8(STATUS), 0);
    driver.select(0);
    assert_eq!(driver.u16(QUEUE_VECTOR), 0xffff);
    assert_eq!(*device.resets.lock().unwrap(), 0);
}

#[test]
fn after_a_reset_the_old_eventfds_reach_nothing() {
    let (device, driver) = rig();
    live(&driver);
    let old = device.activations.lock().unwrap()[0].queues[0].clone();
    driver.write(STATUS, &[0]);
    live(&driver);
    let new = device.activations.lock().unwrap()[1].queues[0].clone();
    driver.interrupts();
    old.call.write(1).unwrap();
    assert_eq!(driver.interrupts(), NONE);
    assert!(!driver.notify(0));
    assert!(event::is_signalled(&new.kick) && !event::is_signalled(&old.kick));
}

#[test]
fn a_vector_beyond_the_table_reads_back_as_none() {
    let (_, driver) = rig();
    assert_eq!(driver.set_vector(0, 4), 4);
    assert_eq!(driver.set_vector(0, 5), 0xffff);
    assert_eq!(
        driver.set_vector(3, 2),
        2,
        "special indices have vectors too"
    );
    assert_eq!(
        driver.set_vector(6, 2),
        0xffff,
        "an index that is not there has none"
    );
    driver.write(16, &4u16.to_le_bytes());
    assert_eq!(driver.u16(16), 4);
    driver.write(16, &5u16.to_le_bytes());
    assert_eq!(driver.u16(16), 0xffff);
}

#[test]
fn the_call_follows_the_vector_that_the_driver_moves() {
    let (device, driver) = rig();
    live(&driver);
    let call = device.activations.lock().unwrap()[0].queues[0].call.clone();
    driver.interrupts();
    call.write(1).unwrap();
    assert_eq!(driver.interrupts(), [1]);
    driver.set_vector(0, 3);
    call.write(1).unwrap();
    assert_eq!(driver.interrupts(), [3]);
    driver.set_vector(0, 0xffff);
    call.write(1).unwrap();
    assert_eq!(driver.interrupts(), NONE);
    assert_eq!(driver.host.interrupts()[3].sources(), 0);
}

#[test]
fn every_queue_has_a_doorbell_that_moves_with_bar_0_and_goes_with_memory_decoding() {
    let (device, driver) = rig();
    live(&driver);
    let at = |base: u64| vec![base + NOTIFY, base + NOTIFY + 4];
    assert_eq!(driver.host.doorbells(), at(BAR0));
    let kick = device.activations.lock().unwrap()[0].queues[1].kick.clone();
    driver.host.ring(BAR0 + NOTIFY + 4);
    assert_eq!(kick.read().unwrap(), 1);

    driver
        .function
        .config_write(0x10, &0xe000_0000u32.to_le_bytes());
    assert_eq!(driver.host.doorbells(), at(0xe000_0000));
    driver.function.config_write(0x04, &[4]);
    assert!(driver.host.doorbells().is_empty());
    driver.function.config_write(0x04, &[6]);
    assert_eq!(driver.host.doorbells(), at(0xe000_0000));
    driver.host.ring(0xe000_0000 + NOTIFY + 4);
    assert_eq!(kick.read().unwrap(), 1);
}

#[test]
fn a_notification_that_leaves_the_guest_signals_the_same_eventfd() {
    let (device, driver) = rig();
    live(&driver);
    let kick = device.activations.lock().unwrap()[0].queues[1].kick.clone();
    driver.write(NOTIFY + 4, &1u16.to_le_bytes());
    assert_eq!(kick.read().unwrap(), 1);
    driver.write(NOTIFY + 4 * 6, &6u16.to_le_bytes());
    driver.write(NOTIFY + 0xffc, &[0]);
}

#[test]
fn the_window_follows_bar_2_and_memory_decoding() {
    let (_, driver) = rig();
    let window = driver.host.windows()[0].clone();
    assert_eq!(window.placed(), Some(BAR2));
    driver.host.log.take();
    driver
        .function
        .config_write(0x18, &0x20_0000_0000u64.to_le_bytes());
    assert_eq!(window.placed(), Some(0x20_0000_0000));
    driver.function.config_write(0x04, &[4]);
    assert_eq!(window.placed(), None);
    driver.function.config_write(0x04, &[6]);
    assert_eq!(window.placed(), Some(0x20_0000_0000));
    // Sizing with decoding left on, as a careless guest does: beyond what the machine can address.
    driver.function.config_write(0x18, &[0xff; 8]);
    assert_eq!(window.placed(), None);
    // A whole address that is too high.
    driver
        .function
        .config_write(0x18, &(1u64 << 46).to_le_bytes());
    assert_eq!(window.placed(), None);
    let places = driver
        .host
        .log
        .take()
        .into_iter()
        .filter(|e| matches!(e, Event::Placed(_)));
    assert_eq!(places.count(), 4, "nothing is placed twice");
}

#[test]
fn configuration_changes_bump_the_generation_set_the_isr_and_raise_the_vector() {
    let (device, driver) = rig();
    driver.enable_msix();
    driver.write(16, &0u16.to_le_bytes());
    let generation = driver.u8(21);
    device.transport().config_changed();
    assert_eq!(driver.u8(21), generation + 1);
    assert_eq!(driver.interrupts(), [0]);
    assert_eq!(driver.u8(0x1000), 2);
    assert_eq!(driver.u8(0x1000), 0, "reading clears it");
}

#[test]
fn needs_reset_interrupts_only_a_live_driver() {
    let (device, driver) = rig();
    driver.enable_msix();
    driver.write(16, &0u16.to_le_bytes());
    device.transport().set_needs_reset();
    assert_eq!(driver.interrupts(), NONE);
    driver.write(STATUS, &[0]);
    live(&driver);
    driver.write(16, &0u16.to_le_bytes());
    driver.interrupts();
    device.transport().set_needs_reset();
    assert_eq!(driver.interrupts(), [0]);
    assert_ne!(driver.u8(STATUS) & status::NEEDS_RESET, 0);
}

#[test]
fn a_kick_waits_for_its_vector_and_follows_it() {
    let (device, driver) = rig();
    driver.enable_msix();
    let kick = eventfd();
    let transport = device.transport();
    transport.set_kick(2, Some(kick.clone())).unwrap();
    kick.write(1).unwrap();
    assert_eq!(driver.interrupts(), NONE);
    driver.set_vector(2, 3);
    assert_eq!(driver.interrupts(), [3]);

    let other = eventfd();
    transport.set_kick(2, Some(other.clone())).unwrap();
    kick.write(1).unwrap();
    assert_eq!(driver.interrupts(), NONE, "the one that was replaced");
    other.write(1).unwrap();
    assert_eq!(driver.interrupts(), [3]);
    transport.set_kick(2, None).unwrap();
    other.write(1).unwrap();
    assert_eq!(driver.interrupts(), NONE);
    assert_eq!(driver.set_vector(2, 3), 3, "the vector stays");
}

#[test]
fn doorbells_of_special_indices_come_and_go_and_never_touch_what_is_no_eventfd() {
    let (device, driver) = rig();
    let transport = device.transport();
    let call = eventfd();
    assert!(driver.notify(2), "none yet: ignored");
    transport.set_doorbell(2, Some(call.clone())).unwrap();
    assert!(!driver.notify(2));
    assert_eq!(call.read().unwrap(), 1);
    driver.write(NOTIFY + 8, &[2, 0]);
    assert_eq!(call.read().unwrap(), 1, "a write that left the guest");

    let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
    let check = file.try_clone().unwrap();
    let fake = Arc::new(event::from_owned(file.into()));
    assert!(transport.set_doorbell(2, Some(fake.clone())).is_err());
    // With memory decoding off nobody can check it.
    driver.function.config_write(0x04, &[4]);
    transport.set_doorbell(2, Some(fake)).unwrap();
    driver.write(NOTIFY + 8, &[2, 0]);
    driver.function.config_write(0x04, &[6]);
    driver.write(NOTIFY + 8, &[2, 0]);
    assert_eq!(check.metadata().unwrap().len(), 0);

    assert!(
        transport.set_doorbell(1, Some(eventfd())).is_err(),
        "a virtqueue is not special"
    );
    assert!(transport.set_doorbell(6, Some(eventfd())).is_err());
    assert!(transport.set_kick(0, None).is_err());
}

#[test]
fn a_reset_takes_special_doorbells_and_kicks() {
    let (device, driver) = rig();
    live(&driver);
    let (kick, call) = (eventfd(), eventfd());
    driver.set_vector(2, 3);
    device.transport().set_kick(2, Some(kick.clone())).unwrap();
    device
        .transport()
        .set_doorbell(2, Some(call.clone()))
        .unwrap();
    driver.write(STATUS, &[0]);
    driver.set_vector(2, 3);
    driver.interrupts();
    kick.write(1).unwrap();
    assert_eq!(driver.interrupts(), NONE);
    driver.notify(2);
    assert!(!event::is_signalled(&call));
}

#[test]
fn the_pci_cfg_capability_reaches_bar_0() {
    let (_, driver) = rig();
    let cap = driver
        .capabilities(9)
        .into_iter()
        .find(|&cap| driver.config(cap) >> 24 == 5)
        .unwrap();
    let aim = |offset: u32, length: u32| {
        driver.function.config_write(cap + 4, &[0]);
        driver.function.config_write(cap + 8, &offset.to_le_bytes());
        driver
            .function
            .config_write(cap + 12, &length.to_le_bytes());
    };
    aim(u32::try_from(DEVICE).unwrap() + 4, 4);
    assert_eq!(driver.config(cap + 16), 0x0807_0605);
    aim(20, 1);
    driver.function.config_write(cap + 16, &[3, 0, 0, 0]);
    assert_eq!(driver.u8(STATUS), 3);
    assert_eq!(driver.config(cap + 16), 3);
    aim(20, 3);
    driver.function.config_write(cap + 16, &[0x80, 0, 0, 0]);
    assert_eq!(driver.u8(STATUS), 3, "a length that there is not");
    driver.function.config_write(cap + 4, &[2]);
    aim(u32::MAX, 4);
    assert_eq!(driver.config(cap + 16), 0);
}

#[test]
fn partial_and_wide_writes_mean_their_bytes() {
    let (_, driver) = rig();
    driver.select(1);
    for (offset, byte) in (32..).zip(1..=8) {
        driver.write(offset, &[byte]);
    }
    assert_eq!(u64::from_le_bytes(driver.read(32)), 0x0807_0605_0403_0201);
    // Vector, enable and notify offset in one access.
    driver.write(26, &[3, 0, 0, 0, 9, 9]);
    assert_eq!((driver.u16(26), driver.u16(28), driver.u16(30)), (3, 0, 1));
}

#[test]
fn the_window_reads_all_ones_where_it_shows_nothing() {
    let (_, driver) = rig();
    let mut data = [0; 8];
    driver.function.bar_read(2, WINDOW - 4, &mut data);
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn too_many_queues_are_an_error_and_no_panic() {
    struct Wide;
    impl VirtioDevice for Wide {
        fn device_type(&self) -> u16 {
            1
        }
        fn pci_class(&self) -> u32 {
            0
        }
        fn queue_sizes(&self) -> Vec<u16> {
            vec![1; 1025]
        }
        fn features(&self) -> u64 {
            0
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn write_config(&self, _: u64, _: &[u8]) {}
        fn bind(&self, _: Weak<dyn Transport>) {}
        fn activate(&self, _: Activation) {}
        fn reset(&self) {}
    }
    let result = VirtioPci::new(Arc::new(Wide), FakeHost::new());
    assert!(matches!(
        result,
        Err(Error::TooManyQueues {
            indices: 1025,
            vectors: 1026
        })
    ));
}

fn offsets() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..64u64,
        0x1000..0x1010u64,
        0x2000..0x2020u64,
        0x4000..0x4020u64,
        0x8000..0x8060u64,
        0xc000..0xc010u64,
        0xfff0..0x1_0010u64,
        any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn no_sequence_of_register_accesses_panics_or_activates_twice(
        eager: bool,
        ready: bool,
        accesses in prop::collection::vec((0..5u8, offsets(), prop::collection::vec(any::<u8>(), 0..9)), 0..200),
    ) {
        let (device, driver) = rig_with(F_RING_PACKED | F_RING_RESET, [768, 64]);
        device.eager.store(eager, Ordering::Relaxed);
        if ready {
            driver.negotiate(F_VERSION_1 | F_RING_RESET);
            driver.set_status(status::DRIVER_OK);
        }
        for (kind, offset, mut data) in accesses {
            let register = u16::try_from(offset % 280).unwrap();
            match kind {
                0 => driver.function.bar_write(0, offset, &data),
                1 => driver.function.bar_read(0, offset, &mut data),
                2 => driver.function.config_write(register, &data),
                3 => driver.function.config_read(register, &mut data),
                _ => {
                    driver.function.bar_write(u8::try_from(offset % 7).unwrap(), offset, &data);
                    driver.function.bar_read(u8::try_from(offset % 7).unwrap(), offset, &mut data);
                }
            }
        }
        let activations = device.activations.lock().unwrap().len();
        let resets = usize::try_from(*device.resets.lock().unwrap()).unwrap();
        prop_assert!(activations <= resets + 1);
        // Between two of its resets a queue is enabled.
        let orders = device.orders.lock().unwrap();
        for index in 0..2 {
            let mine: Vec<_> = orders.iter().filter(|(i, _)| *i == index).map(|(_, queue)| queue.is_some()).collect();
            prop_assert!(resets > 0 || mine.windows(2).all(|pair| pair[0] != pair[1]), "{mine:?}");
            prop_assert!(orders.iter().all(|(i, _)| *i < 2));
        }
    }
}

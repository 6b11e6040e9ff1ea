//! Endpoints that reach all memory.

use super::*;
use crate::fake::MEMORY_SIZE;

/// What an endpoint reaches where nothing is translated.
fn identity() -> Option<Mapping> {
    Some(mapping(0, 0, MEMORY_SIZE, Permission::READ_WRITE))
}

#[test]
fn a_bypass_domain_is_the_identity_over_all_memory() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach_with(1, NET, 1, 0)), OK);
    assert_eq!(rig.net.lookup(0x1234), identity());
    assert_eq!(rig.net.lookup(MEMORY_SIZE), None);
    assert_eq!(rig.other.lookup(0), None);
    assert_eq!(rig.ask(&attach_with(1, OTHER, 1, 0)), OK);
    assert_eq!(rig.other.lookup(0), identity());
    assert_eq!(rig.ask(&attach(2, NET)), OK);
    assert_eq!(rig.net.lookup(0), None);
    assert_eq!(rig.ask(&detach(1, OTHER)), OK);
    assert_eq!(rig.other.lookup(0), None);
}

#[test]
fn with_the_bypass_of_the_configuration_only_what_is_attached_is_translated() {
    let config = IommuConfig {
        bypass: true,
        ..IommuConfig::default()
    };
    // Even with a driver that has never heard of it.
    let mut rig = Rig::with(config, ALL & !F_BYPASS_CONFIG);
    assert_eq!(rig.driver.u8(DEVICE + 36), 1);
    rig.driver.write(DEVICE + 36, &[0]);
    rig.pump();
    assert_eq!(rig.driver.u8(DEVICE + 36), 1);
    assert_eq!(rig.net.lookup(0), identity());
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    assert_eq!(rig.net.lookup(0), None);
    assert_eq!(rig.other.lookup(0), identity());
    assert_eq!(rig.ask(&detach(1, NET)), OK);
    assert_eq!(rig.net.lookup(0), identity());
}

#[test]
fn the_driver_turns_the_bypass_on_and_off_and_a_device_reset_leaves_it() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&attach(1, OTHER)), OK);
    rig.driver.write(DEVICE + 36, &[1]);
    rig.pump();
    assert_eq!(rig.driver.u8(DEVICE + 36), 1);
    assert_eq!(rig.net.lookup(0), identity());
    assert_eq!(rig.other.lookup(0), None);
    // No other value, and no other field.
    rig.driver.write(DEVICE + 36, &[2]);
    rig.driver.write(DEVICE, &[0xff; 8]);
    let config: [u8; 40] = rig.driver.read(DEVICE);
    assert_eq!((config[0], config[36]), (0, 1));
    rig.reset();
    assert_eq!(rig.device_status(), 0);
    assert_eq!(rig.driver.u8(DEVICE + 36), 1);
    assert_eq!(rig.other.lookup(0), identity());
    rig.start(ALL);
    rig.driver.write(DEVICE + 36, &[0]);
    rig.pump();
    assert_eq!((rig.net.lookup(0), rig.other.lookup(0)), (None, None));
}

#[test]
fn a_bypass_may_be_written_before_driver_ok() {
    let rig = Rig::idle(IommuConfig::default());
    rig.driver.write(DEVICE + 36, &[1]);
    assert_eq!(rig.driver.u8(DEVICE + 36), 0);
    assert!(rig.driver.negotiate(ALL));
    rig.driver.write(DEVICE + 36, &[1]);
    assert_eq!(rig.driver.u8(DEVICE + 36), 1);
}

#[test]
fn a_detach_behind_a_bypass_that_was_cleared_does_not_open_it_again() {
    let mut rig = Rig::new();
    rig.driver.write(DEVICE + 36, &[1]);
    rig.pump();
    assert_eq!(rig.ask(&attach(1, NET)), OK);
    rig.net.follow();
    rig.driver.write(DEVICE + 36, &[0]);
    assert_eq!(rig.ask(&detach(1, NET)), OK);
    assert_eq!(rig.net.next_change(), None);
}

#[test]
fn the_next_request_waits_until_a_cleared_bypass_has_taken_effect() {
    let mut rig = Rig::new();
    rig.driver.write(DEVICE + 36, &[1]);
    rig.pump();
    rig.net.follow();
    follow_up(&rig.net);
    rig.driver.write(DEVICE + 36, &[0]);
    let head = rig.post(&probe(OTHER), 68);
    rig.kick();
    assert!(rig.completed().is_empty());
    let gone = Change::Unmap {
        iova: 0,
        len: MEMORY_SIZE,
    };
    assert_eq!(follow_up(&rig.net), [gone]);
    rig.pump();
    assert_eq!(rig.completed(), [head]);
}

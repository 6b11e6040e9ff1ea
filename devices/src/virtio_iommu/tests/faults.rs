//! Accesses that were refused, and how the driver learns of them.

use super::*;
use crate::host::Access;

impl Rig {
    /// Offers a buffer for a report.
    fn offer(&mut self, len: u32) {
        self.faults.offer(len);
        self.driver.notify(1);
        self.pump();
    }

    /// The next report: reason, flags, endpoint, address.
    fn report(&mut self) -> Option<(u8, u32, u32, u64)> {
        let (head, len) = self.used(1)?;
        assert_eq!(len, 24);
        let bytes = self.faults.get(self.faults.buffer(head), 24);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((&bytes[1..4], word(12)), (&[0; 3][..], 0));
        let address = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
        Some((bytes[0], word(4), word(8), address))
    }
}

#[test]
fn a_report_has_the_reason_the_direction_the_endpoint_and_the_address() {
    let mut rig = Rig::new();
    for _ in 0..4 {
        rig.offer(64);
    }
    rig.net.report(0x1234, Access::Read);
    rig.pump();
    assert_eq!(rig.report(), Some((1, 0x101, NET, 0x1234)));
    assert_eq!(rig.driver.interrupts(), [2]);
    assert_eq!(rig.ask(&attach(1, OTHER)), OK);
    assert_eq!(rig.ask(&map(1, 0x1000, 0x1fff, 0, READ)), OK);
    rig.other.report(u64::MAX, Access::Read);
    rig.other.report(0x1800, Access::Write);
    rig.pump();
    assert_eq!(rig.report(), Some((2, 0x101, OTHER, u64::MAX)));
    assert_eq!(rig.report(), Some((2, 0x102, OTHER, 0x1800)));
    assert_eq!(rig.report(), None);
    assert_eq!(rig.device.stats().faults_reported, 3);
}

#[test]
fn a_fault_waits_for_a_buffer_that_it_fits_in() {
    let mut rig = Rig::new();
    rig.net.report(1, Access::Read);
    rig.net.report(2, Access::Read);
    rig.pump();
    assert_eq!(rig.used(1), None);
    // One that is too small goes back empty.
    rig.offer(23);
    assert_eq!(rig.used(1), Some((0, 0)));
    assert_eq!(rig.device.stats().malformed, 1);
    rig.offer(24);
    assert_eq!(rig.report(), Some((1, 0x101, NET, 1)));
    rig.offer(24);
    assert_eq!(rig.report(), Some((1, 0x101, NET, 2)));
    rig.offer(24);
    assert_eq!(rig.report(), None);
    let stats = rig.device.stats();
    assert_eq!((stats.faults_reported, stats.faults_lost), (2, 0));
}

#[test]
fn a_flood_of_one_device_does_not_silence_the_other_and_what_is_lost_is_counted() {
    let mut rig = Rig::new();
    for n in 0..200 {
        rig.net.report(n, Access::Write);
    }
    rig.other.report(7, Access::Read);
    for _ in 0..100 {
        rig.offer(24);
    }
    let reports: Vec<_> = std::iter::from_fn(|| rig.report()).collect();
    assert!(reports[..2].contains(&(1, 0x101, OTHER, 7)));
    let stats = rig.device.stats();
    assert_eq!(reports.len() as u64, stats.faults_reported);
    assert_eq!(stats.faults_reported + stats.faults_lost, 201);
    assert!(stats.faults_lost >= 100);
}

#[test]
fn faults_of_the_last_driver_are_not_told_to_the_next() {
    let mut rig = Rig::new();
    for n in 0..70 {
        rig.net.report(n, Access::Read);
    }
    rig.pump();
    rig.reset();
    assert_eq!(rig.device.stats().faults_lost, 70);
    rig.start(ALL);
    rig.offer(24);
    assert_eq!(rig.report(), None);
    rig.net.report(99, Access::Read);
    rig.pump();
    assert_eq!(rig.report(), Some((1, 0x101, NET, 99)));
}

use devices::host::{Host, Window};

use super::*;
use crate::testing::{Monitor, memfd, region};

const BAR: u64 = 0xC000_0000;
const SIZE: u64 = 1 << 20;

fn window(monitor: &Monitor) -> Arc<dyn Window> {
    monitor.machine.window(SIZE).unwrap()
}

#[test]
fn the_guest_reads_and_writes_the_shared_file_at_bar_plus_offset() {
    let mut monitor = Monitor::new();
    let file = memfd(&[0x11, 0x22, 0x33], true);
    let window = window(&monitor);
    window.map(0x4000, &region(&file, 0x1000, 0x2000)).unwrap();
    window.place(Some(BAR)).unwrap();
    assert_eq!(monitor.peek(BAR + 0x4000), 0x22);
    assert_eq!(monitor.peek(BAR + 0x5FFC), 0x33);
    monitor.poke(BAR + 0x5000, 0x99);
    let mut seen = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut seen, 0x2000).unwrap();
    assert_eq!(u32::from_le_bytes(seen), 0x99);
    assert!(monitor.missed.is_empty());
}

#[test]
fn a_hole_leaves_the_guest_as_mmio() {
    let mut monitor = Monitor::new();
    let file = memfd(&[0x11], true);
    let window = window(&monitor);
    window.place(Some(BAR)).unwrap();
    window.map(0x4000, &region(&file, 0, 0x1000)).unwrap();
    assert_eq!(monitor.peek(BAR + 0x3FFC), u32::MAX);
    monitor.poke(BAR + 0x5000, 1);
    assert_eq!(monitor.missed, [BAR + 0x3FFC, BAR + 0x5000]);
}

#[test]
fn what_is_unmapped_cannot_be_reached_any_more() {
    let mut monitor = Monitor::new();
    let file = memfd(&[0x11, 0x22], true);
    let window = window(&monitor);
    window.place(Some(BAR)).unwrap();
    window.map(0, &region(&file, 0, 0x1000)).unwrap();
    window.map(0x1000, &region(&file, 0x1000, 0x1000)).unwrap();
    assert_eq!(
        (monitor.peek(BAR), monitor.peek(BAR + 0x1000)),
        (0x11, 0x22)
    );
    window.unmap(0).unwrap();
    assert_eq!(
        (monitor.peek(BAR), monitor.peek(BAR + 0x1000)),
        (u32::MAX, 0x22)
    );
    window.clear();
    assert_eq!(monitor.peek(BAR + 0x1000), u32::MAX);
    assert!(window.unmap(0x1000).is_err());
}

#[test]
fn a_window_moves_with_its_bar() {
    let mut monitor = Monitor::new();
    let file = memfd(&[0x11], true);
    let window = window(&monitor);
    window.map(0x2000, &region(&file, 0, 0x1000)).unwrap();
    assert_eq!(monitor.peek(BAR + 0x2000), u32::MAX);
    window.place(Some(BAR)).unwrap();
    assert_eq!(monitor.peek(BAR + 0x2000), 0x11);
    window.place(Some(BAR + SIZE)).unwrap();
    assert_eq!(
        (
            monitor.peek(BAR + 0x2000),
            monitor.peek(BAR + SIZE + 0x2000)
        ),
        (u32::MAX, 0x11)
    );
    window.place(None).unwrap();
    assert_eq!(monitor.peek(BAR + SIZE + 0x2000), u32::MAX);
}

#[test]
fn a_bar_on_top_of_ram_shows_nothing_and_is_an_error() {
    let mut monitor = Monitor::new();
    let file = memfd(&[0x11], true);
    let window = window(&monitor);
    window.map(0, &region(&file, 0, 0x1000)).unwrap();
    assert!(window.place(Some(0x10_0000)).is_err());
    window.place(Some(BAR)).unwrap();
    assert_eq!(monitor.peek(BAR), 0x11);
}

#[test]
fn dropping_a_window_gives_its_slots_back() {
    let mut monitor = Monitor::new();
    let file = memfd(&[0x11; 64], true);
    for _ in 0..3 {
        let window = window(&monitor);
        window.place(Some(BAR)).unwrap();
        // All that are left beside the RAM's.
        for page in 0..u64::from(crate::slots::LIMIT) - 1 {
            window
                .map(page * 0x1000, &region(&file, page * 0x1000, 0x1000))
                .unwrap();
        }
        let error = window.map(0x8_0000, &region(&file, 0, 0x1000)).unwrap_err();
        assert!(error.to_string().contains("memory slots"), "{error}");
        assert_eq!(monitor.peek(BAR + 0x5000), 0x11);
        drop(window);
        assert_eq!(monitor.peek(BAR + 0x5000), u32::MAX);
    }
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let monitor = Monitor::new();
    let file = memfd(&[1, 2, 3, 4], true);
    let window = window(&monitor);
    let refused = |offset, file_offset, len, why: &str| {
        let error = window
            .map(offset, &region(&file, file_offset, len))
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(0x10, 0, 0x1000, "page size");
    refused(0, 0x10, 0x1000, "page size");
    refused(0, 0, 0x10, "page size");
    refused(0, 0, 0, "page size");
    refused(SIZE, 0, 0x1000, "beyond the window");
    refused(SIZE - 0x1000, 0, 0x2000, "beyond the window");
    refused(u64::MAX - 0xFFF, 0, 0x1000, "beyond the window");
    refused(0, 0x3000, 0x2000, "ends at 0x4000");
    refused(0, u64::MAX - 0xFFF, 0x1000, "overflows");
    window.map(0x2000, &region(&file, 0, 0x2000)).unwrap();
    refused(0x2000, 0, 0x1000, "overlaps");
    refused(0x3000, 0, 0x1000, "overlaps");
    refused(0x1000, 0, 0x2000, "overlaps");
    refused(0x1000, 0, 0x4000, "overlaps");
    window.map(0x1000, &region(&file, 0, 0x1000)).unwrap();
    window.map(0x4000, &region(&file, 0, 0x1000)).unwrap();
    assert!(window.unmap(0x3000).is_err());
    assert!(window.place(Some(0xC000_0800)).is_err());
    assert!(window.place(Some(!0xFFF)).is_err());
    assert!(monitor.machine.window(0x3000).is_err());
}

#[test]
fn memory_that_its_owner_could_take_away_is_refused() {
    let monitor = Monitor::new();
    let window = window(&monitor);
    let refused = |file: &Arc<File>, why: &str| {
        let error = window
            .map(0, &region(file, 0, 0x1000))
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(&memfd(&[1], false), "F_SEAL_SHRINK");
    refused(
        &Arc::new(File::open("/dev/zero").unwrap()),
        "character device",
    );
    refused(
        &Arc::new(File::open("/proc/self/exe").unwrap()),
        "F_SEAL_SHRINK",
    );
    let sealed = memfd(&[1], true);
    let read_only = File::open(format!("/proc/self/fd/{}", sealed.as_raw_fd())).unwrap();
    refused(&Arc::new(read_only), "reading and writing");
}

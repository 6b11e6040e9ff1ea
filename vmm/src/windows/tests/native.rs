//! Accesses of a guest's user mode, which touches the host's memory natively.
#![allow(unsafe_code)] // signals to a vCPU's thread

use std::os::unix::fs::FileExt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::testing::{Bar, Op, User};

const RW: Permission = Permission::READ_WRITE;
const NONE: Permission = Permission {
    read: false,
    write: false,
};
/// Pages of [`layout`]'s file and window: all permissions, holes between some.
const READ_WRITE: u64 = BAR + 0x1_0000;
const READ: u64 = READ_WRITE + PAGE;
const WRITE: u64 = READ_WRITE + 2 * PAGE;
const NEITHER: u64 = READ_WRITE + 3 * PAGE;
const HOLE: u64 = READ_WRITE + 4 * PAGE;
const LAST: u64 = READ_WRITE + 5 * PAGE;

pub(super) fn word(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_le_bytes(bytes)
}

fn bytes(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// A guest with one page of each permission and a hole; the file's page n holds n + 1 in every word of 32 bits.
fn layout() -> (User, Arc<File>) {
    let user = User::new(BAR, SIZE);
    let file = memfd(&[1, 2, 3, 4, 5, 6], true);
    let all = [
        (READ_WRITE, RW),
        (READ, Permission::READ),
        (WRITE, Permission::WRITE),
        (NEITHER, NONE),
        (LAST, RW),
    ];
    for (gpa, permission) in all {
        let at = gpa - READ_WRITE;
        user.bar
            .window
            .map(gpa - BAR, &region(&file, at, PAGE), permission)
            .unwrap();
    }
    (user, file)
}

const LOADS: [(Op, usize); 4] = [
    (Op::Load8, 1),
    (Op::Load16, 2),
    (Op::Load32, 4),
    (Op::Load64, 8),
];
const STORES: [(Op, usize); 4] = [
    (Op::Store8, 1),
    (Op::Store16, 2),
    (Op::Store32, 4),
    (Op::Store64, 8),
];

fn ones(bytes: usize) -> u64 {
    u64::MAX >> (64 - 8 * bytes)
}

#[test]
fn each_page_lets_through_what_its_permission_says_at_every_width() {
    let (mut user, file) = layout();
    for (gpa, number, readable) in [
        (READ_WRITE, 1, true),
        (READ, 2, true),
        (WRITE, 3, false),
        (NEITHER, 4, false),
        (HOLE, 5, false),
        (LAST, 6, true),
    ] {
        for (op, width) in LOADS {
            let expected = if readable {
                (number << 32 | number) & ones(width)
            } else {
                ones(width)
            };
            for at in [gpa, gpa + 0x800, gpa + PAGE - 8] {
                assert_eq!(user.call(op, at, 0), Ok(expected), "{op:?} at {at:#x}");
                let missed = user.missed();
                if readable {
                    assert!(missed.is_empty(), "{missed:x?}");
                } else {
                    assert_eq!(missed, [(at, width, false)]);
                }
            }
        }
    }
    for (gpa, writable) in [
        (READ_WRITE, true),
        (READ, false),
        (WRITE, true),
        (NEITHER, false),
        (HOLE, false),
        (LAST, true),
    ] {
        for (op, width) in STORES {
            for at in [gpa, gpa + 0x801, gpa + PAGE - 8] {
                let before = word(&file, at - READ_WRITE);
                let value = 0x8877_6655_4433_2211;
                assert!(user.call(op, at, value).is_ok(), "{op:?} at {at:#x}");
                let missed = user.missed();
                let now = word(&file, at - READ_WRITE);
                if writable {
                    assert!(missed.is_empty(), "{missed:x?}");
                    assert_eq!(now, before & !ones(width) | value & ones(width));
                } else {
                    assert_eq!(missed, [(at, width, true)]);
                    assert_eq!(now, before);
                }
            }
        }
    }
}

#[test]
fn an_access_across_two_pages_goes_by_the_rule_of_each() {
    let (mut user, file) = layout();
    // From a readable page into one that is not, and from a hole into a page.
    assert_eq!(
        user.call(Op::Load64, WRITE - 4, 0),
        Ok(0xFFFF_FFFF_0000_0002)
    );
    assert_eq!(
        user.call(Op::Load64, LAST - 4, 0),
        Ok(0x0000_0006_FFFF_FFFF)
    );
    assert_eq!(
        user.call(Op::Load64, READ - 4, 0),
        Ok(0x0000_0002_0000_0001)
    );
    user.missed();
    let value = 0x8877_6655_4433_2211;
    user.call(Op::Store64, READ - 4, value).unwrap();
    assert_eq!(word(&file, PAGE - 4), 0x0000_0002_4433_2211);
    user.call(Op::Store64, WRITE - 4, value).unwrap();
    assert_eq!(word(&file, 2 * PAGE - 4), 0x8877_6655_0000_0002);
    user.call(Op::Store64, NEITHER - 4, value).unwrap();
    assert_eq!(word(&file, 3 * PAGE - 4), 0x0000_0004_4433_2211);
    assert_eq!(user.missed().len(), 3);
}

#[test]
fn the_edges_of_a_bar_are_the_edges_of_what_is_reached() {
    let mut user = User::new(BAR, SIZE);
    let file = memfd(&[1, 2], true);
    let window = Arc::clone(&user.bar.window);
    window.map(0, &region(&file, 0, PAGE), RW).unwrap();
    window
        .map(SIZE - PAGE, &region(&file, PAGE, PAGE), RW)
        .unwrap();
    assert_eq!(user.call(Op::Load64, BAR - 4, 0), Ok(0x0000_0001_FFFF_FFFF));
    assert_eq!(
        user.call(Op::Load64, BAR + SIZE - 4, 0),
        Ok(0xFFFF_FFFF_0000_0002)
    );
    assert_eq!(user.call(Op::Load64, BAR + SIZE, 0), Ok(u64::MAX));
    user.set_buffer(&[0; 64]);
    user.call(Op::LoadYmm, BAR + SIZE - 16, 0).unwrap();
    let seen = user.buffer();
    assert_eq!(seen[..16], [2, 0, 0, 0].repeat(4));
    assert_eq!(seen[16..32], [0xFF; 16]);
}

#[test]
fn vector_registers_read_and_write_by_the_rule_of_each_page() {
    let (mut user, file) = layout();
    let mut widths = vec![(Op::LoadYmm, Op::StoreYmm, 32)];
    if user.avx512 {
        widths.push((Op::LoadZmm, Op::StoreZmm, 64));
    }
    for (load, store, width) in widths {
        for (page, number) in (0..).step_by(4096).zip(1u32..=6) {
            let words = number.to_le_bytes().repeat(1024);
            file.write_all_at(&words, page).unwrap();
        }
        let half = width / 2;
        for (at, first, second) in [
            (READ_WRITE, Some(1u8), Some(1)),
            (READ, Some(2), Some(2)),
            (WRITE, None, None),
            (NEITHER, None, None),
            (HOLE + 64, None, None),
            (READ - half, Some(1), Some(2)),
            (WRITE - half, Some(2), None),
            (HOLE - half, None, None),
            (LAST - half, None, Some(6)),
        ] {
            user.set_buffer(&[0x55; 64]);
            assert!(user.call(load, at, 0).is_ok());
            let seen = user.buffer();
            let half = usize::try_from(half).unwrap();
            let expect = |number: Option<u8>| match number {
                Some(number) => [number, 0, 0, 0].repeat(half / 4),
                None => vec![0xFF; half],
            };
            assert_eq!(seen[..half], expect(first), "{load:?} at {at:#x}");
            assert_eq!(seen[half..2 * half], expect(second), "{load:?} at {at:#x}");
            let refused = usize::from(first.is_none()) + usize::from(second.is_none());
            let missed = user.missed();
            match (at % PAGE, refused) {
                (_, 0) => assert!(missed.is_empty()),
                (0 | 64, _) => assert_eq!(missed, [(at, 2 * half, false)]),
                (_, n) => assert_eq!(missed.len(), n),
            }
        }
        let mut value = [0; 64];
        for (at, byte) in value.iter_mut().enumerate() {
            *byte = u8::try_from(at).unwrap() + 0x80;
        }
        user.set_buffer(&value);
        let width = usize::try_from(width).unwrap();
        for (at, first, second) in [
            (READ_WRITE + 0x100, true, true),
            (READ + 0x100, false, false),
            (WRITE + 0x101, true, true),
            (NEITHER + 0x100, false, false),
            (HOLE + 0x100, false, false),
            (READ - half, true, false),
            (WRITE - half, false, true),
            (NEITHER - half, true, false),
            (LAST - half, false, true),
        ] {
            let offset = at - READ_WRITE;
            let before = bytes(&file, offset, width);
            assert!(user.call(store, at, 0).is_ok());
            let now = bytes(&file, offset, width);
            let half = usize::try_from(half).unwrap();
            let expect = |written: bool, range: std::ops::Range<usize>| {
                if written {
                    value[range].to_vec()
                } else {
                    before[range].to_vec()
                }
            };
            assert_eq!(now[..half], expect(first, 0..half), "{store:?} at {at:#x}");
            assert_eq!(
                now[half..],
                expect(second, half..width),
                "{store:?} at {at:#x}"
            );
            assert_eq!(user.missed().is_empty(), first && second);
        }
    }
}

#[test]
fn masked_moves_touch_the_bytes_of_their_mask() {
    let (mut user, file) = layout();
    if !user.avx512 {
        return;
    }
    user.set_buffer(&[0x77; 64]);
    user.call(Op::StoreMasked, WRITE, 0xF0).unwrap();
    assert_eq!(
        bytes(&file, 2 * PAGE, 12),
        [3, 0, 0, 0, 0x77, 0x77, 0x77, 0x77, 3, 0, 0, 0]
    );
    user.call(Op::StoreMasked, HOLE, 0xF0).unwrap();
    assert_eq!(user.missed(), [(HOLE + 4, 4, true)]);
    user.call(Op::LoadMasked, HOLE, 0x3).unwrap();
    assert_eq!(user.missed(), [(HOLE, 2, false)]);
    assert_eq!(user.buffer()[..4], [0xFF, 0xFF, 0x77, 0x77]);
}

#[test]
fn instructions_that_nobody_emulates_read_ones_and_write_nothing() {
    let (mut user, file) = layout();
    for (at, expected) in [
        (READ_WRITE, 0x54),
        (HOLE, 0xAA),
        (WRITE, 0xAA),
        (READ, 0x57),
    ] {
        user.set_buffer(&[0x55; 64]);
        assert!(user.call(Op::Xor, at, 0).is_ok(), "{at:#x}");
        assert_eq!(user.buffer()[0], expected);
        let missed = user.missed();
        assert_eq!(missed.is_empty(), expected != 0xAA, "{missed:x?}");
    }
    // It sees each page by its own rule.
    user.set_buffer(&[0x55; 64]);
    user.call(Op::Xor, LAST - 16, 0).unwrap();
    assert_eq!(user.buffer()[15..18], [0xAA, 0x53, 0x55]);
    user.missed();
    // The page of ones was there for that one instruction.
    assert_eq!(user.call(Op::Load8, HOLE, 0), Ok(0xFF));
    assert_eq!(user.missed().len(), 1);

    user.set_buffer(&[0x66; 64]);
    user.call(Op::StoreHigh, READ_WRITE, 0).unwrap();
    assert_eq!(word(&file, 0), 0x6666_6666_6666_6666);
    for at in [READ, NEITHER, HOLE] {
        let before = word(&file, at - READ_WRITE);
        assert!(user.call(Op::StoreHigh, at, 0).is_ok());
        assert_eq!(user.missed(), [(at, 8, true)]);
        assert_eq!(word(&file, at - READ_WRITE), before);
    }
    // What may be written, but only by the software path, is not lost in silence.
    assert_eq!(user.call(Op::StoreHigh, WRITE, 0), Err(6));
    assert_eq!(user.call(Op::Undefined, 0, 0), Err(6));
}

#[test]
fn an_exchange_and_a_string_go_by_the_rule_of_each_page() {
    let (mut user, file) = layout();
    assert_eq!(user.call(Op::Exchange, READ_WRITE, 4), Ok(1));
    assert_eq!(word(&file, 0), 0x1_0000_0005);
    assert_eq!(user.call(Op::Exchange, HOLE, 4), Ok(0xFFFF_FFFF));
    assert_eq!(user.call(Op::Exchange, READ, 4), Ok(2));
    assert_eq!(word(&file, PAGE), 0x2_0000_0002);
    assert_eq!(user.call(Op::Exchange, WRITE, 4), Ok(0xFFFF_FFFF));
    assert_eq!(word(&file, 2 * PAGE), 0x3_0000_0003);
    user.set_buffer(&[0; 64]);
    user.call(Op::CopyString, WRITE - 8, 16).unwrap();
    assert_eq!(user.buffer()[..8], [2, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(user.buffer()[8..16], [0xFF; 8]);
}

#[test]
fn a_device_that_answers_a_miss_with_a_mapping_lets_the_access_through() {
    let mut user = User::new(BAR, SIZE);
    let file = memfd(&[7, 7, 7, 7, 7, 7, 7, 7, 7], true);
    // A neighbour, so that there is a slot.
    user.bar.window.map(0, &region(&file, 0, PAGE), RW).unwrap();
    let mut ops = vec![
        Op::Load32,
        Op::Store32,
        Op::LoadYmm,
        Op::StoreYmm,
        Op::Xor,
        Op::StoreHigh,
    ];
    if user.avx512 {
        ops.extend([Op::LoadZmm, Op::StoreZmm]);
    }
    for (page, op) in (1u64..).zip(ops) {
        let (bar, answer) = (Arc::clone(&user.bar), region(&file, page * PAGE, PAGE));
        *user.bar.on_miss.lock().unwrap() = Some(Box::new(move || {
            let _ = bar.window.map(page * PAGE, &answer, RW);
        }));
        user.set_buffer(&[0x44; 64]);
        let result = user.call(op, BAR + page * PAGE, 0x4444_4444);
        let (seen, now) = (user.buffer(), word(&file, page * PAGE));
        match op {
            Op::Load32 => assert_eq!(result, Ok(7)),
            Op::LoadYmm | Op::LoadZmm => assert_eq!(seen[..4], [7, 0, 0, 0]),
            Op::Xor => assert_eq!(seen[..4], [0x43, 0x44, 0x44, 0x44]),
            Op::Store32 => assert_eq!(now, 0x7_4444_4444),
            _ => assert_eq!(now, 0x4444_4444_4444_4444),
        }
        assert_eq!(user.missed().len(), 1, "{op:?}");
        *user.bar.on_miss.lock().unwrap() = None;
    }
}

#[test]
fn a_part_of_a_mapping_is_taken_away_and_a_permission_changes() {
    let mut user = User::new(BAR, SIZE);
    let file = memfd(&[1, 2, 3, 4], true);
    let window = Arc::clone(&user.bar.window);
    window.map(0, &region(&file, 0, 4 * PAGE), RW).unwrap();
    let read = |user: &mut User| {
        [0, 1, 2, 3].map(|page| user.call(Op::Load32, BAR + page * PAGE, 0).unwrap())
    };
    assert_eq!(read(&mut user), [1, 2, 3, 4]);
    window.unmap(PAGE, 2 * PAGE).unwrap();
    let no = 0xFFFF_FFFF;
    assert_eq!(read(&mut user), [1, no, no, 4]);
    window
        .map(2 * PAGE, &region(&file, 0, PAGE), Permission::READ)
        .unwrap();
    assert_eq!(read(&mut user), [1, no, 1, 4]);
    user.missed();
    user.call(Op::Store32, BAR + 2 * PAGE, 9).unwrap();
    assert_eq!(user.missed().len(), 1);
    window.unmap(2 * PAGE, PAGE).unwrap();
    window.map(2 * PAGE, &region(&file, 0, PAGE), RW).unwrap();
    user.call(Op::Store32, BAR + 2 * PAGE, 9).unwrap();
    assert_eq!(read(&mut user), [9, no, 9, 4]);
    window.unmap(0, !0xFFF).unwrap();
    assert_eq!(read(&mut user), [no; 4]);
    // Another place for the BAR.
    window.map(0, &region(&file, PAGE, PAGE), RW).unwrap();
    window.place(Some(BAR + SIZE)).unwrap();
    user.bar.base.store(BAR + SIZE, Ordering::SeqCst);
    assert_eq!(user.call(Op::Load32, BAR + SIZE, 0), Ok(2));
    assert_eq!(user.call(Op::Load32, BAR, 0), Ok(no));
}

/// Two huge pages of 2 MiB in a sealed memfd, where the kernel has such; and whether the host has memory for them.
fn huge_memfd() -> Option<(Arc<File>, bool)> {
    use std::os::fd::FromRawFd;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB;
    // SAFETY: the name is a NUL-terminated constant.
    let fd = unsafe { libc::memfd_create(c"huge".as_ptr(), flags | libc::MFD_HUGE_2MB) };
    // SAFETY: where it is not negative, the descriptor is new.
    let file = (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })?;
    file.set_len(4 << 20).unwrap();
    // SAFETY: a fcntl without pointers.
    assert_eq!(0, unsafe {
        libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK)
    });
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u32 = free.ok()?.trim().parse().ok()?;
    Some((Arc::new(file), free >= 2))
}

#[test]
fn huge_pages_are_shown_whole_and_missing_ones_do_not_end_the_vm() {
    const HUGE: u64 = 2 << 20;
    let mut user = User::new(BAR, 8 << 20);
    let window = Arc::clone(&user.bar.window);
    let Some((file, there)) = huge_memfd() else {
        return;
    };
    let error = window.map(0, &region(&file, PAGE, HUGE), RW).unwrap_err();
    assert!(error.to_string().contains("no whole pages"), "{error}");
    assert!(window.map(PAGE, &region(&file, 0, HUGE), RW).is_err());
    window.map(HUGE, &region(&file, 0, 2 * HUGE), RW).unwrap();
    let expected = if there { 0 } else { 0xFFFF_FFFF };
    assert_eq!(user.call(Op::Load32, BAR + HUGE, 0), Ok(expected));
    assert_eq!(user.call(Op::Exchange, BAR + 2 * HUGE, 0), Ok(expected));
    user.call(Op::StoreYmm, BAR + HUGE, 0).unwrap();
    user.call(Op::LoadYmm, BAR + HUGE, 0).unwrap();
    assert!(there || user.call(Op::Xor, BAR + HUGE, 0) == Err(6));
    // Part of one goes: the rest is reached by the software path.
    user.missed();
    window.unmap(HUGE, PAGE).unwrap();
    assert_eq!(user.call(Op::Load32, BAR + HUGE, 0), Ok(0xFFFF_FFFF));
    assert_eq!(user.missed().len(), 1);
    let (slots, _) = user.machine.windows().find(BAR).unwrap();
    assert!(!slots.is_native(HUGE + PAGE, Access::Read) && slots.allows(HUGE + PAGE, Access::Read));
    assert_eq!(user.call(Op::Load32, BAR + HUGE + PAGE, 0), Ok(expected));
    assert_eq!(user.missed().is_empty(), there);
}

/// Mappings and resident kilobytes of this process.
fn footprint() -> (usize, u64) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let kib = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    (maps.lines().count(), kib)
}

#[test]
fn touching_ten_thousand_holes_costs_the_host_nothing_that_stays() {
    let size = 64 << 20;
    let mut user = User::new(BAR, size);
    let file = memfd(&[1], true);
    user.bar.window.map(0, &region(&file, 0, PAGE), RW).unwrap();
    user.call(Op::Touch, BAR + PAGE, 10).unwrap();
    let before = footprint();
    user.call(Op::Touch, BAR + PAGE, 10_000).unwrap();
    for page in 1..100 {
        user.call(Op::LoadYmm, BAR + page * PAGE, 0).unwrap();
        user.call(Op::StoreYmm, BAR + page * PAGE, 0).unwrap();
        user.call(Op::Xor, BAR + page * PAGE, 0).unwrap();
        user.call(Op::StoreHigh, BAR + page * PAGE, 0).unwrap();
    }
    let after = footprint();
    assert_eq!(user.missed().len(), 10 + 10_000 + 4 * 99);
    assert!(after.0 < before.0 + 64, "{before:?} {after:?}");
    assert!(after.1 < before.1 + 8 * 1024, "{before:?} {after:?}");
}

#[test]
fn eight_thousand_windows_live_at_once_and_each_shows_its_own_page() {
    let size = 64 << 20;
    let mut user = User::new(BAR, size);
    let file = memfd(&[3; 512], true);
    let window = Arc::clone(&user.bar.window);
    // Every other page, so that nothing merges.
    for number in 0..8192 {
        let at = number % 512 * PAGE;
        window
            .map(number * 2 * PAGE, &region(&file, at, PAGE), RW)
            .unwrap();
    }
    for number in (0..8192).step_by(97) {
        let at = BAR + number * 2 * PAGE;
        assert_eq!(user.call(Op::Load32, at, 0), Ok(3));
        assert!(user.missed().is_empty());
        if number % 2 == 0 {
            assert_eq!(user.call(Op::Load32, at + PAGE, 0), Ok(0xFFFF_FFFF));
            assert_eq!(user.missed().len(), 1);
        }
    }
    assert!(footprint().0 > 8192);
    window.unmap(0, size).unwrap();
    assert!(footprint().0 < 4096);
}

/// Runs a piece in a thread of its own while `work` runs here, then ends it.
pub(crate) fn meanwhile<T>(
    mut user: User,
    op: Op,
    rbx: u64,
    work: impl FnOnce(&Running) -> T,
) -> (User, T) {
    let shared = Running {
        window: Arc::clone(&user.bar.window),
        bar: Arc::clone(&user.bar),
        machine: Arc::clone(&user.machine),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let in_thread = Arc::clone(&stop);
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the handler does nothing.
    unsafe {
        libc::signal(
            libc::SIGUSR2,
            nothing as extern "C" fn(libc::c_int) as usize,
        )
    };
    let vcpu = thread::spawn(move || {
        user.run(op, rbx, 0, Some(&in_thread));
        user
    });
    let result = work(&shared);
    stop.store(true, Ordering::SeqCst);
    while !vcpu.is_finished() {
        // SAFETY: the thread has not been joined.
        unsafe { libc::pthread_kill(vcpu.as_pthread_t(), libc::SIGUSR2) };
        thread::sleep(Duration::from_millis(1));
    }
    (vcpu.join().unwrap(), result)
}

/// What can be used while the vCPU runs.
pub(crate) struct Running {
    pub(super) window: Arc<dyn Window>,
    bar: Arc<Bar>,
    machine: Arc<crate::host::Machine>,
}

impl Running {
    /// How many accesses have been refused.
    pub(super) fn missed(&self) -> usize {
        self.bar.missed.lock().unwrap().len()
    }

    /// The counter in the piece's buffer.
    pub(crate) fn progress(&self) -> u64 {
        use vm_memory::{Bytes, GuestAddress};
        let at = GuestAddress(User::BUFFER);
        self.machine.memory().load(at, Ordering::SeqCst).unwrap()
    }
}

/// Maps and unmaps a page that the guest hammers; after each unmap nothing more may arrive.
fn hammered(op: Op, rounds: u32) {
    let user = User::new(BAR, SIZE);
    let file = memfd(&[0, 0], true);
    user.bar
        .window
        .map(8 * PAGE, &region(&file, PAGE, PAGE), RW)
        .unwrap();
    let (_, arrived) = meanwhile(user, op, BAR, |shared| {
        let mut arrived = 0;
        for round in 0..rounds {
            shared.window.map(0, &region(&file, 0, PAGE), RW).unwrap();
            let deadline = Instant::now() + Duration::from_secs(30);
            let old = word(&file, 0);
            while word(&file, 0) == old {
                assert!(Instant::now() < deadline, "no access in round {round}");
                std::hint::spin_loop();
            }
            shared.window.unmap(0, PAGE).unwrap();
            let mark = 0x5EC0_0000_0000_0000 + u64::from(round);
            file.write_all_at(&mark.to_le_bytes(), 0).unwrap();
            // Where the scheduler lets the guest run only now and then, it may sleep through every hole but these.
            let met = shared.missed();
            while round % 50 == 49 && shared.missed() == met {
                assert!(
                    Instant::now() < deadline,
                    "the hole is not met in round {round}"
                );
                thread::yield_now();
            }
            for _ in 0..20 {
                arrived += u32::from(word(&file, 0) != mark);
            }
        }
        arrived
    });
    assert_eq!(arrived, 0);
}

#[test]
fn after_an_unmap_not_one_more_write_arrives_from_a_guest_that_hammers_the_page() {
    hammered(Op::Hammer, 3000);
}

#[test]
fn after_an_unmap_not_one_more_vector_arrives() {
    hammered(Op::HammerYmm, 1000);
}

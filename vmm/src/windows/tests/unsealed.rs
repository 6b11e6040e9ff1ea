//! Files that their owner cuts off while the guest uses them.

use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use super::native::{meanwhile, word};
use super::*;
use crate::testing::{Op, User};

const RW: Permission = Permission::READ_WRITE;

fn user() -> User {
    User::with_files(BAR, SIZE, Files::Unsealed)
}

/// Every instruction that there is a piece for and that touches memory at its address once.
fn touches(user: &User) -> Vec<(Op, u64)> {
    let mut ops = vec![
        (Op::Load8, 0),
        (Op::Load16, 0),
        (Op::Load32, 0),
        (Op::Load64, 0),
        (Op::Store8, 1),
        (Op::Store16, 1),
        (Op::Store32, 1),
        (Op::Store64, 1),
        (Op::LoadYmm, 0),
        (Op::StoreYmm, 0),
        (Op::Xor, 0),
        (Op::StoreHigh, 0),
        (Op::Exchange, 1),
        (Op::CopyString, 32),
    ];
    if user.avx512 {
        let more = [Op::LoadZmm, Op::StoreZmm, Op::LoadMasked, Op::StoreMasked];
        ops.extend(more.map(|op| (op, 0xFF)));
    }
    ops
}

#[test]
fn what_the_owner_cuts_off_reads_ones_and_takes_no_writes_by_any_instruction() {
    let mut user = user();
    let window = Arc::clone(&user.bar.window);
    for (op, rax) in touches(&user) {
        let file = memfd(&[0x11, 0x22, 0x33], false);
        window.map(0, &region(&file, 0, 3 * PAGE), RW).unwrap();
        for page in 0..3 {
            assert!(user.call(op, BAR + page * PAGE, rax).is_ok(), "{op:?}");
        }
        assert!(user.missed().is_empty(), "{op:?}");
        file.set_len(PAGE).unwrap();
        for page in [1, 2, 1] {
            user.set_buffer(&[0x44; 64]);
            let result = user.call(op, BAR + page * PAGE + 64, rax);
            assert!(result.is_ok(), "{op:?}: {result:?}");
            assert!(!user.missed().is_empty(), "{op:?} was not counted");
            let seen = user.buffer()[0];
            match op {
                Op::LoadYmm | Op::LoadZmm | Op::LoadMasked | Op::CopyString => {
                    assert_eq!(seen, 0xFF, "{op:?}");
                }
                Op::Xor => assert_eq!(seen, 0xBB),
                Op::Load8 => assert_eq!(result, Ok(0xFF)),
                Op::Load64 => assert_eq!(result, Ok(u64::MAX)),
                _ => {}
            }
        }
        // What is left is as it was, and what comes back comes back by another map.
        file.write_all_at(&[0x55; 8], 8).unwrap();
        assert_eq!(user.call(Op::Load8, BAR + 8, 0), Ok(0x55), "{op:?}");
        assert!(user.missed().is_empty());
        file.set_len(3 * PAGE).unwrap();
        assert_eq!(user.call(Op::Load8, BAR + PAGE, 0), Ok(0xFF), "{op:?}");
        assert_eq!(word(&file, PAGE + 64), 0, "{op:?} wrote");
        window.unmap(0, 3 * PAGE).unwrap();
        window.map(0, &region(&file, 0, 3 * PAGE), RW).unwrap();
        assert_eq!(user.call(Op::Load8, BAR + PAGE, 0), Ok(0), "{op:?}");
        window.unmap(0, 3 * PAGE).unwrap();
        user.missed();
    }
}

#[test]
fn an_access_across_the_end_of_a_file_that_was_cut_off_goes_by_the_rule_of_each_page() {
    let mut user = user();
    let file = memfd(&[0x11, 0x22], false);
    let whole = region(&file, 0, 2 * PAGE);
    user.bar.window.map(0, &whole, RW).unwrap();
    file.set_len(PAGE).unwrap();
    assert_eq!(
        user.call(Op::Load64, BAR + PAGE - 4, 0),
        Ok(0xFFFF_FFFF_0000_0011)
    );
    // A page of which a part is left is there.
    file.set_len(2 * PAGE).unwrap();
    user.bar.window.unmap(0, 2 * PAGE).unwrap();
    user.bar.window.map(0, &whole, RW).unwrap();
    file.set_len(1).unwrap();
    file.write_all_at(&[0x11; 8], 0).unwrap();
    file.set_len(1).unwrap();
    assert_eq!(user.call(Op::Load64, BAR + PAGE, 0), Ok(u64::MAX));
    assert_eq!(user.call(Op::Load64, BAR, 0), Ok(0x11));
}

#[test]
fn the_software_path_reaches_nothing_of_what_was_cut_off() {
    let monitor = Monitor::new();
    let window = monitor.machine.window(SIZE, Files::Unsealed).unwrap();
    for permission in [Permission::WRITE, RW] {
        let file = memfd(&[0x11, 0x22], false);
        window
            .map(0, &region(&file, 0, 2 * PAGE), permission)
            .unwrap();
        assert!(window.write(PAGE, &[7; 8]));
        file.set_len(PAGE).unwrap();
        assert!(!window.write(PAGE, &[8; 8]));
        let mut data = [0xFF; 8];
        assert!(!window.read(PAGE, &mut data) && data == [0xFF; 8]);
        // All or nothing.
        assert!(!window.write(PAGE - 4, &[9; 8]));
        assert!(!window.read(PAGE - 4, &mut data) && data == [0xFF; 8]);
        assert_eq!(word(&file, PAGE - 8), 0x11_0000_0011);
        assert_eq!(file.metadata().unwrap().len(), PAGE);
        assert!(window.write(PAGE - 8, &[10; 8]));
        window.clear();
    }
}

/// The owner cuts the file off while the guest is in the middle of it, and makes it whole again, many times.
fn torn(op: Op) {
    let user = user();
    let file = memfd(&[0], false);
    let (_, arrived) = meanwhile(user, op, BAR, |shared| {
        let mut arrived = 0;
        for round in 0..200 {
            let deadline = Instant::now() + Duration::from_secs(30);
            shared.window.map(0, &region(&file, 0, PAGE), RW).unwrap();
            while word(&file, 0) == 0 {
                assert!(Instant::now() < deadline, "no access in round {round}");
                std::hint::spin_loop();
            }
            let met = shared.missed();
            file.set_len(0).unwrap();
            while shared.missed() == met {
                assert!(Instant::now() < deadline, "it is not met in round {round}");
                thread::yield_now();
            }
            file.set_len(PAGE).unwrap();
            for _ in 0..20 {
                arrived += u32::from(word(&file, 0) != 0);
            }
            shared.window.unmap(0, PAGE).unwrap();
        }
        arrived
    });
    assert_eq!(arrived, 0);
}

#[test]
fn a_guest_that_hammers_a_page_goes_on_though_its_owner_cuts_it_off() {
    torn(Op::Hammer);
}

#[test]
fn a_guest_that_hammers_a_page_with_vectors_goes_on_though_its_owner_cuts_it_off() {
    torn(Op::HammerYmm);
}

#[test]
fn a_file_that_is_cut_off_and_made_whole_all_the_time_ends_no_guest() {
    let mut user = user();
    let file = memfd(&[0], false);
    let (stop, owner) = (Arc::new(AtomicBool::new(false)), Arc::clone(&file));
    let stopped = Arc::clone(&stop);
    let thread = thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            owner.set_len(0).unwrap();
            owner.set_len(PAGE).unwrap();
        }
    });
    let window = Arc::clone(&user.bar.window);
    let mut ends = Vec::new();
    for (op, rax) in touches(&user).into_iter().cycle().take(1000) {
        // The file is too short for it now and then.
        while window.map(0, &region(&file, 0, PAGE), RW).is_err() {}
        ends.push(user.call(op, BAR, rax).is_ok());
        window.unmap(0, PAGE).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    assert!(ends.iter().all(|ok| *ok));
}

#[test]
fn memory_is_all_that_is_shown_and_no_more_than_there_is() {
    let monitor = Monitor::new();
    let window = monitor.machine.window(SIZE, Files::Unsealed).unwrap();
    let refused = |file: Arc<File>, len, why: &str| {
        let error = window.map(0, &region(&file, 0, len), RW).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    };
    let open = |path: &str| Arc::new(File::open(path).unwrap());
    refused(open("/dev/zero"), PAGE, "character device");
    refused(open("/proc/self/maps"), PAGE, "memfd or a file of tmpfs");
    refused(memfd(&[1], false), 2 * PAGE, "ends at 0x1000");
    // What was good before is looked at again.
    let file = memfd(&[1, 2], false);
    window.map(0, &region(&file, PAGE, PAGE), RW).unwrap();
    window.clear();
    file.set_len(PAGE).unwrap();
    refused(Arc::clone(&file), 2 * PAGE, "ends at 0x1000");
    window
        .map(0, &region(&memfd(&[1], true), 0, PAGE), RW)
        .unwrap();
}

//! A process that may have no more mappings (vm.max_map_count): `mmap` under a window fails with ENOMEM. Each test fills a process of its own.
#![allow(unsafe_code)] // fork, and mappings that nothing refers to

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use super::*;

/// Runs a test in a copy of this process, in which it is the only thread.
fn in_a_copy(test: impl FnOnce()) {
    // SAFETY: glibc's allocator works in a copied process, and the test takes no lock of another thread's.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // What other tests wait to see closed is not to stay open here.
        // SAFETY: nothing in this process uses a descriptor that it had before, but for standard error; a guest that never comes back is to end, too.
        unsafe {
            libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
            libc::alarm(60);
        }
        let passed = catch_unwind(AssertUnwindSafe(test)).is_ok();
        // SAFETY: it ends the process, and runs nothing of the parent's.
        unsafe { libc::_exit(if passed { 7 } else { 8 }) };
    }
    let mut status = 0;
    // SAFETY: `status` can be written; the child is ours.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFEXITED(status), "{status:#x}");
    assert_eq!(libc::WEXITSTATUS(status), 7);
}

/// All the mappings that this process may still have.
struct Crowd {
    start: *mut libc::c_void,
    len: usize,
}

impl Crowd {
    fn new() -> Self {
        let len = 80_000 * usize::try_from(PAGE).unwrap();
        // SAFETY: a new reservation, which nothing refers to.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        let page = usize::try_from(PAGE).unwrap();
        // Every other page differs from its neighbours: each makes two mappings more of one.
        let full = (1..len / page).step_by(2).any(|n| {
            let page_of = start.wrapping_byte_add(n * page);
            // SAFETY: a page of the reservation.
            unsafe { libc::mprotect(page_of, page, libc::PROT_READ) != 0 }
        });
        assert!(full, "vm.max_map_count is more than this test fills");
        Self { start, len }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // SAFETY: the reservation is this one's, and nothing refers to it.
        assert_eq!(unsafe { libc::munmap(self.start, self.len) }, 0);
    }
}

#[test]
fn a_mapping_that_finds_no_room_is_refused_and_the_others_stay() {
    in_a_copy(|| {
        let mut monitor = Monitor::new();
        let file = memfd(&[0x11, 0x22], true);
        let window = window(&monitor);
        window.place(Some(BAR)).unwrap();
        window
            .map(0, &region(&file, 0, PAGE), Permission::READ_WRITE)
            .unwrap();
        assert_eq!(monitor.peek(BAR), 0x11);
        let more = region(&file, PAGE, PAGE);
        let crowd = Crowd::new();
        let error = window
            .map(0x4000, &more, Permission::READ_WRITE)
            .unwrap_err();
        assert!(error.to_string().contains("vm.max_map_count"), "{error}");
        assert_eq!(monitor.peek(BAR + 0x4000), u32::MAX);
        // Through the VMM, now that the kernel may have taken down what lies around it.
        let mut seen = [0; 4];
        assert!(window.read(0, &mut seen));
        assert_eq!(u32::from_le_bytes(seen), 0x11);
        drop(crowd);
        window.clear();
        window.map(0x4000, &more, Permission::READ_WRITE).unwrap();
        assert_eq!(monitor.peek(BAR + 0x4000), 0x22);
        assert_eq!(monitor.peek(BAR), u32::MAX);
    });
}

#[test]
fn what_is_unmapped_cannot_be_reached_also_where_that_would_take_a_mapping_more() {
    in_a_copy(|| {
        let mut monitor = Monitor::new();
        let file = memfd(&[0x11, 0x22, 0x33], true);
        let window = window(&monitor);
        window.place(Some(BAR)).unwrap();
        window
            .map(0, &region(&file, 0, 3 * PAGE), Permission::READ_WRITE)
            .unwrap();
        assert_eq!(monitor.peek(BAR + PAGE), 0x22);
        let crowd = Crowd::new();
        // The page in the middle: it leaves two mappings of one.
        window.unmap(PAGE, PAGE).unwrap();
        monitor.poke(BAR + PAGE, 0x99);
        assert_eq!(monitor.peek(BAR + PAGE), u32::MAX);
        let mut seen = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&*file, &mut seen, PAGE).unwrap();
        assert_eq!(u32::from_le_bytes(seen), 0x22);
        // What is left of it is there, if not for the processor, then through the VMM.
        for (page, value) in [(0, 0x11), (2, 0x33)] {
            assert!(window.read(page * PAGE, &mut seen));
            assert_eq!(u32::from_le_bytes(seen), value);
        }
        assert!(!window.read(PAGE, &mut seen));
        // And the rest goes, too.
        window.unmap(0, 3 * PAGE).unwrap();
        assert_eq!(monitor.peek(BAR), u32::MAX);
        assert_eq!(monitor.peek(BAR + 2 * PAGE), u32::MAX);
        drop(crowd);
    });
}

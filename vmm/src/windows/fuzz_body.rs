//! What a peer's memory table and translations make of a window, as a byte string: the body of the fuzz target, and of a test that makes strings up.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use kvm_ioctls::VmFd;

use super::*;
use crate::host::open_kvm;

/// Where the pages lie that are mapped and unmapped, in the window: around the end of a chunk.
const START: u64 = CHUNK - 16 * PAGE_SIZE;
const PAGES: u8 = 32;
/// Of a file.
const FILE_PAGES: u64 = 8;
const SIZE: u64 = 2 * CHUNK;
const BASES: [u64; 2] = [1 << 32, 1 << 36];

/// Which file of [`files`] is what.
const UNSEALED: usize = 1;
const NO_MEMORY: usize = 2;

/// A sealed memfd, one that is not, and something that is no memory. Each byte of a memfd is the number of its page, or of the page and 0x80.
fn files() -> [Arc<File>; 3] {
    let memfd = |mark: u8, sealed: bool| {
        // SAFETY: the name is a NUL-terminated constant.
        let fd = unsafe {
            libc::memfd_create(
                c"peer".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        assert!(fd >= 0, "no memfd");
        // SAFETY: the descriptor is new.
        let file = unsafe { File::from_raw_fd(fd) };
        for page in 0..8u8 {
            let at = u64::from(page) * PAGE_SIZE;
            file.write_all_at(&[page | mark; 4096], at).expect("memory");
        }
        if sealed {
            // SAFETY: a fcntl without pointers.
            let done =
                unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
            assert_eq!(done, 0);
        }
        Arc::new(file)
    };
    let null = File::open("/dev/null").expect("it is there");
    [memfd(0, true), memfd(0x80, false), Arc::new(null)]
}

/// What a page of the window shows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shown {
    file: usize,
    page: u64,
    permission: Permission,
}

/// The numbers of a byte string. Behind its end all are 0.
struct Input<'a>(std::slice::Iter<'a, u8>);

impl Input<'_> {
    fn below(&mut self, bound: u8) -> u64 {
        u64::from(self.0.next().copied().unwrap_or(0) % bound)
    }

    /// Some of the pages: the first, and how many.
    fn pages(&mut self) -> (u64, u64) {
        let first = self.below(PAGES);
        (first, (1 + self.below(8)).min(u64::from(PAGES) - first))
    }
}

fn range(first: u64, count: u64) -> std::ops::Range<usize> {
    let [first, end] = [first, first + count].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    first..end
}

/// Maps, unmaps, places, hides and reaches pages of a window like the byte string says, next to a model of it, while the owner of a file cuts it off.
pub fn fuzz_window(data: &[u8]) {
    static VM: OnceLock<Arc<VmFd>> = OnceLock::new();
    let vm = VM.get_or_init(|| {
        let kvm = open_kvm().expect("KVM");
        Arc::new(kvm.create_vm().expect("a VM"))
    });
    let mut input = Input(data.iter());
    let kinds = [Files::Sealed, Files::Unsealed];
    let kind = kinds[range(input.below(2), 1).start];
    let windows = Windows::new(Arc::new(Slots::new(Arc::clone(vm))));
    let window = windows.add(SIZE, kind).expect("a window");
    let files = files();
    let mut model: [Option<Shown>; PAGES as usize] = [None; PAGES as usize];
    let mut base = None;
    // Where an owner has cut its file off, what is mapped of it may be gone or not.
    let cut = Cell::new(false);
    let mut hidden = Hidden::default();
    while !input.0.as_slice().is_empty() {
        let operation = input.below(16);
        let (first, count) = input.pages();
        let (offset, len) = (START + first * PAGE_SIZE, count * PAGE_SIZE);
        let wanted = range(first, count);
        let uncertain =
            |page: &Option<Shown>| cut.get() && page.is_some_and(|p| p.file == UNSEALED);
        match operation {
            0..=3 => {
                let file = range(input.below(3), 1).start;
                let page = input.below(10);
                let permission = Permission {
                    read: operation & 1 == 0,
                    write: operation & 2 == 0,
                };
                let region = SharedRegion {
                    file: Arc::clone(&files[file]),
                    file_offset: page * PAGE_SIZE,
                    len,
                };
                let result = window.map(offset, &region, permission);
                let free = model[wanted.clone()].iter().all(Option::is_none);
                let good = file != NO_MEMORY
                    && page + count <= FILE_PAGES
                    && (file != UNSEALED || kind == Files::Unsealed);
                let uncertain =
                    cut.get() && file == UNSEALED || model[wanted.clone()].iter().any(uncertain);
                if !uncertain {
                    assert_eq!(result.is_ok(), free && good, "{result:?}");
                }
                if result.is_ok() {
                    for (page, at) in (page..).zip(wanted) {
                        model[at] = Some(Shown {
                            file,
                            page,
                            permission,
                        });
                    }
                }
            }
            4 | 5 => {
                window.unmap(offset, len).expect("whole pages");
                model[wanted].fill(None);
            }
            6..=9 => {
                let (inside, reads) = (input.below(255) << 4, operation < 8);
                let mut bytes = [0x55; 24];
                let at = offset + inside;
                let reached = match reads {
                    true => window.read(at, &mut bytes),
                    false => window.write(at, &bytes),
                };
                let access = match reads {
                    true => Access::Read,
                    false => Access::Write,
                };
                let touched: Vec<_> = (at..at + 24)
                    .map(|at| {
                        let page = range((at - START) / PAGE_SIZE, 1).start;
                        let shown = model.get(page).copied().flatten()?;
                        shown.permission.allows(access).then_some(shown)
                    })
                    .collect();
                if reached || !touched.iter().any(uncertain) {
                    assert_eq!(reached, touched.iter().all(Option::is_some));
                }
                if !reached {
                    continue;
                }
                for ((at, byte), shown) in (at..).zip(&mut bytes).zip(&touched) {
                    let Some(Shown { file, page, .. }) = *shown else {
                        continue;
                    };
                    let mut there = [0];
                    let in_file = page * PAGE_SIZE + at % PAGE_SIZE;
                    files[file]
                        .read_exact_at(&mut there, in_file)
                        .expect("what was reached is there");
                    assert_eq!(there, [*byte], "another byte of the peer's");
                }
            }
            10 => {
                base = BASES.get(range(first % 3, 1).start).copied();
                window.place(base).expect("nothing is in the way");
            }
            11 => {
                window.patch(offset);
                if count == 1 {
                    window.remove_patch(offset);
                }
            }
            12 => {
                if let Some(base) = base {
                    windows.hide(&[base + offset], &mut hidden);
                }
            }
            13 => hidden.show(),
            14 => {
                cut.set(true);
                files[UNSEALED]
                    .set_len(first % FILE_PAGES * PAGE_SIZE)
                    .expect("it is not sealed");
                window.settle(offset, len, count == 8);
            }
            _ => {
                window.clear();
                model.fill(None);
            }
        }
        for (page, shown) in (0..).zip(&model) {
            let at = START + page * PAGE_SIZE;
            for access in [Access::Read, Access::Write] {
                let allowed = shown.is_some_and(|shown| shown.permission.allows(access));
                assert!(allowed || !window.allows(at, access), "{at:#x} {access:?}");
                assert!(allowed || !window.is_native(at, access));
                assert!(uncertain(shown) || allowed == window.allows(at, access));
            }
        }
    }
    hidden.show();
    window.clear();
    assert_eq!(windows.live.load(Ordering::Relaxed), 0, "mappings stay");
}

//! Real VMs. These tests need /dev/kvm and two cores, and fail with a line that says so where there are none.

mod bench;
mod capture;
mod faults;
mod isolation;
mod kill;
mod link;
mod log;
mod metrics;
mod offload;
mod pair;
mod process;
mod promises;
mod queues;
mod rss;
mod sandbox;
mod soak;

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::common::{Dir, Running, tool};

/// One test at a time: guests that poll want both cores.
fn machine() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kvm = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = kvm {
        panic!("this test boots VMs and needs /dev/kvm: {error}");
    }
    guard
}

fn start(args: &[&str]) -> Running {
    Running::start(tool(args))
}

/// One VM with a device on `socket`.
fn vm(flag: &str, socket: &str, cmdline: &str) -> Running {
    let device = format!("socket={socket}");
    start(&[
        "run",
        "--console",
        "output",
        flag,
        &device,
        "--cmdline",
        cmdline,
    ])
}

/// An ELF file whose only segment is `code`, entered in 64-bit mode with interrupts off.
fn kernel(dir: &Dir, code: &[u8]) -> String {
    const BASE: u64 = 0x20_0000;
    const HEADERS: u64 = 64 + 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    // ET_EXEC, EM_X86_64, version, entry, program headers at 64, no sections.
    put(&2_u16.to_le_bytes());
    put(&62_u16.to_le_bytes());
    put(&1_u32.to_le_bytes());
    put(&(BASE + HEADERS).to_le_bytes());
    put(&64_u64.to_le_bytes());
    put(&[0; 8 + 4]);
    for half in [64_u16, 56, 1, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    // PT_LOAD, read, write and execute.
    put(&1_u32.to_le_bytes());
    put(&7_u32.to_le_bytes());
    let len = HEADERS + u64::try_from(code.len()).unwrap();
    for word in [0, BASE, BASE, len, len, 4096] {
        put(&word.to_le_bytes());
    }
    put(code);
    let path = dir.file("kernel");
    fs::write(&path, file).unwrap();
    path
}

//! Real VMs. These tests need /dev/kvm and two cores, and fail with a line that says so where there are none.

mod bench;
#[path = "../common/mod.rs"]
mod common;
mod isolation;
mod kill;
mod link;
mod pair;
mod process;
mod queues;

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{Running, tool};

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

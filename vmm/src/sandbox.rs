//! What a thread of a VM's process may still ask of the kernel, once everything is open: a seccomp filter for each kind of thread, and Landlock for all of
//! them. Both only narrow: nothing lets a thread out again.
//!
//! Who takes over a thread of this process has its memory and its descriptors, and nothing else: no file can be opened, no program run, no other
//! process reached, no network used.
#![allow(unsafe_code)] // mallopt

mod filters;
mod landlock;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Once;

use seccompiler::{BpfProgram, SeccompAction};

use crate::sys::context;

/// What becomes of a system call that a VM's threads have no use for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// It ends the process (SIGSYS), and Landlock keeps files closed.
    #[default]
    On,
    /// It is carried out and put into the kernel's log (`audit: type=1326`). Nothing else is confined.
    Log,
    /// Nothing is confined.
    Off,
}

/// What a thread is for, which decides what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thread {
    /// The process' first: it waits, and takes the VM apart.
    Main,
    /// The devices.
    Devices,
    /// What hands out metrics.
    Metrics,
    /// What writes captured frames.
    Capture,
    /// A tap's rings.
    Tap,
    /// A disk's file.
    Disk,
    /// A virtual processor.
    Vcpu,
}

impl Seccomp {
    fn action(self) -> Option<SeccompAction> {
        match self {
            Seccomp::On => Some(SeccompAction::KillProcess),
            Seccomp::Log => Some(SeccompAction::Log),
            Seccomp::Off => None,
        }
    }

    fn program(self, thread: Thread) -> io::Result<Option<BpfProgram>> {
        let Some(action) = self.action() else {
            return Ok(None);
        };
        let program = filters::program(thread, action);
        program
            .map(Some)
            .map_err(|e| context("a seccomp filter", io::Error::other(e)))
    }

    /// Confines the calling thread, for good.
    pub(crate) fn enter(self, thread: Thread) -> io::Result<()> {
        let Some(program) = self.program(thread)? else {
            return Ok(());
        };
        seccompiler::apply_filter(&program).map_err(|e| {
            let error = io::Error::other(e);
            context(
                "the kernel takes no seccomp filter (--seccomp off does without)",
                error,
            )
        })
    }

    /// Makes the process fit for [`Seccomp::enter`]. The threads that it is for are started behind it.
    pub(crate) fn prepare(self) {
        if self == Seccomp::Off {
            return;
        }
        // A panic is one line: a backtrace would have to open files.
        static HOOK: Once = Once::new();
        HOOK.call_once(|| std::panic::set_hook(Box::new(|info| log::error!("{info}"))));
        // glibc opens a file of /proc where it returns memory of an arena of a thread. These threads hardly allocate: one arena serves all.
        // SAFETY: the call takes two numbers.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }

    /// Takes file systems away from the calling thread and those that it starts, but for the removal of these sockets at the end. Kernels without Landlock
    /// leave that to the filters.
    pub(crate) fn close_files(self, sockets: &[PathBuf]) -> io::Result<()> {
        if self != Seccomp::On {
            return Ok(());
        }
        landlock::enter(sockets).map_err(|e| context("Landlock", e))
    }
}

//! Landlock: no file can be opened, made, changed or run from here on, whatever its permissions say. Descriptors that are open stay what they are, and
//! so does what a peer sends: a memfd is no file of a file system. Connecting to a Unix socket by its path is none of the rights below, so that a peer is found again.
#![allow(unsafe_code)] // three system calls without a wrapper, and O_PATH

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use log::debug;

/// LANDLOCK_CREATE_RULESET_VERSION
const VERSION: libc::c_ulong = 1;
/// LANDLOCK_RULE_PATH_BENEATH
const PATH_BENEATH: libc::c_ulong = 1;
/// LANDLOCK_ACCESS_FS_REMOVE_FILE
const REMOVE_FILE: u64 = 1 << 5;

/// struct landlock_ruleset_attr of linux/landlock.h, as of version 6 of the interface; earlier ones know the first 8 or 16 bytes of it.
#[repr(C)]
#[derive(Debug, PartialEq)]
struct Ruleset {
    /// LANDLOCK_ACCESS_FS_*: those that are taken away where no rule gives them back.
    fs: u64,
    /// LANDLOCK_ACCESS_NET_*
    net: u64,
    /// LANDLOCK_SCOPE_*
    scoped: u64,
}

impl Ruleset {
    /// All that a kernel with this version of the interface can take away, as far as it is known here, and how long its structure is.
    fn of(version: i64) -> (Self, usize) {
        let fs = match version {
            1 => 1 << 13,
            2 => 1 << 14,     // REFER
            3 | 4 => 1 << 15, // TRUNCATE
            _ => 1 << 16,     // IOCTL_DEV
        };
        let ruleset = Ruleset {
            fs: fs - 1,
            net: if version >= 4 { 0b11 } else { 0 },
            scoped: if version >= 6 { 0b11 } else { 0 },
        };
        let len = match version {
            ..=3 => 8,
            4 | 5 => 16,
            _ => 24,
        };
        (ruleset, len)
    }
}

/// struct landlock_path_beneath_attr, which is packed.
#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent: i32,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    match result {
        ..0 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Confines the calling thread, and those that it starts, to the removal of files in the directories of `sockets`. Does nothing where the kernel has no
/// Landlock.
pub(super) fn enter(sockets: &[PathBuf]) -> io::Result<()> {
    // SAFETY: with this flag the call takes no structure.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<Ruleset>(),
            0_usize,
            VERSION,
        )
    };
    let version = match check(version) {
        Ok(version) => version,
        Err(error) => {
            debug!("this kernel has no Landlock: {error}");
            return Ok(());
        }
    };
    let (ruleset, len) = Ruleset::of(version);
    // SAFETY: the structure is at least `len` bytes long and only read during the call.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const ruleset,
            len,
            0_u32,
        )
    })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    for socket in sockets {
        let directory = directory(socket)?;
        let rule = PathBeneath {
            allowed_access: REMOVE_FILE,
            parent: directory.as_raw_fd(),
        };
        // SAFETY: the structure is the one of this kind of rule, and only read during the call; both descriptors are open.
        check(unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                fd.as_raw_fd(),
                PATH_BENEATH,
                &raw const rule,
                0_u32,
            )
        })?;
    }
    // SAFETY: takes numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // SAFETY: takes a descriptor that is open, and a number.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd.as_raw_fd(), 0_u32) })?;
    Ok(())
}

/// The directory that a socket is in.
fn directory(socket: &Path) -> io::Result<File> {
    let parent = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_kernel_is_asked_for_what_it_knows() {
        let rights = |version| {
            let (ruleset, len) = Ruleset::of(version);
            (ruleset.fs.count_ones(), ruleset.net, ruleset.scoped, len)
        };
        assert_eq!(rights(1), (13, 0, 0, 8));
        assert_eq!(rights(3), (15, 0, 0, 8));
        assert_eq!(rights(4), (15, 3, 0, 16));
        assert_eq!(rights(5), (16, 3, 0, 16));
        assert_eq!(rights(6), (16, 3, 3, 24));
        assert_eq!(rights(99), rights(6));
    }
}

//! The exit codes: what each means, and which one an error gets.

use std::fmt;
use std::process::ExitStatus;

/// Everything went well.
pub const OK: u8 = 0;
/// The host could not do what was asked.
pub const HOST: u8 = 1;
/// Frames were lost, duplicated, reordered or corrupted; an attack got through.
pub const FRAMES: u8 = 2;
/// The command line is wrong.
pub const USAGE: u8 = 3;
/// The guest faulted, or reset itself.
pub const GUEST: u8 = 4;
/// The guest powered off with a code that means something else here.
pub const GUEST_CODE: u8 = 5;

/// The end of `--help`.
pub const HELP: &str = "\
Exit status:
  0      success
  1      the host: a file, a socket, memory or /dev/kvm could not be had, or a VM could not go on
  2      frames were lost, duplicated, reordered or corrupted; isolation: an attack got through
  3      wrong arguments or a configuration that makes no sense
  4      the guest faulted (triple fault) or reset itself
  5      the guest powered off with a code that has a meaning here (1, 3, 4, 5, 128 and above); it is on stderr
  128+n  ended by signal n (130: Ctrl-C, 143: SIGTERM; 159, SIGSYS: a system call that a VM has no use for, see run --seccomp)
  other  the code that the guest powered off with (0, 2, 6 to 127 pass unchanged)";

/// An error that decides the exit code by itself. All others are the host's ([`HOST`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The command line ([`USAGE`]).
    Usage(String),
    /// The guest ([`GUEST`]).
    Guest(String),
    /// A signal ended it.
    Signal(i32),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(text) | Self::Guest(text) => f.write_str(text),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
        }
    }
}

impl std::error::Error for Failure {}

/// A [`Failure::Usage`].
pub fn usage(text: impl Into<String>) -> Failure {
    Failure::Usage(text.into())
}

/// The exit code for an error.
pub fn of_error(error: &anyhow::Error) -> u8 {
    match error.chain().find_map(|cause| cause.downcast_ref()) {
        Some(Failure::Usage(_)) => USAGE,
        Some(Failure::Guest(_)) => GUEST,
        Some(Failure::Signal(number)) => of_signal(*number),
        None => HOST,
    }
}

/// What went wrong and why, from the outside in. A cause that the line before tells already is left out.
pub fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

/// The exit code for an end by a signal.
pub fn of_signal(number: i32) -> u8 {
    u8::try_from(number & 0x7f).unwrap_or(0) | 0x80
}

/// The exit code for a guest's power-off code.
pub fn of_guest(code: u8) -> u8 {
    match code {
        OK | FRAMES | 6..=127 => code,
        _ => GUEST_CODE,
    }
}

/// The exit code of a process that has ended.
pub fn of_process(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    match status.code() {
        Some(code) => u8::try_from(code).unwrap_or(HOST),
        None => of_signal(status.signal().unwrap_or(0)),
    }
}

/// How a VM's process ended, for people.
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match status.signal() {
        Some(libc::SIGSYS) => format!(
            "{status}: a system call that a VM has no use for; run --seccomp log has the kernel say which"
        ),
        _ => status.to_string(),
    }
}

/// The worse of two exit codes: the host's troubles before the guest's, those before lost frames, and these
/// before a guest's own code.
pub fn worse(a: u8, b: u8) -> u8 {
    fn rank(code: u8) -> u8 {
        match code {
            OK => 0,
            6..=127 => 1,
            GUEST_CODE => 2,
            FRAMES => 3,
            GUEST => 4,
            HOST | USAGE => 5,
            128.. => 6,
        }
    }
    if rank(b) > rank(a) { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_guest_can_pass_for_the_tool() {
        for code in 0..=255 {
            let out = of_guest(code);
            assert!(![HOST, USAGE, GUEST].contains(&out), "{code} -> {out}");
            assert!(out < 128, "{code} -> {out}");
            assert!(out == code || out == GUEST_CODE);
            assert_eq!(out == OK, code == OK);
        }
    }

    #[test]
    fn a_forbidden_system_call_is_told_from_other_signals() {
        use std::os::unix::process::ExitStatusExt;
        let forbidden = ExitStatus::from_raw(libc::SIGSYS);
        assert_eq!(of_process(forbidden), 159);
        assert!(describe(forbidden).contains("--seccomp log"));
        let killed = ExitStatus::from_raw(libc::SIGKILL);
        assert_eq!(describe(killed), killed.to_string());
    }

    #[test]
    fn the_cause_decides_however_deep_it_lies() {
        let error = anyhow::Error::from(usage("x")).context("y").context("z");
        assert_eq!(of_error(&error), USAGE);
        let error = anyhow::Error::from(Failure::Signal(15)).context("y");
        assert_eq!(of_error(&error), 143);
        assert_eq!(of_error(&anyhow::anyhow!("disk full")), HOST);
    }

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow::anyhow!("no memory")
            .context("guest: no memory")
            .context("VM");
        assert_eq!(explain(&error), "VM: guest: no memory");
        let error = anyhow::anyhow!("errno 2").context("cannot open x");
        assert_eq!(explain(&error), "cannot open x: errno 2");
    }

    #[test]
    fn success_is_never_the_worse_one() {
        for code in 1..=255 {
            assert_eq!(worse(OK, code), code);
            assert_eq!(worse(code, OK), code);
        }
        assert_eq!(worse(FRAMES, HOST), HOST);
        assert_eq!(worse(HOST, FRAMES), HOST);
        assert_eq!(worse(77, GUEST), GUEST);
    }
}

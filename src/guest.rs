//! One VM, driven over its control channel (docs/bare-metal.md).

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::bench::record::{Lines, Record};
use crate::child::{Output, VmProcess};
use crate::exit::{self, Failure};
use crate::sys;

/// A guest that does not read its commands for so long must not hold us up.
const WRITE: Duration = Duration::from_secs(5);
/// How long a VM may take to end after its control channel closed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// One VM, seen through its control channel. Dropping it ends it.
pub struct Guest {
    name: &'static str,
    stream: UnixStream,
    lines: Lines,
    /// Absent in tests, which play the guest themselves.
    pub process: Option<VmProcess>,
}

impl AsFd for Guest {
    /// Readable when records have come or the channel is closed.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Guest {
    /// Boots it with these arguments of `run`.
    pub fn start(name: &'static str, args: &[OsString]) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("socketpair")?;
        ours.set_write_timeout(Some(WRITE)).context("setsockopt")?;
        let mut args = args.to_vec();
        args.push("--control-fd=0".into());
        let stdin = Stdio::from(OwnedFd::from(theirs));
        Ok(Self {
            process: Some(VmProcess::start(name, &args, stdin, Output::Keep)?),
            ..Self::played(name, ours)
        })
    }

    /// One that somebody else plays at the other end of `stream`.
    pub fn played(name: &'static str, stream: UnixStream) -> Self {
        Self {
            name,
            stream,
            lines: Lines::default(),
            process: None,
        }
    }

    /// Sends a command. That the VM is gone is an error.
    pub fn send(&mut self, line: &str) -> Result<()> {
        match self.stream.write_all(format!("{line}\n").as_bytes()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(self.died()),
            Err(error) => Err(error)
                .with_context(|| format!("cannot send a command to the {} guest", self.name)),
        }
    }

    /// Why the control channel closed.
    pub fn died(&mut self) -> anyhow::Error {
        let name = self.name;
        let Some(process) = &mut self.process else {
            return anyhow!("the {name} VM closed its control channel");
        };
        // Whether it ends in time or not: what it said so far is reported.
        let _ = sys::poll(&[process.as_fd()], Some(LAST_WORDS));
        match process.ended() {
            Ok(Some(status)) => {
                let text = format!(
                    "the {name} VM ended ({}): {}",
                    exit::describe(status),
                    process.last_words()
                );
                match exit::of_process(status) {
                    exit::GUEST => Failure::Guest(text).into(),
                    _ => anyhow!(text),
                }
            }
            _ => anyhow!(
                "the {name} VM closed its control channel: {}",
                process.last_words()
            ),
        }
    }

    /// What has arrived; `None` when the channel is closed.
    pub fn read(&mut self) -> Result<Option<Vec<Record>>> {
        let mut chunk = [0; 4096];
        let got = match self.stream.read(&mut chunk) {
            Ok(0) => return Ok(None),
            Ok(got) => got,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error).context("cannot read a control channel"),
        };
        let got = chunk.get(..got).unwrap_or_default();
        self.lines.take(got).map(Some)
    }
}

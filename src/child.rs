//! A VM in a process of its own: this program again, with `run`; or the relay between two, with `relay`.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::sys;

/// How many of a VM's last lines are kept for an error message.
const KEPT_LINES: usize = 12;
/// A longer line is cut into several: a guest decides how long its lines are.
const LINE_LIMIT: usize = 1024;
/// How long a VM may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(3);

/// What becomes of a VM's output.
#[derive(Clone, Copy, Debug)]
pub enum Output {
    /// Every line goes to the same stream of this process, behind the prefix.
    Show(&'static str),
    /// The last lines are kept for [`VmProcess::last_words`].
    Keep,
    /// It has this process's standard streams, and its terminal.
    Terminal,
}

/// A running VM or relay. Dropping it ends it.
#[derive(Debug)]
pub struct VmProcess {
    name: &'static str,
    child: Child,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
    errors: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl VmProcess {
    /// Starts `run` with `args`. The VM ends when the calling thread does, so that has to be the main thread.
    pub fn start(
        name: &'static str,
        args: &[OsString],
        stdin: Stdio,
        output: Output,
    ) -> Result<Self> {
        let console = match output {
            Output::Terminal => "stdio",
            Output::Show(_) | Output::Keep => "output",
        };
        let console = ["--console", console].map(OsString::from);
        Self::spawn(name, "run", &[&console, args].concat(), stdin, output)
    }

    /// Starts `relay` with `args`, which ends as a VM does.
    pub fn relay(args: &[OsString]) -> Result<Self> {
        Self::spawn("relay", "relay", args, Stdio::null(), Output::Keep)
    }

    fn spawn(
        name: &'static str,
        command: &str,
        args: &[OsString],
        stdin: Stdio,
        output: Output,
    ) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let mut starter = Command::new(&program);
        starter
            .arg(command)
            .arg("--parent")
            .arg(std::process::id().to_string())
            .args(args)
            .stdin(stdin);
        match output {
            // Who reads from the terminal is in its foreground.
            Output::Terminal => {}
            Output::Show(_) | Output::Keep => {
                starter
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    // Ctrl-C is for this process alone, which then ends the VMs in order.
                    .process_group(0);
            }
        }
        let mut child = starter
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let pidfd = sys::pidfd(child.id());
        // From here on an error drops the process properly.
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error).context("pidfd_open (it needs Linux 5.3)");
            }
        };
        let errors = Arc::new(Mutex::new(VecDeque::new()));
        let mut process = Self {
            name,
            child,
            pidfd,
            status: None,
            errors: Arc::clone(&errors),
            readers: Vec::new(),
        };
        if let Some(stdout) = stdout {
            process.read(stdout, move |line| {
                if let Output::Show(prefix) = output {
                    // A closed stdout must not stop the VM.
                    let _ = writeln!(io::stdout().lock(), "{prefix}{line}");
                }
            })?;
        }
        if let Some(stderr) = stderr {
            process.read(stderr, move |line| {
                if let Output::Show(prefix) = output {
                    let _ = writeln!(io::stderr().lock(), "{prefix}{line}");
                }
                let mut kept = errors.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == KEPT_LINES {
                    kept.pop_front();
                }
                kept.push_back(line.to_owned());
            })?;
        }
        Ok(process)
    }

    fn read(
        &mut self,
        from: impl Read + Send + 'static,
        line: impl FnMut(&str) + Send + 'static,
    ) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(format!("{} output", self.name))
            .spawn(move || lines(from, line))
            .context("cannot start a thread")?;
        self.readers.push(thread);
        Ok(())
    }

    /// Which VM it is.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait().context("waitpid")?;
            if self.status.is_some() {
                self.finish_output();
            }
        }
        Ok(self.status)
    }

    /// Ends it: SIGTERM, and SIGKILL where that is not enough.
    pub fn end(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        sys::signal(self.pid(), libc::SIGTERM).context("kill")?;
        sys::poll(&[self.pidfd.as_fd()], Some(GRACE)).context("poll")?;
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        log::warn!("the {} VM did not end on SIGTERM; killing it", self.name);
        self.child.kill().context("kill")?;
        let status = self.child.wait().context("waitpid")?;
        self.status = Some(status);
        self.finish_output();
        Ok(status)
    }

    fn finish_output(&mut self) {
        for reader in self.readers.drain(..) {
            // A reader does not panic, and if it did its output would be lost, no more.
            let _ = reader.join();
        }
    }

    /// What it wrote to stderr last, in one line.
    pub fn last_words(&self) -> String {
        let kept = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.is_empty() {
            return "it said nothing".to_owned();
        }
        let lines: Vec<&str> = kept
            .iter()
            .map(|line| line.strip_prefix("vhost-pci: ").unwrap_or(line))
            .collect();
        lines.join("; ")
    }
}

impl AsFd for VmProcess {
    /// Readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::warn!("the {} VM: {error:#}", self.name);
        }
    }
}

/// Calls `line` with each line of `from`, without what could move the cursor out of it.
fn lines(mut from: impl Read, mut line: impl FnMut(&str)) {
    let mut pending = Vec::new();
    let mut chunk = [0; 4096];
    let mut give = |pending: &mut Vec<u8>| {
        let text: String = String::from_utf8_lossy(pending)
            .chars()
            .filter(|&c| c == '\t' || !c.is_control())
            .collect();
        line(&text);
        pending.clear();
    };
    loop {
        let got = match from.read(&mut chunk) {
            Ok(got) if got > 0 => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            _ => break,
        };
        for &byte in chunk.iter().take(got) {
            if byte == b'\n' {
                give(&mut pending);
            } else {
                pending.push(byte);
                if pending.len() == LINE_LIMIT {
                    give(&mut pending);
                }
            }
        }
    }
    if !pending.is_empty() {
        give(&mut pending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &[u8]) -> Vec<String> {
        let mut out = Vec::new();
        lines(text, |line| out.push(line.to_owned()));
        out
    }

    #[test]
    fn lines_are_split_and_the_last_needs_no_end() {
        assert_eq!(split(b"one\r\n\ntwo"), ["one", "", "two"]);
        assert!(split(b"").is_empty());
    }

    #[test]
    fn a_guest_cannot_leave_its_line_or_fill_our_memory() {
        assert_eq!(split(b"a\x1b[2J\x07b\n"), ["a[2Jb"]);
        let long = split(&vec![b'x'; 10 * LINE_LIMIT]);
        assert_eq!(long.len(), 10);
        assert_eq!(split(&[0xff, b'a']), ["\u{fffd}a"]);
    }
}

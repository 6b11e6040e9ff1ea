//! `--capture`: the frames that the built-in guest says it sent and received (docs/bare-metal.md), as a pcapng file. Its control channel brings them; a thread of
//! its own reads them and writes the file.
//!
//! What a guest writes is its word, and may be anything: a line that is no record of a frame is left out, and there are never more frames, nor more bytes of
//! one, than were asked for.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{SystemTime, UNIX_EPOCH};

use log::warn;
use pcapng::{Capture, Direction, Limits, SNAPLEN};

use crate::control::LINE_LIMIT;
use crate::metrics::number;
use crate::sandbox::Thread;
use crate::sys::{context, lock};
use crate::{Error, Seccomp};

/// How much waits for the thread at most.
const WAITING_LIMIT: usize = 1 << 20;

/// Where captured frames go, and which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureConfig {
    /// A file, which is made anew.
    pub path: PathBuf,
    /// What the interface is called in it.
    pub interface: &'static str,
    /// Most frames.
    pub frames: u32,
    /// Most bytes of each, from its first on.
    pub snaplen: u32,
}

/// What the guest wrote and the thread has not read.
#[derive(Default)]
pub(crate) struct Inbox {
    state: Mutex<Waiting>,
    wake: Condvar,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    ended: bool,
}

impl Inbox {
    /// What the guest writes. A guest that writes though there is no room loses it.
    pub(crate) fn take(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        if state.bytes.len() + bytes.len() <= WAITING_LIMIT {
            state.bytes.extend_from_slice(bytes);
            self.wake.notify_one();
        }
    }

    /// Whether a line is sure to be taken.
    pub(crate) fn has_room(&self) -> bool {
        lock(&self.state).bytes.len() + LINE_LIMIT <= WAITING_LIMIT
    }

    fn end(&self) {
        lock(&self.state).ended = true;
        self.wake.notify_one();
    }

    /// What has come; `None` when that was all.
    fn next(&self) -> Option<Vec<u8>> {
        let state = lock(&self.state);
        let waits = |state: &mut Waiting| state.bytes.is_empty() && !state.ended;
        let state = self.wake.wait_while(state, waits);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        let bytes = std::mem::take(&mut state.bytes);
        (!bytes.is_empty()).then_some(bytes)
    }
}

/// The running thread.
pub(crate) struct Recorder {
    inbox: Arc<Inbox>,
    handle: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Opens the file.
    pub(crate) fn open(config: &CaptureConfig) -> Result<Frames<File>, Error> {
        let file = pcapng::create(&config.path);
        let file =
            file.map_err(|e| context(&format!("--capture: {}", config.path.display()), e))?;
        let limits = Limits {
            snaplen: config.snaplen,
            frames: config.frames.into(),
        };
        Ok(Frames::new(file, config.interface, limits))
    }

    /// Starts the thread.
    pub(crate) fn spawn(
        mut frames: Frames<File>,
        inbox: Arc<Inbox>,
        seccomp: Seccomp,
    ) -> Result<Self, Error> {
        let (ready, was_ready) = mpsc::channel();
        let from = Arc::clone(&inbox);
        let handle = thread::Builder::new()
            .name("capture".into())
            .spawn(move || {
                let _ = ready.send(seccomp.enter(Thread::Capture));
                while let Some(bytes) = from.next() {
                    frames.take(&bytes);
                }
                frames.finish();
            })
            .map_err(|e| context("the thread of --capture", e))?;
        let recorder = Self {
            inbox,
            handle: Some(handle),
        };
        if let Ok(result) = was_ready.recv() {
            result?;
        }
        Ok(recorder)
    }
}

impl Drop for Recorder {
    /// Ends the thread when it has written what has come.
    fn drop(&mut self) {
        self.inbox.end();
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

/// How the guest's clock goes: what it showed when its record came, and when that was.
#[derive(Clone, Copy, Debug)]
struct Clock {
    ticks: u64,
    tsc_khz: u64,
    /// Nanoseconds since 1970.
    time: u64,
}

impl Clock {
    /// When it showed `ticks`; `None` where it never did.
    fn time(&self, ticks: u64) -> Option<u64> {
        let ago = u128::from(self.ticks.checked_sub(ticks)?) * 1_000_000 / u128::from(self.tsc_khz);
        self.time.checked_sub(u64::try_from(ago).ok()?)
    }
}

/// The guest's records on their way into the file.
pub(crate) struct Frames<W: io::Write> {
    /// Absent when it has failed.
    file: Option<Capture<W>>,
    snaplen: usize,
    line: Vec<u8>,
    overlong: bool,
    clock: Option<Clock>,
    /// Whether it was said that there are records of frames that make no sense.
    complained: bool,
}

impl<W: io::Write> Frames<W> {
    fn new(out: W, interface: &str, limits: Limits) -> Self {
        Self {
            file: Some(Capture::new(out, interface, limits)),
            snaplen: limits.snaplen as usize,
            line: Vec::new(),
            overlong: false,
            clock: None,
            complained: false,
        }
    }

    /// What the guest wrote.
    fn take(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.overlong |= self.line.len() + part.len() > LINE_LIMIT;
            if self.overlong {
                self.line.clear();
            } else {
                self.line.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                if !std::mem::replace(&mut self.overlong, false) {
                    self.record(&line);
                }
            }
        }
        let flushed = self.file.as_mut().map(Capture::flush);
        self.check(flushed);
    }

    fn record(&mut self, line: &[u8]) {
        let Ok(line) = std::str::from_utf8(line) else {
            return;
        };
        if line.starts_with("{\"record\":\"capture\",") {
            self.clock = clock(line, now());
        } else if line.starts_with("{\"record\":\"frame\",") && self.frame(line).is_none() {
            if !self.complained {
                warn!("--capture: the guest's records of frames make no sense");
            }
            self.complained = true;
        }
    }

    /// Writes the frame of a record; `None` where it is none.
    fn frame(&mut self, line: &str) -> Option<()> {
        let time = self.clock?.time(number(line, "ticks")?)?;
        let direction = match number(line, "sent")? {
            0 => Direction::Inbound,
            1 => Direction::Outbound,
            _ => return None,
        };
        let len = number(line, "len").filter(|&len| len <= SNAPLEN.into())?;
        let len = usize::try_from(len).ok()?;
        let (_, digits) = line.split_once("\"bytes\":\"")?;
        let (digits, _) = digits.split_once('"')?;
        let bytes = hexadecimal(digits)?;
        if bytes.len() != len.min(self.snaplen) {
            return None;
        }
        let settled = self.file.as_mut().map(|file| {
            file.frame(time, direction, len, |to| to.copy_from_slice(&bytes));
            file.settle(true)
        });
        self.check(settled);
        Some(())
    }

    /// A file that cannot be written costs the capture, and not the VM.
    fn check(&mut self, result: Option<io::Result<()>>) {
        if let Some(Err(error)) = result {
            warn!("--capture: {error}; there are no more frames in it");
            self.file = None;
        }
    }

    fn finish(mut self) {
        let finished = self.file.take().map(Capture::finish);
        self.check(finished);
    }
}

/// The clock of a record that comes now; `None` where there is none in it.
fn clock(line: &str, time: u64) -> Option<Clock> {
    Some(Clock {
        ticks: number(line, "now")?,
        tsc_khz: number(line, "tsc_khz").filter(|&khz| khz > 0)?,
        time,
    })
}

/// Nanoseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// Bytes from two digits each.
fn hexadecimal(digits: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    let byte = |&[high, low]: &[u8; 2]| u8::try_from(digit(high)? << 4 | digit(low)?).ok();
    let bytes = pairs.iter().map(byte).collect();
    if rest.is_empty() { bytes } else { None }
}

#[cfg(test)]
mod tests;

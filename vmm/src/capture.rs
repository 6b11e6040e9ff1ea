//! `--capture`: the frames that the built-in guest says it sent and received (docs/bare-metal.md), as a pcapng file. A record on the control channel says where
//! in its memory they are; they are copied out before the guest goes on, and a thread of its own writes the file.
//!
//! What a guest says is its word, and may be anything: what is no frame is left out, no more is copied at a time than what was asked for can take, and the file
//! never has more frames, nor more bytes of one, than were asked for.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{SystemTime, UNIX_EPOCH};

use log::warn;
use pcapng::{Capture, Direction, Limits, SNAPLEN};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::lines::Lines;
use crate::metrics::number;
use crate::sandbox::Thread;
use crate::sys::context;
use crate::{Error, Seccomp};

/// What a record of captured frames begins with.
const RECORD: &str = "{\"record\":\"capture\",";
/// Bytes in front of those of a frame: le64 ticks, le32 length, le16 how many bytes of it follow, le16 1 where the guest sent it.
const HEAD: usize = 16;
/// Reports that wait for the thread.
const WAITING: usize = 1;

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

impl CaptureConfig {
    /// Bytes of a guest's memory that so many frames take.
    fn most(&self) -> u64 {
        u64::from(self.frames) * (HEAD as u64 + u64::from(self.snaplen))
    }
}

/// The frames of a workload, as the guest had them in its memory.
pub(crate) struct Report {
    clock: Clock,
    bytes: Vec<u8>,
}

/// What listens to the control channel, on the thread of the vCPU that writes there.
pub(crate) struct Listener {
    memory: GuestMemoryMmap,
    most: u64,
    lines: Lines,
    to: SyncSender<Option<Report>>,
    /// Whether it was said that something is left out.
    complained: bool,
}

impl Listener {
    /// What the guest writes.
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        let mut lines = std::mem::take(&mut self.lines);
        lines.take(bytes, |line| self.hear(line));
        self.lines = lines;
    }

    fn hear(&mut self, line: &[u8]) {
        let line = std::str::from_utf8(line).ok();
        let Some(line) = line.filter(|line| line.starts_with(RECORD)) else {
            return;
        };
        let Some(report) = self.report(line) else {
            return self.complain("the guest's record of frames makes no sense");
        };
        if let Err(mpsc::TrySendError::Full(_)) = self.to.try_send(Some(report)) {
            self.complain("the guest reports frames faster than they are written");
        }
    }

    /// Copies what a record is about; `None` where it is about nothing.
    fn report(&self, line: &str) -> Option<Report> {
        let clock = clock(line, now())?;
        let at = GuestAddress(number(line, "at")?);
        let len = number(line, "len").filter(|&len| len <= self.most)?;
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        self.memory.read_slice(&mut bytes, at).ok()?;
        Some(Report { clock, bytes })
    }

    fn complain(&mut self, what: &str) {
        if !self.complained {
            warn!("--capture: {what}; it is left out");
        }
        self.complained = true;
    }
}

/// The file, open, and what the thread is told.
pub(crate) struct Opened {
    frames: Frames<File>,
    most: u64,
    to: SyncSender<Option<Report>>,
    from: Receiver<Option<Report>>,
}

/// The running thread.
pub(crate) struct Recorder {
    to: SyncSender<Option<Report>>,
    handle: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Opens the file.
    pub(crate) fn open(config: &CaptureConfig) -> Result<Opened, Error> {
        let file = pcapng::create(&config.path);
        let file =
            file.map_err(|e| context(&format!("--capture: {}", config.path.display()), e))?;
        let limits = Limits {
            snaplen: config.snaplen,
            frames: config.frames.into(),
        };
        let (to, from) = mpsc::sync_channel(WAITING);
        Ok(Opened {
            frames: Frames::new(file, config.interface, limits),
            most: config.most(),
            to,
            from,
        })
    }

    /// Starts the thread.
    pub(crate) fn spawn(opened: Opened, seccomp: Seccomp) -> Result<Self, Error> {
        let (ready, was_ready) = mpsc::channel();
        let Opened {
            mut frames,
            to,
            from,
            ..
        } = opened;
        let handle = thread::Builder::new()
            .name("capture".into())
            .spawn(move || {
                let _ = ready.send(seccomp.enter(Thread::Capture));
                while let Ok(Some(report)) = from.recv() {
                    frames.take(&report);
                }
                frames.finish();
            })
            .map_err(|e| context("the thread of --capture", e))?;
        let recorder = Self {
            to,
            handle: Some(handle),
        };
        if let Ok(result) = was_ready.recv() {
            result?;
        }
        Ok(recorder)
    }
}

impl Opened {
    /// What listens for it to the guest with this memory.
    pub(crate) fn listener(&self, memory: &GuestMemoryMmap) -> Listener {
        Listener {
            memory: memory.clone(),
            most: self.most,
            lines: Lines::default(),
            to: self.to.clone(),
            complained: false,
        }
    }
}

impl Drop for Recorder {
    /// Ends the thread when it has written what has come.
    fn drop(&mut self) {
        let _ = self.to.send(None);
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

/// The guest's frames on their way into the file.
struct Frames<W: io::Write> {
    /// Absent when it has failed.
    file: Option<Capture<W>>,
    snaplen: usize,
    /// Whether it was said that there are frames that make no sense.
    complained: bool,
}

impl<W: io::Write> Frames<W> {
    fn new(out: W, interface: &str, limits: Limits) -> Self {
        Self {
            file: Some(Capture::new(out, interface, limits)),
            snaplen: limits.snaplen as usize,
            complained: false,
        }
    }

    /// Writes the frames of a workload, up to what makes no sense.
    fn take(&mut self, report: &Report) {
        let mut rest = &report.bytes[..];
        while !rest.is_empty() {
            match self.frame(report.clock, rest) {
                Some(behind) => rest = behind,
                None if self.complained => break,
                None => {
                    warn!("--capture: frames of the guest make no sense; they are left out");
                    self.complained = true;
                }
            }
        }
        let flushed = self.file.as_mut().map(Capture::flush);
        self.check(flushed);
    }

    /// Writes the first frame, and returns what is behind it; `None` where it is none.
    fn frame<'a>(&mut self, clock: Clock, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let (ticks, bytes) = bytes.split_first_chunk()?;
        let (len, bytes) = bytes.split_first_chunk()?;
        let (kept, bytes) = bytes.split_first_chunk()?;
        let (sent, bytes) = bytes.split_first_chunk()?;
        let time = clock.time(u64::from_le_bytes(*ticks))?;
        let len = u32::from_le_bytes(*len);
        let len = usize::try_from(len).ok().filter(|_| len <= SNAPLEN)?;
        let (kept, behind) = bytes.split_at_checked(u16::from_le_bytes(*kept).into())?;
        let direction = match u16::from_le_bytes(*sent) {
            0 => Direction::Inbound,
            1 => Direction::Outbound,
            _ => return None,
        };
        if kept.len() != len.min(self.snaplen) {
            return None;
        }
        let settled = self.file.as_mut().map(|file| {
            file.frame(time, direction, len, |to| to.copy_from_slice(kept));
            file.settle(true)
        });
        self.check(settled);
        Some(behind)
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

#[cfg(test)]
mod tests;

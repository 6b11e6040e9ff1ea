//! `--capture`: the frames that pass, as a pcapng file.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use guest_driver::port::MAX_LARGE_FRAME;
use guest_driver::watch::Watch;
use guest_driver::{Frame, Slot};
use pcapng::{Direction, Limits, SNAPLEN};

/// Where frames go to, and which: `FILE[,snaplen=N][,count=N]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureFile {
    /// The file.
    pub path: PathBuf,
    /// How much of them.
    pub limits: Limits,
}

impl FromStr for CaptureFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let path = parts.next().filter(|path| !path.is_empty());
        let path = path.ok_or("there has to be FILE")?.into();
        let (mut snaplen, mut count) = (None, None);
        for part in parts {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("'{part}' is not key=value; the keys are snaplen, count"))?;
            let (slot, most) = match key {
                "snaplen" => (&mut snaplen, SNAPLEN.into()),
                "count" => (&mut count, u64::MAX),
                _ => return Err(format!("unknown key '{key}'; the keys are snaplen, count")),
            };
            let number = value
                .parse()
                .ok()
                .filter(|number| (1..=most).contains(number));
            let number =
                number.ok_or_else(|| format!("{key}={value}: it is a number from 1 to {most}"))?;
            if slot.replace(number).is_some() {
                return Err(format!("the key '{key}' is given twice"));
            }
        }
        let limits = Limits {
            snaplen: snaplen.map_or(SNAPLEN, |most| u32::try_from(most).unwrap_or(SNAPLEN)),
            frames: count.unwrap_or(u64::MAX),
        };
        Ok(Self { path, limits })
    }
}

/// A capture of what passes a port.
pub struct Capture<W = File> {
    file: pcapng::Capture<W>,
    /// Frames are built here.
    room: Box<[u8]>,
    /// What became of the file in the last burst.
    state: io::Result<()>,
}

impl Capture {
    /// Makes the file anew, for frames of the interface of this name.
    ///
    /// # Errors
    /// With the file's name.
    pub fn create(file: &CaptureFile, interface: &str) -> io::Result<Self> {
        let out = pcapng::create(&file.path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", file.path.display()))
        })?;
        Ok(Self::new(out, interface, file.limits))
    }
}

impl<W: Write> Capture<W> {
    /// Frames of the interface of this name, written to `out`.
    pub fn new(out: W, interface: &str, limits: Limits) -> Self {
        Self {
            file: pcapng::Capture::new(out, interface, limits),
            room: vec![0; MAX_LARGE_FRAME].into_boxed_slice(),
            state: Ok(()),
        }
    }

    /// Whether it goes on: `Ok(false)` where it has all the frames that it may have.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&mut self) -> io::Result<bool> {
        std::mem::replace(&mut self.state, Ok(()))?;
        Ok(!self.file.is_full())
    }

    /// Writes what there is.
    pub fn flush(&mut self) {
        if self.state.is_ok() {
            self.state = self.file.flush();
        }
    }

    /// Writes the rest.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn finish(self) -> io::Result<()> {
        self.state.and(self.file.finish())
    }
}

impl<W: Write> Watch for Capture<W> {
    fn came(&mut self, frame: &Frame) {
        self.file
            .frame(now(), Direction::Inbound, frame.len(), |to| {
                // As many as there are: they fit.
                let _ = frame.read(0, to);
            });
    }

    fn goes(&mut self, len: usize, build: impl FnOnce(&mut Slot)) -> &[u8] {
        let Self { file, room, .. } = self;
        // A slot is for a frame that a ring takes, which is no longer.
        let room = room.get_mut(..len).unwrap_or(&mut []);
        build(&mut Slot::of(room));
        file.frame(now(), Direction::Outbound, room.len(), |to| {
            if let Some(from) = room.get(..to.len()) {
                to.copy_from_slice(from);
            }
        });
        room
    }

    fn end(&mut self, whole: bool) {
        let settled = self.file.settle(whole);
        if self.state.is_ok() {
            self.state = settled;
        }
    }
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

//! Writes frames of one Ethernet interface as a pcapng file (draft-ietf-opsawg-pcapng): a section header, an interface description, and an enhanced packet block
//! for each frame, little-endian.
//!
//! Who captures must not wait for who reads: what a pipe does not take now stays in memory, up to [`BACKLOG`].

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Most bytes of one frame that are kept, unless somebody says otherwise: all of any frame.
pub const SNAPLEN: u32 = 1 << 18;
/// Bytes that wait for a reader at most.
pub const BACKLOG: usize = 16 << 20;
/// From so many bytes on they are written without being asked for.
const ENOUGH: usize = 64 << 10;

// Sections 4.1 to 4.3 of the draft.
const SECTION_HEADER: u32 = 0x0A0D_0D0A;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1A2B_3C4D;
const END_OF_OPTIONS: u16 = 0;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
/// LINKTYPE_ETHERNET
const ETHERNET: u16 = 1;
/// Times are in units of 10^-9 s.
const NANOSECONDS: u8 = 9;

/// Which way a frame went, seen from the interface (epb_flags, bits 0 and 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It was received.
    Inbound = 1,
    /// It was sent.
    Outbound = 2,
}

/// How much is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of each frame, from its first on.
    pub snaplen: u32,
    /// Frames.
    pub frames: u64,
}

impl Default for Limits {
    /// All of them.
    fn default() -> Self {
        Self {
            snaplen: SNAPLEN,
            frames: u64::MAX,
        }
    }
}

/// Makes the file anew. A pipe without a reader is an error and not a wait, and so is a full one.
pub fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// A capture in progress.
#[derive(Debug)]
pub struct Capture<W> {
    out: W,
    /// Whole blocks that have not been written yet, but for the beginning of the first.
    waiting: Vec<u8>,
    /// Frames of the burst that is not settled: they begin here.
    settled: usize,
    unsettled: u64,
    limits: Limits,
}

impl<W: Write> Capture<W> {
    /// A capture of the interface of this name.
    pub fn new(out: W, interface: &str, limits: Limits) -> Self {
        let mut waiting = Vec::with_capacity(2 * ENOUGH);
        block(&mut waiting, SECTION_HEADER, |out| {
            word(out, BYTE_ORDER);
            // Version 1.0, and a section of unknown length.
            word(out, 1);
            out.extend([0xff; 8]);
            option(out, SHB_USERAPPL, b"vhost-pci");
            option(out, END_OF_OPTIONS, &[]);
        });
        block(&mut waiting, INTERFACE_DESCRIPTION, |out| {
            half(out, ETHERNET);
            half(out, 0);
            word(out, limits.snaplen);
            option(out, IF_NAME, interface.as_bytes());
            option(out, IF_TSRESOL, &[NANOSECONDS]);
            option(out, END_OF_OPTIONS, &[]);
        });
        Self {
            out,
            settled: waiting.len(),
            waiting,
            unsettled: 0,
            limits,
        }
    }

    /// Whether it has all frames that it may have.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.unsettled >= self.limits.frames
    }

    /// Where it is written.
    pub fn get_ref(&self) -> &W {
        &self.out
    }

    /// Adds a frame of `len` bytes, of `time` nanoseconds since 1970; `fill` writes those that are kept. One that is too many is left out.
    pub fn frame(
        &mut self,
        time: u64,
        direction: Direction,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) {
        if self.is_full() {
            return;
        }
        self.unsettled += 1;
        let kept = len.min(self.limits.snaplen as usize);
        let [low, high] = [time & 0xffff_ffff, time >> 32].map(number);
        block(&mut self.waiting, ENHANCED_PACKET, |out| {
            word(out, 0);
            word(out, high);
            word(out, low);
            word(out, number(kept as u64));
            word(out, number(len as u64));
            let at = out.len();
            out.resize(at + kept.next_multiple_of(4), 0);
            if let Some(room) = out.get_mut(at..at + kept) {
                fill(room);
            }
            option(out, EPB_FLAGS, &(direction as u32).to_le_bytes());
            option(out, END_OF_OPTIONS, &[]);
        });
    }

    /// The frames since the last call are whole, or they never were: then they are forgotten. Writes where there is enough to write.
    ///
    /// # Errors
    /// As [`Capture::flush`].
    pub fn settle(&mut self, whole: bool) -> io::Result<()> {
        if whole {
            self.limits.frames -= self.unsettled;
            self.settled = self.waiting.len();
        } else {
            self.waiting.truncate(self.settled);
        }
        self.unsettled = 0;
        match self.settled {
            ..ENOUGH => Ok(()),
            _ => self.flush(),
        }
    }

    /// Writes what is settled, as far as it can be written without waiting.
    ///
    /// # Errors
    /// The file's, or that its reader is too slow: this capture is over then.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut done = 0;
        let written = loop {
            let rest = self.waiting.get(done..self.settled).unwrap_or(&[]);
            if rest.is_empty() {
                break Ok(());
            }
            match self.out.write(rest) {
                Ok(0) => break Err(ErrorKind::WriteZero.into()),
                Ok(len) => done += len,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.waiting.drain(..done);
        self.settled -= done;
        match self.settled {
            BACKLOG.. => Err(io::Error::other("its reader does not keep up")),
            _ => written,
        }
    }

    /// Writes the rest; what a pipe does not take now is lost.
    ///
    /// # Errors
    /// The file's, or that something was lost.
    pub fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        match self.settled {
            0 => Ok(()),
            _ => Err(io::Error::other("its reader does not keep up")),
        }
    }
}

/// A number that is no larger than a field takes: times in halves, and lengths of frames.
fn number(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn half(out: &mut Vec<u8>, value: u16) {
    out.extend(value.to_le_bytes());
}

fn word(out: &mut Vec<u8>, value: u32) {
    out.extend(value.to_le_bytes());
}

/// A block: its type, its length before and behind the body.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    word(out, kind);
    word(out, 0);
    body(out);
    let len = number((out.len() + 4 - start) as u64);
    word(out, len);
    if let Some(field) = out.get_mut(start + 4..start + 8) {
        field.copy_from_slice(&len.to_le_bytes());
    }
}

/// An option, padded to a multiple of four bytes; a value that is too long is cut.
fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    let len = u16::try_from(value.len()).unwrap_or(u16::MAX);
    half(out, code);
    half(out, len);
    out.extend(value.iter().take(len.into()));
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests;

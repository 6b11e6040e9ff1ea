//! The first frames of a workload, as they pass its ports: what a guest that is asked for a capture records and reports (docs/bare-metal.md).
//!
//! A workload that is recorded runs over a link of another type, so that the code of one that is not knows nothing of this.
//!
//! Unsafe code: `Held`, a port that a link has lent, beside what sees its frames.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use guest_driver::port::MAX_LARGE_FRAME;
use guest_driver::watch::{Watch, Watched};
use guest_driver::{Frame, Slot};
use virtqueue::rss;

use crate::frame::End;
use crate::study::windows::Churned;
use crate::workload::{self, Link, Stopped};
use crate::{Outcome, Run};

/// Most frames of a capture.
pub const MAX_FRAMES: usize = 1 << 16;
/// Most bytes of a frame that are kept.
pub const MAX_SNAPLEN: usize = 16 << 10;

/// How much is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Frames of a workload, from its first on, both directions together.
    pub frames: usize,
    /// Bytes of a frame, from its first on.
    pub snaplen: usize,
}

impl Default for Limits {
    /// Nothing.
    fn default() -> Self {
        Self {
            frames: 0,
            snaplen: 1518,
        }
    }
}

/// Bytes in front of those of a frame: le64 ticks, le32 length, le16 how many bytes of it follow, le16 1 where this end sent it.
const HEAD: usize = 16;

/// What is recorded, in one piece: of each frame a head and the bytes that are kept. All its memory is taken at the beginning.
#[derive(Debug)]
pub struct Log {
    limits: Limits,
    bytes: Vec<u8>,
    frames: usize,
    /// How many frames stay, whatever becomes of the present burst, and where the last of them ends.
    settled: (usize, usize),
    /// Frames are built here.
    room: Box<[u8]>,
    now: fn() -> u64,
}

impl Log {
    /// An empty one, with times from this clock; `None` where there is not enough memory.
    #[must_use]
    pub fn new(limits: Limits, now: fn() -> u64) -> Option<Self> {
        let most = HEAD.checked_add(limits.snaplen)?;
        let most = most.checked_mul(limits.frames)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(most).ok()?;
        Some(Self {
            limits,
            bytes,
            frames: 0,
            settled: (0, 0),
            room: vec![0; MAX_LARGE_FRAME].into_boxed_slice(),
            now,
        })
    }

    /// What is recorded.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The record that says where it is; `now` is what the clock shows.
    #[must_use]
    pub fn record(&self, id: u16, tsc_khz: u64) -> CaptureRecord {
        CaptureRecord {
            id,
            frames: self.frames,
            tsc_khz,
            now: (self.now)(),
            at: self.bytes.as_ptr().addr() as u64,
            len: self.bytes.len(),
        }
    }

    /// Adds a frame of `len` bytes; `fill` writes those that are kept.
    fn add(&mut self, sent: bool, len: usize, fill: impl FnOnce(&mut [u8])) {
        if self.frames == self.limits.frames {
            return;
        }
        self.frames += 1;
        let kept = len.min(self.limits.snaplen);
        let low = |number: usize| number as u64;
        let rest = low(len) | low(kept) << 32 | u64::from(sent) << 48;
        self.bytes.extend_from_slice(&(self.now)().to_le_bytes());
        self.bytes.extend_from_slice(&rest.to_le_bytes());
        let start = self.bytes.len();
        self.bytes.resize(start + kept, 0);
        fill(self.bytes.get_mut(start..).unwrap_or(&mut []));
    }
}

impl Watch for Log {
    fn came(&mut self, frame: &Frame) {
        self.add(false, frame.len(), |to| {
            // As many as there are: they fit.
            let _ = frame.read(0, to);
        });
    }

    fn goes(&mut self, len: usize, build: impl FnOnce(&mut Slot)) -> &[u8] {
        let mut room = core::mem::take(&mut self.room);
        // A slot is for a frame that a ring takes, which is no longer.
        let frame = room.get_mut(..len).unwrap_or(&mut []);
        build(&mut Slot::of(frame));
        self.add(true, frame.len(), |to| {
            if let Some(from) = frame.get(..to.len()) {
                to.copy_from_slice(from);
            }
        });
        self.room = room;
        self.room.get(..len).unwrap_or(&[])
    }

    fn end(&mut self, whole: bool) {
        if whole {
            self.settled = (self.frames, self.bytes.len());
        }
        self.frames = self.settled.0;
        self.bytes.truncate(self.settled.1);
    }
}

/// Where the frames of a workload are in the guest's memory: whoever reads the record copies them before the guest goes on. Their times are ticks before `now`.
#[derive(Clone, Copy, Debug)]
pub struct CaptureRecord {
    id: u16,
    frames: usize,
    tsc_khz: u64,
    now: u64,
    at: u64,
    len: usize,
}

impl fmt::Display for CaptureRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            id,
            frames,
            tsc_khz,
            now,
            at,
            len,
        } = self;
        write!(
            f,
            "{{\"record\":\"capture\",\"id\":{id},\"frames\":{frames},\"tsc_khz\":{tsc_khz},\"now\":{now},\"at\":{at},\"len\":{len}}}"
        )
    }
}

/// A port that a link has lent to [`Recorded`].
pub(crate) struct Held<P>(NonNull<P>);

impl<P> Deref for Held<P> {
    type Target = P;

    fn deref(&self) -> &P {
        // SAFETY: it is reached only through what `Recorded` lends, which borrows the link for as long as that is in use: so the port is there, and nobody else
        // uses it. Workloads, which are of this crate, give back what they were lent and exchange it for no other.
        unsafe { self.0.as_ref() }
    }
}

impl<P> DerefMut for Held<P> {
    fn deref_mut(&mut self) -> &mut P {
        // SAFETY: as above.
        unsafe { self.0.as_mut() }
    }
}

/// A link whose frames are recorded.
struct Recorded<'a, L: Link> {
    link: &'a mut L,
    watched: Watched<Held<L::Port>, &'a mut Log>,
}

impl<L: Link> Recorded<'_, L> {
    fn lend(&mut self, pair: usize) -> Option<&mut <Self as Link>::Port> {
        let port = match pair {
            0 => self.link.port(),
            _ => self.link.pair(pair),
        };
        self.watched.port = Held(NonNull::from(port?));
        Some(&mut self.watched)
    }
}

impl<'a, L: Link> Link for Recorded<'a, L> {
    type Port = Watched<Held<L::Port>, &'a mut Log>;

    const CLOCK_EVERY: u32 = L::CLOCK_EVERY;

    fn end(&self) -> End {
        self.link.end()
    }

    fn port(&mut self) -> Option<&mut Self::Port> {
        self.lend(0)
    }

    fn pair(&mut self, index: usize) -> Option<&mut Self::Port> {
        self.lend(index)
    }

    fn use_pairs(&mut self, count: usize) -> bool {
        self.link.use_pairs(count)
    }

    fn steer(&self, headers: &[u8]) -> Option<usize> {
        self.link.steer(headers)
    }

    fn rss(&self) -> Option<rss::Config> {
        self.link.rss()
    }

    fn set_rss(&mut self, config: &rss::Config) -> bool {
        self.link.set_rss(config)
    }

    fn start_flips(&mut self, pairs: usize, hz: u64) -> bool {
        self.link.start_flips(pairs, hz)
    }

    fn end_flips(&mut self) {
        self.link.end_flips();
    }

    fn service(&mut self) {
        self.link.service();
    }

    fn gone(&mut self) -> bool {
        self.link.gone()
    }

    fn called(&mut self) -> bool {
        self.link.called()
    }

    fn sleep(&mut self, until: u64) {
        self.link.sleep(until);
    }

    fn now(&self) -> u64 {
        self.link.now()
    }

    fn ticks_per_ms(&self) -> u64 {
        self.link.ticks_per_ms()
    }

    fn start_churn(&mut self, hz: u64) -> bool {
        self.link.start_churn(hz)
    }

    fn beside(&mut self, now: u64) {
        self.link.beside(now);
    }

    fn end_churn(&mut self) -> Option<Churned> {
        self.link.end_churn()
    }
}

/// As [`workload::attempt`], and records the frames that pass.
#[inline(never)]
pub fn attempt<L: Link>(
    link: &mut L,
    run: &Run,
    outcome: &mut Outcome,
    log: &mut Log,
) -> Result<(), Stopped> {
    let watched = Watched {
        port: Held(NonNull::dangling()),
        watch: log,
    };
    workload::attempt(&mut Recorded { link, watched }, run, outcome)
}

#[cfg(test)]
mod tests;

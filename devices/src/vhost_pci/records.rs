//! The second window: what the guest keeps for others, and what the VMM keeps for the guest (docs/device.md, section 11).
//!
//! * A page that the VMM writes and the guest reads: a generation, which changes before a connection's memory is taken away, and where the rest is.
//! * The record of what is in flight in the front-end's rings, which the driver keeps and the front-end holds on to.
//! * The front-end's dirty log, while there is one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::backend::PAGE;
use crate::host::{Files, Host, Permission, SharedRegion, Window};
use crate::vhost_user::{Inflight, Log};

/// Where the record of what is in flight starts, behind the page, and the log behind that.
const INFLIGHT: u64 = PAGE;
const LOG: u64 = 16 << 20;
const INFLIGHT_LEN: u64 = LOG - INFLIGHT;
/// Bytes of a ring's header in that record, and of an entry for each descriptor: those of packed rings, which have the longer ones. Where each ring's part is
/// aligned to.
const RING_HEADER: u64 = 32;
const RING_ENTRY: u64 = 32;
const RING_ALIGNMENT: u64 = 64;

/// The second window of a device.
pub(super) struct Records {
    window: Arc<dyn Window>,
    size: u64,
    /// Most bytes of a log that are shown.
    log_len: u64,
    host: Arc<dyn Host>,
    page: Arc<File>,
    generation: u64,
}

impl Records {
    /// Nothing but the page, for a device whose window has `window` bytes and whose driver may keep what is in flight, or not.
    pub(super) fn new(host: Arc<dyn Host>, window: u64, inflight: bool) -> io::Result<Self> {
        let log_len = (window / PAGE / 8).max(PAGE);
        let size = (LOG + log_len).next_power_of_two();
        let page = Arc::new(host.shared_memory(PAGE)?);
        let records = Self {
            window: host.window(size, Files::Sealed)?,
            size,
            log_len,
            host,
            page,
            generation: 0,
        };
        let inflight_len = if inflight { INFLIGHT_LEN } else { 0 };
        let fields = [INFLIGHT, inflight_len, LOG, log_len];
        for (at, value) in (8..).step_by(8).zip(fields) {
            records.page.write_all_at(&u64::to_le_bytes(value), at)?;
        }
        let shown = SharedRegion {
            file: records.page.clone(),
            file_offset: 0,
            len: PAGE,
        };
        records.window.map(0, &shown, Permission::READ)?;
        Ok(records)
    }

    /// What is to be placed as the second window, and its size.
    pub(super) fn window(&self) -> (u64, Arc<dyn Window>) {
        (self.size, self.window.clone())
    }

    /// Changes the generation: what the guest reads of the window from now on may not be the front-end's memory.
    pub(super) fn turn(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        // A page of a memfd that is there is written without fail.
        let _ = self.page.write_all_at(&self.generation.to_le_bytes(), 0);
    }

    /// Shows `size` bytes of a file from `offset` on at `at`, where there is room for `most`.
    fn show(&self, at: u64, most: u64, file: &Arc<File>, offset: u64, size: u64) -> io::Result<()> {
        let len = size.min(most).next_multiple_of(PAGE);
        let ends = offset.checked_add(size).and(offset.checked_add(len));
        if size == 0 || !offset.is_multiple_of(PAGE) || ends.is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let region = SharedRegion {
            file: file.clone(),
            file_offset: offset,
            len,
        };
        self.window.map(at, &region, Permission::READ_WRITE)
    }

    /// An area for what is in flight in so many rings, and its description; none where it would be too long.
    pub(super) fn new_inflight(&self, wanted: Inflight) -> io::Result<Option<(Inflight, File)>> {
        let ring = RING_HEADER + RING_ENTRY * u64::from(wanted.queue_size);
        let size = ring.next_multiple_of(RING_ALIGNMENT) * u64::from(wanted.num_queues);
        if size == 0 || size > INFLIGHT_LEN {
            return Ok(None);
        }
        let file = self.host.shared_memory(size.next_multiple_of(PAGE))?;
        let description = Inflight {
            mmap_size: size,
            mmap_offset: 0,
            ..wanted
        };
        Ok(Some((description, file)))
    }

    /// Shows an area for what is in flight in place of the one before. What is in it may come from anybody.
    pub(super) fn set_inflight(&mut self, file: &Arc<File>, area: Inflight) -> io::Result<()> {
        self.take_inflight()?;
        if area.mmap_size > INFLIGHT_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.show(
            INFLIGHT,
            INFLIGHT_LEN,
            file,
            area.mmap_offset,
            area.mmap_size,
        )
    }

    /// Takes it away.
    pub(super) fn take_inflight(&self) -> io::Result<()> {
        self.window.unmap(INFLIGHT, INFLIGHT_LEN)
    }

    /// Shows a log in place of the one before.
    pub(super) fn set_log(&mut self, file: &Arc<File>, log: Log) -> io::Result<()> {
        self.take_log()?;
        // What it has beyond this is for memory that the window cannot show.
        self.show(LOG, self.log_len, file, log.mmap_offset, log.mmap_size)
    }

    /// Takes the log away.
    pub(super) fn take_log(&self) -> io::Result<()> {
        self.window.unmap(LOG, self.log_len)
    }
}

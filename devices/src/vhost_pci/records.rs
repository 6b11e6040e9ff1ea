//! The second window: what the guest keeps for others, and what the VMM keeps for the guest (docs/device.md, section 11).
//!
//! * A page that the VMM writes and the guest reads: a generation, which changes before a connection's memory is taken away, and where the rest is.
//! * The record of what is in flight in the front-end's rings, which the driver keeps and the front-end holds on to.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::backend::PAGE;
use crate::host::{Files, Host, Permission, SharedRegion, Window};
use crate::vhost_user::Inflight;

/// The window's length, and where the record of what is in flight is in it, behind the page.
const SIZE: u64 = 16 << 20;
const INFLIGHT: u64 = PAGE;
const INFLIGHT_LEN: u64 = SIZE - INFLIGHT;
/// Bytes of a ring's header in that record, and of an entry for each descriptor: those of packed rings, which have the longer ones. Where each ring's part is
/// aligned to.
const RING_HEADER: u64 = 32;
const RING_ENTRY: u64 = 32;
const RING_ALIGNMENT: u64 = 64;

/// The second window of a device.
pub(super) struct Records {
    window: Arc<dyn Window>,
    host: Arc<dyn Host>,
    page: Arc<File>,
    generation: u64,
}

impl Records {
    /// Nothing but the page, for a device whose driver may keep what is in flight, or not.
    pub(super) fn new(host: Arc<dyn Host>, inflight: bool) -> io::Result<Self> {
        let page = Arc::new(host.shared_memory(PAGE)?);
        let records = Self {
            window: host.window(SIZE, Files::Sealed)?,
            host,
            page,
            generation: 0,
        };
        let inflight_len = if inflight { INFLIGHT_LEN } else { 0 };
        let fields = [INFLIGHT, inflight_len];
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
        (SIZE, self.window.clone())
    }

    /// Changes the generation: what the guest reads of the window from now on may not be the front-end's memory.
    pub(super) fn turn(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        // A page of a memfd that is there is written without fail.
        let _ = self.page.write_all_at(&self.generation.to_le_bytes(), 0);
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
        let Inflight {
            mmap_size: size,
            mmap_offset: offset,
            ..
        } = area;
        let len = size.min(INFLIGHT_LEN + 1).next_multiple_of(PAGE);
        let ends = offset.checked_add(len).is_some();
        if size == 0 || len > INFLIGHT_LEN || !offset.is_multiple_of(PAGE) || !ends {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let region = SharedRegion {
            file: file.clone(),
            file_offset: offset,
            len,
        };
        self.window.map(INFLIGHT, &region, Permission::READ_WRITE)
    }

    /// Takes it away.
    pub(super) fn take_inflight(&self) -> io::Result<()> {
        self.window.unmap(INFLIGHT, INFLIGHT_LEN)
    }
}

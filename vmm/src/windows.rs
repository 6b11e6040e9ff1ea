//! Windows: parts of a BAR that show other processes' memory.
//!
//! A window has host addresses of its own for all of its length, and memory slots over those parts of it (*chunks* of 64 MiB) where something
//! is or was shown. What the guest sees changes by `mmap` under the slots: KVM follows the host's mappings page by page, so that a map or an unmap
//! costs the same whether 16 or 8192 other mappings are live, and the guest's page tables for everything else stay as they are. (Deleting a slot
//! throws all of them away on most kernels.) Chunks keep a slot's cost, which goes by its length, to where the window is used.
//!
//! An access to a chunk's hole ends KVM_RUN with EFAULT. The vCPU then [hides](Windows::hide) the chunk: without a slot the same
//! access is one to a device, and goes to the BAR's function.
//!
//! What a file's owner has cut off answers a touch in the same way. It is then taken out of the window ([`SlotWindow::settle`]), and is a hole like any other.
#![allow(unsafe_code)] // memory slots over the window's host addresses

mod area;
mod books;
mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use devices::host::{Access, Files, Permission, SharedRegion, Window};
use log::{debug, error};

use self::area::{Area, Copy, copy};
use self::books::{Books, Mapping};
use self::file::{Verdicts, remaining};
use crate::layout::PAGE_SIZE;
use crate::slots::Slots;
use crate::sys::{invalid, lock, size_text};

/// What one memory slot of a window spans.
const CHUNK: u64 = 64 << 20;
/// Most chunks that a VM's windows have at once: 64 GiB.
pub const MAX_CHUNKS: u32 = 1024;
/// Most mappings that a VM's windows have at once. Each can cost the process two mappings (its own, and the hole behind it), of which Linux allows
/// 65530; the rest of the VMM needs some too.
pub const MAX_MAPPINGS: usize = 28 << 10;
/// Most pages of all-ones in holes of a window.
const MAX_PATCHES: usize = 16;

/// The windows of a VM, for its vCPUs.
pub struct Windows {
    slots: Arc<Slots>,
    all: Mutex<Vec<Weak<SlotWindow>>>,
    /// How many mappings there are.
    live: AtomicUsize,
}

impl Windows {
    /// No windows, whose memory slots will come from `slots`.
    pub fn new(slots: Arc<Slots>) -> Arc<Self> {
        Arc::new(Windows {
            slots,
            all: Mutex::default(),
            live: AtomicUsize::new(0),
        })
    }

    /// A window of `size` bytes, a power of two and at least a page, for `files`, not placed, showing nothing.
    pub fn add(self: &Arc<Self>, size: u64, files: Files) -> io::Result<Arc<SlotWindow>> {
        if !size.is_power_of_two() || size < PAGE_SIZE {
            return Err(invalid(format!(
                "a window of {size:#x} bytes: it must be a power of two, at least {PAGE_SIZE:#x}"
            )));
        }
        let window = Arc::new(SlotWindow {
            windows: Arc::clone(self),
            size,
            files,
            area: Area::new(size)?,
            state: Mutex::default(),
        });
        let mut all = lock(&self.all);
        all.retain(|window| window.strong_count() > 0);
        all.push(Arc::downgrade(&window));
        Ok(window)
    }

    fn all(&self) -> Vec<Arc<SlotWindow>> {
        lock(&self.all).iter().filter_map(Weak::upgrade).collect()
    }

    /// The window that shows itself at `gpa`, and the offset in it.
    pub(crate) fn find(&self, gpa: u64) -> Option<(Arc<SlotWindow>, u64)> {
        self.all().into_iter().find_map(|window| {
            let base = lock(&window.state).base?;
            let offset = gpa
                .checked_sub(base)
                .filter(|offset| *offset < window.size)?;
            Some((window, offset))
        })
    }

    /// Takes away the memory slots of the chunks at `addresses` (empty: of all chunks) until `hidden` shows them again. What is in them is
    /// then reached through the BAR's function. Returns whether there was anything that `hidden` did not hide yet.
    pub(crate) fn hide(&self, addresses: &[u64], hidden: &mut Hidden) -> bool {
        let before = hidden.0.len();
        for window in self.all() {
            window.hide(addresses, hidden);
        }
        hidden.0.len() > before
    }
}

/// Chunks that one vCPU has hidden. They are shown again when it is dropped.
#[derive(Default)]
pub(crate) struct Hidden(Vec<(Arc<SlotWindow>, u64)>);

impl Hidden {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Shows all of them again, as far as no other vCPU hides them.
    pub(crate) fn show(&mut self) {
        for (window, index) in self.0.drain(..) {
            window.unhide(index);
        }
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        self.show();
    }
}

/// A window over memory slots.
pub struct SlotWindow {
    windows: Arc<Windows>,
    size: u64,
    files: Files,
    area: Area,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Guest physical address of the BAR.
    base: Option<u64>,
    books: Books,
    /// By offset divided by [`CHUNK`].
    chunks: BTreeMap<u64, Chunk>,
    /// Those of [`State::chunks`] that nothing is mapped in. They stay, because taking a slot away costs the guest its page tables.
    empty: BTreeSet<u64>,
    /// Chunks, whether they exist or not, in whose host addresses something is mapped that should not be: never shown, until
    /// [`Window::clear`] has cleaned them.
    stale: BTreeSet<u64>,
    /// Offsets of pages of all-ones in holes, the oldest first.
    patches: Vec<u64>,
    verdicts: Verdicts,
}

struct Chunk {
    slot: u32,
    shown: bool,
    /// How many mappings that can be read have bytes in it.
    live: usize,
    /// How many vCPUs hide it.
    hiders: u32,
}

impl State {
    fn count(&mut self, offset: u64, len: u64, add: bool) {
        for index in chunks_of(offset, len) {
            if let Some(chunk) = self.chunks.get_mut(&index) {
                chunk.live = match add {
                    true => chunk.live + 1,
                    false => chunk.live.saturating_sub(1),
                };
                match chunk.live {
                    0 => self.empty.insert(index),
                    _ => self.empty.remove(&index),
                };
            }
        }
    }

    fn is_stale(&self, offset: u64, len: u64) -> bool {
        let chunks = chunks_of(offset, len);
        self.stale.range(chunks).next().is_some()
    }

    fn is_shown(&self, offset: u64) -> bool {
        let chunk = self.chunks.get(&(offset / CHUNK));
        chunk.is_some_and(|chunk| chunk.shown)
    }
}

/// The chunks that a range has bytes in; it is not empty and does not overflow.
fn chunks_of(offset: u64, len: u64) -> std::ops::RangeInclusive<u64> {
    offset / CHUNK..=(offset + (len - 1)) / CHUNK
}

impl SlotWindow {
    /// Shows or hides a chunk, as it should be.
    fn refresh(
        &self,
        base: Option<u64>,
        stale: bool,
        index: u64,
        chunk: &mut Chunk,
    ) -> io::Result<()> {
        let base = base.filter(|_| chunk.hiders == 0 && !stale);
        match base {
            Some(base) if !chunk.shown => {
                let offset = index * CHUNK;
                let gpa = base
                    .checked_add(offset)
                    .ok_or_else(|| invalid("the window does not fit the address space"))?;
                let (hva, len) = (self.area.hva(offset), CHUNK.min(self.size));
                // SAFETY: the addresses are reserved as long as the window lives, which takes its slots away when it is dropped;
                // they hold what the guest may reach or nothing.
                unsafe { self.windows.slots.show(chunk.slot, gpa, hva, len) }?;
                chunk.shown = true;
            }
            None if chunk.shown => {
                self.windows.slots.hide(chunk.slot)?;
                chunk.shown = false;
            }
            _ => {}
        }
        Ok(())
    }

    /// [`SlotWindow::refresh`] for all chunks.
    fn refresh_all(&self, state: &mut State) -> io::Result<()> {
        for (index, chunk) in &mut state.chunks {
            self.refresh(state.base, state.stale.contains(index), *index, chunk)?;
        }
        Ok(())
    }

    /// Sees to it that the chunk is there.
    fn need(&self, state: &mut State, index: u64) -> io::Result<()> {
        if let Some(chunk) = state.chunks.get_mut(&index) {
            // One that could not be shown before is tried again.
            return self.refresh(state.base, state.stale.contains(&index), index, chunk);
        }
        let slots = &self.windows.slots;
        let slot = slots.allocate().or_else(|error| {
            self.reclaim(state)?;
            slots.allocate().map_err(|_| error)
        })?;
        let mut chunk = Chunk {
            slot,
            shown: false,
            live: 0,
            hiders: 0,
        };
        if let Err(error) =
            self.refresh(state.base, state.stale.contains(&index), index, &mut chunk)
        {
            slots.release(slot);
            return Err(error);
        }
        state.chunks.insert(index, chunk);
        state.empty.insert(index);
        Ok(())
    }

    /// Gives up a chunk that nothing is mapped in, where there is one.
    fn reclaim(&self, state: &mut State) -> io::Result<()> {
        let idle = |index: &&u64| state.chunks.get(index).is_some_and(|c| c.hiders == 0);
        if let Some(index) = state.empty.iter().find(idle).copied()
            && let Some(chunk) = state.chunks.get_mut(&index)
        {
            self.refresh(None, false, index, chunk)?;
            self.windows.slots.release(chunk.slot);
            state.chunks.remove(&index);
            state.empty.remove(&index);
        }
        Ok(())
    }

    /// Revokes `start..end`, whatever it takes.
    fn revoke(&self, state: &mut State, start: u64, end: u64) {
        let cut = state.books.cut(start, end);
        self.unpatch(state, start, end);
        let Some((first, behind)) = cut.hull() else {
            return;
        };
        let live = &self.windows.live;
        live.fetch_add(cut.left.len(), Ordering::Relaxed);
        let before = live.fetch_sub(cut.removed.len(), Ordering::Relaxed);
        let crowded = before.saturating_sub(cut.removed.len()) > MAX_MAPPINGS;
        let mut reachable = false;
        for (offset, mapping) in cut.removed.iter().filter(|(_, m)| m.readable()) {
            reachable |= mapping.native;
            state.count(*offset, mapping.len, false);
        }
        for (offset, len) in &cut.left {
            if state.books.at(*offset).is_some_and(|(_, m)| m.readable()) {
                state.count(*offset, *len, true);
            }
        }
        if !reachable {
            return;
        }
        let (from, to) = (start.max(first), end.min(behind));
        // A part that is taken out of a mapping makes two of it in the kernel, and of a huge page it cannot be taken at all. The mappings go as a
        // whole then, and the software path serves what is left of them.
        let whole = from == first && to == behind;
        let fits = whole || !crowded;
        if fits && self.area.blank(from, to - from).is_ok() {
            return;
        }
        for (offset, _) in &cut.left {
            if let Some(mapping) = state.books.get_mut(*offset) {
                mapping.native = false;
            }
        }
        self.unpatch(state, first, behind);
        if let Err(error) = self.area.blank(first, behind - first) {
            error!(
                "a window's memory cannot be taken away ({error}); the guest loses the memory slots around it"
            );
            self.withdraw(state, first, behind);
        }
    }

    /// Takes the slots away from the chunks that have bytes in the range, until the window is cleared. Where not even that can be done, the process
    /// ends: what a peer has taken back must not stay reachable.
    fn withdraw(&self, state: &mut State, start: u64, end: u64) {
        for index in chunks_of(start, end - start) {
            state.stale.insert(index);
            if let Some(chunk) = state.chunks.get_mut(&index)
                && let Err(error) = self.refresh(None, true, index, chunk)
            {
                error!("a peer's memory cannot be taken away from the guest: {error}");
                std::process::abort();
            }
        }
    }

    /// Takes out of the window what the owners of files have cut off of the mappings in `len` bytes from `offset` on. With `whole`, which is for who has met
    /// what is not there too often, all of those that could be cut off goes.
    pub(crate) fn settle(&self, offset: u64, len: u64, whole: bool) {
        self.settle_in(&mut lock(&self.state), offset, len, whole);
    }

    fn settle_in(&self, state: &mut State, offset: u64, len: u64, whole: bool) {
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let Some((start, mapping)) = state.books.at(at) else {
                return;
            };
            let behind = start + mapping.len;
            if !mapping.sealed {
                let Mapping {
                    file,
                    file_offset,
                    len,
                    page,
                    ..
                } = mapping;
                let left = match whole {
                    true => 0,
                    // Who cannot tell has nothing to show.
                    false => remaining(file, *file_offset, *len, *page).unwrap_or(0),
                };
                if left < *len {
                    debug!(
                        "a peer's file was cut off: {left:#x} of {len:#x} bytes at offset {start:#x} are left"
                    );
                    self.revoke(state, start + left, behind);
                }
            }
            at = behind;
        }
    }

    /// Takes the pages of all-ones in the range away.
    fn unpatch(&self, state: &mut State, start: u64, end: u64) {
        state.patches.retain(|offset| {
            let inside = (start..end).contains(offset);
            if inside && let Err(error) = self.area.blank(*offset, PAGE_SIZE) {
                debug!("a page of all-ones stays at offset {offset:#x}: {error}");
            }
            !inside
        });
    }

    /// Lets the guest read all-ones natively in the page at `offset`, where nothing is mapped that it may read: `Some(true)`, until
    /// [`SlotWindow::remove_patch`] or a change of the window there. Such pages are few, and the oldest goes first. `Some(false)` where the guest can read
    /// what is mapped there, `None` where it can read neither.
    pub(crate) fn patch(&self, offset: u64) -> Option<bool> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let page = offset - offset % PAGE_SIZE;
        if let Some((_, mapping)) = state.books.at(page).filter(|(_, m)| m.readable()) {
            return (mapping.native && state.is_shown(page)).then_some(false);
        }
        if page >= self.size || state.is_stale(page, PAGE_SIZE) {
            return None;
        }
        if !state.patches.contains(&page) {
            if state.patches.len() >= MAX_PATCHES
                && let Some(oldest) = state.patches.first().copied()
            {
                self.unpatch(state, oldest, oldest + PAGE_SIZE);
            }
            if let Err(error) = self.area.ones(page, PAGE_SIZE) {
                debug!("no page of all-ones at offset {page:#x}: {error}");
                return None;
            }
            state.patches.push(page);
        }
        self.need(state, page / CHUNK).ok()?;
        state.is_shown(page).then_some(true)
    }

    /// Takes a page of all-ones away again.
    pub(crate) fn remove_patch(&self, offset: u64) {
        let page = offset - offset % PAGE_SIZE;
        self.unpatch(&mut lock(&self.state), page, page + PAGE_SIZE);
    }

    /// Whether an access to the page at `offset` goes through without the software path.
    pub(crate) fn is_native(&self, offset: u64, access: Access) -> bool {
        let state = lock(&self.state);
        state.is_shown(offset)
            && state
                .books
                .at(offset)
                .is_some_and(|(_, m)| m.native && m.readable() && m.permission.allows(access))
    }

    /// Whether what is mapped at `offset` allows the access.
    pub(crate) fn allows(&self, offset: u64, access: Access) -> bool {
        let state = lock(&self.state);
        let mapping = state.books.at(offset);
        mapping.is_some_and(|(_, m)| m.permission.allows(access))
    }

    fn hide(self: &Arc<Self>, addresses: &[u64], hidden: &mut Hidden) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let Some(base) = state.base else {
            return;
        };
        for (index, chunk) in &mut state.chunks {
            let start = base + index * CHUNK;
            let wanted = addresses.is_empty()
                || addresses
                    .iter()
                    .any(|gpa| gpa.checked_sub(start).is_some_and(|o| o < CHUNK));
            let already =
                |(window, at): &(Arc<Self>, u64)| Arc::ptr_eq(window, self) && at == index;
            if !wanted || hidden.0.iter().any(already) {
                continue;
            }
            chunk.hiders += 1;
            match self.refresh(state.base, state.stale.contains(index), *index, chunk) {
                Ok(()) => hidden.0.push((Arc::clone(self), *index)),
                Err(error) => {
                    debug!("a chunk of a window cannot be hidden: {error}");
                    chunk.hiders -= 1;
                }
            }
        }
    }

    fn unhide(&self, index: u64) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if let Some(chunk) = state.chunks.get_mut(&index) {
            chunk.hiders = chunk.hiders.saturating_sub(1);
            let stale = state.stale.contains(&index);
            if let Err(error) = self.refresh(state.base, stale, index, chunk) {
                // What is mapped there is reached through the BAR's function, until the next map tries again.
                error!("a chunk of a window cannot be shown again: {error}");
            }
        }
    }

    fn checked(&self, offset: u64, region: &SharedRegion) -> io::Result<u64> {
        let len = region.len;
        if len == 0
            || !offset.is_multiple_of(PAGE_SIZE)
            || !len.is_multiple_of(PAGE_SIZE)
            || !region.file_offset.is_multiple_of(PAGE_SIZE)
        {
            return Err(invalid(format!(
                "a mapping of {len:#x} bytes at offset {offset:#x} from file offset {:#x}: all three must be multiples of the page size, and the length not zero",
                region.file_offset
            )));
        }
        offset.checked_add(len).filter(|end| *end <= self.size).ok_or_else(|| {
            invalid(format!("a mapping of {len:#x} bytes at offset {offset:#x} lies beyond the window of {}", size_text(self.size)))
        })
    }
}

impl Window for SlotWindow {
    fn place(&self, gpa: Option<u64>) -> io::Result<()> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if state.base == gpa {
            return Ok(());
        }
        if let Some(base) = gpa {
            if !base.is_multiple_of(PAGE_SIZE) {
                return Err(invalid(format!(
                    "a window cannot lie at {base:#x}: it is not page aligned"
                )));
            }
            base.checked_add(self.size - 1).ok_or_else(|| {
                invalid(format!(
                    "a window of {:#x} bytes at {base:#x} passes the end of the address space",
                    self.size
                ))
            })?;
        }
        state.base = None;
        self.refresh_all(state)?;
        state.base = gpa;
        let result = self.refresh_all(state);
        if result.is_err() {
            state.base = None;
            self.refresh_all(state)?;
        }
        result
    }

    fn map(&self, offset: u64, region: &SharedRegion, permission: Permission) -> io::Result<()> {
        let end = self.checked(offset, region)?;
        let len = region.len;
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if let Some((at, before)) = state.books.overlap(offset, end) {
            return Err(invalid(format!(
                "a mapping of {len:#x} bytes at offset {offset:#x} overlaps the one of {:#x} bytes at {at:#x}",
                before.len
            )));
        }
        if self.windows.live.load(Ordering::Relaxed) >= MAX_MAPPINGS {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("the VM's windows have {MAX_MAPPINGS} mappings already, which is the most"),
            ));
        }
        let facts = state
            .verdicts
            .check(self.files, &region.file, region.file_offset, len)?;
        let mut mapping = Mapping {
            file: Arc::clone(&region.file),
            file_offset: region.file_offset,
            len,
            permission,
            page: facts.page,
            sealed: facts.sealed,
            native: true,
        };
        if mapping.readable() {
            for index in chunks_of(offset, len) {
                self.need(state, index)?;
            }
            self.unpatch(state, offset, end);
            mapping.native = !state.is_stale(offset, len);
            if mapping.native
                && let Err(error) =
                    self.area
                        .map(offset, len, &region.file, region.file_offset, permission)
            {
                if error.kind() == io::ErrorKind::OutOfMemory {
                    // Some kernels have taken down by now what was there, and anything of this process may come to lie there.
                    self.withdraw(state, offset, end);
                }
                return Err(error);
            }
            state.count(offset, len, true);
        }
        state.books.insert(offset, mapping);
        self.windows.live.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn unmap(&self, offset: u64, len: u64) -> io::Result<()> {
        if !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(invalid(format!(
                "{len:#x} bytes at offset {offset:#x} are no whole pages"
            )));
        }
        let end = offset.saturating_add(len).min(self.size);
        if offset < end {
            self.revoke(&mut lock(&self.state), offset, end);
        }
        Ok(())
    }

    fn clear(&self) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let cut = state.books.cut(0, self.size);
        self.windows
            .live
            .fetch_sub(cut.removed.len(), Ordering::Relaxed);
        let dirty = !cut.removed.is_empty() || !state.patches.is_empty() || !state.stale.is_empty();
        state.patches.clear();
        if dirty {
            match self.area.blank(0, self.size) {
                Ok(()) => state.stale.clear(),
                Err(error) => {
                    error!("a window's memory cannot be taken away ({error})");
                    self.withdraw(state, 0, self.size);
                }
            }
        }
        let slots = &self.windows.slots;
        state.chunks.retain(|index, chunk| {
            chunk.live = 0;
            // One that a vCPU hides is needed to count it; one whose slot stays shows nothing.
            let gone = chunk.hiders == 0 && self.refresh(None, false, *index, chunk).is_ok();
            if gone {
                slots.release(chunk.slot);
            }
            !gone
        });
        state.empty = state.chunks.keys().copied().collect();
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let mut state = lock(&self.state);
        self.settle_in(&mut state, offset, data.len() as u64, false);
        let Some(pieces) = state.books.pieces(offset, data.len() as u64, Access::Read) else {
            return false;
        };
        let mut rest = data;
        for piece in &pieces {
            let Some((part, behind)) = usize::try_from(piece.len)
                .ok()
                .and_then(|len| rest.split_at_mut_checked(len))
            else {
                return false;
            };
            if let Err(error) = copy(piece, Copy::Read(part)) {
                debug!("a peer's memory cannot be read: {error}");
                return false;
            }
            rest = behind;
        }
        true
    }

    // The lock is held while the bytes are copied: an unmap that comes later returns later.
    fn write(&self, offset: u64, data: &[u8]) -> bool {
        let mut state = lock(&self.state);
        self.settle_in(&mut state, offset, data.len() as u64, false);
        let Some(pieces) = state.books.pieces(offset, data.len() as u64, Access::Write) else {
            return false;
        };
        let mut rest = data;
        for piece in &pieces {
            let Some((part, behind)) = usize::try_from(piece.len)
                .ok()
                .and_then(|len| rest.split_at_checked(len))
            else {
                return false;
            };
            if let Err(error) = copy(piece, Copy::Write(part)) {
                debug!("a peer's memory cannot be written: {error}");
                return false;
            }
            rest = behind;
        }
        true
    }
}

impl Drop for SlotWindow {
    fn drop(&mut self) {
        self.clear();
        // The host addresses go next. A slot that KVM has kept would show whatever comes to lie there.
        if lock(&self.state).chunks.values().any(|chunk| chunk.shown) {
            error!("a window's memory slot cannot be taken away");
            std::process::abort();
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz_body;
#[cfg(test)]
mod measure;
#[cfg(test)]
mod tests;

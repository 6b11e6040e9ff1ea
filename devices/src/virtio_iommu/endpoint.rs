//! What lies between the vIOMMU and one device behind it: the mappings that hold for the device, and their changes.
//!
//! The IOMMU's side adds and removes mappings. A device that hands its address space on to another process *follows* the endpoint: it is given
//! each change, carries it out there, and says so with [`Endpoint::done`]; the IOMMU completes the guest's request only then. A device
//! that nobody follows (or that uses [`Endpoint::translate`] itself) is done at once.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::host::{Access, Permission};
use crate::virtio::event;

/// Most faults that wait for the IOMMU; what comes beyond is counted only.
const MAX_FAULTS: usize = 64;

/// Where a range of a device's addresses leads. All three numbers are in bytes, whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Device address of the first byte.
    pub iova: u64,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length, not zero; neither range overflows.
    pub len: u64,
    /// What the device may do there.
    pub permission: Permission,
}

impl Mapping {
    /// The last byte.
    fn last(&self) -> u64 {
        self.iova + (self.len - 1)
    }
}

/// A change that a follower has to carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A mapping is there; it overlaps no other.
    Map(Mapping),
    /// What is mapped in this range is gone: whole mappings.
    Unmap {
        /// The first device address.
        iova: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// An access of the device that no mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Its device address.
    pub iova: u64,
    /// What it does.
    pub access: Access,
    /// Whether a mapping is there that does not allow it.
    pub mapped: bool,
}

#[derive(Default)]
struct State {
    /// By device address; they do not overlap.
    mappings: BTreeMap<u64, Mapping>,
    following: bool,
    /// With the number of each.
    changes: VecDeque<(u64, Change)>,
    /// The number of the last change.
    issued: u64,
    /// All changes up to this one are done.
    done: u64,
    faults: VecDeque<Fault>,
    faults_lost: u64,
}

impl State {
    fn lookup(&self, iova: u64) -> Option<Mapping> {
        let (_, mapping) = self.mappings.range(..=iova).next_back()?;
        (iova <= mapping.last()).then_some(*mapping)
    }
}

/// One device behind the IOMMU.
pub struct Endpoint {
    state: Mutex<State>,
    changed: EventFd,
    attention: EventFd,
}

impl Endpoint {
    /// A device that reaches nothing. Fails where the host gives no eventfd.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            state: Mutex::default(),
            changed: event::new()?,
            attention: event::new()?,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- the IOMMU's side ----

    /// Signalled when changes are done or a fault waits.
    #[must_use]
    pub fn attention(&self) -> &EventFd {
        &self.attention
    }

    /// Adds a mapping, which overlaps no other. Returns the number to ask [`Endpoint::is_done`] for.
    pub fn map(&self, mapping: Mapping) -> u64 {
        let mut state = self.state();
        state.mappings.insert(mapping.iova, mapping);
        self.issue(state, Change::Map(mapping))
    }

    /// Removes all mappings that lie in the range; the caller sees to it that none lies across its ends. Returns the number to
    /// ask [`Endpoint::is_done`] for.
    pub fn unmap(&self, iova: u64, len: u64) -> u64 {
        let mut state = self.state();
        let last = iova.saturating_add(len.saturating_sub(1));
        while let Some((&first, _)) = state.mappings.range(iova..=last).next() {
            state.mappings.remove(&first);
        }
        self.issue(state, Change::Unmap { iova, len })
    }

    fn issue(&self, mut state: MutexGuard<'_, State>, change: Change) -> u64 {
        state.issued += 1;
        let number = state.issued;
        if state.following {
            state.changes.push_back((number, change));
            drop(state);
            event::signal(&self.changed);
        } else {
            state.done = number;
        }
        number
    }

    /// Whether the change of this number, and with it all before, has taken effect wherever the device's address space was handed on to.
    #[must_use]
    pub fn is_done(&self, number: u64) -> bool {
        self.state().done >= number
    }

    /// How many changes have been asked for and are not done.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        let state = self.state();
        state.issued - state.done
    }

    /// The next fault to report, and how many were lost before it.
    pub fn take_fault(&self) -> Option<(Fault, u64)> {
        let mut state = self.state();
        let fault = state.faults.pop_front()?;
        Some((fault, std::mem::take(&mut state.faults_lost)))
    }

    // ---- the device's side ----

    /// Signalled when there is a change to carry out.
    #[must_use]
    pub fn changed(&self) -> &EventFd {
        &self.changed
    }

    /// From now on, changes are queued for the device. What is mapped already comes first, as changes that nobody waits for. A follower
    /// that begins anew says [`Endpoint::unfollow`] first: what it had not carried out is forgotten here.
    pub fn follow(&self) {
        let mut state = self.state();
        let State {
            mappings, changes, ..
        } = &mut *state;
        changes.clear();
        changes.extend(mappings.values().map(|&mapping| (0, Change::Map(mapping))));
        state.done = state.issued;
        state.following = true;
        drop(state);
        event::signal(&self.changed);
        event::signal(&self.attention);
    }

    /// Nobody else has the device's address space any more: everything is done.
    pub fn unfollow(&self) {
        let mut state = self.state();
        state.following = false;
        state.changes.clear();
        state.done = state.issued;
        drop(state);
        event::signal(&self.attention);
    }

    /// The next change to carry out, with its number for [`Endpoint::done`].
    pub fn next_change(&self) -> Option<(u64, Change)> {
        self.state().changes.pop_front()
    }

    /// The change of this number has taken effect, and all before.
    pub fn done(&self, number: u64) {
        let mut state = self.state();
        if number > state.done && number <= state.issued {
            state.done = number;
            drop(state);
            event::signal(&self.attention);
        }
    }

    /// The mapping that an address lies in.
    #[must_use]
    pub fn lookup(&self, iova: u64) -> Option<Mapping> {
        self.state().lookup(iova)
    }

    /// The guest physical address of `len` bytes (not zero) that the device may access so, in one piece; `None` where they are not mapped, not for this, or in
    /// pieces.
    #[must_use]
    pub fn translate(&self, iova: u64, len: u64, access: Access) -> Option<u64> {
        let last = iova.checked_add(len.checked_sub(1)?)?;
        // One lock for all pieces: they are what is mapped at one time.
        let state = self.state();
        let mut next = state.lookup(iova)?;
        let gpa = next.gpa + (iova - next.iova);
        loop {
            if !next.permission.allows(access)
                || next.gpa.wrapping_sub(next.iova) != gpa.wrapping_sub(iova)
            {
                return None;
            }
            if last <= next.last() {
                return Some(gpa);
            }
            next = state.lookup(next.last() + 1)?;
        }
    }

    /// The device was refused an access.
    pub fn report(&self, iova: u64, access: Access) {
        let mut state = self.state();
        let mapped = state.lookup(iova).is_some();
        if state.faults.len() < MAX_FAULTS {
            state.faults.push_back(Fault {
                iova,
                access,
                mapped,
            });
        } else {
            state.faults_lost += 1;
        }
        drop(state);
        event::signal(&self.attention);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(iova: u64, gpa: u64, len: u64) -> Mapping {
        Mapping {
            iova,
            gpa,
            len,
            permission: Permission::READ_WRITE,
        }
    }

    #[test]
    fn a_change_is_done_when_the_follower_says_so_and_at_once_where_nobody_follows() {
        let endpoint = Endpoint::new().unwrap();
        let alone = endpoint.map(mapping(0x1000, 0x5000, 0x1000));
        assert!(endpoint.is_done(alone));
        endpoint.follow();
        assert_eq!(
            endpoint.next_change(),
            Some((0, Change::Map(mapping(0x1000, 0x5000, 0x1000))))
        );
        let first = endpoint.map(mapping(0x2000, 0x9000, 0x1000));
        let second = endpoint.unmap(0x1000, 0x1000);
        assert!(!endpoint.is_done(first));
        endpoint.done(first);
        assert!(endpoint.is_done(first) && !endpoint.is_done(second));
        endpoint.unfollow();
        assert!(endpoint.is_done(second));
        assert_eq!(endpoint.next_change(), None);
    }

    /// The IOMMU on one thread, a follower that comes and goes on another.
    #[test]
    fn what_an_unmap_that_is_done_took_away_is_not_handed_on_by_anyone() {
        use std::collections::BTreeSet;
        use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
        let endpoint = Endpoint::new().unwrap();
        let handed_on = Mutex::new(BTreeSet::new());
        let (carried_out, connections) = (AtomicU32::new(0), AtomicU32::new(0));
        let end = AtomicBool::new(false);
        let follower = || {
            while !end.load(Ordering::Acquire) {
                endpoint.follow();
                for n in 0..100 {
                    let Some((number, change)) = endpoint.next_change() else {
                        std::thread::yield_now();
                        continue;
                    };
                    let mut there = handed_on.lock().unwrap();
                    match change {
                        Change::Map(mapping) => assert!(there.insert(mapping.iova)),
                        Change::Unmap { iova, .. } => assert!(there.remove(&iova)),
                    }
                    drop(there);
                    carried_out.fetch_add(1, Ordering::Relaxed);
                    endpoint.done(number);
                    // The unmap of it is then what the end of the connection completes.
                    if n > 50 && matches!(change, Change::Map(_)) {
                        break;
                    }
                }
                // As when the connection is closed: first it is gone, then nobody waits for it.
                handed_on.lock().unwrap().clear();
                endpoint.unfollow();
                connections.fetch_add(1, Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            let follower = scope.spawn(follower);
            let (mut rounds, mut left_over) = (0, false);
            // Until both have really met; a follower that panics ends it too.
            while !follower.is_finished()
                && (carried_out.load(Ordering::Relaxed) < 3000
                    || connections.load(Ordering::Relaxed) < 10)
            {
                let iova = rounds % 7 * 0x1000;
                rounds += 1;
                endpoint.map(mapping(iova, 0, 0x1000));
                let number = endpoint.unmap(iova, 0x1000);
                while !endpoint.is_done(number) && !follower.is_finished() {
                    std::thread::yield_now();
                }
                left_over = handed_on.lock().unwrap().contains(&iova);
                if left_over {
                    break;
                }
            }
            // First the other thread ends: a failure is not to be a standstill.
            end.store(true, Ordering::Release);
            follower.join().unwrap();
            assert!(!left_over, "after {rounds} rounds");
        });
    }

    #[test]
    fn a_number_that_was_never_issued_does_not_complete_what_comes() {
        let endpoint = Endpoint::new().unwrap();
        endpoint.follow();
        endpoint.done(u64::MAX);
        let number = endpoint.map(mapping(0, 0, 0x1000));
        assert!(!endpoint.is_done(number));
    }

    #[test]
    fn a_translation_goes_across_mappings_that_join_and_ends_where_they_do_not() {
        let endpoint = Endpoint::new().unwrap();
        endpoint.map(mapping(0x1000, 0x5000, 0x1000));
        endpoint.map(mapping(0x2000, 0x6000, 0x1000));
        endpoint.map(mapping(0x3000, 0x1000, 0x1000));
        let translate = |iova, len| endpoint.translate(iova, len, Access::Write);
        assert_eq!(translate(0x1ff8, 16), Some(0x5ff8));
        assert_eq!(translate(0x2ff8, 16), None);
        assert_eq!(translate(0x3ff8, 16), None);
        assert_eq!(translate(0xfff, 1), None);
        assert_eq!(translate(0x1000, 0), None);
        assert_eq!(translate(u64::MAX, 2), None);
    }

    #[test]
    fn faults_are_kept_up_to_a_bound_and_counted_beyond() {
        let endpoint = Endpoint::new().unwrap();
        for n in 0..MAX_FAULTS as u64 + 3 {
            endpoint.report(n, Access::Read);
        }
        assert_eq!(
            endpoint.take_fault().map(|(f, lost)| (f.iova, lost)),
            Some((0, 3))
        );
        let rest = std::iter::from_fn(|| endpoint.take_fault()).count();
        assert_eq!(rest, MAX_FAULTS - 1);
    }
}

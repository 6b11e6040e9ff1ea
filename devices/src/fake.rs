//! A machine for tests: it records what devices ask of it, and delivers interrupts and doorbells on request.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempfile::TempFile;

use crate::host::{
    Access, Files, Host, Interrupt, MemoryRegion, MsiMessage, Permission, SharedRegion, Window,
};
use crate::virtio::event;

/// Size of the guest memory, which starts at address 0.
pub(crate) const MEMORY_SIZE: u64 = 16 << 20;

/// What a device did, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The window was put at an address or taken off the bus.
    Placed(Option<u64>),
    /// A region (offset, length) was shown.
    Mapped(u64, u64),
    /// The region at this offset was taken away.
    Unmapped(u64),
    /// Everything was taken away.
    Cleared,
    /// A doorbell appeared at an address.
    DoorbellAdded(u64),
    /// A doorbell left an address.
    DoorbellRemoved(u64),
    /// A test's own mark.
    Note(&'static str),
}

#[derive(Clone, Default)]
pub(crate) struct EventLog(Arc<Mutex<Vec<Event>>>);

impl EventLog {
    pub(crate) fn push(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
    /// What was recorded since the last call.
    pub(crate) fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

fn check_eventfd(event: &EventFd) -> io::Result<()> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", event.as_raw_fd()))?;
    if link.to_string_lossy() == "anon_inode:[eventfd]" {
        Ok(())
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

#[derive(Default)]
struct InterruptState {
    message: Option<MsiMessage>,
    sources: Vec<Arc<EventFd>>,
    triggered: bool,
}

/// An interrupt that is delivered when the test polls it.
#[derive(Default)]
pub(crate) struct FakeInterrupt(Mutex<InterruptState>);

impl FakeInterrupt {
    /// Delivers what is pending; returns the message if one was delivered.
    pub(crate) fn poll(&self) -> Option<MsiMessage> {
        let mut state = self.0.lock().unwrap();
        let message = state.message?;
        let mut raised = std::mem::take(&mut state.triggered);
        for source in &state.sources {
            raised |= event::is_signalled(source);
            event::clear(source);
        }
        raised.then_some(message)
    }
    /// How many eventfds can raise it.
    pub(crate) fn sources(&self) -> usize {
        self.0.lock().unwrap().sources.len()
    }
}

impl Interrupt for FakeInterrupt {
    fn set_message(&self, message: Option<MsiMessage>) -> io::Result<()> {
        self.0.lock().unwrap().message = message;
        Ok(())
    }
    fn attach(&self, source: &Arc<EventFd>) -> io::Result<()> {
        check_eventfd(source)?;
        let mut state = self.0.lock().unwrap();
        assert!(
            !state.sources.iter().any(|s| Arc::ptr_eq(s, source)),
            "attached twice"
        );
        state.sources.push(source.clone());
        Ok(())
    }
    fn detach(&self, source: &Arc<EventFd>) {
        self.0
            .lock()
            .unwrap()
            .sources
            .retain(|s| !Arc::ptr_eq(s, source));
    }
    fn trigger(&self) {
        self.0.lock().unwrap().triggered = true;
    }
    fn pending(&self) -> bool {
        let state = self.0.lock().unwrap();
        state.message.is_none()
            && (state.triggered || state.sources.iter().any(|s| event::is_signalled(s)))
    }
}

/// A window that keeps the books of a real one.
pub(crate) struct FakeWindow {
    size: u64,
    placed: Mutex<Option<u64>>,
    mapped: Mutex<BTreeMap<u64, (SharedRegion, Permission)>>,
    /// The next `map` fails, as it does for a file without seals.
    pub(crate) refuse_next_map: AtomicBool,
    log: EventLog,
}

impl FakeWindow {
    pub(crate) fn placed(&self) -> Option<u64> {
        *self.placed.lock().unwrap()
    }
    /// (offset, length, offset in the file, accesses) of everything shown.
    pub(crate) fn details(&self) -> Vec<(u64, u64, u64, Permission)> {
        self.mapped
            .lock()
            .unwrap()
            .iter()
            .map(|(offset, (r, permission))| (*offset, r.len, r.file_offset, *permission))
            .collect()
    }
    /// (offset, length) of everything shown.
    pub(crate) fn shown(&self) -> Vec<(u64, u64)> {
        self.mapped
            .lock()
            .unwrap()
            .iter()
            .map(|(offset, (region, _))| (*offset, region.len))
            .collect()
    }
}

impl FakeWindow {
    /// The file that each of `len` bytes lies in, and where.
    fn reach(&self, offset: u64, len: usize, access: Access) -> Option<Vec<(Arc<File>, u64)>> {
        let mapped = self.mapped.lock().unwrap();
        let byte = |at: u64| {
            let (start, (region, permission)) = mapped.range(..=at).next_back()?;
            let inside = at - start;
            let fits = inside < region.len && permission.allows(access);
            fits.then(|| (region.file.clone(), region.file_offset + inside))
        };
        (offset..).take(len).map(byte).collect()
    }
}

impl Window for FakeWindow {
    fn place(&self, gpa: Option<u64>) -> io::Result<()> {
        *self.placed.lock().unwrap() = gpa;
        self.log.push(Event::Placed(gpa));
        Ok(())
    }
    fn map(&self, offset: u64, region: &SharedRegion, permission: Permission) -> io::Result<()> {
        if self.refuse_next_map.swap(false, Ordering::Relaxed) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = offset
            .checked_add(region.len)
            .filter(|&end| end <= self.size)
            .ok_or_else(invalid)?;
        if region.file.metadata()?.len().next_multiple_of(4096) < region.file_offset + region.len {
            return Err(invalid());
        }
        let mut mapped = self.mapped.lock().unwrap();
        if mapped
            .iter()
            .any(|(&o, (r, _))| o < end && offset < o + r.len)
        {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        mapped.insert(offset, (region.clone(), permission));
        self.log.push(Event::Mapped(offset, region.len));
        Ok(())
    }
    fn unmap(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut mapped = self.mapped.lock().unwrap();
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let touched: Vec<u64> = mapped
            .range(..end)
            .filter(|(o, (r, _))| offset < *o + r.len)
            .map(|(o, _)| *o)
            .collect();
        for at in touched {
            let (region, permission) = mapped.remove(&at).unwrap();
            let behind = at + region.len;
            let mut keep = |from: u64, to: u64| {
                if from < to {
                    let part = SharedRegion {
                        file_offset: region.file_offset + (from - at),
                        len: to - from,
                        ..region.clone()
                    };
                    mapped.insert(from, (part, permission));
                }
            };
            keep(at, offset);
            keep(end, behind);
            self.log.push(Event::Unmapped(at.max(offset)));
        }
        Ok(())
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let reached = self.reach(offset, data.len(), Access::Read);
        reached.is_some_and(|bytes| {
            let mut bytes = bytes.iter().zip(data.chunks_mut(1));
            bytes.all(|((file, at), byte)| file.read_exact_at(byte, *at).is_ok())
        })
    }
    fn write(&self, offset: u64, data: &[u8]) -> bool {
        let reached = self.reach(offset, data.len(), Access::Write);
        reached.is_some_and(|bytes| {
            let mut bytes = bytes.iter().zip(data.chunks(1));
            bytes.all(|((file, at), byte)| file.write_all_at(byte, *at).is_ok())
        })
    }
    fn clear(&self) {
        self.mapped.lock().unwrap().clear();
        self.log.push(Event::Cleared);
    }
}

/// The machine.
pub(crate) struct FakeHost {
    memory: GuestMemoryMmap,
    regions: Vec<MemoryRegion>,
    doorbells: Mutex<BTreeMap<u64, Arc<EventFd>>>,
    interrupts: Mutex<Vec<Arc<FakeInterrupt>>>,
    windows: Mutex<Vec<Arc<FakeWindow>>>,
    address_bits: u8,
    /// What devices did.
    pub(crate) log: EventLog,
}

impl FakeHost {
    pub(crate) fn new() -> Arc<Self> {
        Self::with_address_bits(46)
    }
    pub(crate) fn with_address_bits(address_bits: u8) -> Arc<Self> {
        // Memory where the host has a file system for that: machines are many, and each one's file is gone soon.
        let shm = Path::new("/dev/shm");
        let file = match shm.is_dir() {
            true => TempFile::new_in(shm),
            false => TempFile::new(),
        };
        let file: File = file.unwrap().into_file();
        file.set_len(MEMORY_SIZE).unwrap();
        let len = usize::try_from(MEMORY_SIZE).unwrap();
        let range = (
            GuestAddress(0),
            len,
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let shared = SharedRegion {
            file: Arc::new(file),
            file_offset: 0,
            len: MEMORY_SIZE,
        };
        Arc::new(Self {
            memory,
            regions: vec![MemoryRegion { gpa: 0, shared }],
            doorbells: Mutex::default(),
            interrupts: Mutex::default(),
            windows: Mutex::default(),
            address_bits,
            log: EventLog::default(),
        })
    }
    /// The interrupts in the order in which they were made.
    pub(crate) fn interrupts(&self) -> Vec<Arc<FakeInterrupt>> {
        self.interrupts.lock().unwrap().clone()
    }
    /// The windows in the order in which they were made.
    pub(crate) fn windows(&self) -> Vec<Arc<FakeWindow>> {
        self.windows.lock().unwrap().clone()
    }
    /// Where doorbells are.
    pub(crate) fn doorbells(&self) -> Vec<u64> {
        self.doorbells.lock().unwrap().keys().copied().collect()
    }
    /// A guest write to `gpa`: whether a doorbell took it.
    pub(crate) fn ring(&self, gpa: u64) -> bool {
        let doorbells = self.doorbells.lock().unwrap();
        doorbells
            .get(&gpa)
            .inspect(|event| event.write(1).unwrap())
            .is_some()
    }
}

impl Host for FakeHost {
    fn interrupt(&self) -> io::Result<Arc<dyn Interrupt>> {
        let interrupt = Arc::new(FakeInterrupt::default());
        self.interrupts.lock().unwrap().push(interrupt.clone());
        Ok(interrupt)
    }
    fn add_doorbell(&self, gpa: u64, event: &Arc<EventFd>) -> io::Result<()> {
        check_eventfd(event)?;
        let mut doorbells = self.doorbells.lock().unwrap();
        if doorbells.contains_key(&gpa) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        doorbells.insert(gpa, event.clone());
        self.log.push(Event::DoorbellAdded(gpa));
        Ok(())
    }
    fn remove_doorbell(&self, gpa: u64, event: &Arc<EventFd>) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        match doorbells.get(&gpa) {
            Some(registered) if Arc::ptr_eq(registered, event) => {
                doorbells.remove(&gpa);
                self.log.push(Event::DoorbellRemoved(gpa));
                Ok(())
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
    fn window(&self, size: u64, _: Files) -> io::Result<Arc<dyn Window>> {
        let window = Arc::new(FakeWindow {
            size,
            placed: Mutex::default(),
            mapped: Mutex::default(),
            refuse_next_map: AtomicBool::new(false),
            log: self.log.clone(),
        });
        self.windows.lock().unwrap().push(window.clone());
        Ok(window)
    }
    fn shared_memory(&self, size: u64) -> io::Result<File> {
        let file = TempFile::new().map_err(io::Error::from)?.into_file();
        file.set_len(size)?;
        Ok(file)
    }
    fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
    fn memory_regions(&self) -> &[MemoryRegion] {
        &self.regions
    }
    fn physical_address_bits(&self) -> u8 {
        self.address_bits
    }
}

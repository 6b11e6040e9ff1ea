//! The file behind a disk, and what reads and writes it on a thread of its own: a disk that is slow, or a flush, keeps nobody else waiting.
//!
//! Jobs are done one after the other in the order in which they come. They carry their data with them: guest memory is touched by the
//! device thread alone, where the IOMMU is.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::error;
use vmm_sys_util::eventfd::EventFd;

use super::{Error, SECTOR};
use crate::virtio::event;

/// How many jobs one call does.
const BUDGET: usize = 16;

/// What is to be done to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Fill the data.
    Read,
    /// Write the data; `durably`: it is on the medium when the job is done.
    Write { durably: bool },
    /// All that was written before is on the medium when the job is done.
    Flush,
}

/// One job, on its way there or back.
#[derive(Debug)]
pub(super) struct Job {
    /// The caller's mark.
    pub(super) tag: u64,
    pub(super) work: Work,
    /// Where in the file, in bytes. It and the data have been checked against the disk's size.
    pub(super) offset: u64,
    pub(super) data: Vec<u8>,
}

/// What came of a job.
pub(super) struct Done {
    pub(super) job: Job,
    pub(super) result: io::Result<()>,
}

/// The disk as the device thread has it.
pub(super) struct Disk {
    jobs: Sender<Job>,
    wake: Arc<EventFd>,
    done: Receiver<Done>,
    ready: Arc<EventFd>,
}

/// The file as its thread has it.
pub(super) struct Worked {
    file: File,
    jobs: Receiver<Job>,
    wake: Arc<EventFd>,
    done: Sender<Done>,
    ready: Arc<EventFd>,
}

/// Opens a file or a block device and locks it against other users. Returns its size in bytes, a multiple of [`SECTOR`].
pub(super) fn open(path: &Path, readonly: bool) -> Result<(File, u64), Error> {
    let open = OpenOptions::new().read(true).write(!readonly).open(path);
    let mut file = open.map_err(Error::Open)?;
    let kind = file.metadata().map_err(Error::Open)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::Kind);
    }
    // That of a block device is not in its metadata.
    let size = file.seek(SeekFrom::End(0)).map_err(Error::Open)?;
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(Error::Size(size));
    }
    let locked = if readonly {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match locked {
        Ok(()) => Ok((file, size)),
        Err(TryLockError::WouldBlock) => Err(Error::InUse),
        Err(TryLockError::Error(error)) => Err(Error::Open(error)),
    }
}

/// Both ends of the way to a file.
pub(super) fn halves(file: File) -> io::Result<(Disk, Worked)> {
    let [wake, ready] = [event::new()?, event::new()?].map(Arc::new);
    let (to_do, jobs) = channel();
    let (finished, done) = channel();
    let disk = Disk {
        jobs: to_do,
        wake: wake.clone(),
        done,
        ready: ready.clone(),
    };
    let worked = Worked {
        file,
        jobs,
        wake,
        done: finished,
        ready,
    };
    Ok((disk, worked))
}

impl Disk {
    /// Signalled when a job is done.
    pub(super) fn ready(&self) -> &EventFd {
        &self.ready
    }

    /// Hands a job over. The caller bounds how many there are.
    pub(super) fn submit(&self, job: Job) {
        // The other half lives as long as the device.
        let _ = self.jobs.send(job);
        event::signal(&self.wake);
    }

    /// The next job that is done.
    pub(super) fn done(&self) -> Option<Done> {
        self.done.try_recv().ok()
    }
}

impl MutEventSubscriber for Worked {
    fn init(&mut self, ops: &mut EventOps) {
        let wake = self.wake.as_raw_fd();
        if let Err(error) = ops.add(Events::with_data_raw(wake, 0, EventSet::IN)) {
            error!("a disk: cannot watch a descriptor: {error}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        event::clear(&self.wake);
        for _ in 0..BUDGET {
            let Ok(mut job) = self.jobs.try_recv() else {
                return;
            };
            let result = carry_out(&self.file, &mut job);
            let _ = self.done.send(Done { job, result });
            event::signal(&self.ready);
        }
        // Not all in one turn: the VM may be ending.
        event::signal(&self.wake);
    }
}

fn carry_out(file: &File, job: &mut Job) -> io::Result<()> {
    let result = match job.work {
        // A file that was cut off meanwhile is an error like any other.
        Work::Read => file.read_exact_at(&mut job.data, job.offset),
        Work::Write { durably } => {
            let written = file.write_all_at(&job.data, job.offset);
            if durably {
                written.and_then(|()| file.sync_data())
            } else {
                written
            }
        }
        Work::Flush => file.sync_data(),
    };
    if result.is_err() && job.work == Work::Read {
        // The guest gets all of it, or nothing.
        job.data.fill(0);
    }
    result
}

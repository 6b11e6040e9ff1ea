//! What a request says (VIRTIO 1.3, section 5.2.6): a header of 16 bytes, the data, and one byte of status behind all else that the device
//! may write. How these lie in buffers is the driver's matter (section 2.7.4).

use vm_memory::GuestMemory;

use super::disk::Work;
use super::{ID_LENGTH, MAX_DATA, SECTOR};
use crate::virtio::Chain;

/// VIRTIO_BLK_T_*.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

/// Length of the header.
const HEADER: usize = 16;

/// VIRTIO_BLK_S_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// The disk, as far as a request is checked against it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// In bytes.
    pub(super) size: u64,
    pub(super) readonly: bool,
    /// A write is complete when it is on the medium.
    pub(super) durably: bool,
}

/// What a request comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Work for the disk: at this byte, with this data or as much room for data.
    Disk(Work, u64, Vec<u8>),
    /// It wants the device's name.
    Id,
    /// It fails at once.
    Fails(Status),
}

impl Request {
    /// Reads a request. `room`: bytes that the device may write in front of the status.
    pub(super) fn parse(
        chain: &Chain,
        room: usize,
        memory: &impl GuestMemory,
        limits: Limits,
    ) -> Self {
        let mut header = [0; HEADER];
        let sent = chain.readable();
        if sent < HEADER || !chain.read(memory, 0, &mut header) {
            return Self::Fails(Status::IoErr);
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes(sector);
        let sent = sent - HEADER;
        match kind {
            IN => match Self::place(sector, room, limits) {
                Some(offset) => Self::Disk(Work::Read, offset, vec![0; room]),
                None => Self::Fails(Status::IoErr),
            },
            OUT if limits.readonly => Self::Fails(Status::IoErr),
            OUT => {
                let Some(offset) = Self::place(sector, sent, limits) else {
                    return Self::Fails(Status::IoErr);
                };
                let mut data = vec![0; sent];
                if !chain.read(memory, HEADER, &mut data) {
                    return Self::Fails(Status::IoErr);
                }
                let durably = limits.durably;
                Self::Disk(Work::Write { durably }, offset, data)
            }
            FLUSH => Self::Disk(Work::Flush, 0, Vec::new()),
            GET_ID if room >= ID_LENGTH => Self::Id,
            GET_ID => Self::Fails(Status::IoErr),
            _ => Self::Fails(Status::Unsupported),
        }
    }

    /// The byte at which `len` bytes from `sector` on lie, where they are whole sectors of the disk and not too many.
    fn place(sector: u64, len: usize, limits: Limits) -> Option<u64> {
        if len > MAX_DATA {
            return None;
        }
        let (offset, len) = (sector.checked_mul(SECTOR)?, len as u64);
        let inside = offset.checked_add(len)? <= limits.size;
        (inside && len.is_multiple_of(SECTOR)).then_some(offset)
    }
}

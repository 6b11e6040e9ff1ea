//! What requests, answers and fault reports look like (VIRTIO 1.3, section 5.13.6). All numbers are little-endian.

use crate::host::{Access, Permission};

/// The addresses at which the processors take message-signalled interrupts: nothing can be mapped there.
pub(super) const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// `probe_size`: room for one RESV_MEM property and for the end of the list.
pub(super) const PROBE_SIZE: usize = 64;
/// Bytes of `struct virtio_iommu_req_tail`: the status, and three that are zero.
pub(super) const TAIL: usize = 4;
/// The most that is read of a request: PROBE is the longest.
pub(super) const MAX_REQUEST: usize = PROBE;
/// Bytes of a fault report.
pub(super) const FAULT: usize = 24;

// Bytes of the device-readable parts, head included.
const HEAD: usize = 4;
const ATTACH: usize = 20;
const DETACH: usize = 20;
const MAP: usize = 36;
const UNMAP: usize = 28;
const PROBE: usize = 72;

const ATTACH_F_BYPASS: u32 = 1;
const MAP_F_READ: u32 = 1;
const MAP_F_WRITE: u32 = 2;

/// VIRTIO_IOMMU_S_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    /// The request cannot be read.
    IoErr = 1,
    Unsupported = 2,
    Invalid = 4,
    Range = 5,
    NoEntry = 6,
    NoMemory = 8,
}

/// A request as the driver wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Attach {
        domain: u32,
        endpoint: u32,
        bypass: bool,
    },
    Detach {
        domain: u32,
        endpoint: u32,
    },
    Map {
        domain: u32,
        first: u64,
        /// The last address, not the one behind.
        last: u64,
        gpa: u64,
        permission: Permission,
    },
    Unmap {
        domain: u32,
        first: u64,
        last: u64,
    },
    Probe {
        endpoint: u32,
    },
}

/// The types that requests are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Attach,
    Detach,
    Map,
    Unmap,
    Probe,
    Unknown,
}

impl Kind {
    /// Of a request, whatever else it says; `None` where it has no whole head.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let (head, _) = bytes.split_first_chunk::<HEAD>()?;
        Some(match head[0] {
            1 => Kind::Attach,
            2 => Kind::Detach,
            3 => Kind::Map,
            4 => Kind::Unmap,
            5 => Kind::Probe,
            _ => Kind::Unknown,
        })
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let (field, _) = bytes.get(offset..)?.split_first_chunk()?;
    Some(u32::from_le_bytes(*field))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let (field, _) = bytes.get(offset..)?.split_first_chunk()?;
    Some(u64::from_le_bytes(*field))
}

impl Request {
    /// Reads a request of this kind. What lies behind it is ignored, one that is too short is invalid.
    pub(super) fn parse(kind: Kind, bytes: &[u8]) -> Result<Self, Status> {
        let word = |offset| u32_at(bytes, offset).ok_or(Status::Invalid);
        let long = |offset| u64_at(bytes, offset).ok_or(Status::Invalid);
        let whole = |len| {
            if bytes.len() >= len {
                Ok(())
            } else {
                Err(Status::Invalid)
            }
        };
        match kind {
            Kind::Attach => {
                whole(ATTACH)?;
                let (flags, reserved) = (word(12)?, word(16)?);
                if flags & !ATTACH_F_BYPASS != 0 || reserved != 0 {
                    return Err(Status::Invalid);
                }
                Ok(Request::Attach {
                    domain: word(4)?,
                    endpoint: word(8)?,
                    bypass: flags & ATTACH_F_BYPASS != 0,
                })
            }
            Kind::Detach => {
                whole(DETACH)?;
                Ok(Request::Detach {
                    domain: word(4)?,
                    endpoint: word(8)?,
                })
            }
            Kind::Map => {
                whole(MAP)?;
                let flags = word(32)?;
                // VIRTIO_IOMMU_F_MMIO is not offered, so its flag is as unknown as the others.
                if flags & !(MAP_F_READ | MAP_F_WRITE) != 0 {
                    return Err(Status::Invalid);
                }
                Ok(Request::Map {
                    domain: word(4)?,
                    first: long(8)?,
                    last: long(16)?,
                    gpa: long(24)?,
                    permission: Permission {
                        read: flags & MAP_F_READ != 0,
                        write: flags & MAP_F_WRITE != 0,
                    },
                })
            }
            Kind::Unmap => {
                whole(UNMAP)?;
                if word(24)? != 0 {
                    return Err(Status::Invalid);
                }
                Ok(Request::Unmap {
                    domain: word(4)?,
                    first: long(8)?,
                    last: long(16)?,
                })
            }
            Kind::Probe => {
                whole(PROBE)?;
                Ok(Request::Probe { endpoint: word(4)? })
            }
            Kind::Unknown => Err(Status::Unsupported),
        }
    }
}

/// The properties of every endpoint: one reserved region, for interrupts.
pub(super) fn properties() -> [u8; PROBE_SIZE] {
    let mut bytes = [0; PROBE_SIZE];
    // VIRTIO_IOMMU_PROBE_T_RESV_MEM and the length behind this header.
    bytes[0..2].copy_from_slice(&1u16.to_le_bytes());
    bytes[2..4].copy_from_slice(&20u16.to_le_bytes());
    // VIRTIO_IOMMU_RESV_MEM_T_MSI.
    bytes[4] = 1;
    bytes[8..16].copy_from_slice(&MSI.0.to_le_bytes());
    bytes[16..24].copy_from_slice(&MSI.1.to_le_bytes());
    bytes
}

/// The report of an access that was refused (section 5.13.6.9).
pub(super) fn fault(endpoint: u32, attached: bool, iova: u64, access: Access) -> [u8; FAULT] {
    // VIRTIO_IOMMU_FAULT_R_MAPPING and R_DOMAIN.
    let reason = if attached { 2 } else { 1 };
    // VIRTIO_IOMMU_FAULT_F_READ, F_WRITE, and F_ADDRESS: `address` is there.
    let access: u32 = match access {
        Access::Read => 1,
        Access::Write => 2,
    };
    let flags = access | 1 << 8;
    let mut bytes = [0; FAULT];
    bytes[0] = reason;
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..12].copy_from_slice(&endpoint.to_le_bytes());
    bytes[16..24].copy_from_slice(&iova.to_le_bytes());
    bytes
}

//! Whether the buffers of a data path are mapped for the device once and for all, or each while the device has it.

use crate::net_port::BUFFER_STRIDE;
use crate::virtio_iommu::{Error, Request, Shared, access, status};

/// Makes buffers reachable for the device and takes them away again. A buffer's number counts from the start of its pool, in steps of [`Mapper::STRIDE`].
pub trait Mapper: Clone {
    /// Bytes from one buffer to the next. Buffers that are mapped one by one need whole pages.
    const STRIDE: usize;
    /// Whether [`Mapper::map`] and [`Mapper::unmap`] have to be called at all.
    const DYNAMIC: bool;

    /// The device may use these buffers from now on. `pool` is the device address of buffer 0.
    fn map(&mut self, pool: u64, buffers: &[u16]) -> Result<(), Error>;
    /// The device cannot reach these buffers any more.
    fn unmap(&mut self, pool: u64, buffers: &[u16]) -> Result<(), Error>;
    /// The device cannot reach any of the first `count` buffers any more, whichever were mapped.
    fn clear(&mut self, pool: u64, count: u16) -> Result<(), Error>;
}

/// The pool is mapped as a whole, or need not be mapped.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fixed;

impl Mapper for Fixed {
    const STRIDE: usize = BUFFER_STRIDE;
    const DYNAMIC: bool = false;

    fn map(&mut self, _pool: u64, _buffers: &[u16]) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&mut self, _pool: u64, _buffers: &[u16]) -> Result<(), Error> {
        Ok(())
    }

    fn clear(&mut self, _pool: u64, _count: u16) -> Result<(), Error> {
        Ok(())
    }
}

/// A page for each buffer, mapped through a virtio-iommu while the device has it.
///
/// Header, frame and indirect table share the page, and it is mapped readable and writable in either direction: what a processor sees through a
/// window cannot be write-only, and a table is read where the frame is written.
#[derive(Clone, Debug)]
pub struct Pages {
    iommu: Shared,
    domain: u32,
    offset: u64,
    at_once: bool,
}

/// Bytes of a page, and the stride of buffers that have one each.
pub const PAGE: u64 = 4096;

impl Pages {
    /// Buffers whose device addresses are their guest physical ones plus `offset`. `at_once`: one notification for all buffers of a call; otherwise each
    /// request is complete before the next is made. `None` where the device cannot map pages of 4 KiB.
    #[must_use]
    pub fn new(iommu: Shared, domain: u32, offset: u64, at_once: bool) -> Option<Self> {
        let granule = iommu.try_borrow().ok()?.config().granule();
        (granule <= PAGE).then_some(Self {
            iommu,
            domain,
            offset,
            at_once,
        })
    }

    fn carry_out(&mut self, mut requests: impl Iterator<Item = Request>) -> Result<(), Error> {
        let mut iommu = self.iommu.try_borrow_mut().map_err(|_| Error::Full)?;
        if self.at_once {
            return refuse(iommu.batch(&mut requests)?);
        }
        for request in requests {
            refuse(iommu.request(&request)?)?;
        }
        Ok(())
    }
}

/// Turns a status that is not OK into an error.
pub(crate) fn refuse(status: u8) -> Result<(), Error> {
    match status {
        status::OK => Ok(()),
        status => Err(Error::Refused(status)),
    }
}

impl Mapper for Pages {
    const STRIDE: usize = 4096;
    const DYNAMIC: bool = true;

    fn map(&mut self, pool: u64, buffers: &[u16]) -> Result<(), Error> {
        let (domain, offset) = (self.domain, self.offset);
        self.carry_out(buffers.iter().map(|&buffer| {
            let iova = pool + u64::from(buffer) * PAGE;
            Request::Map {
                domain,
                iova,
                gpa: iova.wrapping_sub(offset),
                len: PAGE,
                flags: access::READ | access::WRITE,
            }
        }))
    }

    fn unmap(&mut self, pool: u64, buffers: &[u16]) -> Result<(), Error> {
        let domain = self.domain;
        self.carry_out(buffers.iter().map(|&buffer| Request::Unmap {
            domain,
            iova: pool + u64::from(buffer) * PAGE,
            len: PAGE,
        }))
    }

    fn clear(&mut self, pool: u64, count: u16) -> Result<(), Error> {
        let request = Request::Unmap {
            domain: self.domain,
            iova: pool,
            len: u64::from(count) * PAGE,
        };
        self.carry_out(core::iter::once(request))
    }
}

#[cfg(test)]
mod tests;

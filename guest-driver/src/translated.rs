//! A [`Platform`] whose device is behind a virtio-iommu.

use core::cell::Cell;
use core::ptr::NonNull;

use crate::mapper::refuse;
use crate::virtio_iommu::{Error, Request, Shared, access};
use crate::{Dma, Event, MsiMessage, Platform, Vectors};

/// A platform as one device behind an IOMMU sees it: memory for the device is mapped for it before a driver gets it, at a fixed distance from its
/// guest physical address. Without an IOMMU it is the inner platform.
#[derive(Debug)]
pub struct Translated<'a, P> {
    inner: &'a P,
    iommu: Option<Behind>,
    /// The last request that memory could not be had for, and why.
    refused: Cell<Option<Error>>,
}

/// How a device is behind an IOMMU.
#[derive(Clone, Debug)]
pub struct Behind {
    /// The driver of the IOMMU.
    pub iommu: Shared,
    /// The device's endpoint: its PCI function number.
    pub endpoint: u32,
    /// The domain that its mappings are in.
    pub domain: u32,
    /// What is added to a guest physical address to make a device address: whole pages of the IOMMU.
    pub offset: u64,
    /// Whether pools are mapped too. Where they are not, a [`Mapper`](crate::mapper::Mapper) maps their buffers.
    pub map_pools: bool,
}

impl Behind {
    /// Puts the device's endpoint into the domain. Returns the status.
    pub fn attach(&self) -> Result<u8, Error> {
        self.request(&Request::Attach {
            domain: self.domain,
            endpoint: self.endpoint,
        })
    }

    /// Takes the device's endpoint out of the domain. Returns the status.
    pub fn detach(&self) -> Result<u8, Error> {
        self.request(&Request::Detach {
            domain: self.domain,
            endpoint: self.endpoint,
        })
    }

    /// Carries out a request. Returns the status.
    pub fn request(&self, request: &Request) -> Result<u8, Error> {
        let mut iommu = self.iommu.try_borrow_mut().map_err(|_| Error::Full)?;
        iommu.request(request)
    }

    /// Bytes of the IOMMU's smallest page.
    #[must_use]
    pub fn granule(&self) -> u64 {
        self.iommu
            .try_borrow()
            .map_or(4096, |iommu| iommu.config().granule())
    }
}

impl<'a, P: Platform> Translated<'a, P> {
    /// The device's view of a platform.
    pub fn new(inner: &'a P, iommu: Option<Behind>) -> Self {
        Self {
            inner,
            iommu,
            refused: Cell::new(None),
        }
    }

    /// How the device is behind an IOMMU; `None` where it is not.
    #[must_use]
    pub fn behind(&self) -> Option<&Behind> {
        self.iommu.as_ref()
    }

    /// What is added to a guest physical address to make a device address.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.iommu.as_ref().map_or(0, |behind| behind.offset)
    }

    /// Why the IOMMU refused memory the last time since this was asked; `None` where it did not.
    pub fn take_refusal(&self) -> Option<Error> {
        self.refused.take()
    }

    /// Whole pages of the IOMMU, mapped where asked.
    fn pages(&self, behind: &Behind, len: usize, align: usize, map: bool) -> Option<Dma> {
        let granule = behind.granule();
        let page = usize::try_from(granule).ok()?;
        let rounded = len.max(1).checked_next_multiple_of(page)?;
        let inner = self.inner.dma(rounded, align.max(page))?;
        let request = Request::Map {
            domain: behind.domain,
            iova: inner.addr.checked_add(behind.offset)?,
            gpa: inner.addr,
            len: u64::try_from(rounded).ok()?,
            flags: access::READ | access::WRITE,
        };
        let result = if map {
            behind.request(&request).and_then(refuse)
        } else {
            Ok(())
        };
        if let Err(error) = result {
            self.refused.set(Some(error));
            return None;
        }
        Some(Dma {
            addr: inner.addr + behind.offset,
            len,
            ..inner
        })
    }
}

impl<P: Platform> Platform for Translated<'_, P> {
    fn config_read(&self, function: u8, offset: u16) -> u32 {
        self.inner.config_read(function, offset)
    }

    fn config_write(&self, function: u8, offset: u16, value: u32) {
        self.inner.config_write(function, offset, value);
    }

    fn map(&self, addr: u64, len: u64) -> Option<NonNull<u8>> {
        self.inner.map(addr, len)
    }

    fn dma(&self, len: usize, align: usize) -> Option<Dma> {
        match &self.iommu {
            Some(behind) => self.pages(behind, len, align, true),
            None => self.inner.dma(len, align),
        }
    }

    fn pool(&self, len: usize, align: usize) -> Option<Dma> {
        match &self.iommu {
            Some(behind) => self.pages(behind, len, align, behind.map_pools),
            None => self.inner.pool(len, align),
        }
    }

    fn vectors(&self) -> Vectors {
        self.inner.vectors()
    }

    fn message(&self, event: Event) -> MsiMessage {
        self.inner.message(event)
    }
}

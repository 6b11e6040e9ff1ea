//! What the layouts have in common, for users that are generic over them.

use crate::{DeviceRing, DriverRing, Error, Memory, RingConfig};

/// A ring layout: [`split::Split`](crate::split::Split) (VIRTIO 1.3 section 2.7) or [`packed::Packed`](crate::packed::Packed) (section 2.8).
pub trait Layout {
    /// The driver's side (sections 2.7.13 and 2.7.14; 2.8.21 and 2.8.22).
    type Driver<M: Memory>: DriverRing;
    /// The device's side (sections 2.7 and 2.8.12).
    type Device<M: Memory>: DeviceRing;

    /// Alignment in bytes of the descriptor, driver and device area (sections 2.7 and 2.8.10.1).
    const ALIGN: [usize; 3];
    /// The position of a ring that was reset (sections 2.7.6 and 2.7.8: indices start at 0; section 2.8.1: wrap counters start at 1).
    const FRESH: u32;

    /// Bytes of the descriptor, driver and device area of a ring of `size` descriptors; `None` for a size that the layout does not
    /// have (sections 2.7 and 2.8.10.1).
    fn area_sizes(size: u16) -> Option<[usize; 3]>;

    /// The driver's side of a fresh ring, which it initialises (sections 2.7.6 and 2.8.1).
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a size that the layout does not have, and for an area that is not aligned or not in memory.
    fn driver<M: Memory>(memory: M, config: &RingConfig) -> Result<Self::Driver<M>, Error> {
        Self::driver_at(memory, config, Self::FRESH)
    }

    /// The driver's side of a fresh ring, which it initialises so that both sides start at the position `base`, as
    /// [`Layout::device_at`] says. The specification has no such start; vhost-user does.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] as for [`Layout::driver`], and where `base` is no position at which a ring is empty.
    fn driver_at<M: Memory>(
        memory: M,
        config: &RingConfig,
        base: u32,
    ) -> Result<Self::Driver<M>, Error>;

    /// The device's side of a fresh ring (sections 2.7.6 and 2.8.1).
    ///
    /// # Errors
    ///
    /// As for [`Layout::driver`].
    fn device<M: Memory>(memory: M, config: &RingConfig) -> Result<Self::Device<M>, Error>;

    /// The device's side of a ring that goes on at a position that [`DeviceRing::base`] or VHOST_USER_SET_VRING_BASE gave (vhost-user, not VIRTIO).
    /// Split: the next available index (16 bits). Packed: bits 0-14 are the place of the next
    /// available descriptor, bit 15 its wrap counter, bits 16-30 the place of the next used descriptor, bit 31 its wrap counter.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] as for [`Layout::device`], and where `base` is no position.
    fn device_at<M: Memory>(
        memory: M,
        config: &RingConfig,
        base: u32,
    ) -> Result<Self::Device<M>, Error>;
}

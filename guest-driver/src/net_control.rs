//! The control queue of a virtio-net device, driver side (VIRTIO 1.3, section 5.1.6.5).

use virtqueue::linear::Linear;
use virtqueue::net::features;
use virtqueue::packed::Packed;
use virtqueue::rss;
use virtqueue::split::Split;
use virtqueue::{Buffer, DriverRing, Layout, RingConfig, Used};

use crate::port::{Either, Frame, Slot};
use crate::virtio_pci::{Doorbell, Error, Notify, Transport};
use crate::{Dma, Platform};

/// Descriptors of the queue: one command is under way at a time, of two buffers.
const SIZE: u16 = 4;
/// VIRTIO_NET_CTRL_MQ, and its commands (section 5.1.6.5.5): VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_MQ_RSS_CONFIG.
const MQ: u8 = 4;
const VQ_PAIRS_SET: u8 = 0;
const RSS_CONFIG: u8 = 1;
/// Where the device writes its status, behind the command; and how much room both take.
const STATUS: u64 = 384;
const POOL: usize = 448;
const _: () = assert!(2 + rss::MAX_LEN <= 384);
/// No status that there is.
const UNSET: u8 = 0xff;
/// Each look at the device leaves the guest and takes tens of microseconds, so this waits for seconds: a device may have to ask a back-end,
/// and to give up on it.
const LOOKS: u32 = 200_000;

/// The queue, polled.
#[derive(Debug)]
pub(crate) struct ControlQueue {
    config: RingConfig,
    pool: Dma,
    ring: Ring,
    doorbell: Doorbell,
}

type Ring = Either<<Split as Layout>::Driver<Linear>, <Packed as Layout>::Driver<Linear>>;

impl ControlQueue {
    /// Sets the queue up at `index`, with the layout that was negotiated.
    pub(crate) fn new<P: Platform>(
        platform: &P,
        transport: &Transport,
        memory: Linear,
        negotiated: u64,
        index: u16,
    ) -> Result<Self, Error> {
        let config = if negotiated & features::RING_PACKED != 0 {
            transport.add_queue::<P, Packed>(platform, index, SIZE)
        } else {
            transport.add_queue::<P, Split>(platform, index, SIZE)
        }?;
        let config = RingConfig {
            event_idx: negotiated & features::EVENT_IDX != 0,
            in_order: negotiated & features::IN_ORDER != 0,
            ..config
        };
        let pool = platform.dma(POOL, 64).ok_or(Error::Memory)?;
        let doorbell = transport.doorbell(index)?;
        Ok(Self {
            config,
            pool,
            ring: make_ring(memory, negotiated, &config)?,
            doorbell,
        })
    }

    /// The same on a device that was reset and has negotiated the same layout.
    pub(crate) fn again(
        self,
        transport: &Transport,
        memory: Linear,
        negotiated: u64,
        index: u16,
    ) -> Result<Self, Error> {
        let ring = make_ring(memory, negotiated, &self.config)?;
        transport.enable_queue(index, &self.config)?;
        Ok(Self { ring, ..self })
    }

    /// Has the device use so many pairs, and waits for that.
    pub(crate) fn use_pairs(
        &mut self,
        transport: &Transport,
        memory: Linear,
        pairs: u16,
    ) -> Result<(), Error> {
        self.command(transport, memory, [MQ, VQ_PAIRS_SET], &pairs.to_le_bytes())
    }

    /// Has the device steer frames so, and use the pairs that this takes, and waits for that.
    pub(crate) fn set_rss(
        &mut self,
        transport: &Transport,
        memory: Linear,
        config: &rss::Config,
    ) -> Result<(), Error> {
        let mut bytes = [0; rss::MAX_LEN];
        let config = config.encode(&mut bytes);
        self.command(transport, memory, [MQ, RSS_CONFIG], config)
    }

    /// Sends a command, class and number first, and waits for its status.
    fn command(
        &mut self,
        transport: &Transport,
        memory: Linear,
        number: [u8; 2],
        data: &[u8],
    ) -> Result<(), Error> {
        let (at, status) = (self.pool.addr, self.pool.addr + STATUS);
        let written = write(memory, at, &number)
            && write(memory, at + 2, data)
            && write(memory, status, &[UNSET]);
        let len = u32::try_from(2 + data.len()).map_err(|_| Error::Memory)?;
        if !written || u64::from(len) > STATUS {
            return Err(Error::Memory);
        }
        let chain = [
            Buffer {
                addr: at,
                len,
                device_writes: false,
            },
            Buffer {
                addr: status,
                len: 1,
                device_writes: true,
            },
        ];
        let kick = match &mut self.ring {
            Either::Split(ring) => ring.add(&chain).map(|_| ring.publish()),
            Either::Packed(ring) => ring.add(&chain).map(|_| ring.publish()),
        };
        if kick.ok_or(Error::Silent)? {
            self.doorbell.notify();
        }
        let mut used = [Used::default()];
        for _ in 0..LOOKS {
            let taken = match &mut self.ring {
                Either::Split(ring) => ring.take(&mut used),
                Either::Packed(ring) => ring.take(&mut used),
            }?;
            if taken == 1 {
                return match read(memory, status) {
                    Some(0) => Ok(()),
                    Some(status) => Err(Error::Command(status)),
                    None => Err(Error::Memory),
                };
            }
            if transport.needs_reset() {
                return Err(Error::Reset);
            }
        }
        Err(Error::Silent)
    }
}

fn make_ring(memory: Linear, negotiated: u64, config: &RingConfig) -> Result<Ring, Error> {
    let mut ring = if negotiated & features::RING_PACKED != 0 {
        Either::Packed(Packed::driver(memory, config)?)
    } else {
        Either::Split(Split::driver(memory, config)?)
    };
    match &mut ring {
        Either::Split(ring) => ring.disable_calls(),
        Either::Packed(ring) => ring.disable_calls(),
    }
    Ok(ring)
}

#[allow(unsafe_code)] // one block: a range that `Linear` checked
fn write(memory: Linear, addr: u64, bytes: &[u8]) -> bool {
    let Some(to) = memory.ptr(addr, bytes.len()) else {
        return false;
    };
    // SAFETY: `ptr` checked the range, which stays mapped; the buffer is not with the device.
    unsafe { Slot::new(to, bytes.len()) }.write(0, bytes)
}

#[allow(unsafe_code)] // one block: a range that `Linear` checked
fn read(memory: Linear, addr: u64) -> Option<u8> {
    let from = memory.ptr(addr, 1)?;
    let mut byte = [0];
    // SAFETY: `ptr` checked the range, which stays mapped.
    unsafe { Frame::new(from, 1) }
        .read(0, &mut byte)
        .then_some(byte[0])
}

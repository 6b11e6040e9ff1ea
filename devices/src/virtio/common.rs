//! The registers of the common configuration (VIRTIO 1.3, section 4.1.4.3), without their effects on the machine.

use super::{F_RING_PACKED, F_RING_RESET, F_VERSION_1, MAX_QUEUE_SIZE, status};

/// Length of the structure.
pub(super) const LENGTH: u32 = 64;

/// Offset and size of every field that can be written.
const DEVICE_FEATURE_SELECT: u64 = 0;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_VECTOR: u64 = 16;
pub(super) const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;
const QUEUE_RESET: u64 = 58;
const FIELDS: [(u64, usize); 13] = [
    (DEVICE_FEATURE_SELECT, 4),
    (DRIVER_FEATURE_SELECT, 4),
    (DRIVER_FEATURE, 4),
    (CONFIG_VECTOR, 2),
    (DEVICE_STATUS, 1),
    (QUEUE_SELECT, 2),
    (QUEUE_SIZE, 2),
    (QUEUE_VECTOR, 2),
    (QUEUE_ENABLE, 2),
    (QUEUE_DESC, 8),
    (QUEUE_DRIVER, 8),
    (QUEUE_DEVICE, 8),
    (QUEUE_RESET, 2),
];

/// What a write asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// The configuration vector is to be this.
    ConfigVector(u16),
    /// The selected queue's vector is to be this.
    QueueVector(u16),
    /// DRIVER_OK was set.
    Activate,
    /// 0 was written to the status of a device that is at work.
    Reset,
    /// 0 was written to the status while it was 0: there is only the transport to reset.
    ResetIdle,
    /// This queue, which the device has, is to be reset.
    ResetQueue(u16),
    /// This queue was reset, and the device has not got it.
    ResetQueueIdle(u16),
    /// The device is to have this queue too.
    EnableQueue(u16),
}

/// What the driver set for one virtqueue.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueRegisters {
    max_size: u16,
    size: u16,
    pub(super) enabled: bool,
    /// Between the write to `queue_reset` and the end of that: the registers do not change.
    resetting: bool,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            resetting: false,
            desc: 0,
            driver: 0,
            device: 0,
        }
    }

    /// What `queue_size` reads: without [`F_RING_PACKED`] it has to be a power of two, also where the maximum is none.
    pub(super) fn size(&self, packed: bool) -> u16 {
        match self.size.checked_ilog2() {
            Some(log) if !packed => 1 << log,
            _ => self.size,
        }
    }
}

/// The registers.
pub(super) struct Common {
    offered: u64,
    pub(super) driver_features: u64,
    /// Whether the device can work with them; asked before the status is written.
    pub(super) acceptable: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) status: u8,
    /// Between the write of 0 and the end of the reset: the registers do not change.
    pub(super) resetting: bool,
    pub(super) generation: u8,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
    /// Indices that exist, special ones included.
    indices: u16,
}

impl Common {
    pub(super) fn new(offered: u64, sizes: &[u16], indices: u16) -> Self {
        Self {
            offered: offered | F_VERSION_1,
            driver_features: 0,
            acceptable: true,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: 0,
            resetting: false,
            generation: 0,
            queue_select: 0,
            queues: sizes
                .iter()
                .map(|&size| QueueRegisters::new(size.min(MAX_QUEUE_SIZE)))
                .collect(),
            indices,
        }
    }

    /// The end of a reset.
    pub(super) fn reset(&mut self) {
        self.driver_features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.status = 0;
        self.resetting = false;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
    }

    pub(super) fn has(&self, bits: u8) -> bool {
        self.status & bits == bits
    }

    /// Whether the driver has accepted a feature, or is about to.
    fn accepts(&self, feature: u64) -> bool {
        self.driver_features & self.offered & feature != 0
    }

    /// Whether the rings are packed ones.
    pub(super) fn packed(&self) -> bool {
        self.accepts(F_RING_PACKED)
    }

    /// The end of a queue's reset; returns whether there was one.
    pub(super) fn queue_reset_done(&mut self, index: u16) -> bool {
        match self.queues.get_mut(usize::from(index)) {
            Some(queue) if queue.resetting => {
                *queue = QueueRegisters::new(queue.max_size);
                true
            }
            _ => false,
        }
    }

    /// The half of a feature word that `select` means; there are none beyond 64 bits.
    fn half(features: u64, select: u32) -> [u8; 4] {
        let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
        match select {
            0 => [a, b, c, d],
            1 => [e, f, g, h],
            _ => [0; 4],
        }
    }

    /// The whole structure as it reads now.
    pub(super) fn image(&self, config_vector: u16, queue_vector: u16) -> [u8; LENGTH as usize] {
        let select = usize::from(self.queue_select);
        let queue = self
            .queues
            .get(select)
            .copied()
            .unwrap_or(QueueRegisters::new(0));
        let notify_offset = if self.queue_select < self.indices {
            self.queue_select
        } else {
            0
        };
        // There are fewer virtqueues than notify addresses, which are fewer than 65536.
        let count = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        let mut image = [0; LENGTH as usize];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.device_feature_select.to_le_bytes());
        put(4, &Self::half(self.offered, self.device_feature_select));
        put(8, &self.driver_feature_select.to_le_bytes());
        put(
            12,
            &Self::half(self.driver_features, self.driver_feature_select),
        );
        put(16, &config_vector.to_le_bytes());
        put(18, &count.to_le_bytes());
        put(20, &[self.status, self.generation]);
        put(22, &self.queue_select.to_le_bytes());
        put(24, &queue.size(self.packed()).to_le_bytes());
        put(26, &queue_vector.to_le_bytes());
        put(28, &u16::from(queue.enabled).to_le_bytes());
        put(30, &notify_offset.to_le_bytes());
        put(32, &queue.desc.to_le_bytes());
        put(40, &queue.driver.to_le_bytes());
        put(48, &queue.device.to_le_bytes());
        put(58, &u16::from(queue.resetting).to_le_bytes());
        image
    }

    /// The fields that a write of `len` bytes at `offset` touches.
    pub(super) fn touched(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
        let end = offset.saturating_add(len as u64);
        FIELDS
            .into_iter()
            .filter(move |&(at, size)| at < end && offset < at + size as u64)
    }

    /// Writes one field of [`Common::touched`], whole: a narrower access has been merged with what was there.
    pub(super) fn write(&mut self, field: u64, value: u64) -> Option<Effect> {
        if self.resetting {
            return None;
        }
        let [a, b, c, d, ..] = value.to_le_bytes();
        let (byte, half, word) = (
            a,
            u16::from_le_bytes([a, b]),
            u32::from_le_bytes([a, b, c, d]),
        );
        match field {
            DEVICE_FEATURE_SELECT => self.device_feature_select = word,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = word,
            DRIVER_FEATURE => self.set_driver_feature(word),
            CONFIG_VECTOR => return Some(Effect::ConfigVector(half)),
            DEVICE_STATUS => return self.set_status(byte),
            QUEUE_SELECT => self.queue_select = half,
            QUEUE_VECTOR => return Some(Effect::QueueVector(half)),
            QUEUE_RESET => return self.reset_queue(half),
            _ => return self.set_queue(field, value, half),
        }
        None
    }

    fn set_driver_feature(&mut self, word: u32) {
        let (shift, word) = match self.driver_feature_select {
            0 => (0, u64::from(word)),
            1 => (32, u64::from(word)),
            _ => return,
        };
        if !self.has(status::FEATURES_OK) {
            self.driver_features = self.driver_features & !(0xffff_ffff << shift) | word << shift;
        }
    }

    fn set_status(&mut self, value: u8) -> Option<Effect> {
        if value == 0 {
            if self.status == 0 {
                return Some(Effect::ResetIdle);
            }
            self.resetting = true;
            return Some(Effect::Reset);
        }
        // Bits are only gained (section 2.1.1); NEEDS_RESET is the device's.
        self.status |= value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        let agreed = self.driver_features & !self.offered == 0
            && self.driver_features & F_VERSION_1 != 0
            && self.acceptable;
        if value & status::FEATURES_OK != 0 && agreed {
            self.status |= status::FEATURES_OK;
        }
        if value & status::DRIVER_OK != 0
            && self.has(status::FEATURES_OK)
            && !self.has(status::DRIVER_OK)
        {
            self.status |= status::DRIVER_OK;
            return Some(Effect::Activate);
        }
        None
    }

    /// Whether queues are reset and enabled one by one (section 2.6.1).
    fn resets_queues(&self) -> bool {
        self.has(status::FEATURES_OK) && self.accepts(F_RING_RESET)
    }

    fn reset_queue(&mut self, value: u16) -> Option<Effect> {
        let (live, allowed) = (self.has(status::DRIVER_OK), self.resets_queues());
        let index = self.queue_select;
        let queue = self.queues.get_mut(usize::from(index))?;
        if value != 1 || !allowed || queue.resetting {
            return None;
        }
        if live && queue.enabled {
            queue.resetting = true;
            return Some(Effect::ResetQueue(index));
        }
        *queue = QueueRegisters::new(queue.max_size);
        Some(Effect::ResetQueueIdle(index))
    }

    fn set_queue(&mut self, field: u64, value: u64, half: u16) -> Option<Effect> {
        let live = self.has(status::DRIVER_OK);
        let locked = live && !self.resets_queues();
        let packed = self.packed();
        let index = self.queue_select;
        let queue = self.queues.get_mut(usize::from(index))?;
        // A queue in its reset is still enabled.
        if locked || queue.enabled {
            return None;
        }
        match field {
            // Split rings are powers of two (section 2.7), packed ones need not be (2.8.10.1).
            QUEUE_SIZE
                if (1..=queue.max_size).contains(&half) && (packed || half.is_power_of_two()) =>
            {
                queue.size = half;
            }
            QUEUE_ENABLE if half == 1 && queue.size != 0 => {
                queue.enabled = true;
                return live.then_some(Effect::EnableQueue(index));
            }
            QUEUE_DESC => queue.desc = value,
            QUEUE_DRIVER => queue.driver = value,
            QUEUE_DEVICE => queue.device = value,
            _ => {}
        }
        None
    }
}

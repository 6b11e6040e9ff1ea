//! The virtio-pci transport (VIRTIO 1.3, section 4.1), modern only, with MSI-X and without INTx.
//!
//! # Locks
//!
//! `state` covers the registers and the wiring; the host is called with it, a device never is. `order` makes DRIVER_OK, resets and what
//! happens to single queues reach the device in the order in which they were written; nothing that a device may call takes it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::eventfd::EventFd;

use super::common::{self, Common, Effect};
use super::wiring::{NO_VECTOR, Wiring};
use super::{Activation, QueueSetup, Transport, VirtioDevice, event, status};
use crate::host::Host;
use crate::pci::{self, BARS, BarKind, ConfigSpace, Identity, Msix, PciFunction};

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const REVISION: u8 = 1;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;

// cfg_type of the vendor capabilities (section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
const CFG_SHARED_MEMORY: u8 = 8;

/// The BAR with the structures.
const STRUCTURES: u8 = 0;
const STRUCTURES_SIZE: u64 = 0x1_0000;
/// The BARs with the windows.
const WINDOWS: [u8; 2] = [2, 4];

// Where the structures are in their BAR.
const COMMON: Range<u64> = 0..common::LENGTH as u64;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const DEVICE_LENGTH: u32 = 0x1000;
const NOTIFY: u32 = 0x4000;
const NOTIFY_LENGTH: u32 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;
const MSIX_TABLE: u32 = 0x8000;
const MSIX_PBA: u32 = 0xc000;
/// As many as the table has room for.
const MAX_VECTORS: usize = 1024;
const MAX_INDICES: usize = (NOTIFY_LENGTH / NOTIFY_MULTIPLIER) as usize;

/// The ISR bit of a configuration change.
const ISR_CONFIG: u8 = 2;

/// Why a device could not be put on the bus. The guest has no part in it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration space or the interrupts.
    #[error(transparent)]
    Pci(#[from] pci::Error),
    /// The host has no eventfds left.
    #[error("cannot make the eventfds of the queues: {0}")]
    Events(#[source] io::Error),
    /// The notify area or the MSI-X table is too small for the device's queues.
    #[error("a device with {indices} queue indices and {vectors} interrupt vectors does not fit")]
    TooManyQueues {
        /// Queue indices, special ones included.
        indices: usize,
        /// MSI-X vectors.
        vectors: usize,
    },
}

struct State {
    config: ConfigSpace,
    common: Common,
    msix: Msix,
    wiring: Wiring,
    config_vector: u16,
    isr: u8,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    /// Offset of the MSI-X capability in configuration space.
    msix_cap: u16,
    /// Offset of the VIRTIO_PCI_CAP_PCI_CFG capability.
    access_cap: u16,
    order: Mutex<()>,
    state: Mutex<State>,
}

/// The body of `struct virtio_pci_cap` behind its ID and next pointer, and what follows it.
fn capability(kind: u8, bar: u8, offset: u32, length: u32, tail: &[u8]) -> Vec<u8> {
    // A tail is at most eight bytes.
    let total = u8::try_from(16 + tail.len()).unwrap_or(u8::MAX);
    let mut body = vec![total, kind, bar, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    body.extend_from_slice(tail);
    body
}

impl VirtioPci {
    /// Makes a PCI function of `device` and binds the device to it.
    pub fn new(device: Arc<dyn VirtioDevice>, host: Arc<dyn Host>) -> Result<Arc<Self>, Error> {
        let sizes = device.queue_sizes();
        let special = device.special_queues();
        let indices = sizes.len() + usize::from(special.indices);
        let vectors = 1 + sizes.len() + usize::from(special.vectors);
        let too_many = Error::TooManyQueues { indices, vectors };
        let (Ok(index_count), Ok(vector_count)) = (u16::try_from(indices), u16::try_from(vectors))
        else {
            return Err(too_many);
        };
        if indices > MAX_INDICES || vectors > MAX_VECTORS {
            return Err(too_many);
        }

        let id = DEVICE_BASE + device.device_type();
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: id,
            revision: REVISION,
            class: device.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: id,
        });
        config.add_bar(STRUCTURES, BarKind::Memory32, STRUCTURES_SIZE)?;
        let mut add =
            |body: &[u8], writable: &[u8]| config.add_capability(CAP_VENDOR, body, writable);
        add(
            &capability(CFG_COMMON, STRUCTURES, 0, common::LENGTH, &[]),
            &[],
        )?;
        add(&capability(CFG_ISR, STRUCTURES, ISR, 1, &[]), &[])?;
        add(
            &capability(CFG_DEVICE, STRUCTURES, DEVICE, DEVICE_LENGTH, &[]),
            &[],
        )?;
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        add(
            &capability(CFG_NOTIFY, STRUCTURES, NOTIFY, NOTIFY_LENGTH, &multiplier),
            &[],
        )?;
        // The driver writes bar, offset and length; the data bytes behind them are not memory.
        let mut writable = capability(0, 0xff, u32::MAX, u32::MAX, &[]);
        writable[0] = 0;
        let access_cap = add(&capability(CFG_PCI, 0, 0, 0, &[0; 4]), &writable)?;
        let windows = device.windows();
        for ((id, bar), (size, _)) in (0u8..).zip(WINDOWS).zip(&windows) {
            let [a, b, c, d, high @ ..] = size.to_le_bytes();
            let mut tail = [0; 8];
            tail[4..].copy_from_slice(&high);
            let length = u32::from_le_bytes([a, b, c, d]);
            let mut body = capability(CFG_SHARED_MEMORY, bar, 0, length, &tail);
            body[3] = id;
            config.add_capability(CAP_VENDOR, &body, &[])?;
            config.add_bar(bar, BarKind::Memory64, *size)?;
        }
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vector_count - 1).to_le_bytes());
        body[2..6].copy_from_slice(&MSIX_TABLE.to_le_bytes());
        body[6..].copy_from_slice(&MSIX_PBA.to_le_bytes());
        // Enable and function mask: the two highest bits of the control word.
        let msix_cap = config.add_capability(CAP_MSIX, &body, &[0, 0xc0])?;

        let msix = Msix::new(host.as_ref(), vector_count)?;
        let stride = u64::from(NOTIFY_MULTIPLIER);
        let special = usize::from(special.indices);
        let wiring = Wiring::new(
            host,
            sizes.len(),
            special,
            stride,
            windows.into_iter().map(|(_, window)| window),
        )
        .map_err(Error::Events)?;
        let state = State {
            config,
            common: Common::new(device.features(), &sizes, index_count),
            msix,
            wiring,
            config_vector: NO_VECTOR,
            isr: 0,
        };
        let this = Arc::new(Self {
            device,
            msix_cap,
            access_cap,
            order: Mutex::new(()),
            state: Mutex::new(state),
        });
        let weak: Weak<Self> = Arc::downgrade(&this);
        this.device.bind(weak);
        Ok(this)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An access through the VIRTIO_PCI_CAP_PCI_CFG capability (section 4.1.4.9): offset and length in [`STRUCTURES`], if the driver
    /// asked for something that can be done. The window is not reachable this way.
    fn access_window(&self) -> Option<(u64, usize)> {
        let state = self.state();
        let bar = state.config.u32_at(self.access_cap + 4) & 0xff;
        let offset = state.config.u32_at(self.access_cap + 8);
        let length = state.config.u32_at(self.access_cap + 12);
        let length = usize::try_from(length)
            .ok()
            .filter(|length| matches!(length, 1 | 2 | 4))?;
        (bar == u32::from(STRUCTURES)).then_some((offset.into(), length))
    }

    /// Which bytes of an access to configuration space are the data of the PCI_CFG capability: the range in the access and where it
    /// starts in the data.
    fn access_data(&self, offset: u16, len: usize) -> Option<(Range<usize>, usize)> {
        let data = usize::from(self.access_cap) + 16;
        let start = usize::from(offset);
        let from = start.max(data);
        let to = start.saturating_add(len).min(data + 4);
        (from < to).then(|| (from - start..to - start, from - data))
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let queue_vector = state.wiring.vector(state.common.queue_select);
        let image = state.common.image(state.config_vector, queue_vector);
        copy_from(&image, offset, data);
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        for (field, size) in Common::touched(offset, data.len()) {
            if field == common::DEVICE_STATUS {
                // The features cannot change in between: that takes `order`.
                let features = self.state().common.driver_features;
                let acceptable = self.device.accepts(features);
                self.state().common.acceptable = acceptable;
            }
            let effect = self.state().common_write(field, size, offset, data);
            match effect {
                Some(Do::Activate(activation)) => self.device.activate(activation),
                Some(Do::Reset) => self.device.reset(),
                Some(Do::ResetQueue(index)) => self.device.reset_queue(index),
                Some(Do::EnableQueue(index, queue)) => self.device.enable_queue(index, queue),
                None => {}
            }
        }
    }

    fn notify(&self, offset: u64) {
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        let doorbell = self.state().wiring.doorbell(index);
        if let Some(doorbell) = doorbell {
            event::signal(&doorbell);
        }
    }

    fn resetting(&self) -> bool {
        self.state().common.resetting
    }
}

/// What has to be done with the device, without the lock.
enum Do {
    Activate(Activation),
    Reset,
    ResetQueue(u16),
    EnableQueue(u16, QueueSetup),
}

impl State {
    /// Writes one field of the common configuration with those bytes of `data` (which starts at `offset`) that belong to it.
    fn common_write(&mut self, field: u64, size: usize, offset: u64, data: &[u8]) -> Option<Do> {
        let queue_vector = self.wiring.vector(self.common.queue_select);
        let image = self.common.image(self.config_vector, queue_vector);
        let mut value = [0; 8];
        copy_from(&image, field, &mut value[..size]);
        for (at, byte) in (field..).zip(&mut value[..size]) {
            let new = at
                .checked_sub(offset)
                .and_then(|i| data.get(usize::try_from(i).ok()?));
            *byte = new.copied().unwrap_or(*byte);
        }
        match self.common.write(field, u64::from_le_bytes(value))? {
            Effect::ConfigVector(vector) => {
                self.config_vector = if self.msix.interrupt(vector).is_some() {
                    vector
                } else {
                    NO_VECTOR
                };
                None
            }
            Effect::QueueVector(vector) => {
                self.wiring
                    .set_vector(self.common.queue_select, vector, &self.msix);
                None
            }
            Effect::Activate => Some(Do::Activate(self.activation())),
            Effect::Reset => Some(Do::Reset),
            Effect::ResetIdle => {
                self.reset(false);
                None
            }
            Effect::ResetQueue(index) => Some(Do::ResetQueue(index)),
            Effect::ResetQueueIdle(index) => {
                self.wiring.set_vector(index, NO_VECTOR, &self.msix);
                None
            }
            Effect::EnableQueue(index) => {
                let queue = self.queue(index.into())?;
                Some(Do::EnableQueue(index, queue))
            }
        }
    }

    /// A virtqueue as the driver has set it up.
    fn queue(&self, index: usize) -> Option<QueueSetup> {
        let queue = self.common.queues.get(index)?;
        let (kick, call) = self.wiring.events(index)?;
        Some(QueueSetup {
            size: queue.size(self.common.packed()),
            desc: queue.desc,
            driver: queue.driver,
            device: queue.device,
            enabled: queue.enabled,
            kick,
            call,
        })
    }

    fn activation(&self) -> Activation {
        let queues = (0..self.common.queues.len()).filter_map(|index| self.queue(index));
        Activation {
            features: self.common.driver_features,
            queues: queues.collect(),
        }
    }

    /// Applies configuration space to the machine. What has not changed costs nothing.
    fn apply_config(&mut self, msix_cap: u16) {
        let command = self.config.command();
        let control = self.config.u32_at(msix_cap) >> 16;
        self.msix.set_control(
            control & 0x8000 != 0,
            control & 0x4000 != 0,
            command.bus_master,
        );
        let bars = self.config.bars();
        let [structures, ..] = &bars;
        let notify = structures.as_ref();
        self.wiring
            .place(notify.map(|range| range.start + u64::from(NOTIFY)));
        for (window, bar) in WINDOWS.into_iter().enumerate() {
            self.wiring
                .place_window(window, bars[usize::from(bar)].clone());
        }
    }

    fn reset(&mut self, renew: bool) {
        self.common.reset();
        self.wiring.reset(&self.msix, renew);
        self.config_vector = NO_VECTOR;
        self.isr = 0;
    }

    fn raise_config(&mut self) {
        self.isr |= ISR_CONFIG;
        if let Some(interrupt) = self.msix.interrupt(self.config_vector) {
            interrupt.trigger();
        }
    }
}

/// The window that a BAR is for.
fn window_of(bar: u8) -> Option<usize> {
    WINDOWS.iter().position(|&window| window == bar)
}

/// Copies what `source` has at `offset`; the rest of `data` becomes zero.
fn copy_from(source: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset)
        .ok()
        .and_then(|offset| source.get(offset..))
        .unwrap_or_default();
    let len = from.len().min(data.len());
    let (head, tail) = data.split_at_mut(len);
    head.copy_from_slice(&from[..len]);
    tail.fill(0);
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.state().config.read(offset, data);
        if let Some((range, from)) = self.access_data(offset, data.len())
            && let Some((offset, length)) = self.access_window()
        {
            let mut bytes = [0; 4];
            self.bar_read(STRUCTURES, offset, &mut bytes[..length]);
            copy_from(&bytes, from as u64, &mut data[range]);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        {
            let mut state = self.state();
            state.config.write(offset, data);
            state.apply_config(self.msix_cap);
        }
        if let Some((range, 0)) = self.access_data(offset, data.len())
            && let Some((offset, length)) = self.access_window()
            && let Some(bytes) = data[range].get(..length)
        {
            self.bar_write(STRUCTURES, offset, bytes);
        }
    }

    fn bars(&self) -> [Option<Range<u64>>; BARS] {
        self.state().config.bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if let Some(window) = window_of(bar) {
            data.fill(0xff);
            return self.device.window_read(window, offset, data);
        }
        data.fill(0);
        let Ok(at) = u32::try_from(offset) else {
            return;
        };
        match at {
            _ if bar != STRUCTURES => {}
            _ if COMMON.contains(&offset) => self.common_read(offset, data),
            ISR => {
                if let Some(byte) = data.first_mut() {
                    *byte = std::mem::take(&mut self.state().isr);
                }
            }
            DEVICE..NOTIFY => self.device.read_config(offset - u64::from(DEVICE), data),
            MSIX_TABLE..MSIX_PBA => self
                .state()
                .msix
                .table_read(offset - u64::from(MSIX_TABLE), data),
            MSIX_PBA.. => self
                .state()
                .msix
                .pba_read(offset - u64::from(MSIX_PBA), data),
            _ => {}
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if let Some(window) = window_of(bar) {
            return self.device.window_write(window, offset, data);
        }
        let Ok(at) = u32::try_from(offset) else {
            return;
        };
        match at {
            _ if bar != STRUCTURES => {}
            _ if COMMON.contains(&offset) => self.common_write(offset, data),
            DEVICE..NOTIFY if !self.resetting() => {
                self.device.write_config(offset - u64::from(DEVICE), data);
            }
            NOTIFY..MSIX_TABLE => self.notify(offset - u64::from(NOTIFY)),
            MSIX_TABLE..MSIX_PBA => self
                .state()
                .msix
                .table_write(offset - u64::from(MSIX_TABLE), data),
            _ => {}
        }
    }
}

impl Transport for VirtioPci {
    fn config_changed(&self) {
        let mut state = self.state();
        state.common.generation = state.common.generation.wrapping_add(1);
        state.raise_config();
    }

    fn set_needs_reset(&self) {
        let mut state = self.state();
        state.common.status |= status::NEEDS_RESET;
        if state.common.has(status::DRIVER_OK) {
            state.raise_config();
        }
    }

    fn reset_done(&self) {
        let mut state = self.state();
        if !state.common.resetting {
            return;
        }
        let renew = state.common.has(status::DRIVER_OK);
        state.reset(renew);
    }

    fn queue_reset_done(&self, index: u16) {
        let state = &mut *self.state();
        if state.common.queue_reset_done(index) {
            state.wiring.set_vector(index, NO_VECTOR, &state.msix);
            state.wiring.renew(index.into());
        }
    }

    fn set_doorbell(&self, index: u16, event: Option<Arc<EventFd>>) -> io::Result<()> {
        self.state().wiring.set_doorbell(index, event)
    }

    fn set_kick(&self, index: u16, event: Option<Arc<EventFd>>) -> io::Result<()> {
        let state = &mut *self.state();
        state.wiring.set_kick(index, event, &state.msix)
    }
}

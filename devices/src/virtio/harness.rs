//! A driver for tests: it reaches a device as a guest does, through configuration space, BAR 0 and memory.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::{VirtioPci, status};
use crate::fake::FakeHost;
use crate::host::Host;
use crate::pci::PciFunction;

pub(crate) const BAR0: u64 = 0xd000_0000;
pub(crate) const BAR2: u64 = 0x10_0000_0000;

/// Offsets in BAR 0.
pub(crate) const NOTIFY: u64 = 0x4000;
pub(crate) const DEVICE: u64 = 0x2000;
pub(crate) const STATUS: u64 = 20;
pub(crate) const QUEUE_SELECT: u64 = 22;
pub(crate) const QUEUE_SIZE: u64 = 24;
pub(crate) const QUEUE_VECTOR: u64 = 26;
pub(crate) const QUEUE_ENABLE: u64 = 28;
pub(crate) const QUEUE_RESET: u64 = 58;

pub(crate) struct Driver {
    pub(crate) function: Arc<VirtioPci>,
    pub(crate) host: Arc<FakeHost>,
}

impl Driver {
    /// A driver of a function whose BARs are placed and enabled.
    pub(crate) fn new(function: Arc<VirtioPci>, host: Arc<FakeHost>) -> Self {
        let driver = Self { function, host };
        driver.place(BAR0, BAR2);
        driver
    }

    pub(crate) fn place(&self, bar0: u64, bar2: u64) {
        self.function.config_write(0x04, &[0]);
        self.function.config_write(0x10, &bar0.to_le_bytes()[..4]);
        self.function.config_write(0x18, &bar2.to_le_bytes());
        self.function.config_write(0x04, &[6]);
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.bar_read(0, offset, &mut data);
        data
    }

    pub(crate) fn u8(&self, offset: u64) -> u8 {
        u8::from_le_bytes(self.read(offset))
    }

    pub(crate) fn u16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    pub(crate) fn u32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(0, offset, data);
    }

    pub(crate) fn config(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Offsets of the capabilities with this ID.
    pub(crate) fn capabilities(&self, id: u8) -> Vec<u16> {
        let mut found = Vec::new();
        let mut at = u16::from(self.config(0x34).to_le_bytes()[0]);
        while at != 0 {
            let [this, next, ..] = self.config(at).to_le_bytes();
            if this == id {
                found.push(at);
            }
            at = next.into();
        }
        found
    }

    /// Sets up every MSI-X vector, unmasked, its number as the data.
    pub(crate) fn enable_msix(&self) {
        let cap = self.capabilities(0x11)[0];
        let vectors = (self.config(cap) >> 16 & 0x7ff) + 1;
        for vector in 0..vectors {
            let entry = 0x8000 + 16 * u64::from(vector);
            self.write(entry, &0xfee0_0000u64.to_le_bytes());
            self.write(entry + 8, &vector.to_le_bytes());
            self.write(entry + 12, &[0; 4]);
        }
        self.function
            .config_write(cap + 2, &0x8000u16.to_le_bytes());
    }

    /// The vectors whose interrupts are delivered now.
    pub(crate) fn interrupts(&self) -> Vec<u32> {
        self.host
            .interrupts()
            .iter()
            .filter_map(|i| i.poll())
            .map(|message| message.data)
            .collect()
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(0, &select.to_le_bytes());
            u64::from(self.u32(4))
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn accept(&self, features: u64) {
        for (select, half) in [(0u32, features), (1, features >> 32)] {
            self.write(8, &select.to_le_bytes());
            self.write(12, &half.to_le_bytes()[..4]);
        }
    }

    /// Up to FEATURES_OK; returns whether the device agreed.
    pub(crate) fn negotiate(&self, features: u64) -> bool {
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::DRIVER);
        self.accept(features);
        self.set_status(status::FEATURES_OK);
        self.u8(STATUS) & status::FEATURES_OK != 0
    }

    pub(crate) fn set_status(&self, bits: u8) {
        self.write(STATUS, &[self.u8(STATUS) | bits]);
    }

    pub(crate) fn select(&self, queue: u16) {
        self.write(QUEUE_SELECT, &queue.to_le_bytes());
    }

    /// Chooses a queue's vector; returns what the device made of it.
    pub(crate) fn set_vector(&self, queue: u16, vector: u16) -> u16 {
        self.select(queue);
        self.write(QUEUE_VECTOR, &vector.to_le_bytes());
        self.u16(QUEUE_VECTOR)
    }

    pub(crate) fn setup_queue(&self, queue: u16, ring: &Ring, vector: u16) {
        self.set_vector(queue, vector);
        self.write(24, &ring.size.to_le_bytes());
        for (offset, address) in [(32, ring.desc()), (40, ring.avail()), (48, ring.used())] {
            self.write(offset, &(address + ring.shift).to_le_bytes());
        }
        self.write(28, &1u16.to_le_bytes());
    }

    /// What a guest write to a notify address does: the host's doorbell takes it, or the function does. Returns whether it left the guest.
    pub(crate) fn notify(&self, queue: u16) -> bool {
        let offset = NOTIFY + 4 * u64::from(queue);
        let exit = !self.host.ring(BAR0 + offset);
        if exit {
            self.write(offset, &queue.to_le_bytes());
        }
        exit
    }
}

/// A split ring in the fake host's memory, driver side, one buffer of `BUFFER` bytes a descriptor.
pub(crate) struct Ring {
    host: Arc<FakeHost>,
    base: u64,
    pub(crate) size: u16,
    /// What is added to an address in memory to make the device's.
    pub(crate) shift: u64,
    added: u16,
    seen: u16,
}

pub(crate) const BUFFER: u64 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

impl Ring {
    /// A ring whose areas and buffers start at `base`.
    pub(crate) fn new(host: &Arc<FakeHost>, base: u64, size: u16) -> Self {
        Self {
            host: host.clone(),
            base,
            size,
            shift: 0,
            added: 0,
            seen: 0,
        }
    }

    pub(crate) fn desc(&self) -> u64 {
        self.base
    }

    pub(crate) fn avail(&self) -> u64 {
        self.base + 0x1000
    }

    pub(crate) fn used(&self) -> u64 {
        self.base + 0x2000
    }

    pub(crate) fn buffer(&self, slot: u16) -> u64 {
        self.base + 0x1_0000 + BUFFER * u64::from(slot)
    }

    pub(crate) fn put(&self, address: u64, data: &[u8]) {
        self.host
            .memory()
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.host
            .memory()
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    pub(crate) fn set_desc(&self, slot: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.desc() + 16 * u64::from(slot);
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    pub(crate) fn set_avail_index(&self, index: u16) {
        self.put(self.avail() + 2, &index.to_le_bytes());
    }

    /// Makes the chain at `slot` available.
    pub(crate) fn publish(&mut self, slot: u16) {
        let entry = self.avail() + 4 + 2 * u64::from(self.added % self.size);
        self.put(entry, &slot.to_le_bytes());
        self.added = self.added.wrapping_add(1);
        self.set_avail_index(self.added);
    }

    /// Offers a buffer that the device writes.
    pub(crate) fn offer(&mut self, len: u32) {
        let slot = self.added % self.size;
        self.set_desc(slot, self.buffer(slot) + self.shift, len, WRITE, 0);
        self.publish(slot);
    }

    /// Offers a chain of two buffers that the device writes.
    pub(crate) fn offer_chain(&mut self, first: u32, second: u32) {
        let slot = self.added % self.size;
        let other = (slot + 1) % self.size;
        let buffer = self.buffer(slot) + self.shift;
        self.set_desc(slot, buffer, first, WRITE | NEXT, other);
        self.set_desc(other, buffer + u64::from(first), second, WRITE, 0);
        self.publish(slot);
    }

    /// Sends a buffer.
    pub(crate) fn send(&mut self, data: &[u8]) {
        let slot = self.added % self.size;
        self.put(self.buffer(slot), data);
        let len = u32::try_from(data.len()).unwrap();
        self.set_desc(slot, self.buffer(slot) + self.shift, len, 0, 0);
        self.publish(slot);
    }

    /// Takes a used chain: its contents, as long as the device says it wrote.
    pub(crate) fn take(&mut self) -> Option<Vec<u8>> {
        let index = u16::from_le_bytes(self.get(self.used() + 2, 2).try_into().unwrap());
        if index == self.seen {
            return None;
        }
        let entry = self.get(self.used() + 4 + 8 * u64::from(self.seen % self.size), 8);
        self.seen = self.seen.wrapping_add(1);
        let slot = u16::from_le_bytes([entry[0], entry[1]]);
        let len = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        Some(self.get(self.buffer(slot), usize::try_from(len).unwrap()))
    }
}

//! The rings are the host kernel's: vhost-net, which gets the guest's memory, the rings with their eventfds, and the tap. No thread of the VMM is in the
//! way from then on.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use event_manager::EventOps;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use super::{Engine, Fault, Port};
use crate::virtio::QueueSetup;

/// VHOST_F_LOG_ALL and VHOST_NET_F_VIRTIO_NET_HDR (linux/vhost.h): dirty logging, and headers made by vhost-net and not by the tap. Neither
/// is a feature of a ring.
const NOT_OF_RINGS: u64 = 1 << 26 | 1 << 27;

pub(super) struct Kernel<B> {
    vhost: B,
    /// What vhost-net knows; all else is the tap's and the device's.
    known: u64,
    tap: Port,
    memory: Vec<VhostUserMemoryRegionInfo>,
    started: [bool; 2],
}

impl Kernel<Net<Arc<GuestMemoryMmap>>> {
    /// A back-end of the host's kernel that is this process'.
    pub(super) fn open(tap: Port, memory: &GuestMemoryMmap) -> vhost::Result<Self> {
        let net = Net::new(Arc::new(memory.clone()))?;
        Self::new(net, tap, memory)
    }
}

impl<B: VhostNet> Kernel<B> {
    fn new(vhost: B, tap: Port, memory: &GuestMemoryMmap) -> vhost::Result<Self> {
        vhost.set_owner()?;
        let known = vhost.get_features()? & !NOT_OF_RINGS;
        Ok(Self {
            vhost,
            known,
            tap,
            memory: regions(memory)?,
            started: [false; 2],
        })
    }

    fn set_up(&self, index: usize, queue: &QueueSetup) -> vhost::Result<()> {
        let vhost = &self.vhost;
        vhost.set_vring_num(index, queue.size)?;
        let ring = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: queue.desc,
            used_ring_addr: queue.device,
            avail_ring_addr: queue.driver,
            log_addr: None,
        };
        vhost.set_vring_base(index, 0)?;
        vhost.set_vring_addr(index, &ring)?;
        vhost.set_vring_call(index, &queue.call)?;
        vhost.set_vring_kick(index, &queue.kick)?;
        vhost.set_backend(index, Some(self.tap.file()))
    }
}

/// The guest's memory, where this process has it.
fn regions(memory: &GuestMemoryMmap) -> vhost::Result<Vec<VhostUserMemoryRegionInfo>> {
    let region = |region: &vm_memory::GuestRegionMmap| {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|_| vhost::Error::InvalidGuestMemory)?;
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host.addr() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        })
    };
    memory.iter().map(region).collect()
}

impl<B: VhostNet + Send> Engine for Kernel<B> {
    fn ring_features(&self) -> u64 {
        self.known
    }

    fn configure(&mut self, features: u64) -> Result<(), Fault> {
        self.tap.set_offloads(features).map_err(Fault::Tap)?;
        self.vhost.set_features(features & self.known)?;
        self.vhost.set_mem_table(&self.memory)?;
        Ok(())
    }

    fn start(&mut self, index: u16, queue: &QueueSetup, _ops: &mut EventOps) -> Result<(), Fault> {
        let index = usize::from(index);
        self.set_up(index, queue)?;
        if let Some(started) = self.started.get_mut(index) {
            *started = true;
        }
        Ok(())
    }

    fn stop(&mut self, index: u16, _ops: &mut EventOps) {
        let index = usize::from(index);
        let started = self.started.get_mut(index).map(std::mem::take);
        if started != Some(true) {
            return;
        }
        // This waits for what the kernel is doing with the ring.
        if let Err(error) = self.vhost.set_backend(index, None) {
            log::error!("vhost-net: cannot stop queue {index}: {error}");
        }
    }

    fn event(&mut self, _what: u32, _ops: &mut EventOps) -> Result<(), Fault> {
        Ok(())
    }
}

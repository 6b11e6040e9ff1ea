//! A hostile guest or peer that does what a byte string says: the bodies of the fuzz targets, and of tests that make the strings up. They panic where a device
//! breaks what it promises, and end with the string.

mod back_end;
mod disk;
mod front_end;
mod function;
mod iommu;
mod messages;
mod said;
mod tap;

pub use back_end::fuzz_back_end;
pub use disk::fuzz_disk;
pub use front_end::fuzz_front_end;
pub use function::fuzz_function;
pub use iommu::fuzz_iommu;
pub use messages::fuzz_messages;
pub use tap::fuzz_tap;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use crate::fake::FakeHost;
use crate::host::{Files, Host};
use crate::vhost_pci::{VhostPci, VhostPciConfig};
use crate::vhost_user::{
    Connection, Iotlb, MemoryTable, Message, Payload, SingleMemoryRegion, SocketRole, U64,
    VringAddr, VringFd, VringState,
};
use crate::virtio::harness::{Driver, Ring};
use crate::virtio::{VirtioPci, status};
use crate::virtio_iommu::{Endpoint, IommuConfig, VirtioIommu};
use crate::virtio_net::{NetConfig, RingFeatures, VirtioNet};

/// What a queue's registers take.
const RINGS: u64 = 0x10_0000;
/// The window of a vhost-pci device.
const WINDOW: u64 = 1 << 30;

/// The rest of the byte string. Behind its end everything is 0.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let front = self.slice(N);
        bytes[..front.len()].copy_from_slice(front);
        bytes
    }

    fn slice(&mut self, len: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        front
    }

    fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn over(&self) -> bool {
        self.0.is_empty()
    }
}

type Events = EventManager<Box<dyn MutEventSubscriber + Send>>;

/// Lets the device thread do what it can.
fn turn(events: &mut Events) {
    for _ in 0..8 {
        if events.run_with_timeout(0).expect("epoll works") == 0 {
            return;
        }
    }
}

fn vhost_pci(socket: std::path::PathBuf, role: SocketRole) -> VhostPciConfig {
    VhostPciConfig {
        socket,
        role,
        window: WINDOW,
        queues: 4,
        uuid: [0; 16],
        miss_timeout: Duration::ZERO,
        files: Files::Sealed,
        inflight: true,
        log: false,
    }
}

fn virtio_net(socket: std::path::PathBuf, role: SocketRole) -> NetConfig {
    NetConfig {
        socket,
        role,
        queue_pairs: 2,
        queue_size: 64,
        rings: RingFeatures {
            packed: true,
            ..RingFeatures::default()
        },
        mac: [2, 0, 0, 1, 2, 3],
        iotlb_timeout: Duration::from_millis(1),
    }
}

//! Registers.

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::pci::{PciFunction, PciRoot};
use crate::virtio::VirtioDevice;
use crate::virtio_blk::{BlkConfig, VirtioBlk};
use crate::virtio_rng::VirtioRng;

/// Where BARs go.
const MMIO32: u64 = 0xd000_0000;
const MMIO64: u64 = 0x10_0000_0000;
/// Most capabilities that 256 bytes have room for.
const MOST_CAPABILITIES: usize = 48;
/// Identities of the functions, in the order of their slots.
const DEVICES: [u32; 5] = [
    0x1057_1af4,
    0x107d_1af4,
    0x1041_1af4,
    0x1042_1af4,
    0x1044_1af4,
];

/// A guest that reads and writes configuration space, MSI-X, BARs and memory of one device of each kind as it likes. What a device is
/// stays what it is, its capabilities can be walked, and it answers each access.
pub fn fuzz_function(data: &[u8]) {
    let mut input = Input(data);
    let host = FakeHost::new();
    let mut events: Events = EventManager::new().expect("epoll");
    let root = PciRoot::new();
    let iommu = VirtioIommu::new(IommuConfig::default(), host.clone()).expect("a configuration");
    events.add_subscriber(iommu.subscriber());
    let endpoint = Endpoint::new().expect("an eventfd");
    let behind = input
        .byte()
        .is_multiple_of(2)
        .then(|| Arc::clone(&endpoint));
    // Nobody is there.
    let config = vhost_pci("/proc/no-such-socket".into(), SocketRole::Connect);
    let window = VhostPci::new(config, behind.clone(), host.clone()).expect("a configuration");
    events.add_subscriber(window.subscriber());
    let config = virtio_net("/proc/no-such-socket".into(), SocketRole::Connect);
    let net = VirtioNet::new(config, behind.clone(), host.clone()).expect("a configuration");
    events.add_subscriber(net.subscriber());
    let file = TempFile::new().expect("a file");
    file.as_file().set_len(1 << 20).expect("room");
    let config = BlkConfig {
        path: file.as_path().into(),
        readonly: false,
    };
    let disk = VirtioBlk::new(&config, behind.clone(), host.clone()).expect("a disk");
    events.add_subscriber(disk.subscriber());
    events.add_subscriber(disk.file_subscriber());
    let rng = VirtioRng::new(behind.clone(), host.clone()).expect("an eventfd");
    events.add_subscriber(rng.subscriber());
    let devices: [Arc<dyn VirtioDevice>; 5] = [iommu.clone(), window, net, disk, rng];
    let functions = devices.map(|device| VirtioPci::new(device, host.clone()).expect("a device"));
    let slots = functions
        .each_ref()
        .map(|f| root.add(f.clone()).expect("a slot"));
    if behind.is_some() {
        // They share one.
        iommu.add_endpoint(u32::from(slots[1]) << 3, endpoint);
    }
    root.assign_bars(MMIO32..MMIO32 + (1 << 28), MMIO64..MMIO64 << 1)
        .expect("room");
    while !input.over() {
        let which = usize::from(input.byte());
        let (function, slot) = (&functions[which % 5], u64::from(slots[which % 5]));
        let config = |offset: u16| slot << 15 | u64::from(offset % 4096);
        match which / 5 % 8 {
            0 => {
                let offset = config(input.half() % 256);
                let len = 1 << (input.byte() % 3);
                root.ecam_write(offset, input.slice(len));
            }
            1 => {
                let mut data = [0; 4];
                root.ecam_read(config(input.half()), &mut data);
            }
            // Common configuration, where nearly everything happens; then all of BAR 0, with odd lengths.
            2 | 3 => {
                let offset = u64::from(input.byte() % 64);
                let len = 1 << (input.byte() % 4);
                function.bar_write(0, offset, input.slice(len));
            }
            4 => {
                let offset = u64::from(input.half());
                let len = usize::from(input.byte() % 9);
                function.bar_write(0, offset, input.slice(len));
            }
            5 => {
                let mut data = [0; 8];
                let len = usize::from(input.byte() % 9);
                function.bar_read(0, input.half().into(), &mut data[..len]);
                let bar = MMIO32 + u64::from(input.half());
                root.mmio_read(bar, &mut data[..len]);
            }
            6 => {
                let at = RINGS + u64::from(input.half());
                let len = usize::from(input.byte());
                let written = host
                    .memory()
                    .write_slice(input.slice(len), GuestAddress(at));
                written.expect("it is memory");
            }
            _ => turn(&mut events),
        }
        for (slot, device) in slots.iter().zip(DEVICES) {
            expect_identity(&root, u64::from(*slot) << 15, device);
        }
    }
    turn(&mut events);
}

fn config_word(root: &PciRoot, offset: u64) -> u32 {
    let mut data = [0; 4];
    root.ecam_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn expect_identity(root: &PciRoot, base: u64, device: u32) {
    assert_eq!(
        config_word(root, base),
        device,
        "a device's identity changed"
    );
    let [mut at, ..] = config_word(root, base | 0x34).to_le_bytes();
    let mut count = 0;
    while at != 0 {
        assert!(at >= 0x40 && at.is_multiple_of(4) && count < MOST_CAPABILITIES);
        [_, at, ..] = config_word(root, base | u64::from(at)).to_le_bytes();
        count += 1;
    }
    assert!(count > 4, "capabilities are gone");
}

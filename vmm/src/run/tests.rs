//! Devices put together, without a guest.

use devices::host::Files;
use devices::vhost_pci::{DEFAULT_MISS_TIMEOUT, VhostPciConfig};
use devices::vhost_user::SocketRole;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::Seccomp;
use crate::testing::{self, image, ram};

/// A VM with an IOMMU and two devices behind it.
fn config(directory: &TempDir, iommu: IommuConfig) -> VmConfig {
    let device = |name: &str| VhostPciConfig {
        socket: directory.as_path().join(name),
        role: SocketRole::Listen,
        window: 1 << 30,
        queues: 2,
        uuid: [0; 16],
        miss_timeout: DEFAULT_MISS_TIMEOUT,
        files: Files::Sealed,
        inflight: true,
        log: false,
    };
    VmConfig {
        memory: ram(4 << 20),
        kernel: image(testing::power_off()),
        initrd: None,
        cmdline: String::new(),
        affinity: Vec::new(),
        vcpus: 1,
        net: Vec::new(),
        taps: Vec::new(),
        disks: Vec::new(),
        rng: false,
        vhost_pci: vec![device("a"), device("b")],
        iommu: Some(iommu),
        console: Console::Output,
        control: None,
        metrics: None,
        capture: None,
        // It would stay on the test's thread.
        seccomp: Seccomp::Off,
    }
}

fn machine(config: &VmConfig) -> Arc<Machine> {
    let memory = Memory::new(&config.memory).unwrap();
    Arc::new(Machine::new(&open_kvm().unwrap(), memory).unwrap())
}

fn config_space<const N: usize>(pci: &PciRoot, slot: u64, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    pci.ecam_read(slot << 15 | offset, &mut data);
    data
}

#[test]
fn the_iommu_is_the_first_function_and_the_others_are_behind_it() {
    let directory = TempDir::new().unwrap();
    // What is behind it reaches memory without a driver: that shows who is.
    let bypass = IommuConfig {
        bypass: true,
        ..IommuConfig::default()
    };
    let config = config(&directory, bypass);
    let machine = machine(&config);
    let devices = Devices::new(&machine, &config, &mut Vec::new()).unwrap();
    let pci = PciRoot::new();
    plug(&machine, &pci, &devices).unwrap();
    let ids = [1, 2, 3].map(|slot| u16::from_le_bytes(config_space(&pci, slot, 2)));
    assert_eq!(ids, [0x1057, 0x107d, 0x107d]);
    for device in &devices.vhost_pci {
        let endpoint = device.endpoint.as_ref().unwrap();
        assert_eq!(endpoint.lookup(0).unwrap().len, 4 << 20);
    }
}

#[test]
fn the_iommu_knows_each_device_by_its_requester_id_and_no_other() {
    let directory = TempDir::new().unwrap();
    let config = config(&directory, IommuConfig::default());
    let machine = machine(&config);
    let mut subscribers = Vec::new();
    let devices = Devices::new(&machine, &config, &mut subscribers).unwrap();
    let pci = PciRoot::new();
    plug(&machine, &pci, &devices).unwrap();

    let memory = Host::memory(&*machine);
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
    let (desc, avail, used, buffers) = (0x1_0000u64, 0x1_1000u64, 0x1_2000u64, 0x1_3000u64);
    // ATTACH to domain 0, with one descriptor for the request and one for the status.
    let ids = [0x08u32, 0x10, 0x18, 0x20];
    for (n, id) in (0u16..).zip(ids) {
        let request = [1, 0, id, 0, 0].map(u32::to_le_bytes).concat();
        let buffer = buffers + 0x100 * u64::from(n);
        put(buffer, &request);
        put(buffer + 0x80, &[0xff; 4]);
        let head = 2 * n;
        for (slot, at, len, flags) in [(head, buffer, 20u32, 1u16), (head + 1, buffer + 0x80, 4, 2)]
        {
            let entry = desc + 16 * u64::from(slot);
            put(entry, &at.to_le_bytes());
            put(entry + 8, &len.to_le_bytes());
            put(entry + 12, &flags.to_le_bytes());
            put(entry + 14, &(slot + 1).to_le_bytes());
        }
        put(avail + 4 + 2 * u64::from(n), &head.to_le_bytes());
    }
    put(avail + 2, &4u16.to_le_bytes());

    let bar = u32::from_le_bytes(config_space(&pci, 1, 0x10)) & !0xf;
    // The common configuration is at its beginning.
    let write = |offset: u64, bytes: &[u8]| assert!(pci.mmio_write(u64::from(bar) + offset, bytes));
    write(20, &[1]);
    write(20, &[3]);
    // VERSION_1 and MAP_UNMAP.
    for (select, bits) in [(0u32, 4u32), (1, 1)] {
        write(8, &select.to_le_bytes());
        write(12, &bits.to_le_bytes());
    }
    write(20, &[11]);
    for (queue, offset) in [(0u16, 0), (1, 0x10_0000)] {
        write(22, &queue.to_le_bytes());
        write(24, &16u16.to_le_bytes());
        for (field, at) in [(32, desc), (40, avail), (48, used)] {
            write(field, &(at + offset).to_le_bytes());
        }
        write(28, &1u16.to_le_bytes());
    }
    write(20, &[15]);

    let mut manager: EventManager<Subscriber> = EventManager::new().unwrap();
    for subscriber in subscribers {
        manager.add_subscriber(subscriber);
    }
    for _ in 0..10 {
        manager.run_with_timeout(0).unwrap();
    }
    let status = |n: u64| -> u8 {
        let at = GuestAddress(buffers + 0x100 * n + 0x80);
        memory.read_obj(at).unwrap()
    };
    // OK for slots 2 and 3, NOENT for the IOMMU itself and for a slot that is empty.
    assert_eq!([0, 1, 2, 3].map(status), [6, 0, 0, 6]);
}

#[test]
fn counters_of_several_devices_are_added_up() {
    let one = |reads, writes| [("reads", reads), ("writes", writes)];
    let all = [one(1, 2), one(10, u64::MAX), one(100, 7)];
    let sums = format!("{{\"reads\":111,\"writes\":{}}}", u64::MAX);
    assert_eq!(object(all.into_iter()), sums);
}

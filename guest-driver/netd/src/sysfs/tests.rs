//! A directory of plain files in place of the kernel's, with the configuration space and the registers that the device model has.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use devices::host::{Files, Host, Interrupt, MemoryRegion, Permission, SharedRegion, Window};
use devices::pci::PciFunction;
use devices::vhost_pci::{VhostPci as Model, VhostPciConfig};
use devices::vhost_user::SocketRole;
use devices::virtio::VirtioPci;
use guest_driver::vhost_pci::VhostPci;
use guest_driver::{Dma, Event, MsiMessage, Platform, Vectors};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::pci::Address;
use crate::vfio;

const WINDOW: u64 = 1 << 30;
/// The second window of such a device.
const RECORDS: u64 = 32 << 20;
const BAR0: u64 = 0xd000_0000;
const BAR2: u64 = 0x10_0000_0000;
const BAR4: u64 = 0x20_0000_0000;
const ARENA: u64 = 0x1234_5000;

/// A machine that has nothing but the device.
struct Nothing(GuestMemoryMmap);

impl Host for Nothing {
    fn interrupt(&self) -> io::Result<Arc<dyn Interrupt>> {
        Ok(Arc::new(Silent))
    }
    fn add_doorbell(&self, _gpa: u64, _event: &Arc<EventFd>) -> io::Result<()> {
        Ok(())
    }
    fn remove_doorbell(&self, _gpa: u64, _event: &Arc<EventFd>) -> io::Result<()> {
        Ok(())
    }
    fn window(&self, _size: u64, _files: Files) -> io::Result<Arc<dyn Window>> {
        Ok(Arc::new(Silent))
    }
    fn shared_memory(&self, size: u64) -> io::Result<File> {
        let file = vmm_sys_util::tempfile::TempFile::new()?.into_file();
        file.set_len(size)?;
        Ok(file)
    }
    fn memory(&self) -> &GuestMemoryMmap {
        &self.0
    }
    fn memory_regions(&self) -> &[MemoryRegion] {
        &[]
    }
    fn physical_address_bits(&self) -> u8 {
        46
    }
}

struct Silent;

impl Interrupt for Silent {
    fn set_message(&self, _message: Option<devices::host::MsiMessage>) -> io::Result<()> {
        Ok(())
    }
    fn attach(&self, _source: &Arc<EventFd>) -> io::Result<()> {
        Ok(())
    }
    fn detach(&self, _source: &Arc<EventFd>) {}
    fn trigger(&self) {}
    fn pending(&self) -> bool {
        false
    }
}

impl Window for Silent {
    fn place(&self, _gpa: Option<u64>) -> io::Result<()> {
        Ok(())
    }
    fn map(&self, _offset: u64, _region: &SharedRegion, _permission: Permission) -> io::Result<()> {
        Ok(())
    }
    fn unmap(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
    fn clear(&self) {}
    fn read(&self, _offset: u64, _data: &mut [u8]) -> bool {
        false
    }
    fn write(&self, _offset: u64, _data: &[u8]) -> bool {
        false
    }
}

/// The device model's own configuration space, reached as a guest reaches it.
struct Model0(Arc<VirtioPci>);

impl Platform for Model0 {
    fn config_read(&self, _function: u8, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.0.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn config_write(&self, _function: u8, offset: u16, value: u32) {
        self.0.config_write(offset, &value.to_le_bytes());
    }
    fn map(&self, _addr: u64, _len: u64) -> Option<NonNull<u8>> {
        None
    }
    fn dma(&self, _len: usize, _align: usize) -> Option<Dma> {
        None
    }
    fn message(&self, _event: Event) -> MsiMessage {
        MsiMessage {
            address: 0,
            data: 0,
        }
    }
}

/// The directory of device 0000:00:01.0, and the model that its contents are from.
struct Fake {
    root: TempDir,
    model: Arc<VirtioPci>,
}

impl Fake {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let host = Arc::new(Nothing(
            GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 4096)]).unwrap(),
        ));
        let config = VhostPciConfig {
            socket: root.as_path().join("socket"),
            role: SocketRole::Connect,
            window: WINDOW,
            queues: 2,
            uuid: [0; 16],
            files: Files::Sealed,
            inflight: true,
            log: false,
            miss_timeout: Duration::ZERO,
        };
        let device = Model::new(config, None, host.clone()).unwrap();
        let model = VirtioPci::new(device, host).unwrap();
        model.config_write(0x10, &BAR0.to_le_bytes()[..4]);
        model.config_write(0x18, &BAR2.to_le_bytes());
        model.config_write(0x20, &BAR4.to_le_bytes());
        model.config_write(0x04, &[2]);

        let fake = Self { root, model };
        fs::create_dir(fake.dir()).unwrap();
        let mut config = [0; 256];
        fake.model.config_read(0, &mut config);
        fs::write(fake.path("config"), config).unwrap();
        let mut resource = String::new();
        for (index, bar) in fake.model.bars().iter().enumerate() {
            let (start, end, flags) = match bar {
                Some(range) if index > 0 => (range.start, range.end - 1, 0x14_220c),
                Some(range) => (range.start, range.end - 1, 0x4_0200),
                None => (0, 0, 0),
            };
            resource += &format!("{start:#018x} {end:#018x} {flags:#018x}\n");
        }
        // The ROM and what follows it.
        resource += &format!("{0:#018x} {0:#018x} {0:#018x}\n", 0).repeat(7);
        fs::write(fake.path("resource"), resource).unwrap();
        let mut registers = vec![0; 0x10000];
        for (at, dword) in (0..).step_by(4).zip(registers.chunks_exact_mut(4)) {
            fake.model.bar_read(0, at, dword);
        }
        // Memory does not follow device_feature_select: VERSION_1 in whichever half is asked for.
        registers[4..8].copy_from_slice(&1u32.to_le_bytes());
        fs::write(fake.path("resource0"), registers).unwrap();
        for (name, len) in [("resource2", WINDOW), ("resource4", RECORDS)] {
            fs::File::create(fake.path(name))
                .and_then(|file| file.set_len(len))
                .unwrap();
        }
        fake
    }

    fn dir(&self) -> PathBuf {
        self.root.as_path().join("0000:00:01.0")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    fn function(&self) -> Function {
        let address: Address = "00:01.0".parse().unwrap();
        Function::find(self.root.as_path(), address).unwrap()
    }

    fn open(&self) -> Result<Machine, Error> {
        open(&self.function(), Arena::at(ARENA, 1 << 20).unwrap())
    }

    fn bytes<const N: usize>(&self, name: &str, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let file = fs::File::open(self.path(name)).unwrap();
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

#[test]
fn bars_are_what_sizing_them_on_the_device_would_say() {
    let fake = Fake::new();
    let machine = fake.open().unwrap();
    let function = machine.function();
    assert_eq!((function.vendor, function.device), (0x1af4, 0x107d));
    assert_eq!(fake.function().ids().unwrap(), (0x1af4, 0x107d));
    let mut found = 0;
    for index in 0..6 {
        let want = function.bar(&Model0(fake.model.clone()), index);
        let got = function.bar(&machine, index);
        let numbers = |bar: Option<guest_driver::pci::Bar>| bar.map(|bar| (bar.addr, bar.size));
        // The upper half of a wide BAR means nothing by itself.
        if index != 3 && index != 5 {
            assert_eq!(numbers(got), numbers(want), "BAR {index}");
            found += usize::from(got.is_some());
        }
    }
    assert_eq!(found, 3);
    let before = u32::from_le_bytes(fake.bytes("config", 0x18));
    assert_eq!(u64::from(before & !0xf), BAR2 & 0xffff_ffff, "never sized");
}

#[test]
fn the_driver_starts_the_device_without_interrupts_and_shuts_it_down() {
    let fake = Fake::new();
    let machine = fake.open().unwrap();
    assert_eq!(machine.vectors(), Vectors::Nobody);
    let table: [u8; 64] = fake.bytes("resource0", 0x8000);
    let driver = VhostPci::new(&machine, machine.function(), machine.memory()).unwrap();
    assert_eq!(fake.bytes("resource0", 20), [0xf], "up to DRIVER_OK");
    assert_eq!(
        fake.bytes("resource0", 0x2000),
        1u32.to_le_bytes(),
        "BACKEND_UP"
    );
    for register in [32, 40, 48] {
        let addr = u64::from_le_bytes(fake.bytes("resource0", register));
        assert!((ARENA..ARENA + (1 << 20)).contains(&addr), "{addr:#x}");
    }
    for register in [16, 26] {
        assert_eq!(fake.bytes("resource0", register), [0xff; 2], "no vector");
    }
    assert_eq!(
        fake.bytes("resource0", 0x8000),
        table,
        "nor one in the table"
    );
    let [command, ..] = fake.bytes::<2>("config", 4);
    assert_eq!(command & 6, 6, "memory, bus master");
    let msix = machine
        .function()
        .capabilities(&machine)
        .find(|&(_, id)| id == 0x11)
        .unwrap()
        .0;
    let control = u16::from_le_bytes(fake.bytes("config", u64::from(msix) + 2));
    assert_eq!(control >> 15, 0, "MSI-X is off");

    // What is written through the window lies in its file.
    let window = driver.window();
    let at = window.ptr(WINDOW - 8, 8).unwrap();
    #[allow(unsafe_code)] // tests look through the window
    // SAFETY: the pointer was checked; nobody else writes there.
    unsafe {
        at.write(0x5a);
    }
    assert_eq!(fake.bytes("resource2", WINDOW - 8), [0x5a]);
    assert!(window.ptr(WINDOW - 7, 8).is_none());

    driver.shut_down().unwrap();
    assert_eq!(fake.bytes("resource0", 20), [0], "reset");
}

#[test]
fn another_function_is_not_there() {
    let machine = Fake::new().open().unwrap();
    assert_eq!(machine.config_read(0, 0), u32::MAX);
    machine.config_write(0, 4, 0);
    assert_eq!(machine.config_read(8, 4) & 2, 2, "still on the bus");
    assert!(machine.map(BAR0 + 0x1_0000, 1).is_none(), "beyond the BAR");
    assert!(machine.map(BAR0 + 0xffff, 2).is_none());
    assert!(machine.map(u64::MAX, 2).is_none());
}

#[test]
fn a_bar_that_cannot_be_mapped_is_named() {
    let fake = Fake::new();
    fs::remove_file(fake.path("resource2")).unwrap();
    symlink("/dev/null", fake.path("resource2")).unwrap();
    let machine = fake.open().unwrap();
    assert!(VhostPci::new(&machine, machine.function(), machine.memory()).is_err());
    let (bar, error) = machine.take_failure().unwrap();
    assert_eq!((bar, error.raw_os_error()), (2, Some(libc::ENODEV)));
}

#[test]
fn a_function_that_cannot_be_had_says_why_and_what_to_do() {
    let fake = Fake::new();
    let absent = Function::find(fake.root.as_path(), "00:02.0".parse().unwrap());
    assert!(
        absent
            .unwrap_err()
            .to_string()
            .contains("no PCI device 0000:00:02.0")
    );

    let vfio = vfio::open(&fake.function()).err().unwrap().to_string();
    assert!(
        vfio.contains("bound to no driver") && vfio.contains("driver_override"),
        "{vfio}"
    );
    assert!(!vfio.contains("unbind"), "{vfio}");

    symlink("../../drivers/virtio-pci", fake.path("driver")).unwrap();
    let bound = fake.open().err().unwrap().to_string();
    assert!(bound.contains("the driver virtio-pci"), "{bound}");
    assert!(
        bound.contains("echo 0000:00:01.0 > ") && bound.contains("/driver/unbind"),
        "{bound}"
    );
    let vfio = vfio::open(&fake.function()).err().unwrap().to_string();
    assert!(
        vfio.contains("virtio-pci and not to vfio-pci") && vfio.contains("unbind"),
        "{vfio}"
    );
    fs::remove_file(fake.path("driver")).unwrap();

    fs::create_dir(fake.path("iommu_group")).unwrap();
    for (kind, refused) in [("DMA-FQ\n", true), ("identity\n", false)] {
        fs::write(fake.path("iommu_group/type"), kind).unwrap();
        let result = fake.open().err().map(|error| error.to_string());
        assert_eq!(result.is_some(), refused, "{kind}");
        assert!(result.is_none_or(|text| text.contains("--via vfio")));
    }

    fs::write(fake.path("resource"), "0x1 0x2\n").unwrap();
    let table = fake.open().err().unwrap().to_string();
    assert!(table.contains("line 1"), "{table}");
}

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::fake::FakeHost;
use crate::host::MsiMessage;

const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    revision: 9,
    class: 0x02_0000,
    subsystem_vendor: 0xabcd,
    subsystem: 0xef01,
};

fn u32_at(config: &ConfigSpace, offset: u16) -> u32 {
    config.u32_at(offset)
}

/// A function with a 32-bit BAR 0 and a 64-bit BAR 2 that remembers what reached it.
struct Probe {
    config: Mutex<ConfigSpace>,
    accesses: Mutex<Vec<(u8, u64, Vec<u8>)>>,
}

impl Probe {
    fn new(size0: u64, size2: u64) -> Arc<Self> {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, BarKind::Memory32, size0).unwrap();
        config.add_bar(2, BarKind::Memory64, size2).unwrap();
        Arc::new(Self {
            config: Mutex::new(config),
            accesses: Mutex::default(),
        })
    }
}

impl PciFunction for Probe {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap().write(offset, data);
    }
    fn bars(&self) -> [Option<Range<u64>>; BARS] {
        self.config.lock().unwrap().bars()
    }
    fn bar_read(&self, bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(bar + 1);
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.accesses
            .lock()
            .unwrap()
            .push((bar, offset, data.to_vec()));
    }
}

#[test]
fn the_header_says_what_the_function_is_and_cannot_be_changed() {
    let mut config = ConfigSpace::new(IDENTITY);
    for offset in [0x00, 0x08, 0x2c] {
        config.write(offset, &[0xff; 4]);
    }
    assert_eq!(u32_at(&config, 0x00), 0x5678_1234);
    assert_eq!(u32_at(&config, 0x08), 0x0200_0009);
    assert_eq!(u32_at(&config, 0x2c), 0xef01_abcd);
}

#[test]
fn all_ones_written_to_a_bar_read_back_as_its_size() {
    let mut config = ConfigSpace::new(IDENTITY);
    config.add_bar(0, BarKind::Memory32, 0x1_0000).unwrap();
    config.add_bar(2, BarKind::Memory64, 1 << 36).unwrap();
    for offset in (0x10..0x28).step_by(4) {
        config.write(offset, &[0xff; 4]);
    }
    assert_eq!(u32_at(&config, 0x10), 0xffff_0000);
    assert_eq!(u32_at(&config, 0x14), 0, "no BAR");
    assert_eq!(u32_at(&config, 0x18), 0b1100, "64-bit, prefetchable");
    assert_eq!(u32_at(&config, 0x1c), 0xffff_fff0);
    assert_eq!(u32_at(&config, 0x20), 0, "no BAR");
}

#[test]
fn bars_that_do_not_fit_are_refused() {
    let mut config = ConfigSpace::new(IDENTITY);
    assert!(
        config.add_bar(0, BarKind::Memory32, 0x1001).is_err(),
        "no power of two"
    );
    assert!(
        config.add_bar(0, BarKind::Memory32, 1 << 32).is_err(),
        "too large"
    );
    assert!(
        config.add_bar(5, BarKind::Memory64, 1 << 32).is_err(),
        "no second register"
    );
    config.add_bar(0, BarKind::Memory64, 1 << 32).unwrap();
    assert!(
        config.add_bar(1, BarKind::Memory32, 4096).is_err(),
        "taken by BAR 0"
    );
    assert!(
        config.add_bar(0, BarKind::Memory32, 4096).is_err(),
        "there already"
    );
}

#[test]
fn a_bar_written_byte_by_byte_moves_as_one_written_whole() {
    let mut config = ConfigSpace::new(IDENTITY);
    config.add_bar(0, BarKind::Memory32, 0x1_0000).unwrap();
    config.write(0x04, &[2]);
    for (offset, byte) in (0x10..).zip([0x12, 0x34, 0x56, 0xd0]) {
        config.write(offset, &[byte]);
    }
    assert_eq!(config.bars()[0], Some(0xd056_0000..0xd057_0000));
    // An access across two registers is what its bytes are.
    config.write(0x0f, &[0xff, 0, 0, 0x42]);
    assert_eq!(config.bars()[0], Some(0xd042_0000..0xd043_0000));
}

#[test]
fn a_bar_decodes_nothing_without_memory_enable_or_an_address() {
    let mut config = ConfigSpace::new(IDENTITY);
    config.add_bar(0, BarKind::Memory32, 0x1_0000).unwrap();
    config.write(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(config.bars()[0], None);
    config.write(0x04, &[2]);
    assert!(config.bars()[0].is_some());
    config.write(0x10, &[0; 4]);
    assert_eq!(config.bars()[0], None);
}

#[test]
fn capabilities_form_a_list_that_ends() {
    let mut config = ConfigSpace::new(IDENTITY);
    let first = config.add_capability(0x09, &[4, 1, 2], &[]).unwrap();
    let second = config.add_capability(0x11, &[5, 6], &[0, 0x80]).unwrap();
    assert_eq!(
        u32_at(&config, 0x04) >> 16 & 0x10,
        0x10,
        "status says that there is a list"
    );
    assert_eq!(u32_at(&config, 0x34), u32::from(first));
    assert_eq!(
        u32_at(&config, first) & 0xffff,
        u32::from(second) << 8 | 0x09
    );
    assert_eq!(
        u32_at(&config, second) & 0xffff,
        0x11,
        "the last one leads nowhere"
    );
    config.write(second, &[0xff; 4]);
    assert_eq!(
        u32_at(&config, second),
        0x8605_0011,
        "only the writable bits changed"
    );
    let many = (0..64).map(|_| config.add_capability(9, &[0; 14], &[]));
    assert!(many.last().unwrap().is_err(), "no room");
}

fn msix(vectors: u16) -> (Arc<FakeHost>, Msix) {
    let host = FakeHost::new();
    let msix = Msix::new(host.as_ref(), vectors).unwrap();
    (host, msix)
}

fn set_vector(msix: &mut Msix, vector: u64, address: u64, data: u32, masked: bool) {
    msix.table_write(16 * vector, &address.to_le_bytes());
    msix.table_write(16 * vector + 8, &data.to_le_bytes());
    msix.table_write(16 * vector + 12, &u32::from(masked).to_le_bytes());
}

#[test]
fn a_masked_vector_stays_pending_and_is_delivered_with_the_message_it_has_when_unmasked() {
    let (host, mut msix) = msix(3);
    let interrupt = host.interrupts()[1].clone();
    let source = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    msix.interrupt(1).unwrap().attach(&source).unwrap();
    msix.set_control(true, false, true);
    set_vector(&mut msix, 1, 0xfee0_1000, 0x41, true);

    source.write(1).unwrap();
    assert_eq!(interrupt.poll(), None);
    let mut pending = [0; 8];
    msix.pba_read(0, &mut pending);
    assert_eq!(u64::from_le_bytes(pending), 0b010);

    set_vector(&mut msix, 1, 0x1_fee0_2000, 0x42, false);
    assert_eq!(
        interrupt.poll(),
        Some(MsiMessage {
            address: 0x1_fee0_2000,
            data: 0x42
        })
    );
    assert_eq!(interrupt.poll(), None, "once");
    msix.pba_read(0, &mut pending);
    assert_eq!(u64::from_le_bytes(pending), 0);
}

#[test]
fn enable_function_mask_and_bus_master_each_stop_every_vector() {
    let (host, mut msix) = msix(2);
    set_vector(&mut msix, 0, 0xfee0_0000, 1, false);
    for (enabled, masked, bus_master) in [
        (false, false, true),
        (true, true, true),
        (true, false, false),
        (true, false, true),
    ] {
        msix.set_control(enabled, masked, bus_master);
        msix.interrupt(0).unwrap().trigger();
        let delivered = host.interrupts()[0].poll().is_some();
        assert_eq!(delivered, enabled && !masked && bus_master);
    }
}

#[test]
fn the_table_takes_only_aligned_words_and_reads_at_any_size() {
    let (_, mut msix) = msix(2);
    set_vector(&mut msix, 1, 0x1122_3344_5566_7788, 0x99aa_bbcc, false);
    msix.table_write(16, &[1]);
    msix.table_write(18, &[1, 2, 3, 4]);
    msix.table_write(20, &[1; 8]);
    let mut table = [0; 16];
    msix.table_read(16, &mut table);
    assert_eq!(table[..8], 0x1122_3344_5566_7788u64.to_le_bytes());
    assert_eq!(table[8..12], 0x99aa_bbccu32.to_le_bytes());
    assert_eq!(table[12..], [0; 4]);
    let mut bytes = [0; 3];
    msix.table_read(23, &mut bytes);
    assert_eq!(bytes, [0x11, 0xcc, 0xbb]);
    msix.table_write(32, &[0xff; 4]);
    msix.table_read(32, &mut table);
    assert_eq!(table, [0; 16], "there is no vector 2");
}

fn ecam(slot: u64, register: u64) -> u64 {
    slot << 15 | register
}

#[test]
fn absent_functions_read_all_ones_and_the_bridge_is_at_slot_0() {
    let root = PciRoot::new();
    let slot = root.add(Probe::new(4096, 1 << 20)).unwrap();
    assert_eq!(slot, 1);
    let mut id = [0; 4];
    root.ecam_read(ecam(0, 0), &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x0008_1b36);
    root.ecam_read(ecam(1, 0), &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x5678_1234);
    // Slot 2, function 1 of slot 1, and bus 1.
    for offset in [ecam(2, 0), ecam(1, 0x1000), 1 << 20 | ecam(1, 0), u64::MAX] {
        root.ecam_read(offset, &mut id);
        assert_eq!(id, [0xff; 4], "offset {offset:#x}");
    }
}

#[test]
fn a_full_bus_takes_no_more() {
    let root = PciRoot::new();
    for slot in 1..32 {
        assert_eq!(root.add(Probe::new(4096, 4096)).unwrap(), slot);
    }
    assert!(matches!(
        root.add(Probe::new(4096, 4096)),
        Err(Error::BusFull)
    ));
}

#[test]
fn the_legacy_ports_reach_the_same_registers() {
    let root = PciRoot::new();
    root.add(Probe::new(4096, 4096)).unwrap();
    assert!(root.io_write(0xcf8, &(1 << 31 | 1u32 << 11).to_le_bytes()));
    let mut id = [0; 2];
    assert!(root.io_read(0xcfe, &mut id));
    assert_eq!(u16::from_le_bytes(id), 0x5678);
    root.io_write(0xcf8, &(1 << 31 | 1u32 << 11 | 0x04).to_le_bytes());
    root.io_write(0xcfc, &[2]);
    let mut command = [0; 1];
    root.ecam_read(ecam(1, 4), &mut command);
    assert_eq!(command, [2]);
    // Not enabled; another bus; not the address register; not PCI's.
    root.io_write(0xcf8, &(1u32 << 11).to_le_bytes());
    assert!(root.io_read(0xcfc, &mut id));
    assert_eq!(id, [0xff; 2]);
    root.io_write(0xcf8, &(1 << 31 | 1u32 << 16).to_le_bytes());
    root.io_read(0xcfc, &mut id);
    assert_eq!(id, [0xff; 2]);
    root.io_write(0xcf9, &[0x0e]);
    let mut address = [0; 4];
    root.io_read(0xcf8, &mut address);
    assert_eq!(u32::from_le_bytes(address), 1 << 31 | 1 << 16);
    assert!(!root.io_read(0xd00, &mut id));
    assert!(!root.io_write(0xcf7, &id));
}

#[test]
fn assigned_bars_are_aligned_disjoint_enabled_and_reached() {
    let root = PciRoot::new();
    let probes = [
        Probe::new(4096, 1 << 30),
        Probe::new(0x1_0000, 1 << 33),
        Probe::new(16, 4096),
    ];
    for probe in &probes {
        root.add(probe.clone()).unwrap();
    }
    let (mmio32, mmio64) = (0xc000_1000..0xd000_0000, 0x1_4000_0000..0x10_0000_0000);
    root.assign_bars(mmio32.clone(), mmio64.clone()).unwrap();
    let mut ranges: Vec<_> = probes.iter().flat_map(|p| p.bars()).flatten().collect();
    assert_eq!(ranges.len(), 6);
    ranges.sort_by_key(|range| range.start);
    assert!(
        ranges.array_windows().all(|[a, b]| a.end <= b.start),
        "{ranges:x?}"
    );
    for (probe, range) in probes
        .iter()
        .flat_map(|p| p.bars().into_iter().flatten().map(move |r| (p, r)))
    {
        let size = range.end - range.start;
        assert!(range.start.is_multiple_of(size));
        let area = if range.start < 1 << 32 {
            &mmio32
        } else {
            &mmio64
        };
        assert!(area.start <= range.start && range.end <= area.end);
        assert!(root.mmio_write(range.start + 3, &[7]));
        let (_, offset, data) = probe.accesses.lock().unwrap().pop().unwrap();
        assert_eq!((offset, data), (3, vec![7]));
    }
    let mut data = [0];
    assert!(!root.mmio_read(0xc000_0000, &mut data));
    assert_eq!(data, [0], "nobody there, nothing touched");
    assert!(root.mmio_read(probes[0].bars()[2].clone().unwrap().end - 1, &mut data));
    assert_eq!(data, [3]);
    root.ecam_write(ecam(1, 4), &[0]);
    assert!(
        !root.mmio_write(
            probes[0]
                .bars()
                .iter()
                .flatten()
                .next()
                .map_or(0xc000_1000, |r| r.start),
            &[1]
        )
    );
}

#[test]
fn bars_that_do_not_fit_are_reported_by_name() {
    let root = PciRoot::new();
    root.add(Probe::new(4096, 1 << 30)).unwrap();
    let error = root
        .assign_bars(0xc000_0000..0xc000_1000, 0x4000_0000..0x7fff_f000)
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::NoSpace {
                slot: 1,
                bar: 2,
                size: 0x4000_0000
            }
        ),
        "{error}"
    );
}

proptest! {
    #[test]
    fn no_access_to_the_root_panics(
        accesses in prop::collection::vec((any::<u64>(), any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..64),
        narrow in any::<bool>(),
    ) {
        let root = PciRoot::new();
        root.add(Probe::new(4096, 1 << 36)).unwrap();
        for (offset, port, mut data) in accesses {
            let offset = if narrow { offset % (1 << 17) } else { offset };
            root.ecam_write(offset, &data);
            root.ecam_read(offset, &mut data);
            let port = if narrow { 0xcf0 + port % 32 } else { port };
            root.io_write(port, &data);
            root.io_read(port, &mut data);
            root.mmio_write(offset, &data);
            root.mmio_read(offset, &mut data);
        }
    }

    #[test]
    fn only_writable_bits_of_configuration_space_ever_change(
        writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..32),
    ) {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, BarKind::Memory32, 4096).unwrap();
        config.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        let before = config.clone();
        for (offset, data) in &writes {
            config.write(offset % 300, data);
        }
        let writable = |offset: u16| match offset {
            0x04 => 0b110,
            0x05 => 0b100,
            0x0c | 0x3c | 0x12 | 0x13 => 0xff,
            0x11 => 0xf0,
            0x43 => 0xc0,
            _ => 0u8,
        };
        for offset in 0..256 {
            let (mut old, mut new) = ([0], [0]);
            before.read(offset, &mut old);
            config.read(offset, &mut new);
            prop_assert_eq!((old[0] ^ new[0]) & !writable(offset), 0, "offset {:#x}", offset);
        }
    }
}

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

const GIB: u64 = 1 << 30;

fn description() -> Description {
    Description {
        vcpus: 4,
        window64: 64 * GIB..512 * GIB,
        translated: Some(Translated {
            iommu: 1,
            slots: 2..=3,
        }),
    }
}

/// A table as a guest finds it: by its address, and as long as it says.
struct Table(Vec<u8>);

impl Table {
    fn at(memory: &GuestMemoryMmap, address: u64) -> Self {
        let len: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let table = Self(bytes);
        assert_eq!(sum(&table.0), 0, "{}", table.signature());
        table
    }

    fn signature(&self) -> String {
        String::from_utf8(self.0[..4].to_vec()).unwrap()
    }

    fn number(&self, offset: usize, len: usize) -> u64 {
        number(&self.0[offset..offset + len])
    }
}

fn number(bytes: &[u8]) -> u64 {
    let add = |value, byte: &u8| value << 8 | u64::from(*byte);
    bytes.iter().rev().fold(0, add)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// What a guest finds that follows the root pointer: the tables of the XSDT, and the DSDT behind the FADT.
fn found(vm: &Description) -> Vec<Table> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
    write(&memory, vm).unwrap();
    let mut root = [0; 36];
    memory.read_slice(&mut root, GuestAddress(RSDP)).unwrap();
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
    assert_eq!((root[15], number(&root[20..24])), (2, 36));
    let xsdt = Table::at(&memory, number(&root[24..32]));
    assert_eq!(xsdt.signature(), "XSDT");
    let mut tables: Vec<Table> = xsdt.0[36..]
        .chunks(8)
        .map(|entry| Table::at(&memory, number(entry)))
        .collect();
    let dsdt = Table::at(&memory, tables[0].number(140, 8));
    tables.push(dsdt);
    tables
}

fn signatures(vm: &Description) -> Vec<String> {
    found(vm).iter().map(Table::signature).collect()
}

fn table(vm: &Description, signature: &str) -> Table {
    let mut all = found(vm).into_iter();
    all.find(|table| table.signature() == signature).unwrap()
}

#[test]
fn every_table_is_found_from_the_root_with_its_length_and_checksum() {
    assert_eq!(
        signatures(&description()),
        ["FACP", "APIC", "MCFG", "VIOT", "DSDT"]
    );
    let plain = Description {
        translated: None,
        ..description()
    };
    assert_eq!(signatures(&plain), ["FACP", "APIC", "MCFG", "DSDT"]);
}

#[test]
fn the_tables_lie_in_memory_that_the_map_keeps_from_the_guest() {
    for vcpus in [1, 8] {
        let vm = Description {
            vcpus,
            ..description()
        };
        let end = RSDP + tables(&vm).len() as u64;
        let map = crate::layout::e820(256 << 20);
        let reserved = map
            .iter()
            .find(|(start, len, _)| *start <= RSDP && end <= start + len);
        assert_eq!(
            reserved.map(|entry| entry.2),
            Some(crate::layout::E820Kind::Reserved)
        );
    }
}

#[test]
fn the_fixed_description_has_reduced_hardware_a_reset_register_and_sleep_registers() {
    // Offsets: ACPI 6.5, table 5.9.
    let fadt = table(&description(), "FACP");
    assert_eq!(fadt.0.len(), 276);
    let flags = fadt.number(112, 4);
    assert_eq!((flags >> 20 & 1, flags >> 10 & 1), (1, 1));
    let register = |offset: usize| {
        assert_eq!(
            (fadt.number(offset, 1), fadt.number(offset + 1, 1)),
            (1, 8),
            "a byte of the I/O space"
        );
        fadt.number(offset + 4, 8)
    };
    assert_eq!((register(116), fadt.number(128, 1)), (0x64, 0xFE));
    assert_eq!((register(244), register(256)), (0x600, 0x601));
}

#[test]
fn the_processors_have_the_apic_ids_that_cpuid_tells_them() {
    for vcpus in [1u8, 4, 8] {
        let vm = Description {
            vcpus,
            ..description()
        };
        let madt = table(&vm, "APIC");
        assert_eq!(madt.number(36, 4), 0xFEE0_0000);
        let mut ids = Vec::new();
        let mut io_apics = Vec::new();
        let mut rest = &madt.0[44..];
        while let [kind, len, ..] = *rest {
            let (entry, more) = rest.split_at(len.into());
            match kind {
                0 => ids.push((entry[2], entry[3], number(&entry[4..8]))),
                1 => io_apics.push((number(&entry[4..8]), number(&entry[8..12]))),
                _ => panic!("{entry:x?}"),
            }
            rest = more;
        }
        let expected: Vec<_> = (0..vcpus).map(|id| (id, id, 1)).collect();
        assert_eq!(ids, expected);
        assert_eq!(io_apics, [(0xFEC0_0000, 0)]);
    }
}

#[test]
fn configuration_space_is_where_it_is() {
    let mcfg = table(&description(), "MCFG");
    assert_eq!(mcfg.0.len(), 60);
    assert_eq!(mcfg.number(44, 8), ECAM_BASE);
    // Segment, first and last bus.
    assert_eq!(mcfg.number(52, 4), 0);
}

#[test]
fn the_iommu_table_names_the_iommu_and_the_endpoints_behind_it() {
    let viot = table(&description(), "VIOT");
    assert_eq!((viot.number(36, 2), viot.number(38, 2)), (2, 48));
    // A virtio-iommu on PCI: segment, and bus, device and function.
    assert_eq!((viot.number(48, 1), viot.number(50, 2)), (3, 16));
    assert_eq!((viot.number(52, 2), viot.number(54, 2)), (0, 1 << 3));
    // A range of functions: the first one's endpoint, the first and the last, and what translates for them.
    assert_eq!((viot.number(64, 1), viot.number(66, 2)), (1, 24));
    assert_eq!(viot.number(68, 4), 2 << 3);
    assert_eq!((viot.number(76, 2), viot.number(78, 2)), (2 << 3, 3 << 3));
    assert_eq!(viot.number(80, 2), 48);
}

#[test]
fn the_host_bridge_decodes_the_windows_that_bars_are_put_into() {
    let dsdt = table(&description(), "DSDT").0;
    let mut expected = Vec::new();
    let window = |min: u64, max: u64| [0, min, max, 0, max - min + 1];
    for value in window(0xC000_0000, 0xDFFF_FFFF) {
        expected.extend(u32::try_from(value).unwrap().to_le_bytes());
    }
    assert!(dsdt.windows(expected.len()).any(|part| part == expected));
    expected.clear();
    for value in window(64 * GIB, 512 * GIB - 1) {
        expected.extend(value.to_le_bytes());
    }
    assert!(dsdt.windows(expected.len()).any(|part| part == expected));
}

#[test]
fn soft_off_has_the_sleep_type_that_the_bus_understands() {
    let dsdt = table(&description(), "DSDT").0;
    let at = dsdt.windows(4).position(|part| part == b"_S5_").unwrap();
    // A package of four elements, the first of them a byte.
    assert_eq!(dsdt[at + 4], 0x12);
    assert_eq!(&dsdt[at + 6..at + 9], &[4, 0x0A, SLEEP_TYPE_S5]);
}

//! Where things lie in the guest's physical address space.
//!
//! | range | what |
//! |---|---|
//! | 0 .. 3 GiB | RAM (less where the VM has less); 0xE_0000 .. 0x10_0000 in it: ACPI tables |
//! | 0xC000_0000 .. 0xE000_0000 | 32-bit PCI BARs |
//! | 0xE000_0000 .. 0xE010_0000 | PCI configuration space (ECAM) of bus 0 |
//! | 0xFEC0_0000, 0xFEE0_0000 | I/O APIC, local APIC (in the kernel) |
//! | 0xFFFB_C000 .. 0xFFFC_0000 | KVM's identity page table and TSS |
//! | 4 GiB .. | the rest of the RAM |
//! | behind that | memory for devices, where it is kept apart from the RAM |
//! | max(64 GiB, end of memory) .. | 64-bit PCI BARs |

use std::ops::Range;

/// The page size of the host and the guest.
pub const PAGE_SIZE: u64 = 4096;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// RAM that does not fit below [`LOW_RAM_END`] starts here.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// 32-bit PCI BARs.
pub const PCI_WINDOW32: Range<u64> = 0xC000_0000..0xE000_0000;
/// PCI configuration space.
pub const ECAM_BASE: u64 = 0xE000_0000;
/// Length of [`ECAM_BASE`]: one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// KVM's I/O APIC.
pub const IO_APIC: u32 = 0xFEC0_0000;
/// KVM's local APICs.
pub const LOCAL_APIC: u32 = 0xFEE0_0000;
/// Three pages that KVM wants for itself on some processors.
pub const KVM_TSS: u64 = 0xFFFB_D000;
/// One page that KVM wants for itself on some processors.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// The low memory that a PC keeps for firmware starts here.
pub const FIRMWARE_START: u64 = 0x9_FC00;
/// The root of the ACPI tables, and the tables from here to [`RESET_VECTOR`] at most.
pub const RSDP: u64 = 0xE_0000;
/// Where an operating system jumps to, in real mode, that wants the firmware to reset the machine: the last 16 bytes below 1 MiB.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// RAM is ordinary again from here on.
pub const HIMEM_START: u64 = 0x10_0000;

const GIB: u64 = 1 << 30;
/// Guest software that maps a fixed 512 GiB identically reaches everything below this.
const IDENTITY_LIMIT: u64 = 512 * GIB;
const WINDOW64_UNIT: u64 = 64 * GIB;
const WINDOW64_SIZE: u64 = 448 * GIB;

/// The ranges (address, length) of `size` bytes of RAM, in ascending order.
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(LOW_RAM_END);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((HIGH_RAM_START, size - low));
    }
    ranges
}

/// The first address behind `size` bytes of RAM.
pub fn ram_end(size: u64) -> u64 {
    match size.checked_sub(LOW_RAM_END) {
        Some(high) if high > 0 => HIGH_RAM_START.saturating_add(high),
        _ => size,
    }
}

/// The range (address, length) of `dma` bytes of memory for devices beside `ram` bytes of RAM.
pub fn dma_range(ram: u64, dma: u64) -> (u64, u64) {
    (ram_end(ram).max(HIGH_RAM_START), dma)
}

/// Where 64-bit BARs go: 448 GiB from 64 GiB on, or from the end of RAM rounded up to 64 GiB; cut to 512 GiB where
/// 64 GiB or more are left below that, and to what `address_bits` allow. On a machine with few address bits it starts
/// right behind the RAM. `None` where nothing is left.
pub fn pci_window64(ram_end: u64, address_bits: u8) -> Option<Range<u64>> {
    let limit = 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
    let mut start = ram_end.max(1).checked_next_multiple_of(WINDOW64_UNIT)?;
    if start >= limit {
        start = ram_end.max(HIGH_RAM_START).checked_next_multiple_of(GIB)?;
    }
    let mut end = start.checked_add(WINDOW64_SIZE)?.min(limit);
    if start + WINDOW64_UNIT <= IDENTITY_LIMIT {
        end = end.min(IDENTITY_LIMIT);
    }
    (start < end).then_some(start..end)
}

/// What the firmware's memory map says of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum E820Kind {
    /// Usable RAM.
    Ram = 1,
    /// Not RAM.
    Reserved = 2,
}

/// The firmware's memory map (address, length, kind) of a VM with `size` bytes of RAM, in ascending order.
pub fn e820(size: u64) -> Vec<(u64, u64, E820Kind)> {
    let mut map = vec![
        (0, FIRMWARE_START, E820Kind::Ram),
        (
            FIRMWARE_START,
            HIMEM_START - FIRMWARE_START,
            E820Kind::Reserved,
        ),
    ];
    for (start, len) in ram_ranges(size) {
        let from = start.max(HIMEM_START);
        let end = start + len;
        if start == HIGH_RAM_START {
            map.push((ECAM_BASE, ECAM_SIZE, E820Kind::Reserved));
        }
        if end > from {
            map.push((from, end - from, E820Kind::Ram));
        }
    }
    if size <= LOW_RAM_END {
        map.push((ECAM_BASE, ECAM_SIZE, E820Kind::Reserved));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ram_is_one_range_from_zero() {
        assert_eq!(ram_ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ram_end(128 << 20), 128 << 20);
        assert_eq!(ram_ranges(LOW_RAM_END), [(0, LOW_RAM_END)]);
        assert_eq!(ram_end(LOW_RAM_END), LOW_RAM_END);
    }

    #[test]
    fn ram_beyond_three_gib_goes_on_at_four() {
        let size = LOW_RAM_END + 4096;
        assert_eq!(ram_ranges(size), [(0, LOW_RAM_END), (HIGH_RAM_START, 4096)]);
        assert_eq!(ram_end(size), HIGH_RAM_START + 4096);
    }

    #[test]
    fn the_64_bit_window_stays_below_512_gib_where_it_can() {
        assert_eq!(pci_window64(1 << 30, 48), Some(64 * GIB..512 * GIB));
        assert_eq!(pci_window64(64 * GIB, 48), Some(64 * GIB..512 * GIB));
        assert_eq!(pci_window64(64 * GIB + 1, 48), Some(128 * GIB..512 * GIB));
        assert_eq!(pci_window64(500 * GIB, 48), Some(512 * GIB..960 * GIB));
    }

    #[test]
    fn the_64_bit_window_never_passes_the_address_bits() {
        assert_eq!(pci_window64(1 << 30, 38), Some(64 * GIB..256 * GIB));
        assert_eq!(pci_window64(1 << 30, 36), Some(4 * GIB..64 * GIB));
        assert_eq!(pci_window64(6 * GIB, 36), Some(6 * GIB..64 * GIB));
        assert_eq!(pci_window64(64 * GIB, 36), None);
        assert_eq!(pci_window64(u64::MAX, 48), None);
    }

    #[test]
    fn the_memory_map_is_ascending_without_overlap_and_covers_the_ram_once() {
        for size in [
            2 << 20,
            128 << 20,
            LOW_RAM_END,
            LOW_RAM_END + (2 << 20),
            8 << 30,
        ] {
            let map = e820(size);
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{size:#x}: {map:x?}");
            }
            let usable: u64 = map
                .iter()
                .filter(|e| e.2 == E820Kind::Ram)
                .map(|e| e.1)
                .sum();
            assert_eq!(usable, size - (HIMEM_START - FIRMWARE_START), "{size:#x}");
            assert!(map.contains(&(ECAM_BASE, ECAM_SIZE, E820Kind::Reserved)));
        }
    }
}

//! The ACPI tables of a VM: hardware-reduced (ACPI 6.5, section 3.11.1), and no more than an operating system needs to find the
//! processors, the interrupt controllers, the PCI bus, the serial ports and the IOMMU, to power off and to reset.
//!
//! The built-in guest doesn't look at them. The root pointer lies at [`RSDP`], which boot_params name, and the tables behind it.

#[cfg(test)]
mod tests;

use std::ops::{Range, RangeInclusive};

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::viot::{PciDevice, PciRange, VIOT, VirtIoPciIommu};
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::bus::{KEYBOARD_CONTROL, KEYBOARD_RESET, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_S5};
use crate::layout::{ECAM_BASE, ECAM_SIZE, IO_APIC, LOCAL_APIC, PCI_WINDOW32, RESET_VECTOR, RSDP};
use crate::serial::{COM1, COM1_IRQ, COM2, COM2_IRQ, PORTS};

const OEM: [u8; 6] = *b"VHOPCI";
const OEM_TABLE: [u8; 8] = *b"VHOSTPCI";
const OEM_REVISION: u32 = 1;

/// Why a VM cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Guest memory cannot be written.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The tables are longer than the place that is kept for them.
    #[error("the ACPI tables need {0} bytes, which is more than there is room for")]
    TooLong(usize),
}

/// Which PCI functions are behind a virtio-iommu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Translated {
    /// The slot of the virtio-iommu on bus 0.
    pub(crate) iommu: u8,
    /// The slots of the functions behind it; each one's endpoint ID is its requester ID.
    pub(crate) slots: RangeInclusive<u8>,
}

/// What the tables say of a VM.
pub(crate) struct Description {
    /// How many processors; their APIC IDs count from 0.
    pub(crate) vcpus: u8,
    /// Where 64-bit BARs lie.
    pub(crate) window64: Range<u64>,
    /// What is behind the virtio-iommu, where there is one with something behind it.
    pub(crate) translated: Option<Translated>,
}

/// Writes the tables to the place that [`crate::layout`] keeps for them.
pub(crate) fn write(memory: &GuestMemoryMmap, vm: &Description) -> Result<(), Error> {
    let bytes = tables(vm);
    if bytes.len() as u64 > RESET_VECTOR - RSDP {
        return Err(Error::TooLong(bytes.len()));
    }
    Ok(memory.write_slice(&bytes, GuestAddress(RSDP))?)
}

/// The root pointer and everything behind it, as it lies in memory from [`RSDP`] on.
fn tables(vm: &Description) -> Vec<u8> {
    // The root pointer goes there last, when it's known where the XSDT is.
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt = append(&mut bytes, &dsdt(vm));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(append(&mut bytes, &fadt(dsdt)));
    xsdt.add_entry(append(&mut bytes, &madt(vm.vcpus)));
    xsdt.add_entry(append(&mut bytes, &mcfg()));
    if let Some(translated) = &vm.translated {
        xsdt.add_entry(append(&mut bytes, &viot(translated)));
    }
    let xsdt = append(&mut bytes, &xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    bytes.splice(..root.len(), root);
    bytes
}

/// Appends a table; returns its guest physical address.
fn append(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    let address = RSDP + bytes.len() as u64;
    table.to_aml_bytes(bytes);
    address
}

fn port(port: u16) -> GAS {
    GAS::new(
        RegisterSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

/// The fixed description (ACPI 6.5, section 5.2.9).
fn fadt(dsdt: u64) -> impl Aml {
    // IA-PC boot architecture flags (table 5.11): no VGA, no ASPM, no CMOS clock; the bit that announces a keyboard controller isn't set either.
    const NO_VGA: u16 = 1 << 2;
    const NO_ASPM: u16 = 1 << 4;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // No buttons among the fixed hardware, of which there is none.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (NO_VGA | NO_ASPM | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(KEYBOARD_CONTROL);
    fadt.reset_value = KEYBOARD_RESET;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.finalize()
}

/// Processors and interrupt controllers (section 5.2.12).
fn madt(vcpus: u8) -> impl Aml {
    let local = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

/// Configuration space (PCI Firmware Specification 3.3, section 4.1.2).
fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 0);
    mcfg
}

/// What is behind the virtio-iommu (ACPI 6.5, section 5.2.36).
fn viot(translated: &Translated) -> impl Aml {
    let device = |slot| PciDevice::new(0, 0, slot, 0);
    let mut viot = VIOT::new(OEM, OEM_TABLE, OEM_REVISION);
    let iommu = viot.add_virtio_pci_iommu(VirtIoPciIommu::new(device(translated.iommu)));
    let (first, last) = (*translated.slots.start(), *translated.slots.end());
    viot.add_pci_range(PciRange::new(device(first), device(last), &iommu));
    viot
}

/// A device of the namespace.
struct Node<'a> {
    name: &'static str,
    hid: &'static str,
    /// What else it is compatible with.
    cid: Option<&'static str>,
    uid: u8,
    resources: ResourceTemplate<'a>,
}

impl Aml for Node<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = Name::new(Path::new("_HID"), &EISAName::new(self.hid));
        let cid = self
            .cid
            .map(|cid| Name::new(Path::new("_CID"), &EISAName::new(cid)));
        let uid = Name::new(Path::new("_UID"), &self.uid);
        let resources = Name::new(Path::new("_CRS"), &self.resources);
        let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &resources];
        children.extend(cid.as_ref().map(|cid| cid as &dyn Aml));
        Device::new(Path::new(self.name), children).to_aml_bytes(sink);
    }
}

/// The devices that can't be found otherwise, and how to power off.
fn dsdt(vm: &Description) -> Sdt {
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    // A UART has eight ports.
    let ports = u8::try_from(PORTS).unwrap_or(8);
    let pin = |irq| Interrupt::new(true, true, false, false, irq);

    let bus = AddressSpace::new_bus_number(0u16, 0);
    let configuration = IO::new(0xCF8, 0xCF8, 1, 8);
    let window32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low(PCI_WINDOW32.start),
        low(PCI_WINDOW32.end - 1),
        None,
    );
    let window64 = AddressSpace::new_memory(
        AddressSpaceCacheable::PreFetchable,
        true,
        vm.window64.start,
        vm.window64.end - 1,
        None,
    );
    // Functions have message-signalled interrupts only: there is no _PRT.
    let bridge = Node {
        name: "PCI0",
        hid: "PNP0A08",
        cid: Some("PNP0A03"),
        uid: 0,
        resources: ResourceTemplate::new(vec![&bus, &configuration, &window32, &window64]),
    };
    // Operating systems believe MCFG where a motherboard resource reserves the same range.
    let ecam = Memory32Fixed::new(true, low(ECAM_BASE), low(ECAM_SIZE));
    let board = Node {
        name: "MBRD",
        hid: "PNP0C02",
        cid: None,
        uid: 0,
        resources: ResourceTemplate::new(vec![&ecam]),
    };
    let com1 = (IO::new(COM1, COM1, 1, ports), pin(COM1_IRQ));
    let com2 = (IO::new(COM2, COM2, 1, ports), pin(COM2_IRQ));
    let uart = |name, uid, resources| Node {
        name,
        hid: "PNP0501",
        cid: None,
        uid,
        resources: ResourceTemplate::new(resources),
    };
    let com1 = uart("COM1", 1, vec![&com1.0 as &dyn Aml, &com1.1]);
    let com2 = uart("COM2", 2, vec![&com2.0 as &dyn Aml, &com2.1]);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8]),
    )
    .to_aml_bytes(&mut dsdt);
    Scope::new(Path::new("_SB_"), vec![&bridge, &board, &com1, &com2]).to_aml_bytes(&mut dsdt);
    dsdt
}

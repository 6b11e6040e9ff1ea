//! A function through VFIO: behind an IOMMU, with interrupts. The kernel resets it when the process ends, however it ends.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};

use crate::dma::{self, Arena};
use crate::machine::{Files, Machine};
use crate::pci::{self, Function};
use crate::wait::Interrupts;

/// Device addresses of the arena: low, so that any IOMMU has them, and below those of interrupt messages.
const IOVA: u64 = 4 << 20;
const LEN: usize = 1 << 20;

/// Why a function cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is not there, or not as expected.
    #[error(transparent)]
    Function(#[from] pci::Error),
    /// VFIO does not have it.
    #[error(
        "{dir} is {}; as root:\n  modprobe vfio-pci\n  echo vfio-pci > {dir}/driver_override\n  {}echo {name} > /sys/bus/pci/drivers_probe",
        driver.as_ref().map_or("bound to no driver".into(), |driver| format!("bound to the driver {driver} and not to vfio-pci")),
        if driver.is_some() { format!("echo {} > {}/driver/unbind\n  ", dir.file_name().unwrap_or_default().display(), dir.display()) } else { String::new() },
        dir = dir.display(), name = dir.file_name().unwrap_or_default().display()
    )]
    Driver {
        /// The function's directory.
        dir: PathBuf,
        /// The driver that it has.
        driver: Option<String>,
    },
    /// No memory for the queues.
    #[error(transparent)]
    Memory(#[from] dma::Error),
    /// VFIO refused something.
    #[error("VFIO: {what}: {error}")]
    Vfio {
        /// What was asked for.
        what: &'static str,
        /// The answer.
        error: VfioError,
    },
    /// Interrupts cannot be had.
    #[error("no interrupts: {0}")]
    Interrupts(#[source] std::io::Error),
    /// It has too few interrupts.
    #[error("the device has {0} MSI-X vectors; two are needed")]
    Vectors(u32),
    /// The device's file cannot be shared.
    #[error("the descriptor of the device: {0}")]
    Descriptor(#[source] std::io::Error),
}

fn refused(what: &'static str) -> impl Fn(VfioError) -> Error {
    move |error| Error::Vfio { what, error }
}

/// Takes a function that is bound to vfio-pci.
pub fn open(function: &Function) -> Result<Machine, Error> {
    let driver = function.driver();
    if driver.as_deref() != Some("vfio-pci") {
        let dir = function.dir.clone();
        return Err(Error::Driver { dir, driver });
    }
    let bars = function.bars()?;
    let container = Arc::new(VfioContainer::new(None).map_err(refused("container"))?);
    let ops: Arc<VfioContainer> = container.clone();
    let device = VfioDevice::new(&function.dir, ops, false).map_err(refused("device"))?;
    // Registers and window are mapped until the process ends, and the device is kept as long.
    let device: &'static VfioDevice = Box::leak(Box::new(device));

    let arena = Arena::at(IOVA, LEN)?;
    map(&container, &arena).map_err(refused("memory for the queues"))?;

    let vectors = device
        .get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX)
        .map_or(0, |irq| irq.count);
    if vectors < 2 {
        return Err(Error::Vectors(vectors));
    }
    let interrupts = Interrupts::new().map_err(Error::Interrupts)?;
    device
        .enable_msix(vec![&interrupts.config, &interrupts.queue])
        .map_err(refused("interrupts (MSI-X)"))?;

    let region = |index: u32| Ok::<_, Error>((share(device)?, device.get_region_offset(index)));
    let mut files = Files {
        config: region(VFIO_PCI_CONFIG_REGION_INDEX)?,
        bars: Default::default(),
    };
    for (index, file) in (0..).zip(&mut files.bars) {
        if device.get_region_flags(index) & VFIO_REGION_INFO_FLAG_MMAP != 0 {
            *file = Some(region(index)?);
        }
    }
    let number = function.address.number();
    Ok(Machine::new(number, files, bars, arena, Some(interrupts)))
}

/// Lets the device reach the arena.
#[allow(unsafe_code)] // one block: the memory is the device's to write from here on
fn map(container: &VfioContainer, arena: &Arena) -> Result<(), VfioError> {
    let (iova, len) = arena.range();
    // SAFETY: the arena is mapped for ever, and reached through pointers and atomics only.
    unsafe { container.vfio_dma_map(iova, len, arena.base().as_ptr()) }
}

/// Another descriptor of the device.
#[allow(unsafe_code)] // one block: the type does not lend its descriptor otherwise
fn share(device: &'static VfioDevice) -> Result<File, Error> {
    // SAFETY: the device is never dropped, and its descriptor stays open.
    let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
    fd.try_clone_to_owned()
        .map(File::from)
        .map_err(Error::Descriptor)
}

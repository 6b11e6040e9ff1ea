//! A function through its files in sysfs: for a device that no driver has and no IOMMU translates for. No interrupts.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::dma::Arena;
use crate::machine::{Files, Machine};
use crate::pci::{self, Function};

/// Why a function cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is not there, or not as expected.
    #[error(transparent)]
    Function(#[from] pci::Error),
    /// A driver has it.
    #[error(
        "{dir} is bound to the driver {driver}; 'echo {name} > {dir}/driver/unbind' (as root) takes it away",
        dir = dir.display(), name = dir.file_name().unwrap_or_default().display()
    )]
    Bound {
        /// The function's directory.
        dir: PathBuf,
        /// The driver.
        driver: String,
    },
    /// Physical addresses mean nothing to it.
    #[error(
        "{} is behind an IOMMU (of type {kind}), so that it cannot reach memory by physical address: use --via vfio", dir.display()
    )]
    Translated {
        /// The function's directory.
        dir: PathBuf,
        /// How its IOMMU translates.
        kind: String,
    },
    /// A file cannot be opened.
    #[error("{}: {error}; the files of a device are root's", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Takes a function; `arena` has memory that it can reach.
pub fn open(function: &Function, arena: Arena) -> Result<Machine, Error> {
    check(function)?;
    let bars = function.bars()?;
    let open = |name: &str| {
        let path = function.dir.join(name);
        let opened = File::options().read(true).write(true).open(&path);
        opened.map_err(|error| Error::File { path, error })
    };
    let mut files = Files {
        config: (open("config")?, 0),
        bars: Default::default(),
    };
    for (index, file) in files.bars.iter_mut().enumerate() {
        if bars.get(index).is_some() {
            *file = Some((open(&format!("resource{index}"))?, 0));
        }
    }
    let number = function.address.number();
    Ok(Machine::new(number, files, bars, arena, None))
}

/// Whether a function is free, and reaches memory by physical address.
pub fn check(function: &Function) -> Result<(), Error> {
    let dir = || function.dir.clone();
    if let Some(driver) = function.driver() {
        return Err(Error::Bound { dir: dir(), driver });
    }
    match function.iommu() {
        Some(kind) if kind != "identity" => Err(Error::Translated { dir: dir(), kind }),
        _ => Ok(()),
    }
}

/// Where functions are.
#[must_use]
pub fn root() -> &'static Path {
    Path::new("/sys/bus/pci/devices")
}

#[cfg(test)]
mod tests;

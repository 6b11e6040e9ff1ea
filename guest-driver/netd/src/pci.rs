//! What the kernel says of a PCI function, and BAR registers that say the same.

use std::cell::Cell;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use guest_driver::pci::Bar;

/// Why a function cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is not there.
    #[error("there is no PCI device {0}; 'lspci -d 1af4:107d' lists vhost-pci devices")]
    Absent(Address),
    /// A file of it cannot be read.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The table of its BARs is not as Linux writes it.
    #[error("{}: line {line} is not 'start end flags'", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// Which line, from 1 on.
        line: usize,
    },
}

/// Where a function is: domain, bus, device and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    domain: u32,
    bus: u8,
    number: u8,
}

impl Address {
    /// Device * 8 + function.
    #[must_use]
    pub fn number(self) -> u8 {
        self.number
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, function) = (self.number >> 3, self.number & 7);
        write!(
            f,
            "{:04x}:{:02x}:{device:02x}.{function}",
            self.domain, self.bus
        )
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            let hex = |text: &str| {
                let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
                digits.then(|| u32::from_str_radix(text, 16).ok())?
            };
            let (device, function) = (u8::try_from(hex(device)?).ok()?, hex(function)?);
            Some(Self {
                domain: hex(domain)?,
                bus: u8::try_from(hex(bus)?).ok()?,
                number: (device < 32 && function < 8)
                    .then(|| u8::try_from(function).ok().map(|f| device << 3 | f))??,
            })
        };
        parse().ok_or_else(|| "a PCI address looks like 0000:00:01.0 (or 00:01.0)".into())
    }
}

/// A function in sysfs.
#[derive(Debug)]
pub struct Function {
    /// Where it is.
    pub address: Address,
    /// Its directory.
    pub dir: PathBuf,
}

/// Linux, include/linux/ioport.h.
const FLAG_MEMORY: u64 = 0x200;
const FLAG_PREFETCH: u64 = 0x2000;
const FLAG_64_BIT: u64 = 0x10_0000;

impl Function {
    /// The function below `root`, which is `/sys/bus/pci/devices`.
    pub fn find(root: &Path, address: Address) -> Result<Self, Error> {
        let dir = root.join(address.to_string());
        match dir.is_dir() {
            true => Ok(Self { address, dir }),
            false => Err(Error::Absent(address)),
        }
    }

    /// Its vendor and device ID.
    pub fn ids(&self) -> Result<(u16, u16), Error> {
        let path = self.dir.join("config");
        let mut bytes = [0; 4];
        let read = File::open(&path).and_then(|file| file.read_exact_at(&mut bytes, 0));
        read.map_err(|error| Error::File { path, error })?;
        let [a, b, c, d] = bytes;
        Ok((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])))
    }

    /// The driver that has it; `None` where none has.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        let target = fs::read_link(self.dir.join("driver")).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// How the IOMMU in front of it translates what the kernel has not mapped (`DMA`, `DMA-FQ`, `identity`, …); `None` where there is no IOMMU.
    #[must_use]
    pub fn iommu(&self) -> Option<String> {
        let group = self.dir.join("iommu_group");
        let kind = fs::read_to_string(group.join("type")).ok();
        group
            .exists()
            .then(|| kind.map_or_else(|| "unknown".into(), |kind| kind.trim().into()))
    }

    /// Its memory BARs.
    pub fn bars(&self) -> Result<Bars, Error> {
        let path = self.dir.join("resource");
        let text = fs::read_to_string(&path).map_err(|error| Error::File {
            path: path.clone(),
            error,
        })?;
        let mut bars = [None; 6];
        for ((line, text), bar) in (1..).zip(text.lines()).zip(&mut bars) {
            let mut numbers = text.split_ascii_whitespace().map_while(|word| {
                let digits = word.strip_prefix("0x")?;
                u64::from_str_radix(digits, 16).ok()
            });
            let (Some(start), Some(end), Some(flags)) =
                (numbers.next(), numbers.next(), numbers.next())
            else {
                return Err(Error::Table { path, line });
            };
            // Unused: all zeroes.
            let size = end.wrapping_sub(start).wrapping_add(1);
            if flags & FLAG_MEMORY != 0 && start != 0 && end >= start && size.is_power_of_two() {
                *bar = Some(Resource { start, size, flags });
            }
        }
        Ok(Bars {
            bars,
            probed: Default::default(),
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Resource {
    start: u64,
    size: u64,
    flags: u64,
}

impl Resource {
    /// What the low register says beside the address (PCI 3.0, section 6.2.5.1).
    fn kind(self) -> u64 {
        let wide = if self.flags & FLAG_64_BIT != 0 { 4 } else { 0 };
        let prefetch = if self.flags & FLAG_PREFETCH != 0 {
            8
        } else {
            0
        };
        wide | prefetch
    }
}

/// The BAR registers as the kernel's table has them. The function's own are the kernel's, and stay as they are: a driver that sizes BARs, which
/// takes them off the bus for a moment, is answered from here.
#[derive(Debug)]
pub struct Bars {
    bars: [Option<Resource>; 6],
    /// Which registers have been written with ones, to learn the size.
    probed: Cell<[bool; 6]>,
}

impl Bars {
    /// The BAR in which the bus addresses from `addr` on lie, and where there; `None` where there is none, or not for `len` bytes.
    #[must_use]
    pub fn find(&self, addr: u64, len: u64) -> Option<(usize, u64)> {
        (0..).zip(&self.bars).find_map(|(index, bar)| {
            let bar = (*bar)?;
            let offset = addr.checked_sub(bar.start)?;
            (offset.checked_add(len)? <= bar.size).then_some((index, offset))
        })
    }

    /// A BAR.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Bar> {
        let bar = (*self.bars.get(index)?)?;
        Some(Bar {
            addr: bar.start,
            size: bar.size,
        })
    }

    /// Reads the register of BAR `index`.
    #[must_use]
    pub fn read(&self, index: usize) -> u32 {
        let probed = self.probed.get().get(index).is_some_and(|&probed| probed);
        let at = |index: usize| self.bars.get(index).copied().flatten();
        let below = index.checked_sub(1).and_then(at);
        let (bar, shift) = match (at(index), below) {
            (Some(bar), _) => (bar, 0),
            (None, Some(bar)) if bar.flags & FLAG_64_BIT != 0 => (bar, 32),
            _ => return 0,
        };
        let address = if probed {
            bar.size.wrapping_neg()
        } else {
            bar.start
        };
        let [a, b, c, d, ..] = ((address | bar.kind()) >> shift).to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    /// Writes the register of BAR `index`: all ones asks for the size, anything else ends that.
    pub fn write(&self, index: usize, value: u32) {
        let mut probed = self.probed.get();
        if let Some(probed) = probed.get_mut(index) {
            *probed = value == u32::MAX;
        }
        self.probed.set(probed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_written() {
        for (text, number) in [("0000:00:01.0", 8), ("abcd:3f:1f.7", 255)] {
            let address: Address = text.parse().unwrap();
            assert_eq!(
                (address.to_string().as_str(), address.number()),
                (text, number)
            );
        }
        assert_eq!(
            "00:02.1".parse::<Address>().unwrap().to_string(),
            "0000:00:02.1"
        );
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "1",
            "00:20.0",
            "00:01.8",
            "00:+1.0",
            "0:0:0:1.0",
            "100:00:01",
            "00:100:1.0",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}

//! The guest's memory: sealed memfds, mapped once, that other processes can map too.
//!
//! Usually all of it is one file, and a back-end gets that. With [`MemoryConfig::dma`], what devices reach is a file of its own beside the RAM, and the
//! RAM's file never leaves the process.
//!
//! The seals (shrink, grow, seal) let a peer map the file without the fear that a later truncation kills it.
#![allow(unsafe_code)] // memfd_create, fallocate, fcntl seals and madvise have no safe wrapper here

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use devices::host::{MemoryRegion, SharedRegion};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::layout;
use crate::sys::{context, size_text};

/// The least RAM that a VM can have.
pub const MIN_SIZE: u64 = 2 << 20;
/// The most RAM that a VM can have.
pub const MAX_SIZE: u64 = 448 << 30;

/// The pages that back the guest's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Ordinary pages of 4 KiB.
    #[default]
    Off,
    /// Huge pages of 2 MiB that the administrator has reserved.
    Size2M,
    /// Huge pages of 1 GiB that the administrator has reserved.
    Size1G,
}

impl HugePages {
    /// Bytes in one page.
    pub fn page_size(self) -> u64 {
        match self {
            HugePages::Off => layout::PAGE_SIZE,
            HugePages::Size2M => 2 << 20,
            HugePages::Size1G => 1 << 30,
        }
    }
}

/// How much RAM a VM has and what backs it.
#[derive(Clone, Copy, Debug)]
pub struct MemoryConfig {
    /// Bytes; a multiple of the page size, 2 MiB to 448 GiB.
    pub size: u64,
    /// The pages that back it.
    pub hugepages: HugePages,
    /// Allocate all of it before the guest starts: a lack of memory is then an error at the start.
    pub prefault: bool,
    /// Bytes of memory for devices beside the RAM; a multiple of the page size. Not zero: other processes get this and nothing of the RAM.
    pub dma: u64,
}

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is not a whole number of pages.
    #[error("guest memory of {} is not a whole number of {} pages: choose a multiple of {}", size_text(*.size), size_text(*.page), size_text(*.page))]
    Unaligned {
        /// What was asked for, in bytes.
        size: u64,
        /// The page size, in bytes.
        page: u64,
    },
    /// The size is out of bounds.
    #[error("guest memory of {} is out of bounds: choose {} to {}", size_text(*.0), size_text(MIN_SIZE), size_text(MAX_SIZE))]
    Size(u64),
    /// The host has too few huge pages.
    #[error(
        "guest memory of {} needs {need} huge pages of {} and the host has {free} free: reserve them \
         (as root: echo {need} > /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages, if others hold some, more), or run without huge pages ({source})",
        size_text(*.size), size_text(*.page), *.page >> 10
    )]
    HugePages {
        /// What was asked for, in bytes.
        size: u64,
        /// Size of a huge page, in bytes.
        page: u64,
        /// How many are needed.
        need: u64,
        /// How many are free.
        free: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host has not enough memory to prefault.
    #[error("guest memory of {} cannot be allocated, the host has {} MiB available: choose less memory or leave prefault off", size_text(*.size), *.available >> 20)]
    Insufficient {
        /// What was asked for, in bytes.
        size: u64,
        /// MemAvailable of the host, in bytes.
        available: u64,
    },
    /// A system call failed.
    #[error("guest memory of {}: {call}: {source}", size_text(*.size))]
    System {
        /// What was asked for, in bytes.
        size: u64,
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The guest's RAM.
#[derive(Debug)]
pub struct Memory {
    mapped: GuestMemoryMmap,
    regions: Vec<MemoryRegion>,
    size: u64,
    dma: u64,
}

impl Memory {
    /// Allocates it.
    pub fn new(config: &MemoryConfig) -> Result<Self, Error> {
        let size = config.size;
        let page = config.hugepages.page_size();
        if !(MIN_SIZE..=MAX_SIZE).contains(&size) {
            return Err(Error::Size(size));
        }
        for size in [size, config.dma] {
            if !size.is_multiple_of(page) {
                return Err(Error::Unaligned { size, page });
            }
        }
        if config.dma > MAX_SIZE {
            return Err(Error::Size(config.dma));
        }
        let failed = |call, source| match config.hugepages {
            HugePages::Off => Error::System { size, call, source },
            _ => Error::HugePages {
                size,
                page,
                need: size / page,
                free: free_huge_pages(page),
                source,
            },
        };
        if config.prefault
            && config.hugepages == HugePages::Off
            && let Some(available) = available_memory()
            && available < size
        {
            return Err(Error::Insufficient { size, available });
        }

        // Huge pages are set aside when they are mapped, so that a lack of them is an error here and not a SIGBUS later.
        let reserve = if config.hugepages == HugePages::Off {
            libc::MAP_NORESERVE
        } else {
            0
        };
        let dma = layout::dma_range(size, config.dma);
        let mut files = vec![(layout::ram_ranges(size), size)];
        if dma.1 > 0 {
            files.push((vec![dma], dma.1));
        }
        let mut shared = Vec::new();
        let mut mapped = Vec::new();
        for (ranges, bytes) in files {
            let file = sealed_file(c"vhost-pci-ram", bytes, config.hugepages)
                .map_err(|(call, e)| failed(call, e))?;
            let file = Arc::new(file);
            let mut regions = Vec::new();
            let mut file_offset = 0;
            for (gpa, len) in ranges {
                let length = usize::try_from(len).map_err(|_| Error::Size(len))?;
                let mapping = MmapRegion::build(
                    Some(FileOffset::from_arc(Arc::clone(&file), file_offset)),
                    length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | reserve,
                )
                .map_err(|e| match e {
                    vm_memory::mmap::MmapRegionError::Mmap(source) => failed("mmap", source),
                    other => failed("mmap", io::Error::other(other.to_string())),
                })?;
                mapped.push(
                    GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or(Error::Size(len))?,
                );
                regions.push(MemoryRegion {
                    gpa,
                    shared: SharedRegion {
                        file: Arc::clone(&file),
                        file_offset,
                        len,
                    },
                });
                file_offset += len;
            }
            if config.prefault {
                allocate(&file, bytes).map_err(|e| failed("fallocate", e))?;
            }
            // What comes last is what devices reach.
            shared = regions;
        }
        if config.prefault {
            for region in &mapped {
                populate(region).map_err(|e| failed("madvise(MADV_POPULATE_WRITE)", e))?;
            }
        }
        let mapped = GuestMemoryMmap::from_regions(mapped)
            .map_err(|e| failed("mmap", io::Error::other(e.to_string())))?;
        Ok(Memory {
            mapped,
            regions: shared,
            size,
            dma: config.dma,
        })
    }

    /// As the VMM reaches it.
    pub fn mapped(&self) -> &GuestMemoryMmap {
        &self.mapped
    }

    /// What devices reach, as another process can map it: all of it, or with [`MemoryConfig::dma`] that part.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The memory for devices beside the RAM: address and length; a length of zero where there is none.
    pub fn dma(&self) -> (u64, u64) {
        layout::dma_range(self.size, self.dma)
    }
}

/// A memfd of `size` bytes that can change its size no more; on failure, the call that failed too.
fn sealed_file(
    name: &CStr,
    size: u64,
    hugepages: HugePages,
) -> Result<File, (&'static str, io::Error)> {
    let flags = libc::MFD_CLOEXEC
        | libc::MFD_ALLOW_SEALING
        | match hugepages {
            HugePages::Off => 0,
            HugePages::Size2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            HugePages::Size1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        };
    // SAFETY: the name is NUL-terminated; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(("memfd_create", io::Error::last_os_error()));
    }
    // SAFETY: memfd_create returned a new descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(|e| ("ftruncate", e))?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: a fcntl that takes an integer, on a descriptor that `file` owns.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(("fcntl(F_ADD_SEALS)", io::Error::last_os_error()));
    }
    Ok(file)
}

/// Memory of `size` bytes to share, zeroed and sealed.
pub(crate) fn shared_file(size: u64) -> io::Result<File> {
    sealed_file(c"vhost-pci-shared", size, HugePages::Off).map_err(|(call, e)| context(call, e))
}

/// Gives the file its pages.
fn allocate(file: &File, size: u64) -> io::Result<()> {
    let size = libc::off_t::try_from(size).map_err(io::Error::other)?;
    loop {
        // SAFETY: a call with integers only, on a descriptor that `file` owns.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, size) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Enters the pages into this process' page tables; a kernel that cannot (before 5.14) does it page by page later.
fn populate(region: &GuestRegionMmap) -> io::Result<()> {
    // SAFETY: the range is one mapping that `region` owns; populating changes no contents.
    let result = unsafe {
        libc::madvise(
            region.as_ptr().cast(),
            region.size(),
            libc::MADV_POPULATE_WRITE,
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            e => Err(e),
        },
    }
}

fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Huge pages that are neither used nor promised to somebody.
fn free_huge_pages(page: u64) -> u64 {
    let read = |name: &str| -> u64 {
        fs::read_to_string(format!(
            "/sys/kernel/mm/hugepages/hugepages-{}kB/{name}",
            page >> 10
        ))
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or(0)
    };
    read("free_hugepages").saturating_sub(read("resv_hugepages"))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    fn config(size: u64) -> MemoryConfig {
        MemoryConfig {
            size,
            hugepages: HugePages::Off,
            prefault: false,
            dma: 0,
        }
    }

    #[test]
    fn memory_for_devices_is_a_file_of_its_own_and_the_only_one_that_is_shared() {
        use std::os::unix::fs::MetadataExt;
        let memory = Memory::new(&MemoryConfig {
            dma: 4 << 20,
            ..config(8 << 20)
        })
        .unwrap();
        let [region] = memory.regions() else {
            panic!("{:?}", memory.regions());
        };
        assert_eq!(memory.dma(), (layout::HIGH_RAM_START, 4 << 20));
        assert_eq!((region.gpa, region.shared.len), memory.dma());
        let shared = region.shared.file.metadata().unwrap();
        assert_eq!(shared.len(), 4 << 20);
        memory
            .mapped()
            .write_slice(b"secret", GuestAddress(0x1000))
            .unwrap();
        assert_eq!(region.shared.file.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn the_file_cannot_change_its_size_or_seals() {
        let memory = Memory::new(&config(4 << 20)).unwrap();
        let file = &memory.regions()[0].shared.file;
        assert_eq!(file.metadata().unwrap().len(), 4 << 20);
        assert!(file.set_len(2 << 20).is_err());
        assert!(file.set_len(8 << 20).is_err());
        // SAFETY: a fcntl without pointers on a descriptor that `file` owns.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        assert_eq!(
            seals,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL
        );
    }

    #[test]
    fn another_mapping_of_a_region_shows_what_the_vmm_wrote() {
        use std::os::unix::fs::FileExt;
        let memory = Memory::new(&config(layout::LOW_RAM_END + (2 << 20))).unwrap();
        let high = &memory.regions()[1];
        assert_eq!(
            (high.gpa, high.shared.file_offset),
            (layout::HIGH_RAM_START, layout::LOW_RAM_END)
        );
        memory
            .mapped()
            .write_slice(b"seen", GuestAddress(high.gpa + 8))
            .unwrap();
        let mut seen = [0; 4];
        high.shared
            .file
            .read_exact_at(&mut seen, high.shared.file_offset + 8)
            .unwrap();
        assert_eq!(&seen, b"seen");
        assert_eq!(memory.mapped().num_regions(), 2);
    }

    #[test]
    fn prefault_allocates_every_page() {
        use std::os::unix::fs::MetadataExt;
        let lazy = Memory::new(&config(8 << 20)).unwrap();
        assert_eq!(
            lazy.regions()[0].shared.file.metadata().unwrap().blocks(),
            0
        );
        let memory = Memory::new(&MemoryConfig {
            prefault: true,
            ..config(8 << 20)
        })
        .unwrap();
        assert_eq!(
            memory.regions()[0].shared.file.metadata().unwrap().blocks() * 512,
            8 << 20
        );
    }

    #[test]
    fn memory_that_the_host_does_not_have_is_an_error_at_the_start() {
        let available = available_memory().unwrap();
        let size = (available + (64 << 30))
            .next_multiple_of(1 << 30)
            .min(MAX_SIZE);
        let error = Memory::new(&MemoryConfig {
            prefault: true,
            ..config(size)
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("available") && error.contains("prefault"),
            "{error}"
        );
    }

    #[test]
    fn missing_huge_pages_are_an_error_that_says_how_to_get_them() {
        let free = free_huge_pages(2 << 20);
        let size = (free + 512) * (2 << 20);
        let error = Memory::new(&MemoryConfig {
            hugepages: HugePages::Size2M,
            ..config(size)
        })
        .unwrap_err();
        assert!(matches!(error, Error::HugePages { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("nr_hugepages")
                && text.contains(&format!("needs {} huge pages", free + 512)),
            "{text}"
        );
    }

    #[test]
    fn sizes_that_are_no_whole_pages_or_out_of_bounds_are_refused() {
        assert!(matches!(
            Memory::new(&config((4 << 20) + 1)),
            Err(Error::Unaligned { .. })
        ));
        let odd = MemoryConfig {
            hugepages: HugePages::Size1G,
            ..config(512 << 20)
        };
        assert!(
            Memory::new(&odd)
                .unwrap_err()
                .to_string()
                .contains("multiple of 1 GiB")
        );
        assert!(matches!(Memory::new(&config(0)), Err(Error::Size(0))));
        assert!(matches!(Memory::new(&config(1 << 50)), Err(Error::Size(_))));
    }
}

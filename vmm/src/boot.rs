//! Loading a kernel: ELF or bzImage, entered in 64-bit mode as the Linux x86 boot protocol says (64-bit entry).
//!
//! What the kernel finds in low memory: boot_params ("zero page") at 0x7000, also in RSI; the command line at 0x2_0000; a GDT with
//! code at selector 0x10 and data at 0x18; page tables that map the first 4 GiB identically, for the supervisor; interrupts off. All there
//! is of firmware is a reset vector: Linux reboots through it where ACPI has reduced hardware and there is no EFI.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, ReadVolatile};

use crate::bus::{KEYBOARD_CONTROL, KEYBOARD_RESET};
use crate::layout::{self, HIMEM_START, LOW_RAM_END, PAGE_SIZE};
use crate::sys::{kvm, size_text};

const GDT: u64 = 0x500;
const BOOT_STACK: u64 = 0x6FF0;
/// Guest physical address of boot_params.
pub const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xA000;
const PAGE_DIRECTORIES: u64 = 0xB000;
/// Guest physical address of the command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line of a kernel that sets no limit itself, without the NUL.
const CMDLINE_MAX: usize = 0xFFFF;
/// How far the 64-bit entry lies behind the start of a bzImage's kernel.
const ENTRY64: u64 = 0x200;

/// What a VM boots.
#[derive(Clone, Debug)]
pub enum Kernel {
    /// An ELF image in this process: the built-in guest.
    Image(&'static [u8]),
    /// An ELF file or a bzImage, told apart by its content.
    Path(PathBuf),
}

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or read.
    #[error("{what} {}: {source}", .path.display())]
    File {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel of the host said.
        source: io::Error,
    },
    /// The file is neither ELF nor bzImage.
    #[error(
        "kernel {0}: neither an ELF file nor a bzImage (a compressed vmlinux has to be unpacked first)"
    )]
    Unknown(String),
    /// The file is damaged, cut off, or for another machine.
    #[error("kernel {name}: {why}")]
    Bad {
        /// Which kernel.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel or initrd does not fit the RAM.
    #[error("{name} needs memory up to {} and the guest's RAM below 4 GiB ends at {}: give the guest more memory", size_text(*.need), size_text(*.end))]
    DoesNotFit {
        /// What does not fit.
        name: String,
        /// Where the memory that is needed ends.
        need: u64,
        /// Where the RAM ends.
        end: u64,
    },
    /// The command line cannot be handed over.
    #[error("the kernel command line has {len} bytes and this kernel takes {max}")]
    Cmdline {
        /// Length without the NUL.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
    /// The command line contains a NUL.
    #[error("the kernel command line contains a NUL")]
    CmdlineNul,
    /// Guest memory cannot be written.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// A kernel in guest memory, ready to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical (and, by the identity mapping, virtual) address of the first instruction.
    pub rip: u64,
}

/// Loads the kernel, the initrd and the command line, and writes boot_params, GDT and page tables. `ram_size` is the
/// VM's RAM in bytes, `memory` that RAM.
pub fn load(
    memory: &GuestMemoryMmap,
    ram_size: u64,
    kernel: &Kernel,
    initrd: Option<&Path>,
    cmdline: &str,
) -> Result<Entry, Error> {
    let end = ram_size.min(LOW_RAM_END);
    let loaded = match kernel {
        Kernel::Image(image) => Loader {
            memory,
            end,
            name: "(built in)".into(),
        }
        .load(&mut Cursor::new(*image)),
        Kernel::Path(path) => {
            let fail = |source| Error::File {
                what: "kernel",
                path: path.clone(),
                source,
            };
            let mut file = File::open(path).map_err(fail)?;
            if !file.metadata().map_err(fail)?.is_file() {
                return Err(fail(io::Error::other("not a regular file")));
            }
            Loader {
                memory,
                end,
                name: path.display().to_string(),
            }
            .load(&mut file)
        }
    }?;
    describe(memory, ram_size, &loaded, initrd, cmdline)?;
    Ok(Entry { rip: loaded.entry })
}

/// Writes what a kernel that was loaded finds in memory.
fn describe(
    memory: &GuestMemoryMmap,
    ram_size: u64,
    loaded: &Loaded,
    initrd: Option<&Path>,
    cmdline: &str,
) -> Result<(), Error> {
    let end = ram_size.min(LOW_RAM_END);
    let mut params = boot_params {
        hdr: loaded.header,
        acpi_rsdp_addr: layout::RSDP,
        ..Default::default()
    };
    let max = match usize::try_from(loaded.header.cmdline_size) {
        Ok(max) if max > 0 => max.min(CMDLINE_MAX),
        _ => CMDLINE_MAX,
    };
    if cmdline.len() > max {
        return Err(Error::Cmdline {
            len: cmdline.len(),
            max,
        });
    }
    if cmdline.contains('\0') {
        return Err(Error::CmdlineNul);
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE + cmdline.len() as u64))?;

    params.hdr.type_of_loader = 0xFF;
    params.hdr.cmd_line_ptr = low(CMDLINE);
    if let Some(path) = initrd {
        let top = end.min(loaded.initrd_end);
        let (start, len) = load_initrd(memory, path, loaded.end, top)?;
        params.hdr.ramdisk_image = low(start);
        params.hdr.ramdisk_size = low(len);
    }
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(layout::e820(ram_size)) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: kind as u32,
        };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;
    memory.write_slice(&RESET, GuestAddress(layout::RESET_VECTOR))?;
    write_tables(memory)
}

/// The 32-bit value of an address or length that lies below 4 GiB.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

struct Loaded {
    entry: u64,
    /// The kernel's memory, its working memory included, ends here.
    end: u64,
    /// The initrd has to end here.
    initrd_end: u64,
    header: setup_header,
}

struct Loader<'a> {
    memory: &'a GuestMemoryMmap,
    /// Where the RAM below 4 GiB ends.
    end: u64,
    name: String,
}

impl Loader<'_> {
    fn bad(&self, why: impl Into<String>) -> Error {
        Error::Bad {
            name: self.name.clone(),
            why: why.into(),
        }
    }

    fn fits(&self, need: u64) -> Result<(), Error> {
        if need <= self.end {
            return Ok(());
        }
        Err(Error::DoesNotFit {
            name: format!("kernel {}", self.name),
            need,
            end: self.end,
        })
    }

    fn load<F: Read + ReadVolatile + Seek>(&self, image: &mut F) -> Result<Loaded, Error> {
        // The setup header of a bzImage ends before 0x280.
        let start = self.read(image, 0, 0x280)?;
        if start.starts_with(b"\x7fELF") {
            self.load_elf(image, &Header(start))
        } else if start.get(0x202..0x206) == Some(b"HdrS") {
            self.load_bzimage(image, &Header(start))
        } else {
            Err(Error::Unknown(self.name.clone()))
        }
    }

    /// Up to `len` bytes from `offset`.
    fn read<F: Read + Seek>(&self, image: &mut F, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        image
            .seek(SeekFrom::Start(offset))
            .and_then(|_| image.take(len).read_to_end(&mut bytes))
            .map_err(|e| self.bad(e.to_string()))?;
        Ok(bytes)
    }

    fn load_elf<F: Read + ReadVolatile + Seek>(
        &self,
        image: &mut F,
        header: &Header,
    ) -> Result<Loaded, Error> {
        const PT_LOAD: u64 = 1;
        const PROGRAM_HEADER: usize = 56;
        let cut = || self.bad("the ELF file is cut off");
        let file_len = image
            .seek(SeekFrom::End(0))
            .map_err(|e| self.bad(e.to_string()))?;
        // e_ident: class and byte order; e_machine.
        if (header.get(4, 1), header.get(5, 1), header.get(0x12, 2)) != (Some(2), Some(1), Some(62))
        {
            return Err(self.bad("the ELF file is not for x86-64"));
        }
        let entry = header.get(0x18, 8).ok_or_else(cut)?;
        let offset = header.get(0x20, 8).ok_or_else(cut)?;
        let size = header.get(0x36, 2).ok_or_else(cut)?;
        let count = header.get(0x38, 2).ok_or_else(cut)?;
        if size != PROGRAM_HEADER as u64 || count == 0 {
            return Err(self.bad("the ELF file has no program headers of the right size"));
        }
        let table = self.read(image, offset, count * PROGRAM_HEADER as u64)?;
        if table.len() as u64 != count * PROGRAM_HEADER as u64 {
            return Err(cut());
        }
        let mut end = 0;
        let mut entered = false;
        for program in table
            .chunks_exact(PROGRAM_HEADER)
            .map(|p| Header(p.to_vec()))
        {
            let field = |offset| program.get(offset, 8).ok_or_else(cut);
            let (from, physical, in_file, in_memory) =
                (field(8)?, field(24)?, field(32)?, field(40)?);
            // One that takes no memory but has bytes in the file is not empty: the loader would put those where it says.
            if program.get(0, 4) != Some(PT_LOAD) || (in_memory, in_file) == (0, 0) {
                continue;
            }
            if from.checked_add(in_file).is_none_or(|e| e > file_len) {
                return Err(cut());
            }
            let segment_end = physical
                .checked_add(in_memory)
                .filter(|_| in_file <= in_memory);
            let Some(segment_end) = segment_end else {
                return Err(self.bad("the ELF file has a segment with a nonsensical length"));
            };
            if physical < HIMEM_START {
                return Err(self.bad(format!("the ELF file has a segment at {physical:#x}, below 1 MiB, where the boot data lies")));
            }
            self.fits(segment_end)?;
            entered |= (physical..segment_end).contains(&entry);
            end = end.max(segment_end);
        }
        if !entered {
            return Err(self.bad(format!(
                "the ELF file's entry {entry:#x} lies in none of its segments (physical addresses)"
            )));
        }
        Elf::load(self.memory, None, image, None).map_err(|e| self.bad(e.to_string()))?;
        let header = setup_header {
            boot_flag: 0xAA55,
            header: 0x5372_6448,
            kernel_alignment: 0x100_0000,
            ..Default::default()
        };
        Ok(Loaded {
            entry,
            end,
            initrd_end: LOW_RAM_END,
            header,
        })
    }

    fn load_bzimage<F: Read + ReadVolatile + Seek>(
        &self,
        image: &mut F,
        header: &Header,
    ) -> Result<Loaded, Error> {
        let cut = || self.bad("the bzImage is cut off");
        let field = |offset, len| header.get(offset, len).ok_or_else(cut);
        let version = field(0x206, 2)?;
        if version < 0x020C || field(0x236, 2)? & 1 == 0 {
            return Err(self.bad("the bzImage has no 64-bit entry (boot protocol 2.12 and a 64-bit kernel are needed)"));
        }
        let file_len = image
            .seek(SeekFrom::End(0))
            .map_err(|e| self.bad(e.to_string()))?;
        let sectors = match field(0x1F1, 1)? {
            0 => 4,
            n => n,
        };
        let setup = (sectors + 1) * 512;
        // In units of 16 bytes, rounded up.
        let protected = field(0x1F4, 4)? * 16;
        let payload = field(0x248, 4)? + field(0x24C, 4)?;
        if file_len + 15 < setup + protected || file_len < setup + payload.max(ENTRY64) {
            return Err(cut());
        }
        let start = match field(0x258, 8)? {
            preferred if preferred >= HIMEM_START => preferred,
            _ => HIMEM_START,
        };
        let needed = field(0x260, 4)?.max(file_len - setup);
        let end = start
            .checked_add(needed)
            .ok_or_else(|| self.bad("the bzImage's header has a nonsensical length"))?;
        self.fits(end)?;
        let result = BzImage::load(self.memory, Some(GuestAddress(start)), image, None)
            .map_err(|e| self.bad(e.to_string()))?;
        let initrd_end = field(0x22C, 4)? + 1;
        let header = result
            .setup_header
            .ok_or_else(|| self.bad("the bzImage has no setup header"))?;
        Ok(Loaded {
            entry: start + ENTRY64,
            end,
            initrd_end,
            header,
        })
    }
}

/// Little-endian fields of a header.
struct Header(Vec<u8>);

impl Header {
    fn get(&self, offset: usize, len: usize) -> Option<u64> {
        let bytes = self.0.get(offset..offset.checked_add(len)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        )
    }
}

/// Puts the file as high as it can lie; returns where (address, length).
fn load_initrd(
    memory: &GuestMemoryMmap,
    path: &Path,
    bottom: u64,
    top: u64,
) -> Result<(u64, u64), Error> {
    let fail = |source| Error::File {
        what: "initrd",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err(fail(io::Error::other("empty, or not a regular file")));
    }
    let len = metadata.len();
    let start = top
        .checked_sub(len)
        .map(|s| s & !(PAGE_SIZE - 1))
        .filter(|s| *s >= bottom)
        .ok_or_else(|| Error::DoesNotFit {
            name: format!("initrd {}", path.display()),
            need: bottom.saturating_add(len),
            end: top,
        })?;
    let bytes = usize::try_from(len).map_err(|e| fail(io::Error::other(e)))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, bytes)
        .map_err(|e| fail(io::Error::other(e.to_string())))?;
    Ok((start, len))
}

/// The code at the reset vector: mov al, 0xfe; out 0x64, al; hlt; jmp to the hlt.
const RESET: [u8; 7] = {
    let (port, value) = (KEYBOARD_CONTROL.to_le_bytes()[0], KEYBOARD_RESET);
    [0xB0, value, 0xE6, port, 0xF4, 0xEB, 0xFD]
};

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

fn write_tables(memory: &GuestMemoryMmap) -> Result<(), Error> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    // Null, null, 64-bit code, data; both flat, ring 0, accessed.
    let gdt = [0u64, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
    for (index, entry) in (0..).zip(gdt) {
        memory.write_obj(entry, GuestAddress(GDT + index * 8))?;
    }
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    for gib in 0..4u64 {
        let directory = PAGE_DIRECTORIES + gib * PAGE_SIZE;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(PDPT + gib * 8))?;
        for entry in 0..512u64 {
            let page = (gib << 30) + (entry << 21);
            memory.write_obj(
                page | LARGE | PRESENT_WRITABLE,
                GuestAddress(directory + entry * 8),
            )?;
        }
    }
    Ok(())
}

/// Sets the first vCPU's registers so that it starts at `entry`, in 64-bit mode.
pub fn set_registers(vcpu: &VcpuFd, entry: Entry) -> io::Result<()> {
    const PROTECTED: u64 = 1;
    const EXTENSION_TYPE: u64 = 1 << 4;
    const PAGING: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const LONG_MODE_ENABLED_ACTIVE: u64 = 1 << 8 | 1 << 10;

    let mut sregs = vcpu.get_sregs().map_err(|e| kvm("KVM_GET_SREGS", e))?;
    let data = kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector: DATA_SELECTOR,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: CODE_SELECTOR,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 |= PROTECTED | EXTENSION_TYPE | PAGING;
    sregs.cr3 = PML4;
    sregs.cr4 |= PAE;
    sregs.efer |= LONG_MODE_ENABLED_ACTIVE;
    vcpu.set_sregs(&sregs)
        .map_err(|e| kvm("KVM_SET_SREGS", e))?;

    let mut regs = vcpu.get_regs().map_err(|e| kvm("KVM_GET_REGS", e))?;
    regs.rflags = 2;
    regs.rip = entry.rip;
    regs.rsp = BOOT_STACK;
    regs.rbp = BOOT_STACK;
    regs.rsi = ZERO_PAGE;
    vcpu.set_regs(&regs).map_err(|e| kvm("KVM_SET_REGS", e))
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz_body;
#[cfg(test)]
mod tests;

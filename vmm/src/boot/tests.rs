use std::io::Write;

use vm_memory::GuestAddress;

use super::*;
use crate::iterations;
use crate::testing::{CODE, elf, image};

const RAM: u64 = 32 << 20;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()
}

/// Loads the bytes from a file; the error's text.
fn refused(name: &str, bytes: &[u8]) -> String {
    let path = std::env::temp_dir().join(format!("vmm-boot-{}-{name}", std::process::id()));
    File::create(&path).unwrap().write_all(bytes).unwrap();
    let error = load(&memory(), RAM, &Kernel::Path(path.clone()), None, "")
        .unwrap_err()
        .to_string();
    std::fs::remove_file(&path).unwrap();
    assert!(error.contains(&path.display().to_string()), "{error}");
    error
}

fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 512 * 2 + 4096];
    let mut put =
        |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]);
    put(0x1F4, &(4096u32 / 16).to_le_bytes());
    put(0x1FE, &0xAA55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020Fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &100u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x20_0000u32.to_le_bytes());
    put(1024, &[0xA5; 4096]);
    image
}

/// An ELF file that has a second segment, of no memory but with its bytes for address 0.
fn elf_for_address_0() -> Vec<u8> {
    let mut file = elf(b"\xF4code");
    let table = file.len();
    let segment: Vec<u8> = file[64..64 + 56].to_vec();
    let mut second = segment.clone();
    second[24..32].fill(0);
    second[40..48].fill(0);
    file.extend([segment, second].concat());
    file[0x20..0x28].copy_from_slice(&(table as u64).to_le_bytes());
    file[0x38..0x3A].copy_from_slice(&2u16.to_le_bytes());
    file
}

#[test]
fn a_segment_of_no_memory_that_has_bytes_is_refused_before_it_is_loaded() {
    let memory = memory();
    let loader = Loader {
        memory: &memory,
        end: RAM,
        name: "of bytes".into(),
    };
    let result = loader.load(&mut io::Cursor::new(elf_for_address_0()));
    let error = result.err().unwrap().to_string();
    assert!(error.contains("nonsensical length"), "{error}");
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
}

#[test]
fn a_kernel_is_refused_or_lies_where_it_may_whatever_its_headers_say() {
    let mut short: Vec<u8> = bzimage().into_iter().take(512 * 2 + 0x210).collect();
    short[0x1F4..0x1F6].copy_from_slice(&[0x21, 0]);
    // As low as it may lie, and no longer than there is room for.
    short[0x258..0x260].copy_from_slice(&HIMEM_START.to_le_bytes());
    let seeds = [("elf", elf(b"\xF4code")), ("bzimage", short)];
    for (name, bytes) in &seeds {
        let memory = memory();
        let loader = Loader {
            memory: &memory,
            end: 8 << 20,
            name: "of bytes".into(),
        };
        if let Err(error) = loader.load(&mut io::Cursor::new(bytes)) {
            panic!("{name}: {error}");
        }
    }
    let [elf, bzimage] = seeds;
    let seeds = [elf, bzimage, ("elf-for-address-0", elf_for_address_0())];
    iterations::seeds("kernel", &seeds);
    let count = if cfg!(debug_assertions) { 2000 } else { 20_000 };
    iterations::iterate("kernel", count, fuzz_body::fuzz_kernel);
}

#[test]
fn an_elf_image_is_loaded_where_it_says_and_described_in_the_zero_page() {
    let memory = memory();
    let entry = load(&memory, RAM, &image(b"\xF4code"), None, "one two").unwrap();
    assert_eq!(entry.rip, CODE);
    let mut code = [0; 5];
    memory.read_slice(&mut code, GuestAddress(CODE)).unwrap();
    assert_eq!(&code, b"\xF4code");
    let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
    assert_eq!({ params.acpi_rsdp_addr }, layout::RSDP);
    let header = params.hdr;
    assert_eq!(
        (u64::from(header.cmd_line_ptr), header.type_of_loader),
        (CMDLINE, 0xFF)
    );
    let mut cmdline = [0; 8];
    memory
        .read_slice(&mut cmdline, GuestAddress(CMDLINE))
        .unwrap();
    assert_eq!(&cmdline, b"one two\0");
    let table = params.e820_table;
    let last = table[usize::from(params.e820_entries) - 1];
    assert_eq!({ last.addr }, layout::ECAM_BASE);
}

#[test]
fn a_bzimage_is_loaded_at_its_preferred_address_and_entered_in_64_bit_mode() {
    let path = std::env::temp_dir().join(format!("vmm-bzimage-{}", std::process::id()));
    File::create(&path).unwrap().write_all(&bzimage()).unwrap();
    let initrd = std::env::temp_dir().join(format!("vmm-initrd-{}", std::process::id()));
    File::create(&initrd)
        .unwrap()
        .write_all(&[7; 5000])
        .unwrap();
    let memory = memory();
    let kernel = Kernel::Path(path.clone());
    let entry = load(&memory, RAM, &kernel, Some(&initrd), "x").unwrap();
    assert_eq!(entry.rip, 0x100_0200);
    let mut byte = [0; 1];
    memory
        .read_slice(&mut byte, GuestAddress(0x100_0000))
        .unwrap();
    assert_eq!(byte, [0xA5]);
    let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
    let header = params.hdr;
    assert_eq!(
        (u64::from(header.ramdisk_image), header.ramdisk_size),
        (RAM - 8192, 5000)
    );
    let error = load(&memory, RAM, &kernel, None, &"x".repeat(101)).unwrap_err();
    assert!(matches!(error, Error::Cmdline { len: 101, max: 100 }));
    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(initrd).unwrap();
}

#[test]
fn an_initrd_that_would_lie_on_the_kernel_is_refused() {
    let path = std::env::temp_dir().join(format!("vmm-big-initrd-{}", std::process::id()));
    File::create(&path).unwrap().set_len(RAM - CODE).unwrap();
    let error = load(&memory(), RAM, &image(b"\xF4"), Some(&path), "").unwrap_err();
    assert!(matches!(error, Error::DoesNotFit { .. }), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = load(&memory(), RAM, &image(b"\xF4"), Some(&path), "")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("initrd") && error.contains(&path.display().to_string()),
        "{error}"
    );
}

#[test]
fn a_file_that_is_missing_or_no_kernel_is_named() {
    let path = PathBuf::from("/nonexistent/kernel");
    let error = load(&memory(), RAM, &Kernel::Path(path), None, "")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/nonexistent/kernel") && error.contains("No such file"),
        "{error}"
    );
    let error = load(&memory(), RAM, &Kernel::Path("/tmp".into()), None, "")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/tmp") && error.contains("regular file"),
        "{error}"
    );
    assert!(refused("text", b"hello").contains("neither"));
    assert!(refused("empty", b"").contains("neither"));
}

#[test]
fn an_elf_file_cut_off_anywhere_is_refused() {
    let whole = elf(&[0x90; 256]);
    for len in [5, 20, 63, 64, 119, 120, whole.len() - 1] {
        let error = refused(&format!("cut-{len}"), &whole[..len]);
        assert!(
            error.contains("cut off") || error.contains("not for x86-64"),
            "{len}: {error}"
        );
    }
}

#[test]
fn an_elf_file_with_nonsense_is_refused() {
    let broken = |name: &str, offset: usize, bytes: &[u8], why: &str| {
        let mut image = elf(&[0x90; 16]);
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        let error = refused(name, &image);
        assert!(error.contains(why), "{name}: {error}");
    };
    broken("class", 4, &[1], "x86-64");
    broken("machine", 0x12, &[40], "x86-64");
    broken("entry", 0x18, &0x5000u64.to_le_bytes(), "entry 0x5000");
    broken("phentsize", 0x36, &[32], "program headers");
    broken("phoff", 0x20, &u64::MAX.to_le_bytes(), "");
    broken("low", 64 + 24, &0x7000u64.to_le_bytes(), "below 1 MiB");
    broken("high", 64 + 24, &(RAM - 0x800).to_le_bytes(), "more memory");
    broken("overflow", 64 + 24, &u64::MAX.to_le_bytes(), "nonsensical");
    broken("filesz", 64 + 32, &u64::MAX.to_le_bytes(), "cut off");
    broken("memsz", 64 + 40, &1u64.to_le_bytes(), "nonsensical");
}

#[test]
fn a_bzimage_cut_off_or_without_a_64_bit_entry_is_refused() {
    let whole = bzimage();
    for len in [0x210, 0x260, 1024, 1024 + 100, whole.len() - 16] {
        let error = refused(&format!("bz-{len}"), &whole[..len]);
        assert!(error.contains("cut off"), "{len}: {error}");
    }
    let mut old = bzimage();
    old[0x236] = 0;
    assert!(refused("bz-32", &old).contains("64-bit entry"));
    let mut huge = bzimage();
    huge[0x260..0x264].copy_from_slice(&0x7000_0000u32.to_le_bytes());
    assert!(refused("bz-huge", &huge).contains("more memory"));
}

#[test]
fn a_command_line_that_cannot_be_handed_over_is_refused() {
    let kernel = image(b"\xF4");
    assert!(matches!(
        load(&memory(), RAM, &kernel, None, "a\0b"),
        Err(Error::CmdlineNul)
    ));
    let long = "x".repeat(CMDLINE_MAX);
    load(&memory(), RAM, &kernel, None, &long).unwrap();
    assert!(matches!(
        load(&memory(), RAM, &kernel, None, &(long + "x")),
        Err(Error::Cmdline { .. })
    ));
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[test]
fn a_kernel_file_with_any_bytes_in_its_headers_is_loaded_into_ram_or_refused() {
    let memory = memory();
    let mut state = 0x6b65_726e_656c;
    let mut loaded = 0;
    for n in 0..4000 {
        let mut bytes = if n % 2 == 0 {
            elf(b"\xF4code")
        } else {
            bzimage()
        };
        // Both headers lie in the first kilobyte.
        let headers = bytes.len().min(0x280);
        for _ in 0..1 + next(&mut state) % 6 {
            let at = usize::try_from(next(&mut state)).unwrap() % headers;
            bytes[at] = match next(&mut state) % 4 {
                0 => 0,
                1 => 0xFF,
                _ => next(&mut state).to_le_bytes()[0],
            };
        }
        if next(&mut state).is_multiple_of(8) {
            bytes.truncate(usize::try_from(next(&mut state)).unwrap() % bytes.len());
        }
        let kernel = Kernel::Image(bytes.leak());
        if load(&memory, RAM, &kernel, None, "x").is_ok() {
            loaded += 1;
        }
    }
    assert!(loaded > 0, "every file was refused");
}

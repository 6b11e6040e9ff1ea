//! The headers of a kernel, as a byte string: the body of the fuzz target, and of a test that makes strings up.

use std::io::Cursor;

use super::*;

/// The guest's RAM. The memory goes on behind it, which no kernel may find out.
const RAM: u64 = 8 << 20;
const MEMORY: usize = 9 << 20;

/// Loads a kernel that is these bytes. It is refused, or lies with its entry between the boot data and the end of the RAM, and a guest finds both.
pub fn fuzz_kernel(data: &[u8]) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let loader = Loader {
        memory: &memory,
        end: RAM,
        name: "of bytes".into(),
    };
    let loaded = loader.load(&mut Cursor::new(data));
    for untouched in [0, ZERO_PAGE, CMDLINE, HIMEM_START - PAGE_SIZE, RAM] {
        let mut page = [0; 4096];
        memory
            .read_slice(&mut page, GuestAddress(untouched))
            .expect("memory");
        let clean = page.iter().all(|byte| *byte == 0);
        assert!(clean, "something was written at {untouched:#x}");
    }
    let Ok(loaded) = loaded else {
        return;
    };
    assert!((HIMEM_START..=RAM).contains(&loaded.end));
    assert!((HIMEM_START..loaded.end).contains(&loaded.entry));
    if describe(&memory, RAM, &loaded, None, "console=ttyS0").is_ok() {
        let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).expect("memory");
        assert_eq!({ params.hdr.header }, 0x5372_6448);
        assert_eq!(u64::from(params.hdr.cmd_line_ptr), CMDLINE);
    }
}

//! What the drivers run on: memory, PCI configuration space, interrupts.
//!
//! Unsafe code: addresses from the boot protocol become memory here.
#![allow(unsafe_code)]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::{RefCell, UnsafeCell};
use core::ptr::NonNull;

use guest_driver::mmio::Registers;
use guest_driver::{Dma, Event, MsiMessage, Platform};
use linked_list_allocator::Heap;
use virtqueue::linear::Linear;

use crate::arch;

const E820_COUNT: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;
const E820_RAM: u32 = 1;
const COMMAND_LINE: usize = 0x228;
/// Longest command line that is looked at.
const MAX_COMMAND_LINE: usize = 2048;

/// Two cache lines.
const LINES: usize = 128;
const ECAM_LEN: usize = 1 << 20;
const IO_APIC: usize = 0xfec0_0000;
/// COM2's line.
const CONTROL_PIN: u32 = 3;
const MSI_ADDRESS: u64 = 0xfee0_0000;

/// The heap: one processor, and interrupts allocate nothing, so nothing has to be locked.
struct Allocator(UnsafeCell<Heap>);

// SAFETY: there is one thread.
unsafe impl Sync for Allocator {}

// SAFETY: the heap hands out memory that is its own, aligned, once.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: one thread, and `allocate_first_fit` calls nothing that allocates.
        let heap = unsafe { &mut *self.0.get() };
        heap.allocate_first_fit(layout)
            .map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if let Some(ptr) = NonNull::new(ptr) {
            // SAFETY: one thread; the caller gives back what `alloc` gave.
            unsafe { (*self.0.get()).deallocate(ptr, layout) };
        }
    }
}

#[global_allocator]
static HEAP: Allocator = Allocator(UnsafeCell::new(Heap::empty()));

/// The boot parameters (Linux x86 boot protocol, "zero page").
#[derive(Clone, Copy)]
pub struct BootParameters(*const u8);

impl BootParameters {
    /// The zero page that the VMM handed over.
    ///
    /// # Safety
    /// `page` is what the boot protocol put into rsi, and stays as it is.
    pub unsafe fn new(page: *const u8) -> Self {
        Self(page)
    }

    fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the zero page is 4 KiB of mapped memory, and `offset` one of the constants above, or
        // within its table of at most 128 entries.
        unsafe { self.0.add(offset).cast::<T>().read_unaligned() }
    }

    /// The command line; empty where it is no text.
    pub fn command_line(self) -> &'static str {
        let start = self.read::<u32>(COMMAND_LINE) as usize;
        if start == 0 {
            return "";
        }
        // SAFETY: the boot protocol has put the command line there; nobody writes it.
        let bytes = unsafe {
            core::slice::from_raw_parts(
                core::ptr::with_exposed_provenance::<u8>(start),
                MAX_COMMAND_LINE,
            )
        };
        let end = bytes
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(MAX_COMMAND_LINE);
        core::str::from_utf8(&bytes[..end]).unwrap_or("")
    }

    /// The end of the memory that `addr` lies in.
    fn end_of_memory(self, addr: u64) -> Option<u64> {
        let count = usize::from(self.read::<u8>(E820_COUNT)).min(128);
        (0..count)
            .map(|i| E820_TABLE + i * E820_ENTRY)
            .find_map(|entry| {
                let (start, len, kind) = (
                    self.read::<u64>(entry),
                    self.read::<u64>(entry + 8),
                    self.read::<u32>(entry + 16),
                );
                let end = start.saturating_add(len);
                (kind == E820_RAM && (start..end).contains(&addr)).then_some(end)
            })
    }
}

/// The machine.
pub struct Machine {
    ecam: Registers,
    /// Where the VMM keeps memory for devices apart; otherwise they get it from the heap.
    pool: Option<RefCell<Heap>>,
    /// What devices get memory of.
    base: *mut u8,
    start: u64,
    len: u64,
}

impl Machine {
    /// Makes the memory behind the image a heap, and finds configuration space and (where its length is not zero) the memory for devices.
    pub fn new(boot: BootParameters, ecam: u64, (dma, dma_len): (u64, u64)) -> Option<Self> {
        let start = arch::end_of_image();
        let end = boot.end_of_memory(start)?.min(arch::MAPPED_AT_BOOT);
        let len = end.checked_sub(start)?;
        let base = core::ptr::with_exposed_provenance_mut::<u8>(usize::try_from(start).ok()?);
        let ecam = NonNull::new(core::ptr::with_exposed_provenance_mut::<u8>(
            usize::try_from(ecam).ok()?,
        ))?;
        // SAFETY: the memory map says that this is RAM, the image ends before it, and the boot protocol's data lies below the image. Called
        // once: the heap is empty before. Configuration space is where the VMM says, and is nobody's memory.
        let mut machine = unsafe {
            (*HEAP.0.get()).init(base, usize::try_from(len).ok()?);
            Self {
                ecam: Registers::new(ecam, ECAM_LEN),
                pool: None,
                base,
                start,
                len,
            }
        };
        if dma_len > 0 {
            let base = machine.map(dma, dma_len)?.as_ptr();
            let mut heap = Heap::empty();
            // SAFETY: the VMM says that this memory is there for us, and nothing else uses it.
            unsafe { heap.init(base, usize::try_from(dma_len).ok()?) };
            machine.pool = Some(RefCell::new(heap));
            (machine.base, machine.start, machine.len) = (base, dma, dma_len);
        }
        Some(machine)
    }

    /// The memory that [`Platform::dma`] gives, `offset` above its guest physical addresses.
    pub fn memory(&self, offset: u64) -> Linear {
        let Self {
            base, start, len, ..
        } = *self;
        // SAFETY: as `new` found it: RAM, identity-mapped for ever, and reached through this only where the heap handed it out for that.
        unsafe { Linear::new(base, start.wrapping_add(offset), len) }
    }

    /// Lets COM2 interrupt.
    pub fn connect_control(&self) {
        let Some(base) = NonNull::new(core::ptr::with_exposed_provenance_mut::<u8>(IO_APIC)) else {
            return;
        };
        // SAFETY: the I/O APIC of a PC is there.
        let io_apic = unsafe { Registers::new(base, 0x20) };
        // High half first: the low one unmasks.
        for (register, value) in [(0x11, 0), (0x10, u32::from(arch::VECTOR_CONTROL))] {
            io_apic.write_u32(0, register + 2 * CONTROL_PIN);
            io_apic.write_u32(0x10, value);
        }
    }
}

impl Platform for Machine {
    fn config_read(&self, function: u8, offset: u16) -> u32 {
        self.ecam
            .read_u32(usize::from(function) << 12 | usize::from(offset & 0xffc))
    }

    fn config_write(&self, function: u8, offset: u16, value: u32) {
        self.ecam.write_u32(
            usize::from(function) << 12 | usize::from(offset & 0xffc),
            value,
        );
    }

    fn map(&self, addr: u64, len: u64) -> Option<NonNull<u8>> {
        // Everything is mapped at its own address.
        let end = addr.checked_add(len).filter(|&end| end <= arch::MAPPABLE)?;
        for gib in addr / arch::GIB..end.div_ceil(arch::GIB) {
            // Never from the memory of devices: what a page table says must not be theirs to change.
            arch::map_gib(gib * arch::GIB, || {
                let layout = Layout::from_size_align(4096, 4096).ok()?;
                // SAFETY: the layout has a size.
                let page = unsafe { alloc::alloc::alloc_zeroed(layout) };
                Some(NonNull::new(page)?.as_ptr().cast())
            })?;
        }
        NonNull::new(core::ptr::with_exposed_provenance_mut(
            usize::try_from(addr).ok()?,
        ))
    }

    fn dma(&self, len: usize, align: usize) -> Option<Dma> {
        // What a device looks at shares no cache line, and no pair of lines that is fetched together, with what this processor writes for itself.
        let whole = len.max(1).checked_next_multiple_of(LINES)?;
        let layout = Layout::from_size_align(whole, align.max(LINES)).ok()?;
        let ptr = match &self.pool {
            Some(pool) => {
                let ptr = pool
                    .try_borrow_mut()
                    .ok()?
                    .allocate_first_fit(layout)
                    .ok()?;
                // SAFETY: the pool has just given these bytes away.
                unsafe { ptr.write_bytes(0, layout.size()) };
                ptr
            }
            // SAFETY: the layout has a size.
            None => NonNull::new(unsafe { alloc::alloc::alloc_zeroed(layout) })?,
        };
        Some(Dma {
            ptr,
            addr: ptr.addr().get() as u64,
            len,
        })
    }

    fn message(&self, event: Event) -> MsiMessage {
        let vector = match event {
            Event::Queue => arch::VECTOR_QUEUE,
            Event::Config => arch::VECTOR_CONFIG,
        };
        MsiMessage {
            address: MSI_ADDRESS,
            data: u32::from(vector),
        }
    }
}

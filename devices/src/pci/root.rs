//! The root: bus 0, its host bridge, and the routing of accesses.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::{BARS, ConfigSpace, Error, Identity, PciFunction};

/// How many device slots a bus has; this one puts a single function in each.
const SLOTS: usize = 32;
/// Configuration address register of the legacy mechanism (PCI Local Bus 3.0, section 3.2.2.3.2).
const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
const BAR0: u16 = 0x10;
const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;

/// The host bridge: there to be found, it does nothing.
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        // Red Hat's ID for a host bridge without a model of its own.
        Self(ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn config_write(&self, _offset: u16, _data: &[u8]) {}
    fn bars(&self) -> [Option<Range<u64>>; BARS] {
        [const { None }; BARS]
    }
    fn bar_read(&self, _bar: u8, _offset: u64, _data: &mut [u8]) {}
    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
}

/// A BAR that wants an address.
struct Request {
    slot: u8,
    bar: u8,
    wide: bool,
    size: u64,
}

/// Bus 0. No lock of its own is held while a function is called.
pub struct PciRoot {
    functions: RwLock<Vec<Arc<dyn PciFunction>>>,
    /// What was written to port 0xCF8.
    address: AtomicU32,
}

impl Default for PciRoot {
    fn default() -> Self {
        Self::new()
    }
}

impl PciRoot {
    /// A bus with its host bridge at 00:00.0.
    #[must_use]
    pub fn new() -> Self {
        let bridge: Arc<dyn PciFunction> = Arc::new(HostBridge::new());
        Self {
            functions: RwLock::new(vec![bridge]),
            address: AtomicU32::new(0),
        }
    }

    /// Plugs a function in and returns its slot: it is 00:slot.0.
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<u8, Error> {
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let slot = u8::try_from(functions.len()).map_err(|_| Error::BusFull)?;
        if functions.len() == SLOTS {
            return Err(Error::BusFull);
        }
        functions.push(function);
        Ok(slot)
    }

    fn function(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(slot)
            .cloned()
    }

    fn all(&self) -> Vec<Arc<dyn PciFunction>> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The function and register that an offset into ECAM means (PCI Express 5.0, section 7.2.2): 20 bits for bus 0, 15 for the slot.
    fn ecam(&self, offset: u64) -> Option<(Arc<dyn PciFunction>, u16)> {
        let slot = usize::try_from(offset >> 15).ok()?;
        let function = offset >> 12 & 7;
        let register = u16::try_from(offset & 0xfff).ok()?;
        self.function(slot)
            .filter(|_| function == 0 && slot < SLOTS)
            .map(|f| (f, register))
    }

    /// A guest read at `offset` into the ECAM area. All-ones where there is no function.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((function, register)) = self.ecam(offset) {
            function.config_read(register, data);
        }
    }

    /// A guest write at `offset` into the ECAM area.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.ecam(offset) {
            function.config_write(register, data);
        }
    }

    /// The ECAM offset that the address register and a data port mean.
    fn selected(&self, port: u16) -> Option<u64> {
        let address = self.address.load(Ordering::Relaxed);
        let byte = port.checked_sub(DATA_PORT).filter(|&byte| byte < 4)?;
        let bus = address >> 16 & 0xff;
        let enabled = address >> 31 == 1;
        let register = u64::from(address & 0xfc) + u64::from(byte);
        (enabled && bus == 0).then_some(u64::from(address >> 8 & 0xff) << 12 | register)
    }

    /// A guest read from an I/O port. Returns whether the port is one of PCI's; `data` is all-ones where nothing answers.
    pub fn io_read(&self, port: u16, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match port {
            ADDRESS_PORT if data.len() == 4 => {
                data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            }
            ADDRESS_PORT..DATA_PORT => {}
            _ => match self.selected(port) {
                Some(offset) => self.ecam_read(offset, data),
                None => return (DATA_PORT..DATA_PORT + 4).contains(&port),
            },
        }
        true
    }

    /// A guest write to an I/O port. Returns whether the port is one of PCI's.
    pub fn io_write(&self, port: u16, data: &[u8]) -> bool {
        match port {
            ADDRESS_PORT..DATA_PORT => {
                // Only a whole write to 0xCF8 itself is the address register.
                if let (ADDRESS_PORT, Ok(address)) = (port, data.try_into()) {
                    self.address
                        .store(u32::from_le_bytes(address), Ordering::Relaxed);
                }
            }
            _ => match self.selected(port) {
                Some(offset) => self.ecam_write(offset, data),
                None => return (DATA_PORT..DATA_PORT + 4).contains(&port),
            },
        }
        true
    }

    /// The function, BAR and offset that a guest physical address means.
    fn decode(&self, gpa: u64) -> Option<(Arc<dyn PciFunction>, u8, u64)> {
        self.all().into_iter().find_map(|function| {
            let bars = function.bars();
            let (bar, range) = (0u8..).zip(bars).find_map(|(bar, range)| {
                range
                    .filter(|range| range.contains(&gpa))
                    .map(|range| (bar, range))
            })?;
            Some((function, bar, gpa - range.start))
        })
    }

    /// A guest read from memory that the VMM does not back. Returns whether a BAR is there; if not, `data` is untouched.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let target = self.decode(gpa);
        if let Some((function, bar, offset)) = &target {
            function.bar_read(*bar, *offset, data);
        }
        target.is_some()
    }

    /// A guest write to memory that the VMM does not back. Returns whether a BAR is there.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let target = self.decode(gpa);
        if let Some((function, bar, offset)) = &target {
            function.bar_write(*bar, *offset, data);
        }
        target.is_some()
    }

    /// Does what firmware would: gives every BAR an address, naturally aligned, and turns memory decoding on.
    /// 32-bit BARs go to `mmio32`, 64-bit ones to `mmio64`.
    pub fn assign_bars(&self, mmio32: Range<u64>, mmio64: Range<u64>) -> Result<(), Error> {
        let functions = self.all();
        let mut requests = Vec::new();
        for (slot, function) in (0u8..).zip(&functions) {
            set_memory_decoding(function.as_ref(), false);
            requests.append(&mut probe(slot, function.as_ref()));
        }
        // Largest first: then alignment leaves no gaps.
        requests.sort_by_key(|request| std::cmp::Reverse(request.size));
        let (mut next32, mut next64) = (mmio32.start, mmio64.start);
        for Request {
            slot,
            bar,
            wide,
            size,
        } in requests
        {
            let (next, end) = if wide {
                (&mut next64, mmio64.end)
            } else {
                (&mut next32, mmio32.end.min(1 << 32))
            };
            let base = next.checked_next_multiple_of(size);
            let place = base.and_then(|base| Some((base, base.checked_add(size)?)));
            let Some((base, after)) = place.filter(|&(_, after)| after <= end) else {
                return Err(Error::NoSpace { slot, bar, size });
            };
            *next = after;
            let length = if wide { 8 } else { 4 };
            if let Some(function) = functions.get(usize::from(slot)) {
                function.config_write(BAR0 + 4 * u16::from(bar), &base.to_le_bytes()[..length]);
            }
        }
        for function in &functions {
            set_memory_decoding(function.as_ref(), true);
        }
        Ok(())
    }
}

fn set_memory_decoding(function: &dyn PciFunction, on: bool) {
    let mut command = [0; 1];
    function.config_read(COMMAND, &mut command);
    command[0] = if on {
        command[0] | COMMAND_MEMORY
    } else {
        command[0] & !COMMAND_MEMORY
    };
    function.config_write(COMMAND, &command);
}

/// Finds a function's BARs by writing all-ones to them.
fn probe(slot: u8, function: &dyn PciFunction) -> Vec<Request> {
    let sized = |bar: u8| {
        let register = BAR0 + 4 * u16::from(bar);
        let mut value = [0; 4];
        function.config_write(register, &[0xff; 4]);
        function.config_read(register, &mut value);
        function.config_write(register, &[0; 4]);
        u32::from_le_bytes(value)
    };
    let mut requests = Vec::new();
    let mut bars = 0u8..6;
    while let Some(bar) = bars.next() {
        let low = sized(bar);
        let wide = low & 0b110 == 0b100;
        let high = if wide {
            bars.next().map_or(u32::MAX, sized)
        } else {
            u32::MAX
        };
        let size = !(u64::from(high) << 32 | u64::from(low & !0xf));
        if low != 0 {
            // An all-ones mask would mean a BAR of no address bits at all, which no function has.
            requests.push(Request {
                slot,
                bar,
                wide,
                size: size.wrapping_add(1),
            });
        }
    }
    requests
}

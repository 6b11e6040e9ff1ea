//! Requests in turns, and a memory that counts the cache lines which change hands meanwhile: what a ring costs without a clock.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use virtqueue::{Buffer, Chain, DeviceRing, DriverRing, Memory, Region, Used};

/// Size of the ring.
pub const SIZE: u16 = 256;
/// The longest batch.
pub const LONGEST: usize = 64;

/// Both sides of a ring, of which each has its turn: the driver takes what was used and adds a batch, the device gets a batch and uses it.
pub struct Turns<D, V> {
    driver: D,
    device: V,
    batch: usize,
    /// Where buffers are.
    data: u64,
    /// The device writes into what it gets and says how much; otherwise it only reads.
    written: bool,
    added: u64,
    /// Here and not in a turn, which would have to clear them.
    chains: [Chain; LONGEST],
    buffers: [Buffer; LONGEST],
    used: [Used; LONGEST],
}

impl<D: DriverRing, V: DeviceRing> Turns<D, V> {
    /// Sides that ask for no notifications, and `waiting` requests (whole batches) that are there whenever it is the driver's turn. With 0
    /// the device always has what the driver has just added; with `SIZE` less a batch it is a receive ring that is kept full.
    pub fn new(
        mut driver: D,
        mut device: V,
        batch: usize,
        data: u64,
        written: bool,
        waiting: usize,
    ) -> Self {
        driver.disable_calls();
        device.disable_kicks();
        let mut turns = Self {
            driver,
            device,
            batch,
            data,
            written,
            added: 0,
            chains: [Chain::default(); LONGEST],
            buffers: [Buffer::default(); LONGEST],
            used: [Used::default(); LONGEST],
        };
        for _ in 0..waiting / batch {
            turns.offer();
        }
        turns.offer();
        turns.device_turn();
        turns
    }

    /// Both turns, until so many requests are done; whole batches.
    pub fn run(&mut self, requests: usize) {
        for _ in 0..requests / self.batch {
            self.driver_turn();
            self.device_turn();
        }
    }

    fn offer(&mut self) {
        for _ in 0..self.batch {
            let buffer = Buffer {
                addr: self.data + self.added % 1024 * 64,
                len: 64,
                device_writes: self.written,
            };
            self.driver.add(&[buffer]).unwrap();
            self.added += 1;
        }
        self.driver.publish();
    }

    /// Takes a batch and adds one.
    #[inline(never)]
    pub fn driver_turn(&mut self) {
        let taken = self.driver.take(&mut self.used[..self.batch]).unwrap();
        assert_eq!(taken, self.batch);
        self.offer();
    }

    /// Gets a batch and uses it.
    #[inline(never)]
    pub fn device_turn(&mut self) {
        let chains = &mut self.chains[..self.batch];
        let count = self.device.get(chains, &mut self.buffers).unwrap();
        assert_eq!(count, self.batch);
        if self.written {
            for chain in chains {
                self.device.put(chain.id, 64);
            }
        } else {
            self.device.put_read(chains);
        }
        self.device.publish();
    }
}

struct Cores {
    bytes: Vec<u8>,
    /// By line: whether the cache of either side has it. The side that wrote last always has it, and alone until the other reads.
    held: Vec<[bool; 2]>,
    /// Lines that a side had to fetch because the other had written them since: the driver, and the device.
    fetched: [u64; 2],
}

/// Memory that two cores share whose caches are as large as it is and coherent by lines of 64 bytes: as in MESI, any number of caches may have
/// a line to read, and one alone to write. As one side sees it.
#[derive(Clone)]
pub struct Lines {
    cores: Rc<RefCell<Cores>>,
    side: usize,
}

impl Lines {
    /// As the driver and as the device sees it: `len` bytes from device address 0 on.
    pub fn pair(len: usize) -> [Self; 2] {
        let cores = Rc::new(RefCell::new(Cores {
            bytes: vec![0; len],
            held: vec![[false; 2]; len.div_ceil(64)],
            fetched: [0; 2],
        }));
        [0, 1].map(|side| Self {
            cores: cores.clone(),
            side,
        })
    }

    /// How many lines the driver and the device fetched since the last call.
    pub fn fetched(&self) -> [u64; 2] {
        std::mem::take(&mut self.cores.borrow_mut().fetched)
    }
}

impl Cores {
    fn reach(&mut self, at: usize, side: usize) {
        let held = &mut self.held[at / 64];
        if !held[side] {
            // What nobody has comes from memory, and only once.
            self.fetched[side] += u64::from(held[1 - side]);
            held[side] = true;
        }
    }
}

impl Memory for Lines {
    type Region = LinesRegion;

    fn region(&self, addr: u64, len: usize, align: usize) -> Option<LinesRegion> {
        let start = usize::try_from(addr).ok()?;
        let fits = start.checked_add(len)? <= self.cores.borrow().bytes.len();
        (fits && start.is_multiple_of(align)).then(|| LinesRegion {
            lines: self.clone(),
            start,
        })
    }

    fn contains(&self, _: u64, _: u32) -> bool {
        // No payload is touched.
        true
    }
}

/// A part of it.
#[derive(Clone)]
pub struct LinesRegion {
    lines: Lines,
    start: usize,
}

impl LinesRegion {
    fn load<const N: usize>(&self, offset: usize) -> [u8; N] {
        let at = self.start + offset;
        let mut cores = self.lines.cores.borrow_mut();
        cores.reach(at, self.lines.side);
        cores.bytes[at..at + N].try_into().unwrap()
    }

    fn store<const N: usize>(&self, offset: usize, bytes: [u8; N]) {
        let at = self.start + offset;
        let side = self.lines.side;
        let mut cores = self.lines.cores.borrow_mut();
        cores.reach(at, side);
        cores.held[at / 64][1 - side] = false;
        cores.bytes[at..at + N].copy_from_slice(&bytes);
    }
}

impl Region for LinesRegion {
    fn load_u16(&self, offset: usize, _: Ordering) -> u16 {
        u16::from_le_bytes(self.load(offset))
    }
    fn load_u32(&self, offset: usize, _: Ordering) -> u32 {
        u32::from_le_bytes(self.load(offset))
    }
    fn load_u64(&self, offset: usize, _: Ordering) -> u64 {
        u64::from_le_bytes(self.load(offset))
    }
    fn store_u16(&self, offset: usize, value: u16, _: Ordering) {
        self.store(offset, value.to_le_bytes());
    }
    fn store_u32(&self, offset: usize, value: u32, _: Ordering) {
        self.store(offset, value.to_le_bytes());
    }
    fn store_u64(&self, offset: usize, value: u64, _: Ordering) {
        self.store(offset, value.to_le_bytes());
    }
    fn fence(_: Ordering) {}
    /// A line that comes early has come all the same.
    fn prefetch(&self, offset: usize) {
        let at = self.start + offset;
        self.lines.cores.borrow_mut().reach(at, self.lines.side);
    }
}

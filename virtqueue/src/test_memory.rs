//! A memory for tests that is strict where [`crate::linear::Linear`] trusts, that remembers every access, and that changes while it is read.

use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::sync::atomic::Ordering;

use crate::{Memory, Region};

/// A store into shared memory: device address and value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    pub addr: u64,
    pub value: u64,
    pub release: bool,
}

#[derive(Debug)]
struct Shared {
    bytes: Vec<u8>,
    stores: Vec<Store>,
    loads: Vec<u64>,
    /// What a hostile side writes later: after how many loads, where, what.
    later: Option<(usize, u64, u64)>,
}

/// Memory at the device addresses `base..base + len`. Clones show the same memory.
#[derive(Clone, Debug)]
pub struct Fake {
    base: u64,
    shared: Rc<RefCell<Shared>>,
}

impl Fake {
    /// Filled with a pattern, so that what nobody initialised is noticed.
    pub fn new(base: u64, len: usize) -> Self {
        let shared = Shared {
            bytes: vec![0xa5; len],
            stores: Vec::new(),
            loads: Vec::new(),
            later: None,
        };
        Self {
            base,
            shared: Rc::new(RefCell::new(shared)),
        }
    }

    /// The stores since the last call.
    pub fn stores(&self) -> Vec<Store> {
        core::mem::take(&mut self.shared.borrow_mut().stores)
    }

    /// The addresses of the loads since the last call.
    pub fn loads(&self) -> Vec<u64> {
        core::mem::take(&mut self.shared.borrow_mut().loads)
    }

    /// What a hostile side writes while we read: behind the next `loads` loads.
    pub fn poke_after(&self, loads: usize, addr: u64, value: u64) {
        self.shared.borrow_mut().later = Some((loads, addr, value));
    }

    /// What a hostile side writes: anything anywhere.
    pub fn poke<const N: usize>(&self, addr: u64, bytes: [u8; N]) {
        let at = self.at(addr);
        self.shared.borrow_mut().bytes[at..at + N].copy_from_slice(&bytes);
    }

    pub fn peek<const N: usize>(&self, addr: u64) -> [u8; N] {
        let at = self.at(addr);
        self.shared.borrow().bytes[at..at + N].try_into().unwrap()
    }

    #[cfg(all(test, not(loom)))]
    pub fn peek_u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.peek(addr))
    }

    fn at(&self, addr: u64) -> usize {
        usize::try_from(addr.checked_sub(self.base).unwrap()).unwrap()
    }

    fn len(&self) -> u64 {
        self.shared.borrow().bytes.len().try_into().unwrap()
    }
}

impl Memory for Fake {
    type Region = FakeRegion;

    fn region(&self, addr: u64, len: usize, align: usize) -> Option<FakeRegion> {
        assert!(align.is_power_of_two());
        let offset = addr.checked_sub(self.base)?;
        let end = offset.checked_add(len.try_into().unwrap())?;
        (end <= self.len() && addr.is_multiple_of(align.try_into().unwrap())).then(|| FakeRegion {
            memory: self.clone(),
            start: addr,
            len,
        })
    }

    fn contains(&self, addr: u64, len: u32) -> bool {
        let end = u128::from(addr) + u128::from(len);
        addr >= self.base && end <= u128::from(self.base) + u128::from(self.len())
    }
}

/// Panics where an access is not inside the region or not aligned.
#[derive(Clone, Debug)]
pub struct FakeRegion {
    memory: Fake,
    start: u64,
    len: usize,
}

impl FakeRegion {
    fn check(&self, offset: usize, size: usize) -> u64 {
        assert!(
            offset + size <= self.len,
            "{size} bytes at {offset} of {}",
            self.len
        );
        let addr = self.start + u64::try_from(offset).unwrap();
        assert!(
            addr.is_multiple_of(size.try_into().unwrap()),
            "{size} bytes at {addr:#x}"
        );
        addr
    }

    fn load<const N: usize>(&self, offset: usize, order: Ordering) -> [u8; N] {
        assert!(matches!(order, Ordering::Relaxed | Ordering::Acquire));
        let addr = self.check(offset, N);
        let value = self.memory.peek(addr);
        let mut shared = self.memory.shared.borrow_mut();
        shared.loads.push(addr);
        let now = match &mut shared.later {
            Some((0, addr, value)) => Some((*addr, *value)),
            Some((loads, ..)) => {
                *loads -= 1;
                None
            }
            None => None,
        };
        if let Some((addr, value)) = now {
            shared.later = None;
            drop(shared);
            self.memory.poke(addr, value.to_le_bytes());
        }
        value
    }

    fn store<const N: usize>(&self, offset: usize, bytes: [u8; N], order: Ordering) {
        assert!(matches!(order, Ordering::Relaxed | Ordering::Release));
        let addr = self.check(offset, N);
        self.memory.poke(addr, bytes);
        let mut value = [0; 8];
        value[..N].copy_from_slice(&bytes);
        self.memory.shared.borrow_mut().stores.push(Store {
            addr,
            value: u64::from_le_bytes(value),
            release: order == Ordering::Release,
        });
    }
}

impl Region for FakeRegion {
    fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le_bytes(self.load(offset, order))
    }
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        u32::from_le_bytes(self.load(offset, order))
    }
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        u64::from_le_bytes(self.load(offset, order))
    }
    fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        self.store(offset, value.to_le_bytes(), order);
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.store(offset, value.to_le_bytes(), order);
    }
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.store(offset, value.to_le_bytes(), order);
    }
    fn fence(order: Ordering) {
        assert_eq!(order, Ordering::SeqCst);
    }
    fn prefetch(&self, offset: usize) {
        self.check(offset, 1);
    }
}

//! The data path with buffers that are mapped while the device has them, over rings and a mapper that check each other; and what is asked of an IOMMU.
#![allow(unsafe_code)] // tests make shared memory

extern crate std;

use core::cell::RefCell;
use core::ptr::NonNull;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use virtqueue::linear::Linear;
use virtqueue::net::F_MRG_RXBUF;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Buffer, DriverRing, Layout, RingConfig, Used};

use super::*;
use crate::joined::Silent;
use crate::net_port::{NetPort, Shape, TxShape};
use crate::peer::{PeerPort, Vring};
use crate::port::{Error as PortError, Port};
use crate::translated::{Behind, Translated};
use crate::virtio_iommu::{Config, Fault, Iommu, Ticket};
use crate::{Dma, Event, Frame, MsiMessage, Platform};

const START: u64 = 0x10000;
const SIZE: u16 = 16;
const AREAS: u64 = 0x8000;
const POOL_LEN: u64 = SIZE as u64 * PAGE;

/// Pages that the device can reach, and those that it has been given.
#[derive(Debug, Default)]
struct Ledger {
    mapped: BTreeSet<u64>,
    given: BTreeMap<u64, usize>,
    maps: usize,
    refusing: bool,
}

type SharedLedger = Rc<RefCell<Ledger>>;

/// A mapper that flips all bytes of a receive buffer when it is taken away from the device: who looks too early sees nonsense.
#[derive(Clone)]
struct Strict {
    ledger: SharedLedger,
    memory: Linear,
    rx_pool: u64,
}

impl Mapper for Strict {
    const STRIDE: usize = 4096;
    const DYNAMIC: bool = true;

    fn map(&mut self, pool: u64, buffers: &[u16]) -> Result<(), Error> {
        let mut ledger = self.ledger.borrow_mut();
        if ledger.refusing {
            return Err(Error::Refused(8));
        }
        for &buffer in buffers {
            let page = pool + u64::from(buffer) * PAGE;
            assert!(ledger.mapped.insert(page), "{page:#x} is mapped twice");
            ledger.maps += 1;
        }
        Ok(())
    }

    fn unmap(&mut self, pool: u64, buffers: &[u16]) -> Result<(), Error> {
        let mut ledger = self.ledger.borrow_mut();
        for &buffer in buffers {
            let page = pool + u64::from(buffer) * PAGE;
            assert!(ledger.mapped.remove(&page), "{page:#x} is not mapped");
            assert!(
                !ledger.given.contains_key(&page),
                "the device has {page:#x}"
            );
            if pool == self.rx_pool {
                let bytes = self.memory.ptr(page, 4096).unwrap();
                for i in 0..4096 {
                    // SAFETY: `ptr` checked the page; one thread.
                    unsafe { *bytes.add(i) ^= 0xff };
                }
            }
        }
        Ok(())
    }

    fn clear(&mut self, pool: u64, count: u16) -> Result<(), Error> {
        let mut ledger = self.ledger.borrow_mut();
        ledger
            .mapped
            .retain(|page| !(pool..pool + u64::from(count) * PAGE).contains(page));
        Ok(())
    }
}

/// A ring that takes only what is mapped.
struct Checked<D> {
    inner: D,
    ledger: SharedLedger,
    pages_of: BTreeMap<u16, Vec<u64>>,
}

impl<D: DriverRing> Checked<D> {
    fn note(&mut self, id: Option<u16>, pages: Vec<u64>) -> Option<u16> {
        let id = id?;
        let mut ledger = self.ledger.borrow_mut();
        for &page in &pages {
            assert!(ledger.mapped.contains(&page), "{page:#x} is not mapped");
            *ledger.given.entry(page).or_default() += 1;
        }
        assert!(self.pages_of.insert(id, pages).is_none());
        Some(id)
    }
}

fn pages(buffers: &[Buffer]) -> Vec<u64> {
    buffers
        .iter()
        .map(|buffer| {
            let page = buffer.addr & !(PAGE - 1);
            assert!(buffer.addr + u64::from(buffer.len) <= page + PAGE);
            page
        })
        .collect()
}

impl<D: DriverRing> DriverRing for Checked<D> {
    fn free(&self) -> u16 {
        self.inner.free()
    }

    fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let id = self.inner.add(buffers);
        self.note(id, pages(buffers))
    }

    fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        let id = self.inner.add_indirect(table, buffers);
        let mut pages = pages(buffers);
        pages.push(table & !(PAGE - 1));
        self.note(id, pages)
    }

    fn publish(&mut self) -> bool {
        self.inner.publish()
    }

    fn take(&mut self, out: &mut [Used]) -> Result<usize, virtqueue::Error> {
        let mut places = out.iter_mut();
        self.take_each(places.len(), |used| *places.next().unwrap() = used)
    }

    fn take_each(
        &mut self,
        count: usize,
        mut each: impl FnMut(Used),
    ) -> Result<usize, virtqueue::Error> {
        let Self {
            inner,
            ledger,
            pages_of,
            ..
        } = self;
        let mut ledger = ledger.borrow_mut();
        inner.take_each(count, |used| {
            for page in pages_of.remove(&used.id).unwrap() {
                let count = ledger.given.get_mut(&page).unwrap();
                *count -= 1;
                if *count == 0 {
                    ledger.given.remove(&page);
                }
            }
            each(used);
        })
    }

    fn disable_calls(&mut self) {
        self.inner.disable_calls();
    }

    fn enable_calls(&mut self) -> bool {
        self.inner.enable_calls()
    }
}

struct Bed<L: Layout> {
    _pages: Vec<[u64; 512]>,
    ledger: SharedLedger,
    front: NetPort<Checked<L::Driver<Linear>>, Silent, Strict>,
    back: PeerPort<L::Device<Linear>, Silent>,
}

fn bed<L: Layout>(shape: Shape) -> Bed<L> {
    let len = AREAS + 2 * POOL_LEN;
    let mut words = vec![[0u64; 512]; usize::try_from(len / PAGE).unwrap() + 1];
    let base = words.as_mut_ptr().cast::<u8>();
    // SAFETY: the vector lives as long as the bed and is not touched otherwise.
    let memory = unsafe { Linear::new(base.add(base.align_offset(4096)), START, len) };
    let config = |n: u64| RingConfig {
        size: SIZE,
        desc: START + n * 0x3000,
        driver: START + n * 0x3000 + 0x1000,
        device: START + n * 0x3000 + 0x2000,
        event_idx: false,
        in_order: false,
        indirect: true,
    };
    let pools = [START + AREAS, START + AREAS + POOL_LEN];
    let ledger = SharedLedger::default();
    let half = |n: u8| {
        let ring = Checked {
            inner: L::driver(memory, &config(n.into())).unwrap(),
            ledger: ledger.clone(),
            pages_of: BTreeMap::new(),
        };
        (ring, pools[usize::from(n)], Silent)
    };
    let mapper = Strict {
        ledger: ledger.clone(),
        memory,
        rx_pool: pools[0],
    };
    let mut front = NetPort::with_mapper(memory, shape, half(0), half(1), mapper).unwrap();
    front.fill().unwrap();
    let vring = |n| Vring {
        ring: L::device(memory, &config(n)).unwrap(),
        call: Silent,
        kicks: false,
        record: None,
    };
    let mergeable = if shape.mergeable { F_MRG_RXBUF } else { 0 };
    let back = PeerPort::new(memory, mergeable, vring(0), vring(1));
    Bed {
        _pages: words,
        ledger,
        front,
        back,
    }
}

fn bytes(frame: &Frame) -> Vec<u8> {
    let mut bytes = vec![0; frame.len()];
    assert!(frame.read(0, &mut bytes));
    bytes
}

fn a_buffer_is_mapped_exactly_while_the_device_has_it<L: Layout>() {
    for tx in [TxShape::Direct, TxShape::Chain, TxShape::Indirect] {
        let mut bed = bed::<L>(Shape {
            tx,
            ..Shape::default()
        });
        let size = usize::from(SIZE);
        assert_eq!(bed.ledger.borrow().mapped.len(), size);
        for round in 0..50u8 {
            let burst = 1 + usize::from(round) % (size - 1);
            let payload: Vec<u8> = (0..100).map(|i| i ^ round).collect();
            // To the front-end: the device's bytes are flipped when the buffer is taken away from it.
            let flipped: Vec<u8> = payload.iter().map(|byte| !byte).collect();
            let sent = bed
                .back
                .tx_burst(burst, 100, |_, slot| assert!(slot.write(0, &flipped)));
            assert_eq!(sent, Ok(burst));
            let mut got = 0;
            let ledger = bed.ledger.clone();
            let n = bed.front.rx_burst(burst, |frame| {
                assert_eq!(bytes(frame), payload, "looked at before it was unmapped");
                assert_eq!(
                    ledger.borrow().mapped.len(),
                    size - burst,
                    "while looked at"
                );
                got += 1;
            });
            assert_eq!((n, got), (Ok(burst), burst));
            assert_eq!(bed.ledger.borrow().mapped.len(), size);
            // From the front-end.
            let room = if tx == TxShape::Chain { size / 2 } else { size };
            let fit = burst.min(room);
            let sent = bed.front.tx_burst(burst, 100, |_, slot| {
                assert!(slot.write(0, &payload));
                assert_eq!(ledger.borrow().mapped.len(), size, "while it is built");
            });
            assert_eq!(sent, Ok(fit));
            assert_eq!(bed.ledger.borrow().mapped.len(), size + fit);
            let n = bed
                .back
                .rx_burst(256, |frame| assert_eq!(bytes(frame), payload));
            assert_eq!(n, Ok(fit));
            assert_eq!(bed.front.drained(), Ok(true));
            assert_eq!(bed.ledger.borrow().mapped.len(), size);
            assert_eq!(bed.ledger.borrow().given.len(), size);
        }
        assert!(bed.ledger.borrow().maps > 50);
    }
}

fn a_full_ring_leaves_no_buffer_mapped_that_the_device_does_not_have<L: Layout>() {
    for tx in [TxShape::Direct, TxShape::Chain, TxShape::Indirect] {
        let mut bed = bed::<L>(Shape {
            tx,
            ..Shape::default()
        });
        let mut sent = 0;
        for burst in [5, 9, 30, 3] {
            sent += bed.front.tx_burst(burst, 60, |_, _| ()).unwrap();
        }
        let room = usize::from(SIZE) / if tx == TxShape::Chain { 2 } else { 1 };
        assert_eq!(sent, room);
        let ledger = bed.ledger.borrow();
        assert_eq!(ledger.mapped.len(), usize::from(SIZE) + room);
        assert_eq!(ledger.given.len(), ledger.mapped.len());
    }
}

fn a_buffer_that_cannot_be_mapped_ends_the_burst_with_that_error<L: Layout>() {
    let mut bed = bed::<L>(Shape::default());
    bed.ledger.borrow_mut().refusing = true;
    let refused = Err(PortError::Iommu(Error::Refused(8)));
    assert_eq!(bed.front.tx_burst(4, 60, |_, _| ()), refused);
    assert_eq!(bed.back.rx_burst(4, |_| panic!("sent unmapped")), Ok(0));
    bed.back.tx_burst(2, 60, |_, _| ()).unwrap();
    assert_eq!(bed.front.rx_burst(4, |_| ()), refused);
}

/// Runs each of these for both layouts.
macro_rules! both_layouts {
    ($($name:ident),* $(,)?) => {
        mod split_rings {
            $(#[test]
            fn $name() {
                super::$name::<super::Split>();
            })*
        }
        mod packed_rings {
            $(#[test]
            fn $name() {
                super::$name::<super::Packed>();
            })*
        }
    };
}

both_layouts!(
    a_buffer_is_mapped_exactly_while_the_device_has_it,
    a_full_ring_leaves_no_buffer_mapped_that_the_device_does_not_have,
    a_buffer_that_cannot_be_mapped_ends_the_burst_with_that_error,
);

/// An IOMMU that writes down what it is asked, and refuses from a number of requests on.
#[derive(Debug)]
struct Scribe {
    config: Config,
    asked: Vec<Request>,
    batches: usize,
    refuse_from: usize,
}

impl Scribe {
    fn new(page_size_mask: u64) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            config: Config {
                page_size_mask,
                input_range: (0, u64::MAX),
                domain_range: (0, 9),
                probe_size: 0,
            },
            asked: Vec::new(),
            batches: 0,
            refuse_from: usize::MAX,
        }))
    }
}

impl Iommu for Scribe {
    fn submit(&mut self, request: &Request) -> Result<Ticket, Error> {
        self.asked.push(*request);
        Ok(Ticket::new(0))
    }

    fn flush(&mut self) {}

    fn poll(&mut self, _ticket: &Ticket) -> Result<Option<u8>, Error> {
        let refused = self.asked.len() > self.refuse_from;
        Ok(Some(if refused { 5 } else { status::OK }))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<u8, Error> {
        Ok(self.poll(&ticket)?.unwrap())
    }

    fn batch(&mut self, requests: &mut dyn Iterator<Item = Request>) -> Result<u8, Error> {
        self.batches += 1;
        self.asked.extend(requests);
        self.wait(Ticket::new(0))
    }

    fn faults(&mut self, _show: &mut dyn FnMut(Fault)) -> Result<usize, Error> {
        Ok(0)
    }

    fn config(&self) -> &Config {
        &self.config
    }
}

const OFFSET: u64 = 1 << 32;

fn map(iova: u64, len: u64) -> Request {
    Request::Map {
        domain: 1,
        iova,
        gpa: iova - OFFSET,
        len,
        flags: access::READ | access::WRITE,
    }
}

#[test]
fn pages_are_asked_for_one_by_one_or_at_once() {
    for at_once in [false, true] {
        let scribe = Scribe::new(!0xfff);
        let mut pages = Pages::new(scribe.clone(), 1, OFFSET, at_once).unwrap();
        let pool = OFFSET + 0x20000;
        pages.map(pool, &[0, 7]).unwrap();
        pages.unmap(pool, &[7]).unwrap();
        pages.clear(pool, 16).unwrap();
        let unmap = |iova, len| Request::Unmap {
            domain: 1,
            iova,
            len,
        };
        let wanted = [
            map(pool, PAGE),
            map(pool + 7 * PAGE, PAGE),
            unmap(pool + 7 * PAGE, PAGE),
            unmap(pool, 16 * PAGE),
        ];
        assert_eq!(scribe.borrow().asked, wanted);
        assert_eq!(scribe.borrow().batches, if at_once { 3 } else { 0 });
        scribe.borrow_mut().refuse_from = 5;
        let refused = pages.map(pool, &[1, 2, 3]);
        assert_eq!(refused, Err(Error::Refused(5)));
    }
    assert!(Pages::new(Scribe::new(1 << 21), 1, OFFSET, true).is_none());
}

/// Hands out memory from guest physical address 0x20_0000 on, which nobody touches.
struct Stock(RefCell<u64>);

impl Platform for Stock {
    fn config_read(&self, _function: u8, _offset: u16) -> u32 {
        u32::MAX
    }

    fn config_write(&self, _function: u8, _offset: u16, _value: u32) {}

    fn map(&self, _addr: u64, _len: u64) -> Option<NonNull<u8>> {
        None
    }

    fn dma(&self, len: usize, align: usize) -> Option<Dma> {
        let mut next = self.0.borrow_mut();
        let addr = next.next_multiple_of(align as u64);
        *next = addr + len as u64;
        Some(Dma {
            ptr: NonNull::dangling(),
            addr,
            len,
        })
    }

    fn message(&self, _event: Event) -> MsiMessage {
        MsiMessage {
            address: 0,
            data: 0,
        }
    }
}

fn behind(scribe: &Rc<RefCell<Scribe>>, map_pools: bool) -> Behind {
    Behind {
        iommu: scribe.clone(),
        endpoint: 8,
        domain: 1,
        offset: OFFSET,
        map_pools,
    }
}

#[test]
fn memory_for_a_device_is_mapped_in_whole_pages_before_the_driver_has_it() {
    for (mask, page) in [(!0xfff, PAGE), (1 << 21, 1 << 21)] {
        let scribe = Scribe::new(mask);
        let stock = Stock(RefCell::new(0x20_0040));
        let platform = Translated::new(&stock, Some(behind(&scribe, true)));
        let first = platform.dma(100, 64).unwrap();
        let second = platform.pool(5000, 64).unwrap();
        for dma in [first, second] {
            assert!(dma.addr.is_multiple_of(page) && dma.addr > OFFSET);
        }
        assert!(second.addr >= first.addr + page, "two areas share a page");
        let rounded = 5000u64.next_multiple_of(page);
        let wanted = [map(first.addr, page), map(second.addr, rounded)];
        assert_eq!(scribe.borrow().asked, wanted);
    }
}

#[test]
fn pools_that_are_mapped_buffer_by_buffer_are_not_mapped_as_a_whole() {
    let scribe = Scribe::new(!0xfff);
    let stock = Stock(RefCell::new(0x20_0000));
    let platform = Translated::new(&stock, Some(behind(&scribe, false)));
    assert_eq!(platform.pool(5000, 64).unwrap().addr, OFFSET + 0x20_0000);
    assert_eq!(scribe.borrow().asked, []);
}

#[test]
fn memory_that_is_refused_is_not_handed_out_and_the_reason_is_kept() {
    let scribe = Scribe::new(!0xfff);
    scribe.borrow_mut().refuse_from = 0;
    let stock = Stock(RefCell::new(0x20_0000));
    let platform = Translated::new(&stock, Some(behind(&scribe, true)));
    assert!(platform.dma(100, 64).is_none());
    assert_eq!(platform.take_refusal(), Some(Error::Refused(5)));
    assert_eq!(platform.take_refusal(), None);
}

#[test]
fn without_an_iommu_nothing_is_translated() {
    let stock = Stock(RefCell::new(0x20_0000));
    let platform = Translated::new(&stock, None);
    assert_eq!(platform.offset(), 0);
    assert_eq!(platform.dma(100, 64).unwrap().addr, 0x20_0000);
    assert_eq!(platform.pool(100, 64).unwrap().addr, 0x20_0080);
}

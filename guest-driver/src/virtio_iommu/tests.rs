//! The queues against a device that a test plays: it acts when it is notified, and can be told to be slow, silent, short or wrong.
#![allow(unsafe_code)] // tests make shared memory

extern crate std;

use std::vec;
use std::vec::Vec;

use virtqueue::{Chain, DeviceRing, Layout, RingConfig};

use super::*;

const START: u64 = 0x10000;
const PROBE: usize = 64;
const POOL: u64 = START + 0x4000;
const SIZE: u16 = 16;
const CAPACITY: usize = 8;

/// What the device does with requests.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    /// Answers with statuses 0, 1, 2, … in turn.
    Count,
    /// Answers OK.
    Good,
    /// Keeps them.
    Silent,
    /// Answers without a status.
    Short,
}

struct Device {
    ring: split::Device<Linear>,
    memory: Linear,
    manner: Manner,
    notified: usize,
    seen: Vec<Vec<u8>>,
    held: Vec<u16>,
}

impl Device {
    fn act(&mut self) {
        self.notified += 1;
        let mut chains = [Chain::default(); 16];
        let mut buffers = [Buffer::default(); 32];
        let n = self.ring.get(&mut chains, &mut buffers).unwrap();
        for chain in &chains[..n] {
            let pieces = &buffers[usize::from(chain.first)..][..usize::from(chain.count)];
            let [request, answer] = *pieces else {
                panic!("a request is two buffers");
            };
            assert!(!request.device_writes && answer.device_writes);
            let mut bytes = vec![0; request.len as usize];
            assert!(read(self.memory, request.addr, &mut bytes));
            let mut reply = vec![0xee; answer.len as usize];
            let tail = reply.len() - TAIL;
            let status = match self.manner {
                Manner::Count => u8::try_from(self.seen.len()).unwrap(),
                _ => status::OK,
            };
            reply[tail..].copy_from_slice(&[status, 0, 0, 0]);
            self.seen.push(bytes);
            match self.manner {
                Manner::Silent => self.held.push(chain.id),
                Manner::Short => self.ring.put(chain.id, answer.len - 1),
                _ => {
                    write(self.memory, answer.addr, &reply);
                    self.ring.put(chain.id, answer.len);
                }
            }
        }
        self.ring.publish();
    }

    fn let_go(&mut self) {
        for id in self.held.drain(..) {
            self.ring.put(id, 4);
        }
        self.ring.publish();
    }
}

/// Notifies the device, which acts at once.
#[derive(Clone)]
struct Hook(Rc<RefCell<Device>>);

impl Notify for Hook {
    fn notify(&self) {
        self.0.borrow_mut().act();
    }
}

fn memory() -> (Vec<[u64; 512]>, Linear) {
    let mut pages = vec![[0u64; 512]; 17];
    let base = pages.as_mut_ptr().cast::<u8>();
    // SAFETY: the vector is returned with it, and not touched otherwise.
    let memory = unsafe { Linear::new(base.add(base.align_offset(4096)), START, 0x10000) };
    (pages, memory)
}

fn config() -> RingConfig {
    RingConfig {
        size: SIZE,
        desc: START,
        driver: START + 0x1000,
        device: START + 0x2000,
        event_idx: false,
        in_order: false,
        indirect: false,
    }
}

type Under = Requests<split::Driver<Linear>, Hook>;

fn requests(manner: Manner) -> (Vec<[u64; 512]>, Under, Rc<RefCell<Device>>) {
    let (pages, memory) = memory();
    let ring = Split::driver(memory, &config()).unwrap();
    let device = Rc::new(RefCell::new(Device {
        ring: Split::device(memory, &config()).unwrap(),
        memory,
        manner,
        notified: 0,
        seen: Vec::new(),
        held: Vec::new(),
    }));
    let hook = Hook(device.clone());
    let requests = Requests::new((ring, hook), memory, POOL, PROBE, 1_000_000);
    assert!(Under::pool_len(SIZE, PROBE) <= 0x8000);
    (pages, requests, device)
}

fn one(requests: &mut Under, request: &Request) -> Result<u8, Error> {
    let ticket = requests.submit(request)?;
    requests.flush();
    requests.wait(ticket)
}

fn unmap(n: u64) -> Request {
    Request::Unmap {
        domain: 1,
        iova: n << 12,
        len: 4096,
    }
}

#[test]
fn requests_look_as_the_specification_says_and_statuses_come_back() {
    let (_pages, mut requests, device) = requests(Manner::Count);
    let (domain, endpoint) = (0x0102_0304, 0x0506_0708);
    let map = Request::Map {
        domain,
        iova: 0x1000,
        gpa: 0xa0_0000,
        len: 0x2000,
        flags: access::READ | access::WRITE,
    };
    let all = [
        Request::Attach { domain, endpoint },
        Request::Detach { domain, endpoint },
        map,
        Request::Unmap {
            domain,
            iova: 0x1000,
            len: 0x2000,
        },
        Request::Probe { endpoint },
    ];
    for (request, status) in all.iter().zip(0..) {
        assert_eq!(one(&mut requests, request), Ok(status));
    }
    let (d, e) = ([4, 3, 2, 1], [8, 7, 6, 5]);
    let le = |n: u64| n.to_le_bytes();
    let device = device.borrow();
    assert_eq!(
        device.seen[0],
        [&[1, 0, 0, 0][..], &d, &e, &[0; 8]].concat()
    );
    assert_eq!(
        device.seen[1],
        [&[2, 0, 0, 0][..], &d, &e, &[0; 8]].concat()
    );
    let range = [le(0x1000), le(0x2fff)].concat();
    let tail = [&le(0xa0_0000)[..], &[3, 0, 0, 0]].concat();
    assert_eq!(
        device.seen[2],
        [&[3, 0, 0, 0][..], &d, &range, &tail].concat()
    );
    assert_eq!(
        device.seen[3],
        [&[4, 0, 0, 0][..], &d, &range, &[0; 4]].concat()
    );
    assert_eq!(device.seen[4], [&[5, 0, 0, 0][..], &e, &[0; 64]].concat());
}

#[test]
fn the_last_address_of_everything_is_reached_without_overflow() {
    let (_pages, mut requests, device) = requests(Manner::Good);
    let request = Request::Unmap {
        domain: 0,
        iova: u64::MAX - 0xfff,
        len: 0x1000,
    };
    assert_eq!(one(&mut requests, &request), Ok(status::OK));
    assert_eq!(device.borrow().seen[0][16..24], [0xff; 8]);
}

#[test]
fn a_batch_is_one_notification_a_ringful_and_reports_the_first_failure() {
    let (_pages, mut requests, device) = requests(Manner::Good);
    assert_eq!(requests.batch(&mut (0..3).map(unmap)), Ok(status::OK));
    assert_eq!(device.borrow().notified, 1);
    assert_eq!(requests.batch(&mut (3..23).map(unmap)), Ok(status::OK));
    assert_eq!(device.borrow().notified, 1 + 20usize.div_ceil(CAPACITY));
    let order: Vec<u8> = device.borrow().seen.iter().map(|r| r[9] >> 4).collect();
    assert_eq!(order, (0..23).map(|n| n & 15).collect::<Vec<u8>>());
    device.borrow_mut().seen.clear();
    device.borrow_mut().manner = Manner::Count;
    assert_eq!(requests.batch(&mut (0..20).map(unmap)), Ok(1));
    assert_eq!(device.borrow().seen.len(), 20);
}

#[test]
fn a_silent_device_is_an_error_and_its_buffers_are_not_used_again() {
    let (_pages, mut requests, device) = requests(Manner::Silent);
    for _ in 0..CAPACITY {
        assert_eq!(one(&mut requests, &unmap(1)), Err(Error::Timeout));
    }
    assert_eq!(one(&mut requests, &unmap(1)), Err(Error::Full));
    device.borrow_mut().let_go();
    device.borrow_mut().manner = Manner::Good;
    for _ in 0..3 * CAPACITY {
        assert_eq!(one(&mut requests, &unmap(1)), Ok(status::OK));
    }
}

#[test]
fn an_answer_without_a_status_is_an_input_output_error() {
    let (_pages, mut requests, _device) = requests(Manner::Short);
    assert_eq!(one(&mut requests, &unmap(1)), Ok(status::IOERR));
    let probe = Request::Probe { endpoint: 1 };
    assert_eq!(one(&mut requests, &probe), Ok(status::IOERR));
}

#[test]
fn what_was_submitted_can_be_polled_for_in_any_order() {
    let (_pages, mut requests, device) = requests(Manner::Silent);
    let a = requests.submit(&unmap(1)).unwrap();
    let b = requests.submit(&unmap(2)).unwrap();
    assert_eq!(device.borrow().notified, 0);
    requests.flush();
    requests.flush();
    assert_eq!(device.borrow().notified, 1);
    assert_eq!(requests.poll(&b), Ok(None));
    device.borrow_mut().let_go();
    assert_eq!(requests.poll(&b), Ok(Some(status::OK)));
    assert_eq!(requests.poll(&b), Ok(None), "a ticket counts once");
    assert_eq!(requests.poll(&a), Ok(Some(status::OK)));
}

#[test]
fn a_probe_brings_the_properties() {
    let (_pages, mut requests, _device) = requests(Manner::Good);
    let mut properties = [0; 100];
    assert_eq!(requests.probe(3, &mut properties), Ok(status::OK));
    assert_eq!(properties[..PROBE], [0xee; PROBE]);
    assert_eq!(properties[PROBE..], [0; 100 - PROBE]);
}

#[test]
fn a_device_that_breaks_a_ring_rule_is_an_error_for_ever() {
    let (_pages, mut requests, device) = requests(Manner::Silent);
    let ticket = requests.submit(&unmap(1)).unwrap();
    requests.flush();
    device.borrow_mut().ring.put(15, 4);
    device.borrow_mut().ring.publish();
    let broken = Error::Ring(virtqueue::Error::BadId);
    assert_eq!(requests.wait(ticket), Err(broken));
    assert!(one(&mut requests, &unmap(1)).is_err());
}

/// Notifies nobody.
struct Nobody;

impl Notify for Nobody {
    fn notify(&self) {}
}

#[test]
fn faults_are_shown_once_and_their_buffers_go_round() {
    let (_pages, memory) = memory();
    let ring = split::Driver::new(memory, &config()).unwrap();
    let mut device = split::Device::new(memory, &config()).unwrap();
    let mut events = Events::new((ring, Nobody), memory, POOL);
    let mut number = 0u64;
    for round in 0..10 {
        let mut chains = [Chain::default(); 5];
        let mut buffers = [Buffer::default(); 5];
        assert_eq!(device.get(&mut chains, &mut buffers), Ok(5));
        for (i, chain) in chains.iter().enumerate() {
            let buffer = buffers[usize::from(chain.first)];
            assert!(buffer.device_writes && buffer.len == 24);
            let mut report = [0; 24];
            report[0] = 2;
            report[4..8].copy_from_slice(&0x101u32.to_le_bytes());
            report[8..12].copy_from_slice(&8u32.to_le_bytes());
            report[16..].copy_from_slice(&(number + i as u64).to_le_bytes());
            write(memory, buffer.addr, &report);
            // The last of each round says that it holds less than a report: it is none.
            device.put(chain.id, if i == 4 { 23 } else { 24 });
        }
        device.publish();
        let mut seen = Vec::new();
        assert_eq!(events.drain(|fault| seen.push(fault)), Ok(4), "{round}");
        let wanted = |i| Fault {
            reason: 2,
            flags: 0x101,
            endpoint: 8,
            address: number + i,
        };
        assert_eq!(seen, (0..4).map(wanted).collect::<Vec<_>>());
        assert_eq!(events.drain(|_| panic!("shown twice")), Ok(0));
        number += 5;
    }
}

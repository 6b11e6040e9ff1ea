//! Our driver against the device of another crate, over the same memory.

use core::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::linear::{self, Linear};

const LEN: usize = 0x20_0000;

fn theirs(config: &RingConfig, base: u16) -> Queue {
    let mut queue = Queue::new(config.size).unwrap();
    queue.try_set_size(config.size).unwrap();
    let desc = GuestAddress(config.desc);
    queue.try_set_desc_table_address(desc).unwrap();
    let avail = GuestAddress(config.driver);
    queue.try_set_avail_ring_address(avail).unwrap();
    let used = GuestAddress(config.device);
    queue.try_set_used_ring_address(used).unwrap();
    queue.set_event_idx(config.event_idx);
    queue.set_next_avail(base);
    queue.set_next_used(base);
    queue.set_ready(true);
    queue
}

/// The next chain as the other crate sees it.
fn pop(queue: &mut Queue, memory: &GuestMemoryMmap) -> Option<Travelling> {
    let chain = queue.iter(memory).unwrap().next()?;
    let id = chain.head_index();
    let buffers = chain.map(|descriptor| Buffer {
        addr: descriptor.addr().0,
        len: descriptor.len(),
        device_writes: descriptor.is_write_only(),
    });
    Some((id, buffers.collect()))
}

type Travelling = (u16, Vec<Buffer>);

/// Our driver, their device, and the memory as each sees it.
fn mixed(
    config: &RingConfig,
    base: u16,
) -> (Driver<Linear>, Queue, &'static GuestMemoryMmap, Linear) {
    let (memory, linear) = linear::tests::leak_guest(LEN);
    let driver = Driver::with_base(linear, config, base.into()).unwrap();
    let queue = theirs(config, base);
    assert!(queue.is_valid(memory));
    (driver, queue, memory, linear)
}

#[test]
fn another_device_sees_what_our_driver_adds() {
    for (size, base) in [(1, 65535), (2, 7), (16, 65530), (256, 0), (32768, 50000)] {
        let config = config::<Split>(size);
        let (mut driver, mut queue, memory, _) = mixed(&config, base);
        let mut n = 0u32;
        for round in 0..20usize {
            let mut sent = Vec::new();
            loop {
                let long = 1 + (n as usize + round) % 5;
                let chain: Vec<_> = (0..long)
                    .zip(n..)
                    .map(|(at, n)| buffer(n, at >= 2))
                    .collect();
                // The rest of the ring is filled with short ones.
                let whole = chain.len() <= driver.free().into();
                let chain = if whole { chain } else { chain[..1].to_vec() };
                let Some(id) = driver.add(&chain) else {
                    break;
                };
                sent.push((id, chain));
                n = n.wrapping_add(1);
                if sent.len() > 600 {
                    break;
                }
            }
            assert!(pop(&mut queue, memory).is_none(), "not published");
            driver.publish();
            let mut got: Vec<Travelling> = Vec::new();
            while let Some(chain) = pop(&mut queue, memory) {
                got.push(chain);
            }
            let mut expected = Vec::new();
            // Every second round from the end.
            if round % 2 == 1 {
                got.reverse();
                sent.reverse();
            }
            assert_eq!(got, sent);
            for (id, buffers) in &got {
                let writable = buffers.iter().filter(|b| b.device_writes);
                let len = writable.map(|b| b.len).sum();
                queue.add_used(memory, *id, len).unwrap();
                expected.push(Used { id: *id, len });
            }
            assert_eq!(take(&mut driver, 40_000), expected);
            assert_eq!(driver.free(), size);
        }
    }
}

#[test]
fn our_device_sees_what_another_reads_of_the_same_ring() {
    let config = config::<Split>(64);
    let (mut driver, mut queue, memory, linear) = mixed(&config, 65520);
    let mut device = Device::with_base(linear, &config, 65520).unwrap();
    for round in 0..50u32 {
        for n in 0..16 {
            let chain: Vec<_> = (0..1 + (n + round) % 4)
                .map(|at| buffer(round * 100 + n + at, at > 0))
                .collect();
            driver.add(&chain).unwrap();
        }
        driver.publish();
        let ours = get(&mut device, 64);
        let theirs: Vec<_> = core::iter::from_fn(|| pop(&mut queue, memory)).collect();
        assert!(
            ours.iter()
                .map(|(c, b)| (c.id, b))
                .eq(theirs.iter().map(|(id, b)| (*id, b)))
        );
        for (chain, _) in &ours {
            device.put(chain.id, 0);
        }
        device.publish();
        let index = queue.used_idx(memory, Ordering::Acquire).unwrap().0;
        assert_eq!(u32::from(index), device.base());
        assert_eq!(take(&mut driver, 64).len(), 16);
    }
}

#[test]
fn another_device_and_our_driver_agree_on_notifications() {
    for event_idx in [false, true] {
        let config = RingConfig {
            event_idx,
            ..config::<Split>(16)
        };
        let (mut driver, mut queue, memory, _) = mixed(&config, 65531);
        for _ in 0..20 {
            // Kicks.
            queue.disable_notification(memory).unwrap();
            assert!(!queue.enable_notification(memory).unwrap());
            driver.add(&[buffer(1, true)]).unwrap();
            assert!(driver.publish());
            assert!(queue.enable_notification(memory).unwrap(), "one is there");
            let (first, _) = pop(&mut queue, memory).unwrap();
            if !event_idx {
                queue.disable_notification(memory).unwrap();
            }
            driver.add(&[buffer(2, true)]).unwrap();
            // With event indices the other crate's "disable" is not to ask again: its last wish was the chain that is gone.
            assert!(!driver.publish());
            let (second, _) = pop(&mut queue, memory).unwrap();
            // Calls; without event indices the other crate always makes them.
            assert!(!driver.enable_calls());
            queue.add_used(memory, first, 0).unwrap();
            assert!(queue.needs_notification(memory).unwrap());
            assert!(driver.enable_calls(), "one is there");
            assert_eq!(take(&mut driver, 1).len(), 1);
            driver.disable_calls();
            queue.add_used(memory, second, 0).unwrap();
            assert_eq!(queue.needs_notification(memory).unwrap(), !event_idx);
            assert_eq!(take(&mut driver, 1).len(), 1);
        }
    }
}

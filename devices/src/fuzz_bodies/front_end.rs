//! A vhost-pci device between a front-end and a driver.

use std::io::{Read, Write};
use std::thread;

use vmm_sys_util::tempdir::TempDir;

use super::said::{Files, message, payload};
use super::*;
use crate::pci::PciFunction;
use crate::vhost_pci::{BACKEND_UP, FRONTEND_UP};
use crate::vhost_user::{backend_requests, flags, requests};
use crate::virtio::F_VERSION_1;
use crate::virtio::harness::{DEVICE, STATUS};

const RING_SIZE: u16 = 32;
/// Behind those of the configuration and of the two queues.
const KICK_VECTOR: u16 = 3;
/// The longest message.
const ROOM: u32 = 4096;
/// How often a device thread and a driver may have to take turns at what is left of a conversation.
const TURNS: usize = 1000;

/// A vhost-pci device with a front-end that says whatever, with whatever descriptors, to a driver that answers, or says something else, and reads and writes
/// in the window. When the front-end is gone nothing of it is left.
pub fn fuzz_front_end(data: &[u8]) {
    let mut input = Input(data);
    let host = FakeHost::new();
    let directory = TempDir::new().expect("a directory");
    let socket = directory.as_path().join("s");
    let config = VhostPciConfig {
        // A vCPU that gets no answer costs time.
        miss_timeout: Duration::from_millis(1),
        // Translations are for devices without.
        log: input.byte() & 1 != 0,
        ..vhost_pci(socket.clone(), SocketRole::Listen)
    };
    let device = VhostPci::new(config, None, host.clone()).expect("a configuration");
    let mut events: Events = EventManager::new().expect("epoll");
    events.add_subscriber(device.subscriber());
    let function = VirtioPci::new(device, host.clone()).expect("a device");
    let driver = Driver::new(function.clone(), host.clone());
    let mut rx = Ring::new(&host, RINGS, RING_SIZE);
    let mut tx = Ring::new(&host, 4 * RINGS, RING_SIZE);
    driver.enable_msix();
    assert!(driver.negotiate(F_VERSION_1));
    driver.setup_queue(0, &rx, 1);
    driver.setup_queue(1, &tx, 2);
    // Those of the front-end's rings.
    for queue in 0..4 {
        driver.set_vector(2 + 2 * queue, KICK_VECTOR + queue);
    }
    driver.set_status(status::DRIVER_OK);
    (0..RING_SIZE).for_each(|_| rx.offer(ROOM));
    driver.notify(0);
    let mut peer = Connection::new(UnixStream::connect(&socket).expect("it listens"))
        .expect("a connected stream");
    driver.write(DEVICE, &BACKEND_UP.to_le_bytes());
    turn(&mut events);
    assert_eq!(driver.u32(DEVICE), BACKEND_UP | FRONTEND_UP);
    let mut files = Files::new(&host);
    while !input.over() {
        match input.byte() % 8 {
            // Several may come at once.
            0..=3 => {
                if peer.send(&message(&mut input, &mut files)).is_err() {
                    break;
                }
            }
            4 => {
                let (value, kinds) = (input.byte(), input.byte());
                turn(&mut events);
                let mut answers = 0;
                while let Some(bytes) = rx.take() {
                    rx.offer(ROOM);
                    let [request, word] = [0, 4].map(|at| field(&bytes, at));
                    let asked = matches!(
                        request,
                        requests::GET_FEATURES
                            | requests::GET_PROTOCOL_FEATURES
                            | requests::GET_QUEUE_NUM
                            | requests::GET_VRING_BASE
                    );
                    if asked || word & flags::NEED_REPLY != 0 {
                        let value = if asked && kinds == 0 {
                            u64::MAX
                        } else {
                            value.into()
                        };
                        let answer = Message::reply(request, &U64(value));
                        tx.send(&[&answer.header()[..], &answer.payload].concat());
                        answers += 1;
                        assert!(answers <= RING_SIZE, "more came than there was room for");
                    }
                }
                driver.notify(0);
                driver.notify(1);
                turn(&mut events);
                while tx.take().is_some() {}
            }
            // The driver says something of its own.
            5 => {
                let (request, word) = (input.byte(), input.byte());
                let payload = payload(&mut input);
                let message = Message {
                    request: request.into(),
                    flags: word.into(),
                    payload,
                    fds: Vec::new(),
                };
                tx.send(&[&message.header()[..], &message.payload].concat());
                driver.notify(1);
                turn(&mut events);
                while tx.take().is_some() {}
            }
            6 => {
                let offset = u64::from(input.half()) << 8 | u64::from(input.byte());
                let how = input.byte();
                touch(&function, offset % WINDOW, how, &mut events, &mut files);
            }
            _ => {
                driver.notify(2 + u16::from(input.byte() % 4));
                turn(&mut events);
                // What it was answered.
                while let Ok(Some(_)) = peer.receive() {}
            }
        }
    }
    drop(peer);
    for _ in 0..TURNS {
        turn(&mut events);
        while rx.take().is_some() {
            rx.offer(ROOM);
        }
        driver.notify(0);
        if driver.u32(DEVICE) == 0 {
            break;
        }
    }
    assert_eq!(
        driver.u32(DEVICE),
        0,
        "a front-end that is gone is still up"
    );
    let [window, records] = [0, 1].map(|index| host.windows()[index].shown());
    assert_eq!(window, [], "memory stays");
    assert_eq!(records, [(0, 0x1000)], "a log or an area stays");
    assert_eq!(host.doorbells().len(), 2, "doorbells stay");
    let kicks = host.interrupts();
    let left = kicks
        .iter()
        .skip(KICK_VECTOR.into())
        .map(|interrupt| interrupt.sources());
    assert_eq!(left.sum::<usize>(), 0, "kicks stay");
    assert_eq!(
        driver.u8(STATUS) & status::NEEDS_RESET,
        0,
        "a front-end has broken the device"
    );
}

/// A vCPU reads or writes in the window; where the device asks the front-end where that leads, that says yes, no, or nothing.
fn touch(function: &VirtioPci, offset: u64, how: u8, events: &mut Events, files: &mut Files) {
    let len = 1 + usize::from(how % 8);
    let answer = Message::reply(backend_requests::IOTLB_MSG, &U64(u64::from(how >> 4 & 1)));
    let answer = [&answer.header()[..], &answer.payload].concat();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            let mut data = [0; 8];
            match how & 8 {
                0 => function.bar_read(2, offset, &mut data[..len]),
                _ => function.bar_write(2, offset, &data[..len]),
            }
        });
        while !vcpu.is_finished() {
            turn(events);
            for socket in &mut files.sockets {
                if how & 0x20 == 0 && socket.read(&mut [0; 64]).is_ok_and(|len| len > 0) {
                    // It may have been closed.
                    let _ = socket.write_all(&answer);
                }
            }
            thread::yield_now();
        }
    });
}

fn field(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

//! A virtio-net between a driver, an IOMMU and a back-end.

use vmm_sys_util::tempdir::TempDir;

use super::said::{Files, message, payload};
use super::*;
use crate::host::Permission;
use crate::vhost_user::{VHOST_USER_F_PROTOCOL_FEATURES, requests};
use crate::virtio::harness::{QUEUE_RESET, STATUS};
use crate::virtio_iommu::Mapping;

/// What the driver has mapped for its rings and buffers: their device addresses are this much above.
const SHIFT: u64 = 1 << 32;
const QUEUES: u16 = 5;
const RING_SIZE: u16 = 64;
/// How often a device thread may have to take turns until all that is left of a back-end is gone.
const TURNS: usize = 1000;

/// A page that is mapped and unmapped.
fn page(number: u8) -> Mapping {
    Mapping {
        iova: u64::from(number) << 12,
        gpa: u64::from(number % 4) << 12,
        len: 0x1000,
        permission: Permission::READ_WRITE,
    }
}

/// A virtio-net behind an IOMMU with a back-end that answers, or says whatever with whatever descriptors on its socket and on its channel, while the driver starts
/// and stops. When it is gone nobody waits for it, and the next one is served.
pub fn fuzz_back_end(data: &[u8]) {
    let mut input = Input(data);
    let host = FakeHost::new();
    let directory = TempDir::new().expect("a directory");
    let socket = directory.as_path().join("s");
    let endpoint = Endpoint::new().expect("an eventfd");
    let config = virtio_net(socket.clone(), SocketRole::Listen);
    let net =
        VirtioNet::new(config, Some(Arc::clone(&endpoint)), host.clone()).expect("a configuration");
    let mut events: Events = EventManager::new().expect("epoll");
    events.add_subscriber(net.subscriber());
    let function = VirtioPci::new(net, host.clone()).expect("a device");
    let driver = Driver::new(function, host.clone());
    driver.enable_msix();
    let mut rings: Vec<Ring> = (0..QUEUES)
        .map(|queue| Ring::new(&host, RINGS * u64::from(queue + 1), RING_SIZE))
        .collect();
    rings.iter_mut().for_each(|ring| ring.shift = SHIFT);
    endpoint.map(Mapping {
        iova: SHIFT,
        gpa: 0,
        len: RINGS * u64::from(QUEUES + 1),
        permission: Permission::READ_WRITE,
    });
    let mut files = Files::new(&host);
    let connect = || {
        let stream = UnixStream::connect(&socket).expect("it listens");
        Connection::new(stream).expect("a connected stream")
    };
    let mut peer = connect();
    let mut channel = None;
    turn(&mut events);
    while !input.over() {
        let result = match input.byte() % 8 {
            0 => peer.send(&message(&mut input, &mut files)),
            // Each is answered as it should be, or with something of its own.
            1 | 2 => {
                let (value, wrong) = (input.byte(), input.byte());
                turn(&mut events);
                answer(
                    &mut peer,
                    &mut channel,
                    &mut files,
                    value,
                    wrong,
                    &mut input,
                )
            }
            3 => match &mut channel {
                Some(channel) => {
                    let said = Connection::send(channel, &message(&mut input, &mut files));
                    while let Ok(Some(_)) = channel.receive() {}
                    // An end of the channel alone is not one of the connection.
                    said.or(Ok(()))
                }
                None => Ok(()),
            },
            4 => {
                driver.write(STATUS, &[0]);
                turn(&mut events);
                let features = driver.offered();
                if driver.negotiate(features & !(u64::from(input.byte()) << 28)) {
                    for (queue, ring) in (0..QUEUES).zip(&rings) {
                        driver.setup_queue(queue, ring, queue);
                    }
                    driver.set_status(status::DRIVER_OK);
                }
                Ok(())
            }
            5 => {
                driver.select(u16::from(input.byte() % 8));
                driver.write(QUEUE_RESET, &1u16.to_le_bytes());
                Ok(())
            }
            6 => {
                let number = input.byte();
                endpoint.map(page(number));
                Ok(())
            }
            _ => {
                let number = input.byte();
                endpoint.unmap(page(number).iova, 0x1000);
                while endpoint.take_fault().is_some() {}
                Ok(())
            }
        };
        if result.is_err() {
            turn(&mut events);
            peer = connect();
            channel = None;
        }
        turn(&mut events);
    }
    drop((peer, channel, files));
    let last = endpoint.map(page(0));
    for _ in 0..TURNS {
        turn(&mut events);
        if endpoint.is_done(last) {
            break;
        }
    }
    assert!(endpoint.is_done(last), "a change waits for nobody");
    let mut peer = connect();
    let first = (0..TURNS).find_map(|_| {
        turn(&mut events);
        peer.receive().expect("it is served")
    });
    let first = first.expect("the next back-end is not served");
    assert_eq!(first.request, requests::GET_FEATURES);
}

/// Answers all that has come.
fn answer(
    peer: &mut Connection,
    channel: &mut Option<Connection>,
    files: &mut Files,
    value: u8,
    wrong: u8,
    input: &mut Input,
) -> Result<(), crate::vhost_user::Error> {
    while let Some(mut message) = peer.receive()? {
        let request = message.request;
        if request == requests::SET_BACKEND_REQ_FD
            && let Some(fd) = message.fds.pop()
        {
            *channel = Connection::new(fd.into()).ok();
        }
        let number = |value| Some(Message::reply(request, &U64(value)));
        let reply = match request {
            requests::GET_FEATURES => {
                number(!(u64::from(value) << 27) | VHOST_USER_F_PROTOCOL_FEATURES)
            }
            // Those that there are, but some.
            requests::GET_PROTOCOL_FEATURES => number(0x1_ffff & !(u64::from(value) << 5)),
            requests::GET_QUEUE_NUM => number(2),
            requests::GET_MAX_MEM_SLOTS => number(8),
            requests::GET_VRING_BASE | requests::GET_INFLIGHT_FD => Some(Message {
                payload: message.payload.clone(),
                ..Message::reply(request, &U64(0))
            }),
            _ => message
                .needs_reply()
                .then(|| Message::reply(request, &U64(0))),
        };
        let Some(mut reply) = reply else {
            continue;
        };
        match wrong {
            0xf0.. => return Ok(()),
            0xe0.. => reply.payload = payload(input),
            0xd0.. => reply = super::said::message(input, files),
            _ => {}
        }
        if request == requests::GET_INFLIGHT_FD && wrong & 1 != 0 {
            reply.fds = vec![files.memory()];
        }
        peer.send(&reply)?;
    }
    Ok(())
}

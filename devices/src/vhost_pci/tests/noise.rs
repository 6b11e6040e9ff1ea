//! Front-ends and drivers that say and do anything: nothing panics, nothing hangs, and when the connection is gone so is all that came with it.

use std::io::Write;
use std::net::Shutdown;
use std::thread;

use super::*;
use crate::pci::PciFunction;
use crate::vhost_user::VHOST_USER_F_PROTOCOL_FEATURES;
use crate::vhost_user::tests::noise::{
    self, Given, PROTOCOL_FEATURES, Random, of_front_end, spoil,
};
use crate::virtio::{F_ACCESS_PLATFORM, F_RING_PACKED};

/// Connections, and messages of each at most. Sequences are the same in each run.
const CONNECTIONS: u64 = 500;
const MESSAGES: u64 = 60;

/// What front-ends choose of.
const FEATURES: [u64; 3] = [F_VERSION_1, F_ACCESS_PLATFORM, F_RING_PACKED];

/// The driver takes what came and answers it; badly, once in a while.
fn drive(rig: &mut Rig, random: &mut Random) {
    while let Some((request, word, _)) = rig.received() {
        rig.rx.offer(4096);
        let wants = word & flags::NEED_REPLY != 0;
        let asked = matches!(
            request,
            requests::GET_FEATURES
                | requests::GET_PROTOCOL_FEATURES
                | requests::GET_QUEUE_NUM
                | requests::GET_VRING_BASE
        );
        if !(asked || wants) || random.once_in(400) {
            continue;
        }
        let value = U64(match request {
            requests::GET_FEATURES => u64::MAX,
            requests::GET_PROTOCOL_FEATURES => u64::MAX,
            _ => random.small().into(),
        });
        let mut reply = Message::reply(request, &value);
        if random.once_in(30) {
            spoil(&mut reply, random, &mut Given::default());
        }
        rig.send(reply.request, reply.flags, &reply.payload);
    }
}

/// A vCPU reads or writes anywhere in the window, while the device thread does its work.
fn touch(rig: &mut Rig, random: &mut Random) {
    let offset = random.pages() % (WINDOW - 8);
    let (reads, value) = (random.once_in(2), random.next());
    let function = rig.driver.function.clone();
    let vcpu = thread::spawn(move || {
        let mut data = value.to_le_bytes();
        if reads {
            function.bar_read(2, offset, &mut data);
        } else {
            function.bar_write(2, offset, &data);
        }
    });
    while !vcpu.is_finished() {
        rig.pump();
    }
    vcpu.join().unwrap();
}

/// What most messages build on: features, a channel, and memory from 0 on that has its guest addresses as user addresses.
fn opening(random: &mut Random, given: &mut Given) -> Vec<Message> {
    let mut features = F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES;
    if !random.once_in(3) {
        features |= F_ACCESS_PLATFORM;
    }
    let region = MemoryRegion {
        user_address: 0,
        ..region(0, 16 * 0x1000)
    };
    vec![
        Message::bare(requests::GET_FEATURES),
        Message::bare(requests::GET_PROTOCOL_FEATURES),
        Message::request(requests::SET_PROTOCOL_FEATURES, &U64(PROTOCOL_FEATURES)),
        Message::request(requests::SET_FEATURES, &U64(features)),
        Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(vec![given.channel(random)]),
        Message::request(requests::SET_MEM_TABLE, &MemoryTable(vec![region]))
            .with_fds(vec![given.whole_memory()]),
    ]
}

/// One connection from its beginning to its end, whoever ends it.
fn connection(rig: &mut Rig, random: &mut Random, given: &mut Given) {
    let stream = UnixStream::connect(rig.dir.as_path().join("s")).unwrap();
    let mut raw = stream.try_clone().unwrap();
    let mut peer = Connection::new(stream).unwrap();
    rig.backend_up();
    if !random.once_in(8) {
        for message in opening(random, given) {
            if peer.send(&message).is_err() {
                return;
            }
            rig.pump();
            drive(rig, random);
        }
    }
    for _ in 0..random.below(MESSAGES) {
        let message = of_front_end(random, given, &FEATURES);
        if random.once_in(200) {
            let bytes = noise::bytes(&message);
            let _ = raw.write_all(&bytes[..random.index(bytes.len())]);
            let _ = raw.shutdown(Shutdown::Write);
            break;
        }
        if peer.send(&message).is_err() {
            break;
        }
        // Several messages may come at once.
        if random.once_in(2) {
            rig.pump();
            drive(rig, random);
        }
        match random.below(200) {
            0..=9 => touch(rig, random),
            10 => rig.driver.write(DEVICE, &0u32.to_le_bytes()),
            11 | 12 => {
                rig.driver
                    .notify(2 + u16::try_from(random.below(8)).unwrap());
            }
            _ => {}
        }
        // The end of it is no error of the test's.
        while let Ok(Some(_)) = peer.receive() {}
    }
}

#[test]
fn whatever_a_front_end_says_it_leaves_nothing_behind() {
    let dir = TempDir::new().unwrap();
    let config = VhostPciConfig {
        miss_timeout: Duration::from_millis(2),
        ..config(&dir, SocketRole::Listen)
    };
    let mut rig = Rig::stopped(config, dir, None);
    rig.start();
    for _ in 0..32 {
        rig.rx.offer(4096);
    }
    for seed in 0..CONNECTIONS {
        let random = &mut Random(seed);
        let mut given = Given::default();
        connection(&mut rig, random, &mut given);
        rig.pump();
        // Its messages that are still on the way are thrown away.
        while rig.received().is_some() {
            rig.rx.offer(4096);
        }
        while rig.tx.take().is_some() {}
        rig.pump();
        let what = format!("seed {seed}");
        assert_eq!(rig.status() & (BACKEND_UP | FRONTEND_UP), 0, "{what}");
        assert_eq!(rig.window().shown(), [], "{what}");
        assert_eq!(rig.host.doorbells().len(), 2, "{what}");
        let interrupts = rig.host.interrupts();
        let kicks = interrupts.iter().skip(KICK_VECTOR.into());
        assert!(kicks.into_iter().all(|i| i.sources() == 0), "{what}");
        assert_eq!(rig.driver.u8(STATUS) & status::NEEDS_RESET, 0, "{what}");
        given.assert_closed(&what);
        rig.driver.interrupts();
    }
    // The connections got somewhere before they ended.
    let stats = rig.device.stats();
    assert_eq!(stats.connections, CONNECTIONS);
    let depth = [
        stats.peer_faults,
        stats.map.count(),
        stats.unmap.count(),
        stats.updates,
        stats.invalidates,
        stats.misses,
        stats.messages_to_guest,
        stats.dropped,
    ];
    assert!(
        depth.iter().all(|&count| count > CONNECTIONS / 50),
        "{stats:?}"
    );
}

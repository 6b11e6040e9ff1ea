//! The life of the device and its connections, and what misbehaving guests and peers do to it.

use std::io::{Read, Write};
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::fake::{Event, EventLog};
use crate::pci::PciFunction;

#[test]
fn device_configuration_says_what_the_device_is() {
    let rig = Rig::new(SocketRole::Listen);
    assert_eq!(rig.driver.config(0), 0x107d_1af4);
    let fields: [u8; 24] = rig.driver.read(DEVICE);
    assert_eq!(fields[..4], [0; 4]);
    assert_eq!(fields[4..8], u32::from(QUEUES).to_le_bytes());
    assert_eq!(fields[8..], config(&rig.dir, SocketRole::Listen).uuid);
    // Only bit 0 of the status can be written.
    rig.driver.write(DEVICE + 4, &[0xff; 20]);
    rig.driver.write(DEVICE + 1, &[0xff; 3]);
    assert_eq!(rig.driver.read::<24>(DEVICE), fields);
    assert_eq!(rig.driver.read::<4>(DEVICE + 22), [114, 115, 0, 0]);
}

#[test]
fn a_window_is_a_power_of_two_and_at_most_a_quarter_of_the_address_space() {
    let dir = TempDir::new().unwrap();
    let make = |window, bits| {
        let config = VhostPciConfig {
            window,
            ..config(&dir, SocketRole::Connect)
        };
        VhostPci::new(config, None, FakeHost::with_address_bits(bits))
    };
    assert_eq!(make(1 << 40, 40).unwrap().window_size, 1 << 38);
    assert_eq!(make(1 << 36, 40).unwrap().window_size, 1 << 36);
    assert!(matches!(make(3 << 30, 40), Err(Error::WindowSize(_))));
    assert!(matches!(make(2048, 40), Err(Error::WindowSize(_))));
    for queues in [0, 257] {
        let config = VhostPciConfig {
            queues,
            ..config(&dir, SocketRole::Connect)
        };
        assert!(matches!(
            VhostPci::new(config, None, FakeHost::new()),
            Err(Error::Queues(_))
        ));
    }
}

#[test]
fn a_front_end_waits_until_the_driver_is_ready_and_the_driver_is_told() {
    let mut rig = Rig::new(SocketRole::Listen);
    let _peer = UnixStream::connect(rig.dir.as_path().join("s")).unwrap();
    rig.pump();
    assert_eq!(rig.status(), 0);
    rig.backend_up();
    assert_eq!(rig.status(), BACKEND_UP | FRONTEND_UP);
    assert_eq!(rig.driver.interrupts(), [0]);
    assert_eq!(rig.device.stats().connections, 1);
}

#[test]
fn a_device_that_connects_finds_a_front_end_that_comes_later() {
    let mut rig = Rig::new(SocketRole::Connect);
    rig.backend_up();
    assert_eq!(rig.status(), BACKEND_UP);
    let listener = std::os::unix::net::UnixListener::bind(rig.dir.as_path().join("s")).unwrap();
    for _ in 0..100 {
        rig.events.run_with_timeout(100).unwrap();
        if rig.status() & FRONTEND_UP != 0 {
            listener.accept().unwrap();
            return;
        }
    }
    panic!("never connected");
}

#[test]
fn garbage_and_truncation_close_the_connection_with_nothing_left() {
    let valid = bytes(&Message::request(requests::SET_FEATURES, &U64(0)));
    let version = [1u32, 2, 0].map(u32::to_le_bytes).concat();
    let size = [1u32, 1, 4085].map(u32::to_le_bytes).concat();
    for (garbage, hang_up) in [
        (&version, false),
        (&size, false),
        (&valid[..5].to_vec(), true),
        (&valid[..15].to_vec(), true),
    ] {
        let mut rig = Rig::new(SocketRole::Listen);
        rig.rx.offer(4096);
        let stream = UnixStream::connect(rig.dir.as_path().join("s")).unwrap();
        let mut raw = stream.try_clone().unwrap();
        let mut peer = Connection::new(stream).unwrap();
        rig.backend_up();
        rig.request(&mut peer, &table(&[region(0, 0x1000)], &memory(0x1000)));
        assert_eq!(rig.window().shown().len(), 1);
        raw.write_all(garbage).unwrap();
        if hang_up {
            raw.shutdown(std::net::Shutdown::Write).unwrap();
        }
        rig.assert_gone(&mut peer);
    }
}

#[test]
fn everything_is_taken_away_before_the_status_bits_are() {
    /// Looks at the status at the moment when the window is cleared.
    struct Spy {
        window: Arc<dyn Window>,
        shared: Arc<Shared>,
        log: EventLog,
    }
    impl Window for Spy {
        fn place(&self, gpa: Option<u64>) -> io::Result<()> {
            self.window.place(gpa)
        }
        fn map(
            &self,
            offset: u64,
            region: &crate::host::SharedRegion,
            permission: crate::host::Permission,
        ) -> io::Result<()> {
            self.window.map(offset, region, permission)
        }
        fn unmap(&self, offset: u64, len: u64) -> io::Result<()> {
            self.window.unmap(offset, len)
        }
        fn clear(&self) {
            let up = self.shared.guest().status == BACKEND_UP | FRONTEND_UP;
            self.log
                .push(Event::Note(if up { "still up" } else { "too late" }));
            self.window.clear();
        }
        fn read(&self, offset: u64, data: &mut [u8]) -> bool {
            self.window.read(offset, data)
        }
        fn write(&self, offset: u64, data: &[u8]) -> bool {
            self.window.write(offset, data)
        }
    }
    let (mut rig, mut peer) = Rig::connected();
    let spy = Spy {
        window: rig.device.window.clone(),
        shared: rig.device.shared.clone(),
        log: rig.host.log.clone(),
    };
    rig.device.worker.lock().unwrap().spy(Arc::new(spy));
    rig.request(&mut peer, &table(&[region(0, 0x1000)], &memory(0x1000)));
    rig.request(
        &mut peer,
        &vring(requests::SET_VRING_CALL, 0, Some(eventfd().1)),
    );
    rig.host.log.take();
    drop(peer);
    rig.pump();
    let doorbell = BAR0 + NOTIFY + 4 * 2;
    let events = [
        Event::Note("still up"),
        Event::Cleared,
        Event::DoorbellRemoved(doorbell),
    ];
    assert_eq!(rig.host.log.take(), events);
    assert_eq!(rig.status(), 0);
}

#[test]
fn the_next_front_end_starts_from_nothing_when_the_driver_is_ready_again() {
    let (mut rig, mut peer) = Rig::acknowledging();
    rig.request(&mut peer, &table(&[region(0, 0x1000)], &memory(0x1000)));
    rig.request(&mut peer, &Message::bare(requests::GET_QUEUE_NUM));
    drop(peer);
    let next = UnixStream::connect(rig.dir.as_path().join("s")).unwrap();
    rig.pump();
    assert_eq!(rig.status(), 0, "not before the driver says so");
    // A late reply to the old front-end.
    rig.reply(requests::GET_QUEUE_NUM, &U64(1));
    rig.backend_up();
    assert_eq!(rig.status(), BACKEND_UP | FRONTEND_UP);
    let mut next = Connection::new(next).unwrap();
    while rig.received().is_some() {}
    // Another one, which nobody of this connection asked for either.
    rig.reply(requests::GET_QUEUE_NUM, &U64(1));
    assert!(next.receive().unwrap().is_none());
    assert_eq!(rig.device.stats().dropped, 2);
    assert_eq!(rig.window().shown(), []);
    // REPLY_ACK has to be agreed anew: so no answer is due, and a refusal closes.
    let message = table(&[region(1, 0x1000)], &memory(0x1000)).with_need_reply(true);
    rig.request(&mut next, &message);
    rig.assert_gone(&mut next);
}

#[test]
fn clearing_backend_up_closes_the_connection_even_if_it_is_set_again_at_once() {
    let (mut rig, mut peer) = Rig::connected();
    rig.request(&mut peer, &table(&[region(0, 0x1000)], &memory(0x1000)));
    rig.driver.interrupts();
    rig.driver.write(DEVICE, &[0]);
    rig.driver.write(DEVICE, &[1]);
    rig.assert_gone(&mut peer);
    assert_eq!(rig.device.stats().peer_faults, 0);
}

#[test]
fn a_reset_closes_the_connection_and_the_device_starts_again() {
    let (mut rig, mut peer) = Rig::connected();
    rig.request(&mut peer, &table(&[region(0, 0x1000)], &memory(0x1000)));
    for request in [
        requests::SET_VRING_KICK,
        requests::SET_VRING_CALL,
        requests::SET_VRING_ERR,
    ] {
        rig.request(&mut peer, &vring(request, 0, Some(eventfd().1)));
    }
    rig.driver.write(STATUS, &[0]);
    assert_ne!(
        rig.driver.u8(STATUS),
        0,
        "the device thread has not been there yet"
    );
    rig.pump();
    assert_eq!(rig.driver.u8(STATUS), 0);
    assert_eq!(rig.status(), 0);
    assert!(peer.receive().is_err());
    assert_eq!(rig.window().shown(), []);
    assert_eq!(rig.host.doorbells().len(), 2);
    (rig.rx, rig.tx) = (
        Ring::new(&rig.host, 0x40_0000, 64),
        Ring::new(&rig.host, 0x50_0000, 64),
    );
    rig.start();
    rig.rx.offer(4096);
    let mut peer = rig.connect();
    rig.request(&mut peer, &Message::bare(requests::GET_FEATURES));
    assert_eq!(rig.received().unwrap().0, requests::GET_FEATURES);
}

#[test]
fn without_receive_buffers_one_message_is_read_ahead_and_the_rest_waits_in_the_socket() {
    let mut rig = Rig::new(SocketRole::Listen);
    let mut peer = rig.connect();
    let mut sent = 0u64;
    while sent < 10_000
        && peer
            .send(&Message::request(requests::SET_FEATURES, &U64(sent)))
            .is_ok()
    {
        sent += 1;
        rig.pump();
    }
    assert!(sent < 10_000, "the socket fills up");
    assert_eq!(rig.device.stats().messages_to_guest, 0);
    for number in 0..50 {
        rig.rx.offer(4096);
        rig.driver.notify(0);
        rig.pump();
        assert_eq!(
            rig.received().unwrap().2,
            U64(number).encode(),
            "in order, none lost"
        );
        assert_eq!(rig.received(), None);
    }
}

#[test]
fn a_front_end_that_dies_while_the_guest_is_slow_is_noticed_at_once() {
    let mut rig = Rig::new(SocketRole::Listen);
    let mut peer = rig.connect();
    rig.request(&mut peer, &table(&[region(0, 0x1000)], &memory(0x1000)));
    rig.request(&mut peer, &Message::bare(requests::SET_OWNER));
    assert_eq!(rig.window().shown().len(), 1);
    drop(peer);
    rig.pump();
    assert_eq!(rig.window().shown(), []);
    assert_eq!(rig.status(), 0);
}

#[test]
fn a_driver_that_answers_nothing_stops_its_front_end_after_32_requests() {
    let mut rig = Rig::new(SocketRole::Listen);
    for _ in 0..64 {
        rig.rx.offer(4096);
    }
    let mut peer = rig.connect();
    for _ in 0..40 {
        rig.request(&mut peer, &Message::bare(requests::GET_FEATURES));
    }
    assert_eq!(rig.device.stats().messages_to_guest, 32);
    rig.reply(requests::GET_FEATURES, &U64(0));
    assert_eq!(rig.device.stats().messages_to_guest, 33);
}

#[test]
fn a_front_end_that_does_not_read_stops_its_own_requests_and_is_served_when_it_does() {
    let mut rig = Rig::new(SocketRole::Listen);
    let mut peer = rig.connect();
    let mut asked = 0u32;
    while asked < 100_000
        && peer
            .send(&Message::bare(requests::GET_MAX_MEM_SLOTS))
            .is_ok()
    {
        asked += 1;
        rig.pump();
    }
    assert!(asked < 100_000, "both directions of the socket fill up");
    assert_eq!(
        rig.status(),
        BACKEND_UP | FRONTEND_UP,
        "nobody did anything wrong"
    );
    let mut answered = 0;
    loop {
        peer.flush().unwrap();
        rig.pump();
        let before = answered;
        while peer.receive().unwrap().is_some() {
            answered += 1;
        }
        if answered == before {
            break;
        }
    }
    assert_eq!(answered, asked);
}

#[test]
fn malformed_messages_of_the_driver_are_dropped_and_disturb_nobody() {
    let (mut rig, mut peer) = Rig::connected();
    rig.request(&mut peer, &Message::bare(requests::GET_FEATURES));
    let good = bytes(&Message::reply(requests::GET_FEATURES, &U64(5)));
    let change = |at: usize, value: u8| {
        let mut message = good.clone();
        message[at] = value;
        message
    };
    let malformed = [
        vec![],
        good[..11].to_vec(),
        good[..19].to_vec(),
        change(8, 7),
        change(11, 0xff),
        change(4, 0x1),
        change(4, 0x6),
        change(0, 15),
        bytes(&Message::reply(requests::GET_FEATURES, &VringShort)),
        vec![0; 4096],
        vec![0; 4097],
    ];
    for (dropped, message) in (1..).zip(&malformed) {
        rig.tx.send(message);
        rig.driver.notify(1);
        rig.pump();
        assert_eq!(rig.device.stats().dropped, dropped, "{message:x?}");
        assert!(rig.tx.take().is_some(), "the buffer comes back");
    }
    assert!(peer.receive().unwrap().is_none());
    rig.tx.send(&good);
    rig.driver.notify(1);
    rig.pump();
    assert_eq!(peer.receive().unwrap().unwrap().payload, U64(5).encode());
    assert_eq!(rig.status(), BACKEND_UP | FRONTEND_UP);
}

/// A payload of four bytes.
struct VringShort;

impl Payload for VringShort {
    fn encode(&self) -> Vec<u8> {
        vec![0; 4]
    }
    fn decode(_: &[u8]) -> Result<Self, crate::vhost_user::DecodeError> {
        Ok(Self)
    }
}

fn assert_needs_reset(rig: &mut Rig, peer: &mut Connection) {
    rig.assert_gone(peer);
    assert_ne!(rig.driver.u8(STATUS) & status::NEEDS_RESET, 0);
    assert_eq!(rig.device.stats().peer_faults, 0, "it was the guest");
    rig.driver.write(STATUS, &[0]);
    rig.pump();
    assert_eq!(rig.driver.u8(STATUS), 0, "a reset mends it");
}

#[test]
fn a_driver_that_breaks_its_rings_has_to_reset_and_loses_the_connection() {
    type Break = fn(&mut Rig);
    let breaks: [Break; 4] = [
        // An available index that runs away, on either queue.
        |rig| rig.rx.set_avail_index(1000),
        |rig| {
            rig.tx.set_avail_index(1000);
            rig.driver.notify(1);
        },
        // Buffers outside the memory.
        |rig| {
            rig.tx.set_desc(0, u64::MAX - 5, 100, 0, 0);
            rig.tx.publish(0);
            rig.driver.notify(1);
        },
        // A receive buffer that is too small.
        |rig| rig.rx.offer(16),
    ];
    for break_it in breaks {
        let mut rig = Rig::new(SocketRole::Listen);
        let mut peer = rig.connect();
        break_it(&mut rig);
        rig.request(
            &mut peer,
            &Message::request(requests::SET_FEATURES, &U64(0)),
        );
        assert_needs_reset(&mut rig, &mut peer);
    }
}

#[test]
fn rings_outside_the_memory_need_a_reset_and_are_not_served() {
    let mut rig = Rig::new(SocketRole::Listen);
    rig.driver.write(STATUS, &[0]);
    rig.pump();
    rig.rx = Ring::new(&rig.host.clone(), crate::fake::MEMORY_SIZE - 0x1000, 64);
    rig.start();
    rig.backend_up();
    assert_ne!(rig.driver.u8(STATUS) & status::NEEDS_RESET, 0);
    let _peer = UnixStream::connect(rig.dir.as_path().join("s")).unwrap();
    rig.pump();
    assert_eq!(rig.status() & FRONTEND_UP, 0);
}

#[test]
fn accesses_to_holes_of_the_window_are_counted() {
    let rig = Rig::new(SocketRole::Listen);
    let mut data = [0; 8];
    rig.driver.function.bar_read(2, 0x1000, &mut data);
    assert_eq!(data, [0xff; 8]);
    rig.driver.function.bar_write(2, 0x1000, &data);
    rig.driver.function.bar_write(2, 0x1000, &data);
    let stats = rig.device.stats();
    assert_eq!((stats.window_reads, stats.window_writes), (1, 2));
}

#[test]
fn the_socket_file_goes_with_the_device() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("s");
    let exists = |path: &Path| path.symlink_metadata().is_ok();
    let device = VhostPci::new(config(&dir, SocketRole::Listen), None, FakeHost::new()).unwrap();
    assert!(exists(&path));
    assert!(matches!(
        VhostPci::new(config(&dir, SocketRole::Listen), None, FakeHost::new()),
        Err(Error::Socket(_))
    ));
    drop(device);
    assert!(!exists(&path));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a front-end and a driver write, the device thread comes to rest, and a closed connection leaves nothing.
    #[test]
    fn no_bytes_of_the_peer_or_the_driver_panic_or_outlive_the_connection(
        steps in prop::collection::vec((any::<bool>(), 0u32..48, 0u32..16, prop::collection::vec(any::<u8>(), 0..64), 0usize..3), 1..40),
    ) {
        let (mut rig, _) = Rig::connected();
        rig.pump();
        let mut raw = UnixStream::connect(rig.dir.as_path().join("s")).unwrap();
        raw.set_nonblocking(true).unwrap();
        let mut peer = Connection::new(raw.try_clone().unwrap()).unwrap();
        rig.backend_up();
        let file = memory(0x1000);
        for (front_end, request, word, payload, fds) in steps {
            let message = Message { request, flags: word, payload, fds: Vec::new() };
            if front_end && word & 3 == 1 {
                let fds = (0..fds).map(|i| if i == 0 { eventfd().1 } else { fd(&file) }).collect();
                let _ = peer.send(&message.with_fds(fds));
            } else if front_end {
                let _ = raw.write(&bytes(&message));
            } else {
                rig.tx.send(&bytes(&message));
                rig.driver.notify(1);
            }
            rig.pump();
            let _ = raw.read(&mut [0; 256]);
        }
        drop((peer, raw));
        rig.pump();
        prop_assert_eq!(rig.status() & FRONTEND_UP, 0);
        prop_assert_eq!(rig.window().shown(), []);
        prop_assert_eq!(rig.host.doorbells().len(), 2);
    }
}

//! Accesses that wait for the front-end to say where they lead.

use std::io::Write as _;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::iotlb::{BOTH, READ, USER, answer_of, invalidate, layout, update};
use super::*;
use crate::pci::PciFunction;
use crate::vhost_user::{Iotlb, IotlbKind, backend_requests};

/// A front-end whose memory holds `content` at each 8 bytes of the first pages: their number.
struct Asked {
    rig: Rig,
    peer: Connection,
    channel: Connection,
}

impl Asked {
    fn new(protocol: u64, timeout: Duration) -> Self {
        let dir = TempDir::new().unwrap();
        let config = VhostPciConfig {
            miss_timeout: timeout,
            ..config(&dir, SocketRole::Listen)
        };
        let rig = Rig::stopped(config, dir, None);
        rig.start();
        let (mut rig, mut peer) = Rig::connect_to(rig);
        rig.agree(&mut peer, protocol | protocol_features::BACKEND_REQ);
        let (file, table) = layout();
        let words: Vec<u8> = (0..0x800u64).flat_map(u64::to_le_bytes).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &words, 0).unwrap();
        rig.request(&mut peer, &table);
        while rig.received().is_some() {}
        let channel = give_channel(&mut rig, &mut peer);
        Self { rig, peer, channel }
    }

    fn patient() -> Self {
        Self::new(protocol_features::REPLY_ACK, Duration::from_secs(30))
    }

    /// A vCPU reads 8 bytes.
    fn read(&self, offset: u64) -> JoinHandle<u64> {
        let function = self.rig.driver.function.clone();
        thread::spawn(move || {
            let mut data = [0; 8];
            function.bar_read(2, offset, &mut data);
            u64::from_le_bytes(data)
        })
    }

    fn write(&self, offset: u64, value: u64) -> JoinHandle<()> {
        let function = self.rig.driver.function.clone();
        thread::spawn(move || function.bar_write(2, offset, &value.to_le_bytes()))
    }

    /// The next question: page, and accesses.
    fn question(&mut self) -> (u64, bool, bool) {
        let since = Instant::now();
        loop {
            self.rig.events.run_with_timeout(10).unwrap();
            if let Some(message) = self.channel.receive().unwrap() {
                assert_eq!(message.request, backend_requests::IOTLB_MSG);
                let asked = Iotlb::decode(&message.payload).unwrap();
                assert_eq!((asked.kind, asked.size), (IotlbKind::Miss, 0x1000));
                return (asked.iova, asked.read, asked.write);
            }
            assert!(since.elapsed() < Duration::from_secs(10), "nothing asked");
        }
    }

    fn say(&mut self, value: u64) {
        let reply = Message::reply(backend_requests::IOTLB_MSG, &U64(value));
        self.channel.send(&reply).unwrap();
        self.rig.pump();
    }

    /// What the thread saw, once the device thread has done its part.
    fn join<T>(&mut self, vcpu: JoinHandle<T>) -> T {
        let since = Instant::now();
        while !vcpu.is_finished() {
            self.rig.events.run_with_timeout(10).unwrap();
            assert!(since.elapsed() < Duration::from_secs(10), "it still waits");
        }
        vcpu.join().unwrap()
    }
}

fn give_channel(rig: &mut Rig, peer: &mut Connection) -> Connection {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let message = Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(vec![theirs.into()]);
    rig.request(peer, &message);
    assert_eq!(rig.received(), None, "the driver does not see it");
    Connection::new(ours).unwrap()
}

#[test]
fn a_miss_that_is_answered_lets_the_access_through() {
    let mut asked = Asked::patient();
    let vcpu = asked.read(0x7008);
    assert_eq!(asked.question(), (0x7000, true, false));
    let message = update(0x7000, 0x1000, USER + 0x1000, READ);
    assert_eq!(answer_of(&mut asked.rig, &mut asked.peer, message), 0);
    assert_eq!(asked.join(vcpu), 0x201);
    asked.say(0);
    // It is shown now: nobody is asked.
    let again = asked.read(0x7010);
    assert_eq!(asked.join(again), 0x202);
    let stats = asked.rig.device.stats();
    assert_eq!((stats.misses, stats.misses_answered), (1, 1));
    assert_eq!(
        (stats.window_reads, stats.updates, stats.windows),
        (0, 1, 1)
    );
}

#[test]
fn an_answer_that_overtakes_its_translation_does_not_end_the_wait() {
    let mut asked = Asked::patient();
    let vcpu = asked.write(0x7008, 5);
    assert_eq!(asked.question(), (0x7000, false, true));
    asked.say(0);
    thread::sleep(Duration::from_millis(20));
    assert!(!vcpu.is_finished());
    let message = update(0x7000, 0x1000, USER, BOTH);
    assert_eq!(answer_of(&mut asked.rig, &mut asked.peer, message), 0);
    asked.join(vcpu);
    let read = asked.read(0x7008);
    assert_eq!(asked.join(read), 5);
    assert_eq!(asked.rig.device.stats().window_writes, 0);
}

#[test]
fn a_miss_that_is_refused_ends_at_once_and_is_asked_again_the_next_time() {
    let mut asked = Asked::patient();
    for misses in 1..4 {
        let vcpu = asked.read(0x7008);
        assert_eq!(asked.question().0, 0x7000);
        asked.say(1);
        assert_eq!(asked.join(vcpu), u64::MAX);
        let stats = asked.rig.device.stats();
        assert_eq!((stats.misses, stats.window_reads), (misses, misses));
    }
    let vcpu = asked.write(0x7008, 0);
    asked.question();
    asked.say(7);
    asked.join(vcpu);
    assert_eq!(asked.rig.device.stats().window_writes, 1);
    assert_eq!(asked.rig.device.stats().misses_answered, 0);
}

#[test]
fn a_translation_that_does_not_allow_the_access_is_an_answer_too() {
    let mut asked = Asked::patient();
    let vcpu = asked.write(0x7008, 9);
    assert_eq!(asked.question(), (0x7000, false, true));
    let message = update(0x7000, 0x1000, USER, READ);
    assert_eq!(answer_of(&mut asked.rig, &mut asked.peer, message), 0);
    asked.join(vcpu);
    assert_eq!(asked.rig.device.stats().window_writes, 1);
    let read = asked.read(0x7008);
    assert_eq!(asked.join(read), 1, "nothing was written");
}

#[test]
fn an_access_across_two_pages_needs_both() {
    let mut asked = Asked::patient();
    let vcpu = asked.read(0x7ffc);
    assert_eq!(asked.question().0, 0x7000);
    let message = update(0x7000, 0x1000, USER, READ);
    assert_eq!(answer_of(&mut asked.rig, &mut asked.peer, message), 0);
    assert_eq!(asked.question().0, 0x8000);
    assert!(!vcpu.is_finished());
    let message = update(0x8000, 0x1000, USER + 0x1000, READ);
    assert_eq!(answer_of(&mut asked.rig, &mut asked.peer, message), 0);
    assert_eq!(
        asked.join(vcpu),
        0x200 << 32,
        "the end of one, the beginning of the other"
    );
    // The first one is there and the second is refused.
    let vcpu = asked.read(0x8ffc);
    assert_eq!(asked.question().0, 0x9000);
    asked.say(0);
    asked.say(0);
    asked.say(1);
    assert_eq!(asked.join(vcpu), u64::MAX);
}

#[test]
fn a_front_end_that_says_nothing_is_waited_for_only_so_long() {
    let mut asked = Asked::new(protocol_features::REPLY_ACK, Duration::from_millis(30));
    let since = Instant::now();
    let vcpu = asked.read(0x7008);
    assert_eq!(asked.question().0, 0x7000);
    assert_eq!(asked.join(vcpu), u64::MAX);
    assert!(since.elapsed() >= Duration::from_millis(30));
    // What comes late is too late, and does no harm.
    asked.say(1);
    let message = update(0x7000, 0x1000, USER, READ);
    assert_eq!(answer_of(&mut asked.rig, &mut asked.peer, message), 0);
    assert_eq!(asked.rig.status(), BACKEND_UP | FRONTEND_UP);
    assert_eq!(asked.rig.device.stats().misses_answered, 0);
}

#[test]
fn a_front_end_that_never_answers_is_asked_64_times() {
    let mut asked = Asked::new(protocol_features::REPLY_ACK, Duration::from_millis(5));
    for page in 0..70 {
        let vcpu = asked.read(page << 12);
        // Asked or given up; either is seen to by the device thread.
        while !vcpu.is_finished() {
            asked.rig.events.run_with_timeout(1).unwrap();
        }
        assert_eq!(vcpu.join().unwrap(), u64::MAX);
    }
    asked.rig.pump();
    assert!((32..=64).contains(&asked.rig.device.stats().misses));
    assert_eq!(asked.rig.device.stats().window_reads, 70);
    // Its answers make room.
    for _ in 0..asked.rig.device.stats().misses {
        asked.say(1);
    }
    let before = asked.rig.device.stats().misses;
    let vcpu = asked.read(0);
    while !vcpu.is_finished() {
        asked.rig.events.run_with_timeout(1).unwrap();
    }
    asked.rig.pump();
    assert!(asked.rig.device.stats().misses <= before + 1);
    assert_eq!(asked.rig.status(), BACKEND_UP | FRONTEND_UP);
}

#[test]
fn whoever_waits_does_not_outlive_the_channel_the_connection_or_the_mode() {
    type End = fn(&mut Asked);
    let ends: [End; 6] = [
        |asked| asked.peer = Connection::new(UnixStream::pair().unwrap().0).unwrap(),
        |asked| asked.channel = Connection::new(UnixStream::pair().unwrap().0).unwrap(),
        |asked| asked.rig.driver.write(STATUS, &[0]),
        |asked| asked.rig.driver.write(DEVICE, &[0]),
        |asked| {
            let message = Message::request(requests::SET_FEATURES, &U64(0));
            asked.rig.request(&mut asked.peer, &message);
        },
        |asked| asked.channel = give_channel(&mut asked.rig, &mut asked.peer),
    ];
    for end in ends {
        let mut asked = Asked::patient();
        let vcpu = asked.read(0x7008);
        asked.question();
        end(&mut asked);
        assert_ne!(asked.join(vcpu), 0);
        assert_eq!(asked.rig.device.stats().misses_answered, 0);
    }
}

#[test]
fn the_end_of_the_channel_is_not_the_end_of_the_connection() {
    let reply = |request, payload: &[u8]| Message {
        request,
        flags: flags::VERSION | flags::REPLY,
        payload: payload.to_vec(),
        fds: Vec::new(),
    };
    let iotlb = backend_requests::IOTLB_MSG;
    let garbage = [
        // Nobody asked.
        (false, reply(iotlb, &[0; 8])),
        (true, reply(iotlb, &[0; 4])),
        (true, reply(iotlb, &[0; 32])),
        (true, reply(iotlb + 1, &[0; 8])),
        (true, Message::request(iotlb, &U64(0))),
        (true, reply(iotlb, &[0; 8]).with_fds(vec![eventfd().1])),
    ];
    for (ask, message) in garbage {
        let mut asked = Asked::patient();
        let vcpu = ask.then(|| {
            let vcpu = asked.read(0x7008);
            asked.question();
            vcpu
        });
        asked.channel.send(&message).unwrap();
        asked.rig.pump();
        assert!(asked.channel.receive().is_err(), "the channel is closed");
        if let Some(vcpu) = vcpu {
            assert_eq!(asked.join(vcpu), u64::MAX);
        }
        assert_eq!(asked.rig.status(), BACKEND_UP | FRONTEND_UP);
        let message = update(0x7000, 0x1000, USER, READ);
        assert_eq!(answer_of(&mut asked.rig, &mut asked.peer, message), 0);
        // Nobody can be asked: no waiting.
        let vcpu = asked.read(0x9000);
        assert_eq!(vcpu.join().unwrap(), u64::MAX);
        // A new one may be given.
        asked.channel = give_channel(&mut asked.rig, &mut asked.peer);
        let vcpu = asked.read(0x9008);
        assert_eq!(asked.question().0, 0x9000);
        asked.say(1);
        assert_eq!(asked.join(vcpu), u64::MAX);
    }
}

#[test]
fn bytes_that_are_no_message_close_the_channel_only() {
    let mut asked = Asked::patient();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let message = Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(vec![theirs.into()]);
    asked.rig.request(&mut asked.peer, &message);
    ours.write_all(&[0xff; 100]).unwrap();
    asked.rig.pump();
    assert_eq!(asked.rig.status(), BACKEND_UP | FRONTEND_UP);
    let vcpu = asked.read(0x7008);
    assert_eq!(vcpu.join().unwrap(), u64::MAX);
}

#[test]
fn without_a_channel_without_translations_or_with_a_timeout_of_zero_nobody_waits() {
    // The timeout is so long that waiting would be seen.
    let (rig, _peer) = Rig::connected();
    let mut data = [0; 8];
    rig.driver.function.bar_read(2, 0x1000, &mut data);
    assert_eq!(data, [0xff; 8]);
    let (rig, _peer) = Rig::translating();
    rig.driver.function.bar_read(2, 0x1000, &mut data);
    assert_eq!(data, [0xff; 8]);
    let asked = Asked::new(protocol_features::REPLY_ACK, Duration::ZERO);
    asked.rig.driver.function.bar_read(2, 0x1000, &mut data);
    assert_eq!(data, [0xff; 8]);
    assert_eq!(asked.rig.device.stats().misses, 0);
}

#[test]
fn without_acknowledgements_a_translation_is_the_answer() {
    let mut asked = Asked::new(0, Duration::from_secs(30));
    let vcpu = asked.read(0x7008);
    assert_eq!(asked.question().0, 0x7000);
    let message = update(0x7000, 0x1000, USER, READ).with_need_reply(true);
    asked.rig.request(&mut asked.peer, &message);
    assert_eq!(asked.join(vcpu), 1);
    assert!(
        asked.peer.receive().unwrap().is_none(),
        "no answer was agreed"
    );
}

#[test]
fn a_channel_whose_other_holder_makes_it_block_does_not_stop_the_device() {
    let mut asked = Asked::patient();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let held = theirs.try_clone().unwrap();
    let message = Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(vec![theirs.into()]);
    asked.rig.request(&mut asked.peer, &message);
    held.set_nonblocking(false).unwrap();
    // The device looks at the channel, where nothing is to be read.
    let message = invalidate(0, 0x1000);
    assert_eq!(answer_of(&mut asked.rig, &mut asked.peer, message), 0);
    // Nor is there room to write.
    let mut full = held.try_clone().unwrap();
    full.set_nonblocking(true).unwrap();
    while full.write(&[0; 4096]).is_ok() {}
    held.set_nonblocking(false).unwrap();
    let vcpu = asked.read(0x7008);
    while asked.rig.device.stats().misses == 0 {
        asked.rig.events.run_with_timeout(10).unwrap();
    }
    drop((ours, held, full));
    assert_eq!(asked.join(vcpu), u64::MAX);
}

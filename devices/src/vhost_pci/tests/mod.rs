//! One machine for all tests of the device; what is tested is in the modules.

/// The rest of a `Machine` whose test is about what is mapped: takes everything.
macro_rules! takes_the_rest {
    () => {
        fn connect(&mut self, _: Line, _: u16, _: Option<OwnedFd>) -> io::Result<()> {
            Ok(())
        }
        fn set_channel(&mut self, _: OwnedFd) -> io::Result<()> {
            Ok(())
        }
        fn set_log(&mut self, _: OwnedFd, _: Log) -> io::Result<()> {
            Ok(())
        }
        fn new_inflight(&mut self, _: Inflight) -> io::Result<Option<(Inflight, OwnedFd)>> {
            Ok(None)
        }
        fn set_inflight(&mut self, _: OwnedFd, _: Inflight) -> io::Result<()> {
            Ok(())
        }
    };
}

mod backend;
mod connection;
mod endpoint;
mod iotlb;
mod log;
mod messages;
mod misses;
mod noise;
mod records;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use event_manager::{EventManager, SubscriberOps};
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::fake::{FakeHost, FakeWindow};
use crate::vhost_user::{
    Connection, Inflight, Log, MemoryRegion, MemoryTable, Message, Payload, U64, VringAddr,
    VringFd, VringState, flags, protocol_features, requests,
};
use crate::virtio::harness::*;
use crate::virtio::{F_VERSION_1, VirtioPci, status};

const WINDOW: u64 = 1 << 32;
const QUEUES: u16 = 4;
/// Vector of the kick of vhost-user queue i: this plus i.
const KICK_VECTOR: u16 = 3;

/// A machine with the device, its driver, and the event loop, all on the test's thread.
struct Rig {
    host: Arc<FakeHost>,
    device: Arc<VhostPci>,
    driver: Driver,
    events: EventManager<Box<dyn MutEventSubscriber + Send>>,
    rx: Ring,
    tx: Ring,
    dir: TempDir,
}

fn config(dir: &TempDir, role: SocketRole) -> VhostPciConfig {
    let uuid = std::array::from_fn(|i| u8::try_from(i).unwrap() + 100);
    VhostPciConfig {
        socket: dir.as_path().join("s"),
        role,
        window: WINDOW,
        queues: QUEUES,
        uuid,
        miss_timeout: Duration::from_secs(10),
        files: Files::Sealed,
        inflight: true,
        log: false,
    }
}

impl Rig {
    /// A driver that is live, with empty queues.
    fn new(role: SocketRole) -> Self {
        let dir = TempDir::new().unwrap();
        let rig = Self::stopped(config(&dir, role), dir, None);
        rig.start();
        rig
    }

    /// A driver that has not begun.
    fn stopped(config: VhostPciConfig, dir: TempDir, endpoint: Option<Arc<Endpoint>>) -> Self {
        let host = FakeHost::new();
        let device = VhostPci::new(config, endpoint, host.clone()).unwrap();
        let function = VirtioPci::new(device.clone(), host.clone()).unwrap();
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.subscriber());
        let driver = Driver::new(function, host.clone());
        let (rx, tx) = (
            Ring::new(&host, 0x10_0000, 64),
            Ring::new(&host, 0x20_0000, 64),
        );
        Self {
            host,
            device,
            driver,
            events,
            rx,
            tx,
            dir,
        }
    }

    /// A driver whose rxq is filled and whose front-end is connected.
    fn connected() -> (Self, Connection) {
        Self::connect_to(Self::new(SocketRole::Listen))
    }

    fn connect_to(mut rig: Self) -> (Self, Connection) {
        for _ in 0..32 {
            rig.rx.offer(4096);
        }
        let peer = rig.connect();
        (rig, peer)
    }

    /// As [`Rig::connected`], with REPLY_ACK agreed and its messages out of the way.
    fn acknowledging() -> (Self, Connection) {
        let (mut rig, mut peer) = Self::connected();
        let features = protocol_features::REPLY_ACK | protocol_features::CONFIGURE_MEM_SLOTS;
        rig.request(
            &mut peer,
            &Message::request(requests::SET_PROTOCOL_FEATURES, &U64(features)),
        );
        rig.received().expect("the message passes");
        (rig, peer)
    }

    fn start(&self) {
        self.driver.enable_msix();
        assert!(self.driver.negotiate(F_VERSION_1));
        self.go();
    }

    /// From FEATURES_OK to DRIVER_OK.
    fn go(&self) {
        let driver = &self.driver;
        driver.write(16, &0u16.to_le_bytes());
        driver.setup_queue(0, &self.rx, 1);
        driver.setup_queue(1, &self.tx, 2);
        for queue in 0..QUEUES {
            let index = 2 + 2 * queue;
            assert_eq!(
                driver.set_vector(index, KICK_VECTOR + queue),
                KICK_VECTOR + queue
            );
        }
        driver.set_status(status::DRIVER_OK);
    }

    fn backend_up(&mut self) {
        self.driver.write(DEVICE, &BACKEND_UP.to_le_bytes());
        self.pump();
    }

    fn connect(&mut self) -> Connection {
        let peer = UnixStream::connect(self.dir.as_path().join("s")).unwrap();
        self.backend_up();
        assert_eq!(self.status(), BACKEND_UP | FRONTEND_UP);
        self.driver.interrupts();
        self.host.log.take();
        Connection::new(peer).unwrap()
    }

    /// Lets the device thread do all that there is to do.
    fn pump(&mut self) {
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device thread never comes to rest");
    }

    fn status(&self) -> u32 {
        self.driver.u32(DEVICE)
    }

    fn window(&self) -> Arc<FakeWindow> {
        self.host.windows()[0].clone()
    }

    fn request(&mut self, peer: &mut Connection, message: &Message) {
        peer.send(message).unwrap();
        self.pump();
    }

    /// The next message on rxq: request, flags, payload.
    fn received(&mut self) -> Option<(u32, u32, Vec<u8>)> {
        let bytes = self.rx.take()?;
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(
            usize::try_from(word(8)).unwrap(),
            bytes.len() - 12,
            "size field"
        );
        Some((word(0), word(4), bytes[12..].to_vec()))
    }

    /// The driver sends a message on txq.
    fn send(&mut self, request: u32, word: u32, payload: &[u8]) {
        let message = Message {
            request,
            flags: word,
            payload: payload.to_vec(),
            fds: Vec::new(),
        };
        self.tx.send(&bytes(&message));
        self.driver.notify(1);
        self.pump();
    }

    fn reply(&mut self, request: u32, payload: &impl Payload) {
        self.send(request, flags::VERSION | flags::REPLY, &payload.encode());
    }

    /// The connection is closed, nothing of it is left, and only then the driver was told.
    fn assert_gone(&mut self, peer: &mut Connection) {
        self.pump();
        assert!(peer.receive().is_err(), "the socket is closed");
        assert_eq!(self.status() & (BACKEND_UP | FRONTEND_UP), 0);
        assert_eq!(self.window().shown(), []);
        assert_eq!(self.host.doorbells().len(), 2, "those of the virtqueues");
        for queue in 0..QUEUES {
            assert_eq!(
                self.host.interrupts()[usize::from(KICK_VECTOR + queue)].sources(),
                0
            );
        }
        assert!(
            self.driver.interrupts().contains(&0),
            "configuration interrupt"
        );
    }
}

fn bytes(message: &Message) -> Vec<u8> {
    [&message.header()[..], &message.payload].concat()
}

fn eventfd() -> (EventFd, OwnedFd) {
    let event = event::new().unwrap();
    let copy = event::into_owned(event.try_clone().unwrap());
    (event, copy)
}

/// A file of this size.
fn memory(size: u64) -> File {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(size).unwrap();
    file
}

fn fd(file: &File) -> OwnedFd {
    file.try_clone().unwrap().into()
}

fn region(guest_address: u64, size: u64) -> MemoryRegion {
    MemoryRegion {
        guest_address,
        size,
        user_address: 0x7f00_0000_0000 ^ guest_address,
        mmap_offset: 0,
    }
}

fn table(regions: &[MemoryRegion], file: &File) -> Message {
    Message::request(requests::SET_MEM_TABLE, &MemoryTable(regions.to_vec()))
        .with_fds(regions.iter().map(|_| fd(file)).collect())
}

fn vring(request: u32, index: u8, fd: Option<OwnedFd>) -> Message {
    let payload = VringFd {
        index,
        no_fd: fd.is_none(),
    };
    Message::request(request, &payload).with_fds(fd.into_iter().collect())
}

//! Both roles against the `vhost` crate, which knows nothing of this code.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserLog, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as PeerError, Frontend as PeerFrontend, GpuBackend,
    Result as PeerResult, VhostUserBackendReqHandlerMut, VhostUserFrontend,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempfile::TempFile;

use super::frontend::{memory, vring};
use super::pair;
use crate::vhost_user::frontend::{Event, Frontend, PACKED_BASE, Vring};
use crate::vhost_user::{
    Connection, MemoryTable, Message, Payload, SingleMemoryRegion, U64,
    VHOST_USER_F_PROTOCOL_FEATURES, VringAddr, VringFd, VringState, protocol_features, requests,
};
use crate::virtio::{F_RING_PACKED, F_VERSION_1, event};

const FEATURES: u64 = F_VERSION_1 | F_RING_PACKED | 1 << 29 | 1 << 15;
/// What our front-end starts split rings with.
const SPLIT: u64 = F_VERSION_1 | 1 << 29;

// ---- our front-end, their back-end ----

/// Length of their area for what is in flight.
const AREA: u64 = 0x4000;

/// What their back-end was told.
#[derive(Default)]
struct Told {
    protocol_features: u64,
    owned: bool,
    features: u64,
    /// guest address, size, user address, file offset, inode.
    regions: Vec<(u64, u64, u64, u64, u64)>,
    /// index: size, base, descriptors, available, used.
    sizes: Vec<(u32, u32)>,
    bases: Vec<(u32, u32)>,
    addresses: Vec<(u32, u64, u64, u64)>,
    kicks: Vec<(u8, EventFd)>,
    calls: Vec<(u8, EventFd)>,
    enabled: Vec<(u32, bool)>,
    /// What was asked for in flight, and the area that came: its length, and the inode of its file.
    inflight_asked: Vec<(u16, u16)>,
    inflight: Vec<(u64, u64)>,
}

/// Their back-end. `offers`: protocol features besides REPLY_ACK, which that crate always has.
struct Backend {
    told: Arc<Mutex<Told>>,
    features: u64,
    offers: VhostUserProtocolFeatures,
    refuses_memory: bool,
}

impl Backend {
    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap()
    }

    fn take_region(&mut self, region: (u64, u64, u64, u64), file: &File) -> PeerResult<()> {
        if self.refuses_memory {
            return Err(PeerError::InvalidParam);
        }
        let inode = file.metadata().unwrap().ino();
        let (gpa, size, user, offset) = region;
        self.told().regions.push((gpa, size, user, offset, inode));
        Ok(())
    }
}

fn eventfd(file: Option<File>) -> EventFd {
    event::from_owned(file.unwrap().into())
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> PeerResult<()> {
        self.told().owned = true;
        Ok(())
    }
    fn get_features(&mut self) -> PeerResult<u64> {
        Ok(self.features | VHOST_USER_F_PROTOCOL_FEATURES)
    }
    fn set_features(&mut self, features: u64) -> PeerResult<()> {
        self.told().features = features;
        Ok(())
    }
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> PeerResult<Option<Vec<u64>>> {
        for (r, file) in regions.iter().zip(&files) {
            let region = (r.guest_phys_addr, r.memory_size, r.user_addr, r.mmap_offset);
            self.take_region(region, file)?;
        }
        Ok(None)
    }
    fn set_vring_num(&mut self, index: u32, num: u32) -> PeerResult<()> {
        self.told().sizes.push((index, num));
        Ok(())
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        desc: u64,
        used: u64,
        avail: u64,
        _: u64,
    ) -> PeerResult<()> {
        self.told().addresses.push((index, desc, avail, used));
        Ok(())
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> PeerResult<()> {
        self.told().bases.push((index, base));
        Ok(())
    }
    fn get_vring_base(&mut self, index: u32) -> PeerResult<VhostUserVringState> {
        Ok(VhostUserVringState::new(index, 100 + index))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> PeerResult<()> {
        self.told().kicks.push((index, eventfd(fd)));
        Ok(())
    }
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> PeerResult<()> {
        self.told().calls.push((index, eventfd(fd)));
        Ok(())
    }
    fn get_protocol_features(&mut self) -> PeerResult<VhostUserProtocolFeatures> {
        Ok(self.offers)
    }
    fn set_protocol_features(&mut self, features: u64) -> PeerResult<()> {
        self.told().protocol_features = features;
        Ok(())
    }
    fn get_queue_num(&mut self) -> PeerResult<u64> {
        Ok(2)
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> PeerResult<()> {
        self.told().enabled.push((index, enable));
        Ok(())
    }
    fn get_max_mem_slots(&mut self) -> PeerResult<u64> {
        Ok(32)
    }
    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> PeerResult<Option<u64>> {
        let r = **region;
        let region = (r.guest_phys_addr, r.memory_size, r.user_addr, r.mmap_offset);
        self.take_region(region, &file)?;
        Ok(None)
    }

    fn get_inflight_fd(
        &mut self,
        asked: &VhostUserInflight,
    ) -> PeerResult<(VhostUserInflight, File)> {
        let file = TempFile::new().unwrap().into_file();
        let mut told = self.told();
        told.inflight_asked
            .push((asked.num_queues, asked.queue_size));
        let VhostUserInflight {
            num_queues,
            queue_size,
            ..
        } = *asked;
        Ok((
            VhostUserInflight::new(AREA, 0, num_queues, queue_size),
            file,
        ))
    }
    fn set_inflight_fd(&mut self, area: &VhostUserInflight, file: File) -> PeerResult<()> {
        let mut told = self.told();
        // Before any ring, or nothing of it could be kept.
        assert_eq!(told.kicks.len(), 0);
        told.inflight
            .push((area.mmap_size, file.metadata().unwrap().ino()));
        Ok(())
    }

    // What our front-end never asks for.
    fn reset_owner(&mut self) -> PeerResult<()> {
        unexpected()
    }
    fn reset_device(&mut self) -> PeerResult<()> {
        unexpected()
    }
    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> PeerResult<()> {
        unexpected()
    }
    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> PeerResult<Vec<u8>> {
        unexpected()
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> PeerResult<()> {
        unexpected()
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> PeerResult<()> {
        unexpected()
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> PeerResult<File> {
        unexpected()
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> PeerResult<()> {
        unexpected()
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> PeerResult<Option<File>> {
        unexpected()
    }
    fn check_device_state(&mut self) -> PeerResult<()> {
        unexpected()
    }
    fn get_shmem_config(&mut self) -> PeerResult<VhostUserShMemConfig> {
        unexpected()
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> PeerResult<()> {
        unexpected()
    }
}

fn unexpected<T>() -> PeerResult<T> {
    panic!("our front-end asked for something that it should not");
}

/// A front-end of ours, and a thread that serves it with their back-end until it hangs up.
fn their_backend(
    offers: VhostUserProtocolFeatures,
    refuses_memory: bool,
) -> (Frontend, Arc<Mutex<Told>>, thread::JoinHandle<PeerError>) {
    let (ours, theirs) = pair();
    let told = Arc::new(Mutex::new(Told::default()));
    let backend = Backend {
        told: told.clone(),
        features: FEATURES,
        offers,
        refuses_memory,
    };
    let server = thread::spawn(move || serve(theirs, backend));
    (Frontend::new(ours).unwrap(), told, server)
}

/// Serves until the front-end hangs up.
fn serve(stream: UnixStream, backend: Backend) -> PeerError {
    let mut handler = BackendReqHandler::from_stream(stream, Arc::new(Mutex::new(backend)));
    loop {
        if let Err(error) = handler.handle_request()
            && !matches!(error, PeerError::InvalidParam)
        {
            return error;
        }
    }
}

/// Their back-end for a front-end that somebody else has, with these features.
pub(crate) struct Served {
    told: Arc<Mutex<Told>>,
    stream: UnixStream,
    server: thread::JoinHandle<PeerError>,
}

impl Served {
    pub(crate) fn new(stream: UnixStream, features: u64) -> Self {
        Self::with(stream, features, false)
    }

    /// `keeps_inflight`: it keeps what is in flight where the next one finds it.
    pub(crate) fn with(stream: UnixStream, features: u64, keeps_inflight: bool) -> Self {
        let told = Arc::new(Mutex::new(Told::default()));
        let backend = Backend {
            told: told.clone(),
            features,
            offers: match keeps_inflight {
                true => VhostUserProtocolFeatures::INFLIGHT_SHMFD,
                false => VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            },
            refuses_memory: false,
        };
        let theirs = stream.try_clone().unwrap();
        Self {
            told,
            stream,
            server: thread::spawn(move || serve(theirs, backend)),
        }
    }

    /// How often a vring was enabled.
    pub(crate) fn enabled(&self) -> usize {
        self.told.lock().unwrap().enabled.len()
    }

    /// The features that it was given.
    pub(crate) fn features(&self) -> u64 {
        self.told.lock().unwrap().features
    }

    /// What it was asked for to keep what is in flight: vrings and descriptors.
    pub(crate) fn inflight_asked(&self) -> Vec<(u16, u16)> {
        self.told.lock().unwrap().inflight_asked.clone()
    }

    /// The areas that it was given: length and inode of the file.
    pub(crate) fn inflight(&self) -> Vec<(u64, u64)> {
        self.told.lock().unwrap().inflight.clone()
    }

    /// The bases of its vrings.
    pub(crate) fn bases(&self) -> Vec<(u32, u32)> {
        self.told.lock().unwrap().bases.clone()
    }

    /// It ends, as a process would.
    pub(crate) fn hang_up(self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.server.join().unwrap();
    }
}

/// Waits for the front-end's next event, as an event loop would.
fn next(frontend: &mut Frontend) -> Result<Event, crate::vhost_user::frontend::Error> {
    loop {
        if let Some(event) = frontend.process()? {
            return Ok(event);
        }
        wait(frontend.as_raw_fd());
    }
}

/// Waits until a socket is readable, but not for ever.
fn wait(fd: i32) {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    #[allow(unsafe_code)] // A test's wait for a socket.
    // SAFETY: one pollfd, which is valid for the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 10_000) };
    assert_eq!(ready, 1, "the peer is silent");
}

fn our_frontend_their_backend(offers: VhostUserProtocolFeatures) {
    let (mut frontend, told, server) = their_backend(offers, false);
    let Event::Ready(offer) = next(&mut frontend).unwrap() else {
        panic!("not ready");
    };
    assert_eq!(offer.features, FEATURES);
    let mq = offers.contains(VhostUserProtocolFeatures::MQ);
    assert_eq!(offer.queues, if mq { 2 } else { 1 });

    let memory = memory(3);
    let vrings = [vring(0), vring(1)];
    frontend.start(SPLIT, &memory, &vrings).unwrap();
    assert_eq!(next(&mut frontend).unwrap(), Event::Started);
    {
        let told = told.lock().unwrap();
        let expected = offers | VhostUserProtocolFeatures::REPLY_ACK;
        assert_eq!(told.protocol_features, expected.bits());
        assert!(told.owned);
        assert_eq!(told.features, SPLIT | VHOST_USER_F_PROTOCOL_FEATURES);
        let regions: Vec<_> = memory
            .iter()
            .map(|region| {
                let shared = &region.shared;
                let inode = shared.file.metadata().unwrap().ino();
                let gpa = region.gpa;
                (gpa, shared.len, gpa, shared.file_offset, inode)
            })
            .collect();
        assert_eq!(told.regions, regions);
        assert_eq!(told.sizes, [(0, 256), (1, 256)]);
        assert_eq!(told.bases, [(0, 17), (1, 18)]);
        for (vring, address) in vrings.iter().zip(&told.addresses) {
            let index = u32::from(vring.index);
            assert_eq!(*address, (index, vring.desc, vring.driver, vring.device));
        }
        assert_eq!(told.addresses.len(), 2);
        assert_eq!(told.enabled, [(0, true), (1, true)]);
        for ((vring, kick), call) in vrings.iter().zip(&told.kicks).zip(&told.calls) {
            assert_eq!((kick.0, call.0), (vring.index, vring.index));
            vring.kick.write(1).unwrap();
            assert_eq!(kick.1.read().unwrap(), 1);
            call.1.write(1).unwrap();
            assert_eq!(vring.call.read().unwrap(), 1);
        }
    }
    frontend.stop().unwrap();
    let bases = vec![(0, 100), (1, 101)];
    assert_eq!(next(&mut frontend).unwrap(), Event::Stopped(bases));
    assert_eq!(told.lock().unwrap().enabled[2..], [(0, false), (1, false)]);
    drop(frontend);
    assert!(matches!(server.join().unwrap(), PeerError::Disconnected));
}

#[test]
fn our_front_end_starts_and_stops_their_back_end_with_a_memory_table() {
    our_frontend_their_backend(VhostUserProtocolFeatures::empty());
}

#[test]
fn our_front_end_starts_and_stops_their_back_end_with_single_regions_and_multiqueue() {
    our_frontend_their_backend(
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
    );
}

#[test]
fn our_front_end_stops_and_starts_one_packed_ring_of_their_back_end() {
    let (mut frontend, told, server) = their_backend(VhostUserProtocolFeatures::MQ, false);
    assert!(matches!(next(&mut frontend), Ok(Event::Ready(_))));
    let packed = |index, size| Vring {
        size,
        base: PACKED_BASE,
        ..vring(index)
    };
    let vrings = [packed(0, 768), packed(1, 768)];
    frontend
        .start(SPLIT | F_RING_PACKED, &memory(1), &vrings)
        .unwrap();
    assert_eq!(next(&mut frontend).unwrap(), Event::Started);
    frontend.stop_vring(1).unwrap();
    assert_eq!(next(&mut frontend).unwrap(), Event::VringStopped(1, 101));
    frontend.start_vring(&packed(1, 100)).unwrap();
    frontend.stop().unwrap();
    let bases = vec![(0, 100), (1, 101)];
    assert_eq!(next(&mut frontend).unwrap(), Event::Stopped(bases));
    let told = told.lock().unwrap();
    assert_eq!(told.sizes, [(0, 768), (1, 768), (1, 100)]);
    let base = 0x8000_8000;
    assert_eq!(told.bases, [(0, base), (1, base), (1, base)]);
    let enabled = [(0, true), (1, true), (1, false), (1, true)];
    assert_eq!(told.enabled[..4], enabled);
    drop((frontend, told));
    server.join().unwrap();
}

#[test]
fn our_front_end_sees_that_their_back_end_refuses_memory() {
    for offers in [
        VhostUserProtocolFeatures::empty(),
        VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
    ] {
        let (mut frontend, _, server) = their_backend(offers, true);
        assert!(matches!(next(&mut frontend), Ok(Event::Ready(_))));
        frontend.start(FEATURES, &memory(1), &[vring(0)]).unwrap();
        let error = next(&mut frontend).unwrap_err();
        assert!(error.to_string().contains("MEM"), "{error}");
        drop(frontend);
        server.join().unwrap();
    }
}

// ---- their front-end, our codec ----

/// A back-end made of [`Connection`] and the payload types. Returns what it was sent when the peer hangs up.
fn our_backend(stream: UnixStream) -> thread::JoinHandle<Vec<Message>> {
    thread::spawn(move || {
        let mut connection = Connection::new(stream).unwrap();
        let mut seen = Vec::new();
        loop {
            let message = match connection.receive() {
                Ok(Some(message)) => message,
                Ok(None) => {
                    wait(connection.as_raw_fd());
                    continue;
                }
                Err(error) if error.is_disconnect() => return seen,
                Err(error) => panic!("{error}"),
            };
            let number = |value| Message::reply(message.request, &U64(value));
            let reply = match message.request {
                requests::GET_FEATURES => Some(number(FEATURES | VHOST_USER_F_PROTOCOL_FEATURES)),
                requests::GET_PROTOCOL_FEATURES => Some(number(
                    protocol_features::MQ
                        | protocol_features::REPLY_ACK
                        | protocol_features::CONFIGURE_MEM_SLOTS,
                )),
                requests::GET_QUEUE_NUM => Some(number(2)),
                requests::GET_MAX_MEM_SLOTS => Some(number(9)),
                requests::GET_VRING_BASE => {
                    let asked = VringState::decode(&message.payload).unwrap();
                    let state = VringState {
                        index: asked.index,
                        num: 77,
                    };
                    Some(Message::reply(message.request, &state))
                }
                // One step is refused, to see that the peer believes it.
                requests::SET_VRING_NUM => Some(number(
                    (VringState::decode(&message.payload).unwrap().num == 3).into(),
                )),
                _ => message.needs_reply().then(|| number(0)),
            };
            if let Some(reply) = reply {
                connection.send(&reply).unwrap();
            }
            seen.push(message);
        }
    })
}

fn find<T: Payload>(seen: &[Message], request: u32) -> (T, &Message) {
    let message = seen.iter().find(|message| message.request == request);
    let message = message.unwrap_or_else(|| panic!("no {}", requests::name(request)));
    (T::decode(&message.payload).unwrap(), message)
}

#[test]
fn our_codec_serves_their_front_end() {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let server = our_backend(ours);
    let memory = memory(2);
    let info = |n: usize| VhostUserMemoryRegionInfo {
        guest_phys_addr: memory[n].gpa,
        memory_size: memory[n].shared.len,
        userspace_addr: 0x7f00_0000_0000 + memory[n].gpa,
        mmap_offset: memory[n].shared.file_offset,
        mmap_handle: memory[n].shared.file.as_raw_fd(),
    };
    let (kick, call) = (event::new().unwrap(), event::new().unwrap());

    let mut peer = PeerFrontend::from_stream(theirs, 2);
    assert_eq!(
        peer.get_features().unwrap(),
        FEATURES | VHOST_USER_F_PROTOCOL_FEATURES
    );
    peer.set_owner().unwrap();
    peer.set_features(FEATURES | VHOST_USER_F_PROTOCOL_FEATURES)
        .unwrap();
    let features = peer.get_protocol_features().unwrap();
    assert!(features.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
    peer.set_protocol_features(features).unwrap();
    peer.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(peer.get_queue_num().unwrap(), 2);
    assert_eq!(peer.get_max_mem_slots().unwrap(), 9);
    peer.set_mem_table(&[info(0), info(1)]).unwrap();
    peer.add_mem_region(&info(1)).unwrap();
    peer.set_vring_num(1, 256).unwrap();
    peer.set_vring_num(1, 3).unwrap_err();
    peer.set_vring_base(1, 5).unwrap();
    let config = VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x3000,
        avail_ring_addr: 0x2000,
        log_addr: None,
    };
    peer.set_vring_addr(1, &config).unwrap();
    peer.set_vring_call(1, &call).unwrap();
    peer.set_vring_kick(1, &kick).unwrap();
    peer.set_vring_enable(1, true).unwrap();
    assert_eq!(peer.get_vring_base(1).unwrap(), 77);
    drop(peer);
    let mut seen = server.join().unwrap();

    let (table, message) = find::<MemoryTable>(&seen, requests::SET_MEM_TABLE);
    assert!(message.needs_reply());
    assert_eq!(message.fds.len(), 2);
    assert_eq!(table.0.len(), 2);
    assert_eq!(table.0[1].guest_address, 1 << 32);
    assert_eq!(table.0[1].user_address, 0x7f01_0000_0000);
    assert_eq!(table.0[1].size, memory[1].shared.len);
    assert_eq!(table.0[1].mmap_offset, memory[1].shared.file_offset);
    let file = File::from(message.fds[1].try_clone().unwrap());
    assert_eq!(
        file.metadata().unwrap().ino(),
        memory[1].shared.file.metadata().unwrap().ino()
    );
    let (single, message) = find::<SingleMemoryRegion>(&seen, requests::ADD_MEM_REG);
    assert_eq!(single.0, table.0[1]);
    assert_eq!(message.fds.len(), 1);
    let (addr, _) = find::<VringAddr>(&seen, requests::SET_VRING_ADDR);
    assert_eq!(
        (addr.index, addr.desc, addr.avail, addr.used),
        (1, 0x1000, 0x2000, 0x3000)
    );
    let (base, _) = find::<VringState>(&seen, requests::SET_VRING_BASE);
    assert_eq!(base, VringState { index: 1, num: 5 });
    let (enable, _) = find::<VringState>(&seen, requests::SET_VRING_ENABLE);
    assert_eq!(enable, VringState { index: 1, num: 1 });
    for (request, theirs) in [
        (requests::SET_VRING_KICK, &kick),
        (requests::SET_VRING_CALL, &call),
    ] {
        let (fd, _) = find::<VringFd>(&seen, request);
        let expected = VringFd {
            index: 1,
            no_fd: false,
        };
        assert_eq!(fd, expected);
        let message = seen.iter_mut().find(|message| message.request == request);
        let ours = event::from_owned(message.unwrap().fds.pop().unwrap());
        theirs.write(1).unwrap();
        assert!(event::is_signalled(&ours));
    }
}

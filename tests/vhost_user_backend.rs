//! A VM's network device served by a back-end that was written with the rust-vmm crates `vhost-user-backend` and `virtio-queue`: another implementation of the
//! protocol's other side, and of split rings. Needs /dev/kvm.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::{Dir, Running, tool};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use virtqueue::net::{F_MRG_RXBUF, HEADER_LEN, Header, features};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

const FRAMES: u32 = 100_000;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Sends back what it gets, addresses exchanged.
struct Echo {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    features: u64,
}

type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The packet in a chain, its header taken off.
fn frame(memory: &GuestMemoryMmap, chain: Chain) -> Vec<u8> {
    let mut packet = Vec::new();
    for piece in chain.readable() {
        let at = packet.len();
        packet.resize(at + piece.len() as usize, 0);
        memory.read_slice(&mut packet[at..], piece.addr()).unwrap();
    }
    packet.split_off(HEADER_LEN)
}

/// Fills chains with a packet; `None` where there are too few, none of which is taken then. What it took: each chain and how much of it is used.
fn fill(
    memory: &GuestMemoryMmap,
    queue: &mut Queue,
    mergeable: bool,
    frame: &[u8],
) -> Option<Vec<(u16, u32)>> {
    let need = HEADER_LEN + frame.len();
    let (mut chains, mut pieces, mut room) = (Vec::new(), Vec::new(), 0);
    while room < need {
        let chain = queue.iter(memory).unwrap().next();
        let Some(chain) = chain.filter(|_| mergeable || chains.is_empty()) else {
            for _ in chains {
                queue.go_to_previous_position();
            }
            return None;
        };
        let head = chain.head_index();
        let before = room;
        for piece in chain.writable() {
            pieces.push((piece.addr(), piece.len() as usize));
            room += piece.len() as usize;
        }
        let here = room.min(need) - before;
        chains.push((head, u32::try_from(here).unwrap()));
    }
    let header = Header {
        num_buffers: u16::try_from(chains.len()).unwrap(),
        ..Header::default()
    };
    let packet = [&header.encode()[..], frame].concat();
    let mut rest = &packet[..];
    for (address, len) in pieces {
        let (part, behind) = rest.split_at(len.min(rest.len()));
        memory.write_slice(part, address).unwrap();
        rest = behind;
    }
    Some(chains)
}

impl Echo {
    /// Sends back what is there, as far as there are buffers for it.
    fn turn(&self, memory: &GuestMemoryMmap, to_guest: &VringRwLock, from_guest: &VringRwLock) {
        let (mut to, mut from) = (to_guest.get_mut(), from_guest.get_mut());
        let mergeable = self.features & F_MRG_RXBUF != 0;
        loop {
            let chain = from.get_queue_mut().iter(memory).unwrap().next();
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            let mut frame = frame(memory, chain);
            frame[..12].rotate_left(6);
            frame[26..34].rotate_left(4);
            let Some(chains) = fill(memory, to.get_queue_mut(), mergeable, &frame) else {
                from.get_queue_mut().go_to_previous_position();
                break;
            };
            for (head, len) in chains {
                to.add_used(head, len).unwrap();
            }
            from.add_used(head, 0).unwrap();
        }
        for mut ring in [to, from] {
            if ring.needs_notification().unwrap() {
                ring.signal_used_queue().unwrap();
            }
        }
    }
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn acked_features(&mut self, features: u64) {
        self.features = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some(new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap())
    }

    fn handle_event(
        &mut self,
        _queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.memory();
        let [to_guest, from_guest] = vrings else {
            return Ok(());
        };
        // A kick can come for one queue while the other is not there yet.
        if ![to_guest, from_guest]
            .iter()
            .all(|ring| ring.get_ref().get_queue().ready())
        {
            return Ok(());
        }
        loop {
            to_guest.disable_notification().unwrap();
            from_guest.disable_notification().unwrap();
            self.turn(&memory, to_guest, from_guest);
            // Both, whatever the first says. One that has waited for the other is not asked again before that has something.
            let room = to_guest.enable_notification().unwrap();
            let frames = from_guest.enable_notification().unwrap();
            if !(room && frames) {
                return Ok(());
            }
        }
    }
}

/// Our VM in front of an echo that offers `features`.
fn echo(offered: u64, keys: &str, words: &str) {
    let dir = Dir::new();
    let socket = dir.file("s");
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let echo = Echo {
        memory: memory.clone(),
        features: offered | features::VERSION_1 | PROTOCOL_FEATURES,
    };
    let mut daemon =
        VhostUserDaemon::new("echo".into(), Arc::new(Mutex::new(echo)), memory).unwrap();
    let device = format!("socket={socket}{keys}");
    let cmdline = format!("work=both count={FRAMES} timeout_ms=20000 {words}");
    let run = ["run", "-vv", "--console", "output", "--net", &device];
    let vm = Running::start(tool(&[&run[..], &["--cmdline", &cmdline]].concat()));
    let path = Path::new(&socket).to_owned();
    let daemon = thread::spawn(move || daemon.serve(path));
    let ended = vm.end();
    let whole = format!(
        "received {FRAMES} frames, every byte checked: 0 lost, 0 duplicated, 0 reordered, 0 corrupted"
    );
    assert!(ended.stdout.contains(&whole), "{ended:?}");
    ended.expect_code(0);
    daemon.join().unwrap().unwrap();
}

#[test]
fn a_back_end_of_the_rust_vmm_crates_serves_our_front_end() {
    echo(0, "", "");
}

#[test]
fn a_back_end_of_the_rust_vmm_crates_serves_our_front_end_by_index_and_table() {
    let offered = features::EVENT_IDX | features::INDIRECT_DESC;
    echo(offered, "", "mode=irq tx=indirect size=1518");
}

#[test]
fn a_back_end_of_the_rust_vmm_crates_spreads_frames_over_buffers() {
    echo(F_MRG_RXBUF, "", "size=1518 rx_buffer=512 tx=chain");
}

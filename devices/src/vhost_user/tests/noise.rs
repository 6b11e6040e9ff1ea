//! What peers may say that nobody thought of: messages that are almost right, their descriptors, and whether these were closed in the end.
//!
//! Everything follows from a seed, so that a failure can be repeated.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::tempfile::TempFile;

use crate::virtio::event;

use super::super::{
    Iotlb, IotlbKind, MemoryRegion, MemoryTable, Message, SingleMemoryRegion, U64,
    VHOST_USER_F_PROTOCOL_FEATURES, VringAddr, VringFd, VringState, flags, requests,
};

/// MQ, REPLY_ACK, BACKEND_REQ and CONFIGURE_MEM_SLOTS.
pub(crate) const PROTOCOL_FEATURES: u64 = 0x8029;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }

    /// Once in so many times.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Half a 64-bit number.
    pub(crate) fn word(&mut self) -> u32 {
        let [low, _] = split(self.next());
        low
    }

    /// A number of pages, as addresses and lengths are: small for the most part, sometimes at the end of what there is, or none at all.
    pub(crate) fn pages(&mut self) -> u64 {
        match self.below(16) {
            0 => self.next(),
            1 => u64::MAX - 0xfff,
            2 => 1 << self.below(64),
            _ => 0x1000 * self.below(24),
        }
    }

    /// A small number, for the most part.
    pub(crate) fn small(&mut self) -> u32 {
        if self.once_in(12) {
            self.word()
        } else {
            split(self.below(6))[0]
        }
    }
}

fn split(number: u64) -> [u32; 2] {
    let bytes = number.to_le_bytes();
    let (halves, _) = bytes.as_chunks::<4>();
    [0, 1].map(|i: usize| u32::from_le_bytes(halves[i]))
}

/// Descriptors that were given away, and what tells whether they are still open somewhere.
///
/// Nothing here looks through all that this process has open: a look at a descriptor keeps it open meanwhile, and tests beside this one see theirs close late.
#[derive(Default)]
pub(crate) struct Given {
    /// The kernel takes from it what is closed for the last time, and it holds nothing open.
    watch: Option<Epoll>,
    watched: usize,
    /// The other ends of sockets.
    ends: Vec<UnixStream>,
    /// Files again: what was given away locks them for as long as it is open or mapped.
    files: Vec<File>,
}

impl Given {
    /// Of something that can be waited for.
    fn watch(&mut self, fd: OwnedFd) -> OwnedFd {
        let watch = self.watch.get_or_insert_with(|| Epoll::new().unwrap());
        // One of these is true of each at any time, once the other ends of sockets are gone.
        let any = EventSet::IN | EventSet::OUT;
        let event = EpollEvent::new(any, self.watched as u64);
        watch
            .ctl(ControlOperation::Add, fd.as_raw_fd(), event)
            .unwrap();
        self.watched += 1;
        fd
    }

    fn lock(&mut self, file: File) -> OwnedFd {
        let mut again = File::options();
        again.read(true).write(true);
        let again = again.open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        self.files.push(again.unwrap());
        file.lock().unwrap();
        file.into()
    }

    /// An event file.
    fn event(&mut self) -> OwnedFd {
        self.watch(event::into_owned(event::new().unwrap()))
    }

    /// A file of 16 pages.
    pub(crate) fn whole_memory(&mut self) -> OwnedFd {
        let file: File = TempFile::new().unwrap().into_file();
        file.set_len(16 * 0x1000).unwrap();
        self.lock(file)
    }

    /// A file of at most 16 pages.
    fn memory(&mut self, random: &mut Random) -> OwnedFd {
        let file: File = TempFile::new().unwrap().into_file();
        file.set_len(0x1000 * random.below(17)).unwrap();
        self.lock(file)
    }

    /// A socket: one whose other end stays open and silent, or one that brings nonsense and its end.
    pub(crate) fn channel(&mut self, random: &mut Random) -> OwnedFd {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        if random.once_in(2) {
            theirs.write_all(&random.next().to_le_bytes()).unwrap();
        } else {
            self.ends.push(theirs);
        }
        self.watch(ours.into())
    }

    /// A descriptor of any kind.
    pub(crate) fn any(&mut self, random: &mut Random) -> OwnedFd {
        match random.below(5) {
            0 => self.event(),
            1 => self.memory(random),
            2 => {
                let (_reader, writer) = std::io::pipe().unwrap();
                self.watch(writer.into())
            }
            3 => self.channel(random),
            _ => File::open("/dev/null").unwrap().into(),
        }
    }

    /// None of them is open any more.
    #[track_caller]
    pub(crate) fn assert_closed(mut self, what: &str) {
        self.ends.clear();
        if let Some(watch) = &self.watch {
            let mut events = vec![EpollEvent::default(); self.watched];
            let open = watch.wait(0, &mut events).unwrap();
            let open = events[..open].iter().map(EpollEvent::data);
            let open: Vec<u64> = open.collect();
            assert!(open.is_empty(), "{what}: {open:?} are still open");
        }
        for file in &self.files {
            let locked = file.try_lock();
            assert!(locked.is_ok(), "{what}: {file:?} is still open or mapped");
        }
    }
}

/// A message of a front-end: right for the most part, one way or another wrong in the other cases. `features`: bits that it may choose of.
pub(crate) fn of_front_end(random: &mut Random, given: &mut Given, features: &[u64]) -> Message {
    let choice = |random: &mut Random| {
        let some = features.iter().filter(|_| !random.once_in(3));
        U64(some.fold(VHOST_USER_F_PROTOCOL_FEATURES, |all, bit| all | bit))
    };
    let region = |random: &mut Random| MemoryRegion {
        guest_address: random.pages(),
        size: 0x1000 * (1 + random.below(4)),
        user_address: random.pages(),
        mmap_offset: 0x1000 * random.below(3),
    };
    let mut message = match random.below(24) {
        0 => Message::bare(requests::GET_FEATURES),
        1 | 2 => Message::request(requests::SET_FEATURES, &choice(random)),
        3 => Message::bare(requests::GET_PROTOCOL_FEATURES),
        4 => Message::request(
            requests::SET_PROTOCOL_FEATURES,
            &U64(random.next() & 0x802b),
        ),
        5 => Message::bare(requests::SET_OWNER),
        6 | 7 => {
            let regions: Vec<_> = (0..random.below(9)).map(|_| region(random)).collect();
            let fds = regions.iter().map(|_| given.memory(random)).collect();
            Message::request(requests::SET_MEM_TABLE, &MemoryTable(regions)).with_fds(fds)
        }
        8 | 9 => Message::request(requests::ADD_MEM_REG, &SingleMemoryRegion(region(random)))
            .with_fds(vec![given.memory(random)]),
        10 => Message::request(requests::REM_MEM_REG, &SingleMemoryRegion(region(random))),
        11..=13 => {
            let vring = [
                requests::SET_VRING_NUM,
                requests::SET_VRING_BASE,
                requests::SET_VRING_ENABLE,
                requests::GET_VRING_BASE,
            ];
            let state = VringState {
                index: random.small(),
                num: random.small(),
            };
            Message::request(vring[random.index(4)], &state)
        }
        14 => {
            let addr = VringAddr {
                index: random.small(),
                flags: random.small(),
                desc: random.pages(),
                used: random.pages(),
                avail: random.pages(),
                log: random.pages(),
            };
            Message::request(requests::SET_VRING_ADDR, &addr)
        }
        15..=17 => {
            let line = [
                requests::SET_VRING_KICK,
                requests::SET_VRING_CALL,
                requests::SET_VRING_ERR,
            ];
            let no_fd = random.once_in(4);
            let payload = VringFd {
                index: random.small().to_le_bytes()[0],
                no_fd,
            };
            let fds = if no_fd { vec![] } else { vec![given.event()] };
            Message::request(line[random.index(3)], &payload).with_fds(fds)
        }
        18 | 19 => {
            let few = !random.once_in(4);
            let mut pages = || match few {
                true => 0x1000 * random.below(8),
                false => random.pages(),
            };
            let iotlb = Iotlb {
                iova: pages(),
                size: pages(),
                user_address: pages(),
                read: !random.once_in(4),
                write: !random.once_in(4),
                kind: [IotlbKind::Update, IotlbKind::Invalidate][random.index(2)],
            };
            Message::request(requests::IOTLB_MSG, &iotlb)
        }
        20 if random.once_in(2) => {
            let fd = if random.once_in(4) {
                given.any(random)
            } else {
                given.channel(random)
            };
            Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(vec![fd])
        }
        21 => Message::bare(requests::GET_QUEUE_NUM),
        22 => Message::bare(requests::GET_MAX_MEM_SLOTS),
        _ if random.once_in(8) => Message::bare(split(random.below(48))[0]),
        _ => Message::bare(requests::GET_FEATURES),
    };
    // Without one, whatever is refused ends the connection.
    if !random.once_in(100) {
        message = message.with_need_reply(true);
    }
    if random.once_in(120) {
        spoil(&mut message, random, given);
    }
    message
}

/// Makes something about a message wrong, in most cases.
pub(crate) fn spoil(message: &mut Message, random: &mut Random, given: &mut Given) {
    match random.below(7) {
        0 => message.request = random.small(),
        1 => message.flags ^= flags::REPLY,
        2 => message.flags = random.word(),
        3 => message
            .payload
            .truncate(random.index(message.payload.len() + 1)),
        4 => message.payload.extend(random.next().to_le_bytes()),
        5 => message.fds.push(given.any(random)),
        _ => {
            if let Some(byte) = message.payload.first_mut() {
                *byte = random.next().to_le_bytes()[0];
            }
        }
    }
}

/// A message as it lies on the wire, for whoever breaks off in the middle of it.
pub(crate) fn bytes(message: &Message) -> Vec<u8> {
    [&message.header()[..], &message.payload].concat()
}

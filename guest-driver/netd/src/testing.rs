//! What tests need: memory for rings, frames, and a pair of sockets that stands for a tap.
#![allow(unsafe_code)] // memory that two ends share

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use guest_driver::joined::{self, JoinConfig, JoinedBackEnd, JoinedFrontEnd, Silent};
use guest_driver::net_port::Shape;
use guest_driver::port::{self, Frame, Port, Slot};
use guest_driver::virtio_pci::Notify;
use pcap_parser::parse_block_le;
use pcap_parser::pcapng::Block;
use pcap_parser::traits::PcapNGPacketBlock;
use virtqueue::linear::Linear;
use virtqueue::net::{GUEST_OFFLOADS, HOST_OFFLOADS, Offloads};

use crate::tap::{self, Nic};

const START: u64 = 0x10000;

/// Both ends of a connection, in memory that is never freed.
pub(crate) fn join<C: Notify + Clone, K: Notify + Clone>(
    config: &JoinConfig,
    kicks: K,
    calls: C,
) -> (JoinedFrontEnd<K>, JoinedBackEnd<C>) {
    let (front, back, _) = join_in(config, kicks, calls);
    (front, back)
}

/// The same, and all that is shared.
pub(crate) fn join_in<C: Notify + Clone, K: Notify + Clone>(
    config: &JoinConfig,
    kicks: K,
    calls: C,
) -> (JoinedFrontEnd<K>, JoinedBackEnd<C>, Shared) {
    let len = joined::memory_needed(config).unwrap();
    let bytes = usize::try_from(len).unwrap();
    let base = crate::sys::map_locked(bytes, false).unwrap();
    // SAFETY: mapped for ever, and reached through this only.
    let memory = unsafe { Linear::new(base.as_ptr(), START, len) };
    let (front, back) = joined::join(memory, START, config, kicks, calls, true).unwrap();
    (front, back, Shared(base, bytes))
}

/// What two ends share: where it is, and how many bytes.
#[derive(Clone, Copy)]
pub(crate) struct Shared(NonNull<u8>, usize);

impl Shared {
    /// As a back-end sees it when its window was taken away.
    fn vanish(self) {
        // SAFETY: mapped for ever, and in use by this thread only.
        unsafe { self.0.write_bytes(0xff, self.1) };
    }
}

/// A back-end whose window is taken away while it looks at a burst, before the frame with this number.
pub(crate) struct Vanishing {
    pub(crate) port: JoinedBackEnd<Silent>,
    pub(crate) memory: Shared,
    pub(crate) at: usize,
}

impl Port for Vanishing {
    fn tx_burst(
        &mut self,
        _count: usize,
        _len: usize,
        _build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, port::Error> {
        Ok(0)
    }

    fn rx_burst(
        &mut self,
        count: usize,
        mut receive: impl FnMut(&Frame),
    ) -> Result<usize, port::Error> {
        let Self { port, memory, at } = self;
        let mut number = 0;
        let received = port.rx_burst(count, |frame| {
            if number == *at {
                memory.vanish();
            }
            number += 1;
            receive(frame);
        });
        if number > *at {
            // Writes into a window that is gone vanish.
            memory.vanish();
        }
        received
    }

    fn whole(&self) -> bool {
        self.port.whole()
    }

    fn drained(&mut self) -> Result<bool, port::Error> {
        self.port.drained()
    }

    fn arm(&mut self, rx: bool, tx: bool) -> bool {
        self.port.arm(rx, tx)
    }

    fn disarm(&mut self) {
        self.port.disarm();
    }
}

/// Every way in which rings and buffers differ for a back-end.
pub(crate) fn configs() -> impl Iterator<Item = JoinConfig> {
    [false, true].into_iter().flat_map(|packed| {
        [(false, 1530), (true, 1530), (true, 300)].map(|(mergeable, rx_buffer)| JoinConfig {
            packed,
            size: 64,
            in_order: packed,
            shape: Shape {
                mergeable,
                rx_buffer,
                ..Shape::default()
            },
            ..JoinConfig::default()
        })
    })
}

/// Frames whose every byte says where it belongs.
pub(crate) fn frame(number: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (number * 31 + at * 7 + at / 256).to_le_bytes()[0])
        .collect()
}

/// Sends frames of any lengths; returns how many there was room for.
pub(crate) fn send(port: &mut impl Port, frames: &[Vec<u8>]) -> usize {
    frames
        .iter()
        .take_while(|frame| {
            let build = |_, slot: &mut guest_driver::Slot| assert!(slot.write(0, frame));
            port.tx_burst(1, frame.len(), build).unwrap() == 1
        })
        .count()
}

/// All frames that are there.
pub(crate) fn receive(port: &mut impl Port) -> Vec<Vec<u8>> {
    let mut got = Vec::new();
    port.rx_burst(256, |frame| {
        let mut bytes = vec![0; frame.len()];
        assert!(frame.read(0, &mut bytes));
        got.push(bytes);
    })
    .unwrap();
    got
}

/// A socket that stands for a tap, and what it was told.
pub(crate) struct Socket {
    socket: UnixDatagram,
    pub(crate) mtu: usize,
    pub(crate) carrier: Arc<Mutex<Vec<bool>>>,
    /// What it was told that it may leave to the peer.
    pub(crate) offloads: Vec<Offloads>,
}

/// The socket, and the end at which the test is the kernel.
pub(crate) fn socket() -> (Socket, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).unwrap();
    }
    let nic = Socket {
        socket: ours,
        mtu: 1500,
        carrier: Arc::default(),
        offloads: Vec::new(),
    };
    (nic, theirs)
}

struct Receive<'a>(&'a UnixDatagram);

impl Read for Receive<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.recv(to)
    }
}

impl Nic for Socket {
    fn read(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        tap::read(&mut Receive(&self.socket), packet)
    }

    fn write(&mut self, packet: &[u8]) -> io::Result<()> {
        self.socket.send(packet).map(|_| ())
    }

    fn mtu(&self) -> Option<usize> {
        Some(self.mtu)
    }

    fn offloads(&self) -> u64 {
        HOST_OFFLOADS | GUEST_OFFLOADS
    }

    fn set_offloads(&mut self, offloads: Offloads) {
        self.offloads.push(offloads);
    }

    fn set_carrier(&mut self, up: bool) {
        self.carrier.lock().unwrap().push(up);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A packet without offload.
pub(crate) fn packet(frame: &[u8]) -> Vec<u8> {
    [&[0; 12][..], frame].concat()
}

/// All packets that are there.
pub(crate) fn packets(kernel: &UnixDatagram) -> Vec<Vec<u8>> {
    let mut got = Vec::new();
    let mut buffer = vec![0; 1 << 17];
    while let Ok(len) = kernel.recv(&mut buffer) {
        got.push(buffer[..len].to_vec());
    }
    got
}

/// The frames of a pcapng file as another parser reads it: when, whether to the peer, how long, and what was kept.
pub(crate) fn captured(bytes: &[u8]) -> Vec<(u64, bool, usize, Vec<u8>)> {
    let mut rest = bytes;
    let mut frames = Vec::new();
    while let Ok((behind, block)) = parse_block_le(rest) {
        rest = behind;
        let Block::EnhancedPacket(packet) = block else {
            continue;
        };
        let time = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
        let flags = packet.options.iter().find(|option| option.code.0 == 2);
        let out = match flags.and_then(|flags| flags.as_bytes().ok()) {
            Some([1, 0, 0, 0]) => false,
            Some([2, 0, 0, 0]) => true,
            other => panic!("{other:?}"),
        };
        let len = packet.origlen.try_into().unwrap();
        frames.push((time, out, len, packet.packet_data().to_vec()));
    }
    frames
}

/// Only how long they are.
pub(crate) fn lens_in(bytes: &[u8]) -> Vec<usize> {
    captured(bytes)
        .into_iter()
        .map(|(_, _, len, _)| len)
        .collect()
}

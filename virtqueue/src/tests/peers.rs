//! Sides of a ring that write what they like.

use super::*;

/// Descriptor flags that both layouts have.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A descriptor: address, length, flags. What links it to others comes from the peer.
pub(crate) type Desc = (u64, u32, u16);

/// The ring as a hostile peer sees it: its memory and where it is in it, in descriptors (split: chains) since the start.
#[derive(Debug)]
pub(crate) struct Peer {
    pub memory: Fake,
    pub config: RingConfig,
    pub start: u32,
    pub offered: u16,
    pub used: u16,
}

impl Peer {
    pub fn descriptor(&self, at: u64, (addr, len, flags): Desc, id: u16, next: u16, packed: bool) {
        self.memory.poke(at, addr.to_le_bytes());
        self.memory.poke(at + 8, len.to_le_bytes());
        let last = if packed { [id, flags] } else { [flags, next] };
        self.memory.poke(at + 12, last[0].to_le_bytes());
        self.memory.poke(at + 14, last[1].to_le_bytes());
    }
}

/// A layout, as somebody sees it who breaks its rules.
pub(crate) trait Raw: Tested {
    /// What a used chain is that cannot be.
    const TOO_MANY_USED: Error;

    /// Makes a chain available.
    fn offer(peer: &mut Peer, id: u16, chain: &[Desc]);
    /// Makes a chain available that never ends.
    fn offer_endless(peer: &mut Peer);
    /// Writes one used element that stands for `chains` chains of `descriptors` descriptors.
    fn put(peer: &mut Peer, id: u32, len: u32, chains: u16, descriptors: u16);
    /// Writes what a sleeper writes: flags and position.
    fn wish(peer: &Peer, of_driver: bool, flags: u16, position: u16);
    /// Makes the descriptors of a table one list.
    fn link(table: &mut [Desc]) {
        let _ = table;
    }
}

impl Raw for Split {
    const TOO_MANY_USED: Error = Error::IndexOutOfRange;

    fn offer(peer: &mut Peer, id: u16, chain: &[Desc]) {
        let size = peer.config.size;
        for (n, &(addr, len, flags)) in (1u16..).zip(chain) {
            let at = id.wrapping_add(n - 1) % size;
            let next = if usize::from(n) < chain.len() {
                NEXT
            } else {
                0
            };
            let slot = peer.config.desc + 16 * u64::from(at);
            peer.descriptor(slot, (addr, len, flags | next), 0, (at + 1) % size, false);
        }
        let index = Self::position(peer.start, size, peer.offered, 0);
        let entry = peer.config.driver + 4 + 2 * (u64::from(index) % u64::from(size));
        peer.memory.poke(entry, id.to_le_bytes());
        peer.offered += 1;
        let [i0, i1, ..] = Self::position(peer.start, size, peer.offered, 0).to_le_bytes();
        peer.memory.poke(peer.config.driver + 2, [i0, i1]);
    }

    fn offer_endless(peer: &mut Peer) {
        let size = peer.config.size;
        for n in 0..size {
            let at = peer.config.desc + 16 * u64::from(n);
            peer.descriptor(at, (DATA, 1, NEXT), 0, (n + 1) % size, false);
        }
        let offered = peer.offered;
        Self::offer(peer, 0, &[]);
        assert_eq!(peer.offered, offered + 1);
    }

    fn put(peer: &mut Peer, id: u32, len: u32, chains: u16, _: u16) {
        let size = peer.config.size;
        let index = Self::position(peer.start, size, peer.used, 0);
        let at = peer.config.device + 4 + 8 * (u64::from(index) % u64::from(size));
        peer.memory.poke(at, id.to_le_bytes());
        peer.memory.poke(at + 4, len.to_le_bytes());
        peer.used += chains;
        let [i0, i1, ..] = Self::position(peer.start, size, peer.used, 0).to_le_bytes();
        peer.memory.poke(peer.config.device + 2, [i0, i1]);
    }

    fn wish(peer: &Peer, of_driver: bool, flags: u16, position: u16) {
        let size = u64::from(peer.config.size);
        let (area, event) = if of_driver {
            (peer.config.driver, 4 + 2 * size)
        } else {
            (peer.config.device, 4 + 8 * size)
        };
        peer.memory.poke(area, flags.to_le_bytes());
        peer.memory.poke(area + event, position.to_le_bytes());
    }

    fn link(table: &mut [Desc]) {
        // The place of `next` is behind the flags: see `indirect`.
        if let Some((_, front)) = table.split_last_mut() {
            front.iter_mut().for_each(|desc| desc.2 |= NEXT);
        }
    }
}

impl Packed {
    fn place(peer: &Peer, steps: u16) -> (u64, bool) {
        let position = Self::position(peer.start, peer.config.size, steps, 0);
        let slot = u64::from(position & 0x7fff);
        (peer.config.desc + 16 * slot, position & 0x8000 != 0)
    }
}

impl Raw for Packed {
    const TOO_MANY_USED: Error = Error::BadId;

    fn offer(peer: &mut Peer, id: u16, chain: &[Desc]) {
        for (n, &(addr, len, flags)) in (1..).zip(chain) {
            let (at, wrap) = Self::place(peer, peer.offered);
            let next = if n < chain.len() { NEXT } else { 0 };
            let state = if wrap { 0x80 } else { 0x8000 };
            peer.descriptor(at, (addr, len, flags | next | state), id, 0, true);
            peer.offered += 1;
        }
    }

    fn offer_endless(peer: &mut Peer) {
        for _ in 0..peer.config.size {
            Self::offer(peer, 0, &[(DATA, 1, NEXT)]);
        }
    }

    fn put(peer: &mut Peer, id: u32, len: u32, _: u16, descriptors: u16) {
        let (at, wrap) = Self::place(peer, peer.used);
        let state = if wrap { 0x8080 } else { 0 };
        // There is no room for more than 16 bits.
        let id = u16::try_from(id).unwrap_or(u16::MAX);
        peer.descriptor(at, (0, len, state), id, 0, true);
        peer.used += descriptors;
    }

    fn wish(peer: &Peer, of_driver: bool, flags: u16, position: u16) {
        let area = if of_driver {
            peer.config.driver
        } else {
            peer.config.device
        };
        peer.memory.poke(area, position.to_le_bytes());
        peer.memory.poke(area + 2, flags.to_le_bytes());
    }
}

/// Tests of a body that is generic over the layout and breaks its rules.
macro_rules! hostile {
    ($($(#[$meta:meta])* fn $name:ident<$layout:ident>() $body:block)*) => {
        $($(#[$meta])* fn $name<$layout: $crate::tests::peers::Raw>() $body)*
        mod split {
            $(#[test] fn $name() { super::$name::<crate::split::Split>(); })*
        }
        mod packed {
            $(#[test] fn $name() { super::$name::<crate::packed::Packed>(); })*
        }
    };
}
pub(crate) use hostile;

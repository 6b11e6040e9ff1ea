//! Nonsense in rings.

use guest_driver::wide::{self, MAX_WIDTH};
use virtqueue::linear::Linear;
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Layout, RingConfig};

use super::mix;

/// Which part of a ring nonsense goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scribble {
    /// The available index (packed: a descriptor's flags).
    AvailIndex,
    /// A descriptor's address.
    DescAddress,
    /// A descriptor's length.
    DescLength,
    /// A descriptor's next (packed: its buffer id).
    DescNext,
    /// A descriptor's flags.
    DescFlags,
    /// The used index (packed: a descriptor's flags).
    UsedIndex,
    /// A used element's id.
    UsedId,
    /// A used element's length.
    UsedLength,
    /// A whole descriptor.
    Desc,
    /// Every word of the rings.
    All,
}

/// Bytes of a descriptor.
const DESC: u64 = 16;

impl Scribble {
    /// Its name in commands.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AvailIndex => "avail-index",
            Self::DescAddress => "desc-address",
            Self::DescLength => "desc-length",
            Self::DescNext => "desc-next",
            Self::DescFlags => "desc-flags",
            Self::UsedIndex => "used-index",
            Self::UsedId => "used-id",
            Self::UsedLength => "used-length",
            Self::Desc => "desc",
            Self::All => "all",
        }
    }

    /// The parts that a driver scribbles on, or (`device`) the other side.
    #[must_use]
    pub fn of(device: bool) -> &'static [Self] {
        if device {
            &[
                Self::UsedIndex,
                Self::UsedId,
                Self::UsedLength,
                Self::Desc,
                Self::All,
            ]
        } else {
            &[
                Self::AvailIndex,
                Self::DescAddress,
                Self::DescLength,
                Self::DescNext,
                Self::DescFlags,
                Self::All,
            ]
        }
    }

    /// The part of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let both = [Self::of(false), Self::of(true)];
        let mut all = both.into_iter().flatten().copied();
        all.find(|what| what.name() == name)
    }

    /// Where it is in descriptor or element `slot` of a ring, and its width in bytes; `None` for [`Scribble::All`].
    fn place(self, ring: &RingConfig, packed: bool, slot: u64) -> Option<(u64, usize)> {
        let desc = ring.desc + DESC * slot;
        let element = ring.device + 4 + 8 * slot;
        Some(match (self, packed) {
            (Self::AvailIndex, false) => (ring.driver + 2, 2),
            (Self::UsedIndex, false) => (ring.device + 2, 2),
            (Self::UsedId, false) => (element, 4),
            (Self::UsedLength, false) => (element + 4, 4),
            (Self::DescFlags, false) | (Self::DescNext | Self::UsedId, true) => (desc + 12, 2),
            (Self::DescNext, false)
            | (Self::DescFlags | Self::AvailIndex | Self::UsedIndex, true) => (desc + 14, 2),
            (Self::DescLength, _) | (Self::UsedLength, true) => (desc + 8, 4),
            (Self::DescAddress, _) => (desc, 8),
            (Self::Desc, _) => (desc, 16),
            (Self::All, _) => return None,
        })
    }
}

/// An address that leads nowhere good: anywhere, just below the end of all addresses, or near what is mapped.
fn wild(random: u64) -> u64 {
    match random & 3 {
        0 => mix(random),
        1 => !(mix(random) & 0xfff),
        2 => mix(random) & 0xf_ffff_ffff,
        _ => 0x1_0000_0000 + (mix(random) & 0xfff_ffff),
    }
}

/// Writes nonsense into rings, `count` times. Returns how many writes that were; those beyond `memory` do not take place.
pub fn scribble(
    memory: &Linear,
    rings: &[RingConfig],
    packed: bool,
    what: Scribble,
    count: u64,
    seed: u64,
) -> u64 {
    let mut writes = 0;
    for n in 0..count {
        let random = mix(seed.wrapping_add(n));
        if what == Scribble::All {
            for ring in rings {
                writes += scribble_all(memory, ring, packed, random);
            }
            continue;
        }
        let pick = usize::try_from(random >> 32).unwrap_or(0) % rings.len().max(1);
        let place = rings.get(pick).and_then(|ring| {
            what.place(
                ring,
                packed,
                (random & 0xffff) % u64::from(ring.size.max(1)),
            )
        });
        let Some((addr, width)) = place else {
            continue;
        };
        let mut bytes = [0; MAX_WIDTH];
        let first = match what {
            Scribble::DescAddress | Scribble::Desc => wild(mix(random)),
            _ => mix(random),
        };
        bytes[..8].copy_from_slice(&first.to_le_bytes());
        bytes[8..16].copy_from_slice(&mix(!random).to_le_bytes());
        writes += u64::from(wide::write(memory, addr, width, &bytes));
    }
    writes
}

/// Writes nonsense into every word of a ring's areas.
fn scribble_all(memory: &Linear, ring: &RingConfig, packed: bool, random: u64) -> u64 {
    let sizes = if packed {
        Packed::area_sizes(ring.size)
    } else {
        Split::area_sizes(ring.size)
    };
    let areas = [ring.desc, ring.driver, ring.device];
    let mut writes = 0;
    for (area, len) in areas.into_iter().zip(sizes.into_iter().flatten()) {
        // Areas are a multiple of two bytes long.
        for at in (0..len as u64).step_by(2) {
            let mut bytes = [0; MAX_WIDTH];
            bytes[..8].copy_from_slice(&mix(random.wrapping_add(area + at)).to_le_bytes());
            writes += u64::from(wide::write(memory, area + at, 2, &bytes));
        }
    }
    writes
}

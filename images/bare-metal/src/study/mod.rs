//! What the isolation study is made of: words that can be told from all others, and accesses that count what they find (docs/bare-metal.md).

use guest_driver::wide::{self, MAX_WIDTH};
use virtqueue::linear::Linear;

pub mod race;
pub mod scribble;
pub mod windows;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
const FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
const SECOND: u64 = 0x94d0_49bb_1331_11eb;

/// The number that undoes a multiplication by an odd one, modulo 2^64.
const fn inverse(odd: u64) -> u64 {
    // Newton's iteration doubles the bits that are right; the number itself is right to three.
    let mut x = odd;
    let mut i = 0;
    while i < 5 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        i += 1;
    }
    x
}

/// A word that looks random: the finaliser of SplitMix64. No two numbers give the same word.
#[must_use]
pub fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(GAMMA);
    let z = (z ^ z >> 30).wrapping_mul(FIRST);
    let z = (z ^ z >> 27).wrapping_mul(SECOND);
    z ^ z >> 31
}

/// The number that [`mix`] made the word of.
#[must_use]
pub fn unmix(word: u64) -> u64 {
    let z = word ^ word >> 31 ^ word >> 62;
    let z = z.wrapping_mul(const { inverse(SECOND) });
    let z = z ^ z >> 27 ^ z >> 54;
    let z = z.wrapping_mul(const { inverse(FIRST) });
    (z ^ z >> 30 ^ z >> 60).wrapping_sub(GAMMA)
}

/// How many words a fill can have that [`peek`] recognises.
pub const SECRETS: u64 = 1 << 20;

/// Whether a word is one of those that [`fill`] writes for a seed.
#[must_use]
pub fn is_secret(word: u64, seed: u64) -> bool {
    unmix(word).wrapping_sub(seed) < SECRETS
}

/// Fills memory with words `mix(seed + i)`; `false` where it is not all there.
pub fn fill(memory: &Linear, addr: u64, len: u64, seed: u64) -> bool {
    if !inside(memory, addr, len) {
        return false;
    }
    for i in 0..len / 8 {
        wide::write_word(memory, addr + 8 * i, mix(seed.wrapping_add(i)));
    }
    let word = mix(seed.wrapping_add(len / 8)).to_le_bytes();
    for (at, byte) in (len & !7..len).zip(word) {
        let mut bytes = [0; MAX_WIDTH];
        bytes[0] = byte;
        wide::write(memory, addr + at, 1, &bytes);
    }
    true
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// How many bytes differ.
    pub wrong: u64,
    /// Offset of the first that does.
    pub first: Option<u64>,
}

/// Compares memory with what [`fill`] wrote; `None` where it is not all there.
pub fn check(memory: &Linear, addr: u64, len: u64, seed: u64) -> Option<Difference> {
    if !inside(memory, addr, len) {
        return None;
    }
    let mut difference = Difference::default();
    let mut compare = |at: u64, wrong: bool| {
        if wrong {
            difference.wrong += 1;
            difference.first.get_or_insert(at);
        }
    };
    for i in 0..len.div_ceil(8) {
        let expected = mix(seed.wrapping_add(i));
        let bytes = len - 8 * i;
        if bytes >= 8 && wide::read_word(memory, addr + 8 * i) == Some(expected) {
            continue;
        }
        for (at, byte) in (8 * i..len).zip(expected.to_le_bytes()) {
            let got = wide::read(memory, addr + at, 1).map(|got| got[0]);
            compare(at, got != Some(byte));
        }
    }
    Some(difference)
}

fn inside(memory: &Linear, addr: u64, len: u64) -> bool {
    usize::try_from(len).is_ok_and(|len| memory.ptr(addr, len).is_some())
}

/// Accesses at regular distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// The first address.
    pub offset: u64,
    /// Accesses begin below `offset + len`.
    pub len: u64,
    /// From one to the next; not zero.
    pub step: u64,
    /// Bytes of an access.
    pub width: usize,
    /// Of the words.
    pub seed: u64,
}

impl Sweep {
    /// Where the accesses begin, as far as addresses go.
    fn addresses(self) -> impl Iterator<Item = u64> {
        let count = self.len.div_ceil(self.step.max(1));
        (0..count).map_while(move |i| self.offset.checked_add(i.checked_mul(self.step)?))
    }
}

/// What reads found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peeked {
    /// How many reads there were.
    pub reads: u64,
    /// Those that gave all-ones.
    pub ones: u64,
    /// Words of 8 bytes that are secrets.
    pub secrets: u64,
}

/// Reads; ends where the memory does. `None` where the processor has no access of this width.
#[must_use]
pub fn peek(memory: &Linear, sweep: &Sweep) -> Option<Peeked> {
    if !wide::has(sweep.width) {
        return None;
    }
    let mut peeked = Peeked::default();
    // Narrow reads side by side make words.
    let mut narrow = (0u64, 0usize);
    for addr in sweep.addresses() {
        let Some(bytes) = wide::read(memory, addr, sweep.width) else {
            break;
        };
        let bytes = bytes.get(..sweep.width).unwrap_or(&[]);
        peeked.reads += 1;
        peeked.ones += u64::from(bytes.iter().all(|&byte| byte == 0xff));
        if sweep.width >= 8 {
            let words = bytes.chunks_exact(8).map(word);
            peeked.secrets += words.filter(|&w| is_secret(w, sweep.seed)).count() as u64;
        } else if sweep.step == sweep.width as u64 {
            if addr.is_multiple_of(8) {
                narrow = (0, 0);
            }
            narrow.0 |= word(bytes) << ((8 * narrow.1) & 63);
            narrow.1 += sweep.width;
            peeked.secrets += u64::from(narrow.1 == 8 && is_secret(narrow.0, sweep.seed));
        }
    }
    Some(peeked)
}

/// Up to 8 bytes as a number.
fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    for (to, &byte) in word.iter_mut().zip(bytes) {
        *to = byte;
    }
    u64::from_le_bytes(word)
}

/// Writes words `mix(seed + i)`, as many of them an access as fit; ends where the memory does. Returns how many accesses there were; `None` where the
/// processor has no access of this width.
#[must_use]
pub fn poke(memory: &Linear, sweep: &Sweep) -> Option<u64> {
    if !wide::has(sweep.width) {
        return None;
    }
    let (mut writes, mut next) = (0, sweep.seed);
    for addr in sweep.addresses() {
        let mut bytes = [0; MAX_WIDTH];
        for chunk in bytes.chunks_exact_mut(8).take(sweep.width.div_ceil(8)) {
            chunk.copy_from_slice(&mix(next).to_le_bytes());
            next = next.wrapping_add(1);
        }
        if !wide::write(memory, addr, sweep.width, &bytes) {
            break;
        }
        writes += 1;
    }
    Some(writes)
}

#[cfg(test)]
mod tests;

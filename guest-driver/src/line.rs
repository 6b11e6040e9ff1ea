//! A cache line's worth of a frame, in registers.
//!
//! Unsafe code: SSE2's instructions, which every x86-64 processor has; and loads and stores of shared memory, as in [`bulk`](crate::bulk).
#![allow(unsafe_code)]

use core::arch::x86_64::{
    __m128i, _mm_and_si128, _mm_cmpeq_epi8, _mm_cvtsi128_si64, _mm_loadu_si128, _mm_movemask_epi8,
    _mm_set_epi64x, _mm_srli_si128, _mm_storeu_si128,
};

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// [`LINE`] bytes. Who builds or checks a frame's first line as a whole needs four stores or loads for it. A frame put together from many small
/// stores fills the processor's store buffer while the lines of the peer are still on their way.
#[derive(Clone, Copy, Debug)]
pub struct Line([__m128i; 4]);

impl Line {
    /// Eight little-endian words.
    #[inline(always)]
    #[must_use]
    pub fn from_words(words: [u64; 8]) -> Self {
        let [a, b, c, d, e, f, g, h] = words;
        Self([pair(a, b), pair(c, d), pair(e, f), pair(g, h)])
    }

    /// The same with other last two words.
    #[inline(always)]
    #[must_use]
    pub fn with_last(self, [low, high]: [u64; 2]) -> Self {
        let Self([a, b, c, _]) = self;
        Self([a, b, c, pair(low, high)])
    }

    /// The last two words.
    #[inline(always)]
    #[must_use]
    pub fn last(self) -> [u64; 2] {
        let Self([.., last]) = self;
        // SAFETY: SSE2 is there.
        let halves = unsafe {
            [
                _mm_cvtsi128_si64(last),
                _mm_cvtsi128_si64(_mm_srli_si128::<8>(last)),
            ]
        };
        halves.map(i64::cast_unsigned)
    }

    /// Loads each byte once.
    ///
    /// # Safety
    /// [`LINE`] bytes from `from` are mapped.
    #[inline(always)]
    pub(crate) unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller's promise.
        Self([0, 16, 32, 48].map(|at| unsafe { _mm_loadu_si128(from.add(at).cast()) }))
    }

    /// # Safety
    /// [`LINE`] bytes from `to` are mapped, and there is no reference to them.
    #[inline(always)]
    pub(crate) unsafe fn store(self, to: *mut u8) {
        for (at, part) in [0, 16, 32, 48].into_iter().zip(self.0) {
            // SAFETY: the caller's promise.
            unsafe { _mm_storeu_si128(to.add(at).cast(), part) };
        }
    }
}

impl PartialEq for Line {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (Self([a, b, c, d]), Self([e, f, g, h])) = (*self, *other);
        // SAFETY: SSE2 is there.
        unsafe {
            let low = _mm_and_si128(_mm_cmpeq_epi8(a, e), _mm_cmpeq_epi8(b, f));
            let high = _mm_and_si128(_mm_cmpeq_epi8(c, g), _mm_cmpeq_epi8(d, h));
            _mm_movemask_epi8(_mm_and_si128(low, high)) == 0xffff
        }
    }
}

impl Eq for Line {}

#[inline(always)]
fn pair(low: u64, high: u64) -> __m128i {
    // SAFETY: SSE2 is there.
    unsafe { _mm_set_epi64x(high.cast_signed(), low.cast_signed()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [u64; 8] = [1, 2 << 56, 3, 4, 5, 6 << 32, 7, 8 << 56];

    #[test]
    fn stores_and_loads_little_endian_words() {
        let mut bytes = [0u8; LINE + 2];
        // SAFETY: the array is longer by two.
        unsafe { Line::from_words(WORDS).store(bytes.as_mut_ptr().add(1)) };
        for (i, word) in WORDS.iter().enumerate() {
            assert_eq!(bytes[1 + 8 * i..][..8], word.to_le_bytes());
        }
        assert_eq!((bytes[0], bytes[LINE + 1]), (0, 0));
        // SAFETY: as above.
        let line = unsafe { Line::load(bytes.as_ptr().add(1)) };
        assert_eq!(line, Line::from_words(WORDS));
        assert_eq!(line.last(), [7, 8 << 56]);
        assert_eq!(line.with_last([9, 10]).last(), [9, 10]);
    }

    #[test]
    fn a_difference_in_any_byte_is_seen() {
        let line = Line::from_words(WORDS);
        for byte in 0..LINE {
            let mut words = WORDS;
            words[byte / 8] ^= 0x80 << (8 * (byte % 8));
            assert_ne!(line, Line::from_words(words), "byte {byte}");
        }
    }
}

//! Moving and comparing payload: the one module that touches the bytes of frames.
//!
//! Unsafe code: payload lives in memory that another VM may write at any moment, so there can be no reference to it. Every byte is loaded once
//! and used from the register; a frame that its owner changes meanwhile comes out mixed, which is the owner's loss.
#![allow(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::{
    __cpuid, __cpuid_count, __m128i, __m256i, __m512i, _MM_HINT_T0, _mm_cmpeq_epi8,
    _mm_loadu_si128, _mm_movemask_epi8, _mm_prefetch, _mm_storeu_si128, _mm256_cmpeq_epi8,
    _mm256_loadu_si256, _mm256_movemask_epi8, _mm256_storeu_si256, _mm512_cmpneq_epi64_mask,
    _mm512_loadu_si512, _mm512_storeu_si512, _xgetbv,
};
use core::sync::atomic::{AtomicU8, Ordering};

/// Vector width to use for long payloads, as log2 of its bytes; 0 before [`detect`].
static WIDTH: AtomicU8 = AtomicU8::new(0);

const SSE2: u8 = 4;
const AVX2: u8 = 5;
const AVX512: u8 = 6;

/// Up to here the 16-byte moves that every x86-64 has are as good, and are inlined.
const SHORT: usize = 128;

/// Finds out how wide the processor's vectors are (and the operating system, or its absence, lets them be). Without this call, 16 bytes. Returns
/// the width in bytes.
pub fn detect() -> usize {
    let width = widest();
    WIDTH.store(width, Ordering::Relaxed);
    1 << width
}

/// The vector width in bytes that [`detect`] found; 1 before it was called.
#[must_use]
pub fn width() -> usize {
    1 << WIDTH.load(Ordering::Relaxed)
}

fn widest() -> u8 {
    const OSXSAVE_AVX: u32 = 1 << 27 | 1 << 28;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE_AVX != OSXSAVE_AVX {
        return SSE2;
    }
    let features = __cpuid_count(7, 0).ebx;
    // SAFETY: OSXSAVE says that xgetbv is there.
    let enabled = unsafe { xcr0() };
    if features & 1 << 16 != 0 && enabled & 0xe6 == 0xe6 {
        AVX512
    } else if features & 1 << 5 != 0 && enabled & 0x6 == 0x6 {
        AVX2
    } else {
        SSE2
    }
}

#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: the caller has seen OSXSAVE.
    unsafe { _xgetbv(0) }
}

/// Copies `len` bytes.
///
/// # Safety
/// Both ranges are mapped and do not overlap. Either may be shared with another VM.
#[inline(always)]
pub unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: every access below lies inside `len` bytes from either pointer: the callers of the
    // fixed-width pieces compare `len` first, and the last piece ends at `len`.
    unsafe {
        if len > SHORT {
            match WIDTH.load(Ordering::Relaxed) {
                AVX512 => copy_avx512(to, from, len),
                AVX2 => copy_avx2(to, from, len),
                _ => copy_sse2(to, from, len),
            }
        } else if len >= 16 {
            copy_sse2(to, from, len);
        } else if len >= 8 {
            let (a, b) = (load::<u64>(from), load::<u64>(from.add(len - 8)));
            to.cast::<u64>().write_unaligned(a);
            to.add(len - 8).cast::<u64>().write_unaligned(b);
        } else if len >= 4 {
            let (a, b) = (load::<u32>(from), load::<u32>(from.add(len - 4)));
            to.cast::<u32>().write_unaligned(a);
            to.add(len - 4).cast::<u32>().write_unaligned(b);
        } else {
            for i in 0..len {
                to.add(i).write(from.add(i).read());
            }
        }
    }
}

/// Whether `len` bytes are the same.
///
/// # Safety
/// Both ranges are mapped. Either may be shared with another VM.
#[inline(always)]
#[must_use]
pub unsafe fn equal(a: *const u8, b: *const u8, len: usize) -> bool {
    // SAFETY: as in `copy`.
    unsafe {
        if len > SHORT {
            match WIDTH.load(Ordering::Relaxed) {
                AVX512 => equal_avx512(a, b, len),
                AVX2 => equal_avx2(a, b, len),
                _ => equal_sse2(a, b, len),
            }
        } else if len >= 16 {
            equal_sse2(a, b, len)
        } else if len >= 8 {
            load::<u64>(a) == load::<u64>(b)
                && load::<u64>(a.add(len - 8)) == load::<u64>(b.add(len - 8))
        } else if len >= 4 {
            load::<u32>(a) == load::<u32>(b)
                && load::<u32>(a.add(len - 4)) == load::<u32>(b.add(len - 4))
        } else {
            (0..len).all(|i| a.add(i).read() == b.add(i).read())
        }
    }
}

use crate::line::LINE;

/// The longest frame that is asked for together with the rest of its burst. Of longer ones the lines that are needed first would wait for those of the whole burst.
const TOGETHER: usize = 4 * LINE;
/// As much of a frame as is asked for: where one goes on, the processor has found out by itself.
const MOST: usize = 24 * LINE;

/// Asks for a frame that is about to be read, with the others of its burst, so that the lines of all travel at the same time; a long one is left to
/// [`fetch_next`]. Wherever it points, it does no harm.
#[inline(always)]
pub fn fetch(from: *const u8, len: usize) {
    if len <= TOGETHER {
        each_line(len, |at| read_soon(from.wrapping_add(at)));
    }
}

/// The same for what is about to be written: the lines come to stay.
#[inline(always)]
pub fn fetch_to_write(to: *mut u8, len: usize) {
    if len <= TOGETHER {
        each_line(len, |at| write_soon(to.wrapping_add(at)));
    }
}

/// Asks for a long frame that is read next, while the one before it is: a short one is on its way already.
#[inline(always)]
pub fn fetch_next(from: *const u8, len: usize) {
    #[inline(never)]
    fn long(from: *const u8, len: usize) {
        each_line(len.min(MOST), |at| read_soon(from.wrapping_add(at)));
    }
    if len > TOGETHER {
        long(from, len);
    }
}

/// The same for what is written next.
#[inline(always)]
pub fn fetch_next_to_write(to: *mut u8, len: usize) {
    #[inline(never)]
    fn long(to: *mut u8, len: usize) {
        each_line(len.min(MOST), |at| write_soon(to.wrapping_add(at)));
    }
    if len > TOGETHER {
        long(to, len);
    }
}

/// Calls `ask` with where each line of `len` bytes starts.
#[inline(always)]
fn each_line(len: usize, ask: impl Fn(usize)) {
    let mut at = 0;
    while at < len {
        ask(at);
        at += LINE;
    }
}

#[inline(always)]
fn read_soon(from: *const u8) {
    // SAFETY: a prefetch reads nothing and does not fault, wherever it points.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) };
}

#[inline(always)]
fn write_soon(to: *mut u8) {
    // SAFETY: as above. (`_mm_prefetch` makes this instruction only for targets that are said to have it; processors without it do nothing.)
    unsafe {
        asm!("prefetchw [{}]", in(reg) to.addr(), options(nomem, nostack, preserves_flags));
    }
}

/// One unaligned load.
///
/// # Safety
/// `size_of::<T>()` bytes from `from` are mapped, and any bytes make a `T`.
#[inline(always)]
pub(crate) unsafe fn load<T: Copy>(from: *const u8) -> T {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<T>().read_unaligned() }
}

/// Copies and compares in vectors of one width; the last vector overlaps the one before it.
macro_rules! vectors {
    ($copy:ident, $equal:ident, $vector:ty, $load:path, $store:path, $same:expr, $(#[$attr:meta])*) => {
        $(#[$attr])*
        unsafe fn $copy(to: *mut u8, from: *const u8, len: usize) {
            const N: usize = size_of::<$vector>();
            // SAFETY: `len >= N`, and each vector ends at or before `len`.
            unsafe {
                let mut at = 0;
                while at + N < len {
                    $store(to.add(at).cast(), $load(from.add(at).cast()));
                    at += N;
                }
                $store(to.add(len - N).cast(), $load(from.add(len - N).cast()));
            }
        }

        $(#[$attr])*
        unsafe fn $equal(a: *const u8, b: *const u8, len: usize) -> bool {
            const N: usize = size_of::<$vector>();
            // SAFETY: as above.
            unsafe {
                let same = $same;
                let mut at = 0;
                while at + N < len {
                    if !same($load(a.add(at).cast()), $load(b.add(at).cast())) {
                        return false;
                    }
                    at += N;
                }
                same($load(a.add(len - N).cast()), $load(b.add(len - N).cast()))
            }
        }
    };
}

vectors!(
    copy_sse2,
    equal_sse2,
    __m128i,
    _mm_loadu_si128,
    _mm_storeu_si128,
    |x: __m128i, y: __m128i| _mm_movemask_epi8(_mm_cmpeq_epi8(x, y)) == 0xffff,
    #[inline(always)]
);
vectors!(
    copy_avx2,
    equal_avx2,
    __m256i,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    |x: __m256i, y: __m256i| _mm256_movemask_epi8(_mm256_cmpeq_epi8(x, y)) == -1,
    #[target_feature(enable = "avx2")]
);
vectors!(
    copy_avx512,
    equal_avx512,
    __m512i,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    |x: __m512i, y: __m512i| _mm512_cmpneq_epi64_mask(x, y) == 0,
    #[target_feature(enable = "avx512f")]
);

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn copies_exactly_the_range_at_every_width_and_length() {
        let source: Vec<u8> = (0..2048u32)
            .map(|i| (i * 7 + i / 256).to_le_bytes()[0])
            .collect();
        for width in [SSE2, widest()] {
            WIDTH.store(width, Ordering::Relaxed);
            for len in (0..300).chain([1500, 1518, 2000]) {
                let mut target = [0xa5u8; 2100];
                // SAFETY: both arrays are longer than the range.
                unsafe { copy(target.as_mut_ptr().add(3), source.as_ptr().add(1), len) };
                assert_eq!(&target[3..3 + len], &source[1..=len]);
                assert!(
                    target[..3]
                        .iter()
                        .chain(&target[3 + len..])
                        .all(|&b| b == 0xa5)
                );
            }
        }
    }

    #[test]
    fn finds_a_difference_in_any_byte() {
        let a: Vec<u8> = (0..1600u32).map(|i| i.to_le_bytes()[0]).collect();
        for width in [SSE2, widest()] {
            WIDTH.store(width, Ordering::Relaxed);
            for len in (1..200).chain([1518]) {
                let mut b = a.clone();
                // SAFETY: both are longer than the range.
                assert!(unsafe { equal(a.as_ptr(), b.as_ptr(), len) });
                for at in 0..len {
                    b[at] ^= 0x10;
                    // SAFETY: as above.
                    let same = unsafe { equal(a.as_ptr(), b.as_ptr(), len) };
                    assert!(!same, "byte {at} of {len}");
                    b[at] ^= 0x10;
                }
            }
        }
    }
}

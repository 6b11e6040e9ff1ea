//! Stretches of memory that make up a frame which does not lie in one.
//!
//! Unsafe code: a piece is an address and a length, and says nothing of what is there; whoever makes one or reads from it says why that may be.
#![allow(unsafe_code)]

/// A stretch of mapped memory that may be shared with the peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) ptr: *mut u8,
    pub(crate) len: usize,
}

// SAFETY: the memory belongs to no thread; each access is justified where it is made.
unsafe impl Send for Piece {}
// SAFETY: as for `Send`; it has no interior state.
unsafe impl Sync for Piece {}

impl Piece {
    pub(crate) const NONE: Self = Self {
        ptr: core::ptr::null_mut(),
        len: 0,
    };

    /// What is behind the first `skip` bytes of it.
    #[inline(always)]
    fn behind(self, skip: usize) -> Self {
        Self {
            ptr: self.ptr.wrapping_add(skip),
            len: self.len.saturating_sub(skip),
        }
    }
}

/// Bytes in all of them.
pub(crate) fn total(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.len).sum()
}

/// Calls `each` with the parts of `len` bytes from `offset` on, one behind the other: where it is, and what was before it. Stops where that says `false`. Returns whether
/// `each` took all of them.
pub(crate) fn walk(
    pieces: impl IntoIterator<Item = Piece>,
    offset: usize,
    len: usize,
    mut each: impl FnMut(Piece, usize) -> bool,
) -> bool {
    let (mut skip, mut done) = (offset, 0);
    for piece in pieces {
        if done == len {
            break;
        }
        let part = piece.behind(skip);
        skip = skip.saturating_sub(piece.len);
        let part = Piece {
            len: part.len.min(len - done),
            ..part
        };
        if part.len > 0 && !each(part, done) {
            return false;
        }
        done += part.len;
    }
    done == len
}

/// Takes the first `skip` bytes off: what is left, without pieces that are empty now.
pub(crate) fn strip(pieces: &mut [Piece], mut skip: usize) -> &[Piece] {
    let inside = pieces.iter().position(|piece| {
        let inside = skip < piece.len;
        if !inside {
            skip -= piece.len;
        }
        inside
    });
    let Some(left) = inside.and_then(|at| pieces.get_mut(at..)) else {
        return &[];
    };
    if let Some(first) = left.first_mut() {
        *first = first.behind(skip);
    }
    left
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    fn pieces(bytes: &mut [u8], lens: &[usize]) -> Vec<Piece> {
        let mut at = 0;
        let parts = lens.iter().map(|&len| {
            let ptr = bytes[at..at + len].as_mut_ptr();
            at += len;
            Piece { ptr, len }
        });
        parts.collect()
    }

    #[test]
    fn every_range_is_walked_once_and_one_that_is_too_long_is_told() {
        let mut bytes = [0; 20];
        let start = bytes.as_ptr().addr();
        for lens in [&[20][..], &[3, 0, 7, 10], &[1, 1, 18], &[0, 20]] {
            let all = pieces(&mut bytes, lens);
            for offset in 0..=20 {
                for len in 0..=21 - offset {
                    let mut seen = Vec::new();
                    let whole = walk(all.iter().copied(), offset, len, |part, done| {
                        assert_eq!(seen.len(), done);
                        assert!(part.len > 0);
                        let at = part.ptr.addr() - start;
                        seen.extend(at..at + part.len);
                        true
                    });
                    let end = (offset + len).min(20);
                    assert_eq!(seen, (offset..end).collect::<Vec<_>>());
                    assert_eq!(whole, offset + len <= 20, "{lens:?} {offset} {len}");
                }
            }
        }
    }

    #[test]
    fn stripping_leaves_the_rest_in_its_place() {
        let mut bytes = [0; 20];
        for lens in [&[20][..], &[12, 8], &[5, 7, 8], &[5, 9, 6], &[0, 3, 17]] {
            for skip in 0..=21 {
                let mut all = pieces(&mut bytes, lens);
                let end = all.last().unwrap().ptr.addr() + all.last().unwrap().len;
                let left = strip(&mut all, skip);
                assert_eq!(total(left), 20_usize.saturating_sub(skip));
                if let Some(first) = left.first() {
                    assert_eq!(first.ptr.addr(), end - (20 - skip));
                    assert!(first.len > 0);
                }
            }
        }
    }
}

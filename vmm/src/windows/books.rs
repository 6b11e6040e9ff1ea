//! What is mapped where in a window: the record, apart from what the host's memory management does with it.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use devices::host::{Access, Permission};

/// Part of a peer's file at an offset of the window.
#[derive(Clone)]
pub(super) struct Mapping {
    pub(super) file: Arc<File>,
    pub(super) file_offset: u64,
    pub(super) len: u64,
    pub(super) permission: Permission,
    /// The page size of the file.
    pub(super) page: u64,
    /// The file's owner cannot cut it off.
    pub(super) sealed: bool,
    /// Whether the guest reaches it by memory, as far as the processor knows its permission; else by the software path alone.
    pub(super) native: bool,
}

impl Mapping {
    /// The processor has no pages that can only be written, so that such a mapping is never shown.
    pub(super) fn readable(&self) -> bool {
        self.permission.read
    }

    /// `len` bytes from `start` on.
    fn part(&self, start: u64, len: u64) -> Self {
        Mapping {
            file_offset: self.file_offset + start,
            len,
            ..self.clone()
        }
    }
}

/// Mappings by offset; they do not overlap. Ranges given do not overflow.
#[derive(Default)]
pub(super) struct Books(BTreeMap<u64, Mapping>);

/// What [`Books::cut`] took out and put back.
#[derive(Default)]
pub(super) struct Cut {
    /// Whole mappings that were touched, in ascending order.
    pub(super) removed: Vec<(u64, Mapping)>,
    /// What was left of them at the two ends; they are in the books again.
    pub(super) left: Vec<(u64, u64)>,
}

impl Cut {
    /// From the first touched mapping's first byte to behind the last one's last.
    pub(super) fn hull(&self) -> Option<(u64, u64)> {
        let (first, (last, mapping)) = (self.removed.first()?.0, self.removed.last()?);
        Some((first, last + mapping.len))
    }
}

impl Books {
    pub(super) fn get_mut(&mut self, offset: u64) -> Option<&mut Mapping> {
        self.0.get_mut(&offset)
    }

    /// A mapping that shares bytes with the range: the last one.
    pub(super) fn overlap(&self, start: u64, end: u64) -> Option<(u64, &Mapping)> {
        let (at, mapping) = self.0.range(..end).next_back()?;
        (at + mapping.len > start).then_some((*at, mapping))
    }

    /// The mapping that `offset` lies in, and where it starts.
    pub(super) fn at(&self, offset: u64) -> Option<(u64, &Mapping)> {
        self.overlap(offset, offset.checked_add(1)?)
    }

    /// Adds what overlaps nothing.
    pub(super) fn insert(&mut self, offset: u64, mapping: Mapping) {
        self.0.insert(offset, mapping);
    }

    /// Removes what is mapped in the range; a mapping that lies across an end keeps its part outside.
    pub(super) fn cut(&mut self, start: u64, end: u64) -> Cut {
        let mut cut = Cut::default();
        while let Some((at, _)) = self.overlap(start, end) {
            let Some(mapping) = self.0.remove(&at) else {
                break;
            };
            let behind = at + mapping.len;
            if behind > end {
                self.put_back(end, mapping.part(end - at, behind - end), &mut cut);
            }
            if at < start {
                self.put_back(at, mapping.part(0, start - at), &mut cut);
            }
            cut.removed.push((at, mapping));
        }
        cut.removed.reverse();
        cut
    }

    fn put_back(&mut self, offset: u64, part: Mapping, cut: &mut Cut) {
        cut.left.push((offset, part.len));
        self.insert(offset, part);
    }

    /// Where in which files `len` bytes from `offset` on lie, in pieces; `None` where not all of it allows `access`.
    pub(super) fn pieces(&self, offset: u64, len: u64, access: Access) -> Option<Vec<Piece>> {
        let end = offset.checked_add(len)?;
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < end {
            let (start, mapping) = self.at(at)?;
            if !mapping.permission.allows(access) {
                return None;
            }
            let stop = end.min(start + mapping.len);
            pieces.push(Piece {
                file: Arc::clone(&mapping.file),
                file_offset: mapping.file_offset + (at - start),
                len: stop - at,
                page: mapping.page,
            });
            at = stop;
        }
        Some(pieces)
    }
}

/// A part of an access that lies in one mapping.
pub(super) struct Piece {
    pub(super) file: Arc<File>,
    pub(super) file_offset: u64,
    pub(super) len: u64,
    pub(super) page: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(file: &Arc<File>, file_offset: u64, len: u64, permission: Permission) -> Mapping {
        Mapping {
            file: Arc::clone(file),
            file_offset,
            len,
            permission,
            page: 0x1000,
            sealed: true,
            native: true,
        }
    }

    fn books(mappings: &[(u64, u64)]) -> Books {
        let file = Arc::new(File::open("/dev/null").unwrap());
        let mut books = Books::default();
        for (offset, len) in mappings {
            let file_offset = 0x10_0000 + offset;
            books.insert(
                *offset,
                mapping(&file, file_offset, *len, Permission::READ_WRITE),
            );
        }
        books
    }

    fn ranges(books: &Books) -> Vec<(u64, u64)> {
        books.0.iter().map(|(at, m)| (*at, m.len)).collect()
    }

    #[test]
    fn a_cut_splits_and_each_rest_keeps_its_place_in_the_file() {
        let mut books = books(&[(0x1000, 0x5000), (0x8000, 0x2000), (0xC000, 0x1000)]);
        let cut = books.cut(0x2000, 0x9000);
        assert_eq!(cut.removed.len(), 2);
        assert_eq!(cut.hull(), Some((0x1000, 0xA000)));
        assert_eq!(
            ranges(&books),
            [(0x1000, 0x1000), (0x9000, 0x1000), (0xC000, 0x1000)]
        );
        let cut = books.cut(0, 0x1000);
        assert!(cut.removed.is_empty() && cut.hull().is_none());
        for (at, mapping) in &books.0 {
            assert_eq!(mapping.file_offset, 0x10_0000 + at);
        }
        let mut books = self::books(&[(0, 0x3000)]);
        books.cut(0x1000, 0x2000);
        assert_eq!(ranges(&books), [(0, 0x1000), (0x2000, 0x1000)]);
        assert_eq!(books.at(0x2FFF).unwrap().1.file_offset, 0x10_2000);
    }

    #[test]
    fn an_overlap_is_seen_from_every_side_and_a_neighbour_is_none() {
        let books = books(&[(0x1000, 0x1000), (0x4000, 0x2000)]);
        for (start, end, overlaps) in [
            (0, 0x1000, false),
            (0, 0x1001, true),
            (0x1FFF, 0x2000, true),
            (0x2000, 0x4000, false),
            (0x3000, 0x7000, true),
            (0x5000, 0x5001, true),
            (0x6000, u64::MAX, false),
            (0, u64::MAX, true),
        ] {
            assert_eq!(
                books.overlap(start, end).is_some(),
                overlaps,
                "{start:#x}..{end:#x}"
            );
        }
    }

    #[test]
    fn an_access_goes_through_only_where_every_byte_allows_it() {
        let mut books = books(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x4000, 0x1000)]);
        if let Some(mapping) = books.get_mut(0x2000) {
            mapping.permission = Permission::READ;
        }
        let pieces = books.pieces(0x1FFC, 8, Access::Read).unwrap();
        let parts: Vec<_> = pieces.iter().map(|p| (p.file_offset, p.len)).collect();
        assert_eq!(parts, [(0x10_1FFC, 4), (0x10_2000, 4)]);
        assert!(books.pieces(0x1FFC, 8, Access::Write).is_none());
        assert!(books.pieces(0x1FFC, 4, Access::Write).is_some());
        assert!(books.pieces(0x2FFF, 2, Access::Read).is_none());
        assert!(books.pieces(0x3FFF, 2, Access::Read).is_none());
        assert!(books.pieces(u64::MAX, 2, Access::Read).is_none());
    }
}

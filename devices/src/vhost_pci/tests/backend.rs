//! The state machine alone, over a machine that takes everything: what is refused is refused by itself.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::host::{Permission, SharedRegion};
use crate::vhost_pci::backend::{Backend, Fault, Line, Machine, Refusal, Step};
use crate::vhost_user::SingleMemoryRegion;

/// Remembers what it shows; the map with this number fails.
#[derive(Default)]
pub(super) struct Books {
    shown: BTreeSet<u64>,
    maps: usize,
    fail_at: Option<usize>,
}

impl Machine for Books {
    fn map(
        &mut self,
        offset: u64,
        _region: &SharedRegion,
        _permission: Permission,
    ) -> io::Result<()> {
        self.maps += 1;
        if self.fail_at == Some(self.maps) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        assert!(self.shown.insert(offset), "shown twice");
        Ok(())
    }
    fn unmap(&mut self, offset: u64, _len: u64) -> io::Result<()> {
        assert!(self.shown.remove(&offset), "not shown");
        Ok(())
    }
    takes_the_rest!();
}

fn apply(backend: &mut Backend, books: &mut Books, message: Message) -> Result<Step, Fault> {
    backend.front_end(message, books)
}

fn refusal(result: Result<Step, Fault>) -> Refusal {
    match result {
        Err(Fault::Refused(_, refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_front_end_has_at_most_32_regions() {
    let file = memory(0);
    let mut books = Books::default();
    let mut backend = Backend::new(WINDOW, QUEUES, false);
    let agreed = U64(protocol_features::CONFIGURE_MEM_SLOTS);
    let agree = Message::request(requests::SET_PROTOCOL_FEATURES, &agreed);
    apply(&mut backend, &mut books, agree).unwrap();
    let regions: Vec<_> = (0..33).map(|n| region(n * 0x2000, 0x1000)).collect();
    let all = apply(&mut backend, &mut books, table(&regions, &file));
    assert!(matches!(all, Err(Fault::Payload(..))), "{all:?}");
    apply(&mut backend, &mut books, table(&regions[..32], &file)).unwrap();
    let last = Message::request(requests::ADD_MEM_REG, &SingleMemoryRegion(regions[32]))
        .with_fds(vec![fd(&file)]);
    let one_more = apply(&mut backend, &mut books, last);
    assert!(matches!(refusal(one_more), Refusal::TooMany));
    assert_eq!(books.shown.len(), 32);
}

#[test]
fn tables_are_checked_before_anything_is_touched() {
    let file = memory(0);
    let mut books = Books::default();
    let mut backend = Backend::new(WINDOW, QUEUES, false);
    let mut check =
        |regions: &[MemoryRegion]| refusal(apply(&mut backend, &mut books, table(regions, &file)));
    let page = |at| region(at, 0x1000);
    assert!(matches!(
        check(&[page(0x2000), region(0, 0x2001)]),
        Refusal::Shape(_)
    ));
    assert!(matches!(
        check(&[region(0x1000, 0x2000), page(0x2000)]),
        Refusal::Overlap(0x2000)
    ));
    assert!(matches!(
        check(&[page(0x2000), region(0, 0x3000)]),
        Refusal::Overlap(0x2000)
    ));
    assert!(matches!(
        check(&[page(0), page(WINDOW)]),
        Refusal::BeyondWindow(..)
    ));
    assert!(matches!(
        check(&[region(WINDOW - 0x1000, 0x2000)]),
        Refusal::BeyondWindow(..)
    ));
    assert!(matches!(
        check(&[region(!0xfff, 0x1000)]),
        Refusal::Shape(_)
    ));
    assert_eq!(books.maps, 0);
    // The edges are inside.
    let edges = [
        region(0, 0x1000),
        region(0x1000, 0x1000),
        region(WINDOW - 0x1000, 0x1000),
    ];
    apply(&mut backend, &mut books, table(&edges, &file)).unwrap();
    assert_eq!(books.shown.len(), 3);
}

#[test]
fn a_table_that_fails_half_way_leaves_the_old_one_and_its_books() {
    let file = memory(0);
    let old = [region(0, 0x1000), region(0x1000, 0x1000)];
    let new = [
        region(0x1000, 0x1000),
        region(0x4000, 0x1000),
        region(0x8000, 0x1000),
    ];
    let mut books = Books {
        fail_at: Some(4),
        ..Books::default()
    };
    let mut backend = Backend::new(WINDOW, QUEUES, false);
    apply(&mut backend, &mut books, table(&old, &file)).unwrap();
    let result = apply(&mut backend, &mut books, table(&new, &file));
    assert!(matches!(refusal(result), Refusal::Map(..)));
    assert_eq!(books.shown, BTreeSet::from([0, 0x1000]));
    // Everything that is shown is known: an empty table takes all of it away.
    apply(&mut backend, &mut books, table(&[], &file)).unwrap();
    assert_eq!(books.shown, BTreeSet::new());
}

proptest! {
    /// Whatever tables come, what is shown is exactly the last one that was accepted.
    #[test]
    fn the_window_shows_the_last_accepted_table(
        tables in prop::collection::vec(prop::collection::vec((0u64..12, 0u64..4), 0..6), 1..12),
        fail_at in prop::option::of(1usize..20),
    ) {
        let file = memory(0);
        let mut books = Books { fail_at, ..Books::default() };
        let mut backend = Backend::new(10 * 0x1000, QUEUES, false);
        let mut accepted = BTreeSet::new();
        for pages in tables {
            let regions: Vec<_> = pages.iter().map(|(at, len)| region(at * 0x1000, len * 0x1000)).collect();
            if apply(&mut backend, &mut books, table(&regions, &file)).is_ok() {
                accepted = regions.iter().map(|r| r.guest_address).collect();
                prop_assert_eq!(accepted.len(), regions.len());
                prop_assert!(pages.iter().all(|(at, len)| *len > 0 && at + len <= 10));
            }
            prop_assert_eq!(&books.shown, &accepted);
        }
    }
}

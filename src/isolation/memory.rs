//! The back-end's guest reaches for memory that it was not given.

use super::lab::{BACK, FRONT, Lab, PAGE, Peek, RAM, RANGE, Scene, Tried, WINDOW, amiss};
use super::report::{Finding, From};
use super::{ALL, Attack, Modes, SEEN};
use crate::cli::isolation::Mode;
use crate::cli::rings::Layout;

/// What a processor moves with one ordinary instruction.
const NARROW: [u64; 4] = [1, 2, 4, 8];
/// And with a vector one.
const WIDE: [u64; 3] = [16, 32, 64];
/// How often a page is used again.
const REUSES: u64 = 64;

/// All of them.
pub fn attacks() -> Vec<Attack> {
    let (bare, open) = (Scene::Bare, Scene::Open(Layout::Split));
    let attack = |name, scene, modes: Modes, run: fn(&mut Lab) -> Tried<Finding>| {
        Attack::new(name, From::BackEnd, scene, modes, run)
    };
    vec![
        attack("read-before-attach", bare, ALL, |lab| {
            read_unmapped(lab, &NARROW)
        }),
        attack("write-before-attach", bare, ALL, |lab| {
            write_unmapped(lab, &NARROW)
        }),
        attack("read-attached-nothing-mapped", bare, ALL, attached).spoiling(),
        attack("read-unmapped", open, ALL, |lab| {
            read_unmapped(lab, &NARROW)
        }),
        attack("read-unmapped-vector", open, ALL, |lab| {
            read_unmapped(lab, &WIDE)
        }),
        attack("write-unmapped", open, ALL, |lab| {
            write_unmapped(lab, &NARROW)
        }),
        attack("write-unmapped-vector", open, ALL, |lab| {
            write_unmapped(lab, &WIDE)
        }),
        attack("read-just-below-a-window", open, SEEN, |lab| {
            read_beside(lab, 0)
        }),
        attack("read-just-above-a-window", open, SEEN, |lab| {
            read_beside(lab, 2)
        }),
        attack("write-beside-a-window", open, SEEN, write_beside),
        attack("read-between-windows", open, SEEN, |lab| {
            between(lab, false)
        }),
        attack("write-between-windows", open, SEEN, |lab| {
            between(lab, true)
        }),
        attack("read-across-the-upper-edge", open, SEEN, |lab| {
            read_across(lab, true)
        }),
        attack("read-across-the-lower-edge", open, SEEN, |lab| {
            read_across(lab, false)
        }),
        attack("write-across-the-edges", open, SEEN, write_across),
        attack("write-read-only", open, SEEN, |lab| {
            write_read_only(lab, &NARROW)
        }),
        attack("write-read-only-vector", open, SEEN, |lab| {
            write_read_only(lab, &WIDE)
        }),
        attack("read-write-only", open, SEEN, |lab| {
            read_write_only(lab, &NARROW)
        }),
        attack("read-write-only-vector", open, SEEN, |lab| {
            read_write_only(lab, &WIDE)
        }),
        attack("access-none", open, SEEN, access_none),
        attack("sweep-guest-physical-addresses", open, ALL, sweep_physical),
        attack("sweep-whole-window", open, ALL, sweep_window),
        attack("read-beyond-the-input-range", open, ALL, |lab| {
            read_at(lab, RANGE, 64 * PAGE)
        }),
        attack("read-top-of-the-window", open, ALL, |lab| {
            read_at(lab, WINDOW - 4 * PAGE, 4 * PAGE)
        }),
        attack("read-wrapped-addresses", open, ALL, wrapped),
        attack("read-after-unmap", open, SEEN, |lab| {
            after_unmap(lab, false)
        }),
        attack("write-after-unmap", open, SEEN, |lab| {
            after_unmap(lab, true)
        }),
        attack("page-used-again-after-unmap", open, SEEN, used_again),
        attack("neighbour-unmapped", open, SEEN, neighbour_unmapped),
        attack("mapped-again-smaller", open, SEEN, mapped_smaller),
        attack("address-leads-elsewhere", open, SEEN, elsewhere),
        attack("downgrade-to-read-only", open, SEEN, downgrade),
        attack("read-after-detach", open, SEEN, after_detach).spoiling(),
        attack(
            "read-after-detach-and-attach",
            open,
            SEEN,
            after_attach_again,
        )
        .spoiling(),
        attack(
            "read-ram-beside-memory-for-devices",
            Scene::Apart,
            SEEN,
            read_ram,
        ),
    ]
}

/// Only the memory for devices is shared (`--memory dma=`): the RAM cannot be seen even where there is no IOMMU, and an IOMMU maps none of it.
fn read_ram(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, iova, seed) = (lab.pages(1)?, lab.plot(), lab.seed());
    if gpa < RAM {
        return amiss(format!("{gpa:#x} is not memory for devices"));
    }
    lab.fill(gpa, PAGE, seed)?;
    lab.map(iova, gpa, PAGE, "rw")?;
    lab.control(lab.at(iova, gpa), seed)?;
    let mut tally = Tally { tries: 0, got: 0 };
    let ram = lab.plot();
    // The guest's image lies at 1 MiB: there is something to be read.
    let line = format!("map iova={ram} gpa={} len={PAGE} perm=r", 1 << 20);
    if let Some(status) = lab.try_request(&line)? {
        tally.tries += 1;
        tally.got += u64::from(status == 0);
    }
    for (offset, len, step) in [(0, RAM, PAGE), (1 << 20, 1 << 20, 64), (ram, PAGE, 8)] {
        let peek = lab.peek(offset, len, step, 8, 0)?;
        tally.tries += peek.reads;
        tally.got += peek.seen();
    }
    lab.unmap(iova, PAGE)?;
    tally.finish(lab)
}

/// What an attack on memory came to.
struct Tally {
    tries: u64,
    got: u64,
}

impl Tally {
    fn new() -> Self {
        Self { tries: 0, got: 0 }
    }

    /// Nothing is to be seen there.
    fn nothing(&mut self, peek: Peek) {
        self.tries += peek.reads;
        self.got += peek.seen();
    }

    /// Something may be seen there, but no secret.
    fn no_secret(&mut self, peek: Peek) {
        self.tries += peek.reads;
        self.got += peek.secrets;
    }

    fn finish(self, lab: &mut Lab) -> Tried<Finding> {
        if self.tries == 0 {
            return amiss("not one access was made");
        }
        let mut noticed = lab.complaints(FRONT)?;
        match lab.faults()? {
            0 => {}
            1 => noticed.push("1 fault".to_owned()),
            n => noticed.push(format!("{n} faults")),
        }
        Ok(Finding {
            tries: self.tries,
            got_through: self.got,
            noticed: super::or_nothing(&noticed),
        })
    }
}

/// A page full of secrets that is not mapped: its guest physical address and its seed.
fn secret(lab: &mut Lab, pages: u64) -> Tried<(u64, u64)> {
    let (gpa, seed) = (lab.pages(pages)?, lab.seed());
    lab.fill(gpa, pages * PAGE, seed)?;
    Ok((gpa, seed))
}

/// Where the attacker might guess a page: where it would be mapped, and where drivers map by habit.
fn guesses(lab: &mut Lab, gpa: u64) -> [u64; 3] {
    let iova = lab.plot();
    match lab.mode() {
        Mode::Whole => [gpa; 3],
        _ => [iova, gpa, gpa + (4 << 30)],
    }
}

fn read_unmapped(lab: &mut Lab, widths: &[u64]) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, seed) = secret(lab, 1)?;
    let mut tally = Tally::new();
    for offset in guesses(lab, gpa) {
        for &width in widths {
            tally.nothing(lab.peek(offset, PAGE, 64, width, seed)?);
        }
        tally.nothing(lab.peek(offset, 64, widths[0], widths[0], seed)?);
    }
    tally.finish(lab)
}

fn write_unmapped(lab: &mut Lab, widths: &[u64]) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, seed) = secret(lab, 1)?;
    let other = lab.seed();
    let mut tally = Tally::new();
    for offset in guesses(lab, gpa) {
        for &width in widths {
            tally.tries += lab.poke(offset, PAGE, 64, width, other)?;
        }
    }
    tally.got = lab.wrong(gpa, PAGE, seed)?;
    tally.finish(lab)
}

fn attached(lab: &mut Lab) -> Tried<Finding> {
    lab.attach()?;
    read_unmapped(lab, &NARROW)
}

/// Three pages side by side, of which the one in the middle is mapped: address of the first, where the attacker sees it, seeds.
struct Three {
    gpa: u64,
    iova: u64,
    offset: u64,
    seeds: [u64; 3],
}

impl Three {
    fn page(&self, n: u64) -> u64 {
        self.gpa + n * PAGE
    }

    fn at(&self, n: u64) -> u64 {
        self.offset + n * PAGE
    }

    /// Pages filled, `mapped` of them mapped.
    fn new(lab: &mut Lab, mapped: [bool; 3], perm: &str) -> Tried<Self> {
        lab.forget()?;
        let (gpa, iova) = (lab.pages(3)?, lab.plot());
        let three = Self {
            gpa,
            iova,
            offset: lab.at(iova, gpa),
            seeds: [lab.seed(), lab.seed(), lab.seed()],
        };
        for n in 0..3 {
            lab.fill(three.page(n), PAGE, three.seed(n))?;
        }
        for (n, _) in (0..).zip(mapped).filter(|(_, mapped)| *mapped) {
            lab.map(iova + n * PAGE, three.page(n), PAGE, perm)?;
            if perm.contains('r') {
                lab.control(three.at(n), three.seed(n))?;
            }
        }
        Ok(three)
    }

    fn seed(&self, n: u64) -> u64 {
        let at = usize::try_from(n).unwrap_or(0);
        self.seeds.get(at).copied().unwrap_or_default()
    }
}

fn read_beside(lab: &mut Lab, page: u64) -> Tried<Finding> {
    let three = Three::new(lab, [false, true, false], "rw")?;
    let mut tally = Tally::new();
    let (start, seed) = (three.at(page), three.seed(page));
    for width in NARROW.into_iter().chain(WIDE) {
        tally.nothing(lab.peek(start, PAGE, 64, width, seed)?);
        // The words next to the edge.
        let near = if page == 0 { start + PAGE - 64 } else { start };
        tally.nothing(lab.peek(near, 64, width, width, seed)?);
    }
    tally.finish(lab)
}

fn write_beside(lab: &mut Lab) -> Tried<Finding> {
    let three = Three::new(lab, [false, true, false], "rw")?;
    let other = lab.seed();
    let mut tally = Tally::new();
    for page in [0, 2] {
        for width in NARROW.into_iter().chain(WIDE) {
            tally.tries += lab.poke(three.at(page), PAGE, 64, width, other)?;
        }
        tally.got += lab.wrong(three.page(page), PAGE, three.seed(page))?;
    }
    tally.finish(lab)
}

fn between(lab: &mut Lab, write: bool) -> Tried<Finding> {
    let three = Three::new(lab, [true, false, true], "rw")?;
    let other = lab.seed();
    let mut tally = Tally::new();
    for width in NARROW.into_iter().chain(WIDE) {
        if write {
            tally.tries += lab.poke(three.at(1), PAGE, 64, width, other)?;
        } else {
            tally.nothing(lab.peek(three.at(1), PAGE, 64, width, three.seed(1))?);
        }
    }
    if write {
        for page in 0..3 {
            tally.got += lab.wrong(three.page(page), PAGE, three.seed(page))?;
        }
    }
    tally.finish(lab)
}

/// One access that begins in the window and ends outside, or the other way round. Only vectors have room for a whole secret word.
fn read_across(lab: &mut Lab, upper: bool) -> Tried<Finding> {
    let three = Three::new(lab, [false, true, false], "rw")?;
    let mut tally = Tally::new();
    for width in WIDE {
        for outside in (8..width).step_by(8) {
            let (offset, seed) = if upper {
                (three.at(2) - (width - outside), three.seed(2))
            } else {
                (three.at(1) - outside, three.seed(0))
            };
            tally.no_secret(lab.peek(offset, 1, width, width, seed)?);
        }
    }
    tally.finish(lab)
}

fn write_across(lab: &mut Lab) -> Tried<Finding> {
    let three = Three::new(lab, [false, true, false], "rw")?;
    let other = lab.seed();
    let mut tally = Tally::new();
    for width in NARROW.into_iter().chain(WIDE).filter(|&width| width > 1) {
        for edge in [three.at(1), three.at(2)] {
            tally.tries += lab.poke(edge - width / 2, 1, width, width, other)?;
        }
    }
    for page in [0, 2] {
        tally.got += lab.wrong(three.page(page), PAGE, three.seed(page))?;
    }
    tally.finish(lab)
}

fn write_read_only(lab: &mut Lab, widths: &[u64]) -> Tried<Finding> {
    let three = Three::new(lab, [false, true, false], "r")?;
    let other = lab.seed();
    let mut tally = Tally::new();
    for &width in widths {
        tally.tries += lab.poke(three.at(1), PAGE, 64, width, other)?;
    }
    tally.got = lab.wrong(three.page(1), PAGE, three.seed(1))?;
    lab.control_unless_whole(three.at(1), three.seed(1))?;
    tally.finish(lab)
}

fn read_write_only(lab: &mut Lab, widths: &[u64]) -> Tried<Finding> {
    let three = Three::new(lab, [false, true, false], "w")?;
    let other = lab.seed();
    // That writes arrive shows that the window is there at all.
    lab.poke(three.at(1), 8, 8, 8, other)?;
    if lab.wrong(three.page(1), PAGE, three.seed(1))? == 0 {
        return amiss("a write to a write-only window did not arrive");
    }
    lab.fill(three.page(1), PAGE, three.seed(1))?;
    let mut tally = Tally::new();
    for &width in widths {
        tally.nothing(lab.peek(three.at(1), PAGE, 64, width, three.seed(1))?);
    }
    tally.finish(lab)
}

fn access_none(lab: &mut Lab) -> Tried<Finding> {
    let three = Three::new(lab, [false; 3], "none")?;
    let request = format!(
        "map iova={} gpa={} len={PAGE} perm=none",
        three.iova + PAGE,
        three.page(1)
    );
    // The device may refuse it: then there is nothing to see all the more.
    lab.try_request(&request)?;
    let other = lab.seed();
    let mut tally = Tally::new();
    for width in NARROW {
        tally.nothing(lab.peek(three.at(1), PAGE, 64, width, three.seed(1))?);
        tally.tries += lab.poke(three.at(1), PAGE, 64, width, other)?;
    }
    tally.got += lab.wrong(three.page(1), PAGE, three.seed(1))?;
    tally.finish(lab)
}

fn sweep_physical(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, seed) = secret(lab, 64)?;
    let mut tally = Tally::new();
    let start = gpa.saturating_sub(64 * PAGE);
    tally.no_secret(lab.peek(start, 192 * PAGE, PAGE / 2, 8, seed)?);
    tally.finish(lab)
}

fn sweep_window(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, seed) = secret(lab, 4)?;
    // A step that comes by the secret in the whole memory.
    let step = 32 << 20;
    let start = gpa % step;
    let mut tally = Tally::new();
    tally.no_secret(lab.peek(start, WINDOW - start, step, 8, seed)?);
    tally.finish(lab)
}

/// Nothing can be mapped there.
fn read_at(lab: &mut Lab, offset: u64, len: u64) -> Tried<Finding> {
    lab.forget()?;
    let seed = lab.seed();
    let mut tally = Tally::new();
    for width in [1, 8, 64] {
        tally.nothing(lab.peek(offset, len, 512, width, seed)?);
    }
    tally.finish(lab)
}

/// Addresses that lead to the secret if somebody adds without looking, or keeps too few bits.
fn wrapped(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, seed) = secret(lab, 1)?;
    let iova = lab.plot();
    let mut tally = Tally::new();
    for bit in [32, 33, 34] {
        for address in [gpa, iova] {
            let offset = address.wrapping_add(1 << bit);
            if offset + PAGE <= WINDOW {
                tally.no_secret(lab.peek(offset, PAGE, 64, 8, seed)?);
            }
        }
    }
    // Beyond the BAR the guest's own pages end: it makes no access there, and says so by counting none.
    tally.no_secret(lab.peek(WINDOW - 64, 256, 8, 8, seed)?);
    tally.finish(lab)
}

/// A page is mapped, used, unmapped, and becomes a secret.
fn after_unmap(lab: &mut Lab, write: bool) -> Tried<Finding> {
    let three = Three::new(lab, [false, true, false], "rw")?;
    lab.unmap(three.iova + PAGE, PAGE)?;
    let (seed, other) = (lab.seed(), lab.seed());
    lab.fill(three.page(1), PAGE, seed)?;
    let mut tally = Tally::new();
    for width in NARROW.into_iter().chain(WIDE) {
        if write {
            tally.tries += lab.poke(three.at(1), PAGE, 64, width, other)?;
        } else {
            tally.nothing(lab.peek(three.at(1), PAGE, 64, width, seed)?);
        }
    }
    if write {
        tally.got = lab.wrong(three.page(1), PAGE, seed)?;
    }
    tally.finish(lab)
}

fn used_again(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, iova) = (lab.pages(1)?, lab.plot());
    let offset = lab.at(iova, gpa);
    let mut tally = Tally::new();
    for _ in 0..REUSES {
        let [public, seed, other] = [lab.seed(), lab.seed(), lab.seed()];
        lab.fill(gpa, PAGE, public)?;
        lab.map(iova, gpa, PAGE, "rw")?;
        lab.control(offset, public)?;
        lab.unmap(iova, PAGE)?;
        lab.fill(gpa, PAGE, seed)?;
        tally.nothing(lab.peek(offset, 64, 8, 8, seed)?);
        tally.tries += lab.poke(offset, 64, 8, 8, other)?;
        tally.got += lab.wrong(gpa, PAGE, seed)?;
    }
    tally.finish(lab)
}

/// Of windows that lie side by side, and may have become one, the one in the middle goes.
fn neighbour_unmapped(lab: &mut Lab) -> Tried<Finding> {
    let three = Three::new(lab, [true; 3], "rw")?;
    lab.unmap(three.iova + PAGE, PAGE)?;
    let seed = lab.seed();
    lab.fill(three.page(1), PAGE, seed)?;
    let mut tally = Tally::new();
    tally.nothing(lab.peek(three.at(1), PAGE, 8, 8, seed)?);
    for page in [0, 2] {
        lab.control(three.at(page), three.seed(page))?;
    }
    tally.finish(lab)
}

fn mapped_smaller(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, iova) = (lab.pages(4)?, lab.plot());
    let (offset, public, seed) = (lab.at(iova, gpa), lab.seed(), lab.seed());
    lab.fill(gpa, 4 * PAGE, public)?;
    lab.map(iova, gpa, 4 * PAGE, "rw")?;
    lab.control(offset, public)?;
    lab.unmap(iova, 4 * PAGE)?;
    lab.map(iova, gpa, 2 * PAGE, "rw")?;
    lab.control(offset, public)?;
    lab.fill(gpa + 2 * PAGE, 2 * PAGE, seed)?;
    let mut tally = Tally::new();
    tally.nothing(lab.peek(offset + 2 * PAGE, 2 * PAGE, 32, 8, seed)?);
    tally.finish(lab)
}

/// The same device address leads to another page.
fn elsewhere(lab: &mut Lab) -> Tried<Finding> {
    let three = Three::new(lab, [true, false, false], "rw")?;
    lab.unmap(three.iova, PAGE)?;
    let seed = lab.seed();
    lab.fill(three.page(0), PAGE, seed)?;
    lab.map(three.iova, three.page(2), PAGE, "rw")?;
    let mut tally = Tally::new();
    tally.no_secret(lab.peek(three.offset, PAGE, 8, 8, seed)?);
    if lab.mode().has_iommu() {
        lab.control(three.offset, three.seed(2))?;
    }
    tally.finish(lab)
}

fn downgrade(lab: &mut Lab) -> Tried<Finding> {
    let three = Three::new(lab, [false, true, false], "rw")?;
    let other = lab.seed();
    lab.poke(three.at(1), PAGE, 64, 8, other)?;
    if lab.wrong(three.page(1), PAGE, three.seed(1))? == 0 {
        return amiss("a write to a window did not arrive");
    }
    lab.unmap(three.iova + PAGE, PAGE)?;
    lab.map(three.iova + PAGE, three.page(1), PAGE, "r")?;
    lab.fill(three.page(1), PAGE, three.seed(1))?;
    lab.control(three.at(1), three.seed(1))?;
    let mut tally = Tally::new();
    for width in NARROW.into_iter().chain(WIDE) {
        tally.tries += lab.poke(three.at(1), PAGE, 64, width, other)?;
    }
    tally.got = lab.wrong(three.page(1), PAGE, three.seed(1))?;
    tally.finish(lab)
}

/// The whole domain goes, with the rings of the network device in it.
fn after_detach(lab: &mut Lab) -> Tried<Finding> {
    let three = Three::new(lab, [true, true, true], "rw")?;
    lab.detach()?;
    let mut tally = Tally::new();
    for page in 0..3 {
        let seed = lab.seed();
        lab.fill(three.page(page), PAGE, seed)?;
        tally.nothing(lab.peek(three.at(page), PAGE, 32, 8, seed)?);
    }
    lab.expect_alive(BACK)?;
    tally.finish(lab)
}

fn after_attach_again(lab: &mut Lab) -> Tried<Finding> {
    let three = Three::new(lab, [true, true, true], "rw")?;
    lab.detach()?;
    lab.attach()?;
    let mut tally = Tally::new();
    for page in 0..3 {
        let seed = lab.seed();
        lab.fill(three.page(page), PAGE, seed)?;
        tally.nothing(lab.peek(three.at(page), PAGE, 32, 8, seed)?);
    }
    tally.finish(lab)
}

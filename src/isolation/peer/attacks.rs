//! What a hostile front-end does to the back-end.

mod memory;
mod messages;

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use devices::vhost_user::MemoryRegion;

use crate::cli::rings::Layout;
use crate::isolation::lab::{BACK, FRONT, Lab, PAGE, Scene, Tried, WINDOW, amiss};
use crate::isolation::peer::{Answer, Peer};
use crate::isolation::report::{Finding, From};
use crate::isolation::{ALL, Attack, SEEN, or_nothing};
use crate::sys;

/// Length of the files that are shown.
const FILE: u64 = 1 << 20;
/// Where they are shown.
const BASE: u64 = 1 << 30;

/// All of them. They are the same in every mode: the window shows what this front-end shows.
pub fn attacks() -> Vec<Attack> {
    let attack = |name, run: fn(&mut Lab) -> Tried<Finding>| {
        Attack::new(name, From::FrontEnd, Scene::Alone, ALL, run)
    };
    vec![
        attack("table-overlapping", |lab| {
            memory::tables(lab, &[&[region(BASE, FILE), region(BASE + FILE / 2, FILE)]])
        }),
        attack("table-wrapping", |lab| {
            let at_the_end = region(u64::MAX - (PAGE - 1), FILE);
            memory::tables(lab, &[&[at_the_end]])
        }),
        attack("table-beyond-the-window", |lab| {
            memory::tables(
                lab,
                &[&[region(WINDOW, FILE)], &[region(WINDOW - PAGE, FILE)]],
            )
        }),
        attack("table-beyond-the-file", |lab| {
            let moved = MemoryRegion {
                mmap_offset: FILE - PAGE,
                ..region(BASE, FILE)
            };
            let wrapping = MemoryRegion {
                mmap_offset: u64::MAX - (PAGE - 1),
                ..region(BASE, FILE)
            };
            memory::tables(lab, &[&[region(BASE, 2 * FILE)], &[moved], &[wrapping]])
        }),
        attack("table-parts-of-pages", |lab| {
            memory::tables(lab, &[&[region(BASE + 8, FILE)], &[region(BASE, FILE - 8)]])
        }),
        attack("table-truncated", memory::table_truncated),
        attack("table-without-files", |lab| {
            memory::file_counts(lab, &[0, 1])
        }),
        attack("table-with-too-many-files", |lab| {
            memory::file_counts(lab, &[3, 32])
        }),
        attack("table-of-files-that-are-none", memory::no_files),
        attack("file-without-seal", memory::unsealed),
        attack("file-shrunk-after-it-was-sent", memory::shrunk),
        attack("file-shrunk-although-sealed", memory::sealed_shrunk),
        attack("translations-replaced-under-access", memory::replaced),
        attack("regions-added-and-removed-wrongly", memory::wrong_regions),
        attack("kick-and-call-that-are-no-eventfds", messages::no_eventfds),
        attack("eventfds-missing", messages::missing_eventfds),
        attack("queue-that-does-not-exist", messages::no_queue),
        attack("rings-anywhere", messages::rings_anywhere),
        attack("translation-wrapping", |lab| {
            let top = u64::MAX - (PAGE - 1);
            memory::updates(
                lab,
                &[
                    (top, 2 * PAGE, BASE),
                    (top, PAGE, BASE),
                    (BASE, u64::MAX - (PAGE - 1), BASE),
                    (BASE, 2 * PAGE, top),
                ],
            )
        }),
        attack("translation-beyond-the-window", |lab| {
            memory::updates(
                lab,
                &[(WINDOW, PAGE, BASE), (WINDOW - PAGE, 2 * PAGE, BASE)],
            )
        }),
        attack("translation-beyond-the-table", |lab| {
            memory::updates(
                lab,
                &[
                    (BASE, PAGE, BASE + FILE),
                    (BASE, PAGE, BASE - PAGE),
                    (BASE, 2 * PAGE, BASE + FILE - PAGE),
                    (BASE, PAGE, 0),
                ],
            )
        }),
        attack("translation-of-parts-of-pages", |lab| {
            memory::updates(
                lab,
                &[
                    (BASE + 8, PAGE, BASE),
                    (BASE, PAGE - 8, BASE),
                    (BASE, PAGE, BASE + 8),
                    (BASE, 0, BASE),
                ],
            )
        }),
        attack("translation-flood", memory::translation_flood),
        attack("translation-outlives-its-region", memory::outlived),
        attack("translation-revoked-all-at-once", memory::revoked),
        attack("translation-messages-of-the-other-side", memory::other_side),
        attack("channel-that-never-answers", messages::silent_channel),
        attack("channel-with-garbage", messages::garbage_channel),
        attack("replies-where-requests-belong", messages::replies),
        attack("unknown-requests", messages::unknown_requests),
        attack("messages-too-long", messages::too_long),
        attack("messages-of-another-version", messages::other_version),
        attack("messages-out-of-order", messages::out_of_order),
        attack("messages-cut-short", messages::cut_short),
        attack("message-flood", messages::message_flood),
        attack("connection-flood", messages::connection_flood),
        Attack::new(
            "honest-front-end-afterwards",
            From::FrontEnd,
            Scene::Alone,
            SEEN,
            honest,
        )
        .spoiling(),
    ]
}

/// User address and guest address are the same.
fn region(address: u64, size: u64) -> MemoryRegion {
    MemoryRegion {
        guest_address: address,
        size,
        user_address: address,
        mmap_offset: 0,
    }
}

/// A file full of one byte.
fn file(byte: u8, sealed: bool) -> Tried<File> {
    let file = sys::memory_file(FILE, sealed).context("memfd")?;
    let page = [byte; 4096];
    for at in (0..FILE).step_by(4096) {
        file.write_all_at(&page, at).context("write")?;
    }
    Ok(file)
}

/// Counts what should have been refused, and hears what the back-end did.
#[derive(Default)]
struct Tally {
    tries: u64,
    got: u64,
    refused: u64,
    closed: u64,
    silent: u64,
}

impl Tally {
    /// It has to be refused.
    fn must_refuse(&mut self, answer: Answer) {
        self.may(answer);
        self.got += u64::from(!answer.refused());
    }

    /// Whatever the answer is.
    fn may(&mut self, answer: Answer) {
        self.tries += 1;
        match answer {
            Answer::Number(0) => {}
            Answer::Number(_) => self.refused += 1,
            Answer::Closed => self.closed += 1,
            Answer::Silence => self.silent += 1,
        }
    }

    /// The VM has to live: its VMM and its guest answer.
    fn finish(self, lab: &mut Lab) -> Tried<Finding> {
        lab.expect_alive(BACK)?;
        let mut noticed = Vec::new();
        for (count, what) in [
            (self.refused, "refused"),
            (self.closed, "connections closed"),
            (self.silent, "without an answer"),
        ] {
            if count > 0 {
                noticed.push(format!("{count} {what}"));
            }
        }
        noticed.extend(
            lab.complaints(BACK)?
                .into_iter()
                .filter(|text| !text.contains("dropped")),
        );
        Ok(Finding {
            tries: self.tries,
            got_through: self.got,
            noticed: or_nothing(&noticed),
        })
    }
}

/// Nothing may be seen there, whatever was asked for.
fn expect_nothing(lab: &mut Lab, tally: &mut Tally, offset: u64, len: u64) -> Tried<()> {
    let peek = lab.peek(offset, len, PAGE / 4, 8, 0)?;
    tally.tries += peek.reads;
    tally.got += peek.reads - peek.ones;
    Ok(())
}

/// The attacker's own guest must see it, or the attack proves nothing.
fn expect_shown(lab: &mut Lab, offset: u64) -> Tried<()> {
    let peek = lab.peek(offset, PAGE, 512, 8, 0)?;
    if peek.ones == 0 && peek.reads > 0 {
        return Ok(());
    }
    amiss(format!(
        "what was shown at {offset:#x} cannot be seen: {peek:?}"
    ))
}

/// The front-end is gone: nothing may be seen once the guest was told.
fn expect_nothing_soon(lab: &mut Lab, tally: &mut Tally, offset: u64) -> Tried<()> {
    // The next front-end is served only when everything of the last one is gone.
    drop(Peer::connect(lab)?);
    expect_nothing(lab, tally, offset, FILE)
}

/// A front-end whose window shows translations, with a memory table.
fn translating(lab: &mut Lab) -> Tried<Peer> {
    let mut peer = Peer::negotiate(lab, true)?;
    let shown = file(0x5a, true)?;
    match peer.table(&[region(BASE, FILE)], &[&shown])? {
        Answer::Number(0) => Ok(peer),
        answer => amiss(format!(
            "a proper memory table was answered with {answer:?}"
        )),
    }
}

/// After all that, a proper VM connects, and frames pass.
fn honest(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    lab.scene = Scene::Live(Layout::Split);
    lab.start(FRONT)?;
    let frames = lab.traffic()?;
    lab.expect_alive(FRONT)?;
    Ok(Finding {
        tries: 1,
        got_through: 0,
        noticed: format!("{frames} frames passed, every byte checked"),
    })
}

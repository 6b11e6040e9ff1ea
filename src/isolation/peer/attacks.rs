//! What a hostile front-end does to the back-end.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Context;
use devices::vhost_user::{
    Iotlb, IotlbKind, MemoryRegion, Message, Payload, SingleMemoryRegion, U64, VringAddr, VringFd,
    VringState, flags, requests,
};

use super::super::lab::{BACK, FRONT, Lab, PAGE, Scene, Tried, Trouble, WINDOW, amiss};
use super::super::report::{Finding, From};
use super::super::{ALL, Attack, SEEN};
use super::{Answer, Peer, descriptors};
use crate::cli::rings::Layout;
use crate::sys;

/// Length of the files that are shown.
const FILE: u64 = 1 << 20;
/// Where they are shown.
const BASE: u64 = 1 << 30;
/// Translations that a back-end takes at one time (docs/device.md).
const TRANSLATIONS: u64 = 32768;
/// What one access outside may wait for a front-end that does not answer.
const MISS: Duration = Duration::from_millis(50);

/// All of them. They are the same in every mode: the window shows what this front-end shows.
pub fn attacks() -> Vec<Attack> {
    let attack = |name, run: fn(&mut Lab) -> Tried<Finding>| {
        Attack::new(name, From::FrontEnd, Scene::Alone, ALL, run)
    };
    vec![
        attack("table-overlapping", |lab| {
            tables(lab, &[&[region(BASE, FILE), region(BASE + FILE / 2, FILE)]])
        }),
        attack("table-wrapping", |lab| {
            let at_the_end = region(u64::MAX - (PAGE - 1), FILE);
            tables(lab, &[&[at_the_end]])
        }),
        attack("table-beyond-the-window", |lab| {
            tables(
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
            tables(lab, &[&[region(BASE, 2 * FILE)], &[moved], &[wrapping]])
        }),
        attack("table-parts-of-pages", |lab| {
            tables(lab, &[&[region(BASE + 8, FILE)], &[region(BASE, FILE - 8)]])
        }),
        attack("table-truncated", table_truncated),
        attack("table-without-files", |lab| file_counts(lab, &[0, 1])),
        attack("table-with-too-many-files", |lab| {
            file_counts(lab, &[3, 32])
        }),
        attack("table-of-files-that-are-none", no_files),
        attack("file-without-seal", unsealed),
        attack("file-shrunk-after-it-was-sent", shrunk),
        attack("file-shrunk-although-sealed", sealed_shrunk),
        attack("translations-replaced-under-access", replaced),
        attack("regions-added-and-removed-wrongly", wrong_regions),
        attack("kick-and-call-that-are-no-eventfds", no_eventfds),
        attack("eventfds-missing", missing_eventfds),
        attack("queue-that-does-not-exist", no_queue),
        attack("rings-anywhere", rings_anywhere),
        attack("translation-wrapping", |lab| {
            let top = u64::MAX - (PAGE - 1);
            updates(
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
            updates(
                lab,
                &[(WINDOW, PAGE, BASE), (WINDOW - PAGE, 2 * PAGE, BASE)],
            )
        }),
        attack("translation-beyond-the-table", |lab| {
            updates(
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
            updates(
                lab,
                &[
                    (BASE + 8, PAGE, BASE),
                    (BASE, PAGE - 8, BASE),
                    (BASE, PAGE, BASE + 8),
                    (BASE, 0, BASE),
                ],
            )
        }),
        attack("translation-flood", translation_flood),
        attack("translation-outlives-its-region", outlived),
        attack("translation-revoked-all-at-once", revoked),
        attack("translation-messages-of-the-other-side", other_side),
        attack("channel-that-never-answers", silent_channel),
        attack("channel-with-garbage", garbage_channel),
        attack("replies-where-requests-belong", replies),
        attack("unknown-requests", unknown_requests),
        attack("messages-too-long", too_long),
        attack("messages-of-another-version", other_version),
        attack("messages-out-of-order", out_of_order),
        attack("messages-cut-short", cut_short),
        attack("message-flood", message_flood),
        attack("connection-flood", connection_flood),
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
            noticed: super::super::or_nothing(&noticed),
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

/// Memory tables that have to be refused, each on a connection of its own.
fn tables(lab: &mut Lab, all: &[&[MemoryRegion]]) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for regions in all {
        let mut peer = Peer::negotiate(lab, false)?;
        let shown = file(0x5a, true)?;
        let files: Vec<&File> = regions.iter().map(|_| &shown).collect();
        tally.must_refuse(peer.table(regions, &files)?);
        expect_nothing(lab, &mut tally, BASE, 2 * FILE)?;
    }
    tally.finish(lab)
}

/// A table's payload, then whatever is done to it.
fn table_truncated(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let whole = devices::vhost_user::MemoryTable(vec![region(BASE, FILE); 2]).encode();
    let counted = |count: u32| {
        let mut payload = whole.clone();
        payload[..4].copy_from_slice(&count.to_le_bytes());
        payload
    };
    let payloads = [
        Vec::new(),
        whole[..4].to_vec(),
        whole[..39].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        counted(1),
        counted(3),
        counted(33),
        counted(u32::MAX),
    ];
    for payload in payloads {
        let mut peer = Peer::negotiate(lab, false)?;
        let shown = file(0x5a, true)?;
        let message = Message {
            payload,
            ..Message::bare(requests::SET_MEM_TABLE)
        };
        let message = message
            .with_fds(descriptors(&[&shown, &shown])?)
            .with_need_reply(true);
        tally.must_refuse(peer.ask(&message)?);
    }
    expect_nothing(lab, &mut tally, BASE, FILE)?;
    tally.finish(lab)
}

/// A table of two regions with another number of files.
fn file_counts(lab: &mut Lab, counts: &[usize]) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for &count in counts {
        let mut peer = Peer::negotiate(lab, false)?;
        let shown = file(0x5a, true)?;
        let regions = [region(BASE, FILE), region(BASE + FILE, FILE)];
        tally.must_refuse(peer.table(&regions, &vec![&shown; count])?);
        expect_nothing(lab, &mut tally, BASE, 2 * FILE)?;
    }
    tally.finish(lab)
}

fn no_files(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let (socket, _other) = UnixStream::pair().context("socketpair")?;
    let open = |path: &str| File::open(path).with_context(|| path.to_owned());
    let none = [
        File::from(sys::eventfd().context("eventfd")?),
        File::from(OwnedFd::from(socket)),
        open("/dev/null")?,
        open("/proc/self/status")?,
        open("/")?,
    ];
    for shown in &none {
        let mut peer = Peer::negotiate(lab, false)?;
        tally.must_refuse(peer.table(&[region(BASE, FILE)], &[shown])?);
        expect_nothing(lab, &mut tally, BASE, FILE)?;
    }
    tally.finish(lab)
}

fn unsealed(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let shown = file(0x5a, false)?;
    let mut peer = Peer::negotiate(lab, false)?;
    tally.must_refuse(peer.table(&[region(BASE, FILE)], &[&shown])?);
    expect_nothing(lab, &mut tally, BASE, FILE)?;
    drop(peer);
    // And as a translation.
    let mut peer = Peer::negotiate(lab, true)?;
    let table = peer.table(&[region(BASE, FILE)], &[&shown])?;
    tally.may(table);
    if table == Answer::Number(0) {
        tally.must_refuse(peer.update(BASE, FILE, BASE)?);
    }
    expect_nothing(lab, &mut tally, BASE, FILE)?;
    tally.finish(lab)
}

/// What a guest touches of a file that has become shorter would take its VMM down.
fn shrunk(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let shown = file(0x5a, false)?;
    let mut peer = Peer::negotiate(lab, false)?;
    tally.must_refuse(peer.table(&[region(BASE, FILE)], &[&shown])?);
    shown.set_len(0).context("ftruncate")?;
    for width in [1, 8, 64] {
        let peek = lab.peek(BASE, FILE, PAGE, width, 0)?;
        tally.tries += peek.reads;
        tally.got += peek.reads - peek.ones;
        tally.tries += lab.poke(BASE, FILE, PAGE, width, 0)?;
    }
    tally.finish(lab)
}

fn sealed_shrunk(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let shown = file(0x5a, true)?;
    let mut peer = Peer::negotiate(lab, false)?;
    let table = peer.table(&[region(BASE, FILE)], &[&shown])?;
    if table != Answer::Number(0) {
        return amiss(format!("a proper memory table was answered with {table:?}"));
    }
    expect_shown(lab, BASE)?;
    tally.tries += 1;
    tally.got += u64::from(shown.set_len(0).is_ok());
    expect_shown(lab, BASE + FILE - PAGE)?;
    drop(peer);
    lab.expect_alive(BACK)?;
    tally.finish(lab)
}

/// Windows come, go and lead elsewhere while the guest reads them.
fn replaced(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let mut peer = translating(lab)?;
    peer.update(BASE, FILE, BASE)?;
    expect_shown(lab, BASE)?;
    let command = format!("peek offset={BASE} len={FILE} step=16 width=8 seed=0");
    lab.send(BACK, &command)?;
    for turn in 0..500 {
        let moved = BASE + (turn % 7) * PAGE;
        let answer = if turn % 3 == 2 {
            let all = Iotlb {
                size: u64::MAX,
                kind: IotlbKind::Invalidate,
                ..Iotlb::default()
            };
            peer.request(requests::IOTLB_MSG, &all, Vec::new())?
        } else {
            peer.update(moved, FILE / 2, BASE + (turn % 5) * PAGE)?
        };
        if answer != Answer::Number(0) {
            return Err(Trouble::Victim(format!(
                "a proper translation was answered with {answer:?}"
            )));
        }
        tally.tries += 1;
    }
    lab.answer(BACK, "peek", Duration::from_secs(30))?;
    drop(peer);
    expect_nothing_soon(lab, &mut tally, BASE)?;
    tally.finish(lab)
}

/// The front-end is gone: nothing may be seen once the guest was told.
fn expect_nothing_soon(lab: &mut Lab, tally: &mut Tally, offset: u64) -> Tried<()> {
    // The next front-end is served only when everything of the last one is gone.
    drop(Peer::connect(lab)?);
    expect_nothing(lab, tally, offset, FILE)
}

fn wrong_regions(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let shown = file(0x5a, true)?;
    let mut peer = Peer::negotiate(lab, false)?;
    let ask = |peer: &mut Peer, request, region, files: &[&File]| -> Tried<Answer> {
        peer.request(request, &SingleMemoryRegion(region), descriptors(files)?)
    };
    // One that is not there, one without a file, one twice, one that overlaps, one that is removed twice.
    let (add, remove) = (requests::ADD_MEM_REG, requests::REM_MEM_REG);
    tally.must_refuse(ask(&mut peer, remove, region(BASE, FILE), &[])?);
    drop(peer);
    let mut peer = Peer::negotiate(lab, false)?;
    tally.must_refuse(ask(&mut peer, add, region(BASE, FILE), &[])?);
    drop(peer);
    let mut peer = Peer::negotiate(lab, false)?;
    tally.may(ask(&mut peer, add, region(BASE, FILE), &[&shown])?);
    expect_shown(lab, BASE)?;
    tally.must_refuse(ask(&mut peer, add, region(BASE, FILE), &[&shown])?);
    if peer.is_served()? {
        tally.must_refuse(ask(&mut peer, add, region(BASE + PAGE, FILE), &[&shown])?);
    }
    if peer.is_served()? {
        tally.may(ask(&mut peer, remove, region(BASE, FILE), &[])?);
        expect_nothing(lab, &mut tally, BASE, FILE)?;
        tally.must_refuse(ask(&mut peer, remove, region(BASE, FILE), &[])?);
    }
    tally.finish(lab)
}

fn no_eventfds(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for request in [
        requests::SET_VRING_KICK,
        requests::SET_VRING_CALL,
        requests::SET_VRING_ERR,
    ] {
        let (socket, other) = UnixStream::pair().context("socketpair")?;
        drop(other);
        let null = File::open("/dev/null").context("/dev/null")?;
        let memory = sys::memory_file(PAGE, true).context("memfd")?;
        for fd in [OwnedFd::from(socket), null.into(), memory.into()] {
            let mut peer = Peer::negotiate(lab, false)?;
            let vring = VringFd {
                index: 0,
                no_fd: false,
            };
            peer.send(&Message::request(request, &vring).with_fds(vec![fd]))?;
            lab.expect_alive(BACK)?;
            // The guest may ring what it was given.
            tally.may(if peer.is_served()? {
                Answer::Number(0)
            } else {
                Answer::Closed
            });
        }
    }
    tally.finish(lab)
}

fn missing_eventfds(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for request in [requests::SET_VRING_KICK, requests::SET_VRING_CALL] {
        for (no_fd, count) in [(false, 0), (true, 1), (false, 2)] {
            let mut peer = Peer::negotiate(lab, false)?;
            let vring = VringFd { index: 1, no_fd };
            let events: Result<Vec<OwnedFd>, _> = (0..count).map(|_| sys::eventfd()).collect();
            let events = events.context("eventfd")?;
            peer.send(&Message::request(request, &vring).with_fds(events))?;
            tally.may(if peer.is_served()? {
                Answer::Number(0)
            } else {
                Answer::Closed
            });
        }
    }
    tally.finish(lab)
}

fn no_queue(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for index in [2, 63, 255, 65_535, u32::MAX] {
        let mut peer = Peer::negotiate(lab, false)?;
        let state = VringState { index, num: 256 };
        for request in [
            requests::SET_VRING_NUM,
            requests::SET_VRING_BASE,
            requests::SET_VRING_ENABLE,
        ] {
            peer.send(&Message::request(request, &state))?;
        }
        let kick = VringFd {
            index: u8::try_from(index & 0xff).unwrap_or(u8::MAX),
            no_fd: false,
        };
        let event = sys::eventfd().context("eventfd")?;
        peer.send(&Message::request(requests::SET_VRING_KICK, &kick).with_fds(vec![event]))?;
        let answer = peer.ask(&Message::request(requests::GET_VRING_BASE, &state))?;
        // A base of a queue that is not there is of no harm to anybody.
        tally.may(answer);
    }
    tally.finish(lab)
}

/// Rings that lie where nothing is, wrap, or lie in each other; the guest starts them and looks.
fn rings_anywhere(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let top = u64::MAX - (PAGE - 1);
    for translations in [false, true] {
        for (address, size) in [
            (0, 256),
            (BASE, 256),
            (BASE + FILE - 16, 256),
            (BASE + 1, 256),
            (WINDOW - 16, 32768),
            (top, 256),
            (BASE, 0),
            (BASE, 3),
            (BASE, u32::MAX),
        ] {
            let mut peer = Peer::negotiate(lab, translations)?;
            let shown = file(0xff, true)?;
            peer.table(&[region(BASE, FILE)], &[&shown])?;
            if translations {
                peer.update(BASE, FILE, BASE)?;
            }
            for index in [0, 1] {
                let state = |num| VringState { index, num };
                let addresses = VringAddr {
                    index,
                    desc: address,
                    used: address,
                    avail: address,
                    ..VringAddr::default()
                };
                let kick = VringFd {
                    index: u8::try_from(index).unwrap_or_default(),
                    no_fd: false,
                };
                let event = sys::eventfd().context("eventfd")?;
                peer.send(&Message::request(requests::SET_VRING_NUM, &state(size)))?;
                peer.send(&Message::request(requests::SET_VRING_BASE, &state(0)))?;
                peer.send(&Message::request(requests::SET_VRING_ADDR, &addresses))?;
                let kick = Message::request(requests::SET_VRING_KICK, &kick);
                peer.send(&kick.with_fds(vec![event]))?;
                peer.send(&Message::request(requests::SET_VRING_ENABLE, &state(1)))?;
            }
            tally.may(if peer.is_served()? {
                Answer::Number(0)
            } else {
                Answer::Closed
            });
        }
    }
    tally.finish(lab)
}

/// Translations that have to be refused.
fn updates(lab: &mut Lab, all: &[(u64, u64, u64)]) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for &(iova, size, user_address) in all {
        let mut peer = translating(lab)?;
        tally.must_refuse(peer.update(iova, size, user_address)?);
        expect_nothing(lab, &mut tally, BASE, FILE)?;
        expect_nothing(lab, &mut tally, WINDOW - 2 * PAGE, 2 * PAGE)?;
    }
    tally.finish(lab)
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

fn translation_flood(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let mut peer = translating(lab)?;
    let mut accepted = 0;
    let start = Instant::now();
    // Every other page, so that no two become one.
    for n in 0..=TRANSLATIONS {
        let answer = peer.update(BASE + 2 * n * PAGE, PAGE, BASE)?;
        tally.tries += 1;
        if answer != Answer::Number(0) {
            tally.tries -= 1;
            tally.may(answer);
            break;
        }
        accepted += 1;
    }
    tally.got += u64::from(accepted > TRANSLATIONS);
    log::info!(
        "{accepted} translations in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    lab.expect_alive(BACK)?;
    expect_shown(lab, BASE)?;
    drop(peer);
    expect_nothing_soon(lab, &mut tally, BASE)?;
    tally.finish(lab)
}

/// The region that a translation leads into leaves the table.
fn outlived(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let mut peer = translating(lab)?;
    let iova = BASE + 8 * FILE;
    match peer.update(iova, FILE, BASE)? {
        Answer::Number(0) => expect_shown(lab, iova)?,
        answer => return amiss(format!("a proper translation was answered with {answer:?}")),
    }
    let other = file(0x66, true)?;
    tally.may(peer.table(&[region(BASE + 32 * FILE, FILE)], &[&other])?);
    expect_nothing(lab, &mut tally, iova, FILE)?;
    tally.finish(lab)
}

fn revoked(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for (iova, size) in [(0, u64::MAX), (0, WINDOW), (0, u64::MAX - (PAGE - 1))] {
        let mut peer = translating(lab)?;
        peer.update(BASE, FILE, BASE)?;
        expect_shown(lab, BASE)?;
        let all = Iotlb {
            iova,
            size,
            kind: IotlbKind::Invalidate,
            ..Iotlb::default()
        };
        let answer = peer.request(requests::IOTLB_MSG, &all, Vec::new())?;
        tally.may(answer);
        if answer == Answer::Number(0) {
            expect_nothing(lab, &mut tally, BASE, FILE)?;
        }
    }
    tally.finish(lab)
}

fn other_side(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for kind in [IotlbKind::Miss, IotlbKind::AccessFail] {
        let mut peer = translating(lab)?;
        let message = Iotlb {
            iova: BASE,
            size: PAGE,
            user_address: BASE,
            read: true,
            write: true,
            kind,
        };
        tally.must_refuse(peer.request(requests::IOTLB_MSG, &message, Vec::new())?);
        expect_nothing(lab, &mut tally, BASE, FILE)?;
    }
    // A type that does not exist.
    for kind in [0, 5, 0xff] {
        let mut peer = translating(lab)?;
        let mut payload = Iotlb::default().encode();
        payload[25] = kind;
        let message = Message {
            payload,
            ..Message::bare(requests::IOTLB_MSG)
        };
        tally.must_refuse(peer.ask(&message.with_need_reply(true))?);
    }
    tally.finish(lab)
}

/// Hands over one end of the channel for the back-end's requests.
fn channel(peer: &mut Peer) -> Tried<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("socketpair")?;
    let message = Message::bare(requests::SET_BACKEND_REQ_FD).with_fds(vec![theirs.into()]);
    peer.ask(&message.with_need_reply(true))?;
    Ok(ours)
}

/// The guest's accesses wait for it, but not for ever.
fn silent_channel(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let mut peer = translating(lab)?;
    let _channel = channel(&mut peer)?;
    let start = Instant::now();
    let peek = lab.peek(BASE, 16 * PAGE, PAGE, 8, 0)?;
    let (took, most) = (start.elapsed(), 16 * 4 * MISS + Duration::from_secs(1));
    tally.tries += peek.reads;
    tally.got += (peek.reads - peek.ones) + u64::from(took > most);
    let mut finding = tally.finish(lab)?;
    finding.noticed = format!("{} reads waited {} ms in all", peek.reads, took.as_millis());
    Ok(finding)
}

fn garbage_channel(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for garbage in [vec![0xff; 4096], vec![0; 12], vec![1, 0, 0]] {
        let mut peer = translating(lab)?;
        let mut channel = channel(&mut peer)?;
        // It may have been closed on us.
        let _ = channel.write_all(&garbage);
        expect_nothing(lab, &mut tally, BASE, 8 * PAGE)?;
        drop(channel);
        expect_nothing(lab, &mut tally, BASE, 8 * PAGE)?;
        tally.may(if peer.is_served()? {
            Answer::Number(0)
        } else {
            Answer::Closed
        });
    }
    tally.finish(lab)
}

fn replies(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for request in 1..=44 {
        let (mut peer, _) = Peer::connect(lab)?;
        peer.send(&Message::reply(request, &U64(0)))?;
        tally.may(if peer.is_served()? {
            Answer::Number(0)
        } else {
            Answer::Closed
        });
    }
    tally.finish(lab)
}

fn unknown_requests(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for request in [0, 45, 46, 99, 0x1000, 0xdead_beef, u32::MAX] {
        for (payload, fds) in [(0, 0), (4084, 0), (8, 32)] {
            let mut peer = Peer::negotiate(lab, false)?;
            let events: Result<Vec<OwnedFd>, _> = (0..fds).map(|_| sys::eventfd()).collect();
            let message = Message {
                payload: vec![0xa5; payload],
                ..Message::bare(request)
            };
            peer.send(&message.with_fds(events.context("eventfd")?))?;
            tally.may(if peer.is_served()? {
                Answer::Number(0)
            } else {
                Answer::Closed
            });
        }
    }
    tally.finish(lab)
}

/// A header as it goes over the wire.
fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].map(u32::to_le_bytes).concat()
}

/// Bytes that are no message, which have to end in a closed connection.
fn nonsense(lab: &mut Lab, all: &[Vec<u8>]) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    for bytes in all {
        let (mut peer, _) = Peer::connect(lab)?;
        peer.raw(bytes);
        let answer = peer.answer(Duration::from_secs(2))?;
        tally.must_refuse(answer);
    }
    tally.finish(lab)
}

fn too_long(lab: &mut Lab) -> Tried<Finding> {
    let sizes = [4085, 4096, 65_536, 1 << 30, u32::MAX];
    let all: Vec<Vec<u8>> = sizes
        .iter()
        .map(|&size| header(requests::GET_FEATURES, flags::VERSION, size))
        .collect();
    nonsense(lab, &all)
}

fn other_version(lab: &mut Lab) -> Tried<Finding> {
    let all: Vec<Vec<u8>> = [0, 2, 3, 0xffff_fffc]
        .iter()
        .map(|&flags| header(requests::GET_FEATURES, flags, 0))
        .collect();
    nonsense(lab, &all)
}

/// Everything before its time, backwards.
fn out_of_order(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let state = VringState { index: 0, num: 1 };
    for first in 0..6 {
        let (mut peer, _) = Peer::connect(lab)?;
        let event = sys::eventfd().context("eventfd")?;
        let kick = VringFd {
            index: 0,
            no_fd: false,
        };
        let mut all = vec![
            Message::request(requests::SET_VRING_ENABLE, &state),
            Message::request(requests::SET_VRING_KICK, &kick).with_fds(vec![event]),
            Message::request(requests::SET_VRING_ADDR, &VringAddr::default()),
            Message::request(requests::IOTLB_MSG, &Iotlb::default()),
            Message::request(requests::SET_PROTOCOL_FEATURES, &U64(u64::MAX)),
            Message::request(requests::SET_FEATURES, &U64(u64::MAX)),
        ];
        all.rotate_left(first);
        for message in &all {
            peer.send(message)?;
        }
        tally.may(peer.ask(&Message::request(requests::GET_VRING_BASE, &state))?);
        tally.tries += all.len() as u64;
    }
    tally.finish(lab)
}

fn cut_short(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let whole = [
        header(requests::SET_FEATURES, flags::VERSION, 8),
        vec![0; 8],
    ]
    .concat();
    for len in 1..whole.len() {
        let (mut peer, _) = Peer::connect(lab)?;
        peer.raw(&whole[..len]);
        tally.tries += 1;
    }
    tally.finish(lab)
}

/// Messages by the thousand, and nobody takes the answers.
fn message_flood(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let (mut peer, _) = Peer::connect(lab)?;
    let one = header(requests::GET_FEATURES, flags::VERSION, 0);
    let sent = peer.raw(&one.repeat(20_000));
    tally.tries += (sent / one.len()) as u64;
    drop(peer);
    drop(Peer::connect(lab)?);
    tally.finish(lab)
}

fn connection_flood(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let mut open = Vec::new();
    for n in 0..500 {
        // Some are refused at once: that is an answer, too.
        match UnixStream::connect(lab.socket()) {
            Ok(stream) if n % 2 == 0 => open.push(stream),
            Ok(_) => {}
            Err(_) => tally.closed += 1,
        }
        tally.tries += 1;
        if n % 50 == 49 {
            open.clear();
        }
    }
    drop(open);
    drop(Peer::connect(lab)?);
    tally.finish(lab)
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

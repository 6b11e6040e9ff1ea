//! Memory tables, the files behind them, and translations.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Context;
use devices::vhost_user::{
    Iotlb, IotlbKind, MemoryRegion, MemoryTable, Message, Payload, SingleMemoryRegion, requests,
};

use super::{
    BASE, FILE, Tally, expect_nothing, expect_nothing_soon, expect_shown, file, region, translating,
};
use crate::isolation::lab::{BACK, Lab, PAGE, Tried, Trouble, WINDOW, amiss};
use crate::isolation::peer::{Answer, Peer, descriptors};
use crate::isolation::report::Finding;
use crate::sys;

/// Translations that a back-end takes at one time (docs/device.md).
const TRANSLATIONS: u64 = 32768;

/// Memory tables that have to be refused, each on a connection of its own.
pub fn tables(lab: &mut Lab, all: &[&[MemoryRegion]]) -> Tried<Finding> {
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
pub fn table_truncated(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let whole = MemoryTable(vec![region(BASE, FILE); 2]).encode();
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
pub fn file_counts(lab: &mut Lab, counts: &[usize]) -> Tried<Finding> {
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

pub fn no_files(lab: &mut Lab) -> Tried<Finding> {
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

pub fn unsealed(lab: &mut Lab) -> Tried<Finding> {
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
pub fn shrunk(lab: &mut Lab) -> Tried<Finding> {
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

pub fn sealed_shrunk(lab: &mut Lab) -> Tried<Finding> {
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
pub fn replaced(lab: &mut Lab) -> Tried<Finding> {
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

pub fn wrong_regions(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let mut tally = Tally::default();
    let shown = file(0x5a, true)?;
    let mut peer = Peer::negotiate(lab, false)?;
    let ask = |peer: &mut Peer, request, region, files: &[&File]| -> Tried<Answer> {
        peer.request(request, &SingleMemoryRegion(region), descriptors(files)?)
    };
    // One that is not there (which changes nothing), one without a file, one twice (nor does this), one of another file at its place, one that overlaps, one that is
    // removed twice.
    let (add, remove) = (requests::ADD_MEM_REG, requests::REM_MEM_REG);
    tally.may(ask(&mut peer, remove, region(BASE, FILE), &[])?);
    expect_nothing(lab, &mut tally, BASE, FILE)?;
    drop(peer);
    let mut peer = Peer::negotiate(lab, false)?;
    tally.must_refuse(ask(&mut peer, add, region(BASE, FILE), &[])?);
    drop(peer);
    let mut peer = Peer::negotiate(lab, false)?;
    tally.may(ask(&mut peer, add, region(BASE, FILE), &[&shown])?);
    expect_shown(lab, BASE)?;
    tally.may(ask(&mut peer, add, region(BASE, FILE), &[&shown])?);
    expect_shown(lab, BASE)?;
    let other = file(0x5a, true)?;
    tally.must_refuse(ask(&mut peer, add, region(BASE, FILE), &[&other])?);
    if peer.is_served()? {
        tally.must_refuse(ask(&mut peer, add, region(BASE + PAGE, FILE), &[&shown])?);
    }
    if peer.is_served()? {
        tally.may(ask(&mut peer, remove, region(BASE, FILE), &[])?);
        expect_nothing(lab, &mut tally, BASE, FILE)?;
        tally.may(ask(&mut peer, remove, region(BASE, FILE), &[])?);
        expect_nothing(lab, &mut tally, BASE, FILE)?;
    }
    tally.finish(lab)
}

/// Translations that have to be refused.
pub fn updates(lab: &mut Lab, all: &[(u64, u64, u64)]) -> Tried<Finding> {
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

pub fn translation_flood(lab: &mut Lab) -> Tried<Finding> {
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
pub fn outlived(lab: &mut Lab) -> Tried<Finding> {
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

pub fn revoked(lab: &mut Lab) -> Tried<Finding> {
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

pub fn other_side(lab: &mut Lab) -> Tried<Finding> {
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

//! Attacks in time: the page that is taken away while it is hammered, and VMs that stop, die and come back.

use std::time::{Duration, Instant};

use super::lab::{ANSWER, BACK, FRONT, Lab, PAGE, Scene, Tried, Trouble, amiss};
use super::report::{Finding, From};
use super::{Attack, SEEN, WINDOWS};
use crate::cli::isolation::Mode;
use crate::cli::rings::Layout;

/// The race takes at most so long, whatever the number of rounds.
const RACE: Duration = Duration::from_secs(125);
/// Rounds of the race in which the back-end is killed, and after how long it is: a round takes about a millisecond.
const KILLED_ROUNDS: u64 = 500;
const KILLED_AFTER: Duration = Duration::from_millis(150);
/// After how much more than its limit a back-end that does not answer has to be cut off.
const SLACK: Duration = Duration::from_secs(2);
/// How long `run --net` waits for an acknowledgement.
const IOTLB_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a VM may take to notice that its peer is gone, and to come up again.
const NOTICE: Duration = Duration::from_secs(10);

/// All of them.
pub fn attacks() -> Vec<Attack> {
    let open = Scene::Open(Layout::Split);
    let live = Scene::Live(Layout::Split);
    let back = From::BackEnd;
    vec![
        Attack::new("race-for-an-unmapped-page", back, open, SEEN, race),
        Attack::new("stopped-while-unmap-waits", back, open, WINDOWS, stopped).spoiling(),
        Attack::new(
            "killed-while-unmap-waits",
            back,
            open,
            WINDOWS,
            killed_in_unmap,
        )
        .spoiling(),
        Attack::new("killed-in-the-race", back, open, WINDOWS, killed_in_race).spoiling(),
        Attack::new("killed-in-traffic", back, live, SEEN, killed_in_traffic).spoiling(),
        Attack::new(
            "next-back-end-looks-for-old-pages",
            back,
            open,
            WINDOWS,
            next_back_end,
        )
        .spoiling(),
        Attack::new("read-after-device-reset", back, open, WINDOWS, device_reset),
        Attack::new(
            "read-after-front-end-is-gone",
            back,
            open,
            SEEN,
            front_end_gone,
        )
        .spoiling(),
        Attack::new(
            "read-when-a-front-end-is-back",
            back,
            open,
            WINDOWS,
            front_end_back,
        )
        .spoiling(),
        Attack::new(
            "front-end-killed-in-traffic",
            From::FrontEnd,
            live,
            SEEN,
            front_end_killed,
        )
        .spoiling(),
    ]
}

/// A page that is mapped: its device address, its address, where the attacker sees it.
struct Page {
    iova: u64,
    gpa: u64,
    offset: u64,
}

fn mapped_page(lab: &mut Lab) -> Tried<Page> {
    lab.forget()?;
    lab.faults()?;
    let (gpa, iova, seed) = (lab.pages(1)?, lab.plot(), lab.seed());
    lab.fill(gpa, PAGE, seed)?;
    lab.map(iova, gpa, PAGE, "rw")?;
    let offset = lab.at(iova, gpa);
    lab.control(offset, seed)?;
    Ok(Page { iova, gpa, offset })
}

/// Fills the page with a secret and returns what the attacker gets of it, and how often it tried.
fn read_secret(lab: &mut Lab, page: &Page) -> Tried<[u64; 2]> {
    let seed = lab.seed();
    lab.fill(page.gpa, PAGE, seed)?;
    let peek = lab.peek(page.offset, PAGE, 32, 8, seed)?;
    Ok([peek.reads, peek.seen()])
}

fn race(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    lab.faults()?;
    let (page, sync) = (lab.pages(1)?, lab.pages(1)?);
    let (iova, sync_iova) = (lab.plot(), lab.plot());
    lab.map(sync_iova, sync, PAGE, "rw")?;
    let (offset, sync_offset) = (lab.at(iova, page), lab.at(sync_iova, sync));
    // Where nothing is taken away each round takes its full time, and a few show enough.
    let rounds = match lab.mode() {
        Mode::Windows | Mode::Readable => lab.rounds(),
        Mode::None | Mode::Whole => lab.rounds().min(100),
    };
    let attack = format!(
        "race offset={offset} sync={sync_offset} ms={}",
        RACE.as_millis()
    );
    lab.send(
        FRONT,
        &format!("race rounds={rounds} iova={iova} gpa={page} sync={sync}"),
    )?;
    lab.send(BACK, &attack)?;
    let victim = lab.answer(FRONT, "race", RACE + ANSWER)?;
    let attacker = lab.answer(BACK, "race", ANSWER)?;
    let of = |done: &crate::bench::record::Done, name: &str| done.number(name).unwrap_or(0);
    let (done, touched) = (of(&victim, "rounds"), of(&victim, "touched"));
    if lab.mode().has_iommu() {
        let status = of(&victim, "status");
        if status != 0 {
            return amiss(format!(
                "a request of the victim failed with status {status}"
            ));
        }
        if touched * 2 < done || done < rounds {
            return amiss(format!(
                "of {rounds} rounds {done} were run and {touched} raced: that proves too little"
            ));
        }
    }
    lab.unmap(sync_iova, PAGE)?;
    let (reads, writes) = (of(&attacker, "reads"), of(&attacker, "writes"));
    let faults = lab.faults()?;
    Ok(Finding {
        tries: done,
        got_through: of(&victim, "corrupted") + of(&attacker, "leaked") + of(&attacker, "other"),
        noticed: format!(
            "{faults} faults reported; {touched} rounds touched the page before its unmap; {reads} reads, {writes} writes"
        ),
    })
}

/// The back-end's VMM is stopped, so that it acknowledges nothing.
fn stopped(lab: &mut Lab) -> Tried<Finding> {
    let page = mapped_page(lab)?;
    lab.stop(BACK)?;
    let start = Instant::now();
    let line = format!("unmap iova={} len={PAGE}", page.iova);
    let unmapped = lab.ask(FRONT, &line, IOTLB_TIMEOUT + SLACK);
    let took = start.elapsed();
    // Whatever came of it: a stopped process cannot be ended in order.
    lab.signal(BACK, libc::SIGCONT)?;
    let status = unmapped?.number("status");
    if status != Some(0) {
        return Err(Trouble::Victim(format!(
            "UNMAP ended with status {status:?}"
        )));
    }
    lab.wait_until_down(BACK, NOTICE)?;
    let [tries, got] = read_secret(lab, &page)?;
    lab.expect_alive(FRONT)?;
    Ok(Finding {
        tries: tries + 1,
        got_through: got,
        noticed: format!(
            "the back-end was cut off; UNMAP took {} ms",
            took.as_millis()
        ),
    })
}

fn killed_in_unmap(lab: &mut Lab) -> Tried<Finding> {
    let page = mapped_page(lab)?;
    lab.stop(BACK)?;
    let start = Instant::now();
    lab.send(FRONT, &format!("unmap iova={} len={PAGE}", page.iova))?;
    std::thread::sleep(Duration::from_millis(50));
    lab.kill(BACK)?;
    let done = lab.answer(FRONT, "unmap", SLACK)?;
    if done.number("status") != Some(0) {
        return Err(Trouble::Victim(
            "UNMAP failed when the back-end was killed".to_owned(),
        ));
    }
    let took = start.elapsed();
    lab.expect_alive(FRONT)?;
    Ok(Finding {
        tries: 1,
        got_through: 0,
        noticed: format!(
            "the connection was lost; UNMAP took {} ms",
            took.as_millis()
        ),
    })
}

/// The attacker dies in the middle of the race: requests go on without it, and the secrets stay whole.
fn killed_in_race(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (page, sync) = (lab.pages(1)?, lab.pages(1)?);
    let (iova, sync_iova) = (lab.plot(), lab.plot());
    lab.map(sync_iova, sync, PAGE, "rw")?;
    let (offset, sync_offset) = (lab.at(iova, page), lab.at(sync_iova, sync));
    let victim = format!("race rounds={KILLED_ROUNDS} iova={iova} gpa={page} sync={sync}");
    lab.send(FRONT, &victim)?;
    let attack = format!(
        "race offset={offset} sync={sync_offset} ms={}",
        RACE.as_millis()
    );
    lab.send(BACK, &attack)?;
    std::thread::sleep(KILLED_AFTER);
    lab.kill(BACK)?;
    let victim = lab.answer(FRONT, "race", RACE + ANSWER)?;
    let of = |name: &str| victim.number(name).unwrap_or(0);
    let (done, touched, status) = (of("rounds"), of("touched"), of("status"));
    if status != 0 || done < KILLED_ROUNDS {
        return Err(Trouble::Victim(format!(
            "the race ended after {done} rounds with status {status} when the back-end was killed"
        )));
    }
    if touched == 0 || touched == done {
        return amiss(format!(
            "of {done} rounds {touched} were raced: the back-end was not killed in between"
        ));
    }
    lab.expect_alive(FRONT)?;
    Ok(Finding {
        tries: done,
        got_through: of("corrupted"),
        noticed: format!("killed in round {touched}; the link was lost"),
    })
}

fn killed_in_traffic(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (guard, seed) = (lab.pages(16)?, lab.seed());
    lab.fill(guard, 16 * PAGE, seed)?;
    lab.run(["both", "both"], "size=256 batch=32 ms=2000 timeout_ms=300")?;
    std::thread::sleep(Duration::from_millis(100));
    lab.kill(BACK)?;
    let ended = lab.result(FRONT, NOTICE)?;
    lab.expect_alive(FRONT)?;
    let got = lab.wrong(guard, 16 * PAGE, seed)?;
    // Another back-end, and the link is as it was.
    lab.start(BACK)?;
    lab.traffic()?;
    Ok(Finding {
        tries: 1,
        got_through: got,
        noticed: match ended {
            Ok(_) => "the workload ended; the next back-end served".to_owned(),
            Err(what) => format!("{what}; the next back-end served"),
        },
    })
}

/// A page is unmapped while no back-end is there; the next one must not see it.
fn next_back_end(lab: &mut Lab) -> Tried<Finding> {
    let page = mapped_page(lab)?;
    let (kept, iova, seed) = (lab.pages(1)?, lab.plot(), lab.seed());
    lab.fill(kept, PAGE, seed)?;
    lab.map(iova, kept, PAGE, "r")?;
    lab.control(iova, seed)?;
    lab.kill(BACK)?;
    lab.wait_until_down(FRONT, NOTICE)?;
    lab.unmap(page.iova, PAGE)?;
    lab.start(BACK)?;
    lab.wait_until_up(NOTICE)?;
    // What is still mapped it sees.
    lab.control(iova, seed)?;
    let [tries, got] = read_secret(lab, &page)?;
    let faults = lab.faults()?;
    Ok(Finding {
        tries,
        got_through: got,
        noticed: format!("the back-end was lost and found; {faults} faults"),
    })
}

/// The front-end's guest resets its network device and sets it up again: what was unmapped stays away, what is mapped is seen again.
fn device_reset(lab: &mut Lab) -> Tried<Finding> {
    let page = mapped_page(lab)?;
    let (kept, iova, seed) = (lab.pages(1)?, lab.plot(), lab.seed());
    lab.fill(kept, PAGE, seed)?;
    lab.map(iova, kept, PAGE, "r")?;
    lab.control(iova, seed)?;
    lab.unmap(page.iova, PAGE)?;
    lab.reset_device(NOTICE)?;
    lab.control(iova, seed)?;
    let [tries, got] = read_secret(lab, &page)?;
    lab.unmap(iova, PAGE)?;
    let faults = lab.faults()?;
    Ok(Finding {
        tries,
        got_through: got,
        noticed: format!("the device was reset and set up again; {faults} faults"),
    })
}

fn front_end_gone(lab: &mut Lab) -> Tried<Finding> {
    let page = mapped_page(lab)?;
    lab.kill(FRONT)?;
    lab.wait_until_down(BACK, NOTICE)?;
    let mut tries = 0;
    let mut got = 0;
    for (offset, len, step) in [(page.offset, PAGE, 8), (0, 8 << 30, 8 << 20)] {
        let peek = lab.peek(offset, len, step, 8, 0)?;
        tries += peek.reads;
        got += peek.seen();
    }
    Ok(Finding {
        tries,
        got_through: got,
        noticed: "the front-end was killed".to_owned(),
    })
}

fn front_end_back(lab: &mut Lab) -> Tried<Finding> {
    let page = mapped_page(lab)?;
    lab.kill(FRONT)?;
    lab.wait_until_down(BACK, NOTICE)?;
    lab.start(FRONT)?;
    lab.attach()?;
    lab.start_device()?;
    lab.wait_until_up(NOTICE)?;
    let (gpa, seed) = (lab.pages(4)?, lab.seed());
    lab.fill(gpa, 4 * PAGE, seed)?;
    let mut tries = 0;
    let mut got = 0;
    for offset in [page.offset, gpa, gpa + (4 << 30)] {
        let peek = lab.peek(offset, PAGE, 32, 8, seed)?;
        tries += peek.reads;
        got += if offset == page.offset {
            peek.seen()
        } else {
            peek.secrets
        };
    }
    let faults = lab.faults()?;
    Ok(Finding {
        tries,
        got_through: got,
        noticed: format!("{faults} faults"),
    })
}

/// The other way round: the front-end dies, and the back-end serves the next one.
fn front_end_killed(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    lab.run(["both", "both"], "size=256 batch=32 ms=2000 timeout_ms=300")?;
    std::thread::sleep(Duration::from_millis(100));
    lab.kill(FRONT)?;
    let ended = lab.result(BACK, NOTICE)?;
    lab.expect_alive(BACK)?;
    lab.start(FRONT)?;
    lab.traffic()?;
    Ok(Finding {
        tries: 1,
        got_through: 0,
        noticed: match ended {
            Ok(_) => "the workload ended; the next front-end was served".to_owned(),
            Err(what) => format!("{what}; the next front-end was served"),
        },
    })
}

//! Attacks on the rings and on what goes beside them: corrupted indices, lengths and addresses, floods, messages nobody asked for, and
//! requests of a guest to its own IOMMU that must be refused.

use std::time::Duration;

use super::lab::{ANSWER, BACK, FRONT, Lab, MAPPINGS, PAGE, RANGE, Scene, Tried};
use super::report::{Finding, From};
use super::{Attack, SEEN, WINDOWS, or_nothing};
use crate::cli::rings::Layout;

/// How often each corruption is written.
const SCRIBBLES: u64 = 256;
/// Notifications of a flood.
const FLOOD: u64 = 20_000;
/// Messages of a kind.
const MESSAGES: u64 = 200;
/// How long a workload may take that is cut short.
const WORK: Duration = Duration::from_secs(10);

/// Names must live as long as the program.
const BY_BACK_END: [(&str, &str, &str); 5] = [
    ("used-index", "split-used-index", "packed-used-index"),
    ("used-id", "split-used-id", "packed-used-id"),
    ("used-length", "split-used-length", "packed-used-length"),
    (
        "desc",
        "split-descriptors-overwritten",
        "packed-descriptors-overwritten",
    ),
    ("all", "split-rings-overwritten", "packed-rings-overwritten"),
];
const BY_FRONT_END: [(&str, &str, &str); 6] = [
    (
        "avail-index",
        "split-available-index",
        "packed-available-index",
    ),
    (
        "desc-address",
        "split-descriptor-address",
        "packed-descriptor-address",
    ),
    (
        "desc-length",
        "split-descriptor-length",
        "packed-descriptor-length",
    ),
    (
        "desc-next",
        "split-descriptor-next",
        "packed-descriptor-next",
    ),
    (
        "desc-flags",
        "split-descriptor-flags",
        "packed-descriptor-flags",
    ),
    (
        "all",
        "split-own-rings-overwritten",
        "packed-own-rings-overwritten",
    ),
];
const BY_MESSAGE: [(&str, &str); 5] = [
    ("reply", "message-reply-to-nothing"),
    ("request", "message-request"),
    ("short", "message-shorter-than-a-header"),
    ("long", "message-longer-than-it-is"),
    ("garbage", "message-garbage"),
];

/// All of them.
pub fn attacks() -> Vec<Attack> {
    let live = Scene::Live(Layout::Split);
    let open = Scene::Open(Layout::Split);
    let (back, front) = (From::BackEnd, From::FrontEnd);
    let mut all = vec![
        Attack::new("call-flood", back, live, SEEN, call_flood),
        Attack::new("kick-flood", front, live, SEEN, kick_flood),
    ];
    for (what, name) in BY_MESSAGE {
        all.push(Attack::new(name, back, live, SEEN, move |lab| messages(lab, what)).spoiling());
    }
    for layout in [Layout::Split, Layout::Packed] {
        let scene = Scene::Live(layout);
        for (what, split, packed) in BY_BACK_END {
            let name = if layout == Layout::Split {
                split
            } else {
                packed
            };
            let run = move |lab: &mut Lab| scribbled_by_back_end(lab, what);
            all.push(Attack::new(name, back, scene, SEEN, run).spoiling());
        }
        for (what, split, packed) in BY_FRONT_END {
            let name = if layout == Layout::Split {
                split
            } else {
                packed
            };
            let run = move |lab: &mut Lab| scribbled_by_front_end(lab, what);
            all.push(Attack::new(name, front, scene, SEEN, run).spoiling());
        }
    }
    all.extend([
        Attack::new("map-beyond-the-input-range", front, open, WINDOWS, |lab| {
            refused(lab, &|iova, gpa| {
                let _ = iova;
                vec![
                    format!("map iova={RANGE} gpa={gpa} len={PAGE} perm=rw"),
                    format!(
                        "map iova={} gpa={gpa} len={} perm=rw",
                        RANGE - PAGE,
                        2 * PAGE
                    ),
                ]
            })
        }),
        Attack::new("map-wrapping-addresses", front, open, WINDOWS, |lab| {
            refused(lab, &|iova, gpa| {
                let top = u64::MAX - (PAGE - 1);
                vec![
                    format!("map iova={top} gpa={gpa} len={PAGE} perm=rw"),
                    format!("map iova={top} gpa={gpa} len={} perm=rw", 2 * PAGE),
                    format!("map iova={iova} gpa={top} len={} perm=rw", 2 * PAGE),
                ]
            })
        }),
        Attack::new("map-what-is-no-memory", front, open, WINDOWS, |lab| {
            refused(lab, &|iova, _| {
                [1 << 30, 3 << 30, 0xfee0_0000, 1 << 40]
                    .map(|gpa: u64| format!("map iova={iova} gpa={gpa} len={PAGE} perm=rw"))
                    .to_vec()
            })
        }),
        Attack::new("map-parts-of-pages", front, open, WINDOWS, |lab| {
            refused(lab, &|iova, gpa| {
                vec![
                    format!("map iova={} gpa={gpa} len={PAGE} perm=rw", iova + 8),
                    format!("map iova={iova} gpa={} len={PAGE} perm=rw", gpa + 8),
                    format!("map iova={iova} gpa={gpa} len=64 perm=rw"),
                ]
            })
        }),
        Attack::new("map-over-a-mapping", front, open, WINDOWS, map_over),
        Attack::new("unmap-half-a-mapping", front, open, WINDOWS, unmap_half),
        Attack::new("mapping-flood", front, open, WINDOWS, mapping_flood),
    ]);
    all
}

/// Pages around which the guest's own memory lies, full of words that nobody may change.
struct Guard {
    gpa: u64,
    seed: u64,
}

impl Guard {
    const LEN: u64 = 64 * PAGE;

    fn new(lab: &mut Lab) -> Tried<Self> {
        let (gpa, seed) = (lab.pages(Self::LEN / PAGE)?, lab.seed());
        lab.fill(gpa, Self::LEN, seed)?;
        Ok(Self { gpa, seed })
    }

    fn changed(&self, lab: &mut Lab) -> Tried<u64> {
        lab.wrong(self.gpa, Self::LEN, self.seed)
    }
}

fn workload(ended: &Result<crate::bench::record::WorkResult, String>) -> Option<String> {
    match ended {
        Ok(result) if result.timeout > 0 => Some("its receiver gave up waiting".to_owned()),
        Ok(result) => {
            let bad = result.lost + result.duplicated + result.reordered + result.corrupted;
            (bad > 0).then(|| format!("{bad} frames wrong"))
        }
        Err(_) => None,
    }
}

fn scribbled_by_back_end(lab: &mut Lab, what: &str) -> Tried<Finding> {
    lab.forget()?;
    let guard = Guard::new(lab)?;
    let seed = lab.seed();
    // The victim works with its rings while the attacker writes into them.
    lab.run(
        ["", "both"],
        "size=256 batch=32 ms=300 warmup_ms=0 timeout_ms=500",
    )?;
    let line = format!("scribble what={what} count={SCRIBBLES} seed={seed}");
    let written = lab.ask(BACK, &line, ANSWER)?.number("writes").unwrap_or(0);
    lab.ask(BACK, "calls count=10", ANSWER)?;
    let ended = lab.result(FRONT, WORK)?;
    lab.expect_alive(FRONT)?;
    let got = guard.changed(lab)?;
    let mut noticed = lab.complaints(FRONT)?;
    noticed.extend(workload(&ended));
    Ok(Finding {
        tries: written,
        got_through: got,
        noticed: or_nothing(&noticed),
    })
}

fn scribbled_by_front_end(lab: &mut Lab, what: &str) -> Tried<Finding> {
    lab.forget()?;
    let seed = lab.seed();
    lab.run(
        ["both", ""],
        "size=256 batch=32 ms=300 warmup_ms=0 timeout_ms=500",
    )?;
    let line = format!("scribble what={what} count={SCRIBBLES} seed={seed}");
    let written = lab.ask(FRONT, &line, ANSWER)?.number("writes").unwrap_or(0);
    lab.ask(FRONT, "kicks count=10", ANSWER)?;
    let ended = lab.result(BACK, WORK)?;
    lab.expect_alive(BACK)?;
    let mut noticed = lab.complaints(BACK)?;
    noticed.extend(workload(&ended));
    Ok(Finding {
        tries: written,
        got_through: 0,
        noticed: or_nothing(&noticed),
    })
}

fn call_flood(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let guard = Guard::new(lab)?;
    lab.run(["", "sink"], "size=256 mode=irq timeout_ms=300")?;
    lab.ask(BACK, &format!("calls count={FLOOD}"), 3 * ANSWER)?;
    let _ = lab.result(FRONT, WORK)?;
    lab.expect_alive(FRONT)?;
    let got = guard.changed(lab)?;
    let frames = lab.traffic()?;
    Ok(Finding {
        tries: FLOOD,
        got_through: got,
        noticed: format!("interrupts; {frames} frames passed afterwards"),
    })
}

fn kick_flood(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    lab.run(["sink", ""], "size=256 mode=irq timeout_ms=300")?;
    lab.ask(FRONT, &format!("kicks count={FLOOD}"), 3 * ANSWER)?;
    let _ = lab.result(BACK, WORK)?;
    lab.expect_alive(BACK)?;
    let frames = lab.traffic()?;
    Ok(Finding {
        tries: FLOOD,
        got_through: 0,
        noticed: format!("interrupts; {frames} frames passed afterwards"),
    })
}

fn messages(lab: &mut Lab, what: &str) -> Tried<Finding> {
    lab.forget()?;
    let guard = Guard::new(lab)?;
    let line = format!("messages what={what} count={MESSAGES}");
    let sent = lab
        .ask(BACK, &line, 3 * ANSWER)?
        .number("sent")
        .unwrap_or(0);
    lab.expect_alive(FRONT)?;
    lab.expect_alive(BACK)?;
    let got = guard.changed(lab)?;
    let mut noticed = lab.complaints(FRONT)?;
    let frames = lab.traffic()?;
    noticed.push(format!("{frames} frames passed afterwards"));
    Ok(Finding {
        tries: sent,
        got_through: got,
        noticed: noticed.join("; "),
    })
}

/// Requests that the IOMMU must refuse.
fn refused(lab: &mut Lab, lines: &dyn Fn(u64, u64) -> Vec<String>) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, iova) = (lab.pages(2)?, lab.plot());
    let mut statuses = Vec::new();
    for line in lines(iova, gpa) {
        statuses.extend(lab.try_request(&line)?);
    }
    lab.expect_alive(BACK)?;
    verdict(&statuses)
}

fn verdict(statuses: &[u64]) -> Tried<Finding> {
    let accepted = statuses.iter().filter(|status| **status == 0).count();
    let mut kinds: Vec<u64> = statuses.to_vec();
    kinds.sort_unstable();
    kinds.dedup();
    let kinds: Vec<String> = kinds.iter().map(u64::to_string).collect();
    Ok(Finding {
        tries: statuses.len() as u64,
        got_through: accepted as u64,
        noticed: format!("status {}", kinds.join(", ")),
    })
}

fn map_over(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, iova, public, seed) = (lab.pages(2)?, lab.plot(), lab.seed(), lab.seed());
    lab.fill(gpa, PAGE, public)?;
    lab.fill(gpa + PAGE, PAGE, seed)?;
    lab.map(iova, gpa, PAGE, "r")?;
    let line = format!("map iova={iova} gpa={} len={PAGE} perm=rw", gpa + PAGE);
    let statuses: Vec<u64> = lab.try_request(&line)?.into_iter().collect();
    lab.control(iova, public)?;
    verdict(&statuses)
}

fn unmap_half(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, iova, seed) = (lab.pages(2)?, lab.plot(), lab.seed());
    lab.fill(gpa, 2 * PAGE, seed)?;
    lab.map(iova, gpa, 2 * PAGE, "rw")?;
    let line = format!("unmap iova={iova} len={PAGE}");
    let statuses: Vec<u64> = lab.try_request(&line)?.into_iter().collect();
    lab.control(iova, seed)?;
    verdict(&statuses)
}

/// More mappings than there can be: the last are refused, and the link serves on.
fn mapping_flood(lab: &mut Lab) -> Tried<Finding> {
    lab.forget()?;
    let (gpa, iova) = (lab.pages(2)?, lab.plot());
    let mut mapped = 0;
    let mut refusal = None;
    // Pages that are no neighbours, so that no two mappings become one window.
    for n in 0..=MAPPINGS {
        let line = format!(
            "map iova={} gpa={} len={PAGE} perm=r",
            iova + 2 * n * PAGE,
            gpa + (n % 2) * PAGE
        );
        match lab.try_request(&line)? {
            Some(0) => mapped += 1,
            status => {
                refusal = status;
                break;
            }
        }
    }
    for n in 0..mapped {
        lab.unmap(iova + 2 * n * PAGE, PAGE)?;
    }
    let frames = lab.traffic()?;
    Ok(Finding {
        tries: mapped + 1,
        got_through: u64::from(refusal.is_none()),
        noticed: match refusal {
            Some(status) => format!(
                "status {status} after {mapped} mappings; {frames} frames passed afterwards"
            ),
            None => "nothing".to_owned(),
        },
    })
}

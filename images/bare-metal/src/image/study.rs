//! The steps of the isolation study, on this machine's devices.

use alloc::vec::Vec;
use core::fmt;

use bare_metal::record::{Done, Field};
use bare_metal::study::race::{self, Gate, Victim};
use bare_metal::study::scribble::{Scribble, scribble};
use bare_metal::study::{Sweep, check, fill, peek, poke, windows};
use bare_metal::{Link, Study};
use guest_driver::Platform;
use guest_driver::mapper::Mapper;
use guest_driver::translated::Behind;
use guest_driver::vhost_pci::Junk;
use guest_driver::virtio_iommu::{Error, Fault, Request, access, status, status_of};
use guest_driver::virtio_pci::{Doorbell, Notify};
use virtqueue::net::features::RING_PACKED;

use crate::links::{BackEnd, FrontEnd, NotStarted};
use crate::machine::Machine;
use crate::{arch, console, error};

/// Faults take a moment to arrive: the queue is empty when nothing has come for so long, in milliseconds; and how long to look at all.
const QUIET_MS: u64 = 2;
const FAULTS_MS: u64 = 50;
/// How long a message waits for a free buffer, in milliseconds.
const SEND_MS: u64 = 100;

const OK: u16 = status::OK as u16;
const UNSUPP: u16 = status::UNSUPP as u16;

/// Reports that a step was carried out.
fn done(step: &Study, fields: &[(&str, Field)]) {
    let command = step.name();
    console::record(format_args!("{}", Done { command, fields }));
}

/// Reports that a step makes no sense here.
fn refuse(step: &Study, why: fmt::Arguments) {
    error(format_args!("{}: {why}", step.name()));
}

fn number(number: impl Into<u64>) -> Field<'static> {
    Field::Number(number.into())
}

/// Carries out a step at the front-end.
pub fn front_end<M: Mapper>(link: &mut FrontEnd<'_, M>, step: &Study) {
    let not_ours = || refuse(step, format_args!("not memory of `pages`"));
    match *step {
        Study::Pages { .. } | Study::Fill { .. } | Study::Check { .. } => {
            let granule = link.platform.behind().map_or(race::PAGE, Behind::granule);
            own_memory(link.machine, &mut link.pages, granule, step);
        }
        Study::Attach | Study::Detach => {
            let status = link.attach(*step == Study::Attach);
            done(step, &[("status", number(status))]);
        }
        Study::Map {
            iova,
            gpa,
            len,
            flags,
        } => request(link, step, |domain| Request::Map {
            domain,
            iova,
            gpa,
            len,
            flags,
        }),
        Study::Unmap { iova, len } => {
            request(link, step, |domain| Request::Unmap { domain, iova, len });
        }
        Study::Faults => faults(link, step),
        Study::Start => match link.start() {
            Ok(()) => done(step, &[("status", number(OK))]),
            Err(NotStarted::Iommu(error)) => done(step, &[("status", number(error.status()))]),
            Err(NotStarted::Device(error)) => refuse(step, format_args!("{error}")),
        },
        Study::Windows { live, count } => time_windows(link, step, live, count),
        Study::Victim {
            rounds,
            iova,
            gpa,
            sync,
        } => {
            if link.pages.own(gpa, race::PAGE) && link.pages.own(sync, race::PAGE) {
                be_the_victim(link, step, rounds, iova, [gpa, sync]);
            } else {
                not_ours();
            }
        }
        Study::Scribble { what, count, seed } => {
            let Some(device) = &link.device else {
                return refuse(step, format_args!("no device"));
            };
            if !Scribble::of(false).contains(&what) {
                return refuse(step, format_args!("not for a front-end"));
            }
            let packed = device.features() & RING_PACKED != 0;
            let Some(rings) = device.rings() else {
                return refuse(step, format_args!("no rings"));
            };
            let writes = scribble(&device.memory(), &rings, packed, what, count, seed);
            done(step, &[("writes", number(writes))]);
        }
        Study::Kicks { count } => {
            let Some(device) = &link.device else {
                return refuse(step, format_args!("no device"));
            };
            match [device.doorbell(0), device.doorbell(1)] {
                [Ok(rx), Ok(tx)] => ring(step, [rx, tx], count),
                _ => refuse(step, format_args!("no doorbell")),
            }
        }
        _ => refuse(step, format_args!("not for a front-end")),
    }
}

/// The pages that experiments have: guest physical addresses and lengths.
#[derive(Default)]
pub struct Pages(Vec<(u64, u64)>);

impl Pages {
    /// Takes more of them; where the first is.
    fn take(&mut self, machine: &Machine, granule: u64, count: u64) -> Option<u64> {
        let len = count.checked_mul(race::PAGE)?.next_multiple_of(granule);
        let align = usize::try_from(granule.max(race::PAGE)).ok()?;
        let dma = machine.dma(usize::try_from(len).ok()?, align)?;
        self.0.push((dma.addr, len));
        Some(dma.addr)
    }

    /// Whether memory is theirs.
    fn own(&self, gpa: u64, len: u64) -> bool {
        let inside = |&(start, size): &(u64, u64)| {
            let offset = gpa.checked_sub(start);
            offset.is_some_and(|offset| len <= size && offset <= size - len)
        };
        self.0.iter().any(inside)
    }
}

/// Carries out a step that concerns this guest's own memory only.
fn own_memory(machine: &Machine, pages: &mut Pages, granule: u64, step: &Study) {
    let not_ours = || refuse(step, format_args!("not memory of `pages`"));
    match *step {
        Study::Pages { count } => match pages.take(machine, granule, count) {
            Some(gpa) => done(step, &[("gpa", number(gpa)), ("count", number(count))]),
            None => refuse(step, format_args!("no memory")),
        },
        Study::Fill { gpa, len, seed } => {
            if pages.own(gpa, len) && fill(&machine.memory(0), gpa, len, seed) {
                done(step, &[]);
            } else {
                not_ours();
            }
        }
        Study::Check { gpa, len, seed } => {
            let owned = pages.own(gpa, len);
            match check(&machine.memory(0), gpa, len, seed).filter(|_| owned) {
                Some(found) => {
                    let first = number(found.first.unwrap_or(0));
                    let fields = [("wrong", number(found.wrong)), ("first", first)];
                    let count = 1 + usize::from(found.first.is_some());
                    done(step, fields.get(..count).unwrap_or(&fields));
                }
                None => not_ours(),
            }
        }
        _ => refuse(step, format_args!("not about memory")),
    }
}

/// Makes one request and says how long it took.
fn request<M: Mapper>(link: &FrontEnd<'_, M>, step: &Study, request: impl FnOnce(u32) -> Request) {
    let start = arch::now();
    let status = link.platform.behind().map_or(UNSUPP, |behind| {
        status_of(behind.request(&request(behind.domain)))
    });
    let ticks = arch::now() - start;
    done(
        step,
        &[("status", number(status)), ("ticks", number(ticks))],
    );
}

/// Reports the faults that have come, and come in the next moment.
fn faults<M: Mapper>(link: &FrontEnd<'_, M>, step: &Study) {
    let mut count = 0u64;
    let mut last = Fault::default();
    if let Some(behind) = link.platform.behind() {
        let start = arch::now();
        let mut quiet_since = start;
        loop {
            let now = arch::now();
            let quiet = now - quiet_since > QUIET_MS * link.ticks_per_ms();
            if quiet || now - start > FAULTS_MS * link.ticks_per_ms() {
                break;
            }
            let Ok(mut iommu) = behind.iommu.try_borrow_mut() else {
                break;
            };
            match iommu.faults(&mut |fault| last = fault) {
                Ok(0) => core::hint::spin_loop(),
                Ok(n) => {
                    count += n as u64;
                    quiet_since = now;
                }
                Err(error) => return refuse(step, format_args!("{error}")),
            }
        }
    }
    let fields = [
        ("count", number(count)),
        ("reason", number(last.reason)),
        ("flags", number(last.flags)),
        ("address", number(last.address)),
    ];
    let shown = if count == 0 { 1 } else { fields.len() };
    done(step, fields.get(..shown).unwrap_or(&fields));
}

fn time_windows<M: Mapper>(link: &mut FrontEnd<'_, M>, step: &Study, live: u64, count: u64) {
    let Some((ground, behind)) = link.ground().zip(link.platform.behind()) else {
        return refuse(step, format_args!("no virtio-iommu, or no memory"));
    };
    let Ok(mut iommu) = behind.iommu.try_borrow_mut() else {
        return refuse(step, format_args!("{}", Error::Full));
    };
    let timed = windows::windows(&mut *iommu, &ground, live, count, arch::now);
    done(
        step,
        &[
            ("live", number(live)),
            ("status", number(timed.status)),
            ("map", Field::Times(&timed.map)),
            ("unmap", Field::Times(&timed.unmap)),
        ],
    );
}

/// The victim's page, behind the IOMMU where there is one.
struct PageGate<'a> {
    behind: Option<&'a Behind>,
    iova: u64,
    gpa: u64,
}

impl PageGate<'_> {
    fn request(&self, request: impl FnOnce(u32) -> Request) -> Result<u8, Error> {
        let Some(behind) = self.behind else {
            return Ok(status::OK);
        };
        behind.request(&request(behind.domain))
    }
}

impl Gate for PageGate<'_> {
    fn map(&mut self) -> Result<u8, Error> {
        self.request(|domain| Request::Map {
            domain,
            iova: self.iova,
            gpa: self.gpa,
            len: race::PAGE,
            flags: access::READ | access::WRITE,
        })
    }

    fn unmap(&mut self) -> Result<u8, Error> {
        self.request(|domain| Request::Unmap {
            domain,
            iova: self.iova,
            len: race::PAGE,
        })
    }

    fn now(&self) -> u64 {
        arch::now()
    }
}

fn be_the_victim<M: Mapper>(
    link: &FrontEnd<'_, M>,
    step: &Study,
    rounds: u64,
    iova: u64,
    pages: [u64; 2],
) {
    let mut gate = PageGate {
        behind: link.platform.behind(),
        iova,
        gpa: pages[0],
    };
    let memory = link.machine.memory(0);
    let Some(seen) = race::victim(&memory, pages, rounds, link.ticks_per_ms(), &mut gate) else {
        return refuse(step, format_args!("not memory of `pages`"));
    };
    let Victim {
        rounds,
        touched,
        corrupted,
        status,
    } = seen;
    done(
        step,
        &[
            ("rounds", number(rounds)),
            ("touched", number(touched)),
            ("corrupted", number(corrupted)),
            ("status", number(status)),
        ],
    );
}

/// Rings doorbells in turn.
fn ring(step: &Study, doorbells: [Doorbell; 2], count: u64) {
    let doorbells = doorbells.iter().cycle();
    for (_, doorbell) in (0..count).zip(doorbells) {
        doorbell.notify();
    }
    done(step, &[]);
}

/// Carries out a step at the back-end.
pub fn back_end(link: &mut BackEnd, step: &Study) {
    match *step {
        Study::Pages { .. } | Study::Fill { .. } | Study::Check { .. } => {
            own_memory(link.machine, &mut link.pages, race::PAGE, step);
        }
        Study::Peek(sweep) => sweep_window(link, step, &sweep),
        Study::Poke(sweep) => sweep_window(link, step, &sweep),
        Study::Attacker { offset, sync, ms } => {
            let deadline = arch::now() + ms * link.ticks_per_ms();
            let seen = race::attacker(&link.device.window(), [offset, sync], deadline, arch::now);
            done(
                step,
                &[
                    ("reads", number(seen.reads)),
                    ("writes", number(seen.writes)),
                    ("ones", number(seen.ones)),
                    ("leaked", number(seen.leaked)),
                    ("other", number(seen.other)),
                ],
            );
        }
        Study::Scribble { what, count, seed } => {
            if !Scribble::of(true).contains(&what) {
                return refuse(step, format_args!("not for a back-end"));
            }
            let device = &link.device;
            let Some(rings) = device.rings() else {
                return refuse(step, format_args!("no rings"));
            };
            let writes = scribble(&device.window(), &rings, device.packed(), what, count, seed);
            done(step, &[("writes", number(writes))]);
        }
        Study::Calls { count } => match [link.device.call(0), link.device.call(1)] {
            [Ok(rx), Ok(tx)] => ring(step, [rx, tx], count),
            _ => refuse(step, format_args!("no doorbell")),
        },
        Study::Messages { what, count } => {
            let sent = (0..count).take_while(|&n| send_junk(link, what, n)).count();
            done(step, &[("sent", number(sent as u64))]);
        }
        _ => refuse(step, format_args!("not for a back-end")),
    }
}

fn sweep_window(link: &BackEnd, step: &Study, sweep: &Sweep) {
    let window = link.device.window();
    let start = arch::now();
    if matches!(step, Study::Peek(_)) {
        let seen = peek(&window, sweep);
        let ticks = arch::now() - start;
        match seen {
            Some(seen) => done(
                step,
                &[
                    ("reads", number(seen.reads)),
                    ("ones", number(seen.ones)),
                    ("secrets", number(seen.secrets)),
                    ("ticks", number(ticks)),
                ],
            ),
            None => done(step, &[("skipped", number(1u8))]),
        }
    } else {
        let writes = poke(&window, sweep);
        let ticks = arch::now() - start;
        match writes {
            Some(writes) => done(
                step,
                &[("writes", number(writes)), ("ticks", number(ticks))],
            ),
            None => done(step, &[("skipped", number(1u8))]),
        }
    }
}

/// Sends a message when there is a buffer for it; `false` where none becomes free.
fn send_junk(link: &mut BackEnd, what: Junk, n: u64) -> bool {
    let deadline = arch::now() + SEND_MS * link.ticks_per_ms();
    loop {
        match link.device.send_junk(what, bare_metal::study::mix(n)) {
            Ok(true) => return true,
            Ok(false) if arch::now() < deadline => core::hint::spin_loop(),
            Ok(false) => return false,
            Err(why) => {
                error(format_args!("vhost-pci: {why}"));
                return false;
            }
        }
    }
}

//! What it takes to change windows: alone, among many, and beside traffic.

use alloc::boxed::Box;

use guest_driver::virtio_iommu::{Error, Iommu, Request, Ticket, access, status, status_of};

use crate::histogram::Histogram;

/// Most windows that are kept mapped.
pub const MAX_LIVE: u64 = 8192;
/// Windows that come and go take this many places in turn.
const PLACES: u64 = 64;
/// Fewest pages behind windows.
pub const MIN_PAGES: u64 = 4;

/// Where windows lie, and what is behind them.
#[derive(Clone, Copy, Debug)]
pub struct Ground {
    /// The domain.
    pub domain: u32,
    /// Bytes of a window: the smallest page of the IOMMU.
    pub page: u64,
    /// Guest physical address of the first page behind windows.
    pub gpa: u64,
    /// How many pages there are: even, at least [`MIN_PAGES`].
    pub pages: u64,
    /// The first device address behind all windows.
    pub end: u64,
}

impl Ground {
    /// The page behind window `n`: never the one behind that of its neighbours, so that no two windows can become one.
    fn gpa(&self, n: u64) -> u64 {
        let pages = self.pages.max(MIN_PAGES);
        self.gpa + self.page * ((2 * n) % pages + (2 * n / pages) % 2)
    }

    fn live(&self, n: u64) -> Request {
        self.map(self.live_start() + n * self.page, self.gpa(n))
    }

    fn live_start(&self) -> u64 {
        self.end.saturating_sub(MAX_LIVE * self.page)
    }

    /// Where the window that comes as number `n` lies: with a hole on either side.
    fn passing(&self, n: u64) -> u64 {
        let start = self.live_start().saturating_sub(4 * PLACES * self.page);
        start + (n % PLACES) * 2 * self.page
    }

    fn map(&self, iova: u64, gpa: u64) -> Request {
        Request::Map {
            domain: self.domain,
            iova,
            gpa,
            len: self.page,
            flags: access::READ | access::WRITE,
        }
    }

    fn come(&self, n: u64) -> Request {
        self.map(self.passing(n), self.gpa(n))
    }

    fn go(&self, n: u64) -> Request {
        Request::Unmap {
            domain: self.domain,
            iova: self.passing(n),
            len: self.page,
        }
    }
}

/// How long changes took.
#[derive(Clone, Debug, Default)]
pub struct Timed {
    /// Of the first request that failed, which ends it; otherwise 0.
    pub status: u16,
    /// Ticks of a MAP.
    pub map: Box<Histogram>,
    /// Ticks of an UNMAP.
    pub unmap: Box<Histogram>,
}

/// Keeps `live` windows mapped (at most [`MAX_LIVE`]), maps and unmaps `count` further ones, one at a time, and takes all away again.
pub fn windows<I: Iommu + ?Sized>(
    iommu: &mut I,
    ground: &Ground,
    live: u64,
    count: u64,
    now: impl Fn() -> u64,
) -> Timed {
    let mut timed = Timed::default();
    let live = live.min(MAX_LIVE);
    timed.status = status_of(iommu.batch(&mut (0..live).map(|n| ground.live(n))));
    for n in 0..count {
        if timed.status != u16::from(status::OK) {
            break;
        }
        let parts = [
            (ground.come(n), &mut timed.map),
            (ground.go(n), &mut timed.unmap),
        ];
        for (request, times) in parts {
            let start = now();
            let status = status_of(iommu.request(&request));
            times.add(now().wrapping_sub(start));
            if timed.status == u16::from(status::OK) {
                timed.status = status;
            }
        }
    }
    if live > 0 {
        let all = Request::Unmap {
            domain: ground.domain,
            iova: ground.live_start(),
            len: MAX_LIVE * ground.page,
        };
        let status = status_of(iommu.request(&all));
        if timed.status == u16::from(status::OK) {
            timed.status = status;
        }
    }
    timed
}

/// What came of changes beside a workload.
#[derive(Clone, Debug, Default)]
pub struct Churned {
    /// Ticks from notification to completion, as the workload saw it.
    pub times: Box<Histogram>,
    /// Requests that did not end well.
    pub failed: u64,
}

/// Changes windows beside a workload: maps one and unmaps the one before, so many times a second, and waits for neither.
#[derive(Debug)]
pub struct Churn {
    ground: Ground,
    period: u64,
    next_at: u64,
    /// The number of the next window.
    next: u64,
    /// What is under way, and since when.
    pending: [Option<Ticket>; 2],
    started: u64,
    /// The IOMMU is of no use any more.
    broken: bool,
    seen: Churned,
}

impl Churn {
    /// Begins at `now`.
    #[must_use]
    pub fn new(ground: Ground, hz: u64, ticks_per_ms: u64, now: u64) -> Self {
        Self {
            ground,
            period: ticks_per_ms * 1000 / hz.max(1),
            next_at: now,
            next: 0,
            pending: [None, None],
            started: now,
            broken: false,
            seen: Churned::default(),
        }
    }

    /// Does what is due; to be called often.
    pub fn beside<I: Iommu + ?Sized>(&mut self, iommu: &mut I, now: u64) {
        let idle = self.pending.iter().all(Option::is_none);
        if idle && now < self.next_at || self.broken {
            return;
        }
        if !idle {
            self.collect(iommu, now);
            return;
        }
        // What was missed is not made up for.
        self.next_at = (self.next_at + self.period).max(now);
        self.started = now;
        let coming = iommu.submit(&self.ground.come(self.next));
        let going = match self.next.checked_sub(1) {
            Some(before) => iommu.submit(&self.ground.go(before)).map(Some),
            None => Ok(None),
        };
        iommu.flush();
        self.next += 1;
        match (coming, going) {
            (Ok(coming), Ok(going)) => self.pending = [Some(coming), going],
            (coming, _) => {
                self.pending = [coming.ok(), None];
                self.fail();
            }
        }
    }

    fn collect<I: Iommu + ?Sized>(&mut self, iommu: &mut I, now: u64) {
        for place in &mut self.pending {
            let Some(ticket) = place else { continue };
            match iommu.poll(ticket) {
                Ok(None) => {}
                Ok(Some(status)) => {
                    *place = None;
                    self.seen.times.add(now.wrapping_sub(self.started));
                    self.seen.failed += u64::from(status != status::OK);
                }
                Err(_) => {
                    *place = None;
                    self.broken = true;
                    self.seen.failed += 1;
                }
            }
        }
    }

    fn fail(&mut self) {
        self.broken = true;
        self.seen.failed += 1;
    }

    /// Waits for what is under way, and takes the last window away.
    pub fn end<I: Iommu + ?Sized>(mut self, iommu: &mut I, now: impl Fn() -> u64) -> Churned {
        for ticket in core::mem::take(&mut self.pending).into_iter().flatten() {
            let result: Result<u8, Error> = iommu.wait(ticket);
            self.seen.times.add(now().wrapping_sub(self.started));
            self.seen.failed += u64::from(result != Ok(status::OK));
        }
        if let Some(last) = self.next.checked_sub(1) {
            let result = iommu.request(&self.ground.go(last));
            self.seen.failed += u64::from(result != Ok(status::OK));
        }
        self.seen
    }
}

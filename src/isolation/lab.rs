//! The two VMs of the study, and what their guests can be told to do.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use crate::bench::record::{Done, Record, VmmStats, WorkResult};
use crate::cli::isolation::Mode;
use crate::cli::rings::{Layout, Ring, RingSetup};
use crate::cli::vms::VmsArgs;
use crate::exit::Failure;
use crate::guest::Guest;
use crate::host;
use crate::pair;
use crate::sys::{self, Signals};
use crate::tempdir::TempDir;

/// The back-end VM.
pub const BACK: usize = 0;
/// The front-end VM.
pub const FRONT: usize = 1;
const NAMES: [&str; 2] = ["back-end", "front-end"];

/// The guests' page.
pub const PAGE: u64 = 4096;
/// What the back-end's BAR can show.
pub const WINDOW: u64 = 16 << 30;
/// The first address that the front-end's virtio-iommu cannot map.
pub const RANGE: u64 = 8 << 30;
/// How many mappings it can have.
pub const MAPPINGS: u64 = 1024;
/// The front-end's memory, and what is for devices where that is apart.
pub const RAM: u64 = 128 << 20;
const DMA: u64 = 32 << 20;
/// Guards in the back-end's memory, which a front-end has no way to.
const GUARD: u64 = 64 * PAGE;
/// Where experiments are mapped: above the guest's own rings and buffers.
const FIRST_IOVA: u64 = 6 << 30;
/// What no attack reaches beyond from its first address.
const PLOT: u64 = 4 << 20;
/// Where secrets are said to be when there is no front-end that could say.
const NOWHERE: u64 = 64 << 20;

/// How long two VMs may take to boot and find each other.
const BOOT: Duration = Duration::from_secs(15);
/// How long a command may take that does not say how long.
pub const ANSWER: Duration = Duration::from_secs(10);
/// How long the answer to a command may still come after the guest complained of something.
const AFTER_ERROR: Duration = Duration::from_millis(500);

/// What the study was asked to do.
pub struct Study {
    /// What the window shows.
    pub mode: Mode,
    /// Rounds of the race.
    pub rounds: u64,
    /// The back-end's core, the front-end's.
    pub cores: [usize; 2],
    /// How the VMs' processes run.
    pub vms: VmsArgs,
    /// Absent in tests.
    pub signals: Option<Signals>,
}

/// Why an attack did not come to its end.
#[derive(Debug)]
pub enum Trouble {
    /// A VM died or hung: that is a success of the attack.
    Victim(String),
    /// The study itself failed: nothing is known.
    Study(anyhow::Error),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Study(error)
    }
}

/// What an attack, or a step of one, came to.
pub type Tried<T> = Result<T, Trouble>;

/// The study's own expectation was not met.
pub fn amiss<T>(why: impl Into<String>) -> Tried<T> {
    Err(Trouble::Study(anyhow!(why.into())))
}

/// How the VMs are set up for an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    /// The front-end's guest has touched neither its IOMMU nor its network device.
    Bare,
    /// The link is up; the front-end's guest maps and unmaps pages as it is told.
    Open(Layout),
    /// The link is up, with everything that traffic needs mapped.
    Live(Layout),
    /// As [`Scene::Live`] with split rings; the front-end's memory for devices is apart from its RAM.
    Apart,
    /// There is no front-end VM.
    Alone,
}

impl Scene {
    /// What it comes to in this mode: without an IOMMU a front-end is up from the start.
    pub fn in_mode(self, mode: Mode) -> Self {
        match (mode, self) {
            (Mode::None, _) => Self::Alone,
            (Mode::Whole, Self::Bare) => Self::Live(Layout::Split),
            (Mode::Whole, Self::Open(layout)) => Self::Live(layout),
            (_, scene) => scene,
        }
    }
}

/// What a guest read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peek {
    /// How often; 0 where the processor has no access of that width.
    pub reads: u64,
    /// How many gave all-ones.
    pub ones: u64,
    /// 8-byte words of the secret.
    pub secrets: u64,
}

impl Peek {
    /// Reads that gave anything, where nothing is to be seen.
    pub fn seen(self) -> u64 {
        self.secrets.max(self.reads.saturating_sub(self.ones))
    }
}

/// Both VMs, or the back-end's alone.
pub struct Lab<'a> {
    study: &'a Study,
    /// How it was set up.
    pub scene: Scene,
    sides: [Option<Guest>; 2],
    waiting: VecDeque<(usize, Record)>,
    up: [bool; 2],
    drops: [u64; 2],
    errors: VecDeque<(usize, String)>,
    /// How the workloads of this run ended that nobody asked for yet.
    ended: [Option<Result<WorkResult, String>>; 2],
    /// Answers that came while another was waited for.
    early: Vec<(usize, Done)>,
    /// Faults that were known of before.
    faults: u64,
    /// Guards in the back-end's memory: where, and of which seed.
    guard: Option<[u64; 2]>,
    plots: u64,
    seeds: u64,
    runs: u16,
    // Declared last: the socket's directory goes when the VMs are gone.
    directory: TempDir,
}

impl<'a> Lab<'a> {
    /// Boots the VMs.
    pub fn boot(study: &'a Study, scene: Scene) -> Tried<Self> {
        let directory = TempDir::new().context("cannot make a directory for the socket")?;
        let mut lab = Self {
            study,
            scene,
            sides: [None, None],
            waiting: VecDeque::new(),
            up: [false; 2],
            drops: [0; 2],
            errors: VecDeque::new(),
            ended: [None, None],
            early: Vec::new(),
            faults: 0,
            guard: None,
            plots: 0,
            seeds: 0,
            runs: 0,
            directory,
        };
        lab.start(BACK)?;
        if scene != Scene::Alone {
            lab.start(FRONT)?;
        }
        lab.settle_in().map_err(|trouble| match trouble {
            Trouble::Victim(why) => Trouble::Study(anyhow!(why)),
            study => study,
        })?;
        Ok(lab)
    }

    fn settle_in(&mut self) -> Tried<()> {
        // The first command is answered when the guest has booted.
        self.peek(0, 8, 8, 8, 0)?;
        match self.scene {
            Scene::Alone => {}
            Scene::Bare => {
                self.ask(FRONT, "faults", BOOT)?;
            }
            Scene::Open(_) => {
                self.attach()?;
                self.start_device()?;
                self.wait_until_up(BOOT)?;
            }
            Scene::Live(_) | Scene::Apart => self.wait_until_up(BOOT)?,
        }
        Ok(())
    }

    /// What the window shows.
    pub fn mode(&self) -> Mode {
        self.study.mode
    }

    /// Rounds of the race.
    pub fn rounds(&self) -> u64 {
        self.study.rounds
    }

    /// The socket between the two VMs.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("study.sock")
    }

    fn run_args(&self, side: usize) -> Vec<OsString> {
        let device = |prefix: &str, rest: &str| {
            let mut text = OsString::from(prefix);
            text.push(self.socket());
            text.push(rest);
            text
        };
        let mut args: Vec<OsString> =
            vec![format!("--cpus=count=1,affinity={}", self.study.cores[side]).into()];
        if side == BACK {
            args.push("--memory=size=64M".into());
            let rest = format!(",listen=on,window={WINDOW}");
            args.push(device("--vhost-pci=socket=", &rest));
            return args;
        }
        let layout = match self.scene {
            Scene::Open(layout) | Scene::Live(layout) => layout,
            Scene::Bare | Scene::Apart | Scene::Alone => Layout::Split,
        };
        let rings = RingSetup::default().with(Ring {
            layout,
            in_order: false,
            size: 256,
        });
        args.push(match self.scene {
            Scene::Apart => format!("--memory=size={RAM},dma={DMA}").into(),
            _ => format!("--memory=size={RAM}").into(),
        });
        args.push(device(
            "--net=socket=",
            &format!(",listen=off,{}", rings.net_keys()),
        ));
        if self.study.mode.has_iommu() {
            let write_only = match self.study.mode {
                Mode::Readable => "readable",
                _ => "exact",
            };
            args.push(
                format!("--iommu=range={RANGE},mappings={MAPPINGS},write-only={write_only}").into(),
            );
            let how = match self.scene {
                Scene::Live(_) | Scene::Alone => "static",
                // Memory for devices lies above 4 GiB: moved up by as much again it would leave the range.
                Scene::Apart => "static iova=0",
                Scene::Bare | Scene::Open(_) => "manual",
            };
            args.push(format!("--cmdline=iommu={how}").into());
        }
        args
    }

    /// Boots one of the VMs, in the place of the one that was there.
    pub fn start(&mut self, side: usize) -> Tried<()> {
        self.sides[side] = None;
        self.up[side] = false;
        self.waiting.retain(|(of, _)| *of != side);
        if side == FRONT {
            self.faults = 0;
        } else {
            self.guard = None;
        }
        let mut args = self.run_args(side);
        let more = self.study.vms.run_flags(pair::ENDS[side], 0);
        args.extend(more.map_err(anyhow::Error::from)?);
        self.sides[side] = Some(Guest::start(NAMES[side], &args)?);
        Ok(())
    }

    /// A signal to a VM's process.
    pub fn signal(&mut self, side: usize, number: i32) -> Tried<()> {
        let process = self.sides[side]
            .as_ref()
            .and_then(|guest| guest.process.as_ref());
        let Some(process) = process else {
            return amiss(format!(
                "there is no {} VM to send a signal to",
                NAMES[side]
            ));
        };
        sys::signal(process.pid(), number).context("kill")?;
        Ok(())
    }

    /// Stops a VM's process, and waits until each of its threads has stopped: the signal alone takes its time.
    pub fn stop(&mut self, side: usize) -> Tried<()> {
        self.signal(side, libc::SIGSTOP)?;
        let process = self.sides[side]
            .as_ref()
            .and_then(|guest| guest.process.as_ref());
        let pid = process.map_or(0, |process| process.pid());
        let deadline = Instant::now() + ANSWER;
        while !host::is_stopped(pid) {
            if Instant::now() > deadline {
                return amiss(format!("the {} VM does not stop", NAMES[side]));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Ends a VM's process at once, with no chance to clean up.
    pub fn kill(&mut self, side: usize) -> Tried<()> {
        self.signal(side, libc::SIGKILL)?;
        self.sides[side] = None;
        self.up[side] = false;
        self.waiting.retain(|(of, _)| *of != side);
        Ok(())
    }

    // ---- records ----

    /// Sleeps until records have come (true) or the time has (false). A VM's end is trouble.
    fn gather(&mut self, deadline: Instant) -> Tried<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let there: Vec<usize> = (0..2).filter(|&side| self.sides[side].is_some()).collect();
        let ready = {
            let guests = there.iter().filter_map(|&side| self.sides[side].as_ref());
            let mut fds: Vec<_> = guests.map(AsFd::as_fd).collect();
            fds.extend(self.study.signals.as_ref().map(AsFd::as_fd));
            sys::poll(&fds, Some(left)).context("poll")?
        };
        if let Some(number) = self.study.signals.as_ref().and_then(Signals::caught) {
            return Err(Trouble::Study(Failure::Signal(number).into()));
        }
        for (&side, _) in there.iter().zip(&ready).filter(|(_, ready)| **ready) {
            let Some(guest) = &mut self.sides[side] else {
                continue;
            };
            match guest.read()? {
                Some(records) => {
                    let records = records.into_iter().map(|record| (side, record));
                    self.waiting.extend(records);
                }
                None => {
                    let why = format!("{:#}", guest.died());
                    self.sides[side] = None;
                    return Err(Trouble::Victim(why));
                }
            }
        }
        Ok(!self.waiting.is_empty() || Instant::now() < deadline)
    }

    /// The next record that is an answer; of the others note is taken.
    fn next(&mut self, deadline: Instant) -> Tried<Option<(usize, Record)>> {
        loop {
            while let Some((side, record)) = self.waiting.pop_front() {
                match record {
                    Record::Ready { .. } => self.up[side] = true,
                    Record::Down => {
                        self.up[side] = false;
                        self.drops[side] += 1;
                    }
                    record => return Ok(Some((side, record))),
                }
            }
            if !self.gather(deadline)? {
                return Ok(None);
            }
        }
    }

    /// Takes note of a record that nobody waits for.
    fn note(&mut self, side: usize, record: Record) {
        match record {
            Record::Error { what } => {
                if what.starts_with(&format!("run {} ", self.runs)) {
                    self.ended[side] = Some(Err(what.clone()));
                }
                self.errors.push_back((side, what));
            }
            Record::Result(result) if result.id == self.runs => {
                self.ended[side] = Some(Ok(result));
            }
            Record::Done(done) => self.early.push((side, done)),
            _ => {}
        }
    }

    /// Takes note of what has come so far.
    pub fn drain(&mut self) -> Tried<()> {
        while let Some((side, record)) = self.next(Instant::now())? {
            self.note(side, record);
        }
        Ok(())
    }

    /// Sends a command.
    pub fn send(&mut self, side: usize, line: &str) -> Tried<()> {
        let Some(guest) = &mut self.sides[side] else {
            return amiss(format!("there is no {} VM for '{line}'", NAMES[side]));
        };
        guest
            .send(line)
            .map_err(|error| Trouble::Victim(format!("{error:#}")))
    }

    /// What came of a command that was sent.
    pub fn answer(&mut self, side: usize, command: &str, patience: Duration) -> Tried<Done> {
        let start = Instant::now();
        let mut deadline = start + patience;
        let mut error = None;
        let early = self.early.iter();
        let mut early = early
            .enumerate()
            .filter(|(_, (of, done))| *of == side && done.command == command);
        if let Some((at, _)) = early.next() {
            return Ok(self.early.swap_remove(at).1);
        }
        while let Some((of, record)) = self.next(deadline)? {
            match record {
                Record::Done(done) if of == side && done.command == command => return Ok(done),
                record => {
                    if let (true, Record::Error { what }) = (of == side, &record) {
                        deadline = deadline.min(Instant::now() + AFTER_ERROR);
                        error = Some(what.clone());
                    }
                    self.note(of, record);
                }
            }
        }
        let name = NAMES[side];
        match error {
            Some(what) => amiss(format!(
                "the {name} guest did not carry out '{command}': {what}"
            )),
            None => Err(Trouble::Victim(format!(
                "the {name} guest gave no answer to '{command}' within {} s",
                patience.as_secs()
            ))),
        }
    }

    /// Gives a guest a command and waits for what came of it.
    pub fn ask(&mut self, side: usize, line: &str, patience: Duration) -> Tried<Done> {
        self.drain()?;
        self.early.retain(|(of, _)| *of != side);
        self.send(side, line)?;
        let command = line.split(' ').next().unwrap_or(line);
        self.answer(side, command, patience)
    }

    /// The result of a workload, or the error that ended it.
    pub fn result(&mut self, side: usize, patience: Duration) -> Tried<Result<WorkResult, String>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(ended) = self.ended[side].take() {
                return Ok(ended);
            }
            match self.next(deadline)? {
                Some((of, record)) => self.note(of, record),
                None => break,
            }
        }
        Err(Trouble::Victim(format!(
            "the workload of the {} guest did not end within {} s",
            NAMES[side],
            patience.as_secs()
        )))
    }

    /// Waits until the connection is up at both ends.
    pub fn wait_until_up(&mut self, patience: Duration) -> Tried<()> {
        let deadline = Instant::now() + patience;
        while self.up != [true; 2] {
            match self.next_or_state(deadline)? {
                Some((of, record)) => self.note(of, record),
                None => {
                    let missing = if self.up[BACK] { FRONT } else { BACK };
                    let name = NAMES[missing];
                    return Err(Trouble::Victim(format!(
                        "the {name} guest did not come up within {} s",
                        patience.as_secs()
                    )));
                }
            }
        }
        Ok(())
    }

    /// Waits until a guest has noticed that its peer is gone.
    pub fn wait_until_down(&mut self, side: usize, patience: Duration) -> Tried<()> {
        let deadline = Instant::now() + patience;
        let before = self.drops[side];
        while self.up[side] && self.drops[side] == before {
            let Some((of, record)) = self.next_or_state(deadline)? else {
                return Err(Trouble::Victim(format!(
                    "the {} guest did not notice within {} s that its peer was gone",
                    NAMES[side],
                    patience.as_secs()
                )));
            };
            self.note(of, record);
        }
        Ok(())
    }

    /// One record, or a stand-in for one that changed the state only; `None` when the time has come.
    fn next_or_state(&mut self, deadline: Instant) -> Tried<Option<(usize, Record)>> {
        if self.waiting.is_empty() && !self.gather(deadline)? {
            return Ok(None);
        }
        match self.waiting.pop_front() {
            Some((side, Record::Ready { .. })) => self.up[side] = true,
            Some((side, Record::Down)) => {
                self.up[side] = false;
                self.drops[side] += 1;
            }
            Some(other) => return Ok(Some(other)),
            None => {}
        }
        Ok(Some((BACK, Record::Unknown)))
    }

    // ---- what the victim noticed ----

    /// Forgets what was noticed so far.
    pub fn forget(&mut self) -> Tried<()> {
        self.drain()?;
        self.errors.clear();
        self.drops = [0; 2];
        Ok(())
    }

    /// What a guest noticed since then, apart from faults.
    pub fn complaints(&mut self, side: usize) -> Tried<Vec<String>> {
        self.drain()?;
        let mut all = Vec::new();
        let mut errors = self.errors.iter().filter(|(of, _)| *of == side);
        let count = errors.clone().count();
        if let Some((_, last)) = errors.next_back() {
            all.push(match count {
                1 => last.clone(),
                _ => format!("{count} errors, the last: {last}"),
            });
        }
        if self.drops[side] > 0 {
            all.push(format!("{} connection(s) dropped", self.drops[side]));
        }
        Ok(all)
    }

    /// Accesses that the front-end's IOMMU was told of as faults since the last question; its guest was told of those that its queue had room for.
    pub fn faults(&mut self) -> Tried<u64> {
        if !self.study.mode.has_iommu() || self.sides[FRONT].is_none() {
            return Ok(0);
        }
        self.ask(FRONT, "faults", ANSWER)?;
        let stats = self.stats(FRONT)?;
        let of = |name: &str| stats.iommu.get(name).and_then(|n| n.as_u64()).unwrap_or(0);
        let all = of("faults_reported") + of("faults_lost");
        let new = all.saturating_sub(self.faults);
        self.faults = all;
        Ok(new)
    }

    /// What a VMM counts.
    fn stats(&mut self, side: usize) -> Tried<VmmStats> {
        self.drain()?;
        self.send(side, "vmm stats")?;
        let deadline = Instant::now() + ANSWER;
        loop {
            match self.next(deadline)? {
                Some((of, Record::Vmm(stats))) if of == side => return Ok(stats),
                Some((of, record)) => self.note(of, record),
                None => {
                    return Err(Trouble::Victim(format!(
                        "the VMM of the {} does not answer",
                        NAMES[side]
                    )));
                }
            }
        }
    }

    /// Whether a VM still answers: its VMM and its guest.
    pub fn expect_alive(&mut self, side: usize) -> Tried<()> {
        self.stats(side)?;
        if side == BACK {
            self.peek(0, 8, 8, 8, 0)?;
        } else {
            self.ask(FRONT, "pages count=1", ANSWER)?;
        }
        Ok(())
    }

    // ---- the victim's memory ----

    /// Device addresses that no other attack uses.
    pub fn plot(&mut self) -> u64 {
        let plot = FIRST_IOVA + self.plots * PLOT;
        self.plots = (self.plots + 1) % ((RANGE - FIRST_IOVA) / PLOT);
        plot
    }

    /// Numbers for `fill`, `check` and `peek` that no other attack uses.
    pub fn seed(&mut self) -> u64 {
        self.seeds += 1;
        (1 << 40) + (self.seeds << 21)
    }

    fn victim(&self) -> bool {
        self.sides[FRONT].is_some()
    }

    /// Pages of the front-end's guest, one behind the other: the address of the first.
    pub fn pages(&mut self, count: u64) -> Tried<u64> {
        if !self.victim() {
            return Ok(NOWHERE);
        }
        self.pages_of(FRONT, count)
    }

    fn pages_of(&mut self, side: usize, count: u64) -> Tried<u64> {
        let done = self.ask(side, &format!("pages count={count}"), ANSWER)?;
        done.number("gpa")
            .map_or_else(|| amiss("'pages' says no address"), Ok)
    }

    /// Plants guards in the memory of the back-end's guest, unless they are there.
    pub fn guard_back_end(&mut self) -> Tried<()> {
        if self.guard.is_none() {
            let (gpa, seed) = (self.pages_of(BACK, GUARD / PAGE)?, self.seed());
            let line = format!("fill gpa={gpa} len={GUARD} seed={seed}");
            self.ask(BACK, &line, ANSWER)?;
            self.guard = Some([gpa, seed]);
        }
        Ok(())
    }

    /// Bytes of these guards that changed.
    pub fn broken_guards(&mut self) -> Tried<u64> {
        match self.guard {
            Some([gpa, seed]) => self.wrong_of(BACK, gpa, GUARD, seed),
            None => amiss("the back-end's memory has no guards"),
        }
    }

    /// Has the front-end's guest write its words there.
    pub fn fill(&mut self, gpa: u64, len: u64, seed: u64) -> Tried<()> {
        if self.victim() {
            let line = format!("fill gpa={gpa} len={len} seed={seed}");
            self.ask(FRONT, &line, ANSWER)?;
        }
        Ok(())
    }

    /// Bytes that are not any more what `fill` wrote.
    pub fn wrong(&mut self, gpa: u64, len: u64, seed: u64) -> Tried<u64> {
        if !self.victim() {
            return Ok(0);
        }
        self.wrong_of(FRONT, gpa, len, seed)
    }

    fn wrong_of(&mut self, side: usize, gpa: u64, len: u64, seed: u64) -> Tried<u64> {
        let line = format!("check gpa={gpa} len={len} seed={seed}");
        let done = self.ask(side, &line, ANSWER)?;
        done.number("wrong")
            .map_or_else(|| amiss("'check' says nothing"), Ok)
    }

    fn status(&mut self, side: usize, line: &str) -> Tried<u64> {
        let done = self.ask(side, line, ANSWER)?;
        done.number("status")
            .map_or_else(|| amiss(format!("'{line}' has no status")), Ok)
    }

    fn must(&mut self, line: &str) -> Tried<()> {
        if !self.study.mode.has_iommu() {
            return Ok(());
        }
        match self.status(FRONT, line)? {
            0 => Ok(()),
            status => amiss(format!("'{line}' failed with status {status}")),
        }
    }

    /// The status of a request that need not succeed; `None` where there is no IOMMU.
    pub fn try_request(&mut self, line: &str) -> Tried<Option<u64>> {
        if !self.study.mode.has_iommu() {
            return Ok(None);
        }
        self.status(FRONT, line).map(Some)
    }

    /// Maps pages for the device; without an IOMMU they are visible anyway.
    pub fn map(&mut self, iova: u64, gpa: u64, len: u64, perm: &str) -> Tried<()> {
        self.must(&format!("map iova={iova} gpa={gpa} len={len} perm={perm}"))
    }

    /// Unmaps them; without an IOMMU nothing can be taken away.
    pub fn unmap(&mut self, iova: u64, len: u64) -> Tried<()> {
        self.must(&format!("unmap iova={iova} len={len}"))
    }

    /// Puts the device into its domain.
    pub fn attach(&mut self) -> Tried<()> {
        self.must("attach")
    }

    /// Sets the network device up.
    pub fn start_device(&mut self) -> Tried<()> {
        self.must("start")
    }

    /// Resets the network device and sets it up again; returns when the link is up at both ends.
    pub fn reset_device(&mut self, patience: Duration) -> Tried<()> {
        self.drain()?;
        // Each end says anew that it is ready.
        self.up = [false; 2];
        self.send(FRONT, "reset-device")?;
        self.wait_until_up(patience)
    }

    /// Takes the device out of its domain.
    pub fn detach(&mut self) -> Tried<()> {
        self.must("detach")
    }

    // ---- the attacker's means ----

    /// Where in the window the attacker looks for a page: under its device address, or, where all memory is shown, its guest physical one.
    pub fn at(&self, iova: u64, gpa: u64) -> u64 {
        match self.study.mode {
            Mode::Whole => gpa,
            Mode::Windows | Mode::Readable | Mode::None => iova,
        }
    }

    /// The back-end's guest reads.
    pub fn peek(&mut self, offset: u64, len: u64, step: u64, width: u64, seed: u64) -> Tried<Peek> {
        let line = format!("peek offset={offset} len={len} step={step} width={width} seed={seed}");
        let patience = if offset == 0 { BOOT } else { 3 * ANSWER };
        let done = self.ask(BACK, &line, patience)?;
        let number = |name: &str| done.number(name).unwrap_or(0);
        if number("skipped") != 0 {
            return Ok(Peek::default());
        }
        Ok(Peek {
            reads: number("reads"),
            ones: number("ones"),
            secrets: number("secrets"),
        })
    }

    /// The back-end's guest writes; returns how often.
    pub fn poke(&mut self, offset: u64, len: u64, step: u64, width: u64, seed: u64) -> Tried<u64> {
        let line = format!("poke offset={offset} len={len} step={step} width={width} seed={seed}");
        let done = self.ask(BACK, &line, 3 * ANSWER)?;
        Ok(match done.number("skipped") {
            Some(1..) => 0,
            _ => done.number("writes").unwrap_or(0),
        })
    }

    /// Makes sure that the attacker sees what it may see: an attack on nothing proves nothing.
    pub fn control(&mut self, offset: u64, seed: u64) -> Tried<()> {
        if self.study.mode == Mode::None {
            return Ok(());
        }
        let peek = self.peek(offset, 64, 8, 8, seed)?;
        if peek.secrets == peek.reads && peek.reads == 8 {
            return Ok(());
        }
        amiss(format!(
            "the back-end does not see at {offset:#x} what is mapped there, so the attack would prove nothing ({peek:?})"
        ))
    }

    /// The same, where the attack may have spoilt it because nothing stood in its way.
    pub fn control_unless_whole(&mut self, offset: u64, seed: u64) -> Tried<()> {
        match self.study.mode {
            Mode::Whole => Ok(()),
            _ => self.control(offset, seed),
        }
    }

    // ---- traffic ----

    /// Starts workloads, back-end first; an empty word starts none.
    pub fn run(&mut self, work: [&str; 2], rest: &str) -> Tried<()> {
        self.runs = self.runs.wrapping_add(1);
        self.ended = [None, None];
        let id = self.runs;
        for side in [FRONT, BACK] {
            if !work[side].is_empty() {
                let line = format!("run id={id} work={} {rest}", work[side]);
                self.send(side, &line)?;
            }
        }
        Ok(())
    }

    /// Sends frames both ways and expects that each arrives: a link that was attacked has to serve on.
    pub fn traffic(&mut self) -> Tried<u64> {
        self.wait_until_up(BOOT)?;
        self.drain()?;
        self.run(
            ["both", "both"],
            "size=256 batch=32 ms=50 warmup_ms=0 timeout_ms=2000",
        )?;
        let mut verified = 0;
        for side in [BACK, FRONT] {
            let name = NAMES[side];
            match self.result(side, ANSWER)? {
                Ok(result) => {
                    let bad = result.lost
                        + result.duplicated
                        + result.reordered
                        + result.corrupted
                        + result.timeout;
                    if bad > 0 || result.verified == 0 {
                        return Err(Trouble::Victim(format!(
                            "traffic does not pass: the {name} says {result:?}"
                        )));
                    }
                    verified += result.verified;
                }
                Err(what) => {
                    return Err(Trouble::Victim(format!(
                        "traffic does not pass: the {name}: {what}"
                    )));
                }
            }
        }
        Ok(verified)
    }
}

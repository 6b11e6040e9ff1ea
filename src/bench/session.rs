//! Two VM processes and their control channels, and the relay where there is one.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::Setup;
use super::bound::Bound;
use super::pairs::{BoundSample, Lab, VmSample};
use super::plan::Case;
use super::probe;
use super::record::{Done, Record, SampleResult, VmmStats, WorkResult};
use crate::child::VmProcess;
use crate::cli::bench::Kind;
use crate::cli::iommu::{Iommu, Iommus};
use crate::cli::rings::RingSetup;
use crate::cli::{Direction, Mode, Path};
use crate::exit::Failure;
use crate::guest::Guest;
use crate::sys::{self, Signals};
use crate::tempdir::TempDir;
use crate::{host, pair};

/// How long two VMs may take to boot and find each other.
const BOOT: Duration = Duration::from_secs(10);
/// How long an answer may take beyond what was asked for.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a VM may take to power off, or to end after its control channel closed.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// A receiver in a guest gives up after so long without a frame.
pub const RECEIVER_MS: u64 = 2000;

/// VIRTIO_F_ACCESS_PLATFORM.
const ACCESS_PLATFORM: u64 = 1 << 33;

const NAMES: [&str; 2] = ["back-end", "front-end"];
const FRONT_END: usize = 1;

/// The two VMs, back-end first. (With a relay both are front-ends; the first does what the back-end does otherwise.)
pub struct Session {
    sides: [Guest; 2],
    relay: Option<VmProcess>,
    waiting: VecDeque<(usize, Record)>,
    signals: Option<Rc<Signals>>,
    setup: Rc<Setup>,
    rings: RingSetup,
    kind: Kind,
    tsc_khz: u64,
    bound: Option<Bound>,
    id: u16,
    /// How its processes were called.
    commands: Vec<String>,
    /// Windows a second that the front-end's guest makes come and go while it runs a workload.
    churn: u64,
    // Declared last: the socket's directory goes when the VMs are gone.
    _directory: Option<TempDir>,
}

impl Session {
    /// Boots both VMs and waits until their connection is up.
    pub fn start(setup: Rc<Setup>, kind: Kind, memory: &str, signals: Rc<Signals>) -> Result<Self> {
        let directory = TempDir::new().context("cannot make a directory for the socket")?;
        let Kind { ring, iommu, path } = kind;
        let rings = setup.rings.with(ring);
        let iommus = Iommus {
            front: iommu,
            back: setup.back_iommu,
        };
        let sockets = ["a.sock", "b.sock"].map(|name| directory.path().join(name));
        let mut commands = Vec::new();
        let mut called = |command: &str, args: &[OsString]| {
            let words = args.iter().map(|arg| arg.to_string_lossy());
            let words: Vec<_> = [command.into()].into_iter().chain(words).collect();
            commands.push(format!("vhost-pci {}", words.join(" ")));
        };
        let relay = match path {
            Path::Window => None,
            Path::Relay => {
                let args = relay_args(&sockets, setup.cores)?;
                called("relay", &args);
                Some(VmProcess::relay(&args)?)
            }
        };
        let mut args = match path {
            Path::Window => {
                pair::vm_args(directory.path(), memory, Some(setup.cores), &rings, iommus)
            }
            Path::Relay => [0, 1].map(|side| {
                pair::net_vm_args(&sockets[side], memory, Some(setup.cores[side]), &rings)
            }),
        };
        let words = format!("{} {}", rings.guest_words(), iommus.guest_words(FRONT_END));
        let with_rings = if relay.is_some() { 0 } else { FRONT_END };
        for args in &mut args[with_rings..] {
            args.push(format!("--cmdline={}", words.trim()).into());
        }
        static PAIRS: AtomicU32 = AtomicU32::new(0);
        let number = PAIRS.fetch_add(1, Ordering::Relaxed);
        for (args, end) in args.iter_mut().zip(pair::ENDS) {
            args.extend(setup.vms.run_flags(end, number)?);
            called("run", args);
        }
        let start = |side: usize| Guest::start(NAMES[side], &args[side]);
        let mut session = Self {
            sides: [start(0)?, start(1)?],
            relay,
            waiting: VecDeque::new(),
            signals: Some(signals),
            setup,
            rings,
            kind,
            tsc_khz: 0,
            bound: None,
            id: 0,
            commands,
            churn: 0,
            _directory: Some(directory),
        };
        session
            .wait_until_ready(Instant::now() + BOOT)
            .with_context(|| {
                let (ring, iommu) = (ring.name(), iommu.name());
                format!("{ring} rings, iommu {iommu}, path {}", path.name())
            })?;
        Ok(session)
    }

    fn wait_until_ready(&mut self, deadline: Instant) -> Result<()> {
        let mut ready = [false; 2];
        while ready != [true; 2] {
            let missing = if ready[0] { "front-end" } else { "back-end" };
            match self.next(deadline, &format!("the {missing} guest to be ready"))? {
                (side, Record::Ready { tsc_khz, features }) => {
                    ready[side] = true;
                    self.tsc_khz = tsc_khz;
                    // The driver of the virtio-net device knows what was negotiated; the other end learned it from there.
                    if side == FRONT_END {
                        self.rings.check(features).map_err(|why| anyhow!(why))?;
                        let behind = features & ACCESS_PLATFORM != 0;
                        ensure!(
                            behind == (self.kind.iommu != Iommu::Off),
                            "iommu={} was asked for, but the driver agreed on features {features:#x}",
                            self.kind.iommu.name()
                        );
                    }
                }
                // The connection may take more than one try while the other end boots.
                (side, Record::Down) => ready[side] = false,
                (side, record) => ignore(side, &record)?,
            }
        }
        Ok(())
    }

    /// The next record, which `awaited` describes.
    fn next(&mut self, deadline: Instant, awaited: &str) -> Result<(usize, Record)> {
        loop {
            if let Some(record) = self.waiting.pop_front() {
                return Ok(record);
            }
            if !self.gather(deadline)? {
                bail!("waited in vain for {awaited}");
            }
        }
    }

    /// Sleeps until records have arrived (true) or the time has come (false). A signal and the end of a VM are errors.
    fn gather(&mut self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let ready = {
            let mut fds = vec![self.sides[0].as_fd(), self.sides[1].as_fd()];
            fds.extend(self.signals.as_ref().map(AsFd::as_fd));
            sys::poll(&fds, Some(left)).context("poll")?
        };
        if let Some(number) = self.signals.as_deref().and_then(Signals::caught) {
            return Err(Failure::Signal(number).into());
        }
        for (side, _) in ready
            .iter()
            .take(2)
            .enumerate()
            .filter(|(_, ready)| **ready)
        {
            match self.sides[side].read()? {
                Some(records) => self
                    .waiting
                    .extend(records.into_iter().map(|record| (side, record))),
                None => return Err(self.sides[side].died()),
            }
        }
        Ok(!self.waiting.is_empty() || Instant::now() < deadline)
    }

    /// Sleeps until then. Records that come meanwhile are kept.
    fn sleep_until(&mut self, then: Instant) -> Result<()> {
        while Instant::now() < then {
            self.gather(then)?;
        }
        Ok(())
    }

    fn send(&mut self, side: usize, line: &str) -> Result<()> {
        self.sides[side].send(line)
    }

    /// Gives the front-end guest a command and waits for what came of it.
    pub fn ask_front_end(&mut self, line: &str, patience: Duration) -> Result<Done> {
        self.send(FRONT_END, line)?;
        let deadline = Instant::now() + patience;
        loop {
            match self.next(deadline, &format!("what comes of '{line}'"))? {
                (FRONT_END, Record::Done(done)) => return Ok(done),
                (side, record) => ignore(side, &record)?,
            }
        }
    }

    /// The counters of both VMs, back-end first.
    pub fn stats(&mut self) -> Result<[VmmStats; 2]> {
        self.send(0, "vmm stats")?;
        self.send(1, "vmm stats")?;
        let mut stats = [None, None];
        let deadline = Instant::now() + ANSWER;
        while stats.iter().any(Option::is_none) {
            match self.next(deadline, "the counters of a VM")? {
                (side, Record::Vmm(found)) => stats[side] = Some(found),
                (side, record) => ignore(side, &record)?,
            }
        }
        Ok(stats.map(Option::unwrap_or_default))
    }

    fn results(&mut self, deadline: Instant) -> Result<[WorkResult; 2]> {
        let mut results = [None, None];
        while let Some(missing) = results.iter().position(Option::is_none) {
            let awaited = format!("the result of the {} guest", NAMES[missing]);
            match self.next(deadline, &awaited)? {
                (side, Record::Result(found)) if found.id == self.id => {
                    results[side] = Some(found);
                }
                (side, record) => ignore(side, &record)?,
            }
        }
        Ok(results.map(Option::unwrap_or_default))
    }

    /// How its processes were called, the relay first where there is one.
    pub fn commands(&self) -> &[String] {
        &self.commands
    }

    /// What a guest is told for a case.
    pub fn command(&self, case: &Case, side: usize, rate: Option<u64>) -> String {
        let Setup { ms, warmup_ms, .. } = *self.setup;
        let work = case.direction.work()[side];
        let mut line = format!(
            "run id={} work={work} queues={} size={} batch={} ms={ms} warmup_ms={warmup_ms} {} timeout_ms={RECEIVER_MS}",
            self.id,
            self.rings.pairs(case.direction),
            case.size,
            case.batch,
            case.how.words(),
        );
        if let Some(rate) = rate.filter(|_| side != FRONT_END) {
            line.push_str(&format!(" rate={rate}"));
        }
        if side != FRONT_END && self.kind.path == Path::Relay {
            line.push_str(" end=back-end");
        }
        if side == FRONT_END && self.churn > 0 {
            line.push_str(&format!(" churn={}", self.churn));
        }
        line
    }

    /// From now on so many windows a second come and go while traffic runs.
    pub fn set_churn(&mut self, windows_per_second: u64) {
        self.churn = windows_per_second;
    }

    /// How long a run sends, warm-up included, in milliseconds.
    pub fn run_ms(&self) -> u64 {
        self.setup.ms + self.setup.warmup_ms
    }

    /// Frequency of the guests' clock.
    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    /// What each VM process has used by now: in all, and by threads that are no vCPU.
    fn cpu(&self, stats: &[VmmStats; 2]) -> Result<Cpu> {
        let mut cpu = Cpu {
            at: Instant::now(),
            all: [0; 2],
            others: [0; 2],
            relay: 0,
        };
        if let Some(relay) = &self.relay {
            cpu.relay = sys::process_cpu_ns(relay.pid()).context("the CPU time of the relay")?;
        }
        for (side, stats) in stats.iter().enumerate() {
            let Some(process) = &self.sides[side].process else {
                continue;
            };
            let vcpus: Vec<u32> = stats.vcpus.iter().map(|vcpu| vcpu.tid).collect();
            cpu.all[side] = sys::process_cpu_ns(process.pid()).context("the CPU time of a VM")?;
            cpu.others[side] = host::other_threads_ns(process.pid(), &vcpus);
        }
        Ok(cpu)
    }

    /// Lets both guests power off.
    pub fn finish(mut self) -> Result<()> {
        for side in 0..2 {
            self.send(side, "exit code=0")?;
        }
        for side in &mut self.sides {
            let Some(process) = &mut side.process else {
                continue;
            };
            sys::poll(&[process.as_fd()], Some(LAST_WORDS)).context("poll")?;
            match process.ended()? {
                Some(status) if !status.success() => {
                    log::warn!(
                        "the {} VM ended ({status}): {}",
                        process.name(),
                        process.last_words()
                    );
                }
                Some(_) => {}
                None => log::warn!("the {} guest did not power off", process.name()),
            }
        }
        Ok(())
    }
}

/// What has been used up to an instant, in ns.
struct Cpu {
    at: Instant,
    all: [u64; 2],
    others: [u64; 2],
    relay: u64,
}

impl Cpu {
    /// How many cores all processes together kept busy between two looks.
    fn busy(&self, later: &Self) -> f64 {
        let wall = (later.at - self.at).as_nanos().max(1) as f64;
        let sum = |cpu: &Self| cpu.all.iter().sum::<u64>() + cpu.relay;
        sum(later).saturating_sub(sum(self)) as f64 / wall
    }

    /// Between two looks, of each VM: the vCPU's share of a core, and the other threads' in percent.
    fn between(&self, later: &Self) -> ([f64; 2], [f64; 2]) {
        let wall = (later.at - self.at).as_nanos().max(1) as f64;
        let all = [0, 1].map(|side| later.all[side].saturating_sub(self.all[side]) as f64);
        let others = [0, 1].map(|side| later.others[side].saturating_sub(self.others[side]) as f64);
        (
            [0, 1].map(|side| ((all[side] - others[side]) / wall).max(0.0)),
            [0, 1].map(|side| others[side] / wall * 100.0),
        )
    }
}

impl Lab for Session {
    fn probe(&mut self) -> Result<f64> {
        probe::probe(self.setup.cores)
    }

    fn guests(&mut self, case: &Case) -> Result<VmSample> {
        if case.load.is_none() {
            // Where nobody sends, one frame shows that everything is there, and the next would be due too late.
            return self.run(case, (case.direction == Direction::Idle).then_some(1));
        }
        // What the load is a part of, at this moment: the cores may have moved since another.
        let whole = self.run(&case.whole_load(), None)?;
        let rate = case.rate(whole.result.mpps);
        let mut sample = self.run(case, rate)?;
        sample.of_load(rate, &whole.result);
        Ok(sample)
    }

    fn bound(&mut self, case: &Case) -> Result<BoundSample> {
        let bound = match &mut self.bound {
            Some(bound) => bound,
            none => none.insert(Bound::new(&self.setup, &self.rings, self.tsc_khz)?),
        };
        bound.sample(&self.setup, case)
    }
}

impl Session {
    /// One run of both guests; `rate`: so many frames are due in a second.
    fn run(&mut self, case: &Case, rate: Option<u64>) -> Result<VmSample> {
        let before = self.stats()?;
        self.id = self.id.wrapping_add(1);
        // The receiver first: then the sender does not start against a full ring.
        let order = match case.direction {
            Direction::FeToBe | Direction::Both => [0, 1],
            _ => [1, 0],
        };
        for side in order {
            let command = self.command(case, side, rate);
            self.send(side, &command)?;
        }
        // Two looks, well inside the time in which both work. This thread sleeps the rest of it.
        let start = Instant::now() + Duration::from_millis(self.setup.warmup_ms);
        let length = Duration::from_millis(self.setup.ms);
        self.sleep_until(start + length.mul_f64(0.35))?;
        let first = self.cpu(&before)?;
        self.sleep_until(start + length.mul_f64(0.9))?;
        let second = self.cpu(&before)?;
        let patience = Duration::from_millis(RECEIVER_MS) + ANSWER;
        let results = self.results(start + length + patience)?;
        let after = self.stats()?;

        let (shares, others_percent) = first.between(&second);
        let known =
            case.how.mode == Mode::Poll && self.sides.iter().all(|side| side.process.is_some());
        Ok(VmSample {
            result: SampleResult::new(case.direction, &results, self.tsc_khz)?,
            shares: known.then_some(shares),
            others_percent,
            busy_cores: first.busy(&second),
            exits: grown(&before, &after, |vcpu| &vcpu.exits, |_| true),
            // The kernel counts much else, some of it no counter at all.
            kvm_exits: grown(
                &before,
                &after,
                |vcpu| &vcpu.kvm,
                |name| name.ends_with("exits"),
            ),
            offered_mpps: None,
        })
    }
}

/// The relay's flags. It sleeps while there is nothing to copy, unless there is a third core: three that poll on two cores measure the scheduler.
fn relay_args(sockets: &[PathBuf; 2], cores: [usize; 2]) -> Result<Vec<OsString>> {
    let mut args: Vec<OsString> = Vec::new();
    for (flag, socket) in ["--a=socket=", "--b=socket="].into_iter().zip(sockets) {
        let mut arg = OsString::from(flag);
        arg.push(socket);
        args.push(arg);
    }
    let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
    match allowed.iter().find(|core| !cores.contains(core)) {
        Some(third) => args.extend(["--mode=poll".into(), format!("--core={third}").into()]),
        None => args.push("--mode=irq".into()),
    }
    Ok(args)
}

/// A session for each configuration. The guests of all but one of them sleep at any time.
pub struct Sessions {
    all: Vec<(Kind, Session)>,
}

impl Sessions {
    /// Boots a pair of VMs for each of `kinds`.
    pub fn start(
        setup: Setup,
        kinds: &[Kind],
        memory: &str,
        signals: &Rc<Signals>,
    ) -> Result<Self> {
        let setup = Rc::new(setup);
        let start = |&kind| {
            let (setup, signals) = (Rc::clone(&setup), Rc::clone(signals));
            Ok((kind, Session::start(setup, kind, memory, signals)?))
        };
        Ok(Self {
            all: kinds.iter().map(start).collect::<Result<_>>()?,
        })
    }

    /// Frequency of the guests' clock.
    pub fn tsc_khz(&self) -> u64 {
        self.all.first().map_or(0, |(_, session)| session.tsc_khz)
    }

    /// Lets all guests power off.
    pub fn finish(self) -> Result<()> {
        self.all
            .into_iter()
            .try_for_each(|(_, session)| session.finish())
    }

    fn of(&mut self, case: &Case) -> Result<&mut Session> {
        self.all
            .iter_mut()
            .find(|(kind, _)| *kind == case.kind())
            .map(|(_, session)| session)
            .with_context(|| format!("no VMs were booted for {case:?}"))
    }
}

impl Lab for Sessions {
    fn probe(&mut self) -> Result<f64> {
        let (_, session) = self.all.first_mut().context("no VMs were booted")?;
        session.probe()
    }

    fn guests(&mut self, case: &Case) -> Result<VmSample> {
        self.of(case)?.guests(case)
    }

    fn bound(&mut self, case: &Case) -> Result<BoundSample> {
        self.of(case)?.bound(case)
    }
}

/// By how much counters have grown, over both VMs and all vCPUs.
fn grown(
    before: &[VmmStats; 2],
    after: &[VmmStats; 2],
    counters: impl Fn(&super::record::VcpuStats) -> &BTreeMap<String, u64>,
    wanted: impl Fn(&str) -> bool,
) -> BTreeMap<String, u64> {
    let sum = |stats: &[VmmStats; 2]| {
        let mut sum = BTreeMap::<String, u64>::new();
        for vcpu in stats.iter().flat_map(|stats| &stats.vcpus) {
            for (name, count) in counters(vcpu).iter().filter(|(name, _)| wanted(name)) {
                *sum.entry(name.clone()).or_default() += count;
            }
        }
        sum
    };
    let before = sum(before);
    let mut grown = sum(after);
    for (name, count) in &mut grown {
        *count = count.saturating_sub(before.get(name).copied().unwrap_or(0));
    }
    grown
}

/// Passes over a record that nobody waits for; those that report trouble are errors.
fn ignore(side: usize, record: &Record) -> Result<()> {
    let name = NAMES[side];
    match record {
        Record::Error { what } => bail!("the {name} guest: {what}"),
        Record::Down => bail!("the {name} guest has lost its peer"),
        Record::Result(result) => log::debug!("a late result of run {} of the {name}", result.id),
        Record::Ready { .. } | Record::Vmm(_) | Record::Done(_) | Record::Unknown => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests;

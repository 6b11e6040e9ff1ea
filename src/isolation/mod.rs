//! `isolation`: two VMs, one of which attacks the other in every known way, and a count of what got through.
//!
//! The attacks are put together here out of what the guests can be told to do (docs/bare-metal.md) and, for a front-end that is no VM of ours,
//! out of vhost-user messages.

mod lab;
mod memory;
mod peer;
mod race;
mod report;
mod rings;

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::bench::progress_bar;
use crate::cli::isolation::{IsolationArgs, Mode};
use crate::cli::machine::BothArgs;
use crate::exit::{self, Failure};
use crate::json::{JsonFile, text_out};
use crate::pair;
use crate::sys::{self, Signals};

use lab::{Lab, Scene, Study, Tried, Trouble};
use report::{Failed, Finding, From, Line, Report};

/// The modes in which an attack makes sense.
type Modes = &'static [Mode];
/// Even with no front-end there.
const ALL: Modes = &[Mode::None, Mode::Whole, Mode::Windows, Mode::Readable];
/// There has to be a front-end.
const SEEN: Modes = &[Mode::Whole, Mode::Windows, Mode::Readable];
/// It has to have an IOMMU.
const WINDOWS: Modes = &[Mode::Windows, Mode::Readable];

/// Carries an attack out.
type Run = dyn Fn(&mut Lab) -> Tried<Finding>;

/// One kind of attack.
struct Attack {
    name: &'static str,
    from: From,
    scene: Scene,
    modes: Modes,
    /// Whether nothing can be done with the VMs afterwards.
    spoils: bool,
    run: Box<Run>,
}

impl Attack {
    fn new(
        name: &'static str,
        from: From,
        scene: Scene,
        modes: Modes,
        run: impl Fn(&mut Lab) -> Tried<Finding> + 'static,
    ) -> Self {
        Self {
            name,
            from,
            scene,
            modes,
            spoils: false,
            run: Box::new(run),
        }
    }

    /// Carries it out. A front-end shares its memory and is given none: the back-end's has to be afterwards as it was.
    fn carry_out(&self, lab: &mut Lab) -> Tried<Finding> {
        if self.from == From::BackEnd {
            return (self.run)(lab);
        }
        lab.guard_back_end()?;
        let mut finding = (self.run)(lab)?;
        finding.got_through += lab.broken_guards()?;
        Ok(finding)
    }

    /// The same, after which other VMs are needed.
    fn spoiling(self) -> Self {
        Self {
            spoils: true,
            ..self
        }
    }
}

/// All attacks, those of a scene side by side.
fn attacks() -> Vec<Attack> {
    let mut all = memory::attacks();
    all.extend(race::attacks());
    all.extend(rings::attacks());
    all.extend(peer::attacks());
    all
}

/// Those that the flags ask for.
fn chosen(args: &IsolationArgs) -> Result<Vec<Attack>, Failure> {
    let mut all = attacks();
    for wanted in &args.only {
        if !all
            .iter()
            .any(|attack| attack.name.starts_with(wanted.as_str()))
        {
            let names: Vec<&str> = all.iter().map(|attack| attack.name).collect();
            return Err(exit::usage(format!(
                "--only {wanted}: there is no such attack; there are {}",
                names.join(", ")
            )));
        }
    }
    let asked = |name: &str| {
        args.only.is_empty() || args.only.iter().any(|only| name.starts_with(only.as_str()))
    };
    all.retain(|attack| asked(attack.name) && attack.modes.contains(&args.mode));
    if all.is_empty() {
        return Err(exit::usage(format!(
            "--mode {}: none of the attacks of --only makes sense there",
            args.mode.name()
        )));
    }
    Ok(all)
}

/// Carries out the study; returns the exit code.
pub fn run(args: &IsolationArgs) -> Result<u8> {
    let attacks = chosen(args)?;
    let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
    let both = BothArgs {
        memory: String::new(),
        cores: args.cores.clone(),
    };
    let cores = both.cores(&allowed)?;
    // Before anything is booted.
    args.vms.run_flags(pair::ENDS[0], 0)?;
    let json = args.json.as_deref().map(JsonFile::create).transpose()?;
    let study = Study {
        mode: args.mode,
        rounds: args.rounds,
        cores,
        vms: args.vms.clone(),
        signals: Some(Signals::install().context("cannot handle signals")?),
    };
    let started = Instant::now();
    let report = carry_out(&study, &attacks)?;
    log::info!("the study took {:.1} s", started.elapsed().as_secs_f64());
    let mut out = text_out(args.json.as_deref());
    writeln!(out, "{}", report.render().trim_end())?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    Ok(report.exit_code())
}

fn carry_out(study: &Study, attacks: &[Attack]) -> Result<Report> {
    let mut report = Report::new(study.mode);
    let mut lab: Option<Lab> = None;
    let bar = progress_bar(attacks.len() as u64);
    for attack in attacks {
        bar.set_message(attack.name);
        let began = Instant::now();
        let scene = attack.scene.in_mode(study.mode);
        let here = lab
            .take()
            .filter(|lab| lab.scene == scene)
            .map_or_else(|| Lab::boot(study, scene), Ok);
        let tried = here.and_then(|mut here| {
            let finding = attack.carry_out(&mut here)?;
            if !attack.spoils {
                lab = Some(here);
            }
            Ok(finding)
        });
        log::info!(
            "{}: {:.1} s, {tried:?}",
            attack.name,
            began.elapsed().as_secs_f64()
        );
        record(&mut report, attack, tried)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(report)
}

/// Puts down what came of an attack. A signal ends the study.
fn record(report: &mut Report, attack: &Attack, tried: Tried<Finding>) -> Result<()> {
    let &Attack { name, from, .. } = attack;
    let finding = match tried {
        Ok(finding) => finding,
        Err(Trouble::Victim(noticed)) => Finding {
            tries: 1,
            got_through: 1,
            noticed,
        },
        Err(Trouble::Study(error)) => {
            if error
                .chain()
                .any(|cause| matches!(cause.downcast_ref(), Some(Failure::Signal(_))))
            {
                return Err(error);
            }
            let why = exit::explain(&error);
            report.failed.push(Failed { name, from, why });
            return Ok(());
        }
    };
    let Finding {
        tries,
        got_through,
        noticed,
    } = finding;
    report.attacks.push(Line {
        name,
        from,
        tries,
        got_through,
        noticed,
    });
    Ok(())
}

/// What was noticed, in one line.
fn or_nothing(noticed: &[String]) -> String {
    if noticed.is_empty() {
        "nothing".to_owned()
    } else {
        noticed.join("; ")
    }
}

#[cfg(test)]
mod tests;

//! `pair`: two connected VMs and their consoles.

mod linux;

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bare_metal::frame::MAX_SEGMENT;

use crate::child::{Output, VmProcess};
use crate::cli::iommu::Iommus;
use crate::cli::rings::{Layout, RingSetup, Switch, queue_size};
use crate::cli::{Direction, Mode, PairArgs};
use crate::cli::{capture, machine};
use crate::exit::{self, Failure, usage};
use crate::sys::{self, Signals};
use crate::tempdir::TempDir;

/// How long the other VM may go on when one has ended.
const LEFT_ALONE: Duration = Duration::from_secs(5);

/// Of the two VMs.
const FRONT_END: usize = 1;

/// The arguments of `run` for the two VMs, back-end first, but for the guest's command line.
pub fn vm_args(
    directory: &Path,
    memory: &str,
    cores: Option<[usize; 2]>,
    rings: &RingSetup,
    iommus: Iommus,
) -> [Vec<OsString>; 2] {
    let socket = directory.join("pair.sock");
    [0, 1].map(|side| {
        let mut args = vm_flags(memory, cores.map(|cores| cores[side]));
        args.push(if side == 0 {
            let mut text = OsString::from("--vhost-pci=socket=");
            text.push(&socket);
            text.push(",listen=on");
            text
        } else {
            net_flag(&socket, rings)
        });
        args.extend(iommus.run_flag(side).map(OsString::from));
        args
    })
}

/// The arguments of `run` for a VM that is a front-end of the relay that listens at `socket`, but for the guest's command line.
pub fn net_vm_args(
    socket: &Path,
    memory: &str,
    core: Option<usize>,
    rings: &RingSetup,
) -> Vec<OsString> {
    let mut args = vm_flags(memory, core);
    args.push(net_flag(socket, rings));
    args
}

fn vm_flags(memory: &str, core: Option<usize>) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![["--memory=", memory].concat().into()];
    args.extend(core.map(|core| format!("--cpus=count=1,affinity={core}").into()));
    args
}

/// What is in front of a VM's name in the names of its files, back-end first.
pub const ENDS: [&str; 2] = ["back", "front"];

/// A network device that connects to whoever listens at `socket`.
fn net_flag(socket: &Path, rings: &RingSetup) -> OsString {
    let mut text = OsString::from("--net=socket=");
    text.push(socket);
    text.push(format!(",listen=off,{}", rings.net_keys()));
    text
}

/// The rings that the flags ask for; what they say nothing about is left to the devices.
fn rings(args: &PairArgs) -> Result<RingSetup, Failure> {
    let layout = args.ring.unwrap_or(Layout::Split);
    let size = queue_size(&args.queue_size, &[layout])?;
    if args.rings.queues > 1 && !args.direction.is_stream() {
        return Err(usage(format!(
            "--queues {}: --direction {} goes over one pair",
            args.rings.queues,
            args.direction.name()
        )));
    }
    if args.size as usize > MAX_SEGMENT {
        args.rings.need_long_frames()?;
    }
    Ok(RingSetup {
        packed: args.ring.map(|layout| layout == Layout::Packed),
        in_order: args.in_order.map(Switch::is_on),
        ..RingSetup::new(&args.rings, size)?
    })
}

fn iommus(args: &PairArgs) -> Iommus {
    Iommus {
        front: args.iommu,
        back: args.back.iommu_back.is_on(),
    }
}

/// The guests' command lines, back-end first.
fn cmdlines(args: &PairArgs, rings: &RingSetup) -> [String; 2] {
    let length = match args.count {
        Some(count) => format!("count={count}"),
        None => format!("ms={}", args.seconds * 1000),
    };
    let mut lines = args.direction.work().map(|work| {
        format!(
            "work={work} size={} batch={} mode={} {length}",
            args.size,
            if args.direction == Direction::RoundTrip {
                1
            } else {
                args.batch
            },
            args.mode.name(),
        )
    });
    if args.direction == Direction::Idle {
        lines[1 - FRONT_END] += " rate=1";
    }
    if let Some(queues) = rings.queues {
        lines[1 - FRONT_END] += &format!(" queues={queues}");
    }
    let words = [rings.guest_words(), iommus(args).guest_words(FRONT_END)];
    for words in words.iter().filter(|words| !words.is_empty()) {
        lines[FRONT_END] += &format!(" {words}");
    }
    lines
}

/// What else each VM is told, back-end first.
fn more_flags(args: &PairArgs) -> Result<[Vec<OsString>; 2], Failure> {
    let captures = args.capture.as_deref().map(capture::run_flags);
    let captures = captures.transpose()?.unwrap_or_default();
    let [back, front] = ENDS.map(|end| args.vms.run_flags(end, 0));
    let mut all = [back?, front?];
    for (flags, capture) in all.iter_mut().zip(captures) {
        flags.extend(capture);
    }
    Ok(all)
}

/// Boots both VMs and waits for their ends; returns the exit code.
pub fn run(args: &PairArgs) -> Result<u8> {
    if args.linux {
        return linux::run(args);
    }
    machine::memory(&args.both.memory)?;
    let rings = rings(args)?;
    let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
    // Two guests that poll need a core each; two that sleep can share one.
    let cores = match (args.mode, allowed.len()) {
        (Mode::Irq | Mode::Adaptive, 1) if args.both.cores.is_none() => None,
        _ => Some(args.both.cores(&allowed)?),
    };
    let signals = Signals::install().context("cannot handle signals")?;
    let directory = TempDir::new().context("cannot make a directory for the socket")?;
    let [mut back_args, mut front_args] = vm_args(
        directory.path(),
        &args.both.memory,
        cores,
        &rings,
        iommus(args),
    );
    let [back, front] = cmdlines(args, &rings);
    back_args.push(format!("--cmdline={back}").into());
    front_args.push(format!("--cmdline={front}").into());
    let [back, front] = more_flags(args)?;
    back_args.extend(back);
    front_args.extend(front);
    let start = |name, prefix, args: &[OsString]| {
        VmProcess::start(name, args, Stdio::null(), Output::Show(prefix))
    };
    let back = start("back-end", "back-end  | ", &back_args)?;
    let front = start("front-end", "front-end | ", &front_args)?;
    wait([back, front], &signals)
}

fn wait(mut vms: [VmProcess; 2], signals: &Signals) -> Result<u8> {
    let mut code = exit::OK;
    let mut done = [false; 2];
    let mut deadline: Option<Instant> = None;
    loop {
        for (vm, done) in vms.iter_mut().zip(&mut done) {
            if *done {
                continue;
            }
            if let Some(status) = vm.ended()? {
                *done = true;
                code = exit::worse(code, exit::of_process(status));
                let how = exit::describe(status);
                match status.signal() {
                    Some(_) => log::warn!("the {} VM ended: {how}", vm.name()),
                    None => log::info!("the {} VM ended: {how}", vm.name()),
                }
                deadline.get_or_insert_with(|| Instant::now() + LEFT_ALONE);
            }
        }
        if done == [true; 2] {
            return Ok(code);
        }
        if let Some(number) = signals.caught() {
            // Dropping the VMs ends them.
            return Ok(exit::of_signal(number));
        }
        let left = deadline.map(|time| time.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            let stuck = if done[0] { &vms[1] } else { &vms[0] };
            log::warn!(
                "the {} VM was still running {} s after the other had ended; it is ended now",
                stuck.name(),
                LEFT_ALONE.as_secs()
            );
            // Where the other failed, that is why.
            return Ok(if code == exit::OK { exit::HOST } else { code });
        }
        let mut fds = vec![signals.as_fd()];
        let running = vms.iter().zip(&done).filter(|(_, done)| !**done);
        fds.extend(running.map(|(vm, _)| vm.as_fd()));
        sys::poll(&fds, left).context("poll")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::iommu::Iommu;
    use crate::cli::rings::Ring;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn pair(args: &[&str]) -> PairArgs {
        match Cli::try_parse_from([&["vhost-pci", "pair"], args].concat()) {
            Ok(Cli {
                command: Command::Pair(args),
                ..
            }) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_two_ends_do_what_fits_together() {
        let lines = |args: &[&str]| {
            let args = pair(args);
            cmdlines(&args, &rings(&args).unwrap())
        };
        let [back, front] = lines(&[]);
        assert_eq!(back, "work=both size=64 batch=32 mode=poll ms=3000");
        assert_eq!(front, back);
        let [back, front] = lines(&["--direction", "fe-to-be", "--count", "5"]);
        assert!(back.starts_with("work=sink ") && back.ends_with(" count=5"));
        assert!(front.starts_with("work=source ") && front.ends_with(" count=5"));
        let [back, front] = lines(&["--tx", "chain", "--rx-buffer", "512", "--count", "5"]);
        assert!(back.ends_with(" count=5"));
        assert!(front.ends_with(" count=5 tx=chain rx_buffer=512"));
        let [back, front] = lines(&["--queues", "4", "--count", "5"]);
        assert!(back.ends_with(" count=5 queues=4") && front.ends_with(" count=5 queues=4"));
        let [back, front] = lines(&["--iommu", "batch", "--count", "5"]);
        assert!(back.ends_with(" count=5"));
        assert!(front.ends_with(" count=5 iommu=batch"));
    }

    #[test]
    fn what_pair_is_not_told_is_left_to_the_devices() {
        let rings = |args: &[&str]| rings(&pair(args));
        assert_eq!(rings(&[]).unwrap().net_keys(), "size=256");
        let all = [
            "--ring",
            "packed",
            "--in-order",
            "off",
            "--event-idx",
            "on",
            "--mrg-rxbuf",
            "off",
            "--indirect",
            "on",
            "--queue-size",
            "768",
        ];
        assert_eq!(
            rings(&all).unwrap().net_keys(),
            "size=768,packed=on,in-order=off,event-idx=on,mrg-rxbuf=off,indirect=on"
        );
        assert!(rings(&["--queue-size", "768"]).is_err());
        assert!(rings(&["--queues", "2", "--direction", "round-trip"]).is_err());
    }

    #[test]
    fn what_pair_passes_on_is_what_run_takes() {
        let rings = RingSetup {
            event_idx: Some(false),
            ..RingSetup::default()
        }
        .with(Ring {
            layout: Layout::Packed,
            in_order: true,
            size: 768,
        });
        let iommus = Iommus {
            front: Iommu::Static,
            back: true,
        };
        for args in vm_args(Path::new("/d"), "size=64M", Some([0, 1]), &rings, iommus) {
            let mut all: Vec<OsString> = vec!["vhost-pci".into(), "run".into()];
            all.extend(args);
            let Ok(Cli {
                command: Command::Run(run),
                ..
            }) = Cli::try_parse_from(all)
            else {
                panic!("not a command line");
            };
            let config = run.config(&[0, 1]).unwrap();
            assert_eq!(config.memory.size, 64 << 20);
            assert_eq!(config.affinity.len(), 1);
            assert_eq!(config.net.len() + config.vhost_pci.len(), 1);
            assert!(config.iommu.is_some());
            for net in &config.net {
                assert_eq!(net.queue_size, 768);
                assert!(net.rings.packed && net.rings.in_order && !net.rings.event_idx);
            }
        }
    }
}

//! `pair`: two connected VMs and their consoles.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::child::{Output, VmProcess};
use crate::cli::machine;
use crate::cli::{Direction, Mode, PairArgs};
use crate::exit;
use crate::sys::{self, Signals};
use crate::tempdir::TempDir;

/// How long the other VM may go on when one has ended.
const LEFT_ALONE: Duration = Duration::from_secs(5);

/// The arguments of `run` for the two VMs, back-end first, but for the guest's command line.
pub fn vm_args(
    directory: &Path,
    memory: &str,
    cores: Option<[usize; 2]>,
    queue_size: u16,
) -> [Vec<OsString>; 2] {
    let socket = directory.join("pair.sock");
    let device = |prefix: &str, rest: &str| {
        let mut text = OsString::from(format!("{prefix}socket="));
        text.push(&socket);
        text.push(rest);
        text
    };
    [0, 1].map(|side| {
        let mut args: Vec<OsString> = vec![["--memory=", memory].concat().into()];
        if let Some(cores) = cores {
            args.push(format!("--cpus=count=1,affinity={}", cores[side]).into());
        }
        args.push(if side == 0 {
            device("--vhost-pci=", ",listen=on")
        } else {
            device("--net=", &format!(",listen=off,queue-size={queue_size}"))
        });
        args
    })
}

/// The guests' command lines, back-end first.
fn cmdlines(args: &PairArgs) -> [String; 2] {
    let length = match args.count {
        Some(count) => format!("count={count}"),
        None => format!("ms={}", args.seconds * 1000),
    };
    args.direction.work().map(|work| {
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
    })
}

/// Boots both VMs and waits for their ends; returns the exit code.
pub fn run(args: &PairArgs) -> Result<u8> {
    machine::memory(&args.both.memory)?;
    let queue_size = args.both.queue_size()?;
    let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
    // Two guests that poll need a core each; two that sleep can share one.
    let cores = match (args.mode, allowed.len()) {
        (Mode::Irq, 1) if args.both.cores.is_none() => None,
        _ => Some(args.both.cores(&allowed)?),
    };
    let signals = Signals::install().context("cannot handle signals")?;
    let directory = TempDir::new().context("cannot make a directory for the socket")?;
    let [mut back_args, mut front_args] =
        vm_args(directory.path(), &args.both.memory, cores, queue_size);
    let [back, front] = cmdlines(args);
    back_args.push(format!("--cmdline={back}").into());
    front_args.push(format!("--cmdline={front}").into());
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
                log::info!("the {} VM ended: {status}", vm.name());
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
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn pair(args: &[&str]) -> PairArgs {
        match Cli::try_parse_from([&["vhost-pci", "pair"], args].concat()) {
            Ok(Cli {
                command: Command::Pair(args),
                ..
            }) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_two_ends_do_what_fits_together() {
        let [back, front] = cmdlines(&pair(&[]));
        assert_eq!(back, "work=both size=64 batch=32 mode=poll ms=3000");
        assert_eq!(front, back);
        let [back, front] = cmdlines(&pair(&["--direction", "fe-to-be", "--count", "5"]));
        assert!(back.starts_with("work=sink ") && back.ends_with(" count=5"));
        assert!(front.starts_with("work=source ") && front.ends_with(" count=5"));
    }

    #[test]
    fn what_pair_passes_on_is_what_run_takes() {
        for args in vm_args(Path::new("/d"), "size=64M", Some([0, 1]), 512) {
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
            assert!(config.net.iter().all(|net| net.queue_size == 512));
        }
    }
}

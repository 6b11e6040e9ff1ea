//! How the processes of VMs run, which `run` takes for one, and `pair`, `bench` and `isolation` pass on to all of theirs.

use std::ffi::OsString;

use clap::{Args, ValueEnum};
use vmm::Seccomp;

use super::metrics;
use crate::exit::Failure;

/// How the threads of a VM's process are confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SeccompArg {
    /// It ends the process (SIGSYS, exit status 159 in a shell); files are closed to it by Landlock, too
    #[default]
    On,
    /// It is carried out and put into the kernel's log
    Log,
    /// It is carried out
    Off,
}

impl SeccompArg {
    /// As the VMM takes it.
    pub fn mode(self) -> Seccomp {
        match self {
            Self::On => Seccomp::On,
            Self::Log => Seccomp::Log,
            Self::Off => Seccomp::Off,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Log => "log",
            Self::Off => "off",
        }
    }
}

/// What the VMs of one command have in common.
#[derive(Clone, Debug, Default, Args)]
pub struct VmsArgs {
    #[arg(long, value_name = "DIR|unix:DIR[,KEY=VALUE,…]",
        help = metrics::METRICS.help("Where the counters of each VM go as lines of JSON (docs/metrics.md): DIR/back.metrics and DIR/front.metrics, files or sockets (a further pair's: back-2.metrics and so on)"))]
    pub metrics: Option<String>,
    /// What becomes of a system call that the VMs' threads have no use for
    #[arg(long, value_enum, value_name = "HOW", default_value = "on")]
    pub seccomp: SeccompArg,
}

impl VmsArgs {
    /// The flags of `run` for a VM of the pair of this number, from 0 on; `end`: `back` or `front`.
    pub fn run_flags(&self, end: &str, pair: u32) -> Result<Vec<OsString>, Failure> {
        let mut flags = Vec::new();
        if self.seccomp != SeccompArg::On {
            flags.push(format!("--seccomp={}", self.seccomp.name()).into());
        }
        if let Some(text) = &self.metrics {
            let name = match pair {
                0 => format!("{end}.metrics"),
                _ => format!("{end}-{}.metrics", pair + 1),
            };
            flags.push(format!("--metrics={}", metrics::inside(text, &name)?).into());
        }
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use std::time::Duration;
    use vmm::MetricsTarget;

    fn flags(args: &[&str], pair: u32) -> Result<Vec<OsString>, String> {
        let all = [&["vhost-pci", "pair"], args].concat();
        let Command::Pair(args) = Cli::try_parse_from(all).unwrap().command else {
            panic!("not pair");
        };
        args.vms.run_flags("back", pair).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_passed_on_is_what_run_takes() {
        assert!(flags(&[], 0).unwrap().is_empty());
        let text = "unix:/d,interval=50,format=prometheus";
        for (pair, name) in [(0, "/d/back.metrics"), (2, "/d/back-3.metrics")] {
            let mut all = ["vhost-pci", "run"].map(OsString::from).to_vec();
            all.extend(flags(&["--metrics", text, "--seccomp", "log"], pair).unwrap());
            let Command::Run(run) = Cli::try_parse_from(all).unwrap().command else {
                panic!("not run");
            };
            let config = run.config(&[0]).unwrap();
            assert_eq!(config.seccomp, Seccomp::Log);
            let metrics = config.metrics.unwrap();
            assert_eq!(metrics.target, MetricsTarget::Prometheus(name.into()));
            assert_eq!(metrics.interval, Duration::from_millis(50));
        }
        assert_eq!(
            flags(&["--metrics", "d"], 0).unwrap(),
            ["--metrics=d/back.metrics"]
        );
    }

    #[test]
    fn a_place_that_is_none_is_an_error_before_a_vm_is_booted() {
        let long = format!("unix:/{}", "x".repeat(100));
        for (text, part) in [
            ("", "there has to be FILE"),
            ("unix:", "there has to be FILE"),
            ("d,interval=1", "interval=1: "),
            ("d,format=prometheus", "needs unix:PATH"),
            (&*long, "at most 107 bytes"),
        ] {
            let error = flags(&["--metrics", text], 0).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

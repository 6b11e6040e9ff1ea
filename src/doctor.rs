//! `doctor`: what the host is missing, what slows it down, and how to mend it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::exit;
use crate::host;
use crate::sys::{self, Limit};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// It works, but figures get worse or less steady, or a flag that few want does not work.
    Slow,
    /// It does not work.
    Missing,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Slow => "slow",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.into(),
            mend: None,
        }
    }

    fn not(
        name: &'static str,
        state: State,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            name,
            state,
            found: found.into(),
            mend: Some(mend.into()),
        }
    }

    fn line(&self) -> String {
        let mut line = format!("{:<8} {:<14} {}", self.state.name(), self.name, self.found);
        if let Some(mend) = &self.mend {
            line.push_str(" -> ");
            line.push_str(mend);
        }
        line
    }
}

#[derive(Serialize)]
struct Report<'a> {
    schema_version: u32,
    checks: &'a [Check],
}

/// Looks at everything, prints it, and returns the exit code: [`exit::HOST`] where something needed is missing.
pub fn run(args: &DoctorArgs) -> Result<u8> {
    let checks = checks();
    let mut out = io::stdout().lock();
    if args.json {
        let report = Report {
            schema_version: 1,
            checks: &checks,
        };
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        for check in &checks {
            writeln!(out, "{}", check.line())?;
        }
    }
    Ok(code(&checks))
}

fn code(checks: &[Check]) -> u8 {
    if checks.iter().any(|check| check.state == State::Missing) {
        exit::HOST
    } else {
        exit::OK
    }
}

fn checks() -> Vec<Check> {
    let cores = sys::allowed_cores().unwrap_or_default();
    vec![
        kvm(Path::new("/dev/kvm")),
        kvm_kind(&host::kvm_modules()),
        core_count(&cores),
        hugepages(host::hugepages_2m()),
        thp(host::thp_shmem().as_deref()),
        seals(sys::memfd_can_be_sealed()),
        files(sys::limit(Limit::Files).unwrap_or(u64::MAX)),
        locked(sys::limit(Limit::LockedMemory).unwrap_or(u64::MAX)),
        governor(host::governor(&cores).as_deref()),
        isolated(host::isolated_cores().as_deref()),
        optional("tap", Path::new("/dev/net/tun"), "tun", "--net tap="),
        optional(
            "vhost-net",
            Path::new("/dev/vhost-net"),
            "vhost_net",
            "--net tap=…,vhost=kernel",
        ),
    ]
}

/// A device of the host that one flag needs and nothing else.
fn optional(name: &'static str, path: &Path, module: &str, flag: &str) -> Check {
    let shown = path.display();
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::ok(name, format!("{shown}, for {flag}")),
        Err(error) => {
            let mend = match error.kind() {
                io::ErrorKind::PermissionDenied => "run it as root".to_owned(),
                _ => format!("modprobe {module} (as root)"),
            };
            Check::not(
                name,
                State::Slow,
                format!("{shown}: {error}"),
                format!("{mend}; only {flag} needs it"),
            )
        }
    }
}

fn kvm(path: &Path) -> Check {
    const NAME: &str = "kvm";
    let shown = path.display();
    let file: File = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) => {
            let mend = match error.kind() {
                io::ErrorKind::NotFound => {
                    "load the kvm module (modprobe kvm_intel or kvm_amd); in a VM, enable nested virtualisation"
                }
                io::ErrorKind::PermissionDenied => {
                    "become a member of the group that owns it (usermod -aG kvm $USER), then log in again"
                }
                _ => "see dmesg for what kvm says",
            };
            return Check::not(NAME, State::Missing, format!("{shown}: {error}"), mend);
        }
    };
    match sys::kvm_api_version(&file) {
        Ok(12) => Check::ok(NAME, format!("{shown}, API version 12")),
        Ok(version) => Check::not(
            NAME,
            State::Missing,
            format!("{shown} has API version {version}, not 12"),
            "boot a kernel of 2.6.22 or later",
        ),
        Err(error) => Check::not(
            NAME,
            State::Missing,
            format!("{shown} does not answer: {error}"),
            "see whether it is really the kvm device",
        ),
    }
}

fn kvm_kind(modules: &[String]) -> Check {
    const NAME: &str = "kvm kind";
    let has = |name: &str| modules.iter().any(|module| module == name);
    if has("kvm_pvm") {
        Check::not(
            NAME,
            State::Slow,
            "kvm_pvm: no hardware virtualisation, shadow paging; guest user mode is native, guest kernel mode is emulated \
             (the built-in guest is made for that, a stock Linux kernel does not boot)",
            "run on a host with VT-x or AMD-V for interrupt-driven guests and Linux guests",
        )
    } else if has("kvm_intel") {
        Check::ok(NAME, "kvm_intel: VT-x, all guest code runs natively")
    } else if has("kvm_amd") {
        Check::ok(NAME, "kvm_amd: AMD-V, all guest code runs natively")
    } else {
        Check::ok(
            NAME,
            "no module is listed: built into the kernel, or not visible from here",
        )
    }
}

fn core_count(cores: &[usize]) -> Check {
    const NAME: &str = "cores";
    if cores.len() >= 2 {
        Check::ok(
            NAME,
            format!("this process may run on {} of them", cores.len()),
        )
    } else {
        Check::not(
            NAME,
            State::Missing,
            format!("this process may run on {cores:?} only"),
            "bench needs two: widen the affinity mask (taskset -p) or the container's cpuset",
        )
    }
}

fn hugepages(pool: Option<host::HugePool>) -> Check {
    const NAME: &str = "huge pages";
    match pool {
        Some(pool) if pool.free >= 256 => Check::ok(
            NAME,
            format!("{} of {} 2 MiB pages are free", pool.free, pool.total),
        ),
        Some(pool) => Check::not(
            NAME,
            State::Slow,
            format!("{} of {} 2 MiB pages are free", pool.free, pool.total),
            "sysctl vm.nr_hugepages=512 (as root), then --memory hugepages=2M: fewer misses in the TLB",
        ),
        None => Check::not(
            NAME,
            State::Slow,
            "the kernel has none of 2 MiB",
            "boot a kernel with CONFIG_HUGETLBFS",
        ),
    }
}

fn thp(shmem: Option<&str>) -> Check {
    const NAME: &str = "THP for shmem";
    match shmem {
        Some(setting @ ("always" | "within_size" | "advise" | "force")) => Check::ok(NAME, setting),
        Some(setting) => Check::not(
            NAME,
            State::Slow,
            setting,
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (as root): large pages without a pool",
        ),
        None => Check::not(
            NAME,
            State::Slow,
            "not in this kernel",
            "use --memory hugepages=2M",
        ),
    }
}

fn seals(result: io::Result<()>) -> Check {
    const NAME: &str = "memfd sealing";
    match result {
        Ok(()) => Check::ok(NAME, "guest memory can be sealed against shrinking"),
        Err(error) => Check::not(
            NAME,
            State::Missing,
            format!("{error}"),
            "a kernel of 3.17 or later, and a sandbox that allows memfd_create and F_ADD_SEALS",
        ),
    }
}

fn files(limit: u64) -> Check {
    const NAME: &str = "open files";
    if limit >= 256 {
        Check::ok(NAME, format!("limit {limit}"))
    } else {
        Check::not(
            NAME,
            State::Missing,
            format!("limit {limit}; each queue needs two eventfds"),
            "ulimit -n 1024",
        )
    }
}

fn locked(limit: u64) -> Check {
    const NAME: &str = "locked memory";
    match limit {
        u64::MAX => Check::ok(NAME, "no limit"),
        // Guest memory is not locked; the limit matters to what is charged against it.
        limit => Check::ok(
            NAME,
            format!("limit {} KiB (guest memory is not locked)", limit >> 10),
        ),
    }
}

fn governor(found: Option<&str>) -> Check {
    const NAME: &str = "governor";
    match found {
        Some("performance") => Check::ok(NAME, "performance"),
        Some(other) => Check::not(
            NAME,
            State::Slow,
            other,
            "cpupower frequency-set -g performance (as root): clocks that change make figures that change",
        ),
        None => Check::ok(NAME, "not visible from here (usual in a VM)"),
    }
}

fn isolated(found: Option<&str>) -> Check {
    const NAME: &str = "isolated cores";
    match found {
        Some(cores) if !cores.is_empty() => {
            Check::ok(NAME, format!("{cores} (use them with --cores)"))
        }
        _ => Check::not(
            NAME,
            State::Slow,
            "none: other work takes turns with the guests; bench drops the samples that it hits",
            "boot with isolcpus=A,B nohz_full=A,B",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_comes_with_how_to_mend_it() {
        let bad = [
            kvm(Path::new("/no/such/device")),
            kvm(Path::new("/dev/null")),
            core_count(&[3]),
            hugepages(None),
            hugepages(Some(host::HugePool { free: 0, total: 4 })),
            thp(Some("never")),
            thp(None),
            seals(Err(io::Error::from_raw_os_error(libc::EPERM))),
            files(64),
            governor(Some("powersave")),
            isolated(None),
            kvm_kind(&["kvm".into(), "kvm_pvm".into()]),
            optional("tap", Path::new("/no/such/device"), "tun", "--net tap="),
        ];
        for check in bad {
            assert_ne!(check.state, State::Ok, "{}", check.line());
            assert!(check.mend.is_some(), "{}", check.line());
            assert!(!check.line().contains('\n'));
        }
    }

    #[test]
    fn only_what_is_needed_fails_it() {
        assert_eq!(code(&[thp(Some("never")), isolated(None)]), exit::OK);
        assert_eq!(code(&[core_count(&[0])]), exit::HOST);
        let none = optional("tap", Path::new("/no/such/device"), "tun", "--net tap=");
        assert_eq!(code(&[none]), exit::OK);
        assert_eq!(core_count(&[0, 1]).state, State::Ok);
        assert_eq!(files(1024).state, State::Ok);
        assert_eq!(kvm_kind(&["kvm_amd".into()]).state, State::Ok);
    }
}

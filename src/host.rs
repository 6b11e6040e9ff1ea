//! What can be read about the host: for `doctor`, and for the environment of a measurement.

use std::fs;

/// The pool of huge pages of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct HugePool {
    /// Pages that nobody uses.
    pub free: u64,
    /// Pages in the pool.
    pub total: u64,
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

/// The loaded modules that are part of KVM.
pub fn kvm_modules() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name == "kvm" || name.starts_with("kvm_"))
        .collect();
    names.sort();
    names
}

/// The pool of 2 MiB pages; `None` where the kernel has none.
pub fn hugepages_2m() -> Option<HugePool> {
    let number = |name: &str| -> Option<u64> {
        read(&format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"))?
            .parse()
            .ok()
    };
    Some(HugePool {
        free: number("free_hugepages")?,
        total: number("nr_hugepages")?,
    })
}

/// The setting of transparent huge pages for shared memory.
pub fn thp_shmem() -> Option<String> {
    chosen(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")?)
}

/// The word in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (word, _) = rest.split_once(']')?;
    Some(word.to_owned())
}

/// The frequency governor of these cores, where it is visible; all of them where they differ.
pub fn governor(cores: &[usize]) -> Option<String> {
    let mut names: Vec<String> = cores
        .iter()
        .filter_map(|core| {
            read(&format!(
                "/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"
            ))
        })
        .collect();
    names.sort();
    names.dedup();
    (!names.is_empty()).then(|| names.join(","))
}

/// The cores that the scheduler leaves alone, as the kernel lists them.
pub fn isolated_cores() -> Option<String> {
    read("/sys/devices/system/cpu/isolated")
}

/// The kernel's release.
pub fn kernel() -> Option<String> {
    read("/proc/sys/kernel/osrelease")
}

/// The processor's name.
pub fn cpu_model() -> Option<String> {
    let text = read("/proc/cpuinfo")?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// CPU time of each thread of a process but those in `except`, summed, in ns (schedstat; exact for threads that sleep).
pub fn other_threads_ns(pid: u32, except: &[u32]) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    threads
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|tid| !except.contains(tid))
        .filter_map(|tid| {
            let text = read(&format!("/proc/{pid}/task/{tid}/schedstat"))?;
            text.split_whitespace().next()?.parse::<u64>().ok()
        })
        .sum()
}

/// Whether all threads of a process are stopped (by SIGSTOP).
pub fn is_stopped(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The name in brackets may hold anything, brackets too.
        let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
        state.is_some_and(|state| state.starts_with('T'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_in_brackets_is_the_setting() {
        let text = "always within_size advise [never] deny force";
        assert_eq!(chosen(text).as_deref(), Some("never"));
        assert_eq!(chosen("never"), None);
    }

    #[test]
    fn the_threads_of_this_process_are_seen() {
        let pid = std::process::id();
        assert!(other_threads_ns(pid, &[]) > 0);
        assert!(kernel().is_some());
        assert!(!is_stopped(pid));
        assert!(!is_stopped(u32::MAX));
    }
}

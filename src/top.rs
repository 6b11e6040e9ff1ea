//! `top`: what running VMs are doing, from their `--metrics` sockets.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::cli::TopArgs;
use crate::exit;

/// How long a VM may leave us without a line: it sends one each interval, a minute at most.
const PATIENCE: Duration = Duration::from_secs(65);
/// No line is longer.
const LINE_LIMIT: u64 = 1 << 20;

/// One VM and its two last snapshots.
struct Vm {
    socket: PathBuf,
    lines: BufReader<UnixStream>,
    before: Value,
    now: Value,
}

impl Vm {
    fn connect(socket: &PathBuf) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("{}: no VM has --metrics unix:… here", socket.display()))?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .context("setsockopt")?;
        let mut vm = Self {
            socket: socket.clone(),
            lines: BufReader::new(stream),
            before: Value::Null,
            now: Value::Null,
        };
        vm.read()?;
        Ok(vm)
    }

    /// The next snapshot.
    fn read(&mut self) -> Result<()> {
        let mut line = String::new();
        let mut limited = io::Read::take(&mut self.lines, LINE_LIMIT);
        let got = limited.read_line(&mut line);
        let socket = self.socket.display();
        if got.with_context(|| format!("{socket}: no line came"))? == 0 {
            bail!("{socket}: the VM ended");
        }
        let value: Value = serde_json::from_str(&line).map_err(|_| {
            anyhow!("{socket}: this is no line of --metrics unix:PATH (format=prometheus is not for top)")
        })?;
        if value["schema_version"] != 1 {
            bail!(
                "{socket}: metrics of another version: {}",
                value["schema_version"]
            );
        }
        self.before = std::mem::replace(&mut self.now, value);
        Ok(())
    }

    /// What it did from one snapshot to the next.
    fn render(&self) -> String {
        let ms = number(&self.now, "uptime_ms").saturating_sub(number(&self.before, "uptime_ms"));
        let rates = Rates { ms };
        let mut out = format!(
            "{}  pid {}  up {:.1} s\n",
            self.socket.display(),
            number(&self.now, "pid"),
            number(&self.now, "uptime_ms") as f64 / 1000.0
        );
        let vcpus = list(&self.now, "vcpus")
            .iter()
            .zip(list(&self.before, "vcpus"));
        for (index, (now, before)) in vcpus.enumerate() {
            let exits = rates.changed(&now["exits"], &before["exits"]);
            let _ = writeln!(out, "  vcpu{index}  exits/s: {exits}");
            let kvm = rates.changed(&now["kvm"], &before["kvm"]);
            let _ = writeln!(out, "         kvm/s: {kvm}");
        }
        let devices = list(&self.now, "devices")
            .iter()
            .zip(list(&self.before, "devices"));
        for (now, before) in devices {
            let text = |name| now[name].as_str().unwrap_or_default().to_owned();
            let _ = writeln!(out, "  {} {}", text("kind"), text("name"));
            for gauge in ["windows", "mappings"] {
                if let Some(value) = now[gauge].as_u64() {
                    let _ = writeln!(out, "         {gauge}: {value}");
                }
            }
            let _ = writeln!(out, "         /s: {}", rates.changed(now, before));
            for name in ["map", "unmap"] {
                if let Some(times) = quantiles(&now[name]) {
                    let _ = writeln!(out, "         {name}: {times}");
                }
            }
        }
        let guest = &self.now["guest"];
        let runs = number(guest, "runs");
        if runs > 0 {
            let field = |name| number(guest, name);
            let _ = writeln!(
                out,
                "  guest  {runs} runs: sent {} frames, received {}; {} lost, {} duplicated, {} reordered, {} corrupted",
                field("tx_frames"),
                field("rx_frames"),
                field("lost"),
                field("duplicated"),
                field("reordered"),
                field("corrupted")
            );
        }
        out
    }
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or(0)
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}

struct Rates {
    ms: u64,
}

impl Rates {
    /// The counters of an object that changed, a second.
    fn changed(&self, now: &Value, before: &Value) -> String {
        let Some(fields) = now.as_object() else {
            return "unknown".to_owned();
        };
        let mut parts = Vec::new();
        for (name, value) in fields {
            let change = value
                .as_u64()
                .unwrap_or(0)
                .saturating_sub(number(before, name));
            if change > 0 && self.ms > 0 && !matches!(&**name, "windows" | "mappings") {
                let rate = change as f64 * 1000.0 / self.ms as f64;
                parts.push(format!("{name} {rate:.1}"));
            }
        }
        match parts.is_empty() {
            true => "nothing".to_owned(),
            false => parts.join(", "),
        }
    }
}

/// How many there were, and what half and all but a hundredth stay below.
fn quantiles(times: &Value) -> Option<String> {
    let classes = list(times, "up_to_1024ns_doubling");
    let counts: Vec<u64> = classes.iter().map(|c| c.as_u64().unwrap_or(0)).collect();
    let all: u64 = counts.iter().sum();
    if all == 0 {
        return None;
    }
    let below = |share: f64| {
        let mut seen = 0;
        let class = counts.iter().position(|count| {
            seen += count;
            seen as f64 >= share * all as f64
        });
        match class {
            Some(class) if class + 1 < counts.len() => {
                format!("{:.1} µs", f64::from(1_u32 << class) * 1.024)
            }
            _ => "more".to_owned(),
        }
    };
    Some(format!(
        "{all} times, half within {}, 99 % within {}",
        below(0.5),
        below(0.99)
    ))
}

/// Shows them until one ends or a signal comes; once, where stdout is no terminal.
pub fn run(args: &TopArgs) -> Result<u8> {
    let mut vms = args
        .sockets
        .iter()
        .map(Vm::connect)
        .collect::<Result<Vec<_>>>()?;
    let terminal = io::stdout().is_terminal();
    loop {
        for vm in &mut vms {
            vm.read()?;
        }
        let text: Vec<String> = vms.iter().map(Vm::render).collect();
        let mut out = io::stdout().lock();
        if terminal {
            // To the corner, and nothing below.
            write!(out, "\x1b[H\x1b[J")?;
        }
        writeln!(out, "{}", text.join("\n").trim_end())?;
        out.flush()?;
        if !terminal {
            return Ok(exit::OK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vm(before: Value, now: Value) -> Vm {
        let (stream, _) = UnixStream::pair().unwrap();
        Vm {
            socket: "/m".into(),
            lines: BufReader::new(stream),
            before,
            now,
        }
    }

    fn snapshot(ms: u64, exits: u64, maps: u64) -> Value {
        json!({
            "schema_version": 1, "pid": 5, "uptime_ms": ms,
            "vcpus": [{"exits": {"io_in": 0, "mmio_write": exits}, "kvm": {"halt_exits": 1}}],
            "devices": [{"kind": "window", "name": "/s", "misses": maps, "windows": 3,
                "map": {"count": maps, "total_ns": 0, "up_to_1024ns_doubling": [1, maps - 1, 0]}}],
            "guest": {"runs": 1, "tx_frames": 8, "rx_frames": 9, "lost": 0},
        })
    }

    #[test]
    fn what_changed_is_shown_a_second_and_what_did_not_is_left_out() {
        let text = vm(snapshot(1000, 10, 2), snapshot(3000, 50, 4)).render();
        for line in [
            "/m  pid 5  up 3.0 s",
            "  vcpu0  exits/s: mmio_write 20.0",
            "         kvm/s: nothing",
            "  window /s",
            "         windows: 3",
            "         /s: misses 1.0",
            "         map: 4 times, half within 2.0 µs, 99 % within 2.0 µs",
            "  guest  1 runs: sent 8 frames, received 9; 0 lost, 0 duplicated, 0 reordered, 0 corrupted",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
        }
    }

    #[test]
    fn what_is_no_snapshot_is_shown_as_nothing() {
        let text = vm(
            Value::Null,
            json!({"vcpus": 5, "devices": [1], "guest": []}),
        )
        .render();
        assert!(text.starts_with("/m  pid 0"));
    }
}

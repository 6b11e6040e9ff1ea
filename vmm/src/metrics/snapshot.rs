//! One look at everything that is counted, and its two forms.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use devices::latency::{CLASSES, Latencies, bound_ns};

use super::Reports;
use crate::stats::VcpuStats;

/// The counters of a device, by name; those that can fall are gauges.
pub(crate) struct Group {
    /// What kind of device, as it is called in JSON and in the names of Prometheus.
    pub(crate) kind: &'static str,
    /// Its socket or interface; empty where there is one at most.
    pub(crate) name: String,
    /// What only grows.
    pub(crate) counters: Vec<(&'static str, u64)>,
    /// What is so now.
    pub(crate) gauges: Vec<(&'static str, u64)>,
    /// How long things took.
    pub(crate) times: Vec<(&'static str, Latencies)>,
}

/// Where a snapshot comes from.
pub(crate) struct Sources {
    pub(crate) vcpus: Vec<Arc<VcpuStats>>,
    pub(crate) devices: Box<dyn Fn() -> Vec<Group> + Send>,
    pub(crate) guest: Arc<Reports>,
    pub(crate) started: Instant,
}

/// Text as a JSON string, or as a label's value, which has the same rules for what occurs in a path.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

impl Sources {
    /// A line of JSON (schema_version 1).
    pub(crate) fn json(&self) -> String {
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        let vcpus: Vec<String> = self.vcpus.iter().map(|vcpu| vcpu.to_json()).collect();
        let devices: Vec<String> = (self.devices)().iter().map(Group::json).collect();
        let guest: Vec<String> = self
            .guest
            .read()
            .map(|(k, v)| format!("\"{k}\":{v}"))
            .collect();
        format!(
            "{{\"schema_version\":1,\"record\":\"metrics\",\"pid\":{},\"time_ms\":{},\"uptime_ms\":{},\"vcpus\":[{}],\"devices\":[{}],\"guest\":{{{}}}}}\n",
            std::process::id(),
            time.map_or(0, |time| time.as_millis()),
            self.started.elapsed().as_millis(),
            vcpus.join(","),
            devices.join(","),
            guest.join(","),
        )
    }

    /// Prometheus' text format 0.0.4.
    pub(crate) fn prometheus(&self) -> String {
        let mut text = Exposition::default();
        let uptime = self.started.elapsed().as_secs();
        text.add("uptime_seconds", "gauge", "", uptime);
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            for (reason, count) in vcpu.exits.all() {
                let labels = format!("vcpu=\"{index}\",reason=\"{reason}\"");
                text.add("vcpu_exits_total", "counter", &labels, count);
            }
            for (name, value) in vcpu.kernel() {
                let labels = format!("vcpu=\"{index}\",counter={}", quoted(&name));
                text.add("vcpu_kvm", "untyped", &labels, value);
            }
        }
        for group in (self.devices)() {
            group.expose(&mut text);
        }
        for (name, sum) in self.guest.read() {
            text.add(&format!("guest_{name}_total"), "counter", "", sum);
        }
        text.render()
    }
}

impl Group {
    fn json(&self) -> String {
        let mut out = format!(
            "{{\"kind\":\"{}\",\"name\":{}",
            self.kind,
            quoted(&self.name)
        );
        for (name, value) in self.counters.iter().chain(&self.gauges) {
            let _ = write!(out, ",\"{name}\":{value}");
        }
        for (name, times) in &self.times {
            let classes = times.classes.map(|count| count.to_string()).join(",");
            let _ = write!(
                out,
                ",\"{name}\":{{\"count\":{},\"total_ns\":{},\"up_to_1024ns_doubling\":[{classes}]}}",
                times.count(),
                times.total_ns
            );
        }
        out.push('}');
        out
    }

    fn expose(&self, text: &mut Exposition) {
        let kind = self.kind;
        let labels = match self.name.is_empty() {
            true => String::new(),
            false => format!("device={}", quoted(&self.name)),
        };
        for (name, value) in &self.counters {
            text.add(&format!("{kind}_{name}_total"), "counter", &labels, *value);
        }
        for (name, value) in &self.gauges {
            text.add(&format!("{kind}_{name}"), "gauge", &labels, *value);
        }
        for (name, times) in &self.times {
            text.histogram(&format!("{kind}_{name}_seconds"), &labels, times);
        }
    }
}

/// Families of samples, in the order in which they came first: a family's samples have to stand together.
#[derive(Default)]
struct Exposition(Vec<(String, &'static str, String)>);

impl Exposition {
    fn family(&mut self, name: &str, kind: &'static str) -> &mut String {
        let at = self.0.iter().position(|(known, ..)| known == name);
        let at = at.unwrap_or_else(|| {
            self.0.push((name.to_owned(), kind, String::new()));
            self.0.len() - 1
        });
        &mut self.0[at].2
    }

    fn add(&mut self, name: &str, kind: &'static str, labels: &str, value: u64) {
        let samples = self.family(name, kind);
        let _ = match labels.is_empty() {
            true => writeln!(samples, "vhost_pci_{name} {value}"),
            false => writeln!(samples, "vhost_pci_{name}{{{labels}}} {value}"),
        };
    }

    /// Seconds, cumulated from class to class.
    fn histogram(&mut self, name: &str, labels: &str, times: &Latencies) {
        let samples = self.family(name, "histogram");
        let comma = if labels.is_empty() { "" } else { "," };
        let mut sum = 0;
        for class in 0..CLASSES {
            sum += times.classes.get(class).unwrap_or(&0);
            let bound = bound_ns(class).map_or("+Inf".to_owned(), seconds);
            let _ = writeln!(
                samples,
                "vhost_pci_{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {sum}"
            );
        }
        let braced = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{labels}}}"),
        };
        let total = seconds(times.total_ns);
        let _ = writeln!(samples, "vhost_pci_{name}_sum{braced} {total}");
        let _ = writeln!(samples, "vhost_pci_{name}_count{braced} {sum}");
    }

    fn render(self) -> String {
        let families = self.0.iter();
        let texts = families
            .map(|(name, kind, samples)| format!("# TYPE vhost_pci_{name} {kind}\n{samples}"));
        texts.collect()
    }
}

fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Sources {
        let mut times = Latencies {
            total_ns: 1_500_000_001,
            ..Latencies::default()
        };
        (times.classes[0], times.classes[15]) = (2, 1);
        let devices = move || {
            let group = |name: &str| Group {
                kind: "window",
                name: name.into(),
                counters: vec![("misses", 3)],
                gauges: vec![("windows", 2)],
                times: vec![("map", times)],
            };
            vec![group("/a\"b"), group("/c")]
        };
        let guest = Arc::new(Reports::default());
        guest.take(b"{\"record\":\"result\",\"rx_frames\":7}\n");
        Sources {
            vcpus: vec![Arc::default()],
            devices: Box::new(devices),
            guest,
            started: Instant::now(),
        }
    }

    #[test]
    fn a_line_of_json_is_one_line_with_its_version_and_escapes() {
        let line = sources().json();
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.starts_with("{\"schema_version\":1,\"record\":\"metrics\",\"pid\":"));
        let device = "{\"kind\":\"window\",\"name\":\"/a\\\"b\",\"misses\":3,\"windows\":2,\"map\":{\"count\":3,\"total_ns\":1500000001,\"up_to_1024ns_doubling\":[2,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1]}}";
        assert!(line.contains(device), "{line}");
        assert!(line.contains("\"guest\":{\"runs\":1,") && line.contains("\"rx_frames\":7"));
    }

    #[test]
    fn prometheus_gets_each_family_once_and_cumulated_histograms() {
        let text = sources().prometheus();
        let expected = "# TYPE vhost_pci_window_misses_total counter\n\
            vhost_pci_window_misses_total{device=\"/a\\\"b\"} 3\n\
            vhost_pci_window_misses_total{device=\"/c\"} 3\n";
        assert!(text.contains(expected), "{text}");
        for line in [
            "# TYPE vhost_pci_window_map_seconds histogram",
            "vhost_pci_window_map_seconds_bucket{device=\"/c\",le=\"0.000001024\"} 2",
            "vhost_pci_window_map_seconds_bucket{device=\"/c\",le=\"+Inf\"} 3",
            "vhost_pci_window_map_seconds_sum{device=\"/c\"} 1.500000001",
            "vhost_pci_window_map_seconds_count{device=\"/c\"} 3",
            "vhost_pci_guest_rx_frames_total 7",
            "vhost_pci_vcpu_exits_total{vcpu=\"0\",reason=\"mmio_write\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in {text}");
        }
        let types: Vec<&str> = text.lines().filter(|l| l.starts_with("# TYPE")).collect();
        let unique: std::collections::BTreeSet<&&str> = types.iter().collect();
        assert_eq!(types.len(), unique.len());
    }
}

//! The records of the control channel (docs/bare-metal.md), and what a sample is made of.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cli::Direction;

/// No record is longer.
const LINE_LIMIT: usize = 64 << 10;

/// What has come of a line that has no end yet.
#[derive(Debug, Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    /// The records that end in what has come now.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Vec<Record>> {
        self.0.extend(bytes);
        let mut records = Vec::new();
        while let Some(end) = self.0.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.0.drain(..=end).collect();
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let record = serde_json::from_slice(line).with_context(|| {
                format!("a guest sent no record: {}", String::from_utf8_lossy(line))
            })?;
            records.push(record);
        }
        ensure!(
            self.0.len() <= LINE_LIMIT,
            "a guest sent a line of more than {LINE_LIMIT} bytes"
        );
        Ok(records)
    }
}

/// One line from a guest, or from its VMM.
#[derive(Debug, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// The guest's devices and the connection are up.
    Ready {
        /// Ticks of the time-stamp counter in a millisecond.
        tsc_khz: u64,
        /// What the virtio-net device and its driver agreed on; 0 where the guest does not say.
        #[serde(default)]
        features: u64,
    },
    /// The peer is gone.
    Down,
    /// A workload ended.
    Result(WorkResult),
    /// A command of the study was carried out.
    Done(Done),
    /// A command could not be carried out.
    Error {
        /// Why.
        what: String,
    },
    /// The VMM's counters.
    Vmm(VmmStats),
    /// A record of a later version.
    #[serde(other)]
    Unknown,
}

/// What came of a command; what each command reports is in docs/bare-metal.md.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Done {
    /// Which command.
    pub command: String,
    /// Its numbers, and groups of them.
    #[serde(flatten)]
    pub fields: BTreeMap<String, Value>,
}

impl Done {
    /// A number; `None` where the record has none of that name.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.fields.get(name)?.as_u64()
    }
}

/// What one end of a run reports; the two ends of the upper bound report the same. Times are TSC ticks; what does not apply is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct WorkResult {
    /// The id of the `run` command.
    pub id: u16,
    /// Frames received in the timed part.
    pub rx_frames: u64,
    /// How long the timed part of receiving took.
    pub rx_ticks: u64,
    /// Frames whose contents were checked, warm-up included.
    pub verified: u64,
    /// Frames that did not arrive.
    pub lost: u64,
    /// Frames that arrived again.
    pub duplicated: u64,
    /// Frames that arrived late.
    pub reordered: u64,
    /// Frames with a wrong header or payload.
    pub corrupted: u64,
    /// 1 where the receiver gave up waiting.
    pub timeout: u64,
    /// Round-trip times.
    pub rtt: Option<Rtt>,
    /// Times until a window was there or gone, of those that came and went meanwhile.
    pub churn: Option<Rtt>,
}

/// Percentiles of times, in TSC ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Rtt {
    /// How many.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 90 %.
    pub p90: u64,
    /// 99 %.
    pub p99: u64,
    /// 99.9 %.
    pub p999: u64,
    /// The longest.
    pub max: u64,
}

/// The VMM's answer to `vmm stats`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct VmmStats {
    /// One a virtual CPU.
    pub vcpus: Vec<VcpuStats>,
    /// Of the virtio-iommu, where there is one.
    pub iommu: Counters,
    /// Of the network device.
    pub net: Counters,
    /// Of the vhost-pci device and its window.
    pub window: Counters,
}

/// Counters by name.
pub type Counters = BTreeMap<String, Value>;

/// Counters of one virtual CPU.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct VcpuStats {
    /// The thread that runs it.
    pub tid: u32,
    /// Returns of KVM_RUN to the VMM, by reason.
    pub exits: BTreeMap<String, u64>,
    /// The kernel's own counters.
    pub kvm: BTreeMap<String, u64>,
}

/// What went wrong with frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Faults {
    /// Sent but not received.
    pub lost: u64,
    /// Received again.
    pub duplicated: u64,
    /// Received behind a later one.
    pub reordered: u64,
    /// Received with a wrong header or payload.
    pub corrupted: u64,
    /// Receivers that gave up waiting for the end.
    pub timeouts: u64,
}

impl Faults {
    /// Whether there were any.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

impl AddAssign for Faults {
    fn add_assign(&mut self, other: Self) {
        // Guests count these, and may say anything.
        let all = [
            (&mut self.lost, other.lost),
            (&mut self.duplicated, other.duplicated),
            (&mut self.reordered, other.reordered),
            (&mut self.corrupted, other.corrupted),
            (&mut self.timeouts, other.timeouts),
        ];
        for (sum, more) in all {
            *sum = sum.saturating_add(more);
        }
    }
}

/// Round-trip times in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 90 %.
    pub p90: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

/// What one sample measured, of the guests or of the upper bound.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleResult {
    /// Millions of frames received in a second, both directions together; 0 for a round trip.
    pub mpps: f64,
    /// Frames received in the timed part, or round trips.
    pub frames: u64,
    /// Frames whose contents were checked.
    pub verified: u64,
    /// What went wrong with them.
    pub faults: Faults,
    /// For a round trip.
    pub latency: Option<Latency>,
    /// Windows that came and went meanwhile.
    pub churn: Option<Rtt>,
    /// Whether every receiver timed something: one that hardly ran during a short sample may not have.
    pub timed: bool,
}

impl SampleResult {
    /// Puts together what the two ends report, back-end first.
    pub fn new(direction: Direction, ends: &[WorkResult; 2], tsc_khz: u64) -> Result<Self> {
        ensure!(
            tsc_khz > 0,
            "the guest does not know the frequency of its clock"
        );
        let mut sample = Self::default();
        for end in ends {
            sample.verified = sample.verified.saturating_add(end.verified);
            sample.faults += Faults {
                lost: end.lost,
                duplicated: end.duplicated,
                reordered: end.reordered,
                corrupted: end.corrupted,
                timeouts: end.timeout,
            };
        }
        let [back, front] = ends;
        let receivers: &[&WorkResult] = match direction {
            Direction::BeToFe => &[front],
            Direction::FeToBe => &[back],
            Direction::Both => &[back, front],
            Direction::Echo => &[back],
            Direction::RoundTrip | Direction::Idle => &[],
        };
        sample.churn = front.churn;
        // Where nobody sends, one frame goes over before that.
        sample.timed = direction != Direction::Idle || front.verified > 0;
        for end in receivers {
            sample.frames = sample.frames.saturating_add(end.rx_frames);
            if end.rx_frames > 0 && end.rx_ticks > 0 {
                sample.mpps += end.rx_frames as f64 / end.rx_ticks as f64 * tsc_khz as f64 / 1000.0;
            } else {
                sample.timed = false;
            }
        }
        if direction == Direction::RoundTrip {
            let rtt = back.rtt.unwrap_or_default();
            sample.timed = rtt.count > 0;
            let ns = |ticks: u64| ticks as f64 * 1e6 / tsc_khz as f64;
            sample.frames = rtt.count;
            sample.latency = Some(Latency {
                p50: ns(rtt.p50),
                p90: ns(rtt.p90),
                p99: ns(rtt.p99),
                p999: ns(rtt.p999),
                max: ns(rtt.max),
            });
        }
        Ok(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::fuzz_body::fuzz_records;
    use crate::bench::iterations;
    use clap::ValueEnum;

    fn receiver(frames: u64, ticks: u64) -> WorkResult {
        WorkResult {
            rx_frames: frames,
            rx_ticks: ticks,
            verified: frames,
            ..WorkResult::default()
        }
    }

    #[test]
    fn records_are_read_as_the_guest_writes_them() {
        let line = r#"{"record":"result","id":7,"work":"sink","rx_frames":3,"rx_bytes":192,"rx_ticks":9,"lost":0,
            "duplicated":0,"reordered":0,"corrupted":1,"timeout":0,"verified":4}"#;
        let Record::Result(result) = serde_json::from_str(line).unwrap() else {
            panic!("not a result");
        };
        assert_eq!((result.id, result.corrupted, result.verified), (7, 1, 4));
        assert_eq!(result.rtt, None);
        let line = r#"{"record":"vmm","vcpus":[{"tid":42,"exits":{"io_in":1},"kvm":{"exits":5}}],"window":{"reads":0,"writes":0}}"#;
        let Record::Vmm(stats) = serde_json::from_str(line).unwrap() else {
            panic!("not the VMM's");
        };
        assert_eq!(stats.vcpus[0].tid, 42);
        let line = r#"{"record":"ready","role":"back-end","tsc_khz":2596000,"features":1}"#;
        assert!(matches!(
            serde_json::from_str(line).unwrap(),
            Record::Ready {
                tsc_khz: 2_596_000,
                features: 1
            }
        ));
        assert!(matches!(
            serde_json::from_str(r#"{"record":"of-tomorrow","x":1}"#).unwrap(),
            Record::Unknown
        ));
    }

    #[test]
    fn whatever_a_guest_writes_is_records_or_an_error() {
        let file =
            |piece: u8, lines: &[&str]| [&[piece], lines.join("\n").as_bytes(), b"\n"].concat();
        let result = r#"{"record":"result","id":1,"work":"sink","rx_frames":3,"rx_bytes":192,"rx_ticks":9,"verified":4,"lost":0,"timeout":0,"rtt":{"count":1,"p50":2},"churn":{"count":1,"max":5}}"#;
        let ready = r#"{"record":"ready","role":"back-end","tsc_khz":2596000,"features":1}"#;
        let done = r#"{"record":"done","command":"map","status":0,"times":{"count":1}}"#;
        let error = r#"{"record":"error","what":"no device"}"#;
        let vmm = r#"{"record":"vmm","vcpus":[{"tid":42,"exits":{"io_in":1},"kvm":{"exits":5}}],"window":{"reads":0}}"#;
        iterations::seeds(
            "records",
            &[
                ("run", file(255, &[ready, result, result])),
                (
                    "study",
                    file(7, &[ready, done, error, r#"{"record":"down"}"#]),
                ),
                ("vmm", file(64, &[vmm, r#"{"record":"of-tomorrow"}"#])),
            ],
        );
        let count = if cfg!(debug_assertions) { 2000 } else { 20_000 };
        iterations::iterate("records", count, fuzz_records);
    }

    #[test]
    fn the_rate_is_the_receivers_and_both_directions_add_up() {
        // 2 GHz: 2,000,000 ticks are a millisecond.
        let ends = [receiver(10_000, 2_000_000), receiver(30_000, 2_000_000)];
        let rate = |direction| SampleResult::new(direction, &ends, 2_000_000).unwrap();
        assert!((rate(Direction::BeToFe).mpps - 30.0).abs() < 1e-9);
        assert!((rate(Direction::FeToBe).mpps - 10.0).abs() < 1e-9);
        assert!((rate(Direction::Echo).mpps - 10.0).abs() < 1e-9);
        let both = rate(Direction::Both);
        assert!((both.mpps - 40.0).abs() < 1e-9);
        assert_eq!((both.frames, both.verified), (40_000, 40_000));
    }

    #[test]
    fn faults_of_either_end_count_whatever_the_direction() {
        let bad = WorkResult {
            lost: 1,
            duplicated: 2,
            reordered: 3,
            corrupted: 4,
            timeout: 1,
            ..receiver(5, 5)
        };
        let sample =
            SampleResult::new(Direction::BeToFe, &[bad.clone(), receiver(1, 1)], 1000).unwrap();
        let want = Faults {
            lost: 1,
            duplicated: 2,
            reordered: 3,
            corrupted: 4,
            timeouts: 1,
        };
        assert_eq!(sample.faults, want);
        assert!(sample.faults.any());
    }

    #[test]
    fn a_guest_that_counts_to_the_end_of_numbers_is_believed_and_no_more() {
        let most = WorkResult {
            verified: u64::MAX,
            lost: u64::MAX,
            ..receiver(u64::MAX, 1)
        };
        let sample = SampleResult::new(Direction::Both, &[most.clone(), most], 1).unwrap();
        let counts = [sample.verified, sample.frames, sample.faults.lost];
        assert_eq!(counts, [u64::MAX; 3]);
    }

    #[test]
    fn a_sample_in_which_a_receiver_timed_nothing_says_so() {
        let none = WorkResult::default();
        for &direction in Direction::value_variants() {
            let timed = |ends: [&WorkResult; 2]| {
                let ends = ends.map(Clone::clone);
                SampleResult::new(direction, &ends, 1000).unwrap().timed
            };
            assert!(!timed([&none, &none]));
            let some = WorkResult {
                rtt: Some(Rtt {
                    count: 1,
                    ..Rtt::default()
                }),
                ..receiver(1, 1)
            };
            assert!(timed([&some, &some]));
        }
        assert!(SampleResult::new(Direction::Both, &[none.clone(), none], 0).is_err());
    }

    #[test]
    fn round_trips_are_reported_in_nanoseconds() {
        let back = WorkResult {
            rtt: Some(Rtt {
                count: 9,
                p50: 200,
                p90: 300,
                p99: 400,
                p999: 600,
                max: 2000,
            }),
            ..WorkResult::default()
        };
        let sample = SampleResult::new(
            Direction::RoundTrip,
            &[back, WorkResult::default()],
            2_000_000,
        )
        .unwrap();
        let latency = sample.latency.unwrap();
        assert!((latency.p50 - 100.0).abs() < 1e-9 && (latency.max - 1000.0).abs() < 1e-9);
        assert!((latency.p90 - 150.0).abs() < 1e-9);
        assert_eq!(sample.frames, 9);
    }
}

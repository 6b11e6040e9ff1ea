//! Hours in short: a VM whose peers come and go, with traffic both ways and windows that come and go beside it. It holds no more of the host in the end than
//! after the first peers.
//!
//! 20 seconds for each kind of window, or `VHOST_PCI_SOAK` seconds (`./tests/run --long`: 10 minutes each).

use std::thread;
use std::time::{Duration, Instant};

use super::kill::{Kind, Life, Random, Vm, seed};
use super::machine;
use crate::common::Dir;

/// How long one peer has traffic.
const TRAFFIC: Duration = Duration::from_millis(1500);
/// Windows a second that come and go, where the front-end has an IOMMU.
const CHURN: u32 = 1000;
/// Peers before the first count: by then everything has been touched once.
const FIRST: u32 = 3;

fn length() -> Duration {
    let seconds = std::env::var("VHOST_PCI_SOAK");
    let seconds = seconds.map_or(20, |text| text.parse().expect("VHOST_PCI_SOAK is seconds"));
    Duration::from_secs(seconds)
}

/// Traffic both ways until the peer leaves; returns how many frames the survivor had.
fn traffic(life: &Life, vms: [&mut Vm; 2], id: u64) -> u64 {
    let [survivor, peer] = vms;
    let churn = match life.kind.iommu {
        true => format!(" churn={CHURN}"),
        false => String::new(),
    };
    let run = format!("run id={id} work=both ms=600000 timeout_ms=600000");
    // It is the front-end that has windows.
    let words = |front: bool| if front { &*churn } else { "" };
    survivor.send(&(run.clone() + words(!life.kills_front)));
    peer.send(&(run + words(life.kills_front)));
    thread::sleep(TRAFFIC);
    peer.end();
    let stopped = survivor.record(&["stopped"], Some(id));
    for count in ["corrupted", "lost", "duplicated", "reordered"] {
        assert_eq!(stopped[count], 0, "{stopped}\n{}", survivor.log());
    }
    stopped["verified"].as_u64().unwrap()
}

fn soak(iommu: bool) {
    let _machine = machine();
    let mut random = Random(seed());
    let (start, length) = (Instant::now(), length());
    // Each side is the one that stays for half of the time.
    for kills_front in [true, false] {
        let until = start + if kills_front { length / 2 } else { length };
        let dir = Dir::new();
        let life = Life {
            kind: Kind {
                packed: random.below(2) == 0,
                iommu,
                inflight: false,
            },
            kills_front,
            front_listens: !kills_front,
            socket: dir.file("s"),
        };
        let mut survivor = life.start(!kills_front);
        let (mut id, mut peers, mut frames, mut before) = (0, 0, 0, None);
        while peers <= FIRST || Instant::now() < until {
            let mut peer = life.start(kills_front);
            peer.record(&["ready"], None);
            life.expect_traffic([&mut survivor, &mut peer], &mut id, "soak");
            let now = survivor.holdings();
            if peers >= FIRST {
                now.expect_no_more_than(before.get_or_insert(now), "soak");
            }
            id += 1;
            frames += traffic(&life, [&mut survivor, &mut peer], id);
            peers += 1;
        }
        println!(
            "{:?}: {peers} peers in {:.0?}, {frames} frames; held: {:?}",
            life.kind,
            start.elapsed(),
            survivor.holdings()
        );
    }
}

#[test]
fn a_vm_holds_no_more_of_the_host_however_many_peers_come_and_go() {
    soak(false);
}

#[test]
fn a_vm_holds_no_more_of_the_host_however_many_peers_and_windows_come_and_go() {
    soak(true);
}

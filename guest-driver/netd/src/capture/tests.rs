//! What a capture of a port has in it: both ends of joined rings are the test's.

use guest_driver::Port;
use guest_driver::joined::{JoinConfig, JoinedBackEnd, JoinedFrontEnd, Silent};
use guest_driver::net_port::Shape;
use guest_driver::watch::Watched;
use virtqueue::net::{GUEST_OFFLOADS, HDR_GSO_TCPV4, HOST_OFFLOADS, Header};

use super::*;
use crate::testing::*;

/// Rings, and what passes the back-end's end of them.
struct Rig {
    front: JoinedFrontEnd<Silent>,
    back: JoinedBackEnd<Silent>,
    capture: Capture<Vec<u8>>,
}

impl Rig {
    fn new(config: &JoinConfig, limits: Limits) -> Self {
        let (front, back) = join(config, Silent, Silent);
        let capture = Capture::new(Vec::new(), "test", limits);
        Self {
            front,
            back,
            capture,
        }
    }

    fn watched(&mut self) -> Watched<&mut JoinedBackEnd<Silent>, &mut Capture<Vec<u8>>> {
        Watched {
            port: &mut self.back,
            watch: &mut self.capture,
        }
    }

    /// The frames so far, each with whether it went to the peer and how long it was.
    fn captured(&mut self) -> Vec<(bool, usize, Vec<u8>)> {
        self.capture.flush();
        assert!(self.capture.check().unwrap());
        let frames = captured(self.capture.file.get_ref());
        let times: Vec<_> = frames.iter().map(|(time, ..)| *time).collect();
        assert!(times.is_sorted());
        let sane = |time: &u64| (now() - 60_000_000_000..=now()).contains(time);
        assert!(times.iter().all(sane), "{times:?}");
        frames
            .into_iter()
            .map(|(_, out, len, bytes)| (out, len, bytes))
            .collect()
    }
}

#[test]
fn frames_both_ways_are_in_it_as_they_passed_and_pass_as_without_it() {
    for config in configs() {
        let mut rig = Rig::new(&config, Limits::default());
        let mut expected = Vec::new();
        for number in 0..200 {
            let frames = [60, 1514, 61 + number % 1400].map(|len| frame(number, len));
            assert_eq!(send(&mut rig.front, &frames), 3);
            assert_eq!(receive(&mut rig.watched()), frames, "{config:?}");
            assert_eq!(send(&mut rig.watched(), &frames), 3);
            assert_eq!(receive(&mut rig.front), frames, "{config:?}");
            for out in [false, true] {
                expected.extend(frames.iter().map(|f| (out, f.len(), f.clone())));
            }
        }
        assert_eq!(rig.captured(), expected, "{config:?}");
    }
}

#[test]
fn only_the_first_bytes_are_kept_where_that_is_asked_for_and_all_of_them_pass() {
    let limits = Limits {
        snaplen: 64,
        ..Limits::default()
    };
    let mut rig = Rig::new(&JoinConfig::default(), limits);
    let frames = [60, 64, 65, 1518].map(|len| frame(len, len));
    assert_eq!(send(&mut rig.front, &frames), 4);
    assert_eq!(receive(&mut rig.watched()), frames);
    assert_eq!(send(&mut rig.watched(), &frames), 4);
    assert_eq!(receive(&mut rig.front), frames);
    let kept = |out: bool| {
        let first = |f: &Vec<u8>| (out, f.len(), f[..f.len().min(64)].to_vec());
        frames.iter().map(first).collect::<Vec<_>>()
    };
    assert_eq!(rig.captured(), [kept(false), kept(true)].concat());
}

#[test]
fn long_frames_that_are_left_to_be_segmented_are_in_it_as_one() {
    let config = JoinConfig {
        size: 256,
        shape: Shape {
            mergeable: true,
            offloads: HOST_OFFLOADS | GUEST_OFFLOADS,
            ..Shape::default()
        },
        ..JoinConfig::default()
    };
    let mut rig = Rig::new(&config, Limits::default());
    let header = Header {
        flags: virtqueue::net::HDR_F_NEEDS_CSUM,
        gso_type: HDR_GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
        ..Header::NONE
    };
    let long = frame(1, 40_000);
    let build = |_, slot: &mut Slot| assert!(slot.write(0, &long));
    let sent = rig.watched().tx_offloaded(&header, 1, long.len(), build);
    assert_eq!(sent, Ok(1));
    assert_eq!(receive(&mut rig.front), slice(&long));
    let sent = rig.front.tx_offloaded(&header, 1, long.len(), build);
    assert_eq!(sent, Ok(1));
    assert_eq!(receive(&mut rig.watched()), slice(&long));
    let both = [true, false].map(|out| (out, long.len(), long.clone()));
    assert_eq!(rig.captured(), both);
}

fn slice(frame: &Vec<u8>) -> &[Vec<u8>] {
    std::slice::from_ref(frame)
}

#[test]
fn a_burst_during_which_the_peer_left_is_not_in_it() {
    let (mut front, port, memory) = join_in(&JoinConfig::default(), Silent, Silent);
    let mut capture = Capture::new(Vec::new(), "test", Limits::default());
    assert_eq!(send(&mut front, &[frame(0, 60)]), 1);
    let mut vanishing = Vanishing {
        port,
        memory,
        at: 1,
    };
    let mut watched = Watched {
        port: &mut vanishing,
        watch: &mut capture,
    };
    assert_eq!(receive(&mut watched), [frame(0, 60)]);
    assert_eq!(send(&mut front, &[frame(1, 60), frame(2, 61)]), 2);
    assert_eq!(receive(&mut watched).len(), 2);
    capture.flush();
    assert_eq!(lens_in(capture.file.get_ref()), [60]);
}

#[test]
fn what_is_wrong_with_the_flag_is_named() {
    let parse = |text: &str| text.parse::<CaptureFile>();
    let whole = parse("a b").unwrap();
    assert_eq!(
        (whole.path, whole.limits),
        ("a b".into(), Limits::default())
    );
    let some = parse("f,count=7,snaplen=262144").unwrap().limits;
    assert_eq!((some.snaplen, some.frames), (SNAPLEN, 7));
    for (text, part) in [
        ("", "there has to be FILE"),
        (",count=1", "there has to be FILE"),
        ("f,", "'' is not key=value"),
        ("f,count=0", "count=0: it is a number from 1 to"),
        ("f,count=-1", "count=-1: "),
        ("f,snaplen=262145", "a number from 1 to 262144"),
        ("f,frames=1", "unknown key 'frames'; the keys are"),
        ("f,count=1,count=2", "'count' is given twice"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
    let missing: CaptureFile = "/no/such/place".parse().unwrap();
    let error = Capture::create(&missing, "x").err().unwrap().to_string();
    assert!(error.starts_with("/no/such/place: "), "{error}");
}

//! Frames that are taken one at a time: out of the ring they come in groups (`GROUP`).

use std::vec::Vec;

use super::*;

#[test]
fn frames_that_are_taken_one_at_a_time_are_the_same_in_the_same_order() {
    for config in configs(64) {
        let (_bed, mut front, mut back) = join(&config);
        for round in 0..200 {
            let count = 1 + round % 9;
            let out = frames(count, 60 + round, round);
            assert_eq!(send(&mut back, &out), count, "{config:?}");
            assert_eq!(send(&mut front, &out), count, "{config:?}");
            let (mut at_front, mut at_back) = (Vec::new(), Vec::new());
            for _ in 0..count {
                at_front.extend(receive(&mut front, 1));
                at_back.extend(receive(&mut back, 1));
            }
            assert_eq!(at_front, out, "{config:?}");
            assert_eq!(at_back, out, "{config:?}");
            assert_eq!(
                receive(&mut front, 1).len() + receive(&mut back, 1).len(),
                0
            );
            assert!(front.drained().unwrap(), "{config:?}");
        }
    }
}

#[test]
fn nobody_sleeps_on_a_frame_that_was_taken_and_not_shown() {
    for packed in [false, true] {
        let config = JoinConfig {
            packed,
            ..JoinConfig::default()
        };
        let bed = Bed::new(joined::memory_needed(&config).unwrap());
        let (mut front, mut back) =
            joined::join(bed.memory, START, &config, Silent, Silent, true).unwrap();
        for shown in 1..=3 {
            send(&mut back, &frames(3, 64, 0));
            send(&mut front, &frames(3, 64, 0));
            for _ in 0..shown {
                assert_eq!(receive(&mut front, 1).len(), 1);
                assert_eq!(receive(&mut back, 1).len(), 1);
            }
            assert_eq!(front.arm(true, false), shown < 3);
            assert_eq!(back.arm(true, false), shown < 3);
            receive(&mut front, 8);
            receive(&mut back, 8);
        }
    }
}

#[test]
fn a_device_that_has_few_buffers_gets_each_back_at_once() {
    let config = JoinConfig {
        size: 4,
        ..JoinConfig::default()
    };
    let (_bed, mut front, mut back) = join(&config);
    assert_eq!(send(&mut back, &frames(5, 64, 0)), 4);
    for _ in 0..20 {
        assert_eq!(receive(&mut front, 1).len(), 1);
        assert_eq!(send(&mut back, &frames(1, 64, 0)), 1);
    }
}

/// A back-end that ends in the middle of a group, and the one after it.
fn the_next_back_end_gets_what_was_not_shown_and_nothing_again<L: Layout>() {
    for (in_order, shown) in [false, true]
        .into_iter()
        .flat_map(|o| (0..=4).map(move |n| (o, n)))
    {
        let mut hand = ByHand::<L>::new_in(in_order, 0);
        let all = frames(4, 100, 7);
        let mut ids = Vec::new();
        for (frame, offset) in all.iter().zip([0, 0x1000, 0x2000, 0x3000]) {
            hand.put(BUFFERS + offset + 12, frame);
            ids.extend(hand.tx.add(&[piece(offset, 112, false)]));
        }
        hand.tx.publish();
        for frame in all.iter().take(shown) {
            assert_eq!(receive(&mut hand.back, 1), std::slice::from_ref(frame));
        }
        let bases = hand.back.end();
        let back_ids = |used: Vec<Used>| used.iter().map(|used| used.id).collect::<Vec<_>>();
        assert_eq!(back_ids(used(&mut hand.tx)), ids[..shown]);
        // An end is an end, however often it is said.
        assert_eq!(hand.back.end(), bases);
        hand.back = ByHand::<L>::back(&hand.bed, in_order, 0, bases);
        assert_eq!(receive(&mut hand.back, 16), all[shown..]);
        assert_eq!(back_ids(used(&mut hand.tx)), ids[shown..]);
    }
}

both_layouts!(the_next_back_end_gets_what_was_not_shown_and_nothing_again);

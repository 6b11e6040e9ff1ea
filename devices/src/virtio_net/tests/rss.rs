//! Receive-side scaling: what the driver's command is to the back-end, and what it may not be.

use virtqueue::rss::types;

use super::pairs::{DRIVER, ERR, OK, PAIRS, Several, WITH_MQ};
use super::*;

const KEY: [u8; 40] = [0x6d; 40];

/// A command: hash types, mask, unclassified queue, table, transmit queues, length of the key, key.
fn command(
    types: u32,
    mask: u16,
    unclassified: u16,
    table: &[u16],
    max_tx: u16,
    key: &[u8],
) -> Vec<u8> {
    let mut bytes = vec![4, 1];
    bytes.extend_from_slice(&types.to_le_bytes());
    for word in [&[mask, unclassified], table, &[max_tx]].concat() {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.push(u8::try_from(key.len()).unwrap());
    bytes.extend_from_slice(key);
    bytes
}

fn usual() -> Vec<u8> {
    command(types::ALL, 3, 0, &[0, 1, 2, 1], 3, &KEY)
}

impl Several {
    /// What the back-end was told of steering: the payloads.
    fn told(&self) -> Vec<Vec<u8>> {
        let seen = self.backend.seen.iter();
        let told = seen.filter(|message| message.request == requests::SET_RSS);
        told.map(|message| message.payload.clone()).collect()
    }

    fn configure(&mut self, command: &[u8]) -> u8 {
        self.command(&[command], 1).0
    }
}

#[test]
fn rss_is_offered_with_several_pairs_and_a_back_end_that_takes_the_configuration_and_not_elsewhere()
{
    let rss = protocol_features::RSS;
    for (asked, features, protocol, serves, offered) in [
        (4, WITH_MQ, rss, 4, true),
        (4, WITH_MQ | F_RSS, rss, 4, true),
        (4, WITH_MQ, 0, 4, false),
        // The bit by itself says nothing of a message that the specification does not have.
        (4, WITH_MQ | F_RSS, 0, 4, false),
        (4, WITH_MQ, rss, 3, false),
        (4, BACKEND, rss, 4, false),
        (1, WITH_MQ, rss, 4, false),
    ] {
        let mut world = World::with_pairs(asked);
        let mut backend = world.connect(features);
        backend.protocol |= protocol;
        backend.serve_pairs(serves);
        world.until(&mut backend, |world, _| world.is_ready());
        assert_eq!(
            world.net.features() & F_RSS != 0,
            offered,
            "{asked} {features:#x} {protocol:#x} {serves}"
        );
        assert_eq!(world.link(), LINK_UP);
        let limits = if asked > 1 {
            [0, 40, 128, 0, 0x3f, 0, 0, 0]
        } else {
            [0; 8]
        };
        assert_eq!(world.config(16, 8), limits);
    }
}

#[test]
fn a_configuration_reaches_the_back_end_as_the_driver_wrote_it_and_before_pairs_change() {
    let mut several = Several::steered();
    let features = several.backend.payloads::<U64>(requests::SET_FEATURES);
    assert_eq!(
        features,
        [U64(WITH_MQ | VHOST_USER_F_PROTOCOL_FEATURES)],
        "the bit is between driver and device"
    );
    several.backend.seen.clear();
    assert_eq!(several.configure(&usual()), OK);
    assert_eq!(several.told(), [usual()[2..].to_vec()]);
    assert_eq!(several.backend.seen[0].request, requests::SET_RSS);
    assert_eq!(several.in_use(), [2, 3, 4, 5]);
    // As many pairs as are received on, or sent on, whichever are more.
    for (table, max_tx, pairs) in [(&[0, 0], 4, 4), (&[1, 0], 1, 2), (&[0, 3], 2, 4)] {
        let command = command(types::UDPV4, 1, 0, table, max_tx, &KEY[..9]);
        assert_eq!(several.configure(&command), OK);
        assert_eq!(several.told().pop().unwrap(), command[2..]);
        let mut on = several.in_use();
        on.retain(|vring| *vring >= 2);
        assert_eq!(on, (2..2 * pairs).collect::<Vec<_>>());
    }
    // Another table over the same pairs is worth an answer of the back-end's as well.
    several.backend.silent_at = Some(requests::SET_RSS);
    let start = Instant::now();
    assert_eq!(
        several.configure(&command(types::UDPV4, 0, 0, &[3], 4, &[])),
        OK
    );
    assert!(start.elapsed() >= STOP_DEADLINE, "it was cut off");
}

#[test]
fn a_number_of_pairs_ends_rss_and_so_does_a_reset() {
    let mut several = Several::steered();
    assert_eq!(several.configure(&usual()), OK);
    assert_eq!(several.use_pairs(3), OK);
    assert_eq!(several.told(), [usual()[2..].to_vec(), vec![]]);
    assert_eq!(several.use_pairs(2), OK);
    assert_eq!(several.told().len(), 2);
    assert_eq!(several.configure(&usual()), OK);
    several.world.net.reset();
    let world = &mut several.world;
    world.until(&mut several.backend, |world, _| world.resets_done() == 1);
    several.backend.seen.clear();
    let features = DRIVER | F_RSS;
    let queues = (0..9).map(queue).collect();
    several.world.net.activate(Activation { features, queues });
    let world = &mut several.world;
    world.until(&mut several.backend, |_, backend| {
        backend.enabled().len() == 8
    });
    assert_eq!(several.told(), [vec![]]);
}

#[test]
fn the_next_back_end_is_told_before_it_gets_a_ring_and_one_without_rss_gets_none() {
    let mut several = Several::steered();
    assert_eq!(several.configure(&usual()), OK);
    for protocol in [0, protocol_features::RSS] {
        drop(several.backend.connection.take());
        let world = &mut several.world;
        world.until(&mut Backend::none(), |world, _| world.link() == 0);
        let _ = world.net.ready().read();
        several.backend = world.connect(WITH_MQ);
        several.backend.serve_pairs(PAIRS.into());
        several.backend.protocol |= protocol;
        world.until(&mut several.backend, |world, _| world.is_ready());
        if protocol == 0 {
            world.turn();
            several.backend.serve();
            assert_eq!(world.link(), 0);
            let features = several.backend.payloads::<U64>(requests::SET_FEATURES);
            assert!(features.is_empty());
            continue;
        }
        world.until(&mut several.backend, |_, backend| {
            backend.enabled().len() == 8
        });
        assert_eq!(several.told(), [usual()[2..].to_vec()]);
        let at = |request| {
            several
                .backend
                .seen
                .iter()
                .position(|m| m.request == request)
        };
        assert!(at(requests::SET_RSS) < at(requests::SET_VRING_KICK));
        assert_eq!(several.in_use(), [0, 1, 2, 3, 4, 5]);
    }
}

#[test]
fn a_hostile_configuration_gets_an_error_and_reaches_nobody() {
    let mut several = Several::steered();
    assert_eq!(several.configure(&usual()), OK);
    let good = usual();
    let long = [0x6d; 41];
    let mut cases: Vec<Vec<u8>> = (2..good.len()).map(|len| good[..len].to_vec()).collect();
    cases.extend([
        [&good[..], &[0]].concat(),
        [&good[..], &[0; 4000]].concat(),
        command(types::ALL | 1 << 6, 3, 0, &[0; 4], 1, &KEY),
        command(u32::MAX, 3, 0, &[0; 4], 1, &KEY),
        command(types::ALL, 2, 0, &[0; 3], 1, &KEY),
        command(types::ALL, 255, 0, &[0; 256], 1, &KEY),
        command(types::ALL, u16::MAX, 0, &[0; 4], 1, &KEY),
        command(types::ALL, 3, 0, &[0, 0, 0, PAIRS], 1, &KEY),
        command(types::ALL, 3, 0, &[0, 0, 0, 0x8000], 1, &KEY),
        command(types::ALL, 3, PAIRS, &[0; 4], 1, &KEY),
        command(types::ALL, 3, 0, &[0; 4], 0, &KEY),
        command(types::ALL, 3, 0, &[0; 4], PAIRS + 1, &KEY),
        command(types::ALL, 3, 0, &[0; 4], 1, &long),
    ]);
    let sent = several.backend.seen.len();
    for command in &cases {
        assert_eq!(several.configure(command), ERR, "{command:x?}");
    }
    assert_eq!(several.backend.seen.len(), sent);
    assert_eq!(several.world.needs_reset(), 0);
    // However it is cut into pieces.
    let (head, rest) = good.split_at(1);
    let (table, key) = rest.split_at(20);
    assert_eq!(several.command(&[head, table, key], 1), (OK, 1));
}

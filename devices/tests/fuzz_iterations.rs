//! The bodies of the fuzz targets of the devices for a fixed number of byte strings, without a fuzzer; and what the strings are made from.

#[path = "../../fuzz/iterations.rs"]
mod iterations;

use devices::fuzz_bodies::{
    fuzz_back_end, fuzz_disk, fuzz_front_end, fuzz_function, fuzz_iommu, fuzz_messages, fuzz_tap,
};
use iterations::{iterate, seeds};

/// How many strings a body gets.
const ITERATIONS: usize = if cfg!(debug_assertions) { 300 } else { 10_000 };
/// The same of those with sockets, which are slow.
const CONVERSATIONS: usize = if cfg!(debug_assertions) { 150 } else { 2_500 };

/// Words of a payload, as the bodies read them: what a page starts at, two small numbers, two bytes, all 64 bits.
fn page(number: u8) -> Vec<u8> {
    vec![0x40 | number]
}

fn pair(low: u8, high: u8) -> Vec<u8> {
    vec![0x80 | low | high << 3]
}

fn half(low: u8, high: u8) -> Vec<u8> {
    vec![0xc0, low, high]
}

fn word(value: u64) -> Vec<u8> {
    [&[0xff][..], &value.to_le_bytes()].concat()
}

/// A message that wants an answer, with `fds` descriptors of this kind: memory, eventfd, socket.
fn said(request: u8, words: &[Vec<u8>], fds: u8, kind: u8) -> Vec<u8> {
    let count = u8::try_from(words.len()).unwrap();
    let head = vec![request, 8, count];
    [head, words.concat(), vec![kind << 5 | fds]].concat()
}

fn join(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn a_function_survives_any_access_and_stays_what_it_is() {
    /// Kinds of accesses.
    const CONFIG: u8 = 0;
    const COMMON: u8 = 2;
    const BAR: u8 = 4;
    const MEMORY: u8 = 6;
    const TURN: u8 = 7;
    let start = |device: u8, features: u8, descriptor: [u8; 8], flags: u8| {
        let op = |kind: u8| kind * 5 + device;
        let common = |offset: u8, exponent: u8, data: &[u8]| {
            [&[op(COMMON), offset, exponent][..], data].concat()
        };
        let memory = |offset: u16, data: &[u8]| {
            let [low, high] = offset.to_le_bytes();
            let len = u8::try_from(data.len()).unwrap();
            [&[op(MEMORY), low, high, len][..], data].concat()
        };
        let rings = |offset: u64| (0x10_0000 + offset).to_le_bytes();
        let queue = |index: u8| {
            let at = u64::from(index) * 0x8000;
            join(&[
                common(22, 1, &[index, 0]),
                common(24, 1, &[16, 0]),
                common(32, 3, &rings(at)),
                common(40, 3, &rings(at + 0x1000)),
                common(48, 3, &rings(at + 0x2000)),
                common(26, 1, &[1, 0]),
                common(28, 1, &[1, 0]),
            ])
        };
        join(&[
            // Not behind the IOMMU.
            vec![1],
            vec![op(CONFIG), 4, 0, 1, 6, 0],
            common(20, 0, &[1]),
            common(20, 0, &[3]),
            common(8, 2, &[1, 0, 0, 0]),
            common(12, 2, &[features, 0, 0, 0]),
            common(20, 0, &[11]),
            queue(0),
            // Where there is one.
            queue(1),
            vec![op(BAR), 0x10, 0x80, 8, 0, 0, 0xe0, 0xfe, 0, 0, 0, 0],
            memory(0, &rings(0x4000)),
            memory(8, &descriptor),
            memory(16, &rings(0x5000)),
            memory(24, &[1, 2, 0, 0, 2, 0, 2, 0]),
            memory(32, &rings(0x6000)),
            memory(40, &[1, 0, 0, 0, 2, 0, 0, 0]),
            memory(0x4000, &[flags, 0, 0, 0, 0, 0, 0, 0, 1]),
            memory(0x1000, &[0, 0, 1, 0, 0, 0]),
            common(20, 0, &[15]),
            vec![op(TURN)],
            vec![op(BAR), 0, 0x40, 2, 0, 0],
            vec![op(TURN)],
            common(58, 1, &[1, 0]),
            common(20, 0, &[0]),
            vec![op(TURN)],
        ])
    };
    seeds(
        "function",
        &[
            ("iommu", start(0, 1, [16, 0, 0, 0, 1, 0, 1, 0], 1)),
            ("vhost-pci", start(1, 1, [12, 0, 0, 0, 2, 0, 0, 0], 1)),
            ("net", start(2, 1, [64, 0, 0, 0, 2, 0, 0, 0], 0)),
            ("blk-read", start(3, 1, [16, 0, 0, 0, 1, 0, 1, 0], 0)),
            ("blk-flush", start(3, 1, [16, 0, 0, 0, 1, 0, 2, 0], 4)),
            ("rng", start(4, 1, [64, 0, 0, 0, 2, 0, 0, 0], 0)),
        ],
    );
    iterate("function", ITERATIONS, fuzz_function);
}

#[test]
fn a_virtio_iommu_answers_whatever_it_is_asked() {
    const ENDPOINT: u8 = 4;
    let request = |kind: u8, words: &[&[u8]]| {
        let count = u8::try_from(words.len()).unwrap();
        [&[kind, count][..], &words.concat(), &[0, 255]].concat()
    };
    // Of an even number of pages, that far.
    let end: [u8; 5] = [0xff, 0xff, 0x1f, 0x01, 0];
    let attach = request(1, &[&[1], &[ENDPOINT], &[0], &[0]]);
    let map = |flags: u8| {
        let virt: [&[u8]; 4] = [&[0x10], &[0], &end, &[0]];
        request(
            3,
            &[&[&[1][..]], &virt[..], &[&[0x20], &[0], &[flags]]].concat(),
        )
    };
    let unmap = request(4, &[&[1], &[0x10], &[0], &end, &[0], &[0]]);
    let detach = request(2, &[&[1], &[ENDPOINT], &[0], &[0]]);
    let probe = request(5, &[&[ENDPOINT], &[0]]);
    seeds(
        "iommu",
        &[
            (
                "attach",
                join(&[probe.clone(), attach.clone(), detach.clone()]),
            ),
            (
                "map",
                join(&[attach.clone(), map(3), map(1), unmap.clone()]),
            ),
            (
                "detach",
                join(&[attach.clone(), map(1), detach, map(1), attach]),
            ),
            ("unmap", join(&[unmap, probe])),
        ],
    );
    iterate("iommu", ITERATIONS, fuzz_iommu);
}

#[test]
fn a_connection_hands_out_whole_messages_whatever_is_sent() {
    /// A piece: how many descriptors, and whether it is looked at yet.
    fn piece(fds: u8, bytes: &[u8]) -> Vec<u8> {
        let len = u8::try_from(bytes.len() - 1).unwrap();
        [&[fds, len][..], bytes].concat()
    }
    const TWO_FILES: u8 = 162;
    const MORE: u8 = 3;
    let message = |request: u8, words: &[u64]| {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let size = u8::try_from(payload.len()).unwrap();
        [&[request, 0, 0, 0, 9, 0, 0, 0, size, 0, 0, 0][..], &payload].concat()
    };
    let table = message(5, &[2, 0, 4096, 0, 0, 4096, 4096, 4096, 4096]);
    let features = message(2, &[1 << 30]);
    let (head, tail) = table.split_at(20);
    seeds(
        "messages",
        &[
            (
                "features",
                join(&[piece(0, &message(1, &[])), piece(0, &features)]),
            ),
            ("table", piece(TWO_FILES, &table)),
            (
                "pieces",
                join(&[
                    piece(TWO_FILES, head),
                    piece(MORE, tail),
                    piece(0, &features),
                ]),
            ),
            (
                "vrings",
                join(&[
                    piece(0, &message(9, &[0; 5])),
                    piece(0x81, &message(12, &[1])),
                ]),
            ),
            ("iotlb", piece(0, &message(22, &[4096, 4096, 8192, 0x203]))),
            (
                "areas",
                join(&[
                    piece(0, &message(6, &[4096, 0])),
                    piece(0, &message(32, &[4096; 3])),
                ]),
            ),
        ],
    );
    iterate("messages", ITERATIONS, fuzz_messages);
}

#[test]
fn nothing_of_a_front_end_stays_whatever_it_says_and_its_driver_answers() {
    let say =
        |request, words: &[Vec<u8>], fds, kind| [vec![0], said(request, words, fds, kind)].concat();
    // The driver answers, agreeing to all that it is asked.
    let answer = vec![4, 0, 0];
    let small = |number: u8| vec![number];
    // With a log, or with translations and a channel.
    let begin = |log: bool| {
        let (protocol, features) = match log {
            true => (0x900b, 1 << 32 | 1 << 30 | 1 << 26),
            false => (0x9029, 3 << 32 | 1 << 30),
        };
        join(&[
            vec![u8::from(log)],
            say(1, &[], 0, 0),
            say(15, &[], 0, 0),
            answer.clone(),
            say(16, &[word(protocol)], 0, 0),
            say(2, &[word(features)], 0, 0),
            answer.clone(),
        ])
    };
    let region = [small(0), page(16), small(0), small(0)];
    let table = say(5, &[&[small(1)][..], &region[..]].concat(), 1, 0);
    let update = |kind| say(22, &[page(2), page(1), page(4), half(3, kind)], 0, 0);
    let ring = join(&[
        say(8, &[pair(0, 4)], 0, 0),
        say(10, &[pair(0, 0)], 0, 0),
        say(9, &[pair(0, 0), page(1), page(2), page(3), small(0)], 0, 0),
        say(13, &[small(0)], 1, 1),
        say(12, &[small(0)], 1, 1),
        say(18, &[pair(0, 1)], 0, 0),
        answer.clone(),
        vec![7, 0],
        say(11, &[pair(0, 0)], 0, 0),
        answer.clone(),
    ]);
    let touch = vec![6, 0x20, 0, 0, 7];
    seeds(
        "front_end",
        &[
            (
                "ring",
                join(&[
                    begin(true),
                    table.clone(),
                    answer.clone(),
                    ring,
                    touch.clone(),
                ]),
            ),
            (
                "translations",
                join(&[
                    begin(false),
                    say(21, &[], 1, 2),
                    table,
                    update(2),
                    answer.clone(),
                    touch.clone(),
                    update(3),
                    answer.clone(),
                    touch,
                    vec![7, 0],
                ]),
            ),
            (
                "slots",
                join(&[
                    begin(true),
                    say(36, &[], 0, 0),
                    say(37, &[&[small(0)][..], &region[..]].concat(), 1, 0),
                    answer.clone(),
                    say(38, &[&[small(0)][..], &region[..]].concat(), 0, 0),
                    answer.clone(),
                ]),
            ),
            (
                "areas",
                join(&[
                    begin(true),
                    say(6, &[page(8), small(0)], 1, 0),
                    answer.clone(),
                    say(31, &[small(0), small(0), half(1, 0)], 0, 0),
                    say(32, &[page(1), small(0), half(1, 0)], 1, 0),
                    answer,
                    vec![5, 1, 4, 1, 1],
                ]),
            ),
        ],
    );
    iterate("front_end", CONVERSATIONS, fuzz_front_end);
}

#[test]
fn nobody_waits_for_a_back_end_whatever_it_says() {
    const ANSWER: [u8; 3] = [1, 0, 0];
    const START: [u8; 2] = [4, 0];
    let started = [&ANSWER[..], &ANSWER, &START, &ANSWER, &ANSWER].concat();
    let miss = said(1, &[page(1), page(1), vec![0], half(1, 1)], 0, 0);
    let unasked = said(1, &[vec![1]], 0, 0);
    seeds(
        "back_end",
        &[
            ("started", started.clone()),
            (
                "translations",
                [&started[..], &[6, 1], &ANSWER, &[7, 1], &ANSWER].concat(),
            ),
            ("miss", [&started[..], &[3], &miss, &ANSWER].concat()),
            (
                "reset",
                [&started[..], &[5, 0], &ANSWER, &START, &ANSWER].concat(),
            ),
            ("unasked", [&[0], &unasked[..], &ANSWER].concat()),
            (
                "wrong",
                [&ANSWER[..], &[1, 0, 0xe0, 1, 0x40], &START].concat(),
            ),
        ],
    );
    iterate("back_end", CONVERSATIONS, fuzz_back_end);
}

#[test]
fn a_tap_gets_whole_packets_with_headers_that_fit_whatever_a_driver_sends() {
    let header = |flags: u8, kind: u8, size: u8| [flags, kind, 54, 0, size, 1, 34, 0, 16, 0, 0, 0];
    let frame = [0x55; 100];
    let send = |header: [u8; 12], frame: &[u8]| {
        let len = u8::try_from(frame.len()).unwrap();
        [&[0, 1, 0, 12][..], &header, &[0, len], frame].concat()
    };
    let receive = [&[4, 72][..], &header(0, 0, 0), &frame[..60]].concat();
    seeds(
        "tap",
        &[
            ("sent", [&[0][..], &send(header(0, 0, 0), &frame)].concat()),
            (
                "partial",
                [&[0][..], &send(header(1, 0, 0), &frame)].concat(),
            ),
            (
                "segments",
                [&[0][..], &send(header(1, 1, 1), &frame)].concat(),
            ),
            (
                "short",
                [&[0][..], &send(header(0, 0, 0), &frame[..5])].concat(),
            ),
            ("received", [&[0, 3, 0, 0x80][..], &receive].concat()),
            (
                "reset",
                [&[0, 3, 0, 0x80, 6, 1, 3, 0, 0x80, 6, 0][..], &receive].concat(),
            ),
            (
                "broken",
                [
                    &[0, 5, 1, 0, 0x10, 4, 0, 0, 99, 0][..],
                    &send(header(0, 0, 0), &frame),
                ]
                .concat(),
            ),
        ],
    );
    iterate("tap", ITERATIONS, fuzz_tap);
}

#[test]
fn a_disk_answers_whatever_it_is_asked_and_keeps_its_length() {
    const WRITE: u8 = 1;
    // 16 bytes, one, a sector.
    let header = |kind: u8, sector: u8| {
        [&[0, 16 << 3, 9][..], &[kind, 0, 0, 0, 0, 0, 0, 0, sector]].concat()
    };
    let status = [0, 8 << 3 | WRITE, 0];
    let data = |direction: u8| [0, 1 << 3 | direction, 0];
    let ask = |kind, direction| [&[2][..], &header(kind, 3), &data(direction), &status].concat();
    seeds(
        "disk",
        &[
            ("read", ask(0, WRITE)),
            ("write", [ask(1, 0), ask(0, WRITE)].concat()),
            ("flush", [&[1][..], &header(4, 0), &status].concat()),
            ("id", ask(8, WRITE)),
            ("unknown", ask(11, WRITE)),
            (
                "nowhere",
                [&[2][..], &header(0, 1), &[0xff, 9, 0], &status].concat(),
            ),
            (
                "no-status",
                [&[0][..], &header(4, 0), &ask(0, WRITE)].concat(),
            ),
            (
                "table",
                [&[0, 0, 0x26, 17][..], &[0; 17], &ask(0, WRITE)].concat(),
            ),
        ],
    );
    iterate("disk", ITERATIONS, fuzz_disk);
}

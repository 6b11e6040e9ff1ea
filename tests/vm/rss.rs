//! Receive-side scaling: the back-end's guest sends each flow to the receive queue that the front-end's driver wants it on.

use serde_json::Value;

use super::machine;
use crate::common::Dir;
use crate::common::told::Told;

const PAIRS: u64 = 4;
const FLOWS: u16 = 16;
/// Frames of each flow.
const COUNT: u64 = 2_000;
/// VIRTIO_NET_F_RSS.
const F_RSS: u64 = 1 << 60;
/// VIRTIO_NET_HASH_TYPE_IPv4, _TCPv4, _UDPv4.
const IPV4: u32 = 1;
const TCPV4: u32 = 2;
const UDPV4: u32 = 4;

const KEY: &str =
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa";
const OTHER_KEY: &str = "be27be7fb6a4e53c3abc2e0a38a3a9b5";

/// Bits, from the highest of the first byte on.
fn bits(bytes: &[u8]) -> Vec<bool> {
    let bits = |byte: &u8| (0..8).map(|i| byte >> (7 - i) & 1 == 1).collect::<Vec<_>>();
    bytes.iter().flat_map(bits).collect()
}

/// The Toeplitz hash as it is defined: for each bit of the input that is set the 32 bits of the key from its place on.
fn toeplitz(key: &str, input: &[u8]) -> u32 {
    let digits = key.as_bytes().chunks(2);
    let key: Vec<u8> = digits
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
    let mut key = bits(&key);
    key.resize(8 * input.len() + 32, false);
    let set = bits(input).into_iter().enumerate().filter(|(_, bit)| *bit);
    set.fold(0, |hash, (at, _)| {
        let window = key[at..at + 32].iter();
        hash ^ window.fold(0, |window, bit| window << 1 | u32::from(*bit))
    })
}

/// What the driver is told, and on which pair each flow of the back-end's then has to come in.
struct Wish<'a> {
    table: &'a [u16],
    types: u32,
    key: &'a str,
    unclassified: u16,
}

impl Wish<'_> {
    fn line(&self) -> String {
        let table: Vec<String> = self.table.iter().map(u16::to_string).collect();
        let (table, types, key, unclassified) =
            (table.join(","), self.types, self.key, self.unclassified);
        format!("rss table={table} types={types} key={key} unclassified={unclassified}")
    }

    /// Flow f is UDP from 10.0.0.2 to 10.0.0.1, both ports 9 + f.
    fn pair(&self, flow: u16) -> u16 {
        let addresses = [10, 0, 0, 2, 10, 0, 0, 1];
        let port = (9 + flow).to_be_bytes();
        let input = match self.types {
            types if types & UDPV4 != 0 => [&addresses[..], &port, &port].concat(),
            types if types & IPV4 != 0 => addresses.to_vec(),
            _ => return self.unclassified,
        };
        let hash = usize::try_from(toeplitz(self.key, &input)).unwrap();
        self.table[hash % self.table.len()]
    }
}

/// A back-end and a front-end with these keys, up.
fn ends(dir: &Dir, keys: &str, back: &str) -> ([Told; 2], [u64; 2]) {
    let socket = format!("socket={}", dir.file("s"));
    let front = format!("{socket},queues={PAIRS}{keys}");
    let mut ends = [
        Told::start("--vhost-pci", &socket, back),
        Told::start("--net", &front, &format!("queues={PAIRS}")),
    ];
    let features = ends
        .each_mut()
        .map(|end| end.next("ready")["features"].as_u64().unwrap());
    (ends, features)
}

/// Runs all flows from the back-end to the front-end; what the front-end reports.
#[track_caller]
fn flows(ends: &mut [Told; 2], id: u64, count: u64, more: &str) -> Value {
    let [back, front] = ends;
    let words = format!("id={id} queues={PAIRS} flows={FLOWS} timeout_ms=30000");
    front.send(&format!("run work=sink {words} {more}"));
    back.send(&format!("run work=source count={count} {words}"));
    let sent = back.next("result");
    assert_eq!(sent["tx_frames"], count * u64::from(FLOWS), "{sent}");
    let result = front.next("result");
    assert_eq!(
        (&result["id"], &result["verified"]),
        (&id.into(), &(count * u64::from(FLOWS)).into()),
        "{result}"
    );
    for key in ["lost", "duplicated", "corrupted", "timeout"] {
        assert_eq!(result[key], 0, "{key}: {result}");
    }
    result
}

/// Sends a frame a flow until each lands where it belongs: pairs come into use, and back into use after a reset, one by one, each by a message; until then
/// another takes its frames.
#[track_caller]
fn settle(ends: &mut [Told; 2], pair: impl Fn(u16) -> u16) {
    let settled = (0..50).any(|_| {
        let result = flows(ends, 0, 1, "");
        let landed = &result["landed"]["frames"];
        (0..FLOWS).all(|flow| landed[usize::from(flow)][usize::from(pair(flow))] == 1)
    });
    assert!(settled, "a pair is not in use");
}

/// Every frame of each flow on the pair where it belongs, in order.
#[track_caller]
fn expect(result: &Value, pair: impl Fn(u16) -> u16) {
    for flow in 0..FLOWS {
        let expected: Vec<u64> = (0..PAIRS)
            .map(|i| if i == u64::from(pair(flow)) { COUNT } else { 0 })
            .collect();
        assert_eq!(
            result["landed"]["frames"][usize::from(flow)],
            Value::from(expected),
            "flow {flow}: {result}"
        );
    }
    assert_eq!(result["reordered"], 0, "{result}");
}

#[test]
fn flows_land_on_the_queues_that_the_driver_s_table_says_and_on_others_when_it_is_changed() {
    let _machine = machine();
    let longest: Vec<u16> = (0..128).map(|i| i * 7 % 4).collect();
    let wish = |table, types, key, unclassified| Wish {
        table,
        types,
        key,
        unclassified,
    };
    let wishes = [
        wish(&[0, 1, 2, 3], UDPV4, KEY, 0),
        wish(&[3, 2, 1, 0], UDPV4 | IPV4, KEY, 0),
        wish(&[2, 2, 1, 3, 0, 3, 1, 1], 0x3f, OTHER_KEY, 1),
        wish(&longest, 0x3f, KEY, 0),
        // All flows have the same addresses; none is TCP.
        wish(&[1, 2, 3, 0], IPV4, KEY, 0),
        wish(&[0], TCPV4, KEY, 2),
        wish(&[0, 1], 0, KEY, 3),
        wish(&[1], UDPV4, "", 0),
    ];
    for keys in ["", ",packed=on"] {
        let dir = Dir::new();
        let (mut ends, [back, front]) = ends(&dir, keys, "");
        assert_eq!(front & F_RSS, F_RSS, "the driver negotiated it");
        assert_eq!(back & F_RSS, 0, "the bit is between driver and device");
        // Flow f goes over pair f modulo four as long as nobody says otherwise.
        settle(&mut ends, |flow| flow % 4);
        expect(&flows(&mut ends, 1, COUNT, ""), |flow| flow % 4);
        for (id, wish) in (2..).zip(&wishes) {
            ends[1].send(&wish.line());
            assert_eq!(ends[1].next("done")["command"], "rss");
            let result = flows(&mut ends, id, COUNT, "");
            expect(&result, |flow| wish.pair(flow));
            assert_eq!(result["landed"]["strays"], 0, "{result}");
        }
        // The driver says it again to a device that it has reset, and a reset of the rings leaves it.
        let wish = &wishes[2];
        ends[1].send(&wish.line());
        ends[1].next("done");
        for (id, reset) in (20..).zip(["reset-rings", "reset-device"]) {
            ends[1].send(reset);
            for end in &mut ends {
                end.next("ready");
            }
            settle(&mut ends, |flow| wish.pair(flow));
            expect(&flows(&mut ends, id, COUNT, ""), |flow| wish.pair(flow));
        }
    }
}

#[test]
fn a_table_that_changes_under_traffic_takes_effect_when_the_command_is_complete_and_loses_nothing()
{
    let _machine = machine();
    for keys in ["", ",packed=on"] {
        let dir = Dir::new();
        let (mut ends, _) = ends(&dir, keys, "");
        ends[1].send(&format!("rss table=0,1,2,3,3,1,0,2 key={KEY}"));
        ends[1].next("done");
        let result = flows(&mut ends, 1, 20_000, "turns=500");
        let landed = &result["landed"];
        let number = |key: &str| landed[key].as_u64().unwrap();
        assert!(number("turns") >= 2, "{result}");
        assert!(number("placed") >= 1000, "{result}");
        assert_eq!(number("strays"), 0, "{result}");
    }
}

#[test]
fn rss_is_not_offered_where_the_back_end_s_driver_does_not_take_it() {
    let _machine = machine();
    let dir = Dir::new();
    let (mut ends, [_, front]) = ends(&dir, "", "rss=off");
    assert_eq!(front & F_RSS, 0);
    settle(&mut ends, |flow| flow % 4);
    expect(&flows(&mut ends, 1, COUNT, ""), |flow| flow % 4);
}

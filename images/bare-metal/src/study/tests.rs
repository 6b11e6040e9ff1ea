//! The study's parts on memory of this process; the race on two threads, with a gate that holds and with gates that leak.
#![allow(unsafe_code)] // tests make shared memory

extern crate std;

use core::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::RwLock;
use std::time::{Duration, Instant};
use std::vec;
use std::vec::Vec;
use std::{format, thread};

use guest_driver::virtio_iommu::{Config, Error, Fault, Iommu, Request, Ticket, status};
use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Layout, RingConfig};

use super::race::{Attacker, Gate, MAX_ROUNDS, Victim, View, Word, attacker, victim};
use super::scribble::{Scribble, scribble};
use super::windows::{Churn, Ground, MAX_LIVE, windows};
use super::*;

const START: u64 = 0x10000;

/// Zeroed memory from device address 0x10000 on that is never freed.
fn memory(pages: usize) -> Linear {
    let words = vec![[0u64; 512]; pages + 1].leak();
    let base = words.as_mut_ptr().cast::<u8>();
    let len = (pages * 4096) as u64;
    // SAFETY: leaked, and not touched otherwise.
    unsafe { Linear::new(base.add(base.align_offset(4096)), START, len) }
}

fn byte(memory: &Linear, addr: u64) -> u8 {
    wide::read(memory, addr, 1).unwrap()[0]
}

fn set(memory: &Linear, addr: u64, value: u8) {
    assert!(wide::write(memory, addr, 1, &[value; MAX_WIDTH]));
}

#[test]
fn mix_is_the_finaliser_of_split_mix_64_and_unmix_undoes_it() {
    // The first numbers of the generator with seeds 0 and 1234567.
    assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
    assert_eq!(mix(1_234_567), 6_457_827_717_110_365_317);
    let mut x = 1u64;
    for i in 0..100_000 {
        for x in [x, i, u64::MAX - i, 1 << (i % 64)] {
            assert_eq!(unmix(mix(x)), x);
            assert_eq!(mix(unmix(x)), x);
        }
        x = mix(x);
    }
}

#[test]
fn a_word_is_a_secret_of_its_own_seed_only() {
    for seed in [0, 77, u64::MAX - 5] {
        for i in [0, 1, SECRETS - 1] {
            assert!(is_secret(mix(seed.wrapping_add(i)), seed));
        }
        assert!(!is_secret(mix(seed.wrapping_add(SECRETS)), seed));
        assert!(!is_secret(mix(seed.wrapping_sub(1)), seed));
        assert!(!is_secret(u64::MAX, seed) && !is_secret(0, seed));
    }
}

#[test]
fn a_fill_writes_what_it_says_and_a_check_finds_every_other_byte() {
    let memory = memory(2);
    for (addr, len) in [(START, 4096), (START + 8, 61), (START + 3, 5)] {
        assert!(fill(&memory, addr, len, 9));
        assert_eq!(byte(&memory, addr + len), 0, "wrote behind the end");
        assert_eq!(check(&memory, addr, len, 9), Some(Difference::default()));
        for at in [0, 1, len / 2, len - 1] {
            let before = byte(&memory, addr + at);
            set(&memory, addr + at, before ^ 0x40);
            let found = Difference {
                wrong: 1,
                first: Some(at),
            };
            assert_eq!(check(&memory, addr, len, 9), Some(found));
            set(&memory, addr + at, before);
        }
        assert!(check(&memory, addr, len, 10).unwrap().wrong > 0);
        for at in 0..len {
            set(&memory, addr + at, 0);
        }
    }
    assert!(!fill(&memory, START + 8000, 200, 9));
    assert!(!fill(&memory, START - 1, 8, 9));
    assert_eq!(byte(&memory, START + 8000), 0, "nothing or all");
    assert_eq!(check(&memory, START, u64::MAX, 9), None);
}

fn sweep(offset: u64, len: u64, step: u64, width: usize) -> Sweep {
    Sweep {
        offset,
        len,
        step,
        width,
        seed: 5,
    }
}

#[test]
fn reads_of_every_width_find_the_secrets_and_the_holes() {
    guest_driver::bulk::detect();
    let memory = memory(2);
    assert!(fill(&memory, START, 4096, 5));
    for at in 4096..8192 {
        set(&memory, START + at, 0xff);
    }
    for width in [1, 2, 4, 8, 16, 32, 64] {
        let step = width as u64;
        let Some(seen) = peek(&memory, &sweep(START, 8192, step, width)) else {
            assert!(!wide::has(width));
            continue;
        };
        assert_eq!(seen.reads, 8192 / step);
        assert_eq!(seen.secrets, 512, "width {width}");
        let by_chance = if width == 1 { 64 } else { 2 };
        let holes = 4096 / step;
        assert!((holes..=holes + by_chance).contains(&seen.ones));
        let other = Sweep {
            seed: 5 + SECRETS,
            ..sweep(START, 8192, step, width)
        };
        assert_eq!(peek(&memory, &other).unwrap().secrets, 0);
    }
    // One word in every fourth.
    let seen = peek(&memory, &sweep(START, 4096, 32, 8)).unwrap();
    assert_eq!((seen.reads, seen.secrets), (128, 128));
}

#[test]
fn accesses_end_where_the_memory_or_the_addresses_do() {
    let memory = memory(1);
    let seen = peek(&memory, &sweep(START + 4088, 4096, 8, 8)).unwrap();
    assert_eq!(seen.reads, 1);
    assert_eq!(poke(&memory, &sweep(START + 4080, 4096, 8, 8)), Some(2));
    assert_eq!(poke(&memory, &sweep(u64::MAX - 3, u64::MAX, 8, 8)), Some(0));
    assert_eq!(peek(&memory, &sweep(START, 8, 8, 3)), None);
}

#[test]
fn writes_of_every_width_are_what_a_fill_would_have_written() {
    guest_driver::bulk::detect();
    for width in [8, 16, 32, 64]
        .into_iter()
        .filter(|&width| wide::has(width))
    {
        let memory = memory(1);
        let step = width as u64;
        let writes = poke(&memory, &sweep(START, 4096, step, width));
        assert_eq!(writes, Some(4096 / step));
        assert_eq!(check(&memory, START, 4096, 5), Some(Difference::default()));
    }
    let memory = memory(1);
    assert_eq!(poke(&memory, &sweep(START, 4096, 16, 2)), Some(256));
    for i in 0..256 {
        let [a, b, ..] = mix(5 + i).to_le_bytes();
        let at = START + 16 * i;
        assert_eq!([byte(&memory, at), byte(&memory, at + 1)], [a, b]);
        assert_eq!(byte(&memory, at + 2), 0);
    }
}

#[test]
fn the_race_tells_its_words_apart() {
    assert_eq!(Word::of(u64::MAX), Word::Ones);
    assert_eq!(Word::of(0), Word::Zero);
    for round in [1, 2, race::MAX_ROUNDS] {
        assert_eq!(Word::of(mix(round)), Word::Public);
        for i in [0, 511] {
            assert_eq!(Word::of(mix((1 << 63) + round * 512 + i)), Word::Secret);
        }
    }
    for n in [0, 1, 1 << 39] {
        assert_eq!(Word::of(mix((1 << 62) + n)), Word::Mark);
    }
    for word in [1, 0x1234_5678, mix(0), mix(1 << 40), !mix(1)] {
        assert_eq!(Word::of(word), Word::Other);
    }
}

/// How a gate fails to take the page away.
#[derive(Clone, Copy, PartialEq)]
enum Leak {
    None,
    Reads,
    Writes,
}

/// What stands for the window: the page is reached through it only while it is mapped.
struct Window {
    memory: Linear,
    mapped: RwLock<bool>,
    leak: Leak,
}

const PAGES: [u64; 2] = [START, START + 4096];

impl View for Window {
    fn read(&self, offset: u64) -> u64 {
        let mapped = self.mapped.read().unwrap();
        let through = *mapped || offset >= PAGES[1] || self.leak == Leak::Reads;
        match through {
            true => self.memory.read(offset),
            false => u64::MAX,
        }
    }

    fn write(&self, offset: u64, value: u64) {
        let mapped = self.mapped.read().unwrap();
        if *mapped || offset >= PAGES[1] || self.leak == Leak::Writes {
            self.memory.write(offset, value);
        }
    }
}

struct WindowGate<'a>(&'a Window, Instant);

impl Gate for WindowGate<'_> {
    fn map(&mut self) -> Result<u8, Error> {
        *self.0.mapped.write().unwrap() = true;
        Ok(status::OK)
    }

    fn unmap(&mut self) -> Result<u8, Error> {
        *self.0.mapped.write().unwrap() = false;
        Ok(status::OK)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.1.elapsed().as_micros()).unwrap()
    }
}

fn run_race(leak: Leak, rounds: u64) -> (Victim, Attacker) {
    let window = Window {
        memory: memory(2),
        mapped: RwLock::new(false),
        leak,
    };
    // Whatever the page was used for before.
    assert!(fill(&window.memory, PAGES[1], 4096, 77));
    let start = Instant::now();
    let memory = window.memory;
    thread::scope(|scope| {
        let window = &window;
        let attack = scope.spawn(move || {
            let now = || {
                thread::yield_now(); // two threads may share one core here
                u64::try_from(start.elapsed().as_micros()).unwrap()
            };
            attacker(window, PAGES, 20_000_000, now)
        });
        // The attacker is there first.
        thread::sleep(Duration::from_millis(5));
        let mut gate = WindowGate(window, start);
        let seen = victim(&memory, PAGES, rounds, 1000, &mut gate).unwrap();
        (seen, attack.join().unwrap())
    })
}

#[test]
fn a_gate_that_holds_leaks_nothing_and_the_attacker_reaches_the_page_in_every_round() {
    let (victim, attacker) = run_race(Leak::None, 200);
    assert_eq!((victim.rounds, victim.status), (200, 0));
    assert_eq!(
        (victim.corrupted, attacker.leaked, attacker.other),
        (0, 0, 0)
    );
    assert!(victim.touched > 150, "{victim:?} {attacker:?}");
    assert!(attacker.reads >= victim.touched && attacker.writes > 0);
}

#[test]
fn a_gate_that_leaks_reads_is_found_out_by_the_attacker() {
    let (victim, attacker) = run_race(Leak::Reads, 200);
    assert!(attacker.leaked > 0, "{attacker:?}");
    assert_eq!(victim.corrupted, 0);
}

#[test]
fn a_gate_that_leaks_writes_is_found_out_by_the_victim() {
    let (victim, attacker) = run_race(Leak::Writes, 200);
    assert!(victim.corrupted > 0, "{victim:?}");
    assert_eq!(attacker.leaked, 0);
}

/// A gate to which nothing happens, with a clock that runs by itself.
struct Alone {
    now: RefCell<u64>,
    answer: Result<u8, Error>,
}

impl Gate for Alone {
    fn map(&mut self) -> Result<u8, Error> {
        self.answer
    }

    fn unmap(&mut self) -> Result<u8, Error> {
        self.answer
    }

    fn now(&self) -> u64 {
        *self.now.borrow_mut() += 1;
        *self.now.borrow()
    }
}

#[test]
fn a_victim_without_an_attacker_goes_on_and_ends_in_time() {
    let memory = memory(2);
    let alone = |answer| Alone {
        now: RefCell::new(0),
        answer,
    };
    let seen = victim(&memory, PAGES, 5, 1, &mut alone(Ok(status::OK))).unwrap();
    assert_eq!((seen.rounds, seen.touched, seen.corrupted), (5, 0, 0));
    assert_eq!(
        wide::read_word(&memory, PAGES[1] + 32),
        Some(1),
        "it is over"
    );
    // It waits three times in vain for a second, then hardly any more: 1000 rounds are soon over.
    let mut gate = alone(Ok(status::OK));
    let seen = victim(&memory, PAGES, 1000, 1, &mut gate).unwrap();
    assert_eq!((seen.rounds, seen.touched), (1000, 0));
    let ticks = *gate.now.borrow();
    assert!((3000..30_000).contains(&ticks), "{ticks}");
    // And two minutes are the most, whatever is asked for.
    let mut gate = alone(Ok(status::OK));
    let seen = victim(&memory, PAGES, MAX_ROUNDS, 1, &mut gate).unwrap();
    assert!(seen.rounds < MAX_ROUNDS, "{seen:?}");
    let ticks = *gate.now.borrow();
    assert!((120_000..125_000).contains(&ticks), "{ticks}");
    let seen = victim(&memory, PAGES, 5, 1, &mut alone(Ok(5))).unwrap();
    assert_eq!((seen.rounds, seen.status), (0, 5));
    let seen = victim(&memory, PAGES, 5, 1, &mut alone(Err(Error::Timeout))).unwrap();
    assert_eq!((seen.rounds, seen.status), (0, 256));
    assert_eq!(victim(&memory, [0, START], 5, 1, &mut alone(Ok(0))), None);
}

#[test]
fn an_attacker_without_a_victim_ends_in_time() {
    let now = RefCell::new(0);
    let clock = || {
        *now.borrow_mut() += 1;
        *now.borrow()
    };
    let nothing = Window {
        memory: memory(1),
        mapped: RwLock::new(false),
        leak: Leak::None,
    };
    let seen = attacker(&nothing, PAGES, 100, clock);
    assert_eq!((seen.reads, seen.ones), (99, 99));
}

fn rings(size: u16) -> [RingConfig; 2] {
    [0, 1].map(|n| RingConfig {
        size,
        desc: START + 0x3000 * n,
        driver: START + 0x3000 * n + 0x1000,
        device: START + 0x3000 * n + 0x2000,
        event_idx: false,
        in_order: false,
        indirect: false,
    })
}

/// Offsets within the areas (descriptor, driver, device) that are not zero any more.
fn scribbled(packed: bool, what: Scribble, count: u64) -> (u64, Vec<(usize, u64)>) {
    let memory = memory(7);
    let size = 8;
    let writes = scribble(&memory, &rings(size), packed, what, count, 3);
    let sizes = match packed {
        true => Packed::area_sizes(size),
        false => Split::area_sizes(size),
    };
    let mut touched = Vec::new();
    for at in (0..7 * 4096).filter(|at| byte(&memory, START + at) != 0) {
        let (area, offset) = ((at / 4096 % 3) as usize, at % 4096);
        assert!(at < 6 * 4096 && offset < sizes.unwrap()[area] as u64);
        touched.push((area, offset));
    }
    (writes, touched)
}

#[test]
fn nonsense_goes_where_it_is_meant_to_and_nowhere_else() {
    let within = |packed, what, area, from: u64, to: u64, period: u64| {
        let (writes, touched) = scribbled(packed, what, 100);
        assert_eq!(writes, 100);
        assert!(!touched.is_empty());
        for (got, offset) in touched {
            let place = (offset % period, got);
            assert!(
                (from..to).contains(&place.0) && got == area,
                "{what:?} {place:?}"
            );
        }
    };
    within(false, Scribble::AvailIndex, 1, 2, 4, 4096);
    within(false, Scribble::UsedIndex, 2, 2, 4, 4096);
    within(false, Scribble::UsedId, 2, 4, 8, 8);
    within(false, Scribble::DescNext, 0, 14, 16, 16);
    within(false, Scribble::DescFlags, 0, 12, 14, 16);
    within(true, Scribble::DescFlags, 0, 14, 16, 16);
    within(true, Scribble::AvailIndex, 0, 14, 16, 16);
    within(true, Scribble::UsedIndex, 0, 14, 16, 16);
    within(true, Scribble::UsedId, 0, 12, 14, 16);
    within(true, Scribble::DescNext, 0, 12, 14, 16);
    within(true, Scribble::UsedLength, 0, 8, 12, 16);
    for packed in [false, true] {
        within(packed, Scribble::DescAddress, 0, 0, 8, 16);
        within(packed, Scribble::DescLength, 0, 8, 12, 16);
        within(packed, Scribble::Desc, 0, 0, 16, 16);
        let (_, touched) = scribbled(packed, Scribble::All, 1);
        for area in 0..3 {
            assert!(touched.iter().any(|&(got, _)| got == area));
        }
    }
    // Elements of the used ring: le32 id, le32 length, behind flags and index.
    let (_, touched) = scribbled(false, Scribble::UsedLength, 100);
    assert!(touched.iter().all(|&(_, offset)| (offset - 4) % 8 >= 4));
}

#[test]
fn nonsense_beyond_the_memory_does_not_take_place() {
    let memory = memory(1);
    let writes = scribble(&memory, &rings(8), false, Scribble::AvailIndex, 100, 3);
    assert_eq!(writes, 0);
    assert_eq!(scribble(&memory, &[], false, Scribble::Desc, 10, 3), 0);
}

/// An IOMMU that keeps books: it refuses what overlaps, and what two neighbours could become one window.
#[derive(Debug)]
struct Books {
    config: Config,
    /// Page by page.
    mapped: BTreeMap<u64, u64>,
    most: usize,
    /// What was submitted and not asked for yet.
    waiting: Vec<u8>,
    flushes: usize,
    slow: bool,
    refuse: bool,
}

const PAGE: u64 = 4096;

impl Books {
    fn new() -> Self {
        Self {
            config: Config {
                page_size_mask: !0xfff,
                input_range: (0, (64 << 30) - 1),
                domain_range: (0, 9),
                probe_size: 0,
            },
            mapped: BTreeMap::new(),
            most: 0,
            waiting: Vec::new(),
            flushes: 0,
            slow: false,
            refuse: false,
        }
    }

    fn carry_out(&mut self, request: &Request) -> u8 {
        if self.refuse {
            return status::NOMEM;
        }
        match *request {
            Request::Map { iova, gpa, len, .. } => {
                assert_eq!(len, PAGE);
                assert!(iova + len <= 64 << 30);
                assert!((0x20_0000..0x30_0000).contains(&gpa));
                assert!(self.mapped.insert(iova, gpa).is_none(), "mapped twice");
                self.most = self.most.max(self.mapped.len());
                for (a, b) in [(iova.wrapping_sub(PAGE), iova), (iova, iova + PAGE)] {
                    let pair = self.mapped.get(&a).zip(self.mapped.get(&b));
                    assert!(pair.is_none_or(|(a, b)| a + PAGE != *b), "they merge");
                }
            }
            Request::Unmap { iova, len, .. } => {
                self.mapped.retain(|at, _| !(iova..iova + len).contains(at));
            }
            _ => panic!("not asked for here"),
        }
        status::OK
    }
}

impl Iommu for Books {
    fn submit(&mut self, request: &Request) -> Result<Ticket, Error> {
        let status = self.carry_out(request);
        self.waiting.push(status);
        Ok(Ticket::new(u16::try_from(self.waiting.len() - 1).unwrap()))
    }

    fn flush(&mut self) {
        self.flushes += 1;
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<u8>, Error> {
        let status = self.waiting[usize::from(ticket.number())];
        Ok((!self.slow).then_some(status))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<u8, Error> {
        self.slow = false;
        Ok(self.poll(&ticket)?.unwrap())
    }

    fn batch(&mut self, requests: &mut dyn Iterator<Item = Request>) -> Result<u8, Error> {
        let mut worst = status::OK;
        for request in requests {
            worst = worst.max(self.carry_out(&request));
        }
        Ok(worst)
    }

    fn faults(&mut self, _show: &mut dyn FnMut(Fault)) -> Result<usize, Error> {
        Ok(0)
    }

    fn config(&self) -> &Config {
        &self.config
    }
}

fn ground(pages: u64) -> Ground {
    Ground {
        domain: 1,
        page: PAGE,
        gpa: 0x20_0000,
        pages,
        end: 64 << 30,
    }
}

#[test]
fn windows_are_kept_apart_timed_and_taken_away_again() {
    for (pages, live) in [(256, 0), (256, 16), (256, MAX_LIVE), (4, 100)] {
        let mut books = Books::new();
        let clock = RefCell::new(0);
        let now = || {
            *clock.borrow_mut() += 10;
            *clock.borrow()
        };
        let timed = windows(&mut books, &ground(pages), live, 200, now);
        assert_eq!(timed.status, 0);
        assert_eq!((timed.map.count(), timed.unmap.count()), (200, 200));
        assert_eq!((timed.map.max(), timed.unmap.max()), (10, 10));
        assert_eq!(books.most as u64, live + 1);
        assert!(books.mapped.is_empty());
    }
}

#[test]
fn a_refusal_ends_the_timing_and_is_reported() {
    let mut books = Books::new();
    books.refuse = true;
    let timed = windows(&mut books, &ground(256), 16, 200, || 0);
    assert_eq!(timed.status, u16::from(status::NOMEM));
    assert_eq!(timed.map.count(), 0);
}

#[test]
fn churn_keeps_its_rate_never_waits_and_leaves_nothing_behind() {
    let mut books = Books::new();
    // 1000 a second on a clock of 1000 ticks a millisecond, looked at every 100 ticks for 100 ms.
    let mut churn = Churn::new(ground(256), 1000, 1000, 0);
    for now in (0..100_000).step_by(100) {
        churn.beside(&mut books, now);
        assert!(books.mapped.len() <= 1 + usize::from(now == 0));
    }
    assert!((95..=100).contains(&books.flushes), "{}", books.flushes);
    let flushes = books.flushes as u64;
    let churned = churn.end(&mut books, || 100_000);
    assert_eq!(churned.times.count(), 2 * flushes - 1);
    assert_eq!((churned.failed, churned.times.max()), (0, 100));
    assert!(books.mapped.is_empty());
}

#[test]
fn churn_waits_for_a_slow_device_at_its_end_only() {
    let mut books = Books::new();
    books.slow = true;
    let mut churn = Churn::new(ground(256), 1000, 1000, 0);
    for now in (0..50_000).step_by(100) {
        churn.beside(&mut books, now);
    }
    assert_eq!(books.flushes, 1, "one at a time");
    let churned = churn.end(&mut books, || 50_000);
    assert_eq!((churned.times.count(), churned.times.max()), (1, 50_000));
    assert!(books.mapped.is_empty());
}

#[test]
fn churn_counts_what_fails() {
    let mut books = Books::new();
    books.refuse = true;
    let mut churn = Churn::new(ground(256), 1000, 1000, 0);
    for now in (0..10_000).step_by(100) {
        churn.beside(&mut books, now);
    }
    assert!(churn.end(&mut books, || 10_000).failed >= 10);
}

#[test]
fn records_of_the_study_are_one_line_each() {
    use crate::histogram::Histogram;
    use crate::record::{Done, Field};
    let mut times = Histogram::default();
    times.add(3);
    let done = Done {
        command: "windows",
        fields: &[("live", Field::Number(16)), ("map", Field::Times(&times))],
    };
    assert_eq!(
        format!("{done}"),
        "{\"record\":\"done\",\"command\":\"windows\",\"live\":16,\
         \"map\":{\"count\":1,\"p50\":3,\"p90\":3,\"p99\":3,\"p999\":3,\"max\":3}}"
    );
    let none = Done {
        command: "start",
        fields: &[],
    };
    assert_eq!(
        format!("{none}"),
        "{\"record\":\"done\",\"command\":\"start\"}"
    );
}

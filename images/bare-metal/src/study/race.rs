//! The race: one side takes a page away and puts a secret into it, the other never stops reading and writing it.

use guest_driver::virtio_iommu::{Error, status, status_of};
use guest_driver::wide;
use virtqueue::linear::Linear;

use super::{mix, unmix};

/// Bytes of the page.
pub const PAGE: u64 = 4096;
const WORDS: u64 = PAGE / 8;
/// Most rounds: their numbers, and the words of their secrets, are told from all other words by this bound.
pub const MAX_ROUNDS: u64 = 1 << 20;
const SECRET: u64 = 1 << 63;
const MARK: u64 = 1 << 62;
/// Most marks that are told from other words.
const MARKS: u64 = 1 << 40;

/// Words of the sync page, as byte offsets.
mod sync {
    /// The round whose page is mapped (victim).
    pub const ROUND: u64 = 0;
    /// The last round in which the attacker has reached the page.
    pub const TOUCHED: u64 = 8;
    /// The round whose secret is in place (victim).
    pub const SECRET: u64 = 16;
    /// Accesses of the attacker.
    pub const ACCESSES: u64 = 24;
    /// Not zero: it is over (victim).
    pub const OVER: u64 = 32;
}

/// A step of the victim that the attacker does not follow ends after this, in milliseconds.
const STEP_MS: u64 = 1000;
/// And how long when so many steps in a row were in vain: the attacker is gone, or as good as.
const PATIENT_STEPS: u32 = 3;
const SHORT_STEP_MS: u64 = 1;
/// The victim gives the attacker this many accesses, or this time, to spoil the secret.
const GRACE_ACCESSES: u64 = 4;
const GRACE_MS: u64 = 2;
/// The victim ends after this, in milliseconds.
const TOTAL_MS: u64 = 120_000;

/// What the attacker can find in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Nothing: an access that was refused.
    Ones,
    /// Never written.
    Zero,
    /// What the page showed while it was mapped.
    Public,
    /// What the attacker wrote.
    Mark,
    /// What was written after the page was taken away.
    Secret,
    /// What does not belong here at all.
    Other,
}

impl Word {
    /// Says what a word is, by the number that it was made of.
    #[must_use]
    pub fn of(word: u64) -> Self {
        let number = unmix(word);
        match word {
            u64::MAX => Self::Ones,
            0 => Self::Zero,
            _ if (1..=MAX_ROUNDS).contains(&number) => Self::Public,
            _ if number.wrapping_sub(MARK) < MARKS => Self::Mark,
            _ if number.wrapping_sub(SECRET) < WORDS * (MAX_ROUNDS + 1) => Self::Secret,
            _ => Self::Other,
        }
    }
}

/// What the victim does to its page.
pub trait Gate {
    /// Lets the device reach the page. Returns the status.
    fn map(&mut self) -> Result<u8, Error>;
    /// Takes it away; when this returns, nobody else reaches it. Returns the status.
    fn unmap(&mut self) -> Result<u8, Error>;
    /// The time-stamp counter.
    fn now(&self) -> u64;
}

/// What the victim saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Victim {
    /// Rounds that were done.
    pub rounds: u64,
    /// Rounds in which the attacker reached the page before it was taken away.
    pub touched: u64,
    /// Bytes of secrets that changed.
    pub corrupted: u64,
    /// Of the first request that failed, which ends the race; otherwise 0.
    pub status: u16,
}

/// Plays the victim for `rounds` (at most [`MAX_ROUNDS`]) with the page and the sync page at these addresses of `memory`. `None` where they are not in it.
pub fn victim(
    memory: &Linear,
    [page, sync]: [u64; 2],
    rounds: u64,
    ticks_per_ms: u64,
    gate: &mut impl Gate,
) -> Option<Victim> {
    memory.ptr(page, 4096)?;
    memory.ptr(sync, 4096)?;
    let load = |at| wide::read_word(memory, sync + at).unwrap_or(0);
    let store = |at, value| {
        wide::write_word(memory, sync + at, value);
    };
    let wait = |gate: &dyn Fn() -> u64, ms: u64, done: &dyn Fn() -> bool| {
        let start = gate();
        while !done() {
            if gate().wrapping_sub(start) > ms * ticks_per_ms {
                return false;
            }
            core::hint::spin_loop();
        }
        true
    };
    for at in [
        sync::ROUND,
        sync::TOUCHED,
        sync::SECRET,
        sync::ACCESSES,
        sync::OVER,
    ] {
        store(at, 0);
    }
    let mut seen = Victim::default();
    let mut in_vain = 0;
    let start = gate.now();
    for round in 1..=rounds.min(MAX_ROUNDS) {
        if gate.now().wrapping_sub(start) > TOTAL_MS * ticks_per_ms {
            break;
        }
        for i in 0..WORDS {
            wide::write_word(memory, page + 8 * i, mix(round));
        }
        seen.status = status_of(gate.map());
        if seen.status != u16::from(status::OK) {
            break;
        }
        store(sync::ROUND, round);
        let patience = match in_vain {
            0..PATIENT_STEPS => STEP_MS,
            _ => SHORT_STEP_MS,
        };
        let touched = wait(&|| gate.now(), patience, &|| load(sync::TOUCHED) == round);
        in_vain = if touched {
            0
        } else {
            in_vain.saturating_add(1)
        };
        seen.status = status_of(gate.unmap());
        if seen.status != u16::from(status::OK) {
            break;
        }
        // From here on nobody else can see or change the page.
        let secret = |i: u64| mix(SECRET + round * WORDS + i);
        for i in 0..WORDS {
            wide::write_word(memory, page + 8 * i, secret(i));
        }
        store(sync::SECRET, round);
        let before = load(sync::ACCESSES);
        wait(&|| gate.now(), GRACE_MS, &|| {
            load(sync::ACCESSES).wrapping_sub(before) >= GRACE_ACCESSES
        });
        for i in 0..WORDS {
            let got = wide::read_word(memory, page + 8 * i).unwrap_or(0);
            let wrong = (got ^ secret(i)).to_le_bytes();
            seen.corrupted += wrong.iter().filter(|&&byte| byte != 0).count() as u64;
        }
        seen.touched += u64::from(touched);
        seen.rounds += 1;
    }
    store(sync::OVER, 1);
    Some(seen)
}

/// What the attacker reaches: by offset, as a window's addresses are.
pub trait View {
    /// Reads a word; all-ones where nothing is shown.
    fn read(&self, offset: u64) -> u64;
    /// Writes a word, where something is shown.
    fn write(&self, offset: u64, value: u64);
}

impl View for Linear {
    fn read(&self, offset: u64) -> u64 {
        wide::read_word(self, offset).unwrap_or(u64::MAX)
    }

    fn write(&self, offset: u64, value: u64) {
        wide::write_word(self, offset, value);
    }
}

/// What the attacker did and saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attacker {
    /// Reads of the page.
    pub reads: u64,
    /// Writes to it.
    pub writes: u64,
    /// Reads that gave all-ones.
    pub ones: u64,
    /// Words of secrets that were read.
    pub leaked: u64,
    /// Words that were read and that nobody wrote there.
    pub other: u64,
}

/// Plays the attacker until the victim says that it is over, or `now` shows `deadline`. It may begin before the victim does.
pub fn attacker(
    view: &impl View,
    [page, sync]: [u64; 2],
    deadline: u64,
    now: impl Fn() -> u64,
) -> Attacker {
    let mut seen = Attacker::default();
    let mut last = 0;
    // What an earlier race, or whatever had the page before, left there is not the victim's word.
    view.write(sync + sync::OVER, 0);
    while now() < deadline {
        let over = view.read(sync + sync::OVER);
        if over != 0 && over != u64::MAX {
            break;
        }
        let round = view.read(sync + sync::ROUND);
        let at = |n: u64| page + 8 * (mix(n) % WORDS);
        let word = Word::of(view.read(at(seen.reads)));
        seen.reads += 1;
        match word {
            Word::Ones => seen.ones += 1,
            Word::Secret => seen.leaked += 1,
            Word::Other => seen.other += 1,
            Word::Zero | Word::Public | Word::Mark => {}
        }
        view.write(at(!seen.writes), mix(MARK + seen.writes % MARKS));
        seen.writes += 1;
        view.write(sync + sync::ACCESSES, seen.reads + seen.writes);
        if word != Word::Ones && round != last && round != u64::MAX && round != 0 {
            last = round;
            view.write(sync + sync::TOUCHED, round);
        }
    }
    seen
}

//! MSI-X: the table of messages, the pending bits, and the masks (PCI Local Bus 3.0, section 6.8.2).

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;

use super::Error;
use crate::host::{Host, Interrupt, MsiMessage};
use crate::vhost_user::RateLimit;

/// Bytes of a table entry.
const ENTRY: u64 = 16;
/// Bit 0 of a vector's control word.
const VECTOR_MASKED: u32 = 1;

struct Vector {
    interrupt: Arc<dyn Interrupt>,
    /// Address (64 bits), data and control, as the guest wrote them.
    words: [u32; 4],
    /// What the interrupt has been told.
    current: Option<MsiMessage>,
}

/// The vectors of one function. The owner tells it about the capability's control word and the bus-master bit.
pub struct Msix {
    vectors: Vec<Vector>,
    /// Enabled, not masked as a function, and bus master.
    live: bool,
    log: RateLimit,
}

impl Msix {
    /// `vectors` interrupts of the host, each masked. The guest sees at most 2048.
    pub fn new(host: &dyn Host, vectors: u16) -> Result<Self, Error> {
        let vector = || {
            Ok(Vector {
                interrupt: host.interrupt().map_err(Error::Interrupt)?,
                words: [0, 0, 0, VECTOR_MASKED],
                current: None,
            })
        };
        Ok(Self {
            vectors: (0..vectors)
                .map(|_| vector())
                .collect::<Result<_, Error>>()?,
            live: false,
            log: RateLimit::new(Duration::from_secs(1)),
        })
    }

    /// Number of vectors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Whether there are no vectors.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// The interrupt of a vector, or `None` for one that is not there (0xFFFF among them).
    #[must_use]
    pub fn interrupt(&self, vector: u16) -> Option<&Arc<dyn Interrupt>> {
        self.vectors.get(usize::from(vector)).map(|v| &v.interrupt)
    }

    /// Applies the control word of the capability and the bus-master bit: a function that may not write to memory cannot
    /// send a message either.
    pub fn set_control(&mut self, enabled: bool, function_masked: bool, bus_master: bool) {
        let live = enabled && !function_masked && bus_master;
        if live != self.live {
            self.live = live;
            for index in 0..self.vectors.len() {
                self.update(index);
            }
        }
    }

    /// Reads the table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at / ENTRY)
                .ok()
                .and_then(|i| self.vectors.get(i))
                .map_or(0, |vector| {
                    let [word, byte] =
                        [(at % ENTRY) / 4, at % 4].map(|n| usize::try_from(n).unwrap_or(0));
                    vector.words[word].to_le_bytes()[byte]
                });
        }
    }

    /// Writes the table: 4 or 8 bytes, naturally aligned. Any other access is undefined by the specification and dropped here.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let Ok(index) = usize::try_from(offset / ENTRY) else {
            return;
        };
        let Some(vector) = self.vectors.get_mut(index) else {
            return;
        };
        let first = usize::try_from(offset % ENTRY / 4).unwrap_or(0);
        for (word, bytes) in vector.words[first..].iter_mut().zip(data.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        vector.words[3] &= VECTOR_MASKED;
        self.update(index);
    }

    /// Reads the pending bits, one for each vector; they cannot be written.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let vector = first.checked_add(bit).and_then(|i| self.vectors.get(i));
                bits | u8::from(vector.is_some_and(|v| v.interrupt.pending())) << bit
            });
        }
    }

    fn update(&mut self, index: usize) {
        let Some(vector) = self.vectors.get_mut(index) else {
            return;
        };
        let [low, high, data, control] = vector.words;
        let message = (self.live && control & VECTOR_MASKED == 0).then(|| MsiMessage {
            address: u64::from(high) << 32 | u64::from(low & !3),
            data,
        });
        if message == vector.current {
            return;
        }
        match vector.interrupt.set_message(message) {
            Ok(()) => vector.current = message,
            Err(error) => {
                // Not knowing what holds, the next change is applied whatever it is.
                vector.current = None;
                if self.log.allow(Instant::now()).is_some() {
                    warn!("MSI-X vector {index}: cannot set {message:x?}: {error}");
                }
            }
        }
    }
}

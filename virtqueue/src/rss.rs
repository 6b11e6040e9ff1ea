//! Receive-side scaling of virtio-net (VIRTIO 1.3 sections 5.1.6.4.3 and 5.1.6.5.7): what a driver configures, and the Toeplitz hash.
//!
//! Which bytes of a packet are hashed is the business of whoever steers packets.

/// Hash types (section 5.1.6.4.3), as masks.
pub mod types {
    /// VIRTIO_NET_HASH_TYPE_IPv4 (section 5.1.6.4.3.1): addresses.
    pub const IPV4: u32 = 1 << 0;
    /// VIRTIO_NET_HASH_TYPE_TCPv4 (section 5.1.6.4.3.1): addresses and ports.
    pub const TCPV4: u32 = 1 << 1;
    /// VIRTIO_NET_HASH_TYPE_UDPv4 (section 5.1.6.4.3.1): addresses and ports.
    pub const UDPV4: u32 = 1 << 2;
    /// VIRTIO_NET_HASH_TYPE_IPv6 (section 5.1.6.4.3.1): addresses.
    pub const IPV6: u32 = 1 << 3;
    /// VIRTIO_NET_HASH_TYPE_TCPv6 (section 5.1.6.4.3.1): addresses and ports.
    pub const TCPV6: u32 = 1 << 4;
    /// VIRTIO_NET_HASH_TYPE_UDPv6 (section 5.1.6.4.3.1): addresses and ports.
    pub const UDPV6: u32 = 1 << 5;
    /// All of these (section 5.1.6.4.3.1). Those that look into extension headers of IPv6 are not supported.
    pub const ALL: u32 = IPV4 | TCPV4 | UDPV4 | IPV6 | TCPV6 | UDPV6;
}

/// Longest key in bytes, which is what a device has to take at least (section 5.1.4): it covers the addresses and ports of IPv6.
pub const MAX_KEY: usize = 40;
/// Most entries of an indirection table, which is what a device has to take at least (section 5.1.4).
pub const MAX_TABLE: usize = 128;
/// Length of the longest configuration in bytes (section 5.1.6.5.7).
pub const MAX_LEN: usize = FIXED + 2 * MAX_TABLE + MAX_KEY;

/// Bytes before the table: hash types, mask, unclassified queue.
const HEAD: usize = 8;
/// All fields but table and key: le16 `max_tx_vq` and u8 `hash_key_length` stand between these.
const FIXED: usize = HEAD + 3;

/// A configuration (`virtio_net_rss_config`, section 5.1.6.5.7) that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    hash_types: u32,
    unclassified: u16,
    /// One less than the number of entries, which is a power of two.
    mask: u16,
    table: [u16; MAX_TABLE],
    max_tx: u16,
    key: [u8; MAX_KEY],
    key_len: u8,
}

impl Config {
    /// A configuration (section 5.1.6.5.7) of `pairs` queue pairs at most. `None` where the table has no power of two entries or more than [`MAX_TABLE`], a queue is not one of
    /// those pairs', the key is longer than [`MAX_KEY`], a hash type is not one of [`types::ALL`], or no transmit queue is left.
    pub fn new(
        hash_types: u32,
        unclassified: u16,
        table: &[u16],
        max_tx: u16,
        key: &[u8],
        pairs: u16,
    ) -> Option<Self> {
        let mut config = Self {
            hash_types,
            unclassified,
            mask: u16::try_from(table.len()).ok()?.checked_sub(1)?,
            table: [0; MAX_TABLE],
            max_tx,
            key: [0; MAX_KEY],
            key_len: u8::try_from(key.len()).ok()?,
        };
        config.table.get_mut(..table.len())?.copy_from_slice(table);
        config.key.get_mut(..key.len())?.copy_from_slice(key);
        let queues = table.iter().chain([&unclassified]);
        let good = table.len().is_power_of_two()
            && hash_types & !types::ALL == 0
            && (1..=pairs).contains(&max_tx)
            && queues.copied().all(|queue| queue < pairs);
        good.then_some(config)
    }

    /// The configuration as it is in a command (section 5.1.6.5.7), of exactly this length; `None` as for [`Config::new`].
    #[must_use]
    pub fn parse(bytes: &[u8], pairs: u16) -> Option<Self> {
        let u16_at = |at: usize| {
            let field = bytes.get(at..at.checked_add(2)?)?;
            Some(u16::from_le_bytes(field.try_into().ok()?))
        };
        let hash_types = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
        let entries = usize::from(u16_at(4)?).checked_add(1)?;
        let mut table = [0; MAX_TABLE];
        let table = table.get_mut(..entries)?;
        for (i, entry) in table.iter_mut().enumerate() {
            *entry = u16_at(HEAD + 2 * i)?;
        }
        let rest = HEAD + 2 * entries;
        let key = bytes.get(rest + 3..)?;
        if usize::from(*bytes.get(rest + 2)?) != key.len() {
            return None;
        }
        Self::new(hash_types, u16_at(6)?, table, u16_at(rest)?, key, pairs)
    }

    /// The configuration as it is in a command (section 5.1.6.5.7): what was written into `out`.
    pub fn encode<'a>(&self, out: &'a mut [u8; MAX_LEN]) -> &'a [u8] {
        let [key_len] = [self.key_len];
        let key = self.key.get(..usize::from(key_len)).unwrap_or_default();
        let words = [self.mask, self.unclassified]
            .into_iter()
            .chain(self.table().iter().copied())
            .chain([self.max_tx]);
        let bytes = self.hash_types.to_le_bytes().into_iter();
        let bytes = bytes
            .chain(words.flat_map(u16::to_le_bytes))
            .chain([key_len])
            .chain(key.iter().copied());
        let mut len = 0;
        for (to, byte) in out.iter_mut().zip(bytes) {
            *to = byte;
            len += 1;
        }
        out.get(..len).unwrap_or_default()
    }

    /// Which hash types are enabled (section 5.1.6.4.3.1).
    #[must_use]
    pub fn hash_types(&self) -> u32 {
        self.hash_types
    }

    /// The receive queues by hash (section 5.1.6.5.7): each entry is the number of a queue pair, from 0 on.
    #[must_use]
    pub fn table(&self) -> &[u16] {
        let entries = usize::from(self.mask) + 1;
        self.table.get(..entries).unwrap_or_default()
    }

    /// The same with its table (section 5.1.6.5.7) one entry further round.
    #[must_use]
    pub fn turned(&self) -> Self {
        let mut turned = *self;
        let entries = usize::from(self.mask) + 1;
        if let Some(table) = turned.table.get_mut(..entries) {
            table.rotate_left(1);
        }
        turned
    }

    /// How many queue pairs have to be in use for it (section 5.1.6.5.7): up to the last one that is received or sent on.
    #[must_use]
    pub fn pairs(&self) -> u16 {
        let queues = self.table().iter().chain([&self.unclassified]);
        let last = queues.copied().max().unwrap_or(0);
        self.max_tx.max(last.saturating_add(1))
    }

    /// The receive queue (section 5.1.6.5.7), by the number of its pair, for what is hashed of a packet; `None` for a packet of which nothing is.
    #[must_use]
    pub fn queue(&self, input: Option<&[u8]>) -> u16 {
        let Some(input) = input else {
            return self.unclassified;
        };
        let [low, high, ..] = toeplitz(&self.key, input).to_le_bytes();
        let entry = u16::from_le_bytes([low, high]) & self.mask;
        self.table
            .get(usize::from(entry))
            .copied()
            .unwrap_or(self.unclassified)
    }
}

/// The Toeplitz hash (section 5.1.6.5.7): for each bit of the input that is set, from the highest of the first byte on, the 32 bits of the key from that place on. Behind
/// its end a key is zero.
#[must_use]
pub fn toeplitz(key: &[u8], input: &[u8]) -> u32 {
    let mut key = key.iter().copied().chain(core::iter::repeat(0));
    let mut window = 0u64;
    for _ in 0..4 {
        window = window << 8 | u64::from(key.next().unwrap_or(0));
    }
    let mut hash = 0;
    for byte in input {
        // The 40 bits of the key that this byte's bits meet: bit i from above meets the 32 from i on.
        window = (window << 8 | u64::from(key.next().unwrap_or(0))) & 0xff_ffff_ffff;
        for bit in 0..8 {
            if byte & (0x80 >> bit) != 0 {
                hash ^= window >> (8 - bit);
            }
        }
    }
    u32::try_from(hash & 0xffff_ffff).unwrap_or(0)
}

#[cfg(test)]
mod tests;

//! The vhost-user messages that a back-end driver answers (vhost-user specification, "Message specification").

use virtqueue::rss;

/// Bytes of a header: request, flags and payload size, each le32.
pub const HEADER: usize = 12;
/// Room for the longest message.
pub const MAX_MESSAGE: usize = 4096;

/// Version 1, in the flags of every message.
pub const VERSION: u32 = 1;
/// The message is a reply.
pub const REPLY: u32 = 1 << 2;
/// The sender wants a reply even where the request has none.
pub const NEED_REPLY: u32 = 1 << 3;

/// Feature bit 30: protocol features can be negotiated.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol feature: several queues.
pub const PROTOCOL_F_MQ: u64 = 1 << 0;
/// Protocol feature: the log of what is written is shared memory.
pub const PROTOCOL_F_LOG_SHMFD: u64 = 1 << 1;
/// Protocol feature: the back-end announces a front-end that has moved.
pub const PROTOCOL_F_RARP: u64 = 1 << 2;
/// Protocol feature: NEED_REPLY.
pub const PROTOCOL_F_REPLY_ACK: u64 = 1 << 3;
/// Protocol feature: memory regions are added and removed one by one.
pub const PROTOCOL_F_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

/// Protocol feature, of this project's: the front-end says how frames to it are to be steered (docs/device.md, section 7).
pub const PROTOCOL_F_RSS: u64 = 1 << 62;
/// Protocol feature: what is in flight is kept where the next back-end finds it.
pub const PROTOCOL_F_INFLIGHT_SHMFD: u64 = 1 << 12;

/// Bit 8 of the payload of SET_VRING_KICK and its like: no descriptor comes with it.
pub const VRING_NO_FD: u64 = 1 << 8;

/// Request numbers.
pub mod request {
    #![allow(missing_docs)] // their names are those of the specification
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    /// No name of the specification: docs/device.md, section 7.
    pub const SET_RSS: u32 = 0x7663_0001;
}

/// A message that was copied out of shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Request number.
    pub request: u32,
    /// Flags.
    pub flags: u32,
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Parses a message; `None` where the length does not fit the header.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, payload) = bytes.split_at_checked(HEADER)?;
        let size = usize::try_from(u32_at(header, 8)?).ok()?;
        let message = Self {
            request: u32_at(header, 0)?,
            flags: u32_at(header, 4)?,
            payload: payload.get(..size)?,
        };
        (payload.len() == size).then_some(message)
    }

    /// Whether the sender waits for an acknowledgement that the request does not have by itself.
    #[must_use]
    pub fn wants_ack(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// The payload's le64 at a byte offset.
    #[must_use]
    pub fn u64(&self, offset: usize) -> Option<u64> {
        Some(u64::from_le_bytes(
            self.payload.get(offset..offset + 8)?.try_into().ok()?,
        ))
    }

    /// How a front-end of `pairs` queue pairs wants frames to be steered, in the payload of SET_RSS: by RSS, or as the back-end likes. `None` where it is neither.
    #[must_use]
    pub fn rss(&self, pairs: u16) -> Option<Option<rss::Config>> {
        if self.payload.is_empty() {
            Some(None)
        } else {
            rss::Config::parse(self.payload, pairs).map(Some)
        }
    }

    /// The payload's le16 at a byte offset.
    #[must_use]
    pub fn u16(&self, offset: usize) -> Option<u16> {
        Some(u16::from_le_bytes(
            self.payload.get(offset..offset + 2)?.try_into().ok()?,
        ))
    }

    /// The payload's le32 at a byte offset.
    #[must_use]
    pub fn u32(&self, offset: usize) -> Option<u32> {
        u32_at(self.payload, offset)
    }
}

/// A reply to `request`, in a buffer of its own.
#[must_use]
pub fn reply(request: u32, payload: &[u8; 8]) -> [u8; HEADER + 8] {
    let mut bytes = [0; HEADER + 8];
    bytes[..4].copy_from_slice(&request.to_le_bytes());
    bytes[4..8].copy_from_slice(&(VERSION | REPLY).to_le_bytes());
    bytes[8..12].copy_from_slice(&8u32.to_le_bytes());
    bytes[12..].copy_from_slice(payload);
    bytes
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(offset..offset + 4)?.try_into().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steering_is_by_rss_or_as_the_back_end_likes_and_nothing_else() {
        let config = rss::Config::new(rss::types::ALL, 0, &[0, 1], 2, &[7; 40], 2).unwrap();
        let mut bytes = [0; rss::MAX_LEN];
        let bytes = config.encode(&mut bytes);
        let message = |payload| Message {
            request: request::SET_RSS,
            flags: VERSION,
            payload,
        };
        assert_eq!(message(&[]).rss(2), Some(None));
        assert_eq!(message(bytes).rss(2), Some(Some(config)));
        // Of fewer pairs than it names, and cut off.
        assert_eq!(message(bytes).rss(1), None);
        for len in 1..bytes.len() {
            assert_eq!(message(&bytes[..len]).rss(2), None);
        }
    }
}

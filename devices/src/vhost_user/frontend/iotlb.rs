//! Translations on their way to the back-end.

use std::time::Instant;

use super::super::wire::{Iotlb, IotlbKind, Message, requests};
use super::{Error, Frontend, IotlbDone, Owed};
use crate::virtio_iommu::Change;

/// How many changes of translations the back-end may owe an answer to; see [`Frontend::has_iotlb_room`].
pub const MAX_IOTLB_OWED: usize = 256;

impl Frontend {
    /// Tells the back-end of a change of its translations, after [`Frontend::set_up`]; [`Event::Iotlb`](super::Event::Iotlb) follows when it is done. `number` is the
    /// caller's, and not less than those before, or 0 for a change that nobody waits for.
    ///
    /// Where REPLY_ACK was negotiated a change is done when the back-end has acknowledged it, and a refusal is a [`Violation::Refused`](super::Violation::Refused). Elsewhere
    /// the protocol has no answer: an invalidation is done when the back-end has answered a GET_FEATURES behind it, and an update with
    /// what was sent before it. The caller paces itself by [`Frontend::has_iotlb_room`], and says when these are all for now:
    /// [`Frontend::flush`].
    pub fn iotlb(&mut self, change: &Change, number: u64) -> Result<(), Error> {
        if !self.memory_sent {
            return Err(Error::State("changing a translation"));
        }
        let acks = self.acks();
        let message = Message::request(requests::IOTLB_MSG, &wire_change(change));
        self.connection.post(&message.with_need_reply(acks))?;
        let request = match change {
            _ if acks => requests::IOTLB_MSG,
            Change::Unmap { .. } => {
                let barrier = Message::bare(requests::GET_FEATURES);
                self.connection.post(&barrier)?;
                requests::GET_FEATURES
            }
            Change::Map(_) => {
                self.pass(number);
                return Ok(());
            }
        };
        let since = Instant::now();
        self.iotlb_owed += 1;
        self.owed.push_back(Owed::Iotlb {
            request,
            number,
            since,
        });
        Ok(())
    }

    /// Sends what [`Frontend::iotlb`] was given, in as few pieces as the socket takes.
    pub fn flush(&mut self) -> Result<(), Error> {
        Ok(self.connection.flush()?)
    }

    /// Lets a change that the back-end need not know be done in its turn.
    pub fn pass(&mut self, number: u64) {
        let last = self.owed.iter_mut().rev().find_map(|owed| match owed {
            Owed::Iotlb { number, .. } => Some(number),
            _ => None,
        });
        match last {
            Some(last) => *last = number.max(*last),
            None => {
                let done = self.iotlb_done.get_or_insert_default();
                done.number = done.number.max(number);
            }
        }
    }

    /// What is done already, for a caller that has just sent changes which need no answer: [`Event::Iotlb`](super::Event::Iotlb) does not repeat it.
    pub fn take_iotlb_done(&mut self) -> Option<IotlbDone> {
        self.iotlb_done.take()
    }

    /// Whether one more change of a translation may be sent: the back-end owes less than [`MAX_IOTLB_OWED`] answers to such, and
    /// takes what is sent to it. So no number of changes fills the memory of this process, or overruns the connection.
    #[must_use]
    pub fn has_iotlb_room(&self) -> bool {
        self.iotlb_owed < MAX_IOTLB_OWED && !self.connection.is_blocked()
    }

    /// When the oldest of the changes that are not done was sent.
    #[must_use]
    pub fn oldest_iotlb(&self) -> Option<Instant> {
        self.owed.iter().find_map(|owed| match owed {
            Owed::Iotlb { since, .. } => Some(*since),
            _ => None,
        })
    }
}

fn wire_change(change: &Change) -> Iotlb {
    match *change {
        Change::Map(mapping) => Iotlb {
            iova: mapping.iova,
            size: mapping.len,
            user_address: mapping.gpa,
            read: mapping.permission.read,
            write: mapping.permission.write,
            kind: IotlbKind::Update,
        },
        Change::Unmap { iova, len } => Iotlb {
            iova,
            size: len,
            kind: IotlbKind::Invalidate,
            ..Iotlb::default()
        },
    }
}

//! The vhost-user protocol ("Vhost-user Protocol" in QEMU's interoperability documents), for both roles.
//!
//! * [`wire`]: what the messages look like: request numbers, flags and payloads.
//! * [`Connection`]: messages with their file descriptors over a non-blocking stream socket.
//! * [`Socket`]: where the peer is found: a path that is listened on or connected to.
//! * [`frontend`]: the front-end's side of the conversation as a state machine.
//! * [`backend`]: the back-end's, for rings that are served in this process.
//! * [`channel`]: the front-end's end of the channel on which a back-end asks.
//!
//! Every peer is taken to be hostile: sizes are checked before memory is committed, file descriptors close with the
//! message that is thrown away, and nothing waits for a peer.

pub mod backend;
pub mod channel;
mod connection;
pub mod frontend;
mod inflight;
mod limit;
mod socket;
mod sys;
#[cfg(test)]
pub(crate) mod tests;
pub mod wire;

pub use connection::{Connection, Error, Violation};
pub use inflight::{Inflight, InflightArea};
pub use limit::RateLimit;
pub use socket::{Error as SocketError, Socket, SocketRole};
pub use wire::{
    DecodeError, Iotlb, IotlbKind, Log, MAX_FDS, MAX_PAYLOAD, MemoryRegion, MemoryTable, Message,
    Payload, SingleMemoryRegion, U64, VringAddr, VringFd, VringState, backend_requests, flags,
    protocol_features, requests,
};

/// VHOST_USER_F_PROTOCOL_FEATURES: the feature bit that says that protocol features can be negotiated.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;

//! The bytes of vhost-user.

use std::os::fd::AsRawFd;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;
use crate::vhost_user::{Inflight, Log, MAX_FDS, MAX_PAYLOAD};

/// Less than a socket holds.
const MOST: usize = 1 << 14;

/// A peer that sends whatever bytes, in pieces, with whatever number of descriptors. Messages come out whole or the connection ends; what a payload decodes to
/// has the same meaning when it is encoded.
pub fn fuzz_messages(data: &[u8]) {
    let (theirs, ours) = UnixStream::pair().expect("a socket pair");
    let mut connection = Connection::new(ours).expect("a stream");
    let mut input = Input(data);
    let (mut sent, mut given) = (0, 0);
    let (mut received, mut taken) = (0, 0);
    while !input.over() {
        let count = usize::from(input.byte());
        let len = 1 + usize::from(input.byte());
        let bytes = input.slice(len);
        if !bytes.is_empty() {
            // Now and then more than one message may bring.
            let fds = match count {
                0..0x80 => 0,
                n => n % 40,
            };
            let fds = vec![theirs.as_raw_fd(); fds];
            sent += theirs.send_with_fds(&[bytes], &fds).expect("room");
            given += fds.len();
        }
        // Or several pieces at once.
        if count % 4 == 3 && !input.over() && sent - received < MOST {
            continue;
        }
        // Each turn takes a message's header at least, or ends.
        loop {
            let message = match connection.receive() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(_) => return,
            };
            received += 12 + message.payload.len();
            taken += message.fds.len();
            assert!(
                received <= sent && taken <= given,
                "more came than was sent"
            );
            assert!(message.payload.len() <= MAX_PAYLOAD && message.fds.len() <= MAX_FDS);
            payloads(&message);
        }
    }
}

fn payloads(message: &Message) {
    round_trip::<U64>(&message.payload);
    round_trip::<VringState>(&message.payload);
    round_trip::<VringAddr>(&message.payload);
    round_trip::<Iotlb>(&message.payload);
    round_trip::<SingleMemoryRegion>(&message.payload);
    round_trip::<Log>(&message.payload);
    round_trip::<Inflight>(&message.payload);
    let _ = VringFd::decode(&message.payload);
    if let Ok(MemoryTable(regions)) = MemoryTable::decode(&message.payload) {
        assert!(regions.len() <= MAX_FDS, "more regions than files");
    }
}

fn round_trip<P: Payload>(bytes: &[u8]) {
    if let Ok(payload) = P::decode(bytes) {
        let encoded = payload.encode();
        assert_eq!(encoded.len(), bytes.len(), "a payload has another length");
        // What is padding is not kept; all else is.
        let again = P::decode(&encoded).map(|payload| payload.encode());
        assert_eq!(again.ok(), Some(encoded), "a payload is not what it was");
    }
}

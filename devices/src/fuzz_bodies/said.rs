//! Messages that a byte string describes.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::*;
use crate::virtio::event;

/// Where messages take their descriptors from.
pub(super) struct Files {
    /// Memory: that of the machine under the device.
    memory: File,
    null: File,
    /// The other ends of sockets that were sent.
    pub(super) sockets: Vec<UnixStream>,
}

impl Files {
    pub(super) fn new(host: &FakeHost) -> Self {
        let memory = &host.memory_regions()[0].shared.file;
        Self {
            memory: memory.try_clone().expect("a descriptor"),
            null: File::open("/dev/null").expect("it is there"),
            sockets: Vec::new(),
        }
    }

    pub(super) fn memory(&self) -> OwnedFd {
        self.memory.try_clone().expect("a descriptor").into()
    }

    fn one(&mut self, kind: u8) -> OwnedFd {
        match kind % 4 {
            0 => self.memory(),
            1 => event::into_owned(event::new().expect("an eventfd")),
            2 => {
                let (ours, theirs) = UnixStream::pair().expect("a socket pair");
                ours.set_nonblocking(true).expect("a socket");
                self.sockets.push(ours);
                // So many are enough.
                self.sockets.truncate(8);
                theirs.into()
            }
            _ => self.null.try_clone().expect("a descriptor").into(),
        }
    }
}

/// A payload of 64-bit words most of which are what payloads are made of: small numbers, addresses of pages, two small numbers, a half.
pub(super) fn payload(input: &mut Input) -> Vec<u8> {
    let shape = usize::from(input.byte());
    let mut payload = Vec::new();
    for _ in 0..shape % 40 {
        let word = match input.byte() {
            n @ 0..0x40 => u64::from(n),
            n @ 0x40..0x80 => u64::from(n % 0x40) << 12,
            n @ 0x80..0xc0 => u64::from(n % 8) | u64::from(n / 8 % 8) << 32,
            0xc0..0xe0 => u64::from(input.half()),
            _ => u64::from_le_bytes(input.take()),
        };
        payload.extend(word.to_le_bytes());
    }
    payload.truncate(payload.len().saturating_sub(shape / 40));
    payload
}

/// A message with descriptors.
pub(super) fn message(input: &mut Input, files: &mut Files) -> Message {
    let request = match input.byte() {
        0xff => u32::from_le_bytes(input.take()),
        n => n.into(),
    };
    // Mostly of the right version.
    let flags = match input.byte() {
        n @ 0..0xf0 => 1 | u32::from(n) & 0xc,
        _ => u32::from_le_bytes(input.take()),
    };
    let payload = payload(input);
    let kinds = input.byte();
    let fds = (0..kinds & 0x1f).map(|n| files.one(if n == 0 { kinds >> 5 } else { 0 }));
    Message {
        request,
        flags,
        payload,
        fds: fds.collect(),
    }
}

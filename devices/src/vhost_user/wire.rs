//! What goes over the socket: request numbers, flags and payloads, all little-endian.

use std::os::fd::OwnedFd;

use thiserror::Error;

/// Length of the header: request, flags and size, 32 bits each.
pub const HEADER_SIZE: usize = 12;
/// The longest payload that is sent or accepted; with its header a message fits a 4096-byte buffer.
pub const MAX_PAYLOAD: usize = 4096 - HEADER_SIZE;
/// The most file descriptors that one message carries.
pub const MAX_FDS: usize = 32;

/// The flags of a message's header.
pub mod flags {
    /// Mask of the protocol version.
    pub const VERSION_MASK: u32 = 0x3;
    /// The only version there is.
    pub const VERSION: u32 = 0x1;
    /// The message answers a request.
    pub const REPLY: u32 = 0x4;
    /// The sender wants an answer where the request has none of its own (protocol feature REPLY_ACK).
    pub const NEED_REPLY: u32 = 0x8;
}

/// Declares request numbers and the function that names them in log lines.
macro_rules! numbers {
    ($(#[$doc:meta])* $module:ident { $($name:ident = $value:literal),* $(,)? }) => {
        $(#[$doc])*
        #[allow(missing_docs, reason = "the names are those of the specification")]
        pub mod $module {
            $(pub const $name: u32 = $value;)*

            /// The specification's name of a request, for log lines.
            #[must_use]
            pub const fn name(request: u32) -> &'static str {
                match request {
                    $($name => stringify!($name),)*
                    _ => "an unknown request",
                }
            }
        }
    };
}

numbers! {
    /// Requests of the front-end ("Front-end message types").
    requests {
        GET_FEATURES = 1,
        SET_FEATURES = 2,
        SET_OWNER = 3,
        RESET_OWNER = 4,
        SET_MEM_TABLE = 5,
        SET_LOG_BASE = 6,
        SET_LOG_FD = 7,
        SET_VRING_NUM = 8,
        SET_VRING_ADDR = 9,
        SET_VRING_BASE = 10,
        GET_VRING_BASE = 11,
        SET_VRING_KICK = 12,
        SET_VRING_CALL = 13,
        SET_VRING_ERR = 14,
        GET_PROTOCOL_FEATURES = 15,
        SET_PROTOCOL_FEATURES = 16,
        GET_QUEUE_NUM = 17,
        SET_VRING_ENABLE = 18,
        SEND_RARP = 19,
        NET_SET_MTU = 20,
        SET_BACKEND_REQ_FD = 21,
        IOTLB_MSG = 22,
        SET_VRING_ENDIAN = 23,
        GET_CONFIG = 24,
        SET_CONFIG = 25,
        CREATE_CRYPTO_SESSION = 26,
        CLOSE_CRYPTO_SESSION = 27,
        POSTCOPY_ADVISE = 28,
        POSTCOPY_LISTEN = 29,
        POSTCOPY_END = 30,
        GET_INFLIGHT_FD = 31,
        SET_INFLIGHT_FD = 32,
        GPU_SET_SOCKET = 33,
        RESET_DEVICE = 34,
        VRING_KICK = 35,
        GET_MAX_MEM_SLOTS = 36,
        ADD_MEM_REG = 37,
        REM_MEM_REG = 38,
        SET_STATUS = 39,
        GET_STATUS = 40,
        GET_SHARED_OBJECT = 41,
        SET_DEVICE_STATE_FD = 42,
        CHECK_DEVICE_STATE = 43,
        GET_SHMEM_CONFIG = 44,
        // No name of the specification, which counts from 1 on: docs/device.md, section 7.
        SET_RSS = 0x7663_0001,
    }
}

numbers! {
    /// Requests of the back-end, on the channel that SET_BACKEND_REQ_FD opens ("Back-end message types").
    backend_requests {
        IOTLB_MSG = 1,
        CONFIG_CHANGE_MSG = 2,
        VRING_HOST_NOTIFIER_MSG = 3,
        VRING_CALL = 4,
        VRING_ERR = 5,
        SHARED_OBJECT_ADD = 6,
        SHARED_OBJECT_REMOVE = 7,
        SHARED_OBJECT_LOOKUP = 8,
        SHMEM_MAP = 9,
        SHMEM_UNMAP = 10,
    }
}

/// Protocol features ("Protocol features"), as bit masks.
#[allow(
    missing_docs,
    reason = "the names are those of the specification, without their prefix"
)]
pub mod protocol_features {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const RARP: u64 = 1 << 2;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const MTU: u64 = 1 << 4;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CROSS_ENDIAN: u64 = 1 << 6;
    pub const CRYPTO_SESSION: u64 = 1 << 7;
    pub const PAGEFAULT: u64 = 1 << 8;
    pub const CONFIG: u64 = 1 << 9;
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    pub const HOST_NOTIFIER: u64 = 1 << 11;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const XEN_MMAP: u64 = 1 << 17;
    pub const SHARED_OBJECT: u64 = 1 << 18;
    pub const DEVICE_STATE: u64 = 1 << 19;
    /// No name of the specification, which counts from 0 on: SET_RSS (docs/device.md, section 7).
    pub const RSS: u64 = 1 << 62;
}

/// One message, whole.
#[derive(Debug)]
pub struct Message {
    /// A number of [`requests`] (or of [`backend_requests`] on the back-end's channel).
    pub request: u32,
    /// [`flags`], as on the wire.
    pub flags: u32,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
    /// At most [`MAX_FDS`]; they close with the message.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// A request that carries nothing but its header.
    #[must_use]
    pub fn bare(request: u32) -> Self {
        Self {
            request,
            flags: flags::VERSION,
            payload: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// A request with a payload.
    pub fn request(request: u32, payload: &impl Payload) -> Self {
        Self {
            payload: payload.encode(),
            ..Self::bare(request)
        }
    }

    /// The answer to `request`.
    pub fn reply(request: u32, payload: &impl Payload) -> Self {
        let mut message = Self::request(request, payload);
        message.flags |= flags::REPLY;
        message
    }

    /// The same message with file descriptors.
    #[must_use]
    pub fn with_fds(mut self, fds: Vec<OwnedFd>) -> Self {
        self.fds = fds;
        self
    }

    /// The same message with NEED_REPLY set where `wanted`.
    #[must_use]
    pub fn with_need_reply(mut self, wanted: bool) -> Self {
        if wanted {
            self.flags |= flags::NEED_REPLY;
        }
        self
    }

    /// Whether the REPLY flag is set.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & flags::REPLY != 0
    }

    /// Whether the NEED_REPLY flag is set.
    #[must_use]
    pub fn needs_reply(&self) -> bool {
        self.flags & flags::NEED_REPLY != 0
    }

    /// The header as it goes over the wire.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_SIZE] {
        // A payload beyond 32 bits cannot be sent: `Connection::send` refuses it long before.
        let size = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let mut header = [0; HEADER_SIZE];
        header[0..4].copy_from_slice(&self.request.to_le_bytes());
        header[4..8].copy_from_slice(&self.flags.to_le_bytes());
        header[8..12].copy_from_slice(&size.to_le_bytes());
        header
    }
}

/// A payload that is not what its request carries: a fault of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The length does not fit the type.
    #[error("a payload of {got} bytes where {expected} belong")]
    Length {
        /// What the type has.
        expected: usize,
        /// What came.
        got: usize,
    },
    /// A memory table counts more regions than a message can have descriptors for.
    #[error("a memory table of {0} regions")]
    Regions(u32),
    /// An IOTLB message of a type that does not exist.
    #[error("an IOTLB message of type {0}")]
    Iotlb(u8),
}

/// A typed payload.
pub trait Payload: Sized {
    /// The bytes on the wire.
    fn encode(&self) -> Vec<u8>;
    /// Reads it back; the length must be exactly right.
    fn decode(payload: &[u8]) -> Result<Self, DecodeError>;
}

/// Checks a fixed length and hands out the payload as an array.
pub(super) fn exactly<const N: usize>(payload: &[u8]) -> Result<&[u8; N], DecodeError> {
    payload.try_into().map_err(|_| DecodeError::Length {
        expected: N,
        got: payload.len(),
    })
}

/// The 16-bit field at `AT`.
pub(super) fn u16_at<const AT: usize, const N: usize>(bytes: &[u8; N]) -> u16 {
    let mut field = [0; 2];
    field.copy_from_slice(&bytes[AT..AT + 2]);
    u16::from_le_bytes(field)
}

/// The 32-bit field at `AT`.
fn u32_at<const AT: usize, const N: usize>(bytes: &[u8; N]) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[AT..AT + 4]);
    u32::from_le_bytes(field)
}

/// The 64-bit field at `AT`.
pub(super) fn u64_at<const AT: usize, const N: usize>(bytes: &[u8; N]) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[AT..AT + 8]);
    u64::from_le_bytes(field)
}

/// A single 64-bit number: features, counts, acknowledgements (0 means that it was done).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct U64(pub u64);

impl Payload for U64 {
    fn encode(&self) -> Vec<u8> {
        self.0.to_le_bytes().to_vec()
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(u64::from_le_bytes(*exactly(payload)?)))
    }
}

/// A part of the front-end's memory ("Memory region description").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest physical address of its first byte.
    pub guest_address: u64,
    /// Length in bytes.
    pub size: u64,
    /// The front-end's user address of its first byte; ring addresses are in this space.
    pub user_address: u64,
    /// Where it starts in the file that comes with it.
    pub mmap_offset: u64,
}

impl MemoryRegion {
    const SIZE: usize = 32;

    fn put(&self, out: &mut Vec<u8>) {
        for field in [
            self.guest_address,
            self.size,
            self.user_address,
            self.mmap_offset,
        ] {
            out.extend_from_slice(&field.to_le_bytes());
        }
    }

    fn get(bytes: &[u8; Self::SIZE]) -> Self {
        Self {
            guest_address: u64_at::<0, 32>(bytes),
            size: u64_at::<8, 32>(bytes),
            user_address: u64_at::<16, 32>(bytes),
            mmap_offset: u64_at::<24, 32>(bytes),
        }
    }
}

/// The payload of SET_MEM_TABLE ("Multiple memory regions description"); one file descriptor a region comes with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryTable(pub Vec<MemoryRegion>);

impl Payload for MemoryTable {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + MemoryRegion::SIZE * self.0.len());
        out.extend_from_slice(&(self.0.len() as u64).to_le_bytes()[..4]);
        out.extend_from_slice(&[0; 4]);
        for region in &self.0 {
            region.put(&mut out);
        }
        out
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let (head, regions) = payload
            .split_first_chunk::<8>()
            .ok_or(DecodeError::Length {
                expected: 8,
                got: payload.len(),
            })?;
        let count = u32_at::<0, 8>(head);
        if count as usize > MAX_FDS {
            return Err(DecodeError::Regions(count));
        }
        let (regions, rest) = regions.as_chunks::<{ MemoryRegion::SIZE }>();
        if regions.len() != count as usize || !rest.is_empty() {
            return Err(DecodeError::Length {
                expected: 8 + MemoryRegion::SIZE * count as usize,
                got: payload.len(),
            });
        }
        Ok(Self(regions.iter().map(MemoryRegion::get).collect()))
    }
}

/// The payload of ADD_MEM_REG and REM_MEM_REG ("Single memory region description").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SingleMemoryRegion(pub MemoryRegion);

impl Payload for SingleMemoryRegion {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + MemoryRegion::SIZE);
        out.extend_from_slice(&[0; 8]);
        self.0.put(&mut out);
        out
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let bytes = exactly::<40>(payload)?;
        Ok(Self(MemoryRegion {
            guest_address: u64_at::<8, 40>(bytes),
            size: u64_at::<16, 40>(bytes),
            user_address: u64_at::<24, 40>(bytes),
            mmap_offset: u64_at::<32, 40>(bytes),
        }))
    }
}

/// A number of a vring: its size, base or enable state ("A vring state description").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringState {
    /// The vring.
    pub index: u32,
    /// The number.
    pub num: u32,
}

impl Payload for VringState {
    fn encode(&self) -> Vec<u8> {
        [self.index.to_le_bytes(), self.num.to_le_bytes()].concat()
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let bytes = exactly::<8>(payload)?;
        Ok(Self {
            index: u32_at::<0, 8>(bytes),
            num: u32_at::<4, 8>(bytes),
        })
    }
}

/// Where a vring lies, in user addresses ("A vring address description").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringAddr {
    /// The vring.
    pub index: u32,
    /// Bit 0: writes to the used ring are logged.
    pub flags: u32,
    /// Descriptor area.
    pub desc: u64,
    /// Device area (split: the used ring).
    pub used: u64,
    /// Driver area (split: the available ring).
    pub avail: u64,
    /// Guest physical address for logging.
    pub log: u64,
}

impl Payload for VringAddr {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(40);
        for field in [self.index, self.flags] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        for field in [self.desc, self.used, self.avail, self.log] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let bytes = exactly::<40>(payload)?;
        Ok(Self {
            index: u32_at::<0, 40>(bytes),
            flags: u32_at::<4, 40>(bytes),
            desc: u64_at::<8, 40>(bytes),
            used: u64_at::<16, 40>(bytes),
            avail: u64_at::<24, 40>(bytes),
            log: u64_at::<32, 40>(bytes),
        })
    }
}

/// The payload of SET_LOG_BASE ("Log description").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// Length of the log in bytes: a bit for each page of 4 KiB, the lowest of each byte first.
    pub mmap_size: u64,
    /// Where it starts in the file that comes with it.
    pub mmap_offset: u64,
}

impl Payload for Log {
    fn encode(&self) -> Vec<u8> {
        [self.mmap_size.to_le_bytes(), self.mmap_offset.to_le_bytes()].concat()
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let bytes = exactly::<16>(payload)?;
        Ok(Self {
            mmap_size: u64_at::<0, 16>(bytes),
            mmap_offset: u64_at::<8, 16>(bytes),
        })
    }
}

/// The payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR. Bits beyond these two fields mean nothing and are
/// not kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringFd {
    /// The vring (bits 0 to 7).
    pub index: u8,
    /// Bit 8: no file descriptor comes with it, the vring is polled.
    pub no_fd: bool,
}

impl Payload for VringFd {
    fn encode(&self) -> Vec<u8> {
        U64(u64::from(self.index) | u64::from(self.no_fd) << 8).encode()
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let [index, flags, ..] = *exactly::<8>(payload)?;
        Ok(Self {
            index,
            no_fd: flags & 1 != 0,
        })
    }
}

/// What an IOTLB message says ("IOTLB message", field `type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IotlbKind {
    /// From the back-end: it needs an address that it has no translation for.
    #[default]
    Miss,
    /// From the front-end: a translation.
    Update,
    /// From the front-end: translations are void.
    Invalidate,
    /// From the back-end: an access that its translation does not allow.
    AccessFail,
}

/// The payload of IOTLB_MSG in both directions ("IOTLB message").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Iotlb {
    /// IO virtual address of the first byte.
    pub iova: u64,
    /// Length in bytes.
    pub size: u64,
    /// The front-end's user address of the first byte; means something in an update only.
    pub user_address: u64,
    /// Whether reads are allowed (update), or asked for.
    pub read: bool,
    /// Whether writes are.
    pub write: bool,
    /// What it says.
    pub kind: IotlbKind,
}

impl Iotlb {
    /// Length on the wire: the C structure with its padding, as all implementations send it.
    const SIZE: usize = 32;
}

impl Payload for Iotlb {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::SIZE);
        for field in [self.iova, self.size, self.user_address] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        let kind = match self.kind {
            IotlbKind::Miss => 1,
            IotlbKind::Update => 2,
            IotlbKind::Invalidate => 3,
            IotlbKind::AccessFail => 4,
        };
        out.extend_from_slice(&[u8::from(self.read) | u8::from(self.write) << 1, kind]);
        out.resize(Self::SIZE, 0);
        out
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let bytes = exactly::<{ Self::SIZE }>(payload)?;
        let kind = match bytes[25] {
            1 => IotlbKind::Miss,
            2 => IotlbKind::Update,
            3 => IotlbKind::Invalidate,
            4 => IotlbKind::AccessFail,
            other => return Err(DecodeError::Iotlb(other)),
        };
        Ok(Self {
            iova: u64_at::<0, 32>(bytes),
            size: u64_at::<8, 32>(bytes),
            user_address: u64_at::<16, 32>(bytes),
            read: bytes[24] & 1 != 0,
            write: bytes[24] & 2 != 0,
            kind,
        })
    }
}

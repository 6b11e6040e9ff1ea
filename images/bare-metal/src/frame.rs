//! The frames that workloads exchange: Ethernet, IPv4, UDP, and a payload that can be checked (docs/bare-metal.md).

use guest_driver::line::{LINE, Line};
use guest_driver::port::{self, Offloads};
use guest_driver::{Frame, Port, Slot};
use virtqueue::net::{HDR_F_NEEDS_CSUM, HDR_GSO_UDP_L4, Header};

/// Shortest frame that a workload sends.
pub const MIN_FRAME: usize = 60;
/// Longest: an IP packet of 64 KiB.
pub const MAX_FRAME: usize = 14 + 65535;
/// Longest that is sent as it is. A longer one is left to be segmented.
pub const MAX_SEGMENT: usize = port::MAX_FRAME;
/// UDP payload of the segments of such a one: that of a frame of 1514 bytes.
const SEGMENT_PAYLOAD: u16 = 1472;

/// How many bytes of a frame are written and compared: all of them.
pub const EVERY_BYTE: usize = MAX_FRAME;
/// Those of the first line.
pub const FIRST_LINE: usize = LINE;

/// The simple Internet mix, 7:4:1: lengths of bursts, one after the other. (A burst is of frames of one length.)
pub const IMIX: [usize; 12] = [64, 570, 64, 64, 570, 64, 1518, 64, 570, 64, 64, 570];

const HEADERS: usize = 42;
/// The UDP port "discard", of flow 0.
pub(crate) const PORT: u16 = 9;
const TAG: usize = 42;
/// Two bytes are zero in front of it: so a frame's first 48 bytes are the same in a whole run.
const SEQUENCE: usize = 48;
const PATTERN: usize = 56;

/// Positions in the pattern table repeat after this many.
const PERIOD: usize = 4096;
static TABLE: [u8; PERIOD + MAX_SEGMENT] = table();

const fn table() -> [u8; PERIOD + MAX_SEGMENT] {
    let mut table = [0; PERIOD + MAX_SEGMENT];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut i = 0;
    while i < table.len() {
        table[i] = if i < PERIOD {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        } else {
            table[i - PERIOD]
        };
        i += 1;
    }
    table
}

/// Where in the table the pattern of frame `sequence` starts.
#[inline(always)]
fn start(sequence: u64) -> usize {
    let [low, high, ..] = sequence.to_le_bytes();
    usize::from(u16::from_le_bytes([low, high])) % PERIOD
}

/// Bytes of the pattern of frame `sequence`, from its byte `skip` on.
#[inline(always)]
fn pattern(sequence: u64, skip: usize, len: usize) -> &'static [u8] {
    let start = start(sequence) + skip;
    TABLE.get(start..start + len).unwrap_or(&[])
}

/// Some of them, of a frame that is longer than the table.
fn pattern_from(sequence: u64, skip: usize) -> &'static [u8] {
    TABLE
        .get((start(sequence) + skip) % PERIOD..)
        .unwrap_or(&[])
}

/// The last two words of the first line of frame `sequence`.
#[inline(always)]
fn variable(sequence: u64) -> [u64; 2] {
    let bytes = pattern(sequence, 0, LINE - PATTERN).first_chunk();
    let first = bytes.copied().map_or(0, u64::from_le_bytes);
    // The pattern repeats: so a number that was changed would go for another frame's.
    [sequence, first ^ sequence.rotate_left(32)]
}

/// Which end a frame comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The VM with virtio-net.
    FrontEnd,
    /// The VM with vhost-pci.
    BackEnd,
}

impl End {
    /// The other end.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::FrontEnd => Self::BackEnd,
            Self::BackEnd => Self::FrontEnd,
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::FrontEnd => 1,
            Self::BackEnd => 2,
        }
    }
}

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of a sequence.
    Data,
    /// No more will come; its sequence number is how many there were.
    End,
}

/// What a received frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A whole frame of this run.
    Good(Kind, u64),
    /// A frame of another run.
    Stale,
    /// Anything else: a byte is not what it should be.
    Corrupt,
}

/// The parts of a run's frames that are the same in all of them.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    headers: [u8; HEADERS],
    len: usize,
    run: u16,
    /// What a data frame begins with, but for the last two words; and an end frame.
    data: Line,
    end: Line,
    /// What is left to the receiver.
    header: Option<Header>,
    /// The length of a frame of which nothing is left to the receiver. Where something is, none has it: so the check of the others costs nothing more.
    plain: usize,
}

impl Format {
    /// The frames of run `run` that `from` sends, `len` bytes long (taken to the nearest that is possible).
    #[must_use]
    pub fn new(from: End, len: usize, run: u16) -> Self {
        let len = len.clamp(MIN_FRAME, MAX_FRAME);
        let mut headers = [0; HEADERS];
        let (source, target) = (from.number(), from.peer().number());
        headers[..6].copy_from_slice(&[0x52, 0x54, 0, 0x70, 0, target]);
        headers[6..12].copy_from_slice(&[0x52, 0x54, 0, 0x70, 0, source]);
        headers[12..14].copy_from_slice(&0x0800u16.to_be_bytes());
        let ip_len = u16::try_from(len - 14).unwrap_or(0);
        let ip = &mut headers[14..34];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&ip_len.to_be_bytes());
        ip[6] = 0x40; // don't fragment
        ip[8] = 64;
        ip[9] = 17; // UDP
        ip[12..16].copy_from_slice(&[10, 0, 0, source]);
        ip[16..20].copy_from_slice(&[10, 0, 0, target]);
        let checksum = checksum(ip);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        let udp = &mut headers[34..];
        udp[0..2].copy_from_slice(&PORT.to_be_bytes());
        udp[2..4].copy_from_slice(&PORT.to_be_bytes());
        udp[4..6].copy_from_slice(&(ip_len - 20).to_be_bytes());
        Self {
            len,
            run,
            data: line(&headers, tag(run, Kind::Data)),
            end: line(&headers, tag(run, Kind::End)),
            headers,
            header: None,
            plain: len,
        }
    }

    /// The same with the UDP checksum left to the receiver, and the segmentation of frames that are longer than a segment (VIRTIO 1.3, section 5.1.6.2). The checksum field then
    /// has the sum over the pseudo-header.
    #[must_use]
    pub fn with_offload(mut self) -> Self {
        let mut pseudo = [0; 12];
        pseudo[..8].copy_from_slice(&self.headers[26..34]);
        pseudo[9] = self.headers[23];
        pseudo[10..].copy_from_slice(&self.headers[38..40]);
        self.headers[40..42].copy_from_slice(&(!checksum(&pseudo)).to_be_bytes());
        let csum = Header {
            flags: HDR_F_NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 6,
            ..Header::NONE
        };
        self.header = Some(if self.len > MAX_SEGMENT {
            Header {
                gso_type: HDR_GSO_UDP_L4,
                gso_size: SEGMENT_PAYLOAD,
                hdr_len: 42,
                ..csum
            }
        } else {
            csum
        });
        self.plain = usize::MAX;
        self.with_lines()
    }

    /// Whether a sender with these offloads may send such frames.
    #[must_use]
    pub fn may_go(&self, offloads: Offloads) -> bool {
        self.header
            .is_none_or(|header| offloads.check_segment(&header, self.len).is_some())
    }

    /// Sends up to `count` of them, as [`Port::tx_burst`] does.
    #[inline(always)]
    pub fn send<P: Port>(
        &self,
        port: &mut P,
        count: usize,
        build: impl FnMut(usize, &mut Slot),
    ) -> Result<usize, port::Error> {
        match &self.header {
            None => port.tx_burst(count, self.len, build),
            Some(header) => port.tx_offloaded(header, count, self.len, build),
        }
    }

    /// The same with the UDP ports of flow `flow`: ports 9, of flow 0, and those behind them.
    #[must_use]
    pub fn with_flow(mut self, flow: u16) -> Self {
        let port = PORT.wrapping_add(flow).to_be_bytes();
        for at in [34, 36] {
            self.headers[at..at + 2].copy_from_slice(&port);
        }
        self.with_lines()
    }

    /// The same with the first lines that its headers make.
    fn with_lines(mut self) -> Self {
        self.data = line(&self.headers, tag(self.run, Kind::Data));
        self.end = line(&self.headers, tag(self.run, Kind::End));
        self
    }

    /// What the frames begin with: as far as they are the same.
    pub(crate) fn headers(&self) -> &[u8] {
        &self.headers
    }

    /// Length of the frames in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: a frame has at least its headers.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Writes a frame into a slot of [`Format::len`] bytes, or the first `MOST` bytes of it ([`EVERY_BYTE`], [`FIRST_LINE`]).
    #[inline(always)]
    pub fn build<const MOST: usize>(&self, slot: &mut Slot, kind: Kind, sequence: u64) {
        let line = match kind {
            Kind::Data => self.data,
            Kind::End => self.end,
        };
        if !slot.put_first_line(line.with_last(variable(sequence))) {
            self.build_short(slot, kind, sequence);
        }
        if MOST > LINE && self.len > LINE {
            self.build_rest(slot, sequence);
        }
    }

    /// What comes behind the first line. (A function of its own keeps the loops of short frames short.)
    #[inline(never)]
    fn build_rest(&self, slot: &mut Slot, sequence: u64) {
        let (skip, len) = (LINE - PATTERN, self.len - LINE);
        if self.len <= MAX_SEGMENT {
            slot.write(LINE, pattern(sequence, skip, len));
        } else {
            slot.write_with(LINE, len, |at| pattern_from(sequence, skip + at));
        }
    }

    /// Whether that is what it should be.
    #[inline(never)]
    fn check_rest(&self, frame: &Frame, sequence: u64) -> bool {
        let (skip, len) = (LINE - PATTERN, self.len - LINE);
        if self.len <= MAX_SEGMENT {
            frame.matches(LINE, pattern(sequence, skip, len))
        } else {
            frame.matches_with(LINE, len, |at| pattern_from(sequence, skip + at))
        }
    }

    /// Whether a frame has this format's length, and its header.
    #[inline(always)]
    fn fits(&self, frame: &Frame) -> bool {
        match frame.header() {
            None => frame.len() == self.plain,
            header => frame.len() == self.len && header == self.header,
        }
    }

    /// The first line of a frame that is shorter, or whose first piece is.
    #[cold]
    fn build_short(&self, slot: &mut Slot, kind: Kind, sequence: u64) {
        slot.write(0, &self.headers);
        slot.put_u64(TAG, tag(self.run, kind));
        slot.put_u64(SEQUENCE, sequence);
        let [_, last] = variable(sequence);
        let len = LINE.min(self.len) - PATTERN;
        slot.write(PATTERN, last.to_le_bytes().get(..len).unwrap_or(&[]));
    }

    /// Gives a frame that was copied into a slot this format's headers.
    #[inline(always)]
    pub fn readdress(&self, slot: &mut Slot) {
        slot.write(0, &self.headers);
    }

    /// Checks the length of a received frame, what its header says, and its first `MOST` bytes ([`EVERY_BYTE`], [`FIRST_LINE`]).
    #[inline(always)]
    #[must_use]
    pub fn check<const MOST: usize>(&self, frame: &Frame) -> Seen {
        let rest = MOST > LINE && self.len > LINE;
        let Some(line) = frame.first_line() else {
            return self.check_short(frame, rest);
        };
        let [sequence, _] = line.last();
        let whole = line == self.data.with_last(variable(sequence))
            && self.fits(frame)
            && (!rest || self.check_rest(frame, sequence));
        if whole {
            Seen::Good(Kind::Data, sequence)
        } else {
            self.check_short(frame, rest)
        }
    }

    /// The same for a frame that is no whole data frame of this run, or whose first line is not in one piece. What it finds, the frame was when it looked: the
    /// peer may have changed it since.
    #[cold]
    fn check_short(&self, frame: &Frame, rest: bool) -> Seen {
        let (Some(sequence), Some(found)) = (frame.u64(SEQUENCE), frame.u64(TAG)) else {
            return Seen::Corrupt;
        };
        let found = found & 0xffff_ffff_ffff;
        let kind = if found == tag(self.run, Kind::Data) {
            Kind::Data
        } else if found == tag(self.run, Kind::End) {
            Kind::End
        } else {
            return if found & 0xffff == u64::from(self.run) {
                Seen::Corrupt
            } else {
                Seen::Stale
            };
        };
        let [_, last] = variable(sequence);
        let first = LINE.min(self.len) - PATTERN;
        let whole = self.fits(frame)
            && frame.matches(0, &self.headers)
            && frame.matches(PATTERN, last.to_le_bytes().get(..first).unwrap_or(&[]))
            && (!rest || self.check_rest(frame, sequence));
        if whole {
            Seen::Good(kind, sequence)
        } else {
            Seen::Corrupt
        }
    }
}

/// What stands in front of a frame's sequence number: the run, the kind, and two zero bytes. (As a word, the lower six bytes count.)
#[inline(always)]
const fn tag(run: u16, kind: Kind) -> u64 {
    let kind = match kind {
        Kind::Data => 0,
        Kind::End => 1 << 16,
    };
    run as u64 | kind
}

/// The first line of the frames of a run, as far as it is the same in all of them.
fn line(headers: &[u8; HEADERS], tag: u64) -> Line {
    let mut bytes = [0; LINE];
    bytes[..HEADERS].copy_from_slice(headers);
    bytes[TAG..TAG + 6].copy_from_slice(&tag.to_le_bytes()[..6]);
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, &byte| word << 8 | u64::from(byte));
    }
    Line::from_words(words)
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_to_be_looked_at_is_neither_written_nor_compared() {
        for (len, line) in [(60, 60), (64, 64), (1518, 64)] {
            let format = Format::new(End::FrontEnd, len, 1);
            let mut whole = [0xa5; MAX_FRAME];
            format.build::<EVERY_BYTE>(&mut Slot::of(&mut whole[..len]), Kind::Data, 7);
            let mut first = [0xa5; MAX_FRAME];
            format.build::<FIRST_LINE>(&mut Slot::of(&mut first[..len]), Kind::Data, 7);
            assert_eq!(first[..line], whole[..line]);
            assert!(first[line..].iter().all(|&byte| byte == 0xa5));
            let good = Seen::Good(Kind::Data, 7);
            for at in 0..len {
                whole[at] ^= 1;
                let frame = Frame::of(&whole[..len]);
                assert_ne!(format.check::<EVERY_BYTE>(&frame), good, "byte {at}");
                assert_eq!(format.check::<FIRST_LINE>(&frame) == good, at >= line);
                whole[at] ^= 1;
            }
            let short = Frame::of(&whole[..len - 1]);
            assert_eq!(format.check::<FIRST_LINE>(&short), Seen::Corrupt);
        }
    }

    #[test]
    fn the_mix_has_seven_short_frames_to_four_middle_ones_to_a_long_one() {
        let count = |len| IMIX.iter().filter(|&&it| it == len).count();
        assert_eq!([64, 570, 1518].map(count), [7, 4, 1]);
    }

    #[test]
    fn the_ip_header_sums_to_zero_and_lengths_agree() {
        for len in [60, 64, 1518] {
            let format = Format::new(End::FrontEnd, len, 1);
            assert_eq!(checksum(&format.headers[14..34]), 0);
            assert_eq!(
                usize::from(u16::from_be_bytes([format.headers[16], format.headers[17]])),
                len - 14
            );
            assert_eq!(
                usize::from(u16::from_be_bytes([format.headers[38], format.headers[39]])),
                len - 34
            );
        }
    }

    #[test]
    fn a_partial_checksum_becomes_the_right_one_when_the_rest_is_added() {
        for len in [60, 64, 1518, 65536, MAX_FRAME] {
            let format = Format::new(End::FrontEnd, len, 1).with_offload();
            let header = format.header.unwrap();
            assert_eq!(header.gso_size > 0, len > MAX_SEGMENT);
            // Payload of nothing but zeroes adds nothing: what is left are the pseudo-header and the UDP header.
            let mut udp = format.headers[34..].to_vec();
            let complete = checksum(&udp);
            udp[6..8].copy_from_slice(&complete.to_be_bytes());
            let mut all = format.headers[26..34].to_vec();
            all.extend([0, 17]);
            all.extend(&format.headers[38..40]);
            all.extend(udp);
            assert_eq!(checksum(&all), 0, "{len}");
        }
    }

    #[test]
    fn a_long_pattern_goes_on_as_a_short_one_begins() {
        for sequence in [0, 5, 4095, 4096, 70_000] {
            for at in [0, 1, 1463, 4095, 4096, 65_000] {
                let some = pattern_from(sequence, at);
                assert!(some.len() >= MAX_SEGMENT);
                assert_eq!(some[..8], *pattern(sequence + at as u64 % 4096, 0, 8));
            }
        }
    }

    #[test]
    fn the_two_ends_address_each_other() {
        let (a, b) = (
            Format::new(End::FrontEnd, 64, 1),
            Format::new(End::BackEnd, 64, 1),
        );
        assert_eq!(a.headers[..6], b.headers[6..12]);
        assert_eq!(a.headers[26..30], b.headers[30..34]);
    }

    #[test]
    fn flows_differ_in_their_ports_only_and_the_first_is_the_usual_one() {
        let usual = Format::new(End::FrontEnd, 64, 1);
        assert_eq!(usual.with_flow(0).headers, usual.headers);
        let other = usual.with_flow(3).headers;
        let differs = (0..HEADERS).filter(|&i| other[i] != usual.headers[i]);
        assert!(differs.eq([35, 37]));
        assert_eq!(other[34..38], [0, 12, 0, 12]);
    }

    #[test]
    fn the_pattern_differs_between_neighbouring_frames() {
        for sequence in 0..PERIOD as u64 {
            assert_ne!(pattern(sequence, 0, 4), pattern(sequence + 1, 0, 4));
        }
    }
}

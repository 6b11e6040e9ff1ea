//! What the guests of `bench` do with frames: sizes, and how frames are made, looked at and waited for.

use std::fmt;

use bare_metal::frame::{IMIX, MAX_FRAME, MAX_SEGMENT, MIN_FRAME};
use clap::ValueEnum;
use serde::{Serialize, Serializer};

use super::{Direction, FRAMES, Mode};

/// Bytes of a frame, without FCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// All are of one length.
    Bytes(u32),
    /// The simple Internet mix: 64, 570 and 1518 bytes, 7:4:1, a burst of one length after the other.
    Imix,
}

impl Size {
    /// From the command line.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.parse::<u32>() {
            _ if text == "imix" => Ok(Self::Imix),
            Ok(bytes) if FRAMES.contains(&i64::from(bytes)) => Ok(Self::Bytes(bytes)),
            _ => Err(format!("it is {MIN_FRAME} to {MAX_FRAME}, or imix")),
        }
    }

    /// Whether they have to be left to be segmented.
    pub fn is_long(self) -> bool {
        matches!(self, Self::Bytes(bytes) if bytes as usize > MAX_SEGMENT)
    }

    /// On average.
    pub fn mean(self) -> f64 {
        match self {
            Self::Bytes(bytes) => f64::from(bytes),
            Self::Imix => IMIX.iter().sum::<usize>() as f64 / IMIX.len() as f64,
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => bytes.fmt(f),
            Self::Imix => f.pad("imix"),
        }
    }
}

/// A number, or `imix`.
impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Bytes(bytes) => serializer.serialize_u32(*bytes),
            Self::Imix => serializer.serialize_str("imix"),
        }
    }
}

/// Which bytes of a frame are written by the one guest and compared by the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payload {
    /// All of them
    EveryByte,
    /// Those of the first 64: headers and sequence number, as DPDK's testpmd does
    Headers,
}

impl Payload {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::EveryByte => "every-byte",
            Self::Headers => "headers",
        }
    }
}

/// Where the frames that are sent come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// They are written where the other guest will find them
    Build,
    /// They are written in memory of the guest's own, and copied from there as by an application that forwards
    Copy,
}

impl Source {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Copy => "copy",
        }
    }
}

/// What the guests do with frames, and how they wait for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct How {
    /// Which bytes they write and compare.
    pub payload: Payload,
    /// Where they take them from.
    pub source: Source,
    /// How they wait.
    pub mode: Mode,
}

impl How {
    /// What is done where nothing else is said.
    pub const USUAL: Self = Self {
        payload: Payload::EveryByte,
        source: Source::Build,
        mode: Mode::Poll,
    };

    /// The same as far as it means something for a direction: what comes back was copied anyway, and what is only awaited is neither written nor compared.
    pub fn in_direction(self, direction: Direction) -> Self {
        let Self { payload, mode, .. } = self;
        match direction {
            Direction::BeToFe | Direction::FeToBe | Direction::Both | Direction::Echo => self,
            Direction::RoundTrip => Self {
                source: Source::Build,
                payload,
                mode,
            },
            Direction::Idle => Self {
                mode,
                ..Self::USUAL
            },
        }
    }

    /// As guests are told.
    pub fn words(&self) -> String {
        let Self {
            payload,
            source,
            mode,
        } = self;
        let (payload, source, mode) = (payload.name(), source.name(), mode.name());
        format!("payload={payload} source={source} mode={mode}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_a_number_of_bytes_or_the_mix() {
        assert_eq!(Size::parse("60"), Ok(Size::Bytes(60)));
        assert_eq!(Size::parse("1518"), Ok(Size::Bytes(1518)));
        assert_eq!(Size::parse("65549"), Ok(Size::Bytes(65549)));
        let long = ["1518", "1519", "imix"].map(|text| Size::parse(text).unwrap().is_long());
        assert_eq!(long, [false, true, false]);
        assert_eq!(Size::parse("imix"), Ok(Size::Imix));
        for wrong in ["59", "65550", "", "mix", "-1", "70000"] {
            assert!(Size::parse(wrong).is_err(), "{wrong}");
        }
        let json = |size| serde_json::to_string(&size).unwrap();
        assert_eq!(
            (json(Size::Bytes(64)), json(Size::Imix)),
            ("64".into(), "\"imix\"".into())
        );
        // 28 x 64 + 16 x 570 + 4 x 1518, of 48.
        assert!((Size::Imix.mean() - 16984.0 / 48.0).abs() < 1e-9);
    }

    #[test]
    fn guests_understand_what_they_are_told() {
        for &payload in Payload::value_variants() {
            for &source in Source::value_variants() {
                for &mode in Mode::value_variants() {
                    let how = How {
                        payload,
                        source,
                        mode,
                    };
                    let line = format!("run work=source {}", how.words());
                    assert!(bare_metal::Command::parse(&line).is_ok(), "{line}");
                    let json = serde_json::to_value(how).unwrap();
                    assert_eq!(json["payload"], payload.name());
                    assert_eq!(json["source"], source.name());
                    assert_eq!(json["mode"], mode.name());
                }
            }
        }
        let imix = bare_metal::Command::parse("run work=source size=imix");
        assert!(imix.is_ok());
    }
}

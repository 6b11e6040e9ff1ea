//! Which rings the two VMs use: the flags that `pair` and `bench` share, and what the front-end VM is told.

use bare_metal::frame::MAX_SEGMENT;
use clap::{Args, ValueEnum};
use serde::Serialize;
use virtqueue::Layout as _;
use virtqueue::net::{F_CSUM, F_HOST_TSO4, F_HOST_USO, F_MQ, F_MRG_RXBUF, features};
use virtqueue::packed::Packed;
use virtqueue::split::Split;

use super::Direction;
use crate::exit::{Failure, usage};

/// The layout of the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Split virtqueues
    Split,
    /// Packed virtqueues
    Packed,
}

impl Layout {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Packed => "packed",
        }
    }

    /// Bytes of the three areas of a ring; `None` for a size that the layout does not have.
    pub fn area_sizes(self, size: u16) -> Option<[usize; 3]> {
        match self {
            Self::Split => Split::area_sizes(size),
            Self::Packed => Packed::area_sizes(size),
        }
    }
}

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is used where both ends can
    On,
    /// It is not used
    Off,
}

impl Switch {
    /// Whether it is `on`.
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

/// How the front-end's driver gives a frame to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tx {
    /// Header and frame in one descriptor
    Direct,
    /// A chain of two descriptors
    Chain,
    /// One descriptor, with an indirect table of two
    Indirect,
}

impl Tx {
    /// As it is written on the command line and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Chain => "chain",
            Self::Indirect => "indirect",
        }
    }
}

/// What is the same for all rings.
#[derive(Clone, Debug, Args)]
pub struct RingArgs {
    /// VIRTIO_F_EVENT_IDX: notifications are asked for by index [default: on; bench: on with --mode irq and adaptive only]
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub event_idx: Option<Switch>,
    /// VIRTIO_NET_F_MRG_RXBUF: a frame may lie in several receive buffers [default: on; bench: off]
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub mrg_rxbuf: Option<Switch>,
    /// VIRTIO_F_INDIRECT_DESC [default: on; bench: off, and with on --tx indirect]
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub indirect: Option<Switch>,
    /// Checksums and segmentation are left to the other side, both ways: VIRTIO_NET_F_CSUM, TSO, USO [default: on; bench: off, and on where a size is above 1518]
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub offload: Option<Switch>,
    /// How the front-end's driver gives a frame to the device [default: direct]
    #[arg(long, value_enum, value_name = "SHAPE")]
    pub tx: Option<Tx>,
    /// Queue pairs, each with a flow of frames of its own; --count is of each. A round trip goes over one
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub queues: u16,
    /// Bytes of a receive buffer, with the header of 12; less than a frame needs --mrg-rxbuf on [default: 1530]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(128..=1530))]
    pub rx_buffer: Option<u16>,
}

impl RingArgs {
    /// That nothing is turned off which frames above [`MAX_SEGMENT`] need.
    pub fn need_long_frames(&self) -> Result<(), Failure> {
        let needed = [("--offload", self.offload), ("--mrg-rxbuf", self.mrg_rxbuf)];
        match needed
            .iter()
            .find(|(_, switch)| *switch == Some(Switch::Off))
        {
            Some((flag, _)) => Err(usage(format!(
                "{flag} off: frames of more than {MAX_SEGMENT} bytes need it"
            ))),
            None => Ok(()),
        }
    }
}

/// Descriptors of each ring, where nothing is said.
pub const USUAL_SIZE: u16 = 256;

/// One configuration of the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Ring {
    /// The layout.
    #[serde(rename = "ring")]
    pub layout: Layout,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Descriptors of each.
    #[serde(rename = "queue_size")]
    pub size: u16,
}

impl Ring {
    /// As people write it.
    pub fn name(self) -> String {
        let in_order = if self.in_order { "+in-order" } else { "" };
        let size = match self.size {
            USUAL_SIZE => String::new(),
            size => format!("/{size}"),
        };
        format!("{}{in_order}{size}", self.layout.name())
    }
}

/// What the front-end's device is to offer and what its driver does. Where there is nothing, they do as they like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingSetup {
    /// Descriptors of each ring.
    pub size: u16,
    /// VIRTIO_F_RING_PACKED.
    pub packed: Option<bool>,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: Option<bool>,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: Option<bool>,
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub mrg_rxbuf: Option<bool>,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: Option<bool>,
    /// Checksums and segmentation are left to the other side.
    pub offload: Option<bool>,
    /// How a frame is given to the device.
    pub tx: Option<Tx>,
    /// Bytes of a receive buffer.
    pub rx_buffer: Option<u16>,
    /// Queue pairs, where there are several.
    pub queues: Option<u16>,
}

impl RingSetup {
    /// What the flags ask for, with rings of `size`.
    pub fn new(args: &RingArgs, size: u16) -> Result<Self, Failure> {
        let setup = Self {
            size,
            event_idx: args.event_idx.map(Switch::is_on),
            mrg_rxbuf: args.mrg_rxbuf.map(Switch::is_on),
            indirect: args.indirect.map(Switch::is_on),
            offload: args.offload.map(Switch::is_on),
            tx: args.tx,
            rx_buffer: args.rx_buffer,
            queues: Some(args.queues).filter(|&queues| queues > 1),
            ..Self::default()
        };
        if setup.tx == Some(Tx::Indirect) && setup.indirect == Some(false) {
            return Err(usage("--tx indirect: it needs --indirect on"));
        }
        Ok(setup)
    }

    /// The same with these rings.
    pub fn with(self, ring: Ring) -> Self {
        Self {
            packed: Some(ring.layout == Layout::Packed),
            in_order: Some(ring.in_order),
            size: ring.size,
            ..self
        }
    }

    /// Keys of `--net`, with the name of each feature and its bit.
    fn keys(&self) -> [(&'static str, Option<bool>, &'static str, u64); 8] {
        [
            (
                "packed",
                self.packed,
                "VIRTIO_F_RING_PACKED",
                features::RING_PACKED,
            ),
            (
                "in-order",
                self.in_order,
                "VIRTIO_F_IN_ORDER",
                features::IN_ORDER,
            ),
            (
                "event-idx",
                self.event_idx,
                "VIRTIO_F_EVENT_IDX",
                features::EVENT_IDX,
            ),
            (
                "mrg-rxbuf",
                self.mrg_rxbuf,
                "VIRTIO_NET_F_MRG_RXBUF",
                F_MRG_RXBUF,
            ),
            (
                "indirect",
                self.indirect,
                "VIRTIO_F_INDIRECT_DESC",
                features::INDIRECT_DESC,
            ),
            // One bit of each stands for all: a back-end has both directions or none.
            ("csum", self.offload, "VIRTIO_NET_F_CSUM", F_CSUM),
            ("tso", self.offload, "VIRTIO_NET_F_HOST_TSO4", F_HOST_TSO4),
            ("uso", self.offload, "VIRTIO_NET_F_HOST_USO", F_HOST_USO),
        ]
    }

    /// What follows the socket in the front-end's `--net`.
    pub fn net_keys(&self) -> String {
        let mut text = format!("size={}", self.size);
        for (key, value, ..) in self.keys() {
            if let Some(on) = value {
                text.push_str(&format!(",{key}={}", if on { "on" } else { "off" }));
            }
        }
        if let Some(queues) = self.queues {
            text.push_str(&format!(",queues={queues}"));
        }
        text
    }

    /// Over how many queue pairs frames of this direction go.
    pub fn pairs(&self, direction: Direction) -> u16 {
        if direction.is_stream() {
            self.queues.unwrap_or(1)
        } else {
            1
        }
    }

    /// What the front-end's guest finds on its command line.
    pub fn guest_words(&self) -> String {
        let tx = self.tx.map(|tx| format!("tx={}", tx.name()));
        let rx_buffer = self.rx_buffer.map(|bytes| format!("rx_buffer={bytes}"));
        let queues = self.queues.map(|queues| format!("queues={queues}"));
        let words: Vec<String> = tx.into_iter().chain(rx_buffer).chain(queues).collect();
        words.join(" ")
    }

    /// Whether the driver and the device agreed on what was asked for; if not, what is amiss.
    pub fn check(&self, negotiated: u64) -> Result<(), String> {
        for (key, value, name, bit) in self.keys() {
            match value {
                Some(true) if negotiated & bit == 0 => {
                    return Err(format!(
                        "{key}=on was asked for, but the two ends did not agree on {name} (features {negotiated:#x})"
                    ));
                }
                Some(false) if negotiated & bit != 0 => {
                    return Err(format!(
                        "{key}=off was asked for, but the two ends agreed on {name} (features {negotiated:#x})"
                    ));
                }
                _ => {}
            }
        }
        match self.queues {
            Some(queues) if negotiated & F_MQ == 0 => Err(format!(
                "{queues} queue pairs were asked for, but the two ends did not agree on VIRTIO_NET_F_MQ (features {negotiated:#x})"
            )),
            _ => Ok(()),
        }
    }
}

/// Reads `--queue-size` for rings of these layouts.
pub fn queue_size(text: &str, layouts: &[Layout]) -> Result<u16, Failure> {
    let fits = |size: &u16| {
        layouts
            .iter()
            .all(|layout| layout.area_sizes(*size).is_some())
    };
    text.parse().ok().filter(fits).ok_or_else(|| {
        let form = if layouts.contains(&Layout::Split) {
            "a power of two up to 32768 (split rings have no other)"
        } else {
            "a number from 1 to 32768"
        };
        usage(format!("--queue-size {text}: it is {form}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKED: Ring = Ring {
        layout: Layout::Packed,
        in_order: true,
        size: 768,
    };

    #[test]
    fn what_is_not_asked_for_is_not_said() {
        let setup = RingSetup {
            size: 256,
            ..RingSetup::default()
        };
        assert_eq!(setup.net_keys(), "size=256");
        assert_eq!(setup.guest_words(), "");
        assert_eq!(setup.check(0), Ok(()));
        assert_eq!(setup.check(u64::MAX), Ok(()));
    }

    #[test]
    fn what_is_asked_for_is_a_key_or_a_word() {
        let setup = RingSetup {
            event_idx: Some(false),
            tx: Some(Tx::Chain),
            rx_buffer: Some(512),
            queues: Some(4),
            ..RingSetup::default()
        };
        assert_eq!(
            setup.with(PACKED).net_keys(),
            "size=768,packed=on,in-order=on,event-idx=off,queues=4"
        );
        assert_eq!(setup.guest_words(), "tx=chain rx_buffer=512 queues=4");
        assert_eq!(setup.pairs(Direction::Both), 4);
        for direction in [Direction::RoundTrip, Direction::Echo, Direction::Idle] {
            assert_eq!(setup.pairs(direction), 1);
        }
    }

    #[test]
    fn features_that_are_missing_or_too_many_are_named() {
        let setup = RingSetup {
            mrg_rxbuf: Some(false),
            ..RingSetup::default()
        }
        .with(PACKED);
        let both = features::RING_PACKED | features::IN_ORDER;
        assert_eq!(setup.check(both), Ok(()));
        let error = setup.check(features::RING_PACKED).unwrap_err();
        assert!(error.contains("in-order=on") && error.contains("VIRTIO_F_IN_ORDER"));
        let error = setup.check(features::IN_ORDER).unwrap_err();
        assert!(error.contains("packed=on"), "{error}");
        let error = setup.check(both | F_MRG_RXBUF).unwrap_err();
        assert!(error.contains("mrg-rxbuf=off"), "{error}");
        let several = RingSetup {
            queues: Some(2),
            ..setup
        };
        let error = several.check(both).unwrap_err();
        assert!(error.contains("2 queue pairs"), "{error}");
        assert_eq!(several.check(both | F_MQ), Ok(()));
        let offload = RingSetup {
            offload: Some(true),
            ..setup
        };
        let error = offload.check(both | F_CSUM | F_HOST_TSO4).unwrap_err();
        assert!(error.contains("uso=on") && error.contains("VIRTIO_NET_F_HOST_USO"));
        assert!(offload.net_keys().ends_with(",csum=on,tso=on,uso=on"));
    }

    #[test]
    fn a_split_ring_is_a_power_of_two_and_a_packed_one_any_number() {
        let (split, packed) = (Layout::Split, Layout::Packed);
        assert_eq!(queue_size("1024", &[split, packed]).unwrap(), 1024);
        assert_eq!(queue_size("768", &[packed]).unwrap(), 768);
        assert_eq!(queue_size("32768", &[packed]).unwrap(), 32768);
        for (text, layouts) in [
            ("768", &[split][..]),
            ("768", &[packed, split]),
            ("0", &[packed]),
            ("32769", &[packed]),
            ("65536", &[split]),
            ("x", &[split]),
        ] {
            let error = queue_size(text, layouts).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("--queue-size {text}: ")),
                "{error}"
            );
        }
    }
}

//! The kernel command line.

use guest_driver::net_port::{Shape, TxShape};
use guest_driver::vhost_pci::Offer;
use virtqueue::net::{GUEST_OFFLOADS, HOST_OFFLOADS};

use super::{Run, Work, number, on_off, queues};
use crate::capture::{Limits, MAX_FRAMES, MAX_SNAPLEN};

/// Smallest receive buffer.
const MIN_RX_BUFFER: u16 = 128;

/// What the kernel command line says.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// Frequency of the time-stamp counter.
    pub tsc_khz: u64,
    /// Where PCI configuration space is.
    pub ecam: u64,
    /// Memory for devices apart from the RAM: its address, and its length; a length of zero where there is none.
    pub dma: (u64, u64),
    /// How the front-end lays out frames in buffers.
    pub shape: Shape,
    /// How many queue pairs the front-end sets up.
    pub queues: u16,
    /// What the back-end's driver offers.
    pub offer: Offer,
    /// A workload to run at once; otherwise commands are read from the control channel.
    pub run: Option<Run>,
    /// How the front-end's buffers are mapped where there is a virtio-iommu.
    pub iommu: IommuMode,
    /// What is added to a guest physical address to make the device address under which it is mapped.
    pub iova: u64,
    /// How much of the frames of each workload is recorded and reported; nothing where there are no frames.
    pub capture: Limits,
}

impl Default for Boot {
    fn default() -> Self {
        Self {
            tsc_khz: 0,
            ecam: 0,
            dma: (0, 0),
            shape: Shape {
                offloads: HOST_OFFLOADS | GUEST_OFFLOADS,
                ..Shape::default()
            },
            queues: 1,
            offer: Offer {
                rss: true,
                offloads: HOST_OFFLOADS | GUEST_OFFLOADS,
                ..Offer::default()
            },
            run: None,
            iommu: IommuMode::default(),
            iova: 1 << 32,
            capture: Limits::default(),
        }
    }
}

/// How a front-end uses its virtio-iommu.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IommuMode {
    /// Rings and buffers are mapped once.
    #[default]
    Static,
    /// Each buffer is mapped while the device has it, one request at a time.
    Dynamic,
    /// The same, one notification for all buffers of a burst.
    Batch,
    /// As [`IommuMode::Static`], but nothing is attached or mapped until a command says so.
    Manual,
}

impl IommuMode {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "static" => Some(Self::Static),
            "dynamic" => Some(Self::Dynamic),
            "batch" => Some(Self::Batch),
            "manual" => Some(Self::Manual),
            _ => None,
        }
    }
}

impl Boot {
    /// Parses the command line; each word that is not understood is handed to `unknown`.
    pub fn parse<'a>(line: &'a str, mut unknown: impl FnMut(&'a str)) -> Self {
        let mut boot = Self::default();
        let mut run = Run::default();
        let mut work = None;
        for word in line.split_ascii_whitespace() {
            let understood = match word.split_once('=') {
                Some(("tsc_khz", value)) => number(value).map(|n| boot.tsc_khz = n).is_some(),
                Some(("ecam", value)) => number(value).map(|n| boot.ecam = n).is_some(),
                Some(("dma", value)) => number(value).map(|n| boot.dma.0 = n).is_some(),
                Some(("dma_len", value)) => number(value).map(|n| boot.dma.1 = n).is_some(),
                Some(("tx", shape)) => tx_shape(shape).map(|tx| boot.shape.tx = tx).is_some(),
                Some(("rx_buffer", value)) => number(value)
                    .and_then(|n| u16::try_from(n).ok())
                    .filter(|n| (MIN_RX_BUFFER..=Shape::default().rx_buffer).contains(n))
                    .map(|n| boot.shape.rx_buffer = n)
                    .is_some(),
                Some(("iommu", mode)) => IommuMode::parse(mode)
                    .map(|mode| boot.iommu = mode)
                    .is_some(),
                Some(("iova", value)) => number(value).map(|n| boot.iova = n).is_some(),
                Some(("queues", value)) => queues(value)
                    .map(|n| (boot.queues, run.queues) = (n, n))
                    .is_some(),
                Some(("indirect", value)) => {
                    on_off(value).map(|on| boot.offer.indirect = on).is_some()
                }
                Some(("rss", value)) => on_off(value).map(|on| boot.offer.rss = on).is_some(),
                Some(("capture", value)) => number(value)
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|&n| n <= MAX_FRAMES)
                    .map(|n| boot.capture.frames = n)
                    .is_some(),
                Some(("snaplen", value)) => number(value)
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|n| (1..=MAX_SNAPLEN).contains(n))
                    .map(|n| boot.capture.snaplen = n)
                    .is_some(),
                Some(("work", "control")) => true,
                Some(("work", name)) => Work::parse(name)
                    .map(|parsed| work = Some(parsed))
                    .is_some(),
                _ => run.set(word).is_ok(),
            };
            if !understood {
                unknown(word);
            }
        }
        boot.run = work.map(|work| Run { work, ..run });
        boot
    }
}

/// How frames to send are given to the device, by name.
fn tx_shape(name: &str) -> Option<TxShape> {
    match name {
        "direct" => Some(TxShape::Direct),
        "chain" => Some(TxShape::Chain),
        "indirect" => Some(TxShape::Indirect),
        _ => None,
    }
}

//! What stands between the front-end's memory and the window: the flags that `pair` and `bench` share.

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::rings::Switch;

/// Whether the front-end's network device is behind a virtio-iommu, and how its guest uses that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Iommu {
    /// There is none: the window shows all of the front-end's memory
    #[default]
    Off,
    /// Rings and buffers are mapped once
    Static,
    /// Each buffer is mapped for the time that the device has it, one request at a time
    Dynamic,
    /// The same, with one notification for the requests of a burst
    Batch,
}

impl Iommu {
    /// As it is written on the command lines and in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Static => "static",
            Self::Dynamic => "dynamic",
            Self::Batch => "batch",
        }
    }

    /// Whether windows come and go with every frame.
    pub fn per_frame(self) -> bool {
        matches!(self, Self::Dynamic | Self::Batch)
    }
}

/// Which of the two VMs has a virtio-iommu.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Iommus {
    /// The front-end's.
    pub front: Iommu,
    /// Whether the back-end has one for its own devices.
    pub back: bool,
}

impl Iommus {
    /// What `run` is told, for the back-end (0) or the front-end (1).
    pub fn run_flag(self, side: usize) -> Option<&'static str> {
        let there = if side == 0 {
            self.back
        } else {
            self.front != Iommu::Off
        };
        there.then_some("--iommu=")
    }

    /// What the guest of that side finds on its command line.
    pub fn guest_words(self, side: usize) -> String {
        if side == 1 && self.front != Iommu::Off {
            return format!("iommu={}", self.front.name());
        }
        String::new()
    }
}

/// For the back-end's own devices.
#[derive(Clone, Debug, Args)]
pub struct BackArgs {
    /// Give the back-end VM a virtio-iommu of its own, for the control queues of its vhost-pci device
    #[arg(
        long,
        value_enum,
        value_name = "on|off",
        default_value = "off",
        hide_possible_values = true
    )]
    pub iommu_back: Switch,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vm_is_told_of_its_own_iommu_only() {
        let both = Iommus {
            front: Iommu::Batch,
            back: true,
        };
        assert_eq!(
            [0, 1].map(|side| both.run_flag(side)),
            [Some("--iommu="); 2]
        );
        assert_eq!(both.guest_words(0), "");
        assert_eq!(both.guest_words(1), "iommu=batch");
        let none = Iommus::default();
        assert_eq!([0, 1].map(|side| none.run_flag(side)), [None; 2]);
        assert_eq!(none.guest_words(1), "");
    }

    #[test]
    fn names_are_what_the_command_line_takes() {
        for iommu in Iommu::value_variants() {
            let name = iommu.to_possible_value().unwrap();
            assert_eq!(name.get_name(), iommu.name());
            assert_eq!(serde_json::to_value(iommu).unwrap(), iommu.name());
        }
    }
}

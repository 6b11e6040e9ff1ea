//! The two ends as workloads see them.

use bare_metal::Link;
use bare_metal::frame::End;
use bare_metal::workload::Stopped;
use guest_driver::net::{NetDevice, NetDevicePort};
use guest_driver::vhost_pci::{Link as Change, VhostPci, VhostPciPort};
use guest_driver::virtio_pci;

use crate::arch::{self, event};
use crate::error;
use crate::machine::Machine;

/// What the main loop needs beside what a workload needs.
pub trait Connection: Link {
    /// Whether there is a connection that can carry frames.
    fn is_up(&self) -> bool;
    /// What was negotiated.
    fn features(&self) -> u64;
    /// Its name in records.
    fn role(&self) -> &'static str {
        match self.end() {
            End::FrontEnd => "front-end",
            End::BackEnd => "back-end",
        }
    }
    /// The real reason why a workload could not go on: the window of a peer that is gone reads as a broken ring, a moment before
    /// the device says that it is gone.
    fn explain(&mut self, why: Stopped) -> Stopped {
        let until = arch::now() + GRACE_MS * self.ticks_per_ms();
        while self.is_up() && arch::now() < until {
            sleep(until);
            self.service();
        }
        if self.is_up() { why } else { Stopped::Down }
    }
    /// A workload could not go on.
    fn stopped(&mut self, why: Stopped);
    /// Resets the rings and starts them anew.
    fn reset_rings(&mut self) -> Result<(), virtio_pci::Error> {
        Err(virtio_pci::Error::Features)
    }
}

/// How long a device may take to say that its peer is gone.
const GRACE_MS: u64 = 100;

/// Sleeps until an interrupt or a time. Events are cleared afterwards, never before: one that came since the caller
/// looked at its rings must end the sleep.
fn sleep(until: u64) {
    arch::arm_timer(until);
    arch::sleep();
    arch::take_events(event::QUEUE | event::TIMER);
}

/// The virtio-net driver's end.
pub struct FrontEnd<'a> {
    machine: &'a Machine,
    /// Absent where it could not be set up again.
    device: Option<NetDevice>,
    up: bool,
    tsc_khz: u64,
}

impl<'a> FrontEnd<'a> {
    /// A device that was started.
    pub fn new(machine: &'a Machine, device: NetDevice, tsc_khz: u64) -> Self {
        let up = device.link_up();
        Self {
            machine,
            device: Some(device),
            up,
            tsc_khz,
        }
    }

    /// Looks at the device, and sets it up again where it asks for that.
    fn look(&mut self) {
        let Some(device) = self.device.take() else {
            return;
        };
        let device = if device.needs_reset() {
            match device.restart(self.machine) {
                Ok(device) => device,
                Err(why) => {
                    error(format_args!("virtio-net: {why}"));
                    self.up = false;
                    return;
                }
            }
        } else {
            device
        };
        self.up = device.link_up();
        self.device = Some(device);
    }
}

impl Link for FrontEnd<'_> {
    type Port = NetDevicePort;

    fn end(&self) -> End {
        End::FrontEnd
    }

    fn port(&mut self) -> Option<&mut Self::Port> {
        let device = self.device.as_mut().filter(|_| self.up)?;
        Some(&mut device.port)
    }

    fn service(&mut self) {
        if arch::take_events(event::CONFIG) != 0 {
            self.look();
        }
    }

    fn sleep(&mut self, until: u64) {
        sleep(until);
    }

    fn now(&self) -> u64 {
        arch::now()
    }

    fn ticks_per_ms(&self) -> u64 {
        self.tsc_khz
    }
}

impl Connection for FrontEnd<'_> {
    fn is_up(&self) -> bool {
        self.up
    }

    fn features(&self) -> u64 {
        self.device.as_ref().map_or(0, NetDevice::features)
    }

    fn stopped(&mut self, why: Stopped) {
        // A broken ring stays broken until the device is set up anew.
        self.up &= !matches!(why, Stopped::Ring(_));
    }

    fn reset_rings(&mut self) -> Result<(), virtio_pci::Error> {
        let device = self.device.as_mut().ok_or(virtio_pci::Error::Reset)?;
        device.reset_rings()?;
        self.up = device.link_up();
        Ok(())
    }
}

/// The vhost-pci driver's end.
pub struct BackEnd {
    device: VhostPci,
    up: bool,
    tsc_khz: u64,
}

impl BackEnd {
    /// A device that was started.
    pub fn new(device: VhostPci, tsc_khz: u64) -> Self {
        Self {
            device,
            up: false,
            tsc_khz,
        }
    }
}

impl Link for BackEnd {
    type Port = VhostPciPort;

    fn end(&self) -> End {
        End::BackEnd
    }

    fn port(&mut self) -> Option<&mut Self::Port> {
        self.device.port()
    }

    fn service(&mut self) {
        match self.device.service(arch::take_events(event::CONFIG) != 0) {
            Ok(Change::Same) => {}
            Ok(Change::Up) => self.up = true,
            Ok(Change::Down) => self.up = false,
            Err(why) => {
                error(format_args!("vhost-pci: {why}"));
                self.up = false;
            }
        }
    }

    fn sleep(&mut self, until: u64) {
        sleep(until);
    }

    fn now(&self) -> u64 {
        arch::now()
    }

    fn ticks_per_ms(&self) -> u64 {
        self.tsc_khz
    }
}

impl Connection for BackEnd {
    fn is_up(&self) -> bool {
        self.up
    }

    fn features(&self) -> u64 {
        self.device.features()
    }

    fn stopped(&mut self, why: Stopped) {
        if let Stopped::Ring(_) = why {
            self.device.give_up();
        }
        self.up = false;
    }
}

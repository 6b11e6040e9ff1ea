//! The two ends as workloads see them.

use bare_metal::frame::End;
use bare_metal::study::windows::{Churn, Churned, Ground, MIN_PAGES};
use bare_metal::workload::Stopped;
use bare_metal::{Link, Study};
use guest_driver::mapper::Mapper;
use guest_driver::net::{NetDevice, NetDevicePort};
use guest_driver::net_port::Shape;
use guest_driver::pci::Function;
use guest_driver::translated::Translated;
use guest_driver::vhost_pci::{Link as Change, VhostPci, VhostPciPort};
use guest_driver::virtio_iommu::{self, status_of};
use guest_driver::{Platform, virtio_pci};
use virtqueue::rss;

use crate::arch::{self, event};
use crate::console;
use crate::error;
use crate::machine::Machine;
use crate::print;
use crate::study::{self, Pages};

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
            self.attend();
        }
        if self.is_up() { why } else { Stopped::Down }
    }
    /// Looks after the device where no workload runs.
    fn attend(&mut self) {
        self.service();
        self.gone();
    }
    /// A workload could not go on.
    fn stopped(&mut self, why: Stopped);
    /// Resets the rings and starts them anew.
    fn reset_rings(&mut self) -> Result<(), virtio_pci::Error> {
        Err(virtio_pci::Error::Features)
    }
    /// Resets the device and sets it up anew.
    fn reset_device(&mut self) -> Result<(), virtio_pci::Error> {
        Err(virtio_pci::Error::Features)
    }
    /// Carries out a step of the isolation study and reports it.
    fn study(&mut self, step: &Study);
}

/// How long a device may take to say that its peer is gone.
const GRACE_MS: u64 = 100;

/// Sleeps until an interrupt or a time. Events are cleared afterwards, never before: one that came since the caller
/// looked at its rings must end the sleep.
fn sleep(until: u64) {
    arch::arm_timer(until);
    // An interrupt for input that has been read meanwhile would end every sleep of a workload that does not look at commands.
    if console::command_waits() {
        arch::note_event(event::CONTROL);
    }
    arch::sleep();
    arch::take_events(event::QUEUE | event::TIMER);
}

/// The virtio-net driver's end.
pub struct FrontEnd<'a, M> {
    pub machine: &'a Machine,
    pub platform: &'a Translated<'a, Machine>,
    function: Function,
    shape: Shape,
    mapper: M,
    attached: bool,
    /// Absent before it is started, and where it could not be set up again.
    pub device: Option<NetDevice<M>>,
    up: bool,
    /// The device's configuration changed, and was not looked at since.
    changed: bool,
    tsc_khz: u64,
    /// What experiments have.
    pub pages: Pages,
    ground: Option<Ground>,
    churn: Option<Churn>,
    /// How many queue pairs to set up.
    queues: u16,
    flips: Option<Flips>,
}

/// Queue pairs that go out of use and come back.
struct Flips {
    /// How many there are when all are in use.
    pairs: usize,
    /// Ticks from one change to the next, and when that is.
    every: u64,
    next: u64,
    /// How many changes there have been.
    done: u64,
}

impl Flips {
    fn report(&self) {
        let done = self.done;
        print!("guest: pairs went out of use or came back {done} times");
    }
}

/// Why a network device could not be started.
pub enum NotStarted {
    /// The IOMMU refused something.
    Iommu(virtio_iommu::Error),
    /// The device refused something.
    Device(virtio_pci::Error),
}

/// Bytes behind the windows that come and go, where pages are small.
const GROUND: u64 = 1 << 20;

impl<'a, M: Mapper> FrontEnd<'a, M> {
    /// A device that is not touched yet.
    pub fn new(
        machine: &'a Machine,
        platform: &'a Translated<'a, Machine>,
        function: Function,
        (shape, mapper): (Shape, M),
        (queues, tsc_khz): (u16, u64),
    ) -> Self {
        Self {
            machine,
            platform,
            function,
            shape,
            mapper,
            attached: false,
            device: None,
            up: false,
            changed: false,
            tsc_khz,
            pages: Pages::default(),
            ground: None,
            churn: None,
            queues,
            flips: None,
        }
    }

    /// Attaches the endpoint or detaches it. Returns the status.
    pub fn attach(&mut self, attach: bool) -> u16 {
        let Some(behind) = self.platform.behind() else {
            return u16::from(virtio_iommu::status::UNSUPP);
        };
        let status = status_of(match attach {
            true => behind.attach(),
            false => behind.detach(),
        });
        if status == u16::from(virtio_iommu::status::OK) {
            self.attached = attach;
        }
        status
    }

    /// Sets the device up, behind the IOMMU where there is one.
    pub fn start(&mut self) -> Result<(), NotStarted> {
        if self.device.is_some() {
            return Ok(());
        }
        if let Some(behind) = self.platform.behind()
            && !self.attached
        {
            match behind.attach() {
                Ok(virtio_iommu::status::OK) => self.attached = true,
                Ok(status) => {
                    return Err(NotStarted::Iommu(virtio_iommu::Error::Refused(status)));
                }
                Err(error) => return Err(NotStarted::Iommu(error)),
            }
        }
        let memory = self.machine.memory(self.platform.offset());
        let parts = (self.shape, self.mapper.clone());
        let device = NetDevice::new(self.platform, self.function, memory, parts, self.queues)
            .map_err(|error| match (error, self.platform.take_refusal()) {
                (virtio_pci::Error::Iommu(error), _) | (_, Some(error)) => NotStarted::Iommu(error),
                (error, None) => NotStarted::Device(error),
            })?;
        self.up = device.link_up();
        self.device = Some(device);
        Ok(())
    }

    /// Where windows for experiments lie; `None` without an IOMMU, or without memory.
    pub fn ground(&mut self) -> Option<Ground> {
        if self.ground.is_none() {
            let behind = self.platform.behind()?;
            let page = behind.granule();
            let pages = (GROUND / page).max(MIN_PAGES);
            let size = usize::try_from(page).ok()?;
            let dma = self
                .machine
                .dma(size * usize::try_from(pages).ok()?, size)?;
            let (_, last) = behind.iommu.try_borrow().ok()?.config().input_range;
            self.ground = Some(Ground {
                domain: behind.domain,
                page,
                gpa: dma.addr,
                pages,
                end: last.saturating_add(1) & !(page - 1),
            });
        }
        self.ground
    }

    /// Looks at the device, and sets it up again where it asks for that.
    fn look(&mut self) {
        let Some(device) = self.device.take() else {
            return;
        };
        let device = if device.needs_reset() {
            match device.restart(self.platform) {
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

impl<M: Mapper> Link for FrontEnd<'_, M> {
    type Port = NetDevicePort<M>;

    const CLOCK_EVERY: u32 = if M::DYNAMIC { 1 } else { 16 };

    fn end(&self) -> End {
        End::FrontEnd
    }

    fn port(&mut self) -> Option<&mut Self::Port> {
        let device = self.device.as_mut().filter(|_| self.up)?;
        device.port()
    }

    #[inline(always)]
    fn pair(&mut self, index: usize) -> Option<&mut Self::Port> {
        let device = self.device.as_mut().filter(|_| self.up)?;
        device.pair(index)
    }

    fn rss(&self) -> Option<rss::Config> {
        self.device.as_ref()?.rss().copied()
    }

    fn set_rss(&mut self, config: &rss::Config) -> bool {
        let device = self.device.as_mut();
        let result = device.map(|device| device.set_rss(config));
        if let Some(Err(why)) = result {
            error(format_args!("rss: {why}"));
        }
        result == Some(Ok(()))
    }

    fn use_pairs(&mut self, count: usize) -> bool {
        let Some(device) = &mut self.device else {
            return false;
        };
        match device.use_pairs(count) {
            Ok(()) => true,
            Err(why) => {
                error(format_args!("{count} queue pairs: {why}"));
                false
            }
        }
    }

    fn start_flips(&mut self, pairs: usize, hz: u64) -> bool {
        let every = 1000 * self.tsc_khz / hz.max(1);
        let next = arch::now() + every;
        self.flips = Some(Flips {
            pairs,
            every,
            next,
            done: 0,
        });
        true
    }

    fn end_flips(&mut self) {
        if let Some(flips) = self.flips.take() {
            flips.report();
            self.use_pairs(flips.pairs);
        }
    }

    fn service(&mut self) {
        self.changed |= arch::take_events(event::CONFIG) != 0;
    }

    #[inline(always)]
    fn gone(&mut self) -> bool {
        if self.changed {
            // What a peer that left put into pairs that are out of use counts, too: they come back first.
            if self.flips.is_some() {
                self.end_flips();
                return false;
            }
            self.changed = false;
            self.look();
        }
        !self.up
    }

    fn called(&mut self) -> bool {
        console::command_waits()
    }

    fn sleep(&mut self, until: u64) {
        let flip = self.flips.as_ref().map_or(until, |flips| flips.next);
        sleep(until.min(flip));
    }

    fn now(&self) -> u64 {
        arch::now()
    }

    fn ticks_per_ms(&self) -> u64 {
        self.tsc_khz
    }

    fn start_churn(&mut self, hz: u64) -> bool {
        let Some(ground) = self.ground() else {
            return false;
        };
        self.churn = Some(Churn::new(ground, hz, self.tsc_khz, arch::now()));
        true
    }

    #[inline(always)]
    fn beside(&mut self, now: u64) {
        if let Some(flips) = &mut self.flips
            && now >= flips.next
            && let Some(device) = self.device.as_mut().filter(|_| self.up)
        {
            let count = match device.pair(1) {
                Some(_) => 1,
                None => flips.pairs,
            };
            match device.use_pairs(count) {
                // From its end on: the workload gets its time in between.
                Ok(()) => {
                    flips.next = arch::now() + flips.every;
                    flips.done += 1;
                }
                Err(why) => {
                    error(format_args!("{count} queue pairs: {why}"));
                    flips.report();
                    self.flips = None;
                }
            }
        }
        if let Some(churn) = &mut self.churn
            && let Some(behind) = self.platform.behind()
            && let Ok(mut iommu) = behind.iommu.try_borrow_mut()
        {
            churn.beside(&mut *iommu, now);
        }
    }

    fn end_churn(&mut self) -> Option<Churned> {
        let behind = self.platform.behind()?;
        let mut iommu = behind.iommu.try_borrow_mut().ok()?;
        Some(self.churn.take()?.end(&mut *iommu, arch::now))
    }
}

impl<M: Mapper> Connection for FrontEnd<'_, M> {
    fn is_up(&self) -> bool {
        self.up
    }

    fn features(&self) -> u64 {
        self.device.as_ref().map_or(0, |device| device.features())
    }

    fn stopped(&mut self, why: Stopped) {
        // A broken ring stays broken until the device is set up anew.
        self.up &= !matches!(why, Stopped::Port(_));
    }

    fn reset_rings(&mut self) -> Result<(), virtio_pci::Error> {
        let device = self.device.as_mut().ok_or(virtio_pci::Error::Reset)?;
        device.reset_rings()?;
        self.up = device.link_up();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<(), virtio_pci::Error> {
        self.up = false;
        let device = self.device.take().ok_or(virtio_pci::Error::Reset)?;
        let device = device.restart(self.platform)?;
        self.up = device.link_up();
        self.device = Some(device);
        Ok(())
    }

    fn study(&mut self, step: &Study) {
        study::front_end(self, step);
    }
}

/// The vhost-pci driver's end.
pub struct BackEnd<'a> {
    pub machine: &'a Machine,
    pub device: VhostPci,
    /// What experiments have.
    pub pages: Pages,
    up: bool,
    tsc_khz: u64,
}

impl<'a> BackEnd<'a> {
    /// A device that was started.
    pub fn new(machine: &'a Machine, device: VhostPci, tsc_khz: u64) -> Self {
        Self {
            machine,
            device,
            pages: Pages::default(),
            up: false,
            tsc_khz,
        }
    }
}

impl Link for BackEnd<'_> {
    type Port = VhostPciPort;

    fn end(&self) -> End {
        End::BackEnd
    }

    fn port(&mut self) -> Option<&mut Self::Port> {
        self.device.port()
    }

    #[inline(always)]
    fn pair(&mut self, index: usize) -> Option<&mut Self::Port> {
        self.device.pair(index)
    }

    fn use_pairs(&mut self, count: usize) -> bool {
        count <= self.device.pairs()
    }

    #[inline(always)]
    fn steer(&self, headers: &[u8]) -> Option<usize> {
        self.device.steer(headers)
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

    fn called(&mut self) -> bool {
        console::command_waits()
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

impl Connection for BackEnd<'_> {
    fn is_up(&self) -> bool {
        self.up
    }

    fn features(&self) -> u64 {
        self.device.features()
    }

    fn stopped(&mut self, why: Stopped) {
        if let Stopped::Port(_) = why {
            self.device.give_up();
        }
        self.up = false;
    }

    fn study(&mut self, step: &Study) {
        study::back_end(self, step);
    }
}

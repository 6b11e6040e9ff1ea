//! Putting a VM together, running it, and taking it apart.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use devices::host::Host;
use devices::pci::PciRoot;
use devices::vhost_pci::{VhostPci, VhostPciConfig};
use devices::vhost_user::SocketRole;
use devices::virtio::{VirtioDevice, VirtioPci};
use devices::virtio_blk::VirtioBlk;
use devices::virtio_iommu::{Endpoint, IommuConfig, VirtioIommu};
use devices::virtio_net::tap::TapNet;
use devices::virtio_net::{NetConfig, VirtioNet};
use devices::virtio_rng::VirtioRng;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use log::{debug, info, warn};

use crate::acpi::{self, Description, Translated};
use crate::boot::{self, Kernel};
use crate::bus::Bus;
use crate::capture::Recorder;
use crate::console::{ConsoleOutput, RawTerminal, Stdin};
use crate::control::{Control, ControlOutput, Outbox, Stats};
use crate::host::{Machine, open_kvm};
use crate::layout;
use crate::memory::Memory;
use crate::metrics::{Group, Reports, Server, Sources};
use crate::sandbox::Thread;
use crate::serial::{COM1_IRQ, COM2_IRQ, Uart, line};
use crate::signals::{Signals, wait_readable};
use crate::stats::VcpuStats;
use crate::stop::Stop;
use crate::sys::{context, kvm};
use crate::vcpu::{self, MAX_VCPUS, Vcpus};
use crate::{Console, Error, Outcome, VmConfig};

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Boots the VM and runs it until the guest powers off or resets, a fault, or SIGTERM, SIGINT, SIGHUP or SIGQUIT. (Where the
/// VM has network devices, it starts once each has met its back-end.)
///
/// The calling thread should be the process' first: the signals are blocked in it, and in the threads that it starts
/// from here on, until this returns; a thread that was there before and does not block them would take them.
pub fn run(config: VmConfig) -> Result<Outcome, Error> {
    check(&config)?;
    let signals = Signals::block()?;
    let seccomp = config.seccomp;
    seccomp.prepare();
    let stop = Arc::new(Stop::new()?);

    let kvm_fd = open_kvm()?;
    let memory = Memory::new(&config.memory)?;
    let machine = Arc::new(Machine::new(&kvm_fd, memory)?);
    let mut subscribers: Vec<Subscriber> = Vec::new();
    let devices = Devices::new(&machine, &config, &mut subscribers)?;
    let pci = Arc::new(PciRoot::new());

    let vm = machine.vm();
    let com1 = Uart::new(line(vm, COM1_IRQ)?, ConsoleOutput(Arc::clone(&stop)))?;
    let outbox = config.control.map(Outbox::new).transpose()?;
    let metrics = config.metrics.as_ref().map(Server::open).transpose()?;
    let reports = metrics.as_ref().map(|_| Arc::new(Reports::default()));
    let capture = config.capture.as_ref().map(Recorder::open).transpose()?;
    let control_output = ControlOutput {
        outbox: outbox.clone(),
        reports: reports.clone(),
        capture: capture
            .as_ref()
            .map(|opened| opened.listener(machine.memory())),
    };
    let com2 = Uart::new(line(vm, COM2_IRQ)?, control_output)?;
    let bus = Arc::new(Bus {
        pci: Arc::clone(&pci),
        com1: Arc::new(com1),
        com2: Arc::new(com2),
    });

    let mut vcpus = Vec::new();
    let mut stats = Vec::new();
    for id in 0..config.vcpus {
        let fd = vm
            .create_vcpu(id.into())
            .map_err(|e| kvm("KVM_CREATE_VCPU", e))?;
        vcpu::set_up(vm, machine.cpuid(), &fd, id, config.vcpus)?;
        let counters = Arc::new(VcpuStats::new(&fd));
        stats.push(Arc::clone(&counters));
        vcpus.push((fd, counters));
    }
    if let Some((first, _)) = vcpus.first() {
        let mut cmdline = config.cmdline;
        if let Kernel::Image(_) = config.kernel {
            let khz = first.get_tsc_khz().map_err(|e| kvm("KVM_GET_TSC_KHZ", e))?;
            cmdline.push_str(&format!(" tsc_khz={khz} ecam={:#x}", layout::ECAM_BASE));
            let (dma, len) = machine.dma();
            if len > 0 {
                cmdline.push_str(&format!(" dma={dma:#x} dma_len={len:#x}"));
            }
        }
        let initrd = config.initrd.as_deref();
        let entry = boot::load(
            machine.memory(),
            machine.ram_size(),
            &config.kernel,
            initrd,
            &cmdline,
        )?;
        boot::set_registers(first, entry)?;
    }

    // Everything is open from here on. The threads inherit it.
    let metrics_socket = config.metrics.as_ref().and_then(|m| m.target.socket());
    let mut sockets = listening(&config.net, &config.vhost_pci);
    sockets.extend(metrics_socket.cloned());
    seccomp.close_files(&sockets)?;
    let vcpus = Vcpus::spawn(vcpus, &config.affinity, &bus, &machine, &stop, seccomp)?;
    let terminal = if config.console == Console::Stdio {
        let terminal = RawTerminal::new()?;
        subscribers.push(Box::new(Stdin::new(
            Arc::clone(&bus.com1),
            Arc::clone(&stop),
            terminal.is_some(),
        )));
        terminal
    } else {
        None
    };
    let metrics_sources = reports.map(|guest| Sources {
        vcpus: stats.clone(),
        devices: groups(devices.clone()),
        guest,
        started: Instant::now(),
    });
    if let Some(outbox) = &outbox {
        let stats = stats_record(stats, devices.clone());
        subscribers.push(Box::new(Control::new(
            Arc::clone(outbox),
            Arc::clone(&bus.com2),
            stats,
        )));
    }
    let device_thread = DeviceThread::spawn("devices".into(), subscribers, &stop, move || {
        seccomp.enter(Thread::Devices)
    })?;
    let mut disk_threads = Vec::new();
    for (index, disk) in devices.disks.iter().enumerate() {
        let subscribers = vec![disk.device.file_subscriber()];
        let name = format!("disk{index}");
        disk_threads.push(DeviceThread::spawn(name, subscribers, &stop, move || {
            seccomp.enter(Thread::Disk)
        })?);
    }
    let mut tap_threads = Vec::new();
    for tap in &devices.taps {
        let name = tap.socket.display().to_string();
        let subscribers = vec![tap.device.subscriber()];
        tap_threads.push(DeviceThread::spawn(name, subscribers, &stop, move || {
            seccomp.enter(Thread::Tap)
        })?);
    }

    let metrics = metrics.zip(metrics_sources);
    let metrics = metrics
        .map(|(opened, sources)| Server::spawn(opened, sources, &stop, seccomp))
        .transpose()?;
    let capture = capture
        .map(|opened| Recorder::spawn(opened, seccomp))
        .transpose()?;
    seccomp.enter(Thread::Main)?;
    let result = supervise(&stop, &signals, &devices, || {
        let translated = plug(&machine, &pci, &devices)?;
        let description = Description {
            vcpus: config.vcpus,
            window64: machine.pci_window64()?,
            translated,
        };
        acpi::write(machine.memory(), &description)?;
        vcpus.run();
        Ok(())
    });
    if let Err(error) = result {
        stop.end(Err(error));
    }
    drop(vcpus);
    drop(device_thread);
    drop(tap_threads);
    drop(metrics);
    drop(capture);
    drop(disk_threads);
    if let Some(outbox) = outbox {
        outbox.finish();
    }
    drop(terminal);
    stop.take()
        .unwrap_or_else(|| Err(Error::DeviceThread("without a reason".into())))
}

/// The sockets that are the VM's to remove.
fn listening(net: &[NetConfig], vhost_pci: &[VhostPciConfig]) -> Vec<PathBuf> {
    let net = net.iter().map(|net| (net.role, &net.socket));
    let vhost_pci = vhost_pci.iter().map(|v| (v.role, &v.socket));
    net.chain(vhost_pci)
        .filter(|(role, _)| *role == SocketRole::Listen)
        .map(|(_, socket)| socket.clone())
        .collect()
}

/// Waits for the back-ends, lets the guest run with `start`, and returns when the VM has been told to end.
fn supervise(
    stop: &Stop,
    signals: &Signals,
    devices: &Devices,
    start: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    let ends = [signals.as_raw_fd(), stop.event().as_raw_fd()];
    for net in &devices.net {
        info!("waiting for the back-end at {}", net.socket.display());
        let ready = net.device.ready();
        while !ended(stop, signals) && ready.read().is_err() {
            wait_readable(&[ends[0], ends[1], ready.as_raw_fd()], -1)?;
        }
    }
    if !ended(stop, signals) {
        start()?;
    }
    while !ended(stop, signals) {
        wait_readable(&ends, -1)?;
    }
    Ok(())
}

fn ended(stop: &Stop, signals: &Signals) -> bool {
    if let Some(signal) = signals.take() {
        stop.end(Ok(Outcome::Signal(signal)));
    }
    stop.requested()
}

fn check(config: &VmConfig) -> Result<(), Error> {
    if config.iommu.is_some() && !config.taps.is_empty() {
        return Err(Error::Config(
            "a network device over a tap cannot be behind a virtio-iommu".into(),
        ));
    }
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(Error::Config(format!(
            "{} vCPUs: choose 1 to {MAX_VCPUS}",
            config.vcpus
        )));
    }
    let (cores, vcpus) = (config.affinity.len(), usize::from(config.vcpus));
    if cores != 0 && cores != vcpus {
        return Err(Error::Config(format!(
            "{cores} cores given for {vcpus} vCPUs: give one core for each, or none"
        )));
    }
    Ok(())
}

/// A device with its socket, or what it has in place of one, and what it is to the IOMMU where there is one.
struct Attached<D> {
    socket: PathBuf,
    device: Arc<D>,
    endpoint: Option<Arc<Endpoint>>,
}

impl<D> Clone for Attached<D> {
    fn clone(&self) -> Self {
        Self {
            socket: self.socket.clone(),
            device: Arc::clone(&self.device),
            endpoint: self.endpoint.clone(),
        }
    }
}

#[derive(Clone)]
struct Devices {
    /// All the others are behind it.
    iommu: Option<Arc<VirtioIommu>>,
    net: Vec<Attached<VirtioNet>>,
    /// With the interface in place of a socket.
    taps: Vec<Attached<TapNet>>,
    /// With the file.
    disks: Vec<Attached<VirtioBlk>>,
    /// With its name.
    rng: Option<Attached<VirtioRng>>,
    vhost_pci: Vec<Attached<VhostPci>>,
}

impl Devices {
    fn new(
        machine: &Arc<Machine>,
        config: &VmConfig,
        subscribers: &mut Vec<Subscriber>,
    ) -> Result<Self, Error> {
        let host = || Arc::clone(machine) as Arc<dyn Host>;
        let endpoint = || {
            let wanted = config.iommu.map(|_| Endpoint::new());
            wanted.transpose().map_err(|e| context("an eventfd", e))
        };
        let mut devices = Devices {
            iommu: None,
            net: Vec::new(),
            taps: Vec::new(),
            disks: Vec::new(),
            rng: None,
            vhost_pci: Vec::new(),
        };
        if let Some(iommu) = config.iommu {
            // A part of a huge page could not be shown.
            let page_size = config.memory.hugepages.page_size();
            let iommu = VirtioIommu::new(IommuConfig { page_size, ..iommu }, host())?;
            subscribers.push(iommu.subscriber());
            devices.iommu = Some(iommu);
        }
        for net in &config.net {
            let (socket, endpoint) = (net.socket.clone(), endpoint()?);
            let device = match VirtioNet::new(net.clone(), endpoint.clone(), host()) {
                Ok(device) => device,
                Err(source) => return Err(Error::Net { socket, source }),
            };
            subscribers.push(device.subscriber());
            devices.net.push(Attached {
                socket,
                device,
                endpoint,
            });
        }
        for tap in &config.taps {
            let name = tap.name.clone();
            let device = match TapNet::new(tap.clone(), host()) {
                Ok(device) => device,
                Err(source) => return Err(Error::Tap { name, source }),
            };
            devices.taps.push(Attached {
                socket: name.into(),
                device,
                endpoint: None,
            });
        }
        for disk in &config.disks {
            let (path, endpoint) = (disk.path.clone(), endpoint()?);
            let device = match VirtioBlk::new(disk, endpoint.clone(), host()) {
                Ok(device) => device,
                Err(source) => return Err(Error::Disk { path, source }),
            };
            subscribers.push(device.subscriber());
            devices.disks.push(Attached {
                socket: path,
                device,
                endpoint,
            });
        }
        if config.rng {
            let endpoint = endpoint()?;
            let device = VirtioRng::new(endpoint.clone(), host());
            let device = device.map_err(|e| context("virtio-rng", e))?;
            subscribers.push(device.subscriber());
            devices.rng = Some(Attached {
                socket: "virtio-rng".into(),
                device,
                endpoint,
            });
        }
        for vhost_pci in &config.vhost_pci {
            let (socket, endpoint) = (vhost_pci.socket.clone(), endpoint()?);
            let device = match VhostPci::new(vhost_pci.clone(), endpoint.clone(), host()) {
                Ok(device) => device,
                Err(source) => return Err(Error::VhostPci { socket, source }),
            };
            subscribers.push(device.subscriber());
            devices.vhost_pci.push(Attached {
                socket,
                device,
                endpoint,
            });
        }
        Ok(devices)
    }
}

/// Puts the devices on the bus, the IOMMU first: a driver that looks for functions in their order finds it before those behind it. Not
/// before the network devices have met their back-ends: what a function offers its driver is fixed when it is made, and the back-end has a
/// say in it. Returns which slots are behind the IOMMU.
fn plug(
    machine: &Arc<Machine>,
    pci: &PciRoot,
    devices: &Devices,
) -> Result<Option<Translated>, Error> {
    let host = || Arc::clone(machine) as Arc<dyn Host>;
    let mut iommu_slot = None;
    if let Some(iommu) = &devices.iommu {
        let device: Arc<dyn VirtioDevice> = Arc::clone(iommu) as _;
        let function = VirtioPci::new(device, host()).map_err(Error::IommuFunction)?;
        iommu_slot = Some(pci.add(function)?);
    }
    let mut translated: Option<Translated> = None;
    let net = devices.net.iter().map(|net| {
        let device: Arc<dyn VirtioDevice> = Arc::clone(&net.device) as _;
        (&net.socket, device, &net.endpoint)
    });
    let vhost_pci = devices.vhost_pci.iter().map(|vhost_pci| {
        let device: Arc<dyn VirtioDevice> = Arc::clone(&vhost_pci.device) as _;
        (&vhost_pci.socket, device, &vhost_pci.endpoint)
    });
    let taps = devices.taps.iter().map(|tap| {
        let device: Arc<dyn VirtioDevice> = Arc::clone(&tap.device) as _;
        (&tap.socket, device, &tap.endpoint)
    });
    let disks = devices.disks.iter().map(|disk| {
        let device: Arc<dyn VirtioDevice> = Arc::clone(&disk.device) as _;
        (&disk.socket, device, &disk.endpoint)
    });
    let rng = devices.rng.iter().map(|rng| {
        let device: Arc<dyn VirtioDevice> = Arc::clone(&rng.device) as _;
        (&rng.socket, device, &rng.endpoint)
    });
    let all = net.chain(taps).chain(vhost_pci).chain(disks).chain(rng);
    for (socket, device, endpoint) in all {
        let function = VirtioPci::new(device, host()).map_err(|source| Error::Virtio {
            socket: socket.clone(),
            source,
        })?;
        let slot = pci.add(function)?;
        if let (Some(iommu), Some(endpoint)) = (&devices.iommu, endpoint) {
            // Bus 0, function 0.
            let requester_id = u32::from(slot) << 3;
            iommu.add_endpoint(requester_id, Arc::clone(endpoint));
        }
        if let Some(iommu) = iommu_slot {
            // Slots are given out one after the other.
            let first = translated.map_or(slot, |t| *t.slots.start());
            let slots = first..=slot;
            translated = Some(Translated { iommu, slots });
        }
    }
    pci.assign_bars(layout::PCI_WINDOW32, machine.pci_window64()?)?;
    Ok(translated)
}

/// The fields of the record that answers `vmm stats`. Devices of a kind are added up.
fn stats_record(vcpus: Vec<Arc<VcpuStats>>, devices: Devices) -> Stats {
    Box::new(move || {
        let vcpus: Vec<String> = vcpus.iter().map(|v| v.to_json()).collect();
        let mut record = format!("\"vcpus\":[{}]", vcpus.join(","));
        if let Some(iommu) = &devices.iommu {
            let counters = std::iter::once(iommu_counters(&iommu.stats()));
            record += &format!(",\"iommu\":{}", object(counters));
        }
        if !devices.net.is_empty() {
            let all = devices
                .net
                .iter()
                .map(|net| net_counters(&net.device.stats()));
            record += &format!(",\"net\":{}", object(all));
        }
        if !devices.taps.is_empty() {
            let all = devices.taps.iter().map(|tap| tap.device.stats());
            record += &format!(",\"tap\":{}", object(all.map(|s| tap_counters(&s))));
        }
        if !devices.disks.is_empty() {
            let all = devices.disks.iter().map(|disk| disk.device.stats());
            record += &format!(",\"disk\":{}", object(all.map(|s| disk_counters(&s))));
        }
        let all = devices.vhost_pci.iter().map(|v| v.device.stats());
        // An empty window where there is no device.
        let all = all.chain([Default::default()]).map(|s| window_counters(&s));
        record += &format!(",\"window\":{}", object(all));
        record
    })
}

/// What is counted of each device, for `--metrics`.
fn groups(devices: Devices) -> Box<dyn Fn() -> Vec<Group> + Send> {
    Box::new(move || {
        let gauges = ["windows", "mappings"];
        let group = |kind, name: Option<&PathBuf>, all: &[(&'static str, u64)]| {
            let (gauges, counters) = all.iter().partition(|(name, _)| gauges.contains(name));
            Group {
                kind,
                name: name
                    .map(|name| name.display().to_string())
                    .unwrap_or_default(),
                counters,
                gauges,
                times: Vec::new(),
            }
        };
        let iommu = devices.iommu.iter();
        let mut all: Vec<Group> = iommu
            .map(|iommu| group("iommu", None, &iommu_counters(&iommu.stats())))
            .collect();
        for net in &devices.net {
            all.push(group(
                "net",
                Some(&net.socket),
                &net_counters(&net.device.stats()),
            ));
        }
        for tap in &devices.taps {
            all.push(group(
                "tap",
                Some(&tap.socket),
                &tap_counters(&tap.device.stats()),
            ));
        }
        for window in &devices.vhost_pci {
            let stats = window.device.stats();
            let times = vec![("map", stats.map), ("unmap", stats.unmap)];
            let of_connection = [
                ("messages_to_guest", stats.messages_to_guest),
                ("messages_to_peer", stats.messages_to_peer),
                ("dropped", stats.dropped),
                ("connections", stats.connections),
                ("peer_faults", stats.peer_faults),
            ];
            let counters = [&window_counters(&stats)[..], &of_connection].concat();
            all.push(Group {
                times,
                ..group("window", Some(&window.socket), &counters)
            });
        }
        all
    })
}

/// The sums of counters of the same names as a JSON object.
fn object<const N: usize>(all: impl Iterator<Item = [(&'static str, u64); N]>) -> String {
    let sums = all.reduce(|mut sums, counters| {
        for ((_, sum), (_, counter)) in sums.iter_mut().zip(counters) {
            *sum = sum.saturating_add(counter);
        }
        sums
    });
    let fields = sums.into_iter().flatten();
    let fields: Vec<String> = fields.map(|(name, n)| format!("\"{name}\":{n}")).collect();
    format!("{{{}}}", fields.join(","))
}

fn iommu_counters(stats: &devices::virtio_iommu::Stats) -> [(&'static str, u64); 17] {
    [
        ("attach", stats.attach),
        ("detach", stats.detach),
        ("map", stats.map),
        ("unmap", stats.unmap),
        ("probe", stats.probe),
        ("unknown", stats.unknown),
        ("errors", stats.errors),
        ("malformed", stats.malformed),
        ("mappings", stats.mappings),
        ("faults_reported", stats.faults_reported),
        ("faults_lost", stats.faults_lost),
        ("maps", stats.map_time.count),
        ("map_ns", stats.map_time.total_ns),
        ("map_waiting_ns", stats.map_time.waiting_ns),
        ("unmaps", stats.unmap_time.count),
        ("unmap_ns", stats.unmap_time.total_ns),
        ("unmap_waiting_ns", stats.unmap_time.waiting_ns),
    ]
}

fn net_counters(stats: &devices::virtio_net::Stats) -> [(&'static str, u64); 9] {
    [
        ("updates", stats.updates),
        ("invalidates", stats.invalidates),
        ("answered", stats.answered),
        ("answered_ns", stats.answered_ns),
        ("refused", stats.refused),
        ("timeouts", stats.timeouts),
        ("misses", stats.misses),
        ("misses_refused", stats.misses_refused),
        ("access_fails", stats.access_fails),
    ]
}

fn tap_counters(stats: &devices::virtio_net::tap::Stats) -> [(&'static str, u64); 4] {
    [
        ("sent", stats.sent),
        ("received", stats.received),
        ("sent_dropped", stats.sent_dropped),
        ("received_dropped", stats.received_dropped),
    ]
}

fn disk_counters(stats: &devices::virtio_blk::Stats) -> [(&'static str, u64); 4] {
    [
        ("reads", stats.reads),
        ("writes", stats.writes),
        ("flushes", stats.flushes),
        ("errors", stats.errors),
    ]
}

fn window_counters(stats: &devices::vhost_pci::Stats) -> [(&'static str, u64); 11] {
    [
        ("reads", stats.window_reads),
        ("writes", stats.window_writes),
        ("misses", stats.misses),
        ("misses_answered", stats.misses_answered),
        ("updates", stats.updates),
        ("invalidates", stats.invalidates),
        ("windows", stats.windows),
        ("maps", stats.map.count()),
        ("map_ns", stats.map.total_ns),
        ("unmaps", stats.unmap.count()),
        ("unmap_ns", stats.unmap.total_ns),
    ]
}

/// The thread that the devices, the console's input and the control channel live on; or that of a tap, or of a disk's file.
struct DeviceThread {
    stop: Arc<Stop>,
    handle: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// It calls `confine` when it has what it needs.
    fn spawn(
        name: String,
        subscribers: Vec<Subscriber>,
        stop: &Arc<Stop>,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<Self, Error> {
        let in_thread = Arc::clone(stop);
        let (set_up, was_set_up) = mpsc::channel();
        let handle = thread::Builder::new()
            .name(name)
            .spawn(move || {
                prefer_soon();
                let result = catch_unwind(AssertUnwindSafe(|| {
                    serve(subscribers, &in_thread, &set_up, confine)
                }));
                let why = match result {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "it panicked".into(),
                };
                in_thread.end(Err(Error::DeviceThread(why)));
            })
            .map_err(|e| context("the device thread", e))?;
        // Either way it goes on: a thread that failed has ended the VM.
        let _ = was_set_up.recv();
        Ok(DeviceThread {
            stop: Arc::clone(stop),
            handle: Some(handle),
        })
    }
}

impl Drop for DeviceThread {
    /// Ends the thread. Where the VM is not ending yet, it is now.
    fn drop(&mut self) {
        self.stop
            .end(Err(Error::DeviceThread("the VM was taken apart".into())));
        if let Some(handle) = self.handle.take() {
            // The thread catches its panics.
            let _ = handle.join();
        }
    }
}

/// Asks the scheduler for short turns that come soon: the thread does little at a time, and a guest may be waiting for it on a core that another
/// guest's vCPU never leaves. Kernels before 6.12 do not know the wish, and nothing depends on it.
#[allow(unsafe_code)] // sched_setattr has no wrapper
fn prefer_soon() {
    /// struct sched_attr of linux/sched/types.h, its first version.
    #[repr(C)]
    struct SchedAttr {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        /// Length of a turn in nanoseconds, for SCHED_OTHER.
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    const TURN_NS: u64 = 100_000;
    let attr = SchedAttr {
        size: 48,
        policy: 0,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime: TURN_NS,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the structure is as long as it says and outlives the call; 0 is the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if result != 0 {
        debug!("sched_setattr: {}", io::Error::last_os_error());
    }
}

/// Serves the devices until the VM ends.
fn serve(
    subscribers: Vec<Subscriber>,
    stop: &Arc<Stop>,
    set_up: &mpsc::Sender<()>,
    confine: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let failed = |e| context("epoll", io::Error::other(e));
    let mut manager: EventManager<Subscriber> = EventManager::new().map_err(failed)?;
    for subscriber in subscribers {
        manager.add_subscriber(subscriber);
    }
    manager.add_subscriber(Box::new(StopWatch(Arc::clone(stop))));
    confine()?;
    let _ = set_up.send(());
    while !stop.requested() {
        manager.run().map_err(failed)?;
    }
    Ok(())
}

/// Wakes the loop when the VM ends.
struct StopWatch(Arc<Stop>);

impl MutEventSubscriber for StopWatch {
    /// The event stays set, so that everybody sees it; the loop looks at [`Stop::requested`] and ends.
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.0.event(), EventSet::IN)) {
            warn!("device thread: {error}");
        }
    }
}

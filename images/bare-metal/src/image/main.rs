//! The image: boots, finds its device, runs workloads (docs/bare-metal.md).
#![no_std]
#![no_main]

extern crate alloc;

mod arch;
mod console;
mod links;
mod machine;
mod study;

use alloc::rc::Rc;
use core::cell::RefCell;
use core::fmt;

use bare_metal::capture::{self, Log};
use bare_metal::command::{BadWord, Boot, IommuMode};
use bare_metal::record::{Done, ResultRecord};
use bare_metal::workload::Stopped;
use bare_metal::{Command, Outcome, Run, Work};
use guest_driver::mapper::{Fixed, Mapper, Pages};
use guest_driver::net;
use guest_driver::pci::{self, Function};
use guest_driver::port::Notices;
use guest_driver::translated::{Behind, Translated};
use guest_driver::vhost_pci::{self, VhostPci};
use guest_driver::virtio_iommu::{self, Shared, VirtioIommu, status};
use guest_driver::virtio_pci::{DEVICE_BASE, VENDOR};

use arch::event;
use links::{BackEnd, Connection, FrontEnd, NotStarted};
use machine::{BootParameters, Machine};

/// A byte written here ends the VM with that exit code.
const EXIT_PORT: u16 = 0xf4;
/// The workload lost frames, or timed out.
const EXIT_NOT_CLEAN: u8 = 2;
/// The guest cannot go on.
const EXIT_FAILED: u8 = 101;

/// The domain that the device's mappings are in.
const DOMAIN: u32 = 1;
/// How long the IOMMU may take: it waits for a peer that has to be cut off.
const PATIENCE_MS: u64 = 20_000;

/// Prints a line for people.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::console::print(format_args!($($arg)*)) };
}

fn exit(code: u8) -> ! {
    loop {
        arch::out8(EXIT_PORT, code);
    }
}

/// Says why the guest cannot go on, to people and as a record, and powers off.
fn fail(what: fmt::Arguments) -> ! {
    print!("guest: {what}");
    console::record(format_args!("{{\"record\":\"error\",\"what\":\"{what}\"}}"));
    exit(EXIT_FAILED)
}

/// Where CPL 3 begins; called by boot.s.
#[unsafe(no_mangle)]
#[allow(unsafe_code)] // an entry point has a fixed name, and trusts what the boot protocol says of rdi
extern "C" fn user_main(zero_page: *const u8) -> ! {
    arch::init_interrupts();
    let width = guest_driver::bulk::detect();
    // SAFETY: boot.s passes on what it got from the boot protocol.
    let parameters = unsafe { BootParameters::new(zero_page) };
    let boot = Boot::parse(parameters.command_line(), |word| {
        print!("guest: unknown word on the command line: {word}")
    });
    if boot.tsc_khz == 0 || boot.ecam == 0 {
        fail(format_args!("the command line lacks tsc_khz= or ecam="));
    }
    let Some(machine) = Machine::new(parameters, boot.ecam, boot.dma) else {
        fail(format_args!(
            "no memory behind the image, or no PCI configuration space"
        ));
    };
    print!("guest: up; payload moves in pieces of {width} bytes");
    let iommu = find_iommu(&machine, boot.tsc_khz);
    let behind = |function: Function| {
        Some(Behind {
            iommu: iommu.clone()?,
            endpoint: u32::from(function.number),
            domain: DOMAIN,
            offset: boot.iova,
            map_pools: true,
        })
    };
    for function in virtio_functions(&machine) {
        match function.device.wrapping_sub(DEVICE_BASE) {
            net::DEVICE_TYPE => {
                print!("guest: virtio-net at {function}: front-end");
                front_end(&machine, function, behind(function), &boot);
            }
            vhost_pci::DEVICE_TYPE => {
                print!("guest: vhost-pci at {function}: back-end");
                back_end(&machine, function, behind(function), &boot);
            }
            virtio_iommu::DEVICE_TYPE => {}
            _ => print!("guest: {function}: no driver"),
        }
    }
    fail(format_args!(
        "there is no virtio-net and no vhost-pci device: start with --net or --vhost-pci"
    ));
}

fn virtio_functions(machine: &Machine) -> impl Iterator<Item = Function> + '_ {
    pci::functions(machine).filter(|function| function.vendor == VENDOR)
}

/// The machine's IOMMU, where it has one.
fn find_iommu(machine: &Machine, tsc_khz: u64) -> Option<Shared> {
    let function = virtio_functions(machine)
        .find(|function| function.device == DEVICE_BASE + virtio_iommu::DEVICE_TYPE)?;
    print!("guest: virtio-iommu at {function}");
    match VirtioIommu::new(machine, function, machine.memory(0), PATIENCE_MS * tsc_khz) {
        Ok(iommu) => Some(Rc::new(RefCell::new(iommu))),
        Err(error) => fail(format_args!("{function}: {error}")),
    }
}

/// Serves a front-end.
fn front_end(machine: &Machine, function: Function, behind: Option<Behind>, boot: &Boot) -> ! {
    let at_once = match boot.iommu {
        IommuMode::Static | IommuMode::Manual => None,
        IommuMode::Dynamic => Some(false),
        IommuMode::Batch => Some(true),
    };
    let Some((behind, at_once)) = behind.clone().zip(at_once) else {
        start(machine, function, behind, boot, Fixed)
    };
    let Some(pages) = Pages::new(behind.iommu.clone(), behind.domain, behind.offset, at_once)
    else {
        fail(format_args!(
            "buffers cannot be mapped one by one: the IOMMU has no pages of 4 KiB"
        ));
    };
    let behind = Behind {
        map_pools: false,
        ..behind
    };
    start(machine, function, Some(behind), boot, pages)
}

/// Sets a front-end's device up, unless that is left to a command, and serves it.
fn start<M: Mapper>(
    machine: &Machine,
    function: Function,
    behind: Option<Behind>,
    boot: &Boot,
    mapper: M,
) -> ! {
    let platform = Translated::new(machine, behind);
    let (parts, numbers) = ((boot.shape, mapper), (boot.queues, boot.tsc_khz));
    let mut link = FrontEnd::new(machine, &platform, function, parts, numbers);
    if boot.iommu != IommuMode::Manual || platform.behind().is_none() {
        match link.start() {
            Ok(()) => {}
            Err(NotStarted::Device(error)) => fail(format_args!("{function}: {error}")),
            Err(NotStarted::Iommu(error)) => fail(format_args!("{function}: {error}")),
        }
    }
    serve(machine, link, boot)
}

/// Sets a back-end's device up and serves it.
fn back_end(machine: &Machine, function: Function, behind: Option<Behind>, boot: &Boot) -> ! {
    let platform = Translated::new(machine, behind);
    match platform.behind().map(Behind::attach) {
        None | Some(Ok(status::OK)) => {}
        Some(Ok(status)) => fail(format_args!(
            "{function}: the IOMMU does not attach it: status {status}"
        )),
        Some(Err(error)) => fail(format_args!("{function}: {error}")),
    }
    let memory = machine.memory(platform.offset());
    match VhostPci::with_offer(&platform, function, memory, boot.offer) {
        Ok(device) => serve(machine, BackEnd::new(machine, device, boot.tsc_khz), boot),
        Err(error) => match platform.take_refusal() {
            Some(error) => fail(format_args!("{function}: {error}")),
            None => fail(format_args!("{function}: {error}")),
        },
    }
}

/// Runs the workload of the command line, or those that the control channel asks for.
fn serve<C: Connection>(machine: &Machine, mut link: C, boot: &Boot) -> ! {
    machine.connect_control();
    let mut input = console::Input::new();
    link.attend();
    let mut up = false;
    let mut first = true;
    loop {
        if up != link.is_up() {
            up = !up;
            announce(&link, up, boot.tsc_khz);
        }
        if let Some(run) = boot.run.filter(|_| up) {
            match run_workload(&mut link, &run, boot) {
                // The next connection is served like the first.
                Ok(_) if run.work == Work::Respond => continue,
                Ok(outcome) => exit(if outcome.is_clean() {
                    0
                } else {
                    EXIT_NOT_CLEAN
                }),
                Err(Stopped::Down | Stopped::Port(_)) => continue,
                // What the devices do not have now they will not have later.
                Err(_) => exit(EXIT_FAILED),
            }
        }
        // What came before the interrupt was turned on is there without one.
        if arch::take_events(event::CONTROL) != 0 || first {
            first = false;
            input.lines(|line| match Command::parse(line) {
                Ok(None) => {}
                Ok(Some(Command::Run(run))) => {
                    // It has been reported.
                    let _ = run_workload(&mut link, &run, boot);
                }
                Ok(Some(command @ (Command::ResetRings | Command::ResetDevice))) => {
                    let (name, reset) = match command {
                        Command::ResetRings => ("reset-rings", link.reset_rings()),
                        _ => ("reset-device", link.reset_device()),
                    };
                    match reset {
                        Ok(()) => {
                            up = link.is_up();
                            announce(&link, up, boot.tsc_khz);
                        }
                        Err(why) => error(format_args!("{name}: {why}")),
                    }
                }
                Ok(Some(Command::Rss(config))) => match link.set_rss(&config) {
                    true => {
                        let (command, fields) = ("rss", &[][..]);
                        console::record(format_args!("{}", Done { command, fields }));
                    }
                    false => error(format_args!("rss: it was not taken")),
                },
                Ok(Some(Command::Study(step))) => link.study(&step),
                Ok(Some(Command::Exit(code))) => exit(code),
                Err(BadWord(word)) => error(format_args!("not understood: {word}")),
            });
            link.attend();
            continue;
        }
        arch::sleep();
        arch::take_events(event::QUEUE | event::TIMER);
        link.attend();
    }
}

fn announce<C: Connection>(link: &C, up: bool, tsc_khz: u64) {
    if up {
        let (role, features) = (link.role(), link.features());
        print!("guest: connected");
        console::record(format_args!(
            "{{\"record\":\"ready\",\"role\":\"{role}\",\"tsc_khz\":{tsc_khz},\"features\":{features}}}"
        ));
    } else {
        print!("guest: the peer is gone");
        console::record(format_args!("{{\"record\":\"down\"}}"));
    }
}

/// Runs a workload and reports it, also where it could not be finished.
fn run_workload<C: Connection>(link: &mut C, run: &Run, boot: &Boot) -> Result<Outcome, Stopped> {
    let mut outcome = Outcome::default();
    let before = bare_metal::notices(link, run.queues);
    let result = match boot.capture.frames {
        0 => bare_metal::attempt(link, run, &mut outcome),
        _ => recorded(link, run, &mut outcome, boot),
    };
    let after = bare_metal::notices(link, run.queues);
    let since = |([tx, rx], [old_tx, old_rx]): ([Notices; 2], [Notices; 2])| {
        [tx.since(old_tx), rx.since(old_rx)]
    };
    outcome.notices = after.into_iter().zip(before).map(since).collect();
    let result = result.map_err(|why| link.explain(why));
    console::record(format_args!("{}", ResultRecord(run, &outcome)));
    summary(run, &outcome);
    match result {
        Ok(()) => Ok(outcome),
        Err(stopped) => {
            error(format_args!(
                "run {} ({}): {stopped}",
                run.id,
                run.work.name()
            ));
            link.stopped(stopped);
            Err(stopped)
        }
    }
}

/// Runs a workload, and reports the frames that passed.
#[inline(never)]
fn recorded<C: Connection>(
    link: &mut C,
    run: &Run,
    outcome: &mut Outcome,
    boot: &Boot,
) -> Result<(), Stopped> {
    let Some(mut log) = Log::new(boot.capture, arch::now) else {
        error(format_args!("no memory for a capture of so many frames"));
        return bare_metal::attempt(link, run, outcome);
    };
    let result = capture::attempt(link, run, outcome, &mut log);
    // Who reads the record has copied the frames when it is written.
    console::record(format_args!("{}", log.record(run.id, boot.tsc_khz)));
    result
}

fn error(what: fmt::Arguments) {
    print!("guest: {what}");
    console::record(format_args!("{{\"record\":\"error\",\"what\":\"{what}\"}}"));
}

/// Says how a run of the command line went.
fn summary(run: &Run, outcome: &Outcome) {
    let name = run.work.name();
    if let Some(sent) = outcome.sent {
        print!(
            "guest: {name}: sent {} frames of {} bytes",
            sent.frames, run.size
        );
    }
    if let Some(received) = outcome.received {
        print!(
            "guest: {name}: received {} frames, every byte checked: {} lost, {} duplicated, {} reordered, {} corrupted",
            received.verified,
            received.lost,
            received.duplicated,
            received.reordered,
            received.corrupted
        );
    }
    if let Some(responded) = outcome.responded {
        print!(
            "guest: {name}: {} frames came, {} of them too short or too long, {} longer than a segment, {} without a checksum; {} were sent; {} TCP connections, {} bytes in, {} bytes out",
            responded.rx_frames,
            responded.dropped,
            responded.large,
            responded.partial,
            responded.tx_frames,
            responded.connections,
            responded.rx_bytes,
            responded.tx_bytes
        );
    }
    if outcome.timeout {
        print!("guest: {name}: nothing came for {} ms", run.timeout_ms);
    }
}

/// Where a fault ends up; called by boot.s.
#[unsafe(no_mangle)]
#[allow(unsafe_code)] // an entry point has a fixed name
extern "C" fn user_fault() -> ! {
    let [vector, code, rip, cr2] = arch::fault();
    fail(format_args!(
        "fault {vector}, code {code:#x}, at {rip:#x}, address {cr2:#x}"
    ));
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    fail(format_args!("panic: {}", info.message()));
}

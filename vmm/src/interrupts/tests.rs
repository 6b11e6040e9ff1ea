use devices::host::{Host, Interrupt};

use super::*;
use crate::testing::Monitor;

fn eventfd() -> Arc<EventFd> {
    Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
}

fn interrupt(monitor: &Monitor) -> Arc<dyn Interrupt> {
    monitor.machine.interrupt().unwrap()
}

#[test]
fn a_trigger_and_an_attached_eventfd_both_reach_the_guest() {
    let mut monitor = Monitor::new();
    let interrupt = interrupt(&monitor);
    interrupt.set_message(Some(Monitor::message())).unwrap();
    interrupt.trigger();
    assert_eq!(monitor.interrupts(1), 1);
    let source = eventfd();
    interrupt.attach(&source).unwrap();
    source.write(1).unwrap();
    assert_eq!(monitor.interrupts(2), 2);
    assert!(!interrupt.pending());
}

#[test]
fn a_signal_while_masked_stays_pending_and_is_delivered_with_the_message() {
    let mut monitor = Monitor::new();
    let interrupt = interrupt(&monitor);
    let source = eventfd();
    interrupt.attach(&source).unwrap();
    assert!(!interrupt.pending());
    source.write(1).unwrap();
    assert!(interrupt.pending());
    assert_eq!(monitor.interrupts(0), 0);
    interrupt.set_message(Some(Monitor::message())).unwrap();
    assert_eq!(monitor.interrupts(1), 1);
    assert!(!interrupt.pending());

    interrupt.set_message(None).unwrap();
    interrupt.trigger();
    assert!(interrupt.pending());
    assert_eq!(monitor.interrupts(1), 1);
    interrupt.set_message(Some(Monitor::message())).unwrap();
    assert_eq!(monitor.interrupts(2), 2);
}

#[test]
fn a_detached_eventfd_keeps_its_signals_to_itself() {
    let mut monitor = Monitor::new();
    let interrupt = interrupt(&monitor);
    let source = eventfd();
    interrupt.set_message(Some(Monitor::message())).unwrap();
    interrupt.attach(&source).unwrap();
    interrupt.detach(&source);
    source.write(1).unwrap();
    assert_eq!(monitor.interrupts(0), 0);
    assert_eq!(source.read().unwrap(), 1);
    // It can be attached again, here or elsewhere.
    interrupt.attach(&source).unwrap();
    source.write(1).unwrap();
    assert_eq!(monitor.interrupts(1), 1);
}

#[test]
fn a_changed_message_takes_effect() {
    let mut monitor = Monitor::new();
    let interrupt = interrupt(&monitor);
    // To a processor that is not there.
    interrupt
        .set_message(Some(MsiMessage {
            address: 0xFEE0_5000,
            data: 0x41,
        }))
        .unwrap();
    interrupt.trigger();
    assert_eq!(monitor.interrupts(0), 0);
    interrupt.set_message(Some(Monitor::message())).unwrap();
    interrupt.trigger();
    assert_eq!(monitor.interrupts(1), 1);
}

#[test]
fn interrupts_do_not_disturb_each_other() {
    let mut monitor = Monitor::new();
    let (first, second) = (interrupt(&monitor), interrupt(&monitor));
    first.set_message(Some(Monitor::message())).unwrap();
    second.set_message(Some(Monitor::message())).unwrap();
    first.set_message(None).unwrap();
    second.trigger();
    assert_eq!(monitor.interrupts(1), 1);
    drop(second);
    first.set_message(Some(Monitor::message())).unwrap();
    first.trigger();
    assert_eq!(monitor.interrupts(2), 2);
}

#[test]
fn a_file_that_is_no_eventfd_is_refused_masked_or_not() {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let monitor = Monitor::new();
    let interrupt = interrupt(&monitor);
    let null = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: the descriptor is given away by the file.
    let odd = Arc::new(unsafe { EventFd::from_raw_fd(null.into_raw_fd()) });
    let error = interrupt.attach(&odd).unwrap_err();
    assert!(error.to_string().contains("no eventfd"), "{error}");
    interrupt.set_message(Some(Monitor::message())).unwrap();
    assert!(interrupt.attach(&odd).is_err());
}

#[test]
fn an_eventfd_of_another_interrupt_is_refused() {
    let mut monitor = Monitor::new();
    let (first, second) = (interrupt(&monitor), interrupt(&monitor));
    let source = eventfd();
    first.set_message(Some(Monitor::message())).unwrap();
    second.set_message(Some(Monitor::message())).unwrap();
    first.attach(&source).unwrap();
    assert_eq!(
        second.attach(&source).unwrap_err().kind(),
        io::ErrorKind::ResourceBusy
    );
    source.write(1).unwrap();
    assert_eq!(monitor.interrupts(1), 1);
}

#[test]
fn one_interrupt_takes_every_queue_of_the_largest_device_and_no_more() {
    let mut monitor = Monitor::new();
    let first = interrupt(&monitor);
    let sources: Vec<_> = (0..256 + 2).map(|_| eventfd()).collect();
    for source in &sources {
        first.attach(source).unwrap();
    }
    assert_eq!(
        first.attach(&eventfd()).unwrap_err().kind(),
        io::ErrorKind::QuotaExceeded
    );
    first.set_message(Some(Monitor::message())).unwrap();
    for (source, count) in [&sources[0], &sources[257]].into_iter().zip(1..) {
        source.write(1).unwrap();
        assert_eq!(monitor.interrupts(count), count);
    }
}

#[test]
fn an_eventfd_handed_over_twice_does_not_silence_the_interrupt() {
    let mut monitor = Monitor::new();
    let interrupt = interrupt(&monitor);
    let source = eventfd();
    let again = Arc::new(source.try_clone().unwrap());
    interrupt.attach(&source).unwrap();
    interrupt.attach(&again).unwrap();
    interrupt.set_message(Some(Monitor::message())).unwrap();
    interrupt.trigger();
    assert_eq!(monitor.interrupts(1), 1);
    source.write(1).unwrap();
    assert_eq!(monitor.interrupts(2), 2);
}

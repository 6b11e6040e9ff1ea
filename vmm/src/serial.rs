//! A serial port: vm-superio's UART with an input queue behind its FIFO and a line for its interrupt.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use crate::sys::{context, kvm, lock};

/// I/O ports of the console.
pub(crate) const COM1: u16 = 0x3F8;
/// Interrupt pin of the console.
pub(crate) const COM1_IRQ: u32 = 4;
/// I/O ports of the control channel.
pub(crate) const COM2: u16 = 0x2F8;
/// Interrupt pin of the control channel.
pub(crate) const COM2_IRQ: u32 = 3;
/// How many ports a UART has.
pub(crate) const PORTS: u16 = 8;

const DATA: u8 = 0;
const LINE_CONTROL: u8 = 3;
const LINE_STATUS: u8 = 5;
const DIVISOR_ACCESS: u8 = 1 << 7;
/// Transmitter holding register empty, transmitter idle.
const TRANSMITTER_FREE: u8 = 1 << 5 | 1 << 6;

/// How many bytes wait for the guest at most.
pub(crate) const INPUT_LIMIT: usize = 128 << 10;

/// Where a UART's output goes.
pub(crate) trait Output: Write + Send {
    /// Whether the guest should write more. Where not, the transmitter looks busy; bytes that come all the same may be lost.
    fn has_room(&self) -> bool {
        true
    }
}

/// An interrupt pin, raised through an irqfd.
pub(crate) struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

pub(crate) struct Uart<W: Output> {
    state: Mutex<State<W>>,
    /// Signalled when [`Uart::feed`] takes more after it had not taken all.
    drained: Arc<EventFd>,
}

struct State<W: Output> {
    serial: Serial<Line, NoEvents, W>,
    input: VecDeque<u8>,
    throttled: bool,
}

impl<W: Output> Uart<W> {
    /// A UART that raises `line`.
    pub(crate) fn new(line: Line, output: W) -> io::Result<Self> {
        let drained = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| context("eventfd", e))?;
        let state = State {
            serial: Serial::new(line, output),
            input: VecDeque::new(),
            throttled: false,
        };
        Ok(Uart {
            state: Mutex::new(state),
            drained: Arc::new(drained),
        })
    }

    /// A guest write of one byte to the register at `offset`.
    pub(crate) fn write(&self, offset: u8, value: u8) {
        let mut state = lock(&self.state);
        // A byte that cannot be written is lost, as on a line that is not plugged in.
        let _ = state.serial.write(offset, value);
    }

    /// A guest read of the register at `offset`.
    pub(crate) fn read(&self, offset: u8) -> u8 {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let value = state.serial.read(offset);
        match offset {
            LINE_STATUS if !state.serial.writer().has_room() => value & !TRANSMITTER_FREE,
            DATA if state.serial.read(LINE_CONTROL) & DIVISOR_ACCESS == 0 => {
                self.refill(state);
                value
            }
            _ => value,
        }
    }

    /// Moves input into the FIFO.
    fn refill(&self, state: &mut State<W>) {
        let room = state.serial.fifo_capacity();
        let (front, _) = state.input.as_slices();
        if room > 0 && !front.is_empty() {
            // A failed interrupt leaves the bytes in the FIFO, where a guest that polls finds them.
            let moved = state
                .serial
                .enqueue_raw_bytes(front.get(..room).unwrap_or(front))
                .unwrap_or(0);
            state.input.drain(..moved);
        }
        if state.throttled && state.input.len() <= INPUT_LIMIT / 2 {
            state.throttled = false;
            let _ = self.drained.write(1);
        }
    }

    /// How many bytes [`Uart::feed`] takes now. Where that is less than `wanted`, [`Uart::drained`] tells when to ask again.
    pub(crate) fn room(&self, wanted: usize) -> usize {
        let mut state = lock(&self.state);
        let room = INPUT_LIMIT.saturating_sub(state.input.len());
        state.throttled |= room < wanted;
        room
    }

    /// Input for the guest. Takes all of it or, beyond [`INPUT_LIMIT`], its beginning.
    pub(crate) fn feed(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        let room = INPUT_LIMIT.saturating_sub(state.input.len());
        state.input.extend(bytes.iter().take(room));
        self.refill(&mut state);
    }

    pub(crate) fn drained(&self) -> &Arc<EventFd> {
        &self.drained
    }
}

/// The interrupt pin `irq` of `vm`.
pub(crate) fn line(vm: &VmFd, irq: u32) -> io::Result<Line> {
    let event =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|e| context("eventfd", e))?;
    vm.register_irqfd(&event, irq)
        .map_err(|e| kvm("KVM_IRQFD", e))?;
    Ok(Line(event))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sink(bool);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Output for Sink {
        fn has_room(&self) -> bool {
            self.0
        }
    }

    fn uart(has_room: bool) -> Uart<Sink> {
        Uart::new(
            Line(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            Sink(has_room),
        )
        .unwrap()
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let uart = uart(true);
        let bytes: Vec<u8> = (0..1000u32).map(|i| i.to_le_bytes()[0]).collect();
        uart.feed(&bytes[..300]);
        uart.feed(&bytes[300..]);
        let mut seen = Vec::new();
        while uart.read(LINE_STATUS) & 1 != 0 {
            seen.push(uart.read(DATA));
        }
        assert_eq!(seen, bytes);
    }

    #[test]
    fn a_full_queue_says_when_it_takes_more() {
        let uart = uart(true);
        uart.feed(&vec![7; INPUT_LIMIT]);
        assert!(uart.room(1000) < 1000);
        assert!(uart.drained().read().is_err());
        while uart.read(LINE_STATUS) & 1 != 0 {
            uart.read(DATA);
        }
        assert_eq!(uart.drained().read().unwrap(), 1);
        assert_eq!(uart.room(1000), INPUT_LIMIT);
    }

    #[test]
    fn the_transmitter_looks_busy_while_the_output_has_no_room() {
        assert_eq!(
            uart(true).read(LINE_STATUS) & TRANSMITTER_FREE,
            TRANSMITTER_FREE
        );
        assert_eq!(uart(false).read(LINE_STATUS) & TRANSMITTER_FREE, 0);
    }

    #[test]
    fn the_divisor_latch_is_no_data_register() {
        let uart = uart(true);
        uart.feed(b"x");
        uart.write(LINE_CONTROL, DIVISOR_ACCESS);
        assert_eq!(uart.read(DATA), 0x0C);
        uart.write(LINE_CONTROL, 3);
        assert_eq!(uart.read(DATA), b'x');
    }
}

//! The control channel: COM2 on one side, a stream socket on the other, whole lines both ways.
//!
//! The guest's lines go to the socket and the socket's lines to the guest, except those that begin with `vmm`: the VMM answers them,
//! between two lines of the guest. Each direction is bounded. A socket that nobody reads makes the UART's transmitter look
//! busy; a guest that does not read makes the VMM stop reading from the socket.
#![allow(unsafe_code)] // send(2) and recv(2) with flags

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::capture::Listener;
use crate::metrics::Reports;
use crate::serial::{Output, Uart};
use crate::signals::wait_writable;
use crate::sys::{context, lock};

/// The longest line in either direction, its newline included.
const LINE_LIMIT: usize = 64 << 10;
/// How much waits for the socket's reader at most.
const OUTPUT_LIMIT: usize = 1 << 20;
const CHUNK: usize = 4096;
const FINISH: Duration = Duration::from_secs(1);

/// What goes to the socket.
pub(crate) struct Outbox {
    socket: OwnedFd,
    state: Mutex<OutboxState>,
    wake: EventFd,
}

#[derive(Default)]
struct OutboxState {
    /// The guest's line so far.
    line: Vec<u8>,
    /// The line is too long and will be thrown away.
    overlong: bool,
    /// Whole lines on their way.
    ready: VecDeque<u8>,
    /// The other end is gone.
    closed: bool,
}

impl Outbox {
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Arc<Self>> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| context("eventfd", e))?;
        Ok(Arc::new(Outbox {
            socket,
            state: Mutex::default(),
            wake,
        }))
    }

    fn guest_byte(&self, byte: u8) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if state.overlong {
            state.overlong = byte != b'\n';
            return;
        }
        state.line.push(byte);
        if byte == b'\n' {
            if state.ready.len() + state.line.len() <= OUTPUT_LIMIT && !state.closed {
                state.ready.extend(&state.line);
            } else if !state.closed {
                warn!("control channel: a line of the guest is lost, nobody reads the socket");
            }
            state.line.clear();
            let _ = self.wake.write(1);
        } else if state.line.len() == LINE_LIMIT {
            state.line.clear();
            state.overlong = true;
            drop(guard);
            self.record(
                "error",
                "\"what\":\"the guest wrote a line that is too long\"",
            );
        }
    }

    /// Queues a record of the VMM: `{"record":"<name>",<fields>}`.
    fn record(&self, name: &str, fields: &str) {
        let line = format!("{{\"record\":\"{name}\",{fields}}}\n");
        let mut state = lock(&self.state);
        if state.ready.len() + line.len() <= OUTPUT_LIMIT && !state.closed {
            state.ready.extend(line.as_bytes());
        }
        let _ = self.wake.write(1);
    }

    /// Writes what the socket takes; returns whether something still waits.
    fn flush(&self) -> bool {
        let mut state = lock(&self.state);
        while !state.closed && !state.ready.is_empty() {
            let (front, _) = state.ready.as_slices();
            // SAFETY: the buffer is valid for reads of its length.
            let sent = unsafe {
                libc::send(
                    self.socket.as_raw_fd(),
                    front.as_ptr().cast(),
                    front.len(),
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            };
            match usize::try_from(sent) {
                Ok(sent) => {
                    state.ready.drain(..sent);
                }
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e if e.kind() == io::ErrorKind::WouldBlock => return true,
                    e => {
                        debug!("control channel: {e}");
                        state.closed = true;
                        state.ready.clear();
                    }
                },
            }
        }
        false
    }

    /// Writes the rest out, for a second at most: the last thing that a VM does.
    pub(crate) fn finish(&self) {
        let deadline = Instant::now() + FINISH;
        while self.flush() && Instant::now() < deadline {
            wait_writable(self.socket.as_raw_fd(), 50);
        }
    }

    fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.ready.clear();
    }
}

/// What COM2's UART writes to; without a socket and somebody who reads the guest's reports, nothing.
pub(crate) struct ControlOutput {
    pub(crate) outbox: Option<Arc<Outbox>>,
    pub(crate) reports: Option<Arc<Reports>>,
    pub(crate) capture: Option<Listener>,
}

impl Write for ControlOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(reports) = &self.reports {
            reports.take(bytes);
        }
        if let Some(capture) = &mut self.capture {
            capture.take(bytes);
        }
        if let Some(outbox) = &self.outbox {
            bytes.iter().for_each(|byte| outbox.guest_byte(*byte));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for ControlOutput {
    fn has_room(&self) -> bool {
        self.outbox.as_ref().is_none_or(|outbox| {
            let state = lock(&outbox.state);
            state.closed || state.ready.len() + LINE_LIMIT <= OUTPUT_LIMIT
        })
    }
}

/// Gives the fields of the record that answers `vmm stats`.
pub(crate) type Stats = Box<dyn Fn() -> String + Send>;

/// The socket's side, on the device thread.
pub(crate) struct Control {
    outbox: Arc<Outbox>,
    uart: Arc<Uart<ControlOutput>>,
    stats: Stats,
    line: Vec<u8>,
    overlong: bool,
    interest: Interest,
    reading: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Interest {
    None,
    Set(EventSet),
}

impl Control {
    pub(crate) fn new(outbox: Arc<Outbox>, uart: Arc<Uart<ControlOutput>>, stats: Stats) -> Self {
        Control {
            outbox,
            uart,
            stats,
            line: Vec::new(),
            overlong: false,
            interest: Interest::None,
            reading: true,
        }
    }

    /// Reads as long as there is something and room for it.
    fn receive(&mut self) {
        let mut buffer = [0; CHUNK];
        // Bounded: a peer that writes without end shares the thread with the devices.
        for _ in 0..16 {
            let want = self.line.len() + CHUNK;
            if self.uart.room(want) < want {
                return;
            }
            // SAFETY: the buffer is writable for its length.
            let got = unsafe {
                libc::recv(
                    self.outbox.socket.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_DONTWAIT,
                )
            };
            match usize::try_from(got) {
                Ok(0) => {
                    self.reading = false;
                    return;
                }
                Ok(got) => self.take(buffer.get(..got).unwrap_or(&[])),
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e if e.kind() == io::ErrorKind::WouldBlock => return,
                    e => {
                        debug!("control channel: {e}");
                        self.reading = false;
                        return;
                    }
                },
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let ended = part.ends_with(b"\n");
            if !self.overlong {
                self.line.extend_from_slice(part);
            }
            if self.line.len() > LINE_LIMIT {
                self.overlong = true;
                self.line.clear();
                self.outbox
                    .record("error", "\"what\":\"a line to the guest is too long\"");
            }
            if ended {
                let line = std::mem::take(&mut self.line);
                if !std::mem::replace(&mut self.overlong, false) {
                    self.dispatch(&line);
                }
            }
        }
    }

    fn dispatch(&self, line: &[u8]) {
        let Some(command) = line.strip_prefix(b"vmm") else {
            return self.uart.feed(line);
        };
        let command = String::from_utf8_lossy(command);
        match command.trim() {
            "stats" => self.outbox.record("vmm", &(self.stats)()),
            other => self.outbox.record(
                "error",
                &format!("\"what\":\"the VMM knows no command {}\"", printable(other)),
            ),
        }
    }

    /// Tells epoll what is wanted now.
    fn update(&mut self, waiting: bool, ops: &mut EventOps) {
        let mut events = EventSet::empty();
        let want = self.line.len() + CHUNK;
        events.set(EventSet::IN, self.reading && self.uart.room(want) >= want);
        events.set(EventSet::OUT, waiting);
        let new = if events.is_empty() {
            Interest::None
        } else {
            Interest::Set(events)
        };
        let socket = &self.outbox.socket;
        let result = match (self.interest, new) {
            (old, new) if old == new => return,
            (Interest::None, Interest::Set(events)) => ops.add(Events::new(socket, events)),
            (Interest::Set(_), Interest::Set(events)) => ops.modify(Events::new(socket, events)),
            (_, Interest::None) => ops.remove(Events::empty(socket)),
        };
        match result {
            Ok(()) => self.interest = new,
            Err(error) => warn!("control channel: {error}"),
        }
    }
}

impl MutEventSubscriber for Control {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.outbox.socket.as_raw_fd() {
            if events
                .event_set()
                .intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR)
            {
                self.receive();
            }
            if events
                .event_set()
                .intersects(EventSet::HANG_UP | EventSet::ERROR)
                && !self.reading
            {
                self.outbox.close();
            }
        } else if fd == self.outbox.wake.as_raw_fd() {
            let _ = self.outbox.wake.read();
        } else {
            let _ = self.uart.drained().read();
        }
        let waiting = self.outbox.flush();
        self.update(waiting, ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        for event in [&self.outbox.wake, self.uart.drained().as_ref()] {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                warn!("control channel: {error}");
            }
        }
        self.update(false, ops);
    }
}

/// Text of unknown origin as the inside of a JSON string, shortened.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().take(64) {
        match c {
            ' ' | '!' | '#'..='[' | ']'..='~' => out.push(c),
            _ => {
                let _ = write!(out, "\\\\x{:x}", u32::from(c));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests;

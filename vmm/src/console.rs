//! The console: COM1 on standard output, and on standard input with its terminal in raw mode.
#![allow(unsafe_code)] // termios, and reads and writes that must not go through a buffered or locked handle

use std::io::{self, Write};
use std::sync::{Arc, Mutex, Once};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, warn};

use crate::Outcome;
use crate::serial::{Output, Uart};
use crate::signals::wait_writable;
use crate::stop::Stop;
use crate::sys::{context, lock};

/// Standard output. A reader that stops reading stops the guest's writing vCPU, until the VM ends; bytes are lost then.
pub(crate) struct ConsoleOutput(pub(crate) Arc<Stop>);

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while !self.0.requested() {
            // Waiting here, and not in write(2), lets the end of the VM through.
            if !wait_writable(libc::STDOUT_FILENO, 100) {
                continue;
            }
            // SAFETY: the buffer is valid for reads of its length.
            let written =
                unsafe { libc::write(libc::STDOUT_FILENO, bytes.as_ptr().cast(), bytes.len()) };
            match usize::try_from(written) {
                Ok(written) => return Ok(written),
                Err(_) => match io::Error::last_os_error() {
                    e if matches!(
                        e.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                    e => return Err(e),
                },
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for ConsoleOutput {}

/// The terminal's settings from before, while it is in raw mode.
static BEFORE: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Standard input's terminal in raw mode, until it is dropped or the process panics.
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// `None` where standard input is no terminal.
    pub(crate) fn new() -> io::Result<Option<Self>> {
        static HOOK: Once = Once::new();
        // SAFETY: all bit patterns are valid for the structure, and the call below fills it.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `before` is writable and of the right type. It fails on what is no terminal.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut before) } != 0 {
            return Ok(None);
        }
        let mut raw = before;
        // The output side stays as it is, so that the VMM's own messages look right.
        raw.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN);
        raw.c_iflag &= !(libc::ICRNL | libc::IXON);
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                next(info);
            }));
        });
        *lock(&BEFORE) = Some(before);
        let terminal = RawTerminal(());
        // SAFETY: `raw` is a complete structure.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw) } != 0 {
            return Err(context(
                "the terminal cannot be put into raw mode",
                io::Error::last_os_error(),
            ));
        }
        Ok(Some(terminal))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // A panic elsewhere must not wait for a lock that the panicking thread holds.
    if let Ok(mut before) = BEFORE.try_lock()
        && let Some(settings) = before.take()
    {
        // SAFETY: the settings came from tcgetattr.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const settings) };
    }
}

const CTRL_A: u8 = 1;
const CHUNK: usize = 1024;

/// Standard input, on the device thread. On a terminal, Ctrl-A x ends the VM and Ctrl-A Ctrl-A is one Ctrl-A.
pub(crate) struct Stdin {
    uart: Arc<Uart<ConsoleOutput>>,
    stop: Arc<Stop>,
    terminal: bool,
    escaped: bool,
    open: bool,
    polled: bool,
    /// epoll does not take it (a regular file, /dev/null): then a read never waits.
    unpollable: bool,
}

impl Stdin {
    pub(crate) fn new(uart: Arc<Uart<ConsoleOutput>>, stop: Arc<Stop>, terminal: bool) -> Self {
        Stdin {
            uart,
            stop,
            terminal,
            escaped: false,
            open: true,
            polled: false,
            unpollable: false,
        }
    }

    /// One read.
    fn receive(&mut self) {
        let mut buffer = [0; CHUNK];
        // SAFETY: the buffer is writable for its length.
        let got =
            unsafe { libc::read(libc::STDIN_FILENO, buffer.as_mut_ptr().cast(), buffer.len()) };
        match usize::try_from(got) {
            Ok(0) => self.open = false,
            Ok(got) => {
                let bytes = buffer.get(..got).unwrap_or(&[]);
                if self.terminal {
                    let kept: Vec<u8> = bytes.iter().filter_map(|byte| self.key(*byte)).collect();
                    self.uart.feed(&kept);
                } else {
                    self.uart.feed(bytes);
                }
            }
            Err(_) => match io::Error::last_os_error() {
                e if matches!(
                    e.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
                e => {
                    debug!("standard input: {e}");
                    self.open = false;
                }
            },
        }
    }

    fn key(&mut self, byte: u8) -> Option<u8> {
        if !std::mem::replace(&mut self.escaped, false) {
            self.escaped = byte == CTRL_A;
            return (!self.escaped).then_some(byte);
        }
        if byte == b'x' {
            self.stop.end(Ok(Outcome::Signal(libc::SIGINT)));
            return None;
        }
        Some(byte)
    }

    fn update(&mut self, ops: &mut EventOps) {
        while self.unpollable && self.open && self.uart.room(CHUNK) >= CHUNK {
            self.receive();
        }
        let wanted = self.open && !self.unpollable && self.uart.room(CHUNK) >= CHUNK;
        if wanted == self.polled {
            return;
        }
        let result = if wanted {
            ops.add(Events::new(&io::stdin(), EventSet::IN))
        } else {
            ops.remove(Events::empty(&io::stdin()))
        };
        match result {
            Ok(()) => self.polled = wanted,
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EPERM && wanted => {
                self.unpollable = true;
                self.update(ops);
            }
            Err(error) => {
                warn!("standard input: {error}");
                self.open = false;
            }
        }
    }
}

impl MutEventSubscriber for Stdin {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == libc::STDIN_FILENO {
            self.receive();
        } else {
            let _ = self.uart.drained().read();
        }
        self.update(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.uart.drained().as_ref(), EventSet::IN)) {
            warn!("standard input: {error}");
        }
        self.update(ops);
    }
}

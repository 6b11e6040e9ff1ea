//! The two serial ports: COM1 for people, COM2 for the control channel.

use core::fmt::{self, Write};

use crate::arch::{self, event};

const COM1: u16 = 0x3f8;
const COM2: u16 = 0x2f8;
const INTERRUPT_ENABLE: u16 = 1;
const LINE_STATUS: u16 = 5;
const DATA_READY: u8 = 1;

/// Longest line that goes out in one piece, and longest command that comes in.
const LINE: usize = 1024;

/// A line that is put together before it is written: one exit for a line, not for a byte.
struct Line {
    bytes: [u8; LINE],
    len: usize,
    port: u16,
}

impl Line {
    fn flush(&mut self) {
        if let Some(bytes) = self.bytes.get(..self.len)
            && !bytes.is_empty()
        {
            arch::write_port(self.port, bytes);
        }
        self.len = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.len == LINE {
                self.flush();
            }
            self.bytes[self.len] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

fn write_line(port: u16, args: fmt::Arguments) {
    let mut line = Line {
        bytes: [0; LINE],
        len: 0,
        port,
    };
    // Writing to a `Line` cannot fail, and what a Display of ours writes does not either.
    let _ = line.write_fmt(args).and_then(|()| line.write_str("\n"));
    line.flush();
}

/// Writes a line for people.
pub fn print(args: fmt::Arguments) {
    write_line(COM1, args);
}

/// Writes a record.
pub fn record(args: fmt::Arguments) {
    write_line(COM2, args);
}

fn data_ready() -> bool {
    let mut status = [0];
    arch::read_port(COM2 + LINE_STATUS, &mut status);
    status[0] & DATA_READY != 0
}

/// Whether input interrupted since the last time, and is still to be read.
pub fn command_waits() -> bool {
    arch::take_events(event::CONTROL) != 0 && data_ready()
}

/// The input of the control channel.
pub struct Input {
    bytes: [u8; LINE],
    len: usize,
}

impl Input {
    /// Turns on the interrupt for input.
    pub fn new() -> Self {
        arch::out8(COM2 + INTERRUPT_ENABLE, 1);
        Self {
            bytes: [0; LINE],
            len: 0,
        }
    }

    /// Reads what is there and hands every complete line to `take`. What is no text, or longer than a line can be, is dropped.
    pub fn lines(&mut self, mut take: impl FnMut(&str)) {
        while data_ready() {
            // A string instruction takes the whole FIFO at once; an empty one reads as zero.
            let mut fifo = [0; 64];
            arch::read_port(COM2, &mut fifo);
            for &byte in fifo.iter().filter(|&&byte| byte != 0) {
                if byte == b'\n' {
                    if let Some(line) = self.bytes.get(..self.len)
                        && let Ok(line) = core::str::from_utf8(line)
                    {
                        take(line);
                    }
                    self.len = 0;
                } else if let Some(room) = self.bytes.get_mut(self.len) {
                    *room = byte;
                    self.len += 1;
                }
            }
        }
    }
}

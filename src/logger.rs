//! Log lines on stderr: `-v` for what happens, `-vv` for every detail; warnings by default.

use std::io::{self, Write};

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format(record.level(), record.target(), &record.args().to_string());
            // Nothing can be done about a stderr that is closed.
            let _ = io::stderr().lock().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// One line, whatever the message holds: a peer or a guest may have had a hand in it.
fn format(level: Level, target: &str, message: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let message: String = message
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    // A user needs to know what happened; where in the program it did is for those who asked for details.
    if log::max_level() > LevelFilter::Warn {
        format!("vhost-pci: {level}: {target}: {message}\n")
    } else {
        format!("vhost-pci: {level}: {message}\n")
    }
}

/// Starts logging; `verbose` is how often `-v` was given.
pub fn start(verbose: u8) {
    log::set_max_level(match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    });
    // It fails only where a logger is set already, and that one is as good.
    let _ = log::set_logger(&Stderr);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_whatever_it_says() {
        let line = format(Level::Warn, "vmm", "peer said:\n\x1b[2Jboo");
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.starts_with("vhost-pci: warning: ") && !line.contains('\x1b'));
    }
}

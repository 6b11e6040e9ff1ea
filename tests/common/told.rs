//! Guests that are told what to do, one thing after the other.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use serde_json::Value;

use super::{PATIENCE, tool};

/// A VM whose guest is told what to do over its control channel. It is killed when the test is done with it.
pub struct Told {
    pub child: Child,
    channel: BufReader<UnixStream>,
}

impl Told {
    pub fn start(flag: &str, device: &str, words: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let args = ["run", "--console", "output", "--control-fd", "0"];
        let mut command = tool(&[&args[..], &[flag, device, "--cmdline", words]].concat());
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let channel = BufReader::new(ours);
        Self { child, channel }
    }

    pub fn send(&mut self, line: &str) {
        let channel = self.channel.get_mut();
        channel.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// The next record of this kind; an error record is a failure.
    #[track_caller]
    pub fn next(&mut self, kind: &str) -> Value {
        loop {
            let mut line = String::new();
            let got = self.channel.read_line(&mut line);
            assert!(got.is_ok_and(|got| got > 0), "waited in vain for: {kind}");
            let record: Value = serde_json::from_str(&line).unwrap();
            assert_ne!(record["record"], "error", "{record}");
            if record["record"] == kind {
                return record;
            }
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

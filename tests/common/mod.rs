//! Starting the tool, and not waiting for it for ever.

pub mod linux;
pub mod told;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take that is expected to happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The tool with these arguments.
pub fn tool(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-pci"));
    command.args(args);
    command
}

/// A directory for one test, gone with it.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vp-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    pub fn is_empty(&self) -> bool {
        fs::read_dir(&self.0).unwrap().next().is_none()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The tool, running. It is killed when the test is done with it.
pub struct Running {
    child: Child,
    stdout: Collected,
    stderr: Collected,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// The exit code; a test that asks for it expects no signal.
    #[track_caller]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("ended by a signal: {self:?}"))
    }

    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.code(), code, "{self:?}");
        self
    }

    /// What is wrong, in one line that holds each of `parts`.
    #[track_caller]
    pub fn expect_one_line(&self, parts: &[&str]) -> &Self {
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "{self:?}");
        assert!(lines[0].starts_with("vhost-pci: "), "{self:?}");
        for part in parts {
            assert!(lines[0].contains(part), "no {part:?} in {self:?}");
        }
        self
    }
}

/// What has come out of something so far.
pub struct Collected(Arc<Mutex<String>>);

impl Collected {
    /// Reads it to its end, in a thread.
    pub fn new(mut from: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&text);
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(got @ 1..) = from.read(&mut chunk) {
                kept.lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&chunk[..got]));
            }
        });
        Self(text)
    }

    pub fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }
}

impl Running {
    pub fn start(command: Command) -> Self {
        Self::with_stdin(command, Stdio::null())
    }

    pub fn with_stdin(mut command: Command, stdin: Stdio) -> Self {
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = Collected::new(child.stdout.take().unwrap());
        let stderr = Collected::new(child.stderr.take().unwrap());
        Self {
            child,
            stdout,
            stderr,
        }
    }

    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until `what` holds of it.
    #[track_caller]
    pub fn wait_for(&mut self, what: &str, holds: impl FnMut(&mut Self) -> bool) {
        self.wait_within(PATIENCE, what, holds);
    }

    #[track_caller]
    fn wait_within(
        &mut self,
        most: Duration,
        what: &str,
        mut holds: impl FnMut(&mut Self) -> bool,
    ) {
        let start = Instant::now();
        while !holds(self) {
            assert!(
                start.elapsed() < most,
                "waited in vain for: {what}\n{}\n{}",
                self.stdout(),
                self.stderr()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    pub fn wait_for_stdout(&mut self, text: &str) {
        self.wait_for(text, |running| running.stdout().contains(text));
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(self) -> Ended {
        self.end_within(PATIENCE)
    }

    /// Waits for its end, for as long as it may take at most.
    #[track_caller]
    pub fn end_within(mut self, most: Duration) -> Ended {
        self.wait_within(most, "the end", |running| !running.is_running());
        let status = self.child.wait().unwrap();
        // The readers see the end of the pipes a moment later.
        let mut before = (self.stdout(), self.stderr());
        loop {
            thread::sleep(Duration::from_millis(20));
            let now = (self.stdout(), self.stderr());
            if now == before {
                return Ended {
                    status,
                    stdout: now.0,
                    stderr: now.1,
                };
            }
            before = now;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the tool to its end.
#[track_caller]
pub fn run(args: &[&str]) -> Ended {
    Running::start(tool(args)).end()
}

/// How many processes have `text` in their command lines.
pub fn processes_with(text: &str) -> usize {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(text))
        .count()
}

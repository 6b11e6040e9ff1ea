//! The thread that takes snapshots and hands them out. A reader that is slow is let go.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use devices::vhost_user::{Socket, SocketRole};
use log::{debug, warn};

use super::{MetricsConfig, MetricsTarget, Sources};
use crate::sandbox;
use crate::signals::wait_readable;
use crate::stop::Stop;
use crate::sys::context;
use crate::{Error, Seccomp};

/// Readers of lines at a time.
const MAX_READERS: usize = 8;
/// How long one who asks may take.
const PATIENCE: Duration = Duration::from_millis(500);
/// The longest request that is read to its end.
const REQUEST_LIMIT: usize = 4096;

enum Target {
    File(File),
    Lines(Socket),
    Prometheus(Socket),
}

/// The running thread.
pub(crate) struct Server {
    stop: Arc<Stop>,
    handle: Option<JoinHandle<()>>,
}

/// The file or socket of a configuration, open.
pub(crate) struct Opened {
    target: Target,
    interval: Duration,
}

impl Server {
    /// Opens the file or makes the socket.
    pub(crate) fn open(config: &MetricsConfig) -> Result<Opened, Error> {
        let failed = |why: String| Error::System(io::Error::other(format!("--metrics: {why}")));
        let socket =
            |path| Socket::new(path, SocketRole::Listen).map_err(|e| failed(e.to_string()));
        let target = match &config.target {
            MetricsTarget::File(path) => {
                // A pipe without a reader is an error and not a wait.
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path);
                Target::File(file.map_err(|e| failed(format!("{}: {e}", path.display())))?)
            }
            MetricsTarget::Lines(path) => Target::Lines(socket(path)?),
            MetricsTarget::Prometheus(path) => Target::Prometheus(socket(path)?),
        };
        Ok(Opened {
            target,
            interval: config.interval,
        })
    }

    /// Starts the thread.
    pub(crate) fn spawn(
        opened: Opened,
        sources: Sources,
        stop: &Arc<Stop>,
        seccomp: Seccomp,
    ) -> Result<Self, Error> {
        let in_thread = Arc::clone(stop);
        let (ready, was_ready) = mpsc::channel();
        let handle = thread::Builder::new()
            .name("metrics".into())
            .spawn(move || {
                let _ = ready.send(seccomp.enter(sandbox::Thread::Metrics));
                let mut work = Work {
                    target: opened.target,
                    interval: opened.interval,
                    sources,
                    readers: Vec::new(),
                };
                if let Err(error) = work.run(&in_thread) {
                    warn!("--metrics: {error}; there are no more");
                }
            })
            .map_err(|e| context("the thread of --metrics", e))?;
        if let Ok(result) = was_ready.recv() {
            result?;
        }
        Ok(Server {
            stop: Arc::clone(stop),
            handle: Some(handle),
        })
    }
}

impl Drop for Server {
    /// Ends the thread, and the VM where it is not ending yet.
    fn drop(&mut self) {
        self.stop
            .end(Err(Error::Config("the VM was taken apart".into())));
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

struct Work {
    target: Target,
    interval: Duration,
    sources: Sources,
    /// Who gets a line each interval.
    readers: Vec<UnixStream>,
}

impl Work {
    /// Until the VM ends; a file and the readers get a last line then.
    fn run(&mut self, stop: &Stop) -> io::Result<()> {
        let mut next = Instant::now();
        loop {
            let ended = stop.requested();
            if ended || Instant::now() >= next {
                self.tick()?;
                // Intervals that were slept through are left out.
                next = (next + self.interval).max(Instant::now());
            }
            if ended {
                return Ok(());
            }
            let mut fds = vec![stop.event().as_raw_fd()];
            if let Target::Lines(socket) | Target::Prometheus(socket) = &self.target {
                fds.extend(socket.listener());
            }
            let left = next.saturating_duration_since(Instant::now());
            let ms = left.as_nanos().div_ceil(1_000_000);
            wait_readable(&fds, i32::try_from(ms).unwrap_or(i32::MAX))?;
            self.accept();
        }
    }

    fn tick(&mut self) -> io::Result<()> {
        let readers = &mut self.readers;
        match &mut self.target {
            Target::File(file) => match file.write_all(self.sources.json().as_bytes()) {
                // A pipe whose reader is slow.
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
                result => result,
            },
            Target::Lines(_) if !readers.is_empty() => {
                let line = self.sources.json();
                readers.retain_mut(|reader| send(reader, &line));
                Ok(())
            }
            Target::Lines(_) | Target::Prometheus(_) => Ok(()),
        }
    }

    fn accept(&mut self) {
        // Bounded: who comes and goes without end shares the thread with the others.
        for _ in 0..MAX_READERS {
            let (Target::Lines(socket) | Target::Prometheus(socket)) = &mut self.target else {
                return;
            };
            let mut stream = match socket.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => return debug!("--metrics: {error}"),
            };
            if matches!(self.target, Target::Prometheus(_)) {
                if let Err(error) = answer(&mut stream, &self.sources) {
                    debug!("--metrics: {error}");
                }
            } else if self.readers.len() < MAX_READERS
                && stream.set_nonblocking(true).is_ok()
                && send(&mut stream, &self.sources.json())
            {
                self.readers.push(stream);
            }
        }
    }
}

/// Whether the reader took a whole line. One that is so slow that its socket is full gets no more.
fn send(reader: &mut UnixStream, line: &str) -> bool {
    reader.write_all(line.as_bytes()).is_ok()
}

/// Answers a request by HTTP, whatever it asks for.
fn answer(stream: &mut UnixStream, sources: &Sources) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = [0; REQUEST_LIMIT];
    let mut have = 0;
    let until = Instant::now() + PATIENCE;
    let whole = |request: &[u8]| request.ends_with(b"\r\n\r\n");
    while !whole(request.get(..have).unwrap_or(&[])) && Instant::now() < until {
        match stream.read(request.get_mut(have..).unwrap_or(&mut [])) {
            // The other side has said all, or too much.
            Ok(0) => break,
            Ok(got) => have += got,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let text = sources.prometheus();
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        text.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(text.as_bytes())
}

//! A report's file.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// Standard output, as `--json` names it where it is given no file.
pub const STDOUT: &str = "-";

/// Where the text for people goes: to stderr where the report has stdout to itself.
pub fn text_out(json: Option<&Path>) -> Box<dyn Write> {
    match json {
        Some(path) if path == Path::new(STDOUT) => Box::new(io::stderr().lock()),
        _ => Box::new(io::stdout().lock()),
    }
}

/// The file that `--json` names. A file has its name only when it is complete; what is there and no file (a pipe, /dev/stdout) is written to and stays.
#[derive(Debug)]
pub struct JsonFile {
    path: PathBuf,
    /// What it is called before.
    partial: Option<PathBuf>,
    file: Option<File>,
}

impl JsonFile {
    /// Makes sure, before anything is measured, that it can be written.
    pub fn create(path: &Path) -> Result<Self> {
        if path == Path::new(STDOUT) {
            let stdout = io::stdout().as_fd().try_clone_to_owned();
            return Ok(Self {
                path: path.to_owned(),
                partial: None,
                file: Some(stdout.context("--json: cannot write to stdout")?.into()),
            });
        }
        ensure!(
            !path.is_dir(),
            "--json {}: it is a directory",
            path.display()
        );
        let special = path.metadata().is_ok_and(|metadata| !metadata.is_file());
        let partial = (!special).then(|| {
            let mut partial = OsString::from(path);
            partial.push(".tmp");
            PathBuf::from(partial)
        });
        let written = partial.as_deref().unwrap_or(path);
        let file = File::create(written)
            .with_context(|| format!("--json: cannot write {}", written.display()))?;
        Ok(Self {
            path: path.to_owned(),
            partial,
            file: Some(file),
        })
    }

    /// Writes it.
    pub fn write(mut self, report: &impl Serialize) -> Result<()> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let mut out = BufWriter::new(file);
        serde_json::to_writer_pretty(&mut out, report)
            .map_err(io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush())
            .and_then(|()| match &self.partial {
                Some(partial) => std::fs::rename(partial, &self.path),
                None => Ok(()),
            })
            .with_context(|| format!("--json: cannot write {}", self.path.display()))
    }
}

impl Drop for JsonFile {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial {
            // Gone already where it was renamed.
            let _ = std::fs::remove_file(partial);
        }
    }
}

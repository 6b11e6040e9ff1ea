//! A report's file.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// The file that `--json` names. It has its name only when it is complete.
#[derive(Debug)]
pub struct JsonFile {
    path: PathBuf,
    partial: PathBuf,
    file: Option<File>,
}

impl JsonFile {
    /// Makes sure, before anything is measured, that it can be written.
    pub fn create(path: &Path) -> Result<Self> {
        let mut partial = OsString::from(path);
        partial.push(".tmp");
        let partial = PathBuf::from(partial);
        ensure!(
            !path.is_dir(),
            "--json {}: it is a directory",
            path.display()
        );
        let file = File::create(&partial)
            .with_context(|| format!("--json: cannot write {}", partial.display()))?;
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
            .map_err(std::io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush())
            .and_then(|()| std::fs::rename(&self.partial, &self.path))
            .with_context(|| format!("--json: cannot write {}", self.path.display()))
    }
}

impl Drop for JsonFile {
    fn drop(&mut self) {
        // Gone already where it was renamed.
        let _ = std::fs::remove_file(&self.partial);
    }
}

//! `plot`: charts (SVG) and a page (HTML) from a report of `bench --json`.

mod bars;
mod draw;
mod html;
mod panels;
mod read;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cli::plot::PlotArgs;
use crate::exit::{self, usage};

use panels::Panel;
use read::Report;

/// Reads the report, draws, writes, and returns the exit code.
pub fn run(args: &PlotArgs) -> Result<u8> {
    let name = args.report.display();
    let text = fs::read(&args.report).with_context(|| format!("cannot read {name}"))?;
    let report = Report::parse(&text)
        .map_err(|why| usage(format!("{name}: it is no report of 'bench --json': {why}")))?;
    let panels = panels::panels(&report);
    if panels.is_empty() {
        return Err(usage(format!(
            "{name}: there is no chart in it: one needs figures of two batches or two frame sizes (bench --sweep rings)"
        ))
        .into());
    }
    let caption = report.caption();
    if let Some(out) = &args.out {
        if out.extension() == Some(OsStr::new("svg")) {
            write(out, &panels, &caption)?;
        } else {
            fs::create_dir_all(out)
                .with_context(|| format!("cannot make the directory {}", out.display()))?;
            for panel in &panels {
                let path = out.join(format!("{}.svg", panel.slug));
                write(&path, std::slice::from_ref(panel), &caption)?;
            }
        }
    }
    if let Some(path) = &args.html {
        let page = html::page(&report, &panels)?;
        fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
        log::info!("{} chart(s) in {}", panels.len(), path.display());
    }
    Ok(exit::OK)
}

fn write(path: &Path, panels: &[Panel], caption: &[String]) -> Result<()> {
    let mut caption = caption.to_vec();
    let left_out: usize = panels.iter().map(|panel| panel.left_out).sum();
    if left_out > 0 {
        caption.push(format!(
            "Not drawn: {left_out} figures that were measured while the cores were at another distance than a chart's title says"
        ));
    }
    let svg = draw::figure(panels, &caption)?;
    fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    log::info!("{} chart(s) in {}", panels.len(), path.display());
    Ok(())
}

#[cfg(test)]
mod tests;

//! The flags of `plot`.

use std::path::PathBuf;

use clap::Args;

/// `plot`.
#[derive(Debug, Args)]
pub struct PlotArgs {
    /// A file that `bench --json` wrote
    #[arg(value_name = "REPORT.json")]
    pub report: PathBuf,
    /// Where the charts go: one file with all of them (a name that ends in .svg), or a directory for a file each
    #[arg(long, value_name = "DIR|FILE.svg")]
    pub out: PathBuf,
}

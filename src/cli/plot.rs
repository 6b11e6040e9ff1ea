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
    #[arg(long, value_name = "DIR|FILE.svg", required_unless_present = "html")]
    pub out: Option<PathBuf>,
    /// One page with all charts, where they were measured and how; it needs nothing besides itself
    #[arg(long, value_name = "FILE.html")]
    pub html: Option<PathBuf>,
}

//! `vhost-pci`: boots VMs whose guests reach straight into each other's virtqueues, and measures them.

mod bench;
mod child;
mod cli;
mod doctor;
mod exit;
mod guest;
mod host;
mod image;
mod isolation;
mod json;
mod logger;
mod pair;
mod plot;
mod relay;
mod run;
mod sys;
mod tempdir;
mod top;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(refuse(&error)),
    };
    logger::start(cli.verbose);
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Pair(args) => pair::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Isolation(args) => isolation::run(&args),
        Command::Relay(args) => relay::run(&args),
        Command::Plot(args) => plot::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        complain(&exit::explain(&error));
        exit::of_error(&error)
    }))
}

/// One line on stderr.
fn complain(text: &str) {
    let text: Vec<&str> = text.split_whitespace().collect();
    // Nothing can be done about a stderr that is closed.
    let _ = writeln!(io::stderr(), "vhost-pci: {}", text.join(" "));
}

fn refuse(error: &clap::Error) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            exit::OK
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            exit::USAGE
        }
        _ => {
            complain(&format!("{} (see --help)", cli::one_line(error)));
            exit::USAGE
        }
    }
}

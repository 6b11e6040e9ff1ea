//! The bare-metal guest, as far as it does not depend on the machine: frames, workloads, commands, records, and what the isolation study is made of.
//!
//! The guest image (the `bare-metal` binary) runs this on a vCPU; the tool runs the same workloads on two host threads, which gives the
//! upper bound of its measurements. docs/bare-metal.md specifies commands, records and frames.
#![no_std]

extern crate alloc;

pub mod capture;
pub mod command;
mod flows;
pub mod frame;
pub mod histogram;
mod paced;
mod pairs;
pub mod record;
pub mod respond;
pub mod study;
pub mod workload;

pub use command::{Address, Command, Mode, Payload, Run, Source, Study, Work};
pub use pairs::notices;
pub use record::Outcome;
pub use workload::{Link, attempt, execute};

#[cfg(test)]
mod tests;

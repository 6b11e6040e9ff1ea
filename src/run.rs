//! `run`: one VM.

use anyhow::{Context, Result};
use vmm::Outcome;

use crate::cli::machine::RunArgs;
use crate::exit::{self, Failure};
use crate::sys;

/// Boots the VM and runs it to its end; returns the exit code.
pub fn run(args: &RunArgs) -> Result<u8> {
    if let Some(parent) = args.parent {
        sys::die_with_parent(parent)?;
    }
    let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
    let mut config = args.config(&allowed)?;
    if let Some(fd) = args.control_fd {
        config.control = Some(
            sys::inherited_fd(fd)
                .map_err(|error| exit::usage(format!("--control-fd {fd}: {error}")))?,
        );
    }
    match vmm::run(config) {
        Ok(Outcome::PowerOff { code }) => Ok(powered_off(code)),
        Ok(Outcome::Reset) => Err(Failure::Guest("the guest reset itself".into()).into()),
        Ok(Outcome::Signal(number)) => Ok(exit::of_signal(number)),
        Err(error) => Err(failure(error)),
    }
}

fn powered_off(code: u8) -> u8 {
    let out = exit::of_guest(code);
    if out != code {
        log::warn!("the guest powered off with code {code}");
    }
    out
}

/// Whose fault it was.
fn failure(error: vmm::Error) -> anyhow::Error {
    match error {
        vmm::Error::Config(why) => exit::usage(why).into(),
        vmm::Error::Vcpu {
            fault: vmm::Fault::TripleFault { .. },
            ..
        } => Failure::Guest(error.to_string()).into(),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_host_and_user_are_told_apart() {
        let code = |error| exit::of_error(&failure(error));
        let triple = vmm::Fault::TripleFault { rip: 0, cr2: 0 };
        let fault = vmm::Error::Vcpu {
            id: 0,
            fault: triple,
        };
        assert_eq!(code(fault), exit::GUEST);
        assert_eq!(code(vmm::Error::Config("x".into())), exit::USAGE);
        assert_eq!(code(vmm::Error::DeviceThread("x".into())), exit::HOST);
    }
}

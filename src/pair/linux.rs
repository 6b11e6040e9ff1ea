//! `pair --linux`: Linux in both VMs, the front-end's console in the foreground.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use super::{iommus, more_flags, rings, vm_args};
use crate::child::{Output, VmProcess};
use crate::cli::PairArgs;
use crate::cli::iommu::Iommu;
use crate::cli::machine;
use crate::exit::{self, Failure, usage};
use crate::sys::{self, Signals};
use crate::tempdir::TempDir;

/// How much of the front-end's address space the window shows. Linux makes page tables for all of it where it is mapped through sysfs, and gives devices behind an
/// IOMMU addresses below 4 GiB first.
const WINDOW: &str = ",window=4G";

/// Kernel and initial file system: as given, or where images/linux/build puts them, which is beside the directory that cargo puts this program into.
fn images(args: &PairArgs, program: &Path) -> Result<[PathBuf; 2], Failure> {
    let target = program.parent().and_then(Path::parent);
    let usual = target.unwrap_or(Path::new("/")).join("linux");
    let image = |flag, given: &Option<PathBuf>, name| match given {
        Some(path) => Ok(path.clone()),
        None => {
            let path = usual.join(name);
            match path.exists() {
                true => Ok(path),
                false => Err(usage(format!(
                    "--linux: {} is not there: images/linux/build makes it, or {flag} says where one is",
                    path.display()
                ))),
            }
        }
    };
    Ok([
        image("--kernel", &args.kernel, "vmlinuz")?,
        image("--initrd", &args.initrd, "initrd")?,
    ])
}

/// What the kernels are told, back-end first.
fn cmdlines(args: &PairArgs) -> Result<[String; 2], Failure> {
    let usual = "console=ttyS0 quiet";
    let iommu = match args.iommu {
        Iommu::Off => "",
        // As soon as a buffer is done with.
        Iommu::Dynamic => " iommu.strict=1",
        // Many at a time, a little later.
        Iommu::Batch => " iommu.strict=0",
        Iommu::Static => {
            return Err(usage(
                "--iommu static: Linux maps each buffer when it is used; it is off, dynamic or batch with --linux",
            ));
        }
    };
    Ok([usual.to_owned(), format!("{usual}{iommu}")])
}

/// The arguments of `run` for the two VMs, back-end first.
fn both(args: &PairArgs, directory: &Path, images: &[PathBuf; 2]) -> Result<[Vec<OsString>; 2]> {
    let rings = rings(args)?;
    if !rings.guest_words().is_empty() {
        return Err(
            usage("--tx, --rx-buffer, --queues: a Linux guest does that as it likes").into(),
        );
    }
    let allowed = sys::allowed_cores().context("cannot read the affinity mask")?;
    // Two guests that sleep can share a core.
    let cores = match allowed.len() {
        1 if args.both.cores.is_none() => None,
        _ => Some(args.both.cores(&allowed)?),
    };
    let mut vms = vm_args(directory, &args.both.memory, cores, &rings, iommus(args));
    for (vm, cmdline) in vms.iter_mut().zip(cmdlines(args)?) {
        let is_device = |flag: &OsString| flag.to_string_lossy().starts_with("--vhost-pci=");
        if let Some(device) = vm.iter_mut().find(|flag| is_device(flag)) {
            device.push(WINDOW);
        }
        for (flag, image) in ["--kernel=", "--initrd="].iter().zip(images) {
            let mut text = OsString::from(flag);
            text.push(image);
            vm.push(text);
        }
        vm.push(format!("--cmdline={cmdline}").into());
    }
    for (vm, more) in vms.iter_mut().zip(more_flags(args)?) {
        vm.extend(more);
    }
    Ok(vms)
}

/// Boots both VMs, and waits until one ends, which is the end of the other; returns the exit code.
pub fn run(args: &PairArgs) -> Result<u8> {
    machine::memory(&args.both.memory)?;
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let images = images(args, &program)?;
    let signals = Signals::install().context("cannot handle signals")?;
    let directory = TempDir::new().context("cannot make a directory for the socket")?;
    let [back, front] = both(args, directory.path(), &images)?;
    let mut back = VmProcess::start(
        "back-end",
        &back,
        Stdio::null(),
        Output::Show("back-end  | "),
    )?;
    let mut front = VmProcess::start("front-end", &front, Stdio::inherit(), Output::Terminal)?;
    // Dropping the VMs ends them.
    loop {
        if let Some(status) = front.ended()? {
            return Ok(exit::of_process(status));
        }
        if let Some(status) = back.ended()? {
            bail!("the back-end VM ended ({status})");
        }
        if let Some(number) = signals.caught() {
            return Ok(exit::of_signal(number));
        }
        sys::poll(&[signals.as_fd(), front.as_fd(), back.as_fd()], None).context("poll")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn pair(args: &[&str]) -> Result<PairArgs, clap::Error> {
        let all = [&["vhost-pci", "pair", "--linux"], args].concat();
        Cli::try_parse_from(all).map(|cli| match cli.command {
            Command::Pair(args) => *args,
            other => panic!("{other:?}"),
        })
    }

    fn vms(args: &[&str]) -> Result<[Vec<String>; 2], String> {
        let images = ["/k".into(), "/i".into()];
        both(&pair(args).unwrap(), Path::new("/d"), &images)
            .map(|vms| {
                vms.map(|vm| {
                    vm.iter()
                        .map(|flag| flag.to_str().unwrap().into())
                        .collect()
                })
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn both_get_the_image_and_each_its_device_and_its_words() {
        let [back, front] = vms(&["--iommu", "batch", "--memory", "size=1G"]).unwrap();
        for vm in [&back, &front] {
            for flag in ["--kernel=/k", "--initrd=/i", "--memory=size=1G"] {
                assert!(vm.iter().any(|other| other == flag), "{flag}: {vm:?}");
            }
        }
        let has = |vm: &[String], flag: &str| vm.iter().any(|other| other == flag);
        assert!(has(
            &back,
            "--vhost-pci=socket=/d/pair.sock,listen=on,window=4G"
        ));
        assert!(has(&back, "--cmdline=console=ttyS0 quiet") && !has(&back, "--iommu="));
        assert!(has(&front, "--cmdline=console=ttyS0 quiet iommu.strict=0"));
        assert!(has(&front, "--iommu="));
        let [back, front] = vms(&["--iommu-back", "on", "--ring", "packed"]).unwrap();
        assert!(has(&back, "--iommu=") && !has(&front, "--iommu="));
        assert!(front.iter().any(|flag| flag.contains(",packed=on")));
    }

    #[test]
    fn what_linux_does_not_do_is_refused() {
        let error = vms(&["--iommu", "static"]).unwrap_err();
        assert!(error.starts_with("--iommu static: "), "{error}");
        let error = vms(&["--tx", "chain"]).unwrap_err();
        assert!(error.starts_with("--tx, "), "{error}");
        for flag in ["--size", "--batch", "--count", "--seconds"] {
            assert!(pair(&[flag, "100"]).is_err(), "{flag}");
        }
    }

    #[test]
    fn the_images_are_beside_the_programs_directory_or_where_flags_say() {
        let directory = TempDir::new().unwrap();
        let linux = directory.path().join("linux");
        let program = directory.path().join("release/vhost-pci");
        let error = images(&pair(&[]).unwrap(), &program)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("linux/vmlinuz is not there: images/linux/build makes it, or --kernel"),
            "{error}"
        );
        let given = pair(&["--kernel", "/k", "--initrd", "/i"]).unwrap();
        assert_eq!(
            images(&given, &program).unwrap(),
            [PathBuf::from("/k"), "/i".into()]
        );
        std::fs::create_dir(&linux).unwrap();
        for name in ["vmlinuz", "initrd"] {
            std::fs::write(linux.join(name), "").unwrap();
        }
        assert_eq!(
            images(&pair(&[]).unwrap(), &program).unwrap(),
            ["vmlinuz", "initrd"].map(|name| linux.join(name))
        );
    }
}

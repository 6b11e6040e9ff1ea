//! A stock Linux to boot: Debian's cloud kernel of the machine's own suite, and an initial RAM disk made of busybox and a script.
//!
//! Needs Debian's `busybox-static`, `cpio` and `xz-utils`, and the kernel's package, which is downloaded once into the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// A kernel and its modules.
pub struct Kernel {
    pub image: PathBuf,
    modules: PathBuf,
}

/// What `virtio_net` needs, each behind what it needs itself.
const MODULES: [&str; 8] = [
    "failover",
    "net_failover",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_net",
];

/// The output of a command that succeeds.
#[track_caller]
fn output(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What is in `dir`, in order of the names.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    all.sort();
    all
}

/// A QEMU whose migrations of guests under TCG lose nothing, downloaded where that was not done before (images/linux/debian); or what
/// `VHOST_PCI_QEMU` names.
#[must_use]
pub fn emulator() -> Command {
    if let Some(path) = std::env::var_os("VHOST_PCI_QEMU") {
        return Command::new(path);
    }
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let script = "set -e; . images/linux/debian; need_emulator >&2; printf '%s\\n' \"${qemu[@]}\"";
    let words = output(Command::new("bash").args(["-c", script]));
    let mut words = words.lines();
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words);
    command
}

/// The name of the kernel's package, which depends on the suite; `None` where the machine has no list of packages.
fn package() -> Option<String> {
    let mut query = Command::new("apt-cache");
    let found = query.args(["depends", "linux-image-cloud-amd64"]).output();
    let depends = String::from_utf8(found.expect("apt-cache").stdout).unwrap();
    let mut lines = depends.lines();
    let version = lines.find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))?;
    Some(format!("linux-image-{version}"))
}

/// Downloads the kernel's package, of the version that the machine knows of; what went wrong where it is not to be had.
fn download(cache: &Path) -> Result<PathBuf, String> {
    let package = package().ok_or("there is no linux-image-cloud-amd64")?;
    let root = cache.join(&package);
    if root.exists() {
        return Ok(root);
    }
    let fresh = cache.join(format!("{package}.{}", std::process::id()));
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh).unwrap();
    let mut get = Command::new("apt-get");
    get.args(["download", "--quiet", &package]);
    let got = get.current_dir(&fresh).output().expect("apt-get");
    if !got.status.success() {
        fs::remove_dir_all(&fresh).unwrap();
        return Err(format!("{get:?}: {got:?}"));
    }
    let archive = entries(&fresh).remove(0);
    let mut unpack = Command::new("dpkg");
    output(unpack.arg("-x").args([&archive, &fresh.join("root")]));
    // Whole or not at all.
    fs::rename(fresh.join("root"), &root).unwrap();
    fs::remove_dir_all(&fresh).unwrap();
    Ok(root)
}

/// Has the machine learn which packages there are by now.
fn update() {
    let update = "[ $(id -u) = 0 ] && exec apt-get update -qq; exec sudo -n apt-get update -qq";
    output(Command::new("sh").args(["-c", update]));
}

/// The kernel, downloaded where that was not done before.
pub fn kernel() -> Kernel {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux");
    let root = download(&cache).or_else(|_| {
        // What the list names may have been replaced since.
        update();
        download(&cache)
    });
    let root = root.unwrap_or_else(|why| panic!("no kernel: {why}"));
    let image = entries(&root.join("boot")).into_iter().find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("vmlinuz-")
    });
    let modules = entries(&root.join("lib/modules")).remove(0);
    Kernel {
        image: image.expect("the package has a kernel"),
        modules,
    }
}

impl Kernel {
    /// The file of a module, as it is or compressed; `None` where it is built in.
    fn module(&self, name: &str) -> Option<PathBuf> {
        let mut rooms = vec![self.modules.clone()];
        while let Some(room) = rooms.pop() {
            for path in entries(&room) {
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                if path.is_dir() && !path.is_symlink() {
                    rooms.push(path);
                } else if file == format!("{name}.ko") || file == format!("{name}.ko.xz") {
                    return Some(path);
                }
            }
        }
        None
    }

    /// Makes an initial RAM disk in `dir` that loads the modules of a virtio network device and runs `script`, then powers off. Returns where
    /// it is.
    pub fn initrd(&self, dir: &Path, script: &str) -> PathBuf {
        let root = dir.join("root");
        for room in ["bin", "proc", "sys", "dev", "modules"] {
            fs::create_dir_all(root.join(room)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("Debian: busybox-static");
        let mut load = String::new();
        for name in MODULES {
            let Some(path) = self.module(name) else {
                continue;
            };
            let to = root.join(format!("modules/{name}.ko"));
            if path.extension().is_some_and(|extension| extension == "xz") {
                let unpacked = Command::new("xz").arg("-dc").arg(&path).output().unwrap();
                assert!(unpacked.status.success(), "xz: {unpacked:?}");
                fs::write(&to, unpacked.stdout).unwrap();
            } else {
                fs::copy(&path, &to).unwrap();
            }
            load += &format!("insmod /modules/{name}.ko\n");
        }
        let init = format!(
            "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\nmount -t proc proc /proc\n\
             mount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n{load}{script}\npoweroff -f\n"
        );
        fs::write(root.join("init"), init).unwrap();
        let pack = "chmod +x init && find . | cpio -o -H newc --quiet > ../initrd";
        output(Command::new("sh").args(["-ec", pack]).current_dir(&root));
        dir.join("initrd")
    }
}

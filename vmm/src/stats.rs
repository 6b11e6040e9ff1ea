//! Counters of a vCPU: the VMM's own and the kernel's (KVM_GET_STATS_FD).
#![allow(unsafe_code)] // the ioctl has no wrapper in kvm-ioctls

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use kvm_ioctls::VcpuFd;

/// _IO(KVMIO, 0xce)
const KVM_GET_STATS_FD: libc::c_ulong = 0xAECE;
/// No kernel has nearly as many counters, or as long names.
const MOST: u32 = 4096;

/// A counter that one thread writes and others read.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Only for the one thread that writes it.
    pub(crate) fn bump(&self) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Returns of KVM_RUN to the VMM, by reason.
#[derive(Default)]
pub(crate) struct Exits {
    pub(crate) io_in: Counter,
    pub(crate) io_out: Counter,
    pub(crate) mmio_read: Counter,
    pub(crate) mmio_write: Counter,
    /// Accesses that a window's host memory refused, and instructions that KVM could not emulate.
    pub(crate) refused: Counter,
    pub(crate) other: Counter,
}

impl Exits {
    /// All of them, by reason.
    pub(crate) fn all(&self) -> [(&'static str, u64); 6] {
        [
            ("io_in", self.io_in.get()),
            ("io_out", self.io_out.get()),
            ("mmio_read", self.mmio_read.get()),
            ("mmio_write", self.mmio_write.get()),
            ("refused", self.refused.get()),
            ("other", self.other.get()),
        ]
    }
}

/// What is known of a vCPU from outside.
#[derive(Default)]
pub(crate) struct VcpuStats {
    pub(crate) tid: AtomicI32,
    pub(crate) exits: Exits,
    kernel: Option<File>,
}

impl VcpuStats {
    pub(crate) fn new(vcpu: &VcpuFd) -> Self {
        VcpuStats {
            kernel: stats_file(vcpu),
            ..Default::default()
        }
    }

    /// The kernel's counters, where it has them.
    pub(crate) fn kernel(&self) -> Vec<(String, u64)> {
        let file = self.kernel.as_ref();
        file.and_then(|file| read(file).ok()).unwrap_or_default()
    }

    /// As a JSON object.
    pub(crate) fn to_json(&self) -> String {
        let field = |name: &str, value: u64| format!("\"{name}\":{value}");
        let exits = self.exits.all().map(|(name, value)| field(name, value));
        let kernel: Vec<String> = self.kernel().iter().map(|(n, v)| field(n, *v)).collect();
        format!(
            "{{\"tid\":{},\"exits\":{{{}}},\"kvm\":{{{}}}}}",
            self.tid.load(Ordering::Relaxed),
            exits.join(","),
            kernel.join(","),
        )
    }
}

/// `None` on kernels before 5.14.
fn stats_file(vcpu: &VcpuFd) -> Option<File> {
    // SAFETY: an ioctl without an argument on a descriptor that `vcpu` owns.
    let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
    // SAFETY: where it is not negative, the call returned a new descriptor that nobody else owns.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes
        .get(offset..offset + 4)?
        .try_into()
        .ok()
        .map(u32::from_le_bytes)
}

/// The counters that are one number each, by name. (Histograms are left out.)
fn read(file: &File) -> io::Result<Vec<(String, u64)>> {
    let odd = || io::Error::other("the kernel's counters have an unknown format");
    let mut header = [0; 24];
    file.read_exact_at(&mut header, 0)?;
    let field = |offset| word(&header, offset).ok_or_else(odd);
    let (name_size, count, descriptors, data) = (field(4)?, field(8)?, field(16)?, field(20)?);
    if name_size > MOST || count > MOST {
        return Err(odd());
    }
    let descriptor_size = usize::try_from(name_size).map_err(io::Error::other)? + 16;
    let mut table = vec![0; descriptor_size * usize::try_from(count).map_err(io::Error::other)?];
    file.read_exact_at(&mut table, descriptors.into())?;
    let mut counters = Vec::new();
    for descriptor in table.chunks_exact(descriptor_size) {
        let size = descriptor
            .get(6..8)
            .and_then(|b| b.try_into().ok())
            .map(u16::from_le_bytes);
        let offset = word(descriptor, 8).ok_or_else(odd)?;
        let name = descriptor.get(16..).unwrap_or(&[]);
        let name: String = name
            .iter()
            .take_while(|b| **b != 0)
            .map(|b| char::from(*b))
            .collect();
        if size != Some(1) || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            continue;
        }
        let mut value = [0; 8];
        file.read_exact_at(&mut value, u64::from(data) + u64::from(offset))?;
        counters.push((name, u64::from_le_bytes(value)));
    }
    Ok(counters)
}

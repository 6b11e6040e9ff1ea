//! Builds the bare-metal guest that is embedded into the tool.
//!
//! It is built by a cargo of its own, for the same target and from the same lock file, with its own target directory (the outer
//! cargo holds the lock of the usual one).

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    for path in [
        "virtqueue",
        "guest-driver",
        "images/bare-metal",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    // Grows with every commit and checkout; what is not there would be built anew each time.
    if Path::new(".git/logs/HEAD").exists() {
        println!("cargo::rerun-if-changed=.git/logs/HEAD");
    }
    println!(
        "cargo::rustc-env=VHOST_PCI_COMMIT={}",
        commit().unwrap_or_default()
    );

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let target = env::var("TARGET").expect("cargo sets TARGET");
    // One for all profiles of the tool, in <target>, of which OUT_DIR is <target>/<profile>/build/<package>/out: the guest is the same, and takes a minute.
    let target_dir = out.ancestors().nth(4).unwrap_or(&out).join("guest");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo
        .args([
            "build",
            "--release",
            "--locked",
            "--package",
            "bare-metal",
            "--bin",
            "bare-metal",
            "--features",
            "image",
        ])
        .args(["--target", &target, "--target-dir"])
        .arg(&target_dir)
        // What the outer build was told (a linter in place of the compiler, other flags) is not meant for the guest.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_BUILD_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        // Nor a profile that is quick to build: without link-time optimisation the guest lacks what unwinding would need.
        .env_remove("CARGO_PROFILE_RELEASE_LTO")
        .env_remove("CARGO_PROFILE_RELEASE_CODEGEN_UNITS")
        .env("CARGO_ENCODED_RUSTFLAGS", "-Crelocation-model=static");
    let status = cargo.status().expect("cargo can be started");
    assert!(
        status.success(),
        "the bare-metal guest does not build: {status}"
    );
    let image = target_dir.join(&target).join("release/bare-metal");
    std::fs::copy(&image, out.join("bare-metal"))
        .unwrap_or_else(|error| panic!("{}: {error}", image.display()));
}

/// The commit that is built, where this is a checkout and git is there.
fn commit() -> Option<String> {
    if !Path::new(".git").exists() {
        return None;
    }
    let output = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

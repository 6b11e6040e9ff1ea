//! Links the image as a freestanding ELF executable at a fixed address; the library needs nothing.

fn main() {
    println!("cargo::rerun-if-changed=image.ld");
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("image.ld");
    for arg in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,noexecstack",
    ] {
        println!("cargo::rustc-link-arg-bin=bare-metal={arg}");
    }
    println!(
        "cargo::rustc-link-arg-bin=bare-metal=-Wl,-T,{}",
        script.display()
    );
}

//! The guest image that is built into the tool.

/// The bare-metal guest, an ELF file (made by build.rs from `images/bare-metal`).
pub fn builtin() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/bare-metal"))
}

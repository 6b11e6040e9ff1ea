//! Integration tests, in one program: each would be linked with all of the tool's libraries anew.
//!
//! They run one at a time (`cargo test --release --test integration -- --test-threads=1`), and most of them need /dev/kvm and two cores. A part by
//! itself: `… -- --test-threads=1 qemu::`.

mod cli;
mod common;
mod interop;
mod qemu;
mod relay;
mod tap;
mod vhost_user_backend;
mod vm;

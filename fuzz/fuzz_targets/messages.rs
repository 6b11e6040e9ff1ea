//! A hostile peer's bytes and descriptors on a vhost-user socket.
#![no_main]

use devices::fuzz_bodies::fuzz_messages;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_messages(data));

//! What the VMM is given by others, as a byte string: the bodies of the fuzz targets, and of tests that make the strings up. They panic where it breaks a promise.

pub use crate::boot::fuzz_body::fuzz_kernel;
pub use crate::windows::fuzz_body::fuzz_window;

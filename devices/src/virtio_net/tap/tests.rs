//! The device over a stand-in for a tap.

//! Boots a disk in a small KVM virtual machine and says whether it works.

pub mod console;
pub mod engine;
pub mod pattern;
pub mod verdict;
pub mod watch;

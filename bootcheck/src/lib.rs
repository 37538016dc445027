//! Boots a disk in a small KVM virtual machine and says whether it works.

pub mod engine;

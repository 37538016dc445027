//! Boots a disk in a small KVM virtual machine and says whether it works.

mod acpi;
mod boot;
pub mod bus;
pub mod console;
mod cpu;
pub mod engine;
mod kick;
pub mod kvm;
mod machine;
pub mod memory;
pub mod pattern;
pub mod pci;
pub mod platform;
pub mod power;
mod sandbox;
pub mod serial;
mod sys;
mod vcpu;
pub mod verdict;
pub mod virtio;
pub mod vm;
pub mod watch;

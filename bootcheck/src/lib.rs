//! Boots a disk in a small virtual machine and says whether it works.
//!
//! ```text
//!    Check (disk, kernel, what to look for, time limit)
//!      |  check::run
//!      v
//!    engine: our own KVM machine, or an installed qemu       engine.rs is the seam
//!      |  console bytes
//!      v
//!    console -> watch (pattern)  -> verdict -> report        lines, signs, the answer, its evidence
//! ```
//!
//! The disk is written to as the guest pleases; [`scratch`] puts an overlay over it that vanishes. Nothing here
//! prints or looks at the environment.

mod acpi;
mod boot;
pub mod bus;
pub mod check;
pub mod console;
pub mod counted;
mod cpu;
pub mod engine;
mod firmware;
pub mod folder;
pub mod fuzz;
pub mod kernel;
mod kick;
pub mod kvm;
pub mod loader;
mod machine;
pub mod memory;
pub mod pattern;
pub mod pci;
pub mod platform;
pub mod power;
pub mod qemu;
pub mod report;
mod sandbox;
pub mod scratch;
pub mod serial;
mod sys;
pub mod trace;
mod vcpu;
pub mod verdict;
pub mod vhost_user;
pub mod virtio;
pub mod vm;
pub mod watch;

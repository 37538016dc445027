//! Changes a guest's file systems that vimg cannot write itself (XFS, btrfs, NTFS), by a small Linux of ours.
//!
//! ```text
//!   Kernel           the guest's own or a given one, with the modules that are needed     kernel, modules
//!   initramfs        those modules and our init (init/), a static program                 cpio
//!   engine           bootcheck's: our KVM machine, or an installed qemu; or a User-Mode Linux         uml
//!                    for those who want that, the host's own kernel                                host
//!      |             disks: the guest's volumes, and a mailbox in memory
//!   Appliance        requests and answers through the mailbox, bells on the serial line   wire, line, session
//!   Mounted          a mounted file system: guestedit's trait, so that nobody above sees a difference
//! ```
//!
//! The guest's disk is a stranger's, and so is a kernel that has mounted it: the appliance shares nothing with the host
//! but those disks and the mailbox, and its answers are checked like any other foreign bytes. Nothing here prints or
//! looks at the environment; the engine is the caller's choice.
#![forbid(unsafe_code)]

mod fs;
mod host;
mod kernel;
mod lazy;
mod line;
pub mod modules;
mod program;
mod session;
mod uml;
pub mod wire;
#[cfg(test)]
mod wire_tests;

pub use fs::Mounted;
pub use host::HostEngine;
pub use kernel::{Kernel, usual_places};
pub use lazy::{Lazy, linux_name};
pub use session::{Appliance, Mount, Options, Output, Place};
pub use uml::UmlEngine;

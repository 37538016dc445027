//! The engine that is none: the host's own kernel mounts the file systems. It takes root, and a kernel that parses a
//! stranger's file system with all its rights: only for users who ask for it.
//!
//! ```text
//!   this process                                      our init, a process of root
//!     disks  <-- FUSE: a file for each --  /dev/loopN <-- mount: nosuid, nodev, noexec
//!     observer, Control  <-- a pair of sockets ---->  line
//! ```
//!
//! A thread of ours and the init are alone in a mount namespace; the files and what is mounted are seen by nobody else.
//! When both have ended, however that happens, the kernel takes the namespace, the mounts and the loop devices away.

mod disks;
mod run;

use std::sync::Arc;

use block::{Error, ErrorKind, Result};
use bootcheck::engine::{Boot, Engine, MachineSpec, Observer, Runnable};

use run::Machine;

/// The host's kernel. It boots nothing: [`Kernel::of_host`](crate::Kernel::of_host) goes with it.
#[derive(Debug, Clone, Copy)]
pub struct HostEngine;

impl Engine for HostEngine {
    fn name(&self) -> &'static str {
        "mount"
    }

    fn build(&self, spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>> {
        if !matches!(&spec.boot, Boot::Linux { kernel, .. } if kernel.is_empty()) {
            return Err(Error::usage("the host's kernel runs already"));
        }
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::new(ErrorKind::Permission, "only root can mount file systems on this host")
                .hint("an appliance needs no root: leave out --backend mount"));
        }
        Ok(Box::new(Machine::new(spec.disks, observer)?))
    }
}

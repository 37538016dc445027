//! Our own engine: a KVM virtual machine in this process.

mod probe;
mod vm;

use std::sync::Arc;

use block::Result;

pub use probe::{KvmState, probe};
pub(crate) use vm::{KvmVm, open, refused};

use crate::engine::{Engine, MachineSpec, Observer, Runnable};
use crate::machine::Machine;

/// Where KVM is found.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// Runs guests on this host's KVM.
#[derive(Debug, Clone, Copy, Default)]
pub struct KvmEngine;

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn build(&self, spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>> {
        Ok(Box::new(Machine::build(spec, observer)?))
    }
}

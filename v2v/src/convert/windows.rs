//! Systems that are not Linux: what can be said of them without writing to NTFS.

use crate::inspect::System;
use crate::plan::{Plan, PlanOptions, TargetBus};

/// The changes for one system.
pub(crate) fn convert(system: &System, options: &PlanOptions) -> Plan {
    let mut plan = Plan::default();
    let name = if system.product.is_empty() { "A system that is not Linux" } else { &system.product };
    match options.bus {
        TargetBus::Sata => plan.left_alone.push(format!("{name} is left as it is: it has drivers for SATA.")),
        TargetBus::VirtioBlk | TargetBus::VirtioScsi => plan.to_do.push(format!(
            "{name} does not get its virtio drivers from here: attach its disks by SATA (--bus sata), or install them first."
        )),
    }
    plan
}

//! A boot through a firmware: which one, and what is known of the disk before it runs.

use std::sync::Arc;
use std::time::Duration;

use block::{BlockDevice, Result};
use bootcheck::engine::Boot;
use bootcheck::loader::{FirmwareUse, add_console, look};
use guestdisk::Keys;
use guestdisk::boot::firmware::Firmware;
use guestdisk::boot::nvram;

use super::Args;
use super::firmware::Firmwares;

/// What is to be booted.
pub(super) struct Through {
    pub(super) boot: Boot,
    pub(super) used: FirmwareUse,
}

/// Chooses the firmware, unless that is settled, and looks at the disks.
pub(super) fn find(
    firmwares: &Firmwares,
    settled: Option<Firmware>,
    args: &Args,
    (disks, keys): (&[Arc<dyn BlockDevice>], &Keys),
    stall_limit: Duration,
) -> Result<Through> {
    let changes = if args.add_console { add_console(disks, keys)? } else { vec![] };
    let looked = look(disks, keys)?;
    let choice = looked.facts.choose(None);
    let firmware = settled.unwrap_or(choice.firmware);
    let reason = match settled {
        Some(_) => format!("asked for; {}", looked.facts.describe(firmware)),
        None => choice.reason,
    };
    let loaded = firmwares.get(firmware)?;
    // What the guest's firmware cannot read, it ignores.
    let nvram = loaded.vars.as_deref().map(|vars| nvram::boot_entries(vars).unwrap_or_default());
    let used = FirmwareUse {
        firmware,
        code: loaded.code_name.clone(),
        vars: loaded.vars_name.clone(),
        reason,
        both: choice.both && settled.is_none(),
        landmarks: looked.landmarks(firmware),
        facts: looked.facts,
        nvram: nvram.unwrap_or_default(),
        stall_limit,
        changes,
    };
    Ok(Through { boot: Boot::Firmware { code: Arc::clone(&loaded.code), vars: loaded.vars.clone() }, used })
}

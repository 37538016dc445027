//! Guests that are converted: looked at, planned, changed, looked at again. Nothing may panic, run on, or take more memory
//! than the input justifies.

use std::sync::Arc;

use block::mem::MemStorage;
use block::overlay::Overlay;
use block::{BlockDevice, Error, ErrorKind};
use guestdisk::Disks;
use v2v::guest::{Disk, DiskImage, Guest, Nic, Origin};
use v2v::inspect::inspect;
use v2v::plan::{self, PlanOptions, TargetBus};

/// The most bytes of all changes together.
const MOST_CHANGES: usize = 1 << 30;

/// The disk of a guest, packed as [`pack_disk`](super::pack_disk) does it.
pub fn guest_convert(bytes: &[u8]) {
    let plain = PlanOptions::default();
    let all = PlanOptions {
        bus: TargetBus::VirtioScsi,
        autorelabel: true,
        serial_console: true,
        ..PlanOptions::default()
    };
    let pick = bytes.last().is_some_and(|byte| byte & 1 != 0);
    convert(bytes, if pick { &all } else { &plain });
}

fn convert(bytes: &[u8], options: &PlanOptions) {
    let store = Arc::new(MemStorage::new());
    let Ok(overlay) = Overlay::new(super::guest::device(bytes), store, 4096) else { return };
    let device: Arc<dyn BlockDevice> = Arc::new(overlay);
    if change(&device, options).is_ok() {
        let _ = planned(&device, options);
    }
}

fn guest() -> Guest {
    let disk = Disk {
        guest_name: Some("sda".to_owned()),
        ..Disk::new("scsi0:0", DiskImage::Empty { size_bytes: 1 << 20 })
    };
    let nic = Nic { mac: Some("00:0c:29:aa:bb:cc".to_owned()), slot: Some(192), ..Nic::default() };
    Guest {
        name: "fuzz".to_owned(),
        origin: Origin::Vmware,
        disks: vec![disk],
        nics: vec![nic],
        ..Guest::default()
    }
}

fn planned(device: &Arc<dyn BlockDevice>, options: &PlanOptions) -> block::Result<(Disks, plan::Plan)> {
    let disks = Disks::open(Arc::clone(device))?;
    let found = inspect(&disks)?;
    let plan = plan::make(&disks, &guest(), &found, options)?;
    let bytes: usize = plan.changes.iter().map(|change| change.action.bytes().len()).sum();
    assert!(bytes <= MOST_CHANGES, "changes of {bytes} bytes");
    Ok((disks, plan))
}

fn change(device: &Arc<dyn BlockDevice>, options: &PlanOptions) -> block::Result<()> {
    let (disks, plan) = planned(device, options)?;
    let clock = guestedit::Options { time: Some(1_700_000_000) };
    let mut open = |index: usize| {
        let missing = || Error::new(ErrorKind::NotFound, "no such volume");
        guestedit::open_volume(disks.volumes().get(index).ok_or_else(missing)?, &clock)
    };
    v2v::apply::apply(&plan, &mut open, &mut ())?;
    Ok(())
}

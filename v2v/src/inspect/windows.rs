//! Windows, as far as its disks tell without their NTFS being read.

use guestdisk::Disks;
use guestdisk::boot::firmware::{self, BootCode};
use guestdisk::detect::Kind;

use super::{Obstacle, System, SystemKind};

/// The Windows of a guest, if there is one. `alone`: no other system was found.
pub(super) fn find(disks: &Disks, alone: bool) -> Option<System> {
    let is_its = |kind: Kind| matches!(kind, Kind::Ntfs | Kind::BitLocker);
    let volumes = disks.volumes().iter().enumerate();
    let its =
        volumes.filter(|(_, volume)| volume.content.as_ref().is_some_and(|content| is_its(content.kind)));
    // The partitions that Windows sets aside for starting and for recovery are small.
    let (root, volume) = its.max_by_key(|(_, volume)| volume.device.size())?;
    if !alone && !has_boot_manager(disks) {
        return None;
    }
    let mut system = System {
        root,
        location: volume.location.clone(),
        kind: SystemKind::Windows,
        distribution: "windows".into(),
        product: "Windows".into(),
        ..System::default()
    };
    if volume.content.as_ref().is_some_and(|content| content.kind == Kind::BitLocker) {
        system.obstacles.push(Obstacle {
            code: "bitlocker",
            message: format!("{} is encrypted (BitLocker)", volume.location),
            hint: "suspend or remove BitLocker in the guest before it is converted".into(),
            fatal: true,
        });
    }
    if let Ok(facts) = firmware::facts(disks) {
        let partition = facts.efi_loader().or(facts.efi.first());
        system.esp = partition.map(|partition| partition.volume);
        let fallback = partition.and_then(|partition| partition.fallback.as_deref());
        system.fallback_loader = fallback.map(|path| path.replace('\\', "/").into());
    }
    Some(system)
}

/// Whether something on the disks starts Windows.
fn has_boot_manager(disks: &Disks) -> bool {
    let Ok(facts) = firmware::facts(disks) else { return false };
    let loaders = facts.efi.iter().flat_map(|partition| &partition.loaders);
    let by_efi = loaders.into_iter().any(|loader| loader.to_ascii_lowercase().ends_with("bootmgfw.efi"));
    let by_bios = [Some(facts.boot_code), facts.active.map(|(_, code)| code)];
    by_efi || by_bios.contains(&Some(BootCode::Windows))
}

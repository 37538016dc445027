//! Windows: which volume it is on, and what its registry says.

mod facts;

use guestdisk::boot::firmware::{self, BootCode};
use guestdisk::detect::Kind;
use guestdisk::partition::PartitionType;
use guestdisk::{Disks, Volume};

use super::{Obstacle, System, SystemKind};

pub use facts::Windows;
pub(crate) use facts::open_hive;

/// Types of partitions that belong to a dynamic disk (LDM), as text.
const LDM: [&str; 2] = ["5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "af9b60a0-1431-4f62-bc68-3311714a69ad"];

/// The Windows of a guest, if there is one. `alone`: no other system was found.
pub(super) fn find(disks: &Disks, alone: bool) -> Option<System> {
    let its = |kind: Kind| matches!(kind, Kind::Ntfs | Kind::BitLocker);
    let is = |volume: &Volume, wanted: &dyn Fn(Kind) -> bool| {
        volume.content.as_ref().is_some_and(|content| wanted(content.kind))
    };
    let volumes = || disks.volumes().iter().enumerate().filter(|(_, volume)| is(volume, &its));
    let with_registry = volumes().find(|(_, volume)| {
        is(volume, &|kind| kind == Kind::Ntfs)
            && volume.file_system().is_ok_and(|files| files.exists("/Windows/System32/config/SYSTEM"))
    });
    // The partitions that Windows sets aside for starting and for recovery are small.
    let (root, volume) = match with_registry {
        Some(found) => found,
        None => volumes()
            .max_by_key(|(_, volume)| volume.device.size())
            .filter(|_| alone || has_boot_manager(disks))?,
    };
    let mut system = System {
        root,
        location: volume.location.clone(),
        kind: SystemKind::Windows,
        distribution: "windows".into(),
        product: "Windows".into(),
        ..System::default()
    };
    if is(volume, &|kind| kind == Kind::BitLocker) {
        system.obstacles.push(Obstacle {
            code: "bitlocker",
            message: format!("{} is encrypted (BitLocker)", volume.location),
            hint: "suspend or remove BitLocker in the guest before it is converted".into(),
            fatal: true,
        });
    } else {
        facts::fill(volume, &mut system);
    }
    system.obstacles.extend(dynamic(disks));
    if let Ok(facts) = firmware::facts(disks) {
        let partition = facts.efi_loader().or(facts.efi.first());
        system.esp = partition.map(|partition| partition.volume);
        let fallback = partition.and_then(|partition| partition.fallback.as_deref());
        system.fallback_loader = fallback.map(|path| path.replace('\\', "/").into());
    }
    Some(system)
}

/// Dynamic disks: their volumes are known to Windows only.
fn dynamic(disks: &Disks) -> Option<Obstacle> {
    let is_its = |kind: PartitionType| match kind {
        PartitionType::Mbr(byte) => byte == 0x42,
        PartitionType::Gpt(guid) => LDM.contains(&guid.to_string().to_lowercase().as_str()),
    };
    let tables = disks.disks().iter().enumerate();
    let mut with = tables.filter_map(|(index, disk)| {
        let table = disk.table.as_ref()?;
        table.partitions.iter().any(|partition| is_its(partition.kind)).then_some(index)
    });
    with.next().map(|disk| Obstacle {
        code: "dynamic-disk",
        message: format!("disk {} is a dynamic disk of Windows (LDM), whose volumes are not read", disk + 1),
        hint: "if Windows itself lies on it, make it a basic disk before it is converted".into(),
        fatal: false,
    })
}

/// Whether something on the disks starts Windows.
fn has_boot_manager(disks: &Disks) -> bool {
    let Ok(facts) = firmware::facts(disks) else { return false };
    let loaders = facts.efi.iter().flat_map(|partition| &partition.loaders);
    let by_efi = loaders.into_iter().any(|loader| loader.to_ascii_lowercase().ends_with("bootmgfw.efi"));
    let by_bios = [Some(facts.boot_code), facts.active.map(|(_, code)| code)];
    by_efi || by_bios.contains(&Some(BootCode::Windows))
}

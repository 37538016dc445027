//! What was found, as a document for programs (docs/inspect.md) and as a text for people.

mod text;

use std::path::Path;

use guestdisk::boot::{BootFile, Entry};
use guestdisk::md::Array;
use guestdisk::partition::Partition;
use guestdisk::{Disks, Volume};
use serde_json::{Value, json};

use super::{
    DeviceName, Driver, Initramfs, Inspection, Interface, Kernel, LoaderConfig, Mount, Obstacle, System,
    Tools, Windows,
};

pub use text::to_text;

/// The document: disks, volumes, and what was found on them.
pub fn document(disks: &Disks, found: &Inspection) -> Value {
    json!({
        "disks": disks.disks().iter().enumerate().map(disk).collect::<Vec<_>>(),
        "arrays": disks.arrays().iter().map(array).collect::<Vec<_>>(),
        "volume-groups": disks.volume_groups().iter().map(|group| json!({
            "name": group.name,
            "uuid": group.uuid,
        })).collect::<Vec<_>>(),
        "volumes": disks.volumes().iter().enumerate().map(|(index, volume)| self::volume(disks, index, volume)).collect::<Vec<_>>(),
        "firmware": found.firmware.iter().map(|kind| kind.name()).collect::<Vec<_>>(),
        "firmware-reasons": found.firmware_reasons,
        "systems": found.systems.iter().map(system).collect::<Vec<_>>(),
        "problems": found.problems,
    })
}

fn disk((index, disk): (usize, &guestdisk::Disk)) -> Value {
    let mut value = json!({ "disk": index + 1, "size": disk.device.size() });
    if let Some(table) = &disk.table {
        value["partition-table"] = json!({
            "type": table.scheme.name(),
            "uuid": table.uuid,
            "sector-size": table.sector_bytes,
            "partitions": table.partitions.iter().map(partition).collect::<Vec<_>>(),
        });
    }
    value
}

fn partition(partition: &Partition) -> Value {
    json!({
        "number": partition.number,
        "offset": partition.offset,
        "size": partition.len,
        "type": partition.kind.to_string(),
        "name": partition.name,
        "uuid": partition.uuid,
        "bootable": partition.bootable(),
    })
}

fn array(array: &Array) -> Value {
    json!({
        "name": array.name,
        "full-name": array.full_name,
        "uuid": array.uuid,
        "level": array.level,
        "metadata": array.version.name(),
        "size": array.size,
        "disks": array.disks,
        "missing": array.missing,
        "dirty": array.dirty,
        "read-only": array.locked,
        "error": array.device().err().map(|error| error.to_string()),
        "members": array.members.iter().map(|member| json!({
            "place": member.location.to_string(),
            "number": member.slot,
            "state": member.state.name(),
        })).collect::<Vec<_>>(),
    })
}

fn volume(disks: &Disks, index: usize, volume: &Volume) -> Value {
    json!({
        "volume": index,
        "place": volume.location.to_string(),
        "size": volume.device.size(),
        "content": volume.content.as_ref().map(|content| content.kind.name()),
        "uuid": volume.uuid(),
        "label": volume.label(),
        "partuuid": volume.partuuid(),
        "inside": disks.within(&volume.location),
    })
}

fn system(system: &System) -> Value {
    json!({
        "root": system.root,
        "place": system.location.to_string(),
        "subvolume": path(&system.subvolume),
        "kind": system.kind.name(),
        "distribution": system.distribution,
        "like": system.like,
        "version": system.version,
        "product": system.product,
        "architecture": system.architecture,
        "host-name": system.host_name,
        "packages": system.packages,
        "init": system.init.name(),
        "mounts": system.mounts.iter().map(mount).collect::<Vec<_>>(),
        "boot-entries": system.entries.iter().map(entry).collect::<Vec<_>>(),
        "kernels": system.kernels.iter().map(kernel).collect::<Vec<_>>(),
        "boot-loader-files": system.loaders.iter().map(loader).collect::<Vec<_>>(),
        "esp": system.esp,
        "fallback-loader": system.fallback_loader.as_deref().map(path),
        "guest-tools": system.tools.iter().map(tools).collect::<Vec<_>>(),
        "interfaces": system.interfaces.iter().map(interface).collect::<Vec<_>>(),
        "selinux": system.selinux,
        "device-names": system.device_names.iter().map(device_name).collect::<Vec<_>>(),
        "windows": system.windows.as_ref().map(windows),
        "obstacles": system.obstacles.iter().map(obstacle).collect::<Vec<_>>(),
    })
}

fn windows(facts: &Windows) -> Value {
    json!({
        "folder": path(&facts.folder),
        "build": facts.build,
        "server": facts.server,
        "edition": facts.edition,
        "control-set": facts.control_set,
        "driver-database": facts.driver_database,
        "boot-drivers": facts.boot_drivers,
        "local-time": facts.local_time,
        "fast-startup": facts.fast_startup,
        "drive-letters": facts.drive_letters.iter().map(char::to_string).collect::<Vec<_>>(),
        "addresses": facts.addresses,
    })
}

/// A path as text: what is not UTF-8 is replaced.
fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn file(file: &BootFile) -> Value {
    let mut value = json!({ "volume": file.volume, "path": path(&file.path) });
    if let Some((offset, len)) = file.section {
        value["offset"] = offset.into();
        value["size"] = len.into();
    }
    value
}

fn mount(mount: &Mount) -> Value {
    json!({
        "spec": mount.spec,
        "path": path(&mount.path),
        "type": mount.kind,
        "options": mount.options,
        "volume": mount.volume,
        "line": mount.line,
    })
}

fn entry(entry: &Entry) -> Value {
    json!({
        "id": entry.id,
        "title": entry.title,
        "loader": entry.loader.to_string(),
        "default": entry.default,
        "kernel": file(&entry.kernel),
        "initrds": entry.initrds.iter().map(file).collect::<Vec<_>>(),
        "cmdline": entry.cmdline,
        "source": file(&entry.source),
    })
}

fn kernel(kernel: &Kernel) -> Value {
    json!({
        "release": kernel.release,
        "image": kernel.image.as_ref().map(file),
        "initrds": kernel.initrds.iter().map(file).collect::<Vec<_>>(),
        "modules": kernel.modules.as_deref().map(path),
        "boot-entries": kernel.entries,
        "default": kernel.default,
        "unified": kernel.unified,
        "initramfs": kernel.initramfs.as_ref().map(initramfs),
        "drivers": kernel.drivers.iter().map(driver).collect::<serde_json::Map<_, _>>(),
    })
}

fn initramfs(initramfs: &Initramfs) -> Value {
    json!({
        "generator": initramfs.generator,
        "compression": initramfs.compression,
        "segments": initramfs.segments,
        "size": initramfs.len,
        "modules": initramfs.modules,
        "module-names": initramfs.module_names,
        "module-suffix": initramfs.module_suffix,
        "merged-usr": initramfs.merged_usr,
        "mdadm": initramfs.has_mdadm,
        "files": initramfs.files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(),
    })
}

fn driver(driver: &Driver) -> (String, Value) {
    (driver.name.clone(), driver.place.name().into())
}

fn loader(config: &LoaderConfig) -> Value {
    json!({ "loader": config.loader.to_string(), "file": file(&config.file) })
}

fn tools(tools: &Tools) -> Value {
    json!({ "name": tools.name, "services": tools.services.iter().map(|service| path(service)).collect::<Vec<_>>() })
}

fn interface(interface: &Interface) -> Value {
    json!({
        "name": interface.name,
        "mac": interface.mac,
        "static": interface.is_static,
        "files": interface.files.iter().map(|file| path(file)).collect::<Vec<_>>(),
    })
}

fn device_name(name: &DeviceName) -> Value {
    json!({
        "file": path(&name.file),
        "member": name.member,
        "line": name.line,
        "name": name.name,
        "volume": name.volume,
    })
}

fn obstacle(obstacle: &Obstacle) -> Value {
    json!({
        "code": obstacle.code,
        "message": obstacle.message,
        "hint": obstacle.hint,
        "fatal": obstacle.fatal,
    })
}

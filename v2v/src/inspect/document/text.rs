//! The text for people.

use std::fmt::Write as _;

use guestdisk::md::Array;
use guestdisk::{Disks, Location};

use crate::inspect::{DriverPlace, Inspection, Kernel, System, SystemKind};

/// Everything of importance, in lines.
pub fn to_text(disks: &Disks, found: &Inspection) -> String {
    let mut text = Text::default();
    volumes(&mut text, disks);
    for system in &found.systems {
        text.blank();
        self::system(&mut text, disks, system);
    }
    text.blank();
    for reason in &found.firmware_reasons {
        text.line(0, &format!("firmware: {reason}"));
    }
    for problem in &found.problems {
        text.line(0, &format!("problem: {problem}"));
    }
    text.0
}

/// Lines. What comes from disks is freed of what could confuse a terminal.
#[derive(Default)]
struct Text(String);

impl Text {
    fn line(&mut self, indent: usize, line: &str) {
        let clean: String = line.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let _ = writeln!(self.0, "{:indent$}{}", "", clean.trim_end(), indent = 2 * indent);
    }

    fn blank(&mut self) {
        self.0.push('\n');
    }

    /// A list, if there is anything in it.
    fn list(&mut self, title: &str, lines: impl Iterator<Item = String>) {
        let lines: Vec<_> = lines.collect();
        if !lines.is_empty() {
            self.line(1, title);
            lines.iter().for_each(|line| self.line(2, line));
        }
    }
}

fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    // In tenths.
    let mut value = bytes.saturating_mul(10) / 1024;
    while value >= 10_240 && unit + 1 < UNITS.len() {
        value /= 1024;
        unit += 1;
    }
    if value.is_multiple_of(10) || value >= 1000 {
        format!("{} {}", value / 10, UNITS[unit])
    } else {
        format!("{}.{} {}", value / 10, value % 10, UNITS[unit])
    }
}

fn volumes(text: &mut Text, disks: &Disks) {
    for (index, disk) in disks.disks().iter().enumerate() {
        let table = disk.table.as_ref().map_or("no partition table", |table| table.scheme.name());
        text.line(0, &format!("disk {}: {}, {table}", index + 1, size(disk.device.size())));
        let own = disks.volumes().iter().filter(|volume| volume.location.disk() == Some(index));
        own.for_each(|volume| line_of(text, disks, volume));
    }
    for array in disks.arrays() {
        self::array(text, disks, array);
    }
    let within =
        disks.volumes().iter().filter(|volume| matches!(volume.location, Location::Decrypted { .. }));
    for (index, volume) in within.enumerate() {
        if index == 0 {
            text.line(0, "within encrypted volumes");
        }
        line_of(text, disks, volume);
    }
    for group in disks.volume_groups() {
        text.line(0, &format!("volume group {}", group.name));
        let own = disks.volumes().iter().filter(
            |volume| matches!(&volume.location, Location::Logical { group: own, .. } if *own == group.name),
        );
        own.for_each(|volume| line_of(text, disks, volume));
    }
}

fn array(text: &mut Text, disks: &Disks, array: &Array) {
    let mut line = format!("array /dev/{}: {}, metadata {}", array.name, array.level, array.version);
    if !array.full_name.is_empty() {
        let _ = write!(line, ", name {}", array.full_name);
    }
    let _ = write!(line, ", {} of {} members", array.disks as usize - array.missing.len(), array.disks);
    if let Some(reason) = &array.locked {
        let _ = write!(line, ", read-only: {reason}");
    }
    text.line(0, &line);
    for member in &array.members {
        let number = member.slot.map_or("-".to_owned(), |slot| slot.to_string());
        text.line(1, &format!("number {number}: {}, {}", member.location, member.state.name()));
    }
    if let Err(error) = array.device() {
        text.line(1, &format!("not read: {error}"));
    }
    let own = disks
        .volumes()
        .iter()
        .filter(|volume| matches!(&volume.location, Location::Array { name, .. } if *name == array.name));
    own.for_each(|volume| line_of(text, disks, volume));
}

fn line_of(text: &mut Text, disks: &Disks, volume: &guestdisk::Volume) {
    let place = match &volume.location {
        Location::Whole { .. } => "all of the disk".to_owned(),
        Location::Partition { number, .. } => format!("partition {number}"),
        Location::Logical { .. } | Location::Array { .. } | Location::Decrypted { .. } => {
            volume.location.to_string()
        }
    };
    let content = volume.content.as_ref().map_or("nothing that is known", |content| content.kind.name());
    let number = disks.volumes().iter().position(|known| std::ptr::eq(known, volume)).unwrap_or_default();
    let mut line = format!("volume {number}: {place}, {}, {content}", size(volume.device.size()));
    if !volume.label().is_empty() {
        let _ = write!(line, ", label '{}'", volume.label());
    }
    if !volume.uuid().is_empty() {
        let _ = write!(line, ", UUID {}", volume.uuid());
    }
    text.line(1, &line);
}

fn system(text: &mut Text, disks: &Disks, system: &System) {
    let name = if system.product.is_empty() { "an unknown system" } else { &system.product };
    let mut title = format!("{name} on {}", system.location);
    if !system.subvolume.as_os_str().is_empty() {
        let _ = write!(title, ", subvolume {}", system.subvolume.display());
    }
    text.line(0, &title);
    let facts = [
        ("host name", system.host_name.as_str()),
        ("architecture", &system.architecture),
        ("packages", &system.packages),
        ("init", if system.kind == SystemKind::Linux { system.init.name() } else { "" }),
        ("SELinux", if system.selinux { "on" } else { "" }),
    ];
    let facts = facts.iter().filter(|(_, value)| !value.is_empty());
    text.line(1, &facts.map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", "));
    if let Some(windows) = &system.windows {
        text.line(1, &format!("edition {}, {}", windows.edition, system.version));
        text.list("storage drivers that start at boot", windows.boot_drivers.iter().cloned());
        text.list("fixed addresses", windows.addresses.iter().cloned());
    }
    text.list(
        "mounts",
        system.mounts.iter().map(|mount| {
            let volume = mount.volume.and_then(|volume| disks.volumes().get(volume));
            let volume =
                volume.map_or("on none of the disks".to_owned(), |volume| volume.location.to_string());
            let spec = if mount.spec.is_empty() { "not in fstab" } else { &mount.spec };
            format!("{} ({}, {spec}): {volume}", mount.path.display(), mount.kind)
        }),
    );
    text.list(
        "boot entries",
        system.entries.iter().map(|entry| {
            let mark = if entry.default { ", default" } else { "" };
            format!("{} ({}{mark}): {}", entry.title, entry.loader, entry.cmdline)
        }),
    );
    system.kernels.iter().for_each(|kernel| self::kernel(text, kernel));
    if let Some(esp) = system.esp.and_then(|esp| disks.volumes().get(esp)) {
        let fallback = match &system.fallback_loader {
            Some(path) => format!("fallback loader {}", path.display()),
            None => "no fallback loader".to_owned(),
        };
        text.line(1, &format!("EFI system partition: {}, {fallback}", esp.location));
    }
    text.list(
        "guest tools",
        system.tools.iter().map(|tools| {
            let services: Vec<_> =
                tools.services.iter().map(|service| service.display().to_string()).collect();
            let started = if services.is_empty() { "not started".to_owned() } else { services.join(", ") };
            format!("{}: {started}", tools.name)
        }),
    );
    text.list(
        "network interfaces",
        system.interfaces.iter().map(|interface| {
            let mac = interface.mac.as_deref().unwrap_or("no address tied to the name");
            let address = if interface.is_static { ", fixed address" } else { "" };
            let files: Vec<_> = interface.files.iter().map(|file| file.display().to_string()).collect();
            format!("{} ({mac}{address}): {}", interface.name, files.join(", "))
        }),
    );
    text.list(
        "device names",
        system.device_names.iter().map(|name| {
            let volume = name.volume.and_then(|volume| disks.volumes().get(volume));
            let volume =
                volume.map_or("on none of the disks".to_owned(), |volume| volume.location.to_string());
            let member = if name.member.is_empty() { String::new() } else { format!(" ({})", name.member) };
            format!("{}{member} line {}: {} is {volume}", name.file.display(), name.line, name.name)
        }),
    );
    text.list(
        "in the way of KVM",
        system.obstacles.iter().map(|obstacle| {
            let hint = if obstacle.hint.is_empty() { String::new() } else { format!("; {}", obstacle.hint) };
            format!("{}{hint}", obstacle.message)
        }),
    );
}

fn kernel(text: &mut Text, kernel: &Kernel) {
    let release = if kernel.release.is_empty() { "of an unknown release" } else { &kernel.release };
    let mark = match (kernel.default, kernel.entries.is_empty()) {
        (true, _) => " (default)",
        (false, true) => " (offered by no boot loader)",
        (false, false) => "",
    };
    text.line(1, &format!("kernel {release}{mark}"));
    if let Some(image) = &kernel.image {
        text.line(2, &image.to_string());
    }
    if let Some(initramfs) = &kernel.initramfs {
        let generator = if initramfs.generator.is_empty() { "unknown" } else { &initramfs.generator };
        let (names, len) = (initramfs.module_names.len(), size(initramfs.len));
        let compression = &initramfs.compression;
        text.line(2, &format!("initramfs: {generator}, {compression}, {len}, {names} modules"));
    }
    for place in [DriverPlace::BuiltIn, DriverPlace::Initramfs, DriverPlace::Modules, DriverPlace::Missing] {
        let own = kernel.drivers.iter().filter(|driver| driver.place == place);
        let names: Vec<_> = own.map(|driver| driver.name.as_str()).collect();
        if !names.is_empty() {
            text.line(2, &format!("drivers {}: {}", place.name(), names.join(" ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size(512), "0.5 KiB");
        assert_eq!(size(1 << 20), "1 MiB");
        assert_eq!(size((3 << 30) / 2), "1.5 GiB");
        assert_eq!(size(0), "0 KiB");
        assert_eq!(size(u64::MAX), "1638 PiB");
    }

    #[test]
    fn nothing_moves_the_cursor() {
        let mut text = Text::default();
        text.line(1, "a\x1b[2Jb\n");
        assert_eq!(text.0, "  a?[2Jb?\n");
    }
}

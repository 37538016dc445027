//! Configurations of Xen's `xl`, and of `xm` before it.
//!
//! The syntax is a small part of Python's ([`syntax`]). Old files of `xm` were programs; what goes beyond assignments is
//! refused with its line.

mod disk;
mod syntax;

use block::Result;

use self::syntax::{Config, Value};
use super::place::Place;
use super::{check_drives, names, text, words};
use crate::guest::{Cpus, DirectBoot, Display, FirmwareKind, Guest, Network, Nic, Origin};

/// How a guest runs on Xen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    /// Paravirtual: no firmware, no emulated devices.
    Pv,
    /// A machine with firmware.
    Hvm,
    /// In between: no firmware of a PC, but hardware's help.
    Pvh,
}

/// What a configuration says.
///
/// # Errors
/// `Invalid`, with the line; `Denied`: a name leads where the policy forbids.
pub(super) fn guest(bytes: &[u8], place: &Place<'_>) -> Result<Guest> {
    let config = Config::parse(&text::decode(bytes, None)?)?;
    let kind = kind(&config);
    let mut guest = Guest {
        name: config.text("name").unwrap_or_else(|| place.stem()).to_owned(),
        origin: Origin::Xen,
        uuid: config.text("uuid").and_then(words::uuid),
        memory_bytes: memory(&config),
        cpus: cpus(&config),
        local_time: config.is_on("localtime"),
        display: display(&config),
        sound: sound(&config),
        ..Guest::default()
    };
    firmware(&config, kind, place, &mut guest);
    direct_boot(&config, kind, place, &mut guest)?;
    check_drives(config.list("disk").len())?;
    for text in config.list("disk") {
        disk::read(text, kind == Type::Hvm, place, &mut guest)?;
    }
    names::assign(&mut guest.disks);
    for text in config.list("vif") {
        guest.nics.push(nic(text, kind, &mut guest.notes));
    }
    guest.serial_ports = serial_ports(&config);
    other_notes(&config, kind, &mut guest);
    Ok(guest)
}

fn kind(config: &Config) -> Type {
    let word =
        config.text("type").or_else(|| config.text("builder")).unwrap_or_default().to_ascii_lowercase();
    match word.as_str() {
        "hvm" => Type::Hvm,
        "pvh" => Type::Pvh,
        _ if config.is_on("pvh") => Type::Pvh,
        _ => Type::Pv,
    }
}

/// What the guest may have; it starts with less where both are given.
fn memory(config: &Config) -> Option<u64> {
    let mib = config.number("memory").or_else(|| config.number("maxmem"))?;
    u64::try_from(mib).ok()?.checked_mul(1 << 20)
}

fn cpus(config: &Config) -> Cpus {
    let count = config.number("vcpus").or_else(|| config.number("maxvcpus"));
    Cpus {
        count: count.and_then(|count| u32::try_from(count).ok()).filter(|count| *count > 0),
        ..Cpus::default()
    }
}

fn firmware(config: &Config, kind: Type, place: &Place<'_>, guest: &mut Guest) {
    let word =
        config.text("firmware").or_else(|| config.text("bios")).unwrap_or_default().to_ascii_lowercase();
    guest.firmware.kind = match word.as_str() {
        "uefi" | "ovmf" | "efi" => Some(FirmwareKind::Uefi),
        _ if kind == Type::Hvm => Some(FirmwareKind::Bios),
        _ => None,
    };
    if let Some(nvram) = config.text("nvram").filter(|_| guest.firmware.kind == Some(FirmwareKind::Uefi)) {
        guest.firmware.nvram = place.side_file(nvram, "variable store", &mut guest.notes).map(Into::into);
    }
}

/// Paravirtual guests name their kernel, or a loader on the host that finds it.
fn direct_boot(config: &Config, kind: Type, place: &Place<'_>, guest: &mut Guest) -> Result<()> {
    if kind == Type::Hvm && config.text("ramdisk").is_none() {
        // Old files name Xen's own loader (hvmloader) here.
        return Ok(());
    }
    if let Some(loader) = config.text("bootloader") {
        guest.notes.push(format!(
            "The guest is started by a boot loader on its host ('{loader}'), which reads the guest's menu; a boot loader of its own \
             may be missing."
        ));
        return Ok(());
    }
    let Some(kernel) = config.text("kernel") else { return Ok(()) };
    if ["pv-grub", "pvgrub", "grub-x86_64-xen", "grub-i386-xen"].iter().any(|word| kernel.contains(word)) {
        guest.notes.push(format!("The guest is started by '{kernel}', which reads the guest's menu; a boot loader of its own may be missing."));
        return Ok(());
    }
    let root = config.text("root").map(|root| format!("root={root}"));
    let parts = [root.as_deref(), config.text("extra")];
    let joined = parts.into_iter().flatten().collect::<Vec<_>>().join(" ");
    guest.direct_boot = Some(DirectBoot {
        kernel: place.file(kernel, &mut guest.notes)?,
        initrd: config.text("ramdisk").map(|name| place.file(name, &mut guest.notes)).transpose()?,
        cmdline: config.text("cmdline").map_or(joined, str::to_owned),
    });
    Ok(())
}

/// A network card: `mac=..,bridge=..,model=..`.
fn nic(text: &str, kind: Type, notes: &mut Vec<String>) -> Nic {
    let mut nic = Nic { network: Network::Bridge, ..Nic::default() };
    let mut paravirtual = kind != Type::Hvm;
    for part in text.split(',') {
        let Some((key, value)) = part.split_once('=') else { continue };
        let value = value.trim();
        match key.trim().to_ascii_lowercase().as_str() {
            "mac" => {
                nic.mac = words::mac(value);
                if nic.mac.is_none() {
                    notes.push(format!("A network card has no usable address ('{value}')."));
                }
            }
            "bridge" => nic.network_name = Some(value.to_owned()),
            "model" => nic.model = Some(value.to_ascii_lowercase()),
            "type" if value.eq_ignore_ascii_case("vif") => paravirtual = true,
            "script" if value.contains("nat") => nic.network = Network::Nat,
            "script" if value.contains("route") => {
                nic.network = Network::Managed;
                notes.push(
                    "A network card is routed by its host (vif-route): its addresses have to be looked at."
                        .to_owned(),
                );
            }
            _ => {}
        }
    }
    let default = if paravirtual { "netfront" } else { "rtl8139" };
    nic.model.get_or_insert_with(|| default.to_owned());
    nic
}

fn serial_ports(config: &Config) -> u32 {
    let several = config.list("serial").len();
    let one = usize::from(config.text("serial").is_some_and(|serial| serial != "none"));
    u32::try_from(several.max(one)).unwrap_or_default()
}

fn display(config: &Config) -> Option<Display> {
    let framebuffer = config.list("vfb").into_iter().next().unwrap_or_default();
    let protocol = match () {
        () if config.is_on("spice") => "spice",
        () if config.is_on("vnc") || framebuffer.contains("vnc") => "vnc",
        () if config.is_on("sdl") || !framebuffer.is_empty() => "vnc",
        () => return None,
    };
    let mib = config.number("videoram").and_then(|mib| u64::try_from(mib).ok());
    Some(Display { protocol: protocol.to_owned(), video_bytes: mib.and_then(|mib| mib.checked_mul(1 << 20)) })
}

fn sound(config: &Config) -> Option<String> {
    let card = match config.text("soundhw")? {
        "hda" | "ich6" => "ich6",
        "ac97" | "all" => "ac97",
        "sb16" => "sb16",
        "es1370" => "es1370",
        _ => return None,
    };
    Some(card.to_owned())
}

/// What is lost or needs a person.
fn other_notes(config: &Config, kind: Type, guest: &mut Guest) {
    if let Some(order) =
        config.text("boot").filter(|order| kind == Type::Hvm && !order.is_empty() && !order.contains('c'))
    {
        guest.notes.push(format!("The machine does not start from a hard disk (boot = '{order}')."));
    }
    for (key, what) in [
        ("pci", "devices of the host that are passed through"),
        ("usbdev", "USB devices of the host"),
        ("p9", "shared folders"),
        ("vtpm", "a TPM, whose keys stay behind"),
    ] {
        if matches!(config.get(key), Some(Value::List(list)) if !list.is_empty()) {
            guest.notes.push(format!("The guest has {what} ({key})."));
        }
    }
    guest.tpm = !config.list("vtpm").is_empty();
    if kind == Type::Pv {
        guest.notes.push(
            "The guest is paravirtual: its kernel must be able to run without Xen, and its disks may have no partition table."
                .to_owned(),
        );
    }
}

#[cfg(test)]
mod tests;

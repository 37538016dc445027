//! VMX: VMware's description of a machine.
//!
//! A dictionary ([`dict`]) of dotted, case-insensitive names; what a device is follows from the keys of its namespace.
//! Snapshots and linked clones need nothing special: the machine names the head of the chain, and each disk names its
//! parent.

mod devices;
mod dict;

use block::{Error, Result};

use self::dict::Dict;
use super::place::Place;
use super::words;
use crate::guest::{Cpus, Display, Firmware, FirmwareKind, Guest, Origin};

/// From this version of the virtual hardware on, guests see the UUID in the byte order of SMBIOS 2.6: its first three
/// fields are the other way round than the file has them.
const UUID_SWAPPED_SINCE: u32 = 13;

/// What a VMX file says.
///
/// # Errors
/// `Invalid`: it is none; `Unsupported`: the machine is encrypted; `Denied`: a name leads where the policy forbids.
pub(super) fn guest(bytes: &[u8], place: &Place<'_>) -> Result<Guest> {
    let dict = Dict::parse(bytes)?;
    refuse_encrypted(&dict)?;
    let mut guest = Guest {
        name: dict.text("displayname").unwrap_or_else(|| place.stem()).to_owned(),
        origin: Origin::Vmware,
        uuid: uuid(&dict),
        genid: genid(&dict),
        description: dict.text("annotation").map(str::to_owned),
        os_hint: dict.text("guestos").map(str::to_owned),
        cpus: cpus(&dict),
        serial_ports: dict.count("serial"),
        sound: sound(&dict),
        display: display(&dict),
        tpm: dict.is_on("vtpm.present"),
        notes: dict.notes().to_vec(),
        ..Guest::default()
    };
    memory(&dict, &mut guest);
    firmware(&dict, place, &mut guest);
    devices::disks(&dict, place, &mut guest)?;
    devices::floppies(&dict, place, &mut guest);
    devices::nics(&dict, &mut guest);
    other_notes(&dict, &mut guest);
    Ok(guest)
}

/// Nothing of an encrypted machine can be used, and what little can be read would mislead.
fn refuse_encrypted(dict: &Dict) -> Result<()> {
    let Some(key) = dict.keys().find(|key| key.starts_with("encryption.") || *key == "encryptedvm.guid")
    else {
        return Ok(());
    };
    Err(Error::unsupported(format!("the machine is encrypted (it has '{key}')"))
        .hint("remove the encryption in VMware (and a virtual TPM, which causes it), then try again"))
}

/// The identity that the guest sees.
fn uuid(dict: &Dict) -> Option<String> {
    let uuid = words::uuid(dict.text("uuid.bios")?)?;
    let version: u32 = dict.number("virtualhw.version").unwrap_or_default();
    if version >= UUID_SWAPPED_SINCE { words::swapped(&uuid) } else { Some(uuid) }
}

/// Two signed numbers: the first three fields of the id as little-endian integers, and its last eight bytes.
fn genid(dict: &Dict) -> Option<String> {
    let bytes = |key| dict.number::<i64>(key).map(i64::to_le_bytes);
    let (low, high) = (bytes("vm.genid")?, bytes("vm.genidx")?);
    let [a, b, c, d, e, f, g, h] = low;
    let order = [d, c, b, a, f, e, h, g];
    let digits: String = order.iter().chain(&high).map(|byte| format!("{byte:02x}")).collect();
    words::uuid(&digits)
}

fn cpus(dict: &Dict) -> Cpus {
    let count = dict.number::<u32>("numvcpus").filter(|count| *count > 0);
    let cores = dict.number::<u32>("cpuid.corespersocket").filter(|cores| *cores > 0);
    let topology = match (count, cores) {
        (Some(count), Some(cores)) if count % cores == 0 => Some((count / cores, cores, 1)),
        _ => None,
    };
    Cpus { count: count.or(Some(1)), topology, model: None }
}

fn memory(dict: &Dict, guest: &mut Guest) {
    guest.memory_bytes = dict.number::<u64>("memsize").and_then(|mib| mib.checked_mul(1 << 20));
    if guest.memory_bytes.is_none() {
        guest.notes.push("The machine's memory (memSize) is missing.".to_owned());
    }
}

fn firmware(dict: &Dict, place: &Place<'_>, guest: &mut Guest) {
    let kind = match dict.text("firmware").unwrap_or("bios").to_ascii_lowercase().as_str() {
        "bios" => Some(FirmwareKind::Bios),
        "efi" | "efi64" | "efi32" => Some(FirmwareKind::Uefi),
        other => {
            guest.notes.push(format!(
                "The firmware '{other}' is not known; the disks will show which one is needed."
            ));
            None
        }
    };
    let uefi = kind == Some(FirmwareKind::Uefi);
    let nvram = dict.text("nvram").filter(|_| uefi);
    let nvram = nvram.and_then(|name| place.side_file(name, "variable store", &mut guest.notes));
    let secure_boot = uefi && dict.is_on("uefi.secureboot.enabled");
    guest.firmware = Firmware { kind, secure_boot, nvram: nvram.map(Into::into) };
}

fn sound(dict: &Dict) -> Option<String> {
    if !dict.is_on("sound.present") {
        return None;
    }
    let card = match dict.text("sound.virtualdev").unwrap_or_default().to_ascii_lowercase().as_str() {
        "sb16" => "sb16",
        "hdaudio" => "ich6",
        _ => "es1370",
    };
    Some(card.to_owned())
}

fn display(dict: &Dict) -> Option<Display> {
    let speaks = dict.keys().any(|key| key.starts_with("svga.") || key.starts_with("remotedisplay."));
    (speaks && !dict.is_off("svga.present")).then(|| Display {
        protocol: "vnc".to_owned(),
        video_bytes: dict.number("svga.vramsize").filter(|v| *v > 0),
    })
}

/// What is lost or needs a person.
fn other_notes(dict: &Dict, guest: &mut Guest) {
    if guest.tpm {
        guest.notes.push(
            "The machine has a virtual TPM; the keys in it stay behind, and whatever is sealed to it (BitLocker, LUKS) must be \
             unlocked with its recovery key."
                .to_owned(),
        );
    }
    if let Some(seconds) = dict.number::<i64>("rtc.difffromutc").filter(|seconds| *seconds != 0) {
        guest.notes.push(format!("The hardware clock is {seconds} seconds off UTC."));
    }
    for key in dict.keys() {
        let passed = key.strip_prefix("pcipassthru").and_then(|rest| rest.strip_suffix(".present"));
        if passed.is_some() && dict.is_on(key) {
            guest.notes.push(format!("A device of the host is passed through ({key}); it stays behind."));
        }
    }
    let order = dict.text("bios.bootorder").unwrap_or_default().to_ascii_lowercase();
    if !order.is_empty() && !order.contains("hdd") {
        guest
            .notes
            .push(format!("The machine does not start from a hard disk (bios.bootOrder = '{order}')."));
    }
}

#[cfg(test)]
mod tests;

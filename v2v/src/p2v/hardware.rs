//! Processors, memory, firmware, clock, and whose machine it is.

use std::collections::BTreeSet;

use guestdisk::Guid;

use super::tree::Tree;
use crate::guest::{Cpus, Firmware, FirmwareKind, Guest, Origin};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Memory modules come in multiples of the first, of the second in machines of more than the third; the kernel keeps some of
/// it for itself.
const MODULE: u64 = 256 * MIB;
const LARGE_MODULE: u64 = 1024 * MIB;
const LARGE: u64 = 4096 * MIB;
/// UEFI's variable that says whether Secure Boot is on; four bytes of attributes come first.
const SECURE_BOOT: &str = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// The machine apart from disks and network cards. `is_rescue`: its own system is not running.
pub(super) fn machine(tree: &Tree<'_>, is_rescue: bool) -> Guest {
    let dmi = |name: &str| tree.text(&format!("sys/class/dmi/id/{name}")).filter(|text| !is_filler(text));
    let mut notes = vec![];
    let host = tree.text("proc/sys/kernel/hostname").or_else(|| tree.text("etc/hostname"));
    let own_name = host.filter(|name| !is_rescue && name != "localhost" && name != "(none)");
    let product =
        [dmi("sys_vendor"), dmi("product_name")].into_iter().flatten().collect::<Vec<_>>().join(" ");
    if own_name.is_none() {
        notes.push("It is named after its model: its own system is not running.".to_owned());
    }
    let short = own_name.as_deref().map(|name| name.split('.').next().unwrap_or(name).to_owned());
    let mut description = product.clone();
    if let Some(serial) = dmi("product_serial") {
        description = format!("{description}, serial number {serial}").trim_start_matches(", ").to_owned();
    }
    let cpuinfo = tree.text("proc/cpuinfo").unwrap_or_default();
    Guest {
        name: short
            .unwrap_or_else(|| if product.is_empty() { "machine".to_owned() } else { product.clone() }),
        origin: origin(&product),
        uuid: dmi("product_uuid").and_then(|uuid| Guid::parse(&uuid)).map(|uuid| uuid.to_string()),
        description: (!description.is_empty()).then_some(description),
        architecture: architecture(tree, &cpuinfo),
        memory_bytes: memory(tree),
        cpus: processors(&cpuinfo),
        firmware: firmware(tree),
        local_time: !is_rescue && clock_is_local(tree),
        tpm: tree.exists("sys/class/tpm/tpm0"),
        notes,
        ..Guest::default()
    }
}

/// What makers leave where they had nothing to say.
fn is_filler(text: &str) -> bool {
    let lower = text.to_lowercase();
    [
        "to be filled",
        "default string",
        "system manufacturer",
        "system product name",
        "system serial",
        "not specified",
        "o.e.m.",
    ]
    .iter()
    .any(|filler| lower.contains(filler))
        || text.chars().all(|c| matches!(c, '0' | '-' | ' '))
}

fn origin(product: &str) -> Origin {
    let known = [
        ("VMware", Origin::Vmware),
        ("VirtualBox", Origin::VirtualBox),
        ("innotek", Origin::VirtualBox),
        ("Xen", Origin::Xen),
        ("Microsoft Corporation Virtual Machine", Origin::HyperV),
        ("QEMU", Origin::Kvm),
        ("KVM", Origin::Kvm),
    ];
    known.into_iter().find(|(word, _)| product.contains(word)).map_or(Origin::Physical, |(_, origin)| origin)
}

/// The value of `key` in each block of `/proc/cpuinfo`.
fn fields<'a>(cpuinfo: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    cpuinfo.lines().filter_map(move |line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then_some(value.trim())
    })
}

fn architecture(tree: &Tree<'_>, cpuinfo: &str) -> Option<String> {
    if let Some(name) = tree.text("proc/sys/kernel/arch") {
        return Some(name);
    }
    let flags = fields(cpuinfo, "flags").next();
    let has_long_mode = flags.map(|flags| flags.split(' ').any(|flag| flag == "lm"));
    match has_long_mode {
        Some(true) => Some("x86_64".to_owned()),
        Some(false) => Some("i686".to_owned()),
        None => (fields(cpuinfo, "CPU architecture").next() == Some("8")).then(|| "aarch64".to_owned()),
    }
}

fn processors(cpuinfo: &str) -> Cpus {
    let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number > 0);
    let count = u32::try_from(fields(cpuinfo, "processor").count()).ok().filter(|count| *count > 0);
    let sockets = fields(cpuinfo, "physical id").collect::<BTreeSet<_>>().len();
    let cores = fields(cpuinfo, "cpu cores").next().and_then(number);
    let siblings = fields(cpuinfo, "siblings").next().and_then(number);
    let topology = || {
        let (sockets, cores, siblings) = (u32::try_from(sockets).ok().filter(|n| *n > 0)?, cores?, siblings?);
        let threads = siblings.is_multiple_of(cores).then(|| siblings / cores)?;
        let product = sockets.checked_mul(cores)?.checked_mul(threads)?;
        (Some(product) == count).then_some((sockets, cores, threads))
    };
    Cpus { count, topology: topology(), model: fields(cpuinfo, "model name").next().map(str::to_owned) }
}

/// What the modules have; where nobody says that, what the kernel has, and what it may have kept for itself.
fn memory(tree: &Tree<'_>) -> Option<u64> {
    let text = tree.text("proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(KIB));
    let modules = tree.bytes("sys/firmware/dmi/tables/DMI").map_or(0, |table| modules(&table));
    if modules > 0 && modules >= total.unwrap_or(0) {
        return Some(modules);
    }
    let module = |total| if total > LARGE { LARGE_MODULE } else { MODULE };
    total.filter(|total| *total > 0).and_then(|total| total.checked_next_multiple_of(module(total)))
}

/// Bytes of all memory devices (SMBIOS 3.6, section 7.18) in a table.
fn modules(table: &[u8]) -> u64 {
    let (mut rest, mut sum) = (table, 0_u64);
    while let [kind, len, ..] = rest {
        let (kind, len) = (*kind, usize::from(*len));
        if len < 4 || kind == 127 {
            break;
        }
        let Some(record) = rest.get(..len) else { break };
        if kind == 17 {
            sum = sum.saturating_add(module(record));
        }
        // Texts follow, and two zeros.
        let texts = &rest[len..];
        let Some(end) = texts.windows(2).position(|pair| pair == [0, 0]) else { break };
        rest = &texts[end + 2..];
    }
    sum
}

/// Bytes of a memory device; 0 if there is no module.
fn module(record: &[u8]) -> u64 {
    let word = |at: usize| record.get(at..at + 2).map_or(0, |raw| u16::from_le_bytes([raw[0], raw[1]]));
    match word(0x0c) {
        0 | 0xffff => 0,
        0x7fff => (u64::from(word(0x1c)) | u64::from(word(0x1e) & 0x7fff) << 16) * MIB,
        size if size & 0x8000 != 0 => u64::from(size & 0x7fff) * KIB,
        size => u64::from(size) * MIB,
    }
}

fn firmware(tree: &Tree<'_>) -> Firmware {
    let uefi = tree.exists("sys/firmware/efi");
    let secure_boot = tree.bytes(SECURE_BOOT).is_some_and(|bytes| bytes.get(4) == Some(&1));
    let kind = if uefi { FirmwareKind::Uefi } else { FirmwareKind::Bios };
    Firmware { kind: Some(kind), secure_boot: uefi && secure_boot, nvram: None }
}

/// The third line of `/etc/adjtime` says it (`hwclock(8)`).
fn clock_is_local(tree: &Tree<'_>) -> bool {
    tree.text("etc/adjtime").is_some_and(|text| text.lines().nth(2).map(str::trim) == Some("LOCAL"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(size: u16, extended: u32) -> Vec<u8> {
        let mut record = vec![0; 0x22];
        (record[0], record[1]) = (17, 0x22);
        record[0x0c..0x0e].copy_from_slice(&size.to_le_bytes());
        record[0x1c..0x20].copy_from_slice(&extended.to_le_bytes());
        record.extend(b"DIMM 0\0maker\0\0");
        record
    }

    #[test]
    fn modules_are_summed() {
        let mut table = vec![1, 6, 0, 0, 9, 9, 0, 0];
        for (size, extended) in [(4096, 0), (0, 0), (0xffff, 0), (0x7fff, 32768), (0x8000 | 1024, 0)] {
            table.extend(device(size, extended));
        }
        table.extend([127, 4, 0, 0, 0, 0]);
        assert_eq!(modules(&table), (4096 + 32768 + 1) * MIB);
        for cut in 0..table.len() {
            assert!(modules(&table[..cut]) <= modules(&table));
        }
        assert_eq!(modules(&[17, 0, 0, 0]), 0);
    }

    #[test]
    fn a_topology_that_does_not_add_up_is_none() {
        let text =
            "processor : 0\nphysical id : 0\ncpu cores : 2\nsiblings : 4\n\nprocessor : 1\nphysical id : 0\n";
        assert_eq!(processors(text), Cpus { count: Some(2), topology: None, model: None });
        assert_eq!(processors(""), Cpus::default());
        let text = "processor: 0\nphysical id: 0\ncpu cores: 1\nsiblings: 2\nmodel name: X  Y\nprocessor: 1\nphysical id: 0\n";
        let expected = Cpus { count: Some(2), topology: Some((1, 1, 2)), model: Some("X  Y".to_owned()) };
        assert_eq!(processors(text), expected);
    }
}

//! The machine as it is going to be: every gap filled, every doubt noted.

use std::path::{Path, PathBuf};

use block::{Error, Result};
use guestdisk::Guid;

use super::network::parse_mac;
use super::os;
use super::{Chipset, Connection, CpuMode, Loader, NicModel, OsFacts, OutputDisk, TargetSpec};
use crate::guest::{Bus, DirectBoot, FirmwareKind, Guest, Nic, RemovableKind};

/// Memory of a guest whose source says nothing, in MiB.
const DEFAULT_MEMORY_MIB: u64 = 2048;
const MIB: u64 = 1 << 20;
/// The most processors that are believed; QEMU's Q35 has no more.
const MOST_CPUS: u32 = 1024;
/// Units of an IDE controller: two cables with two drives each.
const IDE_UNITS: usize = 4;
/// Serial ports that a PC has.
const MOST_SERIAL_PORTS: u32 = 4;
/// The longest serial number that virtio-blk shows (virtio 1.2, section 5.2.6.1).
const LONGEST_SERIAL: usize = 20;

/// A machine that every target can describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// What it is called.
    pub name: String,
    /// What people wrote about it.
    pub description: Option<String>,
    /// Its identity in lower case with hyphens.
    pub uuid: Option<String>,
    /// Its generation id, likewise.
    pub genid: Option<String>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of processors.
    pub cpus: u32,
    /// Sockets, cores, threads; their product is `cpus`.
    pub topology: Option<(u32, u32, u32)>,
    /// What it sees of the host's processor.
    pub cpu: CpuMode,
    /// Without KVM.
    pub emulated: bool,
    /// The board.
    pub chipset: Chipset,
    /// BIOS or UEFI.
    pub firmware: FirmwareKind,
    /// With Secure Boot; only with UEFI.
    pub secure_boot: bool,
    /// The firmware's files.
    pub loader: Option<Loader>,
    /// The guest's own variable store.
    pub nvram: Option<PathBuf>,
    /// Started without a boot loader.
    pub direct_boot: Option<DirectBoot>,
    /// Its operating system.
    pub os: OsFacts,
    /// Hard disks, in the order of the source.
    pub disks: Vec<MachineDisk>,
    /// CD-ROM and floppy drives, empty.
    pub drives: Vec<Drive>,
    /// Network cards.
    pub nics: Vec<MachineNic>,
    /// `vnc` or `spice`.
    pub graphics: String,
    /// Sound card in libvirt's words.
    pub sound: Option<String>,
    /// Serial ports, at least one: a console is worth having.
    pub serial_ports: u32,
    /// The clock runs in local time.
    pub local_time: bool,
    /// It has a TPM.
    pub tpm: bool,
    /// It has the channel of the guest agent.
    pub agent: bool,
    /// What was assumed, changed or left out, in whole sentences.
    pub notes: Vec<String>,
}

/// A hard disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineDisk {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it is attached to.
    pub bus: Bus,
    /// For [`Bus::Scsi`]: the controller's model in libvirt's words.
    pub controller: Option<&'static str>,
    /// Which of its bus it is, from 0.
    pub unit: usize,
    /// libvirt's name for it (`vda`), which guests need not share.
    pub target: String,
    /// Its place among what is tried for booting, from 1.
    pub order: usize,
    /// It may not be written.
    pub read_only: bool,
    /// Its serial number.
    pub serial: Option<String>,
}

/// A drive without a medium.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// CD-ROM or floppy.
    pub kind: RemovableKind,
    /// SATA, IDE or floppy.
    pub bus: Bus,
    /// Which of its bus it is, from 0.
    pub unit: usize,
    /// libvirt's name for it.
    pub target: String,
}

/// A network card of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineNic {
    /// Its address, lower case with colons; `None`: whoever runs it makes one up.
    pub mac: Option<String>,
    /// The model in libvirt's words.
    pub model: String,
    /// What it is plugged into.
    pub connection: Connection,
}

impl Machine {
    /// Puts together what the source says and what was decided.
    ///
    /// # Errors
    /// `Usage`: the decisions do not fit the guest or each other (another number of disks, IDE on a board without,
    /// Secure Boot without UEFI); `Unsupported`: not a PC.
    pub fn new(guest: &Guest, spec: &TargetSpec) -> Result<Self> {
        refuse_impossible(guest, spec)?;
        let mut notes = vec![];
        let (cpus, topology) = processors(guest, &mut notes)?;
        let mut units = Units::default();
        let disks = disks(guest, spec, &mut units, &mut notes)?;
        let drives = drives(guest, spec, &mut units, &mut notes)?;
        Ok(Self {
            name: name(spec.name.as_deref().unwrap_or(&guest.name), &mut notes),
            description: guest.description.clone().filter(|text| !text.trim().is_empty()),
            uuid: identity(guest.uuid.as_deref(), "its UUID", &mut notes),
            genid: identity(guest.genid.as_deref(), "its generation id", &mut notes),
            memory_mib: memory(guest, &mut notes),
            cpus,
            topology,
            cpu: spec.cpu.clone(),
            emulated: spec.emulated,
            chipset: spec.chipset,
            firmware: spec.firmware,
            secure_boot: spec.secure_boot,
            loader: spec.loader.clone(),
            nvram: spec.nvram.clone(),
            direct_boot: spec.direct_boot.clone(),
            os: spec.os.clone(),
            disks,
            drives,
            nics: nics(guest, spec, &mut notes),
            graphics: graphics(guest),
            sound: sound(guest, &mut notes),
            serial_ports: guest.serial_ports.clamp(1, MOST_SERIAL_PORTS),
            local_time: guest.local_time,
            tpm: guest.tpm,
            agent: spec.agent,
            notes,
        })
    }

    /// The disks in the order in which they are tried for booting.
    pub fn boot_order(&self) -> Vec<&MachineDisk> {
        let mut order: Vec<&MachineDisk> = self.disks.iter().collect();
        order.sort_by_key(|disk| disk.order);
        order
    }
}

fn refuse_impossible(guest: &Guest, spec: &TargetSpec) -> Result<()> {
    if guest.disks.len() != spec.disks.len() {
        let message = format!("the guest has {} disks, the output {}", guest.disks.len(), spec.disks.len());
        return Err(Error::usage(message));
    }
    if spec.secure_boot && spec.firmware == FirmwareKind::Bios {
        return Err(Error::usage("Secure Boot needs UEFI"));
    }
    if spec.secure_boot && spec.chipset == Chipset::Pc {
        return Err(Error::usage("Secure Boot needs the q35 board, which guards the variables"));
    }
    let source = guest.architecture.as_deref().unwrap_or_default();
    if let Some(other) = [&spec.os.architecture, source].into_iter().find(|name| !os::is_x86(name)) {
        let message = format!("a guest of architecture {other} cannot be described yet");
        return Err(Error::unsupported(message)
            .hint("Only PCs (x86_64, i686) are; the disks can be converted all the same."));
    }
    Ok(())
}

/// A name that libvirt takes: without slashes and control characters, and not empty.
fn name(wanted: &str, notes: &mut Vec<String>) -> String {
    let cleaned: String = wanted.chars().map(|c| if c == '/' || c.is_control() { '-' } else { c }).collect();
    let cleaned = cleaned.trim();
    let name = if cleaned.is_empty() { "guest" } else { cleaned };
    if name != wanted {
        notes.push(format!("It is called '{name}', for '{}' cannot be a name.", wanted.escape_debug()));
    }
    name.to_owned()
}

/// A UUID in the usual form. libvirt takes none whose bytes are all the same.
fn identity(text: Option<&str>, what: &str, notes: &mut Vec<String>) -> Option<String> {
    let text = text?;
    let parsed = Guid::parse(text.trim_matches(['{', '}']));
    let usable = parsed.filter(|guid| guid.as_bytes().iter().any(|byte| *byte != guid.as_bytes()[0]));
    if usable.is_none() {
        notes.push(format!("It loses {what}: '{}' is none.", text.escape_debug()));
    }
    usable.map(|guid| guid.to_string())
}

fn memory(guest: &Guest, notes: &mut Vec<String>) -> u64 {
    match guest.memory_bytes {
        Some(bytes) if bytes > 0 => bytes.div_ceil(MIB),
        _ => {
            notes.push(format!(
                "It gets {DEFAULT_MEMORY_MIB} MiB of memory: the source does not say how much it had."
            ));
            DEFAULT_MEMORY_MIB
        }
    }
}

type Topology = Option<(u32, u32, u32)>;

fn processors(guest: &Guest, notes: &mut Vec<String>) -> Result<(u32, Topology)> {
    let Some(count) = guest.cpus.count else {
        notes.push("It gets one processor: the source does not say how many it had.".to_owned());
        return Ok((1, None));
    };
    if !(1..=MOST_CPUS).contains(&count) {
        return Err(Error::unsupported(format!("{count} processors: 1 to {MOST_CPUS} can be had")));
    }
    let fits = |&(sockets, cores, threads): &(u32, u32, u32)| {
        sockets.checked_mul(cores).and_then(|cpus| cpus.checked_mul(threads)) == Some(count)
    };
    let topology = guest.cpus.topology.filter(fits);
    if let (Some((sockets, cores, threads)), None) = (guest.cpus.topology, topology) {
        notes.push(format!(
            "Its {count} processors are sockets of their own: {sockets} sockets with {cores} cores of {threads} threads \
             would not be {count}."
        ));
    }
    Ok((count, topology))
}

/// What has been attached so far.
#[derive(Default)]
struct Units {
    virtio: usize,
    scsi: usize,
    sata: usize,
    ide: usize,
    /// Letters of `sdX`, which SCSI and SATA share.
    sd: usize,
}

impl Units {
    /// The next unit of a bus and its name for libvirt.
    fn next(&mut self, bus: Bus, chipset: Chipset) -> Result<(usize, String)> {
        let counter = match bus {
            Bus::Virtio => &mut self.virtio,
            Bus::VirtioScsi | Bus::Scsi => &mut self.scsi,
            Bus::Sata => &mut self.sata,
            Bus::Ide if chipset == Chipset::Q35 => {
                return Err(Error::usage("the q35 board has no IDE").hint("Use SATA, or the board pc."));
            }
            Bus::Ide if self.ide >= IDE_UNITS => {
                return Err(Error::usage(format!("IDE takes {IDE_UNITS} disks and drives"))
                    .hint("Use SATA or virtio for some."));
            }
            Bus::Ide => &mut self.ide,
            other => {
                return Err(Error::usage(format!(
                    "disks cannot be attached to {} on the target",
                    other.name()
                ))
                .hint("Choose virtio, virtio-scsi, scsi, sata or ide."));
            }
        };
        let unit = *counter;
        *counter += 1;
        let name = match bus {
            Bus::Virtio => letters("vd", unit),
            Bus::Ide => letters("hd", unit),
            _ => {
                self.sd += 1;
                letters("sd", self.sd - 1)
            }
        };
        Ok((unit, name))
    }
}

/// `sda`, `sdz`, `sdaa`: as Linux counts.
pub(super) fn letters(prefix: &str, index: usize) -> String {
    let mut suffix = vec![];
    let mut rest = index + 1;
    while rest > 0 {
        rest -= 1;
        suffix.push(char::from(b'a' + u8::try_from(rest % 26).unwrap_or(0)));
        rest /= 26;
    }
    suffix.iter().rev().fold(prefix.to_owned(), |mut name, letter| {
        name.push(*letter);
        name
    })
}

fn disks(
    guest: &Guest,
    spec: &TargetSpec,
    units: &mut Units,
    notes: &mut Vec<String>,
) -> Result<Vec<MachineDisk>> {
    let order = order(guest);
    let models: Vec<_> = guest.disks.iter().filter_map(|disk| disk.controller.as_deref()).collect();
    let controller = scsi_model(&models);
    let mixed = |bus| spec.disks.iter().any(|disk| disk.bus == bus);
    if mixed(Bus::Scsi) && mixed(Bus::VirtioScsi) {
        return Err(Error::usage("disks on virtio-scsi and on another SCSI controller at once"));
    }
    let mut made = vec![];
    for ((disk, output), order) in guest.disks.iter().zip(&spec.disks).zip(order) {
        let OutputDisk { path, format, size_bytes, bus } = output;
        let (unit, target) = units.next(*bus, spec.chipset)?;
        made.push(MachineDisk {
            path: path.clone(),
            format: format.clone(),
            size_bytes: *size_bytes,
            bus: *bus,
            controller: (*bus == Bus::Scsi).then_some(controller),
            unit,
            target,
            order,
            read_only: disk.read_only,
            serial: disk.serial.as_deref().and_then(|serial| self::serial(serial, &disk.id, notes)),
        });
    }
    Ok(made)
}

/// The place of every disk in the order of booting, from 1: those that have one come first.
fn order(guest: &Guest) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..guest.disks.len()).collect();
    indices.sort_by_key(|&index| (guest.disks[index].boot_order.unwrap_or(u32::MAX), index));
    let mut order = vec![0; indices.len()];
    for (place, index) in (1..).zip(indices) {
        order[index] = place;
    }
    order
}

/// The controller of QEMU's that is most like the source's.
fn scsi_model(models: &[&str]) -> &'static str {
    let known = |name: &&str| match name.to_ascii_lowercase().as_str() {
        "pvscsi" | "vmpvscsi" | "virtualscsi" => Some("vmpvscsi"),
        "lsisas1068" | "lsilogicsas" | "lsisas" => Some("lsisas1068"),
        "lsilogic" | "buslogic" | "lsi" => Some("lsilogic"),
        _ => None,
    };
    models.iter().find_map(known).unwrap_or("lsilogic")
}

/// A serial number of the characters that libvirt takes.
fn serial(text: &str, disk: &str, notes: &mut Vec<String>) -> Option<String> {
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '+' | '-' | ' ');
    let cleaned: String = text.chars().filter(allowed).collect();
    let cleaned: String = cleaned.trim().chars().take(LONGEST_SERIAL).collect();
    if cleaned != text.trim() {
        notes.push(format!(
            "Disk {disk}: its serial number is '{cleaned}' here, not '{}'.",
            text.escape_debug()
        ));
    }
    (!cleaned.is_empty()).then_some(cleaned)
}

fn drives(
    guest: &Guest,
    spec: &TargetSpec,
    units: &mut Units,
    notes: &mut Vec<String>,
) -> Result<Vec<Drive>> {
    let mut made = vec![];
    let mut floppies = 0;
    for removable in &guest.removables {
        if let Some(medium) = &removable.medium {
            notes.push(format!("The medium in its {} stays behind: {medium}.", kind_name(removable.kind)));
        }
        let (bus, (unit, target)) = match removable.kind {
            RemovableKind::Floppy if floppies == 2 => {
                notes.push("A PC has two floppy drives; further ones are left out.".to_owned());
                continue;
            }
            RemovableKind::Floppy => {
                floppies += 1;
                (Bus::Floppy, (floppies - 1, letters("fd", floppies - 1)))
            }
            RemovableKind::Cdrom if spec.chipset == Chipset::Pc && units.ide < IDE_UNITS => {
                (Bus::Ide, units.next(Bus::Ide, spec.chipset)?)
            }
            RemovableKind::Cdrom => (Bus::Sata, units.next(Bus::Sata, spec.chipset)?),
        };
        made.push(Drive { kind: removable.kind, bus, unit, target });
    }
    Ok(made)
}

const fn kind_name(kind: RemovableKind) -> &'static str {
    match kind {
        RemovableKind::Cdrom => "CD-ROM drive",
        RemovableKind::Floppy => "floppy drive",
    }
}

fn nics(guest: &Guest, spec: &TargetSpec, notes: &mut Vec<String>) -> Vec<MachineNic> {
    (1..)
        .zip(&guest.nics)
        .map(|(number, nic)| MachineNic {
            mac: address(nic, number, notes),
            model: model(nic, &spec.nic_model),
            connection: spec.networks.connect(nic, guest.origin),
        })
        .collect()
}

/// The address of a card, unless nobody could use it: zeros, or a group's address.
fn address(nic: &Nic, number: usize, notes: &mut Vec<String>) -> Option<String> {
    let Some(text) = &nic.mac else {
        notes
            .push(format!("Network card {number} gets a new address: the source does not say which it had."));
        return None;
    };
    let usable = parse_mac(text).filter(|mac| {
        let group = mac
            .get(..2)
            .and_then(|first| u8::from_str_radix(first, 16).ok())
            .is_none_or(|first| first & 1 == 1);
        !group && mac != "00:00:00:00:00:00"
    });
    if usable.is_none() {
        notes.push(format!("Network card {number} gets a new address: '{}' is none.", text.escape_debug()));
    }
    usable
}

fn model(nic: &Nic, wanted: &NicModel) -> String {
    let kept = || match nic.model.as_deref().unwrap_or_default() {
        known @ ("e1000" | "e1000e" | "vmxnet3" | "rtl8139" | "pcnet" | "virtio" | "ne2k_pci" | "igb") => {
            known
        }
        "vlance" | "flexible" => "pcnet",
        _ => "e1000",
    };
    match wanted {
        NicModel::Virtio => "virtio".to_owned(),
        NicModel::Keep => kept().to_owned(),
        NicModel::Named(name) => name.clone(),
    }
}

fn graphics(guest: &Guest) -> String {
    let spice = guest.display.as_ref().is_some_and(|display| display.protocol == "spice");
    if spice { "spice" } else { "vnc" }.to_owned()
}

fn sound(guest: &Guest, notes: &mut Vec<String>) -> Option<String> {
    let name = guest.sound.as_deref()?;
    match name {
        "ich9" | "ich6" | "ac97" | "sb16" => Some(name.to_owned()),
        "es1370" | "es1371" => Some("es1370".to_owned()),
        "hda" | "hdaudio" => Some("ich9".to_owned()),
        other => {
            notes.push(format!("It loses its sound card: there is none like '{}'.", other.escape_debug()));
            None
        }
    }
}

/// A path as text.
///
/// # Errors
/// `Unsupported`: it is not UTF-8, which no description can hold.
pub(super) fn text_of(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::unsupported(format!("the name '{}' is not UTF-8, and cannot be written down", path.display()))
    })
}

/// A path that does not depend on where one stands.
///
/// # Errors
/// `Usage`: it is relative; as [`text_of`].
pub(super) fn absolute(path: &Path) -> Result<&str> {
    match path.is_absolute() {
        true => text_of(path),
        false => Err(Error::usage(format!("'{}' must be an absolute path here", path.display()))),
    }
}

//! Exports of Hyper-V: a folder with `Virtual Machines` and `Virtual Hard Disks`.
//!
//! Configurations are XML up to Windows Server 2012 R2. Since 2016 they are binary (`.vmcx`), in a format that Microsoft has
//! not published; of those only the names of disks are looked for, which stand in them as UTF-16 text, and everything else
//! has to come from the command line. Checkpoints (AVHD, AVHDX) name their parents themselves.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result, ResultExt as _};
use image::{BackingMode, OpenOptions, Policy, Spec};
use roxmltree::Node;

use super::place::Place;
use super::xml::{self, NodeExt as _};
use super::{check_drives, image, names, path_text, text, words};
use crate::guest::{Bus, Disk, FirmwareKind, Guest, Network, Nic, Origin, Removable, RemovableKind};

/// Endings of disks.
const DISKS: &[&str] = &["vhd", "vhdx", "avhd", "avhdx", "vhds"];
/// The most devices of a machine.
const MOST_DEVICES: usize = 256;
/// The most files of an export.
const MOST_FILES: usize = 10_000;
/// How deep an export is searched.
const MOST_DEPTH: usize = 4;

/// Kinds of devices, as configurations name them.
mod device {
    pub(super) const IDE: &str = "83f8638b-8dca-4152-9eda-2ca8b33039b4";
    pub(super) const SCSI: &str = "d422512d-2bf2-4752-809d-7b82b5fcb1b4";
    pub(super) const SYNTHETIC_NIC: &str = "2fc216b0-d2e2-4967-9b6d-b8a5c9ca2778";
}

/// What an export says: a folder, or an XML configuration.
///
/// # Errors
/// `Invalid`: the configuration is none; `NotFound`: there are no disks; `Usage`: there are several machines; the host's.
pub(super) fn guest(path: &Path, policy: &Policy) -> Result<Guest> {
    if path.is_file() {
        return configuration(&text::read_file(path)?, &place_of(path, policy)?);
    }
    let mut files = vec![];
    collect(path, 0, &mut files)?;
    files.sort();
    let with = |endings: &[&str]| -> Vec<&PathBuf> {
        files.iter().filter(|file| endings.contains(&ending(file).as_str())).collect()
    };
    let is_machine = |file: &&&PathBuf| {
        let head = text::read_file(file).unwrap_or_default();
        super::kind::xml_root(&head).as_deref() == Some("configuration") && !in_folder(file, "snapshots")
    };
    let (texts, binaries) = (with(&["xml"]), with(&["vmcx"]));
    let texts: Vec<_> = texts.iter().filter(is_machine).copied().collect();
    let binaries: Vec<_> = binaries.iter().filter(|file| !in_folder(file, "snapshots")).copied().collect();
    match (texts.as_slice(), binaries.as_slice()) {
        ([one], []) => configuration(&text::read_file(one)?, &place_of(one, policy)?),
        ([], [one]) => binary(one, &with(DISKS), path, policy),
        ([], []) => disks_only(&with(DISKS), path),
        (texts, binaries) => {
            Err(Error::usage(format!("the export has {} machines", texts.len() + binaries.len()))
                .hint("give the configuration of one of them (an .xml file), or its disks"))
        }
    }
}

/// The place of a configuration is the whole export: its disks lie in a sister of its folder.
fn place_of<'a>(path: &Path, policy: &'a Policy) -> Result<Place<'a>> {
    match (in_folder(path, "virtual machines"), path.parent(), path.file_name()) {
        (true, Some(folder), Some(name)) => {
            Place::of_file(&super::folder_of(folder).join(name), policy, false)
        }
        _ => Place::of_file(path, policy, false),
    }
}

fn collect(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    let shown = || format!("could not read '{}'", folder.display());
    for entry in std::fs::read_dir(folder).context(shown)? {
        let entry = entry.context(shown)?;
        let kind = entry.file_type().context(shown)?;
        match () {
            () if kind.is_dir() && depth < MOST_DEPTH => collect(&entry.path(), depth + 1, files)?,
            () if kind.is_file() => files.push(entry.path()),
            () => {}
        }
        if files.len() > MOST_FILES {
            return Err(Error::usage(format!(
                "the folder has more than {MOST_FILES} files: this is no export"
            )));
        }
    }
    Ok(())
}

fn ending(path: &Path) -> String {
    path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase()
}

fn in_folder(path: &Path, name: &str) -> bool {
    path.parent().and_then(Path::file_name).is_some_and(|folder| folder.eq_ignore_ascii_case(name))
}

/// What an XML configuration says.
///
/// # Errors
/// `Invalid`: it is none; `Denied`: a disk lies where the policy forbids.
pub(super) fn configuration(bytes: &[u8], place: &Place<'_>) -> Result<Guest> {
    let text = text::decode_xml(bytes)?;
    let document = xml::parse(&text)?;
    let root = document.root_element();
    if !root.is("configuration") {
        return Err(Error::unsupported(format!(
            "a configuration of Hyper-V with the root '{}' is not read",
            root.tag_name().name()
        ))
        .hint("give the disks, and describe the machine on the command line"));
    }
    let properties = root.one("properties");
    let property = |name: &str| properties.and_then(|properties| properties.text_of(name));
    let settings = root.one("settings");
    let setting =
        |path: &[&str]| settings.and_then(|settings| settings.at(path)).and_then(|node| node.words());
    let mut guest = Guest {
        name: property("name").unwrap_or_else(|| place.stem()).to_owned(),
        origin: Origin::HyperV,
        description: property("notes").map(str::to_owned),
        ..Guest::default()
    };
    let generation: u32 = property("subtype").and_then(|text| text.parse().ok()).unwrap_or_default();
    let second = generation == 1;
    guest.firmware.kind = Some(if second { FirmwareKind::Uefi } else { FirmwareKind::Bios });
    guest.firmware.secure_boot =
        second && setting(&["secure_boot_enabled"]).and_then(words::switch) == Some(true);
    guest.uuid = root
        .descendants()
        .find(|node| node.is("bios_guid"))
        .and_then(|node| node.words())
        .and_then(words::uuid);
    guest.cpus.count = setting(&["processors", "count"]).and_then(|text| text.parse().ok());
    let mib: Option<u64> = setting(&["memory", "bank", "size"]).and_then(|text| text.parse().ok());
    guest.memory_bytes = mib.and_then(|mib| mib.checked_mul(1 << 20));
    let devices = devices_of(root);
    let drives: Vec<_> =
        root.descendants().filter(|node| node.is_element() && node.one("pathname").is_some()).collect();
    check_drives(drives.len())?;
    for node in drives {
        drive(node, &devices, place, &mut guest)?;
    }
    names::assign(&mut guest.disks);
    guest.nics = root
        .descendants()
        .filter(|node| node.one("MacAddress").is_some())
        .take(MOST_DEVICES)
        .map(|node| nic(node, &devices))
        .collect();
    Ok(guest)
}

/// Which instance is what kind of device: pairs of instance and device.
fn devices_of(root: Node<'_, '_>) -> Vec<(String, String)> {
    let manifest = root.one("manifest");
    let entries = manifest
        .iter()
        .flat_map(|manifest| manifest.children().filter(|node| node.is_element()).collect::<Vec<_>>());
    let pair = |node: Node<'_, '_>| {
        Some((node.text_of("instance")?.to_ascii_lowercase(), node.text_of("device")?.to_ascii_lowercase()))
    };
    entries.filter_map(pair).take(MOST_DEVICES).collect()
}

/// The kind of device that an element belongs to: `_INSTANCE_` is the name of one around it.
fn kind_of<'a>(node: Node<'a, '_>, devices: &'a [(String, String)]) -> Option<&'a str> {
    node.ancestors().find_map(|around| {
        let name = around.tag_name().name().trim_matches('_').to_ascii_lowercase();
        let known = devices.iter().find(|(instance, _)| *instance == name).map(|(_, device)| device.as_str());
        known.or_else(|| {
            [device::IDE, device::SCSI, device::SYNTHETIC_NIC].into_iter().find(|device| *device == name)
        })
    })
}

fn drive(
    node: Node<'_, '_>,
    devices: &[(String, String)],
    place: &Place<'_>,
    guest: &mut Guest,
) -> Result<()> {
    let Some(path) = node.text_of("pathname") else { return Ok(()) };
    let bus = match kind_of(node, devices) {
        Some(device::IDE) => Some(Bus::Ide),
        Some(device::SCSI) => Some(Bus::Scsi),
        _ => None,
    };
    let kind = node.text_of("type").unwrap_or_default().to_ascii_lowercase();
    let last = ending(Path::new(&path.replace('\\', "/")));
    if kind == "iso" || last == "iso" || last == "vfd" {
        let medium = place.side_file(path, "medium", &mut guest.notes);
        let floppy = last == "vfd";
        guest.removables.push(Removable {
            kind: if floppy { RemovableKind::Floppy } else { RemovableKind::Cdrom },
            bus: if floppy { Some(Bus::Floppy) } else { bus },
            medium,
        });
        return Ok(());
    }
    if !DISKS.contains(&last.as_str()) {
        guest.notes.push(format!("The drive '{path}' is a device of the host, and stays behind."));
        return Ok(());
    }
    let controller = node.parent_element().map(|parent| parent.tag_name().name()).unwrap_or_default();
    let id = format!("{controller}/{}", node.tag_name().name());
    guest.disks.push(Disk { bus, ..Disk::new(id, image(place.file(path, &mut guest.notes)?, None)) });
    Ok(())
}

fn nic(node: Node<'_, '_>, devices: &[(String, String)]) -> Nic {
    let synthetic = kind_of(node, devices) == Some(device::SYNTHETIC_NIC);
    Nic {
        mac: node.text_of("MacAddress").and_then(words::mac),
        model: Some(if synthetic { "netvsc" } else { "tulip" }.to_owned()),
        network: Network::Managed,
        network_name: node
            .text_of("AltSwitchName")
            .or_else(|| node.text_of("FriendlyName"))
            .map(str::to_owned),
        slot: None,
    }
}

/// A binary configuration: the disks that it names, as far as they are there.
fn binary(vmcx: &Path, files: &[&PathBuf], folder: &Path, policy: &Policy) -> Result<Guest> {
    let bytes = text::read_file(vmcx)?;
    let place = Place::of_file(vmcx, policy, false)?;
    let last = |path: &str| path.rsplit(['\\', '/']).next().unwrap_or(path).to_ascii_lowercase();
    let named: BTreeSet<String> = wide_texts(&bytes).iter().map(|text| last(text)).collect();
    let attached: Vec<&PathBuf> = files
        .iter()
        .filter(|file| {
            file.file_name().and_then(|name| name.to_str()).is_some_and(|name| named.contains(&last(name)))
        })
        .copied()
        .collect();
    let mut guest = disks_only(if attached.is_empty() { files } else { &attached }, folder)?;
    guest.notes.insert(
        0,
        format!(
            "The configuration '{}' is binary, and was not read but for the names of disks: say --memory, --cpus, --firmware \
             (generation 2 is uefi, generation 1 bios) and --nic mac=ADDRESS on the command line.",
            vmcx.display()
        ),
    );
    guest.name = folder_name(place.folder(), folder);
    Ok(guest)
}

/// An export's folder has the name of the machine.
fn folder_name(inner: &Path, folder: &Path) -> String {
    let real = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let name = real.file_name().or_else(|| inner.file_name()).and_then(|name| name.to_str());
    name.unwrap_or_default().to_owned()
}

/// Names of disks in UTF-16 text, wherever it stands.
fn wide_texts(bytes: &[u8]) -> BTreeSet<String> {
    const LONGEST: usize = 1024;
    let mut found = BTreeSet::new();
    for start in [0, 1] {
        let units = bytes.get(start..).unwrap_or_default().chunks_exact(2);
        let mut run = String::new();
        for unit in units.map(|pair| u16::from(pair[0]) | u16::from(pair[1]) << 8).chain([0]) {
            let c = char::from_u32(u32::from(unit)).filter(|c| !c.is_control());
            match c {
                Some(c) if run.len() < LONGEST => run.push(c),
                _ => {
                    if DISKS.contains(&ending(Path::new(&run.replace('\\', "/"))).as_str()) {
                        found.insert(run.clone());
                    }
                    run.clear();
                }
            }
        }
    }
    found
}

/// A machine of which only the disks are known: those that no other disk stands on.
fn disks_only(files: &[&PathBuf], folder: &Path) -> Result<Guest> {
    let mut parents = BTreeSet::new();
    for file in files {
        parents.extend(parent_of(file));
    }
    let name = |file: &Path| file.file_name().and_then(|name| name.to_str()).map(str::to_ascii_lowercase);
    let leaves = files.iter().filter(|file| name(file).is_some_and(|name| !parents.contains(&name)));
    let mut guest = Guest { origin: Origin::HyperV, name: folder_name(folder, folder), ..Guest::default() };
    for file in leaves {
        let path = path_text(file)?;
        guest.disks.push(Disk::new(name(file).unwrap_or_default(), image(path, None)));
    }
    if guest.disks.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("the export '{}' has no disks", folder.display()),
        )
        .hint("an export has a folder 'Virtual Hard Disks'; copy it as well"));
    }
    Ok(guest)
}

/// The name of the file that a disk stands on, in lower case and without its folder.
fn parent_of(file: &Path) -> Option<String> {
    let options = OpenOptions { backing: BackingMode::Ignore, metadata_only: true, ..OpenOptions::default() };
    let layer = image::open(&Spec::from_filename(file.to_str()?).ok()?, &options).ok()?;
    let parent = layer.full_backing_filename.as_ref()?;
    parent.rsplit(['/', '\\']).next().map(str::to_ascii_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIGURATION: &str = r#"<?xml version="1.0" encoding="UTF-16" standalone="yes"?>
<configuration>
 <manifest><size type="integer">2</size>
  <vdev000><device type="string">83f8638b-8dca-4152-9eda-2ca8b33039b4</device><instance type="string">83F8638B-8DCA-4152-9EDA-2CA8B33039B4</instance></vdev000>
  <vdev001><device type="string">d422512d-2bf2-4752-809d-7b82b5fcb1b4</device><instance type="string">0f0f0f0f-0000-4000-8000-000000000001</instance></vdev001>
 </manifest>
 <properties><name type="string">srv</name><subtype type="integer">0</subtype><notes type="string"></notes></properties>
 <settings><memory><bank><size type="integer">2048</size></bank></memory><processors><count type="integer">2</count></processors></settings>
 <_83f8638b-8dca-4152-9eda-2ca8b33039b4_>
  <controller0><drive0><pathname type="string">C:\VMs\srv\Virtual Hard Disks\srv.vhd</pathname><type type="string">VHD</type></drive0></controller0>
  <controller1><drive0><pathname type="string">C:\iso\x.iso</pathname><type type="string">ISO</type></drive0></controller1>
 </_83f8638b-8dca-4152-9eda-2ca8b33039b4_>
 <_0f0f0f0f-0000-4000-8000-000000000001_><controller0><drive0><pathname type="string">C:\VMs\srv\data.vhdx</pathname></drive0></controller0></_0f0f0f0f-0000-4000-8000-000000000001_>
 <_2fc216b0-d2e2-4967-9b6d-b8a5c9ca2778_><MacAddress type="string">00-15-5D-01-02-03</MacAddress><AltSwitchName type="string">LAN</AltSwitchName></_2fc216b0-d2e2-4967-9b6d-b8a5c9ca2778_>
</configuration>"#;

    #[test]
    fn an_xml_configuration() {
        let wide: Vec<u8> =
            [0xff, 0xfe].into_iter().chain(CONFIGURATION.encode_utf16().flat_map(u16::to_le_bytes)).collect();
        let guest = configuration(&wide, &Place::nowhere(&Policy::default())).unwrap();
        assert_eq!(
            (guest.name.as_str(), guest.memory_bytes, guest.cpus.count),
            ("srv", Some(2 << 30), Some(2))
        );
        assert_eq!(guest.firmware.kind, Some(FirmwareKind::Bios));
        let disks: Vec<_> = guest.disks.iter().map(|disk| disk.bus).collect();
        assert_eq!(disks, [Some(Bus::Ide), Some(Bus::Scsi)]);
        assert_eq!(guest.removables.len(), 1);
        assert_eq!(guest.nics[0].mac.as_deref(), Some("00:15:5d:01:02:03"));
        assert_eq!(
            (guest.nics[0].model.as_deref(), guest.nics[0].network_name.as_deref()),
            (Some("netvsc"), Some("LAN"))
        );
    }

    #[test]
    fn names_of_disks_in_binary_files() {
        let mut bytes = vec![1, 2, 3];
        bytes.extend("\0C:\\VMs\\a b.vhdx\0".encode_utf16().flat_map(u16::to_le_bytes));
        bytes.extend("no disk.txt\0".encode_utf16().flat_map(u16::to_le_bytes));
        assert_eq!(wide_texts(&bytes).into_iter().collect::<Vec<_>>(), ["C:\\VMs\\a b.vhdx"]);
        assert!(wide_texts(&[]).is_empty());
    }
}

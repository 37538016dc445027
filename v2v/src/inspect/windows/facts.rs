//! What the registry of a Windows says about it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result, ResultExt as _};
use guestdisk::Volume;
use guestdisk::fs::FileSystem;
use hive::{Hive, Key};

use super::super::{Interface, Obstacle, System, Tools};

/// The most bytes of a hive or its log.
const MOST_HIVE: u64 = 512 << 20;
/// The most cards whose addresses are looked at.
const MOST_CARDS: usize = 256;
/// The first build that is called Windows 11.
const WINDOWS_11: u32 = 22_000;

/// Drivers of storage: those of KVM, those that Windows brings along, those of other hypervisors.
const STORAGE: [&str; 14] = [
    "viostor", "vioscsi", "storahci", "msahci", "stornvme", "intelide", "atapi", "iaStorV", "LSI_SAS",
    "LSI_SCSI", "pvscsi", "storvsc", "xenvbd", "stornvmf",
];

/// Guest tools of other hypervisors by their services.
const TOOLS: [(&str, &[&str]); 4] = [
    ("vmware-tools", &["VMTools", "VGAuthService", "vm3dservice"]),
    ("virtualbox-guest-additions", &["VBoxService"]),
    ("xe-guest-utilities", &["xensvc", "XenAgent", "xenagent"]),
    ("parallels-tools", &["prl_tools", "prl_tools_svc", "prl_strg"]),
];

/// What is known of a Windows besides what every [`System`] has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Windows {
    /// Its folder on the root volume, spelt as on the disk (`/Windows`).
    pub folder: PathBuf,
    /// The hive `SYSTEM`, likewise.
    pub system_hive: PathBuf,
    /// The hive `SOFTWARE`, likewise.
    pub software_hive: PathBuf,
    /// Major and minor version (10.0, 6.1).
    pub version: (u32, u32),
    /// The build's number.
    pub build: u32,
    /// A server.
    pub server: bool,
    /// `EditionID` (`Professional`, `ServerStandard`).
    pub edition: String,
    /// The control set that it starts with (`ControlSet001`).
    pub control_set: String,
    /// The hive has a `DriverDatabase` (Windows 8 and later), rather than a `CriticalDeviceDatabase` alone.
    pub driver_database: bool,
    /// Drivers of storage that are started by the boot loader.
    pub boot_drivers: Vec<String>,
    /// The hardware clock runs in local time.
    pub local_time: bool,
    /// Fast Startup is on: shutting down hibernates.
    pub fast_startup: bool,
    /// The letters that volumes have (`C`).
    pub drive_letters: Vec<char>,
    /// Fixed addresses of network cards, which belong to the old cards.
    pub addresses: Vec<String>,
}

/// A path as it is spelt on the disk, where names have no case.
fn spelt(files: &FileSystem, path: &str) -> Option<PathBuf> {
    let mut whole = PathBuf::from("/");
    for name in path.split('/').filter(|name| !name.is_empty()) {
        let same = |own: &OsStr| own.to_str().is_some_and(|own| own.eq_ignore_ascii_case(name));
        let entry = files.read_dir(&whole).ok()?.into_iter().find(|entry| same(&entry.name))?;
        whole.push(entry.name);
    }
    Some(whole)
}

/// A hive with what its logs add to it. `read` gives the contents of files that are there.
///
/// # Errors
/// It is damaged, or was not closed and its logs do not fit.
pub(crate) fn open_hive(path: &Path, read: &mut dyn FnMut(&Path) -> Result<Option<Vec<u8>>>) -> Result<Hive> {
    let what = || format!("the registry ({})", path.display());
    let missing = || Error::new(ErrorKind::NotFound, "it is not there");
    let bytes = read(path).and_then(|bytes| bytes.ok_or_else(missing)).context(what)?;
    let mut hive = Hive::parse(bytes).context(what)?;
    if !hive.is_clean() {
        let mut logs = vec![];
        for ending in [".LOG1", ".LOG2"] {
            let mut name = path.as_os_str().to_owned();
            name.push(ending);
            logs.extend(read(Path::new(&name)).ok().flatten());
        }
        let logs: Vec<&[u8]> = logs.iter().map(Vec::as_slice).collect();
        hive.recover(&logs).context(what)?;
    }
    Ok(hive)
}

/// Looks at a Windows on a volume of NTFS.
pub(super) fn fill(volume: &Volume, system: &mut System) {
    let files = match volume.file_system() {
        Ok(files) => files,
        Err(error) => return system.obstacles.push(unread(&error)),
    };
    system.obstacles.extend(files.notes().iter().map(|note| Obstacle {
        code: "unclean",
        message: format!("{}: {note}", volume.location),
        hint: "start the guest once more and shut it down ('shutdown /s /t 0') before it is converted".into(),
        fatal: false,
    }));
    if is_asleep(&files) {
        system.obstacles.push(Obstacle {
            code: "hibernated",
            message: format!("{} is hibernated (Fast Startup does that at every shutdown)", volume.location),
            hint: "start the guest, run 'powercfg /h off' and 'shutdown /s /t 0', then convert it".into(),
            fatal: true,
        });
    }
    match registry(&files, system) {
        Ok(facts) => {
            if !facts.boot_drivers.iter().any(|name| matches!(name.as_str(), "viostor" | "vioscsi")) {
                system.obstacles.push(Obstacle {
                    code: "no-virtio-driver",
                    message: format!("{} has no driver for virtio disks that starts at boot", system.product),
                    hint: "give the drivers of the virtio-win project (--virtio-win FOLDER), or attach the disks by \
                           SATA (--bus sata)"
                        .into(),
                    fatal: true,
                });
            }
            system.windows = Some(facts);
        }
        Err(error) => system.obstacles.push(unread(&error)),
    }
}

fn unread(error: &Error) -> Obstacle {
    Obstacle {
        code: "windows-unread",
        message: format!("what Windows this is cannot be found out: {error}"),
        hint: "attach its disks by SATA (--bus sata), for which Windows 8 and later have a driver".into(),
        fatal: false,
    }
}

/// Whether the file of hibernation holds a sleeping system.
fn is_asleep(files: &FileSystem) -> bool {
    let mut signature = [0; 4];
    let read = files.open_file("/hiberfil.sys").and_then(|file| file.read_at(&mut signature, 0));
    read.is_ok_and(|len| len == 4) && signature.eq_ignore_ascii_case(b"hibr")
}

fn registry(files: &FileSystem, system: &mut System) -> Result<Windows> {
    let find = |path: &str| {
        let missing = || Error::new(ErrorKind::NotFound, format!("there is no '{path}'"));
        spelt(files, path).ok_or_else(missing)
    };
    let mut facts = Windows {
        folder: find("Windows")?,
        system_hive: find("Windows/System32/config/SYSTEM")?,
        software_hive: find("Windows/System32/config/SOFTWARE")?,
        ..Windows::default()
    };
    let mut read = |path: &Path| match files.read(path, MOST_HIVE) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    };
    let software = open_hive(&facts.software_hive, &mut read)?;
    release(&software, &mut facts, system)?;
    drop(software);
    let hive = open_hive(&facts.system_hive, &mut read)?;
    let reader = Reader(&hive);
    let select = |name| reader.number("Select", name);
    let set = select("Default").or_else(|| select("Current")).unwrap_or(1);
    facts.control_set = format!("ControlSet{set:03}");
    if reader.key(&facts.control_set).is_none() {
        return Err(Error::new(ErrorKind::Corrupt, format!("the registry has no {}", facts.control_set)));
    }
    control_set(&reader, &mut facts, system);
    Ok(facts)
}

/// A hive whose damaged parts count as absent.
struct Reader<'a>(&'a Hive);

impl Reader<'_> {
    fn key(&self, path: &str) -> Option<Key> {
        self.0.find(path).ok().flatten()
    }

    fn value(&self, path: &str, name: &str) -> Option<hive::Value> {
        self.0.value(self.key(path)?, name).ok().flatten()
    }

    fn number(&self, path: &str, name: &str) -> Option<u32> {
        self.value(path, name)?.as_number()
    }

    fn text(&self, path: &str, name: &str) -> Option<String> {
        self.value(path, name)?.as_text()
    }
}

fn release(software: &Hive, facts: &mut Windows, system: &mut System) -> Result<()> {
    const CURRENT: &str = r"Microsoft\Windows NT\CurrentVersion";
    let reader = Reader(software);
    if reader.key(CURRENT).is_none() {
        return Err(Error::new(ErrorKind::Corrupt, format!("the registry has no {CURRENT}")));
    }
    let text = |name| reader.text(CURRENT, name).unwrap_or_default();
    let build = [text("CurrentBuildNumber"), text("CurrentBuild")];
    facts.build = build.iter().find_map(|text| text.parse().ok()).unwrap_or(0);
    let old = text("CurrentVersion");
    let (major, minor) = old.split_once('.').unwrap_or((&old, ""));
    let number = |name, old: &str| reader.number(CURRENT, name).unwrap_or_else(|| old.parse().unwrap_or(0));
    // Since Windows 10, CurrentVersion stays at 6.3 and there are numbers besides.
    facts.version = match reader.number(CURRENT, "CurrentMajorVersionNumber") {
        Some(major) => (major, number("CurrentMinorVersionNumber", "")),
        None => (number("", major), number("", minor)),
    };
    facts.edition = text("EditionID");
    let product = text("ProductName");
    facts.server =
        text("InstallationType").to_lowercase().starts_with("server") || product.contains("Server");
    if !product.is_empty() {
        system.product = match facts.build {
            WINDOWS_11.. if !facts.server => product.replace("Windows 10", "Windows 11"),
            _ => product,
        };
    }
    system.version = format!("{}.{}.{}", facts.version.0, facts.version.1, facts.build);
    Ok(())
}

fn control_set(reader: &Reader<'_>, facts: &mut Windows, system: &mut System) {
    let set = facts.control_set.clone();
    let control = |path: &str| format!(r"{set}\Control\{path}");
    let service = |name: &str| format!(r"{set}\Services\{name}");
    system.host_name =
        reader.text(&control(r"ComputerName\ComputerName"), "ComputerName").unwrap_or_default();
    let processor = reader.text(&control(r"Session Manager\Environment"), "PROCESSOR_ARCHITECTURE");
    system.architecture = match processor.unwrap_or_default().to_uppercase().as_str() {
        "AMD64" => "x86_64",
        "X86" => "i686",
        "ARM64" => "aarch64",
        _ => "",
    }
    .to_owned();
    facts.driver_database = reader.key("DriverDatabase").is_some();
    let starts = |name: &str| reader.number(&service(name), "Start");
    let held_back =
        |name: &str| reader.number(&format!(r"{}\StartOverride", service(name)), "0").unwrap_or(0) != 0;
    let boot = STORAGE.iter().filter(|name| starts(name) == Some(0) && !held_back(name));
    facts.boot_drivers = boot.map(|name| (*name).to_owned()).collect();
    let universal = reader.number(&control("TimeZoneInformation"), "RealTimeIsUniversal");
    facts.local_time = universal.unwrap_or(0) == 0;
    let fast = reader.number(&control(r"Session Manager\Power"), "HiberbootEnabled");
    facts.fast_startup = fast == Some(1);
    for (name, services) in TOOLS {
        let its = |service: &&&str| starts(service).is_some_and(|start| start < 4);
        let services: Vec<PathBuf> = services.iter().filter(its).map(PathBuf::from).collect();
        if !services.is_empty() {
            system.tools.push(Tools { name: name.to_owned(), services });
        }
    }
    cards(reader, &service(r"Tcpip\Parameters\Interfaces"), facts, system);
    let mounted = reader.key("MountedDevices").and_then(|key| reader.0.values(key).ok()).unwrap_or_default();
    for (name, _) in mounted {
        if let Some([letter, b':']) = name.strip_prefix(r"\DosDevices\").map(str::as_bytes)
            && letter.is_ascii_alphabetic()
        {
            facts.drive_letters.push(char::from(letter.to_ascii_uppercase()));
        }
    }
    facts.drive_letters.sort_unstable();
    facts.drive_letters.dedup();
}

/// Fixed addresses: they belong to cards that will not be there.
fn cards(reader: &Reader<'_>, folder: &str, facts: &mut Windows, system: &mut System) {
    let Some(cards) = reader.key(folder) else { return };
    for card in reader.0.subkeys(cards).unwrap_or_default().into_iter().take(MOST_CARDS) {
        let Ok(name) = reader.0.name(card) else { continue };
        let value = |name| reader.0.value(card, name).ok().flatten();
        let list = |name| value(name).and_then(|value| value.as_list()).unwrap_or_default();
        let dhcp = value("EnableDHCP").and_then(|value| value.as_number()).unwrap_or(1) != 0;
        let (addresses, masks) = (list("IPAddress"), list("SubnetMask"));
        let is_static = !dhcp && addresses.iter().any(|address| address != "0.0.0.0");
        if is_static {
            let pairs = addresses.iter().enumerate();
            let pairs = pairs.map(|(index, address)| match masks.get(index) {
                Some(mask) => format!("{address} mask {mask}"),
                None => address.clone(),
            });
            let gateway = list("DefaultGateway").first().map(|gateway| format!(" gateway {gateway}"));
            facts.addresses.push(pairs.collect::<Vec<_>>().join(", ") + &gateway.unwrap_or_default());
            system.interfaces.push(Interface { name, is_static, ..Interface::default() });
        }
    }
}

//! Windows, and what is neither Linux nor Windows.
//!
//! ```text
//!   registry    the hive SYSTEM, set value by value; one change of the plan
//!   drivers     a tree of the virtio-win project: which folder fits, which files
//! ```
//!
//! A driver that starts at boot is known by its service, and by the device's identity: in the `CriticalDeviceDatabase` up to
//! Windows 7, in the `DriverDatabase` since Windows 8. All other drivers are found by Windows itself at its first start, in
//! the folder that `DevicePath` names.

mod drivers;
mod registry;

use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result};
use hive::Value;

use super::draft::{Draft, MOST_FILE, Why};
use super::tree::{Place, Tree};
use super::uefi::child;
use crate::inspect::{System, Windows};
use crate::plan::{Plan, PlanOptions, Stop, TargetBus};
use drivers::Drivers;
use registry::Registry;

/// Where the drivers for Windows' own search are put, below its folder.
const DRIVERS: [&str; 2] = ["Drivers", "VirtIO"];
/// The same as `DevicePath` has it.
const DEVICE_PATH: &str = r"%SystemRoot%\Drivers\VirtIO";

/// A driver of KVM's disks.
struct Storage {
    service: &'static str,
    /// Identities on the PCI bus: of the device as it was before virtio 1.0, and since.
    devices: [&'static str; 2],
}

const BLOCK: Storage =
    Storage { service: "viostor", devices: ["VEN_1AF4&DEV_1001&REV_00", "VEN_1AF4&DEV_1042&REV_01"] };
const SCSI: Storage =
    Storage { service: "vioscsi", devices: ["VEN_1AF4&DEV_1004&REV_00", "VEN_1AF4&DEV_1048&REV_01"] };

/// What can be said of a system that is neither Linux nor Windows.
pub(super) fn other(system: &System) -> Plan {
    let name = if system.product.is_empty() { "A system that is not Linux" } else { &system.product };
    Plan { left_alone: vec![format!("{name} is left as it is.")], ..Plan::default() }
}

/// The changes for one Windows.
pub(super) fn convert(tree: &dyn Tree, system: &System, options: &PlanOptions) -> Result<Plan> {
    let mut draft = Draft::new(tree);
    fallback_loader(&mut draft, system);
    let Some(facts) = &system.windows else {
        let stop = Stop {
            message: format!(
                "{} cannot be prepared for its new disk controller: its registry was not read",
                system.product
            ),
            hint: "attach its disks by SATA (--bus sata); Windows 8 and later have a driver for it"
                .to_owned(),
        };
        match options.bus {
            TargetBus::Sata => draft.ask(format!("{}.", stop.message)),
            TargetBus::VirtioBlk | TargetBus::VirtioScsi => draft.stop(stop.message, stop.hint),
        }
        return draft.finish();
    };
    let mut registry = Registry::open(&mut draft, system.root, facts)?;
    let storage = match options.bus {
        TargetBus::VirtioBlk => Some(BLOCK),
        TargetBus::VirtioScsi => Some(SCSI),
        TargetBus::Sata => None,
    };
    match (storage, &options.virtio_win) {
        (None, _) => sata(&mut draft, &mut registry, system, facts),
        (Some(storage), Some(folder)) => {
            let drivers = Drivers::open(folder, facts, &system.architecture)?;
            virtio(&mut draft, &mut registry, system, facts, &storage, &drivers)?;
        }
        (Some(storage), None) => without_drivers(&mut draft, system, facts, &storage),
    }
    if !options.keep_tools {
        tools(&mut registry, system);
    }
    for address in &facts.addresses {
        draft.ask(format!(
            "A network card had the fixed address {address}; Windows takes the new card for another one: set it again after \
             the first start."
        ));
    }
    registry.finish(&mut draft);
    draft.finish()
}

/// No drivers were given: what there is has to do.
fn without_drivers(draft: &mut Draft<'_>, system: &System, facts: &Windows, storage: &Storage) {
    let name = &system.product;
    if facts.boot_drivers.iter().any(|driver| driver == storage.service) {
        draft.leave(format!("{name} has its driver {} and starts it at boot.", storage.service));
        return;
    }
    draft.ask(format!(
        "{name} would not find its disk: it has no driver {} that starts at boot. Give the files of the virtio-win project \
         (--virtio-win FOLDER), or attach the disks by SATA (--bus sata).",
        storage.service
    ));
}

/// The driver for SATA that Windows brings along, started at boot.
fn sata(draft: &mut Draft<'_>, registry: &mut Registry, system: &System, facts: &Windows) {
    let names = if facts.driver_database { ["storahci", "msahci"] } else { ["msahci", "storahci"] };
    let Some(name) = names.into_iter().find(|name| registry.has(&facts.service(name))) else {
        let message = format!("{} has no driver for SATA (neither storahci nor msahci)", system.product);
        draft.stop(message, "install one in the guest first");
        return;
    };
    start_at_boot(registry, facts, name);
}

/// A service that starts at boot, and is not held back (Windows 8 and later hold back what was not needed the last time).
fn start_at_boot(registry: &mut Registry, facts: &Windows, name: &str) {
    let service = facts.service(name);
    registry.set(&service, "Start", Value::number(0));
    let held_back = format!(r"{service}\StartOverride");
    if registry.has(&held_back) {
        registry.set(&held_back, "0", Value::number(0));
    }
}

fn virtio(
    draft: &mut Draft<'_>,
    registry: &mut Registry,
    system: &System,
    facts: &Windows,
    storage: &Storage,
    drivers: &Drivers,
) -> Result<()> {
    let name = storage.service;
    let file = format!("{name}.sys");
    let own = drivers.file(&file)?;
    let why = |what: &str| {
        Why::new("windows-driver", what, "remove the file, and the driver in the device manager first")
    };
    let windows = Place { volume: system.root, path: facts.folder.clone() };
    let folder = child(draft, &windows, "System32").and_then(|folder| child(draft, &folder, "drivers"));
    let folder = folder.ok_or_else(|| Error::new(ErrorKind::NotFound, "Windows has no System32/drivers"))?;
    put(draft, &folder, &file, own, why("KVM's disks need this driver at boot"));
    service(registry, facts, name);
    match facts.driver_database {
        true => driver_database(registry, system, storage),
        false => critical_devices(registry, facts, storage),
    }
    let mut folder = windows;
    for name in DRIVERS {
        folder = child(draft, &folder, name)
            .unwrap_or_else(|| Place { volume: folder.volume, path: folder.path.join(name) });
    }
    let reason = "Windows finds the drivers of KVM's other devices here at its first start";
    draft.make_directories_at(&folder, &folder.path.clone(), &why(reason));
    for (name, bytes) in drivers.files()? {
        put(draft, &folder, &name, bytes, why(reason));
    }
    device_path(draft, system.root, facts)
}

/// A file of a folder, whatever the case of its name.
fn put(draft: &mut Draft<'_>, folder: &Place, name: &str, bytes: Vec<u8>, why: Why) {
    let place = child(draft, folder, name)
        .unwrap_or_else(|| Place { volume: folder.volume, path: folder.path.join(name) });
    let path = place.path.clone();
    draft.write_at(place, &path, bytes, 0o644, why);
}

/// The service, as the driver's INF file would make it.
fn service(registry: &mut Registry, facts: &Windows, name: &str) {
    let service = facts.service(name);
    registry.set(&service, "Type", Value::number(1));
    registry.set(&service, "ErrorControl", Value::number(1));
    registry.set(&service, "Group", Value::text("SCSI miniport"));
    registry.set(&service, "ImagePath", Value::expand(&format!(r"system32\drivers\{name}.sys")));
    registry.set(&format!(r"{service}\Parameters\PnpInterface"), "5", Value::number(1));
    start_at_boot(registry, facts, name);
}

/// The class of disk controllers.
const CLASS: &str = "{4D36E97B-E325-11CE-BFC1-08002BE10318}";

/// Up to Windows 7.
fn critical_devices(registry: &mut Registry, facts: &Windows, storage: &Storage) {
    for device in storage.devices {
        let key = format!(r"{}\Control\CriticalDeviceDatabase\PCI#{device}", facts.control_set);
        registry.set(&key, "Service", Value::text(storage.service));
        registry.set(&key, "ClassGUID", Value::text(CLASS));
    }
}

/// Since Windows 8: a package of drivers with one configuration for both devices.
fn driver_database(registry: &mut Registry, system: &System, storage: &Storage) {
    const ROOT: &str = "DriverDatabase";
    const INF: &str = "vimgstor.inf";
    const CONFIGURATION: &str = "vimg_storage";
    let architecture = match system.architecture.as_str() {
        "i686" => "x86",
        "aarch64" => "arm64",
        _ => "amd64",
    };
    let package = format!("{INF}_{architecture}_0000000000000000");
    let file = format!(r"{ROOT}\DriverInfFiles\{INF}");
    registry.set(&file, "", Value::list([&*package]));
    registry.set(&file, "Active", Value::text(&package));
    registry.set(&file, "Configurations", Value::list([CONFIGURATION]));
    let package = format!(r"{ROOT}\DriverPackages\{package}");
    registry.set(&package, "", Value::text(INF));
    registry.set(&package, "Version", Value::binary(version()));
    let configuration = format!(r"{package}\Configurations\{CONFIGURATION}");
    registry.set(&configuration, "ConfigFlags", Value::number(0));
    registry.set(&configuration, "Service", Value::text(storage.service));
    for device in storage.devices {
        registry.set(&format!(r"{ROOT}\DeviceIds\PCI\{device}"), INF, Value::binary([1, 0xff, 0, 0]));
        let descriptor = format!(r"{package}\Descriptors\PCI\{device}");
        registry.set(&descriptor, "Configuration", Value::text(CONFIGURATION));
    }
}

/// The version of a package: flags, the class (as GUIDs are kept), a date (2006-06-21, which Windows' own drivers have), the
/// number 0.0.0.0.
fn version() -> Vec<u8> {
    let mut bytes = vec![0x00, 0xff, 0x09, 0x00, 0, 0, 0, 0];
    bytes.extend([
        0x7b, 0xe9, 0x36, 0x4d, 0x25, 0xe3, 0xce, 0x11, 0xbf, 0xc1, 0x08, 0x00, 0x2b, 0xe1, 0x03, 0x18,
    ]);
    bytes.extend([0x00, 0x80, 0x8c, 0xa3, 0xc5, 0x94, 0xc6, 0x01]);
    bytes.extend([0; 16]);
    bytes
}

/// Where Windows looks for drivers.
fn device_path(draft: &mut Draft<'_>, root: usize, facts: &Windows) -> Result<()> {
    const KEY: &str = r"Microsoft\Windows\CurrentVersion";
    let mut software = Registry::open_file(draft, root, &facts.software_hive)?;
    let old = software.text(KEY, "DevicePath").unwrap_or_else(|| r"%SystemRoot%\inf".to_owned());
    if !old.split(';').any(|part| part.eq_ignore_ascii_case(DEVICE_PATH)) {
        software.set(KEY, "DevicePath", Value::expand(&format!("{old};{DEVICE_PATH}")));
    }
    software.finish(draft);
    Ok(())
}

/// Services of other hypervisors' guest tools are not started any more; they stay installed.
fn tools(registry: &mut Registry, system: &System) {
    let Some(facts) = &system.windows else { return };
    for service in system.tools.iter().flat_map(|tools| &tools.services) {
        registry.set(&facts.service(&service.to_string_lossy()), "Start", Value::number(4));
    }
}

/// Windows' boot manager under the name that firmware starts of its own accord.
fn fallback_loader(draft: &mut Draft<'_>, system: &System) {
    let Some(volume) = system.esp.filter(|_| system.fallback_loader.is_none()) else { return };
    let at = |path: &str| Place { volume, path: PathBuf::from(path) };
    let Some(efi) = child(draft, &at("/"), "EFI") else { return };
    let own = ["Microsoft", "Boot", "bootmgfw.efi"]
        .into_iter()
        .try_fold(efi.clone(), |folder, name| child(draft, &folder, name));
    let Some(bytes) = own.and_then(|own| draft.bytes(&own, MOST_FILE)) else {
        draft.ask("The EFI system partition has no \\EFI\\BOOT loader, and none was found that could be copied there.");
        return;
    };
    let name = match system.architecture.as_str() {
        "i686" => "BOOTIA32.EFI",
        "aarch64" => "BOOTAA64.EFI",
        _ => "BOOTX64.EFI",
    };
    let why = Why::new(
        "uefi-fallback",
        "the firmware of the new machine does not know the guest's boot entries and starts \\EFI\\BOOT",
        "remove the folder EFI\\BOOT from the EFI system partition",
    );
    let folder = child(draft, &efi, "BOOT").unwrap_or_else(|| Place { volume, path: efi.path.join("BOOT") });
    let shown = |path: &Path| Path::new("/EFI system partition").join(path.strip_prefix("/").unwrap_or(path));
    draft.make_directories_at(&folder, &shown(&folder.path), &why);
    let place = Place { volume, path: folder.path.join(name) };
    let path = shown(&place.path);
    draft.write_at(place, &path, bytes, 0o644, why);
}

impl Windows {
    /// The key of a service.
    fn service(&self, name: &str) -> String {
        format!(r"{}\Services\{name}", self.control_set)
    }
}

//! Guest tools of other hypervisors.

use std::path::{Path, PathBuf};

use super::{System, Tools};
use crate::view::GuestView;

/// A product's tools: its name, files that only it brings, and its services.
struct Product {
    name: &'static str,
    files: &'static [&'static str],
    /// Units of systemd without `.service`, and names of init scripts; `*` at the end stands for anything.
    services: &'static [&'static str],
}

const PRODUCTS: [Product; 6] = [
    Product {
        name: "open-vm-tools",
        files: &[
            "/usr/share/open-vm-tools",
            "/lib/systemd/system/open-vm-tools.service",
            "/etc/init.d/open-vm-tools",
        ],
        services: &[
            "open-vm-tools",
            "vmtoolsd",
            "vgauth",
            "vgauthd",
            "vmware-vmblock-fuse",
            "run-vmblock\\x2dfuse",
        ],
    },
    Product {
        name: "vmware-tools",
        files: &[
            "/usr/bin/vmware-uninstall-tools.pl",
            "/etc/vmware-tools/locations",
            "/usr/lib/vmware-tools/sbin",
        ],
        services: &["vmware-tools", "vmware-tools-thinprint", "vmware-tools-services"],
    },
    Product {
        name: "virtualbox-guest-additions",
        files: &[
            "/usr/sbin/VBoxService",
            "/sbin/VBoxService",
            "/usr/bin/VBoxService",
            "/opt/VBoxGuestAdditions*",
        ],
        services: &["vboxadd*", "vboxservice", "virtualbox-guest-utils", "vboxdrmclient"],
    },
    Product {
        name: "xe-guest-utilities",
        files: &["/usr/sbin/xe-daemon", "/usr/sbin/xe-linux-distribution"],
        services: &["xe-daemon", "xe-linux-distribution", "xe-guest-utilities", "xendriverdomain"],
    },
    Product {
        name: "hyperv-daemons",
        files: &["/usr/sbin/hv_kvp_daemon", "/usr/sbin/hypervkvpd", "/usr/bin/hv_kvp_daemon"],
        services: &[
            "hypervkvpd",
            "hypervvssd",
            "hypervfcopyd",
            "hv-kvp-daemon*",
            "hv-vss-daemon*",
            "hv-fcopy-daemon*",
            "hv_kvp_daemon",
            "hv_vss_daemon",
            "hv_fcopy_daemon",
        ],
    },
    Product {
        name: "parallels-tools",
        files: &["/usr/bin/prltoolsd", "/usr/lib/parallels-tools", "/usr/bin/prl_nettool"],
        services: &["prltoolsd*", "prl-x11", "parallels-tools"],
    },
];

/// Folders in which a link means that a service is started: of systemd, of System V, of OpenRC.
const UNIT_FOLDER: &str = "/etc/systemd/system";
const SCRIPT_FOLDERS: [&str; 12] = [
    "/etc/rc2.d",
    "/etc/rc3.d",
    "/etc/rc5.d",
    "/etc/rcS.d",
    "/etc/rc.d/rc2.d",
    "/etc/rc.d/rc3.d",
    "/etc/rc.d/rc5.d",
    "/etc/init.d/rc3.d",
    "/etc/init.d/rc5.d",
    "/etc/runlevels/boot",
    "/etc/runlevels/default",
    "/etc/runlevels/sysinit",
];
/// The most folders of wanted units.
const MOST_FOLDERS: usize = 256;

/// Finds the tools and which of their services are started.
pub(super) fn fill(view: &GuestView, system: &mut System) {
    let enabled = Enabled::read(view);
    for product in &PRODUCTS {
        let services = enabled.of(product);
        if !services.is_empty() || product.files.iter().any(|file| is_there(view, file)) {
            system.tools.push(Tools { name: product.name.to_owned(), services });
        }
    }
}

fn is_there(view: &GuestView, file: &str) -> bool {
    match file.strip_suffix('*') {
        None => view.exists(file),
        Some(start) => {
            let (folder, start) = start.rsplit_once('/').unwrap_or(("/", start));
            view.names_in(folder).iter().any(|name| name.starts_with(start))
        }
    }
}

/// The services that are started: their names, and the unit or script that each of them is.
struct Enabled {
    services: Vec<(String, PathBuf)>,
}

impl Enabled {
    fn read(view: &GuestView) -> Self {
        let mut services = vec![];
        let wanted = view.names_in(UNIT_FOLDER).into_iter();
        let wanted = wanted.filter(|name| name.ends_with(".wants") || name.ends_with(".requires"));
        for folder in wanted.take(MOST_FOLDERS) {
            let folder = Path::new(UNIT_FOLDER).join(folder);
            for unit in view.names_in(&folder) {
                let name = unit.rsplit_once('.').map_or(unit.as_str(), |(name, _)| name).to_owned();
                if !is_masked(view, &unit) {
                    services.push((name, unit_file(view, &unit).unwrap_or_else(|| folder.join(&unit))));
                }
            }
        }
        for folder in SCRIPT_FOLDERS {
            for link in view.names_in(folder) {
                let name = match link.strip_prefix('S').and_then(|rest| rest.get(2..)) {
                    Some(name) if link[1..3].bytes().all(|byte| byte.is_ascii_digit()) => name,
                    _ if folder.starts_with("/etc/runlevels") => link.as_str(),
                    _ => continue,
                };
                let script = view.locate(Path::new(folder).join(&link)).map(|place| place.guest_path);
                services
                    .push((name.to_owned(), script.unwrap_or_else(|_| Path::new("/etc/init.d").join(name))));
            }
        }
        Self { services }
    }

    fn of(&self, product: &Product) -> Vec<PathBuf> {
        let fits = |name: &str, pattern: &str| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == pattern,
        };
        let own = self.services.iter().filter(|(name, _)| product.services.iter().any(|own| fits(name, own)));
        let mut paths: Vec<_> = own.map(|(_, path)| path.clone()).collect();
        paths.sort();
        paths.dedup();
        paths
    }
}

/// The file of a unit.
fn unit_file(view: &GuestView, unit: &str) -> Option<PathBuf> {
    let folders = [UNIT_FOLDER, "/usr/lib/systemd/system", "/lib/systemd/system"];
    folders
        .iter()
        .find_map(|folder| view.locate(Path::new(folder).join(unit)).ok())
        .map(|place| place.guest_path)
}

/// Whether a unit is a link to `/dev/null`.
fn is_masked(view: &GuestView, unit: &str) -> bool {
    view.read_link(Path::new(UNIT_FOLDER).join(unit)).is_ok_and(|target| target == Path::new("/dev/null"))
}

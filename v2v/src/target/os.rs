//! What an operating system is called by those who need to know.

use crate::inspect::{System, SystemKind};

/// What is known of the operating system of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OsFacts {
    /// Linux, Windows, something else; `None`: not known.
    pub kind: Option<SystemKind>,
    /// `ID` of os-release (`debian`), or `windows`.
    pub distribution: String,
    /// `VERSION_ID`, or the version of Windows.
    pub version: String,
    /// For people (`Debian GNU/Linux 12 (bookworm)`, `Windows Server 2019 Standard`).
    pub product: String,
    /// `x86_64`, `i686`, `aarch64`; empty if not known.
    pub architecture: String,
}

impl From<&System> for OsFacts {
    fn from(system: &System) -> Self {
        Self {
            kind: Some(system.kind),
            distribution: system.distribution.clone(),
            version: system.version.clone(),
            product: system.product.clone(),
            architecture: system.architecture.clone(),
        }
    }
}

/// Windows by a word of its product's name, more particular ones first: libosinfo's short id, Proxmox' `ostype`.
const WINDOWS: [(&str, &str, &str); 17] = [
    ("2025", "2k25", "win11"),
    ("2022", "2k22", "win11"),
    ("2019", "2k19", "win10"),
    ("2016", "2k16", "win10"),
    ("2012 r2", "2k12r2", "win8"),
    ("2012", "2k12", "win8"),
    ("2008 r2", "2k8r2", "win7"),
    ("2008", "2k8", "w2k8"),
    ("2003 r2", "2k3r2", "w2k3"),
    ("2003", "2k3", "w2k3"),
    ("2000", "2k", "w2k"),
    ("windows 11", "11", "win11"),
    ("windows 10", "10", "win10"),
    ("windows 8.1", "8.1", "win8"),
    ("windows 8", "8", "win8"),
    ("windows 7", "7", "win7"),
    ("xp", "xp", "wxp"),
];

/// Whether a processor's family is one that the targets here are made for (or not known).
pub(super) fn is_x86(architecture: &str) -> bool {
    matches!(architecture, "" | "x86_64" | "amd64" | "i386" | "i486" | "i586" | "i686" | "x86")
}

impl OsFacts {
    /// Whether it is Windows.
    pub fn is_windows(&self) -> bool {
        self.kind == Some(SystemKind::Windows)
    }

    fn windows(&self) -> Option<&'static (&'static str, &'static str, &'static str)> {
        let product = self.product.to_lowercase();
        WINDOWS.iter().find(|(word, ..)| self.is_windows() && product.contains(word))
    }

    fn major(&self) -> &str {
        self.version.split('.').next().unwrap_or_default()
    }

    /// The id by which libosinfo's database knows it, if that is certain enough to say: tools choose devices by it.
    pub fn osinfo_id(&self) -> Option<String> {
        if let Some((_, short, _)) = self.windows() {
            return Some(format!("http://microsoft.com/win/{short}"));
        }
        let (version, major) = (self.version.as_str(), self.major());
        let numbered =
            |vendor: &str, version: &str| (!version.is_empty()).then(|| format!("http://{vendor}/{version}"));
        match self.distribution.as_str() {
            "debian" => numbered("debian.org/debian", major),
            "ubuntu" => numbered("ubuntu.com/ubuntu", version),
            "fedora" => numbered("fedoraproject.org/fedora", major),
            "rhel" => numbered("redhat.com/rhel", version),
            "ol" => numbered("oracle.com/ol", version),
            "rocky" => numbered("rockylinux.org/rocky", major),
            "almalinux" => numbered("almalinux.org/almalinux", major),
            "centos" if self.product.contains("Stream") => numbered("centos.org/centos-stream", major),
            "centos" if major == "8" => numbered("centos.org/centos", "8"),
            "centos" if version.contains('.') => numbered("centos.org/centos", version),
            "centos" => numbered("centos.org/centos", major).map(|id| format!("{id}.0")),
            "sles" | "sled" if matches!(major, "10" | "11") => numbered("suse.com/sles", version),
            "sles" | "sled" => numbered("suse.com/sle", version),
            "opensuse-leap" | "opensuse" => numbered("opensuse.org/opensuse", version),
            "opensuse-tumbleweed" => Some("http://opensuse.org/opensuse/tumbleweed".to_owned()),
            "arch" => Some("http://archlinux.org/archlinux/rolling".to_owned()),
            "gentoo" => Some("http://gentoo.org/gentoo/rolling".to_owned()),
            "alpine" => {
                let end = version.match_indices('.').nth(1).map_or(version.len(), |(at, _)| at);
                numbered("alpinelinux.org/alpinelinux", &version[..end])
            }
            _ => None,
        }
    }

    /// Proxmox' word (`qm.conf`, `ostype`).
    pub fn proxmox(&self) -> &'static str {
        match self.kind {
            Some(SystemKind::Windows) => self.windows().map_or("win10", |(.., word)| word),
            Some(SystemKind::Linux) => "l26",
            _ => "other",
        }
    }

    /// Number and description in CIM's list (`CIM_OperatingSystem.OsType`), VMware's word, VirtualBox' word.
    pub fn ovf(&self) -> (u32, &'static str, &'static str, &'static str) {
        let is_32 = matches!(self.architecture.as_str(), "i386" | "i486" | "i586" | "i686" | "x86");
        match (self.kind, self.distribution.as_str(), is_32) {
            (Some(SystemKind::Windows), ..) => self.windows_in_ovf(),
            (Some(SystemKind::Linux), "debian", true) => (95, "Debian", "debian10Guest", "Debian"),
            (Some(SystemKind::Linux), "debian", false) => {
                (96, "Debian 64-Bit", "debian10_64Guest", "Debian_64")
            }
            (Some(SystemKind::Linux), "ubuntu", true) => (93, "Ubuntu", "ubuntuGuest", "Ubuntu"),
            (Some(SystemKind::Linux), "ubuntu", false) => (94, "Ubuntu 64-Bit", "ubuntu64Guest", "Ubuntu_64"),
            (Some(SystemKind::Linux), "rhel", _) => {
                (80, "Red Hat Enterprise Linux 64-Bit", "rhel7_64Guest", "RedHat_64")
            }
            (Some(SystemKind::Linux), "centos" | "rocky" | "almalinux", _) => {
                (107, "CentOS 64-Bit", "centos7_64Guest", "RedHat_64")
            }
            (Some(SystemKind::Linux), "sles" | "sled", _) => {
                (85, "SLES 64-Bit", "sles12_64Guest", "OpenSUSE_64")
            }
            (Some(SystemKind::Linux), _, true) => (36, "LINUX", "otherLinuxGuest", "Linux"),
            (Some(SystemKind::Linux), _, false) => (101, "Linux 64-Bit", "otherLinux64Guest", "Linux_64"),
            (_, _, true) => (1, "Other", "otherGuest", "Other"),
            (_, _, false) => (102, "Other 64-Bit", "otherGuest64", "Other_64"),
        }
    }

    fn windows_in_ovf(&self) -> (u32, &'static str, &'static str, &'static str) {
        match self.windows().map_or("", |(_, short, _)| short) {
            "2k22" | "2k25" => (123, "Windows Server 2022", "windows2019srvNext_64Guest", "Windows2022_64"),
            "2k19" => (121, "Windows Server 2019", "windows2019srv_64Guest", "Windows2019_64"),
            "2k16" => (116, "Windows Server 2016", "windows9Server64Guest", "Windows2016_64"),
            "2k12" | "2k12r2" => (112, "Windows Server 2012", "windows8Server64Guest", "Windows2012_64"),
            "7" | "2k8r2" => (105, "Windows 7", "windows7_64Guest", "Windows7_64"),
            _ => (120, "Windows 10 64-Bit", "windows9_64Guest", "Windows10_64"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(distribution: &str, version: &str) -> OsFacts {
        OsFacts {
            kind: Some(SystemKind::Linux),
            distribution: distribution.to_owned(),
            version: version.to_owned(),
            ..OsFacts::default()
        }
    }

    fn windows(product: &str) -> OsFacts {
        let kind = Some(SystemKind::Windows);
        OsFacts {
            kind,
            distribution: "windows".to_owned(),
            product: product.to_owned(),
            ..OsFacts::default()
        }
    }

    /// As libosinfo's database (osinfo-db 0.20221130) has them.
    #[test]
    fn ids_are_those_of_libosinfo() {
        for (distribution, version, id) in [
            ("debian", "12", "http://debian.org/debian/12"),
            ("ubuntu", "22.04", "http://ubuntu.com/ubuntu/22.04"),
            ("rhel", "9.1", "http://redhat.com/rhel/9.1"),
            ("rocky", "9.3", "http://rockylinux.org/rocky/9"),
            ("almalinux", "8.7", "http://almalinux.org/almalinux/8"),
            ("centos", "7", "http://centos.org/centos/7.0"),
            ("centos", "8", "http://centos.org/centos/8"),
            ("centos", "6.10", "http://centos.org/centos/6.10"),
            ("sles", "15.4", "http://suse.com/sle/15.4"),
            ("sles", "11.4", "http://suse.com/sles/11.4"),
            ("opensuse-leap", "15.4", "http://opensuse.org/opensuse/15.4"),
            ("opensuse-tumbleweed", "20231010", "http://opensuse.org/opensuse/tumbleweed"),
            ("alpine", "3.17.1", "http://alpinelinux.org/alpinelinux/3.17"),
            ("arch", "", "http://archlinux.org/archlinux/rolling"),
        ] {
            assert_eq!(linux(distribution, version).osinfo_id().as_deref(), Some(id));
        }
        let stream = OsFacts { product: "CentOS Stream 9".to_owned(), ..linux("centos", "9") };
        assert_eq!(stream.osinfo_id().as_deref(), Some("http://centos.org/centos-stream/9"));
        assert_eq!(linux("slackware", "15").osinfo_id(), None);
        assert_eq!(linux("debian", "").osinfo_id(), None, "testing has no number");
    }

    #[test]
    fn windows_is_known_by_its_products_name() {
        for (product, short, proxmox) in [
            ("Windows Server 2012 R2 Standard", "2k12r2", "win8"),
            ("Windows Server 2012 Standard", "2k12", "win8"),
            ("Windows 10 Pro", "10", "win10"),
            ("Windows 8.1", "8.1", "win8"),
            ("Windows Server 2019 Datacenter", "2k19", "win10"),
        ] {
            let facts = windows(product);
            assert_eq!(facts.osinfo_id(), Some(format!("http://microsoft.com/win/{short}")));
            assert_eq!(facts.proxmox(), proxmox);
        }
        assert_eq!(windows("Windows").osinfo_id(), None);
    }
}

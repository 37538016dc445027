//! Disk specifications: xl-disk-configuration(5).
//!
//! Positional (`TARGET, FORMAT, VDEV, ACCESS`), by name (`target=..` last, because it takes everything), with the prefixes of
//! older times (`phy:`, `file:`, `tap:aio:`) and their suffix `:cdrom`.

use block::{Error, Result};

use crate::guest::{Bus, Disk, Guest, Removable, RemovableKind};
use crate::source::place::Place;
use crate::source::{image, names};

/// Words that can stand where the format stands.
const FORMATS: &[&str] = &["raw", "qcow", "qcow2", "qed", "vhd", "vhdx", "vmdk", "aio"];

/// What a specification says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Spec {
    target: String,
    format: Option<String>,
    vdev: Option<String>,
    access: Option<String>,
    cdrom: bool,
    script: Option<String>,
}

/// Reads a specification into the guest. `hvm`: its devices are emulated as well.
///
/// # Errors
/// `Invalid`: it makes no sense; `Denied`.
pub(super) fn read(text: &str, hvm: bool, place: &Place<'_>, guest: &mut Guest) -> Result<()> {
    let spec = Spec::parse(text)?;
    let vdev = spec.vdev.clone().unwrap_or_default();
    let bus = bus(&vdev);
    if spec.cdrom {
        let medium = Some(spec.target.as_str()).filter(|target| !target.is_empty());
        let medium = medium.and_then(|target| place.side_file(target, "CD image", &mut guest.notes));
        guest.removables.push(Removable { kind: RemovableKind::Cdrom, bus, medium });
        return Ok(());
    }
    if spec.target.is_empty() {
        return Err(Error::invalid(format!("the disk '{text}' has no target")));
    }
    if let Some(script) = &spec.script {
        guest.notes.push(format!(
            "The disk '{}' is brought up by the script '{script}' of its host: '{}' may be no file.",
            vdev, spec.target
        ));
    }
    let format = match spec.format.as_deref() {
        None | Some("raw" | "aio") => "raw",
        Some("vhd") => "vpc",
        Some(other) => other,
    };
    let name = place.file(&spec.target, &mut guest.notes)?;
    guest.disks.push(Disk {
        bus,
        guest_name: guest_name(&vdev, hvm),
        read_only: spec.access.as_deref().is_some_and(|access| matches!(access, "r" | "ro")),
        ..Disk::new(if vdev.is_empty() { spec.target.clone() } else { vdev }, image(name, Some(format)))
    });
    Ok(())
}

impl Spec {
    fn parse(text: &str) -> Result<Self> {
        let mut spec = Self::default();
        let (mut positional, mut rest) = (0, text.trim());
        while !rest.is_empty() {
            if let Some(target) = rest.strip_prefix("target=") {
                spec.set_target(target);
                break;
            }
            let (part, behind) = rest.split_once(',').unwrap_or((rest, ""));
            rest = behind.trim_start();
            spec.part(part.trim(), &mut positional).ok_or_else(|| {
                Error::invalid(format!("the disk '{text}' is not understood at '{}'", part.trim()))
            })?;
        }
        Ok(spec)
    }

    /// One part between commas.
    fn part(&mut self, part: &str, positional: &mut usize) -> Option<()> {
        match part.split_once('=').map(|(key, value)| (key.trim(), value.trim())) {
            Some(("format", value)) => self.format = Some(value.to_ascii_lowercase()),
            Some(("vdev", value)) => self.set_vdev(value),
            Some(("access", value)) => self.access = Some(value.to_ascii_lowercase()),
            Some(("devtype", value)) => self.cdrom |= value == "cdrom",
            Some(("script", value)) => self.script = Some(value.to_owned()),
            Some(("backend" | "backendtype" | "discard" | "colo-host" | "colo-port" | "colo-export", _)) => {}
            Some((
                "specification" | "transport" | "trusted" | "grant_usage" | "active-disk" | "hidden-disk",
                _,
            )) => {}
            _ => return self.word(part, positional),
        }
        Some(())
    }

    /// A word without a name: by its place, or one of those that stand anywhere.
    fn word(&mut self, part: &str, positional: &mut usize) -> Option<()> {
        match part {
            "cdrom" => self.cdrom = true,
            "r" | "ro" | "w" | "rw" | "w!" if *positional > 0 => self.access = Some(part.to_owned()),
            "direct-io-safe" | "discard" | "no-discard" | "colo" | "no-colo" => {}
            _ => {
                *positional += 1;
                match positional {
                    1 => self.set_target(part),
                    // The format can be left out where a prefix has said it.
                    2 if part.is_empty() || FORMATS.contains(&part.to_ascii_lowercase().as_str()) => {
                        self.format = Some(part.to_ascii_lowercase())
                            .filter(|part| !part.is_empty())
                            .or(self.format.take());
                    }
                    2 | 3 if self.vdev.is_none() => {
                        *positional = 3;
                        self.set_vdev(part);
                    }
                    _ if part.is_empty() => {}
                    _ => return None,
                }
            }
        }
        Some(())
    }

    /// A target with the prefixes of older times.
    fn set_target(&mut self, target: &str) {
        let mut target = target.trim();
        while let Some((prefix, rest)) = target.split_once(':') {
            match prefix {
                "phy" | "file" | "raw" | "aio" => self.format = Some("raw".to_owned()),
                "qcow" | "qcow2" | "vhd" | "qed" => self.format = Some(prefix.to_owned()),
                "tap" | "tap2" | "tapdisk" | "ioemu" => {}
                _ => break,
            }
            target = rest;
        }
        self.target = target.to_owned();
    }

    /// `hdc:cdrom`, `ioemu:hda`, `/dev/xvda`.
    fn set_vdev(&mut self, vdev: &str) {
        let vdev = vdev.strip_prefix("ioemu:").unwrap_or(vdev);
        let (vdev, suffix) = vdev.split_once(':').unwrap_or((vdev, ""));
        self.cdrom |= suffix == "cdrom";
        let vdev = vdev.strip_prefix("/dev/").unwrap_or(vdev);
        self.vdev = Some(vdev.to_owned()).filter(|vdev| !vdev.is_empty());
    }
}

fn bus(vdev: &str) -> Option<Bus> {
    Some(match vdev {
        _ if vdev.starts_with("xvd") || number(vdev).is_some() => Bus::Xen,
        _ if vdev.starts_with("hd") => Bus::Ide,
        _ if vdev.starts_with("sd") => Bus::Scsi,
        _ => return None,
    })
}

/// `d0p1`: disk 0, partition 1.
fn number(vdev: &str) -> Option<usize> {
    let rest = vdev.strip_prefix('d')?;
    rest.split_once('p').map_or(rest, |(disk, _)| disk).parse().ok()
}

/// What the guest calls it: with Xen's drivers an emulated disk becomes `xvdX`, too; without emulation `sdX` and `hdX` are
/// the guest's names as they are.
fn guest_name(vdev: &str, hvm: bool) -> Option<String> {
    if let Some(disk) = number(vdev) {
        return Some(format!("xvd{}", names::letters(disk.min(10_000))));
    }
    match vdev.strip_prefix("hd").or_else(|| vdev.strip_prefix("sd")) {
        Some(letter) if hvm => Some(format!("xvd{letter}")),
        _ => Some(vdev.to_owned()).filter(|vdev| !vdev.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(target: &str, format: Option<&str>, vdev: &str, access: Option<&str>, cdrom: bool) -> Spec {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Spec {
            target: target.into(),
            format: owned(format),
            vdev: Some(vdev.into()),
            access: owned(access),
            cdrom,
            script: None,
        }
    }

    #[test]
    fn specifications_of_all_times() {
        for (text, wanted) in [
            ("/dev/vg/a,raw,xvda,rw", spec("/dev/vg/a", Some("raw"), "xvda", Some("rw"), false)),
            ("/dev/vg/a, , hda, w", spec("/dev/vg/a", None, "hda", Some("w"), false)),
            (
                "format=qcow2, vdev=xvdb, access=r, target=/a,b=c",
                spec("/a,b=c", Some("qcow2"), "xvdb", Some("r"), false),
            ),
            ("/x.qcow2,qcow2,hda", spec("/x.qcow2", Some("qcow2"), "hda", None, false)),
            ("phy:/dev/vg/a,xvda,w", spec("/dev/vg/a", Some("raw"), "xvda", Some("w"), false)),
            ("file:/a.img,ioemu:hda,w", spec("/a.img", Some("raw"), "hda", Some("w"), false)),
            ("tap:aio:/a.img,sda1,w", spec("/a.img", Some("raw"), "sda1", Some("w"), false)),
            ("tap:qcow2:/a.img,/dev/xvda,w", spec("/a.img", Some("qcow2"), "xvda", Some("w"), false)),
            ("file:/a.iso,hdc:cdrom,r", spec("/a.iso", Some("raw"), "hdc", Some("r"), true)),
            ("/a.iso,raw,hdc,ro,cdrom", spec("/a.iso", Some("raw"), "hdc", Some("ro"), true)),
            (",,hdc:cdrom,r", spec("", None, "hdc", Some("r"), true)),
            ("vdev=hdc,devtype=cdrom,access=r,target=", spec("", None, "hdc", Some("r"), true)),
        ] {
            assert_eq!(Spec::parse(text).unwrap(), wanted, "{text}");
        }
        Spec::parse("/a,raw,xvda,rw,what").unwrap_err();
        Spec::parse("/a,colour=red,xvda").unwrap_err();
    }

    #[test]
    fn names_in_the_guest() {
        assert_eq!(guest_name("hda", true).as_deref(), Some("xvda"));
        assert_eq!(guest_name("sda1", false).as_deref(), Some("sda1"));
        assert_eq!(guest_name("d2p0", false).as_deref(), Some("xvdc"));
        assert_eq!(guest_name("", true), None);
    }
}

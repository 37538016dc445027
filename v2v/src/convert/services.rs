//! Services, consoles and drivers that belong to the machine that the guest leaves.

use std::path::{Path, PathBuf};

use guestdisk::fs::FileKind;

use super::draft::{Draft, Why};
use super::text::{append_lines, each_line};
use crate::inspect::{Init, System};

const RC_FOLDERS: [&str; 2] = ["/etc", "/etc/rc.d"];

/// The terminals of Xen's consoles, which become the first serial port.
const XEN_TERMINALS: [&str; 2] = ["hvc0", "xvc0"];
const SERIAL: &str = "ttyS0";

/// Masks the tools of other hypervisors.
pub(crate) fn tools(draft: &mut Draft<'_>, system: &System) {
    for tools in &system.tools {
        for service in &tools.services {
            let Some(name) = service.file_name().and_then(|name| name.to_str()) else { continue };
            let why =
                |undo: String| Why::new("tools", format!("{} has nothing to do on KVM", tools.name), undo);
            let is_unit =
                [".service", ".timer", ".path", ".mount", ".socket"].iter().any(|end| name.ends_with(end));
            if is_unit || system.init == Init::Systemd {
                let script = script_name(name);
                let unit = if is_unit { name.to_owned() } else { format!("{script}.service") };
                let path = Path::new("/etc/systemd/system").join(&unit);
                draft.link(path, "/dev/null", why(format!("systemctl unmask {unit}")));
            } else {
                unlink(draft, script_name(name), &why);
            }
        }
    }
}

/// `S20open-vm-tools` is `open-vm-tools`.
fn script_name(name: &str) -> &str {
    let rest = name.strip_prefix('S').unwrap_or(name);
    let number = rest.bytes().take_while(u8::is_ascii_digit).count();
    if rest.len() < name.len() && number == 2 { &rest[number..] } else { name }
}

/// Takes away the links by which an init script is started.
fn unlink(draft: &mut Draft<'_>, script: &str, why: &dyn Fn(String) -> Why) {
    for folder in RC_FOLDERS {
        for level in ["2", "3", "4", "5", "S"] {
            let folder = PathBuf::from(folder).join(format!("rc{level}.d"));
            for (name, _) in draft.tree().list(&folder) {
                if name.starts_with('S') && script_name(&name) == script {
                    draft.remove(
                        folder.join(&name),
                        why(format!("update-rc.d {script} enable, or chkconfig {script} on")),
                    );
                }
            }
        }
    }
    for (level, kind) in draft.tree().list(Path::new("/etc/runlevels")) {
        if kind == FileKind::Directory {
            let path = Path::new("/etc/runlevels").join(&level).join(script);
            draft.remove(path, why(format!("rc-update add {script} {level}")));
        }
    }
}

/// Logins on Xen's console move to the serial port.
pub(crate) fn xen_console(draft: &mut Draft<'_>, system: &System) {
    let why = |undo: &str| {
        Why::new("console", "Xen's console does not exist on KVM, the serial port takes its place", undo)
    };
    let wants = Path::new("/etc/systemd/system/getty.target.wants");
    let mut had_getty = false;
    for (name, _) in draft.tree().list(wants) {
        if XEN_TERMINALS.iter().any(|terminal| name.contains(&format!("getty@{terminal}."))) {
            had_getty = true;
            draft.remove(wants.join(&name), why(&format!("systemctl enable {name}")));
        }
    }
    if had_getty {
        serial_getty(draft, why("systemctl disable serial-getty@ttyS0.service"));
    }
    draft.edit("/etc/inittab", why("put the old line of the diff back"), inittab);
    let upstart = draft.tree().list(Path::new("/etc/init"));
    for (name, _) in upstart.iter().filter(|(name, _)| XEN_TERMINALS.iter().any(|t| name.starts_with(t))) {
        draft.edit(Path::new("/etc/init").join(name), why("put the old lines of the diff back"), to_serial);
    }
    if system.init != Init::Unknown {
        draft.edit("/etc/securetty", why("remove ttyS0 from the file"), securetty);
    }
}

fn serial_getty(draft: &mut Draft<'_>, why: Why) {
    let units =
        ["/usr/lib/systemd/system/serial-getty@.service", "/lib/systemd/system/serial-getty@.service"];
    if let Some(unit) = units.iter().find(|unit| draft.exists(unit)) {
        draft.link("/etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service", unit, why);
    }
}

/// A login on the serial port where nothing starts one by itself.
pub(crate) fn serial_login(draft: &mut Draft<'_>, system: &System) {
    let why =
        Why::new("console", "a login on the serial port was asked for", "remove the line from /etc/inittab");
    if system.init == Init::Systemd {
        // systemd-getty-generator follows the kernel's console=.
        return;
    }
    let getty = ["/sbin/agetty", "/sbin/getty"].into_iter().find(|path| draft.exists(path));
    draft.edit("/etc/inittab", why.clone(), |text| {
        let has = text.lines().any(|line| !line.starts_with('#') && line.contains(SERIAL));
        let line = match getty {
            _ if has => return text.to_owned(),
            Some(path) if path.ends_with("agetty") => format!("S0:2345:respawn:{path} -L 115200 ttyS0 vt100"),
            _ => "S0:2345:respawn:/sbin/getty -L ttyS0 115200 vt100".to_owned(),
        };
        append_lines(text, &[line])
    });
    draft.edit("/etc/securetty", why, securetty);
}

fn to_serial(text: &str) -> String {
    XEN_TERMINALS.iter().fold(text.to_owned(), |text, terminal| text.replace(terminal, SERIAL))
}

/// A line for Xen's console becomes one for the serial port, or a comment if there is one already.
fn inittab(text: &str) -> String {
    let is_for = |line: &str, terminal: &str| !line.trim_start().starts_with('#') && line.contains(terminal);
    let mut has_serial = text.lines().any(|line| is_for(line, SERIAL));
    each_line(text, |_, line| {
        if !XEN_TERMINALS.iter().any(|terminal| is_for(line, terminal)) {
            return None;
        }
        if has_serial {
            return Some(format!("#{line}"));
        }
        has_serial = true;
        Some(to_serial(line))
    })
}

fn securetty(text: &str) -> String {
    if text.lines().any(|line| line.trim() == SERIAL) || text.trim().is_empty() {
        return text.to_owned();
    }
    append_lines(text, &[SERIAL.to_owned()])
}

/// Graphics drivers of other hypervisors in Xorg's configuration.
pub(crate) fn xorg(draft: &mut Draft<'_>) {
    let mut files: Vec<PathBuf> =
        ["/etc/X11/xorg.conf", "/etc/X11/XF86Config", "/etc/X11/XF86Config-4"].map(PathBuf::from).into();
    for folder in ["/etc/X11/xorg.conf.d", "/usr/share/X11/xorg.conf.d"] {
        let names = draft.tree().list(Path::new(folder));
        files.extend(names.into_iter().map(|(name, _)| Path::new(folder).join(name)));
    }
    let why = Why::new(
        "xorg",
        "the graphics card of the other hypervisor is not there",
        "put the old driver's name back",
    );
    for file in files {
        draft.edit(file, why.clone(), xorg_drivers);
    }
}

fn xorg_drivers(text: &str) -> String {
    const FOREIGN: [&str; 4] = ["vmware", "vboxvideo", "cirrus", "vmwgfx"];
    each_line(text, |_, line| {
        let body = line.trim_start();
        let is_driver =
            body.len() > 6 && body.is_char_boundary(6) && body[..6].eq_ignore_ascii_case("driver");
        if !is_driver || !body[6..].starts_with([' ', '\t']) {
            return None;
        }
        let quoted = line.split('"').nth(1)?;
        let is_foreign = FOREIGN.iter().any(|driver| quoted.eq_ignore_ascii_case(driver));
        is_foreign.then(|| line.replacen(&format!("\"{quoted}\""), "\"modesetting\"", 1))
    })
}

/// What keeps the drivers of KVM from being loaded, and aliases for the drivers of the old devices.
pub(crate) fn modprobe(draft: &mut Draft<'_>, block_driver: &str) {
    let mut files = vec![PathBuf::from("/etc/modprobe.conf")];
    let folder = Path::new("/etc/modprobe.d");
    files.extend(draft.tree().list(folder).into_iter().map(|(name, _)| folder.join(name)));
    let why = Why::new(
        "virtio-initramfs",
        "the drivers of KVM's devices may be loaded",
        "put the old lines of the diff back",
    );
    for file in files {
        draft.edit(file, why.clone(), |text| modprobe_text(text, block_driver));
    }
}

fn modprobe_text(text: &str, block_driver: &str) -> String {
    const CARDS: [&str; 8] =
        ["vmxnet", "vmxnet2", "vmxnet3", "pcnet32", "e1000", "e1000e", "xennet", "xen-netfront"];
    each_line(text, |_, line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["blacklist", module] if module.starts_with("virtio") => Some(format!("# {line}")),
            ["install", module, command, ..]
                if module.starts_with("virtio")
                    && (command.ends_with("/true") || command.ends_with("/false")) =>
            {
                Some(format!("# {line}"))
            }
            ["alias", name, module] if name.starts_with("eth") && CARDS.contains(&module) => {
                Some(line.replacen(module, "virtio_net", 1))
            }
            ["alias", name, module] if name.starts_with("scsi_hostadapter") && is_old_adapter(module) => {
                Some(line.replacen(module, block_driver, 1))
            }
            _ => None,
        }
    })
}

fn is_old_adapter(module: &str) -> bool {
    [
        "mptspi",
        "mptbase",
        "mptscsih",
        "mptsas",
        "BusLogic",
        "vmw_pvscsi",
        "pvscsi",
        "xenblk",
        "xen-blkfront",
        "xen-vbd",
    ]
    .contains(&module)
}

/// LVM's list of the devices that it may use names those of the old machine.
pub(crate) fn lvm_devices(draft: &mut Draft<'_>) {
    let path = "/etc/lvm/devices/system.devices";
    let foreign = |text: String| {
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        lines.into_iter().any(|line| line.contains("IDTYPE="))
    };
    if draft.text(path).is_some_and(foreign) {
        let why = Why::new(
            "device-name",
            "LVM's devices file names the disks by identities that they do not have on KVM; without it LVM uses all disks",
            "vgimportdevices -a in the guest makes a new one",
        );
        draft.remove(path, why);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::system;
    use super::super::tree::memory::Memory;
    use super::*;
    use crate::inspect::Tools;
    use crate::plan::{Action, Plan};

    fn planned(tree: &Memory, convert: impl FnOnce(&mut Draft<'_>)) -> Plan {
        let mut draft = Draft::new(tree);
        convert(&mut draft);
        draft.finish().unwrap()
    }

    #[test]
    fn tools_are_masked_under_systemd() {
        let tree = Memory::default().folder("/etc/systemd/system");
        let mut system = system();
        let services = [
            "/etc/systemd/system/multi-user.target.wants/open-vm-tools.service",
            "/etc/rc2.d/S20vmware-tools",
        ];
        system.tools =
            vec![Tools { name: "open-vm-tools".to_owned(), services: services.map(PathBuf::from).into() }];
        let plan = planned(&tree, |draft| tools(draft, &system));
        let paths: Vec<_> = plan.changes.iter().map(|change| change.path.to_str().unwrap()).collect();
        assert_eq!(
            paths,
            ["/etc/systemd/system/open-vm-tools.service", "/etc/systemd/system/vmware-tools.service"]
        );
        assert_eq!(plan.changes[0].action, Action::Symlink { target: "/dev/null".into() });
        assert_eq!(plan.changes[0].undo, "systemctl unmask open-vm-tools.service");
    }

    #[test]
    fn tools_are_unlinked_elsewhere() {
        let tree = Memory::default()
            .link_to("/etc/rc.d/rc3.d/S03vmware-tools", "../init.d/vmware-tools")
            .link_to("/etc/rc.d/rc3.d/S10network", "../init.d/network")
            .link_to("/etc/runlevels/default/open-vm-tools", "/etc/init.d/open-vm-tools");
        let mut system = system();
        system.init = Init::SysV;
        let services = ["/etc/init.d/vmware-tools", "/etc/init.d/open-vm-tools"];
        system.tools =
            vec![Tools { name: "vmware-tools".to_owned(), services: services.map(PathBuf::from).into() }];
        let plan = planned(&tree, |draft| tools(draft, &system));
        assert_eq!(plan.changes.len(), 2);
        assert!(plan.changes.iter().all(|change| change.action == Action::Remove));
    }

    #[test]
    fn logins_move_from_xen_to_the_serial_port() {
        let tree = Memory::default()
            .link_to(
                "/etc/systemd/system/getty.target.wants/getty@tty1.service",
                "/lib/systemd/system/getty@.service",
            )
            .link_to(
                "/etc/systemd/system/getty.target.wants/serial-getty@hvc0.service",
                "/lib/systemd/system/serial-getty@.service",
            )
            .file("/lib/systemd/system/serial-getty@.service", "")
            .file("/etc/securetty", "tty1\nhvc0\n");
        let plan = planned(&tree, |draft| xen_console(draft, &system()));
        let done: Vec<_> = plan
            .changes
            .iter()
            .map(|change| (change.path.file_name().unwrap().to_str().unwrap(), &change.action))
            .collect();
        assert_eq!(done[0], ("serial-getty@hvc0.service", &Action::Remove));
        assert!(matches!(done[1], ("serial-getty@ttyS0.service", Action::Symlink { .. })));
        assert_eq!(done[2].1, &Action::Replace { bytes: b"tty1\nhvc0\nttyS0\n".to_vec() });
        assert_eq!(done.len(), 3);
    }

    #[test]
    fn inittab_of_xen() {
        let text = "id:3:initdefault:\n1:2345:respawn:/sbin/mingetty tty1\nco:2345:respawn:/sbin/agetty xvc0 9600 vt100-nav\n";
        assert_eq!(inittab(text), text.replace("xvc0", "ttyS0"));
        let both = "hvc0::respawn:/sbin/getty 38400 hvc0\nttyS0::respawn:/sbin/getty -L ttyS0 115200 vt100\n";
        assert_eq!(inittab(both), format!("#{both}"));
        assert_eq!(inittab(&inittab(both)), inittab(both));
    }

    #[test]
    fn a_login_where_init_starts_none() {
        let tree = Memory::default()
            .file("/etc/inittab", "1:2345:respawn:/sbin/getty 38400 tty1")
            .file("/sbin/getty", "");
        let mut system = system();
        system.init = Init::SysV;
        let plan = planned(&tree, |draft| serial_login(draft, &system));
        assert_eq!(plan.changes[0].diff, ["+S0:2345:respawn:/sbin/getty -L ttyS0 115200 vt100"]);
    }

    #[test]
    fn drivers_of_xorg() {
        let text = "Section \"Device\"\n\tIdentifier \"Card0\"\n\tDriver      \"vmware\"\n\tVendorName \"vmware\"\nEndSection\n";
        assert_eq!(xorg_drivers(text), text.replace("      \"vmware\"", "      \"modesetting\""));
        let own = "\tDriver \"modesetting\"\n\tDriver \"vmmouse\"\n";
        assert_eq!(xorg_drivers(own), own);
    }

    #[test]
    fn modprobe_of_old() {
        let text = "alias eth0 vmxnet\nalias scsi_hostadapter mptbase\nalias scsi_hostadapter1 ata_piix\nblacklist virtio_blk\nblacklist pcspkr\ninstall virtio_net /bin/true\n";
        let expected = "alias eth0 virtio_net\nalias scsi_hostadapter virtio_blk\nalias scsi_hostadapter1 ata_piix\n# blacklist virtio_blk\nblacklist pcspkr\n# install virtio_net /bin/true\n";
        assert_eq!(modprobe_text(text, "virtio_blk"), expected);
        assert_eq!(modprobe_text(expected, "virtio_blk"), expected);
    }

    #[test]
    fn the_devices_file_of_lvm_goes() {
        let tree = Memory::default().file("/etc/lvm/devices/system.devices", "# LVM uses devices listed in this file.\nVERSION=1.1.2\nIDTYPE=sys_wwid IDNAME=naa.6000c2 DEVNAME=/dev/sda3 PVID=abc PART=3\n");
        assert_eq!(planned(&tree, lvm_devices).changes[0].action, Action::Remove);
        let empty = Memory::default().file("/etc/lvm/devices/system.devices", "# empty\n");
        assert!(planned(&empty, lvm_devices).changes.is_empty());
    }
}

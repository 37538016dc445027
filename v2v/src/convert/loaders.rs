//! The configuration of boot loaders, edited where it stands. Nothing is ever generated anew: what a generator would find
//! out in a foreign environment is wrong for the guest.

use std::path::Path;

use guestdisk::boot::Loader;

use super::cmdline::{Cmdlines, assigned, edit_value};
use super::draft::{Draft, Why};
use super::names::Reader;
use super::text::{each_line, first_word};
use super::tree::Place;
use crate::inspect::{Obstacle, System};
use crate::plan::Stop;

const UNDO: &str = "put the lines of the diff that begin with '-' back";
const REASON: &str = "kernels are started with a root file system and consoles that exist on KVM";

fn why() -> Why {
    Why::new("device-name", REASON, UNDO)
}

/// Everything in this file's care.
pub(crate) fn convert(draft: &mut Draft<'_>, system: &System, lines: &Cmdlines<'_>) {
    let mut unknown = vec![];
    for config in &system.loaders {
        let place = Place { volume: config.file.volume, path: config.file.path.clone() };
        let guest_path = guest_path(system, &place);
        draft.edit_at(&place, &guest_path, why(), |text| one(config.loader, text, lines, &mut unknown));
        if config.loader == Loader::Grub {
            environment(draft, &place, &guest_path, lines);
        }
    }
    unified(draft, system, lines);
    let next = Why::new("device-name", "the next configuration of the boot loader will be right too", UNDO);
    for path in [
        "/etc/default/grub",
        "/etc/sysconfig/bootloader",
        "/etc/default/kexec",
        "/etc/update-extlinux.conf",
        "/etc/default/extlinux",
        "/etc/default/u-boot",
    ] {
        draft.edit(path, next.clone(), |text| defaults(text, lines, &mut unknown));
    }
    for path in ["/etc/kernel/cmdline", "/etc/cmdline", "/etc/kernel/entry-token.cmdline"] {
        draft.edit(path, next.clone(), |text| {
            each_line(text, |_, line| Some(lines.edit(line, Reader::Tags, &mut unknown)))
        });
    }
    // Entries of one's own, which the next configuration takes in.
    let folder = Path::new("/etc/grub.d");
    let quiet = Cmdlines { add_serial: false, ..*lines };
    for (name, _) in draft.tree().list(folder).into_iter().filter(|(name, _)| name.contains("custom")) {
        draft.edit(folder.join(name), next.clone(), |text| grub(text, &quiet, &mut unknown));
    }
    // grubby and the early versions of blscfg keep the words for new kernels here.
    for path in ["/etc/default/grub.d", "/etc/kernel/cmdline.d"] {
        for (name, _) in draft.tree().list(Path::new(path)) {
            let file = Path::new(path).join(&name);
            draft.edit(&file, next.clone(), |text| defaults(text, lines, &mut unknown));
        }
    }
    unknown.sort();
    unknown.dedup();
    for name in unknown {
        // Inspection has told of a root that is not there.
        let told = |obstacle: &Obstacle| {
            obstacle.code == "root-missing" && obstacle.message.contains(&format!("'{name}'"))
        };
        if system.obstacles.iter().any(told) {
            continue;
        }
        draft.ask(format!(
            "{name}, which a boot loader's configuration names, is on none of the given disks."
        ));
    }
    if draft.exists("/etc/lilo.conf")
        && !system.loaders.iter().any(|config| config.loader == Loader::GrubLegacy)
    {
        lilo(draft, system, lines);
    }
}

fn lilo(draft: &mut Draft<'_>, system: &System, lines: &Cmdlines<'_>) {
    let stop = Stop {
        message: "LILO keeps the root device in its map file, which only lilo itself writes".to_owned(),
        hint: "run lilo in the guest, or keep the disk's name with --bus sata".to_owned(),
    };
    // Where nothing else offers a kernel, it is what starts the guest.
    match system.entries.is_empty() && lines.names.prefix() != "sd" {
        true => draft.stop(stop.message, stop.hint),
        false => draft.ask(stop.sentence()),
    }
}

/// Command lines in unified kernel images, which are part of what is signed: names in them are told.
fn unified(draft: &mut Draft<'_>, system: &System, lines: &Cmdlines<'_>) {
    for entry in system.entries.iter().filter(|entry| entry.loader == Loader::UnifiedKernel) {
        let new = lines.devices(&entry.cmdline, Reader::Tags, &mut vec![]);
        let words = entry.cmdline.split_whitespace().zip(new.split_whitespace());
        for (old, new) in words.filter(|(old, new)| old != new) {
            draft.ask(format!(
                "The unified image {} has {old} on its command line, which does not exist on KVM, and nothing can be changed in it from outside: make it anew in the guest with {new}.",
                entry.kernel.path.display()
            ));
        }
    }
}

/// How a guest sees a file of one of its volumes, by what fstab mounts.
pub(crate) fn guest_path(system: &System, place: &Place) -> std::path::PathBuf {
    let mut of_volume: Vec<_> =
        system.mounts.iter().filter(|mount| mount.volume == Some(place.volume)).collect();
    of_volume.sort_by_key(|mount| mount.path.as_os_str().len());
    let relative = place.path.strip_prefix("/").unwrap_or(&place.path);
    match of_volume.iter().find(|mount| mount.path.is_absolute()) {
        Some(mount) if place.volume != system.root => mount.path.join(relative),
        _ => match relative.strip_prefix(system.subvolume.strip_prefix("/").unwrap_or(&system.subvolume)) {
            Ok(rest) if place.volume == system.root => Path::new("/").join(rest),
            _ => place.path.clone(),
        },
    }
}

/// The file of one boot loader.
pub(crate) fn one(loader: Loader, text: &str, lines: &Cmdlines<'_>, unknown: &mut Vec<String>) -> String {
    match loader {
        Loader::Grub => grub(text, lines, unknown),
        Loader::GrubLegacy => legacy(text, lines, unknown),
        Loader::BootLoaderSpec => entry(text, lines, unknown),
        Loader::Syslinux => syslinux(text, lines, unknown),
        Loader::UnifiedKernel => text.to_owned(),
    }
}

/// Says of every line whether the kernel that it starts gets an initramfs: one is named before the next kernel is.
fn readers(text: &str, is_kernel: fn(&str) -> bool, is_initrd: fn(&str) -> bool) -> Vec<Reader> {
    let mut out = vec![Reader::Tags; text.split_inclusive('\n').count()];
    let mut kernel: Option<usize> = None;
    for (index, line) in text.lines().enumerate() {
        let word = first_word(line).0.to_ascii_lowercase();
        if is_kernel(&word) {
            out[index] = Reader::Kernel;
            kernel = Some(index);
        } else if is_initrd(&word)
            && let Some(kernel) = kernel
        {
            out[kernel] = Reader::Tags;
        }
    }
    out
}

fn is_grub_kernel(word: &str) -> bool {
    matches!(word, "linux" | "linux16" | "linuxefi")
}

/// grub.cfg.
fn grub(text: &str, lines: &Cmdlines<'_>, unknown: &mut Vec<String>) -> String {
    let readers = readers(text, is_grub_kernel, |word| word.starts_with("initrd"));
    each_line(text, |index, line| {
        let (word, _) = first_word(line);
        if is_grub_kernel(word) {
            return Some(lines.edit(line, readers[index], unknown));
        }
        // The kernel of a hypervisor loads Linux as a module.
        if matches!(word, "module" | "module2") {
            return Some(lines.edit(line, Reader::Tags, unknown));
        }
        let name = assigned(line)?;
        let is_cmdline = name.to_ascii_lowercase().contains("kernelopts") || name.ends_with("cmdline");
        let is_root = name.starts_with("linux_root_device");
        match (is_cmdline, is_root) {
            (true, _) => edit_value(line, |value| lines.edit(value, Reader::Tags, unknown)),
            (_, true) => edit_value(line, |value| lines.devices(value, Reader::Tags, unknown)),
            _ => None,
        }
    })
}

/// menu.lst and grub.conf, with the lines by which Debian's update-grub writes the next one.
fn legacy(text: &str, lines: &Cmdlines<'_>, unknown: &mut Vec<String>) -> String {
    let readers = readers(text, |word| word == "kernel", |word| matches!(word, "initrd" | "module"));
    each_line(text, |index, line| {
        let (word, _) = first_word(line);
        if word == "kernel" {
            return Some(lines.edit(line, readers[index], unknown));
        }
        if word == "module" {
            return Some(lines.edit(line, Reader::Tags, unknown));
        }
        let magic = line.strip_prefix("# ")?;
        let is_magic = ["kopt", "xenkopt", "defoptions", "altoptions", "lockalternative", "xenhopt"]
            .iter()
            .any(|name| magic.starts_with(name) && magic.contains('='));
        is_magic.then(|| lines.edit_part(line, Reader::Tags, unknown))
    })
}

/// A file of the Boot Loader Specification.
fn entry(text: &str, lines: &Cmdlines<'_>, unknown: &mut Vec<String>) -> String {
    let has_initrd = text.lines().any(|line| first_word(line).0 == "initrd");
    let reader = if has_initrd { Reader::Tags } else { Reader::Kernel };
    each_line(text, |_, line| (first_word(line).0 == "options").then(|| lines.edit(line, reader, unknown)))
}

/// syslinux.cfg and extlinux.conf: a label's lines belong together, in any order.
fn syslinux(text: &str, lines: &Cmdlines<'_>, unknown: &mut Vec<String>) -> String {
    let mut blocks = vec![];
    let mut block = 0;
    let mut with_initrd = vec![false];
    for line in text.split_inclusive('\n') {
        let word = first_word(line).0.to_ascii_lowercase();
        if word == "label" {
            block += 1;
            with_initrd.push(false);
        }
        with_initrd[block] |= word == "initrd" || line.to_ascii_lowercase().contains("initrd=");
        blocks.push(block);
    }
    // What stands in front of all labels is for all of them.
    let any = with_initrd.iter().any(|has| *has);
    with_initrd[0] = any;
    each_line(text, |index, line| {
        let word = first_word(line).0.to_ascii_lowercase();
        let reader = if with_initrd[blocks[index]] { Reader::Tags } else { Reader::Kernel };
        matches!(word.as_str(), "append" | "linux" | "kernel").then(|| lines.edit(line, reader, unknown))
    })
}

/// Files of assignments as shells read them, of which some hold command lines.
fn defaults(text: &str, lines: &Cmdlines<'_>, unknown: &mut Vec<String>) -> String {
    const CMDLINES: [&str; 8] = [
        "GRUB_CMDLINE_LINUX",
        "EXTLINUX_",
        "U_BOOT_",
        "DEFAULT_APPEND",
        "XEN_KERNEL_APPEND",
        "FAILSAFE_APPEND",
        "APPEND",
        "default_kernel_opts",
    ];
    const DEVICES: [&str; 5] =
        ["GRUB_DEVICE", "GRUB_DEVICE_BOOT", "root", "LOADER_LOCATION_DEV", "GRUB_OS_PROBER_SKIP"];
    each_line(text, |_, line| {
        let name = assigned(line)?;
        // What a generator adds to the root it finds itself needs no console of ours twice.
        if CMDLINES.iter().any(|known| name.starts_with(known)) {
            let serial = name == "GRUB_CMDLINE_LINUX" && lines.add_serial;
            return edit_value(line, |value| {
                let new = lines.edit_part(value, Reader::Tags, unknown);
                if serial && !new.contains("console=ttyS") {
                    format!("{new} console=tty0 console=ttyS0").trim_start().to_owned()
                } else {
                    new
                }
            });
        }
        let reader = if name == "root" { Reader::Tags } else { Reader::Path };
        DEVICES.contains(&name).then(|| edit_value(line, |value| lines.devices(value, reader, unknown)))?
    })
}

/// The environment block beside grub.cfg: on some systems the command line of all entries is in it. Its length stays
/// (GRUB manual, "GRUB environment block": 1024 bytes, filled with `#`).
fn environment(draft: &mut Draft<'_>, config: &Place, config_path: &Path, lines: &Cmdlines<'_>) {
    let (Some(folder), Some(guest_folder)) = (config.path.parent(), config_path.parent()) else { return };
    let place = Place { volume: config.volume, path: folder.join("grubenv") };
    let path = guest_folder.join("grubenv");
    let mut too_long = false;
    draft.edit_at(&place, &path, why(), |text| match env_block(text, lines) {
        Some(new) => new,
        None => {
            too_long = true;
            text.to_owned()
        }
    });
    if too_long {
        draft.ask(format!(
            "{} has no room for a longer command line: set kernelopts with grub2-editenv in the guest.",
            path.display()
        ));
    }
}

/// `None`: it does not fit.
fn env_block(text: &str, lines: &Cmdlines<'_>) -> Option<String> {
    const HEADER: &str = "# GRUB Environment Block\n";
    if !text.starts_with(HEADER) {
        return Some(text.to_owned());
    }
    let body = text.trim_end_matches('#');
    let edit = |reader| {
        each_line(body, |_, line| {
            let is_cmdline = line.starts_with("kernelopts=") || line.starts_with("tuned_params=");
            is_cmdline.then(|| edit_value(line, |value| lines.edit(value, reader, &mut vec![])))?
        })
    };
    // Shorter names if there is no room for UUIDs.
    let new = [edit(Reader::Tags), edit(Reader::Plain)].into_iter().find(|new| new.len() <= text.len())?;
    if new == body {
        return Some(text.to_owned());
    }
    Some(format!("{new}{}", "#".repeat(text.len() - new.len())))
}

#[cfg(test)]
mod tests {
    use super::super::names::tests::{ROOT, SWAP, names};
    use super::*;
    use crate::plan::TargetBus;

    fn edit(loader: Loader, text: &str) -> String {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: true, add_serial: false };
        let new = one(loader, text, &lines, &mut vec![]);
        assert_eq!(one(loader, &new, &lines, &mut vec![]), new, "edited twice");
        assert_eq!(new.lines().count(), text.lines().count());
        new
    }

    #[test]
    fn grub_of_debian_with_names_of_devices() {
        let text = "\
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-/dev/sda1' {
	load_video
	set root='hd0,msdos1'
	search --no-floppy --fs-uuid --set=root --hint-bios=hd0,msdos1 5b1c
	echo	'Loading Linux 6.1.0-30-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-30-amd64 root=/dev/sda1 ro  quiet
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.1.0-30-amd64
}
menuentry 'without' {
	linux	/boot/vmlinuz-own root=/dev/sda1 ro
}
";
        let expected = text
            .replace("root=/dev/sda1 ro  quiet", &format!("root=UUID={ROOT} ro  quiet"))
            .replace("own root=/dev/sda1", "own root=PARTUUID=76696d67-01");
        assert_eq!(edit(Loader::Grub, text), expected);
    }

    #[test]
    fn grub_of_red_hat_and_suse() {
        let text = "\
  set kernelopts=\"root=/dev/sda1 ro resume=/dev/sda2 console=hvc0\"
	linux16 /vmlinuz-3.10.0-1160.el7.x86_64 root=/dev/sda1 ro crashkernel=auto rhgb quiet LANG=en_US.UTF-8
	initrd16 /initramfs-3.10.0-1160.el7.x86_64.img
	linuxefi /boot/vmlinuz-4.12.14-default root=/dev/sda1  resume=/dev/sda2 splash=silent
	initrdefi /boot/initrd-4.12.14-default
	module2 /boot/vmlinuz placeholder root=/dev/sda1 ro
";
        let new = edit(Loader::Grub, text);
        assert!(!new.contains("/dev/sd"), "{new}");
        assert!(new.starts_with(&format!(
            "set kernelopts=\"root=UUID={ROOT} ro resume=UUID={SWAP} console=tty0 console=ttyS0\"\n"
        )));
    }

    #[test]
    fn grub_legacy_of_debian_and_red_hat() {
        let text = "\
# kopt=root=/dev/sda1 ro
# groot=(hd0,0)
#boot=/dev/sda
default 0
title CentOS (2.6.32-754.el6.x86_64)
	root (hd0,0)
	kernel /vmlinuz-2.6.32-754.el6.x86_64 ro root=/dev/sda1 rd_NO_LUKS KEYTABLE=us
	initrd /initramfs-2.6.32-754.el6.x86_64.img
title own
	kernel /vmlinuz-own root=/dev/sda1
";
        let expected = text
            .replace("kopt=root=/dev/sda1", &format!("kopt=root=UUID={ROOT}"))
            .replace("ro root=/dev/sda1", &format!("ro root=UUID={ROOT}"))
            .replace("own root=/dev/sda1", "own root=PARTUUID=76696d67-01");
        assert_eq!(edit(Loader::GrubLegacy, text), expected);
    }

    #[test]
    fn entries_of_the_specification() {
        let text = "title Fedora Linux\nversion 6.8\nlinux /vmlinuz-6.8\ninitrd /initramfs-6.8.img $tuned_initrd\noptions root=/dev/sda1 ro rhgb\ngrub_users $grub_users\n";
        assert_eq!(edit(Loader::BootLoaderSpec, text), text.replace("/dev/sda1", &format!("UUID={ROOT}")));
        let alone = "linux /vmlinuz\noptions root=/dev/sda1\n";
        assert_eq!(edit(Loader::BootLoaderSpec, alone), alone.replace("/dev/sda1", "PARTUUID=76696d67-01"));
        let variable = "initrd /i\noptions $kernelopts $tuned_params\n";
        assert_eq!(edit(Loader::BootLoaderSpec, variable), variable);
    }

    #[test]
    fn extlinux_of_alpine() {
        let text = "\
DEFAULT menu.c32
LABEL lts
  MENU LABEL Linux lts
  LINUX vmlinuz-lts
  INITRD initramfs-lts
  APPEND root=/dev/sda1 modules=sd-mod,usb-storage,ext4 quiet rootfstype=ext4
LABEL own
  LINUX vmlinuz
  APPEND root=/dev/sda1
";
        let expected = text
            .replace("root=/dev/sda1 modules", &format!("root=UUID={ROOT} modules"))
            .replace("APPEND root=/dev/sda1\n", "APPEND root=PARTUUID=76696d67-01\n");
        assert_eq!(edit(Loader::Syslinux, text), expected);
    }

    #[test]
    fn defaults_of_generators() {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: true, add_serial: false };
        let text = "GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet resume=/dev/sda2\"\nGRUB_CMDLINE_LINUX='console=hvc0'\n#GRUB_CMDLINE_LINUX=\"root=/dev/sda1\"\nGRUB_DEVICE=/dev/sda1\nGRUB_DISABLE_LINUX_UUID=true\n";
        let expected = text
            .replace("resume=/dev/sda2", &format!("resume=UUID={SWAP}"))
            .replace("console=hvc0", "console=tty0 console=ttyS0")
            .replace("DEVICE=/dev/sda1", &format!("DEVICE=/dev/disk/by-uuid/{ROOT}"));
        assert_eq!(defaults(text, &lines, &mut vec![]), expected);
        let text = "EXTLINUX_ROOT=\"root=/dev/sda1\"\nEXTLINUX_PARAMETERS=\"ro quiet\"\nU_BOOT_ROOT=\"root=/dev/sda1\"\n";
        let expected = text.replace("/dev/sda1", &format!("UUID={ROOT}"));
        assert_eq!(defaults(text, &lines, &mut vec![]), expected);
    }

    #[test]
    fn names_in_a_unified_image_are_told() {
        use super::super::tree::memory::Memory;
        let file = guestdisk::boot::BootFile {
            volume: 0,
            location: guestdisk::Location::Whole { disk: 0 },
            path: "/EFI/Linux/x.efi".into(),
            section: None,
        };
        let entry = guestdisk::boot::Entry {
            title: "x".to_owned(),
            id: "x".to_owned(),
            kernel: file.clone(),
            initrds: vec![],
            cmdline: "root=/dev/sda1 ro quiet".to_owned(),
            source: file,
            loader: Loader::UnifiedKernel,
            default: true,
        };
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: false, add_serial: false };
        let tree = Memory::default();
        let told = |cmdline: &str| {
            let entries = vec![guestdisk::boot::Entry { cmdline: cmdline.to_owned(), ..entry.clone() }];
            let mut draft = Draft::new(&tree);
            convert(&mut draft, &System { entries, ..super::super::tests::system() }, &lines);
            draft.finish().unwrap().to_do
        };
        let [sentence] = &told(&entry.cmdline)[..] else { panic!("{:?}", told(&entry.cmdline)) };
        assert!(
            sentence.contains("x.efi has root=/dev/sda1") && sentence.contains(&format!("root=UUID={ROOT}"))
        );
        assert!(told(&format!("root=UUID={ROOT} ro")).is_empty());
    }

    #[test]
    fn the_environment_block_keeps_its_length() {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: false, add_serial: false };
        let block = |extra: usize| {
            let body = format!(
                "# GRUB Environment Block\nsaved_entry=a-4.18.0\nkernelopts=root=/dev/sda1 ro quiet {}\nboot_success=0\n",
                "x".repeat(extra)
            );
            format!("{body}{}", "#".repeat(1024 - body.len()))
        };
        let new = env_block(&block(0), &lines).unwrap();
        assert_eq!(new.len(), 1024);
        assert!(new.contains(&format!("\nkernelopts=root=UUID={ROOT} ro quiet")) && new.ends_with("##"));
        let tight = env_block(&block(900), &lines).unwrap();
        assert_eq!(tight.len(), 1024);
        assert!(tight.contains("root=/dev/vda1"));
        let nothing = "# GRUB Environment Block\nsaved_entry=0\n####";
        assert_eq!(env_block(nothing, &lines).unwrap(), nothing);
    }

    #[test]
    fn entries_of_ones_own_are_right_next_time() {
        use super::super::tree::memory::Memory;
        let text =
            "#!/bin/sh\nexec tail -n +3 $0\nmenuentry x {\n\tlinux /own root=/dev/sda1 ro\n\tinitrd /i\n}\n";
        let tree = Memory::default().file("/etc/grub.d/40_custom", text).file("/etc/grub.d/10_linux", text);
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: false, add_serial: true };
        let mut draft = Draft::new(&tree);
        convert(&mut draft, &super::super::tests::system(), &lines);
        let plan = draft.finish().unwrap();
        assert_eq!(plan.changes.len(), 1);
        assert_eq!(plan.changes[0].diff[1], format!("+\tlinux /own root=UUID={ROOT} ro"));
    }
}

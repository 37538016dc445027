//! What is true of all edits of text: other lines stay as they are, and what has been edited is left alone.

use guestdisk::boot::Loader;
use proptest::prelude::*;

use super::cmdline::Cmdlines;
use super::loaders;
use super::names::tests::names;
use super::tables;
use crate::plan::TargetBus;

/// A line of a file, with names of devices, quotes, white space and much else in it.
fn line() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("/dev/sda1"),
        Just("root=/dev/sda1"),
        Just("resume=/dev/sda2"),
        Just("console=hvc0"),
        Just("console=tty0"),
        Just("linux"),
        Just("kernel"),
        Just("initrd"),
        Just("options"),
        Just("append"),
        Just("label"),
        Just("title"),
        Just("menuentry"),
        Just("# kopt=root=/dev/sda1"),
        Just("kernelopts=\"root=/dev/sda1\""),
        Just("\""),
        Just("'"),
        Just("="),
        Just("/dev/disk/by-id/scsi-36000c29abc-part1"),
        Just("UUID=x"),
        Just("#"),
        Just("ext4"),
        Just("é"),
        Just("/dev/"),
    ];
    let space = prop_oneof![Just(" "), Just("\t"), Just("   "), Just("")];
    proptest::collection::vec((space, word), 0..6)
        .prop_map(|parts| parts.into_iter().map(|(space, word)| format!("{space}{word}")).collect())
}

fn text() -> impl Strategy<Value = String> {
    let end = prop_oneof![Just("\n"), Just("\r\n"), Just("\n\n")];
    proptest::collection::vec((line(), end), 0..12)
        .prop_map(|lines| lines.into_iter().map(|(line, end)| format!("{line}{end}")).collect())
}

/// The parts of a text that no edit may touch: everything of lines that name no device and no console.
fn untouched(text: &str) -> Vec<&str> {
    let touched = |line: &&str| {
        line.contains("/dev/sd")
            || line.contains("/dev/vd")
            || line.contains("UUID=")
            || line.contains("/dev/disk")
            || line.contains("console=")
    };
    text.split_inclusive('\n').filter(|line| !touched(line)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn boot_loaders(text in text()) {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: true, add_serial: false };
        for loader in [Loader::Grub, Loader::GrubLegacy, Loader::BootLoaderSpec, Loader::Syslinux] {
            let once = loaders::one(loader, &text, &lines, &mut vec![]);
            let twice = loaders::one(loader, &once, &lines, &mut vec![]);
            prop_assert_eq!(&twice, &once);
            prop_assert_eq!(once.matches('\n').count(), text.matches('\n').count());
            prop_assert_eq!(untouched(&once), untouched(&text));
        }
    }

    #[test]
    fn tables_of_file_systems(text in text()) {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let fstab = |text: &str| tables::fstab(text, &names, &mut vec![]);
        let crypttab = |text: &str| tables::crypttab(text, &names, &mut vec![]);
        for edit in [&fstab as &dyn Fn(&str) -> String, &crypttab] {
            let once = edit(&text);
            prop_assert_eq!(&edit(&once), &once);
            prop_assert_eq!(untouched(&once), untouched(&text));
        }
    }

    #[test]
    fn nothing_panics(text in "\\PC*") {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: true, add_serial: true };
        loaders::one(Loader::Grub, &text, &lines, &mut vec![]);
        tables::fstab(&text, &names, &mut vec![]);
        super::lvm::conf(&text, &names);
    }
}

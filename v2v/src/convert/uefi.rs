//! The loader that UEFI starts when it knows of no other: `\EFI\BOOT\BOOTX64.EFI` (UEFI specification, 3.5.1.1).
//!
//! The boot entries of a machine live in its firmware's variables, not on the disk, so on KVM they are gone. Where the
//! fallback loader is missing, the one that the distribution installed is copied there, with what it loads from its own
//! folder. GRUB finds its configuration through a stub that leads to the folder of the distribution, so that the copy
//! never grows stale.

use std::path::{Path, PathBuf};

use guestdisk::fs::FileKind;

use super::draft::{Draft, MOST_FILE, Why};
use super::loaders::guest_path;
use super::tree::Place;
use crate::inspect::System;
use crate::plan::Stop;

/// The suffixes of loaders' names by architecture.
const ARCHITECTURES: [(&str, &str); 4] = [
    ("x64", "BOOTX64.EFI"),
    ("aa64", "BOOTAA64.EFI"),
    ("ia32", "BOOTIA32.EFI"),
    ("riscv64", "BOOTRISCV64.EFI"),
];

fn why() -> Why {
    Why::new(
        "uefi-fallback",
        "the firmware of the new machine does not know the guest's boot entries and starts \\EFI\\BOOT",
        "remove the folder EFI/BOOT from the EFI system partition",
    )
}

/// Everything in this file's care. `only`: the machine is started by UEFI.
pub(crate) fn convert(draft: &mut Draft<'_>, system: &System, only: bool) {
    let Some(volume) = system.esp.filter(|_| system.fallback_loader.is_none()) else { return };
    let at = |path: PathBuf| Place { volume, path };
    let Some(efi) = child(draft, &at("/".into()), "EFI") else { return };
    let vendors: Vec<String> = draft
        .tree()
        .list_at(&efi)
        .into_iter()
        .filter(|(name, kind)| *kind == FileKind::Directory && !name.eq_ignore_ascii_case("boot"))
        .map(|(name, _)| name)
        .collect();
    let found = vendors.iter().find_map(|vendor| {
        let folder = at(efi.path.join(vendor));
        let names: Vec<String> = draft.tree().list_at(&folder).into_iter().map(|(name, _)| name).collect();
        loader(&names).map(|copies| (vendor.clone(), folder, names, copies))
    });
    let Some((vendor, folder, names, copies)) = found else {
        if !vendors.iter().any(|vendor| vendor.eq_ignore_ascii_case("microsoft")) {
            let stop = Stop {
                message: "the EFI system partition has no \\EFI\\BOOT loader, and none was found that could be copied there".to_owned(),
                hint: "install a boot loader there in the guest (grub-install --removable, bootctl install)".to_owned(),
            };
            match only {
                true => draft.stop(stop.message, stop.hint),
                false => draft.ask(stop.sentence()),
            }
        }
        return;
    };
    let target = child(draft, &efi, "BOOT").unwrap_or_else(|| at(efi.path.join("BOOT")));
    draft.make_directories_at(&target, &guest_path(system, &target), &why());
    for (from, to) in copies {
        let source = at(folder.path.join(&from));
        if let Some(bytes) = draft.bytes(&source, MOST_FILE) {
            write(draft, system, at(target.path.join(&to)), bytes);
        }
    }
    if names.iter().any(|name| name.eq_ignore_ascii_case("grub.cfg")) {
        let stub = stub(&efi.path, &vendor);
        write(draft, system, at(target.path.join("grub.cfg")), stub.into_bytes());
    }
}

fn write(draft: &mut Draft<'_>, system: &System, place: Place, bytes: Vec<u8>) {
    let path = guest_path(system, &place);
    draft.write_at(place, &path, bytes, 0o700, why());
}

fn stub(efi: &Path, vendor: &str) -> String {
    let folder = efi.join(vendor);
    let folder = folder.display();
    format!(
        "# Written by vimg: the loader in this folder reads the configuration of {folder}.\n\
         search --no-floppy --file --set=root {folder}/grub.cfg\n\
         set prefix=($root){folder}\n\
         configfile $prefix/grub.cfg\n"
    )
}

/// A name in a folder of FAT, whatever its case.
pub(super) fn child(draft: &Draft<'_>, folder: &Place, name: &str) -> Option<Place> {
    let names = draft.tree().list_at(folder);
    let (own, _) = names.into_iter().find(|(own, _)| own.eq_ignore_ascii_case(name))?;
    Some(Place { volume: folder.volume, path: folder.path.join(own) })
}

/// What is copied of a folder, and under which names: shim with the GRUB that it starts, or the loader that is alone.
fn loader(names: &[String]) -> Option<Vec<(String, String)>> {
    let own = |wanted: &str| names.iter().find(|name| name.eq_ignore_ascii_case(wanted)).cloned();
    for (suffix, fallback) in ARCHITECTURES {
        let to = fallback.to_owned();
        if let Some(shim) = own(&format!("shim{suffix}.efi")) {
            let Some(grub) = own(&format!("grub{suffix}.efi")) else { continue };
            let mut copies = vec![(shim, to), (grub, format!("grub{suffix}.efi"))];
            copies
                .extend(own(&format!("mm{suffix}.efi")).map(|manager| (manager, format!("mm{suffix}.efi"))));
            return Some(copies);
        }
        let alone = [
            format!("grub{suffix}.efi"),
            format!("systemd-boot{suffix}.efi"),
            format!("refind_{suffix}.efi"),
        ];
        if let Some(alone) = alone.iter().find_map(|name| own(name)) {
            return Some(vec![(alone, to)]);
        }
    }
    // SUSE.
    let fallback = ARCHITECTURES[0].1.to_owned();
    if let (Some(shim), Some(grub)) = (own("shim.efi"), own("grub.efi")) {
        let mut copies = vec![(shim, fallback), (grub, "grub.efi".to_owned())];
        copies.extend(own("MokManager.efi").map(|manager| (manager, "MokManager.efi".to_owned())));
        return Some(copies);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::tests::system;
    use super::super::tree::memory::Memory;
    use super::*;
    use crate::plan::Action;

    fn esp() -> Memory {
        Memory { boot: true, ..Memory::default() }
            .file("/boot/EFI/debian/shimx64.efi", "shim")
            .file("/boot/EFI/debian/grubx64.efi", "grub")
            .file("/boot/EFI/debian/mmx64.efi", "mok")
            .file("/boot/EFI/debian/grub.cfg", "search.fs_uuid x root")
    }

    fn planned(tree: &Memory) -> Vec<(String, Action)> {
        let mut system = system();
        system.esp = Some(1);
        let mut draft = Draft::new(tree);
        convert(&mut draft, &system, false);
        let plan = draft.finish().unwrap();
        plan.changes.into_iter().map(|change| (change.path.display().to_string(), change.action)).collect()
    }

    #[test]
    fn shim_and_grub_are_copied_with_a_stub() {
        let done = planned(&esp());
        let file = |bytes: &str| Action::Create { bytes: bytes.into(), mode: 0o700 };
        assert_eq!(done[0], ("/EFI/BOOT".to_owned(), Action::CreateDirectory { mode: 0o755 }));
        assert_eq!(done[1], ("/EFI/BOOT/BOOTX64.EFI".to_owned(), file("shim")));
        assert_eq!(done[2], ("/EFI/BOOT/grubx64.efi".to_owned(), file("grub")));
        assert_eq!(done[3], ("/EFI/BOOT/mmx64.efi".to_owned(), file("mok")));
        let Action::Create { bytes, .. } = &done[4].1 else { panic!("{done:?}") };
        let stub = std::str::from_utf8(bytes).unwrap();
        assert!(stub.contains("set prefix=($root)/EFI/debian\nconfigfile"));
        assert_eq!(done.len(), 5);
    }

    #[test]
    fn a_loader_that_is_alone() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let copied = |from: &str, to: &str| Some(vec![(from.to_owned(), to.to_owned())]);
        assert_eq!(loader(&names(&["GRUBX64.EFI"])), copied("GRUBX64.EFI", "BOOTX64.EFI"));
        assert_eq!(loader(&names(&["systemd-bootaa64.efi"])), copied("systemd-bootaa64.efi", "BOOTAA64.EFI"));
        assert_eq!(loader(&names(&["shim.efi", "grub.efi"])).unwrap().len(), 2);
        assert_eq!(loader(&names(&["bootmgfw.efi", "shimx64.efi"])), None);
    }

    #[test]
    fn windows_is_somebody_else() {
        let tree =
            Memory { boot: true, ..Memory::default() }.file("/boot/EFI/Microsoft/Boot/bootmgfw.efi", "");
        assert!(planned(&tree).is_empty());
    }
}

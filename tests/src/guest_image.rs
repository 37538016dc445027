//! Disks of guests, put together from partitions with their file systems.

use std::path::Path;
use std::sync::Arc;

use block::BlockDevice;

use crate::command::Cmd;
use crate::dir::Dir;
use crate::guest;

/// Bytes per sector.
const SECTOR: u64 = 512;
/// Where the first partition begins, in MiB.
const FIRST_MIB: u64 = 1;

/// What a partition holds.
#[derive(Debug, Clone, Copy)]
pub enum Holds<'a> {
    /// ext4 with this UUID.
    Ext4(&'a str),
    /// FAT with this serial number, eight digits.
    Vfat(&'a str),
    /// Nothing.
    Nothing,
}

/// One partition: the type as sfdisk has it, its size, what it holds and the files in it.
#[derive(Debug)]
pub struct Part<'a> {
    /// `L`, `U` for the EFI System Partition, a number or a GUID.
    pub kind: &'a str,
    /// Its size.
    pub mib: u64,
    /// What it holds.
    pub holds: Holds<'a>,
    /// Paths without the first slash, and contents.
    pub files: &'a [(&'a str, &'a [u8])],
}

/// Makes the raw disk `name` in a folder. `label`: `dos` or `gpt`.
pub fn disk(dir: &Dir, name: &str, label: &str, parts: &[Part<'_>]) -> Arc<dyn BlockDevice> {
    let total: u64 = parts.iter().map(|part| part.mib).sum();
    dir.sparse(name, (FIRST_MIB + total + 1) << 20);
    let lines: Vec<_> =
        parts.iter().map(|part| format!("size={}MiB, type={}", part.mib, part.kind)).collect();
    let script = format!("label: {label}\nlabel-id: {}\n{}\n", label_id(label), lines.join("\n"));
    Cmd::new("sfdisk").words("-q").arg(dir.file(name)).stdin(script).ok();
    let mut start = FIRST_MIB;
    for part in parts {
        fill(dir, name, start << 20, part);
        start += part.mib;
    }
    guest::open(&dir.file(name))
}

fn label_id(label: &str) -> &'static str {
    if label == "gpt" { "6A898CC3-1DD2-11B2-99A6-080020736631" } else { "0x12345678" }
}

/// Makes a file system at an offset and puts the files into it.
fn fill(dir: &Dir, name: &str, offset: u64, part: &Part<'_>) {
    let tree = dir.file("partition");
    let _ = std::fs::remove_dir_all(&tree);
    std::fs::create_dir(&tree).unwrap();
    for (path, bytes) in part.files {
        let file = tree.join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, bytes).unwrap();
    }
    let image = dir.file(name);
    match part.holds {
        Holds::Nothing => {}
        Holds::Ext4(uuid) => {
            let size = format!("{}M", part.mib);
            Cmd::new("mke2fs")
                .words("-q -F -t ext4 -d")
                .arg(&tree)
                .words(&format!("-U {uuid} -E offset={offset}"))
                .arg(&image)
                .arg(size)
                .ok();
        }
        Holds::Vfat(serial) => {
            Cmd::new("mkfs.vfat")
                .words(&format!("-i {serial} --offset {}", offset / SECTOR))
                .arg(&image)
                .arg((part.mib << 10).to_string())
                .ok();
            copy_to_fat(&tree, &image, offset);
        }
    }
}

/// Copies what a folder holds to the root of a FAT file system.
pub fn copy_to_fat(tree: &Path, image: &Path, offset: u64) {
    let names: Vec<_> = std::fs::read_dir(tree).unwrap().map(|entry| entry.unwrap().path()).collect();
    if names.is_empty() {
        return;
    }
    let target = format!("{}@@{offset}", image.display());
    // mcopy has to know how names are written here.
    let copy = Cmd::new("mcopy")
        .words("-s -m -Q -i")
        .arg(target)
        .env("MTOOLS_SKIP_CHECK", "1")
        .env("LC_ALL", "C.UTF-8");
    names.iter().fold(copy, |copy, name| copy.arg(name)).arg("::/").ok();
}

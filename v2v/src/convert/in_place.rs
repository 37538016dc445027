//! A plan for file systems in which files can only be overwritten (XFS, btrfs, without their own drivers).
//!
//! Texts fit as a rule, since a file may grow within its last block. What is put behind an initramfs does not: the whole
//! initramfs is packed anew instead, so tightly that it fits with the addition, and filled up with zeros, which Linux skips.
//! (Tried: zstd at level 19 gains more than the drivers take.) What has to be created cannot be, and is listed as to do.

use std::io::Read as _;

use block::{Error, Result, ResultExt as _};
use guestdisk::detect::Kind;
use guestdisk::{Disks, Volume};

use super::draft::{MOST_FILE, digest};
use crate::initramfs::{self, Compression, Limits};
use crate::plan::{Action, Plan, Stop};

/// The most bytes of an initramfs when it is unpacked.
const MOST_UNPACKED: u64 = 1 << 30;
/// As tight as zstd packs within Linux's limits.
const TIGHTEST: i32 = 19;

/// The plan as far as it can be carried out by overwriting files where that is all that can be done; what cannot becomes a
/// sentence of what is to do. Changes of other file systems stay as they are.
///
/// # Errors
/// A file of the guest cannot be read.
pub fn fit(plan: Plan, disks: &Disks) -> Result<Plan> {
    let mut fitted = Plan { changes: vec![], ..plan };
    for mut change in plan.changes {
        let volume = disks.volumes().get(change.volume).filter(|volume| is_overwritten(volume));
        let Some(volume) = volume else {
            fitted.changes.push(change);
            continue;
        };
        let path = change.guest_path.display().to_string();
        match &change.action {
            Action::Replace { .. } => fitted.changes.push(change),
            Action::Append { bytes } => {
                match tighter(volume, &change.path, bytes).context(|| path.clone())? {
                    Some(bytes) => {
                        change.new_digest = digest(&bytes);
                        change.action = Action::Replace { bytes };
                        fitted.changes.push(change);
                    }
                    None => {
                        let stop = Stop {
                            message: format!(
                                "{path} has no room for the drivers that it lacks, and it cannot grow on this file system"
                            ),
                            hint: "use the appliance (--backend appliance), or --bus sata".to_owned(),
                        };
                        match change.needed {
                            true => fitted.stops.push(stop),
                            false => fitted.to_do.push(stop.sentence()),
                        }
                    }
                }
            }
            Action::Create { .. }
            | Action::CreateDirectory { .. }
            | Action::Symlink { .. }
            | Action::Remove => {
                fitted.to_do.push(format!(
                    "{path} ({}): not without the file system's own driver: {}",
                    change.action.name(),
                    change.reason
                ));
            }
        }
    }
    Ok(fitted)
}

fn is_overwritten(volume: &Volume) -> bool {
    let kind = volume.content.as_ref().map(|content| content.kind);
    matches!(kind, Some(Kind::Xfs | Kind::Btrfs))
}

/// An initramfs with an addition, no longer than it is.
fn tighter(volume: &Volume, path: &std::path::Path, addition: &[u8]) -> Result<Option<Vec<u8>>> {
    let files = volume.file_system()?;
    let old = files.read(path, MOST_FILE)?;
    // The configuration of the kernel beside it says what it can unpack.
    let folder = path.parent().unwrap_or(path);
    let configurations =
        files.read_dir(folder)?.into_iter().filter_map(|entry| entry.name.into_string().ok());
    let texts = configurations
        .filter(|name| name.starts_with("config-"))
        .filter_map(|name| files.read(folder.join(name), 4 << 20).ok())
        .map(|bytes| String::from_utf8_lossy(&bytes).lines().any(|line| line == "CONFIG_RD_ZSTD=y"));
    let known: Vec<bool> = texts.collect();
    let knows_zstd = !known.is_empty() && known.into_iter().all(|knows| knows);
    repack(&old, addition, knows_zstd)
}

/// What is in front of the last archive stays; that archive and the addition become one. `None`: it does not fit, or the
/// kernel may not read it.
fn repack(old: &[u8], addition: &[u8], knows_zstd: bool) -> Result<Option<Vec<u8>>> {
    let archive = initramfs::read(old, &Limits::default(), &|_| false);
    let Some(main) = archive.segments.last().filter(|_| archive.problem.is_empty()) else { return Ok(None) };
    if !knows_zstd && main.compression != Compression::Zstd {
        return Ok(None);
    }
    let offset = usize::try_from(main.offset).unwrap_or(usize::MAX);
    let (Some(front), Some(packed)) = (old.get(..offset), old.get(offset..)) else { return Ok(None) };
    let start = addition.iter().position(|byte| *byte != 0).unwrap_or(addition.len());
    let (Some(mut whole), Some(more)) = (unpack(main.compression, packed)?, added(&addition[start..])?)
    else {
        return Ok(None);
    };
    whole.resize(whole.len().next_multiple_of(4), 0);
    whole.extend(more);
    let packed =
        zstd::bulk::compress(&whole, TIGHTEST).map_err(|error| Error::from(error).context("zstd"))?;
    let mut new = front.to_vec();
    new.extend(packed);
    if new.len() > old.len() {
        return Ok(None);
    }
    new.resize(old.len(), 0);
    Ok(Some(new))
}

fn added(addition: &[u8]) -> Result<Option<Vec<u8>>> {
    let archive = initramfs::read(addition, &Limits::default(), &|_| false);
    match archive.segments.first() {
        Some(segment) => unpack(segment.compression, addition),
        None => Ok(None),
    }
}

/// `None`: a compression that is not unpacked here.
fn unpack(compression: Compression, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    let reader: Box<dyn std::io::Read> = match compression {
        Compression::None => Box::new(bytes),
        Compression::Gzip => Box::new(flate2::read::GzDecoder::new(bytes)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(bytes)?.single_frame()),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(bytes, false, 160 << 10)),
        _ => return Ok(None),
    };
    let mut out = vec![];
    reader.take(MOST_UNPACKED + 1).read_to_end(&mut out)?;
    if out.len() as u64 > MOST_UNPACKED {
        return Err(Error::unsupported("an initramfs of more than 1 GiB"));
    }
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::super::segment::{Packing, append};
    use super::*;
    use cpio::Archive;

    fn archive(path: &str, bytes: &[u8]) -> Vec<u8> {
        let mut archive = Archive::new();
        archive.file(path, 0o644, bytes).unwrap();
        archive.finish()
    }

    /// Bytes that pack well with effort and less without.
    fn code() -> Vec<u8> {
        (0..200_000_u32).flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 24 & 15).to_le_bytes()).collect()
    }

    #[test]
    fn an_initramfs_keeps_its_length_and_gets_more() {
        let microcode = archive("kernel/x86/microcode/x.bin", b"microcode");
        let mut old = append(&microcode, Packing::Plain, 0).unwrap();
        old.resize(old.len().next_multiple_of(512), 0);
        let front = old.len();
        old.extend(zstd::bulk::compress(&archive("bin/sh", &code()), -7).unwrap());
        let addition = append(&archive("lib/virtio.ko", b"driver"), Packing::Zstd, old.len() as u64).unwrap();
        let new = repack(&old, &addition, false).unwrap().unwrap();
        assert_eq!((new.len(), &new[..front]), (old.len(), &old[..front]));
        let found = initramfs::read(&new[..], &Limits::default(), &|_| true);
        assert_eq!(found.problem, "");
        assert_eq!(found.get("lib/virtio.ko").unwrap().bytes.as_deref(), Some(&b"driver"[..]));
        assert!(found.get("bin/sh").is_some() && found.get("kernel/x86/microcode/x.bin").is_some());
    }

    #[test]
    fn what_does_not_fit_or_cannot_be_read_is_refused() {
        let tight = zstd::bulk::compress(&archive("bin/sh", &code()), 19).unwrap();
        let random: Vec<u8> =
            (0..50_000_u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        let addition = append(&archive("lib/virtio.ko", &random), Packing::Plain, 0).unwrap();
        assert_eq!(repack(&tight, &addition, true).unwrap(), None);
        let plain = archive("bin/sh", &code());
        assert_eq!(repack(&plain, &addition, false).unwrap(), None, "a kernel that may not know zstd");
        assert!(repack(&plain, &addition, true).unwrap().is_some());
    }
}

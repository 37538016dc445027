//! Whether a boot loader offers after a conversion what it offered before.

use guestdisk::Disks;
use guestdisk::boot::{self, Entry};

/// Reads the boot loaders' configuration again from converted disks, and compares: the same entries in the same order, with
/// the same kernels and initramfs images, and roots that are found. What is wrong, in sentences; nothing if all is well.
/// `before`: the entries of the system before the conversion.
pub fn verify(before: &[Entry], after: &Disks) -> Vec<String> {
    let found = boot::entries(after);
    let mut wrong = vec![];
    for old in before {
        let same = |new: &&Entry| new.id == old.id && new.source == old.source;
        let Some(new) = found.entries.iter().find(same) else {
            wrong.push(format!("the boot entry '{}' is not offered any more", old.title));
            continue;
        };
        let unchanged = (&new.title, &new.kernel, &new.initrds, new.loader, new.default)
            == (&old.title, &old.kernel, &old.initrds, old.loader, old.default);
        if !unchanged {
            wrong.push(format!("the boot entry '{}' starts something else than before", old.title));
        }
        wrong.extend(root(new, after));
    }
    wrong
}

/// Why the root of an entry is not found.
fn root(entry: &Entry, disks: &Disks) -> Option<String> {
    let mut roots = entry.cmdline.split_whitespace().filter_map(|word| word.strip_prefix("root="));
    let root = roots.next_back()?;
    let is_name = root.starts_with("/dev/") || root.contains('=');
    // Something that only the initramfs knows (ZFS=..., live:...).
    let is_special = root.starts_with("ZFS=") || root.starts_with("/dev/nfs") || root.starts_with("/dev/md");
    if !is_name || is_special || disks.find(root).is_ok() {
        return None;
    }
    Some(format!("the boot entry '{}' looks for its root at {root}, which is not there", entry.title))
}

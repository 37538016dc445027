//! Small files below a root, as the kernel shows them.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// The most bytes that are read of a file.
const MOST: u64 = 4 << 20;

/// A file system tree.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tree<'a> {
    root: &'a Path,
}

impl<'a> Tree<'a> {
    pub(super) fn new(root: &'a Path) -> Self {
        Self { root }
    }

    /// Where a path (without its first slash) is.
    pub(super) fn path(self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    pub(super) fn exists(self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The bytes of a file; `None` if it cannot be read.
    pub(super) fn bytes(self, path: &str) -> Option<Vec<u8>> {
        let mut bytes = vec![];
        fs::File::open(self.path(path)).ok()?.take(MOST).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// The text of a file without white space around it; `None` if there is nothing.
    pub(super) fn text(self, path: &str) -> Option<String> {
        let bytes = self.bytes(path)?;
        let text =
            String::from_utf8_lossy(&bytes).trim_matches(|c: char| c.is_whitespace() || c == '\0').to_owned();
        (!text.is_empty()).then_some(text)
    }

    /// The number in a file.
    pub(super) fn number(self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The names in a folder, in the order in which people count.
    pub(super) fn names(self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().filter_map(Result::ok);
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_by_cached_key(|name| natural(name));
        names
    }

    /// The last part of what a symbolic link points to.
    pub(super) fn link_name(self, path: &str) -> Option<String> {
        let target = fs::read_link(self.path(path)).ok()?;
        target.file_name()?.to_str().map(str::to_owned)
    }

    /// What a symbolic link points to, as text; empty if it is none.
    pub(super) fn link(self, path: &str) -> String {
        fs::read_link(self.path(path))
            .map_or_else(|_| String::new(), |target| target.to_string_lossy().into_owned())
    }
}

/// A key by which `sdb` comes before `sdaa`, and `nvme2n1` before `nvme10n1`.
fn natural(name: &str) -> Vec<(usize, String)> {
    let mut parts: Vec<(usize, String)> = vec![];
    let mut part = String::new();
    for c in name.chars() {
        if part.chars().last().is_some_and(|last: char| last.is_ascii_digit() != c.is_ascii_digit()) {
            parts.push(ranked(std::mem::take(&mut part)));
        }
        part.push(c);
    }
    parts.push(ranked(part));
    parts
}

/// Longer numbers are larger, and so are longer names of disks.
fn ranked(part: String) -> (usize, String) {
    let disk = ["sd", "vd", "hd", "xvd"].iter().any(|prefix| part.starts_with(prefix));
    let number = part.bytes().all(|byte| byte.is_ascii_digit());
    (if disk || number { part.len() } else { 0 }, part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_in_which_people_count() {
        let mut names = ["sdaa", "sdb", "nvme10n1", "nvme2n1", "sda", "sda10", "sda2"];
        names.sort_by_cached_key(|name| natural(name));
        assert_eq!(names, ["nvme2n1", "nvme10n1", "sda", "sda2", "sda10", "sdb", "sdaa"]);
    }
}

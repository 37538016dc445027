//! Archives as Linux takes them for an initramfs: cpio's `newc` format (Linux documentation,
//! `driver-api/early-userspace/buffer-format`).
//!
//! A directory that is recorded takes the place of a symbolic link of that name, which breaks an initramfs in which `lib`
//! leads to `usr/lib`: record only directories of which it is known that they are none.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fmt::Write as _;

use block::{Error, Result};

/// The most bytes of a member: what eight hexadecimal digits hold.
const MOST: u64 = 0xffff_ffff;

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    recorded: HashSet<String>,
    members: u32,
}

impl Archive {
    /// An archive without members.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many members it has.
    pub fn members(&self) -> u32 {
        self.members
    }

    /// A directory, once. `path` has no leading slash.
    ///
    /// # Errors
    /// `Usage` for a path that an archive cannot have.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        if self.recorded.insert(path.to_owned()) {
            self.member(path, 0o040_755, 2, &[])?;
        }
        Ok(())
    }

    /// The directories in which `path` lies, as far as they lie below `within`, which is not recorded itself.
    ///
    /// # Errors
    /// As [`directory`](Self::directory); `path` does not lie there.
    pub fn way_to(&mut self, within: &str, path: &str) -> Result<()> {
        let Some(rest) = path.strip_prefix(within) else {
            return Err(Error::usage(format!("'{path}' does not lie below '{within}'")));
        };
        for (at, _) in rest.match_indices('/').filter(|(at, _)| *at > 0 || within.is_empty()) {
            self.directory(&path[..within.len() + at])?;
        }
        Ok(())
    }

    /// A regular file. `path` has no leading slash; its directory must be recorded, or be in an archive before this one.
    ///
    /// # Errors
    /// `Usage` for a path that an archive cannot have; `Unsupported` for more than 4 GiB.
    pub fn file(&mut self, path: &str, permissions: u32, bytes: &[u8]) -> Result<()> {
        self.member(path, 0o100_000 | permissions & 0o7777, 1, bytes)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.member(path, 0o120_777, 1, target.as_bytes())
    }

    /// A device, by its major and minor numbers; `mode` with its type (`0o020_600` for a character device).
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        self.check(path)?;
        self.record(path, mode, 1, &[], [major, minor]);
        Ok(())
    }

    fn member(&mut self, path: &str, mode: u32, links: u32, bytes: &[u8]) -> Result<()> {
        self.check(path)?;
        if bytes.len() as u64 > MOST {
            return Err(Error::unsupported(format!(
                "{path}: {} bytes, more than an archive can hold",
                bytes.len()
            )));
        }
        self.record(path, mode, links, bytes, [0, 0]);
        Ok(())
    }

    fn check(&self, path: &str) -> Result<()> {
        let is_path = !path.is_empty()
            && !path.starts_with('/')
            && path.len() < 4096
            && !path.contains('\0')
            && path.split('/').all(|name| !name.is_empty() && name != "..");
        if is_path { Ok(()) } else { Err(Error::usage(format!("'{path}' is no path of an archive"))) }
    }

    fn record(&mut self, path: &str, mode: u32, links: u32, bytes: &[u8], device: [u32; 2]) {
        let inode = if path == TRAILER { 0 } else { self.members + 1 };
        let (len, name) = (bytes.len(), path.len() + 1);
        let mut header = String::from("070701");
        // inode, mode, owner, group, links, time
        for field in [inode, mode, 0, 0, links, 0] {
            let _ = write!(header, "{field:08x}");
        }
        let _ = write!(header, "{len:08x}");
        // device that it is on, device that it is
        for field in [0, 0, device[0], device[1]] {
            let _ = write!(header, "{field:08x}");
        }
        let _ = write!(header, "{name:08x}{:08x}", 0);
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self.members = self.members.saturating_add(1);
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive with its end.
    pub fn finish(mut self) -> Vec<u8> {
        self.record(TRAILER, 0, 1, &[], [0, 0]);
        self.bytes
    }
}

const TRAILER: &str = "TRAILER!!!";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_its_fields_where_they_belong() {
        let mut archive = Archive::new();
        archive.file("a/b", 0o640, b"hello").unwrap();
        let bytes = archive.finish();
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081a0");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[94..102], b"00000004");
        assert_eq!(&bytes[110..114], b"a/b\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert!(bytes.len().is_multiple_of(4) && bytes[124..].starts_with(b"07070100000000"));
    }

    #[test]
    fn the_systems_cpio_reads_it() {
        let mut archive = Archive::new();
        archive.directory("dir").unwrap();
        archive.file("dir/file", 0o640, b"hello").unwrap();
        archive.file("empty", 0o644, b"").unwrap();
        archive.device("null", 0o020_666, 1, 3).unwrap();
        let bytes = archive.finish();
        assert!(bytes.starts_with(b"070701"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.cpio");
        std::fs::write(&path, &bytes).unwrap();
        let words = ["-itv", "--quiet", "-F", path.to_str().unwrap()];
        let Ok(listed) = std::process::Command::new("cpio").args(words).output() else { return };
        let text = String::from_utf8_lossy(&listed.stdout);
        for part in
            ["drwxr-xr-x", "-rw-r-----   1 root     root            5", "dir/file", "crw-rw-rw-", "1,   3"]
        {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn paths_that_no_archive_has() {
        let mut archive = Archive::new();
        for path in ["", "/a", "a//b", "../a", "a\0b"] {
            archive.file(path, 0o644, b"").unwrap_err();
        }
        assert_eq!(archive.members(), 0);
    }

    #[test]
    fn only_directories_below_are_recorded() {
        let mut archive = Archive::new();
        archive.way_to("usr/lib", "usr/lib/modules/6.1/kernel/a.ko").unwrap();
        archive.way_to("usr/lib", "usr/lib/modules/6.1/b").unwrap();
        let text = String::from_utf8(archive.finish()).unwrap();
        assert!(
            !text.contains("usr/lib\0")
                && text.contains("usr/lib/modules\0")
                && text.contains("6.1/kernel\0")
        );
        assert_eq!(text.matches("070701").count(), 4);
    }
}

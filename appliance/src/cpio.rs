//! Archives as Linux unpacks them into its first file system: cpio in the "new ASCII" form (the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive that is being written.
#[derive(Debug)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o40_000;
const FILE: u32 = 0o100_000;
const CHAR_DEVICE: u32 = 0o20_000;
/// What the last record is called.
const TRAILER: &str = "TRAILER!!!";

impl Archive {
    /// Nothing in it.
    pub fn new() -> Self {
        Self { bytes: vec![], inode: 0 }
    }

    /// A directory, before anything in it. Names have no slash in front.
    pub fn directory(&mut self, name: &str, permissions: u32) {
        self.record(name, DIRECTORY | permissions, (0, 0), b"");
    }

    /// A regular file (of less than 4 GiB).
    pub fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) {
        self.record(name, FILE | permissions, (0, 0), contents);
    }

    /// A character device by its major and minor number.
    pub fn char_device(&mut self, name: &str, permissions: u32, device: (u32, u32)) {
        self.record(name, CHAR_DEVICE | permissions, device, b"");
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.record(TRAILER, 0, (0, 0), b"");
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    /// c_ino, c_mode, c_uid, c_gid, c_nlink, c_mtime, c_filesize, c_maj, c_min, c_rmaj, c_rmin, c_namesize, c_chksum.
    fn record(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), contents: &[u8]) {
        self.inode += 1;
        let name_size = name.len() + 1;
        let (inode, size) = (self.inode, contents.len());
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{major:08x}{minor:08x}\
             {name_size:08x}{0:08x}",
            0, 1
        );
        self.bytes.extend(header.bytes().chain(name.bytes()).chain([0]));
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

impl Default for Archive {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_cpio_reads_it() {
        let mut archive = Archive::new();
        archive.directory("dir", 0o755);
        archive.file("dir/file", 0o640, b"hello");
        archive.file("empty", 0o644, b"");
        archive.char_device("null", 0o666, (1, 3));
        let bytes = archive.finish();
        assert!(bytes.len().is_multiple_of(512) && bytes.starts_with(b"070701"));
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
}

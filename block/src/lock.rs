//! Image locks that a running QEMU understands.
//!
//! Every use of an image is described by permissions: those taken, and those that others may take at the
//! same time. On Linux each is a shared lock of one byte of the file, held by the open file description:
//! byte 100 + b for permission b taken, byte 200 + b for permission b not shared. Locks are shared so that
//! any number of users can say the same thing; a conflict is found by asking whether an *exclusive* lock of
//! the opposite byte would be possible. First all is locked, then all is tested: of two who come at the same
//! moment at least one sees the other.

use std::fmt;
use std::fs;
use std::ops::BitOr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, ErrorKind, Result};

/// First byte of the locks for permissions taken.
const TAKEN_BASE: i64 = 100;
/// First byte of the locks for permissions not shared.
const UNSHARED_BASE: i64 = 200;

/// A set of things that can be done with an image.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Reading, with the expectation that what is read makes sense.
    pub const CONSISTENT_READ: Self = Self(1);
    /// Writing.
    pub const WRITE: Self = Self(1 << 1);
    /// Writing what the disk contains already (to allocate).
    pub const WRITE_UNCHANGED: Self = Self(1 << 2);
    /// Changing the size.
    pub const RESIZE: Self = Self(1 << 3);
    /// Everything.
    pub const ALL: Self = Self(0b1111);

    /// qemu's names of the bits, in order.
    const NAMES: [&'static str; 4] = ["consistent read", "write", "write unchanged", "resize"];

    /// Whether all of `other` are in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// This set without those of `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// What is not in this set.
    #[must_use]
    pub const fn complement(self) -> Self {
        Self::ALL.without(self)
    }

    /// The numbers and names of the bits in this set.
    fn bits(self) -> impl Iterator<Item = (i64, &'static str)> {
        (0..).zip(Self::NAMES).filter(move |&(bit, _)| self.0 & (1 << bit) != 0)
    }
}

impl BitOr for Permissions {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.bits().map(|(_, name)| name)).finish()
    }
}

/// What one open file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    taken: Permissions,
    unshared: Permissions,
}

impl Held {
    /// Adds locks: `wanted` is taken, whatever is not in `shared` is denied to others. What was held stays
    /// held, so that a reader can become a writer. On failure nothing has changed.
    ///
    /// Where the file system or kernel has no locks of this kind, nothing is locked and nothing fails.
    ///
    /// # Errors
    /// `Locked`, in qemu's words, if another user of the file excludes it.
    pub fn lock(&mut self, file: &impl AsFd, wanted: Permissions, shared: Permissions) -> Result<()> {
        let new = Self { taken: self.taken | wanted, unshared: self.unshared | shared.complement() };
        match new.take_beyond(file, *self).and_then(|()| test(file, wanted, shared.complement())) {
            Ok(()) => {
                *self = new;
                Ok(())
            }
            Err(error) => {
                new.release_down_to(file, *self);
                error.into_result()
            }
        }
    }

    /// Gives all locks back.
    pub fn unlock(&mut self, file: &impl AsFd) {
        self.release_down_to(file, Self::default());
        *self = Self::default();
    }

    /// The bytes that these locks cover.
    fn bytes(self) -> impl Iterator<Item = i64> {
        let taken = self.taken.bits().map(|(bit, _)| TAKEN_BASE + bit);
        taken.chain(self.unshared.bits().map(|(bit, _)| UNSHARED_BASE + bit))
    }

    /// What is here and not in `other`.
    fn beyond(self, other: Self) -> Self {
        Self { taken: self.taken.without(other.taken), unshared: self.unshared.without(other.unshared) }
    }

    fn take_beyond(self, file: &impl AsFd, held: Self) -> std::result::Result<(), Failure> {
        for byte in self.beyond(held).bytes() {
            set(file, libc::F_RDLCK, byte).map_err(|errno| Failure::of_byte(byte, errno))?;
        }
        Ok(())
    }

    fn release_down_to(self, file: &impl AsFd, kept: Self) {
        for byte in self.beyond(kept).bytes() {
            // Nothing can be done about a failure, and the lock ends with the file at the latest.
            let _ = set(file, libc::F_UNLCK, byte);
        }
    }
}

/// Why locks were not taken.
enum Failure {
    /// There are no such locks here.
    NoLocks,
    /// Someone else holds the opposite.
    Conflict(Error),
}

impl Failure {
    fn of_byte(byte: i64, errno: Errno) -> Self {
        match errno {
            Errno::EAGAIN | Errno::EACCES => {
                Self::Conflict(Error::new(ErrorKind::Locked, format!("Failed to lock byte {byte}")))
            }
            // EINVAL: a kernel before 3.15. The others: file systems without locks.
            _ => Self::NoLocks,
        }
    }

    fn into_result(self) -> Result<()> {
        match self {
            Self::NoLocks => Ok(()),
            Self::Conflict(error) => Err(error),
        }
    }
}

/// Looks for users who exclude permissions in `wanted` or have taken some in `unshared`.
fn test(file: &impl AsFd, wanted: Permissions, unshared: Permissions) -> std::result::Result<(), Failure> {
    for (bit, name) in wanted.bits() {
        test_byte(file, UNSHARED_BASE + bit, || format!("Failed to get \"{name}\" lock"))?;
    }
    for (bit, name) in unshared.bits() {
        test_byte(file, TAKEN_BASE + bit, || format!("Failed to get shared \"{name}\" lock"))?;
    }
    Ok(())
}

fn test_byte(
    file: &impl AsFd,
    byte: i64,
    message: impl FnOnce() -> String,
) -> std::result::Result<(), Failure> {
    let mut lock = record(libc::F_WRLCK, byte);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) if i32::from(lock.l_type) == libc::F_UNLCK => Ok(()),
        Ok(_) => Err(Failure::Conflict(Error::new(ErrorKind::Locked, message()))),
        Err(errno) => Err(Failure::of_byte(byte, errno)),
    }
}

fn set(file: &impl AsFd, kind: i32, byte: i64) -> std::result::Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&record(kind, byte))).map(drop)
}

/// A lock of `kind` on one byte of the file.
#[expect(clippy::cast_possible_truncation, reason = "the kinds of lock and SEEK_SET are tiny constants")]
fn record(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// A process that holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// The name of its program, at most 15 bytes.
    pub name: String,
}

/// A process other than this one that has a lock of the kind used here on `file`, if `/proc` shows one. Only
/// worth its price for an error message: looks through the descriptors of all processes.
pub fn find_holder(file: &fs::File) -> Option<Holder> {
    let metadata = file.metadata().ok()?;
    let inode = format!(":{} ", metadata.ino());
    let own = std::process::id();
    let pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let pid = pids.filter(|&pid: &u32| pid != own).find(|&pid| holds_lock(pid, &inode).unwrap_or(false))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_owned();
    Some(Holder { pid, name })
}

/// Whether a descriptor of process `pid` has an open-file-description lock on the file with this inode number.
fn holds_lock(pid: u32, inode: &str) -> Option<bool> {
    // `lock: 1: OFDLCK  ADVISORY  READ -1 fe:00:1234 201 201`
    let is_lock = |line: &str| line.starts_with("lock:") && line.contains("OFDLCK") && line.contains(inode);
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).ok()?;
    Some(
        descriptors
            .flatten()
            .any(|entry| fs::read_to_string(entry.path()).is_ok_and(|text| text.lines().any(is_lock))),
    )
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::{Child, Command, Stdio};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    /// What a qcow2 writer takes and shares.
    const WRITER: (Permissions, Permissions) = (
        Permissions(Permissions::CONSISTENT_READ.0 | Permissions::WRITE.0 | Permissions::RESIZE.0),
        Permissions(Permissions::CONSISTENT_READ.0 | Permissions::WRITE_UNCHANGED.0),
    );
    /// What a qcow2 reader takes and shares.
    const READER: (Permissions, Permissions) = (
        Permissions::CONSISTENT_READ,
        Permissions(Permissions::CONSISTENT_READ.0 | Permissions::WRITE_UNCHANGED.0),
    );

    fn file() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, [0; 512]).unwrap();
        (dir, path)
    }

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn readers_share_and_writers_exclude() {
        let (_dir, path) = file();
        let (a, b, c) = (open(&path), open(&path), open(&path));
        let (mut reader, mut other, mut writer) = (Held::default(), Held::default(), Held::default());
        reader.lock(&a, READER.0, READER.1).unwrap();
        other.lock(&b, READER.0, READER.1).unwrap();
        let error = writer.lock(&c, WRITER.0, WRITER.1).unwrap_err();
        assert_eq!((error.kind(), error.message()), (ErrorKind::Locked, "Failed to get \"write\" lock"));
        reader.unlock(&a);
        other.unlock(&b);
        // The failed attempt left nothing behind, and a lock held can be asked for again.
        writer.lock(&c, WRITER.0, WRITER.1).unwrap();
        writer.lock(&c, WRITER.0, WRITER.1).unwrap();
        let error = reader.lock(&a, READER.0, READER.1).unwrap_err();
        assert_eq!(error.message(), "Failed to get shared \"write\" lock");
        writer.unlock(&c);
        reader.lock(&a, READER.0, READER.1).unwrap();
    }

    #[test]
    fn a_reader_becomes_a_writer_unless_someone_minds() {
        let (_dir, path) = file();
        let (a, b) = (open(&path), open(&path));
        let (mut first, mut second) = (Held::default(), Held::default());
        first.lock(&a, READER.0, READER.1).unwrap();
        second.lock(&b, READER.0, READER.1).unwrap();
        let before = first;
        assert!(first.lock(&a, WRITER.0, WRITER.1).is_err());
        assert_eq!(first, before);
        second.unlock(&b);
        first.lock(&a, WRITER.0, WRITER.1).unwrap();
        assert!(second.lock(&b, READER.0, READER.1).is_err());
    }

    /// A qemu-io that has `path` open, or nothing if the machine has none.
    struct Qemu(Child);

    impl Qemu {
        fn open(path: &std::path::Path, format: &str, flags: &[&str]) -> Option<Self> {
            let child = Command::new("qemu-io")
                .args(flags)
                .args(["-f", format, "-c", "sleep 60000"])
                .arg(path)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn();
            let Ok(child) = child else {
                eprintln!("SKIPPED: qemu-io is not installed, locks are not compared with qemu's");
                return None;
            };
            let qemu = Self(child);
            let file = open(path);
            let until = Instant::now() + Duration::from_secs(20);
            while find_holder(&file).is_none() {
                assert!(Instant::now() < until, "qemu-io did not open the image");
                thread::sleep(Duration::from_millis(20));
            }
            // It has begun to lock; let it finish.
            thread::sleep(Duration::from_millis(200));
            Some(qemu)
        }
    }

    impl Drop for Qemu {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn qemu_img(arguments: &[&str], path: &std::path::Path) -> String {
        let output = Command::new("qemu-img").args(arguments).arg(path).output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    #[test]
    fn a_running_qemu_is_noticed() {
        let (_dir, path) = file();
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("SKIPPED: qemu-img is not installed, locks are not compared with qemu's");
            return;
        }
        let path = path.with_extension("qcow2");
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status().unwrap();
        let ours = open(&path);
        let mut held = Held::default();
        {
            let Some(_qemu) = Qemu::open(&path, "qcow2", &[]) else { return };
            let error = held.lock(&ours, READER.0, READER.1).unwrap_err();
            assert_eq!(error.message(), "Failed to get shared \"write\" lock");
            let holder = find_holder(&ours).unwrap();
            assert_eq!(holder.name, "qemu-io");
            // A raw user shares all, and so only minds being excluded.
            let error = held.lock(&ours, Permissions::WRITE, Permissions::ALL).unwrap_err();
            assert_eq!(error.message(), "Failed to get \"write\" lock");
            held.lock(&ours, Permissions::CONSISTENT_READ, Permissions::ALL).unwrap();
            held.unlock(&ours);
        }
        {
            let Some(_qemu) = Qemu::open(&path, "qcow2", &["-r"]) else { return };
            held.lock(&ours, READER.0, READER.1).unwrap();
            held.unlock(&ours);
            assert!(held.lock(&ours, WRITER.0, WRITER.1).is_err());
        }
        held.lock(&ours, WRITER.0, WRITER.1).unwrap();
    }

    #[test]
    fn qemu_notices_us() {
        let (_dir, path) = file();
        let path = path.with_extension("qcow2");
        let created =
            Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status();
        if created.is_err() {
            eprintln!("SKIPPED: qemu-img is not installed, locks are not compared with qemu's");
            return;
        }
        let ours = open(&path);
        let mut held = Held::default();
        held.lock(&ours, WRITER.0, WRITER.1).unwrap();
        let said = qemu_img(&["info"], &path);
        assert!(said.contains("Failed to get shared \"write\" lock"), "{said}");
        held.unlock(&ours);
        held.lock(&ours, READER.0, READER.1).unwrap();
        assert_eq!(qemu_img(&["info"], &path), "");
        let said = qemu_img(&["check", "-r", "all"], &path);
        assert!(said.contains("Failed to get \"write\" lock"), "{said}");
    }
}

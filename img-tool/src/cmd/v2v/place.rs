//! Where a converted machine is put: everything is written in a hidden folder first, and gets its names at the end.
//!
//! ```text
//!   DIR/.NAME.vimg-partial/   NAME-sda.qcow2, NAME.xml ...    while the conversion runs; locked
//!   DIR/NAME-sda.qcow2, DIR/NAME.xml ...                      when everything is complete, descriptions last
//! ```
//!
//! What a killed conversion left behind is removed by the next one of the same name. What an earlier one left complete is
//! replaced with `--overwrite`: all files that its report lists, those that have no successor, too, so that no report stands
//! beside files that are not of it; and nothing else.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use block::lock::{Held, Permissions};
use block::{Error, ErrorKind, Result, ResultExt as _};
use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

/// The output folder of one machine.
#[derive(Debug)]
pub(super) struct Place {
    directory: PathBuf,
    partial: PathBuf,
    /// Names within both folders, in the order in which they become visible.
    names: Vec<String>,
    overwrite: bool,
    /// Names of what the report of an earlier conversion lists: they go with it.
    companions: Vec<String>,
    /// The output folder was made for this.
    made: bool,
    /// What is read from (device and inode): nothing of that is replaced.
    sources: Vec<(u64, u64)>,
    /// Images that are going to be replaced, locked against whoever would begin to use them.
    replaced: Vec<(File, Held)>,
    /// Nobody else converts a machine of this name to this folder.
    _lock: Flock<File>,
}

impl Place {
    /// Makes the folders; what an earlier conversion left unfinished goes.
    ///
    /// # Errors
    /// `Locked` if such a conversion is still running; the folder cannot be made.
    pub(super) fn new(directory: &Path, name: &str, overwrite: bool) -> Result<Self> {
        let made = !directory.exists();
        fs::create_dir_all(directory)
            .context(|| format!("could not make the folder '{}'", directory.display()))?;
        let directory =
            directory.canonicalize().context(|| format!("could not find '{}'", directory.display()))?;
        let partial = directory.join(format!(".{name}.vimg-partial"));
        match fs::create_dir(&partial) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            result => result.context(|| format!("could not make the folder '{}'", partial.display()))?,
        }
        let lock = lock(&partial)?;
        let companions = if overwrite { companions(&directory, name) } else { vec![] };
        let place = Self {
            directory,
            partial,
            names: vec![],
            overwrite,
            companions,
            made,
            sources: vec![],
            replaced: vec![],
            _lock: lock,
        };
        place.empty().context(|| "could not remove what an earlier conversion left".to_owned())?;
        if made {
            sync(place.directory.parent());
        }
        Ok(place)
    }

    /// Files that are read from, by device and inode.
    pub(super) fn protect(&mut self, sources: Vec<(u64, u64)>) {
        self.sources = sources;
    }

    /// The final folder.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where temporary files of the conversion may lie.
    pub(super) fn scratch(&self) -> &Path {
        &self.partial
    }

    /// Announces a file: where it is written now, and what it will be called.
    ///
    /// # Errors
    /// There is one of this name already, and it may not be replaced.
    pub(super) fn file(&mut self, name: &str) -> Result<(PathBuf, PathBuf)> {
        let end = self.directory.join(name);
        if !self.overwrite && end.symlink_metadata().is_ok() {
            let error = Error::new(ErrorKind::Usage, format!("'{}' is there already", end.display()));
            return Err(
                error.hint("choose another folder or --name, or allow it to be replaced: --overwrite")
            );
        }
        self.check_replaced(&end)?;
        self.names.push(name.to_owned());
        Ok((self.partial.join(name), end))
    }

    /// What is there already, and may be replaced, must be nobody's: no file of the source, no image in use.
    fn check_replaced(&mut self, end: &Path) -> Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let Ok(meta) = end.metadata() else { return Ok(()) };
        if self.sources.contains(&(meta.dev(), meta.ino())) {
            let error =
                Error::usage(format!("'{}' is a file of the source: it is not replaced", end.display()));
            return Err(error.hint("choose another folder or --name"));
        }
        if !meta.is_file() {
            return Err(Error::usage(format!("'{}' is there already, and is no file", end.display())));
        }
        let file = File::open(end).context(|| format!("could not open '{}'", end.display()))?;
        let mut held = Held::default();
        held.lock(&file, Permissions::WRITE, Permissions::NONE)
            .context(|| format!("'{}' is in use and is not replaced", end.display()))?;
        self.replaced.push((file, held));
        Ok(())
    }

    /// Announces a file and writes it.
    ///
    /// # Errors
    /// As [`file`](Self::file); it cannot be written.
    pub(super) fn write(&mut self, name: &str, bytes: &[u8], executable: bool) -> Result<PathBuf> {
        let (now, end) = self.file(name)?;
        write_durably(&now, bytes, executable)?;
        Ok(end)
    }

    /// Gives everything its name.
    ///
    /// # Errors
    /// A file appeared under one of the names meanwhile; what an earlier conversion left is a file of the source or in use;
    /// the file system failed. What has its name by then keeps it.
    pub(super) fn publish(&mut self) -> Result<()> {
        self.remove_companions()?;
        for name in &self.names {
            let (now, end) = (self.partial.join(name), self.directory.join(name));
            let renamed = if self.overwrite {
                fs::rename(&now, &end).map_err(Error::from)
            } else {
                rename_new(&now, &end)
            };
            renamed.context(|| format!("could not give '{}' its name", end.display()))?;
        }
        self.made = false;
        sync(Some(&self.directory));
        Ok(())
    }

    /// Takes away what an earlier conversion left and this one does not replace; its reports first.
    fn remove_companions(&mut self) -> Result<()> {
        let old: Vec<_> = self.companions.iter().map(|name| self.directory.join(name)).collect();
        let single: Vec<_> =
            self.companions.iter().filter(|name| !self.names.contains(name)).cloned().collect();
        for name in &single {
            self.check_replaced(&self.directory.join(name))?;
        }
        let is_report = |path: &&PathBuf| path.to_string_lossy().contains("-report.");
        let reports = old.iter().filter(is_report).cloned();
        for path in reports.chain(single.iter().map(|name| self.directory.join(name))) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed.context(|| format!("could not remove '{}'", path.display()))?,
            }
        }
        Ok(())
    }

    fn empty(&self) -> std::io::Result<()> {
        for entry in fs::read_dir(&self.partial)? {
            let entry = entry?;
            if entry.file_name() != LOCK {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// The files that the report of an earlier conversion of this name lists as its own: names in the folder itself, that begin
/// with the machine's name.
fn companions(directory: &Path, name: &str) -> Vec<String> {
    /// No report is larger.
    const MOST: u64 = 64 << 20;
    let path = directory.join(format!("{name}-report.json"));
    let is_small = path.symlink_metadata().is_ok_and(|meta| meta.is_file() && meta.len() <= MOST);
    let text = is_small.then(|| fs::read(&path).ok()).flatten().unwrap_or_default();
    let report: Value = serde_json::from_slice(&text).unwrap_or_default();
    if report["name"] != name {
        return vec![];
    }
    let list = |member: &str| report[member].as_array().cloned().unwrap_or_default();
    let disks = list("disks").into_iter().map(|disk| disk["output"].clone());
    let mut found = vec![];
    for file in disks.chain(list("files")).filter_map(|file| file.as_str().map(PathBuf::from)) {
        let Some(own) = file.file_name().and_then(|own| own.to_str()) else { continue };
        let of_name = own.strip_prefix(name).is_some_and(|rest| rest.starts_with(['-', '.']));
        // A disk within a package is no file.
        let is_file = directory.join(own).symlink_metadata().is_ok_and(|meta| meta.is_file());
        if file.parent() == Some(directory) && of_name && is_file && !found.iter().any(|known| known == own) {
            found.push(own.to_owned());
        }
    }
    found
}

/// What is not complete goes.
impl Drop for Place {
    fn drop(&mut self) {
        // Nobody is left to tell; the next conversion of this name tries again.
        drop(self.empty());
        drop(fs::remove_file(self.partial.join(LOCK)));
        drop(fs::remove_dir(&self.partial));
        if self.made {
            // Only if nothing is in it.
            drop(fs::remove_dir(&self.directory));
        }
    }
}

/// Name of the file that is locked.
const LOCK: &str = ".lock";

fn lock(partial: &Path) -> Result<Flock<File>> {
    let path = partial.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.context(|| format!("could not make '{}'", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
        Error::new(ErrorKind::Locked, "a conversion of a machine of this name to this folder is running")
            .hint("wait for it, or choose another --name or folder")
    })
}

/// A rename that replaces nothing, where the file system can do that.
fn rename_new(now: &Path, end: &Path) -> Result<()> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    match renameat2(AT_FDCWD, now, AT_FDCWD, end, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOSYS) if end.symlink_metadata().is_err() => {
            Ok(fs::rename(now, end)?)
        }
        Err(errno) => Err(std::io::Error::from(errno).into()),
    }
}

/// Writes a whole file, which is on its disk afterwards.
fn write_durably(path: &Path, bytes: &[u8], executable: bool) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mode = if executable { 0o777 } else { 0o666 };
    let what = || format!("could not write '{}'", path.display());
    let mut file =
        File::options().create(true).truncate(true).write(true).mode(mode).open(path).context(what)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).context(what)
}

/// Writes a whole file beside its name first, so that it is never seen half.
pub(super) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".vimg-partial");
    let now = path.with_file_name(name);
    write_durably(&now, bytes, false)?;
    fs::rename(&now, path).context(|| format!("could not give '{}' its name", path.display()))
}

/// Makes names durable where the file system can.
fn sync(directory: Option<&Path>) {
    if let Some(directory) = directory.and_then(|directory| File::open(directory).ok()) {
        drop(directory.sync_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_published_vanishes() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let mut place = Place::new(&out, "web", false).unwrap();
        let end = place.write("web.xml", b"<domain/>", false).unwrap();
        assert!(!end.exists());
        drop(place);
        assert!(!out.exists(), "the folder was made for it");
    }

    #[test]
    fn what_is_published_is_complete_and_nothing_else_stays() {
        let folder = tempfile::tempdir().unwrap();
        let mut place = Place::new(folder.path(), "web", false).unwrap();
        let disk = place.write("web-sda.raw", b"disk", false).unwrap();
        let xml = place.write("web.xml", b"<domain/>", false).unwrap();
        place.publish().unwrap();
        drop(place);
        assert_eq!(
            (fs::read(disk).unwrap(), fs::read(xml).unwrap()),
            (b"disk".to_vec(), b"<domain/>".to_vec())
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_there_is_not_replaced_unless_that_is_wanted() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("web.xml"), b"old").unwrap();
        let mut place = Place::new(folder.path(), "web", false).unwrap();
        assert_eq!(place.file("web.xml").unwrap_err().kind(), ErrorKind::Usage);
        // Appeared while the conversion ran.
        let end = place.write("web.sh", b"new", true).unwrap();
        fs::write(&end, b"somebody else's").unwrap();
        assert!(place.publish().is_err());
        drop(place);
        assert_eq!(fs::read(&end).unwrap(), b"somebody else's");
        let mut place = Place::new(folder.path(), "web", true).unwrap();
        place.write("web.xml", b"new", false).unwrap();
        place.publish().unwrap();
        assert_eq!(fs::read(folder.path().join("web.xml")).unwrap(), b"new");
    }

    #[test]
    fn what_an_earlier_conversion_left_goes_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().canonicalize().unwrap();
        let at = |name: &str| directory.join(name);
        let outside = tempfile::tempdir().unwrap();
        let foreign = outside.path().join("web-sdb.raw");
        for path in [
            at("web-sda.raw"),
            at("web-sdb.raw"),
            at("web.ova"),
            at("web-mine.txt"),
            at("db.xml"),
            foreign.clone(),
        ] {
            fs::write(path, b"old").unwrap();
        }
        let report = serde_json::json!({
            "name": "web",
            "disks": [{"output": at("web-sda.raw")}, {"output": at("web-sdb.raw")}, {"output": format!("{}:a.vmdk", at("web.ova").display())}],
            "files": [at("web.ova"), at("web-report.json"), foreign, at("db.xml"), at("../web-x"), "web-mine.txt"],
        });
        fs::write(at("web-report.json"), report.to_string()).unwrap();
        let run = |overwrite| {
            let mut place = Place::new(&directory, "web", overwrite)?;
            place.write("web-sda.raw", b"new", false)?;
            place.write("web-report.json", b"{}", false)?;
            place.publish()
        };
        assert!(run(false).is_err());
        assert_eq!(fs::read(at("web-sdb.raw")).unwrap(), b"old");
        // A conversion that fails takes nothing away.
        drop(Place::new(&directory, "web", true).unwrap());
        assert!(at("web-sdb.raw").exists() && at("web.ova").exists());
        run(true).unwrap();
        assert_eq!(fs::read(at("web-sda.raw")).unwrap(), b"new");
        assert!(!at("web-sdb.raw").exists() && !at("web.ova").exists());
        assert!(at("web-mine.txt").exists() && at("db.xml").exists() && foreign.exists());
        // The report of another machine says nothing of this one's files.
        let other = serde_json::json!({"name": "web2", "files": [at("web-mine.txt")]});
        fs::write(at("web-report.json"), other.to_string()).unwrap();
        run(true).unwrap();
        assert!(at("web-mine.txt").exists());
    }

    #[test]
    fn sources_and_images_in_use_are_not_replaced() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir().unwrap();
        let (own, used) = (folder.path().join("own"), folder.path().join("used"));
        fs::write(&own, b"the only copy").unwrap();
        fs::write(&used, b"a running guest's").unwrap();
        let mut place = Place::new(folder.path(), "web", true).unwrap();
        let meta = own.metadata().unwrap();
        place.protect(vec![(meta.dev(), meta.ino())]);
        assert!(place.file("own").unwrap_err().to_string().contains("file of the source"));
        let guest = File::open(&used).unwrap();
        let mut held = Held::default();
        held.lock(&guest, Permissions::CONSISTENT_READ | Permissions::WRITE, Permissions::CONSISTENT_READ)
            .unwrap();
        assert!(place.file("used").unwrap_err().to_string().contains("in use"));
        held.unlock(&guest);
        place.file("used").unwrap();
    }

    #[test]
    fn remains_are_removed_and_a_running_conversion_is_not_disturbed() {
        let folder = tempfile::tempdir().unwrap();
        let partial = folder.path().join(".web.vimg-partial");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("web-sda.raw"), b"half").unwrap();
        let place = Place::new(folder.path(), "web", false).unwrap();
        assert!(!partial.join("web-sda.raw").exists());
        assert_eq!(Place::new(folder.path(), "web", false).unwrap_err().kind(), ErrorKind::Locked);
        drop(place);
        assert!(!partial.exists());
    }
}

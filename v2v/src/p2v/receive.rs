//! The receiving end: machines come into folders, and are complete or not there.
//!
//! ```text
//!   offer       compare with what is there, and with the room; make NAME.qcow2.partial for each disk
//!      |        .vimg-p2v-receive.json remembers which disks these are, for a copy that goes on later, and the
//!      |        identifier that the sender got: it is another for each offer that is accepted
//!   copy        somebody writes to the devices
//!      |
//!   complete    close the images, give them their names, write machine.json: a source for `vimg v2v`
//! ```
//!
//! How a sender gets to the devices is none of this module's business.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::image::Repair;
use block::size::human;
use block::{Error, ErrorKind, Result, ResultExt as _};
use image::{CreateRequest, Format, OpenOptions, Spec};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::gate::Gate;
use super::offer::{Acceptance, Accepted, Offer, OfferedDisk};
use super::state::{Identity, new_id, write_whole};
use crate::guest::{DiskImage, from_document};

/// The description of the machine.
const MACHINE: &str = "machine.json";
/// Behind the name of an image that is not complete.
pub const PARTIAL: &str = ".partial";
/// What remembers which disks are coming.
const RECORD: &str = ".vimg-p2v-receive.json";
const RECORD_FORMAT: &str = "vimg-p2v-receive";
/// Room that is kept for tables of the images.
const MARGIN: u64 = 64 << 20;

/// Tells how many bytes may still be written to a folder; `None` if that cannot be told.
pub type Free = dyn Fn(&Path) -> Option<u64> + Send + Sync;

/// The receiving end.
pub struct Receiver {
    root: PathBuf,
    format: Format,
    free: Box<Free>,
    intakes: Mutex<BTreeMap<String, Intake>>,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("root", &self.root).finish_non_exhaustive()
    }
}

/// A machine that is coming.
#[derive(Debug)]
struct Intake {
    /// Of the acceptance.
    id: String,
    disks: Vec<Coming>,
}

/// What the record says.
#[derive(Debug)]
struct Record {
    /// Of the last acceptance.
    id: Option<String>,
    disks: Vec<(String, Identity)>,
}

/// A disk that is coming.
#[derive(Debug)]
struct Coming {
    export: String,
    path: PathBuf,
    gate: Arc<Gate>,
}

/// The name of an image that is not complete.
pub fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PARTIAL);
    name.into()
}

/// Returns clusters of an image that an interrupted run has taken and not used.
///
/// # Errors
/// `Corrupt`: more is wrong with it than that; the host failed.
pub fn give_back_leaks(path: &Path, format: Format) -> Result<()> {
    if format.name() != "qcow2" {
        return Ok(());
    }
    let spec = Spec::from_filename(&path.to_string_lossy())?;
    let options =
        OpenOptions { writable: true, resizable: true, format: Some(format), ..OpenOptions::default() };
    let report = image::check::Subject::open(&spec, &options)?.check(Repair::Leaks)?;
    if report.corruptions > 0 {
        let message = format!("'{}' is damaged: {} errors", path.display(), report.corruptions);
        return Err(Error::new(ErrorKind::Corrupt, message).hint("Begin anew with --restart."));
    }
    Ok(())
}

impl Receiver {
    /// Receives into `root`, in images of this format (raw or qcow2).
    pub fn new(root: PathBuf, format: Format, free: Box<Free>) -> Self {
        Self { root, format, free, intakes: Mutex::default() }
    }

    /// A machine wants to come. Where its disks go, in their order.
    ///
    /// # Errors
    /// `Usage`: something of the name is there, or another machine is coming there; `NoSpace`; `Invalid`: the description is
    /// none; the host failed.
    pub fn offer(&self, offer: &Offer) -> Result<Acceptance> {
        let mut intakes = self.intakes.lock();
        let machine =
            from_document(&offer.machine).context(|| "the description of the machine".to_owned())?;
        if machine.disks.len() != offer.disks.len() {
            return Err(Error::invalid("the description has another number of disks than are offered"));
        }
        let folder = self.folder(&offer.folder);
        let known = recorded(&folder)?;
        let same = |known: &Record| known.disks == identities(&offer.disks);
        let begun = known.as_ref().is_some_and(same) && !offer.restart;
        self.refuse_what_is_there(&folder, offer, known.is_some(), begun)?;
        // Whoever was at it before writes no more.
        if let Some(old) = intakes.remove(&offer.folder) {
            close(old.disks)?;
        }
        if !begun {
            for disk in &offer.disks {
                let _ = fs::remove_file(partial(&self.image(&folder, disk)));
            }
        }
        self.refuse_what_does_not_fit(&folder, offer)?;
        fs::create_dir_all(&folder)
            .map_err(Error::from)
            .context(|| format!("Could not make '{}'", folder.display()))?;
        let id = new_id()?;
        record(&folder, &id, &offer.disks)?;
        let (mut coming, mut accepted) = (vec![], vec![]);
        for disk in &offer.disks {
            let (one, answer) = self.open(&folder, &offer.folder, disk)?;
            coming.push(one);
            accepted.push(answer);
        }
        intakes.insert(offer.folder.clone(), Intake { id: id.clone(), disks: coming });
        let follows = known.filter(|_| begun).and_then(|known| known.id);
        Ok(Acceptance { id, follows, disks: accepted })
    }

    fn folder(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.root.clone() } else { self.root.join(name) }
    }

    fn image(&self, folder: &Path, disk: &OfferedDisk) -> PathBuf {
        folder.join(format!("{}.{}", disk.name, self.format.name()))
    }

    fn refuse_what_is_there(&self, folder: &Path, offer: &Offer, known: bool, begun: bool) -> Result<()> {
        let refuse = |message: String, hint: &str| Err(Error::usage(message).hint(hint));
        if folder.join(MACHINE).exists() {
            let message = format!("there is a complete machine in '{}'", folder.display());
            return refuse(message, "Choose another folder: it is the name behind the host in the URI.");
        }
        for disk in &offer.disks {
            let image = self.image(folder, disk);
            if image.exists() {
                let message = format!("'{}' is there already", image.display());
                return refuse(message, "Choose another folder: it is the name behind the host in the URI.");
            }
            if !begun && !offer.restart && (known || partial(&image).exists()) {
                let message = format!("'{}' is for another machine that is half copied", folder.display());
                return refuse(message, "Choose another folder, or begin anew with --restart.");
            }
        }
        Ok(())
    }

    fn refuse_what_does_not_fit(&self, folder: &Path, offer: &Offer) -> Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        // The nearest folder that is there.
        let there = folder.ancestors().find(|path| path.exists()).unwrap_or(&self.root);
        let Some(free) = (self.free)(there) else { return Ok(()) };
        let present = |disk: &OfferedDisk| {
            let taken =
                fs::metadata(partial(&self.image(folder, disk))).map_or(0, |file| file.blocks() * 512);
            disk.data_bytes.min(disk.identity.size_bytes).saturating_sub(taken)
        };
        let needed = offer.disks.iter().map(present).fold(MARGIN, u64::saturating_add);
        if needed <= free {
            return Ok(());
        }
        let message = format!(
            "the disks hold up to {}, and {} are free in '{}'",
            human(needed),
            human(free),
            there.display()
        );
        Err(Error::new(ErrorKind::NoSpace, message))
    }

    fn open(&self, folder: &Path, name: &str, disk: &OfferedDisk) -> Result<(Coming, Accepted)> {
        let path = self.image(folder, disk);
        let partial = partial(&path);
        let begun = partial.exists();
        let filename = partial.to_string_lossy().into_owned();
        if begun {
            give_back_leaks(&partial, self.format)?;
        } else {
            let size = Some(disk.identity.size_bytes);
            image::create(&CreateRequest { size, ..CreateRequest::new(filename.clone(), self.format) })?;
        }
        let options = OpenOptions { writable: true, format: Some(self.format), ..OpenOptions::default() };
        let device = image::open(&Spec::from_filename(&filename)?, &options)?.device();
        if device.size() != disk.identity.size_bytes {
            let message = format!("'{}' has {} bytes", partial.display(), device.size());
            return Err(Error::invalid(message).hint("Begin anew with --restart."));
        }
        let export = if name.is_empty() { disk.name.clone() } else { format!("{name}/{}", disk.name) };
        let image = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let coming = Coming { export: export.clone(), path, gate: Arc::new(Gate::new(device)) };
        Ok((coming, Accepted { export, image, format: self.format.name().to_owned(), begun }))
    }

    /// The device behind an export's name.
    pub fn device(&self, export: &str) -> Option<Arc<Gate>> {
        let intakes = self.intakes.lock();
        let found = intakes.values().flat_map(|intake| &intake.disks).find(|coming| coming.export == export);
        found.map(|coming| Arc::clone(&coming.gate))
    }

    /// All disks of the machine in a folder are there, says who got this identifier. Where it is.
    ///
    /// # Errors
    /// `Usage`: somebody else has taken the machine over since; `NotFound`: no machine is coming there; `Invalid`: the description is none, or names other images; the host failed.
    pub fn complete(&self, name: &str, id: &str, machine: &Value) -> Result<PathBuf> {
        let mut intakes = self.intakes.lock();
        let folder = self.folder(name);
        let text = format!("{machine:#}\n");
        let Some(intake) = intakes.get(name) else {
            // The answer to this very request may have been lost.
            if fs::read_to_string(folder.join(MACHINE)).is_ok_and(|known| known == text) {
                return Ok(folder);
            }
            return Err(Error::new(ErrorKind::NotFound, "no machine is coming there"));
        };
        if intake.id != id {
            let message = format!("another run of vimg p2v has taken over '{}'", folder.display());
            return Err(Error::usage(message).hint("One of them has to end: wait for the other."));
        }
        let images: Vec<_> = intake.disks.iter().filter_map(|one| one.path.file_name()?.to_str()).collect();
        check_description(machine, &images)?;
        let coming = intakes.remove(name).map(|intake| intake.disks).unwrap_or_default();
        let paths: Vec<PathBuf> = coming.iter().map(|one| one.path.clone()).collect();
        close(coming)?;
        for path in &paths {
            fs::rename(partial(path), path)
                .map_err(Error::from)
                .context(|| format!("Could not rename the image to '{}'", path.display()))?;
        }
        write_whole(&folder.join(MACHINE), &text)?;
        let _ = fs::remove_file(folder.join(RECORD));
        Ok(folder)
    }

    /// Makes everything that has come durable. What is not complete stays as it is, and can go on later.
    ///
    /// # Errors
    /// The host failed.
    pub fn close(&self) -> Result<()> {
        let all = std::mem::take(&mut *self.intakes.lock());
        all.into_values().map(|intake| close(intake.disks)).fold(Ok(()), Result::and)
    }
}

fn close(coming: Vec<Coming>) -> Result<()> {
    let shut = |one: Coming| one.gate.shut().map_or(Ok(()), |device| device.close());
    coming.into_iter().map(shut).fold(Ok(()), Result::and)
}

/// The description names the images that have come, and no other file.
fn check_description(machine: &Value, images: &[&str]) -> Result<()> {
    let guest = from_document(machine).context(|| "the description of the machine".to_owned())?;
    let is_own = |image: &DiskImage, own: &str| matches!(image, DiskImage::Name { name, .. } if name == own);
    let same = guest.disks.len() == images.len()
        && guest.disks.iter().zip(images).all(|(disk, own)| is_own(&disk.image, own));
    if same { Ok(()) } else { Err(Error::invalid("the description names other images than have come")) }
}

fn identities(disks: &[OfferedDisk]) -> Vec<(String, Identity)> {
    disks.iter().map(|disk| (disk.name.clone(), disk.identity.clone())).collect()
}

/// The disks that are coming into a folder, by its record.
fn recorded(folder: &Path) -> Result<Option<Record>> {
    let path = folder.join(RECORD);
    let Ok(text) = fs::read(&path) else { return Ok(None) };
    let parse = || -> Option<Record> {
        let value: Value = serde_json::from_slice(&text).ok()?;
        let disk = |disk: &Value| {
            let text = |name: &str| disk[name].as_str().map(str::to_owned);
            let (serial, table) = (text("serial")?, text("table")?);
            Some((text("name")?, Identity { size_bytes: disk["size-bytes"].as_u64()?, serial, table }))
        };
        let disks = value["disks"].as_array().filter(|_| value["format"] == RECORD_FORMAT)?;
        let id = value["id"].as_str().map(str::to_owned);
        Some(Record { id, disks: disks.iter().map(disk).collect::<Option<_>>()? })
    };
    let wrong =
        || Error::invalid(format!("'{}' is damaged", path.display())).hint("Remove it to begin anew.");
    parse().map(Some).ok_or_else(wrong)
}

fn record(folder: &Path, id: &str, disks: &[OfferedDisk]) -> Result<()> {
    let disk = |disk: &OfferedDisk| {
        let Identity { size_bytes, serial, table } = &disk.identity;
        json!({"name": disk.name, "size-bytes": size_bytes, "serial": serial, "table": table})
    };
    let disks: Vec<Value> = disks.iter().map(disk).collect();
    write_whole(&folder.join(RECORD), &json!({"format": RECORD_FORMAT, "id": id, "disks": disks}).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Disk, Guest, Origin, document};
    use block::BlockDevice as _;

    fn receiver(root: &Path, free: u64) -> Receiver {
        Receiver::new(root.to_owned(), Format::from_name("qcow2").unwrap(), Box::new(move |_| Some(free)))
    }

    fn machine(names: &[&str]) -> Value {
        let disk = |name: &&str| Disk::new(*name, DiskImage::Name { name: (*name).to_owned(), format: None });
        let disks = names.iter().map(disk).collect();
        document(&Guest { name: "web".to_owned(), origin: Origin::Physical, disks, ..Guest::default() })
    }

    fn offer(folder: &str, serial: &str) -> Offer {
        let disk = |name: &str| OfferedDisk {
            name: name.to_owned(),
            identity: Identity { size_bytes: 1 << 20, serial: serial.to_owned(), table: String::new() },
            data_bytes: 1 << 20,
        };
        let machine = machine(&["/dev/sda", "/dev/sdb"]);
        Offer { folder: folder.to_owned(), restart: false, machine, disks: vec![disk("sda"), disk("sdb")] }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = entries.collect();
        names.sort();
        names
    }

    const PLENTY: u64 = 1 << 40;

    #[test]
    fn a_machine_comes_and_is_complete_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let receiver = receiver(dir.path(), PLENTY);
        let Acceptance { id, disks: accepted, .. } = receiver.offer(&offer("web", "S")).unwrap();
        assert_eq!((accepted[1].export.as_str(), accepted[1].begun), ("web/sdb", false));
        receiver.device("web/sdb").unwrap().write_at(b"bytes", 4096).unwrap();
        assert!(receiver.device("web/sdc").is_none());
        let folder = dir.path().join("web");
        assert_eq!(names(&folder), [RECORD, "sda.qcow2.partial", "sdb.qcow2.partial"]);
        let wrong = receiver.complete("web", &id, &machine(&["sda.qcow2", "/etc/passwd"])).unwrap_err();
        assert_eq!(wrong.kind(), ErrorKind::Invalid);
        let description = machine(&["sda.qcow2", "sdb.qcow2"]);
        assert_eq!(receiver.complete("web", &id, &description).unwrap(), folder);
        assert_eq!(names(&folder), ["machine.json", "sda.qcow2", "sdb.qcow2"]);
        // The same once more, as after a lost answer.
        receiver.complete("web", &id, &description).unwrap();
        receiver.complete("web", &id, &machine(&["sda.qcow2"])).unwrap_err();
        let error = receiver.offer(&offer("web", "S")).unwrap_err();
        assert!(error.to_string().contains("complete machine"), "{error}");
        let guest = crate::source::read(folder.to_str().unwrap(), &Default::default()).unwrap();
        let disks = crate::source::open_disks(&guest, &OpenOptions::default()).unwrap();
        let mut bytes = [0; 5];
        disks[1].layer.device().read_at(&mut bytes, 4096).unwrap();
        assert_eq!(&bytes, b"bytes");
    }

    #[test]
    fn a_copy_goes_on_and_the_one_before_writes_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let first = receiver(dir.path(), PLENTY);
        first.offer(&offer("", "S")).unwrap();
        let old = first.device("sda").unwrap();
        old.write_at(b"1", 0).unwrap();
        assert!(first.offer(&offer("", "S")).unwrap().disks[0].begun);
        old.write_at(b"2", 0).unwrap_err();
        first.close().unwrap();
        // After the receiver has been started again; with two at once, the image is locked.
        let second = receiver(dir.path(), PLENTY);
        assert!(second.offer(&offer("", "S")).unwrap().disks[0].begun);
        let mut byte = [0];
        second.device("sda").unwrap().read_at(&mut byte, 0).unwrap();
        assert_eq!(&byte, b"1");
        assert_eq!(
            receiver(dir.path(), PLENTY).offer(&offer("", "S")).unwrap_err().kind(),
            ErrorKind::Locked
        );
        // Another machine.
        let error = second.offer(&offer("", "T")).unwrap_err();
        assert!(error.to_string().contains("another machine"), "{error}");
        let anew = second.offer(&Offer { restart: true, ..offer("", "T") }).unwrap();
        assert!(!anew.disks[0].begun);
        assert_eq!(anew.follows, None);
        second.device("sda").unwrap().read_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn who_was_the_last_to_write_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let first = receiver(dir.path(), PLENTY);
        let one = first.offer(&offer("web", "S")).unwrap();
        assert_eq!(one.follows, None);
        let two = first.offer(&offer("web", "S")).unwrap();
        assert_eq!(two.follows.as_ref(), Some(&one.id));
        first.close().unwrap();
        // After a restart of the receiver, too.
        let second = receiver(dir.path(), PLENTY);
        let three = second.offer(&offer("web", "S")).unwrap();
        assert_eq!(three.follows.as_ref(), Some(&two.id));
        assert_ne!(three.id, two.id);
        second.close().unwrap();
        drop(second);
        // The folder is gone: who comes after another is not the one before.
        fs::remove_dir_all(dir.path().join("web")).unwrap();
        let third = receiver(dir.path(), PLENTY);
        assert_eq!(third.offer(&offer("web", "S")).unwrap().follows, None);
        assert_ne!(third.offer(&offer("web", "S")).unwrap().follows, Some(three.id));
    }

    #[test]
    fn who_was_taken_over_from_completes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let receiver = receiver(dir.path(), PLENTY);
        let description = machine(&["sda.qcow2", "sdb.qcow2"]);
        let old = receiver.offer(&offer("web", "S")).unwrap();
        for restart in [false, true] {
            let new = receiver.offer(&Offer { restart, ..offer("web", "S") }).unwrap();
            let error = receiver.complete("web", &old.id, &description).unwrap_err();
            assert!(error.to_string().contains("taken over"), "{error}");
            assert_eq!(names(&dir.path().join("web")), [RECORD, "sda.qcow2.partial", "sdb.qcow2.partial"]);
            if restart {
                receiver.complete("web", &new.id, &description).unwrap();
            }
        }
    }

    #[test]
    fn what_does_not_fit_or_is_there_is_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let error = receiver(dir.path(), MARGIN + (1 << 20)).offer(&offer("a", "S")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        assert_eq!(names(dir.path()), [""; 0]);
        fs::write(dir.path().join("sdb.qcow2"), "somebody's").unwrap();
        let error = receiver(dir.path(), PLENTY).offer(&offer("", "S")).unwrap_err();
        assert!(error.to_string().contains("sdb.qcow2' is there already"), "{error}");
        receiver(dir.path(), PLENTY).offer(&Offer { restart: true, ..offer("", "S") }).unwrap_err();
        fs::rename(dir.path().join("sdb.qcow2"), dir.path().join("sdb.qcow2.partial")).unwrap();
        receiver(dir.path(), PLENTY).offer(&offer("", "S")).unwrap_err();
        assert_eq!(fs::read(dir.path().join("sdb.qcow2.partial")).unwrap(), b"somebody's");
        receiver(dir.path(), PLENTY).offer(&Offer { machine: json!({}), ..offer("b", "S") }).unwrap_err();
    }
}

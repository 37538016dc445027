//! Carrying out a plan: exactly what it says, on disks that may be thrown away.
//!
//! First everything that the plan expects is compared with what is there, and the room with what is needed; then the
//! changes are made in their order and brought to the disk; then every file is read again from the disk. An error leaves
//! the disks as they may be: the changes belong into an overlay, which is kept only if all went well.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use block::{Error, ErrorKind, Result, ResultExt as _};
use guestedit::{Attributes, FileKind, GuestFs};

use crate::convert::digest;
use crate::plan::{Action, Change, Plan};

/// The most bytes of a file that is changed.
const MOST_FILE: u64 = 1 << 30;
/// The extended attribute that holds SELinux's label.
const LABEL: &str = "security.selinux";
/// Room that is left for directories, maps and whatever else grows along, in bytes.
const MARGIN: u64 = 64 << 10;

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// How many changes were made.
    pub changes: usize,
    /// Bytes of contents that were written.
    pub bytes: u64,
    /// The volumes that were changed (index), how, and what a person should know of each.
    pub volumes: Vec<AppliedVolume>,
}

/// A volume that was changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AppliedVolume {
    /// Index in [`guestdisk::Disks::volumes`].
    pub volume: usize,
    /// By what ([`GuestFs::backend`]).
    pub backend: String,
    /// What is to be known of its state.
    pub notes: Vec<String>,
}

/// Learns of each change before it is made.
pub trait Listener {
    /// Change `number` (from 1) of `of` is about to be made.
    fn change(&mut self, number: usize, of: usize, change: &Change);
}

impl Listener for () {
    fn change(&mut self, _: usize, _: usize, _: &Change) {}
}

/// Opens the file system of a volume for changes: once before, and once more for reading back.
pub type Open<'a> = dyn FnMut(usize) -> Result<Box<dyn GuestFs>> + 'a;

/// Makes the changes of a plan.
///
/// # Errors
/// `Usage` if a file is not what the plan says it is; `NoSpace` if there is not enough room, before anything is written;
/// `Corrupt` if what is read back is not what was written; whatever the file system or the device says.
pub fn apply(plan: &Plan, open: &mut Open<'_>, listener: &mut dyn Listener) -> Result<Applied> {
    let mut systems = Systems::new();
    for change in &plan.changes {
        let system = system(&mut systems, change, open)?;
        check_old(&mut **system, change).context(|| shown(change))?;
    }
    for (volume, system) in &mut systems {
        check_room(&mut **system, plan, *volume)?;
    }
    let mut done = Applied::default();
    for (number, change) in (1..).zip(&plan.changes) {
        listener.change(number, plan.changes.len(), change);
        let system = system(&mut systems, change, open)?;
        one(&mut **system, change).context(|| shown(change))?;
        done.changes += 1;
        done.bytes += change.action.bytes().len() as u64;
    }
    for (volume, mut system) in systems {
        system.sync()?;
        let (backend, notes) = (system.backend().to_owned(), system.notes());
        done.volumes.push(AppliedVolume { volume, backend, notes });
    }
    read_back(plan, open)?;
    Ok(done)
}

/// File systems by their volumes.
type Systems = BTreeMap<usize, Box<dyn GuestFs>>;

/// The file system of a change, opened if it was not yet.
fn system<'a>(
    systems: &'a mut Systems,
    change: &Change,
    open: &mut Open<'_>,
) -> Result<&'a mut Box<dyn GuestFs>> {
    match systems.entry(change.volume) {
        Entry::Occupied(entry) => Ok(entry.into_mut()),
        Entry::Vacant(entry) => Ok(entry.insert(open(change.volume)?)),
    }
}

fn shown(change: &Change) -> String {
    change.guest_path.display().to_string()
}

/// The digest of what is at a path: of a file its contents, of a link its target. Empty for anything else, `None` for
/// nothing.
fn digest_at(system: &mut dyn GuestFs, path: &Path) -> Result<Option<String>> {
    let Some(stat) = system.stat(path)? else { return Ok(None) };
    Ok(Some(match stat.kind {
        FileKind::File => digest(&system.read(path, MOST_FILE)?),
        FileKind::Symlink => digest(system.read_link(path)?.as_os_str().as_encoded_bytes()),
        _ => String::new(),
    }))
}

/// Whether the file is what the plan was made for.
fn check_old(system: &mut dyn GuestFs, change: &Change) -> Result<()> {
    let found = digest_at(system, &change.path)?;
    let as_planned = match (&found, change.old_digest.as_str()) {
        (None, "") => true,
        (Some(found), old) => found == old && !old.is_empty(),
        (None, _) => false,
    };
    if as_planned {
        return Ok(());
    }
    let message = match found {
        None => "it is not there any more".to_owned(),
        Some(_) if change.old_digest.is_empty() => "it is there already".to_owned(),
        Some(found) => format!("its SHA-256 is {found}, the plan was made for {}", change.old_digest),
    };
    Err(Error::usage(message).hint("Make a new plan: the guest has changed since this one was made."))
}

/// Whether there is room for everything, counted as if nothing became free.
fn check_room(system: &mut dyn GuestFs, plan: &Plan, volume: usize) -> Result<()> {
    let own = || plan.changes.iter().filter(|change| change.volume == volume);
    let (mut bytes, mut inodes) = (0_u64, 0_u64);
    for change in own() {
        match &change.action {
            Action::Append { bytes: more } => bytes += more.len() as u64,
            Action::Replace { bytes: new } => {
                let old = system.stat(&change.path)?.map_or(0, |stat| stat.size);
                bytes += (new.len() as u64).saturating_sub(old);
            }
            Action::Create { bytes: new, .. } => {
                bytes += new.len() as u64;
                inodes += 1;
            }
            Action::CreateDirectory { .. } | Action::Symlink { .. } => inodes += 1,
            Action::Remove => {}
        }
    }
    // What only changes bytes that are there needs no room.
    if bytes == 0 && inodes == 0 {
        return Ok(());
    }
    let free = system.free()?;
    let lacks = |what: &str, need: u64, has: u64| {
        let path = own().next().map(shown).unwrap_or_default();
        Error::new(
            ErrorKind::NoSpace,
            format!("the file system of {path} has {has} {what} free, {need} are needed"),
        )
        .hint("Remove what is not needed in the guest (old kernels in /boot, for example) and try again.")
    };
    let need = bytes.saturating_add(MARGIN);
    if free.bytes < need && system.backend() != "in-place" {
        return Err(lacks("bytes", need, free.bytes));
    }
    match free.inodes {
        Some(free) if free < inodes => Err(lacks("inodes", inodes, free)),
        _ => Ok(()),
    }
}

fn one(system: &mut dyn GuestFs, change: &Change) -> Result<()> {
    let path = change.path.as_path();
    match &change.action {
        Action::Replace { bytes } => system.replace(path, bytes),
        Action::Append { bytes } => {
            let mut whole = system.read(path, MOST_FILE)?;
            whole.extend_from_slice(bytes);
            system.replace(path, &whole)
        }
        Action::Create { bytes, mode } => {
            if system.stat(path)?.is_some() {
                system.remove(path)?;
            }
            let like = attributes(system, path, *mode)?;
            system.create(path, bytes, &like)
        }
        Action::CreateDirectory { mode } => {
            let like = attributes(system, path, *mode)?;
            system.mkdir(path, &like)
        }
        Action::Symlink { target } => {
            if system.stat(path)?.is_some() {
                system.remove(path)?;
            }
            let like = attributes(system, path, 0o777)?;
            system.symlink(path, target, &like)
        }
        Action::Remove => system.remove(path),
    }
}

/// What a new file is given: the label of a file beside it, or of its folder.
fn attributes(system: &mut dyn GuestFs, path: &Path, mode: u32) -> Result<Attributes> {
    let mut attributes = Attributes::mode(mode);
    let folder = path.parent().unwrap_or(Path::new("/"));
    let Ok(Some(own)) = system.xattr(folder, LABEL) else { return Ok(attributes) };
    let beside = system.list(folder)?;
    let sibling =
        beside.iter().find(|entry| entry.kind == FileKind::File && folder.join(&entry.name) != path);
    let label = match sibling {
        Some(sibling) => system.xattr(&folder.join(&sibling.name), LABEL)?.unwrap_or(own),
        None => own,
    };
    attributes.xattrs.push((LABEL.as_bytes().to_vec(), label));
    Ok(attributes)
}

/// Reads everything again, from the disk.
fn read_back(plan: &Plan, open: &mut Open<'_>) -> Result<()> {
    let mut systems = Systems::new();
    for change in &plan.changes {
        let system = system(&mut systems, change, open)?;
        let found = digest_at(&mut **system, &change.path)?;
        let expected = match &change.action {
            Action::Remove => None,
            _ => Some(change.new_digest.clone()),
        };
        if found != expected {
            let message = format!("{}: what was read back is not what was written", shown(change));
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
    }
    Ok(())
}

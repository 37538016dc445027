//! A plan in the making: files are read through it, so that what was changed already is changed further.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use block::Result;
use guestdisk::fs::FileKind;
use sha2::{Digest as _, Sha256};

use super::text::{self, Encoding};
use super::tree::{Place, Tree};
use crate::plan::{Action, Change, Plan, Stop};

/// The most bytes of a text that is edited.
const MOST_TEXT: u64 = 4 << 20;
/// The most bytes of any file that is appended to or copied.
pub(crate) const MOST_FILE: u64 = 1 << 30;

/// Why a change is made and what undoes it.
#[derive(Debug, Clone)]
pub(crate) struct Why {
    /// The topic, one of those of [`Change::topic`].
    pub(crate) topic: &'static str,
    pub(crate) reason: String,
    pub(crate) undo: String,
    /// The guest does not start by itself without it.
    pub(crate) needed: bool,
}

impl Why {
    pub(crate) fn new(topic: &'static str, reason: impl Into<String>, undo: impl Into<String>) -> Self {
        Self { topic, reason: reason.into(), undo: undo.into(), needed: false }
    }

    /// The same of what the guest does not start by itself without.
    pub(crate) fn needed(self, needed: bool) -> Self {
        Self { needed, ..self }
    }
}

/// What is going to be at a place.
#[derive(Debug, Clone)]
enum State {
    Bytes(Vec<u8>),
    Appended(Vec<u8>),
    Directory,
    Link(PathBuf),
    Gone,
}

#[derive(Debug)]
struct Pending {
    place: Place,
    guest_path: PathBuf,
    /// What was there; `None` if nothing.
    old: Option<Old>,
    state: State,
    mode: u32,
    why: Vec<Why>,
}

#[derive(Debug)]
enum Old {
    Bytes(Vec<u8>),
    Digest(String),
    /// The digest in the making, which what is added at the end goes into.
    Appended(Box<Sha256>),
    Link(PathBuf),
}

/// The plan so far.
pub(crate) struct Draft<'a> {
    tree: &'a dyn Tree,
    pending: Vec<Pending>,
    index: HashMap<Place, usize>,
    pub(crate) left_alone: Vec<String>,
    pub(crate) to_do: Vec<String>,
    pub(crate) stops: Vec<Stop>,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(tree: &'a dyn Tree) -> Self {
        Self {
            tree,
            pending: vec![],
            index: HashMap::new(),
            left_alone: vec![],
            to_do: vec![],
            stops: vec![],
        }
    }

    pub(crate) fn tree(&self) -> &'a dyn Tree {
        self.tree
    }

    /// Says once what was left alone.
    pub(crate) fn leave(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.left_alone.contains(&note) {
            self.left_alone.push(note);
        }
    }

    /// Says once what a person has to do.
    pub(crate) fn ask(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.to_do.contains(&note) {
            self.to_do.push(note);
        }
    }

    /// Says once what keeps the guest from starting, in the words of an error, and the way out.
    pub(crate) fn stop(&mut self, message: impl Into<String>, hint: impl Into<String>) {
        let stop = Stop { message: message.into(), hint: hint.into() };
        if !self.stops.contains(&stop) {
            self.stops.push(stop);
        }
    }

    fn state(&self, place: &Place) -> Option<&State> {
        self.index.get(place).and_then(|index| self.pending.get(*index)).map(|pending| &pending.state)
    }

    /// The bytes of a file as they will be; `None` if there is none or it cannot be read, which is noted.
    pub(crate) fn bytes(&mut self, place: &Place, max_bytes: u64) -> Option<Vec<u8>> {
        match self.state(place) {
            Some(State::Bytes(bytes)) => return Some(bytes.clone()),
            Some(State::Appended(_)) | None => {}
            Some(_) => return None,
        }
        match self.tree.read(place, max_bytes) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.leave(format!("{}: not looked at: {error}", place.path.display()));
                None
            }
        }
    }

    /// A text at a path of the guest, as it will be.
    pub(crate) fn text(&mut self, path: impl AsRef<Path>) -> Option<String> {
        let place = self.tree.locate(path.as_ref())?;
        self.bytes(&place, MOST_TEXT).map(|bytes| text::decode(&bytes).0)
    }

    /// Whether there is a file or folder, links followed, and it will stay.
    pub(crate) fn exists(&self, path: impl AsRef<Path>) -> bool {
        let Some(place) = self.tree.locate(path.as_ref()) else { return false };
        match self.state(&place) {
            Some(State::Gone) => false,
            Some(_) => true,
            None => self.tree.stat(&place).is_some(),
        }
    }

    /// Changes a text at a path of the guest. Nothing happens if there is none, or `edit` changes nothing.
    pub(crate) fn edit(&mut self, path: impl AsRef<Path>, why: Why, edit: impl FnOnce(&str) -> String) {
        let path = path.as_ref();
        if let Some(place) = self.tree.locate(path) {
            self.edit_at(&place, path, why, edit);
        }
    }

    /// As [`edit`](Self::edit), for a file by its place.
    pub(crate) fn edit_at(
        &mut self,
        place: &Place,
        guest_path: &Path,
        why: Why,
        edit: impl FnOnce(&str) -> String,
    ) {
        let Some(old) = self.bytes(place, MOST_TEXT) else { return };
        let (decoded, encoding): (String, Encoding) = text::decode(&old);
        let new = edit(&decoded);
        if new != decoded {
            self.put(place.clone(), guest_path, State::Bytes(text::encode(&new, encoding)), 0o644, why);
        }
    }

    /// Gives a file these contents: a new one with `mode`, or another text for one that is there.
    pub(crate) fn write(&mut self, path: impl AsRef<Path>, bytes: Vec<u8>, mode: u32, why: Why) {
        let path = path.as_ref();
        let Some(place) = self.make_way(path, &why) else { return };
        self.write_at(place, path, bytes, mode, why);
    }

    /// As [`write`](Self::write), for a file by its place, whose folder exists.
    pub(crate) fn write_at(&mut self, place: Place, guest_path: &Path, bytes: Vec<u8>, mode: u32, why: Why) {
        if self.bytes(&place, MOST_FILE).as_ref() != Some(&bytes) {
            self.put(place, guest_path, State::Bytes(bytes), mode, why);
        }
    }

    /// Adds bytes at the end of a file that is there.
    pub(crate) fn append(&mut self, place: Place, guest_path: &Path, bytes: Vec<u8>, why: Why) {
        self.put(place, guest_path, State::Appended(bytes), 0o644, why);
    }

    /// A symbolic link, in place of one to something else if there is one. A file of this name is left alone, which is
    /// said: nothing would bring it back.
    pub(crate) fn link(&mut self, path: impl AsRef<Path>, target: impl Into<PathBuf>, why: Why) {
        let (path, target) = (path.as_ref(), target.into());
        if self.tree.link(path).as_ref() == Some(&target) {
            return;
        }
        if self.tree.kind(path).is_some_and(|kind| kind != FileKind::Symlink) {
            self.leave(format!("{} is a file of its own and stays: {}.", path.display(), why.reason));
            return;
        }
        if let Some(place) = self.make_way_to_link(path, &why) {
            self.put(place, path, State::Link(target), 0o777, why);
        }
    }

    /// Takes a name away, the link itself if it is one. Nothing happens if there is none.
    pub(crate) fn remove(&mut self, path: impl AsRef<Path>, why: Why) {
        let path = path.as_ref();
        if self.tree.kind(path).is_none() {
            return;
        }
        if let Some(place) = self.own_place(path) {
            self.put(place, path, State::Gone, 0, why);
        }
    }

    /// A folder and those above it, by its place on a volume.
    pub(crate) fn make_directories_at(&mut self, folder: &Place, guest_path: &Path, why: &Why) {
        let depth = folder.path.iter().count();
        for up in (0..depth).rev() {
            let Some(path) = folder.path.ancestors().nth(up) else { continue };
            let place = Place { volume: folder.volume, path: path.to_owned() };
            if self.state(&place).is_none() && self.tree.stat(&place).is_none() {
                let guest = guest_path.ancestors().nth(up).unwrap_or(guest_path).to_owned();
                self.put(place, &guest, State::Directory, 0o755, why.clone());
            }
        }
    }

    /// Where a name itself lies, without following it.
    fn own_place(&self, path: &Path) -> Option<Place> {
        let folder = self.tree.locate(path.parent()?)?;
        Some(Place { volume: folder.volume, path: folder.path.join(path.file_name()?) })
    }

    /// Where a file is going to lie; the folders that lack are made.
    fn make_way(&mut self, path: &Path, why: &Why) -> Option<Place> {
        if let Some(place) = self.tree.locate(path) {
            return Some(place);
        }
        self.make_way_to_link(path, why)
    }

    fn make_way_to_link(&mut self, path: &Path, why: &Why) -> Option<Place> {
        let parent = path.parent()?;
        let folder = match self.tree.locate(parent) {
            Some(folder) => folder,
            None => self.make_way_to_link(parent, why)?,
        };
        let missing = self.state(&folder).is_none() && self.tree.stat(&folder).is_none();
        if missing {
            self.put(folder.clone(), parent, State::Directory, 0o755, why.clone());
        }
        Some(Place { volume: folder.volume, path: folder.path.join(path.file_name()?) })
    }

    fn put(&mut self, place: Place, guest_path: &Path, state: State, mode: u32, why: Why) {
        if let Some(pending) = self.index.get(&place).and_then(|index| self.pending.get_mut(*index)) {
            pending.state = state;
            if !pending.why.iter().any(|known| known.reason == why.reason) {
                pending.why.push(why);
            }
            return;
        }
        let old = match self.tree.stat(&place) {
            None => None,
            Some((FileKind::Symlink, _)) => {
                let target = self.tree.link(guest_path).unwrap_or_default();
                Some(Old::Link(target))
            }
            Some((FileKind::Directory, _)) => Some(Old::Digest(String::new())),
            Some(_) => match self.tree.read(&place, MOST_FILE) {
                Ok(Some(bytes)) if matches!(state, State::Appended(_)) => {
                    Some(Old::Appended(Box::new(Sha256::new_with_prefix(&bytes))))
                }
                Ok(bytes) => bytes.map(Old::Bytes),
                Err(_) => Some(Old::Digest(String::new())),
            },
        };
        self.index.insert(place.clone(), self.pending.len());
        self.pending.push(Pending {
            place,
            guest_path: guest_path.to_owned(),
            old,
            state,
            mode,
            why: vec![why],
        });
    }

    /// The plan.
    ///
    /// # Errors
    /// A file that is appended to could not be read again.
    pub(crate) fn finish(self) -> Result<Plan> {
        let mut changes = vec![];
        for pending in self.pending {
            if let Some(change) = change(self.tree, pending)? {
                changes.push(change);
            }
        }
        Ok(Plan { changes, left_alone: self.left_alone, to_do: self.to_do, stops: self.stops })
    }
}

fn change(tree: &dyn Tree, pending: Pending) -> Result<Option<Change>> {
    let Pending { place, guest_path, old, state, mode, why } = pending;
    let old_digest = match &old {
        None => String::new(),
        Some(Old::Bytes(bytes)) => digest(bytes),
        Some(Old::Digest(digest)) => digest.clone(),
        Some(Old::Appended(whole)) => hexadecimal(&whole.clone().finalize()),
        Some(Old::Link(target)) => digest(target.as_os_str().as_encoded_bytes()),
    };
    let old_text = match &old {
        Some(Old::Bytes(bytes)) => readable(bytes),
        Some(Old::Link(target)) => Some(format!("-> {}", target.display())),
        Some(Old::Digest(_) | Old::Appended(_)) => None,
        None => Some(String::new()),
    };
    let (new_digest, new_text) = match &state {
        State::Bytes(bytes) => (digest(bytes), readable(bytes)),
        State::Appended(more) => {
            let mut whole = match &old {
                Some(Old::Appended(whole)) => Sha256::clone(whole),
                _ => Sha256::new_with_prefix(tree.read(&place, MOST_FILE)?.unwrap_or_default()),
            };
            whole.update(more);
            (hexadecimal(&whole.finalize()), None)
        }
        State::Directory => (String::new(), None),
        State::Link(target) => {
            let bytes = target.as_os_str().as_encoded_bytes();
            (digest(bytes), Some(format!("-> {}", target.display())))
        }
        State::Gone => (String::new(), Some(String::new())),
    };
    if matches!((&old, &state), (Some(Old::Bytes(old)), State::Bytes(new)) if old == new) {
        return Ok(None);
    }
    let action = match (state, &old) {
        (State::Bytes(bytes), Some(Old::Bytes(_) | Old::Digest(_) | Old::Appended(_))) => {
            Action::Replace { bytes }
        }
        (State::Bytes(bytes), _) => Action::Create { bytes, mode },
        (State::Appended(bytes), _) => Action::Append { bytes },
        (State::Directory, _) => Action::CreateDirectory { mode },
        (State::Link(target), _) => Action::Symlink { target },
        (State::Gone, None) => return Ok(None),
        (State::Gone, Some(_)) => Action::Remove,
    };
    let join = |what: fn(&Why) -> &str| {
        let mut parts: Vec<&str> = vec![];
        for part in why.iter().map(what) {
            if !part.is_empty() && !parts.contains(&part) {
                parts.push(part);
            }
        }
        parts.join("; ")
    };
    let (reason, undo) = (join(|why| &why.reason), join(|why| &why.undo));
    let topic = why.first().map_or("", |why| why.topic);
    let needed = why.iter().any(|why| why.needed);
    let diff = match (old_text, new_text) {
        (Some(old), Some(new)) => text::diff(&old, &new),
        _ => vec![],
    };
    let Place { volume, path } = place;
    let change = Change {
        volume,
        path,
        guest_path,
        action,
        topic,
        reason,
        undo,
        old_digest,
        new_digest,
        diff,
        needed,
    };
    Ok(Some(change))
}

/// The text of a file that people can read.
fn readable(bytes: &[u8]) -> Option<String> {
    const MOST: usize = 1 << 20;
    (bytes.len() <= MOST && !bytes.contains(&0)).then(|| text::decode(bytes).0)
}

/// SHA-256 in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::super::tree::memory::Memory;
    use super::*;

    fn why(reason: &str) -> Why {
        Why::new("console", reason, "")
    }

    #[test]
    fn edits_of_a_file_come_together() {
        let tree = Memory::default().file("/etc/a", "one two");
        let mut draft = Draft::new(&tree);
        draft.edit("/etc/a", why("first"), |text| text.replace("one", "1"));
        draft.edit("/etc/a", why("second"), |text| text.replace("two", "2"));
        draft.edit("/etc/absent", why("never"), |_| "x".to_owned());
        let plan = draft.finish().unwrap();
        let [change] = &plan.changes[..] else { panic!("{plan:?}") };
        assert_eq!(change.action, Action::Replace { bytes: b"1 2".to_vec() });
        assert_eq!(change.reason, "first; second");
        assert_eq!(change.diff, ["-one two", "+1 2"]);
        assert_eq!(change.old_digest, digest(b"one two"));
    }

    #[test]
    fn an_edit_and_its_reverse_are_no_change() {
        let tree = Memory::default().file("/etc/a", "one");
        let mut draft = Draft::new(&tree);
        draft.edit("/etc/a", why("there"), |_| "two".to_owned());
        draft.edit("/etc/a", why("back"), |_| "one".to_owned());
        assert!(draft.finish().unwrap().changes.is_empty());
    }

    #[test]
    fn folders_are_made_on_the_way() {
        let tree = Memory::default().folder("/etc");
        let mut draft = Draft::new(&tree);
        draft.write("/etc/x/y/z.conf", b"z".to_vec(), 0o600, why("new"));
        draft.write("/etc/x/y/w.conf", b"w".to_vec(), 0o600, why("new"));
        draft.link("/etc/x/l", "/dev/null", why("mask"));
        let paths: Vec<_> = draft.finish().unwrap().changes.into_iter().map(|change| change.path).collect();
        assert_eq!(
            paths,
            ["/etc/x", "/etc/x/y", "/etc/x/y/z.conf", "/etc/x/y/w.conf", "/etc/x/l"].map(PathBuf::from)
        );
    }

    #[test]
    fn files_are_changed_where_links_lead() {
        let tree = Memory { boot: true, ..Memory::default() };
        let tree = tree.file("/boot/grub2/grub.cfg", "a").link_to("/etc/grub2.cfg", "../boot/grub2/grub.cfg");
        let mut draft = Draft::new(&tree);
        draft.edit("/etc/grub2.cfg", why("one"), |_| "b".to_owned());
        draft.edit("/boot/grub2/grub.cfg", why("two"), |text| format!("{text}c"));
        let plan = draft.finish().unwrap();
        assert_eq!((plan.changes.len(), plan.changes[0].volume), (1, 1));
        assert_eq!(plan.changes[0].path, Path::new("/grub2/grub.cfg"));
        assert_eq!(plan.changes[0].action, Action::Replace { bytes: b"bc".to_vec() });
    }

    #[test]
    fn links_and_removals() {
        let tree =
            Memory::default().link_to("/etc/a.service", "/usr/a").link_to("/etc/b.service", "/dev/null");
        let tree = tree.file("/etc/own.service", "[Service]");
        let mut draft = Draft::new(&tree);
        draft.link("/etc/a.service", "/dev/null", why("mask"));
        draft.link("/etc/b.service", "/dev/null", why("mask"));
        draft.link("/etc/own.service", "/dev/null", why("mask"));
        draft.remove("/etc/c", why("gone"));
        let plan = draft.finish().unwrap();
        let [change] = &plan.changes[..] else { panic!("{plan:?}") };
        assert_eq!(change.diff, ["--> /usr/a", "+-> /dev/null"]);
        assert_eq!(plan.left_alone, ["/etc/own.service is a file of its own and stays: mask."]);
    }
}

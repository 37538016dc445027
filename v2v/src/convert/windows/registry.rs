//! A hive that is changed value by value: one change of the plan, whose reason lists what was set.

use std::path::Path;

use block::{Error, Result};
use hive::{Hive, Value};

use super::super::draft::{Draft, MOST_FILE, Why};
use super::super::tree::Place;
use crate::inspect::{Windows, open_hive};

/// A hive in the making.
pub(super) struct Registry {
    hive: Hive,
    place: Place,
    /// What was set, for people.
    edits: Vec<String>,
    /// The first thing that failed.
    error: Option<Error>,
}

impl Registry {
    /// The hive `SYSTEM`.
    ///
    /// # Errors
    /// As [`open_file`](Self::open_file).
    pub(super) fn open(draft: &mut Draft<'_>, root: usize, facts: &Windows) -> Result<Self> {
        Self::open_file(draft, root, &facts.system_hive)
    }

    /// A hive by its file on the root volume.
    ///
    /// # Errors
    /// It is damaged, or was not closed and its logs do not fit.
    pub(super) fn open_file(draft: &mut Draft<'_>, root: usize, path: &Path) -> Result<Self> {
        let tree = draft.tree();
        let place = |path: &Path| Place { volume: root, path: path.to_owned() };
        let hive = open_hive(path, &mut |path| tree.read(&place(path), MOST_FILE))?;
        Ok(Self { hive, place: place(path), edits: vec![], error: None })
    }

    /// Whether there is a key. Damage counts as absence.
    pub(super) fn has(&self, path: &str) -> bool {
        self.hive.find(path).is_ok_and(|key| key.is_some())
    }

    /// A text.
    pub(super) fn text(&self, path: &str, name: &str) -> Option<String> {
        let key = self.hive.find(path).ok()??;
        self.hive.value(key, name).ok()??.as_text()
    }

    /// Sets a value, and makes the keys above it that are missing.
    pub(super) fn set(&mut self, path: &str, name: &str, value: Value) {
        let done = self.try_set(path, name, &value);
        match done {
            Ok(true) => self.edits.push(format!(
                "{path}\\{} = {}",
                if name.is_empty() { "@" } else { name },
                shown(&value)
            )),
            Ok(false) => {}
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }

    /// Whether that was a change.
    fn try_set(&mut self, path: &str, name: &str, value: &Value) -> Result<bool> {
        let key = self.hive.create(path)?;
        if self.hive.value(key, name)?.as_ref() == Some(value) {
            return Ok(false);
        }
        self.hive.set(key, name, value)?;
        Ok(true)
    }

    /// The hive as a change of the plan, if anything was set.
    pub(super) fn finish(self, draft: &mut Draft<'_>) {
        if let Some(error) = self.error {
            let message = format!("{} could not be changed: {error}", self.place.path.display());
            draft.stop(message, "attach the disks by SATA (--bus sata)");
            return;
        }
        if self.edits.is_empty() {
            return;
        }
        let reason = format!("drivers and services for KVM are registered: {}", self.edits.join(", "));
        let why = Why::new("windows-registry", reason, "set these values back with regedit");
        let path = self.place.path.clone();
        draft.write_at(self.place, &path, self.hive.into_bytes(), 0o644, why);
    }
}

fn shown(value: &Value) -> String {
    if let Some(number) = value.as_number() {
        return number.to_string();
    }
    match (value.as_text(), value.as_list()) {
        (Some(text), _) => format!("'{text}'"),
        (None, Some(list)) => format!("'{}'", list.join("', '")),
        (None, None) => format!("{} bytes", value.data.len()),
    }
}

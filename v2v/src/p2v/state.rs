//! How far a copy has come, in a file, so that another run can go on.
//!
//! ```text
//! {"format": "vimg-p2v-state", "version": 1, "disks": [
//!   {"name": "sda", "size-bytes": 1000204886016, "serial": "S1", "table": "6a89..", "target": "sda.qcow2",
//!    "target-id": "0f5c..", "segment-bytes": 16777216, "done": {"0": "SHA-256 of the segment", ...}}]}
//! ```
//!
//! A segment is in it only when the target has been flushed after it. The file is written beside itself and renamed.
//! Whoever opens a target gives it a new random identifier, which is kept with it and here: if they are still the same, nobody
//! else has written to it, and it is no other one.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind as IoErrorKind, Write as _};
use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result, ResultExt as _};
use serde_json::{Map, Value, json};

const FORMAT: &str = "vimg-p2v-state";
const VERSION: u64 = 1;

/// SHA-256 of a segment.
pub type Digest = [u8; 32];

/// The copies of all disks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// Each disk that has been begun.
    pub disks: Vec<DiskState>,
}

/// By what a disk is known again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its serial number; empty if it has none.
    pub serial: String,
    /// The identifier of its partition table; empty if it has none.
    pub table: String,
}

/// The copy of one disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskState {
    /// The kernel's name, which may change from one run to the next.
    pub name: String,
    /// Which disk it is.
    pub identity: Identity,
    /// Where it is copied to.
    pub target: String,
    /// The identifier that the target got when it was opened last; `None`: it can have none.
    pub target_id: Option<String>,
    /// Bytes per segment.
    pub segment_bytes: u64,
    /// The segments that are safe, by their number from 0.
    pub done: BTreeMap<u64, Digest>,
    /// All of it is there.
    pub complete: bool,
}

impl State {
    /// Reads the file; `None` if there is none.
    ///
    /// # Errors
    /// `Invalid`: it is something else, or damaged; the host failed.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let about = || format!("'{}'", path.display());
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == IoErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::from(error).context(about())),
        };
        let value: Option<Value> = serde_json::from_slice(&text).ok();
        let state = value.as_ref().and_then(parse);
        let state =
            state.ok_or_else(|| Error::invalid("not the state of a copy by vimg p2v").context(about()));
        state.map(Some).hint(|| "Remove it to begin anew.".to_owned())
    }

    /// Writes the file, durably.
    ///
    /// # Errors
    /// The host failed.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_whole(path, &self.document().to_string())
    }

    /// The entry of a disk, or a new one.
    ///
    /// # Errors
    /// `Usage`: what has been copied to `target` is of another disk.
    pub fn disk(
        &mut self,
        name: &str,
        identity: &Identity,
        target: &str,
        segment_bytes: u64,
    ) -> Result<&mut DiskState> {
        let index = self.disks.iter().position(|disk| disk.target == target);
        if let Some(known) = index.and_then(|index| self.disks.get(index))
            && known.identity != *identity
        {
            let message = format!(
                "what has been copied to '{target}' is of another disk than {name}, or that was repartitioned"
            );
            return Err(Error::new(ErrorKind::Usage, message)
                .hint("Begin anew with --restart, or choose another target."));
        }
        let index = index.unwrap_or_else(|| {
            self.disks.push(DiskState {
                identity: identity.clone(),
                target: target.to_owned(),
                segment_bytes,
                ..DiskState::default()
            });
            self.disks.len() - 1
        });
        let disk = &mut self.disks[index];
        name.clone_into(&mut disk.name);
        Ok(disk)
    }

    fn document(&self) -> Value {
        let disk = |disk: &DiskState| {
            let done: Map<String, Value> = disk
                .done
                .iter()
                .map(|(index, digest)| (index.to_string(), json!(hexadecimal(digest))))
                .collect();
            json!({
                "name": disk.name,
                "size-bytes": disk.identity.size_bytes,
                "serial": disk.identity.serial,
                "table": disk.identity.table,
                "target": disk.target,
                "target-id": disk.target_id,
                "segment-bytes": disk.segment_bytes,
                "complete": disk.complete,
                "done": done,
            })
        };
        let disks: Vec<Value> = self.disks.iter().map(disk).collect();
        json!({"format": FORMAT, "version": VERSION, "disks": disks})
    }
}

fn parse(value: &Value) -> Option<State> {
    if value["format"] != FORMAT || value["version"] != VERSION {
        return None;
    }
    let disks = value["disks"].as_array()?.iter().map(parse_disk).collect::<Option<_>>()?;
    Some(State { disks })
}

fn parse_disk(value: &Value) -> Option<DiskState> {
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    let done = value["done"].as_object()?.iter();
    let done = done.map(|(index, digest)| Some((index.parse().ok()?, parse_digest(digest.as_str()?)?)));
    Some(DiskState {
        name: text("name")?,
        identity: Identity {
            size_bytes: value["size-bytes"].as_u64()?,
            serial: text("serial")?,
            table: text("table")?,
        },
        target: text("target")?,
        target_id: text("target-id"),
        segment_bytes: value["segment-bytes"].as_u64().filter(|bytes| *bytes > 0)?,
        done: done.collect::<Option<_>>()?,
        complete: value["complete"].as_bool()?,
    })
}

/// Writes a small file, all of it or nothing, durably.
///
/// # Errors
/// The host failed.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(Error::from).context(|| format!("Could not write '{}'", path.display()))
}

/// An identifier that nobody has had before.
///
/// # Errors
/// The system has no random numbers.
pub fn new_id() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::new(ErrorKind::Io, format!("no random numbers: {error}")))?;
    Ok(hexadecimal(&bytes))
}

fn hexadecimal(digest: &[u8]) -> String {
    use std::fmt::Write as _;
    digest.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn parse_digest(text: &str) -> Option<Digest> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        assert_eq!(State::load(&path).unwrap(), None);
        let identity = Identity { size_bytes: 1 << 40, serial: "S".to_owned(), table: "t".to_owned() };
        let mut state = State::default();
        let disk = state.disk("sda", &identity, "x", 1 << 24).unwrap();
        disk.done.extend([(0, [1; 32]), (7, [0xab; 32])]);
        disk.target_id = Some(new_id().unwrap());
        state.save(&path).unwrap();
        assert_eq!(State::load(&path).unwrap(), Some(state.clone()));
        // The same disk under another name.
        assert_eq!(state.disk("sdb", &identity, "x", 1 << 20).unwrap().done.len(), 2);
        assert_eq!(state.disks.len(), 1);
        let other = Identity { table: "u".to_owned(), ..identity };
        assert!(state.disk("sda", &other, "x", 1 << 20).unwrap_err().to_string().contains("another disk"));
        for damaged in ["", "{}", "[1]", "{\"format\": \"vimg-p2v-state\", \"version\": 1, \"disks\": [{}]}"]
        {
            fs::write(&path, damaged).unwrap();
            State::load(&path).unwrap_err();
        }
    }
}

//! What a server in the background writes down of itself: `/run/vimg/nbd0.json`, locked for as long as it lives.
//!
//! The lock, and not a process number that somebody else may have by now, says whether it is alive. What it leaves
//! behind when it is killed tells `list` and `detach` what the device was.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use block::{Error, Result, ResultExt as _};
use nbd_server::kernel::{self, Device};
use serde_json::{Value, json};

/// Where records are.
const DIRECTORY: &str = "/run/vimg";

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Record {
    /// Our process, if there is one.
    pub(super) pid: Option<u32>,
    /// The image, or the export's URI.
    pub(super) image: String,
    /// Its format.
    pub(super) format: String,
    /// The partition that is the disk.
    pub(super) partition: Option<u32>,
    /// The internal snapshot that is shown.
    pub(super) snapshot: Option<String>,
    /// What is written vanishes.
    pub(super) overlay: bool,
    /// The kernel talks to somebody else's server; our process, if there is one, only calls it again.
    pub(super) remote: bool,
    /// How many connections there are.
    pub(super) connections: u32,
    /// The process that has connected the device, as the kernel shows it: whether this record is about what the device
    /// is now.
    pub(super) connector: Option<u32>,
    /// Why the image could not be left as it should be.
    pub(super) error: Option<String>,
}

impl Record {
    fn to_json(&self) -> Value {
        json!({
            "pid": self.pid,
            "image": self.image,
            "format": self.format,
            "partition": self.partition,
            "snapshot": self.snapshot,
            "overlay": self.overlay,
            "remote": self.remote,
            "connections": self.connections,
            "connector": self.connector,
            "error": self.error,
        })
    }

    /// Only what is there and has the right type.
    fn from_json(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let number = |key: &str| value[key].as_u64().and_then(|number| number.try_into().ok());
        Self {
            pid: number("pid"),
            image: text("image").unwrap_or_default(),
            format: text("format").unwrap_or_default(),
            partition: number("partition"),
            snapshot: text("snapshot"),
            overlay: value["overlay"].as_bool().unwrap_or_default(),
            remote: value["remote"].as_bool().unwrap_or_default(),
            connections: number("connections").unwrap_or_default(),
            connector: number("connector"),
            error: text("error"),
        }
    }
}

fn path(device: Device, extension: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{}.{extension}", device.name()))
}

/// Where its server complains.
pub(super) fn log_path(device: Device) -> PathBuf {
    path(device, "log")
}

/// The record of this process, locked.
#[derive(Debug)]
pub(super) struct Own {
    device: Device,
    file: File,
}

impl Own {
    /// Writes the record of a device that is ours.
    pub(super) fn write(device: Device, record: &Record) -> Result<Self> {
        let file = create(device)?;
        // Whoever looks at it holds it for a moment only.
        file.lock().context(|| path(device, "json").display().to_string())?;
        let own = Self { device, file };
        own.put(record)?;
        Ok(own)
    }

    fn put(&self, record: &Record) -> Result<()> {
        let connector = kernel::status(self.device).and_then(|status| status.pid).or(record.connector);
        let text = format!("{}\n", Record { connector, ..record.clone() }.to_json());
        let written = self.file.set_len(0).and_then(|()| (&self.file).write_all(text.as_bytes()));
        written.context(|| path(self.device, "json").display().to_string())
    }

    /// It is over, and all is well.
    pub(super) fn remove(self) {
        forget(self.device);
    }

    /// It is over, and something has to be told whoever detaches the device.
    pub(super) fn fail(self, record: &Record, error: &Error) {
        // The log has it, too.
        let _ = self.put(&Record { error: Some(error.to_string()), ..record.clone() });
    }
}

fn create(device: Device) -> Result<File> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(DIRECTORY);
    made.context(|| DIRECTORY.to_owned())?;
    let opened = OpenOptions::new().create(true).append(true).mode(0o644).open(path(device, "json"));
    opened.context(|| path(device, "json").display().to_string())
}

/// The record of a device, if there is one that is about what the device is now (or was, if it is nothing now).
pub(super) fn read(device: Device) -> Option<Record> {
    let mut text = String::new();
    File::open(path(device, "json")).ok()?.read_to_string(&mut text).ok()?;
    let record = Record::from_json(&serde_json::from_str(&text).ok()?);
    let connector = kernel::status(device).and_then(|status| status.pid);
    (connector.is_none() || connector == record.connector).then_some(record)
}

/// Whether the server of a device lives.
pub(super) fn is_alive(device: Device) -> bool {
    let Ok(file) = File::open(path(device, "json")) else { return false };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Waits until the server of a device has ended, as long as `patience` lasts. Whether it has.
pub(super) fn wait_until_dead(device: Device, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while is_alive(device) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Removes what is left of a record.
pub(super) fn forget(device: Device) {
    for extension in ["json", "log"] {
        // That it is gone is all that is wanted.
        let _ = std::fs::remove_file(path(device, extension));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_being_written() {
        let record = Record {
            pid: Some(42),
            image: "/a \"b\".qcow2".to_owned(),
            format: "qcow2".to_owned(),
            partition: Some(1),
            snapshot: Some("s".to_owned()),
            overlay: true,
            remote: true,
            connections: 2,
            connector: Some(41),
            error: None,
        };
        assert_eq!(Record::from_json(&record.to_json()), record);
        assert_eq!(Record::from_json(&json!({"pid": "x", "image": 3})), Record::default());
    }
}

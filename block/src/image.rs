//! What the tools need to know of an image beyond reading and writing it.

use std::sync::Arc;

use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// A value of a format's own description, as it appears in `info` (JSON and human).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Int(i64),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Self>),
    /// Named values, in the order in which they are shown.
    Map(Vec<(&'static str, Self)>),
}

/// A snapshot inside an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique id, a decimal number as text.
    pub id: String,
    /// The user's name for it (not necessarily unique).
    pub name: String,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds of that.
    pub date_nsec: u32,
    /// Nanoseconds that the guest had been running.
    pub vm_clock_nsec: u64,
    /// Instruction count of a recorded run, if there was one.
    pub icount: Option<u64>,
    /// Size of the disk at that time in bytes.
    pub disk_size: u64,
}

/// What an image says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Cluster (or grain, or block) size in bytes.
    pub cluster_size: Option<u32>,
    /// Whether the contents are encrypted.
    pub encrypted: bool,
    /// Whether the whole image is of a kind that stores compressed clusters only.
    pub compressed: bool,
    /// Whether it was not closed cleanly. `None`: the format cannot tell.
    pub dirty: Option<bool>,
    /// The backing file's name as stored in the image.
    pub backing_file: Option<String>,
    /// The backing file's format as stored in the image.
    pub backing_format: Option<String>,
    /// Snapshots inside the image.
    pub snapshots: Vec<SnapshotInfo>,
    /// The format's own keys, in qemu-img's order. Empty: it has none.
    pub specific: Vec<(&'static str, Value)>,
}

/// What `check` may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Clusters that nothing refers to are given back.
    Leaks,
    /// Everything that can be.
    All,
}

/// What `check` found. Counts are of entries or clusters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that endanger data.
    pub corruptions: u64,
    /// Clusters that are taken but not used.
    pub leaks: u64,
    /// Places that could not be examined.
    pub check_errors: u64,
    /// Repaired contradictions.
    pub corruptions_fixed: u64,
    /// Returned clusters.
    pub leaks_fixed: u64,
    /// Clusters of the guest disk.
    pub total_clusters: u64,
    /// Of these, the allocated ones.
    pub allocated_clusters: u64,
    /// Of these, the ones that do not follow their predecessor.
    pub fragmented_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// One past the last used host byte.
    pub image_end_offset: u64,
    /// One line for each problem, in qemu-img's words where it has some. At most
    /// [`MAX_MESSAGES`](Self::MAX_MESSAGES); `messages_dropped` counts the rest.
    pub messages: Vec<String>,
    /// Problems without a line.
    pub messages_dropped: u64,
}

impl CheckReport {
    /// How many lines are kept.
    pub const MAX_MESSAGES: usize = 10_000;

    /// Adds a line.
    pub fn say(&mut self, message: String) {
        if self.messages.len() < Self::MAX_MESSAGES {
            self.messages.push(message);
        } else {
            self.messages_dropped += 1;
        }
    }

    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}

/// An opened image: a disk that also knows about itself.
pub trait Image: BlockDevice {
    /// qemu's name of the format.
    fn format_name(&self) -> &'static str;

    /// Describes itself. Opens nothing.
    ///
    /// # Errors
    /// The host failed.
    fn info(&self) -> Result<ImageInfo>;

    /// Checks the structures of this layer (not its backing chain).
    ///
    /// # Errors
    /// `Unsupported` if the format has nothing to check; `Usage` for a repair of an image that is open for writing;
    /// otherwise only what prevents the check as a whole.
    fn check(&self, repair: Repair) -> Result<CheckReport> {
        let _ = repair;
        Err(Error::unsupported("This image format does not support checks"))
    }

    /// What another image records of this one to recognise it as its parent: the content id of a vmdk image, the
    /// unique id of a VHD, the DataWriteGuid of a VHDX; the bytes as they are stored. `None`: nobody does.
    fn content_id(&self) -> Option<Vec<u8>> {
        None
    }

    /// The parent has been changed on purpose, and only in what this image shows anyway (it was committed): the parent's
    /// new [`content_id`](Self::content_id) is recorded, where the format has such a record.
    ///
    /// # Errors
    /// Read-only, or the host failed.
    fn adopt_parent(&self, content_id: &[u8]) -> Result<()> {
        let _ = content_id;
        Ok(())
    }

    /// The container that holds the image itself.
    fn container(&self) -> Option<&Arc<dyn Storage>> {
        None
    }

    /// The name of the file that the data at byte `offset` of the disk lies in, if the image names several for its data.
    fn file_at(&self, offset: u64) -> Option<String> {
        let _ = offset;
        None
    }

    /// Whether the image has an external data file, and its storage.
    fn external_data_file(&self) -> Option<&Arc<dyn Storage>> {
        None
    }

    /// The same object as a plain disk.
    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice>;
}

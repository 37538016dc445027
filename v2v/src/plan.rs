//! What is going to be changed in a guest, before it is changed.

use std::path::PathBuf;

/// All changes, in the order in which they are made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The changes.
    pub changes: Vec<Change>,
    /// What was looked at and left alone, with the reason, in sentences.
    pub left_alone: Vec<String>,
    /// What a person has to do, before or after, in sentences.
    pub to_do: Vec<String>,
}

/// One change of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The volume (index in [`guestdisk::Disks::volumes`]).
    pub volume: usize,
    /// The path within that volume.
    pub path: PathBuf,
    /// The path as the guest sees it.
    pub guest_path: PathBuf,
    /// What is done.
    pub action: Action,
    /// A stable word for programs (`device-name`, `virtio-initramfs`, `nic-name`, `console`, `tools`, `uefi-fallback`,
    /// `selinux`, `regeneration`, `xorg`).
    pub topic: &'static str,
    /// Why, in a sentence.
    pub reason: String,
    /// How a person undoes it in the running guest, in a sentence or a command.
    pub undo: String,
    /// SHA-256 of the old contents in hexadecimal; empty if there were none.
    pub old_digest: String,
    /// SHA-256 of the new contents in hexadecimal; empty if there are none.
    pub new_digest: String,
    /// For text: the lines that go and come (`-old`, `+new`), for people.
    pub diff: Vec<String>,
}

/// What is done to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Its contents are replaced; everything else of it stays.
    Replace {
        /// The new contents.
        bytes: Vec<u8>,
    },
    /// Bytes are added at its end.
    Append {
        /// The bytes, padding included.
        bytes: Vec<u8>,
    },
    /// A new file.
    Create {
        /// The contents.
        bytes: Vec<u8>,
        /// Permission bits.
        mode: u32,
    },
    /// A new folder.
    CreateDirectory {
        /// Permission bits.
        mode: u32,
    },
    /// A new symbolic link, or another target for one.
    Symlink {
        /// Where it points.
        target: PathBuf,
    },
    /// It goes.
    Remove,
}

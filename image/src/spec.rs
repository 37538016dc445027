//! What to open: a file name or an option string, parsed as qemu parses them.
//!
//! Both spellings describe a small tree: a *format node* (raw, qcow2, or "find out") lies in a *source* (a
//! file, a block device, a protocol, or another format node), and may say which backing and data file to use
//! instead of the ones named in the image. `json:{...}` spells the tree nested or with dotted keys,
//! `--image-opts` with dotted keys only, and a plain name is the tree of one file.
//!
//! Parsing is without I/O, except that a name with a colon in it may be that of a file, or of an archive and a member
//! of it: which one is looked up. What a name means is decided here and nowhere else; the [`open`](mod@crate::open) module acts on it.

mod json;
mod keyval;
mod member;
mod node;
mod null;
mod protocol;

use block::{Result, ResultExt as _};

pub(crate) use json::bucket;
pub(crate) use json::parse_object as parse_json_object;
pub(crate) use keyval::split_commas;
pub(crate) use member::is_member;
pub(crate) use node::{Backing, Locking, Node, Source, parse_bool, text_of, unknown_driver};
pub use protocol::{Opening, Protocol, ProtocolRequest, register};
pub(crate) use protocol::{open_protocol, split_protocol};

/// A parsed file name or option string.
#[derive(Debug, Clone)]
pub struct Spec {
    given: String,
    node: Node,
    warnings: Vec<String>,
}

impl Spec {
    /// Gives the image an option, as `--image-opts` would.
    pub(crate) fn set_option(&mut self, key: &str, value: &str) {
        self.node.options.retain(|(known, _)| known != key);
        self.node.options.push((key.to_owned(), serde_json::Value::from(value)));
    }

    /// Parses a file name: a plain path, `file:PATH`, `host_device:PATH`, `json:{...}`, or the name of a
    /// protocol.
    ///
    /// # Errors
    /// In qemu's words, `Could not open 'NAME'` in front: an unknown protocol, malformed `json:`, unknown
    /// options.
    pub fn from_filename(name: &str) -> Result<Self> {
        let mut warnings = vec![];
        let node = Node::from_filename(name, &mut warnings).context(|| could_not_open(name))?;
        Ok(Self { given: name.to_owned(), node, warnings })
    }

    /// Parses an option string of `--image-opts`: `driver=qcow2,file.filename=X`.
    ///
    /// # Errors
    /// In qemu's words, `Could not open 'TEXT'` in front.
    pub fn from_image_opts(text: &str) -> Result<Self> {
        let mut warnings = vec![];
        let node = Node::from_image_opts(text, &mut warnings).context(|| could_not_open(text))?;
        Ok(Self { given: text.to_owned(), node, warnings })
    }

    /// The name as the user gave it, which is how error messages show it.
    pub fn display_name(&self) -> &str {
        &self.given
    }

    /// The same, but its bytes as they are are the disk, shown under the name of the protocol (`-f file`).
    #[must_use]
    pub fn as_protocol(mut self) -> Self {
        self.node.driver = Some(crate::Format::Raw);
        self.node.protocol_only = Some("file");
        self
    }

    /// The plain file, device or archive that it names, if it is nothing more than that.
    pub fn path(&self) -> Option<&std::path::Path> {
        let path = match &self.node.source {
            Source::Member { archive, .. } => Some(archive.as_str()),
            _ => self.node.plain_path(),
        };
        path.map(std::path::Path::new)
    }

    /// Whether it is a disk that a server exports, with nothing around it.
    pub fn is_export(&self) -> bool {
        matches!(&self.node.source, Source::Protocol(request) if request.driver == "nbd")
    }

    /// What the user should be told about the way it is spelled, in qemu's words.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The format it names, if it names one. A name of a protocol counts as raw.
    pub fn format(&self) -> Option<crate::Format> {
        self.node.driver
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }
}

/// The context that qemu puts in front of everything that goes wrong while opening `name`.
pub(crate) fn could_not_open(name: &str) -> String {
    format!("Could not open '{name}'")
}

#[cfg(test)]
mod tests;

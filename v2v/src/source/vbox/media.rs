//! The registry of media: which file is which disk, and which disk stands on which.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

use block::{Error, ErrorKind, Result};
use roxmltree::Node;

use crate::guest::DiskImage;
use crate::source::place::Place;
use crate::source::xml::NodeExt as _;
use crate::source::{disks, image, words};

/// The longest chain of disks.
const MOST_PARENTS: usize = 255;
/// The most files that are looked at for one that no registry names.
const MOST_FILES: usize = 500;

/// A medium.
#[derive(Debug)]
struct Medium {
    location: String,
    format: String,
    kind: String,
    parent: Option<String>,
    encrypted: bool,
}

/// All of them, by UUID.
#[derive(Debug, Default)]
pub(super) struct Media(HashMap<String, Medium>);

impl Media {
    /// The registries of a file: that of the machine, and that of all machines, which old files have.
    pub(super) fn read(root: Node<'_, '_>, machine: Node<'_, '_>) -> Self {
        let mut media = Self::default();
        let registries =
            [machine.one("MediaRegistry"), root.one("MediaRegistry"), root.at(&["Global", "MediaRegistry"])];
        for registry in registries.into_iter().flatten() {
            let is_medium = |node: &Node<'_, '_>| node.is("HardDisk") || node.is("Image");
            registry.descendants().filter(is_medium).for_each(|node| media.add(node));
        }
        media
    }

    fn add(&mut self, node: Node<'_, '_>) {
        let (Some(uuid), Some(location)) = (node.attr("uuid").and_then(words::uuid), node.attr("location"))
        else {
            return;
        };
        let parent = node.parent_element().filter(|parent| parent.is("HardDisk"));
        let crypt =
            |property: Node<'_, '_>| property.attr("name").is_some_and(|name| name.starts_with("CRYPT/"));
        let medium = Medium {
            location: location.to_owned(),
            format: node.attr("format").unwrap_or_default().to_owned(),
            kind: node.attr("type").unwrap_or_default().to_owned(),
            parent: parent.and_then(|parent| parent.attr("uuid")).and_then(words::uuid),
            encrypted: node.all("Property").any(crypt),
        };
        self.0.entry(uuid).or_insert(medium);
    }

    /// Where a medium is, as the registry has it.
    pub(super) fn location(&self, uuid: &str) -> Option<&str> {
        self.0.get(uuid).map(|medium| medium.location.as_str())
    }

    /// The image of a disk, with its parents.
    ///
    /// # Errors
    /// `NotFound`: nobody knows it; `Unsupported`: it is encrypted, or not in a file; what `place` says.
    pub(super) fn image(&self, uuid: &str, place: &Place<'_>, notes: &mut Vec<String>) -> Result<DiskImage> {
        if !self.0.contains_key(uuid) {
            return unregistered(uuid, place, notes);
        }
        let (mut members, mut next) = (vec![], Some(uuid));
        while let Some(medium) = next.and_then(|uuid| self.0.get(uuid)) {
            if medium.encrypted {
                return Err(super::encrypted(&format!("the disk '{}'", medium.location)));
            }
            if members.is_empty() && matches!(medium.kind.as_str(), "Immutable" | "Readonly") {
                notes.push(format!(
                    "The disk '{}' is {}; on KVM it will be written to.",
                    medium.location,
                    medium.kind.to_lowercase()
                ));
            }
            let format = format_of(medium)?;
            members.push((place.file(&medium.location, notes)?, format));
            if members.len() > MOST_PARENTS {
                return Err(Error::invalid(format!(
                    "the disk '{uuid}' has more than {MOST_PARENTS} parents"
                )));
            }
            next = medium.parent.as_deref();
        }
        Ok(match members.as_slice() {
            [(name, format)] => image(name, *format),
            members => image(disks::chain_name(members), None),
        })
    }
}

/// The format of a medium in our words; `None`: its contents will show.
fn format_of(medium: &Medium) -> Result<Option<&'static str>> {
    Ok(match medium.format.to_ascii_uppercase().as_str() {
        "VDI" => Some("vdi"),
        "VMDK" => Some("vmdk"),
        "VHD" => Some("vpc"),
        "VHDX" => Some("vhdx"),
        "PARALLELS" | "HDD" => Some("parallels"),
        "QED" => Some("qed"),
        "RAW" => Some("raw"),
        "ISCSI" | "CLOUD" => {
            let message = format!("the disk '{}' is not in a file ({})", medium.location, medium.format);
            return Err(Error::unsupported(message).hint("clone it into a file with VBoxManage clonemedium"));
        }
        _ => None,
    })
}

/// A disk that is registered elsewhere (in the list of all machines of an old VirtualBox): found by the UUID in its header,
/// beside the description.
fn unregistered(uuid: &str, place: &Place<'_>, notes: &mut Vec<String>) -> Result<DiskImage> {
    let found = if place.is_real() { find_by_uuid(uuid, place) } else { None };
    let Some(path) = found else {
        let message = format!("the machine has the disk {uuid}, and nothing says which file that is");
        return Err(Error::new(ErrorKind::NotFound, message)
            .hint("give the disk itself, and describe the machine on the command line"));
    };
    let path = crate::source::path_text(&path)?;
    notes.push(format!("The disk {uuid} is in no registry; '{path}' has that UUID, and was taken."));
    Ok(image(path, Some("vdi")))
}

fn find_by_uuid(uuid: &str, place: &Place<'_>) -> Option<PathBuf> {
    let folders = [place.folder().to_owned(), place.folder().join("Snapshots")];
    let files = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().take(MOST_FILES);
    let mut paths: Vec<PathBuf> = files.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths.into_iter().filter(|path| path.is_file()).find(|path| vdi_uuid(path).as_deref() == Some(uuid))
}

fn vdi_uuid(path: &PathBuf) -> Option<String> {
    let mut head = vec![];
    File::open(path).ok()?.take(512).read_to_end(&mut head).ok()?;
    if !vdi::Header::probe(&head) {
        return None;
    }
    let header = vdi::Header::parse(&head).ok()?;
    // A child without its registry has no parent that anybody could find.
    (header.image_type != vdi::ImageType::Differencing).then(|| header.uuid.to_string())
}

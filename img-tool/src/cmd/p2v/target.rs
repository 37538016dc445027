//! Where the disks go: images in a folder, or exports of a server.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use image::{CreateRequest, Format, OpenOptions, Secrets, Spec};
use v2v::p2v::PhysicalDisk;
use v2v::p2v::offer::Accepted;
use v2v::p2v::receive::{give_back_leaks, partial};
use v2v::p2v::state::{new_id, write_whole};

use crate::app::App;

/// The description's file, and the export that takes it.
pub(super) const MACHINE: &str = "machine.json";
/// What stands for a disk's name in a URI.
pub(super) const PLACEHOLDER: &str = "{disk}";

/// Behind the name of an image that is not complete: the identifier of who wrote to it last.
const ID: &str = ".id";

/// Where one disk goes.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// A file, under this name once it is complete.
    File {
        /// The name in the end.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// An export.
    Export {
        /// Its URI.
        uri: String,
    },
    /// An export of a receiver.
    Received {
        /// Its URI.
        uri: String,
        /// What the receiver has made of this machine's disk.
        accepted: Accepted,
        /// Of the acceptance.
        id: String,
        /// Of the one before.
        follows: Option<String>,
    },
}

/// A target that has been opened for writing.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) device: Arc<dyn BlockDevice>,
    /// It is new, and all zeros.
    pub(super) fresh: bool,
    /// Its identifier from now on; `None`: it can have none.
    pub(super) id: Option<String>,
    /// The one that it had.
    pub(super) follows: Option<String>,
}

impl Place {
    /// In a folder.
    pub(super) fn in_folder(folder: &Path, disk: &PhysicalDisk, format: Format) -> Self {
        let ending = if format.name() == "raw" { "raw" } else { format.name() };
        let path = folder.join(format!("{}.{ending}", disk.plain_name()));
        Self::File { path, format }
    }

    /// On a server.
    pub(super) fn on_server(template: &str, disk: &PhysicalDisk, only: bool) -> Self {
        Self::Export { uri: uri_of(template, &disk.plain_name(), only) }
    }

    /// What the state knows it by.
    pub(super) fn name(&self) -> String {
        match self {
            Self::File { path, .. } => path.display().to_string(),
            Self::Export { uri } | Self::Received { uri, .. } => uri.clone(),
        }
    }

    /// The receiver's identifier of the acceptance.
    pub(super) fn acceptance(&self) -> Option<&str> {
        if let Self::Received { id, .. } = self { Some(id) } else { None }
    }

    /// How the description names it: as it is called beside it.
    pub(super) fn in_description(&self, disk: &PhysicalDisk) -> (String, &'static str) {
        match self {
            Self::File { path, format } => {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                (name, if format.name() == "raw" { "raw" } else { "qcow2" })
            }
            Self::Export { .. } => (format!("{}.qcow2", disk.plain_name()), "qcow2"),
            Self::Received { accepted, .. } => {
                (accepted.image.clone(), if accepted.format == "raw" { "raw" } else { "qcow2" })
            }
        }
    }

    /// Whether it is complete already.
    pub(super) fn exists(&self) -> bool {
        matches!(self, Self::File { path, .. } if path.exists())
    }

    /// Opens it for writing; a file that is not there is created.
    ///
    /// # Errors
    /// A complete file of the name is there; the host or the server refuses; no space.
    pub(super) fn open(&self, size: u64, begun: bool, secrets: &Secrets, app: &App) -> Result<Opened> {
        let (mut id, mut follows) = (None, None);
        let (spec, format, fresh) = match self {
            Self::File { path, format } => {
                let partial = partial(path);
                let mark = mark(path);
                follows = std::fs::read_to_string(&mark).ok();
                let given = new_id()?;
                write_whole(&mark, &given)?;
                id = Some(given);
                let new = !(begun && partial.exists());
                if !new {
                    give_back_leaks(&partial, *format)?;
                } else {
                    let _ = std::fs::remove_file(&partial);
                    let name = partial.to_string_lossy().into_owned();
                    image::create(&CreateRequest { size: Some(size), ..CreateRequest::new(name, *format) })?;
                }
                (Spec::from_filename(&partial.to_string_lossy())?, *format, new)
            }
            Self::Export { uri } | Self::Received { uri, .. } => {
                let raw =
                    Format::from_name("raw").ok_or_else(|| Error::unsupported("raw is not built in"))?;
                let mut fresh = false;
                if let Self::Received { accepted, id: given, follows: before, .. } = self {
                    fresh = !accepted.begun;
                    (id, follows) = (Some(given.clone()), before.clone());
                }
                (Spec::from_filename(uri)?, raw, fresh)
            }
        };
        let layer = image::open(&spec, &writable(Some(format), secrets, app))?;
        Ok(Opened { device: layer.device(), fresh, id, follows })
    }

    /// Takes a complete file for one that is not: it is to be compared with the disk once more.
    ///
    /// # Errors
    /// The host refuses.
    pub(super) fn reopen(&self) -> Result<()> {
        let Self::File { path, .. } = self else { return Ok(()) };
        Ok(std::fs::rename(path, partial(path))?)
    }

    /// Gives a complete file its name, says who gave it this identifier.
    ///
    /// # Errors
    /// `Locked`: somebody else has begun to write to it since; the host refuses.
    pub(super) fn complete(&self, id: Option<&str>) -> Result<()> {
        let Self::File { path, .. } = self else { return Ok(()) };
        if std::fs::read_to_string(mark(path)).ok().as_deref() != id {
            let message = format!("another run of vimg p2v has taken over '{}'", path.display());
            return Err(Error::new(ErrorKind::Locked, message));
        }
        let renamed = std::fs::rename(partial(path), path);
        renamed
            .map_err(Error::from)
            .context(|| format!("Could not rename the image to '{}'", path.display()))?;
        let _ = std::fs::remove_file(mark(path));
        Ok(())
    }
}

/// The file with the identifier of an image that is not complete.
fn mark(path: &Path) -> PathBuf {
    let mut name = partial(path).into_os_string();
    name.push(ID);
    name.into()
}

/// The URI of a disk's export: in place of `{disk}`; or at the end, if the URI names no export or has to serve several disks.
fn uri_of(template: &str, disk: &str, only: bool) -> String {
    if template.contains(PLACEHOLDER) {
        return template.replace(PLACEHOLDER, disk);
    }
    let (front, query) = template.find('?').map_or((template, ""), |at| template.split_at(at));
    let Some((scheme, rest)) = front.split_once("://") else { return template.to_owned() };
    let names_export = rest.split_once('/').is_some_and(|(_, export)| !export.trim_matches('/').is_empty());
    if names_export && only {
        return template.to_owned();
    }
    // Over a Unix socket there is no host in front of the path.
    format!("{scheme}://{}/{disk}{query}", rest.trim_end_matches('/'))
}

/// Writes the description to the export for it, if the server has one; `false`: it has none.
///
/// # Errors
/// The export is too small, or the server refuses.
pub(super) fn send_description(template: &str, text: &str, secrets: &Secrets, app: &App) -> Result<bool> {
    let base = template.replace(PLACEHOLDER, MACHINE);
    let uri = if base == template { with_export(template, MACHINE) } else { base };
    let options = writable(Format::from_name("raw"), secrets, app);
    let layer = match Spec::from_filename(&uri).and_then(|spec| image::open(&spec, &options)) {
        Ok(layer) => layer,
        Err(error) => {
            app.tell(&format!("no export for the description: {error}"));
            return Ok(false);
        }
    };
    let device = layer.device();
    let room = usize::try_from(device.size()).unwrap_or(usize::MAX).min(16 << 20);
    if text.len() > room {
        let message = format!("the description has {} bytes, the export {MACHINE} {room}", text.len());
        return Err(Error::new(ErrorKind::NoSpace, message));
    }
    // White space may follow (RFC 8259, section 2).
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(room, b'\n');
    device.write_at(&bytes, 0)?;
    device.flush()?;
    Ok(true)
}

/// The URI with another export.
pub(super) fn with_export(template: &str, export: &str) -> String {
    let (front, query) = template.find('?').map_or((template, ""), |at| template.split_at(at));
    let Some((scheme, rest)) = front.split_once("://") else { return template.to_owned() };
    let authority = rest.split('/').next().unwrap_or_default();
    format!("{scheme}://{authority}/{export}{query}")
}

/// How what is copied to, or told, is opened.
pub(super) fn writable(format: Option<Format>, secrets: &Secrets, app: &App) -> OpenOptions {
    OpenOptions {
        writable: true,
        format,
        policy: app.policy(),
        secrets: secrets.clone(),
        ..OpenOptions::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_knows_who_wrote_to_it_last() {
        let dir = tempfile::tempdir().unwrap();
        let place =
            Place::File { path: dir.path().join("sda.raw"), format: Format::from_name("raw").unwrap() };
        let app = App::new("vimg");
        let open = |begun| place.open(1 << 20, begun, &Secrets::default(), &app).unwrap();
        let one = open(false);
        assert!(one.fresh && one.follows.is_none());
        let first = one.id.clone();
        drop(one);
        let two = open(true);
        assert!(!two.fresh && two.follows == first && two.id != first);
        let second = two.id.clone();
        drop(two);
        // Somebody else, whose image it becomes.
        let other = open(false);
        assert!(other.fresh && other.id != second);
        let error = place.complete(second.as_deref()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
        place.complete(other.id.as_deref()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn every_disk_has_its_export() {
        for (template, only, expected) in [
            ("nbd://h/{disk}", false, "nbd://h/sda"),
            ("nbd://h/web-{disk}?tls-psk-file=x", true, "nbd://h/web-sda?tls-psk-file=x"),
            ("nbds://h:1/web", true, "nbds://h:1/web"),
            ("nbds://h:1/web", false, "nbds://h:1/web/sda"),
            ("nbd://h", true, "nbd://h/sda"),
            ("nbd://h/", true, "nbd://h/sda"),
            ("nbd+unix:///?socket=/s", false, "nbd+unix:///sda?socket=/s"),
            ("nbd+unix:///{disk}?socket=/s", false, "nbd+unix:///sda?socket=/s"),
        ] {
            assert_eq!(uri_of(template, "sda", only), expected, "{template}");
        }
        assert_eq!(with_export("nbds://h:1/web?x=y", MACHINE), "nbds://h:1/machine.json?x=y");
        assert_eq!(with_export("nbd+unix:///?socket=/s", MACHINE), "nbd+unix:///machine.json?socket=/s");
    }
}

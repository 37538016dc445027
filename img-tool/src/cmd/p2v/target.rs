//! Where the disks go: images in a folder, or exports of a server.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use image::{CreateRequest, Format, OpenOptions, Secrets, Spec};
use v2v::p2v::PhysicalDisk;
use v2v::p2v::offer::Accepted;
use v2v::p2v::receive::{give_back_leaks, partial};

use crate::app::App;

/// The description's file, and the export that takes it.
pub(super) const MACHINE: &str = "machine.json";
/// What stands for a disk's name in a URI.
pub(super) const PLACEHOLDER: &str = "{disk}";

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
    },
}

impl Place {
    /// In a folder.
    pub(super) fn in_folder(folder: &Path, disk: &PhysicalDisk, format: Format) -> Self {
        let ending = if format.name() == "raw" { "raw" } else { format.name() };
        let path = folder.join(format!("{}.{ending}", disk.name.replace('!', "_")));
        Self::File { path, format }
    }

    /// On a server.
    pub(super) fn on_server(template: &str, disk: &PhysicalDisk, only: bool) -> Self {
        Self::Export { uri: uri_of(template, &disk.name.replace('!', "_"), only) }
    }

    /// What the state knows it by.
    pub(super) fn name(&self) -> String {
        match self {
            Self::File { path, .. } => path.display().to_string(),
            Self::Export { uri } | Self::Received { uri, .. } => uri.clone(),
        }
    }

    /// How the description names it: as it is called beside it.
    pub(super) fn in_description(&self, disk: &PhysicalDisk) -> (String, &'static str) {
        match self {
            Self::File { path, format } => {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                (name, if format.name() == "raw" { "raw" } else { "qcow2" })
            }
            Self::Export { .. } => (format!("{}.qcow2", disk.name.replace('!', "_")), "qcow2"),
            Self::Received { accepted, .. } => {
                (accepted.image.clone(), if accepted.format == "raw" { "raw" } else { "qcow2" })
            }
        }
    }

    /// Whether it is complete already.
    pub(super) fn exists(&self) -> bool {
        matches!(self, Self::File { path, .. } if path.exists())
    }

    /// Opens it for writing; a file that is not there is created. The second value: it is new, and all zeros.
    ///
    /// # Errors
    /// A complete file of the name is there; the host or the server refuses; no space.
    pub(super) fn open(
        &self,
        size: u64,
        begun: bool,
        secrets: &Secrets,
        app: &App,
    ) -> Result<(Arc<dyn BlockDevice>, bool)> {
        let (spec, format, new) = match self {
            Self::File { path, format } => {
                let partial = partial(path);
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
                let fresh = matches!(self, Self::Received { accepted, .. } if !accepted.begun);
                (Spec::from_filename(uri)?, raw, fresh)
            }
        };
        let options = OpenOptions {
            writable: true,
            format: Some(format),
            policy: app.policy(),
            secrets: secrets.clone(),
            ..OpenOptions::default()
        };
        let layer = image::open(&spec, &options)?;
        Ok((layer.device(), new))
    }

    /// Takes a complete file for one that is not: it is to be compared with the disk once more.
    ///
    /// # Errors
    /// The host refuses.
    pub(super) fn reopen(&self) -> Result<()> {
        let Self::File { path, .. } = self else { return Ok(()) };
        Ok(std::fs::rename(path, partial(path))?)
    }

    /// Gives a complete file its name.
    ///
    /// # Errors
    /// The host refuses.
    pub(super) fn complete(&self) -> Result<()> {
        let Self::File { path, .. } = self else { return Ok(()) };
        let renamed = std::fs::rename(partial(path), path);
        renamed.map_err(Error::from).context(|| format!("Could not rename the image to '{}'", path.display()))
    }
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
    let options = OpenOptions {
        writable: true,
        format: Format::from_name("raw"),
        policy: app.policy(),
        secrets: secrets.clone(),
        ..OpenOptions::default()
    };
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

#[cfg(test)]
mod tests {
    use super::*;

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

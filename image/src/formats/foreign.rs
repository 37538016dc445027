//! The formats of the crate `foreign`, which are read and not written.

use std::sync::Arc;

use block::image::{CheckReport, Image, Repair};
use block::{Error, ErrorKind, Result, Storage};
use foreign::Opened;

use super::{Abilities, BackingName, Driver, Found, How, Make, Parts, cannot_create};
use crate::format::Format;
use crate::options::Options;

/// Options of a node that holds an encrypted qcow image.
const KEY_FORMAT: &str = "encrypt.format";
const KEY_SECRET: &str = "encrypt.key-secret";

/// One of the formats.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) format: Format,
    pub(crate) kind: foreign::Format,
}

/// The driver of a format, if it is one of these.
pub(crate) fn driver(format: Format) -> Option<&'static dyn Driver> {
    const fn reader(format: Format, kind: foreign::Format) -> Reader {
        Reader { format, kind }
    }
    static READERS: [Reader; 6] = [
        reader(Format::Cloop, foreign::Format::Cloop),
        reader(Format::Parallels, foreign::Format::Parallels),
        reader(Format::Qed, foreign::Format::Qed),
        reader(Format::Bochs, foreign::Format::Bochs),
        reader(Format::Dmg, foreign::Format::Dmg),
        reader(Format::Qcow, foreign::Format::Qcow),
    ];
    READERS.iter().find(|reader| reader.format == format).map(|reader| reader as &dyn Driver)
}

impl Driver for Reader {
    fn abilities(&self) -> Abilities {
        let backing = matches!(self.kind, foreign::Format::Qed | foreign::Format::Qcow);
        Abilities { backing, ..Abilities::default() }
    }

    fn probe(&self, first: &[u8], storage: &dyn Storage) -> Result<bool> {
        self.kind.probe(first, storage)
    }

    fn read(&self, storage: &Arc<dyn Storage>, how: &How) -> Result<Box<dyn Found>> {
        if how.writable {
            let message = format!("vimg reads {} images, but does not write them", self.format);
            return Err(Error::new(ErrorKind::ReadOnly, message)
                .hint("convert the image to a format that can be written, qcow2 for instance"));
        }
        let opened = self.kind.read(Arc::clone(storage))?;
        Ok(Box::new(ReadOnlyImage { opened }))
    }

    fn node_options(&self) -> &'static [&'static str] {
        match self.kind {
            foreign::Format::Qcow => &[KEY_FORMAT, KEY_SECRET],
            _ => &[],
        }
    }

    fn plan(&self, _size: u64, _options: &Options) -> Result<Box<dyn Make>> {
        Err(cannot_create(self.format))
    }
}

/// An image of one of the formats.
#[derive(Debug)]
struct ReadOnlyImage {
    opened: Opened,
}

impl ReadOnlyImage {
    /// The key of an encrypted image, as qemu asks for it.
    fn key(&self, parts: &Parts<'_>) -> Result<Option<crypt::Volume>> {
        let named = parts.option(KEY_FORMAT);
        if !self.opened.is_encrypted() {
            return match named {
                None => Ok(None),
                Some(format) => Err(Error::usage(format!(
                    "No encryption in image header, but options specified format '{format}'"
                ))),
            };
        }
        if let Some(format) = named.filter(|format| format != "aes") {
            return Err(Error::usage(format!(
                "Header reported 'aes' encryption format but options specify '{format}'"
            )));
        }
        if parts.metadata_only {
            return Ok(None);
        }
        let id = parts.option(KEY_SECRET);
        let passphrase = parts.secrets.required(KEY_SECRET, id.as_deref())?;
        crypt::Volume::qcow2_aes(passphrase).map(Some)
    }
}

impl Found for ReadOnlyImage {
    fn backing(&self) -> Option<BackingName> {
        let backing = self.opened.backing()?;
        let name = String::from_utf8_lossy(&backing.name).into_owned();
        Some(BackingName { names: vec![name], format: backing.format.map(str::to_owned), confined: false })
    }

    fn open(&self, parts: Parts<'_>) -> Result<Arc<dyn Image>> {
        let key = self.key(&parts)?;
        let backing = parts.backing.as_ref().map(|layer| layer.device());
        Ok(self.opened.open(backing, key)?)
    }

    fn check(&self, _parts: Parts<'_>, _repair: Repair) -> Result<CheckReport> {
        self.opened.check()
    }
}

//! Hyper-V's VHDX.
//!
//! qemu reads images without parent only. Here the parent of a differencing disk is found by its locator, beside the
//! image or below its folder unless the command line allows more, and recognised by the GUID that the image records.

use std::sync::Arc;

use block::image::{CheckReport, Image, Repair};
use block::{Error, ErrorKind, Result, ResultExt as _, Storage};
use vhdx::create::{CreateOptions, Plan};
use vhdx::{OpenOptions, Source, Vhdx};

use super::{Abilities, BackingName, Driver, Found, How, Made, Make, Parts, Place};
use crate::create::does_not_accept;
use crate::open::Layer;
use crate::options::{Definition, Kind, Options, option, with_default};
use crate::spec::parse_bool;

/// The driver.
#[derive(Debug)]
pub(crate) struct Format;

/// Node option: the parent is taken as it is, whatever it has become since. The way out after a commit to the parent that
/// was interrupted before the image could record it.
const ANY_PARENT: &str = "ignore-parent-id";

/// In the order in which `create` shows them.
const OPTIONS: &[Definition] = &[
    option("size", Kind::Size, "Virtual disk size; max of 64TB."),
    with_default("log_size", Kind::Size, "1048576", "Log size; min 1MB."),
    with_default(
        "block_size",
        Kind::Size,
        "0",
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
    ),
    option(
        "subformat",
        Kind::Text,
        "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
    ),
    option(
        "block_state_zero",
        Kind::Bool,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using \
         'qemu-img convert' with subformat=dynamic.",
    ),
];

impl Driver for Format {
    fn abilities(&self) -> Abilities {
        Abilities { create: true, ..Abilities::default() }
    }

    fn probe(&self, first: &[u8], _: &dyn Storage) -> Result<bool> {
        Ok(vhdx::probe(first))
    }

    fn read(&self, storage: &Arc<dyn Storage>, _: &How) -> Result<Box<dyn Found>> {
        Ok(Box::new(Read(Source::read(storage)?)))
    }

    fn node_options(&self) -> &'static [&'static str] {
        &[ANY_PARENT]
    }

    fn create_options(&self) -> &'static [Definition] {
        OPTIONS
    }

    fn plan(&self, size: u64, options: &Options) -> Result<Box<dyn Make>> {
        let fixed = match options.get("subformat") {
            None | Some("dynamic") => false,
            Some("fixed") => true,
            Some(other) => return Err(does_not_accept("subformat", other)),
        };
        let wanted = CreateOptions {
            log_size: options.number("log_size").unwrap_or_default(),
            block_size: options.number("block_size"),
            fixed,
            block_state_zero: options.get("block_state_zero") != Some("off"),
            ..CreateOptions::new(size)
        };
        Ok(Box::new(New(wanted.plan()?)))
    }
}

/// An image whose structures have been read.
#[derive(Debug)]
struct Read(Source);

impl Found for Read {
    fn backing(&self) -> Option<BackingName> {
        let parent = self.0.metadata().parent.as_ref()?;
        Some(BackingName { names: parent.names(), format: Some("vhdx".to_owned()), confined: true })
    }

    fn open(&self, parts: Parts<'_>) -> Result<Arc<dyn Image>> {
        let any_parent = parts.option(ANY_PARENT).map(|value| parse_bool(ANY_PARENT, &value)).transpose()?;
        if let Some(parent) = parts.backing.as_ref().filter(|_| any_parent != Some(true)) {
            self.check_parent(parent)?;
        }
        let options = OpenOptions {
            writable: parts.writable,
            parent: parts.backing.as_ref().map(|parent| parent.device()),
        };
        Vhdx::open(self.0.clone(), options).map(|image| image as Arc<dyn Image>)
    }

    fn check(&self, parts: Parts<'_>, repair: Repair) -> Result<CheckReport> {
        vhdx::check::check(&parts.storage, repair)
    }
}

impl Read {
    /// The parent has to be what the image was made on: otherwise its blocks would be mixed with those of another disk.
    fn check_parent(&self, parent: &Layer) -> Result<()> {
        let Some(locator) = &self.0.metadata().parent else { return Ok(()) };
        let found = parent.image.content_id();
        if locator.linkage.iter().any(|wanted| found.as_deref() == Some(&wanted.0[..])) {
            return Ok(());
        }
        let found = found.and_then(|bytes| bytes.try_into().ok()).map(vhdx::Guid);
        let found = found.map_or_else(|| "no VHDX".to_owned(), |guid| guid.to_string());
        let wanted = locator.linkage.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
        Err(Error::new(
            ErrorKind::Corrupt,
            format!("the parent '{}' is {found}, and the image was made on {wanted}", parent.filename),
        )
        .hint(format!(
            "the parent has been written to since, or is another disk, and what the two show together is no disk; after an \
             interrupted commit it is one: rebase -u with the parent's own name records it as it is, and \
             --image-opts driver=vhdx,file.filename=...,{ANY_PARENT}=on opens it once"
        )))
    }
}

/// An image that is to be made.
#[derive(Debug)]
struct New(Plan);

impl Make for New {
    fn carry_out(&self, made: &mut Made, place: &Place<'_>) -> Result<()> {
        let file = made.file(place.path, place.cache)?;
        self.0.carry_out(&*file).context(|| "Could not create the VHDX image".to_owned())
    }
}

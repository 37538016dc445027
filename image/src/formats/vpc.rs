//! VHD, which qemu calls vpc.

use std::sync::Arc;

use block::image::{CheckReport, Image, Repair};
use block::{Error, Preallocation, Result, Storage};
use vhd::create::CreateOptions;
use vhd::{Container, DiskType, OpenOptions, SizeRule, Vhd};

use super::{Abilities, BackingName, Driver, Found, How, Made, Make, Parts, Place};
use crate::create::make::protocol_preallocation;
use crate::options::{Definition, Kind, Options, option};

/// The driver.
#[derive(Debug)]
pub(crate) struct Vpc;

/// The node option that says how the size is found.
const SIZE_RULE: &str = "force_size_calc";

const OPTIONS: &[Definition] = &[
    option("size", Kind::Size, "Virtual disk size"),
    option(
        "subformat",
        Kind::Text,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    option(
        "force_size",
        Kind::Bool,
        "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based \
         calculation",
    ),
];

impl Driver for Vpc {
    fn abilities(&self) -> Abilities {
        Abilities { create: true, backing: true, ..Abilities::default() }
    }

    fn probe(&self, first: &[u8], storage: &dyn Storage) -> Result<bool> {
        Container::probe(first, storage)
    }

    fn refuse_damaged(&self, storage: &dyn Storage) -> Result<()> {
        Container::refuse_damaged(storage)
    }

    fn read(&self, storage: &Arc<dyn Storage>, _how: &How) -> Result<Box<dyn Found>> {
        Ok(Box::new(Opened(Container::read(storage, SizeRule::Creator)?)))
    }

    fn node_options(&self) -> &'static [&'static str] {
        &[SIZE_RULE]
    }

    fn create_options(&self) -> &'static [Definition] {
        OPTIONS
    }

    fn plan(&self, size: u64, options: &Options) -> Result<Box<dyn Make>> {
        let fixed = match options.given("subformat") {
            None | Some("dynamic") => false,
            Some("fixed") => true,
            Some(other) => {
                return Err(Error::usage(format!("Parameter 'subformat' does not accept value '{other}'")));
            }
        };
        let preallocation = match protocol_preallocation(options)? {
            Preallocation::Metadata => {
                return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
            }
            mode => mode,
        };
        let options = CreateOptions { size, fixed, force_size: options.is_on("force_size"), preallocation };
        options.shape()?;
        Ok(Box::new(Plan(options)))
    }
}

/// An image whose footers and header have been read.
#[derive(Debug)]
struct Opened(Container);

impl Found for Opened {
    fn backing(&self) -> Option<BackingName> {
        let names = self.0.parent_names().to_vec();
        // The parent of a VHD is a VHD: nothing else has the id that it is recognised by.
        (!names.is_empty()).then(|| BackingName { names, format: Some("vpc".to_owned()), confined: true })
    }

    fn warnings(&self) -> Vec<String> {
        self.0.warnings()
    }

    fn open(&self, parts: Parts<'_>) -> Result<Arc<dyn Image>> {
        let rule = match parts.option(SIZE_RULE).as_deref() {
            None => SizeRule::Creator,
            Some("chs") => SizeRule::Geometry,
            Some("current_size") => SizeRule::CurrentSize,
            Some(other) => return Err(Error::usage(format!("Invalid size calculation mode: '{other}'"))),
        };
        let other_size;
        let container = if rule == SizeRule::Creator {
            &self.0
        } else {
            other_size = Container::read(&parts.storage, rule)?;
            &other_size
        };
        let options = OpenOptions {
            writable: parts.writable,
            parent_id: parts.backing.as_ref().and_then(|layer| layer.image.content_id()),
            parent: parts.backing.map(|layer| layer.device()),
        };
        Ok(Arc::new(Vhd::open(container, options)?))
    }

    fn check(&self, parts: Parts<'_>, repair: Repair) -> Result<CheckReport> {
        if self.0.footer().disk_type == DiskType::Fixed {
            return Err(Error::unsupported("This image format does not support checks"));
        }
        // A repair has changed what was read before.
        vhd::check::check(&Container::read(&parts.storage, SizeRule::Creator)?, repair)
    }
}

/// An image to be made.
#[derive(Debug)]
struct Plan(CreateOptions);

impl Make for Plan {
    fn carry_out(&self, made: &mut Made, place: &Place<'_>) -> Result<()> {
        let file = made.file(place.path, place.cache)?;
        vhd::create::create(&*file, &self.0)
    }
}

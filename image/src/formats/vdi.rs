//! VDI, VirtualBox's format.

use std::sync::Arc;

use block::image::{CheckReport, Image, Repair};
use block::{Error, Preallocation, Result, Storage};
use vdi::create::CreateOptions;
use vdi::{Header, ImageType, OpenOptions};

use super::{Abilities, Driver, Found, How, Made, Make, Parts, Place};
use crate::create::make::protocol_preallocation;
use crate::options::{Definition, Kind, Options, option, with_default};

/// The driver.
#[derive(Debug)]
pub(crate) struct Vdi;

const OPTIONS: &[Definition] = &[
    option("size", Kind::Size, "Virtual disk size"),
    with_default("static", Kind::Bool, "off", "VDI static (pre-allocated) image"),
];

impl Driver for Vdi {
    fn abilities(&self) -> Abilities {
        // An image knows its parent by its UUID, and not where it is: a backing file has to be named by the user.
        Abilities { create: true, backing: true, ..Abilities::default() }
    }

    fn probe(&self, first: &[u8], _storage: &dyn Storage) -> Result<bool> {
        Ok(Header::probe(first))
    }

    fn read(&self, storage: &Arc<dyn Storage>, _how: &How) -> Result<Box<dyn Found>> {
        Ok(Box::new(Opened(Header::read(&**storage)?)))
    }

    fn create_options(&self) -> &'static [Definition] {
        OPTIONS
    }

    fn plan(&self, size: u64, options: &Options) -> Result<Box<dyn Make>> {
        let preallocation = match protocol_preallocation(options)? {
            Preallocation::Metadata => {
                return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
            }
            mode => mode,
        };
        let options = CreateOptions { size, fixed: options.is_on("static"), preallocation };
        options.validate()?;
        Ok(Box::new(Plan(options)))
    }
}

/// An image whose header has been read.
#[derive(Debug)]
struct Opened(Header);

impl Found for Opened {
    fn open(&self, parts: Parts<'_>) -> Result<Arc<dyn Image>> {
        if self.0.image_type == ImageType::Differencing && parts.backing.is_none() && !parts.metadata_only {
            return Err(vdi::Error::NoParent(self.0.parent).into());
        }
        let options = OpenOptions {
            writable: parts.writable,
            parent_id: parts.backing.as_ref().and_then(|layer| layer.image.content_id()),
            parent: parts.backing.map(|layer| layer.device()),
        };
        Ok(Arc::new(vdi::Vdi::open(parts.storage, self.0.clone(), options)?))
    }

    fn check(&self, parts: Parts<'_>, repair: Repair) -> Result<CheckReport> {
        // A repair has changed what was read before.
        vdi::check::check(&parts.storage, &Header::read(&*parts.storage)?, repair)
    }
}

/// An image to be made.
#[derive(Debug)]
struct Plan(CreateOptions);

impl Make for Plan {
    fn carry_out(&self, made: &mut Made, place: &Place<'_>) -> Result<()> {
        let file = made.file(place.path, place.cache)?;
        vdi::create::create(&*file, &self.0)
    }
}

//! A new LUKS container: a header with its first key, and room for the encrypted disk.

use std::sync::Arc;

use block::file::HostFile;
use block::{Error, Preallocation, Result, Storage as _};
use crypt::Secret;
use crypt::luks::{CreateOptions, Created, Unlocker, area_len, create};

use super::protocol_preallocation;
use crate::measure::Measurement;
use crate::options::Options;
use crate::secret::Secrets;

/// Everything that is needed to make a container, checked.
#[derive(Debug)]
pub(in crate::create) struct Plan {
    /// Bytes of the disk.
    size: u64,
    preallocation: Preallocation,
    options: CreateOptions,
    passphrase: Secret,
    unlocker: Arc<Unlocker>,
}

impl Plan {
    pub(super) fn new(size: u64, options: &Options, secrets: &Secrets) -> Result<Self> {
        // qemu-img lists the option, and has no way to give it.
        if options.given("detached-header").is_some() {
            return Err(Error::usage("Parameter 'detached-header' is unexpected"));
        }
        let preallocation = match protocol_preallocation(options)? {
            Preallocation::Metadata => Preallocation::Off,
            mode => mode,
        };
        let create = CreateOptions::from_words(|name| options.given(name))?;
        let passphrase = secrets.required("key-secret", options.given("key-secret"))?.clone();
        let unlocker = Arc::clone(secrets.unlocker());
        let plan = Self { size, preallocation, options: create, passphrase, unlocker };
        plan.file_len().map(|_| plan)
    }

    /// Bytes of the file.
    fn file_len(&self) -> Result<u64> {
        area_len(&self.options.spec)
            .checked_add(self.size)
            .filter(|len| i64::try_from(*len).is_ok())
            .ok_or_else(|| Error::usage("The image size is too large for file format 'luks'"))
    }

    /// Makes the header. Takes its time: a passphrase is slow to try on purpose.
    pub(super) fn make_volume(&self) -> Result<Created> {
        create(&self.options, &self.passphrase).inspect(|made| self.unlocker.remember(made, &self.passphrase))
    }

    /// Fills the new, empty file.
    pub(super) fn carry_out(&self, file: &HostFile, volume: Option<Created>) -> Result<()> {
        let volume = volume.map_or_else(|| self.make_volume(), Ok)?;
        let len = self.file_len()?;
        if !file.fixed_len() {
            block::raw::preallocate(file, len, self.preallocation)?;
        } else if len > file.len()? {
            return Err(Error::usage("Cannot grow device files"));
        }
        file.write_at(&volume.prefix, 0)?;
        file.sync()
    }
}

/// What a container for a disk of `size` bytes takes.
///
/// # Errors
/// Options that make no sense, or there is no passphrase.
pub(crate) fn measured(size: u64, options: &Options, secrets: &Secrets) -> Result<Measurement> {
    let len = Plan::new(size, options, secrets)?.file_len()?;
    Ok(Measurement { required: len, fully_allocated: len, bitmaps: None })
}

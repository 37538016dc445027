//! Changing what kind of image an image is: the options of `-o` that can be changed after it has been made.

pub(crate) mod keys;

use std::sync::Arc;

use block::{Error, Result, Storage};
use crypt::luks::slots::Change;
use qcow2::amend::Amendment;
use qcow2::header::CRYPT_LUKS;

use crate::format::Format;
use crate::open::Layer;
use crate::options::{Definition, Kind, Options, help_lines, of_format, option};
use crate::progress::{Progress, cancelled};
use crate::secret::Secrets;

const QCOW2: &[Definition] = &[
    option("encrypt.state", Kind::Text, "Select new state of affected keyslots (active/inactive)"),
    option("encrypt.keyslot", Kind::Number, "Select a single keyslot to modify explicitly"),
    option("encrypt.old-secret", Kind::Text, "Select all keyslots that match this password"),
    option(
        "encrypt.new-secret",
        Kind::Text,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    option("encrypt.iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
    option("size", Kind::Size, "Virtual disk size"),
    option("compat", Kind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    option("backing_file", Kind::Text, "File name of a base image"),
    option("backing_fmt", Kind::Text, "Image format of the base image"),
    option("data_file", Kind::Text, "File name of an external data file"),
    option("data_file_raw", Kind::Bool, "The external data file must stay valid as a raw image"),
    option("lazy_refcounts", Kind::Bool, "Postpone refcount updates"),
    option("refcount_bits", Kind::Number, "Width of a reference count entry in bits"),
];

const LUKS: &[Definition] = &[
    option("state", Kind::Text, "Select new state of affected keyslots (active/inactive)"),
    option("keyslot", Kind::Number, "Select a single keyslot to modify explicitly"),
    option("old-secret", Kind::Text, "Select all keyslots that match this password"),
    option("new-secret", Kind::Text, "New secret to set in the matching keyslots. Empty string to erase"),
    option("iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
];

/// The options of a format that can be amended; none if nothing can.
pub const fn options_of(format: Format) -> &'static [Definition] {
    match format {
        Format::Qcow2 => QCOW2,
        Format::Luks => LUKS,
        _ => &[],
    }
}

/// That nothing about images of this format can be amended.
pub fn cannot_amend(format: &str) -> Error {
    Error::unsupported(format!("Format driver '{format}' does not support option amendment"))
}

/// The text of `-o help`.
///
/// # Errors
/// Nothing about images of this format can be amended.
pub fn help(format: Format) -> Result<String> {
    match options_of(format) {
        [] => Err(cannot_amend(format.name())),
        options => Ok(format!("Amend options for '{format}':\n{}", help_lines(options))),
    }
}

/// The options of `-o` that have been understood as far as the format goes.
///
/// # Errors
/// In qemu's words: options that there are not, or that only creating an image has, and values that are not of
/// their type.
pub fn parse(format: Format, given: &[(String, String)]) -> Result<Options> {
    let definitions = options_of(format);
    if definitions.is_empty() {
        return Err(cannot_amend(format.name()));
    }
    let known = |list: &[Definition], name: &str| list.iter().any(|option| option.name == name);
    for (name, _) in given {
        if !known(definitions, name) && known(of_format(format), name) {
            return Err(Error::usage(format!(
                "Invalid parameter '{name}'\nThis option is only supported for image creation"
            )));
        }
    }
    Options::new(definitions.to_vec(), given)
}

/// Amends an image that has been opened for writing. Returns what the user should be told.
///
/// # Errors
/// In qemu's words, without the program name in front. What can be refused is refused before anything is changed;
/// a failure later leaves an image that holds the same disk. With `force`, key slots in use are replaced and the
/// last key may go.
pub fn amend(
    layer: Arc<Layer>,
    options: &Options,
    secrets: &Secrets,
    force: bool,
    progress: &dyn Progress,
) -> Result<Vec<String>> {
    if let Some(luks) = &layer.luks {
        let change = keys::change(options, "", secrets)?;
        progress.starting();
        return luks.change_keys(&change, force).map(|()| vec![]);
    }
    let Some(qcow2) = &layer.qcow2 else { return Err(cannot_amend(layer.format.name())) };
    let header = qcow2.header();
    let amendment = amendment(options, &header)?;
    amendment.check(&header, &layer.image.info()?.snapshots)?;
    if options.given("backing_file").or(options.given("backing_fmt")).is_some() {
        return Err(Error::usage("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead."));
    }
    let keys = key_change(options, &header, secrets)?;
    let unlocked = match (&keys, header.luks) {
        (Some(_), Some((offset, len))) => {
            let passphrase = secrets.required("encrypt.key-secret", layer.key_secret.as_deref())?;
            let unlocked = crypt::luks::unlock_with(
                &*layer.storage,
                offset,
                passphrase,
                layer.effort,
                secrets.unlocker(),
            )?;
            // All key slots end before the payload begins, so this keeps them from the image's other clusters.
            if unlocked.header.payload_offset > len {
                return Err(Error::invalid("LUKS header is larger than the space that the image has for it"));
            }
            Some((unlocked, offset))
        }
        _ => None,
    };
    let storage = Arc::clone(&layer.storage);
    let open = qcow2::OpenOptions {
        writable: true,
        backing: layer.backing.as_ref().map(|backing| backing.device()),
        data_file: layer.data_file.clone().map(|file| file as Arc<dyn Storage>),
        encryption: qcow2.encryption(),
        ..qcow2::OpenOptions::default()
    };
    layer.image.close()?;
    // The steps open the image for themselves; nobody else may hold it meanwhile.
    drop(layer);
    progress.starting();
    if let (Some(change), Some((mut unlocked, offset))) = (keys, unlocked) {
        crypt::luks::slots::change(&*storage, offset, &mut unlocked, &change, force)?;
    }
    qcow2::amend::amend(&storage, open, &amendment, &mut |done, total| {
        progress.update(done, total);
        if progress.cancelled() { Err(cancelled()) } else { Ok(()) }
    })
}

/// Whether key slots are to change.
fn wants_keys(options: &Options) -> bool {
    let names = ["state", "keyslot", "old-secret", "new-secret", "iter-time"];
    names.iter().any(|name| options.given(&format!("encrypt.{name}")).is_some())
}

/// What is to become of the key slots of a qcow2 image.
fn key_change(options: &Options, header: &qcow2::Header, secrets: &Secrets) -> Result<Option<Change>> {
    match header.luks {
        Some(_) if wants_keys(options) => keys::change(options, "encrypt.", secrets).map(Some),
        _ => Ok(None),
    }
}

fn amendment(options: &Options, header: &qcow2::Header) -> Result<Amendment> {
    let version = match options.given("compat") {
        None => None,
        Some("0.10" | "v2") => Some(2),
        Some("1.1" | "v3") => Some(3),
        Some(other) => return Err(Error::usage(format!("Unknown compatibility level {other}"))),
    };
    if wants_keys(options) && header.crypt_method != CRYPT_LUKS {
        return Err(Error::usage(match header.crypt_method {
            0 => "Can't amend encryption options - encryption not present",
            _ => "Only LUKS encryption options can be amended",
        }));
    }
    let refcount_order = options.number("refcount_bits").map(qcow2::create::refcount_order).transpose()?;
    Ok(Amendment {
        version,
        refcount_order,
        lazy_refcounts: options.given("lazy_refcounts").map(|value| value == "on"),
        data_file: options.given("data_file").map(|name| name.as_bytes().to_vec()),
        data_file_raw: options.given("data_file_raw").map(|value| value == "on"),
        // As in qemu-img, 0 is no size.
        size: options.number("size").filter(|size| *size != 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(list: &str) -> String {
        parse(Format::Qcow2, &crate::options::parse(&[list.to_owned()]).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn options_that_only_creating_has_are_told_from_those_that_do_not_exist() {
        let text = "Invalid parameter 'cluster_size'\nThis option is only supported for image creation";
        assert_eq!(wrong("cluster_size=4k"), text);
        assert_eq!(wrong("nonsense=1"), "Invalid parameter 'nonsense'");
        assert_eq!(wrong("nocow=on"), "Invalid parameter 'nocow'");
        assert_eq!(wrong("refcount_bits=x"), "Parameter 'refcount_bits' expects a number");
    }

    #[test]
    fn raw_images_have_nothing_to_amend() {
        let text = "Format driver 'raw' does not support option amendment";
        assert_eq!(help(Format::Raw).unwrap_err().to_string(), text);
        assert_eq!(parse(Format::Raw, &[]).unwrap_err().to_string(), text);
    }
}

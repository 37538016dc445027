//! The creation options of `-o`: which there are, their help, their types, and the order in which they are
//! shown.

use block::{Error, Result};

use crate::format::Format;
use crate::spec::split_protocol;
use crate::suggest::did_you_mean;

/// The type of an option's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Bool,
    /// A number.
    Number,
    /// A number of bytes, with a unit if wanted.
    Size,
}

impl Kind {
    const fn placeholder(self) -> &'static str {
        match self {
            Self::Text => "<str>",
            Self::Bool => "<bool (on/off)>",
            Self::Number => "<num>",
            Self::Size => "<size>",
        }
    }
}

/// A creation option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Definition {
    /// Its name.
    pub name: &'static str,
    /// The type of its value.
    pub kind: Kind,
    /// One line of help.
    pub help: &'static str,
    /// The value that it has, and is shown with, when it is not given.
    pub default: Option<&'static str>,
}

pub(crate) const fn option(name: &'static str, kind: Kind, help: &'static str) -> Definition {
    Definition { name, kind, help, default: None }
}

pub(crate) const fn with_default(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    help: &'static str,
) -> Definition {
    Definition { name, kind, help, default: Some(default) }
}

/// The size of the disk, which every format has.
pub(crate) const SIZE: Definition = option("size", Kind::Size, "Virtual disk size");

/// In the order in which they are shown when an image is created.
const QCOW2: &[Definition] = &[
    option(
        "encryption",
        Kind::Bool,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    option("encrypt.format", Kind::Text, "Encrypt the image, format choices: 'aes', 'luks'"),
    option("encrypt.key-secret", Kind::Text, "ID of secret providing qcow AES key or LUKS passphrase"),
    option("encrypt.cipher-alg", Kind::Text, "Name of encryption cipher algorithm"),
    option("encrypt.cipher-mode", Kind::Text, "Name of encryption cipher mode"),
    option("encrypt.ivgen-alg", Kind::Text, "Name of IV generator algorithm"),
    option("encrypt.ivgen-hash-alg", Kind::Text, "Name of IV generator hash algorithm"),
    option("encrypt.hash-alg", Kind::Text, "Name of encryption hash algorithm"),
    option("encrypt.iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
    with_default("cluster_size", Kind::Size, "65536", "qcow2 cluster size"),
    with_default("extended_l2", Kind::Bool, "off", "Extended L2 tables"),
    option("preallocation", Kind::Text, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    with_default(
        "compression_type",
        Kind::Text,
        "zlib",
        "Compression method used for image cluster compression",
    ),
    SIZE,
    option("compat", Kind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    option("backing_file", Kind::Text, "File name of a base image"),
    option("backing_fmt", Kind::Text, "Image format of the base image"),
    option("data_file", Kind::Text, "File name of an external data file"),
    option("data_file_raw", Kind::Bool, "The external data file must stay valid as a raw image"),
    with_default("lazy_refcounts", Kind::Bool, "off", "Postpone refcount updates"),
    with_default("refcount_bits", Kind::Number, "16", "Width of a reference count entry in bits"),
];

const RAW: &[Definition] = &[SIZE];

const LUKS: &[Definition] = &[
    SIZE,
    option("key-secret", Kind::Text, "ID of the secret that provides the keyslot passphrase"),
    option("cipher-alg", Kind::Text, "Name of encryption cipher algorithm"),
    option("cipher-mode", Kind::Text, "Name of encryption cipher mode"),
    option("ivgen-alg", Kind::Text, "Name of IV generator algorithm"),
    option("ivgen-hash-alg", Kind::Text, "Name of IV generator hash algorithm"),
    option("hash-alg", Kind::Text, "Name of encryption hash algorithm"),
    option("iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
    option("detached-header", Kind::Bool, "Create a detached LUKS header"),
];

const FILE: &[Definition] = &[
    SIZE,
    option("nocow", Kind::Bool, "Turn off copy-on-write (valid only on btrfs)"),
    option("preallocation", Kind::Text, "Preallocation mode (allowed values: off, falloc, full)"),
    option("extent_size_hint", Kind::Size, "Extent size hint for the image file, 0 to disable"),
];

/// What other protocols (and block devices) offer.
const OTHER_PROTOCOL: &[Definition] =
    &[SIZE, option("preallocation", Kind::Text, "Preallocation mode (allowed values: off)")];

/// The creation options of a format.
pub fn of_format(format: Format) -> &'static [Definition] {
    if let Some(driver) = crate::formats::driver(format) {
        return driver.create_options();
    }
    match format {
        Format::Qcow2 => QCOW2,
        Format::Luks => LUKS,
        _ => RAW,
    }
}

/// The creation options of the protocol that a file name selects.
pub fn of_protocol(filename: &str) -> &'static [Definition] {
    match split_protocol(filename) {
        None if is_device(filename) => OTHER_PROTOCOL,
        None | Some(("file", _)) => FILE,
        Some(_) => OTHER_PROTOCOL,
    }
}

/// Whether a path leads to a device.
fn is_device(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device() || m.file_type().is_char_device())
}

/// The options of a format on a file, in the order in which they are shown: the format's, then what the
/// protocol adds.
pub fn of_target(format: Format, filename: &str) -> Vec<Definition> {
    let mut all = of_format(format).to_vec();
    for definition in of_protocol(filename) {
        if !all.iter().any(|known| known.name == definition.name) {
            all.push(*definition);
        }
    }
    all
}

/// Whether `-o` asks for help instead of giving options.
pub fn asks_for_help(option_lists: &[String]) -> bool {
    option_lists.iter().flat_map(|list| split(list)).any(|word| word == "help" || word == "?")
}

/// The text of `-o help`: of the format alone, or of a format on a file.
///
/// # Errors
/// Images of this format cannot be created.
pub fn help(format: Format, filename: Option<&str>) -> Result<String> {
    if !format.can_create() {
        return Err(crate::formats::cannot_create(format));
    }
    let (title, all) = match filename {
        Some(filename) => ("Supported options:\n".to_owned(), of_target(format, filename)),
        None => (format!("Supported {format} options:\n"), of_format(format).to_vec()),
    };
    let lines = help_lines(&all);
    let note = "\nThe protocol level may support further options.\n\
                Specify the target filename to include those options.\n";
    Ok(format!("{title}{lines}{}", if filename.is_none() { note } else { "" }))
}

/// The lines of help of some options, by name.
pub(crate) fn help_lines(definitions: &[Definition]) -> String {
    let mut all = definitions.to_vec();
    all.sort_by_key(|definition| definition.name);
    all.iter().map(help_line).collect()
}

fn help_line(definition: &Definition) -> String {
    let head = format!("{}={}", definition.name, definition.kind.placeholder());
    format!("  {head:<22} - {}\n", definition.help)
}

fn split(list: &str) -> Vec<String> {
    crate::spec::split_commas(list)
}

/// Parses the arguments of `-o` into names and values, in order.
///
/// # Errors
/// An empty list, or one with a comma at an edge, in qemu's words.
pub fn parse(option_lists: &[String]) -> Result<Vec<(String, String)>> {
    let mut options = vec![];
    for list in option_lists {
        let trimmed_end = list.trim_end_matches(',');
        let odd_end = (list.len() - trimmed_end.len()) % 2 == 1;
        if list.is_empty() || list.starts_with(',') || odd_end {
            return Err(Error::usage(format!("Invalid option list: {list}")));
        }
        for word in split(list) {
            options.push(match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None => (word, "on".to_owned()),
            });
        }
    }
    Ok(options)
}

/// Options that have been understood: every name exists, every value is of its type.
#[derive(Debug, Clone)]
pub struct Options {
    definitions: Vec<Definition>,
    values: Vec<(&'static str, String)>,
}

impl Options {
    /// Checks names and types. Of an option given twice the last value counts.
    ///
    /// # Errors
    /// In qemu's words.
    pub fn new(definitions: Vec<Definition>, given: &[(String, String)]) -> Result<Self> {
        let mut options = Self { definitions, values: vec![] };
        for (name, value) in given {
            options.set(name, value)?;
        }
        Ok(options)
    }

    /// Sets an option.
    ///
    /// # Errors
    /// In qemu's words.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let definition = self
            .definitions
            .iter()
            .find(|definition| definition.name == name)
            .ok_or_else(|| self.unknown(name))?;
        let value = canonical(definition, value)?;
        self.values.retain(|(known, _)| *known != definition.name);
        self.values.push((definition.name, value));
        Ok(())
    }

    fn unknown(&self, name: &str) -> Error {
        let error = Error::usage(format!("Invalid parameter '{name}'"));
        did_you_mean(error, name, self.definitions.iter().map(|definition| definition.name))
    }

    /// Whether the target has such an option.
    pub fn knows(&self, name: &str) -> bool {
        self.definitions.iter().any(|definition| definition.name == name)
    }

    /// The value given for an option.
    pub fn given(&self, name: &str) -> Option<&str> {
        self.values.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    /// The value of an option, given or by default.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.given(name).or_else(|| {
            self.definitions.iter().find(|definition| definition.name == name).and_then(|d| d.default)
        })
    }

    /// Whether a switch is on.
    pub fn is_on(&self, name: &str) -> bool {
        self.get(name) == Some("on")
    }

    /// A number of bytes, or a plain number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.get(name).and_then(|text| text.parse().ok())
    }

    /// The line that is printed before an image is created.
    pub fn formatting_line(&self, filename: &str, format: Format) -> String {
        let mut line = format!("Formatting '{filename}', fmt={format}");
        for definition in &self.definitions {
            if let Some(value) = self.get(definition.name) {
                line.push_str(&format!(" {}={}", definition.name, value.replace(',', ",,")));
            }
        }
        line
    }
}

/// The value as it is kept and shown: sizes and numbers in decimal, switches as `on` or `off`.
fn canonical(definition: &Definition, value: &str) -> Result<String> {
    let name = definition.name;
    match definition.kind {
        Kind::Text => Ok(value.to_owned()),
        Kind::Bool => crate::spec::parse_bool(name, value).map(|on| if on { "on" } else { "off" }.to_owned()),
        Kind::Number => parse_number(value)
            .map(|number| number.to_string())
            .ok_or_else(|| Error::usage(format!("Parameter '{name}' expects a number"))),
        Kind::Size => parse_size(name, value).map(|size| size.to_string()),
    }
}

fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A size that is the value of an option: the same numbers as on the command line, another message.
///
/// # Errors
/// In qemu's words.
pub fn parse_size(name: &str, text: &str) -> Result<u64> {
    block::size::parse_plain(text).map_err(|_| expects_size(name))
}

fn expects_size(name: &str) -> Error {
    Error::usage(format!(
        "Parameter '{name}' expects a non-negative number below 2^64\n\
         Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
         and exabytes, respectively."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists(lists: &[&str]) -> Vec<String> {
        lists.iter().map(|&list| list.to_owned()).collect()
    }

    fn qcow2(given: &str) -> Result<Options> {
        Options::new(of_target(Format::Qcow2, "x"), &parse(&lists(&[given]))?)
    }

    #[test]
    fn lists_are_split_and_joined() {
        let options = parse(&lists(&["a=1,b=x,,y", "c"])).unwrap();
        assert_eq!(
            options,
            [("a", "1"), ("b", "x,y"), ("c", "on")].map(|(a, b)| (a.to_owned(), b.to_owned()))
        );
    }

    #[test]
    fn odd_commas_are_refused() {
        for bad in ["", ",a=1", "a=1,"] {
            let error = parse(&lists(&[bad])).unwrap_err().to_string();
            assert_eq!(error, format!("Invalid option list: {bad}"));
        }
        parse(&lists(&["a=1,,"])).unwrap();
    }

    #[test]
    fn help_is_asked_for_anywhere() {
        assert!(asks_for_help(&lists(&["size=1M,help"])));
        assert!(asks_for_help(&lists(&["?"])));
        assert!(!asks_for_help(&lists(&["backing_file=help"])));
    }

    #[test]
    fn values_have_types() {
        let message = |given: &str| qcow2(given).unwrap_err().to_string();
        assert_eq!(message("foo=bar"), "Invalid parameter 'foo'");
        assert_eq!(message("extended_l2=maybe"), "Parameter 'extended_l2' expects 'on' or 'off'");
        assert_eq!(message("refcount_bits=abc"), "Parameter 'refcount_bits' expects a number");
        assert!(
            message("cluster_size=abc").starts_with("Parameter 'cluster_size' expects a non-negative number")
        );
    }

    #[test]
    fn the_line_shows_options_in_qemus_order() {
        let options =
            qcow2("refcount_bits=0x10,size=1M,cluster_size=4k,nocow=on,preallocation=full").unwrap();
        assert_eq!(
            options.formatting_line("x", Format::Qcow2),
            "Formatting 'x', fmt=qcow2 cluster_size=4096 extended_l2=off preallocation=full compression_type=zlib \
             size=1048576 lazy_refcounts=off refcount_bits=16 nocow=on"
        );
    }

    #[test]
    fn the_last_value_counts() {
        assert_eq!(qcow2("cluster_size=4k,cluster_size=8k").unwrap().number("cluster_size"), Some(8192));
    }
}

//! The tree that a name or an option string describes.

use serde_json::{Map, Value};

use block::{Error, Result};

use super::protocol::{ProtocolRequest, driver_of_scheme, shown_by_protocol, split_protocol};
use super::{keyval, null};
use crate::format::Format;

/// A format and what it lies in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    /// The format, if it was named.
    pub(crate) driver: Option<Format>,
    /// The name of the protocol, if a protocol was named where a format could have been: its bytes are the disk.
    pub(crate) protocol_only: Option<&'static str>,
    /// What the format lies in.
    pub(crate) source: Source,
    /// Options of the format, not yet checked: which exist depends on the format.
    pub(crate) options: Vec<(String, Value)>,
    /// Which backing file to use.
    pub(crate) backing: Backing,
    /// The keys with which the backing file was chosen.
    pub(crate) backing_keys: Vec<String>,
    /// Which data file to use instead of the one named in the image.
    pub(crate) data_file: Option<Source>,
    /// `read-only=on`.
    pub(crate) read_only: bool,
    /// `force-share=on`.
    pub(crate) force_share: bool,
}

/// Where bytes come from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    /// A file or block device.
    File {
        /// Its path.
        path: String,
        /// It must be a device (`host_device:`).
        device: bool,
        /// Whether to lock it.
        locking: Locking,
        /// `cache.direct=on`.
        direct: bool,
    },
    /// A protocol.
    Protocol(ProtocolRequest),
    /// Another format node, whose disk is our container.
    Nested(Box<Node>),
    /// A member of an archive.
    Member {
        /// Path of the archive.
        archive: String,
        /// Name of the member.
        member: String,
    },
}

/// `file.locking`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Locking {
    /// Where the system can.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// The backing file to use.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) enum Backing {
    /// The one named in the image.
    #[default]
    FromImage,
    /// None.
    None,
    /// This one.
    Node(Box<Node>),
}

impl Source {
    /// A plain file or block device.
    pub(crate) fn file(path: impl Into<String>) -> Self {
        Self::File { path: path.into(), device: false, locking: Locking::Auto, direct: false }
    }
}

/// Options that make another image of a file, so that its name is not enough.
const SHOWN_OPTIONS: &[&str] = &["offset", "size", "key-secret", "encrypt.key-secret"];

impl Node {
    /// A node of whatever format lies in `source`.
    pub(crate) fn of(source: Source) -> Self {
        Self {
            driver: None,
            protocol_only: None,
            source,
            options: vec![],
            backing: Backing::FromImage,
            backing_keys: vec![],
            data_file: None,
            read_only: false,
            force_share: false,
        }
    }

    /// Parses a file name.
    pub(crate) fn from_filename(name: &str, warnings: &mut Vec<String>) -> Result<Self> {
        if let Some(object) = name.strip_prefix("json:") {
            return Self::from_options(keyval::nest(super::json::parse_object(object)?)?, warnings);
        }
        let Some((scheme, rest)) = split_protocol(name) else {
            return Ok(Self::of(match super::member::split(name) {
                Some(member) => member,
                None => named_file(name, false)?,
            }));
        };
        Ok(Self::of(match driver_of_scheme(scheme) {
            Some("file") => named_file(rest, false)?,
            Some("host_device") => named_file(rest, true)?,
            Some(driver) => Source::Protocol(
                ProtocolRequest {
                    driver: driver.to_owned(),
                    name: Some(name.to_owned()),
                    options: Map::new(),
                    writable: false,
                }
                .checked()?,
            ),
            None => match super::member::split(name) {
                Some(member) => member,
                None => {
                    let error = Error::usage(format!("Unknown protocol '{scheme}'"));
                    return Err(error.hint("a file with a colon in its name is called ./NAME"));
                }
            },
        }))
    }

    /// Parses the argument of `--image-opts`.
    pub(crate) fn from_image_opts(text: &str, warnings: &mut Vec<String>) -> Result<Self> {
        let options = keyval::nest(keyval::parse(text, "file", warnings))?;
        if !options.contains_key("driver") && !options.contains_key("file") {
            return Err(Error::usage("Must specify either driver or file"));
        }
        Self::from_options(options, warnings)
    }

    /// Understands a tree of options.
    fn from_options(mut options: Map<String, Value>, warnings: &mut Vec<String>) -> Result<Self> {
        let driver = take_text(&mut options, "driver")?;
        if let Some(protocol) = driver.as_deref().and_then(protocol_driver) {
            return Self::of_protocol(protocol, options);
        }
        let driver = match driver {
            Some(name) => Some(Format::from_name(&name).ok_or_else(|| not_a_format(&name, &options))?),
            None => None,
        };
        let source = match options.remove("file") {
            Some(Value::Object(file)) => source_from_options(file, warnings)?,
            Some(reference) => return Err(no_such_node(&reference)),
            None => return Err(Error::usage("A block device must be specified for \"file\"")),
        };
        let backing_keys = match options.get("backing") {
            Some(Value::Object(keys)) => {
                keyval::flatten(keys).into_iter().map(|(key, _)| format!("backing.{key}")).collect()
            }
            _ => vec![],
        };
        let backing = take_backing(&mut options, warnings)?;
        let data_file = match options.remove("data-file") {
            None => None,
            Some(Value::Object(file)) => Some(source_from_options(file, warnings)?),
            Some(reference) => return Err(no_such_node(&reference)),
        };
        let common = Common::take(&mut options)?;
        Ok(Self {
            driver,
            protocol_only: None,
            source,
            options: keyval::flatten(&options),
            backing,
            backing_keys,
            data_file,
            read_only: common.read_only,
            force_share: common.force_share,
        })
    }

    /// A protocol where a format could have been named: its bytes are the disk.
    fn of_protocol(protocol: &'static str, mut options: Map<String, Value>) -> Result<Self> {
        let mut common_of = options.clone();
        let common = Common::take(&mut common_of)?;
        options.insert("driver".to_owned(), protocol.into());
        let source = source_from_options(options, &mut vec![])?;
        Ok(Self {
            driver: Some(Format::Raw),
            protocol_only: Some(protocol),
            read_only: common.read_only,
            force_share: common.force_share,
            ..Self::of(source)
        })
    }

    /// The path, if this is a plain file or device and nothing else.
    pub(crate) fn plain_path(&self) -> Option<&str> {
        match &self.source {
            Source::File { path, .. } if self.is_expressible() => Some(path),
            _ => None,
        }
    }

    /// Whether qemu would show the node by the name of its file.
    fn is_expressible(&self) -> bool {
        self.backing == Backing::FromImage
            && self.data_file.is_none()
            && !matches!(self.source, Source::Nested(_))
            && !self.options.iter().any(|(key, _)| SHOWN_OPTIONS.contains(&key.as_str()))
    }

    /// The name as `info` shows it: that of the file, or the whole tree as `json:`.
    pub(crate) fn shown_name(&self, format: Format) -> String {
        match &self.source {
            Source::File { path, .. } if self.is_expressible() => path.clone(),
            Source::Member { archive, member } if self.is_expressible() => format!("{archive}:{member}"),
            Source::Protocol(request)
                if self.is_expressible()
                    && (request.name.is_some() || shown_by_protocol(request).is_some()) =>
            {
                self.source.shown_name()
            }
            source if self.protocol_only.is_some() => source.shown_name(),
            _ => format!("json:{}", super::json::to_qemu_string(&self.tree(format))),
        }
    }

    /// The node as a tree of options.
    fn tree(&self, format: Format) -> Value {
        let mut tree = Map::new();
        tree.insert("driver".to_owned(), format.name().into());
        tree.insert("file".to_owned(), self.source.tree());
        for (key, value) in &self.options {
            if SHOWN_OPTIONS.contains(&key.as_str()) {
                tree.insert(key.clone(), value.clone());
            }
        }
        match &self.backing {
            Backing::FromImage => {}
            Backing::None => {
                tree.insert("backing".to_owned(), Value::Null);
            }
            Backing::Node(node) => {
                tree.insert("backing".to_owned(), node.tree(node.driver.unwrap_or(Format::Raw)));
            }
        }
        if let Some(source) = &self.data_file {
            tree.insert("data-file".to_owned(), source.tree());
        }
        Value::Object(tree)
    }
}

impl Source {
    /// The name of the source alone: its own, or the tree as `json:`.
    pub(crate) fn shown_name(&self) -> String {
        if let Self::Protocol(request) = self
            && let Some(name) = shown_by_protocol(request)
        {
            return name;
        }
        let tree = self.tree();
        match self {
            Self::File { path, .. } => path.clone(),
            Self::Member { archive, member } => format!("{archive}:{member}"),
            Self::Protocol(ProtocolRequest { name: Some(name), .. }) => name.clone(),
            Self::Protocol(request)
                if null::is_null(&request.driver) && tree.as_object().is_some_and(|tree| tree.len() == 1) =>
            {
                format!("{}://", request.driver)
            }
            _ => format!("json:{}", super::json::to_qemu_string(&tree)),
        }
    }

    /// The source as a tree of options.
    fn tree(&self) -> Value {
        match self {
            Self::Protocol(request) if null::is_null(&request.driver) && request.name.is_none() => {
                Value::Object(null::Null::tree(request))
            }
            Self::File { path, device, .. } => serde_json::json!({
                "driver": if *device { "host_device" } else { "file" }, "filename": path
            }),
            Self::Protocol(request) => {
                let mut tree = request.options.clone();
                tree.insert("driver".to_owned(), request.driver.clone().into());
                if let Some(name) = &request.name {
                    tree.insert("filename".to_owned(), name.clone().into());
                }
                Value::Object(tree)
            }
            Self::Nested(node) => node.tree(node.driver.unwrap_or(Format::Raw)),
            Self::Member { archive, member } => {
                serde_json::json!({ "driver": "file", "filename": format!("{archive}:{member}") })
            }
        }
    }
}

/// A file that was named by a name.
fn named_file(path: &str, device: bool) -> Result<Source> {
    if path.is_empty() {
        return Err(Error::usage("The 'file' block driver requires a file name"));
    }
    Ok(Source::File { path: path.to_owned(), device, locking: Locking::Auto, direct: false })
}

/// Understands the options of what a format lies in.
fn source_from_options(mut options: Map<String, Value>, warnings: &mut Vec<String>) -> Result<Source> {
    let driver = take_text(&mut options, "driver")?.unwrap_or_else(|| "file".to_owned());
    match protocol_driver(&driver) {
        Some(protocol @ ("file" | "host_device")) => file_from_options(protocol, options),
        Some(protocol) => {
            let name = take_text(&mut options, "filename")?;
            let request = ProtocolRequest { driver: protocol.to_owned(), name, options, writable: false };
            Ok(Source::Protocol(request.checked()?))
        }
        None => {
            options.insert("driver".to_owned(), driver.into());
            Ok(Source::Nested(Box::new(Node::from_options(options, warnings)?)))
        }
    }
}

/// Options of the file drivers that make no difference here.
const IGNORED_FILE_OPTIONS: &[&str] = &["aio-max-batch", "drop-cache", "x-check-cache-dropped", "pr-manager"];

fn file_from_options(driver: &'static str, mut options: Map<String, Value>) -> Result<Source> {
    let Some(path) = take_text(&mut options, "filename")?.filter(|path| !path.is_empty()) else {
        return Err(Error::usage(format!("The '{driver}' block driver requires a file name")));
    };
    let common = Common::take(&mut options)?;
    let locking = match take_text(&mut options, "locking")?.as_deref() {
        None | Some("auto") => Locking::Auto,
        Some("on") => Locking::On,
        Some("off") => Locking::Off,
        Some(other) => return Err(invalid_value(other)),
    };
    match take_text(&mut options, "aio")?.as_deref() {
        None | Some("threads" | "io_uring") => {}
        Some("native") if common.direct => {}
        Some("native") => {
            return Err(Error::usage(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        Some(other) => return Err(invalid_value(other)),
    }
    for ignored in IGNORED_FILE_OPTIONS {
        options.remove(*ignored);
    }
    match first_in_qemu_order(&options) {
        Some(key) => {
            Err(Error::usage(format!("Block protocol '{driver}' doesn't support the option '{key}'")))
        }
        None => match super::member::split(&path).filter(|_| driver == "file") {
            Some(member) => Ok(member),
            None => {
                Ok(Source::File { path, device: driver == "host_device", locking, direct: common.direct })
            }
        },
    }
}

/// Options that every node takes, whatever its driver.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Common {
    read_only: bool,
    force_share: bool,
    direct: bool,
}

impl Common {
    /// Takes them out of the options. `discard`, `detect-zeroes`, `auto-read-only` and `cache.no-flush` are checked and
    /// make no difference: zeros are found and space is given back anyway.
    pub(super) fn take(options: &mut Map<String, Value>) -> Result<Self> {
        if let Some(name) = take_text(options, "node-name")? {
            check_node_name(&name)?;
        }
        let discard = take_text(options, "discard")?;
        let discards = match discard.as_deref() {
            None | Some("ignore" | "off") => false,
            Some("unmap" | "on") => true,
            Some(_) => return Err(Error::usage("Invalid discard option")),
        };
        match take_text(options, "detect-zeroes")?.as_deref() {
            None | Some("off" | "on") => {}
            Some("unmap") if discards => {}
            Some("unmap") => {
                return Err(Error::usage(
                    "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
                ));
            }
            Some(other) => return Err(invalid_value(other)),
        }
        take_bool(options, "auto-read-only")?;
        options.remove("copy-on-read");
        let mut direct = false;
        if let Some(Value::Object(mut cache)) = options.remove("cache") {
            direct = take_cache_bool(&mut cache, "direct")?.unwrap_or(false);
            take_cache_bool(&mut cache, "no-flush")?;
            if let Some(key) = first_in_qemu_order(&cache) {
                options.insert(format!("cache.{key}"), Value::Null);
            }
        }
        Ok(Self {
            read_only: take_bool(options, "read-only")?.unwrap_or(false),
            force_share: take_bool(options, "force-share")?.unwrap_or(false),
            direct,
        })
    }
}

fn take_cache_bool(cache: &mut Map<String, Value>, key: &str) -> Result<Option<bool>> {
    match take_text(cache, key)?.as_deref() {
        None => Ok(None),
        Some(text) => parse_bool(&format!("cache.{key}"), text).map(Some),
    }
}

/// The longest name of a node.
const MAX_NODE_NAME: usize = 31;

fn check_node_name(name: &str) -> Result<()> {
    let rest = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(rest) {
        return Err(Error::usage(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > MAX_NODE_NAME {
        return Err(Error::usage("Node name too long"));
    }
    Ok(())
}

/// Drivers of qemu that are no formats and are not here, and why.
const REFUSED: &[(&str, &str)] = &[
    ("throttle", "limit the rate of convert and commit with -r"),
    ("copy-on-read", "it would write to the image while it is read; use rebase or convert"),
    ("compress", "use convert -c"),
    ("preallocate", "use -o preallocation= when the image is created"),
    ("snapshot-access", "it belongs to a running backup job of qemu"),
    ("copy-before-write", "it belongs to a running backup job of qemu"),
    ("replication", "it belongs to a pair of running machines"),
    ("blkdebug", "it is for testing qemu itself"),
    ("blkverify", "it is for testing qemu itself; use compare"),
    ("blkreplay", "it is for testing qemu itself"),
    ("blklogwrites", "it is for testing qemu itself"),
    ("quorum", "open one of its children"),
];

/// The error for a driver that is not a format.
fn not_a_format(name: &str, options: &Map<String, Value>) -> Error {
    let Some((_, reason)) = REFUSED.iter().find(|(driver, _)| *driver == name) else {
        return unknown_driver(name);
    };
    if name == "throttle" && !options.contains_key("throttle-group") {
        return Error::usage("Please specify a throttle group");
    }
    Error::unsupported(format!("the '{name}' driver is not in this version of vimg")).hint(*reason)
}

/// The protocol of that name, if it is one (formats are not).
fn protocol_driver(name: &str) -> Option<&'static str> {
    if Format::from_name(name).is_some() || name.contains('+') {
        return None;
    }
    driver_of_scheme(name)
}

fn take_backing(options: &mut Map<String, Value>, warnings: &mut Vec<String>) -> Result<Backing> {
    Ok(match options.remove("backing") {
        None => Backing::FromImage,
        Some(Value::Null) => Backing::None,
        Some(Value::String(empty)) if empty.is_empty() => {
            warnings.push("Use of \"backing\": \"\" is deprecated; use \"backing\": null instead".to_owned());
            Backing::None
        }
        Some(Value::Object(node)) => Backing::Node(Box::new(Node::from_options(node, warnings)?)),
        Some(reference) => return Err(no_such_node(&reference)),
    })
}

/// Takes an option whose value is text (or a number or switch, which JSON spells without quotes).
pub(super) fn take_text(options: &mut Map<String, Value>, key: &str) -> Result<Option<String>> {
    match options.remove(key) {
        None => Ok(None),
        Some(value) => match text_of(&value) {
            Some(text) => Ok(Some(text)),
            None => Err(Error::usage(format!("Invalid parameter type for '{key}', expected: string"))),
        },
    }
}

/// A scalar as text, as qemu spells it.
pub(crate) fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
        _ => None,
    }
}

fn take_bool(options: &mut Map<String, Value>, key: &str) -> Result<Option<bool>> {
    match take_text(options, key)?.as_deref() {
        None => Ok(None),
        Some(text) => parse_bool(key, text).map(Some),
    }
}

/// A switch.
///
/// # Errors
/// In qemu's words.
pub(crate) fn parse_bool(key: &str, text: &str) -> Result<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Error::usage(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

/// The option that qemu would complain about first.
pub(super) fn first_in_qemu_order(options: &Map<String, Value>) -> Option<String> {
    keyval::flatten(options).into_iter().map(|(key, _)| key).min_by_key(|key| super::json::bucket(key))
}

/// qemu's words for a driver that does not exist.
pub(crate) fn unknown_driver(name: &str) -> Error {
    Error::usage(format!("Unknown driver '{name}'"))
}

fn invalid_value(value: &str) -> Error {
    Error::usage(format!("invalid parameter value: {value}"))
}

fn no_such_node(reference: &Value) -> Error {
    let name = text_of(reference).unwrap_or_else(|| reference.to_string());
    Error::usage(format!("Cannot find device='{name}' nor node-name='{name}'"))
        .hint("with --image-opts, name the file as file.filename=PATH")
}

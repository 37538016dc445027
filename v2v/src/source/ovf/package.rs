//! What the machines of a package share: files, disks, properties, configurations.

use std::collections::HashMap;

use block::{Error, Result};
use roxmltree::Node;

use super::sections;
use crate::source::units;
use crate::source::xml::NodeExt as _;

/// The longest text that properties are put into, in bytes.
const MOST_EXPANDED: usize = 4096;
/// The longest chain of disks.
const MOST_PARENTS: usize = 64;

/// A file of the package.
#[derive(Debug, Clone)]
pub(super) struct File {
    pub(super) href: String,
    compression: Option<String>,
    chunk_size: Option<String>,
}

/// A disk of the package.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// Its file; `None`: it is empty.
    file: Option<String>,
    capacity: Capacity,
    /// The URI of its format.
    pub(super) format: String,
    parent: Option<String>,
}

/// A size, which may depend on a property.
#[derive(Debug, Clone)]
struct Capacity {
    written: String,
    unit: String,
}

/// A disk with those that it is made of.
#[derive(Debug)]
pub(super) struct Chain<'a> {
    /// The disk itself first, its parent next.
    pub(super) members: Vec<(&'a Disk, Option<&'a File>)>,
    /// Its size in bytes.
    pub(super) capacity_bytes: Option<u64>,
}

/// Files, disks, properties, and the configuration that is in force.
#[derive(Debug, Default)]
pub(super) struct Package {
    files: HashMap<String, File>,
    disks: HashMap<String, Disk>,
    properties: HashMap<String, String>,
    configuration: Option<String>,
}

impl Package {
    pub(super) fn read(
        envelope: Node<'_, '_>,
        system: Node<'_, '_>,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let mut package = Self::default();
        let references = envelope.one("References");
        for node in references.iter().flat_map(|references| references.all("File")) {
            package.add_file(node);
        }
        for node in
            sections(envelope, "DiskSection").flat_map(|section| section.all("Disk").collect::<Vec<_>>())
        {
            package.add_disk(node);
        }
        // Properties of the collections around the machine hold for it, its own come first.
        for scope in system.ancestors() {
            let products = sections(scope, "ProductSection").collect::<Vec<_>>();
            products.into_iter().for_each(|product| package.add_properties(product));
        }
        package.configuration = configuration(envelope, notes);
        Ok(package)
    }

    fn add_file(&mut self, node: Node<'_, '_>) {
        let (Some(id), Some(href)) = (node.attr("id"), node.attr("href")) else { return };
        let compression = node.attr("compression").filter(|kind| !kind.eq_ignore_ascii_case("identity"));
        let file = File {
            href: href.to_owned(),
            compression: compression.map(str::to_ascii_lowercase),
            chunk_size: node.attr("chunkSize").map(str::to_owned),
        };
        self.files.entry(id.to_owned()).or_insert(file);
    }

    fn add_disk(&mut self, node: Node<'_, '_>) {
        let Some(id) = node.attr("diskId") else { return };
        let disk = Disk {
            file: node.attr("fileRef").map(str::to_owned),
            capacity: Capacity {
                written: node.attr("capacity").unwrap_or_default().to_owned(),
                unit: node.attr("capacityAllocationUnits").unwrap_or("byte").to_owned(),
            },
            format: node.attr("format").unwrap_or_default().to_owned(),
            parent: node.attr("parentRef").map(str::to_owned),
        };
        self.disks.entry(id.to_owned()).or_insert(disk);
    }

    fn add_properties(&mut self, product: Node<'_, '_>) {
        let (class, instance) = (product.attr("class"), product.attr("instance"));
        for node in product.all("Property") {
            let Some(key) = node.attr("key") else { continue };
            let value =
                node.attr("value").or_else(|| node.one("Value").and_then(|value| value.attr("value")));
            let Some(value) = value else { continue };
            let parts = [class, Some(key), instance];
            let full: Vec<&str> = parts.into_iter().flatten().collect();
            self.properties.entry(full.join(".")).or_insert_with(|| value.to_owned());
        }
    }

    /// Whether there are properties.
    pub(super) fn has_properties(&self) -> bool {
        !self.properties.is_empty()
    }

    /// Whether an item with this attribute `configuration` is part of the machine.
    pub(super) fn is_in_force(&self, configurations: Option<&str>) -> bool {
        match (configurations, &self.configuration) {
            (None, _) => true,
            (Some(listed), Some(ours)) => listed.split_whitespace().any(|name| name == ours),
            (Some(_), None) => false,
        }
    }

    /// Puts the values of properties in the place of `${NAME}`.
    pub(super) fn expand(&self, text: &str) -> Option<String> {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once("${") {
            let (name, after) = behind.split_once('}')?;
            out.push_str(before);
            out.push_str(self.properties.get(name)?);
            rest = after;
            if out.len() > MOST_EXPANDED {
                return None;
            }
        }
        out.push_str(rest);
        Some(out)
    }

    /// The file that a resource (`ovf:/file/ID`) means.
    pub(super) fn file_of(&self, resource: &str) -> Option<&File> {
        self.files.get(id_in(resource, "file")?)
    }

    /// The disk that a resource (`ovf:/disk/ID`, or a file without a disk) means, with its parents.
    ///
    /// # Errors
    /// `Invalid`: there is no such disk, its size is no number, its parents form a circle, or its file is not listed.
    pub(super) fn disk_of(&self, resource: &str) -> Result<Chain<'_>> {
        let first = id_in(resource, "disk").unwrap_or(resource);
        let (mut members, mut next) = (vec![], Some(first));
        let mut capacity_bytes = None;
        while let Some(id) = next {
            let disk = self.disks.get(id).ok_or_else(|| {
                Error::invalid(format!("the package has no disk '{id}' (named as '{resource}')"))
            })?;
            if members.is_empty() {
                capacity_bytes = self.capacity(id, &disk.capacity)?;
            }
            let file = match &disk.file {
                Some(file) => Some(self.files.get(file).ok_or_else(|| {
                    Error::invalid(format!(
                        "the disk '{id}' is in the file '{file}', which the package does not list"
                    ))
                })?),
                None => None,
            };
            members.push((disk, file));
            if members.len() > MOST_PARENTS {
                return Err(Error::invalid(format!(
                    "the disk '{first}' has more than {MOST_PARENTS} parents"
                )));
            }
            next = disk.parent.as_deref();
        }
        Ok(Chain { members, capacity_bytes })
    }

    fn capacity(&self, id: &str, capacity: &Capacity) -> Result<Option<u64>> {
        if capacity.written.is_empty() {
            return Ok(None);
        }
        let wrong = || {
            Error::invalid(format!(
                "the disk '{id}' has the capacity '{}' in units of '{}', which is no size",
                capacity.written, capacity.unit
            ))
        };
        let number: u64 =
            self.expand(&capacity.written).and_then(|text| text.trim().parse().ok()).ok_or_else(wrong)?;
        let unit = units::of_ovf(&capacity.unit).ok_or_else(wrong)?;
        number.checked_mul(unit).map(Some).ok_or_else(wrong)
    }
}

impl File {
    /// Refuses what cannot be read where it lies.
    ///
    /// # Errors
    /// `Unsupported`, with the way out.
    pub(super) fn check_readable(&self) -> Result<()> {
        let href = &self.href;
        if let Some(size) = &self.chunk_size {
            let message = format!("the file '{href}' of the package is cut into chunks of {size} bytes");
            return Err(Error::unsupported(message).hint(format!(
                "put them together (cat '{href}'.0* > '{href}'), and remove chunkSize from the description"
            )));
        }
        if let Some(kind) = self.compression.as_deref().filter(|kind| *kind != "gzip") {
            let message = format!("the file '{href}' of the package is compressed with '{kind}'");
            return Err(Error::unsupported(message)
                .hint("decompress it, and remove the attribute compression from the description"));
        }
        let scheme = href.split_once("://").map(|(scheme, _)| scheme);
        if let Some(scheme) = scheme.filter(|scheme| !scheme.eq_ignore_ascii_case("file")) {
            let message = format!("the file '{href}' is not in the package but at a URL ({scheme})");
            return Err(Error::unsupported(message).hint("download it into the package, and name it there"));
        }
        Ok(())
    }

    /// Whether it is gzipped.
    pub(super) fn is_compressed(&self) -> bool {
        self.compression.is_some()
    }
}

/// The id in `ovf:/disk/ID`, `/disk/ID`, `ovf://disk/ID`.
fn id_in<'a>(resource: &'a str, kind: &str) -> Option<&'a str> {
    let path = resource.strip_prefix("ovf:").unwrap_or(resource).trim_start_matches('/');
    path.strip_prefix(kind)?.strip_prefix('/').map(str::trim).filter(|id| !id.is_empty())
}

/// The configuration that is in force if nobody chooses: the one called default, or the first.
fn configuration(envelope: Node<'_, '_>, notes: &mut Vec<String>) -> Option<String> {
    let options = sections(envelope, "DeploymentOptionSection").next()?;
    let all: Vec<_> =
        options.all("Configuration").filter_map(|node| Some((node, node.attr("id")?))).collect();
    let is_default = |node: &Node<'_, '_>| matches!(node.attr("default"), Some("true" | "1"));
    let (_, id) = all.iter().find(|(node, _)| is_default(node)).or_else(|| all.first())?;
    if all.len() > 1 {
        notes.push(format!("The package has {} configurations; '{id}' was taken.", all.len()));
    }
    Some((*id).to_owned())
}

/// The spelling of a file's name that leads to a file: as it stands, or with its percent signs decoded.
pub(in crate::source) fn spelled(href: &str, exists: impl Fn(&str) -> bool) -> Option<String> {
    let plain = href.strip_prefix("file://").unwrap_or(href);
    let decoded = percent_decoded(plain);
    [Some(plain.to_owned()), decoded].into_iter().flatten().find(|name| exists(name))
}

fn percent_decoded(name: &str) -> Option<String> {
    if !name.contains('%') {
        return None;
    }
    let (mut out, mut rest) = (vec![], name.as_bytes());
    while let Some((first, behind)) = rest.split_first() {
        let code = behind.get(..2).filter(|_| *first == b'%').and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = behind.get(2..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8(out).ok()
}

/// What a gzipped file is called when it is inflated.
pub(in crate::source) fn inflated_name(name: &str) -> &str {
    let last = name.rsplit('/').next().unwrap_or(name);
    let end = last.len().saturating_sub(3);
    match last.get(end..) {
        Some(ending) if ending.eq_ignore_ascii_case(".gz") => last.get(..end).unwrap_or(last),
        _ => last,
    }
}

//! VMware's disks: what the crate `vmdk` needs of the rest of this one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::{FileOptions, HostFile};
use block::image::{CheckReport, Image, Repair};
use block::{BlockDevice, Error, Preallocation, Result, ResultExt as _, Storage};
use vmdk::create::{CreateOptions, Subformat};
use vmdk::disk::Parent;
use vmdk::{Layout, OpenOptions};

use super::{Abilities, BackingName, Driver, ExtentFile, Found, How, Made, Make, Parts, Place};
use crate::format::Format;
use crate::open::{Layer, resolve_name};
use crate::options::{Definition, Kind, Options, SIZE, option, with_default};
use crate::spec::parse_bool;

/// The driver.
#[derive(Debug)]
pub(super) struct Vmdk;

/// What a stream that goes into a pipe calls itself, as VMware's products do.
const STREAM_NAME: &str = "generated-stream.vmdk";

/// Node option: the parent is taken as it is, whatever it has become since. The way out after a commit to the parent that
/// was interrupted before the image could record it.
const ANY_PARENT: &str = "ignore-parent-id";

/// In the order of qemu's line about what it creates.
const OPTIONS: &[Definition] = &[
    SIZE,
    option(
        "adapter_type",
        Kind::Text,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    option("backing_file", Kind::Text, "File name of a base image"),
    option("backing_fmt", Kind::Text, "Must be 'vmdk' if present"),
    with_default("compat6", Kind::Bool, "off", "VMDK version 6 image"),
    with_default("hwversion", Kind::Text, "undefined", "VMDK hardware version"),
    option("toolsversion", Kind::Text, "VMware guest tools version"),
    option(
        "subformat",
        Kind::Text,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | \
         twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    ),
    option("zeroed_grain", Kind::Bool, "Enable efficient zero writes using the zeroed-grain GTE feature"),
];

impl Driver for Vmdk {
    fn abilities(&self) -> Abilities {
        Abilities { create: true, compress: true, backing: true, fixed_places: false }
    }

    fn probe(&self, first: &[u8], _storage: &dyn Storage) -> Result<bool> {
        Ok(Layout::probe(first))
    }

    fn read(&self, storage: &Arc<dyn Storage>, how: &How) -> Result<Box<dyn Found>> {
        let layout = Layout::read(storage)?;
        if !how.metadata_only && !how.for_check {
            layout.parent()?;
        }
        Ok(Box::new(Disk { layout, for_check: how.for_check }))
    }

    fn node_options(&self) -> &'static [&'static str] {
        &[ANY_PARENT]
    }

    fn create_options(&self) -> &'static [Definition] {
        OPTIONS
    }

    fn plan(&self, size: u64, options: &Options) -> Result<Box<dyn Make>> {
        let plan = Plan::new(size, options)?;
        plan.create.validate()?;
        Ok(Box::new(plan))
    }
}

/// A disk whose descriptor has been read.
#[derive(Debug)]
struct Disk {
    layout: Layout,
    for_check: bool,
}

impl Disk {
    fn assemble(&self, parts: Parts<'_>, writable: bool) -> Result<Arc<vmdk::Vmdk>> {
        let level = parts.level.level.and_then(|level| u32::try_from(level).ok());
        let any = parts.option(ANY_PARENT).map(|value| parse_bool(ANY_PARENT, &value)).transpose()?;
        let mut parent = parts.backing.as_deref().map(parent);
        if let (Some(true), Some(parent)) = (any, &mut parent) {
            parent.cid = self.layout.descriptor().map(|descriptor| descriptor.parent_cid());
        }
        let options = OpenOptions {
            writable,
            parent,
            files: parts.extents.into_iter().map(|file| file as Arc<dyn Storage>).collect(),
            level,
            metadata_only: parts.metadata_only,
            for_check: self.for_check,
        };
        vmdk::Vmdk::open(parts.storage, self.layout.clone(), options)
    }
}

fn parent(layer: &Layer) -> Parent {
    let id = layer.image.content_id().filter(|_| layer.format == Format::Vmdk);
    let cid = id.and_then(|id| id.try_into().ok()).map(u32::from_le_bytes);
    Parent { device: layer.device(), cid, name: layer.filename.clone() }
}

impl Found for Disk {
    /// As the descriptor says it; or, when the disks have been moved from where they were made, beside this one.
    fn backing(&self) -> Option<BackingName> {
        let hint = self.layout.parent().ok().flatten()?;
        let name = hint.rsplit(['/', '\\']).next().filter(|name| !name.is_empty() && *name != hint);
        let names = std::iter::once(hint).chain(name).map(str::to_owned).collect();
        Some(BackingName { names, format: Some("vmdk".to_owned()), confined: true })
    }

    fn extents(&self) -> Vec<ExtentFile> {
        let files = self.layout.files().iter();
        files.map(|file| ExtentFile { name: file.name.clone(), writable: file.writable }).collect()
    }

    fn warnings(&self) -> Vec<String> {
        self.layout.warnings()
    }

    fn open(&self, parts: Parts<'_>) -> Result<Arc<dyn Image>> {
        let writable = parts.writable;
        Ok(self.assemble(parts, writable)?)
    }

    fn check(&self, parts: Parts<'_>, repair: Repair) -> Result<CheckReport> {
        self.assemble(parts, repair != Repair::None)?.check(repair)
    }
}

/// An understood request to create.
#[derive(Debug)]
struct Plan {
    /// The content ID of the parent is not known yet.
    create: CreateOptions,
    backing: Option<String>,
}

impl Plan {
    fn new(size: u64, options: &Options) -> Result<Self> {
        let invalid = |value: &str| Error::usage(format!("invalid parameter value: {value}"));
        let subformat = match options.given("subformat") {
            Some(name) => Subformat::from_name(name).ok_or_else(|| invalid(name))?,
            None => Subformat::MonolithicSparse,
        };
        let hardware = match (options.given("hwversion"), options.is_on("compat6")) {
            (Some(version), true) if version != "undefined" => {
                return Err(Error::usage("compat6 cannot be enabled with hwversion set"));
            }
            (Some(version), false) if version != "undefined" => version,
            (_, true) => "6",
            (_, false) => "4",
        };
        let backing = options.given("backing_file").map(str::to_owned);
        let format = options.given("backing_fmt").filter(|format| !format.is_empty());
        if backing.is_some() && format.is_some_and(|format| format != "vmdk") {
            return Err(Error::usage("backing_file must be a vmdk image"));
        }
        let create = CreateOptions {
            size,
            subformat,
            adapter: options.given("adapter_type").unwrap_or("ide").to_owned(),
            hardware: hardware.to_owned(),
            tools: options.given("toolsversion").unwrap_or("2147483647").to_owned(),
            zero_grains: options.is_on("zeroed_grain"),
            parent: backing.clone().map(|name| (name, 0)),
            preallocation: preallocation(options)?,
        };
        Ok(Self { create, backing })
    }

    /// The options with the parent's content ID.
    fn with_parent(&self, named: &Path) -> Result<CreateOptions> {
        let mut create = self.create.clone();
        if let Some(name) = &self.backing {
            let cid = read_cid(name, named).context(|| format!("Could not open '{name}'"))?;
            create.parent = Some((name.clone(), cid));
        }
        Ok(create)
    }
}

fn preallocation(options: &Options) -> Result<Preallocation> {
    match options.given("preallocation") {
        None | Some("off") => Ok(Preallocation::Off),
        Some("metadata") => Ok(Preallocation::Metadata),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some(other) => Err(Error::usage(format!("Invalid parameter '{other}'"))),
    }
}

/// The content ID of an image that is to be a parent.
fn read_cid(name: &str, child: &Path) -> Result<u32> {
    let path = resolve_name(child.to_str(), name)?;
    let storage: Arc<dyn Storage> = Arc::new(HostFile::open(Path::new(&path), &FileOptions::read_only())?);
    let layout = Layout::read(&storage)?;
    let descriptor = layout.descriptor();
    descriptor.map(|descriptor| descriptor.cid()).ok_or_else(|| Error::invalid("it has no content ID"))
}

fn beside(named: &Path, file: &str) -> PathBuf {
    named.with_file_name(file)
}

fn file_name(named: &Path) -> Result<&str> {
    let name = named.file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| Error::usage("the name of the image cannot be written into a descriptor"))
}

impl Make for Plan {
    fn others(&self, named: &Path) -> Vec<PathBuf> {
        let Ok(name) = file_name(named) else { return vec![] };
        self.create.extents(name).iter().map(|extent| beside(named, &extent.file)).collect()
    }

    fn carry_out(&self, made: &mut Made, place: &Place<'_>) -> Result<()> {
        let name = file_name(place.named)?;
        let create = self.with_parent(place.named)?;
        let descriptor = create.descriptor(name)?;
        if create.subformat.is_one_file() {
            let storage: Arc<dyn Storage> = made.file(place.path, place.cache)?;
            return create.make_one_file(&storage, &descriptor);
        }
        let mut all = self.others(place.named);
        all.push(place.path.to_owned());
        Made::check_all(&all, place.cache)?;
        // The descriptor comes last: what it names is there.
        for extent in create.extents(name) {
            let file = made.file(&place.other(&beside(place.named, &extent.file)), place.cache)?;
            create.make_extent(&*file, extent.sectors, None)?;
        }
        made.file(place.path, place.cache)?.write_at(descriptor.as_bytes(), 0)
    }

    fn stream(
        &self,
        output: &Arc<dyn Storage>,
        level: qcow2::codec::Level,
    ) -> Result<Option<Arc<dyn BlockDevice>>> {
        if self.create.subformat != Subformat::StreamOptimized || self.backing.is_some() {
            return Ok(None);
        }
        let descriptor = self.create.descriptor(STREAM_NAME)?;
        let level = level.level.and_then(|level| u32::try_from(level).ok());
        let target = vmdk::stream::Target::new(output, self.create.sectors(), descriptor.as_bytes(), level)?;
        Ok(Some(Arc::new(target)))
    }
}

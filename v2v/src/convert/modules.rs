//! A kernel's folder of modules: what depends on what, and the indexes that modprobe reads.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use block::{Error, Result};

use super::index;
use super::tree::Tree;

/// The most bytes of an index.
const MOST_INDEX: u64 = 64 << 20;
/// The most bytes of a module.
const MOST_MODULE: u64 = 64 << 20;
/// The most bytes of a module when it is unpacked.
const MOST_UNPACKED: u64 = 128 << 20;

/// The files that modprobe, busybox and libkmod read besides the dependencies.
pub(crate) const INDEXES: [&str; 14] = [
    "modules.alias",
    "modules.alias.bin",
    "modules.builtin",
    "modules.builtin.bin",
    "modules.builtin.alias.bin",
    "modules.builtin.modinfo",
    "modules.softdep",
    "modules.weakdep",
    "modules.symbols",
    "modules.symbols.bin",
    "modules.order",
    "modules.devname",
    "modules.dep",
    "modules.dep.bin",
];

/// A module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// Its path within the folder.
    pub(crate) path: String,
    /// Names of the modules that it needs.
    pub(crate) needs: Vec<String>,
}

/// The folder.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    pub(crate) folder: PathBuf,
    pub(crate) modules: BTreeMap<String, Module>,
    /// Names in the order of `modules.dep`.
    order: Vec<String>,
    /// What should be loaded before a module, if it is there.
    before: HashMap<String, Vec<String>>,
    built_in: HashSet<String>,
}

/// The name of a module by its path: `_` for `-`, no suffix.
pub(crate) fn name_of(path: &str) -> Option<String> {
    let name = path.rsplit('/').next()?;
    let (name, suffix) = name.split_at(name.find(".ko")?);
    matches!(suffix, ".ko" | ".ko.xz" | ".ko.zst" | ".ko.gz").then(|| name.replace('-', "_"))
}

/// The suffix of a module's file.
pub(crate) fn suffix_of(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.find(".ko").map_or("", |at| &name[at..])
}

impl Modules {
    /// Reads what depmod has found out. `None` if there is no list of dependencies.
    pub(crate) fn read(tree: &dyn Tree, folder: &Path) -> Option<Self> {
        let text = |name: &str| {
            let place = tree.locate(&folder.join(name))?;
            let bytes = tree.read(&place, MOST_INDEX).ok()??;
            Some(String::from_utf8_lossy(&bytes).into_owned())
        };
        let mut modules = Self { folder: folder.to_owned(), ..Self::default() };
        modules.take_dependencies(&text("modules.dep")?);
        modules.take_soft(&text("modules.softdep").unwrap_or_default());
        modules.built_in = text("modules.builtin").unwrap_or_default().lines().filter_map(name_of).collect();
        Some(modules)
    }

    fn take_dependencies(&mut self, text: &str) {
        // Old lists have absolute paths.
        let own = |path: &str| match path.strip_prefix('/') {
            Some(path) => path.splitn(4, '/').nth(3).unwrap_or(path).to_owned(),
            None => path.to_owned(),
        };
        for line in text.lines() {
            let Some((path, needs)) = line.split_once(':') else { continue };
            let (path, needs) = (own(path.trim()), needs.split_whitespace().filter_map(name_of).collect());
            if let Some(name) = name_of(&path)
                && self.modules.insert(name.clone(), Module { path, needs }).is_none()
            {
                self.order.push(name);
            }
        }
    }

    fn take_soft(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if words.next() != Some("softdep") {
                continue;
            }
            let Some(name) = words.next() else { continue };
            let before =
                words.skip_while(|word| *word != "pre:").skip(1).take_while(|word| !word.ends_with(':'));
            self.before
                .entry(name.replace('-', "_"))
                .or_default()
                .extend(before.map(|name| name.replace('-', "_")));
        }
    }

    /// Whether the kernel itself has it.
    pub(crate) fn is_built_in(&self, name: &str) -> bool {
        self.built_in.contains(name)
    }

    /// What has to be added for `wanted`, besides what is `present`: modules with all that they need, each after what it
    /// needs. What the kernel has itself is left out.
    ///
    /// # Errors
    /// `NotFound`, with the name of a module that is wanted or needed and nowhere.
    pub(crate) fn closure(&self, wanted: &[&str], present: &dyn Fn(&str) -> bool) -> Result<Vec<String>> {
        let mut walk = Walk { modules: self, present, seen: HashSet::new(), found: vec![] };
        for name in wanted {
            walk.visit(name, 0, true)?;
        }
        Ok(walk.found)
    }

    /// The first of these modules whose file is not there: what is left of a kernel that was removed may list them.
    pub(crate) fn absent(&self, tree: &dyn Tree, names: &[String]) -> Option<String> {
        let mut paths = names.iter().filter_map(|name| self.modules.get(name)).map(|module| &module.path);
        let is_there = |path: &&String| {
            tree.locate(&self.folder.join(path)).is_some_and(|place| tree.stat(&place).is_some())
        };
        paths.find(|path| !is_there(path)).map(|path| self.folder.join(path).display().to_string())
    }

    /// The bytes of a file of the folder; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is larger than any.
    pub(crate) fn file(&self, tree: &dyn Tree, name: &str) -> Result<Option<Vec<u8>>> {
        match tree.locate(&self.folder.join(name)) {
            Some(place) => tree.read(&place, MOST_MODULE),
            None => Ok(None),
        }
    }

    /// The dependencies, as text and as libkmod's index, where modules have the paths that `path` gives.
    pub(crate) fn dependencies(&self, path: &dyn Fn(&str, &Module) -> String) -> (Vec<u8>, Vec<u8>) {
        let paths: HashMap<&str, String> =
            self.modules.iter().map(|(name, module)| (name.as_str(), path(name, module))).collect();
        let line = |name: &str| {
            let module = self.modules.get(name)?;
            let mut line = format!("{}:", paths.get(name)?);
            for needed in module.needs.iter().filter_map(|needed| paths.get(needed.as_str())) {
                line.push(' ');
                line.push_str(needed);
            }
            Some(line)
        };
        let (mut text, mut entries) = (String::new(), BTreeMap::new());
        for (priority, name) in (0..).zip(&self.order) {
            let Some(line) = line(name) else { continue };
            text.push_str(&line);
            text.push('\n');
            entries.insert(name.clone().into_bytes(), (priority, line.into_bytes()));
        }
        (text.into_bytes(), index::build(&entries))
    }
}

/// A walk over what modules need.
struct Walk<'a> {
    modules: &'a Modules,
    present: &'a dyn Fn(&str) -> bool,
    /// Every module is visited once, also where a list that somebody has written goes round in circles.
    seen: HashSet<String>,
    found: Vec<String>,
}

impl Walk<'_> {
    fn visit(&mut self, name: &str, depth: usize, must: bool) -> Result<()> {
        const DEEPEST: usize = 64;
        let modules = self.modules;
        if modules.is_built_in(name) || (self.present)(name) || depth > DEEPEST || self.seen.contains(name) {
            return Ok(());
        }
        let Some(module) = modules.modules.get(name) else {
            let missing = || Error::new(block::ErrorKind::NotFound, format!("there is no module {name}"));
            return if must { Err(missing()) } else { Ok(()) };
        };
        self.seen.insert(name.to_owned());
        for before in modules.before.get(name).into_iter().flatten() {
            self.visit(before, depth + 1, false)?;
        }
        for needed in &module.needs {
            self.visit(needed, depth + 1, true)?;
        }
        self.found.push(name.to_owned());
        Ok(())
    }
}

/// A module's file without compression.
///
/// # Errors
/// It is damaged, or larger than any module.
pub(crate) fn unpack(path: &str, bytes: Vec<u8>) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let reader: Box<dyn std::io::Read> = match suffix_of(path) {
        ".ko.xz" => Box::new(lzma_rust2::XzReader::new_mem_limit(&bytes[..], true, 160 << 10)),
        ".ko.zst" => Box::new(zstd::stream::read::Decoder::new(&bytes[..])?),
        ".ko.gz" => Box::new(flate2::read::MultiGzDecoder::new(&bytes[..])),
        _ => return Ok(bytes),
    };
    let mut out = vec![];
    let read = reader.take(MOST_UNPACKED + 1).read_to_end(&mut out);
    match read {
        Err(error) => Err(Error::from(error).context(path.to_owned())),
        Ok(_) if out.len() as u64 > MOST_UNPACKED => {
            Err(Error::unsupported(format!("{path}: larger than any module")))
        }
        Ok(_) => Ok(out),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::tree::memory::Memory;
    use super::*;

    pub(crate) const DEP: &str = "\
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio_pci_modern_dev.ko kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_pci_modern_dev.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko:
kernel/drivers/scsi/sd_mod.ko: kernel/drivers/scsi/scsi_mod.ko kernel/lib/crc-t10dif.ko
kernel/drivers/scsi/scsi_mod.ko:
kernel/lib/crc-t10dif.ko:
kernel/drivers/scsi/broken.ko: kernel/gone.ko
";

    fn modules(dep: &str, softdep: &str) -> Modules {
        let tree = Memory::default()
            .file("/usr/lib/modules/1/modules.dep", dep)
            .file("/usr/lib/modules/1/modules.softdep", softdep)
            .file("/usr/lib/modules/1/modules.builtin", "kernel/drivers/scsi/scsi_mod.ko\n");
        Modules::read(&tree, Path::new("/usr/lib/modules/1")).unwrap()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let found = modules(DEP, "").closure(&["virtio_pci", "virtio_blk"], &|_| false).unwrap();
        assert_eq!(found, ["virtio_pci_modern_dev", "virtio", "virtio_ring", "virtio_pci", "virtio_blk"]);
        let some = modules(DEP, "").closure(&["virtio_blk"], &|name| name == "virtio").unwrap();
        assert_eq!(some, ["virtio_ring", "virtio_blk"]);
        // What the kernel has is no file.
        assert_eq!(modules(DEP, "").closure(&["sd_mod"], &|_| false).unwrap(), ["crc_t10dif", "sd_mod"]);
        let error = modules(DEP, "").closure(&["broken"], &|_| false).unwrap_err();
        assert_eq!(error.to_string(), "there is no module gone");
    }

    /// Every way through such a list would be a walk of its own: 40 modules, each of which needs all the others.
    #[test]
    fn circles_do_not_run_on() {
        let name = |index: u32| format!("kernel/m{index}.ko");
        let all: Vec<_> = (0..40).map(name).collect();
        let dep: String = all.iter().map(|name| format!("{name}: {}\n", all.join(" "))).collect();
        let found = modules(&dep, "").closure(&["m0"], &|_| false).unwrap();
        assert_eq!((found.len(), found.last().map(String::as_str)), (40, Some("m0")));
    }

    #[test]
    fn soft_dependencies_are_taken_if_they_are_there() {
        let softdep = "# comment\nsoftdep virtio_ring pre: crc-t10dif nowhere post: sd_mod\n";
        let found = modules(DEP, softdep).closure(&["virtio_blk"], &|_| false).unwrap();
        assert_eq!(found, ["crc_t10dif", "virtio", "virtio_ring", "virtio_blk"]);
    }

    #[test]
    fn old_lists_have_absolute_paths() {
        let old = "/lib/modules/2.6.18/kernel/drivers/block/virtio_blk.ko: /lib/modules/2.6.18/kernel/drivers/virtio/virtio.ko\n";
        let modules = modules(old, "");
        assert_eq!(modules.modules["virtio_blk"].path, "kernel/drivers/block/virtio_blk.ko");
        assert_eq!(modules.modules["virtio_blk"].needs, ["virtio"]);
    }

    #[test]
    fn names_and_suffixes() {
        assert_eq!(name_of("kernel/crc-t10dif.ko.xz").as_deref(), Some("crc_t10dif"));
        assert_eq!(name_of("modules.dep"), None);
        assert_eq!(name_of("a.ko.sig"), None);
        assert_eq!(suffix_of("x/a.ko.zst"), ".ko.zst");
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        use std::io::Write as _;
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::default());
        gzip.write_all(b"module").unwrap();
        assert_eq!(unpack("a.ko.gz", gzip.finish().unwrap()).unwrap(), b"module");
        assert_eq!(unpack("a.ko.zst", zstd::encode_all(&b"module"[..], 1).unwrap()).unwrap(), b"module");
        assert_eq!(unpack("a.ko", b"module".to_vec()).unwrap(), b"module");
        unpack("a.ko.xz", b"module".to_vec()).unwrap_err();
    }

    #[test]
    fn dependencies_with_other_paths() {
        let modules = modules(DEP, "");
        let (text, _) = modules.dependencies(&|_, module| module.path.clone());
        assert_eq!(String::from_utf8(text).unwrap(), DEP.replace(" kernel/gone.ko", ""));
        let (text, index) = modules.dependencies(&|name, _| format!("kernel/{name}.ko.xz"));
        assert!(
            String::from_utf8(text).unwrap().starts_with("kernel/virtio_blk.ko.xz: kernel/virtio_ring.ko.xz")
        );
        assert_eq!(
            index::find(&index, b"virtio_ring").unwrap(),
            b"kernel/virtio_ring.ko.xz: kernel/virtio.ko.xz"
        );
    }
}

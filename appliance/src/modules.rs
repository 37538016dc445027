//! Which modules of a kernel are needed for something, and in which order they are loaded: the closure over
//! `modules.dep`, `modules.softdep` and `modules.alias` (depmod(8)).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result, ResultExt as _};
use guestdisk::fs::FileSystem;

/// The most bytes of one index, and of one module after decompression.
const MOST_BYTES: u64 = 64 << 20;
/// The most modules of one appliance; distributions have a few thousand in all.
const MOST_MODULES: usize = 256;
/// The most bytes of all of them together: each is small, and the appliance has to have room for them.
const MOST_IN_ALL: u64 = 256 << 20;
/// How far a chain of needs goes; those of real kernels have a dozen links.
const DEEPEST: usize = 64;

/// A folder of modules (`/lib/modules/RELEASE`).
pub trait Tree {
    /// The contents of a file in it.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    fn read(&self, path: &Path) -> Result<Vec<u8>>;
}

/// A folder of this machine.
#[derive(Debug)]
pub struct HostTree(pub PathBuf);

impl Tree for HostTree {
    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        let path = self.0.join(path);
        let mut bytes = vec![];
        File::open(&path)
            .and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes))
            .context(|| path.display().to_string())?;
        Ok(bytes)
    }
}

/// A folder in a guest's file system.
#[derive(Debug)]
pub struct GuestTree<'a> {
    /// The file system.
    pub fs: &'a FileSystem,
    /// The folder in it.
    pub folder: PathBuf,
}

impl Tree for GuestTree<'_> {
    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        self.fs.read(self.folder.join(path), MOST_BYTES)
    }
}

/// A module, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with `_` for `-`.
    pub name: String,
    /// The ELF file.
    pub bytes: Vec<u8>,
}

/// What depmod(8) knows of a kernel's modules.
#[derive(Debug, Default)]
struct Index {
    /// Name to path and paths of what it needs.
    modules: BTreeMap<String, (String, Vec<String>)>,
    /// Name to names of what it wants to be there before.
    soft: BTreeMap<String, Vec<String>>,
    aliases: BTreeMap<String, Vec<String>>,
    builtin: BTreeSet<String>,
}

/// What [`closure`] finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The modules, each after those that it needs.
    pub modules: Vec<Module>,
    /// What the kernel does not know.
    pub missing: Vec<String>,
}

/// The modules for everything in `wanted` (names or aliases). What is built into the kernel needs none.
///
/// # Errors
/// There is no `modules.dep`; a module that is listed cannot be read.
pub fn closure(tree: &dyn Tree, wanted: &[&str]) -> Result<Found> {
    let index = Index::read(tree)?;
    let mut order = Order { index: &index, seen: BTreeSet::new(), paths: vec![] };
    wanted.iter().for_each(|name| order.add(name, 0));
    if order.paths.len() > MOST_MODULES {
        return Err(Error::unsupported(format!("an appliance of more than {MOST_MODULES} modules")));
    }
    let missing =
        wanted.iter().filter(|name| !index.knows(&normal(name))).map(|name| (*name).to_owned()).collect();
    let (mut modules, mut left) = (vec![], MOST_IN_ALL);
    for path in &order.paths {
        let module = read_module(tree, path, left)?;
        left = left.saturating_sub(module.bytes.len() as u64);
        modules.push(module);
    }
    Ok(Found { modules, missing })
}

/// `kernel/fs/xfs/xfs.ko.xz` is `xfs`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split(".ko").next().unwrap_or(file))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads a module of at most `most` bytes.
fn read_module(tree: &dyn Tree, path: &str, most: u64) -> Result<Module> {
    let packed = tree.read(Path::new(path)).context(|| format!("module {path}"))?;
    let bytes = unpack(path, packed, most.min(MOST_BYTES)).context(|| format!("module {path}"))?;
    Ok(Module { name: name_of(path), bytes })
}

/// Undoes the compression that a file's name tells.
fn unpack(path: &str, packed: Vec<u8>, most: u64) -> Result<Vec<u8>> {
    let ending = Path::new(path).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let mut bytes = vec![];
    let (packed, limit) = (packed.as_slice(), most.saturating_add(1));
    match ending {
        "ko" => packed.take(limit).read_to_end(&mut bytes)?,
        "gz" => flate2::read::MultiGzDecoder::new(packed).take(limit).read_to_end(&mut bytes)?,
        "zst" => zstd::stream::read::Decoder::new(packed)?.take(limit).read_to_end(&mut bytes)?,
        "xz" => lzma_rust2::XzReader::new(packed, true).take(limit).read_to_end(&mut bytes)?,
        other => return Err(Error::unsupported(format!("modules that are packed as '{other}'"))),
    };
    if bytes.len() as u64 > most {
        return Err(Error::unsupported("more bytes of modules than any kernel needs for its file systems"));
    }
    Ok(bytes)
}

impl Index {
    fn read(tree: &dyn Tree) -> Result<Self> {
        let text = |name: &str| -> Result<String> {
            let bytes = tree.read(Path::new(name)).context(|| name.to_owned())?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        // Only the first has to be there: the others say nothing where they are missing.
        let or_nothing = |name: &str| match text(name) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
            result => result,
        };
        let mut index = Self::default();
        text("modules.dep")?.lines().for_each(|line| index.dependency(line));
        or_nothing("modules.softdep")?.lines().for_each(|line| index.soft(line));
        or_nothing("modules.alias")?.lines().for_each(|line| index.alias(line));
        index.builtin = or_nothing("modules.builtin")?.lines().map(name_of).collect();
        Ok(index)
    }

    /// Whether there is something of this (normal) name.
    fn knows(&self, name: &str) -> bool {
        self.modules.contains_key(name) || self.builtin.contains(name) || self.aliases.contains_key(name)
    }

    /// `PATH: PATH PATH`.
    fn dependency(&mut self, line: &str) {
        if let Some((path, needs)) = line.split_once(':') {
            let needs = needs.split_whitespace().map(str::to_owned).collect();
            self.modules.insert(name_of(path), (path.to_owned(), needs));
        }
    }

    /// `softdep NAME pre: NAME .. post: NAME ..`; those after `post:` are of no use here.
    fn soft(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let (Some("softdep"), Some(name)) = (words.next(), words.next()) else { return };
        let before = words.take_while(|word| *word != "post:").filter(|word| *word != "pre:");
        self.soft.entry(normal(name)).or_default().extend(before.map(str::to_owned));
    }

    /// `alias PATTERN NAME`. Patterns are of use for devices only.
    fn alias(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        if let (Some("alias"), Some(alias), Some(name)) = (words.next(), words.next(), words.next())
            && !alias.contains(['*', ':'])
        {
            self.aliases.entry(normal(alias)).or_default().push(normal(name));
        }
    }
}

struct Order<'a> {
    index: &'a Index,
    seen: BTreeSet<String>,
    paths: Vec<String>,
}

impl Order<'_> {
    /// Adds the modules of this name or alias, what they need first.
    fn add(&mut self, name: &str, depth: usize) {
        let name = normal(name);
        if depth > DEEPEST || self.paths.len() > MOST_MODULES || !self.seen.insert(name.clone()) {
            return;
        }
        let depth = depth + 1;
        let index = self.index;
        match index.modules.get(&name) {
            Some((path, needs)) => {
                needs.iter().rev().for_each(|need| self.add(&name_of(need), depth));
                index.soft.get(&name).into_iter().flatten().for_each(|soft| self.add(soft, depth));
                self.paths.push(path.clone());
            }
            None if index.builtin.contains(&name) => {}
            None => index.aliases.get(&name).into_iter().flatten().for_each(|module| self.add(module, depth)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[derive(Debug)]
    struct Files(BTreeMap<&'static str, Vec<u8>>);

    impl Tree for Files {
        fn read(&self, path: &Path) -> Result<Vec<u8>> {
            let missing = || Error::new(ErrorKind::NotFound, "no such file");
            self.0.get(path.to_str().unwrap()).cloned().ok_or_else(missing)
        }
    }

    const DEP: &str = "kernel/fs/xfs/xfs.ko.zst: kernel/lib/libcrc32c.ko\n\
        kernel/lib/libcrc32c.ko:\n\
        kernel/crypto/crc32c_fast.ko.gz:\n\
        kernel/a.ko: kernel/b.ko\n\
        kernel/b.ko: kernel/a.ko\n";

    fn tree() -> Files {
        let mut packed = vec![];
        let mut writer = flate2::write::GzEncoder::new(&mut packed, flate2::Compression::fast());
        writer.write_all(b"fast").unwrap();
        writer.finish().unwrap();
        Files(BTreeMap::from([
            ("modules.dep", DEP.into()),
            ("modules.softdep", b"# comment\nsoftdep libcrc32c pre: crc32c post: nothing\n".to_vec()),
            ("modules.alias", b"alias crc32c crc32c_fast\nalias pci:v* a\nalias xf* a\n".to_vec()),
            ("modules.builtin", b"kernel/fs/ext4/ext4.ko\n".to_vec()),
            ("kernel/fs/xfs/xfs.ko.zst", zstd::stream::encode_all(&b"xfs"[..], 1).unwrap()),
            ("kernel/lib/libcrc32c.ko", b"lib".to_vec()),
            ("kernel/crypto/crc32c_fast.ko.gz", packed),
            ("kernel/a.ko", b"a".to_vec()),
            ("kernel/b.ko", b"b".to_vec()),
        ]))
    }

    fn names(found: &Found) -> Vec<&str> {
        found.modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn what_is_needed_comes_first() {
        let found = closure(&tree(), &["xfs", "ext4", "un-known"]).unwrap();
        assert_eq!(names(&found), ["crc32c_fast", "libcrc32c", "xfs"]);
        assert_eq!(found.missing, ["un-known"]);
        assert_eq!(found.modules[0].bytes, b"fast");
        assert_eq!(found.modules[2].bytes, b"xfs");
    }

    #[test]
    fn loops_and_repetitions_end() {
        assert_eq!(names(&closure(&tree(), &["a", "b", "a"]).unwrap()), ["b", "a"]);
    }

    /// A list that somebody has written may have a chain of any length.
    #[test]
    fn long_chains_do_not_exhaust_the_stack() {
        let chain: String = (0..200_000).map(|i| format!("m{i}.ko: m{}.ko\n", i + 1)).collect();
        let mut files = tree();
        files.0.insert("modules.dep", chain.into_bytes());
        closure(&files, &["m0"]).unwrap_err();
    }

    #[test]
    fn modules_have_a_bound() {
        let mut packed = vec![];
        let mut writer = flate2::write::GzEncoder::new(&mut packed, flate2::Compression::fast());
        writer.write_all(&[0; 5000]).unwrap();
        writer.finish().unwrap();
        assert_eq!(unpack("a.ko.gz", packed.clone(), 5000).unwrap().len(), 5000);
        unpack("a.ko.gz", packed, 4999).unwrap_err();
        unpack("a.ko", vec![0; 5000], 4999).unwrap_err();
    }

    #[test]
    fn xz_is_undone() {
        let child = std::process::Command::new("sh").args(["-c", "printf slow | xz --check=crc32"]).output();
        let Ok(made) = child else { return };
        if made.status.success() {
            assert_eq!(unpack("a.ko.xz", made.stdout, 4).unwrap(), b"slow");
        }
    }

    #[test]
    fn damage_is_an_error() {
        unpack("a.ko.xz", b"\xfd7zXZ\0garbage".to_vec(), 9).unwrap_err();
        unpack("a.ko.zst", b"garbage".to_vec(), 9).unwrap_err();
        unpack("a.ko.gz", b"garbage".to_vec(), 9).unwrap_err();
        unpack("a.ko.lz4", b"x".to_vec(), 9).unwrap_err();
        let mut files = tree();
        files.0.remove("kernel/lib/libcrc32c.ko");
        let error = closure(&files, &["xfs"]).unwrap_err();
        assert!(error.to_string().contains("libcrc32c"), "{error}");
        files.0.remove("modules.dep");
        closure(&files, &["xfs"]).unwrap_err();
    }
}

//! What a name is: found out from contents, with the ending of the name as a last resort.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::{FileOptions, HostFile};
use block::num::to_usize;
use block::{Error, ErrorKind, Result, ResultExt as _, Storage};
use foreign::archive::{self, Gzip};

use super::{disks, machine, ovf, text};

/// How much of a file is looked at.
const HEAD: usize = 64 << 10;
/// The most files of a folder that are looked at.
const MOST_FILES: usize = 10_000;

/// What a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// VMware's VMX.
    Vmx,
    /// An OVF description.
    Ovf,
    /// An OVF package in a tar archive.
    Ova,
    /// libvirt's domain XML.
    Libvirt,
    /// A configuration of Xen's `xl` or `xm`.
    Xen,
    /// VirtualBox's `.vbox`.
    VirtualBox,
    /// An export of Hyper-V, or its XML configuration.
    HyperV,
    /// vimg's own description, as `vimg p2v` writes it.
    Machine,
    /// A disk without a description.
    Disk,
}

impl Kind {
    /// Its name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vmx => "VMX",
            Self::Ovf => "OVF",
            Self::Ova => "OVA",
            Self::Libvirt => "libvirt XML",
            Self::Xen => "xl configuration",
            Self::VirtualBox => "VirtualBox configuration",
            Self::HyperV => "Hyper-V export",
            Self::Machine => "vimg machine",
            Self::Disk => "disk",
        }
    }
}

/// What a name turned out to be.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) kind: Kind,
    /// The description's path, or the disk's name.
    pub(super) name: String,
    pub(super) notes: Vec<String>,
    /// Why it is hardly the disk that it is taken for, unless somebody says that it is one.
    pub(super) doubt: Option<String>,
}

impl Found {
    fn new(kind: Kind, name: impl Into<String>) -> Self {
        Self { kind, name: name.into(), notes: vec![], doubt: None }
    }
}

/// Finds out what a name is.
///
/// # Errors
/// As [`read`](super::read).
pub(super) fn find(source: &str) -> Result<Found> {
    let path = Path::new(source);
    if disks::is_disk_name(source) && !path.exists() {
        return Ok(Found::new(Kind::Disk, source));
    }
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        // The member of an archive, or another name that only `image` understands.
        Err(_) if is_name_of_image(source) => return Ok(Found::new(Kind::Disk, source)),
        Err(error) => return Err(error).context(|| format!("could not open '{source}'")),
    };
    if metadata.is_dir() {
        return in_folder(path);
    }
    if !metadata.is_file() {
        return Ok(Found::new(Kind::Disk, source));
    }
    of_file(path, source)
}

fn is_name_of_image(source: &str) -> bool {
    let spec = image::Spec::from_filename(source).ok();
    spec.is_some_and(|spec| spec.path().is_none_or(|path| path != Path::new(source)))
}

fn of_file(path: &Path, source: &str) -> Result<Found> {
    let head = head(path).context(|| format!("could not read '{source}'"))?;
    if archive::looks_like_archive(&head) {
        return archive_kind(path, source, archive::is_tar(&head));
    }
    refuse_packed(&head).context(|| format!("'{source}'"))?;
    let Some(kind) = of_text(&head, path).context(|| format!("'{source}'"))? else {
        let mut found = Found::new(Kind::Disk, source);
        found.doubt = doubt(path, &head);
        found.notes.extend(misnamed(path));
        return Ok(found);
    };
    Ok(Found::new(kind, source))
}

/// The first bytes, without a trace: it may be a disk of which nothing is to change, not even when it was read.
fn head(path: &Path) -> Result<Vec<u8>> {
    let file = HostFile::open(path, &looking())?;
    let mut head = vec![0; to_usize(file.len()?.min(HEAD as u64))];
    file.read_at(&mut head, 0)?;
    Ok(head)
}

fn looking() -> FileOptions {
    FileOptions { keep_access_time: true, ..FileOptions::read_only() }
}

/// That a file with the ending of a description is neither that nor an image of a known format.
fn doubt(path: &Path, head: &[u8]) -> Option<String> {
    let what = match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "ova" => "an OVA is a tar archive",
        "ovf" => "an OVF description is XML with the root 'Envelope'",
        "vmx" => "a VMX is text with lines 'key = \"value\"'",
        "vbox" => "a VirtualBox configuration is XML with the root 'VirtualBox'",
        _ => return None,
    };
    let name = path.display();
    let doubt = match head {
        [] => format!("'{name}' is empty; {what}"),
        _ => format!("'{name}' is not what its name says; {what}"),
    };
    (!is_image(head)).then_some(doubt)
}

/// Whether the first bytes are those of an image that is not raw, or of a disk with a boot sector.
fn is_image(head: &[u8]) -> bool {
    const MAGICS: [&[u8]; 7] =
        [b"QFI\xfb", b"KDMV", b"COWD", b"# Disk DescriptorFile", b"vhdxfile", b"conectix", b"LUKS\xba\xbe"];
    MAGICS.iter().any(|magic| head.starts_with(magic))
        || head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe])
        || head.get(510..512) == Some(&[0x55, 0xaa])
}

/// That a file with the ending of a description is a disk.
fn misnamed(path: &Path) -> Option<String> {
    let ending = path.extension()?.to_str()?.to_ascii_lowercase();
    matches!(ending.as_str(), "vmx" | "ovf" | "ova" | "vbox" | "xml" | "cfg").then(|| {
        format!(
            "'{}' has the name of a description, but holds a disk: it was taken as a disk.",
            path.display()
        )
    })
}

/// A tar archive is a package; a gzipped one, too; another gzipped file is a disk.
fn archive_kind(path: &Path, source: &str, is_tar: bool) -> Result<Found> {
    if is_tar {
        return Ok(Found::new(Kind::Ova, source));
    }
    let file: Arc<dyn Storage> = Arc::new(HostFile::open(path, &looking())?);
    let mut first = [0; archive::PROBE_LEN];
    Gzip::new(file)?.read_at(&mut first, 0).context(|| format!("'{source}'"))?;
    if archive::is_tar(&first) {
        return Ok(Found::new(Kind::Ova, source));
    }
    let last = source.rsplit('/').next().unwrap_or(source);
    let inflated = ovf::inflated_name(last);
    let folder = super::path_text(&super::folder_of(path))?;
    Ok(Found::new(Kind::Disk, format!("{folder}/{last}:{inflated}")))
}

/// Refuses archives that can only be read after unpacking.
fn refuse_packed(head: &[u8]) -> Result<()> {
    const PACKED: &[(&[u8], &str, &str)] = &[
        (b"PK\x03\x04", "a zip archive", "unzip"),
        (b"\xfd7zXZ\0", "compressed with xz", "xz -d"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -d"),
        (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "7z x"),
        (b"BZh9", "compressed with bzip2", "bzip2 -d"),
        (b"Rar!\x1a\x07", "a RAR archive", "unrar x"),
    ];
    let Some((_, what, command)) = PACKED.iter().find(|(magic, ..)| head.starts_with(magic)) else {
        return Ok(());
    };
    Err(Error::unsupported(format!("the file is {what}, in which nothing can be read without unpacking it"))
        .hint(format!("unpack it ({command}), and give what comes out of it")))
}

/// The kind of description that a text is; `None`: it is no text.
///
/// # Errors
/// It is XML that is no description.
fn of_text(head: &[u8], path: &Path) -> Result<Option<Kind>> {
    if head.starts_with(b"# Disk DescriptorFile") {
        return Ok(None);
    }
    if let Some(root) = xml_root(head) {
        return of_root(&root).map(Some);
    }
    if head.is_empty() || head.contains(&0) {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(head);
    if text.trim_start().starts_with('{') && text.contains(machine::FORMAT) {
        return Ok(Some(Kind::Machine));
    }
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    let keys = keys(&text);
    let has = |names: &[&str]| keys.iter().any(|key| names.contains(&key.as_str()));
    let vmx = has(&["config.version", "virtualhw.version", ".encoding", "displayname", "guestos", "memsize"])
        || keys.iter().any(|key| key.ends_with(".filename"));
    let xen = has(&["disk", "memory", "kernel", "builder", "bootloader", "vif", "type"]);
    Ok(match (vmx, xen, ending.as_str()) {
        (true, false, _) | (_, _, "vmx") => Some(Kind::Vmx),
        (false, true, _) | (_, _, "cfg" | "xl" | "xm") => Some(Kind::Xen),
        (true, true, _) => Some(Kind::Vmx),
        _ => None,
    })
}

/// The words before the first `=` of the lines, in lower case.
fn keys(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let keys = lines.filter_map(|line| line.split_once('=')).map(|(key, _)| key.trim().to_ascii_lowercase());
    keys.filter(|key| !key.is_empty() && !key.contains(char::is_whitespace)).collect()
}

/// The local name of the root of an XML document.
pub(super) fn xml_root(head: &[u8]) -> Option<String> {
    // The head may end within a character.
    let text = match head {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'<', 0, ..] | [0, b'<', ..] => {
            text::decode_xml(head.get(..head.len() & !1)?).ok()?
        }
        _ => String::from_utf8_lossy(head).into_owned(),
    };
    let mut rest = text.trim_start_matches('\u{feff}').trim_start();
    loop {
        let end = match rest {
            _ if rest.starts_with("<?") => "?>",
            _ if rest.starts_with("<!--") => "-->",
            _ if rest.starts_with("<!") => ">",
            _ => break,
        };
        let at = rest.find(end)?;
        rest = rest.get(at + end.len()..)?.trim_start();
    }
    let name: &str =
        rest.strip_prefix('<')?.split(|c: char| c.is_whitespace() || matches!(c, '>' | '/')).next()?;
    let local = name.rsplit(':').next()?;
    let sound = local.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
    sound.then(|| local.to_owned())
}

fn of_root(root: &str) -> Result<Kind> {
    let hint = match root {
        "Envelope" => return Ok(Kind::Ovf),
        "domain" => return Ok(Kind::Libvirt),
        "VirtualBox" => return Ok(Kind::VirtualBox),
        "configuration" | "DECLARATIONS" | "CIM" => return Ok(Kind::HyperV),
        "domstatus" | "domainsnapshot" | "domaincheckpoint" => "give what 'virsh dumpxml --inactive' prints",
        "network" | "pool" | "volume" => "this describes something else than a machine",
        _ => "known are OVF, libvirt's domains, VirtualBox's and Hyper-V's configurations",
    };
    Err(Error::invalid(format!("this XML describes no machine (its root is '{root}')")).hint(hint))
}

/// The description in a folder.
fn in_folder(folder: &Path) -> Result<Found> {
    let shown = folder.display();
    let mut files = vec![];
    for entry in std::fs::read_dir(folder).context(|| format!("could not read '{shown}'"))?.take(MOST_FILES) {
        files.push(entry.context(|| format!("could not read '{shown}'"))?.path());
    }
    files.sort();
    let with = |endings: &[&str]| -> Vec<&PathBuf> {
        let is = |path: &&PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
            !name.starts_with("._") && endings.contains(&ending.as_str()) && path.is_file()
        };
        files.iter().filter(is).collect()
    };
    let is_machine = |path: &&&PathBuf| {
        let kind = super::path_text(path).and_then(|name| of_file(path, &name)).map(|found| found.kind);
        kind.is_ok_and(|kind| kind == Kind::Machine)
    };
    if let [only] = with(&["json"]).iter().filter(is_machine).collect::<Vec<_>>().as_slice() {
        return Ok(Found::new(Kind::Machine, super::path_text(only)?));
    }
    match with(&["ovf", "ova", "vmx", "vbox"]).as_slice() {
        [only] => return of_file(only, &super::path_text(only)?),
        [] => {}
        several => return Err(several_descriptions(folder, several)),
    }
    let exported = |path: &PathBuf| {
        path.is_dir() && path.file_name().is_some_and(|name| name.eq_ignore_ascii_case("Virtual Machines"))
    };
    if files.iter().any(exported) || !with(&["vmcx", "exp"]).is_empty() {
        return Ok(Found::new(Kind::HyperV, super::path_text(folder)?));
    }
    let described = |path: &&&PathBuf| {
        let kind = super::path_text(path).and_then(|name| of_file(path, &name)).map(|found| found.kind);
        kind.is_ok_and(|kind| kind != Kind::Disk)
    };
    let texts = with(&["xml", "cfg", "xl", "xm"]);
    match texts.iter().filter(described).copied().collect::<Vec<_>>().as_slice() {
        [only] => of_file(only, &super::path_text(only)?),
        [] => Err(Error::new(
            ErrorKind::NotFound,
            format!("the folder '{shown}' has no description of a machine"),
        )
        .hint("give the disks themselves, and describe the machine on the command line")),
        several => Err(several_descriptions(folder, several)),
    }
}

fn several_descriptions(folder: &Path, several: &[&PathBuf]) -> Error {
    let names: Vec<String> = several.iter().take(20).map(|path| format!("'{}'", path.display())).collect();
    Error::usage(format!("the folder '{}' has {} descriptions of machines", folder.display(), several.len()))
        .hint(format!("give one of them: {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_found_behind_what_may_stand_before_them() {
        let root = |text: &str| xml_root(text.as_bytes());
        assert_eq!(
            root("<?xml version='1.0'?>\n<!-- x -->\n<ovf:Envelope a='1'>").as_deref(),
            Some("Envelope")
        );
        assert_eq!(root("\u{feff} <domain type='kvm'>").as_deref(), Some("domain"));
        assert_eq!(root("<!DOCTYPE a><VirtualBox/>").as_deref(), Some("VirtualBox"));
        assert_eq!(root("< a>"), None);
        assert_eq!(root("<?xml"), None);
        let wide: Vec<u8> = "\u{feff}<configuration>".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(xml_root(&wide).as_deref(), Some("configuration"));
    }

    #[test]
    fn looking_leaves_no_trace() {
        use std::time::{Duration, SystemTime};
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, vec![7; 100_000]).unwrap();
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000);
        let times = std::fs::FileTimes::new().set_accessed(long_ago).set_modified(long_ago);
        file.as_file().set_times(times).unwrap();
        assert_eq!(find(file.path().to_str().unwrap()).unwrap().kind, Kind::Disk);
        assert_eq!(file.as_file().metadata().unwrap().accessed().unwrap(), long_ago);
    }

    #[test]
    fn what_is_no_description_is_not_taken_for_a_disk() {
        let doubts = |name: &str, head: &[u8]| doubt(Path::new(name), head);
        for name in ["a.ova", "a.OVF", "a.vmx", "a.vbox"] {
            assert!(doubts(name, b"").unwrap().contains("is empty"));
            assert!(doubts(name, b"noise\0").unwrap().contains("not what its name says"));
            assert_eq!(doubts(name, b"QFI\xfb\0\0\0\x03"), None);
        }
        let mut sector = [0; 512];
        (sector[510], sector[511]) = (0x55, 0xaa);
        assert_eq!(doubts("a.vmx", &sector), None);
        for name in ["a.xml", "a.raw", "a"] {
            assert_eq!(doubts(name, b"noise\0"), None);
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("web.ova");
        std::fs::write(&file, b"noise\0").unwrap();
        let read =
            |options: &crate::source::SourceOptions| crate::source::read(file.to_str().unwrap(), options);
        let mut options = crate::source::SourceOptions::default();
        assert!(read(&options).unwrap_err().hints().iter().any(|hint| hint.contains("-f raw")));
        options.disks_have_format = true;
        assert_eq!(read(&options).unwrap().disks.len(), 1);
    }

    #[test]
    fn contents_decide() {
        let kind = |text: &str, name: &str| of_text(text.as_bytes(), Path::new(name)).unwrap();
        assert_eq!(kind("displayName = \"x\"\n", "a.txt"), Some(Kind::Vmx));
        assert_eq!(kind("name = 'x'\nmemory = 512\ndisk = [ ]\n", "a"), Some(Kind::Xen));
        assert_eq!(kind("name = 'x'\n", "a.cfg"), Some(Kind::Xen));
        assert_eq!(kind("# Disk DescriptorFile\nversion=1\n", "a.vmx"), None);
        assert_eq!(kind("just words\n", "a.txt"), None);
        assert_eq!(kind("{\"format\": \"vimg-machine\"}", "a"), Some(Kind::Machine));
        assert_eq!(kind("{\"format\": \"vimg-p2v-state\"}", "a"), None);
        of_text(b"<html>", Path::new("a")).unwrap_err();
        for packed in [b"PK\x03\x04....".as_slice(), b"\xfd7zXZ\0.."] {
            assert!(refuse_packed(packed).unwrap_err().hints()[0].contains("unpack"));
        }
    }
}

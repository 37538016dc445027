//! Members of archives: `vm.ova:disk1.vmdk`.
//!
//! A colon is no stranger in names, so this reading comes last: only where no file has the whole name, no known
//! protocol begins it, and what stands before one of the colons is a file that is an archive.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use super::node::Source;

/// The most colons that are tried.
const MOST_COLONS: usize = 16;

/// Whether a name stands for a member of an archive, known protocols aside.
pub(crate) fn is_member(name: &str) -> bool {
    let scheme = super::protocol::split_protocol(name)
        .and_then(|(scheme, _)| super::protocol::driver_of_scheme(scheme));
    scheme.is_none() && !name.starts_with("json:") && split(name).is_some()
}

/// The archive and the member that a name stands for. `None`: it is the name of a file, whether that exists or not.
pub(super) fn split(name: &str) -> Option<Source> {
    if !name.contains(':') || fs::symlink_metadata(name).is_ok() {
        return None;
    }
    let colons = name.match_indices(':').map(|(at, _)| at).take(MOST_COLONS);
    let mut parts = colons.filter_map(|at| Some((name.get(..at)?, name.get(at + 1..)?)));
    let (archive, member) = parts.find(|(archive, _)| is_archive(Path::new(archive)))?;
    Some(Source::Member { archive: archive.to_owned(), member: member.to_owned() })
}

/// Whether a path leads to a file that begins like an archive. One that cannot be read may be one: opening it will say
/// what is wrong.
fn is_archive(path: &Path) -> bool {
    if !fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        return false;
    }
    let mut first = Vec::with_capacity(foreign::archive::PROBE_LEN);
    let read = File::open(path)
        .and_then(|file| file.take(foreign::archive::PROBE_LEN as u64).read_to_end(&mut first));
    read.is_err() || foreign::archive::looks_like_archive(&first)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tar header of an empty file called `a`.
    fn header() -> [u8; 512] {
        let mut header = [0; 512];
        header[0] = b'a';
        header[148..156].copy_from_slice(b"000541\0 ");
        header
    }

    #[test]
    fn a_file_of_the_whole_name_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("vm.ova"), header()).unwrap();
        fs::write(path("disk.raw"), [1; 512]).unwrap();
        let found = |name: &str| match split(&path(name)) {
            Some(Source::Member { archive, member }) => Some((archive, member)),
            _ => None,
        };
        assert_eq!(found("vm.ova:disk:1.vmdk"), Some((path("vm.ova"), "disk:1.vmdk".to_owned())));
        assert_eq!(found("vm.ova:"), Some((path("vm.ova"), String::new())));
        assert_eq!(found("disk.raw:x"), None, "not an archive");
        assert_eq!(found("other:x"), None);
        assert_eq!(found("vm.ova"), None);
        fs::write(path("vm.ova:disk"), b"").unwrap();
        assert_eq!(found("vm.ova:disk"), None);
        std::os::unix::fs::symlink("nowhere", path("vm.ova:link")).unwrap();
        assert_eq!(found("vm.ova:link"), None);
    }
}

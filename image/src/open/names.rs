//! Names found inside images: what they mean, and whether they may be followed.

use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result};

use crate::format::Format;
use crate::policy::{Policy, Role};
use crate::spec::{Node, Source, split_protocol, unknown_driver};

/// A backing or data file name as people read it (names are bytes in the image).
pub(crate) fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Whether a name is more than a path: `json:` or a protocol.
fn has_protocol(name: &str) -> bool {
    split_protocol(name).is_some()
}

/// A name found in an image at `image_path`, as qemu resolves it: relative paths count from the directory of
/// the image, absolute paths and names of protocols stand as they are. (A member of an archive beside the image
/// begins with a path, even if it looks like a protocol that nobody knows.)
pub(crate) fn resolve_name(image_path: Option<&str>, name: &str) -> Result<String> {
    if let Some(path) = image_path
        && crate::spec::is_member(&beside(path, name))
        && !name.starts_with('/')
    {
        return Ok(beside(path, name));
    }
    if has_protocol(name) || name.starts_with('/') {
        return Ok(name.to_owned());
    }
    match image_path {
        Some(path) => Ok(beside(path, name)),
        None => Err(Error::usage(format!(
            "Cannot use relative backing file name '{name}': the image it is named in is not a plain file"
        ))),
    }
}

/// `name` in the directory of `path`.
fn beside(path: &str, name: &str) -> String {
    match path.rfind('/') {
        Some(slash) => format!("{}/{name}", path.get(..slash).unwrap_or_default()),
        None => name.to_owned(),
    }
}

/// The folder that an image lies in.
pub(crate) fn folder_of(image_path: &str) -> &Path {
    match Path::new(image_path).parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The file that a further extent of an image lies in: a plain file name, relative to the image's folder, which it must
/// not leave.
///
/// # Errors
/// The policy forbids it, or the image is not in a plain file.
pub(crate) fn extent_path(image_path: Option<&str>, name: &str, policy: &Policy) -> Result<PathBuf> {
    let Some(image) = image_path else {
        return Err(Error::unsupported(format!(
            "the image names a further file '{name}', which can only be found for an image in a plain file"
        )));
    };
    let path = if name.starts_with('/') { PathBuf::from(name) } else { PathBuf::from(beside(image, name)) };
    policy.check_file(Role::Extent, &path)?;
    policy.check_confined(Role::Extent, folder_of(image), &path)?;
    Ok(path)
}

/// The data file that an image names: only ever a plain file name, and (unlike a backing file's) one that
/// counts from the current directory, as with qemu. Where there is no such file, one beside the image serves.
///
/// # Errors
/// The policy forbids it.
pub(crate) fn data_file_path(image_path: Option<&str>, name: &str, policy: &Policy) -> Result<PathBuf> {
    let here = PathBuf::from(name);
    let path = match image_path.map(|image| PathBuf::from(beside(image, name))) {
        Some(beside) if here.is_relative() && !here.exists() && beside.exists() => beside,
        _ => here,
    };
    policy.check_file(Role::DataFile, &path)?;
    Ok(path)
}

/// The backing file that an image names, as something to open; with `confined_to`, one in this folder.
///
/// # Errors
/// The policy forbids it, the name cannot be understood, or the format is unknown.
pub(crate) fn backing_node(
    full_name: &str,
    format: Option<&str>,
    confined_to: Option<&Path>,
    policy: &Policy,
) -> Result<Node> {
    let mut node = Node::from_filename(full_name, &mut vec![])?;
    match (&node.source, full_name.starts_with("json:")) {
        (Source::File { path, .. }, false) => {
            policy.check_file(Role::BackingFile, Path::new(path))?;
            if let Some(folder) = confined_to {
                policy.check_confined(Role::BackingFile, folder, Path::new(path))?;
            }
        }
        (Source::Member { archive, .. }, false) if confined_to.is_none() => {
            policy.check_file(Role::BackingFile, Path::new(archive))?;
        }
        _ if confined_to.is_some() => {
            let message =
                format!("the image names '{full_name}' as its backing file, which is not a plain file");
            return Err(Error::new(ErrorKind::Denied, message));
        }
        _ => policy.check_protocol(Role::BackingFile, full_name)?,
    }
    if let Some(name) = format.filter(|name| !name.is_empty()) {
        let format = match Format::from_name(name) {
            Some(format) => format,
            None if is_protocol_format(name) => Format::Raw,
            None => return Err(unknown_driver(name)),
        };
        node.driver = node.driver.or(Some(format));
    }
    Ok(node)
}

/// Names of protocols that occur as the format of a backing file, where they mean its plain bytes.
fn is_protocol_format(name: &str) -> bool {
    matches!(name, "file" | "host_device" | "host_cdrom")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_names_count_from_the_image() {
        let resolve = |image, name| resolve_name(Some(image), name).unwrap();
        assert_eq!(resolve("sub/b.qcow2", "a.qcow2"), "sub/a.qcow2");
        assert_eq!(resolve("b.qcow2", "a.qcow2"), "a.qcow2");
        assert_eq!(resolve("/x/b.qcow2", "../a"), "/x/../a");
        assert_eq!(resolve("/b.qcow2", "a"), "/a");
    }

    #[test]
    fn absolute_and_protocol_names_stand_alone() {
        for name in ["/a", "json:{}", "nbd://x", "file:a"] {
            assert_eq!(resolve_name(Some("sub/b"), name).unwrap(), name);
            assert_eq!(resolve_name(None, name).unwrap(), name);
        }
        resolve_name(None, "a").unwrap_err();
    }

    #[test]
    fn data_files_are_never_more_than_paths() {
        let path = data_file_path(Some("sub/b"), "json:{\"driver\":\"nbd\"}", &Policy::trusting()).unwrap();
        assert_eq!(path, Path::new("json:{\"driver\":\"nbd\"}"));
    }

    #[test]
    fn data_files_are_found_here_or_beside_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("x.qcow2").display().to_string();
        let find = |name| data_file_path(Some(&image), name, &Policy::trusting()).unwrap();
        assert_eq!(find("no-such-data-file"), Path::new("no-such-data-file"));
        std::fs::write(dir.path().join("no-such-data-file"), b"").unwrap();
        assert_eq!(find("no-such-data-file"), dir.path().join("no-such-data-file"));
        assert_eq!(find("Cargo.toml"), Path::new("Cargo.toml"), "the current directory comes first");
    }

    #[test]
    fn untrusted_images_lead_nowhere() {
        let policy = Policy { untrusted: true, allow: vec![], ..Policy::default() };
        for name in [
            "/etc/passwd",
            "file:/etc/passwd",
            "json:{'driver':'raw','file.filename':'/etc/passwd'}",
            "nbd://h",
        ] {
            assert_eq!(
                backing_node(name, None, None, &policy).unwrap_err().kind(),
                ErrorKind::Denied,
                "{name}"
            );
        }
        data_file_path(Some("a"), "b", &policy).unwrap_err();
    }
}

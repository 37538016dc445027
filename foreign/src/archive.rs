//! Disks inside archives: members of tar files, as they are or gzipped, without unpacking them.
//!
//! ```text
//!   vm.ova            tar:   a member is a window of the file          Window
//!   backup.tar.gz     gzip of tar: a window of what it inflates to     Gzip -> Window
//!   vm.ova            tar of gzip: a member that is inflated           Window -> Gzip
//!   disk.vmdk.gz      gzip, not of tar: one member, `disk.vmdk`        Gzip
//! ```
//!
//! Everything here is a [`Storage`] over another one, so that the formats above never notice.

mod gzip;
mod tar;
mod window;

use std::sync::Arc;

use block::{Error, ErrorKind, Result, Storage};

pub use gzip::Gzip;
pub use tar::{Kind, Member, Tar};
pub use window::Window;

/// How many bytes [`looks_like_archive`] wants to see.
pub const PROBE_LEN: usize = 512;

/// The most members that are named in an error.
const MOST_NAMED: usize = 20;

/// Whether a file that begins with these bytes may be an archive: a tar header whose checksum is right, or gzip.
pub fn looks_like_archive(first: &[u8]) -> bool {
    tar::is_header(first) || gzip::is_header(first)
}

/// Whether a file that begins with these bytes is a tar archive: a header whose checksum is right.
pub fn is_tar(first: &[u8]) -> bool {
    tar::is_header(first)
}

/// A disk found in an archive.
#[derive(Debug)]
pub struct Found {
    /// Its bytes.
    pub storage: Arc<dyn Storage>,
    /// The name of the member as it is spelled in the archive.
    pub name: String,
    /// Whether the archive is compressed as a whole, so that reading here and there costs time.
    pub slow: bool,
}

/// Finds the member called `name` in the archive `storage`. With `inflate`, a member that is gzipped is shown
/// inflated; one whose name ends in `.gz` always is.
///
/// # Errors
/// `NotFound`, with the members that there are; `Unsupported` for members that are not stored in one piece; `Invalid`,
/// `Truncated` or `Corrupt` for an archive that is not what it should be; the host's.
pub fn open(storage: Arc<dyn Storage>, name: &str, inflate: bool) -> Result<Found> {
    let slow = gzip::is_header(&first_of(&*storage)?);
    let gzip = if slow { Some(Arc::new(Gzip::new(Arc::clone(&storage))?)) } else { None };
    let packed = storage.name();
    let archive: Arc<dyn Storage> = gzip.clone().map_or(storage, |gzip| gzip);
    if slow && is_only_member(&packed, name) && !tar::is_header(&first_of(&*archive)?) {
        return Ok(Found { storage: archive, name: name.to_owned(), slow });
    }
    let member = find(&archive, name, slow)?;
    let shown = member.shown_name();
    let window: Arc<dyn Storage> = Arc::new(match gzip {
        Some(gzip) => Window::of_gzip(gzip, member.offset, member.len, &shown),
        None => Window::new(archive, member.offset, member.len, &shown),
    });
    let wanted = inflate || has_gzip_name(&shown);
    let storage = if wanted && is_gzip(&*window)? { Arc::new(Gzip::new(window)?) } else { window };
    Ok(Found { storage, name: shown, slow })
}

/// Whether a file that is compressed, and no archive otherwise, is called so when it is inflated: a package may have its
/// disks gzipped one by one, beside its description.
fn is_only_member(packed: &str, name: &str) -> bool {
    let last = packed.rsplit('/').next().unwrap_or(packed);
    let stem = if has_gzip_name(last) { last.get(..last.len() - 3).unwrap_or(last) } else { last };
    stem == name
}

fn first_of(storage: &dyn Storage) -> Result<[u8; PROBE_LEN]> {
    let mut first = [0; PROBE_LEN];
    storage.read_at(&mut first, 0)?;
    Ok(first)
}

fn has_gzip_name(name: &str) -> bool {
    name.get(name.len().saturating_sub(3)..).is_some_and(|end| end.eq_ignore_ascii_case(".gz"))
}

fn is_gzip(storage: &dyn Storage) -> Result<bool> {
    Ok(gzip::is_header(&first_of(storage)?))
}

/// The member of that name. In a compressed archive the first one is taken, because looking on costs as much as
/// inflating everything; elsewhere two members of one name are refused (tar appends a newer one behind the older).
fn find(archive: &Arc<dyn Storage>, name: &str, slow: bool) -> Result<Member> {
    let len = if slow { None } else { Some(archive.len()?) };
    let mut tar = Tar::new(&**archive, len);
    let mut found: Option<Member> = None;
    let mut names = vec![];
    let mut members = 0_u64;
    while let Some(member) = tar.next()? {
        members += 1;
        if !member.is_called(name) {
            if matches!(member.kind, Kind::File | Kind::Sparse) && names.len() < MOST_NAMED {
                names.push(member.shown_name());
            }
            continue;
        }
        if found.is_some() {
            return Err(Error::invalid(format!("the archive has two members called '{name}'"))
                .hint("the later one is usually the newer one; unpack the archive to choose"));
        }
        found = Some(member);
        if slow {
            break;
        }
    }
    match found {
        Some(member) => member.check_readable(len).map(|()| member),
        None => Err(no_such_member(name, &names, members)),
    }
}

fn no_such_member(name: &str, names: &[String], members: u64) -> Error {
    let error = Error::new(ErrorKind::NotFound, format!("there is no member '{name}' in the archive"));
    if names.is_empty() {
        return error.hint("the archive holds no files");
    }
    let more = if members > names.len() as u64 { " (and others)" } else { "" };
    error.hint(format!("its members are: {}{more}", names.join(", ")))
}

#[cfg(test)]
mod tests;

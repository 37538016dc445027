//! OVA: an OVF package in a tar archive. Its disks are used where they lie, by the name `ARCHIVE:MEMBER`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::{FileOptions, HostFile};
use block::{Error, ErrorKind, Result, ResultExt as _, Storage};
use foreign::archive::{self, Gzip, Kind, Tar, Window};

use super::ovf::{self, Files};
use super::{SourceOptions, text};
use crate::guest::Guest;

/// The most members of an archive.
const MOST_MEMBERS: usize = 10_000;

/// A member.
#[derive(Debug, Clone)]
struct Member {
    /// Its name, cleaned: what descriptions and manifests say.
    name: String,
    /// Its name as the archive has it.
    spelled: String,
    offset: u64,
    len: u64,
}

/// An opened archive.
#[derive(Debug)]
pub(super) struct Archive {
    path: PathBuf,
    /// The tar archive, inflated if it is compressed.
    storage: Arc<dyn Storage>,
    gzip: Option<Arc<Gzip>>,
    members: Vec<Member>,
    /// Index of the description.
    description: usize,
}

/// What an OVA says.
///
/// # Errors
/// As for an OVF; `Invalid`: it is no archive, or has no description.
pub(super) fn guest(path: &Path, options: &SourceOptions) -> Result<Guest> {
    super::path_text(path)?;
    let archive = Archive::open(path)?;
    let description = archive.read(&archive.description().name.clone())?;
    let mut guest = ovf::guest(&description, &archive, options.system.as_deref())
        .context(|| archive.description().name.clone())?;
    if archive.gzip.is_some() {
        guest.notes.push(
            "The archive is compressed as a whole: its disks are read slowly; unpack it if that takes too long.".to_owned(),
        );
    }
    Ok(guest)
}

impl Archive {
    /// Opens an archive and reads its list of members.
    ///
    /// # Errors
    /// The host's; `Invalid`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file: Arc<dyn Storage> = Arc::new(HostFile::open(path, &FileOptions::read_only())?);
        let mut first = [0; archive::PROBE_LEN];
        file.read_at(&mut first, 0)?;
        let compressed = !archive::is_tar(&first) && archive::looks_like_archive(&first);
        let gzip = if compressed { Some(Arc::new(Gzip::new(Arc::clone(&file))?)) } else { None };
        let storage: Arc<dyn Storage> = gzip.clone().map_or(file, |gzip| gzip);
        let members = members(&*storage, compressed)?;
        let description = find_description(&members)?;
        Ok(Self { path: path.to_owned(), storage, gzip, members, description })
    }

    fn description(&self) -> &Member {
        static NONE: Member = Member { name: String::new(), spelled: String::new(), offset: 0, len: 0 };
        self.members.get(self.description).unwrap_or(&NONE)
    }

    /// The folder of the description within the archive: empty, or with a slash at its end.
    fn folder(&self) -> &str {
        let name = self.description().name.as_str();
        name.rfind('/').and_then(|at| name.get(..=at)).unwrap_or_default()
    }

    /// The file with this ending beside the description.
    pub(super) fn beside_description(&self, ending: &str) -> Option<String> {
        let description = self.description().name.as_str();
        let stem = description.rsplit_once('.').map_or(description, |(stem, _)| stem);
        let wanted = format!("{stem}.{ending}");
        let of_folder = |member: &&Member| {
            member
                .name
                .strip_prefix(self.folder())
                .is_some_and(|rest| !rest.contains('/') && !rest.starts_with("._"))
                && has_ending(&member.name, ending)
        };
        let exact = self.members.iter().find(|member| member.name == wanted);
        exact.or_else(|| self.members.iter().find(of_folder)).map(|member| member.name.clone())
    }

    /// The member that a name beside the description means.
    fn find_member(&self, href: &str) -> Option<&Member> {
        let member = |name: &str| {
            let full = clean(&format!("{}{name}", self.folder()));
            self.members.iter().rev().find(|member| member.name == full)
        };
        let spelled = ovf::spelled(href, |name| member(name).is_some());
        spelled.and_then(|name| member(&name)).or_else(|| self.numbered(href))
    }

    /// A file whose only chunk, or newest state, is called `NAME.000000000`.
    fn numbered(&self, href: &str) -> Option<&Member> {
        let full = clean(&format!("{}{href}", self.folder()));
        let is_number = |rest: &str| rest.len() == 9 && rest.bytes().all(|byte| byte.is_ascii_digit());
        let number = |member: &Member| {
            let rest = member.name.strip_prefix(full.as_str())?.strip_prefix('.')?;
            is_number(rest).then(|| rest.to_owned())
        };
        self.members.iter().filter(|member| number(member).is_some()).max_by_key(|member| number(member))
    }

    /// The contents of the member that a name beside the description means; `None`: there is none.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn member(&self, name: &str) -> Result<Option<Arc<dyn Storage>>> {
        let Some(member) = self.find_member(name) else { return Ok(None) };
        Ok(Some(Arc::new(self.window(member))))
    }

    fn window(&self, member: &Member) -> Window {
        match &self.gzip {
            Some(gzip) => Window::of_gzip(Arc::clone(gzip), member.offset, member.len, &member.name),
            None => Window::new(Arc::clone(&self.storage), member.offset, member.len, &member.name),
        }
    }

    /// A small member as a whole, by its name in the archive.
    ///
    /// # Errors
    /// It is too large, or the host's.
    pub(super) fn read(&self, name: &str) -> Result<Vec<u8>> {
        let member = self.members.iter().find(|member| member.name == name);
        let Some(member) = member else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no member '{name}' in the archive"),
            ));
        };
        text::check_len(member.len)?;
        let mut bytes = vec![0; block::num::to_usize(member.len)];
        self.window(member).read_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

impl Files for Archive {
    fn find(&self, href: &str, _compressed: bool, _notes: &mut Vec<String>) -> Result<String> {
        let Some(member) = self.find_member(href) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the description names '{href}', which is not in the archive"),
            ));
        };
        Ok(format!("{}:{}", path_with_slash(&self.path), member.spelled))
    }

    fn side_file(&self, href: &str, what: &str, notes: &mut Vec<String>) -> Option<String> {
        notes.push(format!("The {what} '{href}' stays in the archive; unpack the archive to keep it."));
        None
    }

    fn stem(&self) -> &str {
        self.path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("guest")
    }
}

/// A path that no colon in it can turn into a protocol.
fn path_with_slash(path: &Path) -> String {
    let text = path.display().to_string();
    if text.contains('/') { text } else { format!("./{text}") }
}

/// All files of the archive. Names of Apple's resource forks (`._NAME`) are no files of the package.
fn members(storage: &dyn Storage, compressed: bool) -> Result<Vec<Member>> {
    let mut tar = Tar::new(storage, if compressed { None } else { Some(storage.len()?) });
    let mut members = vec![];
    let mut sparse = vec![];
    while let Some(member) = tar.next()? {
        let spelled = member.shown_name();
        let name = clean(&spelled);
        match member.kind {
            Kind::File => members.push(Member { name, spelled, offset: member.offset, len: member.len }),
            Kind::Sparse | Kind::Part => sparse.push(name),
            Kind::Other => {}
        }
        if members.len() > MOST_MEMBERS {
            return Err(Error::invalid(format!("the archive has more than {MOST_MEMBERS} members")));
        }
    }
    if let Some(name) = sparse.first() {
        return Err(Error::unsupported(format!(
            "the member '{name}' of the archive is not stored in one piece"
        ))
        .hint("unpack the archive, and give the folder"));
    }
    Ok(members)
}

/// A name without `.` and doubled slashes.
fn clean(name: &str) -> String {
    name.split('/').filter(|part| !part.is_empty() && *part != ".").collect::<Vec<_>>().join("/")
}

fn has_ending(name: &str, ending: &str) -> bool {
    Path::new(name).extension().is_some_and(|found| found.eq_ignore_ascii_case(ending))
}

/// The description: the one that is least deep.
fn find_description(members: &[Member]) -> Result<usize> {
    let is_ovf = |member: &Member| {
        let last = member.name.rsplit('/').next().unwrap_or_default();
        has_ending(last, "ovf") && !last.starts_with("._")
    };
    let depth = |member: &Member| member.name.matches('/').count();
    let found: Vec<usize> =
        members.iter().enumerate().filter(|(_, member)| is_ovf(member)).map(|(index, _)| index).collect();
    let least = found.iter().filter_map(|index| members.get(*index)).map(depth).min();
    let mut best = found.iter().filter(|index| members.get(**index).map(depth) == least);
    match (best.next(), best.next()) {
        (Some(index), None) => Ok(*index),
        (Some(_), Some(_)) => Err(Error::usage("the archive has several descriptions (.ovf)")
            .hint("unpack it, and give the one that is meant")),
        (None, _) => Err(Error::invalid("the archive has no description of a machine (.ovf)")
            .hint("a disk in an archive is called ARCHIVE:MEMBER")),
    }
}

//! Which files named *inside* an image may be opened.
//!
//! The command line is the user's word and is always obeyed. A name found in an image is somebody
//! else's: by default it is followed as qemu follows it (except that a data file is only ever a plain
//! file), and for untrusted images not at all, unless the user opened a way.

use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result};
use crypt::luks::Effort;

/// What the command line allows beyond what it names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// The images come from strangers: open nothing that the command line did not name.
    pub untrusted: bool,
    /// Files, and directories with everything below them, that may be opened all the same.
    pub allow: Vec<PathBuf>,
    /// Passphrases are tried however long the image makes that take.
    pub slow_keys: bool,
}

/// The part that a named file would play.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The backing file of an image.
    BackingFile,
    /// The external data file of an image.
    DataFile,
    /// An extent of an image that consists of several files.
    Extent,
}

impl Role {
    /// The article that goes with the noun.
    const fn article(self) -> &'static str {
        match self {
            Self::BackingFile | Self::DataFile => "a",
            Self::Extent => "an",
        }
    }

    /// In words.
    pub const fn noun(self) -> &'static str {
        match self {
            Self::BackingFile => "backing file",
            Self::DataFile => "data file",
            Self::Extent => "extent",
        }
    }
}

impl Policy {
    /// Follows names as qemu does.
    pub fn trusting() -> Self {
        Self::default()
    }

    /// How much work trying a passphrase may be.
    pub(crate) fn effort(&self) -> Effort {
        if self.slow_keys { Effort::UNBOUNDED } else { Effort::DEFAULT }
    }

    /// What to do about a passphrase that is too much work to try.
    pub(crate) fn about_effort(error: Error) -> Error {
        match error.kind() {
            ErrorKind::Denied => error.hint("if the image is worth the time (maybe hours), add --slow-keys"),
            _ => error,
        }
    }

    /// Decides whether a plain file named inside an image may be opened.
    ///
    /// # Errors
    /// `Denied`, with a hint that names the option that would allow it.
    pub fn check_file(&self, role: Role, path: &Path) -> Result<()> {
        if !self.untrusted || self.allows(path) {
            return Ok(());
        }
        // The file that would be opened in the end, so that nobody allows a link without seeing where it leads.
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let leads = match path.symlink_metadata() {
            Ok(metadata) if metadata.is_symlink() => format!(" (a link to '{}')", real.display()),
            _ => String::new(),
        };
        Err(Error::new(
            ErrorKind::Denied,
            format!(
                "the image names {} {} '{}'{leads}, and names inside untrusted images are not followed",
                role.article(),
                role.noun(),
                path.display()
            ),
        )
        .hint(format!(
            "if you trust that file, add --allow {}",
            shell_word(if leads.is_empty() { path } else { &real })
        )))
    }

    /// Decides whether a plain file that must lie in `folder`, or below, may be opened: formats whose images name
    /// other files as a matter of course lead nowhere else, unless the user opened a way.
    ///
    /// # Errors
    /// `Denied`, with a hint that names the option that would allow it.
    pub fn check_confined(&self, role: Role, folder: &Path, path: &Path) -> Result<()> {
        let inside = match (path.canonicalize(), folder.canonicalize()) {
            (Ok(real), Ok(folder)) => real.starts_with(folder),
            // There is no such file; that is for whoever opens it to say, unless it would lie elsewhere.
            _ => {
                let rest = path.strip_prefix(folder).unwrap_or(path);
                !rest.is_absolute() && !rest.components().any(|part| part == std::path::Component::ParentDir)
            }
        };
        if inside || self.allows(path) {
            return Ok(());
        }
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let message = format!(
            "the image names {article} {noun} '{path}', which lies outside the image's folder '{folder}'",
            article = role.article(),
            noun = role.noun(),
            path = path.display(),
            folder = folder.display()
        );
        Err(Error::new(ErrorKind::Denied, message)
            .hint(format!("if you trust the image, add --allow {}", shell_word(&real))))
    }

    /// Decides whether a `json:` or protocol name found inside an image may be opened.
    ///
    /// # Errors
    /// `Denied`.
    pub fn check_protocol(&self, role: Role, name: &str) -> Result<()> {
        if !self.untrusted {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Denied,
            format!(
                "the image names a {} '{name}', which is not a plain file, and names inside untrusted images are not followed",
                role.noun()
            ),
        )
        .hint("if you trust the image, run the command without --untrusted"))
    }

    /// Whether `path`, with every symbolic link followed, is one of the allowed files or lies in one of the
    /// allowed directories.
    fn allows(&self, path: &Path) -> bool {
        let Ok(real) = path.canonicalize() else { return false };
        self.allow
            .iter()
            .filter_map(|allowed| allowed.canonicalize().ok())
            .any(|allowed| real.starts_with(allowed))
    }
}

/// The path as one word of a shell command.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,@%:=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn untrusted(allow: &[&Path]) -> Policy {
        Policy {
            untrusted: true,
            allow: allow.iter().map(|p| p.to_path_buf()).collect(),
            ..Policy::default()
        }
    }

    #[test]
    fn trusting_follows_everything() {
        Policy::trusting().check_file(Role::BackingFile, Path::new("/etc/passwd")).unwrap();
        Policy::trusting().check_protocol(Role::BackingFile, "nbd://x").unwrap();
    }

    #[test]
    fn untrusted_refuses_and_says_what_would_help() {
        let error = untrusted(&[]).check_file(Role::DataFile, Path::new("/a b/c")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert_eq!(error.hints(), ["if you trust that file, add --allow '/a b/c'"]);
        untrusted(&[Path::new("/")]).check_protocol(Role::BackingFile, "json:{}").unwrap_err();
    }

    #[test]
    fn confined_files_lie_in_the_folder_or_are_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir_all(inside.join("deep")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        for file in [inside.join("a"), inside.join("deep/a"), outside.join("a")] {
            std::fs::write(file, b"x").unwrap();
        }
        std::os::unix::fs::symlink(outside.join("a"), inside.join("link")).unwrap();
        let policy = Policy::trusting();
        let check = |path: PathBuf| policy.check_confined(Role::Extent, &inside, &path);
        check(inside.join("a")).unwrap();
        check(inside.join("deep/a")).unwrap();
        check(inside.join("missing")).unwrap();
        for bad in
            [inside.join("link"), inside.join("../out/a"), inside.join("../out/missing"), outside.join("a")]
        {
            let error = check(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(error.hints().iter().any(|hint| hint.contains("--allow")), "{error:?}");
        }
        check(PathBuf::from("/missing-at-all")).unwrap_err();
        let allowing = Policy { untrusted: false, allow: vec![outside.clone()], ..Policy::default() };
        allowing.check_confined(Role::Extent, &inside, &outside.join("a")).unwrap();
    }

    #[test]
    fn allowed_directories_do_not_leak_through_links_or_dots() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(inside.join("base"), b"x").unwrap();
        std::fs::write(outside.join("secret"), b"x").unwrap();
        std::os::unix::fs::symlink(outside.join("secret"), inside.join("link")).unwrap();
        let policy = untrusted(&[&inside]);
        let check = |path: PathBuf| policy.check_file(Role::BackingFile, &path);
        check(inside.join("base")).unwrap();
        check(inside.join("link")).unwrap_err();
        check(inside.join("../out/secret")).unwrap_err();
        check(dir.path().join("inn")).unwrap_err();
        check(inside.join("missing")).unwrap_err();
    }
}

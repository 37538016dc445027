//! The one error type that crosses crate borders.
//!
//! The *kind* is for programs (it decides an exit code, an NBD error number, a virtio status), the
//! *message* is for people, the *hint* says what to do next, the *source* is the format's own typed
//! error for whoever wants to look closer. Context (a path, a verb) is added once, by the layer that
//! knows it.

use std::fmt;
use std::io;

/// The result of everything that can fail in a disk.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a program needs to know. Says whose fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host failed to read or write.
    Io,
    /// The host is out of space (or quota).
    NoSpace,
    /// The host does not know the file.
    NotFound,
    /// The host refuses access to the file.
    Permission,
    /// Another process uses the image in a way that excludes ours.
    Locked,
    /// The image breaks the rules of its format: a lie in the file, not a fault of the host.
    Invalid,
    /// The image contradicts itself where it must not be trusted any more: reading on would give
    /// wrong data.
    Corrupt,
    /// The file ends before the data that it claims to hold.
    Truncated,
    /// The image or the request needs something that is not implemented, or that this format cannot do.
    Unsupported,
    /// The caller asked for bytes outside the disk.
    OutOfRange,
    /// The caller wrote to something that is read-only.
    ReadOnly,
    /// The caller's options make no sense.
    Usage,
    /// A policy forbids it (an untrusted image naming another file).
    Denied,
    /// The user interrupted the operation.
    Cancelled,
}

struct Inner {
    kind: ErrorKind,
    message: String,
    context: Vec<String>,
    hints: Vec<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// An error of a disk, an image or the file under it. One pointer wide.
pub struct Error(Box<Inner>);

impl Error {
    /// An error of `kind`, described by `message` (lower case or qemu's own words, no full stop,
    /// offsets in hex).
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), context: vec![], hints: vec![], source: None }))
    }

    /// Wraps a typed error: its text becomes the message and it stays reachable as the source.
    pub fn from_source(kind: ErrorKind, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let source = source.into();
        let mut error = Self::new(kind, source.to_string());
        error.0.source = Some(source);
        error
    }

    /// Puts `context` in front of the message: `context: message`. The last added stands first.
    #[must_use]
    pub fn context(mut self, context: impl Into<String>) -> Self {
        self.0.context.push(context.into());
        self
    }

    /// Adds a sentence that tells the user what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hints.push(hint.into());
        self
    }

    /// The kind, for programs.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The message without the context around it.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What the user can do, one sentence each.
    pub fn hints(&self) -> &[String] {
        &self.0.hints
    }

    /// An invalid image: the file breaks its format's rules.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// A request or image that needs something that is not there.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// Options of the caller that make no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// A write to something read-only.
    pub fn read_only() -> Self {
        Self::new(ErrorKind::ReadOnly, "the disk is open read-only")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for context in self.0.context.iter().rev() {
            write!(f, "{context}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        for hint in &self.0.hints {
            write!(f, " (hint: {hint})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

/// `strerror` of an I/O error, without Rust's "(os error N)".
fn strerror(error: &io::Error) -> String {
    match error.raw_os_error() {
        // musl says "I/O error"; scripts know glibc's words.
        Some(nix::libc::EIO) => "Input/output error".to_owned(),
        Some(code) => {
            let text = error.to_string();
            text.strip_suffix(&format!(" (os error {code})")).unwrap_or(&text).to_owned()
        }
        None => error.to_string(),
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::Permission,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ErrorKind::NoSpace
            }
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        let mut wrapped = Self::new(kind, strerror(&error));
        wrapped.0.source = Some(Box::new(error));
        wrapped
    }
}

impl From<nix::errno::Errno> for Error {
    fn from(errno: nix::errno::Errno) -> Self {
        io::Error::from(errno).into()
    }
}

/// Adds context to the error of a result, where the caller knows what was being done to what.
pub trait ResultExt<T> {
    /// `context: message`, computed only when there is an error.
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
    /// A sentence that tells the user what to do.
    fn hint(self, hint: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for std::result::Result<T, E> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.into().context(context()))
    }

    fn hint(self, hint: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.into().hint(hint()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_stands_in_front_outermost_first() {
        let error = Error::invalid("bad magic").context("header").context("Could not open 'x'");
        assert_eq!(error.to_string(), "Could not open 'x': header: bad magic");
        assert_eq!(error.message(), "bad magic");
    }

    #[test]
    fn io_errors_read_as_strerror() {
        let error = Error::from(io::Error::from_raw_os_error(2));
        assert_eq!(error.to_string(), "No such file or directory");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

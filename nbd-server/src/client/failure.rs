//! How a request can fail.

use std::io;

use block::{Error, ErrorKind};

use crate::proto::Errno;

/// What a request comes to.
pub(super) type Outcome<T> = Result<T, Failure>;

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// The connection is gone, or could not be had: another one may do.
    Lost(ErrorKind, String),
    /// The server breaks the protocol's rules: no use in talking to it.
    Nonsense(String),
    /// The server says no.
    Refused {
        errno: Errno,
        /// Its own words, if it has some.
        message: String,
        /// Where it failed, if that was said.
        at: Option<u64>,
    },
}

impl Failure {
    pub(super) fn nonsense(message: impl Into<String>) -> Self {
        Self::Nonsense(message.into())
    }

    pub(super) fn lost(message: impl Into<String>) -> Self {
        Self::Lost(ErrorKind::Io, message.into())
    }

    /// As an error for people; what was tried is added by whoever tried.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Lost(kind, message) => Error::new(kind, message),
            Self::Nonsense(message) => {
                Error::new(ErrorKind::Io, format!("the server breaks the NBD protocol: {message}"))
            }
            Self::Refused { errno, message, at } => refusal(errno, &message, at),
        }
    }
}

/// What a server's error says: the words of the system for its number, then the server's own.
fn refusal(errno: Errno, message: &str, at: Option<u64>) -> Error {
    let words = match errno {
        Errno::EPERM => "Operation not permitted",
        Errno::EIO => "Input/output error",
        Errno::ENOMEM => "Cannot allocate memory",
        Errno::ENOSPC => "No space left on device",
        Errno::EOVERFLOW => "Value too large for defined data type",
        Errno::ENOTSUP => "Operation not supported",
        Errno::ESHUTDOWN => "Cannot send after transport endpoint shutdown",
        // The document: what is unknown counts as this.
        _ => "Invalid argument",
    };
    let mut text = words.to_owned();
    if let Some(at) = at {
        text += &format!(" at {at:#x}");
    }
    if !message.is_empty() {
        text += &format!(" (the server says: {})", printable(message.as_bytes()));
    }
    let kind = if errno.kind() == ErrorKind::Usage { ErrorKind::Io } else { errno.kind() };
    Error::new(kind, text)
}

/// A stranger's text, fit for a terminal: without control characters, and not endless.
pub(super) fn printable(bytes: &[u8]) -> String {
    const MOST: usize = 1024;
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MOST)
        .collect::<String>()
        .trim()
        .to_owned()
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof if error.get_ref().is_none() => {
                Self::lost("the server has closed the connection")
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Self::lost("the server does not answer in time")
            }
            // TLS: the peer's certificate, its records.
            io::ErrorKind::InvalidData => Self::Lost(ErrorKind::Permission, error.to_string()),
            _ => {
                let error = Error::from(error);
                Self::Lost(error.kind(), format!("the connection to the server is lost: {error}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_the_systems_words_and_the_servers() {
        let refused = |errno, message: &str, at| {
            Failure::Refused { errno, message: message.to_owned(), at }.into_error()
        };
        assert_eq!(refused(Errno::EIO, "", None).to_string(), "Input/output error");
        let error = refused(Errno::ENOSPC, "full\x1b[2J", Some(0x1000));
        assert_eq!(error.to_string(), "No space left on device at 0x1000 (the server says: full [2J)");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(refused(Errno(7777), "", None).to_string(), "Invalid argument");
    }

    #[test]
    fn an_end_is_told_apart_from_an_error() {
        assert_eq!(
            Failure::from(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Failure::lost("the server has closed the connection")
        );
    }
}

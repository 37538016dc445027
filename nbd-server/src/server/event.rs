//! What the server tells whoever keeps a log.

use std::fmt::Debug;
use std::time::Duration;

use block::Error;

use super::stats::Counts;
use crate::proto::HeaderStyle;

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A peer has connected; nothing is known about it yet.
    Connected {
        /// The number of the connection.
        id: u64,
        /// Its address.
        peer: &'a str,
    },
    /// It has chosen an export.
    Negotiated {
        /// The number of the connection.
        id: u64,
        /// The export's name.
        export: &'a str,
        /// What requests and replies look like.
        style: HeaderStyle,
        /// Whether the connection is enciphered, and who the peer has shown to be.
        tls: Option<&'a str>,
    },
    /// An option or a request was refused or failed.
    Failed {
        /// The number of the connection.
        id: u64,
        /// The option or request, in words.
        what: &'a str,
        /// Why.
        error: &'a str,
    },
    /// The connection is over.
    Ended {
        /// The number of the connection.
        id: u64,
        /// The peer's address.
        peer: &'a str,
        /// The export it had chosen.
        export: Option<&'a str>,
        /// Why it ended; `None` if the client took its leave.
        reason: Option<&'a str>,
        /// How long it lasted.
        duration: Duration,
        /// What was done.
        counts: Counts,
    },
    /// A connection could not be accepted.
    AcceptFailed {
        /// Why.
        error: &'a Error,
    },
}

/// Keeps a log. Called from any thread; must return quickly.
pub trait Log: Send + Sync + Debug {
    /// Something has happened.
    fn event(&self, event: &Event<'_>);
}

/// Keeps no log.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Log for Silent {
    fn event(&self, _event: &Event<'_>) {}
}

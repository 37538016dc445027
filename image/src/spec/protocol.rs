//! Protocols: names that are not files, and who opens them.

use std::fmt;
use std::sync::Arc;

use block::{BlockDevice, Error, Result};
use parking_lot::RwLock;
use serde_json::{Map, Value};

use crate::secret::Secrets;

/// What a protocol is asked to open.
#[derive(Debug, Clone, PartialEq)]
pub struct ProtocolRequest {
    /// qemu's name of the driver: `nbd`.
    pub driver: String,
    /// The whole name (`nbd://host/export`), if it was given as a name.
    pub name: Option<String>,
    /// The options, if it was given as options; nested as they were.
    pub options: Map<String, Value>,
    /// Whether it will be written to.
    pub writable: bool,
}

impl ProtocolRequest {
    /// The request, if it makes sense as far as can be told without opening anything.
    pub(super) fn checked(self) -> Result<Self> {
        if super::null::is_null(&self.driver) {
            super::null::Null::of(&self)?;
        }
        if let Some(protocol) = responsible(&self.driver) {
            protocol.check(&self)?;
        }
        Ok(self)
    }

    /// A container of nothing, if that is what is asked for.
    ///
    /// # Errors
    /// The options are wrong.
    pub(crate) fn null(&self) -> Option<Result<super::null::Null>> {
        super::null::is_null(&self.driver).then(|| super::null::Null::of(self))
    }
}

/// What else matters when a disk is opened.
#[derive(Debug, Clone, Copy)]
pub struct Opening<'a> {
    /// What options refer to.
    pub secrets: &'a Secrets,
    /// Whether flushes are left out (the cache mode `unsafe`).
    pub no_flush: bool,
}

/// A protocol: who judges its names and opens the disks behind them.
pub trait Protocol: fmt::Debug + Send + Sync {
    /// qemu's name of the driver (`nbd` stands for all its schemes).
    fn driver(&self) -> &'static str;

    /// Whether the request makes sense, as far as can be told without opening anything.
    ///
    /// # Errors
    /// In qemu's words, without `Could not open`.
    fn check(&self, request: &ProtocolRequest) -> Result<()>;

    /// The name under which `info` shows the disk; `None`: as it was given.
    fn shown_name(&self, request: &ProtocolRequest) -> Option<String>;

    /// Opens the disk.
    ///
    /// # Errors
    /// It cannot be reached, or is not there.
    fn open(&self, request: &ProtocolRequest, how: &Opening<'_>) -> Result<Arc<dyn BlockDevice>>;
}

/// The table of protocols. Filled by the program at start; the library itself knows none.
static PROTOCOLS: RwLock<Vec<Arc<dyn Protocol>>> = RwLock::new(Vec::new());

/// Makes `protocol` responsible for its driver. The last one registered wins.
pub fn register(protocol: Arc<dyn Protocol>) {
    PROTOCOLS.write().push(protocol);
}

/// The protocol that is responsible for a driver.
fn responsible(driver: &str) -> Option<Arc<dyn Protocol>> {
    PROTOCOLS.read().iter().rev().find(|protocol| protocol.driver() == driver).cloned()
}

/// The name of a disk as its protocol shows it.
pub(crate) fn shown_by_protocol(request: &ProtocolRequest) -> Option<String> {
    responsible(&request.driver)?.shown_name(request)
}

/// The driver that a prefix of a name selects, for the protocols that exist in principle.
pub(crate) fn driver_of_scheme(scheme: &str) -> Option<&'static str> {
    match scheme {
        "file" => Some("file"),
        "host_device" | "host_cdrom" => Some("host_device"),
        "nbd" | "nbd+tcp" | "nbd+unix" | "nbd+vsock" | "nbds" | "nbds+tcp" | "nbds+unix" | "nbds+vsock" => {
            Some("nbd")
        }
        "null-co" => Some("null-co"),
        "null-aio" => Some("null-aio"),
        other => responsible(other).map(|protocol| protocol.driver()),
    }
}

/// Splits `PROTO:rest`. `None`: a plain path (no colon, or a slash before it).
pub(crate) fn split_protocol(name: &str) -> Option<(&str, &str)> {
    let at = name.find([':', '/'])?;
    let rest = name.get(at..)?.strip_prefix(':')?;
    Some((name.get(..at)?, rest))
}

/// Opens through the responsible protocol.
///
/// # Errors
/// `Unsupported` if nobody is responsible; otherwise the protocol's.
pub(crate) fn open_protocol(request: &ProtocolRequest, how: &Opening<'_>) -> Result<Arc<dyn BlockDevice>> {
    match responsible(&request.driver) {
        Some(protocol) => protocol.open(request, how),
        None => Err(Error::unsupported(format!(
            "the '{}' protocol is not in this version of vimg",
            request.driver
        ))
        .hint("export or copy the disk to a file")),
    }
}

//! Protocols: names that are not files, and who opens them.

use std::fmt;
use std::sync::Arc;

use block::{BlockDevice, Error, Result};
use parking_lot::RwLock;
use serde_json::{Map, Value};

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
        match self.driver.as_str() {
            "nbd" => super::nbd::validate(&self)?,
            driver if super::null::is_null(driver) => {
                super::null::Null::of(&self)?;
            }
            _ => {}
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

/// Opens the disk behind a protocol name.
pub type Opener = fn(&ProtocolRequest) -> Result<Arc<dyn BlockDevice>>;

struct Registered {
    driver: &'static str,
    opener: Opener,
}

/// The table of openers. Filled by the program at start; the library itself knows no protocol.
static OPENERS: RwLock<Vec<Registered>> = RwLock::new(Vec::new());

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("driver", &self.driver).finish_non_exhaustive()
    }
}

/// Makes `opener` responsible for a driver (`nbd` stands for all its schemes). The last one registered wins.
pub fn register_opener(driver: &'static str, opener: Opener) {
    OPENERS.write().push(Registered { driver, opener });
}

/// The driver that a prefix of a name selects, for the protocols that exist in principle.
pub(crate) fn driver_of_scheme(scheme: &str) -> Option<&'static str> {
    match scheme {
        "file" => Some("file"),
        "host_device" | "host_cdrom" => Some("host_device"),
        "nbd" | "nbd+tcp" | "nbd+unix" => Some("nbd"),
        "null-co" => Some("null-co"),
        "null-aio" => Some("null-aio"),
        other => OPENERS.read().iter().rev().map(|r| r.driver).find(|driver| *driver == other),
    }
}

/// Splits `PROTO:rest`. `None`: a plain path (no colon, or a slash before it).
pub(crate) fn split_protocol(name: &str) -> Option<(&str, &str)> {
    let at = name.find([':', '/'])?;
    let rest = name.get(at..)?.strip_prefix(':')?;
    Some((name.get(..at)?, rest))
}

/// Opens through the registered opener.
///
/// # Errors
/// `Unsupported` if nobody is responsible; otherwise the opener's.
pub(crate) fn open_protocol(request: &ProtocolRequest) -> Result<Arc<dyn BlockDevice>> {
    let opener = OPENERS.read().iter().rev().find(|r| r.driver == request.driver).map(|r| r.opener);
    match opener {
        Some(opener) => opener(request),
        None => Err(Error::unsupported(format!("the '{}' protocol is not in this version of vimg", request.driver))
            .hint("network block devices come with the NBD part of vimg; until then, export or copy the disk to a file")),
    }
}

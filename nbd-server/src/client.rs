//! A client: an export as a disk, and what a server has to offer.
//!
//! ```text
//!   NbdDevice            a block::BlockDevice: alignment, splitting, zeros, extents
//!      |
//!    Pool                several connections, opened when they are wanted, and again when they are lost
//!      |
//!  Connection            requests of many threads in flight; who waits also receives (leader and followers)
//!      |
//!  Reply, Inbox          every chunk held against the rules, data straight into the caller's buffer
//!      |
//!   Channel              bytes, in the clear or through TLS
//! ```
//!
//! The server is a stranger: nothing that it sends makes us panic, takes memory without limit, or is believed before
//! it has been compared with what was asked for. After the first nonsense the connection is given up.

mod connection;
mod device;
mod dial;
mod extents;
mod failure;
mod handshake;
mod inbox;
mod list;
mod pool;
mod raw;
mod reply;
#[cfg(test)]
mod tests;
mod tls;

use std::time::Duration;

use block::{Error, Result};

use crate::channel::Channel;
use crate::uri::ExportName;

pub use device::NbdDevice;
pub use handshake::{ExportInfo, StartTls};
pub use list::{FLAG_NAMES, Listed, list, render};
pub use raw::connect_raw;
pub use tls::load as load_tls;

/// A disk at the other end of `channel`, on which nothing has been said yet. There is this one connection only.
///
/// # Errors
/// As [`NbdDevice::open`].
pub fn over(
    channel: Channel,
    name: &ExportName,
    tls: Option<&dyn StartTls>,
    writable: bool,
) -> Result<NbdDevice> {
    let patience = Duration::from_secs(30);
    let wanted = handshake::Wanted { export: &name.export, tls, host: name.host(), patience };
    let negotiated = handshake::negotiate(channel, &wanted).map_err(Error::from)?;
    NbdDevice::of(negotiated, name.clone(), writable)
}

//! Connections for somebody else, the kernel: the handshake is carried out here, and then the socket is given away.

use std::os::fd::OwnedFd;
use std::time::Duration;

use block::{Error, Result};

use super::dial::dial;
use super::handshake::{ExportInfo, Wanted, negotiate_simple};
use crate::uri::ExportName;

/// How long a server may be silent during the handshake, and how long that may take in all.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection on which the next thing is a request: compact, to be answered by simple replies. Without TLS.
///
/// # Errors
/// The server cannot be reached, or does not have the export; `Unsupported` for a name with TLS, which would have to be
/// spoken by whoever gets the socket.
pub fn connect_raw(name: &ExportName) -> Result<(OwnedFd, ExportInfo)> {
    if name.tls.is_some() || name.tls_creds.is_some() {
        return Err(Error::unsupported("a connection with TLS cannot be given away"));
    }
    let dialled = dial(name, PATIENCE).map_err(Error::from)?;
    let wanted = Wanted { export: &name.export, tls: None, host: name.host(), patience: PATIENCE };
    let negotiated = negotiate_simple(dialled.channel, &wanted).map_err(Error::from)?;
    dialled.patience.without_end()?;
    let socket = negotiated.channel.into_socket();
    let socket =
        socket.ok_or_else(|| Error::unsupported("this connection is no socket that could be given away"))?;
    Ok((socket, negotiated.export))
}

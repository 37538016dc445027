//! Devices for a driver in another process: the back-end's side of QEMU's vhost-user protocol (docs/interop/vhost-user in
//! QEMU's documentation), over a Unix socket.
//!
//! ```text
//!   front-end (a User-Mode Linux)                 this process
//!     memory, a file          -- descriptor -->   GuestRam::shared
//!     rings: place, size      -- messages ---->   Queue
//!     kick, call              -- descriptors ->   events: "something is available", "something has been used"
//!     configuration           <- GET_CONFIG ---   Device::config_read
//! ```
//!
//! One thread serves a connection: its messages and its queues. The front-end is as hostile as any guest; what makes
//! no sense ends the connection. Its memory is mapped here, so that whoever can make that file shorter can end this
//! process: a front-end that is not trusted must be kept from `ftruncate`.

mod message;
mod session;
#[cfg(test)]
mod tests;

use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;

use block::{Result, ResultExt as _};

use crate::sandbox;
use crate::virtio::Device;

/// Serves `device` on a connection until the front-end closes it. `stopping` and a shutdown of the connection end it
/// earlier, after the request that is being served.
///
/// The calling thread gives up all system calls that this does not take, for the rest of its life.
///
/// # Errors
/// The front-end breaks the rules: of the protocol, or of a ring; the host's kernel cannot confine the thread.
pub fn serve(stream: &UnixStream, device: &dyn Device, stopping: &AtomicBool) -> Result<()> {
    sandbox::enter(sandbox::Role::Device)?;
    session::Session::new(stream, device, stopping).run().context(|| "vhost-user".to_owned())
}

//! Network block devices: the protocol, a server for any disk, a client that is a disk, and the kernel's devices.
//!
//! Written from the protocol's document (`doc/proto.md` of the NetworkBlockDevice project) and from the behaviour of
//! its implementations.
//!
//! ```text
//!    client                                    server
//!      |   greeting, flags                        |      handshake
//!      |   option, reply; option, reply ...       |
//!      |   NBD_OPT_GO  ------------------------>  |
//!      |   <----------------- size, flags, ACK    |
//!      |   request, request, request  --------->  |      transmission
//!      |   <--------  replies, in any order       |
//! ```
//!
//! * [`proto`] has every number and record of the wire.
//! * [`uri`] understands names of exports, [`client`] makes disks of them.
//! * [`channel`] is a connection's bytes, in the clear or through TLS.
//! * [`tls`] is how both ends prove who they are.
//! * [`kernel`] has the devices of the kernel: `/dev/nbd0`.

pub mod channel;
pub mod client;
pub mod kernel;
pub mod proto;
pub mod server;
pub mod tls;
pub mod uri;

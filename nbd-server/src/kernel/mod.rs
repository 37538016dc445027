//! The kernel's nbd devices: `/dev/nbd0` and so on, disks whose contents come from a socket.
//!
//! The kernel is an NBD client without a handshake: whoever has a connection on which the handshake is over, or one end
//! of a socket pair whose other end is served, hands it over with the size and the flags, and a disk appears. It speaks
//! compact requests and takes simple replies only; no TLS. It is reached in two ways:
//!
//! * the generic netlink family `nbd` (Linux 4.12 and newer): connects and returns, picks a free device itself, takes
//!   timeouts, and sockets in place of dead ones;
//! * ioctls on the device, where that is missing: one thread is inside the kernel for as long as the disk is there.
//!
//! A disk that goes away under a file system costs data, so that [`detach`] first looks for whoever uses it, writes
//! back what the kernel has cached, and then waits until the device is really free again.
//!
//! Facts: linux/nbd-netlink.h, linux/nbd.h, linux/blkpg.h, and what Linux 6.1 does.

mod family;
mod ioctl;
mod netlink;
mod partition;
mod sys;
mod sysfs;
mod users;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use block::{Error, ErrorKind, Result, ResultExt as _};

use family::Family;
pub use ioctl::Loop;
pub use partition::{Wanted, show_partitions};
pub use sysfs::{PartitionDevice, Status};

/// The kernel numbers its devices in a minor number of 20 bits.
const MAX_INDEX: u32 = (1 << 20) - 1;
/// How long a device may take to appear or to go.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long one may take to go that somebody may be using.
const RELEASE: Duration = Duration::from_secs(2);

/// An nbd device, whether it exists or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device(u32);

impl Device {
    /// Number `index`; `None` if the kernel cannot have one of that number.
    pub fn new(index: u32) -> Option<Self> {
        (index <= MAX_INDEX).then_some(Self(index))
    }

    /// The device that a user names: `/dev/nbd3` or `nbd3`. A partition is not a device.
    ///
    /// # Errors
    /// It is no name of an nbd device.
    pub fn parse(name: &str) -> Result<Self> {
        Self::from_name(name.strip_prefix("/dev/").unwrap_or(name)).ok_or_else(|| {
            Error::usage(format!("'{name}' is not an nbd device"))
                .hint("they are called /dev/nbd0, /dev/nbd1, ...")
        })
    }

    /// From the kernel's name: `nbd3`.
    fn from_name(name: &str) -> Option<Self> {
        let digits = name.strip_prefix("nbd")?;
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let plain = plain && (digits == "0" || !digits.starts_with('0'));
        Self::new(digits.parse().ok().filter(|_| plain)?)
    }

    /// Its number.
    pub fn index(self) -> u32 {
        self.0
    }

    /// The kernel's name: `nbd3`.
    pub fn name(self) -> String {
        format!("nbd{}", self.0)
    }

    /// Its node: `/dev/nbd3`.
    pub fn path(self) -> PathBuf {
        Path::new("/dev").join(self.name())
    }
}

/// The path of its node.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/nbd{}", self.0)
    }
}

/// How a device is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// Bytes of the export. The kernel shows whole sectors of 512 bytes; the rest cannot be reached through it.
    pub size: u64,
    /// Bytes of a logical block: 512, 1024, 2048 or 4096.
    pub block_size: u32,
    /// The transmission flags, as in the handshake ([`crate::proto::transmission`]).
    pub flags: u16,
    /// How long the server may take for a request before its connection counts as dead. `None`: for ever.
    pub timeout: Option<Duration>,
    /// How long requests wait for a new connection when all are dead ([`reconnect`]). `None`: they fail at once.
    /// Netlink only.
    pub reconnect: Option<Duration>,
    /// What the other end is called in `/sys/block/nbdN/backend`. Netlink only.
    pub backend: Option<String>,
    /// Use ioctls even where there is netlink.
    pub ioctl: bool,
}

impl Setup {
    /// For an export of `size` bytes with these transmission flags: blocks of 512 bytes, no timeouts.
    pub fn new(size: u64, flags: u16) -> Self {
        Self { size, block_size: 512, flags, timeout: None, reconnect: None, backend: None, ioctl: false }
    }
}

/// Gives sockets, on which no handshake will take place (any more), to `device`, or to the first free one. Several
/// sockets need `CAN_MULTI_CONN` among the flags. The module is loaded if need be.
///
/// When this returns, the device has its size. With ioctls (see [`Attached::Loop`]) somebody has to wait for its end.
///
/// # Errors
/// `Locked` if it is in use, `Permission` without root, `Unsupported` if this kernel has no nbd, `Usage` if an export
/// of this size or block size cannot be a disk.
pub fn attach(device: Option<Device>, setup: &Setup, sockets: Vec<OwnedFd>) -> Result<Attached> {
    check_setup(setup)?;
    load_module()?;
    let family = if setup.ioctl { None } else { Family::open()? };
    let attached = match family {
        Some(mut family) => {
            let sockets: Vec<_> = sockets.iter().map(OwnedFd::as_fd).collect();
            Attached::Kernel(family.connect(device, setup, &sockets)?)
        }
        None => Attached::Loop(ioctl::start(device, setup, sockets)?),
    };
    let device = attached.device();
    if let Err(error) = wait_until(device, |status| status.size > 0, PATIENCE) {
        let _ = disconnect(device);
        return Err(error);
    }
    Ok(attached)
}

/// A device that has been connected.
#[derive(Debug)]
pub enum Attached {
    /// The kernel has it all; nobody needs to wait for anything.
    Kernel(Device),
    /// A thread is inside the kernel until the device is disconnected.
    Loop(Loop),
}

impl Attached {
    /// Which.
    pub fn device(&self) -> Device {
        match self {
            Self::Kernel(device) => *device,
            Self::Loop(running) => running.device(),
        }
    }
}

fn check_setup(setup: &Setup) -> Result<()> {
    if setup.size < 512 {
        let size = setup.size;
        return Err(Error::usage(format!("a disk of {size} bytes is smaller than a sector of 512 bytes")));
    }
    let block = setup.block_size;
    if !block.is_power_of_two() || !(512..=4096).contains(&block) {
        return Err(Error::usage(format!("the kernel has no disks with blocks of {block} bytes"))
            .hint("only 512, 1024, 2048 and 4096 are possible"));
    }
    Ok(())
}

/// Gives `device`, which waits for that ([`Setup::reconnect`]), new sockets in place of dead ones. `setup` must name
/// the same backend as when it was connected.
///
/// # Errors
/// It is not connected, its sockets are alive, or there is no netlink here.
pub fn reconnect(device: Device, setup: &Setup, sockets: &[OwnedFd]) -> Result<()> {
    let sockets: Vec<_> = sockets.iter().map(OwnedFd::as_fd).collect();
    netlink()?.reconnect(device, setup, &sockets)
}

/// Tells the kernel that the export of `device` has another size in bytes now.
///
/// # Errors
/// It is not connected, or there is no netlink here.
pub fn resize(device: Device, size: u64) -> Result<()> {
    let backend = status(device).and_then(|status| status.backend);
    netlink()?.resize(device, size, backend.as_deref())
}

fn netlink() -> Result<Family> {
    Family::open()?.ok_or_else(|| {
        Error::unsupported("this kernel's nbd cannot be reached by netlink (Linux 4.12 is needed)")
    })
}

/// Waits for connections of the kernel to die.
#[derive(Debug)]
pub struct DeadLinks(Family);

impl DeadLinks {
    /// Listens from now on. The module is loaded if need be.
    ///
    /// # Errors
    /// There is no netlink here, or this kernel does not tell; as [`load_module`].
    pub fn listen() -> Result<Self> {
        load_module()?;
        let family = netlink()?;
        family.subscribe()?;
        Ok(Self(family))
    }

    /// The next device of which a connection has died; `None` if that did not happen for `wait`.
    ///
    /// # Errors
    /// The socket failed.
    pub fn next(&self, wait: Duration) -> Result<Option<Device>> {
        self.0.dead_link(wait)
    }
}

/// How a device is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Detach {
    /// Whoever uses it loses it, with what the kernel has not written back.
    pub force: bool,
    /// Its server is dead: nothing can be written back, and waiting for that would take for ever.
    pub server_gone: bool,
}

/// Writes back what the kernel has cached, disconnects, and waits until the device is free: without size, without owner,
/// without partitions. The server is told (`NBD_CMD_DISC`), but may need longer to end.
///
/// # Errors
/// `NotFound` if it is not connected, `Locked` if it is in use (by whom is said), a failure to write back, or it does
/// not go away.
pub fn detach(device: Device, how: Detach) -> Result<()> {
    let status = status(device).filter(Status::connected);
    let status =
        status.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{device} is not connected")))?;
    if how.force || how.server_gone {
        let users = if how.force { vec![] } else { users::of(device, status.pid) };
        return if users.is_empty() { abandon(device) } else { Err(busy(device, &users)) };
    }
    // As long as this is open nobody can mount it.
    let disk = open_exclusively(device)?;
    let users = users::of(device, status.pid);
    if !users.is_empty() {
        return Err(busy(device, &users));
    }
    disk.sync_all().context(|| format!("writing back what is cached of {device}"))?;
    partition::remove(&disk, device, &status.partitions)?;
    // Nothing is cached any more; should this fail, there is nothing that could be lost.
    let _ = sys::flush_buffers(&disk);
    disconnect(device)?;
    drop(disk);
    wait_until_free(device)
}

/// Takes a device away as it is: opening it, even, could mean to wait for its server.
fn abandon(device: Device) -> Result<()> {
    let owner = status(device).and_then(|status| status.pid);
    disconnect(device)?;
    if wait_until(device, |status| !status.connected(), RELEASE).is_err() {
        let what = format!("{device} has no server any more, but stays until nobody uses it");
        let error = Error::new(ErrorKind::Locked, what);
        return Err(users::of(device, owner).into_iter().fold(error, Error::hint));
    }
    wait_until_free(device)?;
    let left = status(device).map(|status| status.partitions).unwrap_or_default();
    if left.is_empty() { Ok(()) } else { partition::remove(&open_exclusively(device)?, device, &left) }
}

fn disconnect(device: Device) -> Result<()> {
    match Family::open()? {
        Some(mut family) => family.disconnect(device),
        None => ioctl::disconnect(device),
    }
}

fn open_exclusively(device: Device) -> Result<File> {
    let opened = OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(device.path());
    opened.map_err(|error| match error.raw_os_error() {
        Some(nix::libc::EBUSY) => {
            busy(device, &users::of(device, status(device).and_then(|status| status.pid)))
        }
        _ => Error::from(error).context(device.to_string()),
    })
}

fn busy(device: Device, users: &[String]) -> Error {
    let error = Error::new(ErrorKind::Locked, format!("{device} is busy"));
    let error = match users {
        [] => error.hint("it is in use where this process cannot look: in another mount namespace, perhaps"),
        users => users.iter().fold(error, |error, user| error.hint(user.clone())),
    };
    error.hint(
        "umount it first; --force takes it away all the same, and what has not been written back is lost",
    )
}

/// Every nbd device that this kernel has, connected or not, by number.
pub fn list() -> Vec<Status> {
    let block = Path::new(sysfs::BLOCK);
    sysfs::devices(block).into_iter().filter_map(|device| sysfs::status(block, device)).collect()
}

/// One device; `None` if this kernel has none of that number (yet).
pub fn status(device: Device) -> Option<Status> {
    sysfs::status(Path::new(sysfs::BLOCK), device)
}

/// Loads the module, unless the kernel has nbd already.
///
/// # Errors
/// `Unsupported` if it cannot be had, `Permission` if only root could load it.
pub fn load_module() -> Result<()> {
    let there =
        || !sysfs::devices(Path::new(sysfs::BLOCK)).is_empty() || matches!(Family::open(), Ok(Some(_)));
    if there() {
        return Ok(());
    }
    let said = modprobe();
    if there() {
        return Ok(());
    }
    if !nix::unistd::Uid::effective().is_root() {
        return Err(Error::new(ErrorKind::Permission, "the kernel's nbd module is not loaded")
            .hint("run this as root, or 'modprobe nbd' first"));
    }
    let error = Error::unsupported("this kernel has no nbd devices, and its module cannot be loaded");
    let error = if said.is_empty() { error } else { error.hint(said) };
    Err(error
        .hint("install the rest of the kernel's modules (linux-modules-extra-$(uname -r) on Ubuntu, kernel-modules-extra on Fedora)")
        .hint("without it, 'vimg serve' and nbdfuse show the disk as a file"))
}

/// Loads the module; what is complained about.
fn modprobe() -> String {
    let mut command = Command::new("modprobe");
    command.arg("nbd").env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output() {
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => format!("modprobe: {}", Error::from(error)),
    }
}

/// Waits until the device has what is asked of it.
fn wait_until(device: Device, is_so: impl Fn(&Status) -> bool, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    while !status(device).is_some_and(|status| is_so(&status)) {
        if Instant::now() > deadline {
            let waited = patience.as_secs();
            return Err(Error::new(
                ErrorKind::Io,
                format!("{device} has not changed its state in {waited} s"),
            ));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}

/// Waits until nothing is left of the connection.
fn wait_until_free(device: Device) -> Result<()> {
    wait_until(device, |status| !status.connected(), PATIENCE)?;
    let devices = match Family::open()? {
        Some(mut family) => family.status()?,
        None => return Ok(()),
    };
    match devices.iter().find(|(other, _)| *other == device) {
        Some((_, true)) => {
            Err(Error::new(ErrorKind::Io, format!("the kernel says that {device} is still connected")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_the_kernel_names_them() {
        assert_eq!(Device::parse("/dev/nbd12").unwrap().index(), 12);
        assert_eq!(Device::parse("nbd0").unwrap().to_string(), "/dev/nbd0");
        for name in
            ["", "nbd", "/dev/nbd", "nbd01", "nbd0p1", "/dev/sda", "nbd+1", "nbd1048576", "nbd99999999999"]
        {
            assert_eq!(Device::parse(name).unwrap_err().kind(), ErrorKind::Usage, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_a_disk_is_refused_before_the_kernel_is_asked() {
        let no = |setup: &Setup| check_setup(setup).unwrap_err().to_string();
        assert_eq!(no(&Setup::new(511, 1)), "a disk of 511 bytes is smaller than a sector of 512 bytes");
        for block_size in [0, 1, 256, 513, 8192, 1 << 31] {
            let setup = Setup { block_size, ..Setup::new(1 << 20, 1) };
            assert!(no(&setup).contains("blocks of"), "{block_size}");
        }
        check_setup(&Setup::new(512, 1)).unwrap();
    }
}

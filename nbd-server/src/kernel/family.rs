//! The kernel's generic netlink family `nbd` (linux/nbd-netlink.h): its requests in words of ours, over a socket.

use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use block::{Error, ErrorKind, Result, ResultExt as _};
use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::netlink::{Attributes, Message, Request, messages};
use super::{Device, Setup, sys};

/// The family of families.
mod ctrl {
    pub(super) const FAMILY: u16 = 0x10;
    pub(super) const VERSION: u8 = 2;
    pub(super) const GETFAMILY: u8 = 3;
    pub(super) const ATTR_FAMILY_ID: u16 = 1;
    pub(super) const ATTR_FAMILY_NAME: u16 = 2;
    pub(super) const ATTR_MCAST_GROUPS: u16 = 7;
    pub(super) const GROUP_NAME: u16 = 1;
    pub(super) const GROUP_ID: u16 = 2;
}

const FAMILY_NAME: &str = "nbd";
const GROUP_NAME: &str = "nbd_mc_group";
const VERSION: u8 = 1;

/// `NBD_CMD_*`.
mod command {
    pub(super) const CONNECT: u8 = 1;
    pub(super) const DISCONNECT: u8 = 2;
    pub(super) const RECONFIGURE: u8 = 3;
    pub(super) const LINK_DEAD: u8 = 4;
    pub(super) const STATUS: u8 = 5;
}

/// `NBD_ATTR_*`.
mod attr {
    pub(super) const INDEX: u16 = 1;
    pub(super) const SIZE_BYTES: u16 = 2;
    pub(super) const BLOCK_SIZE_BYTES: u16 = 3;
    pub(super) const TIMEOUT: u16 = 4;
    pub(super) const SERVER_FLAGS: u16 = 5;
    pub(super) const SOCKETS: u16 = 7;
    pub(super) const DEAD_CONN_TIMEOUT: u16 = 8;
    pub(super) const DEVICE_LIST: u16 = 9;
    pub(super) const BACKEND_IDENTIFIER: u16 = 10;
    /// `NBD_SOCK_ITEM`, `NBD_SOCK_FD`, `NBD_DEVICE_ITEM`, `NBD_DEVICE_INDEX`: each the only one of its kind, or the first.
    pub(super) const ITEM: u16 = 1;
    pub(super) const DEVICE_CONNECTED: u16 = 2;
}

/// How long the kernel may take for an answer. Disconnecting waits for what is under way.
const PATIENCE: TimeVal = TimeVal::new(60, 0);
/// Room for an answer: a list of 4096 devices takes 100 KiB.
const BUFFER_BYTES: usize = 256 << 10;

/// A way to the kernel's `nbd`.
#[derive(Debug)]
pub(super) struct Family {
    socket: OwnedFd,
    number: u16,
    group: Option<u32>,
    sequence: u32,
}

impl Family {
    /// Finds the family; `None` if this kernel has none (yet: the module may not be loaded).
    pub(super) fn open() -> Result<Option<Self>> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkGeneric);
        let socket = match socket {
            Err(Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT) => return Ok(None),
            socket => socket.context(|| "netlink".to_owned())?,
        };
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).context(|| "netlink".to_owned())?;
        setsockopt(&socket, ReceiveTimeout, &PATIENCE).context(|| "netlink".to_owned())?;
        let mut family = Self { socket, number: ctrl::FAMILY, group: None, sequence: 0 };
        let request =
            family.request(ctrl::GETFAMILY, ctrl::VERSION).text(ctrl::ATTR_FAMILY_NAME, FAMILY_NAME);
        let mut found = None;
        match family.ask(request, |attributes| found = described(attributes)) {
            Err(Refused::Errno(Errno::ENOENT)) => return Ok(None),
            result => result.map_err(|refused| refused.during("looking for the kernel's nbd"))?,
        }
        Ok(found.map(|(number, group)| Self { number, group, ..family }))
    }

    /// `NBD_CMD_CONNECT`: gives sockets, on which the handshake is over, to `device`, or to the first that is free.
    pub(super) fn connect(
        &mut self,
        device: Option<Device>,
        setup: &Setup,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<Device> {
        let mut request = self.request(command::CONNECT, VERSION);
        if let Some(device) = device {
            request = request.u32(attr::INDEX, device.index());
        }
        request = with_setup(request.u64(attr::SIZE_BYTES, setup.size), setup);
        request = request.u64(attr::SERVER_FLAGS, setup.flags.into());
        let mut connected = device;
        self.ask(with_sockets(request, sockets), |attributes| {
            connected = attributes.u32(attr::INDEX).and_then(Device::new).or(connected);
        })
        .map_err(|refused| refused.connecting(device))?;
        connected.ok_or_else(|| Error::new(ErrorKind::Io, "the kernel does not say which device it took"))
    }

    /// `NBD_CMD_RECONFIGURE` with sockets in place of dead ones.
    pub(super) fn reconnect(
        &mut self,
        device: Device,
        setup: &Setup,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let request = self.request(command::RECONFIGURE, VERSION).u32(attr::INDEX, device.index());
        let request = with_sockets(with_setup(request, setup), sockets);
        self.ask(request, |_| ()).map_err(|refused| refused.during(&format!("reconnecting {device}")))
    }

    /// `NBD_CMD_RECONFIGURE` with a new size in bytes. `backend` is what the device was connected with.
    pub(super) fn resize(&mut self, device: Device, size: u64, backend: Option<&str>) -> Result<()> {
        let request = self.request(command::RECONFIGURE, VERSION).u32(attr::INDEX, device.index());
        let request = with_backend(request.u64(attr::SIZE_BYTES, size), backend);
        self.ask(request, |_| ()).map_err(|refused| refused.during(&format!("resizing {device}")))
    }

    /// `NBD_CMD_DISCONNECT`. Nothing happens if it is not connected.
    pub(super) fn disconnect(&mut self, device: Device) -> Result<()> {
        let request = self.request(command::DISCONNECT, VERSION).u32(attr::INDEX, device.index());
        self.ask(request, |_| ()).map_err(|refused| refused.during(&format!("disconnecting {device}")))
    }

    /// `NBD_CMD_STATUS`: which devices there are and whether they are connected.
    pub(super) fn status(&mut self) -> Result<Vec<(Device, bool)>> {
        let mut devices = vec![];
        let request = self.request(command::STATUS, VERSION);
        self.ask(request, |attributes| devices.extend(listed(attributes)))
            .map_err(|refused| refused.during("asking the kernel for its nbd devices"))?;
        Ok(devices)
    }

    /// Wants to be told when a connection dies ([`dead_link`](Self::dead_link)).
    pub(super) fn subscribe(&self) -> Result<()> {
        let group =
            self.group.ok_or_else(|| Error::unsupported("this kernel does not tell of dead connections"))?;
        sys::join_group(&self.socket, group).context(|| "listening to the kernel's nbd".to_owned())
    }

    /// The next device whose connection has died (`NBD_CMD_LINK_DEAD`); `None` if there was none for `wait`.
    pub(super) fn dead_link(&self, wait: Duration) -> Result<Option<Device>> {
        let millis = i64::try_from(wait.as_millis().max(1)).unwrap_or(i64::MAX);
        setsockopt(&self.socket, ReceiveTimeout, &TimeVal::milliseconds(millis))?;
        let mut buf = vec![0; BUFFER_BYTES];
        let received = match recv(self.socket.as_raw_fd(), &mut buf, MsgFlags::empty()) {
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => return Ok(None),
            received => received?,
        };
        Ok(messages(&buf[..received]).find_map(|message| match message {
            Ok(Message::Data { family, command: command::LINK_DEAD, attributes, .. })
                if family == self.number =>
            {
                attributes.u32(attr::INDEX).and_then(Device::new)
            }
            _ => None,
        }))
    }

    fn request(&mut self, command: u8, version: u8) -> Request {
        self.sequence = self.sequence.wrapping_add(1);
        Request::new(self.number, self.sequence, command, version)
    }

    /// Sends a request and gives what is answered to `told`, until the kernel says how it ended.
    fn ask(
        &self,
        request: Request,
        mut told: impl FnMut(Attributes<'_>),
    ) -> std::result::Result<(), Refused> {
        send(self.socket.as_raw_fd(), &request.finish(), MsgFlags::empty())?;
        let mut buf = vec![0; BUFFER_BYTES];
        loop {
            let received = match recv(self.socket.as_raw_fd(), &mut buf, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                received => received?,
            };
            for message in messages(&buf[..received]) {
                match message.map_err(Refused::Answer)? {
                    Message::Outcome { sequence, errno } if sequence == self.sequence => {
                        return if errno == 0 { Ok(()) } else { Err(Errno::from_raw(errno).into()) };
                    }
                    Message::Data { sequence, attributes, .. } if sequence == self.sequence => {
                        told(attributes);
                    }
                    // Late, or for everybody.
                    _ => {}
                }
            }
        }
    }
}

/// Why the kernel did not do it.
#[derive(Debug)]
enum Refused {
    /// It says so.
    Errno(Errno),
    /// Its answer makes no sense.
    Answer(Error),
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl Refused {
    fn during(self, what: &str) -> Error {
        let error = match self {
            Self::Errno(Errno::EPERM) => Error::from(Errno::EPERM).hint("the kernel's nbd is for root only"),
            Self::Errno(Errno::EAGAIN) => Error::new(ErrorKind::Io, "the kernel does not answer"),
            Self::Errno(errno) => errno.into(),
            Self::Answer(error) => error,
        };
        error.context(what)
    }

    fn connecting(self, device: Option<Device>) -> Error {
        match (self, device) {
            (Self::Errno(Errno::EBUSY), Some(device)) => in_use(device),
            (refused, Some(device)) => refused.during(&format!("connecting {device}")),
            (refused, None) => refused.during("connecting an nbd device"),
        }
    }
}

/// The error of a device that is connected already.
pub(super) fn in_use(device: Device) -> Error {
    Error::new(ErrorKind::Locked, format!("{device} is in use already"))
        .hint("'vimg nbd list' shows by whom; without a device name the first free one is taken")
}

/// The number of the family and of its multicast group.
fn described(attributes: Attributes<'_>) -> Option<(u16, Option<u32>)> {
    let groups = attributes.nested(ctrl::ATTR_MCAST_GROUPS);
    // Each group is an attribute of its own number.
    let mut groups = groups.into_iter().map(|(_, group)| Attributes::of(group));
    let group = groups.find(|group| group.text(ctrl::GROUP_NAME) == Some(GROUP_NAME));
    Some((attributes.u16(ctrl::ATTR_FAMILY_ID)?, group.and_then(|group| group.u32(ctrl::GROUP_ID))))
}

fn listed(attributes: Attributes<'_>) -> impl Iterator<Item = (Device, bool)> {
    attributes.nested(attr::DEVICE_LIST).each(attr::ITEM).filter_map(|device| {
        let connected = device.u8(attr::DEVICE_CONNECTED).is_some_and(|connected| connected != 0);
        Some((Device::new(device.u32(attr::ITEM)?)?, connected))
    })
}

fn with_setup(mut request: Request, setup: &Setup) -> Request {
    request = request.u64(attr::BLOCK_SIZE_BYTES, setup.block_size.into());
    if let Some(timeout) = setup.timeout {
        request = request.u64(attr::TIMEOUT, seconds(timeout));
    }
    if let Some(wait) = setup.reconnect {
        request = request.u64(attr::DEAD_CONN_TIMEOUT, seconds(wait));
    }
    with_backend(request, setup.backend.as_deref())
}

fn with_backend(request: Request, backend: Option<&str>) -> Request {
    match backend {
        Some(name) => request.text(attr::BACKEND_IDENTIFIER, name),
        None => request,
    }
}

/// Whole seconds, rounded up: the kernel takes 0 for "for ever".
fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

fn with_sockets(request: Request, sockets: &[BorrowedFd<'_>]) -> Request {
    request.nest(attr::SOCKETS, |list| {
        sockets.iter().fold(list, |list, socket| {
            let number = socket.as_raw_fd().unsigned_abs();
            list.nest(attr::ITEM, |item| item.u32(attr::ITEM, number))
        })
    })
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;

    /// What Linux 6.1 says of the family (the middle of it left out).
    #[test]
    fn the_family_and_its_group_are_found() {
        let attributes = [
            &[8, 0, 2, 0, b'n', b'b', b'd', 0][..],
            &[6, 0, 1, 0, 0x1c, 0, 0, 0],
            &[32, 0, 7, 0, 28, 0, 1, 0],
            &[8, 0, 2, 0, 5, 0, 0, 0],
            &[16, 0, 1, 0],
            b"nbd_mc_group"[..12].as_ref(),
        ]
        .concat();
        assert_eq!(described(Attributes::of(&attributes)), Some((0x1c, Some(5))));
        assert_eq!(described(Attributes::of(&attributes[..16])), Some((0x1c, None)));
        assert_eq!(described(Attributes::of(&attributes[..8])), None);
    }

    #[test]
    fn the_list_of_devices_is_understood() {
        let device = |index: u8, connected: u8| {
            [&[20, 0, 1, 0, 8, 0, 1, 0, index, 0, 0, 0][..], &[5, 0, 2, 0, connected, 0, 0, 0]].concat()
        };
        let list = [&[44, 0, 9, 0][..], &device(0, 1), &device(11, 0)].concat();
        let devices: Vec<_> = listed(Attributes::of(&list)).collect();
        assert_eq!(devices, [(Device::new(0).unwrap(), true), (Device::new(11).unwrap(), false)]);
        for len in 0..list.len() {
            let _ = listed(Attributes::of(&list[..len])).count();
        }
    }

    #[test]
    fn a_connect_says_all_that_was_set() {
        let setup = Setup {
            timeout: Some(Duration::from_millis(1500)),
            reconnect: Some(Duration::from_secs(60)),
            backend: Some("vimg".to_owned()),
            ..Setup::new(1 << 20, 3)
        };
        let socket = std::io::stderr();
        let sockets = [std::os::fd::AsFd::as_fd(&socket)];
        let bytes = with_sockets(with_setup(Request::new(1, 1, 1, 1), &setup), &sockets).finish();
        let all: Vec<_> = messages(&bytes).collect::<Result<_>>().unwrap();
        let [Message::Data { attributes, .. }] = all[..] else { panic!("{all:?}") };
        assert_eq!(attributes.bytes(attr::BLOCK_SIZE_BYTES), Some(&[0, 2, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(attributes.bytes(attr::TIMEOUT), Some(&[2, 0, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(attributes.bytes(attr::DEAD_CONN_TIMEOUT), Some(&[60, 0, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(attributes.text(attr::BACKEND_IDENTIFIER), Some("vimg"));
        assert_eq!(attributes.nested(attr::SOCKETS).nested(attr::ITEM).u32(attr::ITEM), Some(2));
    }
}

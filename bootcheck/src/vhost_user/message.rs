//! Messages ("Message Specification"): a header of 12 bytes, a payload, and descriptors with some of them.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::net::UnixStream;

use block::codec::Reader;
use block::{Error, Result};

use crate::sys;

/// A message's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request(pub(super) u32);

impl Request {
    pub(super) const GET_FEATURES: Self = Self(1);
    pub(super) const SET_FEATURES: Self = Self(2);
    pub(super) const SET_OWNER: Self = Self(3);
    pub(super) const RESET_OWNER: Self = Self(4);
    pub(super) const SET_MEM_TABLE: Self = Self(5);
    pub(super) const SET_VRING_NUM: Self = Self(8);
    pub(super) const SET_VRING_ADDR: Self = Self(9);
    pub(super) const SET_VRING_BASE: Self = Self(10);
    pub(super) const GET_VRING_BASE: Self = Self(11);
    pub(super) const SET_VRING_KICK: Self = Self(12);
    pub(super) const SET_VRING_CALL: Self = Self(13);
    pub(super) const SET_VRING_ERR: Self = Self(14);
    pub(super) const GET_PROTOCOL_FEATURES: Self = Self(15);
    pub(super) const SET_PROTOCOL_FEATURES: Self = Self(16);
    pub(super) const GET_QUEUE_NUM: Self = Self(17);
    pub(super) const SET_VRING_ENABLE: Self = Self(18);
    pub(super) const SET_BACKEND_REQ_FD: Self = Self(21);
    pub(super) const GET_CONFIG: Self = Self(24);
    pub(super) const SET_CONFIG: Self = Self(25);
}

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;
/// Offset, length and flags before the bytes of a configuration.
const CONFIG_HEAD: usize = 12;
/// No message of the protocol is longer; some front-ends send their whole union.
const MOST_PAYLOAD: u32 = 4096;

/// A message of the front-end.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: Request,
    /// The front-end waits for an answer, whatever the request is.
    pub(super) need_reply: bool,
    pub(super) payload: Vec<u8>,
    pub(super) files: Vec<File>,
}

/// `struct vhost_vring_state`: a ring and a number.
#[derive(Debug, Clone, Copy)]
pub(super) struct State {
    pub(super) index: u32,
    pub(super) number: u32,
}

/// `struct vhost_vring_addr`, without the log. Addresses are the front-end's own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    pub(super) index: u32,
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
}

/// A memory region description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) guest: u64,
    pub(super) len: u64,
    /// Where the front-end itself has it.
    pub(super) user: u64,
    pub(super) offset: u64,
}

/// The head of a virtio device config space payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    pub(super) offset: u32,
    pub(super) len: u32,
    pub(super) flags: u32,
}

impl Message {
    /// The next one; `None` once the other end is closed.
    pub(super) fn receive(stream: &UnixStream) -> Result<Option<Self>> {
        let mut files = vec![];
        let mut header = [0; HEADER_BYTES];
        if !fill(stream, &mut header, &mut files)? {
            return Ok(None);
        }
        let [r0, r1, r2, r3, f0, f1, f2, f3, l0, l1, l2, l3] = header;
        let request = u32::from_le_bytes([r0, r1, r2, r3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
            return Err(Error::invalid(format!("message {request} with flags {flags:#x}")));
        }
        if len > MOST_PAYLOAD {
            return Err(Error::invalid(format!("message {request} of {len:#x} bytes")));
        }
        let mut payload = vec![0; block::num::to_usize(u64::from(len))];
        if !fill(stream, &mut payload, &mut files)? {
            return Err(Error::invalid(format!("message {request} ends after its header")));
        }
        Ok(Some(Self { request: Request(request), need_reply: flags & NEED_REPLY != 0, payload, files }))
    }

    /// The answer to a request.
    pub(super) fn reply(stream: &UnixStream, request: Request, payload: &[u8]) -> Result<()> {
        let mut bytes = vec![];
        bytes.extend(request.0.to_le_bytes());
        bytes.extend((VERSION | REPLY).to_le_bytes());
        bytes.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(payload);
        let mut stream: &UnixStream = stream;
        Ok(stream.write_all(&bytes)?)
    }

    /// Reads the payload's fields; those behind them are of no interest.
    fn parse<T>(&self, read: impl FnOnce(&mut Reader<'_>) -> Option<T>) -> Result<T> {
        let short =
            || Error::invalid(format!("message {} of only {:#x} bytes", self.request.0, self.payload.len()));
        read(&mut Reader::new(&self.payload)).ok_or_else(short)
    }

    pub(super) fn number(&self) -> Result<u64> {
        self.parse(|reader| reader.le_u64())
    }

    pub(super) fn state(&self) -> Result<State> {
        self.parse(|reader| Some(State { index: reader.le_u32()?, number: reader.le_u32()? }))
    }

    pub(super) fn addresses(&self) -> Result<Addresses> {
        self.parse(|reader| {
            let (index, _flags) = (reader.le_u32()?, reader.le_u32()?);
            let (descriptors, used) = (reader.le_u64()?, reader.le_u64()?);
            Some(Addresses { index, descriptors, used, available: reader.le_u64()? })
        })
    }

    pub(super) fn regions(&self) -> Result<Vec<Region>> {
        let count = self.parse(|reader| reader.le_u32())?;
        if block::num::to_usize(u64::from(count)) > sys::MOST_FILES {
            return Err(Error::invalid(format!("a table of {count} memory regions")));
        }
        self.parse(|reader| {
            reader.skip(8)?;
            (0..count).map(|_| region(reader)).collect()
        })
    }

    /// The head, and the bytes behind it.
    pub(super) fn config(&self) -> Result<(Config, &[u8])> {
        let config = self.parse(|reader| {
            Some(Config { offset: reader.le_u32()?, len: reader.le_u32()?, flags: reader.le_u32()? })
        })?;
        let end = block::num::to_usize(u64::from(config.len)).saturating_add(CONFIG_HEAD);
        match self.payload.get(CONFIG_HEAD..end) {
            Some(bytes) => Ok((config, bytes)),
            None => {
                Err(Error::invalid(format!("{:#x} bytes of configuration in a shorter message", config.len)))
            }
        }
    }

    /// Ring and descriptor of a kick, call or error message; bit 8 says that there is no descriptor.
    pub(super) fn event(mut self) -> Result<(u32, Option<File>)> {
        let number = self.number()?;
        let file = self.files.pop();
        if (number & 0x100 == 0) != file.is_some() || !self.files.is_empty() {
            let text = format!("message {} with {number:#x} and other descriptors", self.request.0);
            return Err(Error::invalid(text));
        }
        Ok((block::num::low_u32(number & 0xff), file))
    }
}

fn region(reader: &mut Reader<'_>) -> Option<Region> {
    let (guest, len) = (reader.le_u64()?, reader.le_u64()?);
    Some(Region { guest, len, user: reader.le_u64()?, offset: reader.le_u64()? })
}

/// Reads until `buf` is full; `false` if the other end was closed before the first byte.
fn fill(stream: &UnixStream, buf: &mut [u8], files: &mut Vec<File>) -> Result<bool> {
    let mut done = 0;
    while done < buf.len() {
        let (count, more) = match sys::receive(stream, &mut buf[done..]) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        files.extend(more);
        if files.len() > sys::MOST_FILES {
            return Err(Error::invalid("a message with too many descriptors"));
        }
        if count == 0 {
            return if done == 0 { Ok(false) } else { Err(Error::invalid("a message ends in the middle")) };
        }
        done += count;
    }
    Ok(true)
}

//! Generic netlink messages, as far as one family with plain attributes needs them: built and taken apart, without I/O.
//!
//! ```text
//!   u32 length, u16 type, u16 flags, u32 sequence, u32 port        the message (netlink(7))
//!   u8 command, u8 version, u16 0                                  generic netlink
//!   u16 length, u16 type, payload, padding to 4                    attributes, some of them nested
//! ```
//!
//! Every number is in the byte order of the machine: both ends run on it. The other end is the kernel; all the same
//! nothing here trusts a length.
#![expect(clippy::host_endian_bytes, reason = "netlink(7): all numbers are in host byte order")]

use block::{Error, Result};

/// Bytes of the header of a message.
const HEADER_BYTES: usize = 16;
/// Bytes of the header of generic netlink.
const GENERIC_BYTES: usize = 4;
/// Bytes of the header of an attribute.
const ATTRIBUTE_BYTES: usize = 4;

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLM_F_ACK`: say when it is done.
const ACK: u16 = 4;
/// `NLMSG_ERROR`: an errno, 0 for success.
const ERROR: u16 = 2;
/// The lower 14 bits of an attribute's type; the others are flags (`NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`).
const TYPE_MASK: u16 = 0x3fff;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// A request that is being built.
#[derive(Debug, Clone)]
pub(super) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request to a family (its number), to be acknowledged.
    pub(super) fn new(family: u16, sequence: u32, command: u8, version: u8) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(family.to_ne_bytes());
        bytes.extend((REQUEST | ACK).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend([command, version, 0, 0]);
        Self { bytes }
    }

    /// An attribute with these bytes. What does not fit its length field (64 KiB) is cut off.
    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        let value = &value[..value.len().min(usize::from(u16::MAX) - ATTRIBUTE_BYTES)];
        let len = u16::try_from(value.len() + ATTRIBUTE_BYTES).unwrap_or(u16::MAX);
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// A number of 32 bits.
    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// A number of 64 bits.
    pub(super) fn u64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// A text, which ends with a NUL on the wire.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Attributes inside an attribute: what `fill` adds.
    pub(super) fn nest(self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let inner = fill(Self { bytes: vec![] }).bytes;
        self.bytes(kind | NESTED, &inner)
    }

    /// The message, complete.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes
    }
}

/// A message that has been received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message<'a> {
    /// The outcome of the request with this sequence number: an errno, 0 for success.
    Outcome {
        /// Of the request.
        sequence: u32,
        /// Positive, 0 for success.
        errno: i32,
    },
    /// An answer, or something that the kernel tells everybody.
    Data {
        /// The number of the family (or the kind of message, if it is not generic netlink).
        family: u16,
        /// Of the request; 0 for multicasts.
        sequence: u32,
        /// The family's command.
        command: u8,
        /// What it says.
        attributes: Attributes<'a>,
    },
}

/// The messages of a datagram. One that is malformed is the last.
pub(super) fn messages(mut rest: &[u8]) -> impl Iterator<Item = Result<Message<'_>>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let taken = take_message(rest);
        rest = taken.as_ref().map_or(&[], |(_, rest)| *rest);
        Some(taken.map(|(message, _)| message))
    })
}

fn take_message(bytes: &[u8]) -> Result<(Message<'_>, &[u8])> {
    let malformed = || Error::invalid(format!("the kernel sent a netlink message of {} bytes", bytes.len()));
    let header = bytes.first_chunk::<HEADER_BYTES>().ok_or_else(malformed)?;
    let len = usize::try_from(u32_of(header, 0)).map_err(|_| malformed())?;
    let body = bytes.get(HEADER_BYTES..len).ok_or_else(malformed)?;
    let rest = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    let sequence = u32_of(header, 8);
    let message = if kind == ERROR {
        let errno = body.first_chunk::<4>().ok_or_else(malformed)?;
        Message::Outcome { sequence, errno: i32::from_ne_bytes(*errno).saturating_neg() }
    } else {
        let generic = body.first_chunk::<GENERIC_BYTES>().ok_or_else(malformed)?;
        let attributes = Attributes(&body[GENERIC_BYTES..]);
        Message::Data { family: kind, sequence, command: generic[0], attributes }
    };
    Ok((message, rest))
}

/// The attributes of a message, or inside an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    /// The next attribute's type and payload. What is malformed ends the list.
    fn next(&mut self) -> Option<Self::Item> {
        let header = self.0.first_chunk::<ATTRIBUTE_BYTES>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let payload = self.0.get(ATTRIBUTE_BYTES..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, payload))
    }
}

impl<'a> Attributes<'a> {
    /// The attributes that these bytes are.
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The payload of the first attribute of this type.
    pub(super) fn bytes(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|(found, _)| *found == kind).map(|(_, payload)| payload)
    }

    /// A number of 8 bits.
    pub(super) fn u8(self, kind: u16) -> Option<u8> {
        self.bytes(kind)?.first().copied()
    }

    /// A number of 16 bits.
    pub(super) fn u16(self, kind: u16) -> Option<u16> {
        Some(u16::from_ne_bytes(*self.bytes(kind)?.first_chunk()?))
    }

    /// A number of 32 bits.
    pub(super) fn u32(self, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.bytes(kind)?.first_chunk()?))
    }

    /// A text up to its NUL; empty if it is not UTF-8.
    pub(super) fn text(self, kind: u16) -> Option<&'a str> {
        let bytes = self.bytes(kind)?.split(|byte| *byte == 0).next()?;
        Some(std::str::from_utf8(bytes).unwrap_or_default())
    }

    /// The attributes inside an attribute.
    pub(super) fn nested(self, kind: u16) -> Self {
        Self(self.bytes(kind).unwrap_or(&[]))
    }

    /// The attributes inside each attribute of this type.
    pub(super) fn each(self, kind: u16) -> impl Iterator<Item = Self> {
        self.filter(move |(found, _)| *found == kind).map(|(_, payload)| Self(payload))
    }
}

fn u32_of(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_bytes_of_the_kernels_headers() {
        let request = Request::new(0x1c, 7, 1, 1)
            .u32(1, 5)
            .u64(2, 0x1000)
            .text(10, "me")
            .nest(7, |sockets| sockets.nest(1, |item| item.u32(1, 9)))
            .finish();
        let expected = [
            &[72, 0, 0, 0, 0x1c, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0][..],
            &[1, 1, 0, 0],
            &[8, 0, 1, 0, 5, 0, 0, 0],
            &[12, 0, 2, 0, 0, 0x10, 0, 0, 0, 0, 0, 0],
            &[7, 0, 10, 0, b'm', b'e', 0, 0],
            &[16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 9, 0, 0, 0],
        ]
        .concat();
        let mut expected = expected;
        expected[0] = u8::try_from(expected.len()).unwrap();
        assert_eq!(request, expected);
    }

    /// What Linux 6.1 answers to a CONNECT that leaves the choice of the device to it: the index, then the outcome.
    fn reply() -> Vec<u8> {
        [
            &[28, 0, 0, 0, 0x1c, 0, 0, 0, 7, 0, 0, 0, 0x11, 0x22, 0, 0, 1, 1, 0, 0, 8, 0, 1, 0, 3, 0, 0, 0][..],
            &[36, 0, 0, 0, 2, 0, 0, 1, 7, 0, 0, 0, 0x11, 0x22, 0, 0, 0xf0, 0xff, 0xff, 0xff],
            &[28, 0, 0, 0, 0x1c, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat()
    }

    #[test]
    fn an_answer_is_taken_apart() {
        let reply = reply();
        let all: Vec<_> = messages(&reply).collect::<Result<_>>().unwrap();
        let [Message::Data { family: 0x1c, sequence: 7, command: 1, attributes }, outcome] = all[..] else {
            panic!("{all:?}")
        };
        assert_eq!(attributes.u32(1), Some(3));
        assert_eq!(attributes.u32(2), None);
        assert_eq!(outcome, Message::Outcome { sequence: 7, errno: 16 });
    }

    #[test]
    fn a_message_that_is_cut_off_is_an_error_or_less_never_a_panic() {
        let reply = reply();
        for len in 0..reply.len() {
            for message in messages(&reply[..len]) {
                if let Ok(Message::Data { attributes, .. }) = message {
                    let _ = (
                        attributes.u8(1),
                        attributes.u16(1),
                        attributes.text(1),
                        attributes.nested(1).count(),
                    );
                }
            }
        }
        messages(&reply[..20]).next().unwrap().unwrap_err();
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let mut reply = reply();
        for len in [0_u32, 1, 15, 16, 19, 1 << 16, u32::MAX] {
            reply[..4].copy_from_slice(&len.to_ne_bytes());
            messages(&reply).next().unwrap().unwrap_err();
        }
        for len in [0_u16, 1, 3, 4, 5, 9, u16::MAX] {
            let attribute = [&len.to_ne_bytes()[..], &[1, 0, 3, 0, 0, 0]].concat();
            assert_eq!(Attributes(&attribute).u32(1), None);
        }
    }

    #[test]
    fn no_bytes_are_too_strange() {
        proptest::proptest!(|(bytes: Vec<u8>)| {
            for message in messages(&bytes) {
                if let Ok(Message::Data { attributes, .. }) = message {
                    for (kind, _) in attributes {
                        let _ = (attributes.text(kind), attributes.each(kind).count());
                    }
                }
            }
        });
    }
}

//! What a request asks for, decided without I/O.
//!
//! A request is looked at completely before anything happens: what it wants, or which error it gets, and how many bytes
//! of payload follow it either way.

use block::ZeroMode;

use crate::proto::{Errno, HeaderStyle, Request, command, command_flags as flag};

/// What has to be known of the export and the connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    /// Bytes.
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) resizable: bool,
    pub(super) style: HeaderStyle,
    /// At least one metadata context has been chosen.
    pub(super) contexts: bool,
    /// Bytes.
    pub(super) max_payload: u32,
}

/// A range of the disk that lies on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Read {
        range: Range,
        one_chunk: bool,
    },
    Write {
        range: Range,
        fua: bool,
    },
    Disconnect,
    Flush,
    Trim {
        range: Range,
        fua: bool,
    },
    Cache {
        range: Range,
    },
    Zero {
        range: Range,
        mode: ZeroMode,
        fua: bool,
    },
    Status {
        range: Range,
        one: bool,
    },
    /// The range and the contexts come in the payload.
    StatusOf {
        offset: u64,
        one: bool,
    },
    Resize {
        size: u64,
    },
}

/// Why a request is answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) errno: Errno,
    pub(super) text: String,
}

impl Refusal {
    pub(super) fn new(errno: Errno, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    fn invalid(text: impl Into<String>) -> Self {
        Self::new(Errno::EINVAL, text)
    }
}

/// A request that has been understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// Bytes of payload that follow the header on the wire.
    pub(super) payload: u64,
    pub(super) action: Result<Action, Refusal>,
}

/// The most bytes of ids that a `BLOCK_STATUS` payload can sensibly have.
const MAX_STATUS_PAYLOAD: u64 = 8 + 4 * 1024;

/// Understands a request.
pub(super) fn plan(request: &Request, facts: &Facts) -> Plan {
    let payload = payload_len(request, facts);
    let action = action(request, facts).and_then(|action| {
        if payload > u64::from(facts.max_payload) {
            let limit = facts.max_payload;
            return Err(Refusal::invalid(format!("payload of {payload} bytes, the maximum is {limit}")));
        }
        Ok(action)
    });
    Plan { payload, action }
}

/// In compact requests only writes have a payload; in extended ones what says so has, and a write in any case.
fn payload_len(request: &Request, facts: &Facts) -> u64 {
    let announced = facts.style == HeaderStyle::Extended && request.flags & flag::PAYLOAD_LEN != 0;
    if request.command == command::WRITE || announced { request.length } else { 0 }
}

fn action(request: &Request, facts: &Facts) -> Result<Action, Refusal> {
    let &Request { flags, command, offset, length, .. } = request;
    if command == command::DISC {
        return Ok(Action::Disconnect);
    }
    check_flags(request, facts)?;
    let fua = flags & flag::FUA != 0;
    match command {
        command::READ => {
            let range = range(request, facts, Errno::EINVAL)?;
            let one_chunk = flags & flag::DF != 0 || facts.style == HeaderStyle::Simple;
            if one_chunk && length > u64::from(facts.max_payload) {
                let errno = if flags & flag::DF != 0 { Errno::EOVERFLOW } else { Errno::EINVAL };
                let limit = facts.max_payload;
                return Err(Refusal::new(errno, format!("read of {length} bytes, the maximum is {limit}")));
            }
            Ok(Action::Read { range, one_chunk })
        }
        command::WRITE => {
            writable(facts)?;
            Ok(Action::Write { range: range(request, facts, Errno::ENOSPC)?, fua })
        }
        command::FLUSH if offset == 0 && length == 0 => Ok(Action::Flush),
        command::FLUSH => Err(Refusal::invalid("flush with an offset or a length")),
        command::TRIM => {
            writable(facts)?;
            Ok(Action::Trim { range: range(request, facts, Errno::EINVAL)?, fua })
        }
        command::CACHE => Ok(Action::Cache { range: range(request, facts, Errno::EINVAL)? }),
        command::WRITE_ZEROES => {
            writable(facts)?;
            let range = range(request, facts, Errno::ENOSPC)?;
            let mode =
                ZeroMode { may_unmap: flags & flag::NO_HOLE == 0, no_fallback: flags & flag::FAST_ZERO != 0 };
            Ok(Action::Zero { range, mode, fua })
        }
        command::BLOCK_STATUS => status(request, facts),
        command::RESIZE => resize(request, facts),
        other => Err(Refusal::invalid(format!("unknown command {other:#x}"))),
    }
}

/// Flags where they have no business are an error (section "Command flags").
fn check_flags(request: &Request, facts: &Facts) -> Result<(), Refusal> {
    let allowed = match request.command {
        command::READ if facts.style != HeaderStyle::Simple => flag::DF,
        command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::REQ_ONE,
        _ => 0,
    };
    let payload = match request.command {
        command::WRITE | command::BLOCK_STATUS if facts.style == HeaderStyle::Extended => flag::PAYLOAD_LEN,
        _ => 0,
    };
    let wrong = request.flags & !(flag::FUA | allowed | payload);
    if wrong == 0 {
        return Ok(());
    }
    Err(Refusal::invalid(format!("flags {wrong:#x} do not go with {}", command::name(request.command))))
}

fn writable(facts: &Facts) -> Result<(), Refusal> {
    if facts.read_only { Err(Refusal::new(Errno::EPERM, "the export is read-only")) } else { Ok(()) }
}

fn range(request: &Request, facts: &Facts, past_end: Errno) -> Result<Range, Refusal> {
    let (offset, len) = (request.offset, request.length);
    if offset > facts.size || len > facts.size - offset {
        let size = facts.size;
        let text = format!("{len} bytes at {offset:#x} lie past the end of the export ({size} bytes)");
        return Err(Refusal::new(past_end, text));
    }
    Ok(Range { offset, len })
}

fn status(request: &Request, facts: &Facts) -> Result<Action, Refusal> {
    if facts.style == HeaderStyle::Simple || !facts.contexts {
        return Err(Refusal::invalid("no metadata context has been negotiated"));
    }
    let one = request.flags & flag::REQ_ONE != 0;
    if request.flags & flag::PAYLOAD_LEN != 0 {
        let len = request.length;
        if !(12..=MAX_STATUS_PAYLOAD).contains(&len) || !len.is_multiple_of(4) {
            return Err(Refusal::invalid(format!("block status payload of {len} bytes")));
        }
        return Ok(Action::StatusOf { offset: request.offset, one });
    }
    let range = range(request, facts, Errno::EINVAL)?;
    if range.len == 0 {
        return Err(Refusal::invalid("block status of no bytes"));
    }
    Ok(Action::Status { range, one })
}

/// The resize extension: the offset field is the new size.
fn resize(request: &Request, facts: &Facts) -> Result<Action, Refusal> {
    writable(facts)?;
    if !facts.resizable {
        return Err(Refusal::new(Errno::EPERM, "the export may not be resized"));
    }
    if i64::try_from(request.offset).is_err() {
        return Err(Refusal::invalid(format!("size {:#x} is too large", request.offset)));
    }
    Ok(Action::Resize { size: request.offset })
}

/// Understands the payload of a `BLOCK_STATUS` request: a length in bytes and the ids of contexts.
pub(super) fn status_payload(
    payload: &[u8],
    offset: u64,
    facts: &Facts,
    known: impl Fn(u32) -> bool,
) -> Result<(Range, Vec<u32>), Refusal> {
    let mut reader = block::codec::Reader::new(payload);
    let len = reader.be_u64().ok_or_else(|| Refusal::invalid("short block status payload"))?;
    let mut ids = vec![];
    while let Some(id) = reader.be_u32() {
        if !known(id) || ids.contains(&id) {
            return Err(Refusal::invalid(format!("context id {id} was not negotiated, or stands twice")));
        }
        ids.push(id);
    }
    if ids.is_empty() || len == 0 {
        return Err(Refusal::invalid("block status of nothing"));
    }
    let request = Request { flags: 0, command: command::BLOCK_STATUS, cookie: 0, offset, length: len };
    Ok((range(&request, facts, Errno::EINVAL)?, ids))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FACTS: Facts = Facts {
        size: 1_000_003,
        read_only: false,
        resizable: false,
        style: HeaderStyle::Extended,
        contexts: true,
        max_payload: 1 << 20,
    };

    fn request(command: u16, flags: u16, offset: u64, length: u64) -> Request {
        Request { flags, command, cookie: 1, offset, length }
    }

    fn errno(request: &Request, facts: &Facts) -> Errno {
        plan(request, facts).action.unwrap_err().errno
    }

    #[test]
    fn past_the_end_is_enospc_for_writes_and_einval_for_reads() {
        for (command, wanted) in [
            (command::READ, Errno::EINVAL),
            (command::WRITE, Errno::ENOSPC),
            (command::WRITE_ZEROES, Errno::ENOSPC),
            (command::TRIM, Errno::EINVAL),
            (command::CACHE, Errno::EINVAL),
            (command::BLOCK_STATUS, Errno::EINVAL),
        ] {
            for (offset, len) in [(1_000_000, 4), (u64::MAX, 2), (2, u64::MAX), (1_000_004, 0)] {
                assert_eq!(errno(&request(command, 0, offset, len), &FACTS), wanted, "{command} {offset}");
            }
            plan(&request(command, 0, 1_000_000, 3), &FACTS).action.unwrap();
        }
    }

    #[test]
    fn a_read_only_export_says_eperm() {
        let facts = Facts { read_only: true, ..FACTS };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(errno(&request(command, 0, 0, 512), &facts), Errno::EPERM);
        }
        assert_eq!(
            plan(&request(command::WRITE, 0, 0, 512), &facts).payload,
            512,
            "the payload comes anyway"
        );
    }

    #[test]
    fn flags_out_of_place_are_einval() {
        for (command, flags) in [
            (command::READ, flag::NO_HOLE),
            (command::WRITE, flag::DF),
            (command::FLUSH, flag::REQ_ONE),
            (command::READ, flag::PAYLOAD_LEN),
            (command::READ, 0x8000),
        ] {
            assert_eq!(errno(&request(command, flags, 0, 0), &FACTS), Errno::EINVAL, "{command} {flags}");
        }
        let simple = Facts { style: HeaderStyle::Simple, ..FACTS };
        assert_eq!(errno(&request(command::READ, flag::DF, 0, 4), &simple), Errno::EINVAL);
        plan(&request(command::READ, flag::DF | flag::FUA, 0, 4), &FACTS).action.unwrap();
    }

    #[test]
    fn too_much_for_one_chunk() {
        let facts = Facts { size: 1 << 40, ..FACTS };
        assert_eq!(errno(&request(command::READ, flag::DF, 0, 2 << 20), &facts), Errno::EOVERFLOW);
        assert_eq!(errno(&request(command::WRITE, 0, 0, 2 << 20), &facts), Errno::EINVAL);
        plan(&request(command::READ, 0, 0, 1 << 34), &facts).action.unwrap();
        plan(&request(command::TRIM, 0, 0, 1 << 34), &facts).action.unwrap();
    }

    #[test]
    fn resizing_has_to_be_allowed() {
        assert_eq!(errno(&request(command::RESIZE, 0, 4096, 0), &FACTS), Errno::EPERM);
        let facts = Facts { resizable: true, ..FACTS };
        assert_eq!(
            plan(&request(command::RESIZE, 0, 4096, 0), &facts).action,
            Ok(Action::Resize { size: 4096 })
        );
        assert_eq!(errno(&request(command::RESIZE, 0, 1 << 63, 0), &facts), Errno::EINVAL);
    }

    #[test]
    fn a_status_payload_names_negotiated_contexts_once() {
        let payload = |ids: &[u32]| {
            let mut bytes = 4096_u64.to_be_bytes().to_vec();
            ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
            status_payload(&bytes, 0, &FACTS, |id| id < 3).map(|(range, ids)| (range.len, ids))
        };
        assert_eq!(payload(&[2, 1]), Ok((4096, vec![2, 1])));
        payload(&[3]).unwrap_err();
        payload(&[1, 1]).unwrap_err();
        payload(&[]).unwrap_err();
    }

    proptest! {
        #[test]
        fn what_is_accepted_lies_on_the_disk(
            flags: u16, command in 0..12_u16, offset: u64, length: u64, size in 0..1_u64 << 63, read_only: bool,
        ) {
            let facts = Facts { size, read_only, ..FACTS };
            let plan = plan(&request(command, flags, offset, length), &facts);
            match plan.action {
                Ok(Action::Read { range, .. } | Action::Cache { range } | Action::Status { range, .. }) => {
                    prop_assert!(range.offset.checked_add(range.len).unwrap() <= size);
                }
                Ok(Action::Write { range, .. } | Action::Trim { range, .. } | Action::Zero { range, .. }) => {
                    prop_assert!(range.offset.checked_add(range.len).unwrap() <= size);
                    prop_assert!(!read_only);
                }
                _ => {}
            }
        }
    }
}

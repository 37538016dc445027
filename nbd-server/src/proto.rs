//! The wire: every number and every record of the NBD protocol, under the names that its document
//! (`doc/proto.md` of the NetworkBlockDevice project) gives them. All integers are big-endian.
//!
//! Nothing here does I/O. Values from outside stay plain numbers until somebody decides about them, so that what is
//! unknown can be named in a message and skipped.

use block::ErrorKind;
use block::codec::{Reader, Writer};

/// `NBDMAGIC`, the first eight bytes of a server's greeting.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, the second eight bytes of a newstyle greeting, and the start of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// The second eight bytes of an oldstyle greeting (section "Oldstyle negotiation").
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// The start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The start of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The start of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// The start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The start of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// The start of a chunk of an extended reply.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The port that IANA has set aside.
pub const DEFAULT_PORT: u16 = 10809;
/// The longest string (name, description, query, error text) in bytes.
pub const MAX_STRING: usize = 4096;
/// The payload that every peer must bear when no block size has been agreed on, in bytes.
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;

/// Handshake flags of the server (16 bits).
pub mod handshake {
    /// The server speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The server can leave out the 124 zeros after `NBD_OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Flags of the client (32 bits): the same bits.
pub mod client_flags {
    /// The client speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u32 = 1;
    /// The client does not want the 124 zeros.
    pub const NO_ZEROES: u32 = 2;
}

/// Transmission flags: what an export can do (16 bits).
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_CMD_FLUSH` is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `NBD_CMD_FLAG_FUA` is served.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Seeks cost something.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `NBD_CMD_TRIM` is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `NBD_CMD_WRITE_ZEROES` and `NBD_CMD_FLAG_NO_HOLE` are served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `NBD_CMD_FLAG_DF` is served (structured replies only).
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers the writes of all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `NBD_CMD_RESIZE` is served (the resize extension).
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// `NBD_CMD_CACHE` is served.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `NBD_CMD_FLAG_FAST_ZERO` is served.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// `NBD_CMD_BLOCK_STATUS` with a payload is served (extended headers only).
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Options of the handshake.
pub mod option {
    /// Choose an export and go, without a reply when it fails.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and go.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use extended requests and replies.
    pub const EXTENDED_HEADERS: u32 = 11;

    /// The name of an option as the document spells it.
    pub fn name(option: u32) -> String {
        let name = match option {
            EXPORT_NAME => "EXPORT_NAME",
            ABORT => "ABORT",
            LIST => "LIST",
            STARTTLS => "STARTTLS",
            INFO => "INFO",
            GO => "GO",
            STRUCTURED_REPLY => "STRUCTURED_REPLY",
            LIST_META_CONTEXT => "LIST_META_CONTEXT",
            SET_META_CONTEXT => "SET_META_CONTEXT",
            EXTENDED_HEADERS => "EXTENDED_HEADERS",
            other => return format!("option {other:#x}"),
        };
        format!("NBD_OPT_{name}")
    }
}

/// Types of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A piece of information about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The bit of all errors.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known, or not wanted.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// The server's policy forbids it.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// The platform cannot do it.
    pub const ERR_PLATFORM: u32 = ERROR + 4;
    /// TLS has to be begun first.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is about to end.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// Block sizes have to be asked for.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    /// Extended headers have to be agreed on first.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;

    /// The name of an error reply, for messages.
    pub fn name(kind: u32) -> String {
        let name = match kind {
            ERR_UNSUP => "UNSUP",
            ERR_POLICY => "POLICY",
            ERR_INVALID => "INVALID",
            ERR_PLATFORM => "PLATFORM",
            ERR_TLS_REQD => "TLS_REQD",
            ERR_UNKNOWN => "UNKNOWN",
            ERR_SHUTDOWN => "SHUTDOWN",
            ERR_BLOCK_SIZE_REQD => "BLOCK_SIZE_REQD",
            ERR_TOO_BIG => "TOO_BIG",
            ERR_EXT_HEADER_REQD => "EXT_HEADER_REQD",
            other => return format!("reply type {other:#x}"),
        };
        format!("NBD_REP_ERR_{name}")
    }
}

/// Pieces of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its canonical name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands of the transmission phase.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect; never answered.
    pub const DISC: u16 = 2;
    /// Make completed writes durable.
    pub const FLUSH: u16 = 3;
    /// Give space back.
    pub const TRIM: u16 = 4;
    /// Read ahead.
    pub const CACHE: u16 = 5;
    /// Write zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for metadata.
    pub const BLOCK_STATUS: u16 = 7;
    /// Change the size (the resize extension): the offset field holds it.
    pub const RESIZE: u16 = 8;

    /// The name of a command as the document spells it.
    pub fn name(command: u16) -> String {
        let name = match command {
            READ => "READ",
            WRITE => "WRITE",
            DISC => "DISC",
            FLUSH => "FLUSH",
            TRIM => "TRIM",
            CACHE => "CACHE",
            WRITE_ZEROES => "WRITE_ZEROES",
            BLOCK_STATUS => "BLOCK_STATUS",
            RESIZE => "RESIZE",
            other => return format!("command {other:#x}"),
        };
        format!("NBD_CMD_{name}")
    }
}

/// Flags of commands.
pub mod command_flags {
    /// Answer when the data and what it takes to find them are durable.
    pub const FUA: u16 = 1;
    /// `WRITE_ZEROES`: keep space for the range.
    pub const NO_HOLE: u16 = 1 << 1;
    /// `READ`: answer in one piece.
    pub const DF: u16 = 1 << 2;
    /// `BLOCK_STATUS`: one extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// `WRITE_ZEROES`: fail rather than be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: the length is that of a payload which follows.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks of structured and extended replies.
pub mod chunk {
    /// Nothing more.
    pub const NONE: u16 = 0;
    /// Offset and bytes.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeros.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The bit of all errors.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
    /// Flag: the last chunk of the reply.
    pub const FLAG_DONE: u16 = 1;
}

/// States in the context `base:allocation`.
pub mod allocation {
    /// The name of the context.
    pub const CONTEXT: &str = "base:allocation";
    /// No space is taken.
    pub const HOLE: u64 = 1;
    /// It reads as zeros.
    pub const ZERO: u64 = 2;
}

/// The context of qemu that counts layers.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// What the names of qemu's bitmap contexts begin with.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// An error number on the wire (section "Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub u32);

impl Errno {
    /// Success.
    pub const OK: Self = Self(0);
    /// Not permitted.
    pub const EPERM: Self = Self(1);
    /// The host failed.
    pub const EIO: Self = Self(5);
    /// No memory.
    pub const ENOMEM: Self = Self(12);
    /// The request makes no sense.
    pub const EINVAL: Self = Self(22);
    /// No space, or past the end.
    pub const ENOSPC: Self = Self(28);
    /// Too much for one chunk.
    pub const EOVERFLOW: Self = Self(75);
    /// Cannot be done (fast).
    pub const ENOTSUP: Self = Self(95);
    /// The server is about to end.
    pub const ESHUTDOWN: Self = Self(108);

    /// The number for a kind of error. `OutOfRange` is `EINVAL`; commands that write say `ENOSPC` themselves.
    pub fn from_kind(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::NoSpace => Self::ENOSPC,
            ErrorKind::Permission | ErrorKind::ReadOnly | ErrorKind::Denied | ErrorKind::Locked => {
                Self::EPERM
            }
            ErrorKind::Unsupported => Self::ENOTSUP,
            ErrorKind::OutOfRange | ErrorKind::Usage => Self::EINVAL,
            ErrorKind::Cancelled => Self::ESHUTDOWN,
            _ => Self::EIO,
        }
    }

    /// The kind that a number from a server stands for; what is unknown counts as `EINVAL`, as the document wants.
    pub fn kind(self) -> ErrorKind {
        match self {
            Self::EPERM => ErrorKind::Permission,
            Self::ENOSPC => ErrorKind::NoSpace,
            Self::ENOTSUP => ErrorKind::Unsupported,
            Self::EINVAL | Self::EOVERFLOW => ErrorKind::Usage,
            _ => ErrorKind::Io,
        }
    }

    /// The name, for messages.
    pub fn name(self) -> String {
        match self {
            Self::OK => "OK",
            Self::EPERM => "EPERM",
            Self::EIO => "EIO",
            Self::ENOMEM => "ENOMEM",
            Self::EINVAL => "EINVAL",
            Self::ENOSPC => "ENOSPC",
            Self::EOVERFLOW => "EOVERFLOW",
            Self::ENOTSUP => "ENOTSUP",
            Self::ESHUTDOWN => "ESHUTDOWN",
            Self(other) => return format!("error {other}"),
        }
        .to_owned()
    }
}

/// How requests and replies look on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeaderStyle {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; structured replies where they are needed or carry more.
    Structured,
    /// Extended requests and replies, 64-bit lengths.
    Extended,
}

impl HeaderStyle {
    /// Bytes of a request's header.
    pub const fn request_len(self) -> usize {
        match self {
            Self::Simple | Self::Structured => Request::COMPACT_LEN,
            Self::Extended => Request::EXTENDED_LEN,
        }
    }
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// [`command_flags`].
    pub flags: u16,
    /// One of [`command`].
    pub command: u16,
    /// The client's name for the request, sent back as it is.
    pub cookie: u64,
    /// In bytes (a new size for `RESIZE`).
    pub offset: u64,
    /// In bytes: of the range, or of the payload where [`command_flags::PAYLOAD_LEN`] is set.
    pub length: u64,
}

impl Request {
    /// Bytes of a compact request.
    pub const COMPACT_LEN: usize = 28;
    /// Bytes of an extended request.
    pub const EXTENDED_LEN: usize = 32;

    /// Understands a header of `style.request_len()` bytes; `None` if it is too short or the magic is another.
    pub fn parse(bytes: &[u8], style: HeaderStyle) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let magic = reader.be_u32()?;
        let extended = style == HeaderStyle::Extended;
        let wanted = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if magic != wanted {
            return None;
        }
        Some(Self {
            flags: reader.be_u16()?,
            command: reader.be_u16()?,
            cookie: reader.be_u64()?,
            offset: reader.be_u64()?,
            length: if extended { reader.be_u64()? } else { u64::from(reader.be_u32()?) },
        })
    }

    /// The bytes of the header. In a compact one a length of more than 32 bits is cut to the largest there is; whoever
    /// builds requests keeps below that.
    pub fn encode(&self, style: HeaderStyle) -> Vec<u8> {
        let extended = style == HeaderStyle::Extended;
        let mut writer = Writer::new();
        writer
            .be_u32(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC })
            .be_u16(self.flags)
            .be_u16(self.command)
            .be_u64(self.cookie)
            .be_u64(self.offset);
        if extended {
            writer.be_u64(self.length);
        } else {
            writer.be_u32(u32::try_from(self.length).unwrap_or(u32::MAX));
        }
        writer.into_bytes()
    }
}

/// The header of any reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; the data of a successful read follow.
    Simple {
        /// What went wrong.
        error: Errno,
        /// The request's cookie.
        cookie: u64,
    },
    /// A chunk of a structured or extended reply; `length` bytes of payload follow.
    Chunk {
        /// [`chunk::FLAG_DONE`].
        flags: u16,
        /// One of [`chunk`].
        kind: u16,
        /// The request's cookie.
        cookie: u64,
        /// The request's offset (extended replies only, else 0).
        offset: u64,
        /// Bytes of payload.
        length: u64,
    },
}

impl ReplyHeader {
    /// Bytes of a simple reply.
    pub const SIMPLE_LEN: usize = 16;
    /// Bytes of a structured chunk's header.
    pub const STRUCTURED_LEN: usize = 20;
    /// Bytes of an extended chunk's header.
    pub const EXTENDED_LEN: usize = 32;

    /// How many bytes a header that begins with this magic has; `None` if no reply begins so.
    pub fn len_of(magic: u32) -> Option<usize> {
        match magic {
            SIMPLE_REPLY_MAGIC => Some(Self::SIMPLE_LEN),
            STRUCTURED_REPLY_MAGIC => Some(Self::STRUCTURED_LEN),
            EXTENDED_REPLY_MAGIC => Some(Self::EXTENDED_LEN),
            _ => None,
        }
    }

    /// Understands a header of as many bytes as [`len_of`](Self::len_of) says.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        match reader.be_u32()? {
            SIMPLE_REPLY_MAGIC => {
                Some(Self::Simple { error: Errno(reader.be_u32()?), cookie: reader.be_u64()? })
            }
            STRUCTURED_REPLY_MAGIC => Some(Self::Chunk {
                flags: reader.be_u16()?,
                kind: reader.be_u16()?,
                cookie: reader.be_u64()?,
                offset: 0,
                length: u64::from(reader.be_u32()?),
            }),
            EXTENDED_REPLY_MAGIC => Some(Self::Chunk {
                flags: reader.be_u16()?,
                kind: reader.be_u16()?,
                cookie: reader.be_u64()?,
                offset: reader.be_u64()?,
                length: reader.be_u64()?,
            }),
            _ => None,
        }
    }

    /// Appends the header's bytes; chunks as structured ones unless `extended`. The length of a structured chunk fits
    /// 32 bits because whoever builds it keeps payloads far below that.
    pub fn encode(&self, extended: bool, out: &mut Vec<u8>) {
        match *self {
            Self::Simple { error, cookie } => {
                out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
                out.extend_from_slice(&error.0.to_be_bytes());
                out.extend_from_slice(&cookie.to_be_bytes());
            }
            Self::Chunk { flags, kind, cookie, offset, length } => {
                let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
                out.extend_from_slice(&magic.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
                out.extend_from_slice(&kind.to_be_bytes());
                out.extend_from_slice(&cookie.to_be_bytes());
                if extended {
                    out.extend_from_slice(&offset.to_be_bytes());
                    out.extend_from_slice(&length.to_be_bytes());
                } else {
                    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
                }
            }
        }
    }
}

/// The header of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of [`option`].
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes of the header.
    pub const LEN: usize = 16;

    /// Understands the header; `None` if it is too short or the magic is another.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        (reader.be_u64()? == IHAVEOPT).then_some(())?;
        Some(Self { option: reader.be_u32()?, length: reader.be_u32()? })
    }

    /// The bytes of the header.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.be_u64(IHAVEOPT).be_u32(self.option).be_u32(self.length);
        writer.into_bytes()
    }
}

/// The header of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that it answers.
    pub option: u32,
    /// One of [`reply`].
    pub kind: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReply {
    /// Bytes of the header.
    pub const LEN: usize = 20;

    /// Understands the header; `None` if it is too short or the magic is another.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        (reader.be_u64()? == OPTION_REPLY_MAGIC).then_some(())?;
        Some(Self { option: reader.be_u32()?, kind: reader.be_u32()?, length: reader.be_u32()? })
    }

    /// The bytes of the header.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.be_u64(OPTION_REPLY_MAGIC).be_u32(self.option).be_u32(self.kind).be_u32(self.length);
        writer.into_bytes()
    }

    /// Whether it is an error.
    pub fn is_error(&self) -> bool {
        self.kind & reply::ERROR != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn magics_are_those_of_the_document() {
        assert_eq!(&NBDMAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&IHAVEOPT.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn a_request_of_qemu_io_is_understood() {
        // `qemu-io -c 'read 64k 4k'` on a connection with structured replies.
        let bytes = [
            0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x10, 0,
        ];
        let request = Request { flags: 0, command: command::READ, cookie: 7, offset: 65536, length: 4096 };
        assert_eq!(Request::parse(&bytes, HeaderStyle::Structured), Some(request));
        assert_eq!(Request::parse(&bytes, HeaderStyle::Extended), None);
        assert_eq!(request.encode(HeaderStyle::Simple), bytes);
    }

    fn any_style() -> impl Strategy<Value = HeaderStyle> {
        prop_oneof![Just(HeaderStyle::Simple), Just(HeaderStyle::Structured), Just(HeaderStyle::Extended)]
    }

    proptest! {
        #[test]
        fn requests_survive_a_round_trip(
            flags: u16, command: u16, cookie: u64, offset: u64, length: u64, style in any_style(),
        ) {
            let length = if style == HeaderStyle::Extended { length } else { length & 0xffff_ffff };
            let request = Request { flags, command, cookie, offset, length };
            let bytes = request.encode(style);
            prop_assert_eq!(bytes.len(), style.request_len());
            prop_assert_eq!(Request::parse(&bytes, style), Some(request));
            prop_assert_eq!(Request::parse(&bytes[..bytes.len() - 1], style), None);
        }

        #[test]
        fn replies_survive_a_round_trip(
            flags: u16, kind: u16, cookie: u64, offset: u64, length: u64, error: u32, extended: bool,
        ) {
            let simple = ReplyHeader::Simple { error: Errno(error), cookie };
            let (offset, length) = if extended { (offset, length) } else { (0, length & 0xffff_ffff) };
            for header in [simple, ReplyHeader::Chunk { flags, kind, cookie, offset, length }] {
                let mut bytes = vec![];
                header.encode(extended, &mut bytes);
                let magic = u32::from_be_bytes(bytes[..4].try_into().unwrap());
                prop_assert_eq!(ReplyHeader::len_of(magic), Some(bytes.len()));
                prop_assert_eq!(ReplyHeader::parse(&bytes), Some(header));
            }
        }

        #[test]
        fn options_survive_a_round_trip(option: u32, kind: u32, length: u32) {
            let header = OptionHeader { option, length };
            prop_assert_eq!(OptionHeader::parse(&header.encode()), Some(header));
            let reply = OptionReply { option, kind, length };
            prop_assert_eq!(OptionReply::parse(&reply.encode()), Some(reply));
        }

        #[test]
        fn no_bytes_are_too_strange(bytes: Vec<u8>, style in any_style()) {
            let _ = (Request::parse(&bytes, style), ReplyHeader::parse(&bytes));
            let _ = (OptionHeader::parse(&bytes), OptionReply::parse(&bytes));
        }
    }
}

//! What is said between the host and the appliance's init. This one file is compiled into both.
//!
//! ```text
//!   serial line    bells: 32 bytes with a magic number and a checksum, between whatever the kernel prints
//!   mailbox disk   payloads: the host's at offset 0, the init's at WINDOW; a bell says how long they are
//! ```
//!
//! There is one request at a time, and one answer to each. All numbers are little-endian. Neither side believes the
//! other: the host because a hostile file system may have taken over the appliance, the init because it can.

use std::fmt;

/// The version of all this. Host and init are built together; a test build may still mix them up.
pub const VERSION: u32 = 1;
/// Bytes of the mailbox for each direction, and so the most bytes of a payload.
pub const WINDOW: u32 = 16 << 20;
/// The most bytes of a file in one payload.
pub const PIECE: u32 = 8 << 20;
/// The size of the mailbox disk in bytes.
pub const MAILBOX_BYTES: u64 = 2 * WINDOW as u64;
/// The serial number of the mailbox disk.
pub const MAILBOX_SERIAL: &str = "vimg-mailbox";
/// Where the init finds its configuration.
pub const CONFIG_PATH: &str = "etc/appliance";
/// The init's first word when it is to guard a program on the host.
pub const GUARD: &str = "guard";
/// The init's first word when it is to serve on the host.
pub const HOST: &str = "host";
/// Bytes of a bell.
pub const BELL_BYTES: usize = 32;

const MAGIC: [u8; 8] = *b"\x01vimgAPP";

/// The serial number of the disk with this index.
pub fn disk_serial(index: usize) -> String {
    format!("vimg-disk-{index}")
}

/// CRC-32 (ISO 3309, polynomial 0xedb88320), eight bytes at a time.
pub fn crc32(bytes: &[u8]) -> u32 {
    let at = |table: usize, byte: u8| TABLES[table][usize::from(byte)];
    let mut crc = !0_u32;
    let (eights, rest) = bytes.as_chunks::<8>();
    for [a, b, c, d, e, f, g, h] in eights {
        let [w, x, y, z] = crc.to_le_bytes();
        crc = at(7, a ^ w)
            ^ at(6, b ^ x)
            ^ at(5, c ^ y)
            ^ at(4, d ^ z)
            ^ at(3, *e)
            ^ at(2, *f)
            ^ at(1, *g)
            ^ at(0, *h);
    }
    !rest.iter().fold(crc, |crc, &byte| at(0, crc.to_le_bytes()[0] ^ byte) ^ (crc >> 8))
}

/// What a byte becomes with 0 to 7 zero bytes behind it.
static TABLES: [[u32; 256]; 8] = {
    let mut tables = [[0; 256]; 8];
    let (mut index, mut start) = (0, 0_u32);
    while index < 256 {
        let (mut value, mut bit) = (start, 0);
        while bit < 64 {
            value = if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
            bit += 1;
            if bit % 8 == 0 {
                tables[bit / 8 - 1][index] = value;
            }
        }
        index += 1;
        start += 1;
    }
    tables
};

/// Says that a payload lies in the mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bell {
    /// Number of the request; the answer has the same.
    pub id: u32,
    /// For an answer: 0 for success, 1 for a [`Failure`]. For a request: 0.
    pub status: u32,
    /// Bytes of the payload.
    pub len: u32,
    /// Their CRC-32.
    pub crc: u32,
}

impl Bell {
    /// The bytes on the line: magic number, fields, zeros, CRC-32 of all before.
    pub fn encode(&self) -> [u8; BELL_BYTES] {
        let mut bytes = [0; BELL_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        let fields = [self.id, self.status, self.len, self.crc];
        for (place, field) in bytes[8..24].chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        let crc = crc32(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The bell of these bytes, if they are one.
    pub fn decode(bytes: &[u8; BELL_BYTES]) -> Option<Self> {
        let field =
            |at: usize| bytes.get(at..at + 4).and_then(|field| field.try_into().ok()).map(u32::from_le_bytes);
        if !bytes.starts_with(&MAGIC) || field(28)? != crc32(&bytes[..28]) {
            return None;
        }
        let bell = Self { id: field(8)?, status: field(12)?, len: field(16)?, crc: field(20)? };
        (bell.len <= WINDOW).then_some(bell)
    }
}

/// Finds bells among other bytes on the line.
#[derive(Debug, Default)]
pub struct Scanner {
    held: Vec<u8>,
}

impl Scanner {
    /// Takes the next bytes; hands over bells, and what is between them.
    pub fn push(&mut self, bytes: &[u8], mut bell: impl FnMut(Bell), mut other: impl FnMut(&[u8])) {
        let mut noise = |bytes: &[u8]| {
            if !bytes.is_empty() {
                other(bytes);
            }
        };
        self.held.extend(bytes);
        let mut from = 0;
        while let Some(found) = begin(&self.held[from..]) {
            noise(&self.held[from..from + found]);
            from += found;
            let Some(whole) = self.held.get(from..from + BELL_BYTES) else { break };
            match whole.try_into().ok().and_then(Bell::decode) {
                Some(decoded) => {
                    bell(decoded);
                    from += BELL_BYTES;
                }
                None => {
                    noise(&self.held[from..=from]);
                    from += 1;
                }
            }
        }
        if begin(&self.held[from..]).is_none() {
            noise(&self.held[from..]);
            from = self.held.len();
        }
        self.held.drain(..from);
    }
}

/// Where a bell could begin.
fn begin(bytes: &[u8]) -> Option<usize> {
    (0..bytes.len()).find(|&at| {
        let len = MAGIC.len().min(bytes.len() - at);
        bytes[at..at + len] == MAGIC[..len]
    })
}

/// A payload makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonsense;

impl fmt::Display for Nonsense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message that makes no sense")
    }
}

impl std::error::Error for Nonsense {}

/// Writes the fields of a payload.
#[derive(Debug, Default)]
pub struct Fields(Vec<u8>);

impl Fields {
    fn byte(&mut self, value: u8) {
        self.0.push(value);
    }

    fn number(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    /// The length (8 bytes) and the bytes.
    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn list<T>(&mut self, items: &[T], mut each: impl FnMut(&mut Self, &T)) {
        self.number(items.len() as u64);
        items.iter().for_each(|item| each(self, item));
    }
}

/// Reads the fields of a payload, never past its end.
#[derive(Debug)]
pub struct Source<'a>(&'a [u8]);

type Read<T> = Result<T, Nonsense>;

impl<'a> Source<'a> {
    fn take(&mut self, len: usize) -> Read<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Nonsense)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Read<u8> {
        self.take(1)?.first().copied().ok_or(Nonsense)
    }

    fn flag(&mut self) -> Read<bool> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Nonsense),
        }
    }

    fn number(&mut self) -> Read<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| Nonsense)?))
    }

    fn short(&mut self) -> Read<u32> {
        u32::try_from(self.number()?).map_err(|_| Nonsense)
    }

    fn signed(&mut self) -> Read<i64> {
        Ok(i64::from_le_bytes(self.take(8)?.try_into().map_err(|_| Nonsense)?))
    }

    fn bytes(&mut self) -> Read<Vec<u8>> {
        let len = usize::try_from(self.number()?).map_err(|_| Nonsense)?;
        Ok(self.take(len)?.to_vec())
    }

    fn text(&mut self) -> Read<String> {
        String::from_utf8(self.bytes()?).map_err(|_| Nonsense)
    }

    /// Every item takes a byte at least, so that the count cannot be a lie of any size.
    fn list<T>(&mut self, mut each: impl FnMut(&mut Self) -> Read<T>) -> Read<Vec<T>> {
        let count = usize::try_from(self.number()?).map_err(|_| Nonsense)?;
        if count > self.0.len() {
            return Err(Nonsense);
        }
        (0..count).map(|_| each(self)).collect()
    }
}

/// Something that is sent.
pub trait Message: Sized {
    /// Appends its fields.
    fn write(&self, fields: &mut Fields);

    /// Reads its fields.
    ///
    /// # Errors
    /// They make no sense.
    fn read(source: &mut Source<'_>) -> Read<Self>;

    /// All of it as a payload.
    fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        self.write(&mut fields);
        fields.0
    }

    /// It from a payload, to the last byte.
    ///
    /// # Errors
    /// The payload makes no sense.
    fn decode(payload: &[u8]) -> Read<Self> {
        let mut source = Source(payload);
        let message = Self::read(&mut source)?;
        if source.0.is_empty() { Ok(message) } else { Err(Nonsense) }
    }
}

/// Which file system is mounted, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountRequest {
    /// Index of the disk.
    pub disk: u64,
    /// Number of the partition on it; 0 for the whole disk.
    pub partition: u32,
    /// The kernel's name of the file system.
    pub kind: String,
    /// Nothing is to be written.
    pub read_only: bool,
    /// The kernel's options, with commas between them.
    pub options: String,
}

/// Owner, permissions, time and extended attributes of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WireAttributes {
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the contents, in seconds since 1970 UTC; `None`: now.
    pub mtime: Option<i64>,
    /// Extended attributes: full names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What is done with one mounted file system. Paths begin at its root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// What a path is. Answer: [`WireStat`].
    Stat {
        /// The target of a symbolic link rather than the link.
        follow: bool,
    },
    /// What a symbolic link holds. Answer: the bytes.
    ReadLink,
    /// Bytes of a regular file; fewer than asked for only at its end. Answer: the bytes.
    Read {
        /// From where.
        offset: u64,
        /// How many, at most [`PIECE`].
        len: u32,
    },
    /// Names in a directory. Answer: [`Listing`].
    List {
        /// So many names have been told already.
        skip: u64,
    },
    /// Opens a file for writing: what follows in [`Action::Append`] becomes its contents. Nothing is answered.
    Open {
        /// The file must not be there yet; otherwise it must be.
        create: bool,
    },
    /// More bytes for the file that is open.
    Append {
        /// At most [`PIECE`] of them.
        bytes: Vec<u8>,
    },
    /// The file that is open is complete.
    Close {
        /// What it gets besides its contents.
        attributes: Option<WireAttributes>,
    },
    /// A new directory.
    MakeDirectory {
        /// What it gets.
        attributes: WireAttributes,
    },
    /// A new symbolic link.
    Symlink {
        /// What it holds.
        target: Vec<u8>,
        /// Its owner and extended attributes.
        attributes: WireAttributes,
    },
    /// A name goes; a directory must be empty.
    Remove,
    /// An extended attribute of the path itself. Answer: [`Maybe`].
    GetXattr {
        /// Its full name.
        name: Vec<u8>,
    },
    /// The names of the extended attributes of the path itself. Answer: [`Names`].
    ListXattrs,
    /// Gives an extended attribute to the path itself.
    SetXattr {
        /// Its full name.
        name: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
    },
    /// How much room there is. Answer: [`Room`].
    Free,
    /// Everything that was written is to be on the disk.
    Sync,
    /// Runs a program of the guest, with its file system as root. Answer: [`Ran`].
    Run {
        /// The program and its arguments.
        words: Vec<Vec<u8>>,
        /// Names and values of the environment; there are no others.
        environment: Vec<(Vec<u8>, Vec<u8>)>,
        /// It is ended after so many seconds.
        limit_seconds: u64,
    },
}

/// A request of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Who is there? Answer: [`Hello`].
    Hello,
    /// Mounts a file system. Answer: its number, a [`Number`].
    Mount(MountRequest),
    /// Writes everything that belongs to it, and lets it go.
    Unmount {
        /// Number of the mounted file system.
        mount: u64,
    },
    /// Does something with a mounted file system.
    Act {
        /// Number of the mounted file system.
        mount: u64,
        /// A path from its root; empty where the action needs none.
        path: Vec<u8>,
        /// What is done.
        action: Action,
    },
    /// Lets everything go and switches the machine off.
    PowerOff,
}

/// What the init says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// The kernel's release.
    pub release: String,
    /// Indices and sizes in bytes of the disks.
    pub disks: Vec<(u64, u64)>,
    /// The file systems that the kernel knows.
    pub file_systems: Vec<String>,
    /// What did not work.
    pub notes: Vec<String>,
}

/// A number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number(pub u64);

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireStat {
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Last change of the contents, in seconds since 1970 UTC.
    pub mtime: i64,
    /// Names that it has.
    pub links: u64,
    /// Its inode number.
    pub inode: u64,
}

/// Some names of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Names, and types as in `st_mode`.
    pub entries: Vec<(Vec<u8>, u32)>,
    /// There are more.
    pub more: bool,
}

/// A value, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Maybe(pub Option<Vec<u8>>);

/// Some names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names(pub Vec<Vec<u8>>);

/// The room of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Free for the superuser, in bytes.
    pub free_bytes: u64,
    /// All of it, in bytes.
    pub total_bytes: u64,
    /// Free inodes; `None` where they are not counted.
    pub free_inodes: Option<u64>,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Its exit status; `None` if a signal ended it.
    pub code: Option<u32>,
    /// It took too long.
    pub timed_out: bool,
    /// What it printed, standard output and error together: the first bytes and the last ones.
    pub output: Vec<u8>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The kernel's error number; 0 if it was not the kernel.
    pub errno: u32,
    /// What was being done, and what is wrong.
    pub message: String,
}

macro_rules! message {
    ($name:ty, |$self:ident, $fields:ident| $write:block, |$source:ident| $read:expr) => {
        impl Message for $name {
            fn write(&$self, $fields: &mut Fields) $write

            fn read($source: &mut Source<'_>) -> Read<Self> {
                $read
            }
        }
    };
}

message!(Number, |self, fields| { fields.number(self.0) }, |source| Ok(Self(source.number()?)));

message!(
    Maybe,
    |self, fields| {
        fields.byte(u8::from(self.0.is_some()));
        if let Some(value) = &self.0 {
            fields.bytes(value);
        }
    },
    |source| Ok(Self(if source.flag()? { Some(source.bytes()?) } else { None }))
);

message!(Names, |self, fields| { fields.list(&self.0, |fields, name| fields.bytes(name)) }, |source| Ok(
    Self(source.list(Source::bytes)?)
));

message!(
    MountRequest,
    |self, fields| {
        fields.number(self.disk);
        fields.number(self.partition.into());
        fields.bytes(self.kind.as_bytes());
        fields.byte(self.read_only.into());
        fields.bytes(self.options.as_bytes());
    },
    |source| Ok(Self {
        disk: source.number()?,
        partition: source.short()?,
        kind: source.text()?,
        read_only: source.flag()?,
        options: source.text()?,
    })
);

message!(
    WireAttributes,
    |self, fields| {
        for value in [self.mode, self.uid, self.gid] {
            fields.number(value.into());
        }
        fields.byte(self.mtime.is_some().into());
        if let Some(mtime) = self.mtime {
            fields.0.extend(mtime.to_le_bytes());
        }
        fields.list(&self.xattrs, |fields, (name, value)| {
            fields.bytes(name);
            fields.bytes(value);
        });
    },
    |source| Ok(Self {
        mode: source.short()?,
        uid: source.short()?,
        gid: source.short()?,
        mtime: if source.flag()? { Some(source.signed()?) } else { None },
        xattrs: source.list(|source| Ok((source.bytes()?, source.bytes()?)))?,
    })
);

impl Message for Action {
    fn write(&self, fields: &mut Fields) {
        match self {
            Self::Stat { follow } => {
                fields.byte(1);
                fields.byte(u8::from(*follow));
            }
            Self::ReadLink => fields.byte(2),
            Self::Read { offset, len } => {
                fields.byte(3);
                fields.number(*offset);
                fields.number(u64::from(*len));
            }
            Self::List { skip } => {
                fields.byte(4);
                fields.number(*skip);
            }
            Self::Open { create } => {
                fields.byte(5);
                fields.byte(u8::from(*create));
            }
            Self::Append { bytes } => {
                fields.byte(6);
                fields.bytes(bytes);
            }
            Self::Close { attributes } => {
                fields.byte(7);
                fields.byte(u8::from(attributes.is_some()));
                if let Some(attributes) = attributes {
                    attributes.write(fields);
                }
            }
            Self::MakeDirectory { attributes } => {
                fields.byte(8);
                attributes.write(fields);
            }
            Self::Symlink { target, attributes } => {
                fields.byte(9);
                fields.bytes(target);
                attributes.write(fields);
            }
            Self::Remove => fields.byte(10),
            Self::GetXattr { name } => {
                fields.byte(11);
                fields.bytes(name);
            }
            Self::ListXattrs => fields.byte(12),
            Self::SetXattr { name, value } => {
                fields.byte(13);
                fields.bytes(name);
                fields.bytes(value);
            }
            Self::Free => fields.byte(14),
            Self::Sync => fields.byte(15),
            Self::Run { words, environment, limit_seconds } => {
                fields.byte(16);
                fields.list(words, |fields, word| fields.bytes(word));
                fields.list(environment, |fields, (name, value)| {
                    fields.bytes(name);
                    fields.bytes(value);
                });
                fields.number(*limit_seconds);
            }
        }
    }

    fn read(source: &mut Source<'_>) -> Read<Self> {
        Ok(match source.byte()? {
            1 => Self::Stat { follow: source.flag()? },
            2 => Self::ReadLink,
            3 => Self::Read { offset: source.number()?, len: source.short()? },
            4 => Self::List { skip: source.number()? },
            5 => Self::Open { create: source.flag()? },
            6 => Self::Append { bytes: source.bytes()? },
            7 => Self::Close {
                attributes: if source.flag()? { Some(WireAttributes::read(source)?) } else { None },
            },
            8 => Self::MakeDirectory { attributes: WireAttributes::read(source)? },
            9 => Self::Symlink { target: source.bytes()?, attributes: WireAttributes::read(source)? },
            10 => Self::Remove,
            11 => Self::GetXattr { name: source.bytes()? },
            12 => Self::ListXattrs,
            13 => Self::SetXattr { name: source.bytes()?, value: source.bytes()? },
            14 => Self::Free,
            15 => Self::Sync,
            16 => Self::Run {
                words: source.list(Source::bytes)?,
                environment: source.list(|source| Ok((source.bytes()?, source.bytes()?)))?,
                limit_seconds: source.number()?,
            },
            _ => return Err(Nonsense),
        })
    }
}

impl Message for Request {
    fn write(&self, fields: &mut Fields) {
        match self {
            Self::Hello => fields.byte(1),
            Self::Mount(request) => {
                fields.byte(2);
                request.write(fields);
            }
            Self::Unmount { mount } => {
                fields.byte(3);
                fields.number(*mount);
            }
            Self::Act { mount, path, action } => {
                fields.byte(4);
                fields.number(*mount);
                fields.bytes(path);
                action.write(fields);
            }
            Self::PowerOff => fields.byte(5),
        }
    }

    fn read(source: &mut Source<'_>) -> Read<Self> {
        Ok(match source.byte()? {
            1 => Self::Hello,
            2 => Self::Mount(MountRequest::read(source)?),
            3 => Self::Unmount { mount: source.number()? },
            4 => Self::Act { mount: source.number()?, path: source.bytes()?, action: Action::read(source)? },
            5 => Self::PowerOff,
            _ => return Err(Nonsense),
        })
    }
}

message!(
    Hello,
    |self, fields| {
        fields.number(self.version.into());
        fields.bytes(self.release.as_bytes());
        fields.list(&self.disks, |fields, (index, bytes)| {
            fields.number(*index);
            fields.number(*bytes);
        });
        for list in [&self.file_systems, &self.notes] {
            fields.list(list, |fields, text| fields.bytes(text.as_bytes()));
        }
    },
    |source| Ok(Self {
        version: source.short()?,
        release: source.text()?,
        disks: source.list(|source| Ok((source.number()?, source.number()?)))?,
        file_systems: source.list(Source::text)?,
        notes: source.list(Source::text)?,
    })
);

message!(
    WireStat,
    |self, fields| {
        for value in [self.mode, self.uid, self.gid] {
            fields.number(value.into());
        }
        fields.number(self.size);
        fields.0.extend(self.mtime.to_le_bytes());
        fields.number(self.links);
        fields.number(self.inode);
    },
    |source| Ok(Self {
        mode: source.short()?,
        uid: source.short()?,
        gid: source.short()?,
        size: source.number()?,
        mtime: source.signed()?,
        links: source.number()?,
        inode: source.number()?,
    })
);

message!(
    Listing,
    |self, fields| {
        fields.list(&self.entries, |fields, (name, mode)| {
            fields.bytes(name);
            fields.number((*mode).into());
        });
        fields.byte(self.more.into());
    },
    |source| Ok(Self {
        entries: source.list(|source| Ok((source.bytes()?, source.short()?)))?,
        more: source.flag()?,
    })
);

message!(
    Room,
    |self, fields| {
        fields.number(self.free_bytes);
        fields.number(self.total_bytes);
        fields.byte(self.free_inodes.is_some().into());
        fields.number(self.free_inodes.unwrap_or(0));
    },
    |source| {
        let (free_bytes, total_bytes, counted) = (source.number()?, source.number()?, source.flag()?);
        let inodes = source.number()?;
        Ok(Self { free_bytes, total_bytes, free_inodes: counted.then_some(inodes) })
    }
);

message!(
    Ran,
    |self, fields| {
        fields.byte(self.code.is_some().into());
        fields.number(self.code.unwrap_or(0).into());
        fields.byte(self.timed_out.into());
        fields.bytes(&self.output);
    },
    |source| {
        let (ended, code) = (source.flag()?, source.short()?);
        Ok(Self { code: ended.then_some(code), timed_out: source.flag()?, output: source.bytes()? })
    }
);

message!(
    Failure,
    |self, fields| {
        fields.number(self.errno.into());
        fields.bytes(self.message.as_bytes());
    },
    |source| Ok(Self { errno: source.short()?, message: source.text()? })
);

//! The headers of a tar file: ustar (POSIX.1-1988), GNU's long names and base-256 sizes, pax records (POSIX.1-2001).
//!
//! A walk along the headers, which says where the contents of each member lie. Nothing is kept but the member at
//! hand; every step goes forward by at least a block, and the number of steps has a limit.

use block::num::{align_up, to_usize};
use block::{Error, ErrorKind, Result, Storage};

/// Headers and contents begin at multiples of this.
const BLOCK: u64 = 512;
/// The most headers that are looked at.
const MOST_HEADERS: u64 = 200_000;
/// The longest name, in bytes, and the most bytes of pax records for one member.
const MOST_RECORDS: u64 = 1 << 20;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    File,
    /// A file with holes that are not stored.
    Sparse,
    /// A part of a file that began or goes on in another volume.
    Part,
    /// A folder, link, device or something that this code does not know.
    Other,
}

/// A member of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name: bytes, as tar keeps them.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Where its contents begin in the archive, in bytes.
    pub offset: u64,
    /// How many bytes of contents there are.
    pub len: u64,
}

impl Member {
    /// The name for people.
    pub fn shown_name(&self) -> String {
        String::from_utf8_lossy(plain(&self.name)).into_owned()
    }

    /// Whether this is its name, a leading `./` aside.
    pub fn is_called(&self, name: &str) -> bool {
        plain(&self.name) == plain(name.as_bytes())
    }

    /// Refuses what cannot be read as one run of bytes. `archive_len`: length of the archive, if it is known.
    pub(super) fn check_readable(&self, archive_len: Option<u64>) -> Result<()> {
        let name = self.shown_name();
        let refused = |why: &str| Err(Error::unsupported(format!("the member '{name}' {why}")));
        match self.kind {
            Kind::Sparse => refused("is stored as a sparse file").map_err(|error: Error| {
                error.hint("unpack it with tar, or pack the archive again without --sparse")
            }),
            Kind::Part => refused("goes on in another volume of the archive"),
            Kind::Other => refused("is not a file"),
            Kind::File => match archive_len {
                Some(len) if self.offset.checked_add(self.len).is_none_or(|end| end > len) => {
                    Err(Error::new(
                        ErrorKind::Truncated,
                        format!(
                            "the member '{name}' at {:#x} ({:#x} bytes) goes past the end of the archive (length {len:#x})",
                            self.offset, self.len
                        ),
                    ))
                }
                _ => Ok(()),
            },
        }
    }
}

fn plain(name: &[u8]) -> &[u8] {
    let mut name = name;
    while let Some(rest) = name.strip_prefix(b"./") {
        name = rest;
    }
    name
}

/// A walk along the headers of an archive.
#[derive(Debug)]
pub struct Tar<'a> {
    storage: &'a dyn Storage,
    /// Length of the archive; unknown for a compressed one, which ends with an empty block.
    len: Option<u64>,
    at: u64,
    headers: u64,
    /// Pax records that hold for all that follows.
    global: Records,
}

/// What pax records and GNU's extra headers say of the next member.
#[derive(Debug, Clone, Default)]
struct Records {
    name: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: bool,
}

impl<'a> Tar<'a> {
    /// A walk from the beginning of `storage`, whose length is `len` if it is known.
    pub fn new(storage: &'a dyn Storage, len: Option<u64>) -> Self {
        Self { storage, len, at: 0, headers: 0, global: Records::default() }
    }

    /// The next member. `None`: there are no more.
    ///
    /// # Errors
    /// `Invalid` or `Truncated`: these are not the headers of a tar file; the host's.
    #[expect(clippy::should_implement_trait, reason = "every step may fail, and the walk ends then")]
    pub fn next(&mut self) -> Result<Option<Member>> {
        let mut own = Records::default();
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let offset = self.at;
            let flag = header[156];
            match flag {
                b'L' => own.name = Some(until_nul(&self.records(&header)?).to_vec()),
                b'K' => drop(self.records(&header)?),
                b'x' | b'X' => parse_pax(&self.records(&header)?, &mut own)?,
                b'g' => {
                    let records = self.records(&header)?;
                    parse_pax(&records, &mut self.global)?;
                }
                _ => return self.member(&header, own, offset).map(Some),
            }
        }
    }

    /// The member that `header` describes; the walk goes on behind its contents.
    fn member(&mut self, header: &[u8; 512], own: Records, offset: u64) -> Result<Member> {
        let flag = header[156];
        let name = own.name.or_else(|| self.global.name.clone()).unwrap_or_else(|| name_of(header));
        let stored = number(&header[124..136]).ok_or_else(|| wrong("the size of a member", offset))?;
        let len = own.size.or(self.global.size).unwrap_or(stored);
        let is_folder = name.ends_with(b"/");
        let kind = match flag {
            _ if own.sparse || self.global.sparse => Kind::Sparse,
            b'S' => Kind::Sparse,
            b'M' => Kind::Part,
            b'0' | 0 | b'7' if !is_folder => Kind::File,
            _ => Kind::Other,
        };
        // Links, devices and folders have no contents, whatever their size field says.
        let len = if matches!(flag, b'1'..=b'6') || (flag == 0 && is_folder) { 0 } else { len };
        let offset = if flag == b'S' { self.behind_sparse_maps(header, offset)? } else { offset };
        self.skip(offset, len)?;
        Ok(Member { name, kind, offset, len })
    }

    /// GNU's old sparse files have more of their map in blocks behind the header.
    fn behind_sparse_maps(&mut self, header: &[u8; 512], offset: u64) -> Result<u64> {
        let (mut more, mut at) = (header[482] != 0, offset);
        while more {
            self.count()?;
            let mut map = [0; 512];
            self.storage.read_at(&mut map, at)?;
            more = map[504] != 0;
            at = at.checked_add(BLOCK).ok_or_else(|| wrong("a sparse map", offset))?;
        }
        Ok(at)
    }

    /// The header at hand, checked; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<[u8; 512]>> {
        self.count()?;
        let at = self.at;
        match self.len {
            // Archives without the empty blocks at the end exist.
            Some(len) if at >= len && at > 0 => return Ok(None),
            Some(len) if len - at.min(len) < BLOCK => {
                let message = format!("the archive ends in a header at {at:#x} (length {len:#x})");
                return Err(Error::new(ErrorKind::Truncated, message));
            }
            _ => {}
        }
        let mut header = [0; 512];
        self.storage.read_at(&mut header, at)?;
        if block::zero::is_zero(&header) {
            return Ok(None);
        }
        if !is_header(&header) {
            let what = if at == 0 { "the file is not a tar archive" } else { "the archive is damaged" };
            return Err(Error::invalid(format!("{what}: there is no header at {at:#x}")));
        }
        self.at = at.checked_add(BLOCK).ok_or_else(|| wrong("a header", at))?;
        Ok(Some(header))
    }

    fn count(&mut self) -> Result<()> {
        self.headers += 1;
        if self.headers > MOST_HEADERS {
            return Err(Error::unsupported(format!("the archive has more than {MOST_HEADERS} members")));
        }
        Ok(())
    }

    /// The contents of an extra header.
    fn records(&mut self, header: &[u8; 512]) -> Result<Vec<u8>> {
        let offset = self.at;
        let len = number(&header[124..136]).filter(|len| *len <= MOST_RECORDS);
        let len = len.ok_or_else(|| wrong("the size of an extra header", offset))?;
        if self.len.is_some_and(|end| offset.saturating_add(len) > end) {
            let message = format!("the archive ends in an extra header at {offset:#x}");
            return Err(Error::new(ErrorKind::Truncated, message));
        }
        let mut bytes = vec![0; to_usize(len)];
        self.storage.read_at(&mut bytes, offset)?;
        self.skip(offset, len)?;
        Ok(bytes)
    }

    /// Goes on behind `len` bytes of contents at `offset`.
    fn skip(&mut self, offset: u64, len: u64) -> Result<()> {
        let next = align_up(len, BLOCK).and_then(|len| offset.checked_add(len));
        // As far as an offset in a file can go.
        let next = next.filter(|next| i64::try_from(*next).is_ok());
        self.at = next.ok_or_else(|| wrong("the size of a member", offset))?;
        Ok(())
    }
}

/// Whether these bytes are a tar header: by its checksum, which takes the sum's own field for spaces. Some old
/// programs added signed bytes.
pub(super) fn is_header(bytes: &[u8]) -> bool {
    let Some(header) = bytes.get(..512) else { return false };
    let Some(stored) = number(&header[148..156]) else { return false };
    let byte = |(index, byte): (usize, &u8)| if (148..156).contains(&index) { b' ' } else { *byte };
    let unsigned: u64 = header.iter().enumerate().map(byte).map(u64::from).sum();
    let signed: i64 = header.iter().enumerate().map(byte).map(|byte| i64::from(byte.cast_signed())).sum();
    // A block of zeros has the sum of eight spaces only.
    header[0] != 0 && (stored == unsigned || i64::try_from(stored).is_ok_and(|stored| stored == signed))
}

/// A number of a header: octal digits between spaces and NULs, or (first bit set) a big-endian integer.
fn number(field: &[u8]) -> Option<u64> {
    let first = *field.first()?;
    if first == 0x80 {
        return field
            .get(1..)?
            .iter()
            .try_fold(0_u64, |value, byte| value.checked_mul(256).map(|value| value | u64::from(*byte)));
    }
    if first & 0x80 != 0 {
        return None;
    }
    let text = field.iter().copied().skip_while(|byte| *byte == b' ');
    let digits: Vec<u8> = text.take_while(|byte| !matches!(byte, b' ' | 0)).collect();
    digits.iter().try_fold(0_u64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// The name in a header: with ustar (not GNU's older form) a prefix may stand before it.
fn name_of(header: &[u8; 512]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    let prefix = until_nul(&header[345..500]);
    if &header[257..263] == b"ustar\0" && !prefix.is_empty() {
        [prefix, b"/", name].concat()
    } else {
        name.to_vec()
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Pax records: `LENGTH KEY=VALUE\n`, the length counting all of it.
fn parse_pax(records: &[u8], into: &mut Records) -> Result<()> {
    let mut rest = records;
    while !rest.is_empty() && rest[0] != 0 {
        let record = pax_record(rest).ok_or_else(|| Error::invalid("the archive has a broken pax header"))?;
        let (key, value, len) = record;
        match key {
            b"path" => into.name = Some(value.to_vec()),
            b"size" => {
                let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                into.size = Some(size.ok_or_else(|| Error::invalid("the archive has a broken pax size"))?);
            }
            b"GNU.sparse.name" => {
                into.name = Some(value.to_vec());
                into.sparse = true;
            }
            key if key.starts_with(b"GNU.sparse.") || key == b"SCHILY.realsize" => into.sparse = true,
            _ => {}
        }
        rest = rest.get(len..).unwrap_or_default();
    }
    Ok(())
}

fn pax_record(rest: &[u8]) -> Option<(&[u8], &[u8], usize)> {
    let space = rest.iter().take(12).position(|byte| *byte == b' ')?;
    let len: usize = std::str::from_utf8(rest.get(..space)?).ok()?.parse().ok()?;
    let body = rest.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    Some((body.get(..equals)?, body.get(equals + 1..)?, len))
}

fn wrong(what: &str, offset: u64) -> Error {
    Error::invalid(format!("the archive is damaged: {what} at {offset:#x} makes no sense"))
}

//! The text that describes a disk (specification, "The Descriptor File").
//!
//! A descriptor is kept as the lines that it was read as, with what they mean beside them: changing a value changes
//! its line and nothing else, so that comments, unknown keys, the order and the line ends of whoever wrote it stay.
//!
//! The text is bytes. Names of files are UTF-8 wherever they can be read as that, as every Linux host (ESXi, too)
//! writes them whatever `encoding` says; else they are taken for windows-1252, which is what products on Windows
//! write and what the text then says.

mod line;

use block::{Error, Result};

pub use line::{Access, ExtentLine, Kind};

use line::{decode_text, key_value};

/// The `parentCID` of a disk that has no parent.
pub const NO_PARENT: u32 = 0xffff_ffff;
/// The longest descriptor in bytes, as in qemu.
pub const MAX_LEN: u64 = (1 << 20) - 1;
/// The most extents that a disk may have: 16 TiB in extents of 2 GiB, and eight times what any product makes.
pub const MAX_EXTENTS: usize = 8192;

/// A parsed descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Without their line feeds; carriage returns are part of them.
    lines: Vec<Vec<u8>>,
    cid: u32,
    parent_cid: u32,
    create_type: String,
    parent_hint: Option<String>,
    extents: Vec<ExtentLine>,
}

impl Descriptor {
    /// Whether these first bytes of a file are those of a descriptor: its first line that says something says
    /// `version=1`, `2` or `3`.
    pub fn probe(first: &[u8]) -> bool {
        let mut lines = first.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let said = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
        let Some((b"version", value)) = said.and_then(key_value) else { return false };
        matches!(value, b"1" | b"2" | b"3")
    }

    /// Reads a descriptor. The text ends with the first zero byte.
    ///
    /// # Errors
    /// What is missing or cannot be understood, and where.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let lines: Vec<Vec<u8>> = text.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        let mut parsed = Self {
            lines,
            cid: 0,
            parent_cid: NO_PARENT,
            create_type: String::new(),
            parent_hint: None,
            extents: vec![],
        };
        parsed.check_version()?;
        parsed.cid = parsed.content_id("CID")?.ok_or_else(|| missing("CID"))?;
        parsed.parent_cid = parsed.content_id("parentCID")?.unwrap_or(NO_PARENT);
        parsed.create_type = parsed.get("createType").ok_or_else(|| missing("createType"))?;
        parsed.parent_hint = parsed.get("parentFileNameHint").filter(|name| !name.is_empty());
        parsed.extents = parsed.read_extents()?;
        Ok(parsed)
    }

    fn check_version(&self) -> Result<()> {
        match self.get("version").as_deref() {
            Some("1" | "2" | "3") => Ok(()),
            Some(other) => Err(Error::unsupported(format!("descriptor version {other} is not supported"))),
            None => Err(missing("version")),
        }
    }

    fn content_id(&self, key: &str) -> Result<Option<u32>> {
        let Some(text) = self.get(key) else { return Ok(None) };
        let id = u32::from_str_radix(&text, 16);
        id.map(Some).map_err(|_| invalid(format!("'{key}={text}' is not a hexadecimal number of 32 bits")))
    }

    fn read_extents(&self) -> Result<Vec<ExtentLine>> {
        let mut extents = vec![];
        for (line, number) in self.lines.iter().zip(1..) {
            let at_line = |error: Error| error.context(format!("line {number} of the descriptor"));
            let Some(extent) = ExtentLine::parse(line).map_err(at_line)? else { continue };
            if extents.len() == MAX_EXTENTS {
                let text = format!("the disk has more than {MAX_EXTENTS} extents");
                return Err(Error::unsupported(text));
            }
            extents.push(extent);
        }
        check_sum(&extents)?;
        check_overlaps(&extents)?;
        Ok(extents)
    }

    /// The text, as it was read but for what has been set.
    pub fn encode(&self) -> Vec<u8> {
        self.lines.join(&b'\n')
    }

    /// The value of a key, without its quotes. Of a key that is there more than once, the first.
    pub fn get(&self, key: &str) -> Option<String> {
        self.values().find(|(name, _)| name.eq_ignore_ascii_case(key.as_bytes())).map(|(_, v)| decode_text(v))
    }

    fn values(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.lines.iter().filter_map(|line| key_value(line))
    }

    /// Every key that begins with `ddb.`, in order, with its value.
    pub fn database(&self) -> impl Iterator<Item = (String, String)> {
        let entries = self.values().filter(|(key, _)| key.to_ascii_lowercase().starts_with(b"ddb."));
        entries.map(|(key, value)| (decode_text(key), decode_text(value)))
    }

    /// Changes when the disk's contents change.
    pub fn cid(&self) -> u32 {
        self.cid
    }

    /// The parent's [`cid`](Self::cid) when this disk was made, or [`NO_PARENT`].
    pub fn parent_cid(&self) -> u32 {
        self.parent_cid
    }

    /// What kind of disk it is, such as `monolithicSparse`.
    pub fn create_type(&self) -> &str {
        &self.create_type
    }

    /// The parent's name, from this disk's folder. Only meaningful with a [`parent_cid`](Self::parent_cid).
    pub fn parent_hint(&self) -> Option<&str> {
        self.parent_hint.as_deref()
    }

    /// Whether the disk has a parent.
    pub fn has_parent(&self) -> bool {
        self.parent_cid != NO_PARENT
    }

    /// The disk's parts, in order, all of them.
    pub fn extents(&self) -> &[ExtentLine] {
        &self.extents
    }

    /// How many digits the content ID has. qemu-img writes seven or fewer if the first ones are zeros.
    fn cid_digits(&self) -> usize {
        self.get("CID").map_or(8, |text| text.len()).clamp(6, 8)
    }

    /// The bits of content IDs that can be written in place of the present one, so that the rest of the text stays
    /// where it is: replacing it is one write of a few bytes.
    pub(crate) fn cid_mask(&self) -> u32 {
        if self.cid_digits() == 8 { u32::MAX } else { (1 << (4 * self.cid_digits())) - 1 }
    }

    /// Changes the content ID.
    pub fn set_cid(&mut self, cid: u32) {
        self.cid = cid;
        let digits = self.cid_digits();
        self.set("CID", &format!("{cid:0digits$x}"));
    }

    /// Changes what is recorded of the parent's contents.
    pub fn set_parent_cid(&mut self, cid: u32) {
        self.parent_cid = cid;
        self.set("parentCID", &format!("{cid:08x}"));
    }

    /// Changes the parent.
    pub fn set_parent(&mut self, hint: Option<&str>, cid: u32) {
        self.set_parent_cid(cid);
        self.parent_hint = hint.map(str::to_owned);
        match hint {
            Some(hint) => self.set("parentFileNameHint", &format!("\"{hint}\"")),
            None => self.lines.retain(|line| !is_key(line, "parentFileNameHint")),
        }
    }

    /// Gives a key that is there already (or, if it is not, a new one after `createType`) a value, which is written
    /// as given.
    fn set(&mut self, key: &str, value: &str) {
        if let Some(line) = self.lines.iter_mut().find(|line| is_key(line, key)) {
            line::replace_value(line, value);
            return;
        }
        let after = self.lines.iter().position(|line| is_key(line, "createType"));
        let end = if self.lines.iter().any(|line| line.ends_with(b"\r")) { "\r" } else { "" };
        let at = after.map_or(self.lines.len(), |index| index + 1);
        self.lines.insert(at, format!("{key}={value}{end}").into_bytes());
    }
}

fn is_key(line: &[u8], key: &str) -> bool {
    key_value(line).is_some_and(|(name, _)| name.eq_ignore_ascii_case(key.as_bytes()))
}

fn invalid(what: String) -> Error {
    Error::invalid("invalid VMDK image descriptor").hint(what)
}

fn missing(key: &str) -> Error {
    invalid(format!("it has no '{key}'"))
}

/// The disk must not be larger than any disk can be.
fn check_sum(extents: &[ExtentLine]) -> Result<()> {
    let sum = extents.iter().try_fold(0_u64, |sum, extent| sum.checked_add(extent.sectors));
    match sum.and_then(|sectors| sectors.checked_mul(crate::SECTOR)) {
        Some(bytes) if i64::try_from(bytes).is_ok() => Ok(()),
        _ => Err(Error::invalid("the extents together are larger than a disk can be")),
    }
}

/// The same bytes of a file must not be two parts of the disk: a write to one would change the other.
fn check_overlaps(extents: &[ExtentLine]) -> Result<()> {
    let mut ranges: Vec<_> = extents.iter().filter_map(ExtentLine::file_range).collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let [(name, _, end), (next, start, _)] = pair else { continue };
        if name == next && start < end {
            let text = format!("two extents of the disk overlap in the file '{name}'");
            return Err(Error::invalid(text));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

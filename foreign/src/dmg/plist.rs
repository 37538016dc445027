//! As much of a property list as it takes to find the tables: the `<data>` of `blkx`.
//!
//! Not an XML parser. It goes from tag to tag once, remembers the last `<key>`, and takes every `<data>` in the array
//! that belongs to the key `blkx`; what is inside `<data>` is base64, which has no entities.

use block::{Error, Result};

/// The most tables: one for each partition.
const MOST_TABLES: usize = 4096;

/// The tables of chunks in a property list.
///
/// # Errors
/// `Invalid`: base64 that is none, or too many tables.
pub(super) fn tables(list: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut found = vec![];
    let mut key: &[u8] = b"";
    // Depth of arrays, counted from the one of blkx.
    let mut depth = 0_usize;
    for (tag, text) in Tags(list) {
        match tag {
            b"key" => key = text,
            b"array" if depth > 0 || key == b"blkx" => depth += 1,
            b"/array" => depth = depth.saturating_sub(1),
            b"data" if depth > 0 => found.push(base64(text)?),
            _ => {}
        }
        if found.len() > MOST_TABLES {
            return Err(Error::invalid(format!(
                "the disk image has more than {MOST_TABLES} tables of chunks"
            )));
        }
    }
    found.retain(|table| table.starts_with(b"mish"));
    Ok(found)
}

/// Tags, each with the text up to the next one.
struct Tags<'a>(&'a [u8]);

impl<'a> Iterator for Tags<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let open = self.0.iter().position(|byte| *byte == b'<')?;
        let rest = self.0.get(open + 1..)?;
        if let Some(comment) = rest.strip_prefix(b"!--") {
            let end = comment.windows(3).position(|bytes| bytes == b"-->").map_or(comment.len(), |at| at + 3);
            self.0 = comment.get(end..)?;
            return Some((b"!--", b""));
        }
        let close = rest.iter().position(|byte| *byte == b'>')?;
        let tag = rest.get(..close)?.split(u8::is_ascii_whitespace).next().unwrap_or_default();
        let rest = rest.get(close + 1..)?;
        let text = rest.get(..rest.iter().position(|byte| *byte == b'<').unwrap_or(rest.len()))?;
        self.0 = rest.get(text.len()..)?;
        Some((tag, text))
    }
}

/// Decodes base64, white space anywhere.
fn base64(text: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0_u32, 0_u32);
    for byte in text.iter().filter(|byte| !byte.is_ascii_whitespace()) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => break,
            _ => return Err(Error::invalid("the disk image's property list has broken base64")),
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff).unwrap_or(0));
            bits &= (1 << held) - 1;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_data_of_blkx_counts() {
        let list =
            b"<?xml version='1.0'?><!-- <key>blkx</key> --><plist><dict><key>resource-fork</key><dict>\n\
            <key>cSum</key><array><dict><key>Data</key><data>bWlzaA==</data></dict></array>\n\
            <key>blkx</key><array><dict><key>Attributes</key><string>0x0050</string><key>Data</key><data>\n\
            bWlz\n  aDEy\n</data></dict><dict><key>Data</key><data>bm9uZQ==</data></dict></array>\n\
            <key>plst</key><array><dict><data>bWlzaA==</data></dict></array></dict></dict></plist>";
        assert_eq!(tables(list).unwrap(), [b"mish12"]);
    }

    #[test]
    fn broken_lists_end() {
        for list in [&b""[..], b"<", b"<!--", b"<key>blkx</key><array><data>", b"<key>blkx", b"<<<<>>>"] {
            let _ = tables(list);
        }
        tables(b"<key>blkx</key><array><data>b!</data>").unwrap_err();
    }
}

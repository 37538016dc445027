//! Descriptions as text: how long they may be, and which characters they are written in.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use block::{Error, Result, ResultExt as _};
use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE, WINDOWS_1252};

/// The longest description, in bytes. Real ones have some KiB; a registry of many disks has some hundred.
pub(crate) const MOST_BYTES: u64 = 16 << 20;

/// Reads a description.
///
/// # Errors
/// The host's; it is not a plain file, or too long.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let shown = || format!("could not read '{}'", path.display());
    // A pipe or device would keep us waiting.
    if !std::fs::metadata(path).context(shown)?.is_file() {
        return Err(Error::usage(format!("'{}' is not a file", path.display())));
    }
    let mut bytes = vec![];
    File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes)).context(shown)?;
    check_len(bytes.len() as u64)?;
    Ok(bytes)
}

/// Refuses what is too long for a description.
///
/// # Errors
/// `Invalid`.
pub(crate) fn check_len(len: u64) -> Result<()> {
    if len > MOST_BYTES {
        return Err(Error::invalid(format!("the description is longer than {MOST_BYTES:#x} bytes")));
    }
    Ok(())
}

/// The text of bytes whose character set is called `label`; without one, UTF-8 if it is that, else Windows-1252.
///
/// # Errors
/// `Unsupported`: nobody knows that character set, and there are other characters than ASCII; `Invalid`: the bytes are not
/// what they are said to be.
pub(crate) fn decode(bytes: &[u8], label: Option<&str>) -> Result<String> {
    if let Some((encoding, skipped)) = Encoding::for_bom(bytes) {
        return decode_as(encoding, bytes.get(skipped..).unwrap_or_default());
    }
    if bytes.is_ascii() {
        return Ok(String::from_utf8_lossy(bytes).into_owned());
    }
    let Some(label) = label else {
        return match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => decode_as(WINDOWS_1252, bytes),
        };
    };
    match Encoding::for_label(label.trim().as_bytes()) {
        Some(encoding) => decode_as(encoding, bytes),
        None => Err(Error::unsupported(format!("the description is written in the character set '{label}'"))
            .hint("save it as UTF-8")),
    }
}

fn decode_as(encoding: &'static Encoding, bytes: &[u8]) -> Result<String> {
    match encoding.decode_without_bom_handling_and_without_replacement(bytes) {
        Some(text) => Ok(text.into_owned()),
        None => Err(Error::invalid(format!("the description is not valid {}", encoding.name()))),
    }
}

/// The text of an XML document, by its byte order mark, its first bytes, or its declaration (XML 1.0, appendix F).
///
/// # Errors
/// As [`decode`].
pub(crate) fn decode_xml(bytes: &[u8]) -> Result<String> {
    if Encoding::for_bom(bytes).is_some() {
        return decode(bytes, None);
    }
    match bytes {
        [b'<', 0, ..] => decode_as(UTF_16LE, bytes),
        [0, b'<', ..] => decode_as(UTF_16BE, bytes),
        _ => decode(bytes, Some(declared(bytes).unwrap_or_else(|| UTF_8.name().to_owned()).as_str())),
    }
}

/// The character set that the XML declaration names. UTF-16 cannot be true here: the declaration would not be readable.
fn declared(bytes: &[u8]) -> Option<String> {
    let head = bytes.get(..bytes.len().min(200))?;
    let head = String::from_utf8_lossy(head);
    let declaration = head.trim_start().strip_prefix("<?xml")?;
    let declaration = declaration.get(..declaration.find("?>")?)?;
    let value = declaration.split_once("encoding")?.1.trim_start().strip_prefix('=')?.trim_start();
    let quote = value.chars().next().filter(|quote| matches!(quote, '"' | '\''))?;
    let label = value.get(1..)?.split(quote).next()?;
    (!label.to_ascii_lowercase().starts_with("utf-16")).then(|| label.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn character_sets() {
        assert_eq!(decode("Büro".as_bytes(), None).unwrap(), "Büro");
        assert_eq!(decode(b"B\xfcro", None).unwrap(), "Büro");
        assert_eq!(decode(b"B\xfcro", Some("windows-1252")).unwrap(), "Büro");
        assert_eq!(decode(b"B\xfcro", Some("ISO-8859-1")).unwrap(), "Büro");
        assert_eq!(decode(b"\x93\xfa\x96\x7b", Some("Shift_JIS")).unwrap(), "日本");
        assert_eq!(decode(b"\xc4\xe3", Some("GBK")).unwrap(), "你");
        assert_eq!(decode(b"plain", Some("klingon")).unwrap(), "plain");
        let error = decode(b"B\xfcro", Some("klingon")).unwrap_err();
        assert!(error.to_string().contains("'klingon'"), "{error}");
        decode(b"B\xfcro", Some("UTF-8")).unwrap_err();
        assert_eq!(decode(b"\xef\xbb\xbfx", None).unwrap(), "x");
    }

    #[test]
    fn xml_says_how_it_is_written() {
        let latin = b"<?xml version=\"1.0\" encoding='ISO-8859-1'?><a>\xfc</a>";
        assert!(decode_xml(latin).unwrap().ends_with("<a>ü</a>"));
        let wide: Vec<u8> = "<a>ü</a>".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(decode_xml(&wide).unwrap(), "<a>ü</a>");
        let marked: Vec<u8> = [0xff, 0xfe].into_iter().chain(wide).collect();
        assert_eq!(decode_xml(&marked).unwrap(), "<a>ü</a>");
        decode_xml(b"<a>\xfc</a>").unwrap_err();
    }

    #[test]
    fn what_is_too_long_is_refused() {
        check_len(MOST_BYTES).unwrap();
        check_len(MOST_BYTES + 1).unwrap_err();
        read_file(Path::new("/dev/zero")).unwrap_err();
    }
}

//! By which names a differencing disk knows its parent.
//!
//! The header holds up to eight locators, each for a platform, and one more name without a path. The names come from
//! other machines, so they are turned into what can be looked for here: relative paths with `/`, best first; of an
//! absolute Windows path only the last component, beside the image.

use block::{Result, Storage};

use crate::header::{DynamicHeader, Locator, utf16};

/// The longest name that is looked for.
const MAX_NAME: usize = 4096;

/// The names of the parent, best first, without duplicates.
pub(crate) fn names(storage: &dyn Storage, header: &DynamicHeader, file_len: u64) -> Result<Vec<String>> {
    let mut found: Vec<(u8, String)> = vec![];
    for locator in &header.locators {
        if let Some(name) = locator_name(storage, locator, file_len)? {
            found.extend(local(&locator.platform, &name));
        }
    }
    found.extend(last_component(&header.parent_name).map(|name| (3, name)));
    found.sort_by_key(|(rank, _)| *rank);
    let mut names: Vec<String> = vec![];
    for (_, name) in found {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// The text of a locator; `None` if it is not used or not in the file.
fn locator_name(storage: &dyn Storage, locator: &Locator, file_len: u64) -> Result<Option<String>> {
    let Some((offset, len)) = locator.range() else { return Ok(None) };
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Ok(None);
    }
    let mut bytes = vec![0; block::num::to_usize(len)];
    storage.read_at(&mut bytes, offset)?;
    Ok(match &locator.platform {
        b"W2ru" | b"W2ku" => Some(utf16(&bytes, u16::from_le_bytes)),
        b"MacX" | b"Wi2r" | b"Wi2k" => {
            let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            Some(String::from_utf8_lossy(text).into_owned())
        }
        // "Mac ": an alias, which only a Macintosh understands.
        _ => None,
    })
}

/// What a name means here, with its rank (less is better).
fn local(platform: &[u8; 4], name: &str) -> Option<(u8, String)> {
    match platform {
        b"W2ru" | b"Wi2r" => relative(&name.replace('\\', "/")).map(|name| (0, name)),
        b"MacX" => url_path(name).map(|name| (1, name)),
        _ => last_component(name).map(|name| (2, name)),
    }
}

/// A relative path, without the `./` in front of it. (`..` is for the opener to judge.)
fn relative(path: &str) -> Option<String> {
    let drive = path.as_bytes().get(1) == Some(&b':');
    if path.starts_with('/') || drive {
        return last_component(path);
    }
    let path = path.trim_start_matches("./");
    is_name(path).then(|| path.to_owned())
}

/// The path of a `file:` address; percent signs are decoded.
fn url_path(url: &str) -> Option<String> {
    let path = url.strip_prefix("file://").unwrap_or(url);
    let path = path.strip_prefix("localhost").unwrap_or(path);
    let decoded = percent_decoded(path);
    if decoded.starts_with('/') {
        return is_name(&decoded).then_some(decoded);
    }
    relative(&decoded)
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = vec![];
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|_| byte == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(decoded) => {
                bytes.push(decoded);
                rest = &after[2..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The file's own name of a path of any platform.
fn last_component(path: &str) -> Option<String> {
    let name = path.rsplit(['/', '\\', ':']).next().unwrap_or_default();
    (is_name(name) && name != "." && name != "..").then(|| name.to_owned())
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && !name.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;

    #[test]
    fn names_of_all_platforms_become_names_here_best_first() {
        let mut file = vec![0; 8192];
        let mut header = DynamicHeader::new(1536, 1, 2 << 20);
        header.parent_name = "base.vhd".to_owned();
        let wide = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let stored = [
            (b"W2ku", wide("C:\\vm\\base.vhd")),
            (b"MacX", b"file://./sub/the%20base.vhd".to_vec()),
            (b"W2ru", wide(".\\sub\\base.vhd")),
            (b"Mac ", vec![1, 2, 3]),
        ];
        for (index, (platform, bytes)) in stored.into_iter().enumerate() {
            let offset = 4096 + index * 512;
            file[offset..offset + bytes.len()].copy_from_slice(&bytes);
            let len = u32::try_from(bytes.len()).unwrap();
            header.locators[index] = Locator { platform: *platform, space: 1, len, offset: offset as u64 };
        }
        let file_len = file.len() as u64;
        let storage = MemStorage::from_bytes(file);
        let expected = ["sub/base.vhd", "sub/the base.vhd", "base.vhd"];
        assert_eq!(names(&storage, &header, file_len).unwrap(), expected);
    }

    #[test]
    fn locators_outside_the_file_and_odd_names_are_passed_over() {
        let storage = MemStorage::from_bytes(vec![0; 4096]);
        let mut header = DynamicHeader::new(1536, 1, 2 << 20);
        header.locators[0] = Locator { platform: *b"W2ru", space: 1, len: 20, offset: 1 << 40 };
        header.locators[1] = Locator { platform: *b"W2ru", space: 1, len: u32::MAX, offset: 0 };
        header.locators[2] = Locator { platform: *b"W2ru", space: 1, len: 20, offset: u64::MAX - 3 };
        header.parent_name = "..".to_owned();
        assert_eq!(names(&storage, &header, 4096).unwrap(), Vec::<String>::new());
        assert_eq!(local(b"W2ru", "..\\base.vhd"), Some((0, "../base.vhd".to_owned())));
        assert_eq!(local(b"W2ku", "\\\\server\\share\\b.vhd"), Some((2, "b.vhd".to_owned())));
        assert_eq!(local(b"MacX", "file://localhost/a/b%zz.vhd"), Some((1, "/a/b%zz.vhd".to_owned())));
    }
}

//! Text that is edited where it stands.
//!
//! Configuration files are bytes in an encoding that nobody names. What is UTF-8 is taken as that; anything else byte by
//! byte as ISO 8859-1, so that every byte that no edit touches comes out as it went in.

/// A file's contents as text, and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Utf8,
    Bytes,
}

pub(crate) fn decode(bytes: &[u8]) -> (String, Encoding) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (text.to_owned(), Encoding::Utf8),
        Err(_) => (bytes.iter().map(|byte| char::from(*byte)).collect(), Encoding::Bytes),
    }
}

pub(crate) fn encode(text: &str, encoding: Encoding) -> Vec<u8> {
    match encoding {
        Encoding::Utf8 => text.as_bytes().to_vec(),
        // What edits add is ASCII.
        Encoding::Bytes => text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect(),
    }
}

/// Applies `edit` to every line without its end; what it gives back replaces the line.
pub(crate) fn each_line(text: &str, mut edit: impl FnMut(usize, &str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let (body, end) = split_end(line);
        match edit(index, body) {
            Some(new) => out.push_str(&new),
            None => out.push_str(body),
        }
        out.push_str(end);
    }
    out
}

fn split_end(line: &str) -> (&str, &str) {
    let body = line.strip_suffix('\n').unwrap_or(line);
    let body = body.strip_suffix('\r').unwrap_or(body);
    line.split_at(body.len())
}

/// Appends lines, with an end for a last line that lacks one.
pub(crate) fn append_lines(text: &str, lines: &[String]) -> String {
    let mut out = text.to_owned();
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    for line in lines {
        out.push_str(line);
        out.push('\n');
    }
    out
}

/// The first word of a line and what follows it, white space in front left aside.
pub(crate) fn first_word(line: &str) -> (&str, &str) {
    let line = line.trim_start();
    let end = line.find(char::is_whitespace).unwrap_or(line.len());
    line.split_at(end)
}

/// Characters that a device's name goes on with.
fn goes_on(c: char, is_path: bool) -> bool {
    c.is_ascii_alphanumeric()
        || matches!(c, '/' | '_' | '-' | '.' | '+' | '!' | '@' | '\\')
        || is_path && c == ':'
}

/// Replaces names of devices (`/dev/...`) in a text by what `new` says.
pub(crate) fn map_devices(text: &str, mut new: impl FnMut(&str) -> Option<String>) -> String {
    const START: &str = "/dev/";
    let (mut out, mut rest, mut before) = (String::with_capacity(text.len()), text, None::<char>);
    while let Some(at) = rest.find(START) {
        out.push_str(&rest[..at]);
        before = rest[..at].chars().next_back().or(before);
        let name = &rest[at..];
        let is_path = name.starts_with("/dev/disk/by-path/");
        let end = name.find(|c| !goes_on(c, is_path)).unwrap_or(name.len());
        let name = name[..end].trim_end_matches('.');
        // `/foo/dev/sda` is a file.
        let is_whole = before.is_none_or(|c| !goes_on(c, false));
        match is_whole.then(|| new(name)).flatten() {
            Some(new) => out.push_str(&new),
            None => out.push_str(name),
        }
        before = name.chars().next_back();
        rest = &rest[at + name.len()..];
    }
    out.push_str(rest);
    out
}

/// The lines that go and come between two texts, for people: what they begin and end with in common is left out.
pub(crate) fn diff(old: &str, new: &str) -> Vec<String> {
    const MOST: usize = 400;
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let mut out = vec![];
    if old.len() == new.len() {
        for (old, new) in old.iter().zip(&new).filter(|(old, new)| old != new) {
            out.push(format!("-{old}"));
            out.push(format!("+{new}"));
        }
    } else {
        walk(&old, &new, &mut out);
    }
    if out.len() > MOST {
        let more = out.len() - MOST;
        out.truncate(MOST);
        out.push(format!(" ({more} more lines)"));
    }
    out
}

/// Lines come and go in few places: the nearest line that both have is where they meet again.
fn walk(old: &[&str], new: &[&str], out: &mut Vec<String>) {
    const AHEAD: usize = 200;
    let (mut i, mut j) = (0, 0);
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            i += 1;
            j += 1;
            continue;
        }
        let meets = |distance: usize| {
            (0..=distance).find(|skip| {
                let (a, b) = (old.get(i + skip), new.get(j + distance - skip));
                a.is_some() && a == b
            })
        };
        let found = (1..AHEAD).find_map(|distance| meets(distance).map(|skip| (skip, distance - skip)));
        let (gone, come) = found.unwrap_or((old.len() - i, new.len() - j));
        out.extend(old[i..i + gone].iter().map(|line| format!("-{line}")));
        out.extend(new[j..j + come].iter().map(|line| format!("+{line}")));
        i += gone;
        j += come;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_not_utf8_come_out_as_they_went_in() {
        let bytes: Vec<u8> = (0..=255).collect();
        let (text, encoding) = decode(&bytes);
        assert_eq!(encoding, Encoding::Bytes);
        assert_eq!(encode(&text, encoding), bytes);
    }

    #[test]
    fn devices_in_a_text() {
        let swap = |name: &str| (name == "/dev/sda1").then(|| "UUID=x".to_owned());
        for (old, new) in [
            ("root=/dev/sda1 ro", "root=UUID=x ro"),
            ("/dev/sda1", "UUID=x"),
            ("\"/dev/sda1\"", "\"UUID=x\""),
            ("cryptdevice=/dev/sda1:root", "cryptdevice=UUID=x:root"),
            ("/dev/sda11 /dev/sda1", "/dev/sda11 UUID=x"),
            ("/srv/dev/sda1", "/srv/dev/sda1"),
            ("see /dev/sda1.", "see UUID=x."),
        ] {
            assert_eq!(map_devices(old, swap), new);
        }
        let mut seen = vec![];
        map_devices("a=/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:0:0-part1,b", |name| {
            seen.push(name.to_owned());
            None
        });
        assert_eq!(seen, ["/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:0:0-part1"]);
    }

    #[test]
    fn line_ends_stay() {
        let text = "a\r\nb\nc";
        assert_eq!(each_line(text, |_, line| Some(line.to_uppercase())), "A\r\nB\nC");
        assert_eq!(append_lines("a", &["b".to_owned()]), "a\nb\n");
    }

    #[test]
    fn differences_for_people() {
        assert_eq!(diff("a\nb\nc\n", "a\nx\nc\n"), ["-b", "+x"]);
        assert_eq!(diff("a\nb\nc\n", "a\nc\n"), ["-b"]);
        assert_eq!(diff("a\nc\n", "a\nb\nc\nd\n"), ["+b", "+d"]);
        assert_eq!(diff("", "a\n"), ["+a"]);
    }
}

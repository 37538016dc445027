//! The pieces that formats of configuration files share.

use crate::inspect::release::unquote;

/// The most lines of a file.
const MOST_LINES: usize = 1 << 14;

/// The lines of a file without comments and empty lines.
pub(super) fn lines(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().take(MOST_LINES).map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
}

/// `KEY=value` as a shell has it.
pub(super) fn assignments(text: &str) -> impl Iterator<Item = (&str, String)> {
    lines(text).filter_map(|line| {
        let (key, value) = line.split_once('=')?;
        Some((key.trim(), unquote(value.trim())))
    })
}

/// `key=value` below `[section]`: the section, the key, the value.
pub(super) fn sections(text: &str) -> impl Iterator<Item = (String, &str, &str)> {
    let mut section = String::new();
    lines(text).filter_map(move |line| {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.trim().to_ascii_lowercase();
            return None;
        }
        let (key, value) = line.split_once('=')?;
        Some((section.clone(), key.trim(), value.trim()))
    })
}

//! netplan's YAML, as far as names of interfaces go: nested keys by indentation, and values on their lines.

use super::{Found, mac};

/// The most lines of a file, and the deepest nesting.
const MOST_LINES: usize = 1 << 14;
const MOST_DEPTH: usize = 32;

/// The interfaces of `network: ethernets:`. One that is matched by its address and renamed counts by its new name.
pub(super) fn parse(_: &str, text: &str) -> Vec<Found> {
    let mut found: Vec<Found> = vec![];
    // The keys that the present line lies under, with their indentation.
    let mut path: Vec<(usize, String)> = vec![];
    for line in text.lines().take(MOST_LINES) {
        let line = line.split(" #").next().unwrap_or_default().trim_end();
        let content = line.trim_start();
        if content.is_empty() || content.starts_with('#') || content.starts_with("---") {
            continue;
        }
        let indent = line.len() - content.len();
        let is_item = content == "-" || content.starts_with("- ");
        // Items of a list may stand as far left as its key.
        while path.last().is_some_and(|(own, _)| *own > indent || *own == indent && !is_item) {
            path.pop();
        }
        if is_item {
            visit(&mut found, &path, "", content.trim_start_matches(['-', ' ']));
            continue;
        }
        let Some((key, value)) = content.split_once(':') else { continue };
        let key = key.trim().trim_matches(['"', '\'']);
        visit(&mut found, &path, key, value.trim());
        if path.len() < MOST_DEPTH {
            path.push((indent, key.to_owned()));
        }
    }
    found
}

/// Takes what a line says. `key` is empty for an item of a list.
fn visit(found: &mut Vec<Found>, path: &[(usize, String)], key: &str, value: &str) {
    let keys: Vec<&str> = path.iter().map(|(_, key)| key.as_str()).collect();
    let ["network", "ethernets", rest @ ..] = keys.as_slice() else { return };
    if rest.is_empty() {
        found.push(Found { name: key.to_owned(), ..Found::default() });
        return;
    }
    // `match: {macaddress: ..}`
    if let ([_], "match", Some(flow)) = (rest, key, value.strip_prefix('{')) {
        let mut path = path.to_vec();
        path.push((usize::MAX, key.to_owned()));
        for part in flow.trim_end_matches('}').split(',') {
            let (key, value) = part.split_once(':').unwrap_or((part, ""));
            visit(found, &path, key.trim().trim_matches(['"', '\'']), value.trim());
        }
        return;
    }
    let Some(last) = found.last_mut() else { return };
    let value = value.trim_matches(['"', '\'']);
    match (rest, key) {
        ([_, "match"], "macaddress") => last.mac = mac(value),
        ([_, "match"], "name") if !value.is_empty() => value.clone_into(&mut last.name),
        ([_], "set-name") if !value.is_empty() => value.clone_into(&mut last.name),
        ([_], "addresses") => last.is_static |= !value.trim_matches(['[', ']', ' ']).is_empty(),
        ([_, "addresses"], _) => last.is_static = true,
        _ => {}
    }
}

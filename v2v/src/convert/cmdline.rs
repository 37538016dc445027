//! Kernel command lines.

use super::names::{Names, Reader, Verdict};
use super::text::map_devices;

/// What is done to command lines.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cmdlines<'a> {
    pub(crate) names: &'a Names,
    /// Consoles of Xen become a screen and a serial port.
    pub(crate) from_xen: bool,
    /// A serial console is added where there is none.
    pub(crate) add_serial: bool,
}

impl Cmdlines<'_> {
    /// A command line for KVM. Names that mean nothing on these disks go to `unknown`.
    pub(crate) fn edit(&self, line: &str, reader: Reader, unknown: &mut Vec<String>) -> String {
        let line = self.devices(line, reader, unknown);
        let line = if self.from_xen { without_xen_console(&line) } else { line };
        if self.add_serial && line.split_whitespace().any(|word| word.starts_with("root=")) {
            with_serial(&line)
        } else {
            line
        }
    }

    /// The same for words that are added to a command line: no console comes to them that is not there.
    pub(crate) fn edit_part(&self, line: &str, reader: Reader, unknown: &mut Vec<String>) -> String {
        Self { add_serial: false, ..*self }.edit(line, reader, unknown)
    }

    /// Names of devices alone.
    pub(crate) fn devices(&self, line: &str, reader: Reader, unknown: &mut Vec<String>) -> String {
        map_devices(line, |name| match self.names.judge(name, reader) {
            Verdict::Stays => None,
            Verdict::Becomes(new) => Some(new),
            Verdict::Unknown => {
                unknown.push(name.to_owned());
                None
            }
        })
    }
}

/// Words with the white space in front of each.
fn words(line: &str) -> Vec<(&str, &str)> {
    let (mut out, mut rest) = (vec![], line);
    while !rest.is_empty() {
        let start = rest.find(|c: char| !c.is_whitespace()).unwrap_or(rest.len());
        let len = rest[start..].find(char::is_whitespace).unwrap_or(rest.len() - start);
        out.push((&rest[..start], &rest[start..start + len]));
        rest = &rest[start + len..];
    }
    out
}

fn is_xen_console(word: &str) -> bool {
    let name = word.strip_prefix("console=").map(|value| value.split(',').next().unwrap_or(value));
    name.is_some_and(|name| name.starts_with("hvc") || name.starts_with("xvc"))
}

/// `console=hvc0` becomes the screen and the first serial port, as far as those are not there yet; a second one goes.
fn without_xen_console(line: &str) -> String {
    let words = words(line);
    if !words.iter().any(|(_, word)| is_xen_console(word)) {
        return line.to_owned();
    }
    let has = |name: &str| words.iter().any(|(_, word)| word.split(',').next() == Some(name));
    let mut wanted = vec![];
    wanted.extend((!has("console=tty0")).then_some("console=tty0"));
    wanted.extend((!has("console=ttyS0")).then_some("console=ttyS0"));
    let mut replacement = Some(wanted.join(" "));
    let mut out = String::with_capacity(line.len() + 16);
    let mut dropped_first = false;
    for (space, word) in words {
        let new = if is_xen_console(word) { replacement.take().unwrap_or_default() } else { word.to_owned() };
        if new.is_empty() && !word.is_empty() {
            dropped_first |= out.trim().is_empty();
            if out.is_empty() {
                out.push_str(space);
            }
            continue;
        }
        // What stood first took no space in front of it along.
        if !(dropped_first && out.trim().is_empty()) {
            out.push_str(space);
        }
        out.push_str(&new);
    }
    out
}

fn with_serial(line: &str) -> String {
    let has = |start: &str| line.split_whitespace().any(|word| word.starts_with(start));
    if has("console=ttyS") {
        return line.to_owned();
    }
    let body = line.trim_end();
    let screen = if has("console=tty0") { "" } else { " console=tty0" };
    format!("{body}{screen} console=ttyS0{}", &line[body.len()..])
}

/// Applies `edit` to the value of an assignment as shells read it: `NAME="value"`, `NAME='value'`, `NAME=value`.
pub(crate) fn edit_value(line: &str, edit: impl FnOnce(&str) -> String) -> Option<String> {
    let (name, value) = line.split_once('=')?;
    let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
    let Some(quote) = quote else { return Some(format!("{name}={}", edit(value))) };
    let inner = &value[1..];
    let end = inner.rfind(quote)?;
    Some(format!("{name}={quote}{}{}", edit(&inner[..end]), &inner[end..]))
}

/// The name in front of `=` in an assignment, `export` and `set` left aside; `None` for comments and anything else.
pub(crate) fn assigned(line: &str) -> Option<&str> {
    let (name, _) = line.trim_start().split_once('=')?;
    let name = name.strip_prefix("export ").or_else(|| name.strip_prefix("set ")).unwrap_or(name).trim();
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    is_name.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::super::names::tests::{ROOT, SWAP, names};
    use super::*;
    use crate::plan::TargetBus;

    #[test]
    fn roots_and_consoles() {
        let names = names(["xvda", "xvdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: true, add_serial: false };
        let edit = |line: &str| lines.edit(line, Reader::Tags, &mut vec![]);
        assert_eq!(edit("root=/dev/xvda1  ro quiet"), format!("root=UUID={ROOT}  ro quiet"));
        assert_eq!(edit("ro console=hvc0 quiet"), "ro console=tty0 console=ttyS0 quiet");
        assert_eq!(edit("console=hvc0 console=ttyS0,115200n8 a"), "console=tty0 console=ttyS0,115200n8 a");
        assert_eq!(edit("console=tty0 console=hvc0 console=ttyS0"), "console=tty0 console=ttyS0");
        assert_eq!(edit("console=xvc0 console=tty0 console=ttyS0 b"), "console=tty0 console=ttyS0 b");
        assert_eq!(edit("root=/dev/xvda1 resume=/dev/xvda2"), format!("root=UUID={ROOT} resume=UUID={SWAP}"));
        for same in ["", " ", "root=UUID=x ro", "root=/dev/mapper/vg-root rd.lvm.lv=vg/root", "console=tty0"]
        {
            assert_eq!(edit(same), same);
        }
        assert_eq!(lines.edit("root=/dev/xvda1", Reader::Kernel, &mut vec![]), "root=PARTUUID=76696d67-01");
        let mut unknown = vec![];
        lines.edit("root=/dev/xvdz9", Reader::Tags, &mut unknown);
        assert_eq!(unknown, ["/dev/xvdz9"]);
    }

    #[test]
    fn a_serial_console_where_it_is_wanted() {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let lines = Cmdlines { names: &names, from_xen: false, add_serial: true };
        let edit = |line: &str| lines.edit(line, Reader::Tags, &mut vec![]);
        assert_eq!(edit("root=UUID=x ro\r"), "root=UUID=x ro console=tty0 console=ttyS0\r");
        assert_eq!(edit("root=UUID=x console=tty0"), "root=UUID=x console=tty0 console=ttyS0");
        assert_eq!(edit("root=UUID=x console=ttyS1,9600"), "root=UUID=x console=ttyS1,9600");
        assert_eq!(edit("quiet"), "quiet");
    }

    #[test]
    fn values_of_assignments() {
        let edit = |line: &str| edit_value(line, |value| value.to_uppercase());
        assert_eq!(edit("A=\"b c\" # d").unwrap(), "A=\"B C\" # d");
        assert_eq!(edit("A='b'").unwrap(), "A='B'");
        assert_eq!(edit("A=b").unwrap(), "A=B");
        assert_eq!(edit("A=\"b"), None);
        assert_eq!(assigned("  set kernelopts=\"x\""), Some("kernelopts"));
        assert_eq!(assigned("#A=b"), None);
        assert_eq!(assigned("export GRUB_DEVICE=/dev/sda1"), Some("GRUB_DEVICE"));
    }
}

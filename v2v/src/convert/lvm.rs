//! Filters of LVM (lvm.conf(5)) that name the disks of the source.

use super::names::{Names, Reader, Verdict};
use super::text::{each_line, map_devices};

/// Patterns of LVM's filters that accept a name of the source: they accept that of KVM.
pub(crate) fn conf(text: &str, names: &Names) -> String {
    let mut within = false;
    each_line(text, |_, line| {
        let body = line.trim_start();
        if body.starts_with('#') {
            return None;
        }
        let starts = ["filter", "global_filter"]
            .iter()
            .any(|name| body.strip_prefix(name).is_some_and(|rest| rest.trim_start().starts_with('=')));
        within |= starts;
        if !within {
            return None;
        }
        within = !closes(line);
        Some(patterns(line, names))
    })
}

/// Whether the list ends here: `]` outside of the quotes, since patterns have it too.
fn closes(line: &str) -> bool {
    line.split('"').step_by(2).any(|outside| outside.contains(']'))
}

fn patterns(line: &str, names: &Names) -> String {
    let quoted: Vec<&str> = line.split('"').collect();
    let all = format!("a|^/dev/{}|", names.prefix());
    let mut has_all = quoted.contains(&all.as_str());
    let edited = quoted.iter().enumerate().map(|(index, part)| {
        if index % 2 == 0 || !part.starts_with('a') {
            return (*part).to_owned();
        }
        let mapped = map_devices(part, |name| plain(names, name));
        let mapped = bare(&families(&mapped, names.prefix()), names);
        // What such a link will be called is not known. It accepted disks, so those of KVM are accepted.
        let is_link = ["disk/by-id/", "disk/by-path/"].iter().any(|link| mapped.contains(link));
        let is_stable = ["by-id/dm-", "by-id/lvm-", "by-id/virtio-"].iter().any(|link| mapped.contains(link));
        if is_link && !is_stable && !has_all {
            has_all = true;
            return format!("{mapped}\", \"{all}");
        }
        mapped
    });
    edited.collect::<Vec<_>>().join("\"")
}

fn plain(names: &Names, name: &str) -> Option<String> {
    match names.judge(name, Reader::Plain) {
        Verdict::Becomes(new) => Some(new),
        Verdict::Stays | Verdict::Unknown => None,
    }
}

/// `/dev/sd`, followed by no letter of a disk, stands for all disks.
fn families(pattern: &str, prefix: &str) -> String {
    let mut out = pattern.to_owned();
    for family in ["sd", "hd", "xvd"].iter().filter(|family| **family != prefix) {
        let old = format!("/dev/{family}");
        let is_all = out.find(&old).is_some_and(|at| {
            out[at + old.len()..].chars().next().is_none_or(|next| !next.is_ascii_alphanumeric())
        });
        if is_all {
            out = out.replace(&old, &format!("/dev/{prefix}"));
        }
    }
    out
}

/// Names without `/dev/` in front (`a/sda[0-9]*$/`): a pattern may fit anywhere in a name.
fn bare(pattern: &str, names: &Names) -> String {
    // The first letter says that it accepts, and is no part of a name.
    let (mut out, mut rest) = ("a".to_owned(), &pattern[1..]);
    while let Some(first) = rest.chars().next() {
        let family = ["sd", "hd", "xvd"].into_iter().find(|family| rest.starts_with(family));
        let is_start = out.len() == 1 || !out.ends_with(|c: char| c.is_ascii_alphanumeric());
        let family = family.filter(|family| is_start && *family != names.prefix() && !out.ends_with("/dev/"));
        let Some(family) = family else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        let len = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        let word = &rest[..len];
        let new = match len == family.len() {
            true => Some(names.prefix().to_owned()),
            false => plain(names, &format!("/dev/{word}")).map(|new| new.replacen("/dev/", "", 1)),
        };
        out.push_str(new.as_deref().unwrap_or(word));
        rest = &rest[len..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::names::tests::names;
    use super::*;
    use crate::plan::TargetBus;

    fn edit(text: &str) -> String {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let new = conf(text, &names);
        assert_eq!(conf(&new, &names), new, "edited twice");
        new
    }

    #[test]
    fn filters() {
        let text = "devices {\n\t# filter = [ \"a|/dev/sda|\" ]\n\tfilter = [ \"a|^/dev/sda3$|\", \"a|/dev/sd.*|\",\n\t\"r|/dev/sdb|\" ]\n\tdir = \"/dev/sda\"\n}\n";
        let expected = text.replace("/dev/sda3", "/dev/vda3").replace("/dev/sd.", "/dev/vd.");
        assert_eq!(edit(text), expected);
    }

    #[test]
    fn names_without_their_folder() {
        let text = "filter = [ \"a/sda[0-9]*$/\", \"a/sdb/\", \"a|sd.*|\", \"a|loop|\", \"r/.*/\" ]\n";
        let expected = "filter = [ \"a/vda[0-9]*$/\", \"a/vdb/\", \"a|vd.*|\", \"a|loop|\", \"r/.*/\" ]\n";
        assert_eq!(edit(text), expected);
        // A bracket of a pattern does not end the list.
        let text = "filter = [ \"a|/dev/sd[ab]|\",\n  \"a|^/dev/sda2$|\", \"r|.*|\" ]\n";
        assert_eq!(edit(text), text.replace("/dev/sd", "/dev/vd"));
        let same = "filter = [ \"a|/dev/mapper/mpath.*|\", \"a|^/dev/sdz1$|\", \"a|lsda|\" ]\n";
        assert_eq!(edit(same), same);
    }

    #[test]
    fn links_by_hardware() {
        let text = "filter = [\"a|^/dev/disk/by-id/scsi-.*|\", \"a|by-path|\", \"r|.*|\"]\n";
        let expected = text.replace("scsi-.*|\",", "scsi-.*|\", \"a|^/dev/vd|\",");
        assert_eq!(edit(text), expected);
    }
}

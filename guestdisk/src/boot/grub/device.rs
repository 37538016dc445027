//! The names that GRUB has for volumes (GRUB manual, "How to specify devices"): `hd0,gpt2`, `lvm/group-name`,
//! `md/0`, `mduuid/` and 32 digits.

use super::super::files::{Files, VolumeFacts};
use crate::disks::Location;
use crate::lvm;

/// The name of a volume.
pub(super) fn name(facts: &VolumeFacts) -> String {
    match &facts.location {
        Location::Whole { disk } => format!("hd{disk}"),
        Location::Partition { disk, number } => format!("hd{disk},{number}"),
        Location::Logical { group, name } => format!("lvm/{}", lvm::mapper_name(group, name)),
        Location::Array { name, partition } => {
            let array =
                facts.array.as_ref().map_or_else(|| name.clone(), |array| format!("mduuid/{}", array.uuid));
            partition.map_or_else(|| array.clone(), |number| format!("{array},{number}"))
        }
        Location::Decrypted { .. } => format!("cryptouuid/{}", facts.outer_uuid),
    }
}

/// The volume of a name. Disks are numbered as the guest has them, which a BIOS may see otherwise: scripts search.
pub(super) fn volume(files: &Files, name: &str) -> Option<usize> {
    let by = |same: &dyn Fn(&VolumeFacts) -> bool| files.volumes.iter().position(same);
    if let Some(mapper) = name.strip_prefix("lvm/") {
        return by(&|facts| match &facts.location {
            Location::Logical { group, name } => lvm::mapper_name(group, name) == mapper,
            _ => false,
        });
    }
    if let Some(ids) = name.strip_prefix("lvmid/") {
        let (group, volume) = ids.split_once('/')?;
        let (group, volume) = (group.replace('-', ""), volume.replace('-', ""));
        return by(&|facts| {
            facts.lvm_ids.as_ref().is_some_and(|own| *own == (group.clone(), volume.clone()))
        });
    }
    if name.starts_with("md") {
        return by(&|facts| is_array(facts, name));
    }
    if let Some(uuid) = name.strip_prefix("cryptouuid/") {
        let uuid = uuid.replace('-', "");
        return by(&|facts| !uuid.is_empty() && facts.outer_uuid.eq_ignore_ascii_case(&uuid));
    }
    let (disk, partition) = name.strip_prefix("hd")?.split_once(',').unwrap_or((&name[2..], ""));
    let disk: usize = disk.parse().ok()?;
    let digits = partition.trim_start_matches(|character: char| !character.is_ascii_digit());
    let location = match partition {
        "" => Location::Whole { disk },
        _ => Location::Partition { disk, number: digits.parse().ok()? },
    };
    by(&|facts| facts.location == location)
}

/// Whether a volume is the array, or the partition of one, of a name.
fn is_array(facts: &VolumeFacts, name: &str) -> bool {
    let (Location::Array { partition, .. }, Some(array)) = (&facts.location, &facts.array) else {
        return false;
    };
    let (name, number) = name.split_once(',').unwrap_or((name, ""));
    let number = number.trim_start_matches(|character: char| !character.is_ascii_digit());
    let is_it = match name.strip_prefix("mduuid/") {
        Some(uuid) => uuid.eq_ignore_ascii_case(&array.uuid),
        None => {
            let own = name.strip_prefix("md/").or_else(|| name.strip_prefix("md")).unwrap_or_default();
            !own.is_empty() && array.names.iter().any(|name| name == own)
        }
    };
    is_it && *partition == number.parse().ok()
}

/// What `search` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Uuid,
    Label,
    File,
}

/// The first volume that has it, those of `hints` before others.
pub(super) fn search(files: &Files, wanted: Wanted, value: &str, hints: &[String]) -> Option<usize> {
    let has = |index: usize| {
        let facts = &files.volumes[index];
        match wanted {
            Wanted::Uuid => !value.is_empty() && facts.uuid.eq_ignore_ascii_case(value),
            Wanted::Label => facts.readable && facts.label == value,
            Wanted::File => facts.readable && files.exists(index, value),
        }
    };
    let hinted = hints.iter().filter_map(|hint| volume(files, hint.trim_end_matches(',')));
    hinted.chain(0..files.volumes.len()).find(|index| has(*index))
}

#[cfg(test)]
mod tests {
    use super::super::super::files::ArrayFacts;
    use super::*;

    #[test]
    fn names_of_arrays() {
        let facts = |partition| VolumeFacts {
            location: Location::Array { name: "md/root".into(), partition },
            uuid: String::new(),
            label: String::new(),
            partuuid: String::new(),
            lvm_ids: None,
            array: Some(ArrayFacts {
                uuid: "0f5e7b0a6a554f6c8f0e3f1c4d6b9b00".into(),
                names: ["127", "host:root", "root"].map(str::to_owned),
            }),
            outer_uuid: String::new(),
            is_esp: false,
            readable: true,
        };
        let (whole, part) = (facts(None), facts(Some(2)));
        for name in ["mduuid/0F5E7b0a6a554f6c8f0e3f1c4d6b9b00", "md/root", "md/host:root", "md127", "md/127"]
        {
            assert!(is_array(&whole, name) && !is_array(&part, name), "{name}");
            let of_part = format!("{name},gpt2");
            assert!(!is_array(&whole, &of_part) && is_array(&part, &of_part), "{name}");
        }
        for name in ["mduuid/", "md/", "md", "md0", "mduuid/0f5e", "md/roo"] {
            assert!(!is_array(&whole, name), "{name}");
        }
        assert_eq!(name(&part), "mduuid/0f5e7b0a6a554f6c8f0e3f1c4d6b9b00,2");
        assert!(is_array(&part, &name(&part)));
    }
}

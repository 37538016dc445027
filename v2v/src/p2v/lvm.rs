//! What LVM's own program says of its volumes (`lvs(8)`, `vgs(8)`), and the words that it takes to change something.
//!
//! The program is the machine's: it knows its configuration, locks and metadata formats. It is run by whoever implements
//! [`Lvm`]; tests bring one of their own.

use block::{Error, Result};

/// The beginning of the names of our snapshots.
pub const PREFIX: &str = "vimg_p2v_";
/// The tag that they have.
pub const TAG: &str = "vimg-p2v";

/// Runs `lvm` with some words.
pub trait Lvm {
    /// What it has printed.
    ///
    /// # Errors
    /// It cannot be run, or has failed, with what it said.
    fn run(&self, words: &[&str]) -> Result<String>;
}

/// A logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The name of its group.
    pub group: String,
    /// Its name.
    pub name: String,
    /// Its UUID, without hyphens.
    pub uuid: String,
    /// Its attributes, a letter each; the first says what it is.
    pub attributes: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its tags.
    pub tags: Vec<String>,
}

/// A volume group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Bytes that no volume has.
    pub free_bytes: u64,
    /// Bytes per extent.
    pub extent_bytes: u64,
}

/// How every list is asked for.
const PLAIN: [&str; 6] = ["--noheadings", "--nosuffix", "--units", "b", "--separator", "|"];

fn list(lvm: &dyn Lvm, verb: &str, fields: &str) -> Result<Vec<Vec<String>>> {
    let words: Vec<&str> = [verb].into_iter().chain(PLAIN).chain(["-o", fields]).collect();
    let said = lvm.run(&words)?;
    let count = fields.split(',').count();
    let lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let split = |line: &str| {
        let parts: Vec<String> = line.split('|').map(|part| part.trim().to_owned()).collect();
        let wrong = || Error::invalid(format!("lvm {verb} says '{line}', which is not understood"));
        (parts.len() == count).then_some(parts).ok_or_else(wrong)
    };
    lines.map(split).collect()
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::invalid(format!("lvm says '{text}' where a number of bytes should be")))
}

/// All logical volumes that are shown.
///
/// # Errors
/// As [`Lvm::run`]; `Invalid`: what it says is not understood.
pub fn volumes(lvm: &dyn Lvm) -> Result<Vec<Volume>> {
    let volume = |line: Vec<String>| {
        let [group, name, uuid, attributes, size, tags] = line.try_into().unwrap_or_default();
        Ok(Volume {
            group,
            name,
            uuid: uuid.replace('-', ""),
            attributes,
            size_bytes: number(&size)?,
            tags: tags.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned).collect(),
        })
    };
    list(lvm, "lvs", "vg_name,lv_name,lv_uuid,lv_attr,lv_size,lv_tags")?.into_iter().map(volume).collect()
}

/// All volume groups.
///
/// # Errors
/// As [`volumes`].
pub fn groups(lvm: &dyn Lvm) -> Result<Vec<Group>> {
    let group = |line: Vec<String>| {
        let [name, free, extent] = line.try_into().unwrap_or_default();
        Ok(Group { name, free_bytes: number(&free)?, extent_bytes: number(&extent)?.max(512) })
    };
    list(lvm, "vgs", "vg_name,vg_free,vg_extent_size")?.into_iter().map(group).collect()
}

/// How full a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Percent of its room.
    Percent(u8),
    /// More was written than it has room for: it is worth nothing any more.
    Overflowed,
}

/// How full a snapshot is. Letters `I` and `S` as the fifth attribute mean that it is lost (`lvs(8)`).
///
/// # Errors
/// As [`volumes`]; `NotFound`: there is no such snapshot.
pub fn fill(lvm: &dyn Lvm, group: &str, name: &str) -> Result<Fill> {
    let lines = list_one(lvm, group, name)?;
    let Some([attributes, percent]) = lines.first().map(Vec::as_slice) else {
        let message = format!("there is no snapshot {group}/{name}");
        return Err(Error::new(block::ErrorKind::NotFound, message));
    };
    if attributes.chars().nth(4).is_some_and(|state| matches!(state, 'I' | 'S')) {
        return Ok(Fill::Overflowed);
    }
    let whole = percent.split(['.', ',']).next().unwrap_or_default();
    let percent: u8 =
        whole.parse().map_err(|_| Error::invalid(format!("lvm says that a snapshot is '{percent}' full")))?;
    Ok(Fill::Percent(percent))
}

fn list_one(lvm: &dyn Lvm, group: &str, name: &str) -> Result<Vec<Vec<String>>> {
    let place = format!("{group}/{name}");
    let words: Vec<&str> =
        ["lvs"].into_iter().chain(PLAIN).chain(["-o", "lv_attr,snap_percent", &place]).collect();
    let said = lvm.run(&words)?;
    let lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.map(|line| line.split('|').map(|part| part.trim().to_owned()).collect()).collect())
}

/// Takes a snapshot of a volume.
///
/// # Errors
/// As [`Lvm::run`].
pub fn take(lvm: &dyn Lvm, group: &str, origin: &str, name: &str, size_bytes: u64) -> Result<()> {
    let (size, origin) = (format!("{size_bytes}b"), format!("{group}/{origin}"));
    // Without a backup of the metadata: before long it is as it was.
    let words = [
        "lvcreate",
        "--snapshot",
        "--yes",
        "--autobackup",
        "n",
        "--permission",
        "r",
        "--addtag",
        TAG,
        "--name",
        name,
        "--size",
        &size,
        &origin,
    ];
    lvm.run(&words).map(drop)
}

/// Removes a snapshot.
///
/// # Errors
/// As [`Lvm::run`].
pub fn remove(lvm: &dyn Lvm, place: &str) -> Result<()> {
    lvm.run(&["lvremove", "--force", "--autobackup", "n", place]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Says(&'static str);

    impl Lvm for Says {
        fn run(&self, _: &[&str]) -> Result<String> {
            Ok(self.0.to_owned())
        }
    }

    #[test]
    fn lists_are_understood() {
        let said = "  vg|root|3WFn-tK|owi-aos---|167772160|\n  vg|vimg_p2v_root|x-y|swi-a-s---|4194304|a,vimg-p2v\n\n";
        let found = volumes(&Says(said)).unwrap();
        assert_eq!((found[0].uuid.as_str(), found[0].size_bytes), ("3WFntK", 167_772_160));
        assert_eq!(found[1].tags, ["a", "vimg-p2v"]);
        volumes(&Says("vg|root")).unwrap_err();
        volumes(&Says("vg|root|a|b|many|")).unwrap_err();
        let found = groups(&Says("vg|142606336|4194304")).unwrap();
        assert_eq!((found[0].free_bytes, found[0].extent_bytes), (142_606_336, 4_194_304));
    }

    #[test]
    fn a_snapshot_that_is_lost_is_seen() {
        let fill = |said| fill(&Says(said), "vg", "s");
        assert_eq!(fill(" swi-a-s---|0.03").unwrap(), Fill::Percent(0));
        assert_eq!(fill(" swi-a-s---|99,9").unwrap(), Fill::Percent(99));
        assert_eq!(fill(" swi-I-s---|100.00").unwrap(), Fill::Overflowed);
        assert_eq!(fill(" Swi-S-s---|").unwrap(), Fill::Overflowed);
        assert_eq!(fill(" swi-a-s---|100.00").unwrap(), Fill::Percent(100), "full to the brim, and whole");
        fill("").unwrap_err();
        fill("swi-a-s---|?").unwrap_err();
    }
}

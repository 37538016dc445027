//! Linux software RAID (md): superblocks of its members, and arrays made of them.
//!
//! ```text
//!   disk 1 partition 1   | superblock: array X, I am 0 of 2, events 17 | data ...          |
//!   disk 2 partition 1   | superblock: array X, I am 1 of 2, events 17 | data ...          |   -> /dev/md0
//!   disk 3 partition 1   | superblock: array X, I am 1 of 2, events 12 | old data          |      a stale member
//! ```
//!
//! What the member with the highest event counter says counts; those that fall behind it by more than one are out of
//! date, as md sees it. Levels linear, 0, 1, 4, 5, 6 and 10 are read, with as many members missing as the level allows, and
//! written where all copies and sums stay right: not while parity is being rebuilt or not known to be right. What is in
//! the middle of a reshape, has a journal, or is described by features that are not known here, is refused by name.

mod claim;
mod device;
mod layout;
mod mark;
mod names;
mod parity;
mod superblock;

use std::ops::Range;
use std::sync::Arc;

use block::slice::Slice;
use block::{BlockDevice, Error, ErrorKind, Result};
use parking_lot::Mutex;

use device::{ArrayDevice, Leg};
use layout::Layout;
use mark::Counters;
use superblock::{MOST_DISKS, Role, Superblock, feature};

use crate::bytes::corrupt;
use crate::disks::Location;
use crate::unused::Place;

pub use superblock::Version;
pub(crate) use superblock::probe;

/// An array.
#[derive(Debug)]
pub struct Array {
    /// Its UUID as `mdadm` and `mdadm.conf` write it: four groups of eight digits, colons between them.
    pub uuid: String,
    /// The name in its superblock, `host:name` as a rule; empty in version 0.90.
    pub full_name: String,
    /// What it is called in [`Location::Array`]: `md0`, or `md/root` if its name is no number.
    pub name: String,
    /// The number that the kernel gives it, as far as that can be known: `0` for `/dev/md0`.
    pub number: u32,
    /// The version of its superblocks.
    pub version: Version,
    /// Its level: `linear`, `raid0`, `raid1`, `raid4`, `raid5`, `raid6`, `raid10`, or the number of another one.
    pub level: String,
    /// Its size in bytes; 0 if it cannot be read.
    pub size: u64,
    /// How many devices it is made of, when none is missing.
    pub disks: u32,
    /// All devices that say they belong to it.
    pub members: Vec<Member>,
    /// The numbers of devices that are not there, or hold nothing of use.
    pub missing: Vec<u32>,
    /// Its members are not known to hold the same everywhere: it was not shut down cleanly.
    pub dirty: bool,
    /// Why it can be read and not written.
    pub locked: Option<String>,
    /// What its superblock calls a member in sync is not here.
    lost: bool,
    device: Result<Arc<ArrayDevice>>,
}

/// A device that belongs to an array.
#[derive(Debug, Clone)]
pub struct Member {
    /// Where it lies.
    pub location: Location,
    /// Which of the array's devices it is; `None` for a spare.
    pub slot: Option<u32>,
    /// What it is good for.
    pub state: MemberState,
    /// Where the data of the array begin on it, in bytes.
    pub data_offset: u64,
    device: Arc<dyn BlockDevice>,
}

/// What a member is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemberState {
    /// It holds its part of the array.
    InSync,
    /// It is being brought up to date.
    Rebuilding,
    /// It stands by.
    Spare,
    /// It has been declared faulty.
    Faulty,
    /// Its event counter has fallen behind: what it holds is old.
    Stale,
    /// It holds a journal.
    Journal,
    /// It contradicts the others.
    Unusable,
}

impl MemberState {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InSync => "in-sync",
            Self::Rebuilding => "rebuilding",
            Self::Spare => "spare",
            Self::Faulty => "faulty",
            Self::Stale => "stale",
            Self::Journal => "journal",
            Self::Unusable => "unusable",
        }
    }
}

impl Array {
    /// Its bytes.
    ///
    /// # Errors
    /// `NotFound` if too many members are missing; `Unsupported` if it is of a level or has features that are not known here;
    /// `Corrupt` if its superblocks make no sense.
    pub fn device(&self) -> Result<Arc<dyn BlockDevice>> {
        match &self.device {
            Ok(device) => Ok(Arc::clone(device) as Arc<dyn BlockDevice>),
            Err(error) => {
                let copy = Error::new(error.kind(), error.to_string());
                Err(error.hints().iter().fold(copy, |copy, hint| copy.hint(hint.clone())))
            }
        }
    }

    /// Whether a device of `/dev/` is this array: `md0`, `md/0`, `md/root`, `md/host:root`.
    pub fn answers_to(&self, device: &str) -> bool {
        names::answers(self, device)
    }

    /// Whether it goes by this UUID, in the spelling of `mdadm`, with or without its colons.
    pub fn has_uuid(&self, uuid: &str) -> bool {
        let digits = |text: &str| text.replace([':', '-'], "").to_ascii_lowercase();
        digits(uuid) == digits(&self.uuid)
    }

    /// Whether what follows `md-` in `/dev/disk/by-id/` is this array: `uuid-UUID`, `name-NAME`.
    pub fn has_id(&self, id: &str) -> bool {
        match (id.strip_prefix("uuid-"), id.strip_prefix("name-")) {
            (Some(uuid), _) => self.has_uuid(uuid),
            (_, Some(name)) => !name.is_empty() && name == self.full_name,
            _ => false,
        }
    }

    /// Where a range of it lies, if every member that is in sync holds all of it (RAID 1) and none is being rebuilt; otherwise
    /// nothing.
    pub(crate) fn places(&self, range: &Range<u64>) -> Vec<Place> {
        let in_use = || self.members.iter().filter(|member| member.state != MemberState::Spare);
        let plain = self.level == "raid1"
            && range.end <= self.size
            && in_use().all(|member| member.state == MemberState::InSync);
        let place = |member: &Member| {
            (Arc::clone(&member.device), member.data_offset + range.start..member.data_offset + range.end)
        };
        if plain { in_use().map(place).collect() } else { vec![] }
    }

    /// Whether the superblock knows the member with this number as a good one, and nobody is it.
    fn is_lost(&self, main: &Superblock, slot: u32) -> bool {
        let is_here = |member: &Member| member.slot == Some(slot) && member.state == MemberState::Rebuilding;
        (0..MOST_DISKS).any(|number| main.role(number) == Role::Active(slot))
            && !self.members.iter().any(is_here)
    }

    /// What people should know of it, in sentences.
    fn problems(&self) -> Vec<String> {
        let (mut problems, name) = (vec![], format!("array /dev/{}", self.name));
        for member in &self.members {
            let what = match member.state {
                MemberState::InSync | MemberState::Spare | MemberState::Journal => continue,
                MemberState::Rebuilding => "was being rebuilt",
                MemberState::Faulty => "was declared faulty, and is left out",
                MemberState::Stale => "is out of date (its event counter is behind), and is left out",
                MemberState::Unusable => "contradicts the other members, and is left out",
            };
            problems.push(format!("{name}: {} {what}", member.location));
        }
        match &self.device {
            Err(error) => problems.push(format!("{name} ({}) is not read: {error}", self.level)),
            Ok(_) if !self.missing.is_empty() => {
                let numbers: Vec<_> = self.missing.iter().map(u32::to_string).collect();
                let (count, all) = (numbers.len(), self.disks);
                problems.push(format!(
                    "{name}: {count} of {all} members missing (number {})",
                    numbers.join(", ")
                ));
            }
            Ok(_) => {}
        }
        problems
    }
}

/// What [`scan`] found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) arrays: Vec<Array>,
    pub(crate) problems: Vec<String>,
}

/// A device with a superblock.
struct Candidate {
    location: Location,
    device: Arc<dyn BlockDevice>,
    superblock: Superblock,
}

/// Finds the arrays that some devices form. `known`: those that have been found before.
///
/// # Errors
/// A device failed.
pub(crate) fn scan(devices: &[(Location, Arc<dyn BlockDevice>)], known: &[Array]) -> Result<Found> {
    let mut found = Found::default();
    let mut groups: Vec<Vec<Candidate>> = vec![];
    for (location, device) in devices {
        let superblock = match probe(&**device)?.into_superblock() {
            Ok(superblock) => superblock,
            Err(error) => {
                found.problems.push(format!("{location}: {error}"));
                continue;
            }
        };
        let candidate = Candidate { location: location.clone(), device: Arc::clone(device), superblock };
        let same = |group: &&mut Vec<Candidate>| {
            let first = &group[0].superblock;
            (first.uuid, first.version) == (candidate.superblock.uuid, candidate.superblock.version)
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.push(candidate),
            None => groups.push(vec![candidate]),
        }
    }
    for group in groups {
        found.arrays.extend(assemble(&group));
    }
    names::give(known, &mut found.arrays);
    found.problems.extend(found.arrays.iter().flat_map(Array::problems));
    Ok(found)
}

fn level_name(level: i32) -> String {
    match level {
        -1 => "linear".to_owned(),
        0 | 1 | 4 | 5 | 6 | 10 => format!("raid{level}"),
        _ => level.to_string(),
    }
}

/// The array that some devices say they belong to. Its names are given later.
fn assemble(group: &[Candidate]) -> Option<Array> {
    let rank = |candidate: &&Candidate| {
        (candidate.superblock.events, matches!(candidate.superblock.own_role(), Role::Active(_)))
    };
    // The first of several.
    let freshest = group.iter().rev().max_by_key(rank)?;
    let main = &freshest.superblock;
    let uuid: Vec<String> =
        main.uuid.chunks(4).map(|part| part.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    let judged: Vec<_> = group.iter().map(|candidate| candidate.judge(main)).collect();
    let member = |(candidate, (slot, state)): (&Candidate, &(Option<u32>, MemberState))| Member {
        location: candidate.location.clone(),
        slot: *slot,
        state: *state,
        data_offset: candidate.superblock.data_offset,
        device: Arc::clone(&candidate.device),
    };
    let mut array = Array {
        uuid: uuid.join(":"),
        full_name: main.name.clone(),
        name: String::new(),
        number: main.minor.unwrap_or(u32::MAX),
        version: main.version,
        level: level_name(main.level),
        size: 0,
        disks: main.disks,
        members: group.iter().zip(&judged).map(member).collect(),
        missing: vec![],
        dirty: main.level > 0 && !main.clean,
        locked: None,
        lost: false,
        device: Err(corrupt("it has not been put together")),
    };
    array.device = refuse(main).and_then(|()| put_together(group, main, &mut array)).map(Arc::new);
    array.lost = array.missing.iter().any(|slot| array.is_lost(main, *slot));
    if let Ok(device) = &array.device {
        (array.size, array.locked) = (device.size, device.locked.clone());
    }
    Some(array)
}

/// Whether an array is in a state that is not understood here.
fn refuse(main: &Superblock) -> Result<()> {
    if main.disks == 0 || main.disks > MOST_DISKS {
        return Err(corrupt(format!("an array of {} devices", main.disks)));
    }
    let unsupported = |what: &str, hint: &str| Err(Error::unsupported(what).hint(hint));
    if main.has(feature::RESHAPE | feature::RESHAPE_BACKWARDS | feature::NEW_OFFSET) {
        return unsupported("it is being reshaped", "Let the guest finish the reshape before it is copied.");
    }
    if main.has(feature::JOURNAL) {
        return unsupported(
            "what is written to it goes to a journal first, which is not read",
            "Remove the journal in the guest before it is copied.",
        );
    }
    match main.features & !feature::KNOWN {
        0 => Ok(()),
        unknown => Err(Error::unsupported(format!("it has features that are not known ({unknown:#x})"))),
    }
}

impl Candidate {
    /// Which of the array's devices it is, and what it is good for. `main` is the freshest superblock.
    fn judge(&self, main: &Superblock) -> (Option<u32>, MemberState) {
        let own = &self.superblock;
        let same = |one: &Superblock| (one.level, one.disks, one.layout, one.chunk, one.used);
        let slot = match own.own_role() {
            Role::Spare => return (None, MemberState::Spare),
            Role::Faulty => return (None, MemberState::Faulty),
            Role::Journal => return (None, MemberState::Journal),
            Role::Active(slot) => slot,
        };
        let state = match main.role(own.number) {
            // One behind is what an interrupted update of the superblocks leaves.
            _ if own.events.saturating_add(1) < main.events => MemberState::Stale,
            Role::Active(said) if said != slot => MemberState::Stale,
            Role::Faulty | Role::Spare | Role::Journal => MemberState::Stale,
            Role::Active(_) if same(own) != same(main) || slot >= main.disks => MemberState::Unusable,
            Role::Active(_) if own.recovered.is_some() => MemberState::Rebuilding,
            Role::Active(_) => MemberState::InSync,
        };
        (Some(slot), state)
    }

    /// The data of the member.
    fn leg(&self) -> Result<Leg> {
        let own = &self.superblock;
        if own.used > own.data_len {
            return Err(corrupt(format!(
                "it has {:#x} bytes, where the array wants {:#x}",
                own.data_len, own.used
            )));
        }
        let data = Slice::new(Arc::clone(&self.device), own.data_offset, own.data_len).map_err(|_| {
            let end = own.data_offset.saturating_add(own.data_len);
            corrupt(format!("its data end at {end:#x}, past its end ({:#x})", self.device.size()))
        })?;
        let inside = |bad: &Range<u64>| {
            bad.start.saturating_sub(own.data_offset)..bad.end.saturating_sub(own.data_offset)
        };
        Ok(Leg {
            data,
            recovered: own.recovered,
            bad: own.bad.iter().map(inside).filter(|bad| bad.start < bad.end).collect(),
            write_mostly: own.write_mostly,
        })
    }
}

/// The array as a device. Members that turn out to be of no use are marked as such.
fn put_together(group: &[Candidate], main: &Superblock, array: &mut Array) -> Result<ArrayDevice> {
    let mut slots: Vec<Vec<Leg>> = (0..main.disks).map(|_| vec![]).collect();
    let (mut counters, mut taken) = (vec![], vec![None; slots.len()]);
    for (candidate, member) in group.iter().zip(&mut array.members) {
        let (Some(slot), MemberState::InSync | MemberState::Rebuilding) = (member.slot, member.state) else {
            continue;
        };
        let index = slot as usize;
        let replaces = candidate.superblock.has(feature::REPLACEMENT);
        // A disk and its replacement share a number; two of the same kind are copies of each other.
        let twice = taken[index].is_some_and(|known| known == replaces) || slots[index].len() > 1;
        match candidate.leg().ok().filter(|_| !twice) {
            Some(leg) => {
                taken[index] = Some(replaces);
                counters.push(Counters::new(&candidate.device, &candidate.superblock));
                slots[index].push(leg);
            }
            None => member.state = MemberState::Unusable,
        }
    }
    for legs in &mut slots {
        legs.sort_by_key(|leg| (!leg.is_in_sync(), leg.write_mostly));
    }
    let has = |slot: usize| slots[slot].first().is_some_and(Leg::is_in_sync);
    array.missing = (0..main.disks).filter(|slot| !has(*slot as usize)).collect();
    let lens: Vec<_> = slots.iter().map(|legs| legs.first().map(|leg| leg.data.size())).collect();
    let (layout, size) = Layout::new(main, &lens)?;
    if layout.lacks(slots.len(), &has) {
        let (missing, all) = (array.missing.len(), main.disks);
        return Err(Error::new(ErrorKind::NotFound, format!("{missing} of its {all} members are missing"))
            .hint("Give all disks of the guest together."));
    }
    if matches!(layout, Layout::Parity(_)) && !main.clean && !array.missing.is_empty() {
        return Err(Error::unsupported(
            "it was not shut down cleanly and lacks a member: where it was being written, what its parity gives may be wrong",
        )
        .hint("Give all disks of the guest together, or let the guest start the array (`mdadm --assemble --force`) and rebuild it."));
    }
    let locked = locked(main, &layout, &slots);
    let degraded = main.level > 0 && slots.iter().any(Vec::is_empty);
    let outdate = main.events.checked_add(2).filter(|_| degraded).map(|events| (counters, events));
    Ok(ArrayDevice { layout, size, slots, locked, outdate: Mutex::new(outdate), sums: Mutex::new(()) })
}

/// Why an array cannot be written without harm.
fn locked(main: &Superblock, layout: &Layout, slots: &[Vec<Leg>]) -> Option<String> {
    let reason = match layout {
        _ if main.has(feature::CLUSTERED) => "several machines share it",
        _ if main.has(feature::PPL | feature::MULTIPLE_PPLS) => "it has a log of partial parity",
        Layout::Parity(_) if !main.clean => "its parity is not known to be right",
        Layout::Parity(_) if slots.iter().flatten().any(|leg| !leg.is_in_sync()) => "it is being rebuilt",
        Layout::Parity(_) if slots.iter().flatten().any(|leg| !leg.bad.is_empty()) => {
            "members have bad blocks"
        }
        _ => return None,
    };
    Some(reason.to_owned())
}

#[cfg(test)]
mod tests;

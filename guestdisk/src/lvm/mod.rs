//! LVM2: physical volumes, the text that describes their group, linear and striped logical volumes.
//!
//! ```text
//!   physical volume
//!   +--------+-------+---------------------------------+----------+----------+----------+-- ..
//!   |        | label | metadata area: header, then a   | extent 0 | extent 1 | extent 2 |
//!   |        |       | ring of descriptions as text    |          |          |          |
//!   +--------+-------+---------------------------------+----------+----------+----------+-- ..
//!                 |     ^
//!                 '-----'      the text names all physical volumes of the group by their UUIDs, and
//!                              for each logical volume the extents that it consists of
//! ```
//!
//! The newest description that any physical volume holds counts. Volumes of other types than linear and striped
//! (mirrors, RAID, thin, cached, snapshots) are listed, and refused by name when they are to be read.

mod device;
mod label;
mod text;

use std::ops::Range;
use std::sync::Arc;

use block::{BlockDevice, Error, Result, ResultExt as _};

use device::{Mapped, Segment, Stripe};
use label::Physical;
use text::{Section, Value};

use crate::ranges::Ranges;
use crate::unused::Place;

pub(crate) use label::dashed;

/// The most bytes of descriptions of all physical volumes together.
const MOST_TEXT: u64 = 8 << 20;
/// LVM counts in sectors of this many bytes.
const SECTOR: u64 = 512;

/// A volume group.
#[derive(Debug)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// Bytes per extent.
    pub extent_bytes: u64,
    /// Its logical volumes, those that LVM keeps for itself included.
    pub volumes: Vec<Logical>,
    /// UUIDs of physical volumes that belong to it and have not been found.
    pub missing: Vec<String>,
    /// The extents of the physical volumes that have been found.
    areas: Vec<Place>,
    /// The extents of all volumes, of whatever type; `None` if there are any that are not understood.
    taken: Option<Vec<Place>>,
}

impl Group {
    /// Bytes of physical volumes that no logical volume has. Nothing, if any volume of the group is not understood.
    pub(crate) fn unallocated(&self) -> Vec<Place> {
        let Some(taken) = &self.taken else { return vec![] };
        let mut free = vec![];
        for (device, area) in &self.areas {
            let mut used = Ranges::default();
            for (other, range) in taken {
                if std::ptr::addr_eq(Arc::as_ptr(other), Arc::as_ptr(device)) {
                    used.push(range.clone());
                }
            }
            let gaps = used.sorted().gaps(area.clone());
            free.extend(gaps.into_iter().map(|gap| (Arc::clone(device), gap)));
        }
        free
    }
}

/// A logical volume.
#[derive(Debug)]
pub struct Logical {
    /// Its name, without that of the group.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// Its size in bytes, as far as its segments are understood.
    pub size: u64,
    /// Whether it is meant for users; others are parts of RAIDs, pools and the like.
    pub visible: bool,
    segments: Result<Vec<Segment>>,
}

impl Logical {
    /// Whether it is linear or striped.
    pub(crate) fn is_plain(&self) -> bool {
        self.segments.is_ok()
    }

    /// Where a range of it lies on physical volumes; nothing if it is not understood.
    pub(crate) fn places(&self, range: Range<u64>) -> Vec<Place> {
        let Ok(segments) = &self.segments else { return vec![] };
        Mapped::new(segments.clone(), self.size).places(range)
    }

    /// Its bytes.
    ///
    /// # Errors
    /// `Unsupported` with the type of the volume, if it is neither linear nor striped; `NotFound` if a physical volume is
    /// missing; `Corrupt` if its description makes no sense.
    pub fn device(&self) -> Result<Arc<dyn BlockDevice>> {
        match &self.segments {
            Ok(segments) => Ok(Arc::new(Mapped::new(segments.clone(), self.size))),
            Err(error) => Err(Error::new(error.kind(), error.to_string())),
        }
    }
}

/// What [`scan`] found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) groups: Vec<Group>,
    /// Where LVM's own books are.
    pub(crate) books: Vec<Place>,
    pub(crate) problems: Vec<String>,
}

/// Finds the groups that some physical volumes form.
///
/// # Errors
/// A device failed.
pub(crate) fn scan(devices: &[Arc<dyn BlockDevice>]) -> Result<Found> {
    let (mut found, mut physical) = (Found::default(), vec![]);
    let mut room = MOST_TEXT;
    for device in devices {
        match Physical::read(device, &mut room) {
            Ok(volume) => physical.push(volume),
            Err(error) if error.kind() == block::ErrorKind::Io => return Err(error),
            Err(error) => found.problems.push(format!("physical volume of LVM: {error}")),
        }
    }
    let mut newest: Vec<(String, u64, Section)> = vec![];
    for volume in &physical {
        found.books.extend(volume.own.iter().map(|own| (Arc::clone(&volume.device), own.clone())));
        for problem in &volume.problems {
            found.problems.push(format!("physical volume {}: {problem}", volume.uuid));
        }
        for (name, section) in &volume.descriptions {
            let (uuid, sequence) = (section.text("id"), section.number("seqno").unwrap_or(0));
            match newest.iter_mut().find(|(_, _, known)| known.text("id") == uuid) {
                Some(known) if known.1 >= sequence => {}
                Some(known) => *known = (name.clone(), sequence, section.clone()),
                None => newest.push((name.clone(), sequence, section.clone())),
            }
        }
    }
    for (name, _, section) in newest {
        match Group::parse(&name, &section, &physical) {
            Ok(group) => found.groups.push(group),
            Err(error) => found.problems.push(format!("volume group {name}: {error}")),
        }
    }
    Ok(found)
}

/// The name that device-mapper gives a volume: hyphens inside names are doubled.
pub fn mapper_name(group: &str, name: &str) -> String {
    format!("{}-{}", group.replace('-', "--"), name.replace('-', "--"))
}

/// A physical volume as the description of a group has it.
struct Member {
    name: String,
    /// Where its extents begin, in bytes.
    start: u64,
    extents: u64,
    device: Option<Arc<dyn BlockDevice>>,
}

impl Group {
    fn parse(name: &str, section: &Section, physical: &[Physical]) -> Result<Self> {
        let extent_bytes = section
            .number("extent_size")
            .and_then(|sectors| sectors.checked_mul(SECTOR))
            .filter(|bytes| *bytes != 0)
            .ok_or_else(|| Error::invalid("the description has no extent size"))?;
        let mut missing = vec![];
        let mut members = vec![];
        for (name, volume) in section.sections("physical_volumes") {
            let uuid = volume.text("id");
            let found = physical.iter().find(|found| found.uuid == uuid);
            if found.is_none() {
                missing.push(uuid.to_owned());
            }
            members.push(Member {
                name: name.to_owned(),
                start: volume.number("pe_start").unwrap_or(0).saturating_mul(SECTOR),
                extents: volume.number("pe_count").unwrap_or(0),
                device: found.map(|found| Arc::clone(&found.device)),
            });
        }
        let reader = SegmentReader { extent_bytes, members: &members };
        let volumes = section.sections("logical_volumes").map(|(name, volume)| reader.logical(name, volume));
        let (volumes, uuid): (Vec<Logical>, _) = (volumes.collect(), section.text("id").to_owned());
        let areas = members.iter().filter_map(|member| {
            let end = member.extents.checked_mul(extent_bytes)?.checked_add(member.start)?;
            let device = member.device.as_ref().filter(|device| end <= device.size())?;
            Some((Arc::clone(device), member.start..end))
        });
        let plain = volumes.iter().all(Logical::is_plain);
        let taken = plain.then(|| volumes.iter().flat_map(|volume| volume.places(0..volume.size)).collect());
        Ok(Self {
            name: name.to_owned(),
            uuid,
            extent_bytes,
            areas: areas.collect(),
            taken,
            volumes,
            missing,
        })
    }
}

struct SegmentReader<'a> {
    extent_bytes: u64,
    members: &'a [Member],
}

impl SegmentReader<'_> {
    fn logical(&self, name: &str, section: &Section) -> Logical {
        let visible = section.list("status").iter().any(|word| word.text() == Some("VISIBLE"));
        let segments = self.segments(section);
        let size = segments.as_ref().ok().and_then(|segments| segments.last()).map_or(0, Segment::end);
        Logical { name: name.to_owned(), uuid: section.text("id").to_owned(), size, visible, segments }
    }

    /// The segments in their order, without gaps.
    fn segments(&self, section: &Section) -> Result<Vec<Segment>> {
        let mut segments = vec![];
        for (name, segment) in section.children().filter(|(name, _)| name.starts_with("segment")) {
            segments.push(self.segment(segment).context(|| name.to_owned())?);
        }
        segments.sort_by_key(|segment| segment.start);
        let mut end = 0;
        for segment in &segments {
            if segment.start != end {
                return Err(Error::invalid(format!("its segments do not meet at byte {end:#x}")));
            }
            end = segment.end();
        }
        if segments.is_empty() { Err(Error::invalid("it has no segments")) } else { Ok(segments) }
    }

    fn segment(&self, segment: &Section) -> Result<Segment> {
        let kind = segment.text("type");
        if !matches!(kind, "striped" | "linear") {
            return Err(Error::unsupported(format!("a logical volume of type '{kind}' cannot be read")));
        }
        let number = |key: &str| {
            segment.number(key).ok_or_else(|| Error::invalid(format!("a segment without '{key}'")))
        };
        let bytes = |extents: u64| {
            extents
                .checked_mul(self.extent_bytes)
                .filter(|bytes| *bytes < 1 << 62)
                .ok_or_else(|| Error::invalid(format!("a segment of {extents} extents")))
        };
        let (first, extents) = (number("start_extent")?, number("extent_count")?);
        let list = segment.list("stripes");
        let count = list.len() as u64 / 2;
        if count == 0 || count > 4096 || extents == 0 || extents % count != 0 {
            return Err(Error::invalid(format!("a segment of {extents} extents on {count} stripes")));
        }
        let pairs = list.chunks_exact(2);
        let stripes: Result<Vec<_>> =
            pairs.map(|pair| self.stripe(&pair[0], &pair[1], extents / count)).collect();
        let stripe_bytes = match count {
            1 => bytes(extents)?,
            _ => number("stripe_size")?.saturating_mul(SECTOR),
        };
        let len = bytes(extents)?;
        if stripe_bytes == 0 || !(len / count).is_multiple_of(stripe_bytes) {
            return Err(Error::invalid(format!("stripes of {stripe_bytes} bytes in a segment of {len}")));
        }
        Ok(Segment { start: bytes(first)?, len, stripe_bytes, stripes: stripes?.into() })
    }

    /// `extents` extents of a physical volume, from the one that the list names.
    fn stripe(&self, name: &Value, first: &Value, extents: u64) -> Result<Stripe> {
        let (Some(name), Some(first)) = (name.text(), first.number()) else {
            return Err(Error::invalid("a list of stripes that is none"));
        };
        let member = self.members.iter().find(|member| member.name == name).ok_or_else(|| {
            Error::invalid(format!("it lies on '{name}', which is none of the group's physical volumes"))
        })?;
        let end = first.checked_add(extents).filter(|end| *end <= member.extents);
        let offset = first.checked_mul(self.extent_bytes).and_then(|offset| offset.checked_add(member.start));
        let len = extents.checked_mul(self.extent_bytes);
        let Some(((_, offset), len)) = end.zip(offset).zip(len) else {
            return Err(Error::invalid(format!(
                "extents {first} and {extents} more of '{name}', which has {}",
                member.extents
            )));
        };
        let device = member.device.clone().ok_or_else(|| {
            Error::new(
                block::ErrorKind::NotFound,
                format!("physical volume '{name}' of its group is missing"),
            )
            .hint("Give all disks of the guest together.")
        })?;
        block::device::check_range(offset, len, device.size())?;
        Ok(Stripe { device, offset })
    }
}

#[cfg(test)]
mod tests;

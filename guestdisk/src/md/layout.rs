//! Where the bytes of an array lie on its members (md(4)), counted from the start of each member's data.
//!
//! ```text
//!   RAID 10, chunks 0 .. on four disks      near=2        far=2               offset=2
//!                                           0 0 1 1       0 1 2 3             0 1 2 3
//!                                           2 2 3 3       4 5 6 7 ..          3 0 1 2
//!                                                         3 0 1 2 (half-way)  4 5 6 7
//!                                                         7 4 5 6 ..          7 4 5 6
//! ```

use block::num::to_usize;
use block::{Error, ErrorKind, Result};

use super::superblock::{Superblock, feature};
use crate::bytes::corrupt;

/// The smallest chunk: a sector.
const SMALLEST_CHUNK: u64 = 512;

/// How an array is laid out.
#[derive(Debug)]
pub(super) enum Layout {
    /// One member after the other, each of which ends at this byte of the array.
    Linear(Vec<u64>),
    /// Chunks go to the members in turn.
    Striped(Striped),
    /// Every member has all of it.
    Mirror { disks: usize },
    /// Chunks go to the members in turn, each to several.
    Copies(Copies),
    /// Chunks go to the members in turn, with sums of each row.
    Parity(Parity),
}

/// Where some bytes of the array lie: the slots that have them, where there, and how many follow.
pub(super) type Copied = (Vec<(usize, u64)>, u64);

/// RAID 0. Where the members are of different sizes, what the larger ones have more forms a zone of its own.
#[derive(Debug)]
pub(super) struct Striped {
    chunk: u64,
    zones: Vec<Zone>,
    /// The first member of a row follows from the number of the chunk in the array (until Linux 3.13), not in the zone.
    absolute: bool,
}

#[derive(Debug)]
struct Zone {
    /// In the array.
    start: u64,
    end: u64,
    /// On each of its members.
    place: u64,
    slots: Vec<usize>,
}

/// RAID 10.
#[derive(Debug)]
pub(super) struct Copies {
    disks: u64,
    chunk: u64,
    near: u64,
    far: u64,
    /// Far copies lie in the next row, not a fraction of the disk away.
    offset: bool,
    /// The number of disks among which far copies are turned; the rest of a division goes to the last set.
    set: u64,
    /// Chunks between far copies.
    stride: u64,
}

/// RAID 4, 5 and 6.
#[derive(Debug)]
pub(super) struct Parity {
    pub(super) disks: u64,
    pub(super) chunk: u64,
    level: i32,
    layout: u32,
}

/// One row of chunks of an array with parity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    disks: u64,
    /// The slot of the sum.
    p: u64,
    /// The slot of the second sum of RAID 6.
    q: Option<u64>,
    /// Data begin at this slot and go round over so many; otherwise in order, past the sums.
    around: Option<(u64, u64)>,
}

fn refuse(message: String) -> Error {
    Error::unsupported(message)
}

impl Layout {
    /// The layout that a superblock describes, and the size of the array. `lens`: bytes of data of the member in each slot.
    pub(super) fn new(superblock: &Superblock, lens: &[Option<u64>]) -> Result<(Self, u64)> {
        let (chunk, disks) = (superblock.chunk, u64::from(superblock.disks));
        match superblock.level {
            -1 => Self::linear(chunk, &all(lens)?),
            0 => Self::striped(superblock, &all(lens)?),
            1 => Ok((Self::Mirror { disks: lens.len() }, superblock.used)),
            4..=6 => Self::parity(superblock, checked_chunk(chunk)?, disks),
            10 => Copies::new(superblock.layout, checked_chunk(chunk)?, disks, superblock.used)
                .map(|(copies, size)| (Self::Copies(copies), size)),
            level => Err(refuse(format!("arrays of level {level} cannot be read"))),
        }
    }

    fn linear(chunk: u64, lens: &[u64]) -> Result<(Self, u64)> {
        let mut ends: Vec<u64> = vec![];
        for len in lens {
            let len = if chunk == 0 { *len } else { len - len % chunk };
            let end = ends.last().copied().unwrap_or(0).checked_add(len);
            ends.push(end.ok_or_else(|| corrupt("its members are larger than anything"))?);
        }
        let size = ends.last().copied().unwrap_or(0);
        Ok((Self::Linear(ends), size))
    }

    fn striped(superblock: &Superblock, lens: &[u64]) -> Result<(Self, u64)> {
        let chunk = checked_chunk(superblock.chunk)?;
        let lens: Vec<u64> = lens.iter().map(|len| len - len % chunk).collect();
        let mut sizes = lens.clone();
        sizes.sort_unstable();
        sizes.dedup();
        let (mut zones, mut place, mut start): (Vec<Zone>, u64, u64) = (vec![], 0, 0);
        for size in sizes.into_iter().filter(|size| *size > 0) {
            let slots: Vec<usize> = (0..lens.len()).filter(|slot| lens[*slot] >= size).collect();
            let end = (size - place).checked_mul(slots.len() as u64).and_then(|len| start.checked_add(len));
            let end = end.ok_or_else(|| corrupt("its members are larger than anything"))?;
            zones.push(Zone { start, end, place, slots });
            (place, start) = (size, end);
        }
        // Until Linux 3.13 rows of the second zone and later ones began elsewhere than since then.
        let differ = |zone: &Zone| !(zone.start / chunk).is_multiple_of(zone.slots.len() as u64);
        let said = superblock.has(feature::RAID0_LAYOUT).then_some(superblock.layout);
        let absolute = match said {
            Some(1) => true,
            Some(2) => false,
            _ if !zones.iter().any(differ) => false,
            _ => {
                return Err(refuse(
                    "its members differ in size, and which of two layouts it has is not written down".into(),
                )
                .hint("`mdadm --assemble --update=layout-alternate` (or `layout-original`) in the guest writes it down."));
            }
        };
        Ok((Self::Striped(Striped { chunk, zones, absolute }), start))
    }

    fn parity(superblock: &Superblock, chunk: u64, disks: u64) -> Result<(Self, u64)> {
        let (level, layout) = (superblock.level, superblock.layout);
        let known = match level {
            4 => true,
            5 => layout <= 5,
            _ => layout <= 5 || matches!(layout, 16..=20),
        };
        if !known {
            return Err(refuse(format!("layout {layout} of RAID {level} cannot be read")));
        }
        let sums = if level == 6 { 2 } else { 1 };
        let data = disks.checked_sub(sums).filter(|data| *data > 0);
        let data = data.ok_or_else(|| corrupt(format!("a RAID {level} of {disks} disks")))?;
        let size = (superblock.used - superblock.used % chunk).checked_mul(data);
        let size = size.ok_or_else(|| corrupt("its members are larger than anything"))?;
        Ok((Self::Parity(Parity { disks, chunk, level, layout }), size))
    }

    /// Where the byte at `offset` lies, below the size of the array. Nowhere twice if there is parity.
    pub(super) fn locate(&self, offset: u64) -> Copied {
        match self {
            Self::Linear(ends) => {
                let slot = ends.partition_point(|end| *end <= offset);
                let start = slot.checked_sub(1).map_or(0, |before| ends[before]);
                (vec![(slot, offset - start)], ends[slot] - offset)
            }
            Self::Striped(striped) => striped.locate(offset),
            Self::Mirror { disks } => ((0..*disks).map(|slot| (slot, offset)).collect(), u64::MAX),
            Self::Copies(copies) => copies.locate(offset),
            Self::Parity(parity) => {
                let (row, index, at, left) = parity.locate(offset);
                (vec![(row.data(index), at)], left)
            }
        }
    }

    /// The slots that are missing for anything to be read, where `has` tells which are there.
    pub(super) fn lacks(&self, disks: usize, has: &dyn Fn(usize) -> bool) -> bool {
        let missing = (0..disks).filter(|slot| !has(*slot)).count();
        match self {
            Self::Linear(_) | Self::Striped(_) => missing > 0,
            Self::Mirror { .. } => missing == disks,
            Self::Copies(copies) => !copies.groups().all(|group| group.iter().any(|(slot, _)| has(*slot))),
            Self::Parity(parity) => missing > if parity.level == 6 { 2 } else { 1 },
        }
    }
}

/// The lengths of all members, if all are there.
fn all(lens: &[Option<u64>]) -> Result<Vec<u64>> {
    let found: Option<Vec<u64>> = lens.iter().copied().collect();
    found.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "members of the array are missing")
            .hint("Give all disks of the guest together.")
    })
}

fn checked_chunk(chunk: u64) -> Result<u64> {
    match chunk {
        0 => Err(corrupt("an array without a chunk size")),
        _ if chunk.is_multiple_of(SMALLEST_CHUNK) => Ok(chunk),
        _ => Err(corrupt(format!("an array with chunks of {chunk} bytes"))),
    }
}

impl Striped {
    fn locate(&self, offset: u64) -> Copied {
        let zone = &self.zones[self.zones.partition_point(|zone| zone.end <= offset)];
        let (chunk, within) = ((offset - zone.start) / self.chunk, offset % self.chunk);
        let count = zone.slots.len() as u64;
        let turn = if self.absolute { offset / self.chunk } else { chunk };
        let place = zone.place + chunk / count * self.chunk + within;
        (vec![(zone.slots[to_usize(turn % count)], place)], self.chunk - within)
    }
}

impl Copies {
    fn new(layout: u32, chunk: u64, disks: u64, used: u64) -> Result<(Self, u64)> {
        let (near, far) = (u64::from(layout & 0xff), u64::from(layout >> 8 & 0xff));
        let offset = layout & 1 << 16 != 0;
        if near == 0 || far == 0 || near * far > disks {
            return Err(corrupt(format!("a RAID 10 of {disks} disks with layout {layout:#x}")));
        }
        let set = match layout >> 17 {
            0 => disks,
            1 if near == 1 => disks / far,
            2 if near == 1 => far,
            _ => return Err(refuse(format!("layout {layout:#x} of RAID 10 cannot be read"))),
        };
        let large = || corrupt("its members are larger than anything");
        let chunks = (used / chunk / far).checked_mul(disks).ok_or_else(large)? / near;
        // What of each disk is used, rounded up.
        let rows = chunks.checked_mul(near * far).ok_or_else(large)?.div_ceil(disks);
        let size = chunks.checked_mul(chunk).ok_or_else(large)?;
        Ok((Self { disks, chunk, near, far, offset, set, stride: rows / far }, size))
    }

    /// Where all copies of a chunk lie: slots, and which chunk of them.
    fn places(&self, chunk: u64) -> Vec<(usize, u64)> {
        let mut places = vec![];
        for copy in 0..self.near {
            let position = chunk * self.near + copy;
            let (row, slot) = (position / self.disks, position % self.disks);
            for turn in 0..self.far {
                let place = if self.offset { row * self.far + turn } else { row + turn * self.stride };
                places.push((to_usize(self.turned(slot, turn * self.near)), place));
            }
        }
        places
    }

    /// The slot that is `by` further in the same set.
    fn turned(&self, slot: u64, by: u64) -> u64 {
        let last = (self.disks / self.set - 1) * self.set;
        let (start, len) =
            if slot >= last { (last, self.disks - last) } else { (slot / self.set * self.set, self.set) };
        start + (slot - start + by) % len
    }

    /// The copies of all chunks that differ in their slots.
    fn groups(&self) -> impl Iterator<Item = Vec<(usize, u64)>> {
        (0..self.disks).map(|chunk| self.places(chunk))
    }

    fn locate(&self, offset: u64) -> Copied {
        let within = offset % self.chunk;
        let places = self.places(offset / self.chunk).into_iter();
        (places.map(|(slot, chunk)| (slot, chunk * self.chunk + within)).collect(), self.chunk - within)
    }
}

impl Parity {
    /// Chunks of data in a row.
    pub(super) fn data_disks(&self) -> u64 {
        self.disks - if self.level == 6 { 2 } else { 1 }
    }

    /// The row of a byte of the array, which of its data chunks it is in, where on the member, and how many bytes follow.
    pub(super) fn locate(&self, offset: u64) -> (Row, u64, u64, u64) {
        let (chunk, within) = (offset / self.chunk, offset % self.chunk);
        let (stripe, index) = (chunk / self.data_disks(), chunk % self.data_disks());
        (self.row(stripe), index, stripe * self.chunk + within, self.chunk - within)
    }

    fn row(&self, stripe: u64) -> Row {
        let disks = self.disks;
        let (layout, own_q) = match (self.level, self.layout) {
            (4, _) => (5, false),
            // The layouts of RAID 5, and the second sum on a disk of its own.
            (6, 16..=20) => (self.layout - 16, true),
            (_, layout) => (layout, false),
        };
        let turning = if own_q { disks - 1 } else { disks };
        let p = match layout {
            0 | 2 => turning - 1 - stripe % turning,
            1 | 3 => stripe % turning,
            4 => 0,
            _ => self.data_disks(),
        };
        let q = match (self.level, own_q) {
            (6, true) => Some(disks - 1),
            (6, false) => Some((p + 1) % disks),
            _ => None,
        };
        let first = if own_q { p + 1 } else { q.unwrap_or(p) + 1 };
        let around = matches!(layout, 2 | 3).then_some((first, turning));
        Row { disks, p, q, around }
    }
}

impl Row {
    /// The slot of the sum.
    pub(super) fn p(&self) -> usize {
        to_usize(self.p)
    }

    /// The slot of the second sum.
    pub(super) fn q(&self) -> Option<usize> {
        self.q.map(to_usize)
    }

    /// The slot of a data chunk.
    pub(super) fn data(&self, index: u64) -> usize {
        to_usize(self.data_slot(index))
    }

    fn data_slot(&self, index: u64) -> u64 {
        if let Some((first, count)) = self.around {
            return (first + index) % count;
        }
        let other = self.q.unwrap_or(u64::MAX);
        let mut slot = index;
        for sum in [self.p.min(other), self.p.max(other)] {
            slot += u64::from(slot >= sum);
        }
        slot
    }

    /// The power of the generator that a data chunk goes into the second sum with: disks are counted from the one that
    /// follows it, the first sum left out.
    pub(super) fn exponent(&self, index: u64) -> u64 {
        let start = self.q.map_or(0, |q| q + 1);
        let from_start = |slot: u64| (slot + self.disks - start % self.disks) % self.disks;
        let (own, p) = (from_start(self.data_slot(index)), from_start(self.p));
        own - u64::from(p < own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(layout: u32, disks: u64, rows: u64, used: u64) -> Vec<Vec<Option<u64>>> {
        let (copies, size) = Copies::new(layout, 4096, disks, used * 4096).unwrap();
        let mut table = vec![vec![None; to_usize(disks)]; to_usize(rows)];
        for chunk in 0..size / 4096 {
            for (slot, row) in copies.places(chunk) {
                if let Some(row) = table.get_mut(to_usize(row)) {
                    assert_eq!(row[slot], None, "chunk {chunk}: two at one place");
                    row[slot] = Some(chunk);
                }
            }
        }
        table
    }

    fn row<const N: usize>(chunks: [u64; N]) -> Vec<Option<u64>> {
        chunks.into_iter().map(Some).collect()
    }

    /// The pictures of md(4).
    #[test]
    fn copies_near_far_and_by_an_offset() {
        assert_eq!(table(0x102, 4, 2, 8), [row([0, 0, 1, 1]), row([2, 2, 3, 3])]);
        assert_eq!(table(0x102, 3, 3, 8), [row([0, 0, 1]), row([1, 2, 2]), row([3, 3, 4])]);
        let far = table(0x201, 4, 4, 4);
        assert_eq!(far, [row([0, 1, 2, 3]), row([4, 5, 6, 7]), row([3, 0, 1, 2]), row([7, 4, 5, 6])]);
        let offset = table(0x1_0201, 3, 4, 4);
        assert_eq!(offset, [row([0, 1, 2]), row([2, 0, 1]), row([3, 4, 5]), row([5, 3, 4])]);
        // Far copies within sets of two, the last of which has three.
        let sets = table(0x4_0201, 5, 2, 2);
        assert_eq!(sets, [row([0, 1, 2, 3, 4]), row([1, 0, 4, 2, 3])]);
    }

    #[test]
    fn hostile_layouts_are_refused() {
        for layout in [0, 0x100, 1, 0x303, 0xffff_ffff, 0x6_0101] {
            Copies::new(layout, 4096, 4, 1 << 20).unwrap_err();
        }
        Copies::new(0x101, 512, 1920, 1 << 61).unwrap_err();
    }

    /// Every slot is one chunk of each row, and exponents are those of 0 and on.
    #[test]
    fn rows_are_complete() {
        for (level, layout) in
            [(4, 0), (5, 0), (5, 1), (5, 2), (5, 3), (5, 4), (5, 5), (6, 0), (6, 1), (6, 2), (6, 3)]
                .into_iter()
                .chain([(6, 4), (6, 5), (6, 16), (6, 17), (6, 18), (6, 19), (6, 20)])
        {
            let parity = Parity { disks: 5, chunk: 4096, level, layout };
            for stripe in 0..12 {
                let row = parity.row(stripe);
                let mut slots: Vec<_> = (0..parity.data_disks()).map(|index| row.data(index)).collect();
                slots.push(row.p());
                slots.extend(row.q());
                slots.sort_unstable();
                assert_eq!(slots, [0, 1, 2, 3, 4], "level {level} layout {layout} stripe {stripe}");
                let mut exponents: Vec<_> =
                    (0..parity.data_disks()).map(|index| row.exponent(index)).collect();
                exponents.sort_unstable();
                assert_eq!(
                    exponents,
                    (0..parity.data_disks()).collect::<Vec<_>>(),
                    "{level} {layout} {stripe}"
                );
            }
        }
    }
}

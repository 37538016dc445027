//! A container that remembers enough to show what a loss of power could have left at any moment.
//!
//! Every change is recorded, and every sync. If power fails at some moment, all changes before the last
//! completed sync are there. Of the later ones any may be there or not, in any combination, and of a write
//! any of its 512-byte sectors (the later of two writes to a sector can be there without the earlier, and the
//! other way round: an order is promised by syncs only). The length of the file may have become durable ahead
//! of the data.
//!
//! A test registers *marks* when its guest has been promised something ("flush 3 has returned"); each image
//! says which marks had been passed, hence what it must contain.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::device::ZeroMode;
use crate::error::Result;
use crate::mem::MemStorage;
use crate::num::to_usize;
use crate::storage::{HostExtent, Storage};
use crate::testing::Random;

/// What is written whole or not at all.
const SECTOR: u64 = 512;

/// Something that happened to the container.
#[derive(Debug, Clone)]
enum Event {
    Write {
        offset: u64,
        data: Arc<[u8]>,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    Allocate {
        end: u64,
    },
    SetLen(u64),
    /// A sync was completed.
    Sync,
    Mark(u64),
}

impl Event {
    /// Whether it changes the container.
    fn changes(&self) -> bool {
        !matches!(self, Self::Sync | Self::Mark(_))
    }

    /// Does it to `bytes`, in sectors for which `keep` says so.
    fn apply(&self, bytes: &mut Vec<u8>, mut keep: impl FnMut() -> bool) {
        match self {
            Self::Write { offset, data } => {
                for (start, end) in sectors(*offset, data.len() as u64).filter(|_| keep()) {
                    lengthen(bytes, end);
                    let piece = &data[to_usize(start - offset)..to_usize(end - offset)];
                    bytes[to_usize(start)..to_usize(end)].copy_from_slice(piece);
                }
            }
            Self::Zero { offset, len } => {
                for (start, end) in sectors(*offset, *len).filter(|_| keep()) {
                    lengthen(bytes, end);
                    bytes[to_usize(start)..to_usize(end)].fill(0);
                }
            }
            Self::Discard { offset, len } => {
                let len = len.to_owned().min((bytes.len() as u64).saturating_sub(*offset));
                for (start, end) in sectors(*offset, len).filter(|_| keep()) {
                    bytes[to_usize(start)..to_usize(end)].fill(0);
                }
            }
            Self::Allocate { end } if keep() => lengthen(bytes, *end),
            Self::SetLen(len) if keep() => bytes.resize(to_usize(*len), 0),
            Self::Allocate { .. } | Self::SetLen(_) | Self::Sync | Self::Mark(_) => {}
        }
    }
}

fn lengthen(bytes: &mut Vec<u8>, len: u64) {
    bytes.resize(bytes.len().max(to_usize(len)), 0);
}

/// The parts of a range that lie in one sector each, as start and end.
fn sectors(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    (offset / SECTOR..end.div_ceil(SECTOR))
        .map(move |sector| (offset.max(sector * SECTOR), end.min((sector + 1) * SECTOR)))
        .filter(|(start, end)| start < end)
}

/// A container in memory that records what is done to it.
pub struct CrashStorage {
    initial: Vec<u8>,
    live: MemStorage,
    events: Mutex<Vec<Event>>,
}

impl fmt::Debug for CrashStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CrashStorage({} events)", self.events.lock().len())
    }
}

impl CrashStorage {
    /// A container that holds `bytes`, durably.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { live: MemStorage::from_bytes(bytes.clone()), initial: bytes, events: Mutex::default() }
    }

    /// Notes that something has been promised. Numbers are the test's own.
    pub fn mark(&self, number: u64) {
        self.events.lock().push(Event::Mark(number));
    }

    /// How many syncs have been completed.
    pub fn syncs(&self) -> usize {
        self.events.lock().iter().filter(|event| matches!(event, Event::Sync)).count()
    }

    /// How many changes have been recorded.
    pub fn changes(&self) -> usize {
        self.events.lock().iter().filter(|event| event.changes()).count()
    }

    /// A copy of the contents now, as if power had not failed.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.live.to_bytes()
    }

    /// What could be left after a loss of power at any moment so far: every prefix of the changes, and for each
    /// stretch between syncs random subsets of sectors (all subsets of changes, where they are few). At most
    /// `max` images, sampled evenly by `seed` if there are more.
    pub fn images(&self, max: usize, seed: u64) -> CrashImages {
        let events = self.events.lock().clone();
        let plan = Planner::new(&events, seed).plan(max);
        CrashImages { base: self.initial.clone(), applied: 0, events, plan: plan.into() }
    }

    /// Does a change and records it, as one step.
    fn record(&self, event: Event, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut events = self.events.lock();
        change()?;
        events.push(event);
        Ok(())
    }
}

impl Storage for CrashStorage {
    fn len(&self) -> Result<u64> {
        self.live.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.record(Event::SetLen(len), || self.live.set_len(len))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.live.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.record(Event::Write { offset, data: buf.into() }, || self.live.write_at(buf, offset))
    }

    fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.record(Event::Zero { offset, len }, || self.live.zero_range(offset, len, mode))
    }

    fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        self.record(Event::Discard { offset, len }, || self.live.discard_range(offset, len))
    }

    fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
        self.record(Event::Allocate { end: offset + len }, || self.live.allocate_range(offset, len))
    }

    fn sync(&self) -> Result<()> {
        self.record(Event::Sync, || Ok(()))
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
        self.live.extent(offset, max_len)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}

/// What a loss of power could have left.
#[derive(Debug)]
pub struct CrashImage {
    /// The contents.
    pub storage: Arc<MemStorage>,
    /// The marks that had been passed, in order.
    pub marks: Vec<u64>,
    /// How it came about, for the message of a failing test.
    pub description: String,
}

/// Which of the changes that are not durable are there.
#[derive(Debug, Clone, Copy)]
enum Choice {
    /// All.
    All,
    /// The n-th if bit n is set.
    Mask(u64),
    /// Each sector by chance, chosen by this seed.
    Random(u64),
}

/// A moment and a choice.
#[derive(Debug, Clone, Copy)]
struct Point {
    /// Events before this one are durable.
    durable: usize,
    /// Events from this one on have not happened.
    at: usize,
    choice: Choice,
}

/// The events between two syncs.
#[derive(Debug)]
struct Epoch {
    start: usize,
    end: usize,
    /// The events that change something.
    changes: Vec<usize>,
}

impl Epoch {
    /// The moments to crash at: before each change and at the end, each as late as can be, so that marks set
    /// before it count.
    fn moments(&self) -> impl Iterator<Item = usize> {
        self.changes.iter().copied().chain([self.end])
    }

    fn point(&self, at: usize, choice: Choice) -> Point {
        Point { durable: self.start, at, choice }
    }

    /// How many combinations of whole changes there are, if that is a small number.
    fn combinations(&self) -> Option<u64> {
        (1..=16).contains(&self.changes.len()).then(|| 1 << self.changes.len())
    }
}

/// Chooses points.
struct Planner {
    epochs: Vec<Epoch>,
    random: Random,
}

impl Planner {
    fn new(events: &[Event], seed: u64) -> Self {
        let mut epochs = vec![];
        let mut start = 0;
        let syncs = events.iter().enumerate().filter(|(_, event)| matches!(event, Event::Sync));
        for end in syncs.map(|(index, _)| index).chain([events.len()]) {
            let changes = (start..end).filter(|&index| events[index].changes()).collect();
            epochs.push(Epoch { start, end, changes });
            start = end + 1;
        }
        Self { epochs, random: Random::new(seed) }
    }

    /// At most `max` points, in the order of their durable parts.
    fn plan(mut self, max: usize) -> Vec<Point> {
        let mut prefixes: Vec<Point> = self
            .epochs
            .iter()
            .flat_map(|epoch| epoch.moments().map(|at| epoch.point(at, Choice::All)))
            .collect();
        // With little room, half of it is for prefixes.
        let room = if prefixes.len() <= max { prefixes.len() } else { max.div_ceil(2) };
        self.sample(&mut prefixes, room);
        let mut plan = prefixes;
        self.add_subsets(&mut plan, max - room);
        plan.sort_by_key(|point| point.durable);
        plan
    }

    /// Keeps `count` of the points.
    fn sample(&mut self, points: &mut Vec<Point>, count: usize) {
        while points.len() > count {
            let index = self.random.below(points.len() as u64);
            points.swap_remove(to_usize(index));
        }
    }

    /// Adds at most `count` points with subsets of changes.
    fn add_subsets(&mut self, plan: &mut Vec<Point>, count: usize) {
        let busy: Vec<&Epoch> = self.epochs.iter().filter(|epoch| !epoch.changes.is_empty()).collect();
        if busy.is_empty() {
            return;
        }
        let share = count / busy.len();
        let mut left = count;
        for epoch in &busy {
            if let Some(masks) = epoch.combinations().filter(|&masks| masks <= share as u64 / 2) {
                plan.extend((0..masks).map(|mask| epoch.point(epoch.end, Choice::Mask(mask))));
                left -= to_usize(masks);
            }
        }
        for turn in 0..left {
            // Every epoch in turn if there is room for that, some by chance otherwise.
            let turn = if share > 0 { turn } else { to_usize(self.random.below(busy.len() as u64)) };
            let epoch = busy[turn % busy.len()];
            let moment = if self.random.once_in(2) {
                epoch.end
            } else {
                let index = to_usize(self.random.below(epoch.changes.len() as u64));
                epoch.moments().nth(index + 1).unwrap_or(epoch.end)
            };
            plan.push(epoch.point(moment, Choice::Random(self.random.next_u64())));
        }
    }
}

/// Iterates over what could be left; made by [`CrashStorage::images`].
#[derive(Debug)]
pub struct CrashImages {
    /// The contents after `applied` events.
    base: Vec<u8>,
    applied: usize,
    events: Vec<Event>,
    plan: VecDeque<Point>,
}

impl CrashImages {
    /// The container as it is if `point` comes true.
    fn materialise(&mut self, point: Point) -> CrashImage {
        for event in &self.events[self.applied..point.durable] {
            event.apply(&mut self.base, || true);
        }
        self.applied = point.durable;
        let bytes = self.choose(point);
        let passed = self.events[..point.at].iter();
        let marks = passed.filter_map(|event| if let Event::Mark(mark) = event { Some(*mark) } else { None });
        CrashImage {
            marks: marks.collect(),
            description: format!(
                "power lost before event {} of {}, events before {} durable, then {:?}",
                point.at,
                self.events.len(),
                point.durable,
                point.choice
            ),
            storage: Arc::new(MemStorage::from_bytes(bytes)),
        }
    }

    /// Adds to the durable contents what was chosen.
    fn choose(&self, point: Point) -> Vec<u8> {
        let mut bytes = self.base.clone();
        let pending = self.events[point.durable..point.at].iter().filter(|event| event.changes());
        match point.choice {
            Choice::All => pending.for_each(|event| event.apply(&mut bytes, || true)),
            Choice::Mask(mask) => {
                for (nth, event) in pending.enumerate() {
                    event.apply(&mut bytes, || mask >> nth & 1 == 1);
                }
            }
            Choice::Random(seed) => self.choose_by_chance(&mut bytes, point, &mut Random::new(seed)),
        }
        bytes
    }

    fn choose_by_chance(&self, bytes: &mut Vec<u8>, point: Point, random: &mut Random) {
        let pending = self.events[point.durable..point.at].iter();
        // How much gets through at all: little, half, or nearly everything.
        let out_of = 10;
        let kept = [1, 5, 9][to_usize(random.below(3))];
        for event in pending {
            match random.below(3) {
                // Torn in any way.
                0 => event.apply(bytes, || random.below(out_of) < kept),
                // Whole or not at all, as most writes are.
                _ => {
                    let whole = random.below(out_of) < kept;
                    event.apply(bytes, || whole);
                }
            }
        }
        if random.once_in(3) {
            bytes.resize(self.len_at(point), 0);
        }
    }

    /// The length that the container had at the moment of `point`.
    fn len_at(&self, point: Point) -> usize {
        self.events[point.durable..point.at].iter().fold(self.base.len(), |len, event| match event {
            Event::Write { offset, data } => len.max(to_usize(*offset) + data.len()),
            Event::Zero { offset, len: zeros } => len.max(to_usize(offset + zeros)),
            Event::Allocate { end } => len.max(to_usize(*end)),
            Event::SetLen(exact) => to_usize(*exact),
            Event::Discard { .. } | Event::Sync | Event::Mark(_) => len,
        })
    }
}

impl Iterator for CrashImages {
    type Item = CrashImage;

    fn next(&mut self) -> Option<CrashImage> {
        let point = self.plan.pop_front()?;
        Some(self.materialise(point))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.plan.len(), Some(self.plan.len()))
    }
}

impl ExactSizeIterator for CrashImages {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn bytes(image: &CrashImage) -> Vec<u8> {
        image.storage.to_bytes()
    }

    /// Two sectors: A written and synced, then B, then C over both.
    fn sample() -> CrashStorage {
        let storage = CrashStorage::new(vec![0; 1024]);
        storage.write_at(&[1; 512], 0).unwrap();
        storage.sync().unwrap();
        storage.mark(7);
        storage.write_at(&[2; 512], 512).unwrap();
        storage.write_at(&[3; 1024], 0).unwrap();
        storage
    }

    #[test]
    fn synced_bytes_are_in_every_image_after_the_mark() {
        let storage = sample();
        let images: Vec<_> = storage.images(200, 1).collect();
        assert!(images.iter().any(|image| image.marks.is_empty()));
        assert!(images.iter().any(|image| image.marks == [7]));
        for image in images {
            let first = bytes(&image)[0];
            let allowed: &[u8] = if image.marks.is_empty() { &[0, 1] } else { &[1, 3] };
            assert!(allowed.contains(&first), "{first}: {}", image.description);
        }
    }

    #[test]
    fn every_legal_outcome_occurs_and_no_other() {
        let found: BTreeSet<(u8, u8)> = sample()
            .images(500, 2)
            .filter(|image| image.marks == [7])
            .map(|image| (bytes(&image)[0], bytes(&image)[512]))
            .collect();
        // The first sector is the synced 1 or the 3; the second the old 0, the 2, or the 3, independently: the
        // write of 3 can be torn.
        let legal = [(1, 0), (1, 2), (1, 3), (3, 0), (3, 2), (3, 3)];
        assert_eq!(found, legal.into());
    }

    #[test]
    fn sectors_are_never_torn_and_whole_at_both_ends() {
        let storage = CrashStorage::new(vec![0; 2048]);
        storage.write_at(&[9; 1000], 300).unwrap();
        let mut torn = false;
        for image in storage.images(300, 3) {
            let bytes = bytes(&image);
            for part in [300..512, 512..1024, 1024..1300] {
                assert!(bytes[part.clone()].iter().all(|&byte| byte == bytes[part.start]));
            }
            torn |= bytes[400] != bytes[600];
            assert!(bytes[..300].iter().chain(&bytes[1300..]).all(|&byte| byte == 0));
        }
        assert!(torn);
    }

    #[test]
    fn the_length_may_be_there_before_the_data() {
        let storage = CrashStorage::new(vec![]);
        storage.write_at(&[9; 512], 512).unwrap();
        storage.set_len(4096).unwrap();
        let found: BTreeSet<(usize, bool)> =
            storage.images(300, 4).map(|image| (bytes(&image).len(), bytes(&image).contains(&9))).collect();
        for outcome in [(0, false), (1024, true), (4096, false), (4096, true)] {
            assert!(found.contains(&outcome), "{outcome:?} of {found:?}");
        }
    }

    #[test]
    fn the_number_of_images_is_bounded_and_the_same_seed_gives_the_same() {
        let storage = CrashStorage::new(vec![0; 65536]);
        let mut random = Random::new(5);
        for step in 0..400 {
            storage.write_at(&[1; 700], random.below(60_000)).unwrap();
            if step % 10 == 9 {
                storage.sync().unwrap();
            }
        }
        assert_eq!((storage.syncs(), storage.changes()), (40, 400));
        for max in [0, 1, 10, 100, 1000] {
            assert_eq!(storage.images(max, 6).len(), max);
        }
        let all = |seed| storage.images(50, seed).map(|image| bytes(&image)).collect::<Vec<_>>();
        assert_eq!(all(1), all(1));
        assert_ne!(all(1), all(2));
        // Enough room: every prefix is there, the last being the live contents.
        assert!(storage.images(1000, 7).any(|image| bytes(&image) == storage.to_bytes()));
    }
}

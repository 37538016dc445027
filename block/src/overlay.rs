//! Copy-on-write over any disk: the base is read and never touched.
//!
//! The disk is divided into blocks. A map in memory says of each block whether the base answers for it, it is
//! zero, or it lies in a *slot* of a storage. The map grows with what is written, not with the disk:
//!
//! ```text
//!   guest block --> shard (of 64) --> region (1024 blocks) --> table of 1024 states, or "all zero"
//! ```
//!
//! Locks: a shard is locked for looking a state up or changing it, never during I/O. I/O in a slot holds the
//! *stripe* of its block shared, and taking the slot away from the block holds it exclusively, so that the
//! slot is not given to another block meanwhile. A block that gets a slot is prepared there without a lock and
//! then changes its state, if that is still what it was when it was prepared (compare and set); otherwise all
//! begins anew.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::device::{BlockDevice, LayerExtent, Limits, Stored, ZeroMode, check_range};
use crate::error::{Error, Result};
use crate::extent::read_backing;
use crate::num::to_usize;
use crate::storage::Storage;

/// Blocks of a region.
const REGION_BLOCKS: u64 = 1024;
/// Shards of the map.
const SHARDS: usize = 64;
/// Stripes of block locks.
const STRIPES: usize = 256;

/// Where the contents of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the base.
    Base,
    /// Nowhere: it is zero.
    Zero,
    /// In this slot of the store.
    Slot(u64),
}

/// The states of the blocks of a region.
enum Region {
    /// All of them are zero.
    Zero,
    /// One state each.
    Table(Box<[State]>),
}

impl Region {
    fn state(&self, index: usize) -> State {
        match self {
            Self::Zero => State::Zero,
            Self::Table(states) => states[index],
        }
    }

    fn set(&mut self, index: usize, state: State) {
        if let Self::Zero = self {
            *self = Self::table(State::Zero);
        }
        if let Self::Table(states) = self {
            states[index] = state;
        }
    }

    fn table(state: State) -> Self {
        Self::Table(vec![state; to_usize(REGION_BLOCKS)].into())
    }
}

/// The map from blocks to states.
struct Map {
    shards: Vec<RwLock<HashMap<u64, Region>>>,
    /// Regions that are in the map.
    regions: AtomicU64,
}

impl Map {
    fn new() -> Self {
        let shards = (0..SHARDS).map(|_| RwLock::default()).collect();
        Self { shards, regions: AtomicU64::new(0) }
    }

    fn shard(&self, region: u64) -> &RwLock<HashMap<u64, Region>> {
        &self.shards[to_usize(region) % SHARDS]
    }

    fn state(&self, block: u64) -> State {
        let (region, index) = split(block);
        self.shard(region).read().get(&region).map_or(State::Base, |states| states.state(index))
    }

    /// Changes the state of a block from `seen` to `new`; `false` if it is not `seen` any more.
    fn replace(&self, block: u64, seen: State, new: State) -> bool {
        let (region, index) = split(block);
        let mut shard = self.shard(region).write();
        let states = match shard.entry(region) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                self.regions.fetch_add(1, Ordering::Relaxed);
                entry.insert(Region::table(State::Base))
            }
        };
        let unchanged = states.state(index) == seen;
        if unchanged {
            states.set(index, new);
        }
        unchanged
    }

    /// Makes a region zero if the base answers for all of it (or it is zero already).
    fn zero_untouched_region(&self, region: u64) -> bool {
        match self.shard(region).write().entry(region) {
            Entry::Occupied(entry) => matches!(entry.get(), Region::Zero),
            Entry::Vacant(entry) => {
                self.regions.fetch_add(1, Ordering::Relaxed);
                entry.insert(Region::Zero);
                true
            }
        }
    }

    /// The state of `block` and how many blocks from it to `end` are the same, slots being consecutive.
    fn run(&self, block: u64, end: u64) -> (State, u64) {
        if self.regions.load(Ordering::Relaxed) == 0 {
            return (State::Base, end - block);
        }
        let first = self.state(block);
        let mut next = block;
        while next < end {
            let (region, index) = split(next);
            let region_end = (next - index as u64 + REGION_BLOCKS).min(end);
            let same = self.same_in_region(region, index, region_end - next, first, next - block);
            next += same;
            if next < region_end {
                break;
            }
        }
        // Another thread may have changed even the first: its length is 1 in any case.
        (first, (next - block).max(1))
    }

    /// How many of the `count` blocks from `index` of a region continue a run that began `done` blocks ago.
    fn same_in_region(&self, region: u64, index: usize, count: u64, first: State, done: u64) -> u64 {
        let shard = self.shard(region).read();
        match shard.get(&region) {
            None => {
                if first == State::Base {
                    count
                } else {
                    0
                }
            }
            Some(Region::Zero) => {
                if first == State::Zero {
                    count
                } else {
                    0
                }
            }
            Some(Region::Table(states)) => {
                let continues = |&(nth, state): &(u64, State)| match (first, state) {
                    (State::Slot(first), State::Slot(slot)) => slot == first + done + nth,
                    _ => first == state,
                };
                let states = states[index..].iter().copied().take(to_usize(count));
                (0..).zip(states).take_while(continues).count() as u64
            }
        }
    }
}

/// The region of a block, and its place there.
fn split(block: u64) -> (u64, usize) {
    (block / REGION_BLOCKS, to_usize(block % REGION_BLOCKS))
}

/// The slots of the store.
#[derive(Default)]
struct Slots {
    next: AtomicU64,
    free: Mutex<Vec<u64>>,
}

impl Slots {
    fn take(&self) -> u64 {
        self.free.lock().pop().unwrap_or_else(|| self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn give_back(&self, slot: u64) {
        self.free.lock().push(slot);
    }
}

/// A writable disk over another that stays as it is.
///
/// What is written is gone when the overlay is dropped, hence a flush does nothing.
pub struct Overlay {
    base: Arc<dyn BlockDevice>,
    store: Arc<dyn Storage>,
    size: u64,
    block_size: u32,
    map: Map,
    slots: Slots,
    stripes: Vec<RwLock<()>>,
}

impl fmt::Debug for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { base, store, size, block_size, .. } = self;
        write!(f, "Overlay {{ size: {size}, block_size: {block_size}, store: {store:?}, base: {base:?} }}")
    }
}

/// A part of a request that lies in one block.
#[derive(Debug, Clone, Copy)]
struct Piece {
    block: u64,
    /// First byte in the block.
    start: usize,
    len: usize,
}

impl Overlay {
    /// A disk that shows `base` and keeps what is written in `store`, which is empty and is used for nothing
    /// else, in blocks of `block_size` bytes (a power of two, at least 512).
    ///
    /// # Errors
    /// `Usage` if `block_size` is not such a number.
    pub fn new(base: Arc<dyn BlockDevice>, store: Arc<dyn Storage>, block_size: u32) -> Result<Self> {
        if !block_size.is_power_of_two() || block_size < 512 {
            return Err(Error::usage(format!(
                "overlay block size {block_size} is not a power of two from 512"
            )));
        }
        Ok(Self {
            size: base.size(),
            base,
            store,
            block_size,
            map: Map::new(),
            slots: Slots::default(),
            stripes: (0..STRIPES).map(|_| RwLock::default()).collect(),
        })
    }

    /// Bytes of the store that are in use or waiting to be used again.
    pub fn store_bytes(&self) -> u64 {
        self.slots.next.load(Ordering::Relaxed) * self.unit()
    }

    fn unit(&self) -> u64 {
        u64::from(self.block_size)
    }

    fn stripe(&self, block: u64) -> &RwLock<()> {
        &self.stripes[to_usize(block) % STRIPES]
    }

    /// The pieces of a range.
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let (unit, end) = (self.unit(), offset + len);
        (offset / unit..end.div_ceil(unit)).map(move |block| {
            let start = offset.max(block * unit);
            let stop = end.min(block * unit + unit);
            Piece { block, start: to_usize(start - block * unit), len: to_usize(stop - start) }
        })
    }

    /// Whether a piece is all of its block, as far as the disk goes.
    fn is_whole(&self, piece: Piece) -> bool {
        piece.start == 0 && piece.len as u64 == self.unit().min(self.size - piece.block * self.unit())
    }

    fn read_piece(&self, piece: Piece, buf: &mut [u8]) -> Result<()> {
        let _stripe = self.stripe(piece.block).read();
        match self.map.state(piece.block) {
            State::Base => {
                read_backing(Some(&*self.base), buf, piece.block * self.unit() + piece.start as u64)
            }
            State::Zero => {
                buf.fill(0);
                Ok(())
            }
            State::Slot(slot) => self.store.read_at(buf, slot * self.unit() + piece.start as u64),
        }
    }

    fn write_piece(&self, piece: Piece, buf: &[u8]) -> Result<()> {
        while !self.write_in_place(piece, buf)? && !self.write_first(piece, buf)? {}
        Ok(())
    }

    /// Writes to a block that has a slot; `false` if it has none.
    fn write_in_place(&self, piece: Piece, buf: &[u8]) -> Result<bool> {
        let _stripe = self.stripe(piece.block).read();
        match self.map.state(piece.block) {
            State::Slot(slot) => {
                self.store.write_at(buf, slot * self.unit() + piece.start as u64)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Writes to a block that has no slot; `false` if it was given one, or was zeroed, meanwhile. No lock is
    /// held: nobody knows the new slot until the state of the block has been changed to it.
    fn write_first(&self, piece: Piece, buf: &[u8]) -> Result<bool> {
        let seen = self.map.state(piece.block);
        if let State::Slot(_) = seen {
            return Ok(false);
        }
        let slot = self.slots.take();
        let stored = self.store_new(piece, buf, seen, slot);
        let linked = stored.is_ok() && self.map.replace(piece.block, seen, State::Slot(slot));
        if !linked {
            self.slots.give_back(slot);
        }
        stored.map(|()| linked)
    }

    /// Stores a block for the first time: `buf`, and around it what `seen` says.
    fn store_new(&self, piece: Piece, buf: &[u8], seen: State, slot: u64) -> Result<()> {
        let place = slot * self.unit();
        if self.is_whole(piece) {
            return self.store.write_at(buf, place);
        }
        let mut block = vec![0; to_usize(self.unit())];
        if seen == State::Base {
            read_backing(Some(&*self.base), &mut block, piece.block * self.unit())?;
        }
        block[piece.start..piece.start + piece.len].copy_from_slice(buf);
        self.store.write_at(&block, place)
    }

    /// Forgets the contents of a whole block. Returns its slot to the others.
    fn zero_block(&self, block: u64) {
        let _stripe = self.stripe(block).write();
        loop {
            let seen = self.map.state(block);
            if seen == State::Zero || self.map.replace(block, seen, State::Zero) {
                if let State::Slot(slot) = seen {
                    self.slots.give_back(slot);
                }
                return;
            }
        }
    }

    fn zero_piece(&self, piece: Piece, zeros: &[u8]) -> Result<()> {
        if self.is_whole(piece) {
            self.zero_block(piece.block);
            return Ok(());
        }
        if self.map.state(piece.block) == State::Zero {
            return Ok(());
        }
        self.write_piece(piece, &zeros[..piece.len])
    }

    /// The end of the region at `offset`, if all of it lies in `offset..end` and the base answers for it.
    fn zero_whole_region(&self, offset: u64, end: u64) -> Option<u64> {
        let region_bytes = self.unit() * REGION_BLOCKS;
        if !offset.is_multiple_of(region_bytes) {
            return None;
        }
        let next = offset.checked_add(region_bytes).filter(|&next| next <= end)?;
        self.map.zero_untouched_region(offset / region_bytes).then_some(next)
    }
}

impl BlockDevice for Overlay {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        Limits { alignment: 1, preferred: self.block_size, discard_granularity: self.block_size }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let (mut rest, mut offset) = (buf, offset);
        while !rest.is_empty() {
            let end = offset + rest.len() as u64;
            let (state, blocks) = self.map.run(offset / self.unit(), end.div_ceil(self.unit()));
            let stop = ((offset / self.unit() + blocks) * self.unit()).min(end);
            let (head, tail) = rest.split_at_mut(to_usize(stop - offset));
            match state {
                // The base never changes: who writes a block meanwhile races with this read anyway.
                State::Base => self.base.read_at(head, offset)?,
                State::Zero => head.fill(0),
                State::Slot(_) => {
                    let mut part = head;
                    for piece in self.pieces(offset, stop - offset) {
                        let (here, later) = part.split_at_mut(piece.len);
                        self.read_piece(piece, here)?;
                        part = later;
                    }
                }
            }
            (rest, offset) = (tail, stop);
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let mut rest = buf;
        for piece in self.pieces(offset, buf.len() as u64) {
            let (here, later) = rest.split_at(piece.len);
            self.write_piece(piece, here)?;
            rest = later;
        }
        Ok(())
    }

    fn write_zeroes_at(&self, mut offset: u64, len: u64, _mode: ZeroMode) -> Result<()> {
        check_range(offset, len, self.size)?;
        let end = offset + len;
        let zeros = vec![0; to_usize(self.unit())];
        while offset < end {
            if let Some(next) = self.zero_whole_region(offset, end) {
                offset = next;
                continue;
            }
            let stop = (offset / self.unit() + 1) * self.unit();
            for piece in self.pieces(offset, stop.min(end) - offset) {
                self.zero_piece(piece, &zeros)?;
            }
            offset = stop.min(end);
        }
        Ok(())
    }

    /// Gives back the slots of whole blocks, which read as zeros then. Blocks of the base stay visible.
    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size)?;
        let (mut block, end) = (offset.div_ceil(self.unit()), (offset + len) / self.unit());
        while block < end {
            let (state, blocks) = self.map.run(block, end);
            if let State::Slot(_) = state {
                (block..block + blocks).for_each(|block| self.zero_block(block));
            }
            block += blocks;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size)?;
        let end = offset + max_len.min(self.size - offset);
        let (state, blocks) = self.map.run(offset / self.unit(), end.div_ceil(self.unit()));
        let len = ((offset / self.unit() + blocks) * self.unit()).min(end) - offset;
        Ok(match state {
            State::Base => LayerExtent::new(Stored::Absent, len),
            State::Zero => LayerExtent::new(Stored::Zero, len),
            State::Slot(slot) => {
                LayerExtent::new(Stored::Data, len).at(slot * self.unit() + offset % self.unit())
            }
        })
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        Some(&self.base)
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.store)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::ErrorKind;
    use crate::extent::extents;
    use crate::mem::MemStorage;
    use crate::raw::{Raw, RawOptions};
    use crate::storage::HostExtent;
    use crate::testing::{Model, Op, Random, Trace, TraceDevice};

    const SIZE: u64 = 700_100;

    fn base(seed: u64) -> (Vec<u8>, Arc<dyn BlockDevice>) {
        let mut bytes = vec![0; to_usize(SIZE)];
        Random::new(seed).fill(&mut bytes);
        let storage = Arc::new(MemStorage::from_bytes(bytes.clone()));
        (bytes, Arc::new(Raw::open(storage, RawOptions::default()).unwrap()))
    }

    /// What the extents promise: zeros where they say so, and the bytes in the store where they name a place.
    fn check_extents(overlay: &Overlay, store: &MemStorage, model: &Model) {
        let mut next = 0;
        for extent in extents(overlay, 0, SIZE) {
            let extent = extent.unwrap();
            assert_eq!(extent.offset, next);
            next = extent.end();
            let shown = &model.bytes()[to_usize(extent.offset)..to_usize(extent.end())];
            if extent.zero {
                assert_eq!(model.find_difference(&vec![0; shown.len()], extent.offset), None);
            } else if extent.depth == 0 {
                let mut stored = vec![0; shown.len()];
                store.read_at(&mut stored, extent.host_offset.unwrap()).unwrap();
                assert_eq!(model.find_difference(&stored, extent.offset), None);
            }
        }
        assert_eq!(next, SIZE);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_shows_what_was_written_over_a_base_that_stays(
            raw in proptest::collection::vec(any::<[u64; 3]>(), 1..60),
            block_bits in 9u32..17,
        ) {
            let (bytes, base) = base(1);
            let store = Arc::new(MemStorage::new());
            let overlay = Overlay::new(Arc::clone(&base), Arc::clone(&store) as _, 1 << block_bits).unwrap();
            let mut model = Model::from_bytes(bytes.clone());
            for raw in raw {
                let op = Op::from_raw(raw, SIZE);
                op.run(&overlay).unwrap();
                model.apply(&op);
                prop_assert_eq!(model.compare(&overlay), Ok(()));
            }
            check_extents(&overlay, &store, &model);
            prop_assert_eq!(Model::from_bytes(bytes).compare(&*base), Ok(()));
        }
    }

    #[test]
    fn many_threads_in_the_same_blocks() {
        let (bytes, base) = base(2);
        let overlay = Overlay::new(base, Arc::new(MemStorage::new()), 4096).unwrap();
        // Every thread owns each fourth run of 100 bytes, so that all blocks are shared by all.
        let models: Vec<_> = thread::scope(|scope| {
            let work = |thread: u64| {
                let (overlay, mut model) = (&overlay, Model::from_bytes(bytes.clone()));
                move || {
                    let mut random = Random::new(thread);
                    for _ in 0..2000 {
                        let offset = (random.below(SIZE / 400) * 4 + thread) * 100;
                        let op = match random.below(3) {
                            0 => Op::Zero { offset, len: 100, mode: ZeroMode::UNMAP },
                            _ => Op::Write { offset, len: 100, seed: random.next_u64() },
                        };
                        op.run(overlay).unwrap();
                        model.apply(&op);
                        model.compare_range(overlay, offset, 100).unwrap();
                    }
                    model
                }
            };
            let threads: Vec<_> = (0..4).map(|thread| scope.spawn(work(thread))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (thread, model) in models.iter().enumerate() {
            for run in (0..SIZE / 400).map(|run| (run * 4 + thread as u64) * 100) {
                model.compare_range(&overlay, run, 100).unwrap();
            }
        }
    }

    /// Slots that are given back by one thread are taken by others: nobody may see another's bytes.
    #[test]
    fn recycled_slots_are_not_mixed_up() {
        let (_, base) = base(3);
        let overlay = Overlay::new(base, Arc::new(MemStorage::new()), 512).unwrap();
        thread::scope(|scope| {
            for thread in 0..4_u64 {
                let overlay = &overlay;
                scope.spawn(move || {
                    let mut random = Random::new(thread);
                    let mark = u8::try_from(thread).unwrap() + 1;
                    for _ in 0..3000 {
                        let offset = (random.below(20) * 4 + thread) * 512;
                        overlay.write_at(&[mark; 512], offset).unwrap();
                        let mut buf = [0; 512];
                        overlay.read_at(&mut buf, offset).unwrap();
                        assert_eq!(buf, [mark; 512]);
                        overlay.write_zeroes_at(offset, 512, ZeroMode::UNMAP).unwrap();
                    }
                });
            }
        });
        assert!(overlay.store_bytes() <= 80 * 512, "{}", overlay.store_bytes());
    }

    /// A container (and, through [`Raw`], a disk) in which chosen reads or writes stand still until the test
    /// lets them go on.
    #[derive(Debug, Default)]
    struct Gate {
        memory: MemStorage,
        held: AtomicBool,
        inside: AtomicBool,
    }

    impl Gate {
        fn pass(&self) {
            if self.held.load(Ordering::SeqCst) {
                self.inside.store(true, Ordering::SeqCst);
                while self.held.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            }
        }

        /// Waits until someone stands at the gate.
        fn wait(&self) {
            while !self.inside.swap(false, Ordering::SeqCst) {
                thread::yield_now();
            }
        }

        fn close(&self) {
            self.held.store(true, Ordering::SeqCst);
        }

        fn open(&self) {
            self.held.store(false, Ordering::SeqCst);
        }
    }

    impl Storage for Gate {
        fn len(&self) -> Result<u64> {
            self.memory.len()
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.memory.set_len(len)
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            self.pass();
            self.memory.read_at(buf, offset)
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
            self.pass();
            self.memory.write_at(buf, offset)
        }
        fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
            self.memory.zero_range(offset, len, mode)
        }
        fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
            self.memory.discard_range(offset, len)
        }
        fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
            self.memory.allocate_range(offset, len)
        }
        fn sync(&self) -> Result<()> {
            Ok(())
        }
        fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
            self.memory.extent(offset, max_len)
        }
        fn read_only(&self) -> bool {
            false
        }
        fn name(&self) -> String {
            "gate".to_owned()
        }
    }

    /// A write to a part of a block has read the base when all around it is zeroed: it must not bring the old
    /// bytes back.
    #[test]
    fn zeroing_a_region_is_not_undone_by_a_write_under_way() {
        const REGION: u64 = 512 * REGION_BLOCKS;
        for len in [REGION, 512] {
            let gate = Arc::new(Gate::default());
            gate.memory.write_at(&vec![7; to_usize(REGION)], 0).unwrap();
            let base = Raw::open(Arc::clone(&gate) as _, RawOptions::default()).unwrap();
            let overlay = Overlay::new(Arc::new(base), Arc::new(MemStorage::new()), 512).unwrap();
            gate.close();
            thread::scope(|scope| {
                let write = scope.spawn(|| overlay.write_at(&[9; 10], 100));
                gate.wait();
                overlay.write_zeroes_at(0, len, ZeroMode::UNMAP).unwrap();
                gate.open();
                write.join().unwrap().unwrap();
            });
            let mut expected = [0; 512];
            expected[100..110].fill(9);
            let mut shown = [1; 512];
            overlay.read_at(&mut shown, 0).unwrap();
            assert_eq!(shown, expected);
        }
    }

    /// Two writes to parts of one block that is in the base: both must be there in the end.
    #[test]
    fn two_first_writes_to_a_block_are_both_seen() {
        let gate = Arc::new(Gate::default());
        gate.memory.write_at(&[7; 512], 0).unwrap();
        let base = Raw::open(Arc::clone(&gate) as _, RawOptions::default()).unwrap();
        let overlay = Overlay::new(Arc::new(base), Arc::new(MemStorage::new()), 512).unwrap();
        gate.close();
        thread::scope(|scope| {
            let first = scope.spawn(|| overlay.write_at(&[1; 10], 0));
            gate.wait();
            let second = scope.spawn(|| overlay.write_at(&[2; 10], 20));
            gate.wait();
            gate.open();
            first.join().unwrap().unwrap();
            second.join().unwrap().unwrap();
        });
        let mut shown = [0; 31];
        overlay.read_at(&mut shown, 0).unwrap();
        assert_eq!((shown[9], shown[10], shown[20], shown[30]), (1, 7, 2, 7));
        assert_eq!(overlay.store_bytes(), 1024);
    }

    /// While a request is under way in a slot, the slot is not taken from its block.
    #[test]
    fn a_slot_in_use_is_not_given_away() {
        for reading in [true, false] {
            let (_, base) = base(5);
            let gate = Arc::new(Gate::default());
            let overlay = Overlay::new(base, Arc::clone(&gate) as _, 512).unwrap();
            overlay.write_at(&[1; 512], 0).unwrap();
            gate.close();
            thread::scope(|scope| {
                let overlay = &overlay;
                let request = scope.spawn(move || match reading {
                    true => overlay.read_at(&mut [0; 512], 0),
                    false => overlay.write_at(&[2; 512], 0),
                });
                gate.wait();
                let zeroing = scope.spawn(|| overlay.write_zeroes_at(0, 512, ZeroMode::UNMAP));
                thread::sleep(Duration::from_millis(100));
                let too_early = zeroing.is_finished();
                gate.open();
                request.join().unwrap().unwrap();
                zeroing.join().unwrap().unwrap();
                assert!(!too_early, "zeroed with a request in the slot, reading: {reading}");
            });
            let mut shown = [1; 512];
            overlay.read_at(&mut shown, 0).unwrap();
            assert_eq!(shown, [0; 512]);
        }
    }

    /// A disk of the largest size that is never read for what nobody asks.
    fn huge() -> (Arc<TraceDevice>, Overlay) {
        #[derive(Debug)]
        struct Endless;
        impl BlockDevice for Endless {
            fn size(&self) -> u64 {
                1 << 50
            }
            fn read_only(&self) -> bool {
                true
            }
            fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
                buf.fill(1);
                Ok(())
            }
            fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
                Err(Error::read_only())
            }
            fn write_zeroes_at(&self, _: u64, _: u64, _: ZeroMode) -> Result<()> {
                Err(Error::read_only())
            }
            fn discard_at(&self, _: u64, _: u64) -> Result<()> {
                Err(Error::read_only())
            }
            fn flush(&self) -> Result<()> {
                Ok(())
            }
            fn layer_extent(&self, _offset: u64, max_len: u64) -> Result<LayerExtent> {
                Ok(LayerExtent::new(Stored::Data, max_len))
            }
        }
        let base = Arc::new(TraceDevice::new(Arc::new(Endless)));
        let overlay = Overlay::new(Arc::clone(&base) as _, Arc::new(MemStorage::new()), 65536).unwrap();
        (base, overlay)
    }

    #[test]
    fn large_ranges_cost_little() {
        let (base, overlay) = huge();
        let all = overlay.layer_extent(0, u64::MAX).unwrap();
        assert_eq!((all.stored, all.len), (Stored::Absent, 1 << 50));
        overlay.discard_at(0, 1 << 50).unwrap();
        overlay.write_zeroes_at(1 << 30, 1 << 40, ZeroMode::UNMAP).unwrap();
        overlay.write_at(&[5; 10], (1 << 30) + 7).unwrap();
        assert_eq!(overlay.store_bytes(), 65536);
        let zeros = overlay.layer_extent((1 << 30) + 65536, 1 << 49).unwrap();
        assert_eq!((zeros.stored, zeros.len), (Stored::Zero, (1 << 40) - 65536));
        assert_eq!(base.take(), []);
        let mut buf = [9; 8];
        overlay.read_at(&mut buf, (1 << 30) + 3).unwrap();
        assert_eq!(buf, [0, 0, 0, 0, 5, 5, 5, 5]);
        overlay.read_at(&mut buf, 4096).unwrap();
        assert_eq!((buf, base.take()), ([1; 8], vec![Trace::Read { offset: 4096, len: 8 }]));
    }

    #[test]
    fn the_base_is_read_only_for_blocks_written_in_part() {
        let (base, overlay) = huge();
        overlay.write_at(&vec![1; 65536 * 3], 65536).unwrap();
        assert_eq!(base.take(), []);
        overlay.write_at(&[1; 65537], 65536 * 9).unwrap();
        assert_eq!(base.take(), [Trace::Read { offset: 65536 * 10, len: 65536 }]);
    }

    #[test]
    fn bad_block_sizes_and_places_are_refused() {
        let (_, base) = base(4);
        for block_size in [0, 1, 256, 513, 65537] {
            let made = Overlay::new(Arc::clone(&base), Arc::new(MemStorage::new()), block_size);
            assert_eq!(made.unwrap_err().kind(), ErrorKind::Usage);
        }
        let overlay = Overlay::new(base, Arc::new(MemStorage::new()), 512).unwrap();
        assert_eq!(overlay.write_at(&[0; 2], SIZE - 1).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(overlay.layer_extent(SIZE, 1).unwrap_err().kind(), ErrorKind::OutOfRange);
        overlay.resize(SIZE + 512, crate::Preallocation::Off).unwrap_err();
    }
}

//! Making the changes of the log: on the disk, or, where the file must not be written, as a view of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use block::num::to_usize;
use block::{Error, ErrorKind, HostExtent, Result, Storage, ZeroMode};

use super::entry::{self, Change, Kept};
use super::scan::{Located, active_sequence};
use super::{Ring, SECTOR};
use crate::Guid;

/// The longest active sequence that is replayed, in bytes. The logs that are met have 1 MiB.
const MAX_SEQUENCE: u64 = 64 << 20;
/// The most changes that are remembered at once: an entry can be full of descriptors without data.
const MAX_CHANGES: usize = 1 << 20;
/// The headers, which never change through the log.
const HEADERS_END: u64 = 192 << 10;

/// What becomes of a range of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Patch {
    Zero { end: u64 },
    Data(Kept),
}

impl Patch {
    fn end(&self, start: u64) -> u64 {
        match *self {
            Self::Zero { end } => end,
            Self::Data(_) => start + SECTOR,
        }
    }
}

/// What a log that has been left behind makes of the file.
#[derive(Debug, Clone)]
pub struct Replay {
    ring: Ring,
    /// By their first byte; they do not overlap.
    patches: BTreeMap<u64, Patch>,
    /// Length of the file afterwards.
    len: u64,
}

impl Replay {
    /// Reads the log at `log` (first byte and length) of `storage`. `None`: it has no entries.
    ///
    /// # Errors
    /// It is damaged, contradicts the file, or is larger than what is replayed here; the host failed.
    pub fn read(storage: &Arc<dyn Storage>, log: (u64, u64), guid: Guid) -> Result<Option<Self>> {
        let ring = Ring::new(Arc::clone(storage), log.0, log.1);
        let sequence = active_sequence(&ring, guid)?;
        let Some(last) = sequence.last() else { return Ok(None) };
        let file_len = storage.len()?;
        if file_len < last.head.flushed_file_offset {
            return Err(Error::new(
                ErrorKind::Truncated,
                format!(
                    "the VHDX file has {file_len:#x} bytes, and its log is for one of at least {:#x}",
                    last.head.flushed_file_offset
                ),
            ));
        }
        let total: u64 = sequence.iter().map(|entry| entry.head.length).sum();
        if total > MAX_SEQUENCE {
            return Err(too_large());
        }
        let len = file_len.max(last.head.last_file_offset);
        let mut replay = Self { ring, patches: BTreeMap::new(), len };
        sequence.iter().try_for_each(|entry| replay.add_entry(entry, log))?;
        Ok(Some(replay))
    }

    fn add_entry(&mut self, entry: &Located, log: (u64, u64)) -> Result<()> {
        let changes = entry::read(&self.ring, entry.position, &entry.head)?;
        let changes =
            changes.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the VHDX log changes while it is read"))?;
        for change in changes {
            let (offset, end) = match change {
                Change::Zero { offset, len } => (offset, (offset + len).min(self.len)),
                Change::Data { offset, .. } => (offset, offset + SECTOR),
            };
            self.check_place(offset, end, log)?;
            match change {
                _ if end <= offset => {} // Zeros behind the end are there already.
                Change::Zero { .. } => self.add(offset, Patch::Zero { end }),
                Change::Data { kept, .. } => self.add(offset, Patch::Data(kept)),
            }
            if self.patches.len() > MAX_CHANGES {
                return Err(too_large());
            }
        }
        Ok(())
    }

    /// The log changes neither the headers nor itself, and nothing behind the end that it says the file has.
    fn check_place(&self, offset: u64, end: u64, (log, log_len): (u64, u64)) -> Result<()> {
        let in_log = offset < log + log_len && log < end;
        if offset < HEADERS_END || in_log || end > self.len {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("the VHDX log has a change for {offset:#x}, where it must not make any"),
            ));
        }
        Ok(())
    }

    /// Puts a patch over those that are there.
    fn add(&mut self, start: u64, patch: Patch) {
        let end = patch.end(start);
        // One that begins before may reach into it, and out of it again.
        if let Some((&before, &old)) = self.patches.range(..start).next_back() {
            let old_end = old.end(before);
            if old_end > start {
                self.patches.insert(before, Patch::Zero { end: start });
                if old_end > end {
                    self.patches.insert(end, Patch::Zero { end: old_end });
                }
            }
        }
        while let Some((&inside, &old)) = self.patches.range(start..end).next() {
            self.patches.remove(&inside);
            let old_end = old.end(inside);
            if old_end > end {
                self.patches.insert(end, Patch::Zero { end: old_end });
            }
        }
        self.patches.insert(start, patch);
    }

    /// The patches that have a byte in `start..end`, with their first byte.
    fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, Patch)> {
        let before = self.patches.range(..start).next_back();
        let before = before.filter(move |(at, patch)| patch.end(**at) > start);
        before.into_iter().chain(self.patches.range(start..end)).map(|(&at, &patch)| (at, patch))
    }

    /// Makes the changes on the disk, durably. What has been made already is made again, so that nothing is lost if
    /// it is interrupted.
    ///
    /// # Errors
    /// The host failed.
    pub fn carry_out(&self, storage: &dyn Storage) -> Result<()> {
        if storage.len()? < self.len {
            storage.set_len(self.len)?;
        }
        for (&offset, patch) in &self.patches {
            match patch {
                Patch::Zero { end } => storage.zero_range(offset, end - offset, ZeroMode::ALLOCATE)?,
                Patch::Data(kept) => storage.write_at(&kept.read(&self.ring)?, offset)?,
            }
        }
        storage.sync()
    }

    /// The file as it would be, over the file as it is.
    pub fn view(self, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(View { storage, replay: self })
    }
}

/// The error for a log that is more than is worth remembering.
pub(super) fn too_large() -> Error {
    Error::unsupported("the VHDX log is larger than what can be replayed here")
        .hint("attach the disk once on the system that it comes from: that replays the log")
}

/// A file with the changes of its log, read-only.
#[derive(Debug)]
struct View {
    storage: Arc<dyn Storage>,
    replay: Replay,
}

impl Storage for View {
    fn len(&self) -> Result<u64> {
        Ok(self.replay.len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.storage.read_at(buf, offset)?;
        let end = offset.saturating_add(buf.len() as u64);
        for (at, patch) in self.replay.within(offset, end) {
            let (from, to) = (at.max(offset), patch.end(at).min(end));
            let part = &mut buf[to_usize(from - offset)..to_usize(to - offset)];
            match patch {
                Patch::Zero { .. } => part.fill(0),
                Patch::Data(kept) => {
                    part.copy_from_slice(
                        &kept.read(&self.replay.ring)?[to_usize(from - at)..to_usize(to - at)],
                    );
                }
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
        let end = offset.saturating_add(max_len).min(self.replay.len);
        let next = self.replay.within(offset, end).next();
        let until = match next {
            Some((at, patch)) if at <= offset => {
                let data = matches!(patch, Patch::Data(_));
                return Ok(HostExtent { data, len: patch.end(at).min(end) - offset });
            }
            Some((at, _)) => at,
            None => end,
        };
        let file_len = self.storage.len()?;
        if offset >= file_len {
            return Ok(HostExtent { data: false, len: until - offset });
        }
        self.storage.extent(offset, until.min(file_len) - offset)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn alignment(&self) -> u32 {
        self.storage.alignment()
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.storage.allocated()
    }

    fn name(&self) -> String {
        self.storage.name()
    }
}

#[cfg(test)]
mod tests {
    use block::mem::MemStorage;

    use super::*;
    use crate::log::entry::tests::{GUID, frame, sector};
    use crate::log::entry::{Frame, build};

    const LOG: (u64, u64) = (1 << 20, 1 << 20);

    fn file() -> Arc<dyn Storage> {
        Arc::new(MemStorage::from_bytes(vec![9; 4 << 20]))
    }

    /// A file with these entries in its log; each is given by its sectors.
    fn logged(entries: &[&[(u64, u8)]], frame: impl Fn(u64) -> Frame) -> Arc<dyn Storage> {
        let storage = file();
        let ring = Ring::new(Arc::clone(&storage), LOG.0, LOG.1);
        let mut position = 0;
        for (sequence, entry) in (1..).zip(entries) {
            let sectors: Vec<_> = entry.iter().map(|&(offset, byte)| sector(offset, byte)).collect();
            let bytes = build(&frame(sequence), &sectors).unwrap();
            ring.write(&bytes, position).unwrap();
            position += bytes.len() as u64;
        }
        storage
    }

    fn read_all(storage: &dyn Storage) -> Vec<u8> {
        let mut bytes = vec![0; to_usize(storage.len().unwrap())];
        storage.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn the_view_and_the_disk_agree() {
        let grown = |sequence| Frame { file_len: 4 << 20, ..frame(sequence, 0) };
        let storage = logged(&[&[(2 << 20, 1), (3 << 20, 2)], &[(2 << 20, 3), ((4 << 20) - 4096, 4)]], grown);
        let replay = Replay::read(&storage, LOG, GUID).unwrap().unwrap();
        let view = replay.clone().view(Arc::clone(&storage));
        let seen = read_all(&*view);
        assert_eq!((seen[(2 << 20) + 5], seen[(3 << 20) + 5], seen[(4 << 20) - 5]), (3, 2, 4));
        assert_eq!((seen[2 << 20], seen[(2 << 20) + 4095], seen[(2 << 20) + 4096]), (1, 2, 9));
        // Any part of it.
        for (offset, len) in [((2 << 20) - 3, 10), ((2 << 20) + 100, 5000), ((4 << 20) - 5, 5)] {
            let mut part = vec![0; len];
            view.read_at(&mut part, offset).unwrap();
            assert_eq!(part, seen[to_usize(offset)..][..len]);
        }
        assert_eq!(view.write_at(&[0], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
        replay.carry_out(&*storage).unwrap();
        assert_eq!(read_all(&*storage), seen);
        replay.carry_out(&*storage).unwrap();
        assert_eq!(read_all(&*storage), seen, "twice is as good as once");
    }

    #[test]
    fn ranges_of_zeros_and_data_replace_each_other() {
        let ring = Ring::new(file(), LOG.0, LOG.1);
        let mut replay = Replay { ring, patches: BTreeMap::new(), len: 4 << 20 };
        let data = || {
            let storage = logged(&[&[(2 << 20, 7)]], |n| frame(n, 0));
            let read = Replay::read(&storage, LOG, GUID).unwrap().unwrap();
            *read.patches.values().next().unwrap()
        };
        let at = |n: u64| (2 << 20) + n * SECTOR;
        replay.add(at(0), Patch::Zero { end: at(10) });
        replay.add(at(4), data());
        replay.add(at(2), Patch::Zero { end: at(3) });
        let ranges = |replay: &Replay| -> Vec<(u64, u64, bool)> {
            let number = |offset: u64| (offset - at(0)) / SECTOR;
            let all = replay.patches.iter();
            all.map(|(s, p)| (number(*s), number(p.end(*s)), matches!(p, Patch::Zero { .. }))).collect()
        };
        assert_eq!(ranges(&replay), [(0, 2, true), (2, 3, true), (3, 4, true), (4, 5, false), (5, 10, true)]);
        replay.add(at(1), Patch::Zero { end: at(7) });
        assert_eq!(ranges(&replay), [(0, 1, true), (1, 7, true), (7, 10, true)]);
        let mut byte = [0; 2];
        let view = replay.view(file());
        view.read_at(&mut byte, at(10) - 1).unwrap();
        assert_eq!(byte, [0, 9]);
        assert_eq!(view.extent(at(0) - 8, 100).unwrap(), HostExtent { data: true, len: 8 });
        assert_eq!(view.extent(at(0), 100_000).unwrap(), HostExtent { data: false, len: 4096 });
    }

    #[test]
    fn changes_where_none_may_be_are_refused() {
        let kind = |offset| {
            let storage = logged(&[&[(offset, 1)]], |n| frame(n, 0));
            Replay::read(&storage, LOG, GUID).map(|_| ()).map_err(|error| error.kind())
        };
        assert_eq!(kind(64 << 10), Err(ErrorKind::Corrupt));
        assert_eq!(kind((1 << 20) + 8192), Err(ErrorKind::Corrupt));
        assert_eq!(kind(4 << 20), Err(ErrorKind::Corrupt), "behind the end");
        assert_eq!(kind(192 << 10), Ok(()));
    }

    #[test]
    fn a_file_that_has_become_shorter_than_its_log_knows_is_refused() {
        let storage = logged(&[&[(2 << 20, 1)]], |n| frame(n, 0));
        storage.set_len((4 << 20) - 1).unwrap();
        assert_eq!(Replay::read(&storage, LOG, GUID).unwrap_err().kind(), ErrorKind::Truncated);
    }
}

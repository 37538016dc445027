//! Metadata: what `NBD_CMD_BLOCK_STATUS` says about a range.

use block::extent::{Extent, Walker};
use block::{Result, Stored};

use super::export::{Context, Export};
use super::request::Range;
use crate::proto::allocation;

/// The most extents of one answer; a client that wants the rest asks again.
const MAX_EXTENTS: usize = 1 << 14;

/// A run of bytes in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Bytes, at least 1.
    pub(super) len: u64,
    /// What it means depends on the context.
    pub(super) state: u64,
}

/// The runs from the start of `range` on, at least one, together no longer than the range; each at most `max_run` bytes.
pub(super) fn runs(
    export: &Export,
    context: Context,
    range: Range,
    one: bool,
    max_run: u64,
) -> Result<Vec<Run>> {
    let mut list = List { runs: vec![], limit: if one { 1 } else { MAX_EXTENTS }, max_run };
    match context {
        Context::Allocation => walk(export, range, &mut list, allocation_state)?,
        Context::Depth => walk(export, range, &mut list, depth_state)?,
        Context::Bitmap(index) => dirty(export, index, range, &mut list),
    }
    Ok(list.runs)
}

/// Runs in the making: neighbours in the same state are one.
struct List {
    runs: Vec<Run>,
    limit: usize,
    max_run: u64,
}

impl List {
    /// Adds a run; `false` if there is no room for (all of) it.
    fn push(&mut self, len: u64, state: u64) -> bool {
        let mut left = len;
        if let Some(last) = self.runs.last_mut().filter(|last| last.state == state) {
            let more = left.min(self.max_run - last.len);
            last.len += more;
            left -= more;
        }
        while left > 0 && self.runs.len() < self.limit {
            let len = left.min(self.max_run);
            self.runs.push(Run { len, state });
            left -= len;
        }
        left == 0
    }
}

fn walk(export: &Export, range: Range, list: &mut List, state: fn(&Extent) -> u64) -> Result<()> {
    let mut walker = Walker::new(&*export.device, u32::MAX);
    let (mut offset, end) = (range.offset, range.offset + range.len);
    while offset < end {
        let extent = walker.extent(offset, end - offset)?;
        if !list.push(extent.len, state(&extent)) {
            break;
        }
        offset = extent.end();
    }
    Ok(())
}

fn allocation_state(extent: &Extent) -> u64 {
    match extent.stored {
        Stored::Data if extent.zero => allocation::ZERO,
        Stored::Data | Stored::Compressed => 0,
        Stored::Zero | Stored::Absent => allocation::HOLE | allocation::ZERO,
    }
}

/// 0: nowhere; 1: in the first layer, 2: in the one behind it, and so on.
fn depth_state(extent: &Extent) -> u64 {
    if extent.stored == Stored::Absent { 0 } else { u64::from(extent.depth) + 1 }
}

fn dirty(export: &Export, index: usize, range: Range, list: &mut List) {
    let end = range.offset + range.len;
    let mut covered = range.offset;
    if let Some((_, bitmap)) = export.bitmaps.get(index) {
        for extent in bitmap.extents(range.offset, end.min(bitmap.len())) {
            if !list.push(extent.len, u64::from(extent.dirty)) {
                return;
            }
            covered = extent.offset + extent.len;
        }
    }
    // What the bitmap does not know (the disk has grown since it was read) counts as changed.
    if covered < end {
        list.push(end - covered, 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use block::mem::MemStorage;
    use block::overlay::Overlay;
    use block::raw::Raw;
    use block::{BlockDevice as _, DirtyBitmap};

    use super::*;
    use crate::server::export::ExportOptions;

    fn run(len: u64, state: u64) -> Run {
        Run { len, state }
    }

    #[test]
    fn runs_are_merged_and_cut() {
        let mut list = List { runs: vec![], limit: 3, max_run: 100 };
        assert!(list.push(60, 0) && list.push(30, 0) && list.push(30, 0));
        assert_eq!(list.runs, [run(100, 0), run(20, 0)]);
        assert!(list.push(5, 1));
        assert!(!list.push(5, 0));
        assert_eq!(list.runs.len(), 3);
    }

    #[test]
    fn depth_and_bitmaps_are_told() {
        let base = Arc::new(
            Raw::open(Arc::new(MemStorage::from_bytes(vec![7; 1 << 20])), Default::default()).unwrap(),
        );
        let top = Overlay::new(base, Arc::new(MemStorage::new()), 65536).unwrap();
        top.write_at(&[1; 65536], 65536).unwrap();
        let mut export = Export::new("", Arc::new(top), ExportOptions::default());
        let bitmap = DirtyBitmap::new(1 << 19, 16);
        bitmap.set(65536, 1);
        export.bitmaps.push(("b".to_owned(), Arc::new(bitmap)));
        let all = Range { offset: 0, len: 1 << 20 };
        let depth = runs(&export, Context::Depth, all, false, u64::MAX).unwrap();
        assert_eq!(depth, [run(65536, 2), run(65536, 1), run((1 << 20) - 131_072, 2)]);
        let dirty = runs(&export, Context::Bitmap(0), all, false, u64::MAX).unwrap();
        assert_eq!(dirty, [run(65536, 0), run(65536, 1), run((1 << 19) - 131_072, 0), run(1 << 19, 1)]);
        let one = runs(&export, Context::Depth, all, true, u64::MAX).unwrap();
        assert_eq!(one, [run(65536, 2)]);
    }
}

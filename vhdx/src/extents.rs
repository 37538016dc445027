//! What the image stores where.

use block::{LayerExtent, Result, Stored};

use crate::bat::{Entry, State};
use crate::device::{Place, Vhdx};

/// The most blocks that one answer covers.
const MAX_BLOCKS: u64 = 1 << 16;

/// Part of a block that is stored in one way.
#[derive(Debug, Clone, Copy)]
struct Part {
    stored: Stored,
    host: Option<u64>,
    len: u64,
}

impl Part {
    /// Whether `next` behind this is more of the same.
    fn goes_on_with(&self, next: &Self) -> bool {
        self.stored == next.stored && self.host.map(|host| host + self.len) == next.host
    }
}

impl Vhdx {
    /// What is stored at `offset`, for at most `max_len` bytes of the disk: block by block as long as it is the same.
    pub(crate) fn extent_at(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let end = offset + max_len;
        let mut all = self.part(offset, end)?;
        for _ in 0..MAX_BLOCKS {
            let at = offset + all.len + self.alike(&all, offset + all.len, end)?;
            all.len = at - offset;
            if at >= end {
                break;
            }
            // An error in a later block is that block's, not this answer's.
            let Ok(next) = self.part(at, end) else { break };
            if !all.goes_on_with(&next) {
                break;
            }
            all.len += next.len;
        }
        self.with_holes(&all)
    }

    /// How many bytes of whole blocks from `offset` on, the start of a block, have the same entry as those before them:
    /// disks are empty by the million blocks.
    fn alike(&self, before: &Part, offset: u64, end: u64) -> Result<u64> {
        let size = self.geometry.block_size;
        let (block, whole) = (offset / size, (end.saturating_sub(offset)) / size);
        if !offset.is_multiple_of(size) || whole == 0 || before.host.is_some() {
            return Ok(0);
        }
        let differencing = self.is_differencing();
        let wanted = |entry: Entry| match entry.state() {
            State::NotPresent if differencing => before.stored == Stored::Absent,
            State::NotPresent | State::Undefined | State::Zero | State::Unmapped => {
                before.stored == Stored::Zero
            }
            State::FullyPresent | State::PartiallyPresent | State::Reserved => false,
        };
        let most = whole.min(self.geometry.blocks_in_a_row(block));
        Ok(self.table.count(self.geometry.entry_of(block), most, wanted)? * size)
    }

    /// What is stored at `offset` until at most `end`, in one block.
    fn part(&self, offset: u64, end: u64) -> Result<Part> {
        let (block, within) = (offset / self.geometry.block_size, offset % self.geometry.block_size);
        let len = (self.geometry.block_size - within).min(end - offset);
        let whole = |stored, host| Part { stored, host, len };
        Ok(match self.place(block)? {
            Place::Zero => whole(Stored::Zero, None),
            Place::Parent => whole(Stored::Absent, None),
            Place::File(at) => whole(Stored::Data, Some(at + within)),
            Place::Partly(at, bits) => match self.run_at(&bits, within, len) {
                (true, len) => Part { stored: Stored::Data, host: Some(at + within), len },
                (false, len) => Part { stored: Stored::Absent, host: None, len },
            },
        })
    }

    /// Blocks are large, and what has never been written in them is a hole of the file.
    fn with_holes(&self, part: &Part) -> Result<LayerExtent> {
        let Some(host) = part.host else { return Ok(LayerExtent::new(part.stored, part.len)) };
        let found = self.storage.extent(host, part.len)?;
        let extent = LayerExtent::new(part.stored, found.len.min(part.len)).at(host);
        Ok(LayerExtent { reads_zero: !found.data, ..extent })
    }
}

//! What is served: disks under names.

use std::sync::Arc;

use block::{BlockDevice, DirtyBitmap};

use super::stats::Counters;
use crate::proto::{ALLOCATION_DEPTH, DIRTY_BITMAP, HeaderStyle, allocation, transmission};

/// What becomes of zeros that a client writes (qemu's `--detect-zeroes`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are written like anything else.
    #[default]
    Off,
    /// They are written as zeros that keep their space.
    On,
    /// They are written as zeros that give back their space.
    Unmap,
}

/// How an export treats what clients ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportOptions {
    /// Writes are refused, whatever the disk allows.
    pub read_only: bool,
    /// `NBD_CMD_TRIM` gives space back; otherwise it is accepted and nothing happens (`--discard`).
    pub discard: bool,
    /// What becomes of zeros.
    pub detect_zeroes: DetectZeroes,
    /// Every write is durable before it is answered (`--cache writethrough`).
    pub write_through: bool,
    /// `NBD_CMD_RESIZE` is served.
    pub resizable: bool,
    /// Several connections at once are promised to see each other's writes.
    pub multi_conn: bool,
    /// Every byte of the disk has its place in the host's file for good (a raw image): what is read may be sent from there
    /// while others write.
    pub in_place: bool,
    /// The context `qemu:allocation-depth` is offered.
    pub allocation_depth: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            discard: true,
            detect_zeroes: DetectZeroes::Off,
            write_through: false,
            resizable: false,
            multi_conn: true,
            in_place: false,
            allocation_depth: false,
        }
    }
}

/// A disk under a name.
#[derive(Debug)]
pub struct Export {
    /// What clients ask for; at most 4096 bytes. The empty name is the default export's.
    pub name: String,
    /// A word for people; at most 4096 bytes.
    pub description: String,
    /// The disk.
    pub device: Arc<dyn BlockDevice>,
    /// How it is served.
    pub options: ExportOptions,
    /// Bitmaps that are offered as contexts, by name.
    pub bitmaps: Vec<(String, Arc<DirtyBitmap>)>,
    /// What clients have done with it.
    pub counters: Counters,
}

/// A metadata context of an export. The number of a context on the wire is its place among
/// [`Export::contexts`] plus one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    Depth,
    /// `qemu:dirty-bitmap:NAME`, the bitmap at this place.
    Bitmap(usize),
}

impl Export {
    /// A disk under a name, without description or bitmaps.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>, options: ExportOptions) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            device,
            options,
            bitmaps: vec![],
            counters: Counters::default(),
        }
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.options.read_only || self.device.read_only()
    }

    /// The transmission flags on a connection with these headers.
    pub fn flags(&self, style: HeaderStyle) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_CACHE;
        if self.read_only() {
            flags |= transmission::READ_ONLY;
        } else {
            flags |= transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO;
            if self.options.resizable {
                flags |= transmission::SEND_RESIZE;
            }
        }
        if self.options.multi_conn {
            flags |= transmission::CAN_MULTI_CONN;
        }
        match style {
            HeaderStyle::Simple => {}
            HeaderStyle::Structured => flags |= transmission::SEND_DF,
            HeaderStyle::Extended => flags |= transmission::SEND_DF | transmission::BLOCK_STATUS_PAYLOAD,
        }
        flags
    }

    /// Minimum, preferred and maximum block size in bytes. Any alignment is served; the maximum is that of a payload.
    pub fn block_sizes(&self, max_payload: u32) -> (u32, u32, u32) {
        let preferred = self.device.limits().preferred.clamp(512, max_payload);
        let preferred = if preferred.is_power_of_two() { preferred } else { 4096 };
        (1, preferred.max(4096), max_payload)
    }

    /// The contexts, in the order of their numbers.
    pub fn contexts(&self) -> impl Iterator<Item = (u32, Context)> + '_ {
        let depth = self.options.allocation_depth.then_some(Context::Depth);
        std::iter::once(Context::Allocation)
            .chain(depth)
            .chain((0..self.bitmaps.len()).map(Context::Bitmap))
            .zip(1..)
            .map(|(context, id)| (id, context))
    }

    /// The name of a context on the wire.
    pub fn context_name(&self, context: Context) -> String {
        match context {
            Context::Allocation => allocation::CONTEXT.to_owned(),
            Context::Depth => ALLOCATION_DEPTH.to_owned(),
            Context::Bitmap(index) => {
                let name = self.bitmaps.get(index).map_or("", |(name, _)| name.as_str());
                format!("{DIRTY_BITMAP}{name}")
            }
        }
    }

    /// Whether a query stands for a context: its exact name or, when `list`ing, a namespace (`base:`, `qemu:`,
    /// `qemu:dirty-bitmap:`).
    pub fn matches(&self, query: &str, context: Context, list: bool) -> bool {
        let name = self.context_name(context);
        name == query
            || (list && ["base:", "qemu:", DIRTY_BITMAP].contains(&query) && name.starts_with(query))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;
    use block::raw::Raw;

    fn export() -> Export {
        let disk = Raw::open(Arc::new(MemStorage::from_bytes(vec![0; 4096])), Default::default()).unwrap();
        let mut export = Export::new("x", Arc::new(disk), ExportOptions::default());
        export.options.allocation_depth = true;
        export.bitmaps.push(("b".to_owned(), Arc::new(DirtyBitmap::new(4096, 9))));
        export
    }

    fn matching(query: &str, list: bool) -> Vec<String> {
        let export = export();
        let contexts = export.contexts().filter(|(_, context)| export.matches(query, *context, list));
        contexts.map(|(_, context)| export.context_name(context)).collect()
    }

    #[test]
    fn queries_choose_exact_names_and_list_whole_namespaces() {
        assert_eq!(matching("base:allocation", false), ["base:allocation"]);
        assert_eq!(matching("base:", false), Vec::<String>::new());
        assert_eq!(matching("base:", true), ["base:allocation"]);
        assert_eq!(matching("qemu:", true), ["qemu:allocation-depth", "qemu:dirty-bitmap:b"]);
        assert_eq!(matching("qemu:dirty-bitmap:", true), ["qemu:dirty-bitmap:b"]);
        assert_eq!(matching("qemu:dirty-bitmap:c", true), Vec::<String>::new());
        assert_eq!(matching("", true), Vec::<String>::new());
    }

    #[test]
    fn a_read_only_export_offers_nothing_that_writes() {
        let mut export = export();
        export.options.read_only = true;
        let flags = export.flags(HeaderStyle::Extended);
        assert_ne!(flags & transmission::READ_ONLY, 0);
        assert_eq!(flags & (transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES), 0);
        assert_ne!(flags & transmission::SEND_DF, 0);
        assert_eq!(export.flags(HeaderStyle::Simple) & transmission::SEND_DF, 0);
    }
}

//! Where each byte of a disk comes from: the document of `map`.

use block::extent::{Extent, extents};
use block::{Error, Stored};

use crate::format::Format;
use crate::open::Layer;

/// A line of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Hops down the chain to the layer that answers.
    pub depth: u32,
    /// Whether any layer stores it.
    pub present: bool,
    /// Whether it is known to read as zeros.
    pub zero: bool,
    /// Whether bytes have to be read.
    pub data: bool,
    /// Whether they have to be inflated.
    pub compressed: bool,
    /// Where the bytes lie in the file of the layer.
    pub offset: Option<u64>,
}

impl Entry {
    fn of(extent: &Extent) -> Self {
        let compressed = extent.stored == Stored::Compressed;
        Self {
            start: extent.offset,
            len: extent.len,
            depth: extent.depth,
            present: extent.stored != Stored::Absent,
            zero: extent.zero,
            data: compressed || extent.stored == Stored::Data,
            compressed,
            offset: extent.host_offset,
        }
    }

    /// The bytes of a raw file's last sector that the file does not have.
    const fn past_the_end(start: u64, len: u64, depth: u32) -> Self {
        let offset = Some(start);
        Self { start, len, depth, present: true, zero: true, data: false, compressed: false, offset }
    }

    /// Whether `next` is the same in every way and contiguous.
    fn continued_by(&self, next: &Self) -> bool {
        let flags = |entry: &Self| (entry.depth, entry.present, entry.zero, entry.data, entry.compressed);
        self.start + self.len == next.start
            && flags(self) == flags(next)
            && self.offset.map(|offset| offset + self.len) == next.offset
    }

    /// What qemu-img prints where there is nothing to print.
    const fn nothing(start: u64) -> Self {
        Self {
            start,
            len: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
        }
    }

    /// One object of the JSON list, without brackets around the list.
    pub fn to_json(&self) -> String {
        let offset = self.offset.map_or_else(String::new, |offset| format!(", \"offset\": {offset}"));
        format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
             \"compressed\": {}{offset}}}",
            self.start, self.len, self.depth, self.present, self.zero, self.data, self.compressed
        )
    }
}

/// The part of a disk that is to be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    /// First byte.
    pub start: u64,
    /// At most this many bytes.
    pub max_len: Option<u64>,
}

/// Walks the entries of a disk, in order; neighbours that continue each other are one.
///
/// # Errors
/// The host failed, or a table is corrupt; or what `visit` says.
pub fn walk<E: From<Error>>(
    layer: &Layer,
    window: Window,
    mut visit: impl FnMut(Entry) -> Result<(), E>,
) -> Result<(), E> {
    let device = layer.device();
    let ends = RawEnds::of(layer);
    let end = window.start.saturating_add(window.max_len.unwrap_or(u64::MAX));
    let mut pending: Option<Entry> = None;
    let mut add = |entry: Entry| match &mut pending {
        Some(last) if last.continued_by(&entry) && own_file(layer, last) == own_file(layer, &entry) => {
            last.len += entry.len;
            Ok(())
        }
        _ => pending.replace(entry).map_or(Ok(()), &mut visit),
    };
    for extent in extents(&*device, window.start, end - window.start) {
        for entry in ends.split(Entry::of(&extent?)).into_iter().flatten() {
            add(entry)?;
        }
    }
    if let Some(tail) = ends.tail(window.start, end) {
        add(tail)?;
    }
    pending.map_or(Ok(()), visit)
}

/// The ends of raw layers that are not whole sectors. qemu rounds them up: the bytes between the end of the file
/// and the end of its last sector are there, and zero.
#[derive(Debug)]
struct RawEnds {
    /// By depth: the length of the file, if its last sector is not whole.
    ends: Vec<Option<u64>>,
}

impl RawEnds {
    fn of(layer: &Layer) -> Self {
        let odd = |layer: &Layer| {
            let size = layer.image.size();
            (layer.format == Format::Raw && !size.is_multiple_of(512)).then_some(size)
        };
        Self { ends: layer.chain().map(odd).collect() }
    }

    fn at(&self, depth: u32) -> Option<u64> {
        usize::try_from(depth).ok().and_then(|depth| self.ends.get(depth)).copied().flatten()
    }

    /// Takes what belongs to the last sector of a backing file off the front of what follows it.
    fn split(&self, entry: Entry) -> [Option<Entry>; 2] {
        let depth = entry.depth.saturating_add(1);
        let Some(end) = self.at(depth).filter(|end| !entry.present && *end == entry.start) else {
            return [Some(entry), None];
        };
        let len = (end.next_multiple_of(512) - end).min(entry.len);
        let rest = Entry { start: end + len, len: entry.len - len, ..entry };
        [Some(Entry::past_the_end(end, len, depth)), (rest.len > 0).then_some(rest)]
    }

    /// The rest of the last sector of the disk itself, as far as it lies in the window.
    fn tail(&self, start: u64, end: u64) -> Option<Entry> {
        let size = self.at(0)?;
        let from = size.max(start);
        let to = size.next_multiple_of(512).min(end);
        (from < to).then(|| Entry::past_the_end(from, to - from, 0))
    }
}

/// Writes the JSON document: one object a line.
///
/// # Errors
/// As [`walk`]; what has been written before stays written.
pub fn write_json<E: From<Error>>(
    layer: &Layer,
    window: Window,
    mut out: impl FnMut(&str) -> Result<(), E>,
) -> Result<(), E> {
    let mut before = "[";
    walk::<E>(layer, window, |entry| {
        let text = format!("{before}{}", entry.to_json());
        before = ",\n";
        out(&text)
    })?;
    if before == "[" {
        out(&format!("[{}", Entry::nothing(window.start).to_json()))?;
    }
    out("]\n")
}

/// Writes the table for people: only what is data and lies somewhere.
///
/// # Errors
/// As [`walk`]; `Unsupported`, in qemu's words, where data has no place of its own.
pub fn write_text<E: From<Error>>(
    layer: &Layer,
    window: Window,
    mut out: impl FnMut(&str) -> Result<(), E>,
) -> Result<(), E> {
    out(&format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File"))?;
    let files: Vec<Option<String>> = layer.chain().map(file_of).collect();
    walk::<E>(layer, window, |entry| {
        if !entry.data {
            return Ok(());
        }
        let file =
            usize::try_from(entry.depth).ok().and_then(|depth| files.get(depth)).and_then(Option::as_ref);
        let own = own_file(layer, &entry);
        let (Some(offset), Some(file)) = (entry.offset, own.as_ref().or(file)) else {
            return Err(no_place().into());
        };
        if !entry.zero {
            out(&format!("{}{}{}{file}\n", hex(entry.start), hex(entry.len), hex(offset)))?;
        }
        Ok(())
    })
}

fn no_place() -> Error {
    Error::unsupported("File contains external, encrypted or compressed clusters.")
        .hint("--output=json shows those, too")
}

/// The file in which an entry lies, of an image whose data is spread over several.
fn own_file(layer: &Layer, entry: &Entry) -> Option<String> {
    let depth = usize::try_from(entry.depth).ok()?;
    layer.chain().nth(depth)?.image.file_at(entry.start)
}

/// The file in which the data of a layer lies.
fn file_of(layer: &Layer) -> Option<String> {
    if (layer.member.is_some() || layer.protocol == "nbd") && layer.data_file.is_none() {
        return Some(layer.source_name.clone());
    }
    layer.data_file.as_ref().or(layer.file.as_ref()).map(|file| file.path().display().to_string())
}

/// A column: C's `%#-16x`, which leaves 0 bare.
fn hex(number: u64) -> String {
    if number == 0 { format!("{:<16}", 0) } else { format!("{number:<#16x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_those_of_the_real_tool() {
        assert_eq!(hex(0), "0               ");
        assert_eq!(hex(0x19000), "0x19000         ");
    }

    #[test]
    fn the_last_sector_of_a_backing_file_is_whole() {
        let ends = RawEnds { ends: vec![None, Some(5220)] };
        let absent = Entry { zero: true, len: 1000, ..Entry::nothing(5220) };
        let [Some(sector), Some(rest)] = ends.split(absent) else { panic!() };
        assert_eq!((sector.start, sector.len, sector.depth, sector.present), (5220, 412, 1, true));
        assert_eq!((rest.start, rest.len, rest.depth, rest.present), (5632, 588, 0, false));
        assert_eq!(ends.split(Entry { start: 5221, ..absent })[1], None);
    }

    #[test]
    fn the_last_sector_of_the_disk_is_whole() {
        let ends = RawEnds { ends: vec![Some(1000)] };
        assert_eq!(ends.tail(0, u64::MAX), Some(Entry::past_the_end(1000, 24, 0)));
        assert_eq!(ends.tail(1010, 1020), Some(Entry::past_the_end(1010, 10, 0)));
        assert_eq!(ends.tail(0, 1000), None);
        assert_eq!(ends.tail(1024, u64::MAX), None);
    }

    #[test]
    fn an_entry_without_a_place_has_no_offset() {
        assert_eq!(
            Entry::nothing(5).to_json(),
            r#"{ "start": 5, "length": 0, "depth": 0, "present": false, "zero": false, "data": false, "compressed": false}"#
        );
    }
}

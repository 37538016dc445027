//! What a disk has seen, for the report.

use block::Error;

use super::Bytes;
use super::request::SECTOR;
use crate::engine::DiskActivity;

fn widen(seen: &mut Option<(u64, u64)>, bytes: &Bytes) {
    if bytes.len == 0 {
        return;
    }
    let (first, last) = (bytes.offset / SECTOR, (bytes.offset + bytes.len - 1) / SECTOR);
    *seen = Some(seen.map_or((first, last), |(a, b)| (a.min(first), b.max(last))));
}

pub(super) fn read(activity: &mut DiskActivity, bytes: &Bytes) {
    activity.reads += 1;
    activity.read_bytes = activity.read_bytes.saturating_add(bytes.len);
    widen(&mut activity.sectors_read, bytes);
}

pub(super) fn write(activity: &mut DiskActivity, bytes: &Bytes) {
    activity.writes += 1;
    activity.written_bytes = activity.written_bytes.saturating_add(bytes.len);
    widen(&mut activity.sectors_written, bytes);
}

pub(super) fn error(activity: &mut DiskActivity, error: &Error) {
    activity.errors += 1;
    activity.first_error.get_or_insert_with(|| error.to_string());
}

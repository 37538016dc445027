//! What the server has said of its extents, for as long as it is true.

use super::reply::Status;

/// The extents of one range, as the server gave them last.
#[derive(Debug, Default)]
pub(super) struct Extents {
    start: u64,
    /// Where each ends, and its flags; ascending.
    ends: Vec<(u64, u64)>,
    /// Counts changes of the disk.
    generation: u64,
}

impl Extents {
    /// The flags at `offset`, and for how many bytes they hold.
    pub(super) fn at(&self, offset: u64) -> Option<(u64, u64)> {
        if offset < self.start {
            return None;
        }
        let index = self.ends.partition_point(|(end, _)| *end <= offset);
        self.ends.get(index).map(|(end, flags)| (end - offset, *flags))
    }

    /// To be asked before a question is sent to the server.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Keeps an answer, unless the disk has been changed since the question was sent.
    pub(super) fn keep(&mut self, generation: u64, start: u64, size: u64, statuses: &[Status]) {
        if generation != self.generation {
            return;
        }
        self.start = start;
        self.ends.clear();
        let mut end = start;
        for status in statuses {
            end = end.saturating_add(status.len).min(size);
            self.ends.push((end, status.flags));
        }
    }

    /// The disk changes at `offset..offset + len`.
    pub(super) fn change(&mut self, offset: u64, len: u64) {
        self.generation += 1;
        let end = self.ends.last().map_or(self.start, |(end, _)| *end);
        if offset < end && offset.saturating_add(len) > self.start {
            self.ends.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_known_until_the_disk_changes() {
        let mut extents = Extents::default();
        let said = [Status { len: 10, flags: 1 }, Status { len: 100, flags: 2 }];
        extents.keep(extents.generation(), 5, 50, &said);
        assert_eq!((extents.at(4), extents.at(5), extents.at(14)), (None, Some((10, 1)), Some((1, 1))));
        assert_eq!((extents.at(15), extents.at(49), extents.at(50)), (Some((35, 2)), Some((1, 2)), None));
        let before = extents.generation();
        extents.change(50, 5);
        assert_eq!(extents.at(5), Some((10, 1)), "elsewhere");
        extents.change(49, 1);
        assert_eq!(extents.at(5), None);
        extents.keep(before, 5, 50, &said);
        assert_eq!(extents.at(5), None, "an answer that a change has overtaken");
    }
}

//! Examining the tables of an extent, and making the two copies of them equal again.
//!
//! qemu-img looks for grains past the end of the file, and stops at the first. This looks at every entry of both
//! copies. Where the copies disagree, the one that can be right is taken; where both can be, the one that knows of a
//! grain that the other does not: a table that has been lost is mostly zeros.
//!
//! A repair changes one entry after the other, each from one that is wrong to one that is right, so that it can be
//! interrupted anywhere. A table that has lost its place is written anew at the end of the file before any directory
//! names it, and so is one that lies where something else does ([`places`](super::places)); nothing that is there is ever
//! written over but the entry itself.

use std::collections::HashMap;

use block::Result;
use block::image::{CheckReport, Repair};
use block::num::{align_up, to_usize};

use super::places::Places;
use super::tables::{Choice, Copy, Tables, ZERO_GRAIN};
use crate::SECTOR;
use crate::header::{Header, UNCLEAN_AT, flags};

/// Grains below this many sectors are more than it pays to keep a record of.
const MIN_TRACKED_GRAIN: u64 = 8;

/// Checks an extent that nobody is writing to, and repairs it if asked to.
pub(super) fn check(tables: &Tables, report: &mut CheckReport, repair: Repair) -> Result<()> {
    let mut walk = Walk {
        tables,
        report,
        repair: repair == Repair::All && !tables.storage.read_only(),
        used: Used::new(tables.header.grain),
        places: Places::look(tables)?,
        directories: vec![],
    };
    walk.file_length()?;
    if walk.directories()? {
        for index in 0..tables.header.gd_entries() {
            walk.table(index)?;
        }
    }
    walk.finish()
}

/// Places of the file that something refers to, in grains.
struct Used {
    grain: u64,
    words: HashMap<u64, Box<[u64; 64]>>,
}

impl Used {
    fn new(grain: u64) -> Self {
        Self { grain, words: HashMap::new() }
    }

    /// Takes the grain at a sector; whether nobody else has it.
    fn take(&mut self, sector: u64) -> bool {
        if self.grain < MIN_TRACKED_GRAIN {
            return true;
        }
        let index = sector / self.grain;
        let words = self.words.entry(index / 4096).or_insert_with(|| Box::new([0; 64]));
        let (word, bit) = (&mut words[to_usize(index % 4096 / 64)], 1_u64 << (index % 64));
        let free = *word & bit == 0;
        *word |= bit;
        free
    }
}

/// A table of one copy.
struct Table {
    /// Where it begins, in bytes.
    at: u64,
    entries: Vec<u32>,
}

struct Walk<'a> {
    tables: &'a Tables,
    report: &'a mut CheckReport,
    repair: bool,
    used: Used,
    places: Places,
    /// Directory entries to be written once the tables that they name are on the disk: place and value.
    directories: Vec<(u64, u32)>,
}

impl Walk<'_> {
    fn header(&self) -> &Header {
        &self.tables.header
    }

    fn has_copies(&self) -> bool {
        self.header().has(flags::REDUNDANT)
    }

    /// Notes a problem; `fixed` says that it is one no more.
    fn problem(&mut self, fixed: bool, text: &str) {
        if fixed {
            self.report.corruptions_fixed += 1;
            self.report.say(format!("Repaired: {text}"));
        } else {
            self.report.corruptions += 1;
            self.report.say(format!("ERROR: {text}"));
        }
    }

    fn file_length(&mut self) -> Result<()> {
        let overhead = self.header().overhead.saturating_mul(SECTOR);
        if !self.tables.inside(overhead)? {
            self.problem(false, &format!("File truncated, expecting at least {overhead} bytes"));
        }
        Ok(())
    }

    /// Whether there is a directory to go by. One that lies outside the file cannot be repaired: who knows what
    /// else the header says that is not so.
    fn directories(&mut self) -> Result<bool> {
        let main = self.tables.directory(Copy::Main).is_some();
        let redundant = self.tables.directory(Copy::Redundant).is_some();
        if !main {
            self.problem(false, "the grain directory lies outside the file");
        }
        if self.has_copies() && !redundant {
            self.problem(false, "the redundant grain directory lies outside the file");
        }
        Ok(main || redundant)
    }

    /// Checks the table of one directory entry, both copies.
    fn table(&mut self, index: u64) -> Result<()> {
        let main = self.load(Copy::Main, index)?;
        let redundant = if self.has_copies() { self.load(Copy::Redundant, index)? } else { State::Missing };
        match (main, redundant) {
            (State::Missing, State::Missing) => Ok(()),
            (State::There(main), State::Missing) if !self.has_copies() => self.entries(index, &[&main]),
            (State::There(main), State::There(redundant)) => self.entries(index, &[&main, &redundant]),
            (State::There(good), _) => {
                self.restore(Copy::Redundant, index, &good)?;
                self.entries(index, &[&good])
            }
            (_, State::There(good)) => {
                self.restore(Copy::Main, index, &good)?;
                self.entries(index, &[&good])
            }
            _ => {
                let text =
                    format!("grain table {index} lies where no table can be, and there is no other copy");
                self.problem(false, &text);
                Ok(())
            }
        }
    }

    fn load(&mut self, copy: Copy, index: u64) -> Result<State> {
        match self.tables.gde(copy, index)? {
            None => Ok(State::Bad),
            Some(0) => Ok(State::Missing),
            Some(sector) if !self.tables.is_table(sector)? || self.places.is_bad(copy, index) => {
                Ok(State::Bad)
            }
            Some(sector) => {
                let at = u64::from(sector) * SECTOR;
                let entries = self.tables.read_table(at)?;
                let entries = entries.unwrap_or_else(|| vec![0; to_usize(self.header().gtes_per_gt.into())]);
                Ok(State::There(Table { at, entries }))
            }
        }
    }

    /// Checks the entries of a table, and that its copies agree.
    fn entries(&mut self, index: u64, copies: &[&Table]) -> Result<()> {
        let [first, ..] = copies else { return Ok(()) };
        let per_table = u64::from(self.header().gtes_per_gt);
        let last = self.header().capacity.div_ceil(self.header().grain);
        for (within, entry) in first.entries.iter().enumerate() {
            let grain = index * per_table + within as u64;
            if grain >= last {
                break; // Entries past the end of the disk mean nothing.
            }
            let other = copies.get(1).and_then(|copy| copy.entries.get(within)).copied();
            if *entry == 0 && other.unwrap_or(0) == 0 {
                continue;
            }
            let right = match self.tables.choose(grain, *entry, other)? {
                Choice::Take(right) | Choice::Either(right) => right,
                Choice::Neither(fault) => {
                    self.wrong_grain(grain, fault);
                    continue;
                }
            };
            for copy in copies {
                if copy.entries[within] != right {
                    self.set_entry(copy, within, grain, right)?;
                }
            }
            self.take(grain, right);
        }
        Ok(())
    }

    fn wrong_grain(&mut self, grain: u64, fault: &str) {
        let sector = grain * self.header().grain;
        let text = match fault {
            "lies past the end of the file" => format!("cluster offset for sector {sector} points after EOF"),
            _ => format!("cluster offset for sector {sector} {fault}"),
        };
        self.problem(false, &text);
    }

    fn set_entry(&mut self, table: &Table, within: usize, grain: u64, right: u32) -> Result<()> {
        if self.repair {
            self.tables.storage.write_at(&right.to_le_bytes(), table.at + within as u64 * 4)?;
        }
        let sector = grain * self.header().grain;
        self.problem(self.repair, &format!("the copies of the grain table differ for sector {sector}"));
        Ok(())
    }

    fn take(&mut self, grain: u64, entry: u32) {
        if entry > ZERO_GRAIN && !self.used.take(u64::from(entry)) {
            let sector = grain * self.header().grain;
            self.problem(false, &format!("the grain for sector {sector} is that of another sector, too"));
        }
    }

    /// Puts a lost copy of a table at the end of the file.
    fn restore(&mut self, copy: Copy, index: u64, good: &Table) -> Result<()> {
        let which = if copy == Copy::Main { "grain table" } else { "redundant grain table" };
        let text = format!("the {which} {index} has lost its place");
        let Some(directory) = self.tables.directory(copy).filter(|_| self.repair) else {
            self.problem(false, &text);
            return Ok(());
        };
        let storage = &self.tables.storage;
        let end = storage.len()?;
        let place = align_up(end, self.header().grain_bytes()).unwrap_or(end);
        let len = self.header().gt_sectors() * SECTOR;
        let Ok(sector) = u32::try_from(place / SECTOR) else {
            self.problem(false, &format!("{text}, and the file is too large for another"));
            return Ok(());
        };
        if storage.fixed_len() {
            self.problem(false, &format!("{text}, and a device has no room for another"));
            return Ok(());
        }
        let mut bytes: Vec<u8> = good.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        bytes.resize(to_usize(len.next_multiple_of(self.header().grain_bytes().min(1 << 20))), 0);
        storage.write_at(&bytes, place)?;
        self.directories.push((directory + index * 4, sector));
        self.problem(true, &text);
        Ok(())
    }

    /// Lets the directories name the tables that have been written for them, and takes the mark of a crash away.
    fn finish(self) -> Result<()> {
        if !self.repair {
            return Ok(());
        }
        let storage = &self.tables.storage;
        storage.sync()?;
        for (at, sector) in &self.directories {
            storage.write_at(&sector.to_le_bytes(), *at)?;
        }
        if self.tables.header.unclean && self.report.corruptions == 0 {
            storage.write_at(&[0], UNCLEAN_AT)?;
        }
        storage.sync()
    }
}

/// What one copy of a directory says.
enum State {
    /// The table lies where it can.
    There(Table),
    /// There is no table.
    Missing,
    /// The table cannot be where it is said to be.
    Bad,
}

//! How changes of the BAT reach the disk: through the log.
//!
//! A flush is, in this order:
//!
//! 1. the changed sectors of the BAT are copied,
//! 2. *sync*: guest data, new blocks and whatever the previous flush wrote into the BAT are durable,
//! 3. an entry with the sectors is appended to the log, its tail being itself,
//! 4. *sync*: from here on a reader replays the entry,
//! 5. the first time, the header comes to name the log (two syncs),
//! 6. the sectors are written to their places in the BAT; the next flush makes that durable before it appends an
//!    entry, whose tail then leaves this one behind.
//!
//! An entry takes at most half of the ring, so that appending one never touches the last. Naming the log only
//! after its first entry is complete means that there is no moment at which the header names a log without one.
//! Closing makes everything durable and empties the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Error, Result, Storage};
use parking_lot::Mutex;

use crate::Guid;
use crate::header::Headers;
use crate::log::entry::{Frame, build, capacity};
use crate::log::{Ring, SECTOR_LEN};
use crate::region::Region;
use crate::table::{Sector, Table};

/// The most sectors that one entry changes, whatever the length of the log: 4 MiB at a time.
const MAX_SECTORS: u64 = 1024;

/// Writes headers and log.
#[derive(Debug)]
pub(crate) struct Journal {
    storage: Arc<dyn Storage>,
    ring: Ring,
    /// The header says that this session changes the file.
    announced: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    headers: Headers,
    /// Of the entries of this session.
    guid: Guid,
    /// The header names the log.
    named: bool,
    /// Where the next entry begins.
    position: u64,
    /// Its number.
    sequence: u64,
}

impl Journal {
    /// For a file whose log, at `log`, is empty.
    ///
    /// # Errors
    /// The file has no log; the system has no randomness to give.
    pub(crate) fn new(storage: Arc<dyn Storage>, headers: Headers, log: Region) -> Result<Self> {
        if log.length == 0 {
            return Err(Error::invalid("the VHDX file has no log, without which it cannot be written"));
        }
        let ring = Ring::new(Arc::clone(&storage), log.offset, log.length.into());
        let state = State { headers, guid: Guid::random()?, named: false, position: 0, sequence: 1 };
        Ok(Self { storage, ring, announced: AtomicBool::new(false), state: Mutex::new(state) })
    }

    /// To be called before the first change of anything in the file: new GUIDs say that it is not what it was
    /// (section 2.2.2). Durable on return.
    pub(crate) fn announce(&self) -> Result<()> {
        if self.announced.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = self.state.lock();
        if !self.announced.load(Ordering::Acquire) {
            let (file, data) = (Guid::random()?, Guid::random()?);
            state.headers.replace(&*self.storage, |header| {
                (header.file_write_guid, header.data_write_guid) = (file, data);
            })?;
            self.announced.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The GUID that a differencing disk knows this file by.
    pub(crate) fn data_write_guid(&self) -> Guid {
        self.state.lock().headers.current.data_write_guid
    }

    /// Makes everything durable that has been written and that `table` has taken note of.
    pub(crate) fn flush(&self, table: &Table) -> Result<()> {
        let mut state = self.state.lock();
        self.flush_locked(&mut state, table)
    }

    fn flush_locked(&self, state: &mut State, table: &Table) -> Result<()> {
        let sectors = table.take();
        let done = self.storage.len().and_then(|len| {
            self.storage.sync()?;
            self.commit(state, &sectors, len)
        });
        match done {
            Ok(()) => table.landed(),
            Err(_) => table.returned(),
        }
        done
    }

    /// Brings sectors through the log to their places. `file_len` is durable.
    fn commit(&self, state: &mut State, sectors: &[Sector], file_len: u64) -> Result<()> {
        let most = capacity(self.ring.length() / 2).min(MAX_SECTORS);
        for (nth, part) in sectors.chunks(block::num::to_usize(most)).enumerate() {
            if nth > 0 {
                // The entry before is about to be left behind.
                self.storage.sync()?;
            }
            self.append(state, part, file_len)?;
            self.write_in_place(part)?;
        }
        Ok(())
    }

    /// Appends an entry, durably.
    fn append(&self, state: &mut State, sectors: &[Sector], file_len: u64) -> Result<()> {
        let frame = Frame { guid: state.guid, sequence: state.sequence, tail: state.position, file_len };
        let entry = build(&frame, sectors)?;
        self.ring.write(&entry, state.position)?;
        self.storage.sync()?;
        if !state.named {
            let guid = state.guid;
            state.headers.replace(&*self.storage, |header| header.log_guid = guid)?;
            state.named = true;
        }
        state.position = self.ring.advance(state.position, entry.len() as u64);
        state.sequence += 1;
        Ok(())
    }

    /// Writes sectors where they belong, neighbours at once.
    fn write_in_place(&self, sectors: &[Sector]) -> Result<()> {
        let mut run: Vec<u8> = vec![];
        let mut start = 0;
        for (offset, bytes) in sectors {
            if !run.is_empty() && start + run.len() as u64 != *offset {
                self.storage.write_at(&run, start)?;
                run.clear();
            }
            if run.is_empty() {
                start = *offset;
                run.reserve(SECTOR_LEN);
            }
            run.extend_from_slice(&**bytes);
        }
        if run.is_empty() { Ok(()) } else { self.storage.write_at(&run, start) }
    }

    /// Changes sectors of the file that are not of the BAT, through the log. Durable on return.
    pub(crate) fn change(&self, sectors: &[Sector]) -> Result<()> {
        let mut state = self.state.lock();
        let len = self.storage.len()?;
        self.storage.sync()?;
        self.commit(&mut state, sectors, len)
    }

    /// Flushes, and leaves a file whose log is empty.
    pub(crate) fn close(&self, table: &Table) -> Result<()> {
        let mut state = self.state.lock();
        self.flush_locked(&mut state, table)?;
        if state.named {
            self.storage.sync()?;
            state.headers.replace(&*self.storage, |header| header.log_guid = Guid::ZERO)?;
            // What is written from here on gets a log of its own.
            (state.named, state.guid, state.position, state.sequence) = (false, Guid::random()?, 0, 1);
        }
        Ok(())
    }
}

//! From file to socket without a copy in between.
//!
//! Where a chunk's bytes lie in a file as they are, the page cache's pages themselves are handed to the socket, through a
//! pipe. They are put into the pipe before the chunk's header is sent, so that a disk that fails is known of in time.
//!
//! Until the client has received them, such bytes are those of the page, not those that were there when the reply was made.
//! For a client that is no different from a write that comes at the same time, as long as the place in the file goes on
//! belonging to the same place of the disk. A format that gives places away anew must therefore not be written to meanwhile:
//! [`Connection::place`] is where that is decided.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use block::extent::Extent;
use block::{BlockDevice, Storage, Stored};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use parking_lot::Mutex;

use super::super::reply::Replies;
use super::Connection;

/// Bytes of a chunk that goes this way at most.
pub(super) const MOST: u64 = 256 << 10;
/// Below this a copy costs less.
const LEAST: u64 = 32 << 10;
/// Bytes that a pipe has room for: twice as many, for pages that are used in part.
const PIPE_BYTES: i32 = 512 << 10;
/// Pipes of a connection.
const PIPES: usize = 4;

/// A pipe, empty.
#[derive(Debug)]
struct Pipe {
    output: OwnedFd,
    input: OwnedFd,
}

impl Pipe {
    fn new() -> Option<Self> {
        let (output, input) = nix::unistd::pipe2(OFlag::O_CLOEXEC).ok()?;
        fcntl(&input, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES)).ok()?;
        Some(Self { output, input })
    }

    /// Takes `len` bytes of a file in; whether they all are there.
    fn load(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> bool {
        let Ok(mut at) = i64::try_from(offset) else { return false };
        let mut left = len;
        while left > 0 {
            match splice(file, Some(&mut at), &self.input, None, left, SpliceFFlags::SPLICE_F_NONBLOCK) {
                Ok(moved) if moved > 0 => left -= moved,
                Err(Errno::EINTR) => {}
                // The end of the file, a disk that fails, or a full pipe: somebody else's case.
                _ => return false,
            }
        }
        true
    }

    /// Sends what has been taken in.
    fn unload(&self, socket: BorrowedFd<'_>, len: usize) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            match splice(&self.output, None, socket, None, left, SpliceFFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(moved) => left -= moved,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The pipes of a connection. Who finds none left copies.
#[derive(Debug, Default)]
pub(super) struct Pipes(Mutex<Stock>);

#[derive(Debug, Default)]
struct Stock {
    spare: Vec<Pipe>,
    made: usize,
}

impl Pipes {
    fn take(&self) -> Option<Pipe> {
        let mut stock = self.0.lock();
        if let Some(pipe) = stock.spare.pop() {
            return Some(pipe);
        }
        if stock.made == PIPES {
            return None;
        }
        // What cannot be made now will not be made later either.
        stock.made += 1;
        Pipe::new()
    }

    fn put_back(&self, pipe: Pipe) {
        self.0.lock().spare.push(pipe);
    }

    /// A pipe with something in it is of no use any more.
    fn forget(&self) {
        self.0.lock().made -= 1;
    }
}

impl Connection<'_> {
    /// Sends `len` bytes of an extent at guest `offset` as a chunk right from the file that they lie in. `Ok(false)`: nothing
    /// was sent, they have to be read.
    pub(super) fn send_in_place(
        &self,
        replies: &Replies,
        extent: &Extent,
        (offset, len): (u64, u64),
        done: bool,
    ) -> io::Result<bool> {
        if !(LEAST..=MOST).contains(&len) {
            return Ok(false);
        }
        let Some(socket) = self.channel.clear_socket() else { return Ok(false) };
        let Some((storage, place)) = self.place(extent) else { return Ok(false) };
        let place = place + (offset - extent.offset);
        let Some(file) = storage.as_fd() else { return Ok(false) };
        let Some(pipe) = self.pipes.take() else { return Ok(false) };
        let bytes = block::num::to_usize(len);
        let begun = Instant::now();
        let loaded = pipe.load(file, place, bytes);
        self.took(begun, len);
        if !loaded {
            self.pipes.forget();
            return Ok(false);
        }
        let mut header = Vec::with_capacity(64);
        replies.data(offset, bytes, done, &mut header);
        let _turn = self.output.lock();
        self.channel.send_more(&[&header])?;
        pipe.unload(socket.as_fd(), bytes)?;
        self.pipes.put_back(pipe);
        Ok(true)
    }

    /// Where an extent's bytes lie as they are, for as long as the client may take to receive them: in a layer that is not
    /// written to, or whose every byte has its place for good.
    fn place(&self, extent: &Extent) -> Option<(Arc<dyn Storage>, u64)> {
        if extent.stored != Stored::Data || extent.zero {
            return None;
        }
        let mut device: &dyn BlockDevice = &*self.export.device;
        for _ in 0..extent.depth {
            device = &**device.backing()?;
        }
        let stays = device.read_only() || self.export.read_only() || self.export.options.in_place;
        let storage = device.host_storage().filter(|storage| stays && storage.alignment() == 1)?;
        Some((Arc::clone(storage), extent.host_offset?))
    }
}

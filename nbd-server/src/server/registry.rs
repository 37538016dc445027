//! Who is connected, and how to end it from outside.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Result, ResultExt as _};
use parking_lot::Mutex;

use super::Shared;
use crate::channel::{Channel, Shutter};

/// The connections.
#[derive(Debug)]
pub(super) struct Registry {
    inner: Mutex<Inner>,
    wake: UnixStream,
}

/// The end on which whoever waits for changes of the registry waits.
#[derive(Debug)]
pub(super) struct Waker(UnixStream);

#[derive(Debug, Default)]
struct Inner {
    connections: HashMap<u64, Entry>,
    /// A client has chosen an export once.
    had_clients: bool,
}

#[derive(Debug)]
struct Entry {
    shutter: Shutter,
    /// Until when the handshake has to be over.
    deadline: Option<Instant>,
    negotiated: bool,
    late: bool,
}

/// What the accepting thread has to know.
#[derive(Debug)]
pub(super) struct State {
    pub(super) connections: usize,
    pub(super) negotiated: usize,
    pub(super) had_clients: bool,
    /// The next deadline of a handshake.
    pub(super) deadline: Option<Instant>,
}

impl Waker {
    /// Takes note of what has happened.
    pub(super) fn clear(&self) {
        let mut bytes = [0; 64];
        while (&self.0).read(&mut bytes).is_ok_and(|read| read > 0) {}
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Registry {
    pub(super) fn new() -> Result<(Self, Waker)> {
        let (wake, waker) = UnixStream::pair().context(|| "cannot make a socket pair".to_owned())?;
        for stream in [&wake, &waker] {
            stream.set_nonblocking(true)?;
        }
        Ok((Self { inner: Mutex::default(), wake }, Waker(waker)))
    }

    /// Adds a connection, which stays until the place is dropped.
    pub(super) fn enter(
        shared: &Arc<Shared>,
        id: u64,
        channel: &Channel,
        limit: Option<Duration>,
    ) -> Result<Place> {
        let shutter = channel.shutter().context(|| "cannot watch a connection".to_owned())?;
        let deadline = limit.map(|limit| Instant::now() + limit);
        let entry = Entry { shutter, deadline, negotiated: false, late: false };
        shared.registry.inner.lock().connections.insert(id, entry);
        shared.registry.wake();
        Ok(Place { shared: Arc::clone(shared), id })
    }

    pub(super) fn wake(&self) {
        // A full pipe wakes as well.
        let _ = (&self.wake).write(&[1]);
    }

    pub(super) fn negotiated(&self, id: u64) {
        let mut inner = self.inner.lock();
        inner.had_clients = true;
        if let Some(entry) = inner.connections.get_mut(&id) {
            entry.negotiated = true;
            entry.deadline = None;
        }
        drop(inner);
        self.wake();
    }

    pub(super) fn was_late(&self, id: u64) -> bool {
        self.inner.lock().connections.get(&id).is_some_and(|entry| entry.late)
    }

    pub(super) fn len(&self) -> usize {
        self.inner.lock().connections.len()
    }

    pub(super) fn state(&self) -> State {
        let inner = self.inner.lock();
        State {
            connections: inner.connections.len(),
            negotiated: inner.connections.values().filter(|entry| entry.negotiated).count(),
            had_clients: inner.had_clients,
            deadline: inner.connections.values().filter_map(|entry| entry.deadline).min(),
        }
    }

    /// Ends connections whose handshake takes too long.
    pub(super) fn end_late(&self) {
        let now = Instant::now();
        for entry in self.inner.lock().connections.values_mut() {
            if entry.deadline.is_some_and(|deadline| deadline <= now) {
                entry.late = true;
                entry.deadline = None;
                entry.shutter.shutdown();
            }
        }
    }

    /// Ends handshakes, and receiving on the other connections.
    pub(super) fn stop_receiving(&self) {
        for entry in self.inner.lock().connections.values() {
            if entry.negotiated { entry.shutter.shutdown_receive() } else { entry.shutter.shutdown() }
        }
    }

    pub(super) fn end_all(&self) {
        self.inner.lock().connections.values().for_each(|entry| entry.shutter.shutdown());
    }
}

/// A connection's place in the registry.
#[derive(Debug)]
pub(super) struct Place {
    shared: Arc<Shared>,
    id: u64,
}

impl Place {
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.registry.inner.lock().connections.remove(&self.id);
        self.shared.registry.wake();
    }
}

//! The connections to one export: opened as they are wanted, and opened again when they are lost.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use block::{Error, Result};
use parking_lot::Mutex;

use crate::proto::{Errno, HeaderStyle, transmission};
use crate::uri::ExportName;

use super::connection::Connection;
use super::dial::dial;
use super::failure::{Failure, Outcome};
use super::handshake::{ExportInfo, Negotiated, StartTls, Wanted, is_final, negotiate};

/// How long a handshake may take, and a server may be silent in it.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for connections that would only make it faster: a server may leave them waiting in its queue for ever.
const LITTLE_PATIENCE: Duration = Duration::from_secs(3);
/// The first and the longest pause between attempts to connect.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Requests that have found all connections busy before another one is worth its while.
const WORTH_IT: usize = 16;
/// Connections that are useful at most, where nobody says otherwise.
const USEFUL: usize = 4;

/// How to get a connection.
#[derive(Debug)]
struct Origin {
    name: ExportName,
    tls: Option<Arc<dyn StartTls>>,
}

impl Origin {
    fn connect(&self, patience: Duration) -> Outcome<Negotiated> {
        let dialled = dial(&self.name, patience)?;
        let wanted =
            Wanted { export: &self.name.export, tls: self.tls.as_deref(), host: self.name.host(), patience };
        let negotiated = negotiate(dialled.channel, &wanted)?;
        dialled.patience.without_end()?;
        Ok(negotiated)
    }

    /// Connects, again and again until `deadline`.
    fn connect_until(&self, deadline: Instant) -> Outcome<Negotiated> {
        let mut pause = PAUSE.0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let patience =
                if left.is_zero() { PATIENCE } else { left.clamp(Duration::from_secs(1), PATIENCE) };
            match self.connect(patience) {
                Err(failure) if !is_final(&failure) && Instant::now() + pause < deadline => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE.1);
                }
                result => return result,
            }
        }
    }
}

/// A connection, and what has been agreed on for it.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    /// The id of `base:allocation`.
    pub(super) allocation: Option<u32>,
}

impl Link {
    fn new(negotiated: Negotiated) -> Self {
        let Negotiated { channel, style, allocation, .. } = negotiated;
        Self { connection: Connection::new(channel, style), allocation }
    }
}

/// The connections to an export.
#[derive(Debug)]
pub(super) struct Pool {
    origin: Arc<Origin>,
    /// What the server said first; later connections have to agree.
    pub(super) export: ExportInfo,
    pub(super) style: HeaderStyle,
    pub(super) has_allocation: bool,
    most: usize,
    links: Mutex<Links>,
    /// Another connection is being opened, or could not be.
    growing: AtomicBool,
    /// How often there was no idle connection.
    busy: AtomicUsize,
    /// Held while a lost connection is replaced.
    replacing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Links {
    open: Vec<Arc<Link>>,
    /// Why there will be no more.
    dead: Option<Failure>,
}

impl Pool {
    /// Opens the first connection.
    ///
    /// # Errors
    /// It cannot be had.
    pub(super) fn open(name: &ExportName, tls: Option<Arc<dyn StartTls>>) -> Result<Arc<Self>> {
        let origin = Arc::new(Origin { name: name.clone(), tls });
        let first = origin.connect_until(Instant::now() + name.open_timeout).map_err(Error::from)?;
        Ok(Arc::new(Self::with_first(origin, first)))
    }

    fn with_first(origin: Arc<Origin>, first: Negotiated) -> Self {
        let most = match (first.export.can(transmission::CAN_MULTI_CONN), origin.name.connections) {
            (false, _) => 1,
            (true, Some(wanted)) => wanted.max(1),
            (true, None) => thread::available_parallelism().map_or(1, usize::from).clamp(1, USEFUL),
        };
        Self {
            export: first.export.clone(),
            style: first.style,
            has_allocation: first.allocation.is_some(),
            most,
            links: Mutex::new(Links { open: vec![Arc::new(Link::new(first))], dead: None }),
            growing: AtomicBool::new(false),
            busy: AtomicUsize::new(0),
            replacing: Mutex::new(()),
            origin,
        }
    }

    /// A pool whose only connection exists already.
    pub(super) fn of(first: Negotiated, name: ExportName) -> Arc<Self> {
        let name = ExportName { connections: Some(1), ..name };
        Arc::new(Self::with_first(Arc::new(Origin { name, tls: None }), first))
    }

    pub(super) fn name(&self) -> &ExportName {
        &self.origin.name
    }

    /// Carries out a request on some connection; again on another one if that is lost and the user wants to wait for
    /// the server. All requests may be repeated: they do the same again.
    ///
    /// # Errors
    /// The server refuses it, or is gone for good.
    pub(super) fn run<T>(self: &Arc<Self>, mut request: impl FnMut(&Link) -> Outcome<T>) -> Outcome<T> {
        let mut deadline = None;
        let mut pause = PAUSE.0;
        loop {
            let link = self.pick()?;
            let failure = match request(&link) {
                Err(failure @ (Failure::Lost(..) | Failure::Nonsense(_))) => failure,
                // It is about to go away.
                Err(failure @ Failure::Refused { errno: Errno::ESHUTDOWN, .. }) => failure,
                result => return result,
            };
            let now = Instant::now();
            let again = deadline.is_some();
            let deadline = *deadline.get_or_insert(now + self.origin.name.reconnect_delay);
            if is_final(&failure) || now >= deadline {
                self.lose(&link, Some(&failure));
                return Err(failure);
            }
            self.lose(&link, None);
            if again {
                // It came back and went away again.
                thread::sleep(pause);
                pause = (pause * 2).min(PAUSE.1);
            }
            self.replace(deadline)?;
        }
    }

    /// The connection with the least to do. If all have something to do, another one is opened meanwhile.
    fn pick(self: &Arc<Self>) -> Outcome<Arc<Link>> {
        loop {
            let links = self.links.lock();
            let best = links.open.iter().min_by_key(|link| link.connection.in_flight()).cloned();
            let full = links.open.len() >= self.most;
            let dead = links.dead.clone();
            drop(links);
            return match (best, dead) {
                (_, Some(failure)) => Err(failure),
                (Some(link), None) => {
                    if !full && link.connection.in_flight() > 0 {
                        self.grow();
                    }
                    Ok(link)
                }
                (None, None) => {
                    // Somebody is replacing it.
                    drop(self.replacing.lock());
                    thread::yield_now();
                    if self.links.lock().open.is_empty() {
                        self.replace(Instant::now() + self.origin.name.reconnect_delay)?;
                    }
                    continue;
                }
            };
        }
    }

    /// Opens one more connection without anybody waiting for it. If that fails it is not tried again.
    fn grow(self: &Arc<Self>) {
        let busy = self.busy.fetch_add(1, Ordering::Relaxed);
        if busy < WORTH_IT || self.growing.swap(true, Ordering::AcqRel) {
            return;
        }
        let (origin, pool) = (Arc::clone(&self.origin), Arc::downgrade(self));
        // Without a thread it stays as it is.
        let _ = thread::Builder::new().name("nbd-connect".to_owned()).spawn(move || add_link(&origin, &pool));
    }

    /// Gives up a connection, and with a reason all of them.
    fn lose(&self, link: &Arc<Link>, reason: Option<&Failure>) {
        let mut links = self.links.lock();
        links.open.retain(|open| !Arc::ptr_eq(open, link) && !open.connection.is_broken());
        if let Some(reason) = reason {
            links.dead.get_or_insert_with(|| reason.clone());
        }
    }

    /// Makes sure that there is a connection, until `deadline`.
    fn replace(&self, deadline: Instant) -> Outcome<()> {
        let _alone = self.replacing.lock();
        let links = self.links.lock();
        if let Some(failure) = &links.dead {
            return Err(failure.clone());
        }
        if !links.open.is_empty() {
            return Ok(());
        }
        drop(links);
        let found = self.origin.connect_until(deadline).and_then(|found| self.check(&found).map(|()| found));
        let mut links = self.links.lock();
        match found {
            Ok(found) => links.open.push(Arc::new(Link::new(found))),
            Err(failure) => {
                links.dead = Some(failure.clone());
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Whether a new connection leads to the same export.
    fn check(&self, found: &Negotiated) -> Outcome<()> {
        let (old, new) = (&self.export, &found.export);
        let same = old.size == new.size
            && new.can(old.flags)
            && (old.can(transmission::READ_ONLY) || !new.can(transmission::READ_ONLY))
            && new.min_block <= old.min_block
            && new.max_block >= old.max_block
            && self.style == found.style
            && (!self.has_allocation || found.allocation.is_some());
        if same {
            return Ok(());
        }
        Err(Failure::nonsense(format!(
            "after connecting again the export is another one ({} bytes with flags {:#x}; it had {} with {:#x})",
            new.size, new.flags, old.size, old.flags
        )))
    }
}

fn add_link(origin: &Origin, pool: &Weak<Pool>) {
    let Ok(found) = origin.connect(LITTLE_PATIENCE) else { return };
    let Some(pool) = pool.upgrade() else { return };
    if pool.check(&found).is_ok() {
        pool.links.lock().open.push(Arc::new(Link::new(found)));
        pool.growing.store(false, Ordering::Release);
    }
}

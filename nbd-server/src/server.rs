//! The server: any number of clients, any number of exports.
//!
//! ```text
//!   listeners --accept--> a thread per connection: handshake, then transmission (threads as needed)
//!        \                       |
//!         `-- run() ------ registry: who is there, until when the handshake has to be over
//! ```
//!
//! [`Server::run`] accepts connections, ends those that do not finish their handshake in time, and when it is told to
//! stop lets every client's outstanding requests finish before it flushes the disks. Whatever a client does, only its own
//! connection ends.

mod connection;
pub mod event;
pub mod export;
mod handshake;
pub mod listen;
pub mod metrics;
pub mod pool;
mod registry;
mod reply;
mod request;
pub mod stats;
mod status;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use block::{Error, Result, ResultExt as _};

use self::connection::Connection;
use self::event::{Event, Log};
use self::export::Export;
use self::handshake::{Agreement, Failure, negotiate};
use self::listen::Listener;
use self::pool::{Part, Pool};
use self::registry::{Registry, Waker};
use self::stats::{Counters, Counts};
use crate::channel::Channel;
use crate::proto::{DEFAULT_MAX_PAYLOAD, HeaderStyle};
use crate::tls::{Policy, ServerTls};

/// What a server allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once; the next ones wait in the listener's queue.
    pub max_clients: usize,
    /// How long the handshake may take, TLS included.
    pub handshake_timeout: Option<Duration>,
    /// The largest payload of a request or chunk in bytes; at least 1 MiB.
    pub max_payload: u32,
    /// Requests of one connection that are carried out at once.
    pub threads_per_connection: usize,
    /// Memory for large requests of all connections together, in bytes.
    pub pool_bytes: usize,
    /// The same of one connection.
    pub pool_bytes_per_connection: usize,
    /// How long clients may take to receive what they have asked for when the server stops.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_clients: 100,
            handshake_timeout: Some(Duration::from_secs(10)),
            max_payload: DEFAULT_MAX_PAYLOAD,
            threads_per_connection: 16,
            pool_bytes: 48 << 20,
            pool_bytes_per_connection: 8 << 20,
            drain: Duration::from_secs(10),
        }
    }
}

/// Exports that come and go while a server runs. They are listed to nobody, and their owner flushes them.
pub trait Catalogue: std::fmt::Debug + Send + Sync {
    /// The export of this name. Asked several times for one connection, to which it has to give the same export each time.
    fn find(&self, name: &str) -> Option<Arc<Export>>;
}

/// How a server is set up.
#[derive(Debug)]
pub struct Config {
    /// What it serves. Names are different from each other.
    pub exports: Vec<Arc<Export>>,
    /// How clients get TLS.
    pub tls: Option<ServerTls>,
    /// Whether they must.
    pub tls_policy: Policy,
    /// What is allowed.
    pub limits: Limits,
    /// End when the last client that has chosen an export leaves.
    pub once: bool,
    /// Where events go.
    pub log: Arc<dyn Log>,
}

/// Failures of a connection that are told one by one.
const MAX_TOLD: u64 = 100;

/// What all threads of the server know.
#[derive(Debug)]
pub(super) struct Shared {
    config: Config,
    catalogue: OnceLock<Arc<dyn Catalogue>>,
    pool: Arc<Pool>,
    registry: Registry,
    stopping: AtomicBool,
    impatient: AtomicBool,
    next_id: AtomicU64,
    accepted: AtomicU64,
    started: Instant,
}

impl Shared {
    fn exports(&self) -> &[Arc<Export>] {
        &self.config.exports
    }

    fn export(&self, name: &str) -> Option<Arc<Export>> {
        let known = self.config.exports.iter().find(|export| export.name == name).map(Arc::clone);
        known.or_else(|| self.catalogue.get()?.find(name))
    }

    fn tls(&self) -> Option<&ServerTls> {
        self.config.tls.as_ref().filter(|_| self.config.tls_policy != Policy::Off)
    }

    fn tls_policy(&self) -> Policy {
        self.config.tls_policy
    }

    fn max_payload(&self) -> u32 {
        self.config.limits.max_payload.max(1 << 20)
    }

    fn threads_per_connection(&self) -> usize {
        self.config.limits.threads_per_connection.max(1)
    }

    fn part(&self) -> Part {
        Part::new(&self.pool, self.config.limits.pool_bytes_per_connection)
    }

    /// Tells the `count`th failure of a connection. Clients that do nothing but fail do not fill the log.
    fn failed(&self, id: u64, count: u64, what: &str, error: &str) {
        if count < MAX_TOLD {
            self.config.log.event(&Event::Failed { id, what, error });
        } else if count == MAX_TOLD {
            let error = &format!("{error} (further failures of this connection are not told)");
            self.config.log.event(&Event::Failed { id, what, error });
        }
    }

    /// A connection's whole life.
    fn attend(&self, mut channel: Channel, id: u64, agreed: Option<Agreement>) {
        let begun = Instant::now();
        let counters = Counters::default();
        let peer = channel.peer().to_owned();
        self.config.log.event(&Event::Connected { id, peer: &peer });
        let agreement = match agreed {
            Some(agreement) => Ok(agreement),
            None => negotiate(&mut channel, self, id),
        };
        let (export, reason) = match agreement {
            Ok(agreement) => {
                self.registry.negotiated(id);
                let export = Arc::clone(&agreement.export);
                let tls_peer = channel.is_tls().then(|| channel.tls_peer().unwrap_or_default());
                self.config.log.event(&Event::Negotiated {
                    id,
                    export: &export.name,
                    style: agreement.style,
                    tls: tls_peer.as_deref(),
                });
                let reason = Connection::new(self, &channel, id, agreement, &counters).serve();
                channel.close();
                (Some(export), reason)
            }
            Err(Failure::Probe | Failure::Left) => (None, None),
            Err(Failure::Broken(reason)) => (None, Some(reason)),
            Err(Failure::Io(error)) => (None, Some(Error::from(error).to_string())),
        };
        let reason =
            reason.or_else(|| self.registry.was_late(id).then(|| "the handshake took too long".to_owned()));
        self.config.log.event(&Event::Ended {
            id,
            peer: &peer,
            export: export.as_ref().map(|export| export.name.as_str()),
            reason: reason.as_deref(),
            duration: begun.elapsed(),
            counts: counters.counts(),
        });
    }
}

/// A server that is set up.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<Listener>,
    waker: Waker,
}

/// Stops a server from outside, and looks into it; any thread may.
#[derive(Debug, Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// Lets the server stop: what clients have asked for is still done, then the disks are flushed. Told twice, it does
    /// not wait for clients any more.
    pub fn stop(&self) {
        if self.shared.stopping.swap(true, Ordering::AcqRel) {
            self.shared.impatient.store(true, Ordering::Release);
        }
        self.shared.registry.wake();
    }

    /// What has been done until now.
    pub fn snapshot(&self) -> metrics::Snapshot {
        let shared = &self.shared;
        metrics::Snapshot {
            uptime: shared.started.elapsed(),
            connections: shared.registry.len(),
            accepted: shared.accepted.load(Ordering::Relaxed),
            exports: shared
                .exports()
                .iter()
                .map(|export| (export.name.clone(), export.device.size(), export.counters.counts()))
                .collect(),
        }
    }

    /// Reads certificates and keys again, for connections that come from now on.
    ///
    /// # Errors
    /// What cannot be read; what was read before stays in use.
    pub fn reload_tls(&self) -> Result<()> {
        self.shared.config.tls.as_ref().map_or(Ok(()), ServerTls::reload)
    }
}

impl Server {
    /// Sets a server up.
    ///
    /// # Errors
    /// Two exports have the same name, a name is too long, or the system gives no descriptors.
    pub fn new(config: Config) -> Result<Self> {
        check_names(&config.exports)?;
        let (registry, waker) = Registry::new()?;
        let pool = Arc::new(Pool::new(config.limits.pool_bytes));
        let shared = Shared {
            config,
            catalogue: OnceLock::new(),
            pool,
            registry,
            stopping: AtomicBool::new(false),
            impatient: AtomicBool::new(false),
            next_id: AtomicU64::new(1),
            accepted: AtomicU64::new(0),
            started: Instant::now(),
        };
        Ok(Self { shared: Arc::new(shared), listeners: vec![], waker })
    }

    /// The way to stop it.
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared) }
    }

    /// Asks this catalogue for names that none of the configured exports has. To be called once; a second one is not asked.
    pub fn consult(&self, catalogue: Arc<dyn Catalogue>) {
        let _ = self.shared.catalogue.set(catalogue);
    }

    /// Accepts connections from here, too, once it runs.
    pub fn listen(&mut self, listener: Listener) {
        self.listeners.push(listener);
    }

    /// Serves a client that is connected already, handshake included, as soon as this is called.
    ///
    /// # Errors
    /// The system gives no thread or descriptor.
    pub fn serve(&self, channel: Channel) -> Result<()> {
        self.start(channel, None)
    }

    /// Serves a client that needs no handshake: the kernel's, for which somebody has agreed on everything. Compact
    /// requests, simple replies.
    ///
    /// # Errors
    /// The system gives no thread or descriptor.
    pub fn serve_raw(&self, channel: Channel, export: &Arc<Export>) -> Result<()> {
        let export = Arc::clone(export);
        self.start(channel, Some(Agreement { export, style: HeaderStyle::Simple, contexts: vec![] }))
    }

    fn start(&self, channel: Channel, agreed: Option<Agreement>) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        let limit = shared.config.limits.handshake_timeout.filter(|_| agreed.is_none());
        let place = Registry::enter(&shared, id, &channel, limit)?;
        std::thread::Builder::new()
            .name(format!("nbd-{id}"))
            .stack_size(1 << 20)
            .spawn(move || {
                let place = place;
                place.shared().attend(channel, id, agreed);
            })
            .map_err(Error::from)
            .context(|| "cannot start a thread for a connection".to_owned())?;
        Ok(())
    }

    /// Accepts and serves until it is told to stop, or (with [`Config::once`], or without listeners) the last client has
    /// left. Then the disks are flushed and left clean.
    ///
    /// # Errors
    /// The listeners cannot be waited on, or a disk could not be flushed: what clients wrote may not be durable.
    pub fn run(mut self) -> Result<Counts> {
        let listened = self.accept_until_stopped();
        // Nobody new gets in.
        self.listeners.clear();
        let shared = &self.shared;
        shared.stopping.store(true, Ordering::Release);
        self.drain();
        let mut closed = Ok(());
        for export in shared.exports() {
            let result = export.device.close().context(|| format!("export '{}'", export.name));
            closed = closed.and(result);
        }
        listened.and(closed)?;
        Ok(total(shared.exports()))
    }

    fn accept_until_stopped(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        loop {
            if shared.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            let state = shared.registry.state();
            let over = shared.config.once && state.had_clients && state.negotiated == 0;
            if over || (self.listeners.is_empty() && state.connections == 0) {
                return Ok(());
            }
            let full = state.connections >= shared.config.limits.max_clients.max(1);
            let listening = if full { &[][..] } else { &self.listeners[..] };
            let ready = listen::wait(listening, &self.waker, state.deadline)?;
            shared.registry.end_late();
            for index in ready {
                self.accept(index);
            }
        }
    }

    fn accept(&self, index: usize) {
        let Some(listener) = self.listeners.get(index) else { return };
        let accepted = match listener.accept() {
            Ok(Some(channel)) => self.start(channel, None),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = accepted {
            self.shared.config.log.event(&Event::AcceptFailed { error: &error });
            // Out of descriptors or memory: trying again at once would only burn time.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Lets every connection finish what it has begun; those that cannot in time are ended.
    fn drain(&self) {
        let shared = &self.shared;
        shared.registry.stop_receiving();
        let patience = Instant::now() + shared.config.limits.drain;
        while shared.registry.len() > 0 && Instant::now() < patience {
            if shared.impatient.load(Ordering::Acquire) {
                break;
            }
            // A failure to wait only makes this loop faster.
            let _ = listen::wait(&[], &self.waker, Some(patience));
        }
        shared.registry.end_all();
        let patience = Instant::now() + Duration::from_secs(2);
        while shared.registry.len() > 0 && Instant::now() < patience {
            let _ = listen::wait(&[], &self.waker, Some(patience));
        }
    }
}

fn total(exports: &[Arc<Export>]) -> Counts {
    exports.iter().map(|export| export.counters.counts()).fold(Counts::default(), Counts::plus)
}

fn check_names(exports: &[Arc<Export>]) -> Result<()> {
    for (index, export) in exports.iter().enumerate() {
        for text in [&export.name, &export.description] {
            if text.len() > crate::proto::MAX_STRING || text.contains('\0') {
                return Err(Error::usage(
                    "names and descriptions of exports have at most 4096 bytes and no NUL",
                ));
            }
        }
        if exports[..index].iter().any(|other| other.name == export.name) {
            return Err(Error::usage(format!("two exports are called '{}'", export.name)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

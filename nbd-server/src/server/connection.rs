//! A connection in transmission: requests in, replies out.
//!
//! Any number of threads, up to a limit, serve a connection. One of them leads: it alone receives. What happens with a
//! request depends on what it will take, judged by how long requests have taken lately:
//!
//! * *Fast* ones (data in the page cache) are carried out by the leader itself, one after the other, for as long as the
//!   client's requests lie in the receive buffer; their replies leave together. That costs three system calls for a lone
//!   request and a fraction of that in a deep queue, and no thread wakes another.
//! * For *slow* ones the leader passes the lead on before it begins, so that what follows is received and carried out
//!   meanwhile, and replies leave in the order in which they become ready.
//! * For *large* ones that are mere copies, or after which nothing has come yet, it leaves the lead behind, wakes nobody,
//!   and is usually back first.
//!
//! Nothing here waits for a client to read but the threads of its own connection, and a connection's memory is bounded:
//! a receive buffer, a thread's batch of replies, and its part of the pool.

mod execute;
mod input;
mod splice;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use self::execute::Job;
use self::input::{Input, Received};
use super::Shared;
use super::export::{Context, Export};
use super::handshake::Agreement;
use super::pool::{Buffer, Part};
use super::reply::Replies;
use super::request::{Action, Facts, Plan, Range, Refusal, plan};
use super::stats::Counters;
use crate::channel::Channel;
use crate::proto::{HeaderStyle, Request, command, command_flags};

/// The largest read or write that the leader carries out on the spot, in bytes.
const SMALL: u64 = 64 << 10;
/// Replies are sent once so many bytes have gathered...
const BATCH_BYTES: usize = 128 << 10;
/// ... or so many replies. The first one of a queue leaves alone, and each batch is twice as large as the one before, up to
/// this: the client works on the first replies while the others are made.
const BATCH_REPLIES: u32 = 16;
/// A request that takes longer than this, for each [`SMALL`] bytes of it, counts as slow.
const SLOW: Duration = Duration::from_micros(80);
/// A request that takes less than this, for each [`SMALL`] bytes of it, is a copy out of the cache.
const BRISK: Duration = Duration::from_micros(25);
/// What one slow request counts at most: a thread that was only kept from running once is not taken for a slow disk, and a
/// slow disk is known after a few requests.
const SLOWEST: Duration = Duration::from_micros(400);
/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(5);
/// So long a lead that was left behind without waking anybody may be free.
const RELIEF: Duration = Duration::from_millis(50);
/// Bytes of a thread's stack. Reading an image goes deep only where images are nested.
const STACK_BYTES: usize = 1 << 20;

/// A connection in transmission.
#[derive(Debug)]
pub(super) struct Connection<'a> {
    shared: &'a Shared,
    channel: &'a Channel,
    id: u64,
    export: Arc<Export>,
    style: HeaderStyle,
    contexts: Vec<(u32, Context)>,
    input: Mutex<Input>,
    /// Held while a message is sent, so that messages do not mingle.
    output: Mutex<()>,
    crew: Mutex<Crew>,
    lead_is_free: Condvar,
    /// Mean time of small requests lately, in nanoseconds for each [`SMALL`] bytes.
    pace: AtomicU64,
    part: Part,
    pipes: splice::Pipes,
    counters: &'a Counters,
    /// Why the connection ended, if not by the client's wish.
    reason: Mutex<Option<String>>,
}

/// The threads of a connection.
#[derive(Debug)]
struct Crew {
    threads: usize,
    waiting: usize,
    /// One of the waiting threads looks every now and then whether the lead has been left behind.
    watched: bool,
    led: bool,
    ended: bool,
}

/// Replies that wait to be sent together.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    replies: u32,
    /// How many replies the next batch may have.
    limit: u32,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.bytes.len() >= BATCH_BYTES || self.replies > self.limit
    }
}

/// Whether a thread goes on leading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lead {
    Kept,
    Passed,
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        channel: &'a Channel,
        id: u64,
        agreement: Agreement,
        counters: &'a Counters,
    ) -> Self {
        Self {
            shared,
            channel,
            id,
            export: agreement.export,
            style: agreement.style,
            contexts: agreement.contexts,
            input: Mutex::new(Input::new(agreement.style)),
            output: Mutex::new(()),
            crew: Mutex::new(Crew { threads: 1, waiting: 0, watched: false, led: false, ended: false }),
            lead_is_free: Condvar::new(),
            pace: AtomicU64::new(nanos(SLOWEST)),
            part: shared.part(),
            pipes: splice::Pipes::default(),
            counters,
            reason: Mutex::new(None),
        }
    }

    /// Serves the client until it leaves, the connection ends, or it breaks the rules. The reason, if it was not the
    /// client's wish.
    pub(super) fn serve(&self) -> Option<String> {
        std::thread::scope(|scope| self.work(scope));
        self.reason.lock().take()
    }

    /// A thread's life: lead when nobody does, and serve what comes.
    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let guard = WorkGuard(self);
        let mut batch = Batch::default();
        while self.take_lead() {
            self.lead(scope, &mut batch);
        }
        drop(guard);
    }

    /// Waits for the lead; `false` if there is nothing left to do for this thread.
    fn take_lead(&self) -> bool {
        let mut crew = self.crew.lock();
        let begun = Instant::now();
        while crew.led && !crew.ended {
            let watches = !std::mem::replace(&mut crew.watched, true);
            crew.waiting += 1;
            self.lead_is_free.wait_for(&mut crew, if watches { RELIEF } else { IDLE });
            crew.waiting -= 1;
            crew.watched &= !watches;
            if crew.led && begun.elapsed() >= IDLE {
                return false;
            }
        }
        let leads = !crew.ended;
        crew.led |= leads;
        leads
    }

    /// Receives and serves for as long as this thread leads.
    fn lead<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, batch: &mut Batch) {
        let mut input = self.input.lock();
        loop {
            let turn = self.turn(&mut input, scope, batch);
            match turn {
                Ok(Some(job)) => {
                    drop(input);
                    let done = self.run(job, batch).and_then(|()| self.send_batch(batch));
                    self.note(done);
                    return;
                }
                Ok(None) => {}
                Err(end) => {
                    let sent = self.send_batch(batch);
                    self.end(end.or_else(|| sent.err().map(|error| explain(&error))));
                    return;
                }
            }
        }
    }

    /// Receives one request and serves it, or comes back with a job after the lead has been passed on. An error is the
    /// end: with a reason, or none if the client takes its leave.
    fn turn<'scope>(
        &'scope self,
        input: &mut Input,
        scope: &'scope Scope<'scope, '_>,
        batch: &mut Batch,
    ) -> Result<Option<Job<'scope>>, Option<String>> {
        if !input.has_request() {
            self.send_batch(batch).map_err(|error| Some(explain(&error)))?;
            batch.limit = 0;
        } else if batch.is_full() {
            self.send_batch(batch).map_err(|error| Some(explain(&error)))?;
            batch.limit = (batch.limit * 2 + 1).min(BATCH_REPLIES);
        }
        let request = match input.request(self.channel) {
            Ok(Received::Request(request)) => request,
            Ok(Received::End) => return Err(None),
            Ok(Received::Cut) => return Err(Some("the connection ended inside a request".to_owned())),
            Ok(Received::Magic(magic)) => return Err(Some(format!("a request begins with {magic:#010x}"))),
            // The end of receiving, which TLS takes for a cut: what was asked before is still answered.
            Err(_) if self.shared.stopping.load(Ordering::Acquire) => return Err(None),
            Err(error) => return Err(Some(explain(&error))),
        };
        let plan = plan(&request, &self.facts());
        if plan.action == Ok(Action::Disconnect) {
            return Err(None);
        }
        if !input.holds(plan.payload) {
            // The client may wait for replies before it sends the rest.
            self.send_batch(batch).map_err(|error| Some(explain(&error)))?;
        }
        if let Some(done) = self.small_write(input, &request, &plan, batch) {
            return done.map(|()| None).map_err(|error| Some(explain(&error)));
        }
        let job = self.receive_job(input, request, plan).map_err(|error| match error {
            Lost::Io(error) => Some(explain(&error)),
            Lost::Payload(len) => Some(format!("a request with a payload of {len} bytes")),
        })?;
        match self.hand_over(&job, input, scope, batch).map_err(|error| Some(explain(&error)))? {
            Lead::Passed => Ok(Some(job)),
            Lead::Kept => self.run(job, batch).map(|()| None).map_err(|error| Some(explain(&error))),
        }
    }

    fn facts(&self) -> Facts {
        Facts {
            size: self.export.device.size(),
            read_only: self.export.read_only(),
            resizable: self.export.options.resizable,
            style: self.style,
            contexts: !self.contexts.is_empty(),
            max_payload: self.shared.max_payload(),
        }
    }

    /// Carries out a write whose payload lies in the receive buffer, right from there; `None` if it is no such write, or
    /// should not be done by the leader.
    fn small_write(
        &self,
        input: &mut Input,
        request: &Request,
        plan: &Plan,
        batch: &mut Batch,
    ) -> Option<io::Result<()>> {
        let Ok(Action::Write { range, fua: false }) = plan.action else { return None };
        if range.len > SMALL || self.is_slow() || self.export.options.write_through {
            return None;
        }
        let payload = match input.buffered(self.channel, block::num::to_usize(range.len)) {
            Ok(payload) => payload,
            Err(error) => return Some(Err(error)),
        };
        let begun = Instant::now();
        let written = self.write_pieces(range.offset, std::iter::once(payload));
        self.took(begun, range.len);
        self.finish(request, written, range.len, batch);
        Some(Ok(()))
    }

    /// Takes the payload of a request off the connection.
    fn receive_job(&self, input: &mut Input, request: Request, plan: Plan) -> Result<Job<'_>, Lost> {
        let Plan { payload, action } = plan;
        let job = |action, payload| Job { request, action, payload };
        if payload == 0 {
            return Ok(job(action, execute::Payload::None));
        }
        match action {
            Ok(Action::Write { range, fua }) => {
                let len = block::num::to_usize(range.len);
                match self.part.take_for(len) {
                    Some(mut buffers) => {
                        fill(input, self.channel, &mut buffers, len)?;
                        Ok(job(action, execute::Payload::Buffers(buffers)))
                    }
                    None => {
                        let written = self.write_streaming(input, range)?;
                        let written = written.and_then(|()| self.durable(fua));
                        Ok(job(action, execute::Payload::Written(written)))
                    }
                }
            }
            Ok(Action::StatusOf { .. }) => {
                // At most some kilobytes, as has been checked.
                let mut bytes = vec![0; block::num::to_usize(payload)];
                input.read_exact(self.channel, &mut bytes)?;
                Ok(job(action, execute::Payload::Bytes(bytes)))
            }
            refused => {
                if payload > u64::from(self.shared.max_payload()).saturating_mul(4) {
                    return Err(Lost::Payload(payload));
                }
                input.skip(self.channel, payload)?;
                Ok(job(refused, execute::Payload::None))
            }
        }
    }

    /// Writes a payload piece by piece while it comes in: where the pool is used up. The inner error is the request's.
    fn write_streaming(&self, input: &mut Input, range: Range) -> io::Result<Result<(), Refusal>> {
        let mut piece = vec![0; block::num::to_usize(SMALL)];
        let mut written = Ok(());
        let mut at = 0;
        while at < range.len {
            let now = block::num::to_usize((range.len - at).min(SMALL));
            input.read_exact(self.channel, &mut piece[..now])?;
            if written.is_ok() {
                written = self.write_pieces(range.offset + at, std::iter::once(&piece[..now]));
            }
            at += now as u64;
        }
        Ok(written)
    }

    /// Decides who receives the next request while this one is carried out.
    fn hand_over<'scope>(
        &'scope self,
        job: &Job<'_>,
        input: &Input,
        scope: &'scope Scope<'scope, '_>,
        batch: &mut Batch,
    ) -> io::Result<Lead> {
        let synced = self.export.options.write_through && matches!(job.action, Ok(Action::Write { .. }));
        let (kept, quiet) = match job.weight() {
            _ if synced => (false, false),
            execute::Weight::Nothing => (true, false),
            execute::Weight::Small => (!self.is_slow(), false),
            execute::Weight::Large => (false, self.is_brisk() || (!self.is_slow() && !input.has_request())),
            execute::Weight::Slow => (false, false),
        };
        if kept {
            return Ok(Lead::Kept);
        }
        self.send_batch(batch)?;
        let mut crew = self.crew.lock();
        if quiet && crew.watched {
            // Most likely this thread is back before anything comes. Should it wait for the client to receive, while the
            // client waits to send, the one that watches takes over.
            crew.led = false;
            return Ok(Lead::Passed);
        }
        if crew.waiting == 0 && crew.threads < self.shared.threads_per_connection() {
            let builder =
                std::thread::Builder::new().name(format!("nbd-{}", self.id)).stack_size(STACK_BYTES);
            if builder.spawn_scoped(scope, move || self.work(scope)).is_ok() {
                crew.threads += 1;
            } else if crew.threads == 1 {
                // Alone then, one after the other.
                return Ok(Lead::Kept);
            }
        }
        crew.led = false;
        drop(crew);
        self.lead_is_free.notify_one();
        Ok(Lead::Passed)
    }

    /// Moving bytes is all the work there is: another thread would only have to wait for the socket.
    fn is_brisk(&self) -> bool {
        self.pace.load(Ordering::Relaxed) < nanos(BRISK)
    }

    fn is_slow(&self) -> bool {
        self.pace.load(Ordering::Relaxed) > nanos(SLOW)
    }

    /// Remembers how long a request took. Threads may overwrite what others have just remembered; it is a guess anyway.
    fn took(&self, begun: Instant, len: u64) {
        let took = nanos(begun.elapsed().min(SLOWEST)) / len.div_ceil(SMALL).max(1);
        let pace = self.pace.load(Ordering::Relaxed);
        self.pace.store(pace - pace / 8 + took / 8, Ordering::Relaxed);
    }

    fn send_batch(&self, batch: &mut Batch) -> io::Result<()> {
        batch.replies = 0;
        if batch.bytes.is_empty() {
            return Ok(());
        }
        let sent = {
            let _turn = self.output.lock();
            self.channel.send(&[&batch.bytes])
        };
        batch.bytes.clear();
        sent
    }

    /// Adds the reply of a request without data, and counts it.
    fn finish(&self, request: &Request, result: Result<(), Refusal>, bytes: u64, batch: &mut Batch) {
        let replies = Replies::to(request, self.style);
        self.count(request, bytes, result.as_ref().err());
        batch.replies += 1;
        match result {
            Ok(()) => replies.success(&mut batch.bytes),
            Err(refusal) => replies.error(&refusal, None, &mut batch.bytes),
        }
    }

    fn count(&self, request: &Request, bytes: u64, refusal: Option<&Refusal>) {
        let bytes = if refusal.is_some() { 0 } else { bytes };
        for counters in [self.counters, &self.export.counters] {
            counters.add(request.command, bytes, refusal.is_some());
        }
        if let Some(refusal) = refusal {
            let (what, count) = (describe(request), self.counters.errors());
            self.shared.failed(self.id, count, &what, &format!("{}: {}", refusal.errno.name(), refusal.text));
        }
    }

    /// Ends the connection if sending failed.
    fn note(&self, done: io::Result<()>) {
        if let Err(error) = done {
            self.end(Some(explain(&error)));
        }
    }

    /// No further requests are received; those that are being carried out are finished.
    fn end(&self, reason: Option<String>) {
        let mut crew = self.crew.lock();
        if reason.is_some() {
            self.reason.lock().get_or_insert_with(|| reason.unwrap_or_default());
            // Whoever receives or sends is woken: there is nobody to talk to.
            self.channel.shutdown();
        }
        crew.ended = true;
        drop(crew);
        self.lead_is_free.notify_all();
    }
}

/// A payload that is of no use: the connection cannot go on.
enum Lost {
    Io(io::Error),
    Payload(u64),
}

impl From<io::Error> for Lost {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn fill(input: &mut Input, channel: &Channel, buffers: &mut [Buffer<'_>], len: usize) -> io::Result<()> {
    let mut left = len;
    for buffer in buffers {
        let now = left.min(buffer.len());
        input.read_exact(channel, &mut buffer[..now])?;
        left -= now;
    }
    Ok(())
}

/// Takes a thread off the crew, also one that panics: the others must not wait for it.
struct WorkGuard<'a, 'b>(&'a Connection<'b>);

impl Drop for WorkGuard<'_, '_> {
    fn drop(&mut self) {
        self.0.crew.lock().threads -= 1;
        if std::thread::panicking() {
            self.0.end(Some("a mistake of this program".to_owned()));
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn explain(error: &io::Error) -> String {
    block::Error::from(io::Error::new(error.kind(), error.to_string())).to_string()
}

/// A request in words.
fn describe(request: &Request) -> String {
    let name = command::name(request.command);
    let fua = if request.flags & command_flags::FUA != 0 { " with FUA" } else { "" };
    match request.command {
        command::FLUSH => name,
        command::RESIZE => format!("{name} to {} bytes", request.offset),
        _ => format!("{name} of {} bytes at {:#x}{fua}", request.length, request.offset),
    }
}

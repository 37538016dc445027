//! One connection in the transmission phase, shared by any number of threads.
//!
//! Every request has a thread that waits for its reply, so no further threads are needed: one of those who wait, the
//! *leader*, receives on behalf of all.
//!
//! ```text
//!   thread A   send --> lead: header of B's read --------.   wait .................  lead: own data, done
//!   thread B   send --> wait                             '-> lead: data into B's own buffer, done --^
//! ```
//!
//! * A leader that meets the header of somebody else's read hands the lead over together with the header, and the
//!   owner moves the data from the socket into its own buffer: no copies, and no buffer is ever seen by two threads.
//! * All other replies are small. The leader takes them in itself, so that a server that answers a write before it has
//!   received it whole cannot make both sides wait for each other.
//! * Whoever is done and leads passes the lead to whoever has waited longest, whose reply is probably next.
//!
//! One request at a time, the caller is the leader all along: nobody is woken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::channel::Channel;
use crate::proto::{HeaderStyle, ReplyHeader, Request, command};

use super::failure::{Failure, Outcome};
use super::inbox::Inbox;
use super::reply::{Answer, Asked, Reply};

/// A connection that requests can be sent through.
#[derive(Debug)]
pub(super) struct Connection {
    channel: Channel,
    style: HeaderStyle,
    /// Held while a request is sent.
    outgoing: Mutex<()>,
    /// Held by the leader.
    inbox: Mutex<Inbox>,
    state: Mutex<State>,
    in_flight: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    /// By cookie; cookies ascend, so that the first has been waiting longest.
    pending: BTreeMap<u64, Pending>,
    last_cookie: u64,
    /// Whether somebody leads.
    led: bool,
    /// Why the connection is of no use any more.
    broken: Option<Failure>,
}

/// A request without its complete reply.
#[derive(Debug)]
struct Pending {
    wake: Arc<Condvar>,
    /// Of requests other than reads; the owner has that of a read.
    reply: Option<Reply>,
    mail: Option<Mail>,
    waiting: bool,
}

/// What a waiting thread is woken for.
#[derive(Debug)]
enum Mail {
    /// To lead.
    Lead,
    /// To lead, beginning with this header of its own reply.
    Header(ReplyHeader),
    /// Its reply is complete.
    Done,
}

/// Why a leader stops leading.
#[derive(Debug)]
enum Ended {
    /// Its own reply is complete.
    Done,
    /// Somebody else's data come, after this header.
    Other(u64, ReplyHeader),
}

/// A request to be sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// The data of a write.
    pub(super) payload: &'a [u8],
}

/// Counts a request for as long as it is under way.
#[derive(Debug)]
struct InFlight<'a>(&'a AtomicUsize);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connection {
    pub(super) fn new(channel: Channel, style: HeaderStyle) -> Self {
        Self {
            channel,
            style,
            outgoing: Mutex::new(()),
            inbox: Mutex::new(Inbox::new()),
            state: Mutex::default(),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// How many requests are under way.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether it is of no use any more.
    pub(super) fn is_broken(&self) -> bool {
        self.state.lock().broken.is_some()
    }

    /// Carries out a request; the data of a read go to `buf`.
    ///
    /// # Errors
    /// The server refuses it, or the connection is gone.
    pub(super) fn transact(&self, call: &Call<'_>, buf: &mut [u8]) -> Outcome<Answer> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let _counted = InFlight(&self.in_flight);
        let asked = Asked { command: call.command, offset: call.offset, length: call.length };
        let mut own = (call.command == command::READ).then(|| Reply::new(asked, self.style));
        let cookie = self.send(call, asked)?;
        loop {
            match self.wait(cookie)? {
                Mail::Done => return self.take_reply(cookie).finish(),
                Mail::Lead => {
                    if self.lead(cookie, None, &mut own, buf)? {
                        return own.unwrap_or_else(|| self.take_reply(cookie)).finish();
                    }
                }
                Mail::Header(header) => {
                    if self.lead(cookie, Some(header), &mut own, buf)? {
                        return own.unwrap_or_else(|| self.take_reply(cookie)).finish();
                    }
                }
            }
        }
    }

    /// Sends the request and names it.
    fn send(&self, call: &Call<'_>, asked: Asked) -> Outcome<u64> {
        let _in_order = self.outgoing.lock();
        let cookie = self.register(asked)?;
        let Call { command, flags, offset, length, payload } = *call;
        let header = Request { flags, command, cookie, offset, length }.encode(self.style);
        if let Err(error) = self.channel.send(&[&header, payload]) {
            return Err(self.give_up(cookie, error.into()));
        }
        Ok(cookie)
    }

    fn register(&self, asked: Asked) -> Outcome<u64> {
        let mut state = self.state.lock();
        if let Some(failure) = &state.broken {
            return Err(failure.clone());
        }
        state.last_cookie += 1;
        let cookie = state.last_cookie;
        let reply = (asked.command != command::READ).then(|| Reply::new(asked, self.style));
        let pending = Pending { wake: Arc::new(Condvar::new()), reply, mail: None, waiting: false };
        state.pending.insert(cookie, pending);
        Ok(cookie)
    }

    /// Waits until there is something to do: to lead if nobody does, or what another leader has for us.
    fn wait(&self, cookie: u64) -> Outcome<Mail> {
        let mut state = self.state.lock();
        loop {
            let State { pending, led, broken, .. } = &mut *state;
            let Some(own) = pending.get_mut(&cookie) else {
                return Err(Failure::lost("the request is not known any more"));
            };
            own.waiting = false;
            if matches!(own.mail, Some(Mail::Done)) {
                return Ok(Mail::Done);
            }
            if let Some(failure) = broken {
                let failure = failure.clone();
                pending.remove(&cookie);
                return Err(failure);
            }
            if let Some(mail) = own.mail.take() {
                return Ok(mail);
            }
            if !*led {
                *led = true;
                return Ok(Mail::Lead);
            }
            own.waiting = true;
            let wake = Arc::clone(&own.wake);
            wake.wait(&mut state);
        }
    }

    /// Receives until the own reply is complete (`true`) or the lead has been handed over (`false`).
    fn lead(
        &self,
        cookie: u64,
        first: Option<ReplyHeader>,
        own: &mut Option<Reply>,
        buf: &mut [u8],
    ) -> Outcome<bool> {
        let mut inbox = self.inbox.lock();
        let ended = self.receive(cookie, first, own, buf, &mut inbox);
        // The next leader needs it.
        drop(inbox);
        match ended.map_err(|failure| self.give_up(cookie, failure))? {
            Ended::Done => {
                self.retire(cookie, own.is_some());
                Ok(true)
            }
            Ended::Other(other, header) => {
                self.hand_over(other, header);
                Ok(false)
            }
        }
    }

    fn receive(
        &self,
        cookie: u64,
        mut first: Option<ReplyHeader>,
        own: &mut Option<Reply>,
        buf: &mut [u8],
        inbox: &mut Inbox,
    ) -> Outcome<Ended> {
        loop {
            let header = match first.take() {
                Some(header) => header,
                None => inbox.header(&self.channel, self.style)?,
            };
            let theirs = cookie_of(&header);
            match own {
                Some(reply) if theirs == cookie => {
                    if reply.accept(&header, inbox, &self.channel, buf)? {
                        return Ok(Ended::Done);
                    }
                }
                _ => match self.reply_of(theirs)? {
                    Some(reply) => {
                        if self.take_in(theirs, reply, &header, inbox)? && theirs == cookie {
                            return Ok(Ended::Done);
                        }
                    }
                    None => return Ok(Ended::Other(theirs, header)),
                },
            }
        }
    }

    /// The unfinished reply of somebody's request; `None` if it is a read.
    fn reply_of(&self, cookie: u64) -> Outcome<Option<Reply>> {
        let mut state = self.state.lock();
        let pending = state.pending.get_mut(&cookie).filter(|pending| pending.mail.is_none());
        match pending {
            Some(pending) => Ok(pending.reply.take()),
            None => Err(Failure::nonsense(format!(
                "a reply to a request that was never made (cookie {cookie:#x})"
            ))),
        }
    }

    /// Takes in a chunk of somebody's reply that is not a read's; whether that was the last.
    fn take_in(
        &self,
        cookie: u64,
        mut reply: Reply,
        header: &ReplyHeader,
        inbox: &mut Inbox,
    ) -> Outcome<bool> {
        let done = reply.accept(header, inbox, &self.channel, &mut [])?;
        let mut state = self.state.lock();
        if let Some(pending) = state.pending.get_mut(&cookie) {
            pending.reply = Some(reply);
            if done {
                pending.mail = Some(Mail::Done);
                pending.wake.notify_one();
            }
        }
        Ok(done)
    }

    /// Lets the owner of a read lead, beginning with a header that is its.
    fn hand_over(&self, cookie: u64, header: ReplyHeader) {
        let mut state = self.state.lock();
        if let Some(pending) = state.pending.get_mut(&cookie) {
            pending.mail = Some(Mail::Header(header));
            pending.wake.notify_one();
        }
    }

    /// Ends the leadership of a request that is done: the next in line leads, if anybody waits. The place of a read is
    /// given up at once.
    fn retire(&self, cookie: u64, forget: bool) {
        let mut state = self.state.lock();
        if forget {
            state.pending.remove(&cookie);
        }
        self.pass_lead(&mut state);
    }

    fn pass_lead(&self, state: &mut MutexGuard<'_, State>) {
        let next = state.pending.values_mut().find(|pending| pending.waiting && pending.mail.is_none());
        match next {
            Some(next) => {
                next.mail = Some(Mail::Lead);
                next.wake.notify_one();
            }
            None => state.led = false,
        }
    }

    /// The complete reply of a request other than a read.
    fn take_reply(&self, cookie: u64) -> Reply {
        let pending = self.state.lock().pending.remove(&cookie);
        pending.and_then(|pending| pending.reply).unwrap_or_else(|| {
            // Cannot be: whoever says that it is done has put it there.
            Reply::new(Asked { command: command::FLUSH, offset: 0, length: 0 }, self.style)
        })
    }

    /// Nothing more will come of this connection: everybody is told.
    fn give_up(&self, cookie: u64, failure: Failure) -> Failure {
        let mut state = self.state.lock();
        state.pending.remove(&cookie);
        let failure = state.broken.get_or_insert(failure).clone();
        for pending in state.pending.values() {
            pending.wake.notify_one();
        }
        drop(state);
        self.channel.shutdown();
        failure
    }

    /// Says goodbye. Nobody may be using the connection.
    pub(super) fn disconnect(&self) {
        if self.is_broken() {
            return;
        }
        let goodbye = Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 };
        // A server that is gone already need not be told.
        let _ = self.channel.send(&[&goodbye.encode(self.style)]);
        self.channel.close();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.disconnect();
    }
}

fn cookie_of(header: &ReplyHeader) -> u64 {
    match header {
        ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. } => *cookie,
    }
}

//! The QEMU Machine Protocol, as much of it as a check needs: a JSON object a line, replies in the order of the
//! commands, events in between (QEMU's "QMP protocol specification").

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use block::{Error, Result};

/// A line of the protocol is not longer than this.
const MAX_LINE: u64 = 4 << 20;

/// What can happen while a machine runs.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Event {
    /// The machine has ended, for the reason that qemu gives.
    Shutdown(String),
    /// qemu answers a command.
    Reply(Value),
    /// There is nobody at the other end any more.
    Gone,
    /// We want it to end.
    Stop,
}

/// Reads what qemu says, until it is gone.
pub(super) fn read(stream: UnixStream, events: &Sender<Event>) {
    let mut reader = BufReader::new(stream);
    let mut line = vec![];
    loop {
        line.clear();
        let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
        if !matches!(read, Ok(1..)) {
            drop(events.send(Event::Gone));
            return;
        }
        if let Some(event) = parse(&line)
            && events.send(event).is_err()
        {
            return;
        }
    }
}

/// What a line says that matters here.
fn parse(line: &[u8]) -> Option<Event> {
    let value: Value = serde_json::from_slice(line).ok()?;
    match value.get("event").and_then(Value::as_str) {
        Some("SHUTDOWN") => {
            Some(Event::Shutdown(value["data"]["reason"].as_str().unwrap_or("unknown").to_owned()))
        }
        Some("GUEST_PANICKED") => Some(Event::Shutdown("guest-panic".to_owned())),
        Some(_) => None,
        None if value.get("return").is_some() || value.get("error").is_some() => Some(Event::Reply(value)),
        None => None,
    }
}

/// Sends commands and waits for their replies.
#[derive(Debug)]
pub(super) struct Qmp<'a> {
    pub(super) stream: UnixStream,
    pub(super) events: &'a Receiver<Event>,
    /// Events that came while a reply was waited for.
    early: Vec<Event>,
    /// The number of the last command: a reply that comes too late is not taken for the next one's.
    last: u64,
}

impl<'a> Qmp<'a> {
    /// Speaks over `stream`; what is said there comes through `events`.
    pub(super) fn new(stream: UnixStream, events: &'a Receiver<Event>) -> Self {
        Self { stream, events, early: vec![], last: 0 }
    }

    /// Carries out a command.
    pub(super) fn run(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value> {
        self.last += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": self.last }).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes())?;
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Reply(reply)) if reply["id"] == self.last => return answer(command, &reply),
                Ok(Event::Reply(_)) => {}
                Ok(Event::Gone) | Err(_) => {
                    return Err(Error::unsupported(format!("qemu does not answer '{command}'")));
                }
                Ok(event) => self.early.push(event),
            }
        }
    }

    /// Carries out a command of the monitor for people and returns what it prints.
    pub(super) fn monitor(&mut self, line: &str, limit: Duration) -> Result<String> {
        let reply = self.run("human-monitor-command", json!({ "command-line": line }), limit)?;
        Ok(reply.as_str().unwrap_or_default().to_owned())
    }

    /// The next event.
    pub(super) fn next(&mut self) -> Event {
        if self.early.is_empty() { self.events.recv().unwrap_or(Event::Gone) } else { self.early.remove(0) }
    }

    /// The next event, if it comes within `limit`.
    pub(super) fn next_within(&mut self, limit: Duration) -> Option<Event> {
        if !self.early.is_empty() {
            return Some(self.early.remove(0));
        }
        match self.events.recv_timeout(limit) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Event::Gone),
        }
    }
}

fn answer(command: &str, reply: &Value) -> Result<Value> {
    match reply.get("return") {
        Some(value) => Ok(value.clone()),
        None => {
            let why = reply["error"]["desc"].as_str().unwrap_or("no reason given");
            Err(Error::unsupported(format!("qemu refuses '{command}': {why}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_matters_is_understood_and_the_rest_left_aside() {
        let shutdown =
            br#"{"timestamp": {}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#;
        assert_eq!(parse(shutdown), Some(Event::Shutdown("guest-reset".to_owned())));
        assert!(matches!(parse(br#"{"return": {}}"#), Some(Event::Reply(_))));
        for line in
            [&br#"{"QMP": {"version": {}}}"#[..], br#"{"event": "RESUME"}"#, b"nonsense", b"[]", b"\xff"]
        {
            assert_eq!(parse(line), None);
        }
    }

    #[test]
    fn refusals_carry_qemus_words() {
        let reply = json!({ "error": { "class": "GenericError", "desc": "no such thing" } });
        assert_eq!(answer("x", &reply).unwrap_err().to_string(), "qemu refuses 'x': no such thing");
        assert_eq!(answer("x", &json!({ "return": 7 })).unwrap(), 7);
    }

    #[test]
    fn a_late_reply_is_nobodys() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (sender, events) = std::sync::mpsc::channel();
        let mut qmp = Qmp::new(ours, &events);
        qmp.run("slow", json!({}), Duration::ZERO).unwrap_err();
        for event in [
            Event::Reply(json!({ "return": "late", "id": 1 })),
            Event::Shutdown("guest-reset".to_owned()),
            Event::Reply(json!({ "return": "right", "id": 2 })),
        ] {
            sender.send(event).unwrap();
        }
        assert_eq!(qmp.run("next", json!({}), Duration::from_secs(9)).unwrap(), "right");
        assert_eq!(qmp.next(), Event::Shutdown("guest-reset".to_owned()));
        drop(theirs);
    }
}

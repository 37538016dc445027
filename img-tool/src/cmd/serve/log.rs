//! The log of a server: for people, or a JSON document a line.

use std::fs::{File, OpenOptions};
use std::io::Write as _;

use block::ResultExt as _;
use nbd_server::proto::HeaderStyle;
use nbd_server::server::event::{Event, Log};
use nbd_server::server::stats::Counts;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::plan::Logging;
use crate::app::App;
use crate::output::Output;

/// Writes events as they come.
#[derive(Debug)]
pub(super) struct Writer {
    json: bool,
    verbose: bool,
    program: &'static str,
    file: Option<Mutex<File>>,
}

impl Writer {
    pub(super) fn open(logging: &Logging, app: &App) -> block::Result<Self> {
        let file = logging
            .file
            .as_ref()
            .map(|path| {
                let opened = OpenOptions::new().create(true).append(true).open(path);
                opened.context(|| format!("cannot open the log '{}'", path.display()))
            })
            .transpose()?
            .map(Mutex::new);
        let verbose = app.global.verbose || file.is_some();
        Ok(Self { json: logging.json, verbose, program: app.program, file })
    }

    fn write(&self, line: &str) {
        match &self.file {
            // A full disk must not end the service.
            Some(file) => drop(file.lock().write_all(format!("{line}\n").as_bytes())),
            None => Output::new(false).say(&format!("{line}\n")),
        }
    }

    /// Whether an event is told without -v, too.
    fn matters(&self, event: &Event<'_>) -> bool {
        self.json || self.verbose || matches!(event, Event::AcceptFailed { .. })
    }
}

impl Log for Writer {
    fn event(&self, event: &Event<'_>) {
        if !self.matters(event) {
            return;
        }
        if self.json {
            self.write(&document(event).to_string());
        } else {
            self.write(&format!("{}: {}", self.program, sentence(event)));
        }
    }
}

fn style_name(style: HeaderStyle) -> &'static str {
    match style {
        HeaderStyle::Simple => "simple",
        HeaderStyle::Structured => "structured",
        HeaderStyle::Extended => "extended",
    }
}

fn sentence(event: &Event<'_>) -> String {
    match event {
        Event::Connected { id, peer } => format!("connection {id}: from {peer}"),
        Event::Negotiated { id, export, style, tls } => {
            let tls = match tls {
                None => String::new(),
                Some("") => ", TLS".to_owned(),
                Some(peer) => format!(", TLS with {peer}"),
            };
            format!("connection {id}: export '{export}', {} replies{tls}", style_name(*style))
        }
        Event::Failed { id, what, error } => format!("connection {id}: {what}: {error}"),
        Event::Ended { id, reason, duration, counts, .. } => {
            let how = reason.map_or_else(|| "ended".to_owned(), |reason| format!("lost ({reason})"));
            let seconds = duration.as_secs_f64();
            format!("connection {id}: {how} after {seconds:.3} s{}", in_words(counts))
        }
        Event::AcceptFailed { error } => format!("{error}"),
        other => format!("{other:?}"),
    }
}

fn in_words(counts: &Counts) -> String {
    let mut words: Vec<_> = counts
        .by_name()
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| match name {
            "read" => format!("{count} read ({} bytes)", counts.read_bytes),
            "write" => format!("{count} write ({} bytes)", counts.written_bytes),
            name => format!("{count} {name}"),
        })
        .collect();
    if counts.errors > 0 {
        words.push(format!("{} errors", counts.errors));
    }
    if words.is_empty() { String::new() } else { format!(": {}", words.join(", ")) }
}

fn document(event: &Event<'_>) -> Value {
    let mut document = Map::new();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    document.insert("time".to_owned(), json!(now.as_secs_f64()));
    let rest = match event {
        Event::Connected { id, peer } => json!({"event": "connected", "connection": id, "peer": peer}),
        Event::Negotiated { id, export, style, tls } => json!({
            "event": "negotiated", "connection": id, "export": export, "replies": style_name(*style),
            "tls": tls.is_some(), "tls-peer": tls.filter(|peer| !peer.is_empty()),
        }),
        Event::Failed { id, what, error } => {
            json!({"event": "failed", "connection": id, "what": what, "error": error})
        }
        Event::Ended { id, peer, export, reason, duration, counts } => {
            let operations: Map<String, Value> = counts
                .by_name()
                .filter(|(_, count)| *count > 0)
                .map(|(name, count)| (name.to_owned(), json!(count)))
                .collect();
            json!({
                "event": "ended", "connection": id, "peer": peer, "export": export, "reason": reason,
                "seconds": duration.as_secs_f64(), "read-bytes": counts.read_bytes,
                "written-bytes": counts.written_bytes, "operations": operations, "errors": counts.errors,
            })
        }
        Event::AcceptFailed { error } => json!({"event": "accept-failed", "error": error.to_string()}),
        other => json!({"event": format!("{other:?}")}),
    };
    if let Value::Object(rest) = rest {
        document.extend(rest);
    }
    Value::Object(document)
}

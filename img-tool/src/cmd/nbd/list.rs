//! `nbd list`: which devices are in use, and what they show.

use nbd_server::kernel::{self, Status};
use serde_json::{Value, json};

use super::record::{self, Record};
use crate::app::App;
use crate::cli::OutputFormat;
use crate::exit::{Exit, Outcome};

/// List the devices that are in use
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg nbd list
  vimg nbd list --output json")]
pub(crate) struct Args {
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    output: Option<String>,
}

/// A device, and what its server has written down.
struct Entry {
    status: Status,
    record: Option<Record>,
    alive: bool,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "nbd", app)?;
    let used = kernel::list().into_iter().filter(Status::connected);
    let entries: Vec<Entry> = used
        .map(|status| {
            let device = status.device;
            Entry { status, record: record::read(device), alive: record::is_alive(device) }
        })
        .collect();
    match output {
        OutputFormat::Json => {
            let list = Value::Array(entries.iter().map(Entry::to_json).collect());
            app.print(&format!("{list:#}\n"))?;
        }
        OutputFormat::Human => app.print(&table(&entries))?,
    }
    Ok(Exit::OK)
}

impl Entry {
    /// The server's process, or the one that has connected the device.
    fn pid(&self) -> Option<u32> {
        match &self.record {
            Some(record) => record.pid,
            None => self.status.pid,
        }
    }

    /// Who answers the device's requests.
    fn server(&self) -> &'static str {
        match &self.record {
            Some(record) if record.remote => "remote",
            Some(_) if self.alive => "vimg",
            Some(_) => "dead",
            None => "foreign",
        }
    }

    fn image(&self) -> String {
        let record = self.record.as_ref().map(|record| {
            let snapshot =
                record.snapshot.as_ref().map(|name| format!(" (snapshot {name})")).unwrap_or_default();
            let partition =
                record.partition.map(|number| format!(" (partition {number})")).unwrap_or_default();
            let overlay = if record.overlay { " (overlay)" } else { "" };
            format!("{}{snapshot}{partition}{overlay}", record.image)
        });
        record.or_else(|| self.status.backend.clone()).unwrap_or_default()
    }

    fn to_json(&self) -> Value {
        let status = &self.status;
        let partitions: Vec<Value> = status
            .partitions
            .iter()
            .map(|found| {
                json!({
                    "device": format!("/dev/{}", found.name),
                    "number": found.number,
                    "offset": found.offset,
                    "size": found.len,
                })
            })
            .collect();
        let record = self.record.as_ref();
        json!({
            "device": status.device.to_string(),
            "size": status.size,
            "read-only": status.read_only,
            "block-size": status.block_size,
            "server": self.server(),
            "pid": self.pid(),
            "image": record.map(|record| &record.image).or(status.backend.as_ref()),
            "format": record.map(|record| &record.format),
            "snapshot": record.and_then(|record| record.snapshot.as_ref()),
            "partition": record.and_then(|record| record.partition),
            "overlay": record.is_some_and(|record| record.overlay),
            "connections": record.map(|record| record.connections),
            "partitions": partitions,
        })
    }
}

fn table(entries: &[Entry]) -> String {
    let mut text = String::new();
    if entries.is_empty() {
        return text;
    }
    let mut line = |columns: [&str; 7]| {
        let [device, size, mode, partitions, server, pid, image] = columns;
        text.push_str(&format!(
            "{device:<12}{size:>10}  {mode:<5}{partitions:>10}  {server:<8}{pid:>8}  {image}\n"
        ));
    };
    line(["DEVICE", "SIZE", "MODE", "PARTITIONS", "SERVER", "PID", "IMAGE"]);
    for entry in entries {
        let status = &entry.status;
        line([
            &status.device.to_string(),
            &block::size::human(status.size),
            if status.read_only { "ro" } else { "rw" },
            &status.partitions.len().to_string(),
            entry.server(),
            &entry.pid().map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            &entry.image(),
        ]);
    }
    text
}

//! Numbers for those who watch servers.

use std::fmt::Write as _;
use std::time::Duration;

use super::stats::Counts;

/// What a server has done until now.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// How long it has been there.
    pub uptime: Duration,
    /// Connections now.
    pub connections: usize,
    /// Connections until now.
    pub accepted: u64,
    /// Name, size in bytes and numbers of each export.
    pub exports: Vec<(String, u64, Counts)>,
}

impl Snapshot {
    /// The numbers in the text format of Prometheus (version 0.0.4).
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        metric(&mut out, "uptime_seconds", "gauge", "How long the server has been there.");
        let _ = writeln!(out, "vimg_nbd_uptime_seconds {:.3}", self.uptime.as_secs_f64());
        metric(&mut out, "connections", "gauge", "Clients that are connected now.");
        let _ = writeln!(out, "vimg_nbd_connections {}", self.connections);
        metric(&mut out, "connections_total", "counter", "Clients that have connected.");
        let _ = writeln!(out, "vimg_nbd_connections_total {}", self.accepted);
        metric(&mut out, "export_size_bytes", "gauge", "Size of the disk.");
        for (name, size, _) in &self.exports {
            let _ = writeln!(out, "vimg_nbd_export_size_bytes{{export=\"{}\"}} {size}", escape(name));
        }
        metric(&mut out, "requests_total", "counter", "Requests that were answered.");
        for (name, _, counts) in &self.exports {
            for (command, count) in counts.by_name().filter(|(command, _)| *command != "disc") {
                let export = escape(name);
                let labels = format!("export=\"{export}\",command=\"{command}\"");
                let _ = writeln!(out, "vimg_nbd_requests_total{{{labels}}} {count}");
            }
        }
        let read = |counts: &Counts| counts.read_bytes;
        self.column(&mut out, "read_bytes_total", "Bytes that clients have read.", read);
        let written = |counts: &Counts| counts.written_bytes;
        self.column(&mut out, "written_bytes_total", "Bytes that clients have written.", written);
        let errors = |counts: &Counts| counts.errors;
        self.column(&mut out, "errors_total", "Requests that were answered with an error.", errors);
        out
    }

    fn column(&self, out: &mut String, name: &str, help: &str, value: impl Fn(&Counts) -> u64) {
        metric(out, name, "counter", help);
        for (export, _, counts) in &self.exports {
            let _ = writeln!(out, "vimg_nbd_{name}{{export=\"{}\"}} {}", escape(export), value(counts));
        }
    }
}

fn metric(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP vimg_nbd_{name} {help}\n# TYPE vimg_nbd_{name} {kind}");
}

/// A label's value: backslashes, quotes and line ends are escaped.
fn escape(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_and_every_metric_is_described() {
        let exports = vec![("a\"b\\".to_owned(), 4096, Counts { read_bytes: 7, ..Counts::default() })];
        let snapshot = Snapshot { uptime: Duration::from_secs(2), connections: 1, accepted: 3, exports };
        let text = snapshot.prometheus();
        assert!(text.contains("vimg_nbd_read_bytes_total{export=\"a\\\"b\\\\\"} 7\n"), "{text}");
        let types = text.lines().filter(|line| line.starts_with("# TYPE")).count();
        assert_eq!(types, 8, "{text}");
    }
}

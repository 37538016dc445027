//! The description for people, line for line as qemu-img prints it: scripts read it too.

use std::fmt::Write as _;

use block::image::{SnapshotInfo, Value};
use block::size::human;

use super::Description;

/// Turns seconds since the epoch into local time as `2026-11-20 16:25:03`; the library does not know where
/// the user is.
pub type LocalTime<'a> = &'a dyn Fn(u32) -> String;

impl Description {
    /// As text, several lines.
    pub fn to_text(&self, local_time: LocalTime<'_>) -> String {
        let mut out = String::new();
        self.write(&mut out, "", "/", local_time);
        out
    }

    fn write(&self, out: &mut String, indent: &str, path: &str, local_time: LocalTime<'_>) {
        let mut line = |text: String| {
            let _ = writeln!(out, "{indent}{text}");
        };
        let size = format!("{} ({} bytes)", human(self.virtual_size), self.virtual_size);
        if self.is_protocol {
            line(format!("filename: {}", self.filename));
            line(format!("protocol type: {}", self.format));
            line(format!("file length: {size}"));
        } else {
            line(format!("image: {}", self.filename));
            line(format!("file format: {}", self.format));
            line(format!("virtual size: {size}"));
        }
        line(format!("disk size: {}", self.actual_size.map_or_else(|| "unavailable".to_owned(), human)));
        if self.image.encrypted {
            line("encrypted: yes".to_owned());
        }
        if let Some(size) = self.image.cluster_size {
            line(format!("cluster_size: {size}"));
        }
        if self.image.dirty == Some(true) {
            line("cleanly shut down: no".to_owned());
        }
        if let Some(name) = &self.image.backing_file {
            line(format!("backing file: {name}{}", self.actual_path(name)));
        }
        if let Some(format) = &self.image.backing_format {
            line(format!("backing file format: {format}"));
        }
        write_snapshots(out, indent, &self.image.snapshots, local_time);
        self.write_specific(out, indent);
        self.write_children(out, indent, path, local_time);
    }

    fn actual_path(&self, name: &str) -> String {
        match &self.full_backing_filename {
            Some(full) if full == name => String::new(),
            Some(full) => format!(" (actual path: {full})"),
            None => " (cannot determine actual path)".to_owned(),
        }
    }

    fn write_specific(&self, out: &mut String, indent: &str) {
        if self.image.specific.is_empty() {
            return;
        }
        let _ = writeln!(out, "{indent}Format specific information:");
        write_members(out, &self.image.specific, &format!("{indent}    "));
    }

    fn write_children(&self, out: &mut String, indent: &str, path: &str, local_time: LocalTime<'_>) {
        for (name, child) in self.named_children() {
            let path = format!("{path}{name}");
            let _ = writeln!(out, "{indent}Child node '{path}':");
            child.write(out, &format!("{indent}    "), &format!("{path}/"), local_time);
        }
    }
}

fn write_snapshots(out: &mut String, indent: &str, snapshots: &[SnapshotInfo], local_time: LocalTime<'_>) {
    if snapshots.is_empty() {
        return;
    }
    let _ = writeln!(out, "{indent}Snapshot list:");
    out.push_str(&snapshot_table(snapshots, indent, local_time));
}

/// The table of snapshots, with its heading.
pub fn snapshot_table(snapshots: &[SnapshotInfo], indent: &str, local_time: LocalTime<'_>) -> String {
    let row = |id: &str, tag: &str, size: &str, date: &str, clock: &str, icount: &str| {
        format!("{indent}{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
    };
    let mut table = row("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    for snapshot in snapshots {
        table.push_str(&row(
            &snapshot.id,
            &snapshot.name,
            &human(snapshot.vm_state_size),
            &local_time(snapshot.date_sec),
            &clock(snapshot.vm_clock_nsec),
            &snapshot.icount.map_or_else(|| "--".to_owned(), |icount| icount.to_string()),
        ));
    }
    table
}

/// Running time as hours, minutes, seconds, milliseconds.
fn clock(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let milliseconds = nanoseconds / 1_000_000 % 1000;
    format!("{:04}:{:02}:{:02}.{milliseconds:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn write_members(out: &mut String, members: &[(&'static str, Value)], indent: &str) {
    for (key, value) in members {
        write_value(out, &key.replace('-', " "), value, indent);
    }
}

fn write_value(out: &mut String, label: &str, value: &Value, indent: &str) {
    let deeper = format!("{indent}    ");
    let _ = match value {
        Value::Bool(on) => writeln!(out, "{indent}{label}: {on}"),
        Value::Int(number) => writeln!(out, "{indent}{label}: {number}"),
        Value::Text(text) => writeln!(out, "{indent}{label}: {text}"),
        Value::List(_) | Value::Map(_) => writeln!(out, "{indent}{label}:"),
    };
    match value {
        Value::List(items) => {
            for (index, item) in items.iter().enumerate() {
                write_value(out, &format!("[{index}]"), item, &deeper);
            }
        }
        Value::Map(members) => write_members(out, members, &deeper),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_time_is_shown_in_hours() {
        assert_eq!(clock(0), "0000:00:00.000");
        assert_eq!(clock(3_723_004_999_999), "0001:02:03.004");
    }

    #[test]
    fn nested_values_are_indented() {
        let members = [(
            "encrypt-slots",
            Value::List(vec![Value::Map(vec![("key-offset", Value::Int(4096))]), Value::Text("x".into())]),
        )];
        let mut out = String::new();
        write_members(&mut out, &members, "    ");
        assert_eq!(out, "    encrypt slots:\n        [0]:\n            key offset: 4096\n        [1]: x\n");
    }
}

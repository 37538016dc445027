//! A plan as JSON and as text for people.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Action, Change, Plan, Stop};

impl Plan {
    /// The plan as JSON: `changes` (each with `volume`, `path`, `guest-path`, `action`, `topic`, `reason`, `undo`,
    /// `old-sha256`, `new-sha256`, `bytes`, `diff`, and `mode` or `target` where there is one), `left-alone`, `to-do`, `stops`.
    /// Contents are not in it.
    pub fn to_json(&self) -> Value {
        json!({
            "changes": self.changes.iter().map(change).collect::<Vec<_>>(),
            "left-alone": self.left_alone,
            "to-do": self.to_do,
            "stops": self.stops.iter().map(Stop::sentence).collect::<Vec<_>>(),
        })
    }

    /// The plan for people. What comes out of the guest is shown without control characters.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        if self.changes.is_empty() {
            out.push_str("Nothing has to be changed.\n");
        }
        for (number, change) in (1..).zip(&self.changes) {
            text(&mut out, number, change);
        }
        list(&mut out, "Left alone:", &self.left_alone);
        list(&mut out, "To do:", &self.to_do);
        out
    }
}

fn change(change: &Change) -> Value {
    let mut value = json!({
        "volume": change.volume,
        "path": change.path.to_string_lossy(),
        "guest-path": change.guest_path.to_string_lossy(),
        "action": change.action.name(),
        "topic": change.topic,
        "reason": change.reason,
        "undo": change.undo,
        "old-sha256": digest(&change.old_digest),
        "new-sha256": digest(&change.new_digest),
        "bytes": change.action.bytes().len(),
        "diff": change.diff,
    });
    match &change.action {
        Action::Create { mode, .. } | Action::CreateDirectory { mode } => {
            value["mode"] = json!(format!("{mode:04o}"));
        }
        Action::Symlink { target } => value["target"] = json!(target.to_string_lossy()),
        Action::Replace { .. } | Action::Append { .. } | Action::Remove => {}
    }
    value
}

fn digest(digest: &str) -> Value {
    if digest.is_empty() { Value::Null } else { json!(digest) }
}

fn text(out: &mut String, number: usize, change: &Change) {
    let verb = match &change.action {
        Action::Replace { .. } => "change",
        Action::Append { .. } => "append to",
        Action::Create { .. } => "create",
        Action::CreateDirectory { .. } => "create folder",
        Action::Symlink { .. } => "link",
        Action::Remove => "remove",
    };
    let _ = writeln!(
        out,
        "{number}. {verb} {}  [{}]",
        printable(&change.guest_path.to_string_lossy()),
        change.topic
    );
    let _ = writeln!(out, "   why:  {}", printable(&change.reason));
    match &change.action {
        Action::Append { bytes } => {
            let _ = writeln!(out, "   adds: {} bytes", bytes.len());
        }
        Action::Symlink { target } => {
            let _ = writeln!(out, "   to:   {}", printable(&target.to_string_lossy()));
        }
        _ => {}
    }
    for line in change.diff.iter().filter(|_| !matches!(change.action, Action::Symlink { .. })) {
        let _ = writeln!(out, "   {}", printable(line));
    }
    let _ = writeln!(out, "   undo: {}", printable(&change.undo));
}

fn list(out: &mut String, title: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(out, "{title}");
    for line in lines {
        let _ = writeln!(out, " - {}", printable(line));
    }
}

/// Text of the guest must not move the terminal's cursor.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let change = Change {
            volume: 0,
            path: "/etc/fstab".into(),
            guest_path: "/etc/fstab".into(),
            action: Action::Replace { bytes: b"new".to_vec() },
            topic: "device-name",
            reason: "names".to_owned(),
            undo: "put it back".to_owned(),
            needed: false,
            old_digest: "aa".to_owned(),
            new_digest: "bb".to_owned(),
            diff: vec!["-\u{1b}[2Jold".to_owned(), "+new".to_owned()],
        };
        Plan {
            changes: vec![change],
            left_alone: vec![],
            to_do: vec!["Say so.".to_owned()],
            ..Plan::default()
        }
    }

    #[test]
    fn for_people() {
        let text = plan().to_text();
        assert_eq!(
            text,
            "1. change /etc/fstab  [device-name]\n   why:  names\n   -\u{fffd}[2Jold\n   +new\n   undo: put it back\nTo do:\n - Say so.\n"
        );
        assert_eq!(Plan::default().to_text(), "Nothing has to be changed.\n");
    }

    #[test]
    fn for_programs() {
        let value = plan().to_json();
        let change = &value["changes"][0];
        assert_eq!(change["action"], "replace");
        assert_eq!(change["new-sha256"], "bb");
        assert_eq!(change["bytes"], 3);
        assert_eq!(value["to-do"][0], "Say so.");
    }
}

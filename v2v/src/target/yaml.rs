//! YAML in blocks, made of a JSON value.

use serde_json::Value;

/// The value as a YAML document (YAML 1.2, chapter 8), without markers.
pub(super) fn block(value: &Value) -> String {
    let mut text = String::new();
    write(value, 0, &mut text);
    text
}

fn indent(depth: usize, text: &mut String) {
    for _ in 0..depth {
        text.push_str("  ");
    }
}

/// Writes `value` on lines of its own.
fn write(value: &Value, depth: usize, text: &mut String) {
    match value {
        Value::Object(members) if !members.is_empty() => {
            for (index, (name, member)) in members.iter().enumerate() {
                // The first one may stand behind the dash of a list.
                if index > 0 || !text.ends_with("- ") {
                    indent(depth, text);
                }
                text.push_str(&scalar(name));
                text.push(':');
                below(member, depth + 1, text);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                if index > 0 || !text.ends_with("- ") {
                    indent(depth, text);
                }
                text.push_str("- ");
                match is_block(item) {
                    true => write(item, depth + 1, text),
                    false => line(item, text),
                }
            }
        }
        other => line(other, text),
    }
}

fn is_block(value: &Value) -> bool {
    match value {
        Value::Object(members) => !members.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    }
}

/// A member's value: behind its name, or below it.
fn below(value: &Value, depth: usize, text: &mut String) {
    if is_block(value) {
        text.push('\n');
        // Lists stand as deep as the name they belong to, as Kubernetes' own manifests have it.
        let depth = if value.is_array() { depth - 1 } else { depth };
        write(value, depth, text);
    } else {
        text.push(' ');
        line(value, text);
    }
}

fn line(value: &Value, text: &mut String) {
    match value {
        Value::String(string) => text.push_str(&scalar(string)),
        other => text.push_str(&other.to_string()),
    }
    text.push('\n');
}

/// A string, in quotes unless no reader could take it for anything else: a number, a date, a word like `no`.
fn scalar(string: &str) -> String {
    let starts = string.chars().next().is_some_and(|c| c.is_ascii_alphabetic());
    let plain = string.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    let word = ["y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"]
        .contains(&string.to_ascii_lowercase().as_str());
    match starts && plain && !word {
        true => string.to_owned(),
        // JSON's strings are YAML's (section 5.7), if nothing in them is out of its reach.
        false => Value::from(string).to_string().replace('\u{7f}', "\\u007f"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn blocks_are_as_people_write_them() {
        let value =
            json!({"a": {"b": [1, "x y", {"c": "no", "d": {}}], "e": []}, "f": ["1", "g/h.i-j_k"], "l": ""});
        let expected = "a:
  b:
  - 1
  - \"x y\"
  - c: \"no\"
    d: {}
  e: []
f:
- \"1\"
- g/h.i-j_k
l: \"\"
";
        assert_eq!(block(&value), expected);
    }

    /// Another reader finds what was written.
    #[test]
    fn python_reads_the_same_value() {
        let value = json!({"a": [[1, [2]], {"x": [{"y": null, "z": [true, 1.5]}]}], "1": "2024-01-01", "k: v": "# x\n\t'\"\\\u{7f}é", "yes": "off", "m": "0x1f"});
        let script = "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin.read())))";
        let child = std::process::Command::new("/usr/bin/python3")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn();
        let Ok(mut child) = child else {
            eprintln!("skipped: no python3");
            return;
        };
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, block(&value).as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        if !output.status.success()
            && std::process::Command::new("/usr/bin/python3")
                .args(["-c", "import yaml"])
                .status()
                .is_ok_and(|status| !status.success())
        {
            eprintln!("skipped: no python3-yaml");
            return;
        }
        assert!(output.status.success(), "{}", block(&value));
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), value, "{}", block(&value));
    }
}

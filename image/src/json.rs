//! JSON as qemu-img prints it, byte for byte, since scripts compare text.
//!
//! Four spaces a level, `"key": value`, an empty list or object still on two lines, and everything outside
//! printable ASCII escaped with upper-case hex digits.

use serde_json::Value;

/// The document, without a line feed at the end.
pub fn pretty(value: &Value) -> String {
    let mut out = String::new();
    write(&mut out, value, 0);
    out
}

fn write(out: &mut String, value: &Value, level: usize) {
    match value {
        Value::Object(members) => {
            out.push('{');
            for (index, (key, member)) in members.iter().enumerate() {
                new_line(out, index, level + 1);
                out.push_str(&quote(key));
                out.push_str(": ");
                write(out, member, level + 1);
            }
            new_line(out, 0, level);
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                new_line(out, index, level + 1);
                write(out, item, level + 1);
            }
            new_line(out, 0, level);
            out.push(']');
        }
        Value::String(text) => out.push_str(&quote(text)),
        scalar => out.push_str(&scalar.to_string()),
    }
}

fn new_line(out: &mut String, index: usize, level: usize) {
    out.push_str(if index == 0 { "\n" } else { ",\n" });
    out.extend(std::iter::repeat_n("    ", level));
}

/// A string in quotes.
pub fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
    out
}

/// A format's own description as JSON.
pub fn from_image_value(value: &block::image::Value) -> Value {
    use block::image::Value as Described;
    match value {
        Described::Bool(on) => Value::Bool(*on),
        Described::Int(number) => Value::from(*number),
        Described::Text(text) => Value::from(text.as_str()),
        Described::List(items) => Value::Array(items.iter().map(from_image_value).collect()),
        Described::Map(members) => object(members),
    }
}

/// Named values as a JSON object, in their order.
pub fn object(members: &[(&'static str, block::image::Value)]) -> Value {
    Value::Object(members.iter().map(|(key, value)| ((*key).to_owned(), from_image_value(value))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn empty_containers_take_two_lines() {
        assert_eq!(pretty(&json!({"a": [], "b": {}})), "{\n    \"a\": [\n    ],\n    \"b\": {\n    }\n}");
    }

    #[test]
    fn members_are_separated_by_commas() {
        assert_eq!(pretty(&json!([1, true, "x"])), "[\n    1,\n    true,\n    \"x\"\n]");
    }

    #[test]
    fn strings_are_escaped_as_the_real_tool_does() {
        assert_eq!(quote("\u{fc} \"b\\\tc\u{1f600}\u{7f}"), r#""\u00FC \"b\\\tc\uD83D\uDE00\u007F""#);
    }
}

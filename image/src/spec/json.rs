//! `json:` names: qemu's relaxed JSON in, qemu's order of keys out.

use std::borrow::Cow;

use serde_json::{Map, Value};

use block::{Error, Result};

/// Parses the object after `json:`. As qemu, accepts strings in single quotes.
///
/// # Errors
/// Not JSON, or not an object.
pub(crate) fn parse_object(text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(&double_quotes(text)) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::usage("Invalid JSON object given")),
        Err(error) => {
            Err(Error::usage(format!("Could not parse the JSON options: JSON parse error, {error}")))
        }
    }
}

/// Rewrites strings in single quotes as strings in double quotes.
fn double_quotes(text: &str) -> Cow<'_, str> {
    if !text.contains('\'') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                out.push('"');
            }
            (Some(open), c) if c == open => {
                quote = None;
                out.push('"');
            }
            (Some('\''), '"') => out.push_str("\\\""),
            (Some(_), '\\') => match chars.next() {
                Some('\'') => out.push('\''),
                Some(escaped) => out.extend(['\\', escaped]),
                None => out.push('\\'),
            },
            (_, c) => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// One line of JSON as qemu writes names: keys in the order of its hash table.
pub(crate) fn to_qemu_string(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.iter().rev().collect();
            keys.sort_by_key(|(key, _)| bucket(key));
            let members: Vec<_> = keys
                .into_iter()
                .map(|(key, value)| format!("{}: {}", crate::json::quote(key), to_qemu_string(value)))
                .collect();
            format!("{{{}}}", members.join(", "))
        }
        Value::Array(items) => {
            format!("[{}]", items.iter().map(to_qemu_string).collect::<Vec<_>>().join(", "))
        }
        Value::String(text) => crate::json::quote(text),
        other => other.to_string(),
    }
}

/// The bucket of qemu's dictionary that a key falls into; dictionaries are walked in the order of buckets.
pub(crate) fn bucket(key: &str) -> u32 {
    let len = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let sum = key.bytes().enumerate().fold(0x238F_13AF_u32.wrapping_mul(len), |sum, (i, byte)| {
        sum.wrapping_add(u32::from(byte) << (i * 5 % 24))
    });
    1_103_515_243_u32.wrapping_mul(sum).wrapping_add(12345) % 512
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn single_quotes_are_accepted_as_qemu_accepts_them() {
        let object = parse_object(r#"{'driver':"raw", 'a"b': 'it\'s', "c'd": 1}"#).unwrap();
        assert_eq!(Value::Object(object), json!({"driver": "raw", "a\"b": "it's", "c'd": 1}));
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        assert_eq!(parse_object("[]").unwrap_err().to_string(), "Invalid JSON object given");
        assert!(
            parse_object("{bad").unwrap_err().to_string().starts_with("Could not parse the JSON options")
        );
    }

    #[test]
    fn keys_come_out_in_the_order_of_the_real_tool() {
        let tree = json!({"driver": "raw", "offset": 512, "size": 4096, "file": {"filename": "a", "driver": "file"}});
        assert_eq!(
            to_qemu_string(&tree),
            r#"{"offset": 512, "driver": "raw", "size": 4096, "file": {"driver": "file", "filename": "a"}}"#
        );
    }
}

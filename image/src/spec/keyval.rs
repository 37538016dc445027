//! Option strings: `key=value,other.key=value`, where `,,` stands for a comma in a value.

use serde_json::{Map, Value};

use block::{Error, Result};

/// Splits at single commas; `,,` becomes a comma.
pub(crate) fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, parts.last_mut()) {
            (',', Some(last)) if chars.peek() == Some(&',') => {
                chars.next();
                last.push(',');
            }
            (',', _) => parts.push(String::new()),
            (c, Some(last)) => last.push(c),
            (_, None) => {}
        }
    }
    parts
}

/// Parses an option string into flat keys. A first word without `=` is the value of `implied_key`; a later one
/// is a switch that is on.
pub(crate) fn parse(text: &str, implied_key: &str, warnings: &mut Vec<String>) -> Map<String, Value> {
    let mut options = Map::new();
    if text.is_empty() {
        return options;
    }
    for (index, part) in split_commas(text).into_iter().enumerate() {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None if index == 0 => (implied_key.to_owned(), part),
            None if part.is_empty() => continue,
            None => {
                warnings.push(format!(
                    "short-form boolean option '{part}' deprecated\nPlease use {part}=on instead"
                ));
                (part, "on".to_owned())
            }
        };
        options.insert(key, Value::String(value));
    }
    options
}

/// Turns dotted keys into nested objects, at every level.
///
/// # Errors
/// A key is used both as a value and as a group.
pub(crate) fn nest(options: Map<String, Value>) -> Result<Map<String, Value>> {
    let mut nested = Map::new();
    for (key, value) in options {
        let value = match value {
            Value::Object(inner) => Value::Object(nest(inner)?),
            other => other,
        };
        insert(&mut nested, &key, value)?;
    }
    Ok(nested)
}

fn insert(into: &mut Map<String, Value>, key: &str, value: Value) -> Result<()> {
    let Some((group, rest)) = key.split_once('.') else {
        return insert_leaf(into, key, value);
    };
    let slot = into.entry(group).or_insert_with(|| Value::Object(Map::new()));
    match slot {
        Value::Object(inner) => insert(inner, rest, value),
        _ => Err(conflict(group)),
    }
}

fn insert_leaf(into: &mut Map<String, Value>, key: &str, value: Value) -> Result<()> {
    match (into.get_mut(key), value) {
        (Some(Value::Object(old)), Value::Object(new)) => {
            for (key, value) in new {
                insert_leaf(old, &key, value)?;
            }
        }
        (Some(Value::Object(_)), _) => return Err(conflict(key)),
        (_, value) => {
            into.insert(key.to_owned(), value);
        }
    }
    Ok(())
}

fn conflict(key: &str) -> Error {
    Error::usage(format!("'{key}' is given both as a value and as a group of options"))
}

/// The reverse of [`nest`] for what is left over: flat keys with dots.
pub(crate) fn flatten(options: &Map<String, Value>) -> Vec<(String, Value)> {
    let mut flat = vec![];
    for (key, value) in options {
        match value {
            Value::Object(inner) => {
                flat.extend(flatten(inner).into_iter().map(|(rest, value)| (format!("{key}.{rest}"), value)));
            }
            other => flat.push((key.clone(), other.clone())),
        }
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(text: &str) -> Value {
        Value::Object(nest(parse(text, "file", &mut vec![])).unwrap())
    }

    #[test]
    fn double_commas_are_commas() {
        assert_eq!(split_commas("a=b,,c,d"), ["a=b,c", "d"]);
        assert_eq!(split_commas("a,,,b"), ["a,", "b"]);
        assert_eq!(split_commas(""), [""]);
    }

    #[test]
    fn dotted_keys_nest() {
        assert_eq!(
            parsed("driver=qcow2,file.driver=file,file.filename=a.b,x.y.z=1"),
            json!({"driver": "qcow2", "file": {"driver": "file", "filename": "a.b"}, "x": {"y": {"z": "1"}}})
        );
        assert_eq!(parsed("disk.img"), json!({"file": "disk.img"}));
    }

    #[test]
    fn switches_are_on_and_complained_about() {
        let mut warnings = vec![];
        assert_eq!(parse("a=1,flag", "file", &mut warnings).get("flag"), Some(&json!("on")));
        assert_eq!(warnings.len(), 1);
    }

    #[test]
    fn a_key_is_a_value_or_a_group_but_not_both() {
        nest(parse("file=x,file.filename=y", "file", &mut vec![])).unwrap_err();
        nest(parse("file.filename=y,file=x", "file", &mut vec![])).unwrap_err();
    }

    #[test]
    fn flattening_undoes_nesting() {
        let map = nest(parse("a.b=1,a.c.d=2,e=3", "file", &mut vec![])).unwrap();
        let flat: Vec<_> = flatten(&map).into_iter().map(|(key, _)| key).collect();
        assert_eq!(flat, ["a.b", "a.c.d", "e"]);
    }
}

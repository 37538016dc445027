//! The text that describes a group: `name = value`, and `name { ... }` for sections within sections.

use block::{Error, Result};

/// The deepest that sections are nested; LVM itself needs four levels.
const MOST_DEPTH: usize = 16;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    Number(u64),
    List(Vec<Self>),
    /// A number that is negative or no integer: nothing that matters here.
    Other,
}

impl Value {
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn number(&self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }
}

/// What stands between two braces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Section {
    values: Vec<(String, Value)>,
    children: Vec<(String, Self)>,
}

impl Section {
    fn value(&self, key: &str) -> Option<&Value> {
        self.values.iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }

    /// A text, empty if there is none.
    pub(super) fn text(&self, key: &str) -> &str {
        self.value(key).and_then(Value::text).unwrap_or("")
    }

    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.value(key).and_then(Value::number)
    }

    /// A list, empty if there is none.
    pub(super) fn list(&self, key: &str) -> &[Value] {
        match self.value(key) {
            Some(Value::List(list)) => list,
            _ => &[],
        }
    }

    pub(super) fn children(&self) -> impl Iterator<Item = (&str, &Self)> {
        self.children.iter().map(|(name, section)| (name.as_str(), section))
    }

    /// The sections within a section.
    pub(super) fn sections(&self, key: &str) -> impl Iterator<Item = (&str, &Self)> {
        self.children().filter(move |(name, _)| *name == key).flat_map(|(_, section)| section.children())
    }
}

/// Reads a whole text.
pub(super) fn parse(text: &[u8]) -> Result<Section> {
    let mut parser = Parser { text, at: 0 };
    parser.section(0)
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn error(&self, what: &str) -> Error {
        Error::invalid(format!("{what} at byte {} of the text", self.at))
    }

    /// The next byte that is neither white space nor comment.
    fn peek(&mut self) -> Option<u8> {
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b'#' => {
                    let line = self.text[self.at..].iter().position(|byte| *byte == b'\n');
                    self.at = line.map_or(self.text.len(), |line| self.at + line);
                }
                // LVM ends its text with a zero.
                0 => return None,
                byte if byte.is_ascii_whitespace() => self.at += 1,
                byte => return Some(*byte),
            }
        }
        None
    }

    fn take(&mut self, wanted: u8) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn section(&mut self, depth: usize) -> Result<Section> {
        let mut section = Section::default();
        while let Some(byte) = self.peek() {
            if byte == b'}' {
                break;
            }
            let name = self.word()?;
            if self.take(b'{') {
                if depth == MOST_DEPTH {
                    return Err(self.error("too many sections within sections"));
                }
                let child = self.section(depth + 1)?;
                if !self.take(b'}') {
                    return Err(self.error("a section without end"));
                }
                section.children.push((name, child));
            } else if self.take(b'=') {
                let value = self.value()?;
                section.values.push((name, value));
            } else {
                return Err(self.error("neither '=' nor '{'"));
            }
        }
        if depth == 0 && self.peek().is_some() { Err(self.error("a '}' too many")) } else { Ok(section) }
    }

    fn word(&mut self) -> Result<String> {
        let rest = &self.text[self.at..];
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-+./@".contains(byte);
        let len = rest.iter().position(|byte| !is_word(byte)).unwrap_or(rest.len());
        if len == 0 {
            return Err(self.error("no name"));
        }
        self.at += len;
        Ok(String::from_utf8_lossy(&rest[..len]).into_owned())
    }

    fn value(&mut self) -> Result<Value> {
        if !self.take(b'[') {
            return self.scalar();
        }
        let mut list = vec![];
        while !self.take(b']') {
            list.push(self.scalar()?);
            if !self.take(b',') && self.peek() != Some(b']') {
                return Err(self.error("a list without end"));
            }
        }
        Ok(Value::List(list))
    }

    fn scalar(&mut self) -> Result<Value> {
        match self.peek() {
            Some(b'"') => self.string().map(Value::Text),
            _ => Ok(self.word()?.parse().map_or(Value::Other, Value::Number)),
        }
    }

    fn string(&mut self) -> Result<String> {
        let mut bytes = vec![];
        let mut rest = self.text[self.at + 1..].iter();
        loop {
            match rest.next() {
                Some(b'"') => break,
                Some(b'\\') => bytes.extend(rest.next()),
                Some(byte) => bytes.push(*byte),
                None => return Err(self.error("a string without end")),
            }
        }
        self.at = self.text.len() - rest.len();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description() {
        let text = b"vg0 {\nid = \"abc\" # comment }\nseqno = 7\nstatus = [\"READ\", \"WRITE\"]\nflags = []\nx = -1\n\
            physical_volumes {\npv0 {\nid = \"a\\\"b\"\n}\n}\n}\n# end\ncontents = \"Text\"\n\0garbage";
        let document = parse(text).unwrap();
        let (name, group) = document.children().next().unwrap();
        assert_eq!((name, group.text("id"), group.number("seqno")), ("vg0", "abc", Some(7)));
        assert_eq!(group.list("status").len(), 2);
        assert_eq!(group.value("x"), Some(&Value::Other));
        let (name, volume) = group.sections("physical_volumes").next().unwrap();
        assert_eq!((name, volume.text("id")), ("pv0", "a\"b"));
        assert_eq!(document.text("contents"), "Text");
    }

    #[test]
    fn what_is_not_a_description() {
        for bad in
            ["a", "a {", "}", "a = \"", "a = [", "a = [1", "= 1", "a = {", "a {}}", "[", &"a {".repeat(100)]
        {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}

//! Assignments of strings, numbers and lists: xl.cfg(5).

use std::collections::BTreeMap;

use block::{Error, Result};

/// How deep lists may be nested.
const MOST_DEPTH: usize = 4;
/// The most elements of a file.
const MOST_VALUES: usize = 100_000;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// A string, or a number as it is written.
    Text(String),
    /// A list.
    List(Vec<Self>),
}

/// A configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Config(BTreeMap<String, Value>);

impl Config {
    /// Parses a file.
    ///
    /// # Errors
    /// `Invalid`, with the line.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut parser = Parser { rest: text.trim_start_matches('\u{feff}'), line: 1, values: 0 };
        let mut config = Self::default();
        while let Some((key, adds, value)) = parser.statement()? {
            config.set(key, adds, value);
        }
        Ok(config)
    }

    /// The last assignment wins; `+=` appends to what was there.
    fn set(&mut self, key: String, adds: bool, value: Value) {
        match (self.0.get_mut(&key).filter(|_| adds), value) {
            (Some(Value::List(list)), Value::List(mut more)) => list.append(&mut more),
            (Some(Value::Text(text)), Value::Text(more)) => text.push_str(&more),
            (_, value) => {
                self.0.insert(key, value);
            }
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// A string, or the digits of a number, that is not empty.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key)? {
            Value::Text(text) => Some(text.trim()).filter(|text| !text.is_empty()),
            Value::List(_) => None,
        }
    }

    /// A number.
    pub(super) fn number(&self, key: &str) -> Option<i64> {
        let text = self.text(key)?;
        match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) => i64::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        }
    }

    /// Whether a switch is on.
    pub(super) fn is_on(&self, key: &str) -> bool {
        match self.number(key) {
            Some(number) => number != 0,
            None => self.text(key).and_then(crate::source::words::switch) == Some(true),
        }
    }

    /// The strings of a list.
    pub(super) fn list(&self, key: &str) -> Vec<&str> {
        let Some(Value::List(list)) = self.0.get(key) else { return vec![] };
        let texts = list.iter().filter_map(|value| match value {
            Value::Text(text) => Some(text.as_str()),
            Value::List(_) => None,
        });
        texts.collect()
    }
}

struct Parser<'a> {
    rest: &'a str,
    line: usize,
    values: usize,
}

impl Parser<'_> {
    /// The next assignment: name, whether it appends, value.
    fn statement(&mut self) -> Result<Option<(String, bool, Value)>> {
        self.skip(true);
        while self.take(";") {
            self.skip(true);
        }
        if self.rest.is_empty() {
            return Ok(None);
        }
        let key = self.word();
        if key.is_empty() {
            return Err(self.unexpected("a name"));
        }
        self.skip(false);
        let adds = self.take("+=");
        if !adds && !self.take("=") {
            let program =
                matches!(key.as_str(), "import" | "from" | "def" | "if" | "for" | "print" | "while" | "try");
            let error = self.unexpected(&format!("'=' behind '{key}'"));
            return Err(if program {
                error.hint("this configuration is a Python program, as xm allowed; write its result down as plain assignments")
            } else {
                error
            });
        }
        self.skip(false);
        let value = self.value(0)?;
        self.skip(false);
        if !self.rest.is_empty() && !self.rest.starts_with(['\n', '\r', ';']) {
            return Err(self.unexpected("the end of the line"));
        }
        Ok(Some((key, adds, value)))
    }

    fn value(&mut self, depth: usize) -> Result<Value> {
        self.values += 1;
        if self.values > MOST_VALUES {
            return Err(Error::invalid(format!("the configuration has more than {MOST_VALUES} values")));
        }
        match self.rest.chars().next() {
            Some(quote @ ('"' | '\'')) => self.string(quote).map(Value::Text),
            Some('[') if depth < MOST_DEPTH => self.list(depth),
            Some('[') => Err(self.unexpected(&format!("lists within lists less than {MOST_DEPTH} deep"))),
            Some(c) if c.is_ascii_alphanumeric() || c == '-' => Ok(Value::Text(self.word())),
            _ => Err(self.unexpected("a string, a number or a list")),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value> {
        self.take("[");
        let mut values = vec![];
        loop {
            self.skip(true);
            if self.take("]") {
                return Ok(Value::List(values));
            }
            values.push(self.value(depth + 1)?);
            self.skip(true);
            if !self.take(",") && !self.rest.starts_with(']') {
                return Err(self.unexpected("',' or ']'"));
            }
        }
    }

    fn string(&mut self, quote: char) -> Result<String> {
        let mut out = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.rest = self.rest.get(at + 1..).unwrap_or_default();
                    return Ok(out);
                }
                '\n' => break,
                '\\' => match chars.next() {
                    Some((_, 'n')) => out.push('\n'),
                    Some((_, 't')) => out.push('\t'),
                    Some((_, 'r')) => out.push('\r'),
                    Some((_, 'x')) => {
                        let digits: String = chars.by_ref().take(2).map(|(_, digit)| digit).collect();
                        match u8::from_str_radix(&digits, 16) {
                            Ok(code) if digits.len() == 2 => out.push(char::from(code)),
                            _ => return Err(self.unexpected("two hexadecimal digits behind '\\x'")),
                        }
                    }
                    Some((_, other)) => out.push(other),
                    None => break,
                },
                other => out.push(other),
            }
        }
        Err(self.unexpected("the end of the string"))
    }

    /// Letters, digits and what numbers and names have between them.
    fn word(&mut self) -> String {
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let end = self.rest.find(|c| !is_part(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at_checked(end).unwrap_or((self.rest, ""));
        self.rest = rest;
        word.to_owned()
    }

    fn take(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Skips spaces, comments and (if asked) line ends.
    fn skip(&mut self, lines: bool) {
        while let Some(c) = self.rest.chars().next() {
            match c {
                '\n' if lines => self.line += 1,
                '#' => {
                    let end = self.rest.find('\n').unwrap_or(self.rest.len());
                    self.rest = self.rest.get(end..).unwrap_or_default();
                    continue;
                }
                ' ' | '\t' | '\r' => {}
                '\\' if self.rest.starts_with("\\\n") => {
                    self.line += 1;
                    self.rest = self.rest.get(1..).unwrap_or_default();
                }
                _ => return,
            }
            self.rest = self.rest.get(c.len_utf8()..).unwrap_or_default();
        }
    }

    fn unexpected(&self, wanted: &str) -> Error {
        let found: String = self.rest.chars().take_while(|c| *c != '\n').take(20).collect();
        Error::invalid(format!("line {}: expected {wanted}, found '{found}'", self.line))
    }
}

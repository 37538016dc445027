//! Variables, and the block in which GRUB keeps some of them (GRUB manual, "The GRUB environment block").

use std::collections::HashMap;

/// The most bytes of a value: a script can double one with every command.
const MOST_VALUE: usize = 64 << 10;
/// The most bytes of all names and values together.
const MOST_BYTES: usize = 1 << 20;
/// The most variables.
const MOST_VARIABLES: usize = 4096;

/// Variables by their names.
#[derive(Debug, Clone, Default)]
pub(super) struct Env {
    values: HashMap<String, String>,
    bytes: usize,
}

impl Env {
    /// The value; empty if there is none.
    pub(super) fn get(&self, name: &str) -> &str {
        self.values.get(name).map_or("", String::as_str)
    }

    /// Sets a variable. What is beyond all limits is cut off or left out.
    pub(super) fn set(&mut self, name: &str, mut value: String) {
        let mut len = value.len().min(MOST_VALUE);
        while !value.is_char_boundary(len) {
            len -= 1;
        }
        value.truncate(len);
        self.unset(name);
        let bytes = name.len() + value.len();
        if self.values.len() < MOST_VARIABLES && self.bytes + bytes <= MOST_BYTES {
            self.bytes += bytes;
            self.values.insert(name.to_owned(), value);
        }
    }

    pub(super) fn unset(&mut self, name: &str) {
        if let Some(value) = self.values.remove(name) {
            self.bytes -= name.len() + value.len();
        }
    }
}

/// The variables of an environment block: `name=value` on lines that a backslash may continue, then `#` up to its end.
pub(super) fn parse_block(text: &str) -> Option<Vec<(String, String)>> {
    let body = text.strip_prefix("# GRUB Environment Block\n")?;
    let mut variables = vec![];
    let mut characters = body.chars();
    let mut line = String::new();
    loop {
        let character = characters.next();
        match character {
            Some('\\') => line.extend(characters.next()),
            Some('\n') | None => {
                if let Some((name, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
                    variables.push((name.to_owned(), value.to_owned()));
                }
                line.clear();
            }
            Some(character) => line.push(character),
        }
        if character.is_none() || variables.len() > MOST_VARIABLES {
            return Some(variables);
        }
    }
}

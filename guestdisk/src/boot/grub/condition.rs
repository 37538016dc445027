//! `test` and `[ ]` (GRUB manual, "test").

use std::cmp::Ordering;

use super::super::version;
use crate::fs::FileKind;

/// What conditions ask of files: kind and size of what is at a path.
pub(super) type Stat<'a> = &'a dyn Fn(&str) -> Option<(FileKind, u64)>;

/// Whether an expression is true. One that makes no sense is not.
pub(super) fn holds(words: &[String], stat: Stat<'_>) -> bool {
    let mut reader = Reader { words, at: 0, stat, depth: 0 };
    reader.either()
}

struct Reader<'a> {
    words: &'a [String],
    at: usize,
    stat: Stat<'a>,
    depth: u32,
}

impl Reader<'_> {
    fn peek(&self, ahead: usize) -> Option<&str> {
        self.words.get(self.at + ahead).map(String::as_str)
    }

    fn either(&mut self) -> bool {
        let mut result = self.both();
        while self.peek(0) == Some("-o") {
            self.at += 1;
            result |= self.both();
        }
        result
    }

    fn both(&mut self) -> bool {
        let mut result = self.one();
        // Two expressions side by side have to hold both.
        while let Some(word) = self.peek(0).filter(|word| *word != "-o" && *word != ")") {
            if word == "-a" {
                self.at += 1;
            }
            result &= self.one();
        }
        result
    }

    fn one(&mut self) -> bool {
        let Some(first) = self.peek(0).map(str::to_owned) else { return false };
        if let Some(result) = self.binary(&first) {
            return result;
        }
        self.at += 1;
        match first.as_str() {
            "!" if self.depth < 32 => {
                self.depth += 1;
                let result = !self.one();
                self.depth -= 1;
                result
            }
            "(" if self.depth < 32 => {
                self.depth += 1;
                let result = self.either();
                self.depth -= 1;
                self.at += usize::from(self.peek(0) == Some(")"));
                result
            }
            "-n" | "-z" | "-d" | "-e" | "-f" | "-s" => {
                let operand = self.peek(0).unwrap_or("").to_owned();
                self.at += 1;
                self.unary(&first, &operand)
            }
            text => !text.is_empty(),
        }
    }

    fn unary(&self, operator: &str, operand: &str) -> bool {
        let found = || (self.stat)(operand);
        match operator {
            "-n" => !operand.is_empty(),
            "-z" => operand.is_empty(),
            "-d" => found().is_some_and(|(kind, _)| kind == FileKind::Directory),
            "-f" => found().is_some_and(|(kind, _)| kind == FileKind::File),
            "-s" => found().is_some_and(|(_, size)| size > 0),
            _ => found().is_some(),
        }
    }

    fn binary(&mut self, left: &str) -> Option<bool> {
        let (operator, right) = (self.peek(1)?, self.peek(2)?);
        let number = |text: &str| text.trim().parse::<i64>().unwrap_or(0);
        let numbers = || number(left).cmp(&number(right));
        let result = match operator {
            "=" | "==" => left == right,
            "!=" => left != right,
            "<" => left < right,
            "<=" => left <= right,
            ">" => left > right,
            ">=" => left >= right,
            "-eq" => numbers() == Ordering::Equal,
            "-ne" => numbers() != Ordering::Equal,
            "-lt" => numbers() == Ordering::Less,
            "-le" => numbers() != Ordering::Greater,
            "-gt" => numbers() == Ordering::Greater,
            "-ge" => numbers() != Ordering::Less,
            // Numbers behind a common prefix: versions.
            "-pgt" => version::compare(left, right) == Ordering::Greater,
            "-plt" => version::compare(left, right) == Ordering::Less,
            _ => return None,
        };
        self.at += 3;
        Some(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_of_real_configurations() {
        let stat = |path: &str| match path {
            "/file" => Some((FileKind::File, 5)),
            "/empty" => Some((FileKind::File, 0)),
            "/folder" => Some((FileKind::Directory, 0)),
            _ => None,
        };
        for (expression, result) in [
            ("-s /file", true),
            ("-s /empty", false),
            ("-f /empty", true),
            ("-d /folder", true),
            ("-f /folder", false),
            ("! -e /nothing", true),
            ("xy = xy", true),
            ("a != b -a c = d", false),
            ("a = b -o c = c", true),
            ("( a = b -o c = c ) -a ! ( d = e )", true),
            ("2 -gt 10", false),
            ("text", true),
            ("", false),
            ("-z", true),
            ("( ( (", false),
            ("= = =", true),
        ] {
            let words: Vec<_> = expression.split_whitespace().map(str::to_owned).collect();
            assert_eq!(holds(&words, &stat), result, "{expression}");
        }
        let deep = vec!["!".to_owned(); 100_000];
        let _ = holds(&deep, &stat);
    }
}

//! Prompts for passphrases: what is typed at which, once.

use crypt::Secret;

/// What is to be done about a prompt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nobody has given a passphrase.
    NoneGiven,
    /// All that were given have been typed here.
    Refused,
    /// The next one is to be typed.
    Type,
    /// That has been done at this very line.
    Done,
}

/// The passphrases, and the prompts so far.
#[derive(Debug, Default)]
pub(super) struct Prompts {
    passphrases: Vec<Secret>,
    /// Texts of prompts, and how many passphrases have been typed at each.
    asked: Vec<(String, usize)>,
    /// The console's unfinished line has been answered.
    answered: bool,
    /// Passphrases that are to be typed.
    pending: Vec<Secret>,
}

/// More prompts than this are no longer told apart.
const MOST_PROMPTS: usize = 64;

impl Prompts {
    pub(super) fn new(passphrases: Vec<Secret>) -> Self {
        Self { passphrases, ..Self::default() }
    }

    /// Whether no passphrase was given.
    pub(super) fn is_empty(&self) -> bool {
        self.passphrases.is_empty()
    }

    /// The console's line has ended.
    pub(super) fn line_ended(&mut self) {
        self.answered = false;
    }

    /// The guest asks, with these words.
    pub(super) fn asked(&mut self, prompt: &str) -> Answer {
        if self.passphrases.is_empty() {
            return Answer::NoneGiven;
        }
        if self.answered {
            return Answer::Done;
        }
        let prompt = words(prompt);
        let index = self.asked.iter().position(|(text, _)| text == prompt).unwrap_or_else(|| {
            if self.asked.len() < MOST_PROMPTS {
                self.asked.push((prompt.to_owned(), 0));
            }
            self.asked.len() - 1
        });
        let count = &mut self.asked[index].1;
        let Some(passphrase) = self.passphrases.get(*count) else { return Answer::Refused };
        *count += 1;
        self.answered = true;
        self.pending.push(passphrase.clone());
        Answer::Type
    }

    /// What is to be typed now.
    pub(super) fn take(&mut self) -> Vec<Secret> {
        std::mem::take(&mut self.pending)
    }
}

/// The prompt itself, without what stands in front of it on its line when it comes for the first time.
fn words(line: &str) -> &str {
    let start = ["Please unlock", "Please enter", "Enter passphrase", "Password"]
        .iter()
        .filter_map(|start| line.find(start))
        .min();
    line[start.unwrap_or(0)..].trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_prompt_is_answered_once_with_one_after_the_other() {
        let mut none = Prompts::default();
        assert_eq!(none.asked("key: "), Answer::NoneGiven);
        let mut prompts = Prompts::new(vec![Secret::from("a"), Secret::from("b")]);
        assert_eq!(prompts.asked("one: "), Answer::Type);
        assert_eq!(prompts.asked("one: "), Answer::Done);
        prompts.line_ended();
        // Another volume begins with the first again.
        assert_eq!(prompts.asked("two: "), Answer::Type);
        prompts.line_ended();
        assert_eq!(prompts.asked("one:"), Answer::Type);
        prompts.line_ended();
        assert_eq!(prompts.asked("one: "), Answer::Refused);
        assert_eq!(prompts.take(), ["a", "a", "b"].map(Secret::from));
        assert_eq!(prompts.take(), []);
        assert_eq!(words("Begin: x ... Please unlock disk a: "), words("Please unlock disk a:"));
    }
}

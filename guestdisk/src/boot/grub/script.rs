//! The language of `grub.cfg` (GRUB manual, "Writing full configuration files directly"): words, quoting, `if`, `for`,
//! `while`, functions, `menuentry` and `submenu`.

use std::iter::Peekable;
use std::sync::Arc;
use std::vec::IntoIter;

use block::{Error, Result};

/// The deepest that blocks are nested.
const MOST_DEPTH: usize = 40;

/// Part of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Characters as they are. Quoted ones are no keywords, and make a word even if there are none.
    Text { text: String, quoted: bool },
    /// The value of a variable; unquoted, it may be several words or none.
    Variable { name: String, quoted: bool },
}

/// What stands between two spaces.
pub(super) type Word = Vec<Piece>;
/// Commands one after the other.
pub(super) type Block = Arc<[Command]>;

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// A name and arguments, or assignments.
    Simple(Vec<Word>),
    /// Conditions with their blocks, in order; the last may be without condition.
    If(Vec<(Option<Block>, Block)>),
    For {
        variable: String,
        words: Vec<Word>,
        body: Block,
    },
    /// Loops while the condition has this result.
    While {
        condition: Block,
        until: bool,
        body: Block,
    },
    Function {
        name: String,
        body: Block,
    },
    /// `menuentry` or `submenu`.
    Menu {
        words: Vec<Word>,
        submenu: bool,
        body: Block,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// A line's end or a semicolon.
    End,
}

/// Reads a script.
pub(super) fn parse(text: &str) -> Result<Block> {
    let tokens = Lexer { text: text.chars().collect(), at: 0 }.tokens();
    let mut parser = Parser { tokens: tokens.into_iter().peekable(), depth: 0 };
    let block = parser.block(&[])?;
    match parser.tokens.next() {
        None => Ok(block),
        Some(token) => Err(Error::invalid(format!("'{}' where no command can begin", shown(&token)))),
    }
}

fn shown(token: &Token) -> String {
    match token {
        Token::Word(word) => keyword(word).unwrap_or("a word").to_owned(),
        Token::End => "end of line".to_owned(),
    }
}

/// The word, if it is one without quotes and variables.
fn keyword(word: &Word) -> Option<&str> {
    match word.as_slice() {
        [Piece::Text { text, quoted: false }] => Some(text),
        _ => None,
    }
}

struct Lexer {
    text: Vec<char>,
    at: usize,
}

impl Lexer {
    fn tokens(mut self) -> Vec<Token> {
        let mut tokens = vec![];
        while let Some(character) = self.peek() {
            match character {
                '\n' | ';' => {
                    self.at += 1;
                    tokens.push(Token::End);
                }
                '\\' if self.text.get(self.at + 1) == Some(&'\n') => self.at += 2,
                _ if character.is_whitespace() => self.at += 1,
                '#' => {
                    while self.peek().is_some_and(|character| character != '\n') {
                        self.at += 1;
                    }
                }
                // Braces are words of their own, `{` where it begins one, `}` wherever one ends.
                '{' | '}' => {
                    self.at += 1;
                    tokens.push(Token::Word(vec![Piece::Text { text: character.into(), quoted: false }]));
                }
                _ => tokens.push(Token::Word(self.word())),
            }
        }
        tokens
    }

    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let character = self.peek()?;
        self.at += 1;
        Some(character)
    }

    fn word(&mut self) -> Word {
        let mut word = Builder::default();
        while let Some(character) = self.peek() {
            if character.is_whitespace() || matches!(character, ';' | '{' | '}') {
                break;
            }
            self.at += 1;
            match character {
                '\\' => match self.next() {
                    Some('\n') => {}
                    Some(escaped) => word.push(escaped, true),
                    None => word.push('\\', false),
                },
                '\'' => {
                    word.quoted();
                    while let Some(quoted) = self.next().filter(|quoted| *quoted != '\'') {
                        word.push(quoted, true);
                    }
                }
                '"' => self.double_quoted(&mut word),
                '$' => self.variable(&mut word, false),
                plain => word.push(plain, false),
            }
        }
        word.pieces
    }

    fn double_quoted(&mut self, word: &mut Builder) {
        word.quoted();
        while let Some(character) = self.next() {
            match character {
                '"' => return,
                '\\' if matches!(self.peek(), Some('"' | '\\' | '$' | '\n')) => {
                    if let Some(escaped) = self.next().filter(|escaped| *escaped != '\n') {
                        word.push(escaped, true);
                    }
                }
                '$' => self.variable(word, true),
                plain => word.push(plain, true),
            }
        }
    }

    /// What follows a `$`.
    fn variable(&mut self, word: &mut Builder, quoted: bool) {
        let braced = self.peek() == Some('{');
        if braced {
            self.at += 1;
        }
        let mut name = String::new();
        while let Some(character) = self.peek() {
            let special = name.is_empty() && matches!(character, '?' | '@' | '*' | '#');
            let belongs = character.is_ascii_alphanumeric() || character == '_' || special;
            let in_braces = braced && !matches!(character, '}' | '\n');
            if !belongs && !in_braces {
                break;
            }
            name.push(character);
            self.at += 1;
            if special && !braced {
                break;
            }
        }
        if braced && self.peek() == Some('}') {
            self.at += 1;
        }
        if name.is_empty() {
            word.push('$', quoted);
        } else {
            word.pieces.push(Piece::Variable { name, quoted });
        }
    }
}

/// A word in the making.
#[derive(Default)]
struct Builder {
    pieces: Word,
}

impl Builder {
    fn push(&mut self, character: char, quoted: bool) {
        if let Some(Piece::Text { text, quoted: last }) = self.pieces.last_mut()
            && *last == quoted
        {
            text.push(character);
        } else {
            self.pieces.push(Piece::Text { text: character.into(), quoted });
        }
    }

    /// Quotes begin: there is a word, even if nothing stands between them.
    fn quoted(&mut self) {
        if !matches!(self.pieces.last(), Some(Piece::Text { quoted: true, .. })) {
            self.pieces.push(Piece::Text { text: String::new(), quoted: true });
        }
    }
}

struct Parser {
    tokens: Peekable<IntoIter<Token>>,
    depth: usize,
}

impl Parser {
    /// The keyword that comes next, if the next word is one without quotes.
    fn peek(&mut self) -> Option<&str> {
        match self.tokens.peek() {
            Some(Token::Word(word)) => keyword(word),
            _ => None,
        }
    }

    fn expect(&mut self, wanted: &str) -> Result<()> {
        while self.tokens.next_if_eq(&Token::End).is_some() {}
        if self.peek() == Some(wanted) {
            self.tokens.next();
            return Ok(());
        }
        let found = self.tokens.peek().map_or_else(|| "the end".to_owned(), shown);
        Err(Error::invalid(format!("'{wanted}' is missing before {found}")))
    }

    /// Commands up to one of these keywords, which is left for the caller.
    fn block(&mut self, ends: &[&str]) -> Result<Block> {
        self.depth += 1;
        if self.depth > MOST_DEPTH {
            return Err(Error::invalid("too many blocks within blocks"));
        }
        let mut commands = vec![];
        loop {
            while self.tokens.next_if_eq(&Token::End).is_some() {}
            if self.tokens.peek().is_none()
                || self.peek().is_some_and(|word| ends.contains(&word) || word == "}")
            {
                break;
            }
            commands.push(self.command()?);
        }
        self.depth -= 1;
        Ok(commands.into())
    }

    fn command(&mut self) -> Result<Command> {
        let Some(word) = self.peek().map(str::to_owned) else { return self.simple().map(Command::Simple) };
        match word.as_str() {
            "if" => self.conditional(),
            "for" => self.counted(),
            "while" | "until" => {
                self.tokens.next();
                let condition = self.block(&["do"])?;
                Ok(Command::While { condition, until: word == "until", body: self.loop_body()? })
            }
            "function" => {
                self.tokens.next();
                let name = self.name()?;
                Ok(Command::Function { name, body: self.braced()? })
            }
            "menuentry" | "submenu" => {
                self.tokens.next();
                let words = self.words_until_brace()?;
                Ok(Command::Menu { words, submenu: word == "submenu", body: self.braced()? })
            }
            // A block on its own.
            "{" => Ok(Command::If(vec![(None, self.braced()?)])),
            _ => self.simple().map(Command::Simple),
        }
    }

    fn simple(&mut self) -> Result<Vec<Word>> {
        let mut words = vec![];
        while let Some(Token::Word(word)) = self.tokens.peek() {
            if keyword(word) == Some("}") {
                break;
            }
            if let Some(Token::Word(word)) = self.tokens.next() {
                words.push(word);
            }
        }
        if words.is_empty() { Err(Error::invalid("a command is missing")) } else { Ok(words) }
    }

    fn conditional(&mut self) -> Result<Command> {
        let mut branches = vec![];
        self.tokens.next();
        loop {
            let condition = self.block(&["then"])?;
            self.expect("then")?;
            branches.push((Some(condition), self.block(&["elif", "else", "fi"])?));
            match self.peek() {
                Some("elif") => drop(self.tokens.next()),
                Some("else") => {
                    self.tokens.next();
                    branches.push((None, self.block(&["fi"])?));
                    break;
                }
                _ => break,
            }
        }
        self.expect("fi")?;
        Ok(Command::If(branches))
    }

    fn counted(&mut self) -> Result<Command> {
        self.tokens.next();
        let variable = self.name()?;
        self.expect("in")?;
        let words = match self.tokens.peek() {
            Some(Token::Word(_)) => self.simple()?,
            _ => vec![],
        };
        Ok(Command::For { variable, words, body: self.loop_body()? })
    }

    fn loop_body(&mut self) -> Result<Block> {
        self.expect("do")?;
        let body = self.block(&["done"])?;
        self.expect("done")?;
        Ok(body)
    }

    fn name(&mut self) -> Result<String> {
        let name = self.peek().map(str::to_owned).ok_or_else(|| Error::invalid("a name is missing"))?;
        self.tokens.next();
        Ok(name)
    }

    fn words_until_brace(&mut self) -> Result<Vec<Word>> {
        let mut words = vec![];
        while self.peek() != Some("{") {
            match self.tokens.next() {
                Some(Token::Word(word)) => words.push(word),
                _ => return Err(Error::invalid("a menu entry without '{'")),
            }
        }
        Ok(words)
    }

    fn braced(&mut self) -> Result<Block> {
        self.expect("{")?;
        let body = self.block(&[])?;
        self.expect("}")?;
        Ok(body)
    }
}

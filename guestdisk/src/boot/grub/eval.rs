//! Runs a script: variables, conditions, files, and the commands that matter.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::files::Files;
use super::super::{BootFile, Entry, Loader, bls};
use super::device;
use super::env::Env;
use super::script::{self, Block, Command, Piece, Word};
use super::{Content, Menu, Node};

/// The most commands of one configuration, its entries included.
const MOST_STEPS: u32 = 50_000;
/// The deepest that blocks, functions, files and submenus are nested altogether.
const MOST_DEPTH: u32 = 100;
/// The most entries of all menus together.
const MOST_ENTRIES: usize = 2048;
/// The most bytes that the words of one command become, each variable counted at once.
const MOST_EXPANDED: usize = 128 << 10;
/// The most bytes of a title.
const MOST_TITLE: usize = 1 << 10;
/// The most words of one command.
const MOST_WORDS: usize = 4096;

/// Something in a menu that has not been run yet.
pub(super) struct Item {
    pub(super) title: String,
    pub(super) id: String,
    pub(super) body: Body,
    /// What `$1` and so on are in it.
    pub(super) arguments: Vec<String>,
    /// The file that it stands in.
    pub(super) source: BootFile,
}

pub(super) enum Body {
    Entry(Block),
    Submenu(Block),
    Spec(Box<bls::Spec>),
}

/// What an entry loads.
#[derive(Default)]
pub(super) struct Loaded {
    pub(super) kernel: Option<(BootFile, String)>,
    pub(super) initrds: Vec<BootFile>,
}

pub(super) struct Interpreter<'a> {
    pub(super) files: &'a Files,
    pub(super) env: Env,
    pub(super) functions: HashMap<String, Block>,
    pub(super) items: Vec<Item>,
    pub(super) loaded: Loaded,
    pub(super) arguments: Vec<String>,
    /// The file that is being run, for entries to name.
    pub(super) current: BootFile,
    /// An entry is being run, not the configuration.
    pub(super) in_entry: bool,
    /// The rest of the block, function or file is not to be run.
    pub(super) leaving: bool,
    pub(super) steps: u32,
    pub(super) depth: u32,
    pub(super) entries: usize,
    pub(super) menu: Menu,
}

impl<'a> Interpreter<'a> {
    pub(super) fn new(files: &'a Files, config: &BootFile, efi: bool) -> Self {
        let mut env = Env::default();
        let root = files.volumes.get(config.volume).map(device::name).unwrap_or_default();
        let folder = config.path.parent().unwrap_or(&config.path);
        env.set("prefix", format!("({root}){}", folder.display()));
        env.set("root", root);
        env.set("grub_platform", if efi { "efi" } else { "pc" }.into());
        env.set("grub_cpu", if efi { "x86_64" } else { "i386" }.into());
        // What GRUB of today says of itself.
        for feature in [
            "menuentry_id",
            "menuentry_options",
            "platform_search_hint",
            "timeout_style",
            "default_font_path",
            "all_video_module",
            "ntldr",
            "nativedisk_cmd",
            "chainloader_bpb",
            "200_final",
        ] {
            env.set(&format!("feature_{feature}"), "y".into());
        }
        Self {
            files,
            env,
            functions: HashMap::new(),
            items: vec![],
            loaded: Loaded::default(),
            arguments: vec![],
            current: config.clone(),
            in_entry: false,
            leaving: false,
            steps: 0,
            depth: 0,
            entries: 0,
            menu: Menu::default(),
        }
    }

    pub(super) fn variable(&self, name: &str) -> &str {
        self.env.get(name)
    }

    pub(super) fn into_menu(self) -> Menu {
        self.menu
    }

    pub(super) fn note(&mut self, note: String) {
        if self.menu.notes.len() < 100 {
            self.menu.notes.push(note);
        }
    }

    /// Runs a file.
    pub(super) fn source(&mut self, file: &BootFile) -> bool {
        match self.files.text(file) {
            Ok(text) => {
                self.menu.sources.push(file.clone());
                self.text(file, &text)
            }
            Err(error) => {
                self.note(error.to_string());
                false
            }
        }
    }

    /// Runs the text of a file.
    pub(super) fn text(&mut self, file: &BootFile, text: &str) -> bool {
        let block = match script::parse(text) {
            Ok(block) => block,
            Err(error) => {
                self.note(format!("{file}: {error}"));
                return false;
            }
        };
        let before = std::mem::replace(&mut self.current, file.clone());
        let result = self.block(&block);
        self.current = before;
        self.leaving = false;
        result
    }

    fn block(&mut self, block: &Block) -> bool {
        let mut result = true;
        if self.depth >= MOST_DEPTH {
            return false;
        }
        self.depth += 1;
        for command in block.iter() {
            self.steps += 1;
            if self.leaving || self.steps > MOST_STEPS {
                break;
            }
            result = self.command(command);
            self.env.set("?", u8::from(!result).to_string());
        }
        self.depth -= 1;
        result
    }

    fn command(&mut self, command: &Command) -> bool {
        match command {
            Command::Simple(words) => self.simple(words),
            Command::If(branches) => {
                for (condition, body) in branches {
                    if condition.as_ref().is_none_or(|condition| self.block(condition)) {
                        return self.block(body);
                    }
                }
                true
            }
            Command::For { variable, words, body } => {
                let mut result = true;
                for word in self.expand(words) {
                    self.steps += 1;
                    if self.steps > MOST_STEPS {
                        return false;
                    }
                    self.env.set(variable, word);
                    result = self.block(body);
                }
                result
            }
            Command::While { condition, until, body } => {
                // Every turn costs steps, so that this ends.
                while !self.leaving && self.steps <= MOST_STEPS && self.block(condition) != *until {
                    self.steps += 1;
                    self.block(body);
                    if self.depth >= MOST_DEPTH {
                        break;
                    }
                }
                true
            }
            Command::Function { name, body } => {
                if self.functions.len() < MOST_ENTRIES {
                    self.functions.insert(name.clone(), Arc::clone(body));
                }
                true
            }
            Command::Menu { words, submenu, body } => self.menu_item(words, *submenu, body),
        }
    }

    /// Expands variables. An unquoted one becomes as many words as it has.
    fn expand(&self, words: &[Word]) -> Vec<String> {
        let (mut expanded, mut bytes) = (vec![], 0);
        for word in words {
            let mut current: Option<String> = None;
            for piece in word {
                bytes += match piece {
                    Piece::Text { text, .. } => text.len(),
                    Piece::Variable { name, .. } => self.value(name).len(),
                };
                if bytes > MOST_EXPANDED {
                    break;
                }
                match piece {
                    Piece::Text { text, .. } => current.get_or_insert_default().push_str(text),
                    Piece::Variable { name, quoted: true } => {
                        current.get_or_insert_default().push_str(&self.value(name));
                    }
                    Piece::Variable { name, quoted: false } => {
                        let value = self.value(name);
                        if value.starts_with(char::is_whitespace) {
                            expanded.extend(current.take());
                        }
                        for (index, part) in value.split_whitespace().enumerate() {
                            if index > 0 {
                                expanded.extend(current.take());
                            }
                            current.get_or_insert_default().push_str(part);
                        }
                        if value.ends_with(char::is_whitespace) {
                            expanded.extend(current.take());
                        }
                    }
                }
            }
            expanded.extend(current);
            if expanded.len() > MOST_WORDS {
                expanded.truncate(MOST_WORDS);
                break;
            }
        }
        expanded
    }

    fn value(&self, name: &str) -> String {
        match name {
            "@" | "*" => self.arguments.join(" "),
            "#" => self.arguments.len().to_string(),
            _ => match name.parse::<usize>() {
                Ok(number) => {
                    number.checked_sub(1).and_then(|at| self.arguments.get(at)).cloned().unwrap_or_default()
                }
                Err(_) => self.env.get(name).to_owned(),
            },
        }
    }

    fn simple(&mut self, words: &[Word]) -> bool {
        let mut expanded = self.expand(words);
        let nots = expanded.iter().take_while(|word| *word == "!").count();
        if nots > 0 {
            expanded.drain(..nots);
            return self.named(expanded) != (nots % 2 == 1);
        }
        // `name=value`, if the name stands there without quotes.
        if let Some(Piece::Text { text, quoted: false }) = words[0].first()
            && let Some((variable, _)) = text.split_once('=')
            && is_name(variable)
        {
            return expanded.iter().all(|assignment| self.assign(assignment));
        }
        self.named(expanded)
    }

    /// Calls a function or a command of GRUB's own.
    fn named(&mut self, mut words: Vec<String>) -> bool {
        let Some(name) = words.first().cloned() else { return true };
        let arguments = words.split_off(1);
        if let Some(function) = self.functions.get(&name).cloned() {
            let before = std::mem::replace(&mut self.arguments, arguments);
            let result = self.block(&function);
            self.arguments = before;
            self.leaving = false;
            return result;
        }
        self.builtin(&name, &arguments)
    }

    pub(super) fn assign(&mut self, assignment: &str) -> bool {
        let Some((name, value)) = assignment.split_once('=') else { return false };
        self.env.set(name, value.to_owned());
        true
    }

    fn menu_item(&mut self, words: &[Word], submenu: bool, body: &Block) -> bool {
        let words = self.expand(words);
        let (mut title, mut id, mut arguments) = (None, String::new(), vec![]);
        let mut rest = words.into_iter();
        while let Some(word) = rest.next() {
            match word.as_str() {
                "--id" => id = rest.next().unwrap_or_default(),
                "--class" | "--users" | "--hotkey" | "--source" => drop(rest.next()),
                option if option.starts_with("--id=") => option["--id=".len()..].clone_into(&mut id),
                option if option.starts_with("--") => {}
                _ => {
                    arguments.push(word.clone());
                    title.get_or_insert(word);
                }
            }
        }
        let body = if submenu { Body::Submenu(Arc::clone(body)) } else { Body::Entry(Arc::clone(body)) };
        let source = self.current.clone();
        let mut title: String = title.unwrap_or_default();
        if title.len() > MOST_TITLE {
            title = title.chars().take(MOST_TITLE).collect();
        }
        self.push(Item { title, id, body, arguments, source });
        true
    }

    pub(super) fn push(&mut self, item: Item) {
        self.entries += 1;
        if self.entries <= MOST_ENTRIES {
            self.items.push(item);
        }
    }

    /// Runs everything that the menu holds. Each entry begins with the variables that the configuration has left.
    pub(super) fn nodes(&mut self) -> Vec<Node> {
        let items = std::mem::take(&mut self.items);
        let env = self.env.clone();
        let mut nodes = vec![];
        for item in items {
            self.env = env.clone();
            self.leaving = false;
            self.loaded = Loaded::default();
            let arguments = std::mem::replace(&mut self.arguments, item.arguments);
            let content = match item.body {
                Body::Submenu(body) => {
                    self.block(&body);
                    // Submenus within submenus are not run deeper than anything else.
                    self.depth += 1;
                    let nodes = if self.depth < MOST_DEPTH { self.nodes() } else { vec![] };
                    self.depth -= 1;
                    Content::Submenu(nodes)
                }
                Body::Entry(body) => {
                    self.in_entry = true;
                    self.block(&body);
                    self.in_entry = false;
                    Content::Entry(self.entry(&item.title, &item.source).map(Box::new))
                }
                Body::Spec(spec) => Content::Entry(Some(Box::new(self.spec_entry(&spec, &item.source)))),
            };
            self.arguments = arguments;
            nodes.push(Node { title: item.title, id: item.id, content });
        }
        self.env = env;
        nodes
    }

    /// The entry of what has been loaded.
    fn entry(&mut self, title: &str, source: &BootFile) -> Option<Entry> {
        let loaded = std::mem::take(&mut self.loaded);
        let (kernel, cmdline) = loaded.kernel?;
        Some(Entry {
            title: title.to_owned(),
            id: String::new(),
            kernel,
            initrds: loaded.initrds,
            cmdline,
            source: source.clone(),
            loader: Loader::Grub,
            default: false,
        })
    }
}

/// Whether a variable can have this name.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|character: char| character.is_ascii_digit())
        && text.chars().all(|character| character.is_ascii_alphanumeric() || character == '_')
}

//! Runs a script: variables, conditions, files, and the commands that matter.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::files::Files;
use super::super::{BootFile, Entry, Loader, bls, version};
use super::condition;
use super::device::{self, Wanted};
use super::env::{Env, parse_block};
use super::script::{self, Block, Command, Piece, Word};
use super::{Content, Menu, Node};

/// The most commands of one configuration, its entries included.
const MOST_STEPS: u32 = 200_000;
/// The deepest that blocks, functions, files and submenus are nested altogether.
const MOST_DEPTH: u32 = 100;
/// The most entries of all menus together.
const MOST_ENTRIES: usize = 2048;
/// The most words of one command.
const MOST_WORDS: usize = 4096;

/// Something in a menu that has not been run yet.
struct Item {
    title: String,
    id: String,
    body: Body,
    /// What `$1` and so on are in it.
    arguments: Vec<String>,
    /// The file that it stands in.
    source: BootFile,
}

enum Body {
    Entry(Block),
    Submenu(Block),
    Spec(Box<bls::Spec>),
}

/// What an entry loads.
#[derive(Default)]
struct Loaded {
    kernel: Option<(BootFile, String)>,
    initrds: Vec<BootFile>,
}

pub(super) struct Interpreter<'a> {
    files: &'a Files,
    env: Env,
    functions: HashMap<String, Block>,
    items: Vec<Item>,
    loaded: Loaded,
    arguments: Vec<String>,
    /// The file that is being run, for entries to name.
    current: BootFile,
    /// An entry is being run, not the configuration.
    in_entry: bool,
    /// The rest of the block, function or file is not to be run.
    leaving: bool,
    steps: u32,
    depth: u32,
    entries: usize,
    menu: Menu,
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

    fn note(&mut self, note: String) {
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
        let mut expanded = vec![];
        for word in words {
            let mut current: Option<String> = None;
            for piece in word {
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

    fn assign(&mut self, assignment: &str) -> bool {
        let Some((name, value)) = assignment.split_once('=') else { return false };
        self.env.set(name, value.to_owned());
        true
    }

    fn builtin(&mut self, name: &str, arguments: &[String]) -> bool {
        match name {
            "set" => arguments.iter().all(|assignment| self.assign(assignment)),
            "unset" => {
                arguments.iter().for_each(|name| self.env.unset(name));
                true
            }
            "[" => self.test(arguments.strip_suffix(&["]".to_owned()]).unwrap_or(arguments)),
            "test" => self.test(arguments),
            "search" => self.search(arguments),
            "search.fs_uuid" => self.search_old(Wanted::Uuid, arguments),
            "search.fs_label" => self.search_old(Wanted::Label, arguments),
            "search.file" => self.search_old(Wanted::File, arguments),
            "linux" | "linux16" | "linuxefi" => self.linux(arguments),
            "initrd" | "initrd16" | "initrdefi" => self.initrd(arguments),
            "source" | "." => self.file(arguments.first()).is_some_and(|file| self.source(&file)),
            "configfile" | "normal" => self.configfile(arguments),
            "load_env" => self.load_env(arguments),
            "blscfg" => self.blscfg(),
            "probe" => self.probe(arguments),
            "return" | "exit" | "break" => {
                self.leaving = true;
                arguments.first().is_none_or(|status| status == "0")
            }
            "setparams" => {
                self.arguments = arguments.to_vec();
                true
            }
            // These say what is possible; a machine of today can.
            "true" | "export" | "insmod" | "save_env" | "echo" | "cpuid" | "loadfont" | "terminal_output"
            | "terminal_input" | "serial" | "eval" | "savedefault" | "gfxmode" | "load_video"
            | "recordfail" | "cat" | "sleep" | "clear" | "background_color" | "background_image" | "play"
            | "rmmod" | "devicetree" => true,
            _ => false,
        }
    }

    fn test(&self, words: &[String]) -> bool {
        condition::holds(words, &|path| {
            let file = self.file(Some(&path.to_owned()))?;
            self.files.stat(file.volume, &file.path.to_string_lossy())
        })
    }

    /// The file of a path: `(device)/path`, or `/path` on the device that `root` names.
    fn file(&self, path: Option<&String>) -> Option<BootFile> {
        let path = path?;
        let (device, path) = match path.strip_prefix('(') {
            Some(rest) => rest.split_once(')')?,
            None => (self.env.get("root"), path.as_str()),
        };
        let volume = device::volume(self.files, device)?;
        Some(self.files.at(volume, format!("/{}", path.trim_start_matches('/'))))
    }

    fn search(&mut self, arguments: &[String]) -> bool {
        let (mut wanted, mut variable, mut hints, mut names) = (Wanted::File, None, vec![], vec![]);
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let (option, value) = argument.split_once('=').unwrap_or((argument, ""));
            match option {
                "--fs-uuid" | "-u" => wanted = Wanted::Uuid,
                "--label" | "--fs-label" | "-l" => wanted = Wanted::Label,
                "--file" | "-f" => wanted = Wanted::File,
                "--set" | "-s" if argument.contains('=') => variable = Some(value.to_owned()),
                // The name of the variable is optional: what follows may be what is searched for.
                "--set" | "-s" => variable = Some("root".to_owned()),
                "--hint" if !argument.contains('=') => hints.extend(rest.next().cloned()),
                _ if option.starts_with("--hint") => hints.push(value.to_owned()),
                _ if option.starts_with('-') => {}
                _ => names.push(argument.clone()),
            }
        }
        // `--set root UUID`: two names, of which the first is the variable.
        if names.len() > 1
            && arguments.iter().any(|argument| argument == "--set" || argument == "-s")
            && is_name(&names[0])
        {
            variable = Some(names.remove(0));
        }
        let Some((name, more)) = names.split_first() else { return false };
        hints.extend(more.iter().cloned());
        self.found(wanted, name, variable.as_deref(), &hints)
    }

    /// `search.fs_uuid UUID VARIABLE HINT...`
    fn search_old(&mut self, wanted: Wanted, arguments: &[String]) -> bool {
        let Some((name, rest)) = arguments.split_first() else { return false };
        let variable = rest.first().map_or("root", String::as_str).to_owned();
        self.found(wanted, name, Some(&variable), rest.get(1..).unwrap_or_default())
    }

    fn found(&mut self, wanted: Wanted, name: &str, variable: Option<&str>, hints: &[String]) -> bool {
        let Some(volume) = device::search(self.files, wanted, name, hints) else {
            self.note(format!("{}: no volume has '{name}'", self.current));
            return false;
        };
        if let Some(variable) = variable {
            self.env.set(variable, device::name(&self.files.volumes[volume]));
        }
        true
    }

    fn linux(&mut self, arguments: &[String]) -> bool {
        let Some(file) = self.file(arguments.first()) else { return false };
        let arguments = arguments[1..].iter().map(|argument| {
            if argument.contains(' ') { format!("\"{argument}\"") } else { argument.clone() }
        });
        self.loaded.kernel = Some((file, arguments.collect::<Vec<_>>().join(" ")));
        true
    }

    fn initrd(&mut self, arguments: &[String]) -> bool {
        let files: Vec<_> = arguments.iter().filter_map(|path| self.file(Some(path))).collect();
        let all = files.len() == arguments.len();
        self.loaded.initrds = files;
        all
    }

    /// Another configuration takes the place of this one; out of an entry, it is no kernel.
    fn configfile(&mut self, arguments: &[String]) -> bool {
        if self.in_entry {
            return false;
        }
        let Some(file) = self.file(arguments.first()) else { return false };
        let result = self.source(&file);
        self.leaving = result;
        result
    }

    fn load_env(&mut self, arguments: &[String]) -> bool {
        let (mut path, mut names) = (format!("{}/grubenv", self.env.get("prefix")), vec![]);
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.strip_prefix("--file=") {
                Some(file) => file.clone_into(&mut path),
                None if argument == "-f" || argument == "--file" => {
                    rest.next().into_iter().for_each(|file| path.clone_from(file));
                }
                None if argument.starts_with('-') => {}
                None => names.push(argument),
            }
        }
        let Some(file) = self.file(Some(&path)) else { return false };
        let Ok(text) = self.files.text(&file) else { return false };
        let Some(variables) = parse_block(&text) else { return false };
        for (name, value) in variables {
            if names.is_empty() || names.contains(&&name) {
                self.env.set(&name, value);
            }
        }
        self.menu.sources.push(file);
        true
    }

    /// `probe --set=NAME --fs-uuid DEVICE`: facts about a volume.
    fn probe(&mut self, arguments: &[String]) -> bool {
        let device = arguments.iter().find(|argument| !argument.starts_with('-'));
        let device = device.map(|device| device.trim_matches(['(', ')']));
        let Some(volume) = device.and_then(|device| device::volume(self.files, device)) else { return false };
        let facts = &self.files.volumes[volume];
        let has =
            |long: &str, short: &str| arguments.iter().any(|argument| argument == long || argument == short);
        let value = if has("--fs-uuid", "-u") {
            facts.uuid.clone()
        } else if has("--label", "-l") {
            facts.label.clone()
        } else if has("--part-uuid", "") {
            facts.partuuid.clone()
        } else {
            return false;
        };
        if let Some(name) = arguments.iter().find_map(|argument| argument.strip_prefix("--set=")) {
            self.env.set(name, value);
        }
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
        self.push(Item { title: title.unwrap_or_default(), id, body, arguments, source });
        true
    }

    fn push(&mut self, item: Item) {
        self.entries += 1;
        if self.entries <= MOST_ENTRIES {
            self.items.push(item);
        }
    }

    /// Fedora's GRUB makes entries of the files of the Boot Loader Specification.
    fn blscfg(&mut self) -> bool {
        let own = self.env.get("blsdir").to_owned();
        let places = [own.as_str(), "/loader/entries", "/boot/loader/entries"];
        for device in ["boot", "root"] {
            let Some(volume) = device::volume(self.files, self.env.get(device)) else { continue };
            for place in places.into_iter().filter(|place| !place.is_empty()) {
                let mut specs = bls::read(self.files, volume, place);
                if specs.is_empty() {
                    continue;
                }
                specs.sort_by(|one, other| version::compare(&other.0.id, &one.0.id));
                self.menu.directories.push((volume, place.to_owned()));
                for (spec, file) in specs.into_iter().filter(|(spec, _)| !spec.linux.is_empty()) {
                    let (title, id) = (spec.shown().to_owned(), spec.id.clone());
                    self.push(Item {
                        title,
                        id,
                        body: Body::Spec(Box::new(spec)),
                        arguments: vec![],
                        source: file,
                    });
                }
                return true;
            }
        }
        false
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

    fn spec_entry(&self, spec: &bls::Spec, source: &BootFile) -> Entry {
        let words = |text: &str| expand_dollars(text, &self.env);
        let options = if spec.has_options { &spec.options } else { self.env.get("default_kernelopts") };
        let initrds = spec.initrds.iter().map(|path| words(path)).filter(|path| !path.is_empty());
        Entry {
            title: spec.shown().to_owned(),
            id: spec.id.clone(),
            kernel: bls::resolve(self.files, source, &spec.linux),
            initrds: initrds.map(|path| bls::resolve(self.files, source, &path)).collect(),
            cmdline: words(options).split_whitespace().collect::<Vec<_>>().join(" "),
            source: source.clone(),
            loader: Loader::Grub,
            default: false,
        }
    }
}

/// Replaces `$name` and `${name}`.
fn expand_dollars(text: &str, env: &Env) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (braced, after) = match after.strip_prefix('{') {
            Some(inner) => (true, inner),
            None => (false, after),
        };
        let len = after
            .find(|character: char| !character.is_ascii_alphanumeric() && character != '_')
            .unwrap_or(after.len());
        expanded.push_str(env.get(&after[..len]));
        rest = &after[len..];
        if braced {
            rest = rest.strip_prefix('}').unwrap_or(rest);
        }
    }
    expanded + rest
}

/// Whether a variable can have this name.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|character: char| character.is_ascii_digit())
        && text.chars().all(|character| character.is_ascii_alphanumeric() || character == '_')
}

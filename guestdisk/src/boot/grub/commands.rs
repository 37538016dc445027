//! The commands of GRUB that say what is loaded from where.

use super::super::{BootFile, Entry, Loader, MOST_CMDLINE, bls, cmdline, version};
use super::condition;
use super::device::{self, Wanted};
use super::env::{Env, parse_block};
use super::eval::{Body, Interpreter, Item, is_name};

impl Interpreter<'_> {
    pub(super) fn builtin(&mut self, name: &str, arguments: &[String]) -> bool {
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
        let quoted = |argument: &String| {
            if argument.contains(' ') { format!("\"{argument}\"") } else { argument.clone() }
        };
        let words: Vec<_> = arguments[1..].iter().map(quoted).collect();
        self.loaded.kernel = Some((file, cmdline(words.iter().map(String::as_str))));
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

    pub(super) fn spec_entry(&self, spec: &bls::Spec, source: &BootFile) -> Entry {
        let words = |text: &str| expand_dollars(text, &self.env);
        let options = if spec.has_options { &spec.options } else { self.env.get("default_kernelopts") };
        let initrds = spec.initrds.iter().map(|path| words(path)).filter(|path| !path.is_empty());
        Entry {
            title: spec.shown().to_owned(),
            id: spec.id.clone(),
            kernel: bls::resolve(self.files, source, &spec.linux),
            initrds: initrds.map(|path| bls::resolve(self.files, source, &path)).collect(),
            cmdline: cmdline(words(options).split_whitespace()),
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
        if expanded.len() < MOST_CMDLINE {
            expanded.push_str(env.get(&after[..len]));
        }
        rest = &after[len..];
        if braced {
            rest = rest.strip_prefix('}').unwrap_or(rest);
        }
    }
    expanded + rest
}

//! The simpler configurations: extlinux and syslinux (Syslinux wiki, "Config"), GRUB of the first generation (its manual,
//! chapter 5).

use std::path::{Component, Path, PathBuf};

use super::discover::Group;
use super::files::Files;
use super::{BootFile, Entry, Loader, cmdline};
use crate::disks::Location;

/// The most entries of one configuration.
const MOST_ENTRIES: usize = 1024;
/// The most files that include one another.
const MOST_INCLUDED: usize = 32;

/// A label of syslinux.
#[derive(Debug, Default)]
struct Label {
    name: String,
    title: String,
    kernel: String,
    initrds: Vec<String>,
    append: Option<String>,
}

/// A configuration of syslinux while it is read.
struct Syslinux<'a> {
    files: &'a Files,
    folder: PathBuf,
    labels: Vec<Label>,
    append: String,
    default: String,
    included: usize,
    sources: Vec<BootFile>,
}

/// Reads a configuration of extlinux or syslinux and what it includes.
pub(super) fn syslinux(files: &Files, config: &BootFile) -> Group {
    let folder = config.path.parent().unwrap_or(&config.path).to_owned();
    let mut reader = Syslinux {
        files,
        folder,
        labels: vec![],
        append: String::new(),
        default: String::new(),
        included: 0,
        sources: vec![],
    };
    reader.file(config);
    let entries: Vec<_> = reader.labels.iter().filter_map(|label| reader.entry(label, config)).collect();
    let default = entries.iter().position(|entry| entry.id == reader.default);
    Group::new(entries, default, reader.sources)
}

impl Syslinux<'_> {
    fn file(&mut self, file: &BootFile) {
        self.included += 1;
        let Ok(text) = self.files.text(file) else { return };
        self.sources.push(file.clone());
        let mut in_text = false;
        for line in text.lines().map(str::trim) {
            let (key, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let (key, value) = (key.to_ascii_lowercase(), value.trim());
            match key.as_str() {
                "text" => in_text = true,
                "endtext" => in_text = false,
                _ if in_text => {}
                "include" if self.included < MOST_INCLUDED => {
                    let file = self.files.at(file.volume, self.path(value));
                    self.file(&file);
                }
                _ => self.line(&key, value),
            }
        }
    }

    fn line(&mut self, key: &str, value: &str) {
        match key {
            "default" => value.clone_into(&mut self.default),
            "ontimeout" => value.split_whitespace().next().unwrap_or("").clone_into(&mut self.default),
            "label" if self.labels.len() < MOST_ENTRIES => {
                self.labels.push(Label { name: value.to_owned(), ..Label::default() });
            }
            "menu" => self.menu(value),
            "append" => match self.labels.last_mut() {
                Some(label) => label.append = Some(value.to_owned()),
                None => value.clone_into(&mut self.append),
            },
            _ => {
                let Some(label) = self.labels.last_mut() else { return };
                match key {
                    "kernel" | "linux" => value.clone_into(&mut label.kernel),
                    "initrd" => label.initrds = value.split(',').map(str::to_owned).collect(),
                    _ => {}
                }
            }
        }
    }

    fn menu(&mut self, value: &str) {
        let (key, value) = value.split_once(char::is_whitespace).unwrap_or((value, ""));
        let Some(label) = self.labels.last_mut() else { return };
        match key.to_ascii_lowercase().as_str() {
            // A hat marks the key.
            "label" => label.title = value.trim().replace('^', ""),
            "default" => label.name.clone_into(&mut self.default),
            _ => {}
        }
    }

    /// Paths are relative to the configuration's folder.
    fn path(&self, path: &str) -> PathBuf {
        normal(&self.folder.join(path))
    }

    fn entry(&self, label: &Label, config: &BootFile) -> Option<Entry> {
        // Modules of syslinux itself end like this.
        if label.kernel.is_empty() || label.kernel.ends_with(".c32") {
            return None;
        }
        let append = match label.append.as_deref() {
            Some("-") => "",
            Some(append) => append,
            None => &self.append,
        };
        let is_initrd = |word: &&str| word.starts_with("initrd=");
        let named = append.split_whitespace().find(is_initrd).map(|word| &word["initrd=".len()..]);
        let initrds = match named {
            Some(named) if label.initrds.is_empty() => named.split(',').map(str::to_owned).collect(),
            _ => label.initrds.clone(),
        };
        let at = |path: &String| self.files.at(config.volume, self.path(path));
        Some(Entry {
            title: if label.title.is_empty() { label.name.clone() } else { label.title.clone() },
            id: label.name.clone(),
            kernel: at(&label.kernel),
            initrds: initrds.iter().map(at).collect(),
            cmdline: cmdline(append.split_whitespace().filter(|word| !is_initrd(word))),
            source: config.clone(),
            loader: Loader::Syslinux,
            default: false,
        })
    }
}

/// The path without `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::ParentDir => drop(normal.pop()),
            Component::Normal(name) => normal.push(name),
            _ => {}
        }
    }
    normal
}

/// Reads a configuration of GRUB legacy.
pub(super) fn grub_legacy(files: &Files, config: &BootFile) -> Option<Group> {
    let text = files.text(config).ok()?;
    let (mut entries, mut default, mut titles) = (vec![], 0, 0);
    // The title's number, the volume that it names, its kernel with arguments, its other files.
    let mut open: Option<Title> = None;
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let (key, value) = line.split_once([' ', '\t', '=']).unwrap_or((line, ""));
        let value = value.trim();
        match key {
            "default" if open.is_none() => default = value.parse().unwrap_or(0),
            "title" if titles < MOST_ENTRIES => {
                entries.extend(open.take().and_then(|title| title.entry(files, config)));
                open = Some(Title { name: value.to_owned(), number: titles, ..Title::default() });
                titles += 1;
            }
            _ => {
                if let Some(title) = &mut open {
                    title.line(files, key, value);
                }
            }
        }
    }
    entries.extend(open.and_then(|title| title.entry(files, config)));
    let chosen = entries.iter().position(|entry| entry.id == default.to_string());
    Some(Group::new(entries, chosen, vec![config.clone()]))
}

#[derive(Debug, Default)]
struct Title {
    name: String,
    number: usize,
    volume: Option<usize>,
    kernel: String,
    modules: Vec<String>,
}

impl Title {
    fn line(&mut self, files: &Files, key: &str, value: &str) {
        match key {
            "root" | "rootnoverify" => self.volume = legacy_volume(files, value),
            "uuid" => {
                self.volume = files.volumes.iter().position(|facts| facts.uuid.eq_ignore_ascii_case(value));
            }
            "kernel" => value.clone_into(&mut self.kernel),
            "initrd" | "module" => self.modules.push(value.to_owned()),
            _ => {}
        }
    }

    fn entry(mut self, files: &Files, config: &BootFile) -> Option<Entry> {
        // A hypervisor starts the first of its modules with the second.
        let mut modules = std::mem::take(&mut self.modules);
        if self.kernel.split_whitespace().any(|word| word.contains("xen") && word.ends_with(".gz")) {
            self.kernel = if modules.is_empty() { String::new() } else { modules.remove(0) };
        }
        let mut words = self.kernel.split_whitespace().skip_while(|word| word.starts_with("--"));
        let at = |path: &str| match path.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((device, path)) => Some(files.at(legacy_volume(files, device)?, path)),
            None => Some(files.at(self.volume.unwrap_or(config.volume), path)),
        };
        Some(Entry {
            title: self.name.clone(),
            id: self.number.to_string(),
            kernel: at(words.next()?)?,
            initrds: modules.iter().filter_map(|module| at(module.split_whitespace().next()?)).collect(),
            cmdline: cmdline(words),
            source: config.clone(),
            loader: Loader::GrubLegacy,
            default: false,
        })
    }
}

/// `(hd0,0)`: partitions count from 0.
fn legacy_volume(files: &Files, name: &str) -> Option<usize> {
    let name = name.trim_matches(['(', ')']).strip_prefix("hd")?;
    let (disk, partition) = name.split_once(',').unwrap_or((name, ""));
    let disk = disk.parse().ok()?;
    let location = match partition {
        "" => Location::Whole { disk },
        _ => Location::Partition { disk, number: partition.parse::<u32>().ok()?.checked_add(1)? },
    };
    files.volumes.iter().position(|facts| facts.location == location)
}

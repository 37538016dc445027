//! GRUB 2: its script is interpreted, as far as it says what the menu holds and what its entries start.
//!
//! The whole configuration is run first, as GRUB does, which gives the menu; then each entry by itself, to see which
//! kernel it would load. Variables, conditions, searches, other files and the environment block count; what draws the
//! menu does not. A script gets only so many commands, so much depth and so much room.

mod commands;
mod condition;
mod device;
mod env;
mod eval;
mod script;

use super::files::Files;
use super::{BootFile, Entry};
use eval::Interpreter;

/// What a configuration comes to.
#[derive(Debug, Default)]
pub(super) struct Menu {
    pub(super) entries: Vec<Entry>,
    /// Files that were read on the way, the one it began with among them.
    pub(super) sources: Vec<BootFile>,
    /// Directories of the Boot Loader Specification whose entries are part of the menu.
    pub(super) directories: Vec<(usize, String)>,
    pub(super) notes: Vec<String>,
}

/// What a menu consists of, submenus within.
#[derive(Debug)]
struct Node {
    title: String,
    id: String,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// `None`: it starts something else than Linux.
    Entry(Option<Box<Entry>>),
    Submenu(Vec<Node>),
}

/// Runs a configuration. `efi`: as GRUB for UEFI would.
pub(super) fn menu(files: &Files, config: &BootFile, efi: bool) -> Menu {
    let mut interpreter = Interpreter::new(files, config, efi);
    interpreter.source(config);
    let nodes = interpreter.nodes();
    let default = interpreter.variable("default").to_owned();
    let mut menu = interpreter.into_menu();
    let chosen = choose(&nodes, &default).or_else(|| nodes.first().map(first));
    let title = chosen.map(|chosen| chosen.title.clone());
    let chosen = chosen.and_then(|chosen| match &chosen.content {
        Content::Entry(entry) => entry.as_deref().map(std::ptr::from_ref),
        Content::Submenu(_) => None,
    });
    if let (None, Some(title)) = (chosen, title) {
        menu.notes.push(format!("{config}: the default entry '{title}' starts no Linux kernel"));
    }
    flatten(&nodes, &mut vec![], &mut |entry, path| {
        let mut copy = entry.clone();
        copy.default = chosen.is_some_and(|chosen| std::ptr::eq(chosen, entry));
        copy.id = path.join(">");
        menu.entries.push(copy);
    });
    menu
}

/// The titles in the menu of a configuration, if there were no files to be found. For tests of hostile scripts.
#[doc(hidden)]
pub fn titles(config: &str) -> Vec<String> {
    let files = Files::none();
    let file = files.at(0, "/boot/grub/grub.cfg");
    let mut interpreter = Interpreter::new(&files, &file, false);
    interpreter.text(&file, config);
    let mut titles = vec![];
    flatten_titles(&interpreter.nodes(), &mut titles);
    titles
}

fn flatten_titles(nodes: &[Node], titles: &mut Vec<String>) {
    for node in nodes {
        titles.push(node.title.clone());
        if let Content::Submenu(nodes) = &node.content {
            flatten_titles(nodes, titles);
        }
    }
}

/// Visits all entries with the identifiers on the way to them.
fn flatten<'a>(nodes: &'a [Node], path: &mut Vec<String>, visit: &mut impl FnMut(&'a Entry, &[String])) {
    for node in nodes {
        path.push(if node.id.is_empty() { node.title.clone() } else { node.id.clone() });
        match &node.content {
            Content::Entry(Some(entry)) => visit(entry, path),
            Content::Entry(None) => {}
            Content::Submenu(nodes) => flatten(nodes, path, visit),
        }
        path.pop();
    }
}

/// The entry that `default` means: a number, a title or an identifier, of a submenu's entries with `>` between them.
fn choose<'a>(nodes: &'a [Node], default: &str) -> Option<&'a Node> {
    // The whole may be a title with a `>` in it.
    let whole = nodes.iter().find(|node| node.id == default || node.title == default);
    if let Some(node) = whole.filter(|_| !default.is_empty()) {
        return Some(first(node));
    }
    let (here, rest) = default.split_once('>').unwrap_or((default, ""));
    let named = nodes.iter().find(|node| !here.is_empty() && (node.id == here || node.title == here));
    let node = named.or_else(|| nodes.get(here.parse::<usize>().ok()?))?;
    match &node.content {
        Content::Submenu(nodes) if !rest.is_empty() => {
            choose(nodes, rest).or_else(|| nodes.first().map(first))
        }
        _ => Some(first(node)),
    }
}

/// What is started if nobody chooses within a submenu.
fn first(node: &Node) -> &Node {
    match &node.content {
        Content::Submenu(nodes) => nodes.first().map_or(node, first),
        Content::Entry(_) => node,
    }
}

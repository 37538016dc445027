//! The Boot Loader Specification, type 1 (UAPI.1): a file per entry in `loader/entries`, and systemd-boot's `loader.conf`.

use std::cmp::Ordering;

use super::files::Files;
use super::{BootFile, Entry, Loader, version};

/// The most entries of one directory.
const MOST_ENTRIES: usize = 1024;

/// A file of `loader/entries`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Spec {
    /// The name of the file without its ending and without the counter of tries.
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) version: String,
    pub(crate) machine_id: String,
    pub(crate) sort_key: String,
    pub(crate) linux: String,
    pub(crate) initrds: Vec<String>,
    /// Everything on the lines `options`, one after the other.
    pub(crate) options: String,
    /// There was such a line.
    pub(crate) has_options: bool,
    /// A program for UEFI instead of a kernel.
    pub(crate) efi: String,
    /// All tries have been in vain.
    pub(crate) is_bad: bool,
}

impl Spec {
    /// Reads a file of this name.
    pub(crate) fn parse(name: &str, text: &str) -> Self {
        let stem = name.strip_suffix(".conf").unwrap_or(name);
        // NAME+LEFT-DONE.conf counts tries ("Boot counting").
        let (id, left) = match stem.rsplit_once('+') {
            Some((id, tries)) if tries.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') => {
                (id, tries.split('-').next().and_then(|left| left.parse::<u32>().ok()))
            }
            _ => (stem, None),
        };
        let mut spec = Self { id: id.to_owned(), is_bad: left == Some(0), ..Self::default() };
        for line in text.lines() {
            let line = line.trim();
            let (key, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            spec.set(key, value.trim());
        }
        spec
    }

    fn set(&mut self, key: &str, value: &str) {
        match key {
            "title" => value.clone_into(&mut self.title),
            "version" => value.clone_into(&mut self.version),
            "machine-id" => value.clone_into(&mut self.machine_id),
            "sort-key" => value.clone_into(&mut self.sort_key),
            "linux" => value.clone_into(&mut self.linux),
            "efi" => value.clone_into(&mut self.efi),
            // GRUB takes several on a line.
            "initrd" => self.initrds.extend(value.split_whitespace().map(str::to_owned)),
            "options" => {
                let space = if self.options.is_empty() { "" } else { " " };
                self.options = format!("{}{space}{value}", self.options);
                self.has_options = true;
            }
            _ => {}
        }
    }

    /// The title, or what stands in for one.
    pub(crate) fn shown(&self) -> &str {
        if self.title.is_empty() { &self.id } else { &self.title }
    }

    /// The order of menus: first what has a sort key, by that, machine and falling version; then the rest by falling
    /// name; what has failed too often last ("Sorting").
    fn order(&self, other: &Self) -> Ordering {
        let falling = |one: &str, other: &str| version::compare(other, one);
        let sorted = |spec: &Self| spec.sort_key.is_empty();
        self.is_bad.cmp(&other.is_bad).then(sorted(self).cmp(&sorted(other))).then_with(|| {
            if sorted(self) {
                return falling(&self.id, &other.id);
            }
            let keys = (&self.sort_key, &self.machine_id).cmp(&(&other.sort_key, &other.machine_id));
            keys.then_with(|| falling(&self.version, &other.version))
                .then_with(|| falling(&self.id, &other.id))
        })
    }
}

/// The entries of a directory, in the order of the menu, with the files that they are from.
pub(super) fn read(files: &Files, volume: usize, directory: &str) -> Vec<(Spec, BootFile)> {
    let names = files.list(volume, directory).into_iter().filter(|name| name.ends_with(".conf"));
    let spec = |name: String| {
        let file = files.at(volume, format!("{directory}/{name}"));
        let text = files.small_text(&file).ok()?;
        Some((Spec::parse(&name, &text), file))
    };
    let mut specs: Vec<_> = names.take(MOST_ENTRIES).filter_map(spec).collect();
    specs.sort_by(|one, other| one.0.order(&other.0));
    specs
}

/// Where the paths of an entry begin: at the root of the volume, or, where that is not so, in the folder that holds
/// `loader`.
pub(super) fn resolve(files: &Files, source: &BootFile, path: &str) -> BootFile {
    let absolute = format!("/{}", path.trim_start_matches('/'));
    let beside = source.path.ancestors().nth(3).map(|root| root.join(absolute.trim_start_matches('/')));
    match beside {
        Some(beside)
            if !files.exists(source.volume, &absolute)
                && files.exists(source.volume, &beside.to_string_lossy()) =>
        {
            files.at(source.volume, beside)
        }
        _ => files.at(source.volume, absolute),
    }
}

/// The entry that systemd-boot makes of a file; `None` if it is not one of Linux.
pub(super) fn entry(files: &Files, spec: &Spec, source: &BootFile) -> Option<Entry> {
    if spec.linux.is_empty() {
        return None;
    }
    let title = spec.shown();
    Some(Entry {
        title: if spec.version.is_empty() { title.to_owned() } else { format!("{title} ({})", spec.version) },
        id: spec.id.clone(),
        kernel: resolve(files, source, &spec.linux),
        initrds: spec.initrds.iter().map(|path| resolve(files, source, path)).collect(),
        cmdline: spec.options.clone(),
        source: source.clone(),
        loader: Loader::BootLoaderSpec,
        default: false,
    })
}

/// The pattern of `default` in `loader.conf`.
pub(crate) fn default_pattern(loader_conf: &str) -> Option<&str> {
    loader_conf
        .lines()
        .find_map(|line| line.trim().strip_prefix("default")?.strip_prefix(char::is_whitespace))
        .map(str::trim)
}

/// Whether a name fits a pattern of `*` and `?`.
pub(crate) fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<_>, Vec<_>) = (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut from) = (0, 0);
    // Where the last star was, and how much it has swallowed.
    let mut star: Option<(usize, usize)> = None;
    while at < name.len() {
        match pattern.get(from) {
            Some('*') => {
                star = Some((from, at));
                from += 1;
            }
            Some(wanted) if *wanted == '?' || *wanted == name[at] => {
                at += 1;
                from += 1;
            }
            _ => {
                let Some((place, swallowed)) = star else { return false };
                star = Some((place, swallowed + 1));
                from = place + 1;
                at = swallowed + 1;
            }
        }
    }
    pattern[from..].iter().all(|rest| *rest == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_specification() {
        let text = "# comment\ntitle Fedora\nversion\t6.5\nlinux /vmlinuz\ninitrd /a /b\ninitrd /c\noptions root=x\noptions ro";
        let spec = Spec::parse("id-6.5+2-1.conf", text);
        assert_eq!((spec.id.as_str(), spec.is_bad, spec.shown()), ("id-6.5", false, "Fedora"));
        assert_eq!((spec.initrds.len(), spec.options.as_str()), (3, "root=x ro"));
        assert!(Spec::parse("x+0-3.conf", "").is_bad);
        assert_eq!(Spec::parse("a+b.conf", "").id, "a+b");
    }

    #[test]
    fn the_order_of_the_menu() {
        let spec = |name: &str, text: &str| Spec::parse(name, text);
        let mut specs = [
            spec("a-1.9.conf", ""),
            spec("a-1.10.conf", ""),
            spec("z.conf", "sort-key b"),
            spec("y.conf", "sort-key a\nversion 1"),
            spec("x.conf", "sort-key a\nversion 2"),
            spec("w+0.conf", "sort-key a\nversion 3"),
        ];
        specs.sort_by(Spec::order);
        let ids: Vec<_> = specs.iter().map(|spec| spec.id.as_str()).collect();
        assert_eq!(ids, ["x", "y", "z", "a-1.10", "a-1.9", "w"]);
    }

    #[test]
    fn patterns() {
        for (pattern, name, fit) in [
            ("debian-*", "debian-6.1.conf", true),
            ("debian-*", "fedora", false),
            ("*", "", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*b*b", "abab", true),
            ("*a*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(fits(pattern, name), fit, "{pattern} {name}");
        }
        assert_eq!(default_pattern("timeout 3\ndefault  arch*\n"), Some("arch*"));
        assert_eq!(default_pattern("defaults x"), None);
    }
}

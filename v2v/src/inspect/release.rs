//! What a Linux is called, and what it is made of.

use std::collections::HashMap;

use super::{Init, System, elf};
use crate::view::GuestView;

/// Programs that tell the machine; the first that is there.
const PROGRAMS: [&str; 6] = [
    "/sbin/init",
    "/usr/lib/systemd/systemd",
    "/lib/systemd/systemd",
    "/bin/sh",
    "/bin/busybox",
    "/usr/bin/env",
];

/// Folders and files of package managers.
const PACKAGES: [(&str, &str); 9] = [
    ("/var/lib/dpkg/status", "deb"),
    ("/usr/lib/sysimage/rpm", "rpm"),
    ("/var/lib/rpm", "rpm"),
    ("/usr/share/rpm", "rpm"),
    ("/var/lib/pacman/local", "pacman"),
    ("/lib/apk/db", "apk"),
    ("/usr/lib/apk/db", "apk"),
    ("/var/db/pkg", "portage"),
    ("/nix/store", "nix"),
];

/// Files of systems that have no os-release, and what their names mean.
const OLD_FILES: [(&str, &str); 10] = [
    ("/etc/centos-release", "centos"),
    ("/etc/fedora-release", "fedora"),
    ("/etc/photon-release", "photon"),
    ("/etc/redhat-release", "rhel"),
    ("/etc/system-release", ""),
    ("/etc/SuSE-release", "sles"),
    ("/etc/alpine-release", "alpine"),
    ("/etc/arch-release", "arch"),
    ("/etc/gentoo-release", "gentoo"),
    ("/etc/slackware-version", "slackware"),
];

/// Beginnings of the first line of such files.
const OLD_NAMES: [(&str, &str); 13] = [
    ("red hat", "rhel"),
    ("centos", "centos"),
    ("fedora", "fedora"),
    ("scientific", "scientific"),
    ("oracle", "ol"),
    ("enterprise linux", "ol"),
    ("amazon", "amzn"),
    ("rocky", "rocky"),
    ("almalinux", "almalinux"),
    ("opensuse", "opensuse"),
    ("suse linux enterprise desktop", "sled"),
    ("suse", "sles"),
    ("xenserver", "xenserver"),
];

/// Finds out what a system is.
pub(super) fn fill(view: &GuestView, system: &mut System) {
    let text = view.text("/etc/os-release").or_else(|| view.text("/usr/lib/os-release")).unwrap_or_default();
    let release = parse_os_release(&text);
    let get = |key: &str| release.get(key).cloned().unwrap_or_default();
    (system.distribution, system.version, system.product) =
        (get("ID"), get("VERSION_ID"), get("PRETTY_NAME"));
    system.like = get("ID_LIKE").split_whitespace().map(str::to_owned).collect();
    if system.distribution.is_empty() {
        old_release(view, system);
    }
    if system.product.is_empty() {
        system.product = [get("NAME"), get("VERSION")].join(" ").trim().to_owned();
    }
    system.architecture = architecture(view).to_owned();
    system.host_name = host_name(view).unwrap_or_default();
    let packages = PACKAGES.iter().find(|(path, _)| view.exists(path));
    system.packages = packages.map_or(String::new(), |(_, name)| (*name).to_owned());
    system.init = init(view);
}

/// `KEY=value`, `KEY="value"`, as a shell reads it (os-release(5)).
pub fn parse_os_release(text: &str) -> HashMap<String, String> {
    let line = |line: &str| {
        let (key, value) = line.trim().split_once('=')?;
        let is_key = |c: char| c.is_ascii_alphanumeric() || c == '_';
        (!key.is_empty() && key.chars().all(is_key)).then(|| (key.to_owned(), unquote(value.trim())))
    };
    text.lines().take(1000).filter_map(line).collect()
}

/// A word of a shell without its quotes.
pub(super) fn unquote(value: &str) -> String {
    let quote = value.chars().next().filter(|quote| matches!(quote, '"' | '\''));
    let Some(quote) = quote else { return value.to_owned() };
    let mut plain = String::new();
    let mut chars = value[1..].chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' if quote == '"' => plain.extend(chars.next()),
            c if c == quote => break,
            c => plain.push(c),
        }
    }
    plain
}

/// Distributions of the time before os-release.
fn old_release(view: &GuestView, system: &mut System) {
    if let Some(text) = view.text("/etc/lsb-release") {
        let release = parse_os_release(&text);
        if let Some(id) = release.get("DISTRIB_ID") {
            system.distribution = id.to_lowercase();
            system.version = release.get("DISTRIB_RELEASE").cloned().unwrap_or_default();
            system.product = release.get("DISTRIB_DESCRIPTION").cloned().unwrap_or_default();
            return;
        }
    }
    for (path, id) in OLD_FILES {
        let Some(text) = view.text(path) else { continue };
        let first = text.lines().next().unwrap_or_default().trim();
        let lower = first.to_lowercase();
        let named = OLD_NAMES.iter().find(|(start, _)| lower.starts_with(start)).map(|(_, id)| *id);
        system.distribution = named.unwrap_or(id).to_owned();
        system.product = first.to_owned();
        system.version = version_in(first);
        // SUSE has a line each for the version and the service pack.
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_prefix('='));
            line.map(|value| value.trim().to_owned())
        };
        if let Some(version) = value("VERSION") {
            let patch = value("PATCHLEVEL").filter(|patch| patch != "0");
            system.version = patch.map_or(version.clone(), |patch| format!("{version}.{patch}"));
        }
        return;
    }
    if let Some(version) = view.text("/etc/debian_version") {
        system.distribution = "debian".to_owned();
        system.version = version.lines().next().unwrap_or_default().trim().to_owned();
        system.product = format!("Debian GNU/Linux {}", system.version);
    }
}

/// The first word that begins with a digit.
fn version_in(line: &str) -> String {
    let begins = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
    line.split_whitespace().find(begins).unwrap_or_default().to_owned()
}

fn architecture(view: &GuestView) -> &'static str {
    let machine = |path: &&str| {
        let place = view.locate(path).ok()?;
        let mut head = [0; 64];
        let read = view.open(&place).ok()?.read_at(&mut head, 0).ok()?;
        Some(elf::machine(&head[..read])).filter(|machine| !machine.is_empty())
    };
    PROGRAMS.iter().find_map(machine).unwrap_or_default()
}

/// The most characters of a host name.
const MOST_NAME: usize = 253;

fn host_name(view: &GuestView) -> Option<String> {
    let line = |path: &str| {
        let text = view.text(path)?;
        let mut lines = text.lines().map(str::trim);
        lines.find(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned)
    };
    let value = |path: &str, key: &str| {
        let text = view.text(path)?;
        let line =
            text.lines().find_map(|line| line.trim().strip_prefix(key)?.trim_start().strip_prefix('='));
        line.map(|value| unquote(value.trim()))
    };
    let name = line("/etc/hostname")
        .or_else(|| line("/etc/HOSTNAME"))
        .or_else(|| value("/etc/sysconfig/network", "HOSTNAME"))
        .or_else(|| value("/etc/conf.d/hostname", "hostname"))?;
    let is_good = |c: char| c.is_alphanumeric() || matches!(c, '-' | '.' | '_');
    Some(name).filter(|name| !name.is_empty() && name.len() <= MOST_NAME && name.chars().all(is_good))
}

fn init(view: &GuestView) -> Init {
    let program = view.locate("/sbin/init").map(|place| place.guest_path).unwrap_or_default();
    let is_systemd = || view.exists("/usr/lib/systemd/systemd") || view.exists("/lib/systemd/systemd");
    if program.ends_with("systemd") {
        Init::Systemd
    } else if ["/sbin/openrc-run", "/sbin/openrc", "/usr/bin/openrc-run"].iter().any(|path| view.exists(path))
    {
        Init::OpenRc
    } else if view.exists("/etc/inittab") {
        Init::SysV
    } else if is_systemd() {
        Init::Systemd
    } else {
        Init::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_as_shells_read_it() {
        let release = parse_os_release(
            "# x\nID=debian\nVERSION_ID=\"12\"\nPRETTY_NAME='a \"b\"'\nNAME=\"a \\\"b\\\" c\" # d\nno\n=x\n",
        );
        assert_eq!(release["ID"], "debian");
        assert_eq!(release["VERSION_ID"], "12");
        assert_eq!(release["PRETTY_NAME"], "a \"b\"");
        assert_eq!(release["NAME"], "a \"b\" c");
        assert_eq!(release.len(), 4);
    }

    #[test]
    fn quotes_that_do_not_end() {
        assert_eq!(unquote("\"abc"), "abc");
        assert_eq!(unquote("\"abc\\"), "abc");
        assert_eq!(unquote("'"), "");
        assert_eq!(unquote(""), "");
    }

    #[test]
    fn versions_in_old_files() {
        assert_eq!(version_in("CentOS release 5.11 (Final)"), "5.11");
        assert_eq!(version_in("Arch Linux"), "");
    }
}

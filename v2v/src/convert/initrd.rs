//! The drivers of KVM's devices in early boot: modules out of the guest's own tree, put behind its initramfs.
//!
//! Udev in the initramfs loads them by the aliases of the devices, as do mdev and nlplug-findfs where they are; what is
//! needed for that is that the indexes in the initramfs know the modules, so these are added too. Nothing that is there is
//! unpacked or made anew, and the microcode in front stays in front.

use std::collections::{BTreeMap, HashSet};

use block::Result;
use guestdisk::boot::BootFile;

use super::cmdline::Cmdlines;
use super::draft::{Draft, Why};
use super::loaders::guest_path;
use super::lvm;
use super::modules::{self, INDEXES, Modules, name_of, suffix_of};
use super::names::Reader;
use super::segment::{self, Packing};
use super::tables;
use super::tree::Place;
use super::units;
use crate::inspect::{DriverPlace, Initramfs, Kernel, System};
use crate::plan::{Stop, TargetBus};
use cpio::Archive;

/// Modules that are added along with others where there are any: other ways to attach the same devices.
const ALONG: [&str; 1] = ["virtio_mmio"];
/// The network card, for systems that use the network in early boot.
const NETWORK: &str = "virtio_net";

/// The most bytes of modules and their indexes that go into one initramfs; a few MiB are usual.
const MOST_ADDED: u64 = 256 << 20;

/// What has been found to be missing anywhere.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Missing {
    /// Drivers that an initramfs did not have.
    pub(crate) drivers: Vec<&'static str>,
}

/// Everything in this file's care. `links`: `.link` files for network cards.
///
/// # Errors
/// A file of the guest cannot be read in the middle.
pub(crate) fn convert(
    draft: &mut Draft<'_>,
    system: &System,
    bus: TargetBus,
    lines: &Cmdlines<'_>,
    links: &[(String, Vec<u8>)],
) -> Result<Missing> {
    let mut missing = Missing::default();
    let mut seen: HashSet<Place> = HashSet::new();
    for kernel in &system.kernels {
        let wanted = absent(kernel, bus);
        let Some(file) = kernel.initrds.last() else {
            without_initramfs(draft, kernel, &wanted, bus);
            continue;
        };
        // What is started by itself may share its initramfs with what is not.
        let shared = |other: &&Kernel| other.initrds.last() == Some(file);
        let starts = system.kernels.iter().filter(shared).any(|kernel| kernel.default);
        if kernel.unified {
            unified(draft, kernel, &wanted, bus);
            continue;
        }
        let Some(found) = &kernel.initramfs else {
            unreadable(draft, starts, kernel, file, &wanted);
            continue;
        };
        let place = Place { volume: file.volume, path: file.path.clone() };
        if !seen.insert(place.clone()) {
            continue;
        }
        if !found.problem.is_empty() {
            damaged(draft, starts && !wanted.is_empty(), kernel, file, &found.problem);
            continue;
        }
        let mut work = Work { draft, system, kernel, found, place, lines, links, starts };
        work.run(wanted, &mut missing)?;
    }
    Ok(missing)
}

/// Drivers that are neither in the kernel nor in its initramfs.
fn absent(kernel: &Kernel, bus: TargetBus) -> Vec<&'static str> {
    let is_there = |name: &str| {
        let place = kernel.drivers.iter().find(|driver| driver.name == name).map(|driver| driver.place);
        let known = kernel.initramfs.as_ref().map(|found| &found.module_names);
        place == Some(DriverPlace::BuiltIn)
            || place == Some(DriverPlace::Initramfs)
            || known.is_some_and(|names| names.iter().any(|own| own == name))
    };
    bus.modules().iter().copied().filter(|name| !is_there(name)).collect()
}

/// Says what a kernel lacks: of the one that starts by itself, that keeps the guest from starting.
fn lacks(draft: &mut Draft<'_>, starts: bool, message: String, hint: impl Into<String>) {
    let stop = Stop { message, hint: hint.into() };
    if starts {
        let by_itself = "the kernel that starts by itself does not find its disk on KVM";
        draft.stop(format!("{by_itself}: {}", stop.message), stop.hint);
    } else {
        draft.ask(stop.sentence());
    }
}

fn unreadable(draft: &mut Draft<'_>, starts: bool, kernel: &Kernel, file: &BootFile, wanted: &[&str]) {
    let (path, release) = (file.path.display(), &kernel.release);
    let is_there = draft.tree().stat(&Place { volume: file.volume, path: file.path.clone() }).is_some();
    if wanted.is_empty() || !is_there {
        // Inspection has told of a file that is not there.
        draft.leave(format!("The initramfs {path} of kernel {release} cannot be read, and stays as it is."));
        return;
    }
    let message = format!(
        "the initramfs {path} of kernel {release} cannot be read, so that it is not known whether it has {}",
        wanted.join(", ")
    );
    lacks(draft, starts, message, "make it anew in the guest before it is moved");
}

fn damaged(draft: &mut Draft<'_>, starts: bool, kernel: &Kernel, file: &BootFile, problem: &str) {
    let message = format!(
        "the initramfs {} of kernel {} is damaged or of a kind that is not known ({problem}), so that nothing can be added to it",
        file.path.display(),
        kernel.release
    );
    lacks(draft, starts, message, "make it anew in the guest before it is moved");
}

fn without_initramfs(draft: &mut Draft<'_>, kernel: &Kernel, wanted: &[&str], bus: TargetBus) {
    // Of a kernel without a list of drivers nothing can be said.
    if !wanted.is_empty() && !kernel.drivers.is_empty() && !kernel.entries.is_empty() {
        let message = format!(
            "kernel {} is started without an initramfs and lacks {}",
            kernel.release,
            wanted.join(", ")
        );
        lacks(draft, kernel.default, message, other_way(bus));
    }
}

fn unified(draft: &mut Draft<'_>, kernel: &Kernel, wanted: &[&str], bus: TargetBus) {
    if wanted.is_empty() {
        draft.leave(format!(
            "The unified image of kernel {} has the drivers that are needed.",
            kernel.release
        ));
        return;
    }
    let message = format!(
        "the unified image of kernel {} lacks {}, and nothing can be added to it from outside",
        kernel.release,
        wanted.join(", ")
    );
    let hint =
        format!("make it anew in the guest with these drivers before it is moved, or {}", other_way(bus));
    lacks(draft, kernel.default, message, hint);
}

fn other_way(bus: TargetBus) -> &'static str {
    match bus {
        TargetBus::Sata => "attach the disks to another bus",
        TargetBus::VirtioBlk | TargetBus::VirtioScsi => "use --bus sata",
    }
}

/// One initramfs.
struct Work<'a, 'b> {
    draft: &'a mut Draft<'b>,
    system: &'a System,
    kernel: &'a Kernel,
    found: &'a Initramfs,
    place: Place,
    lines: &'a Cmdlines<'a>,
    links: &'a [(String, Vec<u8>)],
    /// It is of the kernel that starts by itself.
    starts: bool,
}

/// What goes into the archive.
#[derive(Default)]
struct Contents {
    /// Paths within the initramfs, with permissions and bytes.
    files: BTreeMap<String, (u32, Vec<u8>)>,
    reasons: Vec<String>,
    /// Drivers that it lacked.
    drivers: Vec<&'static str>,
    /// Bytes of all files.
    bytes: u64,
}

impl Contents {
    /// Adds a module, or what belongs to modules.
    ///
    /// # Errors
    /// All of them together are larger than what a kernel needs to find its disk.
    fn add(&mut self, path: String, mode: u32, bytes: Vec<u8>) -> Result<()> {
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        if self.bytes > MOST_ADDED {
            return Err(block::Error::unsupported(format!(
                "{path}: with it, the modules for an initramfs would be larger than {} MiB",
                MOST_ADDED >> 20
            )));
        }
        self.files.insert(path, (mode, bytes));
        Ok(())
    }
}

impl Work<'_, '_> {
    fn run(&mut self, wanted: Vec<&'static str>, missing: &mut Missing) -> Result<()> {
        let mut contents = Contents::default();
        if !wanted.is_empty() {
            self.modules(&wanted, &mut contents)?;
        }
        self.names_within(&mut contents);
        if contents.files.is_empty() {
            return Ok(());
        }
        let drivers = std::mem::take(&mut contents.drivers);
        let lacked = !drivers.is_empty();
        let new = drivers.into_iter().filter(|name| !missing.drivers.contains(name));
        let new: Vec<_> = new.collect();
        missing.drivers.extend(new);
        self.link_files(&mut contents);
        let has_gzip = self.config("CONFIG_RD_GZIP=y");
        let packing = Packing::behind(&self.found.compression, &self.kernel.release, has_gzip);
        let archive = archive(&contents.files)?;
        let len = self.draft.tree().stat(&self.place).map_or(0, |found| found.1);
        let bytes = segment::append(&archive, packing, len)?;
        let path = guest_path(self.system, &self.place);
        let undo = format!(
            "update-initramfs -u -k {0}, dracut -f --kver {0} or mkinitcpio -P makes it anew; truncate -s {len} {1} takes the addition away",
            self.kernel.release,
            path.display()
        );
        let needed = self.starts && lacked;
        let why = Why::new("virtio-initramfs", contents.reasons.join("; "), undo).needed(needed);
        self.draft.append(self.place.clone(), &path, bytes, why);
        Ok(())
    }

    /// Whether the kernel's configuration in /boot has this line.
    fn config(&mut self, line: &str) -> bool {
        let path = format!("/boot/config-{}", self.kernel.release);
        self.draft.text(path).is_some_and(|text| text.lines().any(|own| own == line))
    }

    /// The modules that are missing and the indexes that know them.
    fn modules(&mut self, wanted: &[&'static str], contents: &mut Contents) -> Result<()> {
        let release = &self.kernel.release;
        let tree = self.draft.tree();
        let Some(modules) = self.kernel.modules.as_ref().and_then(|folder| Modules::read(tree, folder))
        else {
            let message = format!(
                "kernel {release} has no {} in its initramfs, and its folder of modules (or modules.dep in it) is not there to take them from",
                wanted.join(", ")
            );
            lacks(self.draft, self.starts, message, "reinstall that kernel in the guest, or use --bus sata");
            return Ok(());
        };
        let wanted: Vec<_> = wanted.iter().copied().filter(|name| !modules.is_built_in(name)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let present = |name: &str| self.found.module_names.iter().any(|own| own == name);
        let closure = match modules.closure(&wanted, &present) {
            Ok(closure) => closure,
            Err(error) => {
                let message = format!("kernel {release} cannot start from {}: {error}", wanted[0]);
                let bus = if wanted.contains(&"ahci") { TargetBus::Sata } else { TargetBus::VirtioBlk };
                let hint = format!("install a kernel that has it, or {}", other_way(bus));
                lacks(self.draft, self.starts, message, hint);
                return Ok(());
            }
        };
        let mut added = closure;
        let mut along: Vec<&str> = ALONG.to_vec();
        along.extend(self.uses_network().then_some(NETWORK));
        let is_added = |added: &[String], name: &str| added.iter().any(|own| own == name);
        let known = |name: &str| present(name) || is_added(&added, name);
        // What is optional is left out where anything about it is odd.
        let more = along.iter().filter_map(|name| modules.closure(&[*name], &known).ok()).flatten();
        let more: Vec<String> = more.collect();
        for name in more {
            if !is_added(&added, &name) {
                added.push(name);
            }
        }
        if let Some(absent) = modules.absent(tree, &added) {
            let message = format!(
                "kernel {release} has no {} in its initramfs, and {absent}, which modules.dep lists, is not there",
                wanted.join(", ")
            );
            lacks(self.draft, self.starts, message, "reinstall that kernel, or remove what is left of it");
            return Ok(());
        }
        self.take(&modules, &added, contents)?;
        contents.drivers.extend(wanted.iter().copied());
        contents.reasons.push(format!(
            "kernel {release} does not find its disk on KVM without {}: {} modules are added",
            wanted.join(", "),
            added.len()
        ));
        Ok(())
    }

    /// Whether a boot entry asks for the network before there is a root file system.
    fn uses_network(&self) -> bool {
        let entries = self.system.entries.iter().filter(|entry| self.kernel.entries.contains(&entry.id));
        entries.into_iter().any(|entry| {
            entry.cmdline.split_whitespace().any(|word| word.starts_with("ip=") || word == "rd.neednet=1")
        })
    }

    /// The files of modules, in the places and with the compression that the initramfs has.
    fn take(&mut self, modules: &Modules, added: &[String], contents: &mut Contents) -> Result<()> {
        let tree = self.draft.tree();
        if self.nash_init(modules, added, contents)? {
            return Ok(());
        }
        let base = self.found.modules.clone().filter(|folder| folder.ends_with(&self.kernel.release));
        let base = base.unwrap_or_else(|| {
            format!("{}lib/modules/{}", if self.found.merged_usr { "usr/" } else { "" }, self.kernel.release)
        });
        let present = self.places(&base);
        // Which compressions modules have in there is which ones can be read there.
        let readable: HashSet<&str> = present.values().map(|path| suffix_of(path)).collect();
        let path = |name: &str, module: &modules::Module| {
            if let Some(path) = present.get(name) {
                return path.clone();
            }
            let suffix = suffix_of(&module.path);
            match readable.contains(suffix) {
                true => module.path.clone(),
                false => format!("{}.ko", module.path.strip_suffix(suffix).unwrap_or(&module.path)),
            }
        };
        for name in added {
            let Some(module) = modules.modules.get(name) else { continue };
            let Some(mut bytes) = modules.file(tree, &module.path)? else {
                return Err(block::Error::new(
                    block::ErrorKind::NotFound,
                    format!(
                        "{}: listed in modules.dep and not there",
                        modules.folder.join(&module.path).display()
                    ),
                ));
            };
            let path = path(name, module);
            if suffix_of(&path) != suffix_of(&module.path) {
                bytes = modules::unpack(&module.path, bytes)?;
            }
            contents.add(format!("{base}/{path}"), 0o644, bytes)?;
        }
        let as_they_are = modules.modules.iter().all(|(name, module)| path(name, module) == module.path);
        for index in INDEXES {
            if let Some(bytes) = modules.file(tree, index)? {
                contents.add(format!("{base}/{index}"), 0o644, bytes)?;
            }
        }
        if !as_they_are {
            let (text, index) = modules.dependencies(&path);
            contents.files.insert(format!("{base}/modules.dep"), (0o644, text));
            contents.files.insert(format!("{base}/modules.dep.bin"), (0o644, index));
        }
        Ok(())
    }

    /// Where the modules of the initramfs are, by their names, below its folder.
    fn places(&self, base: &str) -> BTreeMap<String, String> {
        let through_link = base.strip_prefix("usr/").unwrap_or(base);
        let below = |path: &str| {
            let rest = path.strip_prefix(base).or_else(|| path.strip_prefix(through_link))?;
            rest.strip_prefix('/').map(str::to_owned)
        };
        let paths = self.found.module_paths.iter();
        paths.filter_map(|path| Some((name_of(path)?, below(path)?))).collect()
    }

    /// The initramfs of Red Hat's old mkinitrd has no udev: its init, a script for nash, loads what it names. The modules are
    /// named in front of the first line that looks for disks. `false`: it is something else.
    fn nash_init(&mut self, modules: &Modules, added: &[String], contents: &mut Contents) -> Result<bool> {
        let Some(init) = self.found.files.iter().find(|file| file.path == "init") else { return Ok(false) };
        let text = String::from_utf8_lossy(&init.bytes).into_owned();
        if !text.lines().next().is_some_and(|line| line.starts_with("#!") && line.contains("nash")) {
            return Ok(false);
        }
        let mut lines = String::new();
        for name in added {
            let Some(module) = modules.modules.get(name) else { continue };
            let Some(bytes) = modules.file(self.draft.tree(), &module.path)? else { continue };
            let bytes = modules::unpack(&module.path, bytes)?;
            lines.push_str(&format!("echo \"Loading {name}.ko module\"\ninsmod /lib/{name}.ko \n"));
            contents.add(format!("lib/{name}.ko"), 0o600, bytes)?;
        }
        contents.files.insert("init".to_owned(), (0o700, nash(&text, &lines).into_bytes()));
        Ok(true)
    }

    /// Configuration within the initramfs that names devices of the source.
    fn names_within(&self, contents: &mut Contents) {
        for file in &self.found.files {
            if contents.files.contains_key(&file.path) || file.path == "init" {
                continue;
            }
            let Ok(text) = std::str::from_utf8(&file.bytes) else { continue };
            let new = self.within(&file.path, text);
            if new != text {
                contents.files.insert(file.path.clone(), (file.mode & 0o7777, new.into_bytes()));
                let reason = "devices that it names itself get names that exist on KVM".to_owned();
                if !contents.reasons.contains(&reason) {
                    contents.reasons.push(reason);
                }
            }
        }
    }

    fn within(&self, path: &str, text: &str) -> String {
        let names = self.lines.names;
        if path.ends_with("crypttab") {
            return tables::crypttab(text, names, &mut vec![]);
        }
        if path.contains("fstab") {
            return tables::fstab(text, names, &mut vec![]);
        }
        if path.contains("lvm/devices/") {
            return tables::lvm_devices(text, names);
        }
        if path.ends_with("lvm.conf") || path.ends_with("lvmlocal.conf") {
            return lvm::conf(text, names);
        }
        if path.contains("mdadm") {
            return tables::devices(text, names, Reader::Plain);
        }
        if let Some(unit) = path.strip_suffix(".d/timeout.conf") {
            return units::timeout(unit, text, names);
        }
        // A hook opens the path that it waits for.
        let reader = if path.contains("devexists-") { Reader::Path } else { Reader::Tags };
        if path.contains("cmdline") {
            return super::text::each_line(text, |_, line| {
                Some(self.lines.edit_part(line, reader, &mut vec![]))
            });
        }
        tables::devices(text, names, reader)
    }

    /// Names of network cards, where they are given in early boot already.
    fn link_files(&self, contents: &mut Contents) {
        let has_card = self.found.module_names.iter().any(|name| name == NETWORK)
            || contents.files.keys().any(|path| name_of(path).as_deref() == Some(NETWORK));
        if !has_card {
            return;
        }
        for (path, bytes) in self.links {
            let path = path.trim_start_matches('/').to_owned();
            contents.files.insert(path, (0o644, bytes.clone()));
        }
    }
}

/// The archive. Directories are recorded only where it is known that they are nothing else; of a file that takes the
/// place of another the directory is there.
fn archive(files: &BTreeMap<String, (u32, Vec<u8>)>) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for (path, (mode, bytes)) in files {
        let within = ["usr/lib", "lib"].into_iter().find(|lib| path.starts_with(&format!("{lib}/modules/")));
        let within = within.or_else(|| path.starts_with("etc/systemd/").then_some("etc"));
        if let Some(within) = within {
            archive.way_to(within, path)?;
        }
        archive.file(path, *mode, bytes)?;
    }
    Ok(archive.finish())
}

/// Lines in front of the first of nash's commands that looks for devices.
fn nash(text: &str, lines: &str) -> String {
    let finds = |line: &str| {
        let word = line.split_whitespace().next().unwrap_or_default();
        matches!(word, "mkblkdevs" | "rmparts" | "dm" | "resume" | "mkrootdev" | "lvm")
    };
    // Drivers of disks come last, so what is named after all of them finds everything loaded.
    let last = text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("insmod ")).last();
    let from = last.map_or(0, |(index, _)| index + 1);
    let mut out = String::with_capacity(text.len() + lines.len());
    let mut done = false;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if !done && index >= from && finds(line) {
            out.push_str(lines);
            done = true;
        }
        out.push_str(line);
    }
    out
}

//! What is booted: files that the command line names, or what the boot loader of the disk would start.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, ResultExt as _};
use bootcheck::check::{Origin, Source};
use bootcheck::engine;
use bootcheck::verdict::{Reason, Verdict};
use guestdisk::boot::{self, Boot, BootFile, Entry};
use guestdisk::{Disks, Keys};
use image::json;
use serde_json::json;

use super::{Args, disk};
use crate::app::App;
use crate::cli::OutputFormat;
use crate::exit::{Exit, Outcome};
use crate::keys::explain;

/// A kernel, or an initramfs image, is not larger than this.
const MAX_FILE: u64 = 1 << 30;
/// A file of an initramfs begins at a multiple of this (Linux, "initramfs buffer format").
const INITRD_ALIGNMENT: usize = 4;

/// What the command line names, read before anything is given up.
pub(super) struct Given {
    kernel: Option<(String, Arc<[u8]>)>,
    initrds: Vec<(String, Vec<u8>)>,
}

impl Given {
    /// Reads the files.
    pub(super) fn read(args: &Args) -> Outcome<Self> {
        let read = |path: &Path| Ok((path.display().to_string(), read_file(path)?));
        let kernel = args.kernel.as_deref().map(read).transpose();
        Ok(Self {
            kernel: kernel
                .map(|kernel| kernel.map(|(name, bytes): (String, Vec<u8>)| (name, bytes.into())))?,
            initrds: args.initrd.iter().map(|path| read(path)).collect::<block::Result<_>>()?,
        })
    }
}

fn read_file(path: &Path) -> block::Result<Vec<u8>> {
    let what = || format!("could not read '{}'", path.display());
    let mut bytes = vec![];
    let file = std::fs::File::open(path).context(what)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).context(what)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::unsupported("it is larger than 1 GiB").context(what()));
    }
    Ok(bytes)
}

/// What is to be booted.
pub(super) struct Found {
    pub(super) boot: engine::Boot,
    pub(super) source: Source,
}

/// Puts together what is to be booted; or the verdict that this is not possible.
pub(super) fn find(
    given: &Given,
    args: &Args,
    append: &str,
    (disks, keys): (&[Arc<dyn BlockDevice>], &Keys),
) -> Result<Found, Verdict> {
    let mut found = match &given.kernel {
        Some((name, kernel)) => Parts {
            origin: Origin::Given,
            entry: None,
            kernel: (name.clone(), Arc::clone(kernel)),
            initrds: vec![],
            cmdline: String::new(),
        },
        None => from_disk(args, disks, keys)?,
    };
    if !given.initrds.is_empty() {
        found.initrds.clone_from(&given.initrds);
    }
    if let Some(cmdline) = &args.cmdline {
        found.cmdline.clone_from(cmdline);
    }
    let engine = (!append.is_empty()).then(|| append.to_owned());
    let append: Vec<_> = engine.into_iter().chain(args.append.iter().cloned()).collect();
    Ok(found.finish(&append))
}

/// A kernel and what belongs to it.
struct Parts {
    origin: Origin,
    entry: Option<(String, String)>,
    kernel: (String, Arc<[u8]>),
    initrds: Vec<(String, Vec<u8>)>,
    cmdline: String,
}

impl Parts {
    fn finish(self, append: &[String]) -> Found {
        let cmdline = complete(&self.cmdline, append);
        let (kernel_name, kernel) = self.kernel;
        let (names, images): (Vec<_>, Vec<_>) = self.initrds.into_iter().unzip();
        let initrd = (!images.is_empty()).then(|| back_to_back(images).into());
        Found {
            boot: engine::Boot::Linux { kernel, initrd, cmdline: cmdline.clone() },
            source: Source {
                origin: self.origin,
                entry: self.entry,
                kernel: kernel_name,
                initrd: names,
                cmdline,
            },
        }
    }
}

fn back_to_back(images: Vec<Vec<u8>>) -> Vec<u8> {
    let mut all = vec![];
    for image in images {
        all.resize(all.len().next_multiple_of(INITRD_ALIGNMENT), 0);
        if all.is_empty() {
            all = image;
        } else {
            all.extend(image);
        }
    }
    all
}

/// The command line with the serial console, a panic that ends in a reset, and what the user adds; all in front of
/// `--`, behind which words are for the init.
fn complete(cmdline: &str, append: &[String]) -> String {
    let (kernel, init) = match cmdline.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (cmdline, None),
    };
    let mut words: Vec<&str> = kernel.split(' ').filter(|word| !word.is_empty()).collect();
    if !words.iter().any(|word| word.split(',').next() == Some("console=ttyS0")) {
        words.push("console=ttyS0");
    }
    if !words.contains(&"panic=-1") {
        words.push("panic=-1");
    }
    words.extend(append.iter().map(String::as_str));
    let kernel = words.join(" ");
    init.map_or_else(|| kernel.clone(), |init| format!("{kernel} -- {init}"))
}

/// What the boot loader of the disk would start, or the entry that is wanted.
fn from_disk(args: &Args, disks: &[Arc<dyn BlockDevice>], keys: &Keys) -> Result<Parts, Verdict> {
    let not_checked =
        |error: Error| Verdict::not_checked(&error.hint("name a kernel: --kernel, --initrd, --cmdline"));
    let boot = look(disks, keys).map_err(not_checked)?;
    let entry = match &args.entry {
        Some(name) => boot.entry(name),
        None => boot.default_entry(),
    };
    let entry = entry.map_err(not_checked)?;
    let read = |file: &BootFile| -> Result<(String, Vec<u8>), Verdict> {
        let bytes = boot.read(file, MAX_FILE).map_err(|error| missing(entry, file, &error))?;
        Ok((file.to_string(), bytes))
    };
    let (kernel_name, kernel) = read(&entry.kernel)?;
    Ok(Parts {
        origin: Origin::Disk,
        entry: Some((entry.id.clone(), entry.title.clone())),
        kernel: (kernel_name, kernel.into()),
        initrds: entry.initrds.iter().map(read).collect::<Result<_, _>>()?,
        cmdline: entry.cmdline.clone(),
    })
}

fn look(disks: &[Arc<dyn BlockDevice>], keys: &Keys) -> block::Result<Boot> {
    Ok(boot::entries(&Disks::open_with(disks.to_vec(), keys).map_err(explain)?))
}

/// A boot loader could not read it either, unless that is our lack.
fn missing(entry: &Entry, file: &BootFile, error: &Error) -> Verdict {
    if error.kind() == ErrorKind::Unsupported {
        return Verdict::not_checked(error);
    }
    let detail = format!("entry '{}', {file}: {error}", entry.title);
    Verdict::NotBooted { reason: Reason::KernelMissing, detail: Some(detail) }
}

/// `--list-entries`.
pub(super) fn list(args: &Args, keys: &Keys, output: OutputFormat, app: &App) -> Outcome {
    let mut devices = vec![];
    for (index, name) in args.filenames.iter().chain(&args.disk).enumerate() {
        let format = args.format.as_deref().filter(|_| index == 0);
        devices.push(disk::open_image(args, name, format, app)?.device());
    }
    app.confine(&[]);
    let boot = look(&devices, keys)?;
    let text = match output {
        OutputFormat::Json => json::pretty(&document(&boot)) + "\n",
        OutputFormat::Human => {
            boot.default_entry()?;
            (1..).zip(&boot.entries).map(|(number, entry)| describe(number, entry)).collect()
        }
    };
    app.print(&text)?;
    Ok(Exit::OK)
}

fn describe(number: usize, entry: &Entry) -> String {
    let default = if entry.default { " (default)" } else { "" };
    let mut text = format!("{number}  {}{default}\n", entry.title);
    let mut line = |about: &str, what: &str| text.push_str(&format!("     {about:<8} {what}\n"));
    line("id", &entry.id);
    line("kernel", &entry.kernel.to_string());
    for initrd in &entry.initrds {
        line("initrd", &initrd.to_string());
    }
    line("cmdline", &entry.cmdline);
    line("from", &format!("{} ({})", entry.source, entry.loader));
    text
}

fn document(boot: &Boot) -> serde_json::Value {
    let entry = |entry: &Entry| {
        json!({
            "id": entry.id,
            "title": entry.title,
            "default": entry.default,
            "kernel": entry.kernel.to_string(),
            "initrd": entry.initrds.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "cmdline": entry.cmdline,
            "from": entry.source.to_string(),
            "loader": entry.loader.to_string(),
        })
    };
    json!({ "entries": boot.entries.iter().map(entry).collect::<Vec<_>>(), "looked-at": boot.looked_at })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_to_a_command_line() {
        let plain = |line: &str| complete(line, &[]);
        assert_eq!(plain("root=/dev/vda1 ro quiet"), "root=/dev/vda1 ro quiet console=ttyS0 panic=-1");
        assert_eq!(plain(""), "console=ttyS0 panic=-1");
        // What is there stays as it is.
        assert_eq!(plain("console=ttyS0,115200n8 panic=-1"), "console=ttyS0,115200n8 panic=-1");
        assert_eq!(plain("console=tty0 panic=30"), "console=tty0 panic=30 console=ttyS0 panic=-1");
        assert_eq!(plain("a -- single"), "a console=ttyS0 panic=-1 -- single");
        assert_eq!(complete("a", &["b c".to_owned()]), "a console=ttyS0 panic=-1 b c");
    }

    #[test]
    fn initramfs_images_are_put_back_to_back() {
        assert_eq!(
            back_to_back(vec![vec![1; 5], vec![2; 2], vec![3]]),
            [1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 0, 0, 3]
        );
        assert_eq!(back_to_back(vec![vec![1; 3]]), [1; 3]);
    }
}

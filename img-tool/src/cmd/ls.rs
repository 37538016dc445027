//! `ls`: names in the folders of a guest.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use block::Error;
use guestdisk::fs::{FileKind, Metadata, Node};
use image::json;
use serde_json::{Value, json};
use v2v::view::GuestView;

use super::guest::GuestArgs;
use crate::app::App;
use crate::cli::OutputFormat;
use crate::exit::{Exit, Failure, Outcome};
use crate::output::Gathered;

/// List files of a guest
///
/// Paths are those of the guest's system, with what it mounts. VOLUME:PATH is a path on one volume.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg ls disk.qcow2 /boot
  vimg ls -l disk.vmdk /etc/network
  vimg ls -R --output=json disk.qcow2 /etc/systemd
  vimg ls disk.qcow2 'disk 1 partition 1:/EFI'
  vimg ls --volume /dev/vg/data disk.qcow2")]
pub(crate) struct Args {
    #[command(flatten)]
    guest: GuestArgs,
    /// Show modes, owners, lengths and times
    #[arg(short)]
    long: bool,
    /// Show the folders within, too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    output: Option<String>,
    /// The image, or the description of the machine (VMX, OVF, OVA, libvirt XML, xl.cfg, .vbox)
    filename: String,
    /// The folder or file
    #[arg(default_value = "/", value_name = "PATH")]
    path: String,
}

/// The deepest folder.
pub(super) const MOST_DEPTH: usize = 256;

/// Something that has been found.
struct Item {
    path: PathBuf,
    metadata: block::Result<Metadata>,
    target: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "ls", app)?;
    let opened = args.guest.open(&args.filename, app)?;
    app.confine(&[]);
    let trees = args.guest.trees(opened)?;
    let (view, path) = trees.find(&args.path)?;
    let mut lister = Lister {
        view: &view,
        args,
        app,
        output,
        gathered: Gathered::new(&app.output),
        documents: vec![],
        failed: false,
    };
    if view.metadata(&path)?.kind == FileKind::Directory {
        lister.folder(&path, &mut vec![], true)?;
    } else {
        let item = item(&view, path);
        lister.show(&item, &item.path.display().to_string())?;
    }
    lister.finish()
}

fn item(view: &GuestView, path: PathBuf) -> Item {
    let metadata = view.symlink_metadata(&path);
    let is_link = metadata.as_ref().is_ok_and(|metadata| metadata.kind == FileKind::Symlink);
    let target = is_link.then(|| view.read_link(&path).ok()).flatten();
    Item { path, metadata, target }
}

struct Lister<'a> {
    view: &'a GuestView,
    args: &'a Args,
    app: &'a App,
    output: OutputFormat,
    gathered: Gathered<'a>,
    documents: Vec<Value>,
    failed: bool,
}

impl Lister<'_> {
    /// Shows the names in a folder, then what is in the folders among them. `above`: the folders that it lies in, for a
    /// damaged file system may have one within itself.
    fn folder(&mut self, path: &Path, above: &mut Vec<(usize, Node)>, first: bool) -> Outcome<()> {
        let entries = match self.view.read_dir(path) {
            Ok(entries) => entries,
            Err(error) if first => return Err(error.into()),
            Err(error) => {
                self.app.show(&error);
                self.failed = true;
                return Ok(());
            }
        };
        if self.args.recursive && self.output == OutputFormat::Human {
            let blank = if first { "" } else { "\n" };
            self.gathered.print(&format!("{blank}{}:\n", quoted(path.as_os_str())))?;
        }
        let place = self.view.locate(path)?;
        let mut folders = vec![];
        for entry in entries {
            let item = item(self.view, path.join(&entry.name));
            self.show(&item, &quoted(&entry.name))?;
            if item.metadata.as_ref().is_ok_and(|metadata| metadata.kind == FileKind::Directory) {
                folders.push((item.path, (place.volume, entry.node)));
            }
        }
        if !self.args.recursive {
            return Ok(());
        }
        for (path, node) in folders {
            if above.len() >= MOST_DEPTH || above.contains(&node) {
                self.app.show(&Error::unsupported(format!("{}: a folder within itself", path.display())));
                self.failed = true;
                continue;
            }
            above.push(node);
            self.folder(&path, above, false)?;
            above.pop();
        }
        Ok(())
    }

    fn show(&mut self, item: &Item, name: &str) -> Outcome<()> {
        if let Err(error) = &item.metadata {
            self.app.complain(&error.to_string());
            self.failed = true;
        }
        if self.output == OutputFormat::Json {
            self.documents.push(document(item));
            return Ok(());
        }
        let mut line = String::new();
        if self.args.long {
            line = item.metadata.as_ref().map_or_else(|_| "?????????? ".to_owned(), long);
        }
        line.push_str(name);
        if self.args.long
            && let Some(target) = &item.target
        {
            line = format!("{line} -> {}", quoted(target.as_os_str()));
        }
        self.gathered.print(&format!("{line}\n"))
    }

    fn finish(mut self) -> Outcome {
        if self.output == OutputFormat::Json {
            self.app.print(&(json::pretty(&Value::Array(self.documents)) + "\n"))?;
        } else {
            self.gathered.flush()?;
        }
        if self.failed { Err(Failure::Silent(Exit::ERROR)) } else { Ok(Exit::OK) }
    }
}

/// A name in which nothing moves the cursor: control characters, and bytes that are not UTF-8, as `\x1b`.
fn quoted(name: &OsStr) -> String {
    let mut text = String::new();
    for chunk in name.as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                text.push_str(&format!("\\x{:02x}", u32::from(c)));
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

fn long(metadata: &Metadata) -> String {
    let Metadata { links, uid, gid, size, .. } = metadata;
    let time = chrono::DateTime::from_timestamp(metadata.mtime, 0).map(|time| {
        let local: chrono::DateTime<chrono::Local> = time.into();
        local.format("%Y-%m-%d %H:%M").to_string()
    });
    let time = time.unwrap_or_else(|| "?".to_owned());
    format!("{} {links:>3} {uid:>5} {gid:>5} {size:>10} {time} ", mode(metadata))
}

/// `-rwxr-xr-x`
fn mode(metadata: &Metadata) -> String {
    let mode = metadata.mode;
    let mut text = String::from(letter(metadata.kind));
    for (shift, special, lower, upper) in
        [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, true) => lower,
            (true, false) => upper,
        });
    }
    text
}

fn letter(kind: FileKind) -> char {
    match kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
        FileKind::Unknown => '?',
    }
}

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::CharDevice => "char-device",
        FileKind::BlockDevice => "block-device",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::Unknown => "unknown",
    }
}

/// The document of a file. A path that is not UTF-8 is given in hexadecimal, too.
fn document(item: &Item) -> Value {
    let mut value = json!({ "path": item.path.to_string_lossy() });
    if item.path.to_str().is_none() {
        let hex: String = item.path.as_os_str().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        value["path-hex"] = hex.into();
    }
    match &item.metadata {
        Ok(metadata) => {
            value["type"] = kind_name(metadata.kind).into();
            value["mode"] = format!("{:04o}", metadata.mode).into();
            value["uid"] = metadata.uid.into();
            value["gid"] = metadata.gid.into();
            value["links"] = metadata.links.into();
            value["size"] = metadata.size.into();
            value["mtime"] = metadata.mtime.into();
        }
        Err(error) => value["error"] = error.to_string().into(),
    }
    if let Some(target) = &item.target {
        value["target"] = target.to_string_lossy().into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        let metadata = |kind, mode| Metadata { kind, mode, uid: 0, gid: 0, size: 0, mtime: 0, links: 1 };
        assert_eq!(mode(&metadata(FileKind::File, 0o4755)), "-rwsr-xr-x");
        assert_eq!(mode(&metadata(FileKind::Directory, 0o1777)), "drwxrwxrwt");
        assert_eq!(mode(&metadata(FileKind::Symlink, 0o777)), "lrwxrwxrwx");
        assert_eq!(mode(&metadata(FileKind::File, 0o2644)), "-rw-r-Sr--");
    }

    #[test]
    fn names_move_no_cursor() {
        assert_eq!(quoted(OsStr::from_bytes(b"a\x1b[2J\xffb\xc3\xa9")), "a\\x1b[2J\\xffb\u{e9}");
    }
}

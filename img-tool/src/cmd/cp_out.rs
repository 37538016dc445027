//! `cp-out`: files and folders of a guest, copied to the host.
//!
//! The guest is a stranger: nothing is written outside the folder that was named (every step is taken from an open
//! folder, links are made and never followed), nothing that is there is replaced, and no file becomes one that runs with
//! somebody else's rights.

mod target;

use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, ResultExt as _};
use guestdisk::fs::{FileKind, Metadata, Node};
use image::progress::Progress as _;
use v2v::view::GuestView;

use super::guest::GuestArgs;
use crate::app::App;
use crate::exit::{Exit, Outcome};
use crate::progress::{ProgressArgs, Reporter};
use target::Folder;

/// Copy files and folders out of a guest
///
/// Each PATH appears in DIR under its last name, folders with all that is in them, with modes and times; links stay
/// links. Files belong to whoever runs this, and set-user-ID, set-group-ID and sticky bits are not kept. Devices, pipes
/// and sockets are left out, and told. What is in DIR already is never replaced.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  everything was copied
  1  something was not, or was left out

Examples:
  vimg cp-out disk.qcow2 /etc /var/log .
  vimg cp-out -p disk.vmdk /home/alice backup/
  vimg cp-out disk.qcow2 'disk 1 partition 1:/EFI' esp/")]
pub(crate) struct Args {
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    progress: ProgressArgs,
    /// The image, or the description of the machine (VMX, OVF, OVA, libvirt XML, xl.cfg, .vbox)
    filename: String,
    /// What is to be copied
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
    /// Where to: a folder that exists
    #[arg(required = true, value_name = "DIR")]
    directory: PathBuf,
}

/// The deepest folder.
const MOST_DEPTH: usize = super::ls::MOST_DEPTH;
/// Bytes that are copied at once, and the size of holes that are kept.
const PIECE: usize = 1 << 20;
const HOLE: usize = 64 << 10;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let opened = args.guest.open(&args.filename, app)?;
    let target = Folder::open(&args.directory)?;
    let reporter = Reporter::new(&args.progress, false, app)?;
    app.confine_to_unpacking(&args.directory);
    let trees = args.guest.trees(opened)?;
    let mut copier = Copier { reporter: &reporter, done: 0, total: 0, left_out: 0, above: vec![] };
    let mut found = vec![];
    for path in &args.paths {
        let follow = path.ends_with('/');
        let (view, path) = trees.find(path)?;
        // A link at the end is copied as what it is, unless a slash behind it asks for the folder.
        let place = if follow { view.locate(&path)? } else { view.locate_link(&path)? };
        if reporter.wants_estimate() {
            copier.measure(&view, &place.guest_path)?;
        }
        found.push((view, place.guest_path));
    }
    for (view, path) in &found {
        let copied = match path.file_name() {
            Some(name) => copier.copy(view, path, &target, name.as_ref()),
            // The root has no name.
            None => copier.within(view, path, &target),
        };
        copied.map_err(|error| reporter.failure(error))?;
    }
    reporter.finish();
    Ok(if copier.left_out == 0 { Exit::OK } else { Exit::ERROR })
}

/// Copies, and keeps count.
struct Copier<'a> {
    reporter: &'a Reporter<'a>,
    /// Bytes that have been copied, and that are to be.
    done: u64,
    total: u64,
    left_out: u64,
    /// The folders that the present one lies in: a damaged file system may have one within itself.
    above: Vec<(usize, Node)>,
}

impl Copier<'_> {
    /// Adds what is to be copied to the total.
    fn measure(&mut self, view: &GuestView, path: &Path) -> block::Result<()> {
        let metadata = view.symlink_metadata(path)?;
        match metadata.kind {
            FileKind::File => self.total = self.total.saturating_add(metadata.size),
            FileKind::Directory => {
                for (child, node) in self.children(view, path)? {
                    self.above.push(node);
                    // What cannot be read is told when it is copied.
                    drop(self.measure(view, &child));
                    self.above.pop();
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The paths in a folder, with their nodes.
    fn children(&self, view: &GuestView, path: &Path) -> block::Result<Vec<(PathBuf, (usize, Node))>> {
        let volume = view.locate(path)?.volume;
        let entries = view.read_dir(path)?;
        let child = |entry: guestdisk::fs::DirEntry| {
            let node = (volume, entry.node);
            if self.above.len() >= MOST_DEPTH
                || entry.kind == FileKind::Directory && self.above.contains(&node)
            {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("{}: a folder within itself", path.display()),
                ));
            }
            Ok((path.join(entry.name), node))
        };
        entries.into_iter().map(child).collect()
    }

    /// Copies what is at a path into a folder, under a name.
    fn copy(&mut self, view: &GuestView, path: &Path, target: &Folder, name: &Path) -> block::Result<()> {
        if self.reporter.cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "cancelled"));
        }
        let metadata = view.symlink_metadata(path)?;
        match metadata.kind {
            FileKind::Directory => {
                let folder = target.create_folder(name)?;
                self.within(view, path, &folder)?;
                folder.finish(&metadata)
            }
            FileKind::Symlink => target.create_link(name, &view.read_link(path)?, &metadata),
            FileKind::File => self.file(view, path, target, name, &metadata),
            _ => {
                self.leave_out(&format!("{}: neither a file, a folder nor a link", path.display()));
                Ok(())
            }
        }
    }

    /// Copies all that is in a folder. What is damaged is left out, and told.
    fn within(&mut self, view: &GuestView, path: &Path, target: &Folder) -> block::Result<()> {
        let children = match self.children(view, path) {
            Ok(children) => children,
            Err(error) => {
                self.leave_out(&error.to_string());
                return Ok(());
            }
        };
        for (child, node) in children {
            let Some(name) = child.file_name() else { continue };
            self.above.push(node);
            let copied = self.copy(view, &child, target, name.as_ref());
            self.above.pop();
            match copied {
                Err(error) if is_of_guest(&error) => self.leave_out(&error.to_string()),
                other => other?,
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        view: &GuestView,
        path: &Path,
        target: &Folder,
        name: &Path,
        metadata: &Metadata,
    ) -> block::Result<()> {
        let source = view.open(&view.locate_link(path)?)?;
        let file = target.create_file(name)?;
        let (mut buffer, mut offset) = (vec![0; PIECE], 0);
        loop {
            if self.reporter.cancelled() {
                return Err(Error::new(ErrorKind::Cancelled, "cancelled"));
            }
            let read = source.read_at(&mut buffer, offset)?;
            if read == 0 {
                break;
            }
            for (index, piece) in buffer[..read].chunks(HOLE).enumerate() {
                if !block::zero::is_zero(piece) {
                    file.write_at(piece, offset + (index * HOLE) as u64)
                        .context(|| name.display().to_string())?;
                }
            }
            offset += read as u64;
            self.done = self.done.saturating_add(read as u64);
            self.reporter.update(self.done.min(self.total), self.total);
        }
        file.finish(offset, metadata)
    }

    fn leave_out(&mut self, what: &str) {
        self.left_out += 1;
        self.reporter.warn(&format!("left out: {what}"));
    }
}

/// Whether an error is about the guest's file system rather than the host's.
fn is_of_guest(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Corrupt | ErrorKind::Invalid | ErrorKind::Truncated | ErrorKind::Unsupported
    )
}

//! `cat`: files of a guest, on standard output.

use v2v::view::GuestView;

use super::guest::GuestArgs;
use crate::app::App;
use crate::exit::{Exit, Outcome};

/// Print files of a guest
///
/// Paths are those of the guest's system, with what it mounts. VOLUME:PATH is a path on one volume.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg cat disk.qcow2 /etc/fstab
  vimg cat disk.vmdk /boot/grub/grub.cfg /etc/default/grub
  vimg cat disk.qcow2 'disk 1 partition 1:/EFI/debian/grub.cfg'")]
pub(crate) struct Args {
    #[command(flatten)]
    guest: GuestArgs,
    /// The image, or the description of the machine (VMX, OVF, OVA, libvirt XML, xl.cfg, .vbox)
    filename: String,
    /// The files
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
}

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let opened = args.guest.open(&args.filename, app)?;
    app.confine(&[]);
    let trees = args.guest.trees(opened)?;
    let mut exit = Exit::OK;
    for path in &args.paths {
        let found = trees.find(path);
        let printed = found.map_err(Into::into).and_then(|(view, path)| print(&view, &path, app));
        match printed {
            Ok(()) => {}
            // As cat does: the others are printed all the same.
            Err(crate::exit::Failure::Error { error, .. }) => {
                app.show(&error);
                exit = Exit::ERROR;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(exit)
}

fn print(view: &GuestView, path: &std::path::Path, app: &App) -> Outcome<()> {
    let place = view.locate(path)?;
    let file = view.open(&place)?;
    let (mut buffer, mut offset) = (vec![0; PIECE], 0);
    loop {
        let read = file.read_at(&mut buffer, offset)?;
        if read == 0 {
            return Ok(());
        }
        app.output.write(&buffer[..read])?;
        offset += read as u64;
    }
}

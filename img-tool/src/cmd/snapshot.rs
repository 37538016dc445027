//! `snapshot`: the states of a disk that are kept inside its image.

use std::sync::Arc;
use std::time::SystemTime;

use block::{Error, ErrorKind, Result};
use image::info::human::snapshot_table;
use image::open::BackingMode;
use image::{Layer, OpenOptions};
use qcow2::Qcow2;
use qcow2::snapshot::Selector;

use crate::app::App;
use crate::cli::SourceArgs;
use crate::cmd::info::local_time;
use crate::exit::{Exit, Failure, Outcome};
use crate::snapshot::Wanted;

/// List, create, apply or delete internal snapshots of an image
///
/// A snapshot is the disk as it was at one moment, kept in the same file; it takes no space until the disk changes.
/// Applying one throws away what the disk holds now. Whatever is done is done at once or, should the machine stop in
/// the middle of it, not at all.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg snapshot -l disk.qcow2
  vimg snapshot -c before-upgrade disk.qcow2
  vimg snapshot -a before-upgrade disk.qcow2
  vimg snapshot -d before-upgrade disk.qcow2
  vimg convert -l before-upgrade -O qcow2 disk.qcow2 before.qcow2")]
pub(crate) struct Args {
    /// List the snapshots (the default)
    #[arg(short, long, action = clap::ArgAction::Count)]
    list: u8,
    /// Create a snapshot of this name
    #[arg(short, long, value_name = "SNAPSHOT", action = clap::ArgAction::Append)]
    create: Vec<String>,
    /// Make the disk what it was when the snapshot (an id or a name) was created
    #[arg(short, long, value_name = "SNAPSHOT", action = clap::ArgAction::Append)]
    apply: Vec<String>,
    /// Delete the snapshot of this name, or with snapshot.id=ID the one of this id
    #[arg(short, long, value_name = "SNAPSHOT", action = clap::ArgAction::Append)]
    delete: Vec<String>,
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Print errors only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    source: SourceArgs,
    /// The image
    filename: String,
}

/// What is to be done.
enum Action<'a> {
    List,
    Create(&'a str),
    Apply(&'a str),
    Delete(&'a str),
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let action = args.action(app)?;
    let writable = !matches!(action, Action::List);
    let source = args.source.source(&args.filename, args.format.as_deref())?;
    if writable && args.source.force_share {
        return Err(Failure::usage(format!(
            "Could not open '{}': force-share=on can only be used with read-only images",
            args.filename
        )));
    }
    let options = OpenOptions {
        writable,
        resizable: writable,
        format: source.format,
        force_share: args.source.force_share,
        // Only the tables are needed.
        backing: BackingMode::Ignore,
        metadata_only: true,
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        ..OpenOptions::default()
    };
    let layer = app.open(&source.spec, &options)?;
    app.confine(&[]);
    match action {
        Action::List => return list(&layer, app),
        Action::Create(name) => create(&layer, name),
        Action::Apply(name) => apply(&layer, name, &Wanted::parse(name, app)?.selector),
        Action::Delete(name) => delete(&layer, name, &Wanted::by_name(name, app)?),
    }?;
    layer.image.close()?;
    Ok(Exit::OK)
}

impl Args {
    fn action(&self, app: &App) -> Outcome<Action<'_>> {
        let named = [&self.create, &self.apply, &self.delete].map(Vec::len).iter().sum::<usize>();
        if named + usize::from(self.list) > 1 {
            return Err(app.usage("snapshot", "Cannot mix '-l', '-a', '-c', '-d'"));
        }
        Ok(match (self.create.first(), self.apply.first(), self.delete.first()) {
            (Some(name), _, _) => Action::Create(name),
            (_, Some(name), _) => Action::Apply(name),
            (_, _, Some(name)) => Action::Delete(name),
            _ => Action::List,
        })
    }
}

/// Prints the table; nothing at all if there are no snapshots.
fn list(layer: &Layer, app: &App) -> Outcome {
    let snapshots = layer.image.info()?.snapshots;
    if !snapshots.is_empty() {
        app.print(&format!("Snapshot list:\n{}", snapshot_table(&snapshots, "", &local_time)))?;
    }
    Ok(Exit::OK)
}

/// The image, if its format has snapshots.
fn image<'a>(layer: &'a Layer, otherwise: &str) -> Result<&'a Arc<Qcow2>> {
    layer.qcow2.as_ref().ok_or_else(|| Error::unsupported(otherwise))
}

fn create(layer: &Layer, name: &str) -> Result<()> {
    image(layer, "Operation not supported")
        .and_then(|image| image.create_snapshot(name.as_bytes(), SystemTime::now()))
        .map(drop)
        .map_err(|error| error.context(format!("Could not create snapshot '{name}'")))
}

fn apply(layer: &Layer, name: &str, selector: &Selector) -> Result<()> {
    const LOADING: &str = "Failed to load snapshot";
    let applied = image(layer, "Block driver does not support snapshots").and_then(|image| {
        image.apply_snapshot(selector).map_err(|error| match (error.kind(), error.message()) {
            (ErrorKind::NotFound, _) => {
                Error::new(ErrorKind::NotFound, "No such file or directory").context(LOADING)
            }
            // Refused before anything is loaded.
            (_, message) if message.starts_with("Device has") => error,
            _ => error.context(LOADING),
        })
    });
    applied.map_err(|error| error.context(format!("Could not apply snapshot '{name}'")))
}

fn delete(layer: &Layer, name: &str, selector: &Selector) -> Result<()> {
    image(layer, "snapshot not found")
        .and_then(|image| match selector.find(&image.snapshots()) {
            None => Err(Error::new(ErrorKind::NotFound, "snapshot not found")),
            Some(_) => image.delete_snapshot(selector).map(drop),
        })
        .map_err(|error| match error.kind() {
            ErrorKind::NoSpace => error.hint(
                "Until it is done, deleting takes space for new tables: about 1/8000 of the data with 64 KiB clusters",
            ),
            _ => error,
        })
        .map_err(|error| error.context(format!("Could not delete snapshot '{name}'")))
}

//! The disks of a guest and the tree of files on them, for the commands that look into guests.

use std::path::PathBuf;
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind};
use guestdisk::Disks;
use image::OpenOptions;
use v2v::inspect::trees;
use v2v::names::DiskNames;
use v2v::view::GuestView;

use crate::app::App;
use crate::cli::SourceArgs;
use crate::exit::{Failure, Outcome};

/// How the files of a guest are named.
#[derive(Debug, clap::Args)]
pub(crate) struct GuestArgs {
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Another disk of the guest, behind the image (repeatable)
    #[arg(long, value_name = "FILENAME")]
    disk: Vec<String>,
    /// Look at this volume alone, not at the tree of the guest's system: a number as `vimg inspect` shows it, 'disk 1
    /// partition 2', /dev/GROUP/NAME, /dev/sda1, UUID=..., LABEL=...
    #[arg(long, value_name = "VOLUME")]
    volume: Option<String>,
    #[command(flatten)]
    source: SourceArgs,
}

/// Opens the disks of one guest, for reading only and without a trace. `formats`: one for all disks, or one for each.
pub(crate) fn open(
    names: &[String],
    formats: &[String],
    source: &SourceArgs,
    app: &App,
) -> Outcome<Vec<Arc<dyn BlockDevice>>> {
    if formats.len() > 1 && formats.len() != names.len() {
        return Err(Failure::usage(format!("{} formats for {} images", formats.len(), names.len())));
    }
    let open = |(index, name): (usize, &String)| {
        let format = if formats.len() > 1 { formats.get(index) } else { formats.first() };
        let found = source.source(name, format.map(String::as_str))?;
        let options = OpenOptions {
            format: found.format,
            force_share: source.force_share,
            policy: app.policy(),
            secrets: source.objects.secrets()?,
            keep_access_time: true,
            ..OpenOptions::default()
        };
        Ok(app.open(&found.spec, &options)?.device())
    };
    names.iter().enumerate().map(open).collect()
}

impl GuestArgs {
    /// Opens the image and the further disks.
    pub(crate) fn open(&self, filename: &str, app: &App) -> Outcome<Vec<Arc<dyn BlockDevice>>> {
        let mut devices = open(&[filename.to_owned()], self.format.as_slice(), &self.source, app)?;
        devices.extend(open(&self.disk, &[], &self.source, app)?);
        Ok(devices)
    }

    /// The trees that paths lie in.
    pub(crate) fn trees(&self, devices: Vec<Arc<dyn BlockDevice>>) -> Outcome<Trees> {
        let disks = Disks::open_all(devices)?;
        let main = match &self.volume {
            Some(name) => Some(volume_view(&disks, volume_of(&disks, name)?)),
            None => system_view(&disks),
        };
        Ok(Trees { disks, main })
    }
}

fn system_view(disks: &Disks) -> Option<GuestView> {
    let names = DiskNames::default();
    let system = trees(disks, &names).into_iter().next()?;
    Some(GuestView::with_names(disks, &system, &names).without_limit())
}

fn volume_view(disks: &Disks, volume: usize) -> GuestView {
    GuestView::of_volume(disks, volume).without_limit()
}

/// The volume that a person means.
fn volume_of(disks: &Disks, name: &str) -> block::Result<usize> {
    let by_number = || name.parse::<usize>().ok().filter(|index| *index < disks.volumes().len());
    let by_place = || disks.volumes().iter().position(|volume| volume.location.to_string() == name);
    let found = by_number().or_else(by_place).or_else(|| DiskNames::default().find(disks, name));
    found.ok_or_else(|| {
        let error = Error::new(ErrorKind::NotFound, format!("no volume of this guest is '{name}'"));
        error.hint(list_of_volumes(disks))
    })
}

fn list_of_volumes(disks: &Disks) -> String {
    let volume = |(index, volume): (usize, &guestdisk::Volume)| {
        let content = volume.content.as_ref().map_or("unknown", |content| content.kind.name());
        format!("{index} '{}' ({content})", volume.location)
    };
    let volumes: Vec<_> = disks.volumes().iter().enumerate().map(volume).collect();
    if volumes.is_empty() { "There are none.".into() } else { format!("There are: {}.", volumes.join(", ")) }
}

/// The files of a guest: the tree of its system, or that of a volume.
pub(crate) struct Trees {
    disks: Disks,
    main: Option<GuestView>,
}

impl Trees {
    /// The tree and the path in it that `VOLUME:PATH` or `PATH` means. Volumes are looked at when they are asked for.
    pub(crate) fn find(&self, name: &str) -> block::Result<(View<'_>, PathBuf)> {
        let prefix = name.match_indices(":/").find_map(|(at, _)| {
            let volume = volume_of(&self.disks, &name[..at]).ok()?;
            Some((volume, PathBuf::from(&name[at + 1..])))
        });
        if let Some((volume, path)) = prefix {
            return Ok((View::Own(Box::new(volume_view(&self.disks, volume))), path));
        }
        match &self.main {
            Some(view) => Ok((View::Main(view), PathBuf::from(name))),
            None => {
                let error = Error::new(ErrorKind::NotFound, "no operating system was found on these disks");
                Err(error.hint(format!("Name a volume with --volume. {}", list_of_volumes(&self.disks))))
            }
        }
    }
}

/// The tree of the system, or one of a volume that was asked for.
pub(crate) enum View<'a> {
    /// The one that paths without a volume lie in.
    Main(&'a GuestView),
    /// Another one.
    Own(Box<GuestView>),
}

impl std::ops::Deref for View<'_> {
    type Target = GuestView;

    fn deref(&self) -> &GuestView {
        match self {
            Self::Main(view) => view,
            Self::Own(view) => view,
        }
    }
}

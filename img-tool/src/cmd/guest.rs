//! The disks of a guest and the tree of files on them, for the commands that look into guests.

use std::path::PathBuf;
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind};
use guestdisk::{Disks, Keys};
use image::OpenOptions;
use v2v::inspect::trees;
use v2v::names::DiskNames;
use v2v::source::{self, Kind, SourceOptions};
use v2v::view::GuestView;

use crate::app::App;
use crate::cli::SourceArgs;
use crate::exit::{Failure, Outcome};
use crate::keys::{KeyArgs, explain};

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
    #[command(flatten)]
    keys: KeyArgs,
}

/// The disks of a guest, open for reading.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    /// In the guest's order.
    pub(crate) devices: Vec<Arc<dyn BlockDevice>>,
    /// What the guest calls them, where a description says it.
    pub(crate) names: DiskNames,
    /// What opens encrypted volumes.
    pub(crate) keys: Keys,
}

/// Opens the disks of one guest, for reading only and without a trace. A single name may be that of a machine's
/// description (VMX, OVF, OVA, ...). `formats`: one for all disks, or one for each.
pub(crate) fn open(names: &[String], formats: &[String], source: &SourceArgs, app: &App) -> Outcome<Opened> {
    if formats.len() > 1 && formats.len() != names.len() {
        return Err(Failure::usage(format!("{} formats for {} images", formats.len(), names.len())));
    }
    if let ([name], []) = (names, formats)
        && !source.image_opts
        && let Some(opened) = described(name, source, app)?
    {
        return Ok(opened);
    }
    let open = |(index, name): (usize, &String)| -> Outcome<Arc<dyn BlockDevice>> {
        let format = if formats.len() > 1 { formats.get(index) } else { formats.first() };
        if format.is_none() && !source.image_opts {
            refuse_description(name, "give it alone, as the only image: its disks are found through it")?;
        }
        let found = source.source(name, format.map(String::as_str))?;
        let options = OpenOptions { format: found.format, ..options(source, app)? };
        Ok(app.open(&found.spec, &options)?.device())
    };
    let devices = names.iter().enumerate().map(open).collect::<Outcome<_>>()?;
    Ok(Opened { devices, ..Opened::default() })
}

fn options(source: &SourceArgs, app: &App) -> Outcome<OpenOptions> {
    Ok(OpenOptions {
        force_share: source.force_share,
        policy: app.policy(),
        secrets: source.objects.secrets()?,
        keep_access_time: true,
        ..OpenOptions::default()
    })
}

/// The disks of a machine that a description names. `None`: it is no description.
fn described(name: &str, source: &SourceArgs, app: &App) -> Outcome<Option<Opened>> {
    // What cannot be told here is told when it is opened as an image.
    match source::detect(name) {
        Ok(Kind::Disk) | Err(_) => return Ok(None),
        Ok(_) => {}
    }
    let machine = source::read(name, &SourceOptions { policy: app.policy(), ..SourceOptions::default() })?;
    for note in &machine.notes {
        app.tell(note);
    }
    let mut opened = Opened::default();
    for disk in source::open_disks(&machine, &options(source, app)?)? {
        app.announce(&disk.layer, false);
        opened.devices.push(disk.device);
    }
    opened.names = DiskNames::of(&machine);
    Ok(Some(opened))
}

/// Refuses the text of a machine's description where a disk is wanted: taken for a raw one, it would be an empty disk.
/// `way_out`: what does it.
pub(crate) fn refuse_description(name: &str, way_out: &str) -> block::Result<()> {
    // What cannot be told here is told when it is opened as an image. A package can be opened as one.
    let kind = match source::detect(name) {
        Ok(Kind::Disk | Kind::Ova) | Err(_) => return Ok(()),
        Ok(kind) => kind,
    };
    let error = Error::usage(format!("'{name}' is a machine's description ({}), not a disk", kind.name()));
    Err(error.hint(way_out.to_owned()))
}

impl Opened {
    /// Looks at what is on the disks.
    pub(crate) fn look(&mut self) -> Outcome<Disks> {
        Ok(Disks::open_with(std::mem::take(&mut self.devices), &self.keys).map_err(explain)?)
    }
}

impl GuestArgs {
    /// Opens the image and the further disks.
    pub(crate) fn open(&self, filename: &str, app: &App) -> Outcome<Opened> {
        let mut opened = open(&[filename.to_owned()], self.format.as_slice(), &self.source, app)
            .map_err(|failure| self.keys.unopened_failure(failure))?;
        opened.keys = self.keys.read(&self.source.objects.secrets()?, app)?;
        for further in &self.disk {
            if !self.source.image_opts {
                refuse_description(further, "give it as the image: its disks are found through it")?;
            }
            opened.devices.extend(open(std::slice::from_ref(further), &[], &self.source, app)?.devices);
        }
        Ok(opened)
    }

    /// The trees that paths lie in.
    pub(crate) fn trees(&self, mut opened: Opened) -> Outcome<Trees> {
        let (disks, names) = (opened.look()?, opened.names);
        let main = match &self.volume {
            Some(name) => Some(volume_view(&disks, volume_of(&disks, &names, name)?)),
            None => system_view(&disks, &names),
        };
        Ok(Trees { disks, names, main })
    }
}

fn system_view(disks: &Disks, names: &DiskNames) -> Option<GuestView> {
    let system = trees(disks, names).into_iter().next()?;
    Some(GuestView::with_names(disks, &system, names).without_limit())
}

fn volume_view(disks: &Disks, volume: usize) -> GuestView {
    GuestView::of_volume(disks, volume).without_limit()
}

/// The volume that a person means.
fn volume_of(disks: &Disks, names: &DiskNames, name: &str) -> block::Result<usize> {
    let by_number = || name.parse::<usize>().ok().filter(|index| *index < disks.volumes().len());
    let by_place = || disks.volumes().iter().position(|volume| volume.location.to_string() == name);
    let found = by_number().or_else(by_place).or_else(|| names.find(disks, name));
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
    names: DiskNames,
    main: Option<GuestView>,
}

impl Trees {
    /// The tree and the path in it that `VOLUME:PATH` or `PATH` means. Volumes are looked at when they are asked for.
    pub(crate) fn find(&self, name: &str) -> block::Result<(View<'_>, PathBuf)> {
        let prefix = name.match_indices(":/").find_map(|(at, _)| {
            let volume = volume_of(&self.disks, &self.names, &name[..at]).ok()?;
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

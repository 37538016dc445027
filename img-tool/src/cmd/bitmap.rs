//! `bitmap`: the persistent dirty bitmaps of an image.

use std::sync::Arc;

use block::{DirtyBitmap, Error, Result};
use clap::{Arg, ArgAction, ArgMatches};
use image::open::BackingMode;
use image::{Layer, OpenOptions};

use crate::app::App;
use crate::cli::{ObjectArgs, source};
use crate::exit::{Exit, Failure, Outcome};

/// Add, remove and change the dirty bitmaps of an image
///
/// A bitmap that is enabled records which parts of the disk are written: what an incremental backup has to copy.
/// Several actions are carried out in the order in which they are given.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg bitmap --add disk.qcow2 backup0
  vimg bitmap --add -g 1M --disable disk.qcow2 coarse
  vimg bitmap --merge monday --merge tuesday disk.qcow2 week
  vimg bitmap --add --merge backup0 -b old.qcow2 -F qcow2 new.qcow2 backup0")]
pub(crate) struct Args {
    #[command(flatten)]
    actions: Actions,
    /// Bytes of disk that a bit of an added bitmap stands for: 512 to 2G (default: the cluster size, 4k to 64k)
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    granularity: Option<String>,
    /// The image that has the bitmaps of --merge (default: FILENAME)
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<String>,
    /// Format of the image of -b
    #[arg(short = 'F', long, value_name = "FMT")]
    source_format: Option<String>,
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a complete image specification (key=value,...), not a file name
    #[arg(long)]
    image_opts: bool,
    #[command(flatten)]
    objects: ObjectArgs,
    /// The image and the name of the bitmap
    #[arg(value_names = ["FILENAME", "BITMAP"], num_args = 0..)]
    names: Vec<String>,
}

/// Something to be done to the bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    /// With the bits of the bitmap of this name.
    Merge(String),
}

impl Action {
    /// As it is called in messages.
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// What is to be done, in the order of the command line (which derived arguments do not tell).
#[derive(Debug, Clone, Default)]
struct Actions(Vec<Action>);

/// The options that are actions without an argument: name, help, action.
const PLAIN: [(&str, &str, Action); 5] = [
    ("add", "Create the bitmap; it records unless --disable follows", Action::Add),
    ("remove", "Remove the bitmap", Action::Remove),
    ("clear", "Forget what the bitmap has recorded", Action::Clear),
    ("enable", "Let the bitmap record writes", Action::Enable),
    ("disable", "Stop the bitmap from recording writes", Action::Disable),
];

impl clap::Args for Actions {
    fn augment_args(command: clap::Command) -> clap::Command {
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("SOURCE")
            .action(ArgAction::Append)
            .help("Add what the bitmap SOURCE has recorded");
        let plain = PLAIN.map(|(name, help, _)| {
            let arg = Arg::new(name).long(name).help(help).action(ArgAction::Append);
            arg.num_args(0).default_missing_value("yes")
        });
        command.args(plain).arg(merge)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let mut found: Vec<(usize, Action)> = vec![];
        for (name, _, action) in PLAIN {
            found.extend(matches.indices_of(name).into_iter().flatten().map(|index| (index, action.clone())));
        }
        let sources = matches.get_many::<String>("merge").into_iter().flatten();
        let indices = matches.indices_of("merge").into_iter().flatten();
        found.extend(indices.zip(sources).map(|(index, source)| (index, Action::Merge(source.clone()))));
        found.sort_by_key(|(index, _)| *index);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let granularity = args.granularity.as_deref().map(granularity).transpose()?;
    let (filename, name) = check_usage(args)?;
    let named = source(filename, args.format.as_deref(), args.image_opts)?;
    let options = OpenOptions {
        writable: true,
        format: named.format,
        backing: BackingMode::Ignore,
        policy: app.policy(),
        secrets: args.objects.secrets()?,
        ..OpenOptions::default()
    };
    let layer = app.open(&named.spec, &options)?;
    let other = args.source_file.as_deref().map(|file| open_source(file, args, app)).transpose()?;
    app.confine(&[]);
    let mut done = Ok(());
    for action in &args.actions.0 {
        done = act(action, &layer, other.as_deref(), name, granularity)
            .map_err(|error| error.context(format!("Operation {} on bitmap {name} failed", action.name())));
        if done.is_err() {
            break;
        }
    }
    // What came before a failure counts, as with qemu-img.
    let closed = layer.image.close();
    done?;
    closed?;
    Ok(Exit::OK)
}

/// `0` is as good as nothing, in qemu-img, too.
fn granularity(text: &str) -> Outcome<u64> {
    Ok(block::size::parse_named("granularity", text, 0..=block::size::MAX)?)
}

/// The image and the name of the bitmap.
fn check_usage(args: &Args) -> Outcome<(&str, &str)> {
    let actions = &args.actions.0;
    let fault = if actions.is_empty() {
        "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
    } else if args.granularity.is_some() && !actions.contains(&Action::Add) {
        "granularity only supported with --add"
    } else if args.source_format.is_some() && args.source_file.is_none() {
        "-F only supported with -b"
    } else if args.source_file.is_some() && !actions.iter().any(|a| matches!(a, Action::Merge(_))) {
        "Merge bitmap source file only supported with --merge"
    } else if let [filename, name] = args.names.as_slice() {
        return Ok((filename, name));
    } else {
        "Expecting filename and bitmap name"
    };
    Err(Failure::usage(fault))
}

fn open_source(file: &str, args: &Args, app: &App) -> Outcome<Arc<Layer>> {
    let named = source(file, args.source_format.as_deref(), false)?;
    let options = OpenOptions {
        format: named.format,
        backing: BackingMode::Ignore,
        policy: app.policy(),
        secrets: args.objects.secrets()?,
        ..OpenOptions::default()
    };
    Ok(app.open(&named.spec, &options)?)
}

fn act(
    action: &Action,
    layer: &Layer,
    other: Option<&Layer>,
    name: &str,
    granularity: Option<u64>,
) -> Result<()> {
    let Some(image) = &layer.qcow2 else { return Err(without_bitmaps(action, layer, name, granularity)) };
    let bytes = name.as_bytes();
    match action {
        Action::Add => image.add_bitmap(bytes, granularity.filter(|bytes| *bytes > 0), true),
        Action::Remove => image.remove_bitmap(bytes),
        Action::Clear => image.clear_bitmap(bytes),
        Action::Enable => image.enable_bitmap(bytes, true),
        Action::Disable => image.enable_bitmap(bytes, false),
        Action::Merge(from) => {
            image.check_bitmap(bytes)?;
            image.merge_bitmap(bytes, &*bits_of(other.unwrap_or(layer), from)?)
        }
    }
}

fn bits_of(layer: &Layer, name: &str) -> Result<Arc<DirtyBitmap>> {
    match &layer.qcow2 {
        Some(image) => image.dirty_bitmap(name.as_bytes()),
        None => Err(not_found(name)),
    }
}

fn not_found(name: &str) -> Error {
    Error::usage(format!("Dirty bitmap '{name}' not found"))
}

/// Why nothing can be done to the bitmaps of an image whose format has none.
fn without_bitmaps(action: &Action, layer: &Layer, name: &str, granularity: Option<u64>) -> Error {
    if *action != Action::Add {
        return not_found(name);
    }
    if let Err(error) = qcow2::bitmap::check_new(name.as_bytes(), granularity.filter(|bytes| *bytes > 0)) {
        return error;
    }
    let filename = &layer.filename;
    Error::unsupported(format!("Can't store persistent bitmaps to {filename}: Operation not supported"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn actions_keep_their_order() {
        let line = "bitmap --merge a --add --merge=b -g 64k --disable f n --add";
        let line = Line::try_parse_from(line.split(' ')).unwrap();
        let merge = |name: &str| Action::Merge(name.to_owned());
        let expected = [merge("a"), Action::Add, merge("b"), Action::Disable, Action::Add];
        assert_eq!(line.args.actions.0, expected);
        assert_eq!(check_usage(&line.args).unwrap(), ("f", "n"));
    }
}

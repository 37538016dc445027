//! `amend`: options of an image that can be changed after it has been made.

use block::file::CacheMode;
use image::{OpenOptions, options};

use crate::app::App;
use crate::cli::{FOREIGN_FORMATS, ObjectArgs, source, target_format};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::{ProgressArgs, Reporter};

/// Change format-specific options of an image
///
/// The contents of the disk stay what they are, but for 'size': a smaller size throws away what lies behind it
/// without being asked twice.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg amend -f qcow2 -o help
  vimg amend -o compat=1.1,lazy_refcounts=on disk.qcow2
  vimg amend -p -o refcount_bits=64 disk.qcow2
  vimg amend -o compat=0.10 disk.qcow2
  vimg amend --object secret,id=old,file=old.txt --object secret,id=new,file=new.txt \\
    --image-opts driver=luks,key-secret=old,file.filename=disk.luks -o state=active,new-secret=new")]
pub(crate) struct Args {
    /// Options to change, separated by commas; 'help' lists them
    #[arg(short, long = "options", value_name = "OPTIONS")]
    pub(crate) options: Vec<String>,
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// FILENAME is a complete image specification (key=value,...), not a file name
    #[arg(long)]
    pub(crate) image_opts: bool,
    /// Use of the host's cache: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 't', long, value_name = "CACHE")]
    pub(crate) cache: Option<String>,
    /// Allow what cannot be undone, such as erasing the last key slot
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) objects: ObjectArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) filenames: Vec<String>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    if args.options.is_empty() {
        return Err(app.usage("amend", "Must specify options (-o)"));
    }
    let lists = options::parse(&args.options);
    let help = options::asks_for_help(&args.options);
    if let (true, Some(format)) = (help, &args.format) {
        return show_help(format, app);
    }
    let lists = if help { vec![] } else { lists? };
    let [filename] = args.filenames.as_slice() else {
        return Err(Failure::usage("Expecting one image file name"));
    };
    args.objects.secrets()?;
    let cache = match args.cache.as_deref() {
        None => CacheMode::default(),
        Some(name) => {
            CacheMode::parse(name).ok_or_else(|| Failure::usage(format!("Invalid cache option: {name}")))?
        }
    };
    let reporter = Reporter::new(&args.progress, args.quiet, app)?.confining_to(vec![]);
    let result = amend(args, app, filename, lists, cache, &reporter);
    reporter.finish();
    result
}

fn show_help(format: &str, app: &App) -> Outcome {
    if FOREIGN_FORMATS.contains(&format) {
        return Err(image::amend::cannot_amend(format).into());
    }
    app.print(&image::amend::help(target_format(format)?)?).map(|()| Exit::OK)
}

fn amend(
    args: &Args,
    app: &App,
    filename: &str,
    lists: Vec<(String, String)>,
    cache: CacheMode,
    reporter: &Reporter<'_>,
) -> Outcome {
    let source = source(filename, args.format.as_deref(), args.image_opts)?;
    let options = OpenOptions {
        writable: true,
        resizable: true,
        format: source.format,
        cache,
        policy: app.policy(),
        secrets: args.objects.secrets()?,
        ..OpenOptions::default()
    };
    let layer = app.open(&source.spec, &options)?;
    let format = layer.format;
    if options::asks_for_help(&args.options) {
        drop(layer);
        return app.print(&image::amend::help(format)?).map(|()| Exit::OK);
    }
    let options = image::amend::parse(format, &lists)?;
    reporter.start();
    let result = image::amend::amend(layer, &options, &args.objects.secrets()?, args.force, reporter);
    reporter.end();
    for warning in result.map_err(|error| reporter.failure(error))? {
        app.warn(&warning);
    }
    Ok(Exit::OK)
}

//! What `commit` and `rebase` have in common: the image that they change, and how they go about it.

use block::file::CacheMode;
use image::progress::Progress;
use image::{OpenOptions, Secrets};

use crate::app::App;
use crate::cli::{ObjectArgs, Source, source};
use crate::exit::{Failure, Outcome};
use crate::progress::{ProgressArgs, Reporter};

/// The options of both.
#[derive(Debug, clap::Args)]
pub(crate) struct ChainArgs {
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a complete image specification (key=value,...), not a file name
    #[arg(long)]
    image_opts: bool,
    /// Cache mode: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// How many threads work [default: one for each processor]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    objects: ObjectArgs,
    /// The image
    filename: String,
}

impl ChainArgs {
    /// The passphrases.
    pub(crate) fn secrets(&self) -> Outcome<Secrets> {
        self.objects.secrets()
    }

    /// How many threads are to work, if that was said.
    pub(crate) fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }

    /// The image as it was named.
    pub(crate) fn source(&self) -> Outcome<Source> {
        source(&self.filename, self.format.as_deref(), self.image_opts)
    }

    /// `options` for an image of this source.
    pub(crate) fn opening(&self, source: &Source, options: OpenOptions) -> Outcome<OpenOptions> {
        let cache = cache_mode(&self.cache, "Invalid cache option")?;
        Ok(OpenOptions { cache, format: source.format, ..options })
    }

    /// Does the work while its progress is shown.
    pub(crate) fn with_progress<T>(
        &self,
        app: &App,
        work: impl FnOnce(&dyn Progress) -> block::Result<T>,
    ) -> Outcome<T> {
        let reporter = Reporter::new(&self.progress, self.quiet, app)?.confining_to(vec![]);
        let result = work(&reporter);
        if result.is_ok() {
            reporter.finish();
        }
        result.map_err(|error| reporter.failure(error))
    }
}

/// A cache mode by name.
pub(crate) fn cache_mode(name: &str, complaint: &str) -> Outcome<CacheMode> {
    CacheMode::parse(name).ok_or_else(|| Failure::usage(format!("{complaint}: {name}")))
}

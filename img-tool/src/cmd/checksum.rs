//! `checksum`: digests of what guests see, to compare disks that are far apart.

use std::path::Path;
use std::sync::Arc;

use block::file::CacheMode;
use image::checksum::{Algorithm, ChecksumOptions, Digest, checksum};
use image::progress::Progress;
use image::{Layer, OpenOptions, json};
use serde_json::json;

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::{ProgressArgs, Reporter};

/// Print digests of the contents of disks, or check them
///
/// The same for every format and layout that holds the same bytes, whatever is sparse or compressed. The trees are
/// computed on all cores, and what is not stored costs nothing. Their definition is in docs/checksum.md.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Algorithms:
  tree-sha256  a tree over chunks of 4 MiB (default)
  tree-blake3  the same over BLAKE3, which is faster without SHA instructions
  sha256       what sha256sum prints for the raw file; one core hashes all of it

Exit codes:
  0  everything could be read, and with -c is as it was
  1  something could not be read, or is different

Examples:
  vimg checksum disk.qcow2
  vimg checksum *.qcow2 > DIGESTS
  vimg checksum -c DIGESTS
  vimg checksum --algorithm=sha256 disk.qcow2
  vimg checksum --output=json disk.qcow2")]
pub(crate) struct Args {
    /// Format of the images (default: found out from their contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// tree-sha256, tree-blake3 or sha256
    #[arg(short, long, value_name = "NAME")]
    algorithm: Option<String>,
    /// The files are lists of digests as this command prints them (or sha256sum): check the images named there
    #[arg(short, long)]
    check: bool,
    /// Cache mode of the images: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// How many threads read and hash [default: one for each processor]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    output: Option<String>,
    #[command(flatten)]
    progress: ProgressArgs,
    /// With -c, do not print what is as it was
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    source: SourceArgs,
    /// The images, or with -c the lists (- is standard input)
    #[arg(required = true, value_name = "FILENAME")]
    filenames: Vec<String>,
}

/// A list of digests is not longer than this.
const MAX_LIST: u64 = 64 << 20;

/// An image whose digest is wanted.
struct Wanted {
    name: String,
    /// What it is to be, with `-c`.
    expected: Option<Digest>,
    layer: Outcome<Arc<Layer>>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "checksum", app)?;
    let algorithm = args.algorithm()?;
    let Some(cache) = CacheMode::parse(&args.cache) else {
        return Err(Failure::usage(format!("Invalid source cache option: {}", args.cache)));
    };
    let names = if args.check {
        args.listed(app)?
    } else {
        args.filenames.iter().map(|name| (name.clone(), None)).collect()
    };
    let open = |(name, expected): (String, Option<Digest>)| {
        let layer = args.open(&name, cache, app);
        Wanted { name, expected, layer }
    };
    let wanted: Vec<Wanted> = names.into_iter().map(open).collect();
    let reporter = Reporter::new(&args.progress, false, app)?;
    app.confine(&[]);
    let size = |image: &Wanted| image.layer.as_ref().map_or(0, |layer| layer.image.size());
    let total = wanted.iter().map(size).fold(0, u64::saturating_add);
    let mut share = Share { reporter: &reporter, before: 0, total };
    let (mut tally, mut documents) = (Tally::default(), vec![]);
    for image in wanted {
        let algorithm = image.expected.map_or(algorithm, |digest| digest.algorithm);
        let size = size(&image);
        let Wanted { name, expected, layer } = image;
        let found = layer.and_then(|layer| {
            let found = checksum(&layer, &args.options(algorithm), &share);
            found.map_err(|error| reporter.failure(error.context(name.clone())))
        });
        share.before = share.before.saturating_add(size);
        match (found, output) {
            (Ok(digest), OutputFormat::Json) => {
                tally.count(expected, &digest);
                documents.push(document(&name, size, expected, &digest));
            }
            (Ok(digest), OutputFormat::Human) => {
                tally.count(expected, &digest);
                app.print(&args.line(&name, expected, &digest))?;
            }
            (Err(Failure::Error { exit: Exit::ERROR, error }), _) => {
                tally.unreadable += 1;
                app.show(&error);
                documents.push(json!({ "filename": name, "error": error.to_string() }));
                if expected.is_some() && output == OutputFormat::Human {
                    app.print(&format!("{name}: FAILED open or read\n"))?;
                }
            }
            (Err(other), _) => return Err(other),
        }
    }
    reporter.finish();
    if output == OutputFormat::Json {
        app.print(&format!("{}\n", json::pretty(&documents.into())))?;
    }
    tally.tell(args.check, app);
    Ok(if tally.unreadable + tally.different == 0 { Exit::OK } else { Exit::ERROR })
}

/// The progress of one image of several.
struct Share<'a, 'b> {
    reporter: &'a Reporter<'b>,
    /// Bytes of the images before it.
    before: u64,
    /// Bytes of all images.
    total: u64,
}

impl Progress for Share<'_, '_> {
    fn update(&self, done: u64, _total: u64) {
        self.reporter.update(self.before.saturating_add(done).min(self.total), self.total);
    }

    fn cancelled(&self) -> bool {
        self.reporter.cancelled()
    }

    fn warn(&self, message: &str) {
        self.reporter.warn(message);
    }
}

/// How many went wrong.
#[derive(Debug, Default)]
struct Tally {
    unreadable: u64,
    different: u64,
}

impl Tally {
    fn count(&mut self, expected: Option<Digest>, found: &Digest) {
        if expected.is_some_and(|expected| expected != *found) {
            self.different += 1;
        }
    }

    /// The last words of a check, in the manner of sha256sum.
    fn tell(&self, check: bool, app: &App) {
        let plural =
            |count: u64, one: &str, many: &str| format!("{count} {}", if count == 1 { one } else { many });
        if check && self.unreadable > 0 {
            let files = plural(self.unreadable, "listed image", "listed images");
            app.complain(&format!("WARNING: {files} could not be read"));
        }
        if self.different > 0 {
            let digests = plural(self.different, "computed checksum", "computed checksums");
            app.complain(&format!("WARNING: {digests} did NOT match"));
        }
    }
}

impl Args {
    fn algorithm(&self) -> Outcome<Algorithm> {
        let Some(name) = &self.algorithm else { return Ok(Algorithm::default()) };
        let known: Vec<_> = Algorithm::ALL.iter().map(|algorithm| algorithm.name()).collect();
        Algorithm::from_name(name).ok_or_else(|| {
            Failure::usage(format!("Unknown algorithm '{name}'. There are: {}", known.join(", ")))
        })
    }

    fn open(&self, name: &str, cache: CacheMode, app: &App) -> Outcome<Arc<Layer>> {
        let source = self.source.source(name, self.format.as_deref())?;
        let options = OpenOptions {
            format: source.format,
            cache,
            force_share: self.source.force_share,
            policy: app.policy(),
            secrets: self.source.objects.secrets()?,
            ..OpenOptions::default()
        };
        Ok(app.open(&source.spec, &options)?)
    }

    fn options(&self, algorithm: Algorithm) -> ChecksumOptions {
        let threads = self.threads.map_or_else(|| ChecksumOptions::default().threads, usize::from);
        ChecksumOptions { algorithm, threads }
    }

    /// The line of a digest, or with `-c` the verdict on it.
    fn line(&self, name: &str, expected: Option<Digest>, found: &Digest) -> String {
        match expected {
            None => format_line(name, found),
            Some(expected) if expected != *found => format!("{name}: FAILED\n"),
            Some(_) if self.quiet => String::new(),
            Some(_) => format!("{name}: OK\n"),
        }
    }

    /// The images in the lists.
    fn listed(&self, app: &App) -> Outcome<Vec<(String, Option<Digest>)>> {
        let mut all = vec![];
        for list in &self.filenames {
            let text = read_list(list)?;
            let lines: Vec<_> =
                text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
            let good: Vec<_> = lines.iter().filter_map(|line| parse_line(line)).collect();
            if good.is_empty() {
                return Err(Failure::usage(format!("{list}: no properly formatted checksum lines found")));
            }
            let bad = lines.len() - good.len();
            if bad > 0 {
                let lines = if bad == 1 { "line is" } else { "lines are" };
                app.complain(&format!("WARNING: {bad} {lines} improperly formatted"));
            }
            all.extend(good.into_iter().map(|(digest, name)| (name, Some(digest))));
        }
        Ok(all)
    }
}

fn read_list(name: &str) -> Outcome<String> {
    use std::io::Read as _;
    let mut text = String::new();
    let read = match name {
        "-" => std::io::stdin().lock().take(MAX_LIST).read_to_string(&mut text),
        _ => std::fs::File::open(Path::new(name))
            .and_then(|file| file.take(MAX_LIST).read_to_string(&mut text)),
    };
    match read {
        Ok(_) => Ok(text),
        Err(error) => Err(block::Error::from(error).context(format!("Could not read '{name}'")).into()),
    }
}

/// `DIGEST  NAME`, as sha256sum: a name with line breaks is escaped, which a backslash in front says.
fn format_line(name: &str, digest: &Digest) -> String {
    let escaped = name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
    let mark = if escaped == name { "" } else { "\\" };
    format!("{mark}{digest}  {escaped}\n")
}

/// What [`format_line`] writes, without the line break.
fn parse_line(line: &str) -> Option<(Digest, String)> {
    let (escaped, line) = match line.strip_prefix('\\') {
        Some(line) => (true, line),
        None => (false, line),
    };
    let (digest, name) = line.split_once("  ").or_else(|| line.split_once(" *"))?;
    let name = if escaped { unescape(name)? } else { name.to_owned() };
    Some((Digest::parse(digest)?, name)).filter(|(_, name)| !name.is_empty())
}

fn unescape(text: &str) -> Option<String> {
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        plain.push(match c {
            '\\' => match chars.next()? {
                '\\' => '\\',
                'n' => '\n',
                'r' => '\r',
                _ => return None,
            },
            c => c,
        });
    }
    Some(plain)
}

/// For programs.
fn document(name: &str, size: u64, expected: Option<Digest>, found: &Digest) -> serde_json::Value {
    let mut document = json!({
        "filename": name, "virtual-size": size, "algorithm": found.algorithm.name(), "digest": found.hex(),
    });
    if let Some(expected) = expected {
        document["expected"] = json!(expected.hex());
        document["matches"] = json!(expected == *found);
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_are_written() {
        let digest = Digest { algorithm: Algorithm::TreeSha256, bytes: [7; 32] };
        for name in ["a", "with  two spaces", "line\nbreak", "back\\slash", " *x"] {
            let line = format_line(name, &digest);
            assert_eq!(
                parse_line(line.strip_suffix('\n').unwrap()),
                Some((digest, name.to_owned())),
                "{line:?}"
            );
        }
        let plain = Digest { algorithm: Algorithm::Sha256, bytes: [0; 32] };
        assert_eq!(
            parse_line(&format!("{} *disk.raw", "0".repeat(64))),
            Some((plain, "disk.raw".to_owned()))
        );
        for wrong in
            ["", "x", "0  a", &format!("{}  ", "0".repeat(64)), &format!("md5:{}  a", "0".repeat(64))]
        {
            assert_eq!(parse_line(wrong), None, "{wrong}");
        }
    }
}

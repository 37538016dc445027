//! `check`: are the structures of an image consistent, and can they be made so?

use block::ErrorKind;
use block::file::CacheMode;
use block::image::{CheckReport, Repair};
use image::check::{Subject, repair_summary, summary};
use image::{OpenOptions, json};

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs};
use crate::exit::{Exit, Failure, OrExit as _, Outcome};

/// Check the structures of an image, and repair them
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0   nothing is wrong
  1   the check could not be completed
  2   the image is corrupt
  3   the image has leaked clusters only
  63  the format has nothing to check

Examples:
  vimg check disk.qcow2
  vimg check -r leaks disk.qcow2
  vimg check -r all disk.qcow2
  vimg check --output=json disk.qcow2")]
pub(crate) struct Args {
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Repair 'leaks' (no harm can be done) or 'all'
    #[arg(short, long, value_name = "leaks|all")]
    pub(crate) repair: Option<String>,
    /// Use of the host's cache: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    pub(crate) cache: Option<String>,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    pub(crate) output: Option<String>,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// The image
    pub(crate) filename: String,
}

const NOTHING_TO_CHECK: u8 = 63;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "check", app)?;
    let repair = repair(args, app)?;
    let cache = match args.cache.as_deref() {
        None => CacheMode::default(),
        Some(name) => CacheMode::parse(name)
            .ok_or_else(|| Failure::usage(format!("Invalid source cache option: {name}")))?,
    };
    let source = args.source.source(&args.filename, args.format.as_deref())?;
    if repair != Repair::None && args.source.force_share {
        return Err(Failure::usage(format!(
            "Could not open '{}': force-share=on can only be used with read-only images",
            args.filename
        )));
    }
    let options = OpenOptions {
        writable: repair != Repair::None,
        resizable: repair != Repair::None,
        format: source.format,
        cache,
        force_share: args.source.force_share,
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        ..OpenOptions::default()
    };
    app.warn_about(&source.spec);
    let subject = Subject::open(&source.spec, &options)?;
    subject.warnings().iter().for_each(|warning| app.warn(warning));
    if options.writable
        && let Some(warning) = subject.probed_raw_warning()
    {
        app.say(&format!("{warning}\n"));
    }
    app.confine(&[]);
    check(args, app, output, &subject, repair)
}

fn repair(args: &Args, app: &App) -> Outcome<Repair> {
    match args.repair.as_deref() {
        None => Ok(Repair::None),
        Some("leaks") => Ok(Repair::Leaks),
        Some("all") => Ok(Repair::All),
        Some(other) => {
            Err(app.usage("check", &format!("--repair (-r) expects 'leaks' or 'all' not '{other}'")))
        }
    }
}

fn check(args: &Args, app: &App, output: OutputFormat, subject: &Subject, repair: Repair) -> Outcome {
    let mut report = examine(app, subject, repair)?;
    if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        if !args.quiet && output == OutputFormat::Human {
            app.note(&repair_summary(&report));
        }
        let fixed = (report.leaks_fixed, report.corruptions_fixed);
        report = examine(app, subject, Repair::None)?;
        (report.leaks_fixed, report.corruptions_fixed) = fixed;
    }
    if !args.quiet {
        let said = match output {
            OutputFormat::Human => app.print(&summary(&report)),
            OutputFormat::Json => app.print(&format!("{}\n", json::pretty(&subject.to_json(&report)))),
        };
        match said {
            // Whoever does not read on may still look at the exit code.
            Ok(()) | Err(Failure::BrokenPipe) => {}
            Err(failure) => return Err(failure),
        }
    }
    Ok(verdict(&report))
}

fn examine(app: &App, subject: &Subject, repair: Repair) -> Outcome<CheckReport> {
    let result = subject.check(repair).map_err(|error| match error.kind() {
        ErrorKind::Unsupported => error,
        _ => error.context("Check failed"),
    });
    let exit = match &result {
        Err(error)
            if error.kind() == ErrorKind::Unsupported && error.message().ends_with("support checks") =>
        {
            NOTHING_TO_CHECK
        }
        _ => 1,
    };
    let report = result.or_exit(exit)?;
    for message in &report.messages {
        app.say(&format!("{message}\n"));
    }
    if report.messages_dropped > 0 {
        app.say(&format!("({} more messages)\n", report.messages_dropped));
    }
    Ok(report)
}

/// The exit code says the worst that is left.
fn verdict(report: &CheckReport) -> Exit {
    match report {
        CheckReport { check_errors: 1.., .. } => Exit::ERROR,
        CheckReport { corruptions: 1.., .. } => Exit(2),
        CheckReport { leaks: 1.., .. } => Exit(3),
        _ => Exit::OK,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_decides() {
        let report = |corruptions, leaks, check_errors| {
            verdict(&CheckReport { corruptions, leaks, check_errors, ..CheckReport::default() })
        };
        assert_eq!(report(0, 0, 0), Exit(0));
        assert_eq!(report(0, 1, 0), Exit(3));
        assert_eq!(report(1, 1, 0), Exit(2));
        assert_eq!(report(1, 1, 1), Exit(1));
    }
}

//! Drawing the progress of long operations, and listening to signals meanwhile.
//!
//! Three forms: qemu-img's (`    (12.34/100%)` and a carriage return, which scripts parse), a bar with rate and
//! time left for people at a terminal, and one JSON object a line for programs. Whatever the form, SIGUSR1 gets
//! one line in qemu-img's form on standard error, and SIGINT, SIGTERM and SIGHUP end the operation in an orderly
//! way.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use image::progress::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};

use crate::app::App;
use crate::exit::{Exit, Failure, Outcome};

/// qemu-img prints a new figure when it has grown by this much (hundredths of a percent).
const STEP: u64 = 100;
/// JSON objects come this often.
const JSON_INTERVAL: Duration = Duration::from_millis(200);

/// What `-p` and `--progress` ask for.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ProgressArgs {
    /// Show the progress of the operation
    #[arg(short = 'p')]
    pub(crate) show: bool,
    /// Show it in this form: auto (a bar on a terminal, else as qemu-img does) or json (an object a line)
    #[arg(long, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    pub(crate) progress: Option<String>,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Silent,
    Qemu,
    Bar,
    Json,
}

impl ProgressArgs {
    fn form(&self, quiet: bool, app: &App) -> Outcome<Form> {
        let wanted = match self.progress.as_deref() {
            None if !self.show => return Ok(Form::Silent),
            None | Some("auto") if self.at_terminal(app) => Form::Bar,
            None | Some("auto") => Form::Qemu,
            Some("json") => Form::Json,
            Some(other) => {
                return Err(Failure::usage(format!("--progress expects 'auto' or 'json' not '{other}'")));
            }
        };
        Ok(if quiet { Form::Silent } else { wanted })
    }

    fn at_terminal(&self, app: &App) -> bool {
        !app.as_qemu_img() && std::io::stdout().is_terminal() && std::io::stderr().is_terminal()
    }
}

/// What has been shown last.
#[derive(Debug, Default)]
struct Shown {
    /// Hundredths of a percent, plus 1; for JSON, milliseconds plus 1. 0: nothing yet.
    figure: u64,
    /// The most bytes that were said to be done.
    done: u64,
    /// The end has been shown.
    ended: bool,
}

/// Listens to an operation of the library and shows what it says.
pub(crate) struct Reporter<'a> {
    app: &'a App,
    form: Form,
    bar: Option<ProgressBar>,
    started: Instant,
    /// Locked while a figure is written, so that figures from several threads come out in order.
    shown: Mutex<Shown>,
    signal: Arc<AtomicUsize>,
    asked: Arc<AtomicBool>,
    /// Where files may still be made, renamed and removed once the operation has started.
    directories: Option<Vec<PathBuf>>,
    /// Standard output is taken: everything is shown on standard error.
    spares_stdout: bool,
}

/// Which signals whoever started us wants to be ignored (nohup, a shell's background job). They stay ignored.
fn ignored_signals() -> impl Fn(i32) -> bool {
    let mask = std::fs::read_to_string("/proc/self/status").ok().and_then(|status| {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    move |number| mask.is_some_and(|mask| (1..=64).contains(&number) && mask >> (number - 1) & 1 == 1)
}

impl<'a> Reporter<'a> {
    /// Starts listening to signals. To be called once, before the operation.
    pub(crate) fn new(args: &ProgressArgs, quiet: bool, app: &'a App) -> Outcome<Self> {
        let form = args.form(quiet, app)?;
        let (signal, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let ignored = ignored_signals();
        for number in [SIGINT, SIGTERM, SIGHUP, SIGQUIT].into_iter().filter(|number| !ignored(*number)) {
            let value = usize::try_from(number).unwrap_or_default();
            signal_hook::flag::register_usize(number, Arc::clone(&signal), value)
                .map_err(block::Error::from)?;
        }
        signal_hook::flag::register(SIGUSR1, Arc::clone(&asked)).map_err(block::Error::from)?;
        let bar = (form == Form::Bar).then(bar);
        Ok(Self {
            app,
            form,
            bar,
            started: Instant::now(),
            shown: Mutex::default(),
            signal,
            asked,
            directories: None,
            spares_stdout: false,
        })
    }

    /// The signal that has come, or 0, for those who cannot hold on to this.
    pub(crate) fn signal(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.signal)
    }

    /// Confines the program to these directories once the operation has opened all it needs.
    pub(crate) fn confining_to(self, directories: Vec<PathBuf>) -> Self {
        Self { directories: Some(directories), ..self }
    }

    /// Leaves standard output to what the operation itself writes there, if `spare`.
    pub(crate) fn sparing_stdout(self, spare: bool) -> Self {
        Self { spares_stdout: spare, ..self }
    }

    /// Shows a piece of text.
    fn put(&self, text: &str) {
        if self.spares_stdout { self.app.say(text) } else { self.app.note(text) }
    }

    /// Says that nothing is done yet, for operations of which not all have anything to tell.
    pub(crate) fn start(&self) {
        self.update(0, 1);
    }

    /// Says that everything is done.
    pub(crate) fn end(&self) {
        self.update(u64::MAX, u64::MAX);
    }

    /// The operation is over: leaves the line. Whatever was to be said about its result has been said.
    pub(crate) fn finish(&self) {
        match self.form {
            Form::Qemu => self.put("\n"),
            Form::Bar => self.bar.iter().for_each(ProgressBar::abandon),
            Form::Silent | Form::Json => {}
        }
    }

    /// How the program ends after `error`: as the signal demands if there was one.
    pub(crate) fn failure(&self, error: block::Error) -> Failure {
        let signal = self.signal.load(Ordering::Relaxed);
        let exit = match u8::try_from(signal) {
            Ok(signal @ 1..) if error.kind() == block::ErrorKind::Cancelled => Exit(128 + signal),
            _ => Exit::ERROR,
        };
        Failure::Error { exit, error }
    }

    /// Calls `show` with `done` unless that is the past already, or too soon after what was shown last: `figure`
    /// has to grow by `step`, except at the end.
    fn in_order(&self, done: u64, total: u64, figure: u64, step: u64, show: impl FnOnce()) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = done >= total;
        let due = shown.figure == 0 || ends || figure + 1 >= shown.figure.saturating_add(step);
        if due && !shown.ended && done >= shown.done {
            *shown = Shown { figure: figure + 1, done, ended: ends };
            show();
        }
    }

    fn show_qemu(&self, done: u64, total: u64) {
        let percent = hundredths(done, total);
        self.in_order(done, total, percent, STEP, || self.put(&format!("{}\r", line(percent))));
    }

    fn show_json(&self, done: u64, total: u64) {
        let elapsed = self.started.elapsed();
        let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX - 1);
        let interval = u64::try_from(JSON_INTERVAL.as_millis()).unwrap_or(1);
        self.in_order(done, total, millis, interval, || {
            self.put(&format!("{}\n", object(done, total, elapsed)));
        });
    }

    fn show_bar(&self, done: u64, total: u64) {
        let Some(bar) = &self.bar else { return };
        bar.set_length(total);
        bar.set_position(done);
    }
}

impl Progress for Reporter<'_> {
    fn update(&self, done: u64, total: u64) {
        if self.asked.swap(false, Ordering::Relaxed) {
            self.app.say(&format!("{}\n", line(hundredths(done, total))));
        }
        match self.form {
            Form::Silent => {}
            Form::Qemu => self.show_qemu(done, total),
            Form::Bar => self.show_bar(done, total),
            Form::Json => self.show_json(done, total),
        }
    }

    fn cancelled(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    fn wants_estimate(&self) -> bool {
        self.form != Form::Silent
    }

    fn starting(&self) {
        if let Some(directories) = &self.directories {
            self.app.confine(directories);
        }
    }

    fn warn(&self, message: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.app.warn(message)),
            None => self.app.warn(message),
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template =
        "{bar:30} {percent:>3}%  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// How much of `total` is done, in hundredths of a percent. Of nothing, all is done.
fn hundredths(done: u64, total: u64) -> u64 {
    let share = u128::from(done.min(total)) * 10_000 / u128::from(total.max(1));
    if total == 0 { 10_000 } else { u64::try_from(share).unwrap_or(10_000) }
}

/// qemu-img's form.
fn line(hundredths: u64) -> String {
    format!("    ({}.{:02}/100%)", hundredths / 100, hundredths % 100)
}

/// One object: bytes done, bytes in all, percent, seconds since the start.
fn object(done: u64, total: u64, elapsed: Duration) -> serde_json::Value {
    // At most 10 000: exact as a float, and as a number of JSON.
    let percent = f64::from(u16::try_from(hundredths(done, total)).unwrap_or(10_000)) / 100.0;
    serde_json::json!({
        "done": done,
        "total": total,
        "percent": percent,
        "elapsed": (elapsed.as_secs_f64() * 1000.0).round() / 1000.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_look_as_qemu_prints_them() {
        assert_eq!(line(hundredths(0, 7)), "    (0.00/100%)");
        assert_eq!(line(hundredths(1, 3)), "    (33.33/100%)");
        assert_eq!(line(hundredths(7, 7)), "    (100.00/100%)");
        assert_eq!(line(hundredths(0, 0)), "    (100.00/100%)");
        assert_eq!(hundredths(u64::MAX, u64::MAX), 10_000);
        assert_eq!(hundredths(9, 4), 10_000);
    }

    #[test]
    fn objects_are_one_line_each() {
        let text = object(1, 8, Duration::from_millis(1234)).to_string();
        assert_eq!(text, r#"{"done":1,"total":8,"percent":12.5,"elapsed":1.234}"#);
    }
}

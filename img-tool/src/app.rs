//! What every verb needs: who we are, the global options, and ways to speak to the user.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use image::{Layer, OpenOptions, Policy, Spec};

use crate::cli::{self, Cli, Command, GlobalArgs, Refused};
use crate::cmd;
use crate::exit::{Exit, Failure, Outcome};
use crate::hint;
use crate::output::Output;
use crate::sandbox;

/// The running program.
#[derive(Debug)]
pub(crate) struct App {
    /// The name it was called by: `vimg`, `qemu-img` or `qemu-nbd`.
    pub(crate) program: &'static str,
    /// `--untrusted`, `--allow`, `-v`.
    pub(crate) global: GlobalArgs,
    /// Standard output and error.
    pub(crate) output: Output,
}

impl App {
    pub(crate) fn new(program: &'static str) -> Self {
        let output = Output::new(program == "vimg");
        Self { program, global: GlobalArgs::default(), output }
    }

    /// Called as `qemu-img`: no hints, no colour, nothing that qemu-img would not print.
    pub(crate) fn as_qemu_img(&self) -> bool {
        self.program == "qemu-img"
    }

    /// Called as `qemu-nbd`, whose words scripts know.
    pub(crate) fn as_qemu_nbd(&self) -> bool {
        self.program == "qemu-nbd"
    }

    /// Which names inside images are followed.
    pub(crate) fn policy(&self) -> Policy {
        Policy {
            untrusted: self.global.untrusted,
            allow: self.global.allow.clone(),
            slow_keys: self.global.slow_keys,
        }
    }

    /// Prints a text on standard output.
    pub(crate) fn print(&self, text: &str) -> Outcome<()> {
        self.output.print(text)
    }

    /// Prints on standard output what accompanies work: progress, and that it has been done. The work counts, not the
    /// words: that they could not be written changes neither what is done nor the exit code.
    pub(crate) fn note(&self, text: &str) {
        drop(self.output.print(text));
    }

    /// Prints a text on standard error as it is.
    pub(crate) fn say(&self, text: &str) {
        self.output.say(text);
    }

    /// Prints `program: message` on standard error.
    pub(crate) fn complain(&self, message: &str) {
        self.output.complain(self.program, message);
    }

    /// Prints `program: warning: message` on standard error.
    pub(crate) fn warn(&self, message: &str) {
        self.complain(&format!("warning: {message}"));
    }

    /// With `--untrusted`, gives up everything but reading these files before an image is opened: for verbs that open
    /// nothing else. Local time may still be looked up.
    pub(crate) fn confine_to_reading(&self, paths: impl IntoIterator<Item = PathBuf>) {
        if self.global.untrusted {
            let clock = ["/etc/localtime", "/usr/share/zoneinfo"].map(PathBuf::from);
            let paths: Vec<_> = paths.into_iter().chain(self.global.allow.clone()).chain(clock).collect();
            let applied = sandbox::enter_reading(&paths);
            self.tell(&format!("sandbox: {applied}"));
        }
    }

    /// Shows an error with its hints, without ending the program.
    pub(crate) fn show(&self, error: &block::Error) {
        self.say(&hint::render(error, self.program, self.output.colour));
    }

    /// With `-v`, prints a line on standard error.
    pub(crate) fn tell(&self, line: &str) {
        if self.global.verbose {
            self.say(&format!("{line}\n"));
        }
    }

    /// A mistake in the usage of `command`, pointing to its help.
    pub(crate) fn usage(&self, command: &str, message: &str) -> Failure {
        self.complain(message);
        self.say(&format!("Try '{} {command} --help' for more info\n", self.program));
        Failure::Silent(Exit::ERROR)
    }

    /// Opens an image, says what is to be said about it, and with `-v` shows its chain.
    pub(crate) fn open(&self, spec: &Spec, options: &OpenOptions) -> block::Result<Arc<Layer>> {
        self.warn_about(spec);
        let layer = image::open(spec, options)?;
        self.announce(&layer, options.writable);
        Ok(layer)
    }

    /// What is to be said about the way an image was named.
    pub(crate) fn warn_about(&self, spec: &Spec) {
        for warning in spec.warnings() {
            self.warn(warning);
        }
    }

    /// What is to be said about an image that has been opened.
    pub(crate) fn announce(&self, layer: &Layer, writable: bool) {
        for warning in &layer.warnings {
            self.warn(warning);
        }
        if let Some(warning) = layer.probed_raw_warning().filter(|_| writable) {
            self.say(&format!("{warning}\n"));
        }
        if self.global.verbose {
            self.say(&chain(layer));
        }
    }

    /// With `--untrusted`, gives up everything that is not needed any more once all files are open: only in
    /// `directories` may files still be made, renamed and removed. To be called before threads are started.
    pub(crate) fn confine(&self, directories: &[PathBuf]) {
        if self.global.untrusted {
            let applied = sandbox::enter(directories);
            self.tell(&format!("sandbox: {applied}"));
        }
    }

    /// The same for servers: connections may still be accepted, and files in `directories` removed.
    pub(crate) fn confine_to_serving(&self, directories: &[PathBuf]) {
        if self.global.untrusted {
            let applied = sandbox::enter_serving(directories);
            self.tell(&format!("sandbox: {applied}"));
        }
    }

    /// The same for programs that unpack: in `directory`, files, folders and links may be made.
    pub(crate) fn confine_to_unpacking(&self, directory: &Path) {
        if self.global.untrusted {
            let applied = sandbox::enter_unpacking(directory);
            self.tell(&format!("sandbox: {applied}"));
        }
    }

    /// Shows a failure and finds the exit code.
    fn end(&self, failure: Failure) -> Exit {
        match failure {
            Failure::Error { exit, error } => {
                self.show(&error);
                exit
            }
            Failure::Silent(exit) => exit,
            Failure::BrokenPipe => Exit::OK,
        }
    }
}

/// The chain of an image, a line a layer.
fn chain(layer: &Layer) -> String {
    layer
        .chain()
        .enumerate()
        .map(|(depth, layer)| {
            let indent = "  ".repeat(depth.min(16));
            let data = layer.data_file.as_ref().map(|file| format!(", data in {}", file.path().display()));
            format!("{indent}{} ({}{})\n", layer.filename, layer.format, data.unwrap_or_default())
        })
        .collect()
}

/// The directory that a file lies in, for [`App::confine`].
pub(crate) fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Runs the program.
pub(crate) fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    crate::nbd::register();
    let args: Vec<OsString> = args.into_iter().collect();
    let mut app = App::new(program_name(args.first()));
    if app.program == "qemu-nbd" {
        catch_file_size_limit();
        allow_many_files();
        return cmd::serve::qemu_nbd::main(&args, &mut app).unwrap_or_else(|failure| app.end(failure)).into();
    }
    let exit = match cli::parse(args, app.program) {
        Ok(cli) => {
            app.global = cli.global.clone();
            run(&cli, &app).unwrap_or_else(|failure| app.end(failure))
        }
        Err(refused) => answer(refused, &app).unwrap_or_else(|failure| app.end(failure)),
    };
    exit.into()
}

/// Under the names qemu-img and qemu-nbd we are those, under any other we are vimg.
fn program_name(arg0: Option<&OsString>) -> &'static str {
    let name = arg0.and_then(|path| Path::new(path).file_name());
    ["qemu-img", "qemu-nbd"].into_iter().find(|own| name.is_some_and(|name| name == *own)).unwrap_or("vimg")
}

/// The version of qemu-img whose behaviour is followed.
const QEMU_VERSION: &str = "10.0.2";

fn answer(refused: Refused, app: &App) -> Outcome {
    match refused {
        Refused::Text(text) => app.print(&text).map(|()| Exit::OK),
        Refused::Version => app.print(&version(app)).map(|()| Exit::OK),
        Refused::Wrong { message, getopt, hint, command } => {
            match command.as_ref().filter(|_| getopt) {
                Some(command) => app.say(&format!("{} {command}: {message}\n", app.program)),
                None => app.complain(&message),
            }
            if let Some(hint) = hint.filter(|_| !app.as_qemu_img()) {
                app.say(&hint::line(&hint, app.output.colour));
            }
            if message.starts_with("At most one filename") {
                return Ok(Exit::ERROR);
            }
            let help = command.as_ref().map_or_else(|| "--help".to_owned(), |name| format!("{name} --help"));
            app.say(&format!("Try '{} {help}' for more info\n", app.program));
            // Where 1 is an answer.
            let verdict = matches!(command.as_deref(), Some("bootcheck" | "compare")) && !app.as_qemu_img();
            Ok(if verdict { Exit(2) } else { Exit::ERROR })
        }
    }
}

fn version(app: &App) -> String {
    let own = concat!("vimg ", env!("CARGO_PKG_VERSION"));
    if app.as_qemu_img() { format!("qemu-img version {QEMU_VERSION} ({own})\n") } else { format!("{own}\n") }
}

/// Makes a write past the file size limit an error (EFBIG) instead of a deadly signal, for verbs that write.
fn survive_file_size_limit(command: &Command) {
    if !matches!(
        command,
        Command::Info(_) | Command::Map(_) | Command::Compare(_) | Command::Measure(_) | Command::Checksum(_)
    ) {
        catch_file_size_limit();
    }
}

fn catch_file_size_limit() {
    let caught = Arc::new(AtomicBool::new(false));
    // If it cannot be set the limit still ends the program, only less politely.
    let _ = signal_hook::flag::register(nix::libc::SIGXFSZ, caught);
}

/// Every image of a chain is a file or two: as many as the system allows.
fn allow_many_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Where it cannot be raised, a long chain ends with an error that names the limit.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn run(cli: &Cli, app: &App) -> Outcome {
    survive_file_size_limit(&cli.command);
    allow_many_files();
    match &cli.command {
        Command::Amend(args) => cmd::amend::run(args, app),
        Command::Bench(args) => cmd::bench::run(args, app),
        Command::Bitmap(args) => cmd::bitmap::run(args, app),
        Command::Bootcheck(args) => cmd::bootcheck::run(args, app),
        Command::Cat(args) => cmd::cat::run(args, app),
        Command::Check(args) => cmd::check::run(args, app),
        Command::Checksum(args) => cmd::checksum::run(args, app),
        Command::Commit(args) => cmd::commit::run(args, app),
        Command::Compare(args) => cmd::compare::run(args, app),
        Command::Convert(args) => cmd::convert::run(args, app),
        Command::Copy(args) => cmd::copy::run(args, app),
        Command::CpOut(args) => cmd::cp_out::run(args, app),
        Command::Create(args) => cmd::create::run(args, app),
        Command::Dd(args) => cmd::dd::run(args, app),
        Command::Doctor(args) => cmd::doctor::run(args, app),
        Command::Info(args) => cmd::info::run(args, app),
        Command::Inspect(args) => cmd::inspect::run(args, app),
        Command::Ls(args) => cmd::ls::run(args, app),
        Command::Map(args) => cmd::map::run(args, app),
        Command::Measure(args) => cmd::measure::run(args, app),
        Command::Nbd(args) => cmd::nbd::run(args, app),
        Command::P2v(args) => cmd::p2v::run(args, app),
        Command::Rebase(args) => cmd::rebase::run(args, app),
        Command::Resize(args) => cmd::resize::run(args, app),
        Command::Serve(args) => cmd::serve::run(args, app),
        Command::Snapshot(args) => cmd::snapshot::run(args, app),
        Command::V2v(args) => cmd::v2v::run(args, app),
        Command::Completions(args) => cmd::completions::run(args, app),
        Command::Man(args) => cmd::man::run(args, app),
    }
}

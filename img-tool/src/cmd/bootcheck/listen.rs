//! Whoever follows a check: progress, the console in a file or on the terminal, a person at the keyboard, signals.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bootcheck::check::Listener;
use bootcheck::console::Lines;
use bootcheck::engine::Control;
use bootcheck::pattern::Milestone;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::output::Output;

/// Bytes of a console that are written to its file.
const MAX_CONSOLE: u64 = 256 << 20;
/// Ctrl-], which telnet and virsh use, too.
const ESCAPE: u8 = 0x1d;
/// Characters of the last line that are shown beside the progress.
const SHOWN: usize = 70;

/// What follows a check, and how.
pub(super) struct Options {
    /// Shown in front of lines if there are several images.
    pub(super) name: Option<String>,
    /// Gets the whole console.
    pub(super) console: Option<File>,
    /// The console is shown, line by line.
    pub(super) verbose: bool,
    /// A person types.
    pub(super) interactive: bool,
    /// The signal that has come, or 0.
    pub(super) signal: Arc<AtomicUsize>,
    /// Shows where the guest is.
    pub(super) bar: Option<ProgressBar>,
}

/// Follows one check.
pub(super) struct Following {
    name: Option<String>,
    verbose: bool,
    interactive: bool,
    signal: Arc<AtomicUsize>,
    /// The person at the keyboard has left.
    left: Arc<AtomicBool>,
    bar: Option<ProgressBar>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    console: Option<File>,
    written: u64,
    lines: Lines,
    remarks: Vec<String>,
    terminal: Option<RawTerminal>,
}

impl Following {
    pub(super) fn new(options: Options) -> Self {
        Self {
            name: options.name,
            verbose: options.verbose,
            interactive: options.interactive,
            signal: options.signal,
            left: Arc::default(),
            bar: options.bar,
            state: Mutex::new(State { console: options.console, ..State::default() }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The check is over: the terminal is as it was, and there may be something to say.
    pub(super) fn finish(&self) -> Vec<String> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let mut state = self.state();
        if state.terminal.take().is_some() {
            say("\n");
        }
        if self.verbose && !state.lines.partial().is_empty() {
            let last = state.lines.partial().into_owned();
            self.show(&last);
        }
        std::mem::take(&mut state.remarks)
    }

    fn show(&self, line: &str) {
        match &self.name {
            Some(name) => say(&format!("{name}: {line}\n")),
            None => say(&format!("{line}\n")),
        }
    }
}

/// Prints on standard error.
fn say(text: &str) {
    Output { colour: false }.say(text);
}

impl Listener for Following {
    fn ready(&self, control: &Arc<dyn Control>) {
        if !self.interactive {
            return;
        }
        say("The guest's console follows; Ctrl-] leaves it.\n");
        self.state().terminal = RawTerminal::enter();
        let (control, left) = (Arc::clone(control), Arc::clone(&self.left));
        let typing = move || {
            let mut buf = [0; 256];
            let mut input = std::io::stdin().lock();
            while let Ok(count @ 1..) = input.read(&mut buf) {
                let typed = &buf[..count];
                let end = typed.iter().position(|&byte| byte == ESCAPE);
                control.type_bytes(&typed[..end.unwrap_or(count)]);
                if end.is_some() {
                    left.store(true, Ordering::Relaxed);
                    return;
                }
            }
        };
        // Without a thread nobody can type, which the person will notice.
        drop(std::thread::Builder::new().name("keyboard".to_owned()).spawn(typing));
    }

    fn console(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.record(bytes);
        if self.interactive {
            let mut stdout = std::io::stdout().lock();
            // Whoever closes the terminal does not want to see it.
            drop(stdout.write_all(bytes).and_then(|()| stdout.flush()));
        }
        if self.verbose {
            let mut lines = std::mem::take(&mut state.lines);
            lines.push(bytes, |line| self.show(line));
            state.lines = lines;
        }
    }

    fn running(&self, elapsed: Duration, station: Option<Milestone>, line: &str) {
        if let Some(bar) = &self.bar {
            let station = station.map_or("no output yet", Milestone::words);
            let line: String = line.trim().chars().take(SHOWN).collect();
            bar.set_message(format!("{} s, {station}: {line}", elapsed.as_secs()));
            bar.tick();
        }
    }

    fn cancelled(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0 || self.left.load(Ordering::Relaxed)
    }
}

impl State {
    /// Keeps what the guest prints, up to a limit; a file that cannot be written is told once.
    fn record(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.console else { return };
        let problem = match file.write_all(bytes) {
            Ok(()) => {
                self.written = self.written.saturating_add(bytes.len() as u64);
                (self.written > MAX_CONSOLE).then(|| format!("it is kept up to {} MiB", MAX_CONSOLE >> 20))
            }
            Err(error) => Some(error.to_string()),
        };
        if let Some(problem) = problem {
            self.remarks.push(format!("the file of the console is not complete: {problem}"));
            self.console = None;
        }
    }
}

/// A terminal that passes on every key as it is; dropping it makes it a usual one again.
struct RawTerminal(Termios);

impl RawTerminal {
    /// Standard input, if that is a terminal.
    fn enter() -> Option<Self> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // If the terminal has gone away, that does not matter any more.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

/// The progress of all checks, on a terminal.
pub(super) struct Bars(Option<MultiProgress>);

impl Bars {
    pub(super) fn new(shown: bool) -> Self {
        Self(shown.then(MultiProgress::new))
    }

    /// A line for an image.
    pub(super) fn add(&self, name: &str) -> Option<ProgressBar> {
        let bars = self.0.as_ref()?;
        let bar = bars.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}: {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(name.chars().filter(|c| !c.is_control()).collect::<String>());
        bar.set_message("waiting");
        Some(bar)
    }

    /// Makes room for other output.
    pub(super) fn suspend(&self, print: impl FnOnce()) {
        match &self.0 {
            Some(bars) => bars.suspend(print),
            None => print(),
        }
    }
}

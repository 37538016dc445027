//! The personality of qemu-nbd: under that name, its options, defaults, words and exit codes, so that scripts go on
//! working. What comes out is a [`Plan`] like that of `vimg serve`, or work for the kernel's devices.

mod creds;
mod help;
mod list;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use block::ResultExt as _;
use nbd_server::kernel::Device;
use nbd_server::proto::{DEFAULT_PORT, MAX_STRING};

use super::getopt::{self, Known, Mistake, Value};
use super::plan::{Authentication, Image, Io, Logging, Plan, Served, Where, Window};
use crate::app::App;
use crate::cli::ObjectArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::snapshot::Wanted;

/// Every option of version 10.0.2.
const OPTIONS: [Known; 35] = [
    (Some('h'), "help", Value::None),
    (Some('V'), "version", Value::None),
    (Some('p'), "port", Value::Required),
    (Some('b'), "bind", Value::Required),
    (Some('k'), "socket", Value::Required),
    (Some('e'), "shared", Value::Required),
    (Some('t'), "persistent", Value::None),
    (Some('v'), "verbose", Value::None),
    (Some('x'), "export-name", Value::Required),
    (Some('D'), "description", Value::Required),
    (None, "handshake-limit", Value::Required),
    (Some('o'), "offset", Value::Required),
    (Some('A'), "allocation-depth", Value::None),
    (Some('B'), "bitmap", Value::Required),
    (Some('L'), "list", Value::None),
    (None, "object", Value::Required),
    (None, "tls-creds", Value::Required),
    (None, "tls-authz", Value::Required),
    (None, "tls-hostname", Value::Required),
    (Some('T'), "trace", Value::Required),
    (None, "fork", Value::None),
    (None, "pid-file", Value::Required),
    (None, "selinux-label", Value::Required),
    (Some('c'), "connect", Value::Required),
    (Some('d'), "disconnect", Value::None),
    (Some('f'), "format", Value::Required),
    (Some('r'), "read-only", Value::None),
    (Some('s'), "snapshot", Value::None),
    (Some('l'), "load-snapshot", Value::Required),
    (Some('n'), "nocache", Value::None),
    (None, "cache", Value::Required),
    (None, "aio", Value::Required),
    (None, "discard", Value::Required),
    (None, "detect-zeroes", Value::Required),
    (None, "image-opts", Value::None),
];

/// What the options have said, each as it was understood.
#[derive(Debug, Default)]
struct Words {
    port: Option<String>,
    bind: Option<String>,
    socket: Option<PathBuf>,
    shared: Option<usize>,
    persistent: bool,
    verbose: bool,
    export_name: Option<String>,
    description: Option<String>,
    handshake_limit: Option<u64>,
    offset: Option<String>,
    allocation_depth: bool,
    bitmaps: Vec<String>,
    list: bool,
    objects: Vec<String>,
    tls_creds: Option<String>,
    tls_authz: Option<String>,
    tls_hostname: Option<String>,
    fork: bool,
    pid_file: Option<PathBuf>,
    selinux_label: Option<String>,
    connect: Option<String>,
    disconnect: bool,
    format: Option<String>,
    read_only: bool,
    snapshot: bool,
    load_snapshot: Option<Wanted>,
    cache: Option<String>,
    aio: Option<String>,
    discard: Option<String>,
    detect_zeroes: Option<String>,
    image_opts: bool,
    files: Vec<String>,
}

/// Why reading the command line ended.
enum End {
    /// getopt complains.
    Mistake(Mistake),
    /// The user wants to read this.
    Text(String),
    /// Something else is wrong.
    Failure(Failure),
}

impl From<Mistake> for End {
    fn from(mistake: Mistake) -> Self {
        Self::Mistake(mistake)
    }
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// Does what qemu-nbd would do.
pub(crate) fn main(args: &[OsString], app: &mut App) -> Outcome {
    let args: Vec<_> = args.iter().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let mut words = Words::default();
    let read =
        getopt::parse(&OPTIONS, &args, |(name, value)| words.take(name, value.unwrap_or_default(), app));
    match read {
        Ok(files) => words.files = files,
        Err(End::Text(text)) => return app.print(&text).map(|()| Exit::OK),
        Err(End::Failure(failure)) => return Err(failure),
        Err(End::Mistake(Mistake(text))) => {
            app.complain(&text);
            app.complain("Try `qemu-nbd --help' for more information.");
            return Err(Failure::Silent(Exit::ERROR));
        }
    }
    app.global.verbose = words.verbose;
    words.run(app)
}

impl Words {
    /// Understands one option.
    fn take(&mut self, name: &'static str, value: String, app: &App) -> Result<(), End> {
        match name {
            "help" => return Err(End::Text(help::TEXT.to_owned())),
            "version" => return Err(End::Text(help::version())),
            "port" => self.port = Some(value),
            "bind" => self.bind = Some(value),
            "socket" if !value.starts_with('/') => return refuse("socket path must be absolute"),
            "socket" => self.socket = Some(value.into()),
            "shared" => self.shared = Some(number(&value, "shared device number")?),
            "persistent" => self.persistent = true,
            "verbose" => self.verbose = true,
            "export-name" => self.export_name = Some(text(value, "name")?),
            "description" => self.description = Some(text(value, "description")?),
            "handshake-limit" => self.handshake_limit = Some(number(&value, "handshake limit")?),
            "offset" => self.offset = Some(value),
            "allocation-depth" => self.allocation_depth = true,
            "bitmap" => self.bitmaps.push(value),
            "list" => self.list = true,
            "object" => self.objects.push(value),
            "tls-creds" => self.tls_creds = Some(value),
            "tls-authz" => self.tls_authz = Some(value),
            "tls-hostname" => self.tls_hostname = Some(value),
            "fork" => self.fork = true,
            "pid-file" => self.pid_file = Some(value.into()),
            "selinux-label" => self.selinux_label = Some(value),
            "connect" => self.connect = Some(value),
            "disconnect" => self.disconnect = true,
            "format" => self.format = Some(value),
            "read-only" => self.read_only = true,
            "snapshot" => self.snapshot = true,
            "load-snapshot" => {
                self.read_only = true;
                self.load_snapshot = Some(snapshot(&value, app)?);
            }
            "nocache" => self.set_mode("-n and --cache", |words| &mut words.cache, "none".to_owned())?,
            "cache" => self.set_mode("-n and --cache", |words| &mut words.cache, value)?,
            "aio" => self.set_mode("--aio", |words| &mut words.aio, value)?,
            "discard" => self.set_mode("--discard", |words| &mut words.discard, value)?,
            "detect-zeroes" => self.set_mode("", |words| &mut words.detect_zeroes, value)?,
            "image-opts" => self.image_opts = true,
            // There are no trace points.
            _ => {}
        }
        Ok(())
    }

    /// One of the four modes; `once` names those that may be given once only.
    fn set_mode(
        &mut self,
        once: &str,
        field: impl Fn(&mut Self) -> &mut Option<String>,
        value: String,
    ) -> Result<(), End> {
        let field = field(self);
        if field.is_some() && !once.is_empty() {
            return refuse(&format!("{once} can only be specified once"));
        }
        *field = Some(value);
        // What is wrong is told in the order in which it was typed.
        self.check_modes().map(drop)
    }

    fn check_modes(&self) -> Result<Io, End> {
        let or = |mode: &Option<String>, default: &str| mode.clone().unwrap_or_else(|| default.to_owned());
        // Whether the mode fits the cache is seen when the file is opened.
        let aio = or(&self.aio, "threads");
        if !["threads", "native", "io_uring"].contains(&&*aio) {
            return refuse(&format!("Invalid aio mode '{aio}'"));
        }
        let zeroes = or(&self.detect_zeroes, "off");
        if !["off", "on", "unmap"].contains(&&*zeroes) {
            let words = format!("Failed to parse detect_zeroes mode: invalid parameter value: {zeroes}");
            return refuse(&words);
        }
        let (cache, discard) = (or(&self.cache, "writeback"), or(&self.discard, "ignore"));
        Ok(Io::parse(&cache, "threads", &discard, &zeroes)?)
    }

    fn run(self, app: &mut App) -> Outcome {
        self.check()?;
        if self.list {
            return list::run(&self, app);
        }
        let [file] = &self.files[..] else { return Err(invalid_number(app)) };
        if self.disconnect {
            return disconnect(file, app);
        }
        if let Some(label) = &self.selinux_label {
            label_sockets(label)?;
        }
        let plan = self.plan(file)?;
        super::carry_out(&plan, app)
    }

    /// What does not go together, in qemu-nbd's order.
    fn check(&self) -> Outcome<()> {
        if self.list {
            self.check_list()?;
        } else if self.files.len() != 1 {
            return Ok(());
        }
        if self.tls_creds.is_some() {
            creds::find(self)?;
            if !self.list && self.tls_hostname.is_some() {
                return Err(Failure::usage("TLS hostname is only supported with export list"));
            }
            if self.connect.is_some() {
                return Err(Failure::usage("TLS is not supported with a host device"));
            }
            if self.list && self.tls_authz.is_some() {
                return Err(Failure::usage("TLS authorization is incompatible with export list"));
            }
        }
        for (given, name) in [(&self.tls_authz, "--tls-authz"), (&self.tls_hostname, "--tls-hostname")] {
            if given.is_some() && self.tls_creds.is_none() {
                return Err(Failure::usage(format!("{name} is not permitted without --tls-creds")));
            }
        }
        if activated()? {
            self.check_activation()?;
        }
        if self.selinux_label.is_some() && self.socket.is_none() {
            return Err(Failure::usage("--selinux-label is not permitted without --socket"));
        }
        if self.image_opts && self.format.is_some() {
            return Err(Failure::usage("--image-opts and -f are mutually exclusive"));
        }
        Ok(())
    }

    fn check_list(&self) -> Outcome<()> {
        let per_device = self.export_name.is_some()
            || self.description.is_some()
            || self.offset.is_some()
            || self.connect.is_some()
            || self.disconnect
            || self.allocation_depth
            || !self.bitmaps.is_empty()
            || self.format.is_some()
            || self.cache.is_some()
            || self.aio.is_some()
            || self.discard.is_some()
            || self.load_snapshot.is_some();
        let wrong = |with| Err(Failure::usage(format!("List mode is incompatible with {with}")));
        if !self.files.is_empty() {
            return wrong("a file name");
        }
        if per_device {
            return wrong("per-device settings");
        }
        if self.fork {
            return wrong("forking");
        }
        Ok(())
    }

    fn check_activation(&self) -> Outcome<()> {
        if self.list {
            return Err(Failure::usage("List mode is incompatible with socket activation"));
        }
        let taken = [
            (self.connect.is_some() || self.disconnect, "NBD device"),
            (self.socket.is_some(), "Unix socket"),
            (self.bind.is_some(), "The interface"),
            (self.port.is_some(), "TCP port number"),
            (self.selinux_label.is_some(), "SELinux label"),
        ];
        match taken.iter().find(|(given, _)| *given) {
            Some((_, what)) => {
                Err(Failure::usage(format!("{what} can't be set when using socket activation")))
            }
            None => Ok(()),
        }
    }

    fn plan(&self, file: &str) -> Outcome<Plan> {
        let io = self.check_modes().map_err(|end| match end {
            End::Failure(failure) => failure,
            End::Mistake(Mistake(text)) | End::Text(text) => Failure::usage(text),
        })?;
        if self.aio.as_deref() == Some("native") && !io.cache.direct() {
            let why = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
            return Err(Failure::usage(format!("Failed to blk_new_open '{file}': {why}")));
        }
        let shared = self.shared.unwrap_or(1);
        Ok(Plan {
            images: vec![Image {
                export: self.export_name.clone().unwrap_or_default(),
                filename: file.to_owned(),
            }],
            description: self.description.clone().unwrap_or_default(),
            format: self.format.clone(),
            served: Served {
                read_only: self.read_only,
                overlay: self.snapshot,
                snapshot: self.load_snapshot.as_ref().map(|wanted| wanted.selector.clone()),
                bitmaps: self.bitmaps.clone(),
                allocation_depth: self.allocation_depth,
                resizable: false,
                multi_conn: shared != 1,
            },
            window: self.window()?,
            io,
            place: self.place()?,
            authentication: self.authentication()?,
            tls_optional: false,
            max_clients: if shared == 0 { usize::MAX } else { shared },
            handshake_timeout: Some(self.handshake_limit.unwrap_or(10))
                .filter(|seconds| *seconds > 0)
                .map(Duration::from_secs),
            threads: 16,
            once: !self.persistent,
            // A device has its server in the background, unless somebody wants to see it.
            fork: self.fork || (self.connect.is_some() && !self.verbose),
            pid_file: self.pid_file.clone(),
            announce: false,
            logging: Logging::default(),
            metrics: None,
            force_share: false,
            image_opts: self.image_opts,
            secrets: self.objects().secrets()?,
        })
    }

    /// The objects that are no business of TLS.
    fn objects(&self) -> ObjectArgs {
        ObjectArgs::of(self.objects.iter().filter(|object| !creds::is_for_tls(object)).cloned().collect())
    }

    fn authentication(&self) -> Outcome<Authentication> {
        if self.tls_creds.is_none() {
            return Ok(Authentication::None);
        }
        if self.tls_authz.is_some() {
            // To ignore it would let strangers in.
            return Err(Failure::usage("--tls-authz is not in this version of vimg"));
        }
        creds::find(self)?.for_server()
    }

    fn window(&self) -> Outcome<Window> {
        let Some(text) = &self.offset else { return Ok(Window::Whole) };
        let wrong = || Failure::usage(format!("Invalid offset '{text}'"));
        let (negative, digits) = match text.strip_prefix('-') {
            Some(digits) => (true, digits),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let offset = integer(digits).ok_or_else(wrong)?;
        if negative || i64::try_from(offset).is_err() {
            let words = format!("Value '{text}' is out of range for parameter 'offset'");
            return Err(Failure::usage(words));
        }
        Ok(Window::Part { offset, len: None })
    }

    fn place(&self) -> Outcome<Where> {
        if activated()? {
            return Ok(Where::Default);
        }
        if let Some(name) = &self.connect {
            return Ok(Where::Kernel(device(name, "Failed to open")?));
        }
        if let Some(path) = &self.socket {
            return Ok(Where::Unix { path: path.clone(), mode: None });
        }
        let (host, port) = self.address()?;
        Ok(Where::Tcp(vec![(host, port)]))
    }

    /// Where to listen, or whom to ask.
    fn address(&self) -> Outcome<(String, u16)> {
        let host = self.bind.clone().unwrap_or_else(|| "0.0.0.0".to_owned());
        let port = match self.port.as_deref() {
            None => DEFAULT_PORT,
            Some("nbd") => DEFAULT_PORT,
            Some(text) => text.parse().map_err(|_| {
                let what = "Servname not supported for ai_socktype";
                Failure::usage(format!("address resolution failed for {host}:{text}: {what}"))
            })?,
        };
        Ok((host, port))
    }
}

fn disconnect(name: &str, app: &App) -> Outcome {
    crate::cmd::nbd::detach(device(name, "Cannot open")?, false, app)?;
    app.print(&format!("{name} disconnected\n"))?;
    Ok(Exit::OK)
}

/// A device that is there.
fn device(name: &str, failed: &str) -> Outcome<Device> {
    let what = || format!("{failed} {name}");
    std::fs::metadata(name).map_err(block::Error::from).context(what)?;
    crate::cmd::nbd::device(name).map_err(|error| Failure::usage(format!("{}: {error}", what())))
}

fn invalid_number(app: &App) -> Failure {
    app.complain("Invalid number of arguments");
    app.say("Try `qemu-nbd --help' for more information.\n");
    Failure::Silent(Exit::ERROR)
}

fn refuse<T>(words: &str) -> Result<T, End> {
    Err(End::Failure(Failure::usage(words)))
}

/// A number that is an `int` for qemu-nbd and not negative.
fn number<T: TryFrom<u64>>(text: &str, noun: &str) -> Result<T, End> {
    integer(text)
        .filter(|number| i32::try_from(*number).is_ok())
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| End::Failure(Failure::usage(format!("Invalid {noun} '{text}'"))))
}

/// An integer as C writes it: decimal, 0x.. or 0...
fn integer(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
    }
    if text.starts_with('+') {
        return None;
    }
    let radix = if text.len() > 1 && text.starts_with('0') { 8 } else { 10 };
    u64::from_str_radix(text, radix).ok()
}

fn text(text: String, noun: &str) -> Result<String, End> {
    if text.len() > MAX_STRING {
        return refuse(&format!("export {noun} '{text}' too long"));
    }
    Ok(text)
}

fn snapshot(text: &str, app: &App) -> Outcome<Wanted> {
    Wanted::parse(text, app).map_err(|failure| match failure {
        Failure::Error { .. } => Failure::usage(format!("Failed in parsing snapshot param `{text}'")),
        silent => silent,
    })
}

/// Whether systemd has passed a socket to this process (sd_listen_fds(3)): one, or none.
fn activated() -> Outcome<bool> {
    let of = |name| std::env::var(name).ok();
    // In the background the process is another one, and only knows that there is a socket.
    let ours = match of("LISTEN_PID") {
        Some(pid) => pid.parse() == Ok(std::process::id()),
        None => super::background::is_background(),
    };
    match of("LISTEN_FDS").and_then(|count| count.parse::<u32>().ok()).filter(|_| ours) {
        None | Some(0) => Ok(false),
        Some(1) => Ok(true),
        Some(_) => Err(Failure::usage("qemu-nbd does not support socket activation with LISTEN_FDS > 1")),
    }
}

/// Lets sockets that this thread makes have a label (setsockcreatecon(3)).
fn label_sockets(label: &str) -> Outcome<()> {
    let written = std::fs::write("/proc/thread-self/attr/sockcreate", label);
    Ok(written.context(|| format!("Cannot set SELinux socket create context to {label}"))?)
}

#[cfg(test)]
mod tests;

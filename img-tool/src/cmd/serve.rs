//! `serve`: images as network block devices.

mod background;
mod disk;
mod getopt;
mod list;
mod log;
mod metrics;
pub(crate) mod plan;
pub(crate) mod qemu_nbd;
mod run;

use std::path::PathBuf;
use std::time::Duration;

use nbd_server::kernel::Device;

use crate::app::App;
use crate::cli::{ObjectArgs, OutputFormat, SourceArgs};
use crate::exit::{Exit, Failure, Outcome};

pub(crate) use disk::temporary;
pub(crate) use run::run as carry_out;
pub(crate) use run::{listeners, tls as server_tls, watch_signals};

use plan::{Authentication, Io, Logging, Plan, Served, Where, Window};

/// Serve images to clients of network block devices (NBD)
///
/// Listens (by default on port 10809 of this machine's own address only) and serves until it is told to stop: SIGTERM and
/// SIGINT let outstanding requests finish and flush the images. When it is ready, it prints the URI of each export.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg serve --socket /tmp/disk.sock disk.qcow2
  vimg serve --listen 0.0.0.0:10809 --read-only root=root.qcow2 data=data.vmdk
  vimg serve --socket /tmp/try.sock --overlay disk.qcow2          # what clients write vanishes in the end
  vimg serve --socket /tmp/old.sock --snapshot before-upgrade disk.qcow2
  vimg serve --partition 1 --read-only --socket /tmp/p1.sock appliance.ova:disk1.vmdk
  vimg serve --fork --pid-file /run/disk.pid --socket /run/disk.sock disk.qcow2
  vimg serve --listen :10809 --tls-dir /etc/pki/nbd --tls-verify-peer disk.qcow2

Whoever can connect can read the disk, and write it without --read-only or --overlay: give a socket in a folder of your
own, or TLS with --tls-verify-peer, to those who may.")]
pub(crate) struct Args {
    /// Format of the images (default: found out from their contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Listen on this Unix socket
    #[arg(short = 'k', long, value_name = "PATH", conflicts_with_all = ["listen", "stdio"])]
    socket: Option<PathBuf>,
    /// Permissions of the Unix socket, in octal (default: what the umask leaves)
    #[arg(long, value_name = "MODE", requires = "socket")]
    socket_mode: Option<String>,
    /// Listen on this address: HOST:PORT, [V6]:PORT, or :PORT for every address of the machine; port 0 is any free one
    /// (repeatable) [default: localhost:10809]
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "stdio")]
    listen: Vec<String>,
    /// Serve one client on standard input and output
    #[arg(long)]
    stdio: bool,
    /// The export's name, if there is one image
    #[arg(short = 'x', long, value_name = "NAME")]
    export: Option<String>,
    /// A description for people who list the exports
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    description: String,
    /// Refuse writes, and open the images for reading only
    #[arg(short, long)]
    read_only: bool,
    /// Keep what clients write in a temporary file that vanishes; the images stay as they are
    #[arg(long, conflicts_with = "read_only")]
    overlay: bool,
    /// Show the image as it was when this internal snapshot was taken (read-only, unless with --overlay)
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Show the part of the disk that begins here
    #[arg(short, long, value_name = "N", conflicts_with = "partition")]
    offset: Option<String>,
    /// Show so many bytes [default: up to the end]
    #[arg(long, value_name = "N", conflicts_with = "partition")]
    length: Option<String>,
    /// Show this partition only, numbered as by Linux
    #[arg(short = 'P', long, value_name = "N")]
    partition: Option<u32>,
    /// Offer a persistent dirty bitmap as qemu:dirty-bitmap:NAME (repeatable)
    #[arg(short = 'B', long, value_name = "NAME")]
    bitmap: Vec<String>,
    /// Offer qemu:allocation-depth: which image of a chain each byte comes from
    #[arg(short = 'A', long)]
    allocation_depth: bool,
    /// Let clients change the size of the disk (the resize extension)
    #[arg(long)]
    resizable: bool,
    /// Folder with ca-cert.pem, server-cert.pem and server-key.pem: require TLS
    #[arg(long, value_name = "DIR", conflicts_with = "tls_psk")]
    tls_dir: Option<PathBuf>,
    /// Require that clients show a certificate of the same authority
    #[arg(long, requires = "tls_dir")]
    tls_verify_peer: bool,
    /// File with the keys of clients, NAME:HEXADECIMAL a line (psktool makes such): require TLS
    #[arg(long, value_name = "FILE")]
    tls_psk: Option<PathBuf>,
    /// Clients may do without TLS
    #[arg(long)]
    tls_optional: bool,
    /// Clients at once; others wait
    #[arg(short = 'e', long, value_name = "N", default_value_t = 100)]
    max_clients: usize,
    /// How long a client may take to choose an export, in seconds; 0: for ever
    #[arg(long, value_name = "S", default_value_t = 10)]
    handshake_timeout: u64,
    /// End when the last client that has chosen an export leaves
    #[arg(long)]
    once: bool,
    /// Go into the background once the server is ready
    #[arg(long, conflicts_with = "stdio")]
    fork: bool,
    /// Write the number of the server's process here once it is ready; removed in the end
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Cache mode of the images: none, writeback, unsafe, directsync, writethrough
    #[arg(long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// threads, native (only with --cache none or directsync) or io_uring: all mean the server's threads
    #[arg(long, value_name = "AIO", default_value = "threads")]
    aio: String,
    /// What becomes of discards: ignore or unmap
    #[arg(long, value_name = "MODE", default_value = "unmap")]
    discard: String,
    /// What becomes of zeros that clients write: off, on (space is kept) or unmap
    #[arg(long, value_name = "MODE", default_value = "off")]
    detect_zeroes: String,
    /// Requests of a client that are carried out at once
    #[arg(short, long, value_name = "N", default_value_t = 16)]
    threads: usize,
    /// Log in this form: human (with -v: everything) or json (a line for each event)
    #[arg(long, value_name = "FORM", default_value = "human")]
    log: String,
    /// Append the log to this file [default: standard error]
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Answer on this Unix socket with numbers in the text format of Prometheus
    #[arg(long, value_name = "PATH")]
    metrics: Option<PathBuf>,
    #[command(flatten)]
    source: SourceArgs,
    /// Show the image as this disk of this machine, as 'vimg nbd attach' does
    #[arg(
        short,
        long,
        value_name = "/dev/nbdN",
        value_parser = crate::cmd::nbd::device,
        conflicts_with_all = ["socket", "listen", "stdio", "once", "tls_dir", "tls_psk"],
    )]
    connect: Option<Device>,
    /// Take this disk of this machine away, as 'vimg nbd detach' does
    #[arg(short, long, value_name = "/dev/nbdN", value_parser = crate::cmd::nbd::device, exclusive = true)]
    disconnect: Option<Device>,
    /// List what another server offers, and serve nothing
    #[arg(short = 'L', long, value_name = "URI", conflicts_with = "images")]
    list: Option<String>,
    /// With --list: human or json
    #[arg(long, value_name = "OFMT", requires = "list")]
    output: Option<String>,
    /// The image; or several as NAME=IMAGE
    #[arg(required_unless_present_any = ["disconnect", "list"], value_name = "IMAGE")]
    images: Vec<String>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    if let Some(device) = args.disconnect {
        crate::cmd::nbd::detach(device, false, app)?;
        return Ok(Exit::OK);
    }
    if let Some(uri) = &args.list {
        let output = OutputFormat::parse(args.output.as_deref(), "serve", app)?;
        return list::run(uri, output, &args.objects().secrets()?, app);
    }
    carry_out(&args.plan(app)?, app)
}

impl Args {
    fn plan(&self, app: &App) -> Outcome<Plan> {
        let read_only = self.read_only || (self.snapshot.is_some() && !self.overlay);
        Ok(Plan {
            images: plan::images(&self.images, self.export.as_deref(), self.source.image_opts)?,
            description: self.description.clone(),
            format: self.format.clone(),
            served: Served { read_only, overlay: self.overlay, ..self.served(app)? },
            window: self.window()?,
            io: Io::parse(&self.cache, &self.aio, &self.discard, &self.detect_zeroes)?,
            place: self.place()?,
            authentication: self.authentication(),
            tls_optional: self.tls_optional,
            max_clients: self.max_clients.max(1),
            handshake_timeout: Some(Duration::from_secs(self.handshake_timeout)).filter(|t| !t.is_zero()),
            threads: self.threads,
            once: self.once,
            fork: self.fork,
            pid_file: self.pid_file.clone(),
            announce: true,
            logging: Logging::parse(&self.log, self.log_file.clone())?,
            metrics: self.metrics.clone(),
            force_share: self.source.force_share,
            image_opts: self.source.image_opts,
            secrets: self.objects().secrets()?,
        })
    }

    fn objects(&self) -> &ObjectArgs {
        &self.source.objects
    }

    fn served(&self, app: &App) -> Outcome<Served> {
        Ok(Served {
            snapshot: self
                .snapshot
                .as_deref()
                .map(|name| crate::snapshot::Wanted::parse(name, app))
                .transpose()?
                .map(|wanted| wanted.selector),
            bitmaps: self.bitmap.clone(),
            allocation_depth: self.allocation_depth,
            resizable: self.resizable,
            multi_conn: true,
            ..Served::default()
        })
    }

    fn window(&self) -> Outcome<Window> {
        let bytes = |text: &Option<String>, noun| {
            text.as_deref()
                .map(|text| block::size::parse_named(noun, text, 0..=i64::MAX.unsigned_abs()))
                .transpose()
        };
        if let Some(number) = self.partition {
            return Ok(Window::Partition(number));
        }
        let (offset, len) = (bytes(&self.offset, "offset")?, bytes(&self.length, "length")?);
        Ok(match (offset, len) {
            (None, None) => Window::Whole,
            (offset, len) => Window::Part { offset: offset.unwrap_or(0), len },
        })
    }

    fn place(&self) -> Outcome<Where> {
        if let Some(device) = self.connect {
            return Ok(Where::Kernel(device));
        }
        if self.stdio {
            return Ok(Where::Stdio);
        }
        if let Some(path) = &self.socket {
            let mode = self.socket_mode.as_deref().map(octal).transpose()?;
            return Ok(Where::Unix { path: path.clone(), mode });
        }
        if self.listen.is_empty() {
            return Ok(Where::Default);
        }
        Ok(Where::Tcp(self.listen.iter().map(|text| plan::address(text)).collect::<Outcome<_>>()?))
    }

    fn authentication(&self) -> Authentication {
        match (&self.tls_dir, &self.tls_psk) {
            (Some(dir), _) => Authentication::X509 { dir: dir.clone(), verify_peer: self.tls_verify_peer },
            (None, Some(file)) => Authentication::Psk { file: file.clone() },
            (None, None) => Authentication::None,
        }
    }
}

fn octal(text: &str) -> Outcome<u32> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| Failure::usage(format!("'{text}' is no mode of a file, such as 660")))
}

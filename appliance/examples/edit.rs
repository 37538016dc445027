//! Changes a raw file system by an appliance, step by step, with timings: for trying engines and kernels by hand.
//!
//! `edit ENGINE KERNEL MODULES DISK [PROGRAM ..]`, ENGINE being `kvm`, `qemu`, `uml`, whose KERNEL is the
//! program, or `mount`, which needs neither.
#![allow(clippy::print_stdout, reason = "a program for people")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use appliance::{Appliance, HostEngine, Kernel, Mount, Options, UmlEngine};
use block::file::{FileOptions, HostFile};
use block::raw::{Raw, RawOptions};
use block::{BlockDevice, Error, Result};
use bootcheck::engine::Engine;
use bootcheck::kvm::KvmEngine;
use bootcheck::qemu::{Accelerator, QemuEngine, ServeDisks};
use guestdisk::detect::detect;
use guestedit::{Attributes, GuestFs as _};
use nbd_server::server::event::Silent;
use nbd_server::server::export::{Export, ExportOptions};
use nbd_server::server::listen::Listener;
use nbd_server::server::{Config, Limits, Server};
use nbd_server::tls::Policy;

#[derive(Debug)]
struct ByNbd;

impl ServeDisks for ByNbd {
    fn serve(&self, disks: Vec<(Arc<dyn BlockDevice>, bool)>, socket: &Path) -> Result<Box<dyn Send>> {
        let export = |(index, (device, read_only)): (usize, (Arc<dyn BlockDevice>, bool))| {
            let options = ExportOptions { read_only, ..ExportOptions::default() };
            Arc::new(Export::new(format!("disk{index}"), device, options))
        };
        let mut server = Server::new(Config {
            exports: disks.into_iter().enumerate().map(export).collect(),
            tls: None,
            tls_policy: Policy::Off,
            limits: Limits::default(),
            once: false,
            log: Arc::new(Silent),
        })?;
        server.listen(Listener::unix(socket, Some(0o600))?);
        std::thread::spawn(move || server.run());
        Ok(Box::new(()))
    }
}

fn engine(name: &str, kernel: &Path) -> Result<Box<dyn Engine>> {
    match name {
        "kvm" => Ok(Box::new(KvmEngine)),
        "qemu" => Ok(Box::new(QemuEngine {
            program: "qemu-system-x86_64".into(),
            wrapper: vec![],
            accelerator: Accelerator::Tcg,
            directory: std::env::temp_dir(),
            server: Arc::new(ByNbd),
        })),
        "uml" => {
            let directories = vec!["/dev/shm".into(), std::env::temp_dir()];
            Ok(Box::new(UmlEngine { program: kernel.to_owned(), directories }))
        }
        "mount" => Ok(Box::new(HostEngine)),
        other => Err(Error::usage(format!("no engine '{other}'"))),
    }
}

fn main() -> Result<()> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [name, kernel, modules, disk, program @ ..] = &words[..] else {
        return Err(Error::usage("edit ENGINE KERNEL MODULES DISK [PROGRAM ..]"));
    };
    let begin = Instant::now();
    let step = |what: &str| println!("{:>8.3} s  {what}", begin.elapsed().as_secs_f64());
    let file = HostFile::open(Path::new(disk), &FileOptions::read_write())?;
    let device: Arc<dyn BlockDevice> = Arc::new(Raw::open(Arc::new(file), RawOptions::default())?);
    let kind = detect(&*device)?.ok_or_else(|| Error::usage("no file system"))?.kind;
    let module = if kind.name() == "ntfs" { "ntfs3" } else { kind.name() };
    let (image, modules) = (Path::new(kernel), Path::new(modules));
    let kernel = match name.as_str() {
        "uml" => Kernel::from_uml(modules, &[module])?,
        "mount" => Kernel::of_host(),
        _ => Kernel::from_host(image, modules, &[module])?,
    };
    step(&format!("{} modules", kernel.modules.len()));
    let appliance = Appliance::start(vec![device], &kernel, &*engine(name, image)?, Options::default())?;
    step(&format!("started: {} {:?}", appliance.release(), appliance.notes()));
    let mut fs = appliance.mount(&Mount::whole(0, kind))?;
    step(&format!("mounted: {:?}", fs.free()?));
    for entry in fs.list(Path::new("/"))? {
        println!("            {entry:?}");
    }
    let big: Vec<u8> = (0..20_000_000_u32).map(|value| value.to_le_bytes()[value as usize % 3]).collect();
    let path = PathBuf::from(format!("/made-{}", std::process::id()));
    fs.create(
        &path,
        &big,
        &Attributes { uid: 7, gid: 8, mtime: Some(1_000_000_000), ..Attributes::mode(0o640) },
    )?;
    step(&format!("made: {:?}", fs.stat(&path)?));
    fs.sync()?;
    step("synced");
    for _ in 0..100 {
        fs.stat(&path)?;
    }
    step("asked 100 times");
    println!("            reads back: {}", fs.read(&path, 1 << 30)? == big);
    step("read");
    if let [_, ..] = program {
        let program: Vec<_> = program.iter().map(String::as_str).collect();
        let path = ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let output = fs.run(&program, &[path], Duration::from_secs(600))?;
        step(&format!("ran: {:?} {}", output.code, String::from_utf8_lossy(&output.bytes)));
    }
    appliance.shutdown()?;
    step("off");
    Ok(())
}

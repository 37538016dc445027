//! Runs a guest by hand: `run [--probe] [--cpus N] [--mem MIB] [--mmio] [--bios FILE [--vars FILE]] [--kernel FILE]
//! [--initrd FILE] [--cmdline TEXT] [--reads] [--until TEXT] [--seconds N] [DISK...]`. Disks are raw files; what the
//! guest writes to them is lost. `--reads` shows what is read of them; `--until` stops the guest when its console shows
//! the text, `--seconds` after a time.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use block::file::{FileOptions, HostFile};
use block::{Error, Result};
use bootcheck::engine::{Boot, Control, Disk, Engine as _, MachineSpec, Observer, Transport};
use bootcheck::kvm::{KvmEngine, probe};

struct Terminal {
    start: Instant,
    reads: bool,
    until: Option<String>,
    seen: Mutex<Vec<u8>>,
    control: OnceLock<Arc<dyn Control>>,
}

impl Terminal {
    fn look_for_the_end(&self, bytes: &[u8], at: Instant) {
        let (Some(until), Ok(mut seen)) = (&self.until, self.seen.lock()) else { return };
        seen.extend(bytes);
        if seen.windows(until.len()).any(|window| window == until.as_bytes()) {
            seen.clear();
            eprintln!("\n'{until}' after {:?}", at.duration_since(self.start));
            self.control.get().inspect(|control| control.stop());
        }
    }
}

impl Observer for Terminal {
    fn console(&self, bytes: &[u8], at: Instant) {
        let _ = std::io::stdout().write_all(bytes);
        let _ = std::io::stdout().flush();
        self.look_for_the_end(bytes, at);
    }

    fn firmware_log(&self, bytes: &[u8], at: Instant) {
        let _ = std::io::stderr().write_all(format!("[{:?}] ", at.duration_since(self.start)).as_bytes());
        let _ = std::io::stderr().write_all(bytes);
    }

    fn screen(&self, rows: &[String], at: Instant) {
        eprintln!("screen after {:?}:\n{}", at.duration_since(self.start), rows.join("\n"));
    }

    fn disk_read(&self, disk: usize, sector: u64, sectors: u64, at: Instant) {
        if self.reads {
            eprintln!("disk {disk}: {sectors} from {sector} after {:?}", at.duration_since(self.start));
        }
    }

    fn started(&self, at: Instant) {
        eprintln!("first instruction after {:?}", at.duration_since(self.start));
    }
}

fn file(path: &str) -> Result<Arc<[u8]>> {
    Ok(std::fs::read(path).map_err(|e| Error::from(e).context(path))?.into())
}

fn main() -> Result<()> {
    let start = Instant::now();
    let mut spec = MachineSpec {
        cpus: 1,
        memory_bytes: 512 << 20,
        disks: vec![],
        transport: Transport::Pci,
        boot: Boot::Firmware { code: Arc::new([]), vars: None },
    };
    let (mut kernel, mut initrd, mut cmdline) = (None, None, "console=ttyS0 panic=-1 quiet".to_owned());
    let (mut bios, mut vars, mut reads, mut until) = (None, None, false, None);
    let mut seconds = 3600;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| Error::usage(format!("{arg} needs a value")));
        match arg.as_str() {
            "--probe" => {
                println!("{:?} after {:?}", probe(), start.elapsed());
                return Ok(());
            }
            "--cpus" => spec.cpus = value()?.parse().map_err(|_| Error::usage("a number of processors"))?,
            "--mem" => spec.memory_bytes = value()?.parse::<u64>().map_err(|_| Error::usage("MiB"))? << 20,
            "--mmio" => spec.transport = Transport::Mmio,
            "--bios" => bios = Some(file(&value()?)?),
            "--vars" => vars = Some(file(&value()?)?),
            "--kernel" => kernel = Some(file(&value()?)?),
            "--initrd" => initrd = Some(file(&value()?)?),
            "--cmdline" => cmdline = value()?,
            "--reads" => reads = true,
            "--seconds" => seconds = value()?.parse().map_err(|_| Error::usage("a number of seconds"))?,
            "--until" => until = Some(value()?),
            path => spec.disks.push(disk(path)?),
        }
    }
    let before = vars.clone();
    if let Some(code) = bios {
        spec.boot = Boot::Firmware { code, vars };
    }
    if let Some(kernel) = kernel {
        spec.boot = Boot::Linux { kernel, initrd, cmdline };
    }
    let terminal =
        Arc::new(Terminal { start, reads, until, seen: Mutex::default(), control: OnceLock::new() });
    let machine = KvmEngine.build(spec, Arc::clone(&terminal) as _)?;
    let _ = terminal.control.set(machine.control());
    eprintln!("built after {:?}", start.elapsed());
    let control = machine.control();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(seconds));
        control.stop();
    });
    let mut outcome = machine.run()?;
    let elapsed = start.elapsed();
    if let (Some(before), Some(after)) = (before, outcome.vars.take()) {
        let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        eprintln!("{changed} bytes of {} of the variable store have changed", after.len());
    }
    eprintln!("{outcome:#?}\nafter {elapsed:?}");
    Ok(())
}

/// A raw file, the changes to which stay in memory.
fn disk(path: &str) -> Result<Disk> {
    let file = Arc::new(HostFile::open(Path::new(path), &FileOptions::read_only())?);
    let raw = Arc::new(block::raw::Raw::open(file, block::raw::RawOptions::default())?);
    let device = bootcheck::scratch::in_memory(raw, 1 << 30)?;
    Ok(Disk { device, read_only: false, serial: "example".to_owned() })
}

//! Runs a guest by hand: `run [--probe] [--cpus N] [--mem MIB] [--mmio] [--bios FILE] [--kernel FILE] [--initrd FILE]
//! [--cmdline TEXT] [DISK...]`. Disks are raw files; what the guest writes to them is lost.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::io::Write as _;
use std::sync::Arc;
use std::time::Instant;

use block::{Error, Result};
use bootcheck::engine::{Boot, Disk, Engine as _, MachineSpec, Observer, Transport};
use bootcheck::kvm::{KvmEngine, probe};

struct Terminal(Instant);

impl Observer for Terminal {
    fn console(&self, bytes: &[u8], _at: Instant) {
        let _ = std::io::stdout().write_all(bytes);
        let _ = std::io::stdout().flush();
    }

    fn firmware_log(&self, bytes: &[u8], _at: Instant) {
        let _ = std::io::stderr().write_all(bytes);
    }

    fn started(&self, at: Instant) {
        eprintln!("first instruction after {:?}", at.duration_since(self.0));
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
            "--bios" => spec.boot = Boot::Firmware { code: file(&value()?)?, vars: None },
            "--kernel" => kernel = Some(file(&value()?)?),
            "--initrd" => initrd = Some(file(&value()?)?),
            "--cmdline" => cmdline = value()?,
            path => spec.disks.push(disk(path)?),
        }
    }
    if let Some(kernel) = kernel {
        spec.boot = Boot::Linux { kernel, initrd, cmdline };
    }
    let machine = KvmEngine.build(spec, Arc::new(Terminal(start)))?;
    eprintln!("built after {:?}", start.elapsed());
    let outcome = machine.run()?;
    eprintln!("{outcome:#?}\nafter {:?}", start.elapsed());
    Ok(())
}

/// A raw file, the changes to which stay in memory.
fn disk(path: &str) -> Result<Disk> {
    let storage = Arc::new(block::mem::MemStorage::from_bytes(file(path)?.to_vec()));
    let device = Arc::new(block::raw::Raw::open(storage, block::raw::RawOptions::default())?);
    Ok(Disk { device, read_only: false, serial: "example".to_owned() })
}

//! From nothing to a machine that can serve.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::mailbox::Mailbox;
use crate::wire::{self, CONFIG_PATH, MAILBOX_SERIAL};
use crate::{during, sys};

/// The disks have to be there within this time.
const DISKS_LIMIT: Duration = Duration::from_secs(60);
const NAP: Duration = Duration::from_millis(5);

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The serial line.
    pub(crate) line: File,
    pub(crate) mailbox: Mailbox,
    /// Names of the disks in their order, as /sys/class/block has them.
    pub(crate) disks: Vec<String>,
    /// What did not work.
    pub(crate) notes: Vec<String>,
    /// File systems are mounted below this.
    pub(crate) base: PathBuf,
    /// It is nobody's machine but the host.
    pub(crate) on_host: bool,
    /// What is kept open for as long.
    #[allow(dead_code, reason = "it is only kept")]
    pub(crate) held: Vec<File>,
}

/// What the initramfs says.
#[derive(Debug, Default)]
struct Config {
    line: String,
    disks: usize,
    modules: Vec<(String, String)>,
}

impl Config {
    /// `line NAME`, `disks COUNT`, `module FILE PARAMETERS`.
    fn parse(text: &str) -> Result<Self> {
        let mut config = Self::default();
        for line in text.lines() {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "line" => rest.clone_into(&mut config.line),
                "disks" => config.disks = rest.parse().map_err(Error::other)?,
                "module" => {
                    let (file, parameters) = rest.split_once(' ').unwrap_or((rest, ""));
                    config.modules.push((file.to_owned(), parameters.to_owned()));
                }
                _ => {
                    return Err(Error::new(ErrorKind::InvalidData, format!("'{line}' in {CONFIG_PATH}")));
                }
            }
        }
        Ok(config)
    }
}

/// Makes the machine ready.
pub(crate) fn start() -> Result<Machine> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target)?;
        sys::mount_at(kind, Path::new(target), kind, sys::MS_NOSUID | sys::MS_NOEXEC, "")
            .map_err(during(format_args!("mount {target}")))?;
    }
    let text = fs::read_to_string(Path::new("/").join(CONFIG_PATH)).map_err(during(CONFIG_PATH))?;
    let config = Config::parse(&text)?;
    let mut notes = load_modules(&config.modules);
    let (mailbox, disks) = match find_disks(config.disks) {
        Ok(found) => found,
        // Without its modules it could not find them.
        Err(error) => return Err(Error::other(format!("{error} ({})", notes.join("; ")))),
    };
    let mailbox = Mailbox::open(&device(&mailbox)).map_err(during("the mailbox"))?;
    let line = open_line(&config.line).map_err(during(&config.line))?;
    if let Err(error) = sys::console_level(1) {
        notes.push(format!("the kernel goes on talking: {error}"));
    }
    Ok(Machine { line, mailbox, disks, notes, base: "/mounted".into(), on_host: false, held: vec![] })
}

/// Loads the modules in their order. One that cannot be loaded may not be needed (a driver of an instruction that
/// this processor lacks): what needs it will fail, and the notes say why.
fn load_modules(modules: &[(String, String)]) -> Vec<String> {
    let mut notes = vec![];
    for (file, parameters) in modules {
        let path = Path::new("/modules").join(file);
        let loaded = File::open(&path).and_then(|file| sys::load_module(&file, parameters));
        match loaded {
            Err(error) if error.raw_os_error() != Some(sys::EEXIST) => {
                notes.push(format!("module {file}: {error}"));
            }
            _ => {}
        }
        // Its memory is needed elsewhere.
        drop(fs::remove_file(&path));
    }
    notes
}

/// The names of the mailbox and of the disks, once all of them are there.
fn find_disks(count: usize) -> Result<(String, Vec<String>)> {
    let deadline = Instant::now() + DISKS_LIMIT;
    loop {
        let by_serial = |serial: &str| -> Option<String> {
            fs::read_dir("/sys/class/block").ok()?.flatten().find_map(|entry| {
                let found = fs::read_to_string(entry.path().join("serial")).ok()?;
                (found.trim() == serial).then(|| entry.file_name().to_string_lossy().into_owned())
            })
        };
        let disks: Option<Vec<_>> = (0..count).map(|index| by_serial(&wire::disk_serial(index))).collect();
        if let (Some(mailbox), Some(disks)) = (by_serial(MAILBOX_SERIAL), disks) {
            return Ok((mailbox, disks));
        }
        if Instant::now() > deadline {
            return Err(Error::new(ErrorKind::NotFound, "the disks do not appear"));
        }
        std::thread::sleep(NAP);
    }
}

/// The device file of a disk or partition.
pub(crate) fn device(name: &str) -> PathBuf {
    Path::new("/dev").join(name)
}

fn open_line(name: &str) -> Result<File> {
    let line = OpenOptions::new().read(true).write(true).custom_flags(sys::O_NOCTTY).open(device(name))?;
    sys::make_raw(&line)?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_read() {
        let config = Config::parse("line ttyS0\ndisks 2\nmodule a.ko\nmodule b.ko x=1 y=2\n").unwrap();
        assert_eq!((config.line.as_str(), config.disks), ("ttyS0", 2));
        assert_eq!(config.modules[1], ("b.ko".to_owned(), "x=1 y=2".to_owned()));
        Config::parse("disks x").unwrap_err();
        Config::parse("other").unwrap_err();
    }
}

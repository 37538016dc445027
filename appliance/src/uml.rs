//! The engine for machines without KVM: a User-Mode Linux, a kernel that is a program (Debian: user-mode-linux).
//!
//! ```text
//!   this process                                               linux.uml, below our init as its guard
//!     Blk  <-- vhost-user: messages, its memory, kicks -->  virtio_uml, virtio_blk
//!     observer, Control  <-- a pair of sockets ---------->  serial line (ssl0)
//!     folder: sockets, initramfs                            removed as soon as every disk is in use
//! ```
//!
//! Its memory is a file that has no name, in the same folder. No disk is a file for it, it has no network, and it is
//! confined (`confine`), but it runs as its user, not in a machine: `docs/appliance.md` says what that means.

mod confine;
mod first_use;
mod run;

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc;

use block::{Error, Result, ResultExt as _};
use bootcheck::engine::{Boot, Engine, MachineSpec, Observer, Runnable};
use bootcheck::folder::Folder;
use bootcheck::virtio::blk::Blk;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};

use run::{Machine, Parts};

const INITRD: &str = "initrd";
/// Number of a block device (virtio 1.2, section 5.2.1).
const BLOCK_DEVICE: u32 = 2;
/// The longest path of a Unix socket, with the file's own name.
const MOST_PATH: usize = 90;

/// An installed User-Mode Linux. It boots [`Kernel::from_uml`](crate::Kernel::from_uml) and nothing else.
#[derive(Debug, Clone)]
pub struct UmlEngine {
    /// The program.
    pub program: PathBuf,
    /// Where a private folder may be made, in which its memory lies, too: the first with enough room, those in memory
    /// (tmpfs) before others.
    pub directories: Vec<PathBuf>,
}

impl UmlEngine {
    /// The release of the kernel that the program is.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn release(&self) -> Result<String> {
        let what = || format!("could not run '{}'", self.program.display());
        let said = Command::new(&self.program).arg("--version").env_clear().output().context(what)?;
        let release = String::from_utf8_lossy(&said.stdout).trim().to_owned();
        let is_one = said.status.success() && release.starts_with(|c: char| c.is_ascii_digit());
        if !is_one || release.contains(['/', ' ', '\n']) {
            return Err(Error::unsupported(format!("'{}' is no User-Mode Linux", self.program.display())));
        }
        Ok(release)
    }

    /// Whether one with so many bytes of memory finds a place for it.
    ///
    /// # Errors
    /// `Unsupported`, with what is in the way of each folder.
    pub fn check_room(&self, memory_bytes: u64) -> Result<()> {
        roomy(&self.directories, memory_bytes).map(drop)
    }
}

impl Engine for UmlEngine {
    fn name(&self) -> &'static str {
        "uml"
    }

    fn build(&self, spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>> {
        let Boot::Linux { kernel, initrd: Some(initrd), cmdline } = &spec.boot else {
            return Err(Error::usage("a User-Mode Linux is started with an initramfs"));
        };
        if !kernel.is_empty() {
            return Err(Error::usage("a User-Mode Linux brings its own kernel"));
        }
        let directory = roomy(&self.directories, spec.memory_bytes + initrd.len() as u64)?;
        let folder = Folder::new(directory, "uml")?;
        let path = folder.file(INITRD);
        std::fs::write(&path, initrd).context(|| format!("could not write '{}'", path.display()))?;
        let listen = |index| {
            let path = socket(folder.path(), index);
            UnixListener::bind(&path).context(|| format!("the socket '{}'", path.display()))
        };
        let listeners = (0..spec.disks.len()).map(listen).collect::<Result<Vec<_>>>()?;
        let args = args(folder.path(), &spec, cmdline);
        let (sender, events) = mpsc::channel();
        let disks = spec.disks.into_iter().map(|disk| Arc::new(Blk::new(disk, 1))).collect();
        let machine = Machine::new(Parts {
            program: self.program.clone(),
            args,
            folder,
            listeners,
            disks,
            observer,
            sender,
            events,
        })?;
        Ok(Box::new(machine))
    }
}

fn socket(folder: &Path, index: usize) -> PathBuf {
    folder.join(format!("disk{index}"))
}

fn args(folder: &Path, spec: &MachineSpec, cmdline: &str) -> Vec<OsString> {
    let with_path = |word: &str, path: &Path, rest: &str| {
        let mut word = OsString::from(word);
        word.push(path);
        word.push(rest);
        word
    };
    let mut args = vec![
        format!("mem={}M", spec.memory_bytes >> 20).into(),
        with_path("initrd=", &folder.join(INITRD), ""),
        with_path("uml_dir=", folder, "/"),
        "con=null".into(),
        "ssl=null".into(),
        "ssl0=fd:0".into(),
    ];
    for index in 0..spec.disks.len() {
        let rest = format!(":{BLOCK_DEVICE}:{index}");
        args.push(with_path("virtio_uml.device=", &socket(folder, index), &rest));
    }
    args.extend(cmdline.split_whitespace().map(OsString::from));
    args
}

/// The first of the directories in which a User-Mode Linux can have `needed` bytes of memory.
fn roomy(directories: &[PathBuf], needed: u64) -> Result<&Path> {
    let mut why = vec![];
    let in_memory = |path: &Path| statfs(path).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC);
    let (first, then): (Vec<_>, Vec<_>) = directories.iter().partition(|path| in_memory(path));
    for directory in first.into_iter().chain(then) {
        match unfit(directory, needed) {
            None => return Ok(directory),
            Some(reason) => why.push(format!("{} {reason}", directory.display())),
        }
    }
    let text = format!(
        "there is no folder for the memory of a User-Mode Linux, {} MiB: {}",
        needed >> 20,
        why.join(", ")
    );
    Err(Error::unsupported(text).hint("name one by TMPDIR, best on a tmpfs that allows programs"))
}

/// Why a directory cannot hold its memory.
fn unfit(directory: &Path, needed: u64) -> Option<String> {
    if directory.as_os_str().len() > MOST_PATH || directory.to_string_lossy().contains([' ', ':', ',']) {
        return Some("has a name that a socket in it cannot have".to_owned());
    }
    let space = match statvfs(directory) {
        Ok(space) => space,
        Err(error) => return Some(format!("cannot be used ({})", error.desc())),
    };
    if space.flags().contains(FsFlags::ST_NOEXEC) {
        return Some("is mounted without programs".to_owned());
    }
    let free = space.blocks_available().saturating_mul(space.fragment_size());
    // A tmpfs without a limit has no blocks at all.
    (space.blocks() > 0 && free < needed).then(|| format!("has only {} MiB", free >> 20))
}

#[cfg(test)]
mod tests;

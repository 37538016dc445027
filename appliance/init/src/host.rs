//! The same program on the host, as root: the host's kernel mounts the disks, which are files here, through loop
//! devices. It runs in a mount namespace that nobody else sees and that ends with it.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use crate::mailbox::Mailbox;
use crate::start::Machine;
use crate::{during, sys};

/// Makes everything ready: `words` are the number of disks with the mailbox, the folder of their files, and that of
/// the mounts.
pub(crate) fn start(words: &[String]) -> Result<Machine> {
    let [count, files, base] = words else {
        return Err(Error::new(ErrorKind::InvalidInput, "a number and two folders are expected"));
    };
    let mailbox = count.parse::<usize>().ok().and_then(|count| count.checked_sub(1));
    let mailbox = mailbox.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "no mailbox"))?;
    let file = |index: usize| Path::new(files).join(format!("disk{index}"));
    let (mut disks, mut held) = (vec![], vec![]);
    for index in 0..mailbox {
        let (name, device) =
            attach(&file(index)).map_err(during(format_args!("a loop device for disk {index}")))?;
        disks.push(name);
        held.push(device);
    }
    Ok(Machine {
        line: File::from(std::io::stdin().as_fd().try_clone_to_owned()?),
        mailbox: Mailbox::open(&file(mailbox)).map_err(during("the mailbox"))?,
        disks,
        notes: vec![],
        base: PathBuf::from(base),
        on_host: true,
        held,
    })
}

/// A loop device over a file, which goes when it is closed. Its name, and the device.
fn attach(path: &Path) -> Result<(String, File)> {
    let writable = OpenOptions::new().read(true).write(true).open(path);
    match writable {
        Ok(file) => sys::attach_loop(&file, false),
        Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {
            sys::attach_loop(&File::open(path)?, true)
        }
        Err(error) => Err(error),
    }
}

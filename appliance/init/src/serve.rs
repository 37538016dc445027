//! Requests in, answers out, one after the other.

use std::fs;
use std::io::{Error, ErrorKind, Read as _, Result, Write as _};

use crate::mounted::Mounted;
use crate::start::{Machine, device};
use crate::wire::{
    Action, Bell, Failure, Hello, Message as _, MountRequest, Number, Request, Scanner, VERSION, WINDOW,
    crc32,
};
use crate::{during, sys};

/// An answer's payload, or why there is none.
pub(crate) type Answer = std::result::Result<Vec<u8>, Failure>;

/// The answer without contents.
pub(crate) const DONE: Vec<u8> = vec![];

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let errno = crate::errno(&error).unwrap_or_else(|| match error.kind() {
            ErrorKind::NotFound => sys::ENOENT,
            ErrorKind::InvalidInput => sys::EINVAL,
            _ => 0,
        });
        let errno = u32::try_from(errno).unwrap_or(0);
        let message = error.to_string();
        let message = message.split(" (os error ").next().unwrap_or(&message).to_owned();
        Self { errno, message }
    }
}

/// Serves until the machine is to be switched off.
pub(crate) fn serve(mut machine: Machine) -> Result<Machine> {
    let mut server = Server { mounts: vec![], off: false };
    let mut scanner = Scanner::default();
    let mut buffer = [0; 512];
    // Whoever rings before this is not heard.
    machine
        .line
        .write_all(&Bell { id: 0, status: 0, len: 0, crc: crc32(&[]) }.encode())
        .map_err(during("the line"))?;
    loop {
        let count = machine.line.read(&mut buffer).map_err(during("the line"))?;
        if count == 0 {
            // Nobody is left to be told.
            drop(server.unmount_all());
            return Err(Error::new(ErrorKind::UnexpectedEof, "the line was hung up"));
        }
        let mut bells = vec![];
        scanner.push(&buffer[..count], |bell| bells.push(bell), |_| ());
        for bell in bells {
            let answer = read(&machine, bell).and_then(|request| server.handle(&machine, request));
            reply(&mut machine, bell.id, answer)?;
            if server.off {
                return Ok(machine);
            }
        }
    }
}

fn read(machine: &Machine, bell: Bell) -> std::result::Result<Request, Failure> {
    let len = usize::try_from(bell.len).map_err(Error::other)?;
    let payload = machine.mailbox.read(len).map_err(during("the mailbox"))?;
    if crc32(&payload) != bell.crc {
        return Err(Error::new(ErrorKind::InvalidData, "a request that was damaged on its way").into());
    }
    Ok(Request::decode(&payload).map_err(Error::other)?)
}

fn reply(machine: &mut Machine, id: u32, answer: Answer) -> Result<()> {
    let (status, payload) = match answer {
        Ok(payload) => (0, payload),
        Err(failure) => (1, failure.encode()),
    };
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let bell = if len > WINDOW {
        let failure = Failure { errno: 0, message: format!("an answer of {} bytes", payload.len()) }.encode();
        machine.mailbox.write(&failure)?;
        Bell { id, status: 1, len: u32::try_from(failure.len()).unwrap_or(0), crc: crc32(&failure) }
    } else {
        machine.mailbox.write(&payload).map_err(during("the mailbox"))?;
        Bell { id, status, len, crc: crc32(&payload) }
    };
    machine.line.write_all(&bell.encode()).map_err(during("the line"))
}

struct Server {
    mounts: Vec<Option<Mounted>>,
    off: bool,
}

impl Server {
    fn handle(&mut self, machine: &Machine, request: Request) -> Answer {
        match request {
            Request::Hello => hello(machine),
            Request::Mount(request) => self.mount(machine, &request),
            Request::Unmount { mount } => {
                let mounted =
                    usize::try_from(mount).ok().and_then(|mount| self.mounts.get_mut(mount)?.take());
                mounted.ok_or_else(none)?.unmount()?;
                Ok(DONE)
            }
            Request::Act { action: Action::Run { .. }, .. } if machine.on_host => {
                let message = "a guest's programs are not run on the host".to_owned();
                Err(Failure { errno: sys::EPERM, message })
            }
            Request::Act { mount, path, action } => {
                let mounted = usize::try_from(mount).ok().and_then(|mount| self.mounts.get(mount)?.as_ref());
                mounted.ok_or_else(none)?.act(path, action)
            }
            Request::PowerOff => {
                self.off = true;
                self.unmount_all()?;
                Ok(DONE)
            }
        }
    }

    /// Lets all file systems go, the last one first; the first failure.
    fn unmount_all(&mut self) -> Result<()> {
        let results: Vec<_> = self.mounts.drain(..).flatten().rev().map(Mounted::unmount).collect();
        results.into_iter().collect()
    }

    fn mount(&mut self, machine: &Machine, request: &MountRequest) -> Answer {
        let disk = usize::try_from(request.disk).ok().and_then(|disk| machine.disks.get(disk));
        let disk = disk.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such disk"))?;
        let name = match request.partition {
            0 => disk.clone(),
            number => partition(disk, number)?,
        };
        let number = self.mounts.len();
        let point = machine.base.join(number.to_string());
        let mut request = request.clone();
        if machine.on_host {
            request.options = on_host(&request.kind, request.options);
        }
        self.mounts.push(Some(Mounted::mount(&device(&name), point, &request)?));
        Ok(Number(number as u64).encode())
    }
}

/// The options with what else this host needs for a file system that is not its own.
fn on_host(kind: &str, options: String) -> String {
    let more = match kind {
        // It may be a copy of one that is mounted here.
        "xfs" => "nouuid",
        // What a superblock says is to be done about damage may be a panic, which would be the host's. The last one counts.
        "ext2" | "ext3" | "ext4" => "errors=remount-ro",
        _ => return options,
    };
    if options.is_empty() { more.to_owned() } else { format!("{options},{more}") }
}

fn none() -> Error {
    Error::new(ErrorKind::NotFound, "no such mounted file system")
}

/// The name of a partition.
fn partition(disk: &str, number: u32) -> Result<String> {
    let folder = format!("/sys/class/block/{disk}");
    let found = fs::read_dir(&folder)?.flatten().find(|entry| {
        let own = fs::read_to_string(entry.path().join("partition")).unwrap_or_default();
        own.trim().parse() == Ok(number)
    });
    let missing = || Error::new(ErrorKind::NotFound, format!("{disk} has no partition {number}"));
    Ok(found.ok_or_else(missing)?.file_name().to_string_lossy().into_owned())
}

fn hello(machine: &Machine) -> Answer {
    let size = |name: &String| -> u64 {
        let sectors = fs::read_to_string(format!("/sys/class/block/{name}/size")).unwrap_or_default();
        sectors.trim().parse::<u64>().unwrap_or(0).saturating_mul(512)
    };
    let disks = machine.disks.iter().enumerate().map(|(index, name)| (index as u64, size(name))).collect();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let known = fs::read_to_string("/proc/filesystems")?;
    let file_systems = known.lines().filter_map(|line| line.split('\t').nth(1)).map(str::to_owned).collect();
    let notes = machine.notes.clone();
    Ok(Hello { version: VERSION, release, disks, file_systems, notes }.encode())
}

#[cfg(test)]
mod tests {
    use super::on_host;

    #[test]
    fn damage_of_a_guest_is_no_panic_of_its_host() {
        let options = |kind: &str, own: &str| on_host(kind, own.to_owned());
        for kind in ["ext2", "ext3", "ext4"] {
            assert_eq!(options(kind, ""), "errors=remount-ro");
            assert_eq!(options(kind, "errors=panic"), "errors=panic,errors=remount-ro");
        }
        assert_eq!(options("xfs", "norecovery"), "norecovery,nouuid");
        assert_eq!(options("btrfs", "subvol=@"), "subvol=@");
    }
}

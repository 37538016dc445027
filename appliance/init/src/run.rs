//! Runs a program of the guest in the guest's own file system, which is this thread's root.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{Error, ErrorKind, PipeReader, Result};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::wire::Ran;
use crate::{during, sys};

/// Bytes of the output's beginning that are kept, and as many of its end.
const KEPT: usize = 64 << 10;
const NAP: Duration = Duration::from_millis(10);

/// What a program expects to find.
const SERVICES: [(&str, &str); 4] =
    [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run")];

/// Runs a program, for `limit` at the most.
pub(crate) fn run(words: &[Vec<u8>], environment: &[(Vec<u8>, Vec<u8>)], limit: Duration) -> Result<Ran> {
    let [program, arguments @ ..] = words else {
        return Err(Error::new(ErrorKind::InvalidInput, "no program"));
    };
    // What was mounted for a stranger's data is to run a stranger's programs now; they were asked for.
    let root = Path::new("/");
    sys::mount_at("", root, "", sys::MS_REMOUNT | sys::MS_NODEV, "").map_err(during("remount"))?;
    let mounted: Vec<_> = SERVICES
        .iter()
        .filter(|(kind, target)| sys::mount_at(kind, Path::new(target), kind, sys::MS_NOSUID, "").is_ok())
        .collect();
    let result =
        start(program, arguments, environment).and_then(|(child, output)| follow(child, output, limit));
    // Whatever it has left behind.
    sys::end_processes(-1);
    for (_, target) in mounted.iter().rev() {
        // It may be busy for a moment more: it is out of sight either way.
        drop(sys::unmount(Path::new(target), sys::MNT_DETACH));
    }
    let flags = sys::MS_REMOUNT | sys::MS_NODEV | sys::MS_NOSUID | sys::MS_NOEXEC;
    sys::mount_at("", root, "", flags, "").map_err(during("remount"))?;
    result
}

fn start(
    program: &[u8],
    arguments: &[Vec<u8>],
    environment: &[(Vec<u8>, Vec<u8>)],
) -> Result<(Child, PipeReader)> {
    let (output, input) = std::io::pipe()?;
    let mut command = Command::new(OsStr::from_bytes(program));
    command.args(arguments.iter().map(|word| OsStr::from_bytes(word)));
    command.env_clear();
    command.envs(environment.iter().map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))));
    command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input).process_group(0);
    let child = command.spawn().map_err(during(String::from_utf8_lossy(program)))?;
    Ok((child, output))
}

fn follow(mut child: Child, output: PipeReader, limit: Duration) -> Result<Ran> {
    let reader = std::thread::spawn(move || gather(output));
    let deadline = Instant::now().checked_add(limit);
    let mut timed_out = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if !timed_out && deadline.is_some_and(|deadline| Instant::now() > deadline) {
            timed_out = true;
            sys::end_processes(i32::try_from(child.id()).map_err(Error::other)?);
        }
        std::thread::sleep(NAP);
    };
    // A daemon that it has started may hold the pipe.
    sys::end_processes(-1);
    let output = reader.join().unwrap_or_default();
    Ok(Ran { code: status.code().and_then(|code| u32::try_from(code).ok()), timed_out, output })
}

/// The beginning and the end of what is printed.
fn gather(mut output: impl std::io::Read) -> Vec<u8> {
    let (mut first, mut last, mut lost) = (vec![], VecDeque::<u8>::new(), false);
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        let (head, tail) = buffer[..count].split_at(count.min(KEPT - first.len()));
        first.extend(head);
        last.extend(tail);
        if last.len() > KEPT {
            lost = true;
            last.drain(..last.len() - KEPT);
        }
    }
    if lost {
        first.extend(b"\n[...]\n");
    }
    first.extend(last);
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_output_keeps_both_ends() {
        assert_eq!(gather(&b"short"[..]), b"short");
        let mut long = vec![b'a'; KEPT];
        long.extend(vec![b'b'; 100]);
        long.extend(vec![b'c'; KEPT]);
        let kept = gather(&long[..]);
        assert_eq!(kept.len(), 2 * KEPT + 7);
        assert!(kept.starts_with(b"aa") && kept.ends_with(b"cc") && !kept.contains(&b'b'));
    }
}

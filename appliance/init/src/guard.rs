//! The same program in another part, on the host: it runs a User-Mode Linux, which is several processes, and ends all
//! of them when the appliance's owner goes, however that happens.
//!
//! Standard input is the serial line, one end of a pair of sockets. When the other end is closed the owner is gone.
//! What a process leaves behind becomes a child of this one (`PR_SET_CHILD_SUBREAPER`).

use std::fs;
use std::io::{Error, Result};
use std::process::Command;

use crate::sys;

/// Runs the program that `words` name until it ends or the line is hung up, and then ends whatever it has started.
/// Its exit code, or 128 and the number of the signal that ended it.
pub(crate) fn guard(words: &[String]) -> Result<i32> {
    let (program, rest) = words.split_first().ok_or_else(|| Error::from_raw_os_error(sys::EINVAL))?;
    sys::adopt_orphans()?;
    let mut command = Command::new(program);
    command.args(rest);
    sys::end_with_parent(&mut command);
    let first = i32::try_from(command.spawn()?.id()).map_err(Error::other)?;
    std::thread::Builder::new().spawn(move || {
        sys::wait_for_hangup(0);
        sys::end_process(first);
    })?;
    let mut code = None;
    while let Some((process, ended)) = sys::wait_for_any() {
        if process == first {
            code = Some(ended);
            sys::end_processes(first);
        }
        if code.is_some() {
            // What has left its group; and what that has started in the meantime, when this comes again.
            children().into_iter().for_each(sys::end_process);
        }
    }
    Ok(code.unwrap_or(1))
}

/// This process's children.
fn children() -> Vec<i32> {
    let own = std::process::id();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers.filter(|number| parent_of(*number) == Some(own)).collect()
}

/// The second field after the name, which is in parentheses and may be anything.
fn parent_of(process: i32) -> Option<u32> {
    let stat = fs::read(format!("/proc/{process}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_found() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let number = i32::try_from(child.id()).unwrap();
        assert!(children().contains(&number));
        assert_eq!(parent_of(number), Some(std::process::id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!children().contains(&number));
    }
}

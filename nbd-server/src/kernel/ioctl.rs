//! nbd by ioctl, as before netlink: whoever connects a device has a thread inside the kernel until it is disconnected.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::thread::JoinHandle;

use block::{Error, ErrorKind, Result, ResultExt as _};
use nix::errno::Errno;

use super::family::in_use;
use super::{Device, Setup, Status, list, status, sys};
use crate::proto::transmission;

/// A device that works as long as its thread.
#[derive(Debug)]
pub struct Loop {
    device: Device,
    thread: JoinHandle<Result<()>>,
}

impl Loop {
    /// Which.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It has ended because its connection died.
    pub fn wait(self) -> Result<()> {
        let ended = self.thread.join();
        ended.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Io, format!("the thread of {} has failed", self.device)))
        })
    }
}

/// Connects `device`, or the first that looks free.
pub(super) fn start(device: Option<Device>, setup: &Setup, sockets: Vec<OwnedFd>) -> Result<Loop> {
    let device = match device {
        Some(device) => device,
        None => first_free()?,
    };
    let nbd = open(device)?;
    if status(device).is_some_and(|status| status.connected()) {
        return Err(in_use(device));
    }
    configure(&nbd, device, setup, &sockets).inspect_err(|_| {
        // What has been handed over is given back; the error that matters is the first.
        let _ = sys::clear(&nbd);
    })?;
    let thread = std::thread::Builder::new().name(device.name()).spawn(move || {
        let ended = sys::do_it(&nbd);
        drop(sockets);
        // So that the device can be used again, however it ended.
        let _ = sys::clear(&nbd);
        ended.context(|| format!("{device} has lost its connection"))
    });
    Ok(Loop { device, thread: thread? })
}

fn first_free() -> Result<Device> {
    let free = list().into_iter().find(|status: &Status| !status.connected());
    let free = free.ok_or_else(|| Error::new(ErrorKind::Locked, "all nbd devices are in use"));
    Ok(free.map_err(|error| error.hint("'vimg nbd list' shows by whom"))?.device)
}

fn configure(nbd: &File, device: Device, setup: &Setup, sockets: &[OwnedFd]) -> Result<()> {
    for socket in sockets {
        sys::set_socket(nbd, socket.as_fd()).map_err(|errno| match errno {
            Errno::EBUSY => in_use(device),
            errno => Error::from(errno).context(format!("connecting {device}")),
        })?;
    }
    let step = |what: &'static str| move || format!("connecting {device}: {what}");
    let blocks = setup.size / u64::from(setup.block_size);
    sys::set_size(nbd, setup.block_size, blocks).context(step("its size"))?;
    sys::set_flags(nbd, setup.flags).context(step("its flags"))?;
    if let Some(timeout) = setup.timeout {
        let seconds = timeout.as_secs().max(1).try_into().unwrap_or(u32::MAX >> 1);
        sys::set_timeout(nbd, seconds).context(step("its timeout"))?;
    }
    if setup.flags & transmission::READ_ONLY != 0 {
        sys::set_read_only(nbd).context(step("read-only"))?;
    }
    Ok(())
}

/// Disconnects a device that whoever has connected it.
pub(super) fn disconnect(device: Device) -> Result<()> {
    let nbd = open(device)?;
    sys::disconnect(&nbd).context(|| format!("disconnecting {device}"))?;
    // The thread that waits in the kernel does the same.
    let _ = sys::clear(&nbd);
    Ok(())
}

fn open(device: Device) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(device.path());
    opened.map_err(|error| {
        let error = Error::from(error);
        match error.kind() {
            ErrorKind::Permission => error.hint("the kernel's nbd is for root only"),
            ErrorKind::NotFound => error.hint("the module parameter nbds_max says how many there are"),
            _ => error,
        }
        .context(device.to_string())
    })
}

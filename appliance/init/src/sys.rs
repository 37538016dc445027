//! The system calls that the standard library has no function for.
#![allow(
    unsafe_code,
    reason = "an init has nothing under it but system calls; each block says why it is sound"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::ptr;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn umount2(target: *const c_char, flags: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn reboot(command: c_int) -> c_int;
    fn unshare(flags: c_int) -> c_int;
    fn sync();
    fn syncfs(fd: c_int) -> c_int;
    fn klogctl(kind: c_int, buffer: *mut c_char, len: c_int) -> c_int;
    fn lsetxattr(
        path: *const c_char,
        name: *const c_char,
        value: *const c_void,
        len: usize,
        flags: c_int,
    ) -> c_int;
    fn lgetxattr(path: *const c_char, name: *const c_char, value: *mut c_void, len: usize) -> isize;
    fn llistxattr(path: *const c_char, list: *mut c_char, len: usize) -> isize;
    fn statvfs(path: *const c_char, buffer: *mut u64) -> c_int;
    fn tcgetattr(fd: c_int, termios: *mut u32) -> c_int;
    fn cfmakeraw(termios: *mut u32);
    fn tcsetattr(fd: c_int, actions: c_int, termios: *const u32) -> c_int;
    fn tcdrain(fd: c_int) -> c_int;
    fn kill(process: c_int, signal: c_int) -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn waitpid(process: c_int, status: *mut c_int, options: c_int) -> c_int;
}

/// No devices, no programs with special rights, no programs: what is mounted is a stranger's.
pub(crate) const MS_RDONLY: u64 = 1;
pub(crate) const MS_NOSUID: u64 = 2;
pub(crate) const MS_NODEV: u64 = 4;
pub(crate) const MS_NOEXEC: u64 = 8;
pub(crate) const MS_REMOUNT: u64 = 32;

pub(crate) const MNT_DETACH: i32 = 2;

pub(crate) const EPERM: u32 = 1;
pub(crate) const ENOENT: i32 = 2;
pub(crate) const EEXIST: i32 = 17;
pub(crate) const EBUSY: i32 = 16;
pub(crate) const EINVAL: i32 = 22;
const ERANGE: i32 = 34;
pub(crate) const ENODATA: i32 = 61;
pub(crate) const EOPNOTSUPP: i32 = 95;

pub(crate) const O_NOCTTY: i32 = 0o400;
pub(crate) const O_NONBLOCK: i32 = 0o4000;
#[cfg(target_arch = "x86_64")]
pub(crate) const O_DIRECT: i32 = 0o40_000;
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const O_DIRECT: i32 = 0o200_000;

#[cfg(target_arch = "x86_64")]
const SYS_FINIT_MODULE: c_long = 313;
#[cfg(not(target_arch = "x86_64"))]
const SYS_FINIT_MODULE: c_long = 273;

const LOOP_CTL_GET_FREE: c_ulong = 0x4c82;
const LOOP_CONFIGURE: c_ulong = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// How often a free loop device is looked for: others look, too.
const LOOP_TRIES: u32 = 100;
const PR_SET_PDEATHSIG: c_int = 1;
const PR_SET_CHILD_SUBREAPER: c_int = 36;
const EINTR: i32 = 4;
const CLONE_FS: c_int = 0x200;
const POWER_OFF: c_int = 0x4321_fedc;
const SIGKILL: c_int = 9;
/// klogctl: set the level of what the console shows.
const CONSOLE_LEVEL: c_int = 8;
/// The most that Linux keeps in one extended attribute, and in one list of their names.
const MOST_XATTR: usize = 64 << 10;

/// `struct pollfd`.
#[repr(C)]
struct PollFd {
    fd: c_int,
    events: i16,
    revents: i16,
}

fn check(result: c_int) -> Result<()> {
    if result == -1 { Err(Error::last_os_error()) } else { Ok(()) }
}

fn text(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::from_raw_os_error(EINVAL))
}

fn name(path: &Path) -> Result<CString> {
    text(path.as_os_str().as_bytes())
}

/// mount(2); an empty string stands for none.
pub(crate) fn mount_at(source: &str, target: &Path, kind: &str, flags: u64, options: &str) -> Result<()> {
    let (source, target) = (text(source.as_bytes())?, name(target)?);
    let (kind, options) = (text(kind.as_bytes())?, text(options.as_bytes())?);
    let or_none = |text: &CStr| if text.is_empty() { ptr::null() } else { text.as_ptr() };
    // SAFETY: all pointers are null or strings with an end, which live until the call returns.
    check(unsafe { mount(source.as_ptr(), target.as_ptr(), or_none(&kind), flags, or_none(&options).cast()) })
}

/// umount2(2).
pub(crate) fn unmount(target: &Path, flags: i32) -> Result<()> {
    let target = name(target)?;
    // SAFETY: a string with an end that lives until the call returns.
    check(unsafe { umount2(target.as_ptr(), flags) })
}

/// finit_module(2) without flags.
pub(crate) fn load_module(file: &File, parameters: &str) -> Result<()> {
    let parameters = text(parameters.as_bytes())?;
    // SAFETY: the arguments are those of finit_module: an open file, a string with an end, flags. The kernel reads
    // from both and keeps neither.
    let result = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), parameters.as_ptr(), 0 as c_int) };
    if result == -1 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// This thread's root and working directory become its own, no longer those of the whole program.
pub(crate) fn own_root() -> Result<()> {
    // SAFETY: no memory is passed; CLONE_FS concerns this thread alone.
    check(unsafe { unshare(CLONE_FS) })
}

/// Switches the machine off, if this is its init.
pub(crate) fn power_off() -> Error {
    if std::process::id() != 1 {
        return Error::from_raw_os_error(EINVAL);
    }
    // SAFETY: no memory is passed.
    unsafe {
        sync();
        reboot(POWER_OFF);
    }
    Error::last_os_error()
}

/// Everything written to the file system of `file` reaches the disk.
pub(crate) fn sync_file_system(file: &File) -> Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { syncfs(file.as_raw_fd()) })
}

/// The kernel shows on its console only what is graver than `level`.
pub(crate) fn console_level(level: i32) -> Result<()> {
    // SAFETY: this command takes no buffer.
    check(unsafe { klogctl(CONSOLE_LEVEL, ptr::null_mut(), level) })
}

/// Gives an extended attribute to a path, not to what a link there points to.
pub(crate) fn set_xattr(path: &Path, key: &[u8], value: &[u8]) -> Result<()> {
    let (path, key) = (name(path)?, text(key)?);
    // SAFETY: two strings with ends and a buffer of the length that is told; the kernel only reads them.
    check(unsafe { lsetxattr(path.as_ptr(), key.as_ptr(), value.as_ptr().cast(), value.len(), 0) })
}

/// An extended attribute of a path.
pub(crate) fn get_xattr(path: &Path, key: &[u8]) -> Result<Vec<u8>> {
    let (path, key) = (name(path)?, text(key)?);
    let mut value = vec![0; MOST_XATTR];
    // SAFETY: two strings with ends, and a buffer into which the kernel writes at most the length that is told.
    let len = unsafe { lgetxattr(path.as_ptr(), key.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(len).map_err(|_| Error::last_os_error())?);
    Ok(value)
}

/// The names of the extended attributes of a path.
pub(crate) fn list_xattrs(path: &Path) -> Result<Vec<Vec<u8>>> {
    let path = name(path)?;
    let mut list = vec![0; MOST_XATTR];
    // SAFETY: a string with an end, and a buffer into which the kernel writes at most the length that is told.
    let len = unsafe { llistxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    let len = usize::try_from(len).map_err(|_| Error::last_os_error())?;
    let names = list.get(..len).ok_or_else(|| Error::from_raw_os_error(ERANGE))?;
    Ok(names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
}

/// What statvfs(3) tells that is wanted here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Space {
    pub(crate) block_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) free_blocks: u64,
    pub(crate) inodes: u64,
    pub(crate) free_inodes: u64,
}

/// statvfs(3).
pub(crate) fn space(path: &Path) -> Result<Space> {
    let path = name(path)?;
    let mut buffer = [0_u64; 64];
    // SAFETY: a string with an end. On 64-bit Linux struct statvfs is 112 bytes, less than the buffer, aligned like
    // it, and begins with seven 64-bit fields: f_bsize, f_frsize, f_blocks, f_bfree, f_bavail, f_files, f_ffree.
    check(unsafe { statvfs(path.as_ptr(), buffer.as_mut_ptr()) })?;
    let [_, block_bytes, blocks, free_blocks, _, inodes, free_inodes, ..] = buffer;
    Ok(Space { block_bytes, blocks, free_blocks, inodes, free_inodes })
}

/// A line that passes all bytes as they are.
pub(crate) fn make_raw(line: &File) -> Result<()> {
    let mut termios = [0_u32; 64];
    // SAFETY: struct termios has 60 bytes, less than the buffer, and is aligned like it.
    unsafe {
        check(tcgetattr(line.as_raw_fd(), termios.as_mut_ptr()))?;
        cfmakeraw(termios.as_mut_ptr());
        check(tcsetattr(line.as_raw_fd(), 0, termios.as_ptr()))
    }
}

/// Waits until everything written to the line has left.
pub(crate) fn drain(line: &File) {
    // SAFETY: no memory is passed.
    unsafe { tcdrain(line.as_raw_fd()) };
}

/// Ends a process group, or with -1, if this is the init, every process but this one.
pub(crate) fn end_processes(group: i32) {
    if group <= 1 && (group != -1 || std::process::id() != 1) {
        return;
    }
    // SAFETY: no memory is passed.
    unsafe { kill(if group == -1 { -1 } else { -group }, SIGKILL) };
}

/// Ends one process.
pub(crate) fn end_process(process: i32) {
    // SAFETY: no memory is passed.
    unsafe { kill(process, SIGKILL) };
}

/// Whoever loses its parent below this process becomes its child.
pub(crate) fn adopt_orphans() -> Result<()> {
    // SAFETY: this option takes a number.
    check(unsafe { prctl(PR_SET_CHILD_SUBREAPER, 1 as c_ulong) })
}

/// What the command starts is ended by the kernel when this process ends.
pub(crate) fn end_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec this makes one system call, which takes two numbers, and allocates nothing.
    unsafe { command.pre_exec(|| check(prctl(PR_SET_PDEATHSIG, SIGKILL as c_ulong))) };
}

/// Waits until the other end of a descriptor is closed.
pub(crate) fn wait_for_hangup(fd: i32) {
    let mut fds = PollFd { fd, events: 0, revents: 0 };
    // SAFETY: one structure, as long as is told, which lives until the call returns. With no events asked for it returns
    // for a hangup or an error only, or for a signal.
    while unsafe { poll(&raw mut fds, 1, -1) } == -1 && Error::last_os_error().raw_os_error() == Some(EINTR) {
    }
}

/// Waits for the end of any child: which, and its exit code or 128 and its signal. `None`: there are no more.
pub(crate) fn wait_for_any() -> Option<(i32, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes a number into `status`, which lives until the call returns.
        let process = unsafe { waitpid(-1, &raw mut status, 0) };
        if process > 0 {
            let signal = status & 0x7f;
            return Some((process, if signal == 0 { status >> 8 & 0xff } else { 128 + signal }));
        }
        if Error::last_os_error().raw_os_error() != Some(EINTR) {
            return None;
        }
    }
}

/// A loop device over a file, until it is closed: its name, and the device.
pub(crate) fn attach_loop(file: &File, read_only: bool) -> Result<(String, File)> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..LOOP_TRIES {
        // SAFETY: this request takes no argument.
        let number = unsafe { ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        check(number)?;
        let name = format!("loop{number}");
        let device = File::options().read(true).write(!read_only).open(Path::new("/dev").join(&name))?;
        // struct loop_config: descriptor, block size, struct loop_info64 (its flags are its 14th word), zeros.
        let mut config = [0_u32; 76];
        config[0] = u32::try_from(file.as_raw_fd()).map_err(Error::other)?;
        config[15] = LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
        // SAFETY: the structure has 304 bytes, as many as the array, which lives until the call returns; the kernel only
        // reads it, whatever its alignment.
        match check(unsafe { ioctl(device.as_raw_fd(), LOOP_CONFIGURE, config.as_ptr()) }) {
            Err(error) if error.raw_os_error() == Some(EBUSY) => {}
            result => return result.map(|()| (name, device)),
        }
    }
    Err(Error::from_raw_os_error(EBUSY))
}

//! What the program gives up once every file is open and only a stranger's bytes remain to be read.
//!
//! Two walls, each as high as the kernel builds it, and neither a reason to fail: Landlock takes the file system
//! away (open descriptors stay), but for the directories in which a target has to be renamed or removed;
//! seccomp leaves only the system calls that a tool for files makes, so that whoever takes over the process can
//! neither start another nor reach the network.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetStatus,
};
use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Gives up everything but work on open files, and on files in `directories`. Says what was applied.
pub(crate) fn enter(directories: &[PathBuf]) -> String {
    let all = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::Refer;
    enter_with(directories, all, &[])
}

/// The same, for a whole machine: the folder that everything was in until it got its name is removed, and the space of
/// the file system looked at.
pub(crate) fn enter_converting(directory: &Path) -> String {
    let all = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer;
    enter_with(&[directory.to_owned()], all, &[libc::SYS_statfs, libc::SYS_rmdir, libc::SYS_renameat2])
}

/// Gives up everything but work on open files, connections that come in on open sockets, and removing files in
/// `directories`. Says what was applied.
pub(crate) fn enter_serving(directories: &[PathBuf]) -> String {
    enter_with(directories, AccessFs::RemoveFile | AccessFs::RemoveDir, &CONNECTIONS)
}

/// What it takes to serve on sockets that are open; none can be made, and none connected.
const CONNECTIONS: [libc::c_long; 11] = [
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_ppoll,
];

/// Gives up everything but work on open files, and reading of `paths`. Says what was applied.
pub(crate) fn enter_reading(paths: &[PathBuf]) -> String {
    enter_with(paths, AccessFs::ReadFile | AccessFs::ReadDir, &[])
}

/// Gives up everything but work on open files, and making files, folders and links in `directory`. Says what was applied.
pub(crate) fn enter_unpacking(directory: &Path) -> String {
    let all = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSym;
    let calls = [libc::SYS_mkdirat, libc::SYS_symlinkat, libc::SYS_utimensat];
    enter_with(&[directory.to_owned()], all, &calls)
}

/// Gives up everything but work on open files, and KVM; its threads may give up more. Says what was applied.
pub(crate) fn enter_for_machine() -> String {
    let access = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    enter_with(&[PathBuf::from("/dev/kvm")], access, &[libc::SYS_seccomp])
}

/// Gives up the file system, but for reading and executing what belongs to the system and to `program`, which will be
/// started, and for the files in `directory`. Holds for the program, too; which system calls it may make is its own
/// affair. Says what was applied.
pub(crate) fn enter_for_program(program: &Path, directory: &Path) -> String {
    let abi = ABI::V5;
    let system = [
        "/usr",
        "/lib",
        "/lib64",
        "/bin",
        "/etc/ld.so.cache",
        "/proc",
        "/sys/devices/system",
        "/sys/kernel/mm",
    ];
    let devices = ["/dev/kvm", "/dev/urandom", "/dev/random", "/dev/null", "/dev/zero"];
    let reading = system.iter().map(PathBuf::from).chain(program.canonicalize());
    let mut paths: Vec<_> = reading.map(|path| (path, AccessFs::from_read(abi))).collect();
    paths.extend(
        devices.iter().map(|path| (PathBuf::from(path), AccessFs::from_file(abi) & !AccessFs::Execute)),
    );
    paths.push((directory.to_owned(), AccessFs::from_all(abi) & !AccessFs::Execute));
    words(take_file_system(&paths))
}

fn words(landlock: Result<RulesetStatus, landlock::RulesetError>) -> String {
    match landlock {
        Ok(RulesetStatus::FullyEnforced) => "Landlock in full".to_owned(),
        Ok(RulesetStatus::PartiallyEnforced) => "Landlock as far as this kernel has it".to_owned(),
        Ok(RulesetStatus::NotEnforced) => "no Landlock in this kernel".to_owned(),
        Err(error) => format!("no Landlock ({error})"),
    }
}

fn enter_with(paths: &[PathBuf], access: BitFlags<AccessFs>, more: &[libc::c_long]) -> String {
    let paths: Vec<_> = paths.iter().map(|path| (path.clone(), access)).collect();
    let landlock = words(take_file_system(&paths));
    let seccomp = match take_system_calls(more) {
        Ok(()) => format!("seccomp with {} system calls", allowed().len() + more.len()),
        Err(error) => format!("no seccomp ({error})"),
    };
    format!("{landlock}, {seccomp}")
}

fn take_file_system(
    paths: &[(PathBuf, BitFlags<AccessFs>)],
) -> Result<RulesetStatus, landlock::RulesetError> {
    let abi = ABI::V5;
    let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(abi))?.create()?;
    for (path, access) in paths {
        let access = *access;
        if let Ok(open) = PathFd::new(path) {
            // Rights of directories mean nothing for a file, and old kernels refuse them there.
            let access = if path.is_dir() { access } else { access & AccessFs::from_file(abi) };
            ruleset = ruleset.add_rule(PathBeneath::new(open, access))?;
        }
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

fn take_system_calls(more: &[libc::c_long]) -> Result<(), Box<dyn std::error::Error>> {
    let rules: BTreeMap<_, _> = allowed().iter().chain(more).map(|call| (*call, vec![])).collect();
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter =
        SeccompFilter::new(rules, refused, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter_all_threads(&program)?;
    Ok(())
}

/// The system calls that stay: memory, threads, time, signals of our own, and open files.
fn allowed() -> Vec<libc::c_long> {
    let mut calls = vec![
        // Reading and writing.
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_pread64,
        libc::SYS_preadv,
        libc::SYS_preadv2,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_pwritev2,
        libc::SYS_lseek,
        libc::SYS_copy_file_range,
        libc::SYS_sendfile,
        libc::SYS_splice,
        libc::SYS_fallocate,
        libc::SYS_ftruncate,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_sync_file_range,
        libc::SYS_fadvise64,
        libc::SYS_readahead,
        libc::SYS_ioctl,
        libc::SYS_fcntl,
        libc::SYS_flock,
        libc::SYS_dup,
        libc::SYS_dup3,
        libc::SYS_close,
        libc::SYS_close_range,
        // Names, as far as Landlock lets them be used.
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_statfs,
        libc::SYS_fstatfs,
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_readlinkat,
        libc::SYS_getdents64,
        libc::SYS_getcwd,
        libc::SYS_unlinkat,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_linkat,
        libc::SYS_fchmod,
        libc::SYS_fchown,
        libc::SYS_umask,
        libc::SYS_fgetxattr,
        libc::SYS_flistxattr,
        // Memory.
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_membarrier,
        // Threads.
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_futex,
        libc::SYS_set_robust_list,
        libc::SYS_set_tid_address,
        libc::SYS_rseq,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_setaffinity,
        libc::SYS_prctl,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getegid,
        libc::SYS_exit,
        libc::SYS_exit_group,
        // Time, randomness, limits.
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_clock_gettime,
        libc::SYS_clock_getres,
        libc::SYS_gettimeofday,
        libc::SYS_getrandom,
        libc::SYS_prlimit64,
        libc::SYS_getrusage,
        libc::SYS_sysinfo,
        libc::SYS_uname,
        // Signals, and waiting for them.
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_sigaltstack,
        libc::SYS_tgkill,
        libc::SYS_restart_syscall,
        libc::SYS_ppoll,
        libc::SYS_pselect6,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_pwait,
        libc::SYS_eventfd2,
        libc::SYS_pipe2,
        libc::SYS_socketpair,
        // Connections that are open already, to network block devices.
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_shutdown,
        libc::SYS_sendto,
    ];
    calls.extend_from_slice(OLD);
    calls
}

/// Older forms that only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLD: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_dup2,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_pipe,
    libc::SYS_epoll_wait,
    libc::SYS_time,
    libc::SYS_arch_prctl,
    libc::SYS_getrlimit,
];
/// Older forms that only this architecture has.
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[libc::c_long] = &[];

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Runs a test of this file in a process of its own: there is no way back out of the sandbox.
    fn alone(name: &str) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([&format!("sandbox::tests::{name}"), "--exact", "--ignored", "--test-threads=1"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    #[test]
    fn inside_threads_and_open_files_work_and_the_rest_does_not() {
        alone("in_the_sandbox");
    }

    #[test]
    #[ignore = "run by the test above, in a process of its own"]
    fn in_the_sandbox() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("target");
        std::fs::create_dir(&inside).unwrap();
        let outside = directory.path().join("secret");
        std::fs::write(&outside, b"secret").unwrap();
        let applied = enter(std::slice::from_ref(&inside));
        std::fs::write(inside.join("a"), b"x").unwrap();
        std::fs::rename(inside.join("a"), inside.join("b")).unwrap();
        assert_eq!(std::thread::spawn(|| 42).join().unwrap(), 42);
        if applied.contains("seccomp with") {
            Command::new("/bin/true").status().unwrap_err();
            std::net::TcpStream::connect("127.0.0.1:9").unwrap_err();
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap_err();
            assert_eq!(socket.raw_os_error(), Some(libc::EPERM));
        }
        if applied.contains("Landlock in full") {
            std::fs::read(&outside).unwrap_err();
        }
        std::fs::remove_file(inside.join("b")).unwrap();
    }
}

//! What a User-Mode Linux may do on its host: work in its folder, read what a program needs to start, and make the
//! system calls that such a kernel and its processes make. Nothing of the user's can be read or written, no network,
//! no other process traced; and no file be made shorter, which would end us (its memory is mapped here, too): neither
//! by `truncate` and `ftruncate`, nor as it is opened (`O_TRUNC`), nor by `fallocate`.
//!
//! The walls are the thread's that starts the program, and the program inherits them. What is left: it can connect to
//! sockets of the file system that the user may connect to, which Landlock does not yet keep it from, see which
//! processes there are, fill the file system that its memory lies in, and ask of that one by `ioctl` what a user may.

use std::collections::BTreeMap;
use std::path::Path;

use block::{Error, Result};
use landlock::{
    ABI, Access as _, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// The newest Landlock that this knows.
const FILES: ABI = ABI::V5;
const SCOPES: ABI = ABI::V6;

/// Confines the calling thread, and what it starts from now on, for life. A kernel without Landlock confines less;
/// whether this one has it.
///
/// # Errors
/// This kernel has no seccomp, or the rules cannot be made.
pub(super) fn enter(program: &Path, folder: &Path) -> Result<bool> {
    let has_landlock = take_files(program, folder).map_err(broken)?;
    let filter = SeccompFilter::new(
        rules()?,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        SeccompAction::Allow,
        arch()?,
    );
    let filter = filter.and_then(BpfProgram::try_from).map_err(broken)?;
    seccompiler::apply_filter(&filter).map_err(broken)?;
    Ok(has_landlock)
}

fn arch() -> Result<TargetArch> {
    TargetArch::try_from(std::env::consts::ARCH).map_err(broken)
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::unsupported(format!("a User-Mode Linux cannot be confined here: {error}"))
}

fn take_files(program: &Path, folder: &Path) -> std::result::Result<bool, landlock::RulesetError> {
    let program_files = AccessFs::ReadFile | AccessFs::Execute;
    let libraries = program_files | AccessFs::ReadDir;
    let device = AccessFs::ReadFile | AccessFs::WriteFile;
    let own = AccessFs::from_all(FILES) & !(AccessFs::Execute | AccessFs::Truncate);
    let mut rules: Vec<(&Path, BitFlags<AccessFs>)> = vec![(program, program_files), (folder, own)];
    let libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"].map(|path| (Path::new(path), libraries));
    rules.extend(libraries);
    rules.push((Path::new("/etc/ld.so.cache"), AccessFs::ReadFile.into()));
    rules.push((Path::new("/proc"), AccessFs::ReadFile | AccessFs::ReadDir));
    rules.extend(
        ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"].map(|path| (Path::new(path), device)),
    );
    let ruleset = Ruleset::default().handle_access(AccessFs::from_all(FILES))?;
    let mut ruleset = ruleset.scope(Scope::from_all(SCOPES))?.create()?;
    for (path, access) in rules {
        if let Ok(open) = PathFd::new(path) {
            let access = if path.is_dir() { access } else { access & AccessFs::from_file(FILES) };
            ruleset = ruleset.add_rule(PathBeneath::new(open, access))?;
        }
    }
    Ok(ruleset.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, vec![])).collect();
    let local = |domain: i32| {
        let domain = u64::from(domain.unsigned_abs());
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, domain)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(broken)
    };
    rules.insert(libc::SYS_socket, vec![local(libc::AF_UNIX)?]);
    rules.insert(libc::SYS_socketpair, vec![local(libc::AF_UNIX)?]);
    // Nothing of these makes a file shorter.
    rules.insert(libc::SYS_openat, vec![without(2, libc::O_TRUNC)?]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, vec![without(1, libc::O_TRUNC)?]);
    rules.insert(libc::SYS_fallocate, vec![without(1, libc::FALLOC_FL_COLLAPSE_RANGE)?]);
    Ok(rules)
}

/// Calls whose argument does not have this flag.
fn without(argument: u8, flag: i32) -> Result<SeccompRule> {
    let mask = SeccompCmpOp::MaskedEq(u64::from(flag.unsigned_abs()));
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, mask, 0)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(broken)
}

/// Files, memory, time, processes, signals, local sockets. Not here, among others: `truncate` and `ftruncate`, `creat` and
/// `openat2` (whose flags no filter sees), mounts, namespaces, other processes' memory and descriptors, keys, BPF, io_uring,
/// and all that takes rights of root.
const CALLS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_ioctl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_signalfd4,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_readlinkat,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_umask,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_memfd_create,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_execve,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_ptrace,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_gettime,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_delete,
    libc::SYS_setitimer,
    libc::SYS_getitimer,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getpgid,
    libc::SYS_setpgid,
    libc::SYS_getsid,
    libc::SYS_setsid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_prlimit64,
    libc::SYS_getrlimit,
    libc::SYS_setrlimit,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_personality,
    libc::SYS_prctl,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_getrandom,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_connect,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_pipe,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_select,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_create,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_eventfd,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_pause,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_alarm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_getpgrp,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_arch_prctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

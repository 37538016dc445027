//! What the threads that meet the guest may ask of the host: to run it, to read and write what is open already, to
//! sleep and to allocate. Nothing that opens, connects, starts or signals.
//!
//! The filter (seccomp) is the thread's own and cannot be taken back. A call that is not on the list fails with
//! `EPERM`: for a disk that is an error of one request, which the report shows, rather than the end of the check.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use block::{Error, Result};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// What a thread does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Role {
    /// Runs a virtual processor.
    Processor,
    /// Serves a queue.
    Device,
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Memory, time, waiting, ending; reading and writing what is open (the console's observer writes, too).
const COMMON: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_membarrier,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What disks need: files that are open, and connections that stand.
const STORAGE: &[i64] = &[
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readv,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_copy_file_range,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
];

/// Type of KVM's ioctls.
const KVM: u64 = 0xae00;
/// KVM's numbers: run; registers, segments, translation, activity (for the report); memory (flash that is shown and
/// hidden), interrupt line, coalesced writes, routes, irqfd, ioeventfd.
const PROCESSOR_IOCTLS: &[u64] = &[
    KVM | 0x80,
    KVM | 0x81,
    KVM | 0x83,
    KVM | 0x85,
    KVM | 0x98,
    KVM | 0x46,
    KVM | 0x61,
    KVM | 0x67,
    KVM | 0x68,
    KVM | 0x6a,
    KVM | 0x76,
    KVM | 0x79,
];
/// Interrupt line, routes, irqfd; `BLKDISCARD`, `BLKZEROOUT`, `FICLONERANGE`.
const DEVICE_IOCTLS: &[u64] = &[KVM | 0x61, KVM | 0x6a, KVM | 0x76, 0x1277, 0x127f, 0x940d];

/// A rule: the argument, under the mask, has this value.
fn when(argument: u8, mask: u64, value: u64) -> Result<SeccompRule> {
    let op = SeccompCmpOp::MaskedEq(mask);
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, op, value)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(broken)
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::unsupported(format!("the monitor's threads cannot be confined: {error}"))
}

fn rules(role: Role) -> Result<Rules> {
    let mut rules = Rules::new();
    let mut allow = |calls: &[i64]| rules.extend(calls.iter().map(|call| (*call, vec![])));
    allow(COMMON);
    if matches!(role, Role::Device) {
        allow(STORAGE);
    }
    let ioctls = match role {
        Role::Processor => PROCESSOR_IOCTLS,
        Role::Device => DEVICE_IOCTLS,
    };
    // Sizes and directions are in the upper half of the number; KVM checks them itself.
    let ioctls = ioctls.iter().map(|number| when(1, 0xffff, *number)).collect::<Result<_>>()?;
    rules.insert(libc::SYS_ioctl, ioctls);
    // No memory that can be executed.
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    rules.insert(libc::SYS_mmap, vec![when(2, executable, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![when(2, executable, 0)?]);
    // Only to give memory back.
    let advice = |value: i32| when(2, 0xffff_ffff, u64::from(value.unsigned_abs()));
    rules.insert(libc::SYS_madvise, vec![advice(libc::MADV_DONTNEED)?, advice(libc::MADV_FREE)?]);
    if matches!(role, Role::Device) {
        let empty_path = u64::from(libc::AT_EMPTY_PATH.unsigned_abs());
        rules.insert(libc::SYS_newfstatat, vec![when(3, empty_path, empty_path)?]);
        rules.insert(libc::SYS_statx, vec![when(2, empty_path, empty_path)?]);
    }
    Ok(rules)
}

fn compile(role: Role) -> Result<BpfProgram> {
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    SeccompFilter::new(rules(role)?, refused, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(broken)
}

/// Confines the calling thread for the rest of its life.
///
/// # Errors
/// The host's kernel cannot.
pub(crate) fn enter(role: Role) -> Result<()> {
    static PROCESSOR: OnceLock<BpfProgram> = OnceLock::new();
    static DEVICE: OnceLock<BpfProgram> = OnceLock::new();
    let place = match role {
        Role::Processor => &PROCESSOR,
        Role::Device => &DEVICE,
    };
    if place.get().is_none() {
        let _ = place.set(compile(role)?);
    }
    place.get().map_or(Ok(()), |program| seccompiler::apply_filter(program).map_err(broken))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
    use std::net::TcpListener;

    use super::*;

    /// Runs in a thread of its own: a filter is for life.
    fn confined<T: Send>(role: Role, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    enter(role).unwrap();
                    body()
                })
                .join()
                .unwrap()
        })
    }

    #[test]
    fn nothing_is_opened_connected_or_started() {
        for role in [Role::Processor, Role::Device] {
            confined(role, || {
                let denied =
                    |error: std::io::Error| assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{role:?}");
                denied(std::fs::File::open("/").unwrap_err());
                denied(std::fs::File::create("/tmp/vimg-sandbox").unwrap_err());
                denied(std::fs::metadata("/").unwrap_err());
                denied(TcpListener::bind("127.0.0.1:0").unwrap_err());
                denied(std::process::Command::new("true").spawn().unwrap_err());
                denied(std::thread::Builder::new().spawn(|| ()).unwrap_err());
            });
        }
    }

    #[test]
    fn what_is_open_can_be_used_and_memory_taken() {
        let mut file = tempfile();
        confined(Role::Device, move || {
            file.write_all(b"bytes").unwrap();
            file.seek(SeekFrom::Start(0)).unwrap();
            let mut bytes = String::new();
            file.read_to_string(&mut bytes).unwrap();
            file.set_len(4096).unwrap();
            file.sync_data().unwrap();
            assert_eq!((bytes.as_str(), file.metadata().unwrap().len()), ("bytes", 4096));
            let many: Vec<Vec<u8>> = (0..64).map(|_| vec![1; 1 << 20]).collect();
            assert_eq!(many.iter().map(Vec::len).sum::<usize>(), 64 << 20);
        });
    }

    /// A file that nobody else has.
    fn tempfile() -> std::fs::File {
        let path = std::env::temp_dir().join(format!("vimg-sandbox-{}", std::process::id()));
        let file =
            std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}

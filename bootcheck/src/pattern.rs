//! What lines on a console mean: the signs of success and failure, and the stations of a boot.
//!
//! The tables are the whole knowledge. They were written from what guests print (recorded consoles are in
//! `testdata`), and are searched in order: of two signs on one line the first one counts.

use regex::bytes::{RegexSet, RegexSetBuilder};

use block::{Error, Result};

use crate::verdict::Reason;

/// A station of a boot, in the order in which they are usually passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Milestone {
    /// The guest has printed something.
    FirstByte,
    /// A boot loader speaks.
    BootLoader,
    /// The kernel speaks.
    Kernel,
    /// The initramfs is at work.
    Initramfs,
    /// The root file system is mounted.
    RootMounted,
    /// The init of the root file system is at work.
    Init,
    /// A target or runlevel has been reached that stands for a running system.
    Target,
    /// Somebody may log in.
    Login,
}

impl Milestone {
    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FirstByte => "first-byte",
            Self::BootLoader => "boot-loader",
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::RootMounted => "root-mounted",
            Self::Init => "init",
            Self::Target => "target",
            Self::Login => "login",
        }
    }

    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::FirstByte => "first byte of output",
            Self::BootLoader => "boot loader",
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::RootMounted => "root file system mounted",
            Self::Init => "init of the root file system",
            Self::Target => "target reached",
            Self::Login => "login prompt",
        }
    }
}

/// What a line is a sign of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// The guest works (unless the user has said what to expect instead); and a station.
    Success(Milestone),
    /// It does not, for this reason.
    Failure(Reason),
    /// Neither, but worth showing if it does not.
    Note,
    /// A station.
    Station(Milestone),
}

/// A line to look for.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    /// Its name in reports.
    pub name: &'static str,
    /// What it means.
    pub sign: Sign,
    /// The regular expression, over bytes, without Unicode classes.
    regex: &'static str,
}

const fn success(name: &'static str, milestone: Milestone, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Success(milestone), regex }
}

const fn failure(name: &'static str, reason: Reason, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Failure(reason), regex }
}

const fn station(name: &'static str, milestone: Milestone, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Station(milestone), regex }
}

const fn note(name: &'static str, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Note, regex }
}

use Milestone::{BootLoader, Init, Initramfs, Kernel, Login, RootMounted, Target};

/// All patterns. Prompts are matched while they are the unfinished last line of the console, too.
pub const PATTERNS: &[Pattern] = &[
    // --- success ---
    // getty (agetty, busybox, FreeBSD's); kernel messages like to follow on the same line.
    success("login prompt", Login, r"^(?:[\w.\-]+ )?login: ?(?:\[ *\d+\.\d+\].*)?$"),
    success(
        "systemd target",
        Target,
        r"Reached target (?:multi-user\.target|graphical\.target|Multi-User System|Graphical Interface)",
    ),
    success("systemd has finished", Target, r"systemd\[1\]: Startup finished in "),
    // --- the kernel cannot go on ---
    failure(
        "no root device (kernel)",
        Reason::RootNotFound,
        r"VFS: Cannot open root device|VFS: Unable to mount root fs on unknown-block\(0,0\)|/dev/root: Can't open blockdev",
    ),
    failure("cannot mount root (kernel)", Reason::RootNotMounted, r"VFS: Unable to mount root fs"),
    failure("cannot mount root (BSD)", Reason::RootNotMounted, r"^mountroot> ?$"),
    failure(
        "no init",
        Reason::NoInit,
        r"Kernel panic - not syncing: (?:No (?:working )?init found|Requested init )",
    ),
    failure("init has ended", Reason::InitDied, r"Kernel panic - not syncing: Attempted to kill init"),
    failure(
        "init has stopped",
        Reason::InitDied,
        r"systemd\[1\]: Freezing execution|\[!!!!!!\] .*[Ff]reezing",
    ),
    failure("kernel panic", Reason::KernelPanic, r"Kernel panic - not syncing|^panic: "),
    failure(
        "damaged kernel",
        Reason::KernelDamaged,
        r"(?:-compressed data is corrupt|uncompression error|invalid magic at start of compressed kernel|^Decoding failed|^ -- System halted)",
    ),
    // --- the initramfs gives up ---
    failure(
        "no root device (initramfs-tools)",
        Reason::RootNotFound,
        r"Gave up waiting for root (?:file system )?device|ALERT! +\S+ does not exist",
    ),
    failure(
        "no root device (dracut)",
        Reason::RootNotFound,
        r"Warning: /dev/\S+ does not exist|dracut-initqueue.*: starting timeout scripts|dracut: FATAL: (?:No or empty root=|Don't know how to handle 'root=)",
    ),
    failure(
        "no root device (systemd)",
        Reason::RootNotFound,
        r"Dependency failed for .*(?:/sysroot|sysroot\.mount|Initrd Root Device|initrd-root-device)",
    ),
    failure(
        "no root device (mkinitcpio)",
        Reason::RootNotFound,
        r"ERROR: (?:device|Failed to mount|Unable to find root device) .*(?:not found|root device)",
    ),
    failure(
        "cannot mount root (initramfs-tools)",
        Reason::RootNotMounted,
        r"mounting \S+ on /(?:root|sysroot|new_root|newroot) failed|Failed to mount \S+ as root file system",
    ),
    failure(
        "cannot mount root (dracut)",
        Reason::RootNotMounted,
        r"Failed to mount (?:/sysroot|sysroot\.mount|Root Partition)|mount: /(?:sysroot|new_root|newroot): |Mounting root failed",
    ),
    failure(
        "cannot mount root (mkinitcpio)",
        Reason::RootNotMounted,
        r"ERROR: Failed to mount '?\S+'? on real root",
    ),
    failure(
        "no init (initramfs)",
        Reason::NoInit,
        r"No init found\. Try passing init=|ERROR: Root device mounted successfully, but \S+ does not exist|Cannot find init!",
    ),
    failure(
        "rebooted by the initramfs",
        Reason::InitramfsShell,
        r"^Rebooting automatically due to panic= boot argument",
    ),
    failure("initramfs shell (busybox)", Reason::InitramfsShell, r"^\(initramfs\) ?$"),
    failure(
        "initramfs shell (mkinitcpio)",
        Reason::InitramfsShell,
        r"You are now being dropped into an emergency shell|^\[rootfs [^\]]*\]# ?$",
    ),
    failure(
        "initramfs shell (Alpine)",
        Reason::InitramfsShell,
        r"initramfs emergency recovery shell launched",
    ),
    failure(
        "dracut emergency shell",
        Reason::DracutShell,
        r"^(?:\x20*)dracut:/# ?$|rdsosreport\.txt|Entering emergency mode\. Exit the shell to continue|dracut Warning: Could not boot",
    ),
    // --- the system gives up ---
    failure(
        "emergency mode",
        Reason::EmergencyMode,
        r"You are in (?:emergency|rescue) mode|Give root password for maintenance|Press Enter for maintenance|Give root password for system maintenance|(?:Reached target|Started) (?:emergency|rescue)\.|Reached target (?:Emergency|Rescue) Mode|Cannot open access to console, the root account is locked|Enter full pathname of shell or RETURN",
    ),
    // --- the boot loader gives up ---
    failure("GRUB rescue shell", Reason::BootLoader, r"^grub rescue> ?$|Entering rescue mode\.\.\."),
    failure("GRUB shell", Reason::BootLoader, r"^grub> ?$|Minimal BASH-like line editing is supported"),
    failure(
        "GRUB cannot load",
        Reason::BootLoader,
        r"^error: (?:\S+: )?(?:no such (?:partition|device)|unknown filesystem|disk `[^']*' not found|file `[^']*' not found|symbol `[^']*' not found|you need to load the kernel first|invalid arch-independent ELF magic|premature end of file)",
    ),
    failure(
        "SYSLINUX cannot load",
        Reason::BootLoader,
        r"Could not find kernel image: |Failed to load (?:ldlinux|libcom32)|^No DEFAULT or UI configuration directive found|^LILO? ?$|^L [0-9]{2}",
    ),
    failure(
        "Windows boot manager",
        Reason::BootLoader,
        r"^(?:BOOTMGR is (?:missing|compressed)|NTLDR is (?:missing|compressed)|Remove disks or other media)",
    ),
    // --- the firmware gives up ---
    failure(
        "no bootable device (BIOS)",
        Reason::NoBootLoader,
        r"No bootable device|Boot failed: (?:not a bootable disk|could not read the boot disk)|[Mm]issing operating system|Operating system not found|Invalid partition table|Error loading operating system|[Nn]on-[Ss]ystem disk|No boot(?:able)? (?:device|disk)|FATAL: No bootable|Nothing to boot:",
    ),
    failure(
        "no bootable device (UEFI)",
        Reason::NoBootLoader,
        r"BdsDxe: (?:No bootable option|failed to (?:load|start) Boot[0-9A-F]{4}.*(?:Disk|HD\())|UEFI Interactive Shell|^Shell> ?$|Map: No mapping found",
    ),
    // --- stations ---
    station(
        "boot loader",
        BootLoader,
        r"GNU GRUB +version|Welcome to GRUB|^(?:SYS|ISO|EXT)LINUX \d|systemd-boot|EFI stub: ",
    ),
    station("kernel", Kernel, r"Linux version \d|^FreeBSD \d.*-RELEASE|Decompressing Linux"),
    station(
        "initramfs",
        Initramfs,
        r"^Loading, please wait\.\.\.|^Begin: Loading essential drivers|Run /init as init process|dracut-cmdline|^:: running (?:early )?hook|Alpine Init|\(Initramfs\)|Running in initrd",
    ),
    station(
        "root mounted",
        RootMounted,
        r"(?:EXT[234]-fs|XFS|BTRFS)\W.*(?:mounted filesystem|Ending clean mount|first mount of filesystem)|VFS: Mounted root|Begin: Running /scripts/(?:local|nfs)-bottom|Switching root|Mounting root: ok",
    ),
    station(
        "init",
        Init,
        r"systemd\[1\]: systemd .* running in system mode|INIT: version |OpenRC [\w.]+ is starting up|^Welcome to .*!|Run /(?:usr/)?s?bin/\S+ as init process|^Starting syslogd|Entering runlevel|runit: ",
    ),
    station("basic system", Init, r"Reached target (?:basic\.target|Basic System)"),
    // --- what may explain a failure later ---
    note(
        "I/O error",
        r"I/O error|Buffer I/O error|critical (?:medium|target) error|EXT[234]-fs error|XFS.*[Cc]orrupt|BTRFS (?:error|critical)",
    ),
    note(
        "file system problem",
        r"(?:EXT[234]-fs|XFS|BTRFS|FAT-fs|SQUASHFS)\W.*(?:[Cc]an't|unable|bad |[Ii]nvalid|wrong |VFS: )|UNEXPECTED INCONSISTENCY|fsck.*(?:failed|errors)",
    ),
    note("kernel bug", r"BUG: |Oops: |general protection fault|Unable to handle kernel|invalid opcode: "),
    note("kernel is stuck", r"soft lockup|hard LOCKUP|self-detected stall|blocked for more than \d+ seconds"),
    note("out of memory", r"Out of memory|oom-kill|invoked oom-killer"),
    note(
        "initramfs is damaged",
        r"Initramfs unpacking failed|rootfs image is not initramfs|junk (?:in|within) compressed archive",
    ),
    note(
        "module cannot be loaded",
        r"modprobe: (?:FATAL|ERROR|can't)|Failed to load module|Failed to start Load Kernel Modules|disagrees about version of symbol",
    ),
    note("unit has failed", r"^\[(?:FAILED| TIME|DEPEND)"),
    note(
        "machine is left",
        r"reboot: (?:Restarting system|Power down|System halted)|^(?:The system is going down|System halted)",
    ),
];

/// The patterns, compiled.
#[derive(Debug, Clone)]
pub struct Patterns {
    set: RegexSet,
}

impl Patterns {
    /// Compiles them.
    ///
    /// # Errors
    /// Never, as the tests show; nothing here may panic all the same.
    pub fn new() -> Result<Self> {
        let regexes = PATTERNS.iter().map(|pattern| pattern.regex);
        let set = RegexSetBuilder::new(regexes).unicode(false).build();
        set.map(|set| Self { set })
            .map_err(|error| Error::unsupported(format!("pattern of the console: {error}")))
    }

    /// The patterns that a line matches, in the order of the table.
    pub fn on<'a>(&'a self, line: &str) -> impl Iterator<Item = &'static Pattern> + use<'a> {
        let matches = self.set.matches(line.as_bytes());
        PATTERNS
            .iter()
            .enumerate()
            .filter(move |(index, _)| matches.matched(*index))
            .map(|(_, pattern)| pattern)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the line is taken for, notes and stations aside.
    fn verdict(line: &str) -> Option<Sign> {
        let patterns = Patterns::new().unwrap();
        let found = patterns.on(line).map(|pattern| pattern.sign);
        found.into_iter().find(|sign| matches!(sign, Sign::Success(_) | Sign::Failure(_)))
    }

    #[track_caller]
    fn fails(reason: Reason, lines: &[&str]) {
        for line in lines {
            assert_eq!(verdict(line), Some(Sign::Failure(reason)), "{line}");
        }
    }

    #[test]
    fn prompts_are_success() {
        for line in [
            "debian login: ",
            "login: ",
            "localhost login:",
            "vm-1.example.org login: [   14.2] random: crng init done",
        ] {
            assert_eq!(verdict(line), Some(Sign::Success(Login)), "{line}");
        }
        for line in
            ["Last login: Sat Nov 28", "Starting User login: x", "no login: here please", "login: root"]
        {
            assert_eq!(verdict(line), None, "{line}");
        }
    }

    #[test]
    fn targets_are_success() {
        for line in [
            "[  OK  ] Reached target Multi-User System.",
            "[  OK  ] Reached target multi-user.target - Multi-User System.",
            "[  OK  ] Reached target Graphical Interface.",
            "[    9.1] systemd[1]: Startup finished in 2.1s (kernel) + 5s (userspace) = 7.1s.",
        ] {
            assert_eq!(verdict(line), Some(Sign::Success(Target)), "{line}");
        }
        assert_eq!(verdict("[  OK  ] Reached target Local File Systems."), None);
    }

    #[test]
    fn kernels_that_give_up() {
        fails(
            Reason::RootNotFound,
            &[
                "[    1.341539] /dev/root: Can't open blockdev",
                "VFS: Cannot open root device \"vda1\" or unknown-block(0,0): error -6",
                "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
            ],
        );
        fails(
            Reason::RootNotMounted,
            &[
                "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(254,1)",
                "mountroot> ",
            ],
        );
        fails(
            Reason::NoInit,
            &[
                "Kernel panic - not syncing: No working init found.  Try passing init= option to kernel.",
                "Kernel panic - not syncing: Requested init /sbin/nope failed (error -2).",
            ],
        );
        fails(
            Reason::InitDied,
            &[
                "[ 3.3] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000000",
                "[!!!!!!] Failed to mount API filesystems, freezing.",
            ],
        );
        fails(
            Reason::KernelPanic,
            &["Kernel panic - not syncing: Fatal exception", "panic: vm_fault: fault on nofault entry"],
        );
        fails(Reason::KernelDamaged, &["XZ-compressed data is corrupt", " -- System halted"]);
    }

    #[test]
    fn initramfs_images_that_give_up() {
        fails(
            Reason::RootNotFound,
            &[
                "Gave up waiting for root file system device.  Common problems:",
                "ALERT!  UUID=9d3e does not exist.  Dropping to a shell!",
                "[  183.1] dracut-initqueue[275]: Warning: dracut-initqueue timeout - starting timeout scripts: starting timeout scripts",
                "Warning: /dev/disk/by-uuid/6c1a does not exist",
                "[DEPEND] Dependency failed for /sysroot.",
                "ERROR: device 'UUID=1' not found. Skipping fsck.",
            ],
        );
        fails(
            Reason::RootNotMounted,
            &[
                "mount: mounting /dev/vda2 on /root failed: Invalid argument",
                "Failed to mount /dev/vda2 as root file system.",
                "[FAILED] Failed to mount /sysroot.",
                "mount: /sysroot: wrong fs type, bad option, bad superblock on /dev/vda1, missing codepage",
            ],
        );
        fails(Reason::InitramfsShell, &["(initramfs) ", "[rootfs /]# "]);
        fails(
            Reason::DracutShell,
            &[
                "dracut:/# ",
                "Generating \"/run/initramfs/rdsosreport.txt\"",
                "Entering emergency mode. Exit the shell to continue.",
            ],
        );
        fails(Reason::NoInit, &["No init found. Try passing init= bootarg."]);
    }

    #[test]
    fn systems_and_boot_loaders_that_give_up() {
        fails(
            Reason::EmergencyMode,
            &[
                "You are in emergency mode. After logging in, type \"journalctl -xb\" to view",
                "Give root password for maintenance",
                "Press Enter for maintenance",
                "Cannot open access to console, the root account is locked.",
            ],
        );
        fails(
            Reason::BootLoader,
            &[
                "grub rescue> ",
                "grub>",
                "error: no such device: 5b1c9f3e-8a70-4d0c-9a55-0d3b6c2f7a11.",
                "error: file `/boot/grub/i386-pc/normal.mod' not found.",
                "BOOTMGR is missing",
            ],
        );
        fails(
            Reason::NoBootLoader,
            &[
                "No bootable device.",
                "Boot failed: not a bootable disk",
                "BdsDxe: No bootable option or device was found.",
                "Shell> ",
            ],
        );
    }

    #[test]
    fn ordinary_lines_mean_nothing() {
        for line in [
            "",
            "[    0.000000] Command line: root=UUID=1 ro init=/bin/sh panic=-1 console=ttyS0",
            "[  OK  ] Started emergency-thing.",
            "Loading Linux 6.1.0 ...",
            "# grub> is not a prompt here",
            "Welcome to Debian GNU/Linux 12 (bookworm)!",
            "EXT4-fs (vda1): mounted filesystem with ordered data mode.",
        ] {
            assert_eq!(verdict(line), None, "{line}");
        }
    }
}

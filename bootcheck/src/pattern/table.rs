//! The table of patterns for what a guest prints on its console or its screen.

use super::{Milestone, Pattern, Sign};
use crate::verdict::Reason;

pub(super) const fn success(name: &'static str, milestone: Milestone, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Success(milestone), regex }
}

pub(super) const fn failure(name: &'static str, reason: Reason, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Failure(reason), regex }
}

pub(super) const fn station(name: &'static str, milestone: Milestone, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Station(milestone), regex }
}

pub(super) const fn note(name: &'static str, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Note, regex }
}

pub(super) const fn passphrase(name: &'static str, regex: &'static str) -> Pattern {
    Pattern { name, sign: Sign::Passphrase, regex }
}

use Milestone::{BootLoader, DiskSeen, Firmware, Init, Initramfs, Kernel, Login, RootMounted, Target};

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
    // --- an encrypted disk: cryptsetup's own prompt, those of initramfs-tools, of systemd, of Alpine; GRUB's ---
    passphrase(
        "passphrase prompt (GRUB)",
        r"Enter passphrase for (?:hd|lvm/|md/|crypto)\S* ?(?:\(.*\))?: ?$",
    ),
    passphrase(
        "passphrase prompt",
        r"(?:Please unlock disk \S+|(?:Please )?[Ee]nter (?:the )?(?:LUKS )?[Pp]assphrase for .+|^Password (?:for )?\(?/dev/\S+\)?): ?[\x80-\xff]* ?(?:\(press TAB for no echo\))? ?(?:\[ *\d+\.\d+\].*)?$",
    ),
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
    failure("GRUB rescue prompt", Reason::BootLoader, r"^grub rescue> ?$|Entering rescue mode\.\.\."),
    failure("GRUB prompt", Reason::BootLoader, r"^grub> ?$|Minimal BASH-like line editing is supported"),
    failure(
        "GRUB cannot read the disk",
        Reason::BootLoader,
        r"^(?:GRUB )?(?:Geom|Hard Disk|Floppy|Read) Error|^error: (?:\S+:)? ?(?:failure reading|attempt to read or write outside of)",
    ),
    // What GRUB misses may be a font, or a disk that its configuration only guessed; a kernel is no such thing.
    failure(
        "GRUB cannot load",
        Reason::BootLoader,
        r"^error: (?:\S+:)? ?(?:you need to load the (?:kernel|Linux|linux) |invalid arch-independent ELF magic|invalid magic number|file `[^']*(?:vmlinuz|linux|bzImage|kernel|initr)[^']*' not found)",
    ),
    failure(
        "SYSLINUX cannot load",
        Reason::BootLoader,
        r"Could not find kernel image: |Failed to load (?:ldlinux|libcom32|COM32)|^Loading \S+ ?failed: |^No DEFAULT or UI configuration directive found|^LILO? ?$|^L [0-9]{2}",
    ),
    failure("SYSLINUX prompt", Reason::BootLoader, r"^boot: ?$"),
    failure(
        "systemd-boot cannot load",
        Reason::BootLoader,
        r"^Error loading (?:EFI binary )?\\|^Failed to execute .*\(\\.*\): |^Error (?:preparing|registering) initrd: |^No loader found\. ",
    ),
    failure(
        "Windows boot manager",
        Reason::BootLoader,
        r"^(?:BOOTMGR is (?:missing|compressed)|NTLDR is (?:missing|compressed)|Remove disks or other media)|Windows failed to start|An operating system wasn't found",
    ),
    // --- the firmware gives up ---
    failure(
        "no bootable device (BIOS)",
        Reason::NoBootLoader,
        r"No bootable device|[Mm]issing operating system|^Missing OS\b|Multiple active partitions|Operating system not found|Invalid partition table|Error loading operating system|Operating system load error|[Nn]on-[Ss]ystem disk|This is not a bootable disk|No boot(?:able)? (?:device|disk)|FATAL: No bootable|Nothing to boot:",
    ),
    // Its shell is the last thing that it tries.
    failure(
        "no bootable device (UEFI)",
        Reason::NoBootLoader,
        r#"BdsDxe: No bootable option|BdsDxe: (?:loading|starting) Boot[0-9A-F]{4} "(?:EFI Internal|UEFI) Shell"|UEFI Interactive Shell|^Shell> ?$|Map: No mapping found|^ *(?:> )?Boot Maintenance Manager *$"#,
    ),
    // --- stations ---
    station("SeaBIOS", Firmware, r"^SeaBIOS \(version|^BdsDxe: "),
    station("disk", DiskSeen, r"^Booting from Hard Disk|^BdsDxe: (?:loading|starting|failed to load) Boot"),
    // (What is its shell is a failure, whose line stands for nothing else.)
    station("boot option", BootLoader, r"^BdsDxe: starting Boot"),
    station(
        "boot loader",
        BootLoader,
        r"GNU GRUB +version|^GRUB loading|Welcome to GRUB|^(?:SYS|ISO|EXT)LINUX \d|systemd-boot|^Booting `|^Loading (?:Linux|initial ramdisk)",
    ),
    station("kernel", Kernel, r"EFI stub: |Linux version \d|^FreeBSD \d.*-RELEASE|Decompressing Linux"),
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
        r"systemd\[1\]: systemd .* running in system mode|INIT: version |OpenRC [\w.]+ is starting up|^Welcome to (?:[^G]|G[^R]|GR[^U]).*!|Run /(?:usr/)?s?bin/\S+ as init process|^Starting syslogd|Entering runlevel|runit: ",
    ),
    station("basic system", Init, r"Reached target (?:basic\.target|Basic System)"),
    // --- what may explain a failure later ---
    note("GRUB", r"^error: "),
    // A BIOS goes on to the next disk then.
    note("BIOS", r"^Boot failed: "),
    note("UEFI", r"^BdsDxe: (?:failed|loading|starting)"),
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

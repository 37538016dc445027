//! What lines of real consoles are taken for.

use super::*;
use Milestone::{Login, Target};

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
    for line in ["Last login: Sat Nov 28", "Starting User login: x", "no login: here please", "login: root"] {
        assert_eq!(verdict(line), None, "{line}");
    }
}

#[test]
fn encrypted_disks_ask_for_their_passphrase() {
    let is_prompt = |line: &str| {
        Patterns::new().unwrap().on(line).next().is_some_and(|pattern| pattern.sign == Sign::Passphrase)
    };
    for line in [
        "Begin: Mounting root file system ... Begin: Running /scripts/local-top ... Please unlock disk sda5_crypt: ",
        "Please unlock disk sda5_crypt: ",
        "Please unlock disk sda5_crypt: [    5.102] usb 1-1: new device",
        "Please enter passphrase for disk luks-0f5e7b0a: (press TAB for no echo) ",
        "\u{1f510} Please enter passphrase for disk QEMU HARDDISK (root): \u{2328}\u{fe0f} (press TAB for no echo) ",
        "Enter passphrase for /dev/vda2: ",
        "Enter passphrase for hd0,msdos1 (0f5e7b0a6a554f6c8f0e3f1c4d6b9a11): ",
        "Password (/dev/vda2): ",
    ] {
        assert!(is_prompt(line), "{line}");
    }
    for line in [
        "Please enter passphrase for disk luks-0f5e7b0a: (press TAB for no echo) ***",
        "Enter passphrase for /dev/vda2: ******",
        "Password: ",
        "Please unlock disk",
        "cryptsetup: sda5_crypt: set up successfully",
    ] {
        assert!(!is_prompt(line), "{line}");
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
        &["Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(254,1)", "mountroot> "],
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
            "error: file `/boot/vmlinuz-6.1.0' not found.",
            "error: you need to load the kernel first.",
            "Could not find kernel image: vmlinuz-0.0",
            "error: ../../grub-core/fs/fshelp.c:257:file `/boot/vmlinuz-6.1.0' not found.",
            "error: ../../grub-core/loader/i386/linux.c:1129:you need to load the kernel first.",
            "GRUB Hard Disk Error",
            "Loading /vmlinuz-0.0 failed: No such file or directory",
            "Error loading \\vmtest\\linux: Not Found",
            "Failed to execute Debian (\\EFI\\Linux\\debian.efi): Load Error",
            "BOOTMGR is missing",
        ],
    );
    fails(
        Reason::NoBootLoader,
        &[
            "No bootable device.",
            "Missing operating system.",
            "Operating system load error.",
            "BdsDxe: loading Boot0002 \"EFI Internal Shell\" from Fv(7CB8BDC9-F8EB-4F34-AAEA-3EE4AF6516A1)",
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
        // Loaders go on after these.
        "error: no suitable video mode found.",
        "error: no such device: 5b1c9f3e-8a70-4d0c-9a55-0d3b6c2f7a11.",
        "error: file `/boot/grub/fonts/unicode.pf2' not found.",
        "Boot failed: not a bootable disk",
        "BdsDxe: failed to load Boot0001 \"UEFI Misc Device\" from PciRoot(0x0)/Pci(0x2,0x0): Not Found",
        // What services say is no boot loader's.
        "Failed to start Load Kernel Modules.",
        "Failed to load SELinux policy.",
        "Loading kernel modules... failed",
        "EXT4-fs (vda1): mounted filesystem with ordered data mode.",
    ] {
        assert_eq!(verdict(line), None, "{line}");
    }
}

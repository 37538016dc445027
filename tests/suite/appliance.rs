//! File systems that only an appliance can change, changed by one under qemu with a guest's own kernel, and by one that
//! is a User-Mode Linux; judged by the file systems' own checkers and by our readers, which share no code with the kernel that wrote.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use appliance::{Appliance, HostEngine, Kernel, Mount, Mounted, Options, UmlEngine};
use block::file::{FileOptions, HostFile};
use block::raw::{Raw, RawOptions};
use block::slice::Slice;
use block::{BlockDevice, ErrorKind, Result};
use bootcheck::qemu::{Accelerator, QemuEngine, ServeDisks};
use guestdisk::Disks;
use guestdisk::detect::Kind;
use guestdisk::fs::{FileKind, FileSystem};
use guestedit::{Attributes, GuestFs};
use nbd_server::server::event::Silent;
use nbd_server::server::export::{Export, ExportOptions};
use nbd_server::server::listen::Listener;
use nbd_server::server::{Config, Handle, Limits, Server};
use nbd_server::tls::Policy;

use tests::guests::{guests, qemu_system};
use tests::skip::{root, tool};
use tests::{Cmd, Dir, command, guest, requires};

/// Before the file system on the second disk, so that it is a window and not a whole file.
const BEFORE: u64 = 1 << 20;

#[derive(Debug)]
struct ByNbd;

struct Serving(Handle, Option<JoinHandle<()>>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.stop();
        drop(self.1.take().map(JoinHandle::join));
    }
}

impl ServeDisks for ByNbd {
    fn serve(&self, disks: Vec<(Arc<dyn BlockDevice>, bool)>, socket: &Path) -> Result<Box<dyn Send>> {
        let export = |(index, (device, read_only)): (usize, (Arc<dyn BlockDevice>, bool))| {
            let options = ExportOptions { read_only, ..ExportOptions::default() };
            Arc::new(Export::new(format!("disk{index}"), device, options))
        };
        let mut server = Server::new(Config {
            exports: disks.into_iter().enumerate().map(export).collect(),
            tls: None,
            tls_policy: Policy::Off,
            limits: Limits { drain: Duration::from_secs(1), ..Limits::default() },
            once: false,
            log: Arc::new(Silent),
        })?;
        server.listen(Listener::unix(socket, Some(0o600))?);
        let handle = server.handle();
        let thread = std::thread::spawn(move || drop(server.run()));
        Ok(Box::new(Serving(handle, Some(thread))))
    }
}

fn engine() -> QemuEngine {
    QemuEngine {
        program: "qemu-system-x86_64".into(),
        wrapper: vec!["setpriv".into(), "--pdeathsig".into(), "KILL".into()],
        accelerator: Accelerator::Tcg,
        directory: std::env::temp_dir(),
        server: Arc::new(ByNbd),
    }
}

/// The kernel of the Debian guest, read from its disk.
fn kernel(guests: &Path, file_systems: &[&str]) -> Kernel {
    let disks = Disks::open(guest::open(&guests.join("debian.raw"))).unwrap();
    let root = disks.volumes().iter().find(|volume| volume.is_readable()).unwrap().file_system().unwrap();
    let modules = root.read_dir("/usr/lib/modules").unwrap();
    let release = modules[0].name.to_str().unwrap();
    let folder = Path::new("/lib/modules").join(release);
    let image = PathBuf::from(format!("/boot/vmlinuz-{release}"));
    Kernel::from_guest(&root, &image, &root, &folder, file_systems).unwrap()
}

fn writable(path: &Path) -> Arc<dyn BlockDevice> {
    let file = HostFile::open(path, &FileOptions::read_write()).unwrap();
    Arc::new(Raw::open(Arc::new(file), RawOptions::default()).unwrap())
}

/// Bytes that do not compress to nothing.
fn noise(len: usize) -> Vec<u8> {
    let mut random = block::testing::Random::new(5);
    (0..len.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).take(len).collect()
}

/// All that can be done with a file system; `big` is the contents of the largest file.
fn change(fs: &mut dyn GuestFs, big: &[u8]) {
    let root = |mode| Attributes::mode(mode);
    let path = Path::new;
    fs.mkdir(path("/etc"), &root(0o755)).unwrap();
    fs.mkdir(path("/boot"), &root(0o700)).unwrap();
    let owned = Attributes {
        uid: 12,
        gid: 34,
        mtime: Some(1_234_567_890),
        xattrs: vec![
            (b"user.color".to_vec(), b"blue".to_vec()),
            (b"security.selinux".to_vec(), b"a:b:c\0".to_vec()),
        ],
        ..root(0o4750)
    };
    fs.create(path("/etc/owned"), b"one\n", &owned).unwrap();
    let stat = fs.stat(path("/etc/owned")).unwrap().unwrap();
    assert_eq!((stat.mode, stat.uid, stat.gid, stat.size, stat.mtime), (0o4750, 12, 34, 4, 1_234_567_890));
    assert_eq!(fs.xattr(path("/etc/owned"), "security.selinux").unwrap().unwrap(), b"a:b:c\0");
    assert_eq!(fs.xattr(path("/etc/owned"), "user.none").unwrap(), None);
    fs.replace(path("/etc/owned"), b"another text\n").unwrap();
    let after = fs.stat(path("/etc/owned")).unwrap().unwrap();
    assert_eq!((after.mode & 0o777, after.uid, after.links, after.node), (0o750, 12, 1, stat.node));
    assert_eq!(fs.xattr(path("/etc/owned"), "user.color").unwrap().unwrap(), b"blue");
    fs.create(path("/boot/initrd"), &big[..1000], &root(0o644)).unwrap();
    fs.replace(path("/boot/initrd"), big).unwrap();
    assert_eq!(fs.read(path("/boot/initrd"), 1 << 30).unwrap(), big);
    // What hostile links say ends at the root of the file system.
    fs.symlink(path("/up"), path("../../../.."), &root(0o777)).unwrap();
    fs.symlink(path("/proc"), path("/"), &root(0o777)).unwrap();
    assert_eq!(fs.read(path("/up/etc/owned"), 100).unwrap(), b"another text\n");
    assert_eq!(fs.read(path("/proc/../up/etc/owned"), 100).unwrap(), b"another text\n");
    assert_eq!(fs.stat(path("/up/init")).unwrap(), None);
    assert_eq!(fs.stat(path("/proc/mounts")).unwrap(), None);
    assert_eq!(fs.stat(path("/up")).unwrap().unwrap().kind, FileKind::Symlink);
    assert_eq!(fs.read_link(path("/up")).unwrap(), path("../../../.."));
    refusals(fs);
    for number in 0..100 {
        fs.create(&PathBuf::from(format!("/boot/file-{number}")), b"x", &root(0o600)).unwrap();
    }
    fs.remove(path("/boot/file-7")).unwrap();
    assert_eq!(fs.list(path("/boot")).unwrap().len(), 100);
    let room = fs.free().unwrap();
    assert!(room.bytes > 20 << 20 && room.bytes < 500 << 20, "{room:?}");
    fs.sync().unwrap();
}

fn refusals(fs: &mut dyn GuestFs) {
    let (path, root) = (Path::new, Attributes::mode(0o644));
    for (error, kind) in [
        (fs.create(path("/etc/owned"), b"", &root).unwrap_err(), ErrorKind::Usage),
        (fs.create(path("/nowhere/x"), b"", &root).unwrap_err(), ErrorKind::NotFound),
        (fs.mkdir(path("/etc"), &root).unwrap_err(), ErrorKind::Usage),
        (fs.replace(path("/etc/none"), b"").unwrap_err(), ErrorKind::NotFound),
        (fs.replace(path("/up"), b"").unwrap_err(), ErrorKind::Usage),
        (fs.replace(path("/etc"), b"").unwrap_err(), ErrorKind::Usage),
        (fs.read(path("/etc"), 9).unwrap_err(), ErrorKind::Usage),
        (fs.read(path("/etc/owned"), 3).unwrap_err(), ErrorKind::Unsupported),
        (fs.remove(path("/etc")).unwrap_err(), ErrorKind::Usage),
        (fs.remove(path("/etc/none")).unwrap_err(), ErrorKind::NotFound),
        (fs.list(path("/etc/owned")).unwrap_err(), ErrorKind::NotFound),
    ] {
        assert_eq!(error.kind(), kind, "{error}");
    }
}

/// A file that is too large is not there afterwards.
fn overfill(fs: &mut dyn GuestFs) {
    let (path, room) = (Path::new("/too-big"), fs.free().unwrap().bytes);
    let bytes = vec![1; usize::try_from(room).unwrap() + (20 << 20)];
    let error = fs.create(path, &bytes, &Attributes::mode(0o644)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert_eq!(fs.stat(path).unwrap(), None);
}

/// What our reader, which knows nothing of the kernel's, finds.
fn judge(device: Arc<dyn BlockDevice>, big: &[u8]) {
    let fs = FileSystem::open(device).unwrap();
    assert!(fs.notes().is_empty(), "{:?}", fs.notes());
    let owned = fs.metadata("/etc/owned").unwrap();
    assert_eq!((owned.uid, owned.gid, owned.kind), (12, 34, FileKind::File));
    assert_eq!(fs.read("/etc/owned", 100).unwrap(), b"another text\n");
    assert!(fs.read("/boot/initrd", 1 << 30).unwrap() == big);
    assert_eq!(fs.read_dir("/boot").unwrap().len(), 100);
    assert_eq!(fs.read_link("/up").unwrap(), Path::new("../../../.."));
    assert!(!fs.exists("/too-big"));
}

/// A program of the guest runs with the guest's file system as its root.
fn run(fs: &mut Mounted) {
    let Some(busybox) = command::find("busybox") else { return };
    let executable = Attributes::mode(0o755);
    fs.create(Path::new("/busybox"), &std::fs::read(busybox).unwrap(), &executable).unwrap();
    fs.mkdir(Path::new("/sys"), &executable).unwrap();
    fs.mkdir(Path::new("/dev"), &executable).unwrap();
    let script = "echo $COLOR; cat /etc/owned; echo made >/etc/made; test -c /dev/null && exit 3";
    let limit = Duration::from_secs(120);
    let ran = fs.run(&["/busybox", "sh", "-c", script], &[("COLOR", "red")], limit).unwrap();
    assert_eq!((ran.code, ran.timed_out), (Some(3), false), "{}", String::from_utf8_lossy(&ran.bytes));
    assert_eq!(ran.bytes, b"red\nanother text\n");
    assert_eq!(fs.read(Path::new("/etc/made"), 100).unwrap(), b"made\n");
    let begin = Instant::now();
    let slow = fs.run(&["/busybox", "sleep", "1000"], &[], Duration::from_secs(1)).unwrap();
    assert!(slow.timed_out && begin.elapsed() < limit, "{slow:?}");
    assert!(fs.run(&["/none"], &[], limit).unwrap_err().to_string().contains("/none"));
}

#[test]
fn xfs_and_btrfs_are_changed_by_a_guests_kernel() {
    requires!(qemu_system(), tool("setpriv"), tool("mkfs.xfs"), tool("mkfs.btrfs"), tool("xfs_repair"));
    let guests = match guests() {
        Ok(guests) => guests,
        Err(reason) => return tests::skip::note(&reason),
    };
    let dir = Dir::new();
    let (xfs, btrfs, broken) = (dir.file("xfs"), dir.file("btrfs"), dir.file("broken"));
    dir.sparse("xfs", 400 << 20);
    dir.sparse("btrfs", 160 << 20);
    Cmd::new("mkfs.xfs").words("-q xfs").dir(dir.path()).ok();
    Cmd::new("mkfs.btrfs").words("-q btrfs").dir(dir.path()).ok();
    // An XFS in which nothing but its first sectors is whole.
    dir.copy("xfs", "broken");
    dir.poke("broken", 4096, &noise(8 << 20));
    // The btrfs lies behind something else on its disk.
    let whole = [vec![0; 1 << 20], std::fs::read(&btrfs).unwrap()].concat();
    std::fs::write(&btrfs, whole).unwrap();
    let window =
        |device| -> Arc<dyn BlockDevice> { Arc::new(Slice::new(device, BEFORE, 160 << 20).unwrap()) };

    let kernel = kernel(&guests, &["xfs", "btrfs"]);
    let disks = vec![writable(&xfs), window(writable(&btrfs)), writable(&broken)];
    let appliance = Appliance::start(disks, &kernel, &engine(), Options::default()).unwrap();
    assert!(appliance.notes().is_empty(), "{:?}", appliance.notes());
    let big = noise(20_000_000);
    let error = appliance.mount(&Mount::whole(2, Kind::Xfs)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io), "{error:?}");
    appliance.mount(&Mount::whole(9, Kind::Xfs)).unwrap_err();
    let unknown = appliance.mount(&Mount::whole(0, Kind::F2fs)).unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::Unsupported, "{unknown}");
    for (disk, kind) in [(0, Kind::Xfs), (1, Kind::Btrfs)] {
        let mut fs = appliance.mount(&Mount::whole(disk, kind)).unwrap();
        change(&mut fs, &big);
        if kind == Kind::Btrfs {
            fs.remove(Path::new("/proc")).unwrap();
            fs.mkdir(Path::new("/proc"), &Attributes::mode(0o755)).unwrap();
            fs.mkdir(Path::new("/run"), &Attributes::mode(0o755)).unwrap();
            overfill(&mut fs);
            run(&mut fs);
        }
    }
    appliance.shutdown().unwrap();

    judge(guest::open(&xfs), &big);
    judge(window(guest::open(&btrfs)), &big);
    Cmd::new("xfs_repair").words("-n xfs").dir(dir.path()).ok();
    let bare = std::fs::read(&btrfs).unwrap().split_off(1 << 20);
    std::fs::write(&btrfs, bare).unwrap();
    Cmd::new("btrfs").words("check btrfs").dir(dir.path()).ok();
}

/// An installed User-Mode Linux, and the folder of its modules.
fn user_mode_linux() -> std::result::Result<(UmlEngine, PathBuf), String> {
    let program = command::find("linux.uml").ok_or_else(|| "no linux.uml on this machine".to_owned())?;
    let engine = UmlEngine { program, directories: vec!["/dev/shm".into(), std::env::temp_dir()] };
    let modules = Path::new("/usr/lib/uml/modules").join(engine.release().map_err(|e| e.to_string())?);
    Ok((engine, modules))
}

/// Processes that are, or guard, a User-Mode Linux of this one, by the name of the folder in their words.
fn left_of_ours() -> Vec<String> {
    let mark = format!("/vimg-uml-{}-", std::process::id());
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let words = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let words = words.map(|words| String::from_utf8_lossy(&words).replace('\0', " "));
    words.filter(|words| words.contains(&mark)).collect()
}

#[test]
fn xfs_and_btrfs_are_changed_by_a_user_mode_linux() {
    requires!(tool("linux.uml"), tool("mkfs.xfs"), tool("mkfs.btrfs"), tool("xfs_repair"));
    let (engine, modules) = match user_mode_linux() {
        Ok(found) => found,
        Err(reason) => return tests::skip::note(&reason),
    };
    let dir = Dir::new();
    dir.sparse("xfs", 400 << 20);
    dir.sparse("btrfs", 160 << 20);
    Cmd::new("mkfs.xfs").words("-q xfs").dir(dir.path()).ok();
    Cmd::new("mkfs.btrfs").words("-q btrfs").dir(dir.path()).ok();
    let kernel = Kernel::from_uml(&modules, &["xfs", "btrfs"]).unwrap();
    assert_eq!(kernel.missing, Vec::<String>::new());
    let disks = vec![writable(&dir.file("xfs")), writable(&dir.file("btrfs"))];
    let options = || Options { memory_bytes: 256 << 20, ..Options::default() };
    let appliance = match Appliance::start(disks, &kernel, &engine, options()) {
        // Some containers do not let a process be traced.
        Err(error) if error.to_string().contains("ptrace") => return tests::skip::note(&error.to_string()),
        started => started.unwrap(),
    };
    let big = noise(1_000_000);
    for (disk, kind) in [(0, Kind::Xfs), (1, Kind::Btrfs)] {
        let mut fs = appliance.mount(&Mount::whole(disk, kind)).unwrap();
        change(&mut fs, &big);
    }
    appliance.shutdown().unwrap();
    assert_eq!(left_of_ours(), Vec::<String>::new());
    judge(guest::open(&dir.file("xfs")), &big);
    judge(guest::open(&dir.file("btrfs")), &big);
    Cmd::new("xfs_repair").words("-n xfs").dir(dir.path()).ok();
    Cmd::new("btrfs").words("check btrfs").dir(dir.path()).ok();

    // Without a goodbye nothing is left, either.
    let disks = vec![writable(&dir.file("xfs"))];
    let appliance = Appliance::start(disks, &kernel, &engine, options()).unwrap();
    assert_ne!(left_of_ours(), Vec::<String>::new());
    drop(appliance);
    failing_starts(&kernel);
    assert_eq!(left_of_ours(), Vec::<String>::new());
}

/// One that cannot start says why.
fn failing_starts(kernel: &Kernel) {
    let start = |program: &str, memory_bytes| {
        let engine = UmlEngine { program: program.into(), directories: vec![std::env::temp_dir()] };
        let options = Options { memory_bytes, ..Options::default() };
        Appliance::start(vec![], kernel, &engine, options).unwrap_err().to_string()
    };
    let program = command::find("linux.uml").unwrap();
    let error = start(program.to_str().unwrap(), 1 << 50);
    assert!(error.contains("memory of a User-Mode Linux") && error.contains("has only"), "{error}");
    let error = start("/nowhere/linux.uml", 64 << 20);
    assert!(error.contains("/nowhere/linux.uml") || error.contains("exit code"), "{error}");
    assert!(start("/bin/true", 64 << 20).contains("it has ended"));
}

/// File systems of this list that the host's kernel knows already.
fn host_knows(kinds: &[Kind]) -> std::result::Result<Vec<Kind>, String> {
    for device in ["/dev/fuse", "/dev/loop-control"] {
        std::fs::metadata(device).map_err(|_| format!("no {device} on this machine"))?;
    }
    // Root of a container may not be allowed to mount anything.
    let tried = std::process::Command::new("unshare").args(["--mount", "true"]).status();
    if !tried.is_ok_and(|status| status.success()) {
        return Err("no mount namespaces for this root".to_owned());
    }
    let known = std::fs::read_to_string("/proc/filesystems").map_err(|e| e.to_string())?;
    let known: Vec<_> = known.split_whitespace().collect();
    let kinds: Vec<_> = kinds.iter().copied().filter(|kind| known.contains(&kind.name())).collect();
    if kinds.is_empty() { Err("the host's kernel knows neither XFS nor btrfs".to_owned()) } else { Ok(kinds) }
}

#[test]
fn xfs_and_btrfs_are_changed_by_the_hosts_kernel() {
    requires!(root(), tool("mkfs.xfs"), tool("mkfs.btrfs"), tool("xfs_repair"));
    let kinds = match host_knows(&[Kind::Xfs, Kind::Btrfs]) {
        Ok(kinds) => kinds,
        Err(reason) => return tests::skip::note(&reason),
    };
    let dir = Dir::new();
    for kind in &kinds {
        let name = kind.name();
        dir.sparse(name, if *kind == Kind::Xfs { 400 << 20 } else { 160 << 20 });
        Cmd::new(format!("mkfs.{name}")).words(&format!("-q {name}")).dir(dir.path()).ok();
    }
    let disks = || kinds.iter().map(|kind| writable(&dir.file(kind.name()))).collect();
    let start = || Appliance::start(disks(), &Kernel::of_host(), &HostEngine, Options::default()).unwrap();
    // Sources of mounts that others would see.
    let seen = || {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(" - fuse vimg ") || mounts.contains(" - tmpfs vimg ")
    };
    let big = noise(1_000_000);
    let appliance = start();
    for (disk, kind) in kinds.iter().enumerate() {
        let mut fs = appliance.mount(&Mount::whole(disk, *kind)).unwrap();
        change(&mut fs, &big);
        let program = fs.run(&["/bin/true"], &[], Duration::from_secs(10)).unwrap_err();
        assert_eq!(program.kind(), ErrorKind::Permission, "a guest's program ran on the host: {program}");
        assert!(!seen());
    }
    appliance.shutdown().unwrap();
    for kind in &kinds {
        judge(guest::open(&dir.file(kind.name())), &big);
    }
    check_all(&dir, &kinds);
    // Without a goodbye the kernel puts everything away.
    let appliance = start();
    let _fs = appliance.mount(&Mount::whole(0, kinds[0])).unwrap();
    drop((_fs, appliance));
    check_all(&dir, &kinds);
}

fn check_all(dir: &Dir, kinds: &[Kind]) {
    for kind in kinds {
        match kind {
            Kind::Xfs => Cmd::new("xfs_repair").words("-n xfs").dir(dir.path()).ok(),
            _ => Cmd::new("btrfs").words("check btrfs").dir(dir.path()).ok(),
        };
    }
}

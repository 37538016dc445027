use super::*;
use crate::program;
use crate::session::INIT;

#[test]
fn memory_is_only_put_where_there_is_room() {
    let here = std::env::temp_dir();
    let folder = Folder::new(&here, "uml-test").unwrap();
    let good = folder.path().to_owned();
    assert_eq!(roomy(&[PathBuf::from("/nowhere"), good.clone()], 4096).unwrap(), good);
    let error = roomy(std::slice::from_ref(&good), 1 << 60).unwrap_err();
    assert!(error.to_string().contains("has only"), "{error}");
    let error = roomy(&[], 4096).unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::Unsupported);
    assert!(unfit(&good.join("a b"), 4096).is_some_and(|why| why.contains("name")));
    assert!(unfit(Path::new(&"/x".repeat(60)), 4096).is_some_and(|why| why.contains("name")));
}

#[test]
fn every_disk_has_its_socket() {
    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};
    use bootcheck::engine::{Disk, Transport};
    let device: Arc<dyn block::BlockDevice> =
        Arc::new(Raw::open(Arc::new(MemStorage::new()), RawOptions::default()).unwrap());
    let disk = Disk { device, read_only: false, serial: String::new() };
    let spec = MachineSpec {
        cpus: 1,
        memory_bytes: 64 << 20,
        disks: vec![disk.clone(), disk],
        transport: Transport::Pci,
        boot: Boot::Firmware { code: Arc::from([]), vars: None },
    };
    let args = args(Path::new("/f"), &spec, "quiet  rdinit=/init");
    let args: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
    let expected = "mem=64M initrd=/f/initrd uml_dir=/f/ con=null ssl=null ssl0=fd:0 \
        virtio_uml.device=/f/disk0:2:0 virtio_uml.device=/f/disk1:2:1 quiet rdinit=/init";
    assert_eq!(args.join(" "), expected);
    let engine = UmlEngine { program: "/bin/true".into(), directories: vec![] };
    struct Nobody;
    impl Observer for Nobody {
        fn console(&self, _: &[u8], _: std::time::Instant) {}
    }
    assert_eq!(engine.build(spec, Arc::new(Nobody)).unwrap_err().kind(), block::ErrorKind::Usage);
    engine.release().unwrap_err();
}

/// Processes of which a word is `word`.
fn running(word: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_one = |number: &u32| {
        let words = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).any(|found| found == word.as_bytes())
    };
    numbers.filter(is_one).collect()
}

#[test]
fn nothing_is_left_when_the_owner_goes() {
    use std::io::Read as _;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::process::Stdio;
    if INIT.is_empty() {
        return;
    }
    let init = program::init().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let word = format!("1000.{}", std::process::id());
    // One in its own session, one in the background of the guarded program, and that itself.
    let script = format!("setsid sleep {word} & sleep {word} & echo >&0; sleep {word}");
    let mut command = Command::new(program::path(&init));
    command.args([crate::wire::GUARD, "/bin/sh", "-c", &script]).stdin(Stdio::from(OwnedFd::from(theirs)));
    let mut guard = program::spawn(&mut command).unwrap();
    drop(command);
    ours.read_exact(&mut [0]).unwrap();
    assert!(!running(&word).is_empty());
    drop(ours);
    guard.wait().unwrap();
    assert_eq!(running(&word), Vec::<u32>::new());
}

#[test]
fn what_is_confined_reaches_neither_the_network_nor_the_users_files() {
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsRawFd as _;
    let folder = Folder::new(&std::env::temp_dir(), "uml-confine").unwrap();
    let outside = Folder::new(&std::env::temp_dir(), "uml-outside").unwrap();
    let path = folder.path().to_owned();
    std::fs::write(outside.file("secret"), "x").unwrap();
    let secret = outside.file("secret");
    let confined = std::thread::spawn(move || {
        let has_landlock = confine::enter(Path::new("/bin/true"), &path).unwrap();
        let errno = |error: std::io::Error| error.raw_os_error().unwrap();
        let own = path.join("own");
        let mut file = std::fs::File::create_new(&own).unwrap();
        std::io::Write::write_all(&mut file, &[1; 4096]).unwrap();
        assert_eq!(errno(file.set_len(0).unwrap_err()), nix::libc::EPERM);
        assert_eq!(errno(std::fs::File::create(&own).unwrap_err()), nix::libc::EPERM);
        // Whatever file system that is on: it is the call that is not let through.
        let collapse = FallocateFlags::FALLOC_FL_COLLAPSE_RANGE;
        assert_eq!(fallocate(&file, collapse, 0, 4096), Err(nix::errno::Errno::EPERM));
        // Files in memory are in no folder, so that Landlock has no say in them.
        let memory = memfd_create(c"memory", MFdFlags::empty()).unwrap();
        let memory = format!("/proc/self/fd/{}", memory.as_raw_fd());
        assert_eq!(errno(std::fs::File::create(memory).unwrap_err()), nix::libc::EPERM);
        assert_eq!(file.metadata().unwrap().len(), 4096);
        assert_eq!(errno(std::net::TcpListener::bind("127.0.0.1:0").unwrap_err()), nix::libc::EPERM);
        if has_landlock {
            assert_eq!(errno(std::fs::read(&secret).unwrap_err()), nix::libc::EACCES);
            assert_eq!(errno(Command::new("/bin/sh").spawn().unwrap_err()), nix::libc::EACCES);
        }
        has_landlock
    });
    confined.join().unwrap();
}

//! vimg under the name qemu-nbd, side by side with the real one.

use std::io::Read as _;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tests::server::{Server, fresh_socket, libnbd, python, vimg_as_qemu_nbd};
use tests::skip::{qemu10, tool};
use tests::{Cmd, Dir, requires};

fn both(dir: &Dir) -> [Cmd; 2] {
    [Cmd::new("qemu-nbd").dir(dir.path()), vimg_as_qemu_nbd(dir)]
}

/// Everything that is wrong is wrong with both, in the same words and with the same exit code.
#[test]
fn mistakes() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    dir.qemu_ok("create -f qcow2 a.qcow2 1M");
    for words in [
        "",
        "a b",
        "--foo",
        "--foo=x a.raw",
        "-Z a.raw",
        "-p",
        "--port",
        "--ver",
        "--persistent=3 a.raw",
        "-k rel a.raw",
        "-e -1 a.raw",
        "-e x a.raw",
        "--shared=99999999999 a.raw",
        "--cache=foo a.raw",
        "--aio=foo a.raw",
        "--discard=foo a.raw",
        "--detect-zeroes=foo a.raw",
        "--detect-zeroes=unmap a.raw",
        "-n --cache=none a.raw",
        "--cache=none --cache=none a.raw",
        "--aio=threads --aio=native a.raw",
        "--discard=unmap --discard=ignore a.raw",
        "--aio=native -f raw a.raw",
        "-o x a.raw",
        "-o 2M a.raw",
        "-f raw -o -1 a.raw",
        "-f raw -k SOCKET -o 2097152 a.raw",
        "-f foo a.raw",
        "-k SOCKET nofile",
        "-f qcow2 -k SOCKET a.raw",
        "--handshake-limit=x a.raw",
        "--handshake-limit=-1 a.raw",
        "-L a.raw",
        "-L -x foo",
        "-L -D foo",
        "-L -A",
        "-L -B x",
        "-L -f raw",
        "-L -n",
        "-L -o 1",
        "-L -c x",
        "-L -l x",
        "-L --fork",
        "-f raw -B x -k SOCKET a.raw",
        "-f qcow2 -l x -k SOCKET a.qcow2",
        "--tls-creds=x -k SOCKET a.raw",
        "--tls-authz=x -k SOCKET a.raw",
        "--tls-hostname=x -k SOCKET a.raw",
        "--selinux-label=x a.raw",
        "--image-opts -f raw a.raw",
        "-f raw -c /nosuch/nbd0 a.raw",
        "-d /nosuch/nbd0",
        "--fork -f raw nosuch",
        "-- -f",
    ] {
        let words = words.replace("SOCKET", &dir.file("s").display().to_string());
        let [theirs, ours] = both(&dir).map(|cmd| cmd.words(&words).timeout(60).run());
        // The real one names itself as it was called here: by its path.
        let path = tests::command::find("qemu-nbd").unwrap().display().to_string();
        let said = theirs.stderr.replace(&path, "qemu-nbd");
        let called = ours.stderr.replace(&dir.file("qemu-nbd").display().to_string(), "qemu-nbd");
        let same = theirs.code == ours.code && theirs.stdout == ours.stdout && said == called;
        assert!(same, "{words}: the tools differ\n{}{}", theirs.story(), ours.story());
    }
}

/// Places to listen that cannot be had: the same code, and the same reason at the end.
#[test]
fn places_that_cannot_be_had() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for words in [
        format!("-f raw -b 127.0.0.1 -p {port} a.raw"),
        "-f raw -k /nosuch/folder/s a.raw".to_owned(),
        "-f raw -p nosuch a.raw".to_owned(),
        format!("-f raw -k {} --pid-file /nosuch/folder/pid a.raw", fresh_socket(&dir).display()),
    ] {
        let [theirs, ours] = both(&dir).map(|cmd| cmd.words(&words).timeout(60).run());
        let reason = |ran: &tests::Ran| ran.stderr.trim_end().rsplit(": ").next().unwrap().to_owned();
        assert_eq!(
            (theirs.code, reason(&theirs)),
            (ours.code, reason(&ours)),
            "{}{}",
            theirs.story(),
            ours.story()
        );
    }
}

/// The same options give the same export, as libnbd sees it.
#[test]
fn exports_look_alike() {
    requires!(qemu10(), tool("qemu-nbd"), libnbd());
    let script = "
import nbd, sys
h = nbd.NBD(); h.set_opt_mode(True)
for c in ('base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:b'):
    h.add_meta_context(c)
h.connect_uri(sys.argv[1])
exports = []
h.opt_list(lambda name, description: exports.append((name, description)))
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
h.opt_go()
flags = [f for f in ('can_df', 'can_flush', 'can_fua', 'can_trim', 'can_zero', 'can_fast_zero', 'can_cache',
    'can_multi_conn', 'is_read_only', 'is_rotational') if getattr(h, f)()]
print(exports, sorted(contexts), h.get_size(), flags)
print(h.pread(65536, 0)[:64].hex())
h.shutdown()
";
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 disk.qcow2 4M");
    dir.qemu_ok("bitmap --add disk.qcow2 b");
    Cmd::new("qemu-io").words("-f qcow2 disk.qcow2 -c").arg("write -P 3 0 1M").dir(dir.path()).ok();
    dir.qemu_ok("snapshot -c s disk.qcow2");
    Cmd::new("qemu-io").words("-f qcow2 disk.qcow2 -c").arg("write -P 4 0 1M").dir(dir.path()).ok();
    for (words, uri) in [
        ("-t disk.qcow2", ""),
        ("disk.qcow2 -t -e 4", ""),
        ("-tre0 -x name -D what -A -B b -f qcow2 disk.qcow2", "name"),
        ("-t -s -n disk.qcow2", ""),
        ("-t -l s disk.qcow2", ""),
        ("-t -l snapshot.name=s disk.qcow2", ""),
        ("-t -r -o 0x10000 --discard=unmap --detect-zeroes=unmap disk.qcow2", ""),
        ("-t -r -o 01000 disk.qcow2", ""),
        ("-t --image-opts driver=qcow2,file.driver=file,file.filename=disk.qcow2", ""),
        ("-t --cache=unsafe --handshake-limit=0 --trace nosuch disk.qcow2 -f qcow2", ""),
    ] {
        let [theirs, ours] = both(&dir).map(|cmd| {
            let socket = fresh_socket(&dir);
            let server = Server::run_silent(&cmd.arg("-k").arg(&socket).words(words), socket);
            let ran = python(&dir, script, &[&server.uri_of(uri)]);
            let socket = server.socket.clone();
            server.stop();
            assert!(!socket.exists(), "{words}: the socket is left behind");
            ran.stdout
        });
        assert_eq!(theirs, ours, "{words}");
    }
}

/// The list of one and the same server, by both.
#[test]
fn lists() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    dir.sparse("b.raw", 1_000_003);
    let server = Server::start(&dir, "-f raw -D both -A one=a.raw two=b.raw");
    let [theirs, ours] = both(&dir).map(|cmd| cmd.words("-L -k").arg(&server.socket).ok());
    assert_eq!(theirs.stdout, ours.stdout);
    server.stop();
}

#[test]
fn it_ends_with_its_only_client_unless_it_is_to_stay() {
    requires!(tool("nbdinfo"));
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    let socket = fresh_socket(&dir);
    let cmd = vimg_as_qemu_nbd(&dir).words("-f raw a.raw -k").arg(&socket);
    let mut server = Server::run_silent(&cmd, socket);
    // Only one at a time, and looking is not enough to end it.
    Cmd::new("nbdinfo").arg("--size").arg(server.uri()).ok();
    assert_eq!(server.wait().code, Some(0));
    assert!(!server.socket.exists());
}

#[test]
fn in_the_background() {
    requires!(tool("nbdinfo"));
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    let socket = fresh_socket(&dir);
    let ran = vimg_as_qemu_nbd(&dir).words("-f raw --fork --pid-file pid -t a.raw -k").arg(&socket).ok();
    assert_eq!((&*ran.stdout, &*ran.stderr), ("", ""));
    let pid: i32 = String::from_utf8(dir.read("pid")).unwrap().trim().parse().unwrap();
    Cmd::new("nbdinfo").arg("--size").arg(format!("nbd+unix:///?socket={}", socket.display())).ok();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGHUP).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while socket.exists() {
        assert!(Instant::now() < deadline, "SIGHUP does not end it");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_port_is_where_scripts_expect_it() {
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    // Somebody else may be using the port itself.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let cmd = vimg_as_qemu_nbd(&dir).words(&format!("-f raw -r -p{free} -b 127.0.0.1 a.raw"));
    let mut child = cmd.spawn();
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut socket = loop {
        if let Ok(socket) = std::net::TcpStream::connect(("127.0.0.1", free)) {
            break socket;
        }
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "nobody listens");
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    child.kill().unwrap();
    child.wait().unwrap();
}

const ACTIVATE: &str = "
import os, socket, sys
count = int(sys.argv[1])
sockets = [socket.socket(socket.AF_UNIX) for _ in range(count)]
for number, listener in enumerate(sockets):
    listener.listen() if number else listener.bind(b'\\0' + os.urandom(8).hex().encode()) or listener.listen()
sockets = [os.dup(s.fileno()) for s in sockets]
sockets = [os.fdopen(os.dup(s), 'rb').detach() for s in sockets]
high = [os.dup2(s, 100 + n) for n, s in enumerate(sockets)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count))
os.execvp(sys.argv[2], sys.argv[2:])
";

/// What cannot be had together with a socket from systemd.
#[test]
fn socket_activation_is_exclusive() {
    requires!(qemu10(), tool("qemu-nbd"), tool("python3"));
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    vimg_as_qemu_nbd(&dir).arg("-V").ok();
    let ours = dir.file("qemu-nbd");
    for (sockets, words) in [
        ("2", "-f raw a.raw"),
        ("1", "-f raw -p 1 a.raw"),
        ("1", "-f raw -b 1 a.raw"),
        ("1", "-f raw -k /nosuch/s a.raw"),
        ("1", "-f raw -c /dev/nosuch a.raw"),
        ("1", "-f raw --selinux-label=x a.raw"),
        ("1", "-L"),
    ] {
        let run = |program: &std::path::Path| {
            let cmd = Cmd::new("python3").arg("-c").arg(ACTIVATE).arg(sockets).arg(program);
            cmd.words(words).dir(dir.path()).timeout(60).run()
        };
        let (theirs, ours) = (run(&tests::command::find("qemu-nbd").unwrap()), run(&ours));
        assert_eq!((theirs.code, &theirs.stderr), (ours.code, &ours.stderr), "{words}");
        assert_eq!(theirs.code, Some(1), "{}", theirs.story());
    }
}

#[test]
fn help_and_version() {
    let dir = Dir::new();
    let help = vimg_as_qemu_nbd(&dir).arg("--help").ok();
    for option in ["--persistent", "--handshake-limit", "--load-snapshot", "--image-opts", "--selinux-label"]
    {
        assert!(help.stdout.contains(option), "{option}");
    }
    let version = vimg_as_qemu_nbd(&dir).words("-V --foo").ok();
    assert!(version.stdout.starts_with("qemu-nbd 10.0.2 "), "{}", version.stdout);
}

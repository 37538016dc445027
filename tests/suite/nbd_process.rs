//! The process of `vimg serve`: where it listens, how it starts, stops and dies, and what it tells of itself.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::command::{find, vimg_path};
use tests::requires;
use tests::server::{Server, fresh_socket, libnbd, python};
use tests::skip::{not_root, qemu, root, tool};
use tests::{Cmd, Dir};

use crate::nbd_serve::{MIB, disk};

#[test]
fn once_ends_with_its_last_client() {
    requires!(tool("nbdinfo"));
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    let mut server = Server::start(&dir, "-f raw --once disk.raw");
    // Who only looks, is no client.
    Cmd::new("nbdinfo").arg("--list").arg(server.uri()).run();
    assert!(server.is_alive());
    Cmd::new("nbdinfo").arg("--size").arg(server.uri()).ok();
    assert_eq!(server.wait().code, Some(0));
    assert!(!server.socket.exists(), "the socket's file is left");
}

#[test]
fn in_the_background_with_a_pid_file() {
    requires!(tool("nbdinfo"));
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    let socket = fresh_socket(&dir);
    let ran = dir
        .vimg_cmd("serve --fork --pid-file pid -f raw --socket")
        .arg(&socket)
        .arg("disk.raw")
        .run()
        .expect_code(0);
    // The pipes of whoever has started it are closed by now, or run() would not have come back.
    assert!(ran.elapsed < Duration::from_secs(50), "{}", ran.story());
    let pid: i32 = String::from_utf8(dir.read("pid")).unwrap().trim().parse().unwrap();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let size = Cmd::new("nbdinfo").arg("--size").arg(&uri).ok();
    assert_eq!(size.stdout.trim(), "1048576");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while dir.exists("pid") || socket.exists() {
        assert!(Instant::now() < deadline, "it does not end, or leaves files behind");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_server_that_cannot_start_says_so_before_it_goes_into_the_background() {
    let dir = Dir::new();
    dir.vimg("serve --fork --socket s nosuch.qcow2").expect_clean_failure().expect_stderr("nosuch.qcow2");
}

#[test]
fn one_client_on_standard_input_and_output() {
    requires!(libnbd());
    let dir = Dir::new();
    dir.write("disk.raw", &disk(MIB));
    let script = "
import nbd, sys
h = nbd.NBD()
h.connect_command([sys.argv[1], 'serve', '--stdio', '-f', 'raw', sys.argv[2]])
assert h.get_size() == 1 << 20
h.pwrite(b'x' * 70000, 12345)
h.flush()
assert h.pread(70000, 12345) == b'x' * 70000
h.shutdown()
";
    let vimg = vimg_path().display().to_string();
    python(&dir, script, &[&vimg, &dir.file("disk.raw").display().to_string()]);
    assert!(dir.read("disk.raw")[12_345..82_345].iter().all(|byte| *byte == b'x'));
}

const ACTIVATE: &str = "
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(8)
os.dup2(listener.fileno(), 3, inheritable=True) if listener.fileno() != 3 else os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')
os.execv(sys.argv[2], sys.argv[2:])
";

#[test]
fn a_socket_that_systemd_has_opened() {
    requires!(tool("nbdinfo"), tool("python3"));
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    for fork in [false, true] {
        let socket = fresh_socket(&dir);
        let cmd = Cmd::new("python3").arg("-c").arg(ACTIVATE).arg(&socket).arg(vimg_path());
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        if fork {
            cmd.words("serve --fork --pid-file pid -f raw disk.raw").dir(dir.path()).ok();
        } else {
            let server = Server::run_silent(&cmd.words("serve -f raw disk.raw").dir(dir.path()), socket);
            assert_eq!(Cmd::new("nbdinfo").arg("--size").arg(&uri).ok().stdout.trim(), "1048576");
            server.stop();
            continue;
        }
        assert_eq!(Cmd::new("nbdinfo").arg("--size").arg(&uri).ok().stdout.trim(), "1048576");
        let pid: i32 = String::from_utf8(dir.read("pid")).unwrap().trim().parse().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    }
}

#[test]
fn sockets_that_are_in_the_way() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    let mut first = Server::start(&dir, "-f raw --read-only --socket-mode 600 disk.raw");
    let mode = std::fs::metadata(&first.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = || {
        let cmd = dir.vimg_cmd("serve -f raw --read-only --socket").arg(&first.socket).arg("disk.raw");
        (cmd, first.socket.clone())
    };
    let (cmd, socket) = again();
    cmd.run().expect_clean_failure().expect_stderr("another server listens there");
    first.signal(Signal::SIGKILL);
    first.wait();
    assert!(socket.exists(), "nobody could have removed it");
    Server::run(&cmd, socket).stop();
    dir.write("plain", b"precious");
    dir.vimg("serve -f raw --socket plain disk.raw").expect_clean_failure();
    assert_eq!(dir.read("plain"), b"precious");
}

#[test]
fn a_port_that_is_taken() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    dir.vimg(&format!("serve -f raw --listen 127.0.0.1:{port} disk.raw"))
        .expect_clean_failure()
        .expect_stderr("in use");
    let cmd = dir.vimg_cmd("serve -f raw --listen 127.0.0.1:0 disk.raw");
    let server = Server::run(&cmd, fresh_socket(&dir));
    let address = server.uris[0].strip_prefix("nbd://").unwrap();
    let mut greeting = [0; 18];
    std::net::TcpStream::connect(address).unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    server.stop();
}

#[test]
fn mistakes_in_the_command_line() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    for words in [
        "",
        "--stdio --socket s disk.raw",
        "--listen nowhere:x disk.raw",
        "--socket s a=disk.raw disk.raw",
        "--socket s --export x a=disk.raw b=disk.raw",
        "--socket s --cache fast disk.raw",
        "--socket s --aio fast disk.raw",
        "--socket s --aio native disk.raw",
        "--socket s --discard maybe disk.raw",
        "--socket s --detect-zeroes maybe disk.raw",
        "--socket s --socket-mode 999 disk.raw",
        "--socket s --log xml disk.raw",
        "--socket s --overlay --read-only disk.raw",
        "--socket s --snapshot none disk.raw",
        "--socket s --bitmap none disk.raw",
        "--socket s -f fast disk.raw",
        "--socket s --tls-verify-peer disk.raw",
        "--socket s --tls-dir nosuch disk.raw",
        "--socket s a=disk.raw a=disk.raw",
        "--socket nosuch/folder/s disk.raw",
        "--disconnect /dev/nbd0 disk.raw",
        "--connect nosuch disk.raw",
    ] {
        dir.vimg(&format!("serve {words}")).expect_clean_failure();
        assert!(!dir.exists("s"), "{words}: a socket is left behind");
    }
}

#[test]
fn numbers_for_prometheus_and_lines_of_json() {
    requires!(qemu());
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    let server = Server::start(&dir, "-f raw -x d --metrics metrics.sock --log json --log-file log disk.raw");
    Cmd::new("qemu-io")
        .words("-f raw -c")
        .arg("write 0 64k")
        .arg("-c")
        .arg("read 0 4k")
        .arg(server.uri_of("d"))
        .ok();
    let mut socket = std::os::unix::net::UnixStream::connect(dir.file("metrics.sock")).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.0 200 OK\r\n"), "{text}");
    let written = text.lines().any(|line| line.contains("written") && line.ends_with(" 65536"));
    assert!(written && text.contains("export=\"d\""), "{text}");
    server.stop();
    assert!(!dir.exists("metrics.sock"));
    let log = String::from_utf8(dir.read("log")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ended = lines.iter().rfind(|line| line["event"] == "ended").expect(&log);
    assert_eq!((&ended["export"], &ended["written-bytes"]), (&Value::from("d"), &Value::from(65536)));
    assert!(ended["operations"]["write"].as_u64() >= Some(1), "{ended}");
}

#[test]
fn in_the_sandbox() {
    requires!(qemu());
    let dir = Dir::new();
    dir.vimg_ok("create -f qcow2 disk.qcow2 4M");
    let server = Server::start(&dir, "--untrusted -v -f qcow2 disk.qcow2");
    for _ in 0..3 {
        let ran = Cmd::new("qemu-io")
            .words("-f raw -c")
            .arg("write -P 3 0 2M")
            .words("-c flush -c")
            .arg("read -P 3 0 2M")
            .arg(server.uri())
            .ok();
        assert!(!ran.stdout.contains("failed"), "{}", ran.story());
    }
    let socket = server.socket.clone();
    let ended = server.stop();
    assert!(ended.stderr.contains("sandbox:"), "{}", ended.stderr);
    assert!(!socket.exists(), "the sandbox must leave the way to the socket's file");
    dir.qemu_checks("disk.qcow2");
}

#[test]
fn a_full_disk_is_the_clients_error_and_not_the_servers_end() {
    requires!(root(), tool("mount"), libnbd());
    let dir = Dir::new();
    std::fs::create_dir(dir.file("small")).unwrap();
    let mounted = Cmd::new("mount").words("-t tmpfs -o size=2m none").arg(dir.file("small")).run();
    if mounted.code != Some(0) {
        tests::skip::note("no tmpfs can be mounted");
        return;
    }
    let _unmount = Unmount(dir.file("small"));
    dir.vimg_ok("create -f qcow2 small/disk.qcow2 16M");
    let mut server = Server::start(&dir, "small/disk.qcow2");
    let script = "
import nbd, sys, errno
h = nbd.NBD(); h.connect_uri(sys.argv[1])
seen = None
for at in range(0, 8 << 20, 1 << 18):
    try:
        h.pwrite(bytes([7]) * (1 << 18), at)
    except nbd.Error as e:
        seen = e.errnum
        break
assert seen == errno.ENOSPC, seen
assert h.pread(4096, 0) == bytes([7]) * 4096
h.shutdown()
";
    python(&dir, script, &[&server.uri()]);
    assert!(server.is_alive());
    python(
        &dir,
        "import nbd, sys\nh = nbd.NBD(); h.connect_uri(sys.argv[1]); h.pread(512, 0)",
        &[&server.uri()],
    );
    drop(server);
}

/// A tmpfs that must not outlive its test.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        Cmd::new("umount").words("-l").arg(&self.0).run();
    }
}

/// SIGTERM lets what was asked for be done, and brings it to the disk.
#[test]
fn sigterm_finishes_what_was_begun() {
    requires!(libnbd(), qemu());
    let dir = Dir::new();
    dir.vimg_ok("create -f qcow2 disk.qcow2 64M");
    let server = Server::start(&dir, "disk.qcow2");
    let script = "
import nbd, os, signal, sys
h = nbd.NBD(); h.connect_uri(sys.argv[1])
done = 0
def note(error):
    global done
    done += error.value == 0
    return 1
for at in range(64):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([at + 1]) * (1 << 20)), at << 20, completion=note)
os.kill(int(sys.argv[2]), signal.SIGTERM)
try:
    while h.aio_in_flight() > 0 and h.poll(10000) == 1:
        pass
except nbd.Error:
    pass
print(done)
";
    let ran = python(&dir, script, &[&server.uri(), &server.pid().to_string()]);
    let mut server = server;
    let ended = server.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let done: u8 = ran.stdout.trim().parse().unwrap();
    dir.qemu_checks("disk.qcow2");
    // Every write that was answered is there. (They are answered in any order: count the blocks that are.)
    let bytes = dir.qemu_reads("disk.qcow2");
    let whole = (0..64_usize).filter(|at| {
        let mark = u8::try_from(at + 1).unwrap();
        bytes[at << 20..(at + 1) << 20].iter().all(|byte| *byte == mark)
    });
    assert!(whole.count() >= usize::from(done), "{done} writes were answered, and not all are there");
}

/// A client that does not take its replies holds the end up for a while; a second signal does not wait.
#[test]
fn a_second_sigterm_ends_it_at_once() {
    let dir = Dir::new();
    dir.write("disk.raw", &disk(32 * MIB));
    let mut server = Server::start(&dir, "-f raw disk.raw");
    let mut socket = server.connect();
    let export = nbd::client::handshake(&mut socket, b"").unwrap();
    assert_eq!(export.size, 32 * MIB as u64);
    // Reads of 16 MiB which are never received.
    for cookie in 0..4_u64 {
        let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0];
        request.extend(cookie.to_be_bytes());
        request.extend(0_u64.to_be_bytes());
        request.extend((16_u32 << 20).to_be_bytes());
        socket.write_all(&request).unwrap();
    }
    std::thread::sleep(Duration::from_millis(300));
    server.signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(300));
    assert!(server.is_alive(), "it did not wait for the client at all");
    let begun = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code, Some(0));
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

/// What CAN_MULTI_CONN promises: a flush on one connection covers what was written on another.
#[test]
fn a_flush_on_one_connection_covers_the_others() {
    requires!(libnbd(), qemu());
    let dir = Dir::new();
    dir.vimg_ok("create -f qcow2 disk.qcow2 16M");
    let mut server = Server::start(&dir, "disk.qcow2");
    let script = "
import nbd, os, signal, sys
all = [nbd.NBD() for _ in range(4)]
for h in all:
    h.connect_uri(sys.argv[1])
    assert h.can_multi_conn()
for at in range(64):
    all[at % 4].pwrite(bytes([at + 1]) * 200000, at * 200000)
# Seen by all at once ...
for at in range(64):
    assert all[(at + 1) % 4].pread(200000, at * 200000) == bytes([at + 1]) * 200000
# ... and durable, which a process that dies now cannot help any more.
all[3].flush()
os.kill(int(sys.argv[2]), signal.SIGKILL)
";
    python(&dir, script, &[&server.uri(), &server.pid().to_string()]);
    assert_eq!(server.wait().code, None);
    dir.qemu("check -f qcow2 disk.qcow2");
    let bytes = dir.qemu_reads("disk.qcow2");
    for at in 0..64_usize {
        let mark = u8::try_from(at + 1).unwrap();
        assert!(bytes[at * 200_000..][..200_000].iter().all(|byte| *byte == mark), "write {at} is lost");
    }
}

#[test]
fn an_image_that_must_not_be_written() {
    requires!(not_root());
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    std::fs::set_permissions(dir.file("disk.raw"), std::fs::Permissions::from_mode(0o444)).unwrap();
    dir.vimg("serve -f raw --socket s disk.raw").expect_clean_failure();
    Server::start(&dir, "-f raw -r disk.raw").stop();
}

/// One raw image under two servers that write would be two disks (qemu-nbd lets that happen).
#[test]
fn two_servers_do_not_write_to_one_image() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    let _first = Server::start(&dir, "-f raw disk.raw");
    dir.vimg("serve -f raw --socket s disk.raw").expect_clean_failure().expect_stderr("lock");
}

/// `[ CMD ]`: libnbd starts the server itself, and passes it a socket as systemd would.
#[test]
fn a_captive_server() {
    requires!(tool("nbdcopy"), tool("nbdinfo"));
    let dir = Dir::new();
    let bytes = disk(MIB);
    dir.write("disk.raw", &bytes);
    let captive = |tool: &str, words: &[&str]| {
        let mut command = std::process::Command::new(find(tool).unwrap());
        command.args(words).arg("[").arg(vimg_path()).args(["serve", "-r", "-f", "raw"]);
        command.arg(dir.file("disk.raw")).arg("]");
        command
    };
    let output = captive("nbdcopy", &["--"]).arg("-").stdout(Stdio::piped()).output().unwrap();
    assert!(output.status.success() && output.stdout == bytes);
    let output = captive("nbdinfo", &["--size", "--"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1048576\n");
}

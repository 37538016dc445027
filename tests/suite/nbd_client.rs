//! Our NBD client against the servers that there are: qemu-nbd, nbdkit with its filters, nbd-server, and the one of
//! the crate `nbd`, which knows only the protocol's oldest option.

use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tests::skip::{qemu10, tool};
use tests::{Cmd, Dir, requires};

/// A server, until dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts `command`, which is to listen at `socket` of the folder.
    fn start(dir: &Dir, socket: &str, command: &Cmd) -> Self {
        let socket = dir.file(socket);
        let mut server = Self { child: command.spawn(), socket };
        let deadline = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&server.socket).is_err() {
            if server.child.try_wait().unwrap().is_some() || Instant::now() > deadline {
                let mut why = String::new();
                let _ = server.child.kill();
                let _ = server.child.stderr.take().unwrap().read_to_string(&mut why);
                panic!("the server does not serve: {why}");
            }
            thread::sleep(Duration::from_millis(5));
        }
        // What it complains about must not fill a pipe that nobody reads.
        let mut stderr = server.child.stderr.take().unwrap();
        thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        server
    }

    fn qemu(dir: &Dir, socket: &str, words: &str) -> Self {
        let command =
            Cmd::new("qemu-nbd").words("-t -e 0 -k").arg(dir.file(socket)).words(words).dir(dir.path());
        Self::start(dir, socket, &command)
    }

    fn nbdkit(dir: &Dir, socket: &str, words: &str) -> Self {
        let command = Cmd::new("nbdkit").words("-f -U").arg(dir.file(socket)).words(words).dir(dir.path());
        Self::start(dir, socket, &command)
    }

    fn uri(&self) -> String {
        self.export("")
    }

    fn export(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }
}

/// A raw disk with data here and there, 8 MiB and a bit.
fn disk(dir: &Dir, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; (8 << 20) + 512];
    for (index, start) in [0, 1 << 20, (3 << 20) + 4096, 8 << 20].into_iter().enumerate() {
        bytes[start..start + 512].fill(u8::try_from(index + 1).unwrap());
    }
    (5 << 20..6 << 20).for_each(|at| bytes[at] = u8::try_from(at / 512 % 251).unwrap());
    dir.sparse(name, bytes.len() as u64);
    for start in (0..bytes.len()).step_by(512) {
        let sector = &bytes[start..start + 512];
        if sector.iter().any(|byte| *byte != 0) {
            dir.poke(name, start as u64, sector);
        }
    }
    bytes
}

#[test]
fn what_qemu_img_says_of_an_export_we_say() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = Dir::new();
    disk(&dir, "a.raw");
    let server = Server::qemu(&dir, "s", "-r -f raw -x disk a.raw");
    let (uri, path) = (server.export("disk"), server.socket.display());
    for words in [
        format!("info {uri}"),
        format!("info --output=json {uri}"),
        format!("info nbd:unix:{path}:exportname=disk"),
        format!("info --output=json --image-opts driver=nbd,server.type=unix,server.path={path},export=disk"),
        format!(
            "info --output=json --image-opts driver=raw,file.driver=nbd,file.path={path},file.export=disk"
        ),
        format!("map {uri}"),
        format!("map --output=json {uri}"),
        format!("measure -O qcow2 {uri}"),
        format!("compare {uri} a.raw"),
        format!("check -f raw {uri}"),
        format!("info {}", server.export("other")),
        "info nbd+unix:///?socket=/nonexistent/socket".to_owned(),
        "info nbd://localhost:1/x".to_owned(),
    ] {
        dir.same(&words);
    }
    let (ours, theirs) = (
        dir.vimg_ok(&format!("info --exports {uri}")),
        Cmd::new("qemu-nbd").words("-L -k").arg(&server.socket).ok(),
    );
    assert_eq!(ours.stdout, theirs.stdout);
}

#[test]
fn sparse_copies_stay_sparse_in_both_directions() {
    requires!(qemu10(), tool("qemu-nbd"), tool("nbdkit"));
    let dir = Dir::new();
    let bytes = disk(&dir, "a.raw");
    dir.sparse("b.raw", bytes.len() as u64);
    dir.sparse("c.raw", bytes.len() as u64);
    // A file system's block at the end more or less.
    let most = dir.taken("a.raw") + 8192;
    let (from, to) = (Server::qemu(&dir, "s", "-r -f raw a.raw"), Server::nbdkit(&dir, "d", "file b.raw"));
    dir.vimg_ok(&format!("convert -O raw {} out.raw", from.uri()));
    assert!(dir.read("out.raw") == bytes);
    assert!(dir.taken("out.raw") <= most, "{}", dir.taken("out.raw"));
    dir.vimg_ok(&format!("copy --flush {} {}", from.uri(), to.uri()));
    assert!(dir.read("b.raw") == bytes);
    assert!(dir.taken("b.raw") <= most, "{}", dir.taken("b.raw"));
    let to = Server::qemu(&dir, "e", "--discard=unmap -f raw c.raw");
    dir.vimg_ok(&format!("convert -n -O raw --target-is-zero a.raw {}", to.uri()));
    drop(to);
    assert!(dir.read("c.raw") == bytes);
    assert!(dir.taken("c.raw") <= most, "{}", dir.taken("c.raw"));
}

#[test]
fn an_export_that_has_contents_is_overwritten_whole() {
    requires!(tool("qemu-nbd"));
    let dir = Dir::new();
    let bytes = disk(&dir, "a.raw");
    dir.write("b.raw", &vec![0xee; bytes.len()]);
    let to = Server::qemu(&dir, "d", "-f raw b.raw");
    // Without -n, too: an export is there already.
    dir.vimg_ok(&format!("convert -O raw a.raw {}", to.uri()));
    dir.vimg_ok(&format!("compare a.raw {}", to.uri()));
    let small = dir.vimg(&format!("copy {} b.raw.qcow2 -O qcow2", to.uri()));
    small.expect_code(0);
    dir.write("large.raw", &vec![1; 9 << 20]);
    dir.vimg(&format!("copy large.raw {}", to.uri())).expect_clean_failure().expect_stderr("smaller");
    dir.vimg(&format!("convert -O qcow2 a.raw {}", to.uri()))
        .expect_clean_failure()
        .expect_stderr("not a new qcow2");
    dir.vimg(&format!("resize -f raw {} 1G", to.uri()))
        .expect_clean_failure()
        .expect_stderr("Cannot resize NBD nodes");
}

#[test]
fn a_qcow2_image_lies_behind_the_network_as_elsewhere() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = Dir::new();
    let bytes = disk(&dir, "a.raw");
    dir.qemu_ok("convert -O qcow2 a.raw a.qcow2");
    let server = Server::qemu(&dir, "s", "-f raw a.qcow2");
    dir.same(&format!("info {}", server.uri()));
    dir.same_json(&format!("info --output=json {}", server.uri()));
    dir.vimg_ok(&format!("convert -O raw {} out.raw", server.uri()));
    assert!(dir.read("out.raw") == bytes);
    dir.vimg_ok(&format!("check {}", server.uri()));
    // And as a backing file, which is opened unless the image is a stranger's.
    dir.vimg_ok(&format!("create -f qcow2 -b {} -F qcow2 over.qcow2", server.uri()));
    dir.vimg_ok("compare over.qcow2 a.raw");
    dir.vimg("--untrusted compare over.qcow2 a.raw").expect_clean_failure().expect_stderr("not followed");
    dir.vimg_ok(&format!("--untrusted convert -O raw {} out2.raw", server.uri()));
    assert!(dir.read("out2.raw") == bytes);
}

#[test]
fn servers_with_less_are_served_as_well() {
    requires!(tool("nbdkit"));
    let dir = Dir::new();
    let bytes = disk(&dir, "a.raw");
    for filters in [
        "--no-sr file a.raw",
        "--mask-handshake=0 file a.raw",
        "--mask-handshake=1 file a.raw",
        "--filter=noextents file a.raw",
        "--filter=nozero file a.raw",
        "--filter=nozero file a.raw zeromode=emulate",
        "--filter=noparallel file a.raw serialize=requests",
        "--filter=nocache --filter=nofilter file a.raw",
        "--filter=blocksize-policy file a.raw blocksize-minimum=512 blocksize-preferred=4096 blocksize-maximum=64k \
         blocksize-error-policy=error",
        "--filter=delay file a.raw rdelay=5ms",
        "-o file a.raw",
    ] {
        dir.write("b.raw", &vec![0xee; bytes.len()]);
        let from = Server::nbdkit(&dir, "s", filters);
        dir.vimg_ok(&format!("convert -O raw {} out.raw", from.uri()));
        assert!(dir.read("out.raw") == bytes, "{filters}");
        let to = Server::nbdkit(&dir, "d", &filters.replace("a.raw", "b.raw"));
        dir.vimg_ok(&format!("copy -C 2 a.raw {}", to.uri()));
        assert!(dir.read("b.raw") == bytes, "{filters}");
        drop((from, to));
        std::fs::remove_file(dir.file("s")).unwrap();
        std::fs::remove_file(dir.file("d")).unwrap();
    }
}

#[test]
fn errors_of_the_server_are_errors_here() {
    requires!(tool("nbdkit"));
    let dir = Dir::new();
    disk(&dir, "a.raw");
    for (socket, words, says) in [
        ("1", "--filter=error file a.raw error-pread=EIO error-pread-rate=100%", "Input/output error"),
        ("2", "--filter=error file a.raw error-pread=ENOMEM error-pread-rate=100%", "Cannot allocate memory"),
        (
            "3",
            "--filter=error file a.raw error-extents=EIO error-extents-rate=100%",
            "asking for the extents",
        ),
    ] {
        let server = Server::nbdkit(&dir, socket, words);
        dir.vimg(&format!("convert -O raw {} out.raw", server.uri()))
            .expect_clean_failure()
            .expect_stderr(says);
        assert!(!dir.exists("out.raw"), "{words}");
    }
    let full = Server::nbdkit(&dir, "4", "full 9M");
    dir.vimg(&format!("copy a.raw {}", full.uri()))
        .expect_clean_failure()
        .expect_stderr("No space left on device");
    let read_only = Server::nbdkit(&dir, "5", "-r file a.raw");
    dir.vimg(&format!("copy a.raw {}", read_only.uri())).expect_clean_failure();
    // What cannot be read is left out where the user wants that.
    let flaky = Server::nbdkit(&dir, "6", "--filter=error file a.raw error-pread=EIO error-pread-rate=100%");
    dir.vimg_ok(&format!("convert -f raw --salvage -O raw {} out.raw", flaky.uri()));
    // A filter that tries again makes it whole.
    let retry = "--filter=retry-request --filter=error file a.raw error-pread=EIO error-pread-rate=10% \
                 retry-request-delay=1 retry-request-retries=1000";
    let server = Server::nbdkit(&dir, "7", retry);
    dir.vimg_ok(&format!("compare -f raw -F raw {} a.raw", server.uri()));
}

#[test]
fn a_server_that_dies_midway_is_a_clear_error() {
    requires!(tool("nbdkit"));
    let dir = Dir::new();
    let words = "--filter=delay pattern 128M rdelay=200ms";
    let mut server = Server::nbdkit(&dir, "s", words);
    let copy = dir.vimg_cmd(&format!("copy {} out.raw", server.uri()));
    let running = thread::spawn(move || copy.run());
    thread::sleep(Duration::from_millis(500));
    server.child.kill().unwrap();
    let ran = running.join().unwrap().expect_code(1).expect_clean_failure();
    assert!(ran.stderr.contains("connection"), "{}", ran.story());
    assert!(!dir.exists("out.raw"));
}

#[test]
fn a_server_that_comes_back_is_waited_for() {
    requires!(tool("nbdkit"));
    let dir = Dir::new();
    let words = "--filter=delay pattern 128M rdelay=200ms";
    let first = Server::nbdkit(&dir, "s", words);
    let copy = dir.vimg_cmd(&format!("copy {}&reconnect-delay=30 out.raw", first.uri()));
    let running = thread::spawn(move || copy.run());
    thread::sleep(Duration::from_millis(500));
    drop(first);
    thread::sleep(Duration::from_millis(300));
    std::fs::remove_file(dir.file("s")).unwrap();
    let second = Server::nbdkit(&dir, "s", "pattern 128M");
    let ran = running.join().unwrap();
    assert_eq!(ran.code, Some(0), "{}", ran.story());
    dir.vimg_ok(&format!("compare -f raw -F raw out.raw {}", second.uri()));
}

#[test]
fn a_server_that_comes_back_as_another_is_not_taken_for_the_same() {
    requires!(tool("nbdkit"));
    let dir = Dir::new();
    let first = Server::nbdkit(&dir, "s", "--filter=delay pattern 128M rdelay=200ms");
    let copy = dir.vimg_cmd(&format!("copy {}&reconnect-delay=30 out.raw", first.uri()));
    let running = thread::spawn(move || copy.run());
    thread::sleep(Duration::from_millis(500));
    drop(first);
    let _ = std::fs::remove_file(dir.file("s"));
    let _second = Server::nbdkit(&dir, "s", "pattern 129M");
    running.join().unwrap().expect_clean_failure().expect_stderr("the export is another one");
}

#[test]
fn a_server_that_is_not_there_yet_is_waited_for() {
    requires!(tool("nbdkit"));
    let dir = Dir::new();
    let uri = format!("nbd+unix:///?socket={}&open-timeout=20", dir.file("s").display());
    let info = dir.vimg_cmd(&format!("info {uri}"));
    let running = thread::spawn(move || info.run());
    thread::sleep(Duration::from_millis(700));
    let _server = Server::nbdkit(&dir, "s", "null 1M");
    let ran = running.join().unwrap();
    assert_eq!(ran.code, Some(0), "{}", ran.story());
}

#[test]
fn a_server_that_says_nothing_sensible_is_no_server() {
    let dir = Dir::new();
    let listener = UnixListener::bind(dir.file("s")).unwrap();
    let serving = thread::spawn(move || {
        for greeting in [&b"220 mail.example ESMTP\r\n"[..], b"NBDMAGICgarbage!garbage!", b""] {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(greeting);
        }
    });
    let uri = format!("nbd+unix:///?socket={}", dir.file("s").display());
    for says in ["Bad initial magic", "Bad server magic", "closed the connection"] {
        dir.vimg(&format!("info {uri}")).expect_clean_failure().expect_stderr(says);
    }
    serving.join().unwrap();
}

/// A disk in memory for the crate `nbd`.
#[derive(Debug, Clone)]
struct Memory(Arc<Mutex<Cursor<Vec<u8>>>>);

impl Read for Memory {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().read(buf)
    }
}

impl Write for Memory {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Memory {
    fn seek(&mut self, position: SeekFrom) -> std::io::Result<u64> {
        self.0.lock().unwrap().seek(position)
    }
}

/// The crate `nbd` knows `NBD_OPT_EXPORT_NAME` and simple replies, and serves one request after the other.
#[test]
fn the_server_of_the_crate_nbd_is_served() {
    let dir = Dir::new();
    let bytes = disk(&dir, "a.raw");
    let memory = Memory(Arc::new(Mutex::new(Cursor::new(vec![0xee; bytes.len()]))));
    let listener = UnixListener::bind(dir.file("s")).unwrap();
    let (size, disk) = (bytes.len() as u64, memory.clone());
    let serving = thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let export = |_: &str| {
                Ok(nbd::Export {
                    size,
                    readonly: false,
                    resizeable: false,
                    rotational: false,
                    send_trim: false,
                    send_flush: true,
                    data: disk.clone(),
                })
            };
            let data = nbd::server::handshake(&mut stream, export).unwrap();
            let _ = nbd::server::transmission(&mut stream, data);
        }
    });
    let uri = format!("nbd+unix:///disk?socket={}", dir.file("s").display());
    dir.vimg_ok(&format!("copy --flush a.raw {uri}"));
    assert!(*memory.0.lock().unwrap().get_ref() == bytes);
    dir.vimg_ok(&format!("copy {uri} out.raw"));
    assert!(dir.read("out.raw") == bytes);
    serving.join().unwrap();
}

/// A server in the background, until dropped.
struct Background {
    socket: PathBuf,
    pid: String,
}

impl Background {
    fn export(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        Cmd::new("kill").arg(&self.pid).run();
    }
}

#[test]
fn nbd_server_is_served() {
    requires!(tool("nbd-server"));
    let dir = Dir::new();
    let bytes = disk(&dir, "a.raw");
    dir.write("b.raw", &vec![0xee; bytes.len()]);
    let config = format!(
        "[generic]\nunixsock = {}\nallowlist = true\nduallisten = false\n[a]\nexportname = {}\nflush = true\ntrim = true\n\
         [b]\nexportname = {}\n",
        dir.file("s").display(),
        dir.file("a.raw").display(),
        dir.file("b.raw").display()
    );
    dir.write("config", config.as_bytes());
    // It goes into the background, and says whom to end.
    Cmd::new("nbd-server").words("-C config -p").arg(dir.file("pid")).dir(dir.path()).ok();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !dir.exists("pid") || UnixStream::connect(dir.file("s")).is_err() {
        assert!(Instant::now() < deadline, "nbd-server does not serve");
        thread::sleep(Duration::from_millis(5));
    }
    let pid = String::from_utf8(dir.read("pid")).unwrap().trim().to_owned();
    let server = Background { socket: dir.file("s"), pid };
    dir.vimg_ok(&format!("copy {} {}", server.export("a"), server.export("b")));
    assert!(dir.read("b.raw") == bytes);
    dir.vimg_ok(&format!("info --exports {}", server.export(""))).expect_stdout("export: 'b'");
    dir.vimg(&format!("info {}", server.export("none")))
        .expect_clean_failure()
        .expect_stderr("not available");
}

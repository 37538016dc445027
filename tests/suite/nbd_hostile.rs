//! Clients that a server must survive: garbage in every state, connections that break, clients that are slow, many, or
//! deaf. A well-behaved client beside them must not notice.

use std::io::{ErrorKind, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use tests::Dir;
use tests::server::Server;

const SIZE: usize = 4 << 20;

fn serve(words: &str) -> (Dir, Server) {
    let dir = Dir::new();
    dir.write("disk.raw", &vec![0x5a; SIZE]);
    let server = Server::start(&dir, &format!("-f raw {words} disk.raw"));
    (dir, server)
}

/// A request in compact form.
fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(0_u16.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Chooses the export: fixed newstyle without zeros, `NBD_OPT_EXPORT_NAME`. From here on simple replies.
fn choose(socket: &mut UnixStream) {
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    socket.write_all(&3_u32.to_be_bytes()).unwrap();
    socket.write_all(&option(1, b"")).unwrap();
    let mut answer = [0; 10];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..8], (SIZE as u64).to_be_bytes());
}

/// That the server answers a client that behaves.
#[track_caller]
fn is_well(server: &mut Server) {
    assert!(server.is_alive(), "the server has ended: {:?}", server.wait());
    let mut socket = server.connect();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    choose(&mut socket);
    socket.write_all(&request(0, 7, 512, 16)).unwrap();
    let mut reply = [0; 32];
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(reply[16..], [0x5a; 16]);
    socket.write_all(&request(2, 8, 0, 0)).unwrap();
}

/// Waits until the server closes a connection, whatever it says before.
fn read_to_end(socket: &mut UnixStream) -> Result<(), ErrorKind> {
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut bytes = [0; 4096];
    loop {
        match socket.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error.kind()),
        }
    }
}

#[test]
fn garbage_in_every_state() {
    let (_dir, mut server) = serve("--handshake-timeout 2");
    let mut random = block::testing::Random::new(11);
    let flags = 3_u32.to_be_bytes().to_vec();
    let with = |more: Vec<u8>| [flags.clone(), more].concat();
    let states = [
        vec![],
        flags.clone(),
        with(option(8, b"")),
        with([option(8, b""), option(10, &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])].concat()),
        with(option(6, &[0xff; 4])),
        with(b"IHAVEOPT\0\0\0\x03\xff\xff\xff\xff".to_vec()),
        with(b"IHAVEOPT\0\0\0\x01\x7f\xff\xff\xff".to_vec()),
        with(option(1, b"")),
        with([option(1, b""), request(0, 1, 0, 512)].concat()),
        with([option(1, b""), request(1, 1, 0, u32::MAX)].concat()),
        with([option(8, b""), option(7, &[0; 6])].concat()),
        with([option(11, b""), option(7, &[0; 6])].concat()),
    ];
    for round in 0..8 {
        for state in &states {
            let mut socket = server.connect();
            let mut noise = vec![0; 1 + round * 97];
            random.fill(&mut noise);
            // It may have been thrown out before.
            let _ = socket.write_all(state).and_then(|()| socket.write_all(&noise));
            if round % 2 == 0 {
                let _ = socket.shutdown(std::net::Shutdown::Write);
                assert_eq!(read_to_end(&mut socket), Ok(()), "a connection that is over stays open");
            }
        }
        is_well(&mut server);
    }
    let ended = server.stop();
    assert!(!ended.stderr.contains("mistake of this program"), "{}", ended.stderr);
}

/// qemu-nbd ends with an assertion when the data of a query goes on with the header of another option.
#[test]
fn an_option_inside_an_option() {
    let (_dir, mut server) = serve("");
    for number in [9, 10] {
        let mut socket = server.connect();
        let inner = [&[0, 0, 0, 0, 0, 0, 0, 0][..], &option(number, &[0; 8])].concat();
        let bytes = [3_u32.to_be_bytes().to_vec(), option(8, b""), option(number, &inner)].concat();
        socket.write_all(&bytes).unwrap();
        socket.write_all(&option(2, b"")).unwrap();
        assert_eq!(read_to_end(&mut socket), Ok(()));
        is_well(&mut server);
    }
    server.stop();
}

#[test]
fn connections_that_break_with_work_in_flight() {
    let (_dir, mut server) = serve("");
    for round in 0..30_u64 {
        let mut socket = server.connect();
        choose(&mut socket);
        for cookie in 0..8 {
            socket.write_all(&request(0, cookie, 0, 1 << 20)).unwrap();
        }
        if round % 3 == 1 {
            // A write whose payload never comes.
            socket.write_all(&request(1, 9, 0, 1 << 20)).unwrap();
            socket.write_all(&[0x5a; 1000]).unwrap();
        }
        if round % 3 == 2 {
            let mut some = [0; 5000];
            socket.read_exact(&mut some).unwrap();
        }
        drop(socket);
    }
    is_well(&mut server);
    server.stop();
}

/// TCP connections that are reset, not closed.
#[test]
fn resets() {
    let dir = Dir::new();
    dir.write("disk.raw", &vec![0x5a; SIZE]);
    let cmd = dir.vimg_cmd("serve -f raw --listen 127.0.0.1:0 disk.raw");
    let mut server = Server::run(&cmd, tests::server::fresh_socket(&dir));
    let address = server.uris[0].strip_prefix("nbd://").unwrap().to_owned();
    for _ in 0..20 {
        let mut socket = std::net::TcpStream::connect(&address).unwrap();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        bytes.extend(option(1, b""));
        for cookie in 0..8 {
            bytes.extend(request(0, cookie, 0, 1 << 20));
        }
        socket.write_all(&bytes).unwrap();
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    }
    assert!(server.is_alive());
    server.stop();
}

#[test]
fn a_handshake_that_takes_too_long() {
    let (_dir, mut server) = serve("--handshake-timeout 1");
    let begun = Instant::now();
    let mut silent = server.connect();
    let mut slow = server.connect();
    let dripping = std::thread::spawn(move || {
        // One byte after the other, never done.
        let bytes = [3_u32.to_be_bytes().to_vec(), option(3, &[0; 4000])].concat();
        for byte in bytes {
            if slow.write_all(&[byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    assert_eq!(read_to_end(&mut silent), Ok(()));
    dripping.join().unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    is_well(&mut server);
    // Whoever has chosen an export may be silent for as long as it likes.
    let mut idle = server.connect();
    choose(&mut idle);
    std::thread::sleep(Duration::from_millis(1500));
    idle.write_all(&request(3, 1, 0, 0)).unwrap();
    idle.read_exact(&mut [0; 16]).unwrap();
    server.stop();
}

#[test]
fn a_client_that_half_closes_gets_its_answers() {
    let (_dir, server) = serve("");
    let mut socket = server.connect();
    choose(&mut socket);
    for cookie in 0..4 {
        socket.write_all(&request(0, cookie, 0, 1 << 20)).unwrap();
    }
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let mut bytes = vec![];
    socket.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 4 * (16 + (1 << 20)));
    server.stop();
}

/// Memory does not grow with clients that are idle, nor with one that asks for much and takes nothing.
#[test]
fn many_idle_clients_and_a_deaf_one() {
    let (_dir, mut server) = serve("--max-clients 300");
    let mut clients: Vec<_> = (0..200)
        .map(|_| {
            let mut socket = server.connect();
            choose(&mut socket);
            socket
        })
        .collect();
    let mut deaf = server.connect();
    choose(&mut deaf);
    deaf.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    for cookie in 0..2000 {
        if deaf.write_all(&request(0, cookie, 0, 4 << 20)).is_err() {
            break;
        }
    }
    is_well(&mut server);
    for (cookie, socket) in clients.iter_mut().enumerate() {
        socket.write_all(&request(0, cookie as u64, 0, 4096)).unwrap();
        socket.read_exact(&mut [0; 16 + 4096]).unwrap();
    }
    let (now, most) = server.memory_kib();
    assert!(now < 100 << 10 && most < 100 << 10, "{now} KiB in use, {most} KiB at most");
    drop(deaf);
    server.stop();
}

#[test]
fn more_clients_than_are_allowed_wait() {
    let (_dir, mut server) = serve("--max-clients 1");
    let mut first = server.connect();
    choose(&mut first);
    let mut second = server.connect();
    second.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    second.read_exact(&mut [0; 1]).expect_err("two clients at once");
    drop(first);
    second.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    choose(&mut second);
    drop(second);
    is_well(&mut server);
    server.stop();
}

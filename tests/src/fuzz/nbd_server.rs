//! The NBD server, fed with arbitrary bytes over a socket pair.
//!
//! The input is what a client sends, all of it, before it stops sending. The server has to answer or hang up, and be
//! done soon; what it sends must not be beyond all measure.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use block::BlockDevice;
use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use nbd_server::channel::Channel;
use nbd_server::server::event::{Event, Log};
use nbd_server::server::export::{Export, ExportOptions};
use nbd_server::server::{Config, Limits, Server};
use nbd_server::tls::Policy;

/// The disk's size in bytes; odd, and small.
const DISK_BYTES: usize = 70_001;
/// A request of 28 bytes may ask for the whole disk.
const MAX_ANSWER_PER_BYTE: u64 = DISK_BYTES as u64 * 2;
/// How long a server may need for an input.
const PATIENCE: Duration = Duration::from_secs(20);
/// Inputs are cut to this many bytes.
const MAX_INPUT: usize = 8 << 10;

/// Panics on a mistake of ours, which the server would survive.
#[derive(Debug)]
struct Judge;

impl Log for Judge {
    fn event(&self, event: &Event<'_>) {
        if let Event::Ended { reason: Some(reason), .. } = event {
            // All of it: clients may choose names like that, and fuzzers do.
            assert_ne!(*reason, "a mistake of this program", "the server panicked");
        }
    }
}

fn exports() -> Vec<Arc<Export>> {
    let disk = || -> Arc<dyn BlockDevice> {
        let storage = MemStorage::from_bytes(vec![0x5a; DISK_BYTES]);
        Arc::new(Raw::open(Arc::new(storage), RawOptions::default()).unwrap())
    };
    let writable = ExportOptions { allocation_depth: true, ..ExportOptions::default() };
    let read_only = ExportOptions { read_only: true, ..writable };
    vec![Arc::new(Export::new("", disk(), writable)), Arc::new(Export::new("r", disk(), read_only))]
}

/// Sends `bytes` and reads what comes back, to the end.
fn converse(bytes: &[u8]) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let limits =
        Limits { handshake_timeout: Some(PATIENCE / 2), threads_per_connection: 2, ..Limits::default() };
    let config = Config {
        exports: exports(),
        tls: None,
        tls_policy: Policy::Off,
        limits,
        once: false,
        log: Arc::new(Judge),
    };
    let server = Server::new(config).unwrap();
    server.serve(Channel::unix(theirs, "fuzz")).unwrap();
    let running = std::thread::spawn(move || server.run());
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut sender = ours.try_clone().unwrap();
    let bytes = bytes[..bytes.len().min(MAX_INPUT)].to_vec();
    let limit = MAX_ANSWER_PER_BYTE * (bytes.len() as u64 + 100);
    let sending = std::thread::spawn(move || {
        // It may hang up in the middle.
        let _ = sender.write_all(&bytes);
        let _ = sender.shutdown(std::net::Shutdown::Write);
    });
    let (mut receiver, mut received, mut piece) = (ours, 0, vec![0; 64 << 10]);
    loop {
        match receiver.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => received += count as u64,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            // The fuzzer's own clock.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("the server hangs: {error}"),
        }
        assert!(received <= limit, "more than {limit} bytes for so few");
    }
    drop(receiver);
    sending.join().unwrap();
    // Its only client has gone: so does the server.
    running.join().unwrap().unwrap();
}

/// What a client sends from the first byte on.
pub fn nbd_server_handshake(data: &[u8]) {
    converse(data);
}

/// What a client sends after a handshake, of which the first byte says how it went.
pub fn nbd_server_transmission(data: &[u8]) {
    let Some((kind, requests)) = data.split_first() else { return };
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    match kind % 4 {
        0 => {}
        1 => option(&mut bytes, 8, &[]),
        kind => option(&mut bytes, if kind == 2 { 11 } else { 8 }, &[]),
    }
    let name: &[u8] = if kind & 0x80 != 0 { b"r" } else { b"" };
    let named = [&u32::try_from(name.len()).unwrap().to_be_bytes()[..], name].concat();
    if kind % 4 >= 2 {
        // All contexts that there are.
        let mut query = [named.clone(), 2_u32.to_be_bytes().to_vec()].concat();
        for context in ["base:allocation", "qemu:allocation-depth"] {
            query.extend(u32::try_from(context.len()).unwrap().to_be_bytes());
            query.extend(context.bytes());
        }
        option(&mut bytes, 10, &query);
    }
    option(&mut bytes, 7, &[named, vec![0, 0]].concat());
    bytes.extend(requests);
    converse(&bytes);
}

fn option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.extend(b"IHAVEOPT");
    out.extend(number.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    out.extend(data);
}

/// Inputs and what they are called.
pub type Seeds = Vec<(String, Vec<u8>)>;

/// Inputs to start from: every option, every command, in every form.
pub fn nbd_seeds() -> (Seeds, Seeds) {
    let handshakes = (0..=12_u32).map(|number| {
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        let data: &[u8] = match number {
            6 | 7 => &[0, 0, 0, 0, 0, 1, 0, 3],
            9 | 10 => &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, b'b', b'a', b's', b'e', b':'],
            _ => &[],
        };
        option(&mut bytes, 8, &[]);
        option(&mut bytes, number, data);
        option(&mut bytes, 2, &[]);
        (format!("option-{number}"), bytes)
    });
    let transmissions = (0..=9_u16).flat_map(|command| {
        (0..4_u8).map(move |kind| {
            let extended = kind == 2;
            let mut bytes = vec![kind];
            for (offset, len) in [(0_u64, 512_u32), (70_000, 512), (u64::MAX, 1), (512, 0)] {
                let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
                bytes.extend(magic.to_be_bytes());
                let payload = command == 1;
                bytes.extend((if extended && payload { 1_u16 << 5 } else { 0 }).to_be_bytes());
                bytes.extend(command.to_be_bytes());
                bytes.extend(7_u64.to_be_bytes());
                bytes.extend(offset.to_be_bytes());
                if extended {
                    bytes.extend([0; 4]);
                }
                bytes.extend(len.to_be_bytes());
                if payload {
                    bytes.extend(vec![1; len as usize]);
                }
            }
            (format!("command-{command}-{kind}"), bytes)
        })
    });
    (handshakes.collect(), transmissions.collect())
}

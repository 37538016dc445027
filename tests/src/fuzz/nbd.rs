//! The body of the fuzz target for the NBD client: what a server may send.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;

use block::codec::Writer;
use block::{BlockDevice, ZeroMode};
use nbd_server::channel::Channel;
use nbd_server::client;
use nbd_server::proto::{IHAVEOPT, NBDMAGIC, OptionReply, handshake, info, option, reply};
use nbd_server::uri::{Address, ExportName};

/// The size of the export in the handshakes that are made up here, in bytes.
const SIZE: u64 = 1 << 20;

/// Lets a client connect to a server that sends `bytes`, whatever it is told, and then leaves. The first byte says
/// where they begin: 0 with the greeting, 1 to 3 behind a handshake that agreed on simple, structured or extended
/// replies.
pub fn nbd_client(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let mut sent = nbd_handshake(first % 4);
    sent.extend_from_slice(rest);
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let server = thread::spawn(move || say(theirs, &sent));
    let name = ExportName::new(Address::Unix("fuzz".into()), "x");
    let opened = client::over(Channel::unix(ours, "fuzz"), &name, None, first & 4 == 0);
    if let Ok(disk) = opened {
        use_it(&disk);
    }
    server.join().expect("the server's thread does not panic");
}

/// Sends everything, hears what is said to it, and leaves.
fn say(mut socket: UnixStream, bytes: &[u8]) {
    let mut listening = socket.try_clone().expect("a second descriptor");
    let listener = thread::spawn(move || {
        let mut waste = [0; 4096];
        while matches!(listening.read(&mut waste), Ok(len) if len > 0) {}
    });
    // The client may have left already.
    let _ = socket.write_all(bytes);
    let _ = socket.shutdown(std::net::Shutdown::Write);
    let _ = listener.join();
}

fn use_it(disk: &dyn BlockDevice) {
    let size = disk.size();
    let mut buf = [0; 512];
    let within = |len: usize| usize::try_from(size.min(len as u64)).unwrap_or(len);
    let len = within(buf.len());
    for offset in [0, size / 2, size.saturating_sub(512)] {
        let len = within(usize::try_from((size - offset).min(len as u64)).unwrap_or(0));
        let _ = disk.read_at(&mut buf[..len], offset);
        if let Ok(extent) = disk.layer_extent(offset, 4096) {
            assert!(extent.len > 0 && extent.len <= 4096, "{extent:?}");
        }
        let _ = disk.write_at(&buf[..len], offset);
    }
    let _ = disk.write_zeroes_at(0, size.min(4096), ZeroMode::UNMAP);
    let _ = disk.discard_at(0, size.min(4096));
    let _ = disk.flush();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| disk.read_at(&mut vec![0; len], 0));
        }
    });
}

/// What a server says in a handshake as it should be, up to the first reply. `style`: 0 nothing, 1 simple, 2
/// structured, 3 extended.
pub fn nbd_handshake(style: u8) -> Vec<u8> {
    let mut out = Writer::new();
    if style == 0 {
        return vec![];
    }
    out.be_u64(NBDMAGIC).be_u64(IHAVEOPT).be_u16(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    let mut answer = |option, kind, data: &[u8]| {
        let length = u32::try_from(data.len()).unwrap_or(0);
        out.bytes(&OptionReply { option, kind, length }.encode()).bytes(data);
    };
    let yes = |is: bool| if is { reply::ACK } else { reply::ERR_UNSUP };
    answer(option::EXTENDED_HEADERS, yes(style == 3), &[]);
    if style < 3 {
        answer(option::STRUCTURED_REPLY, yes(style == 2), &[]);
    }
    if style > 1 {
        answer(option::SET_META_CONTEXT, reply::META_CONTEXT, b"\0\0\0\x01base:allocation");
        answer(option::SET_META_CONTEXT, reply::ACK, &[]);
    }
    let mut export = Writer::new();
    export.be_u16(info::EXPORT).be_u64(SIZE).be_u16(0x0fff & !2);
    answer(option::GO, reply::INFO, &export.into_bytes());
    answer(option::GO, reply::ACK, &[]);
    out.into_bytes()
}

//! The server over a socket pair, spoken to byte by byte.

use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use block::codec::Writer;
use block::mem::MemStorage;
use block::raw::Raw;
use block::{BlockDevice, LayerExtent, ZeroMode};

use super::event::Silent;
use super::export::ExportOptions;
use super::*;
use crate::proto::{
    Errno, OptionHeader, OptionReply, ReplyHeader, Request, allocation, chunk, command, command_flags,
    option, reply,
};

mod patience;
mod refusals;
mod shrinking;

const SIZE: u64 = 1_000_003;

/// A client that does nothing by itself.
struct Client {
    stream: Channel,
    style: HeaderStyle,
}

/// The answers to an option: type and data.
type Answers = Vec<(u32, Vec<u8>)>;

fn config(exports: Vec<Export>) -> Config {
    Config {
        exports: exports.into_iter().map(Arc::new).collect(),
        tls: None,
        tls_policy: Policy::Off,
        limits: Limits { handshake_timeout: Some(Duration::from_secs(20)), ..Limits::default() },
        once: false,
        log: Arc::new(Silent),
    }
}

fn raw(bytes: Vec<u8>) -> Arc<Raw> {
    Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), Default::default()).unwrap())
}

fn disk() -> Arc<Raw> {
    raw((0..SIZE).map(|index| u8::try_from(index % 251).unwrap()).collect())
}

/// A server with one client, which has received the greeting.
fn connect(config: Config) -> (Server, Client) {
    let server = Server::new(config).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    ours.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    server.serve(Channel::unix(theirs, "test")).unwrap();
    let client = Client { stream: Channel::unix(ours, "server"), style: HeaderStyle::Simple };
    let mut greeting = [0; 18];
    client.stream.receive_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
    (server, client)
}

impl Client {
    fn send(&self, bytes: &[u8]) {
        self.stream.send(&[bytes]).unwrap();
    }

    fn receive(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.receive_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server has ended the connection.
    fn is_over(&self) -> bool {
        self.stream.receive(&mut [0; 1]).is_ok_and(|received| received == 0)
    }

    fn option(&self, option: u32, data: &[u8]) -> Answers {
        self.send(&OptionHeader { option, length: u32::try_from(data.len()).unwrap() }.encode());
        self.send(data);
        let mut answers = vec![];
        loop {
            let header = OptionReply::parse(&self.receive(OptionReply::LEN)).unwrap();
            assert_eq!(header.option, option);
            answers.push((header.kind, self.receive(block::num::to_usize(u64::from(header.length)))));
            if header.kind == reply::ACK || header.is_error() {
                return answers;
            }
        }
    }

    /// Goes into transmission with all contexts of the default export.
    fn go(&mut self, style: HeaderStyle) {
        self.send(&3_u32.to_be_bytes());
        self.style = style;
        let negotiated = match style {
            HeaderStyle::Simple => None,
            HeaderStyle::Structured => Some(option::STRUCTURED_REPLY),
            HeaderStyle::Extended => Some(option::EXTENDED_HEADERS),
        };
        if let Some(option) = negotiated {
            assert_eq!(self.option(option, &[])[0].0, reply::ACK);
            let answers = self.option(option::SET_META_CONTEXT, &queries("", &[allocation::CONTEXT]));
            assert_eq!(answers.len(), 2, "{answers:?}");
        }
        assert_eq!(self.option(option::GO, &go_data("", &[])).last().unwrap().0, reply::ACK);
    }

    fn request(&self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) {
        self.send(&Request { flags, command, cookie, offset, length }.encode(self.style));
    }

    /// A whole simple reply of a request that reads `len` bytes.
    fn simple(&self, len: usize) -> (Errno, u64, Vec<u8>) {
        match ReplyHeader::parse(&self.receive(ReplyHeader::SIMPLE_LEN)).unwrap() {
            ReplyHeader::Simple { error: Errno::OK, cookie } => (Errno::OK, cookie, self.receive(len)),
            ReplyHeader::Simple { error, cookie } => (error, cookie, vec![]),
            other @ ReplyHeader::Chunk { .. } => panic!("{other:?}"),
        }
    }

    /// The chunks of one reply: kind and payload.
    fn chunks(&self) -> Vec<(u16, Vec<u8>)> {
        let mut chunks = vec![];
        loop {
            let extended = self.style == HeaderStyle::Extended;
            let len = if extended { ReplyHeader::EXTENDED_LEN } else { ReplyHeader::STRUCTURED_LEN };
            match ReplyHeader::parse(&self.receive(len)).unwrap() {
                ReplyHeader::Chunk { flags, kind, length, .. } => {
                    chunks.push((kind, self.receive(block::num::to_usize(length))));
                    if flags & chunk::FLAG_DONE != 0 {
                        return chunks;
                    }
                }
                other @ ReplyHeader::Simple { .. } => panic!("{other:?}"),
            }
        }
    }
}

fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = Writer::new();
    data.be_u32(u32::try_from(name.len()).unwrap()).bytes(name.as_bytes());
    data.be_u16(u16::try_from(infos.len()).unwrap());
    for info in infos {
        data.be_u16(*info);
    }
    data.into_bytes()
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Writer::new();
    data.be_u32(u32::try_from(name.len()).unwrap()).bytes(name.as_bytes());
    data.be_u32(u32::try_from(queries.len()).unwrap());
    for query in queries {
        data.be_u32(u32::try_from(query.len()).unwrap()).bytes(query.as_bytes());
    }
    data.into_bytes()
}

fn one_export() -> Config {
    config(vec![Export::new("", disk(), ExportOptions::default())])
}

#[test]
fn the_size_of_an_odd_disk_is_exact() {
    let (_server, client) = connect(one_export());
    client.send(&1_u32.to_be_bytes());
    client.send(&OptionHeader { option: option::EXPORT_NAME, length: 0 }.encode());
    let answer = client.receive(8 + 2 + 124);
    assert_eq!(answer[..8], SIZE.to_be_bytes());
    assert!(answer[10..].iter().all(|byte| *byte == 0));
    client.request(command::READ, 0, 5, SIZE - 3, 3);
    let wanted: Vec<u8> = (SIZE - 3..SIZE).map(|index| u8::try_from(index % 251).unwrap()).collect();
    assert_eq!(client.simple(3), (Errno::OK, 5, wanted));
}

/// One disk, under every name that begins with `x`.
#[derive(Debug)]
struct Changing(Arc<Export>);

impl Catalogue for Changing {
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        name.starts_with('x').then(|| Arc::clone(&self.0))
    }
}

#[test]
fn a_catalogue_is_asked_for_names_that_nobody_else_has() {
    let (server, client) = connect(one_export());
    let other = Export::new("x", raw(vec![7; 512]), ExportOptions::default());
    server.consult(Arc::new(Changing(Arc::new(other))));
    client.send(&3_u32.to_be_bytes());
    let size = |name: &str| {
        let answers = client.option(option::INFO, &go_data(name, &[]));
        let found = answers.iter().find(|(kind, data)| *kind == reply::INFO && data[..2] == [0, 0]);
        found.map(|(_, data)| u64::from_be_bytes(data[2..10].try_into().unwrap()))
    };
    assert_eq!((size(""), size("x/1"), size("y")), (Some(SIZE), Some(512), None));
    // They are listed to nobody.
    assert_eq!(client.option(option::LIST, &[]).len(), 2);
}

#[test]
fn options_that_make_no_sense_are_answered_in_step() {
    let (_server, client) = connect(one_export());
    client.send(&3_u32.to_be_bytes());
    let kind = |option, data: &[u8]| client.option(option, data).last().unwrap().0;
    assert_eq!(kind(0x1234, b"whatever"), reply::ERR_UNSUP);
    assert_eq!(kind(option::LIST, b"x"), reply::ERR_INVALID);
    assert_eq!(kind(option::STARTTLS, &[]), reply::ERR_POLICY);
    assert_eq!(kind(option::GO, &go_data("nobody", &[])), reply::ERR_UNKNOWN);
    assert_eq!(kind(option::INFO, &[0, 0, 0, 9]), reply::ERR_INVALID);
    assert_eq!(kind(option::INFO, &[go_data("", &[]), vec![0]].concat()), reply::ERR_INVALID);
    assert_eq!(
        kind(option::SET_META_CONTEXT, &queries("", &[])),
        reply::ERR_INVALID,
        "no structured replies"
    );
    assert_eq!(kind(option::INFO, &vec![0; 2 << 20]), reply::ERR_TOO_BIG);
    // What ends qemu-nbd 10.0.2: more data than the queries, which look like another option.
    let mut data = queries("", &["base:allocation"]);
    data.extend(OptionHeader { option: option::LIST, length: 0 }.encode());
    assert_eq!(kind(option::LIST_META_CONTEXT, &data), reply::ERR_INVALID);
    assert_eq!(kind(option::STRUCTURED_REPLY, &[]), reply::ACK);
    assert_eq!(kind(option::EXTENDED_HEADERS, &[]), reply::ACK);
    assert_eq!(kind(option::STRUCTURED_REPLY, &[]), reply::ERR_EXT_HEADER_REQD);
    assert_eq!(kind(option::ABORT, b"with data"), reply::ACK);
    assert!(client.is_over());
}

#[test]
fn exports_are_listed_and_chosen_by_name() {
    let mut one = Export::new("one", disk(), ExportOptions::default());
    one.description = "the first".to_owned();
    let two = Export::new("two", raw(vec![2; 4096]), ExportOptions::default());
    let (_server, client) = connect(config(vec![one, two]));
    client.send(&3_u32.to_be_bytes());
    let answers = client.option(option::LIST, &[]);
    assert_eq!(answers[0], (reply::SERVER, b"\0\0\0\x03onethe first".to_vec()));
    assert_eq!(answers[1], (reply::SERVER, b"\0\0\0\x03two".to_vec()));
    assert_eq!(client.option(option::INFO, &go_data("", &[]))[0].0, reply::ERR_UNKNOWN);
    let answers = client.option(option::GO, &go_data("two", &[1, 2, 3]));
    assert_eq!(answers[0].1[2..10], 4096_u64.to_be_bytes());
    assert_eq!(answers[1].1, b"\0\x01two");
    client.request(command::READ, 0, 1, 0, 4);
    assert_eq!(client.simple(4).2, [2; 4]);
}

#[test]
fn a_selection_is_void_for_another_export_and_after_a_failure() {
    for failing in [false, true] {
        let exports = ["", "b"].map(|name| Export::new(name, disk(), ExportOptions::default()));
        let (_server, mut client) = connect(config(exports.into()));
        client.send(&3_u32.to_be_bytes());
        client.style = HeaderStyle::Structured;
        client.option(option::STRUCTURED_REPLY, &[]);
        client.option(option::SET_META_CONTEXT, &queries("b", &[allocation::CONTEXT]));
        if failing {
            client.option(option::SET_META_CONTEXT, &queries("nobody", &[allocation::CONTEXT]));
        }
        client.option(option::GO, &go_data(if failing { "b" } else { "" }, &[]));
        client.request(command::BLOCK_STATUS, 0, 1, 0, 512);
        assert_eq!(client.chunks()[0].0, chunk::ERROR, "failing: {failing}");
    }
}

#[test]
fn writes_are_seen_by_reads_in_every_style() {
    for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
        for len in [1_u64, 4096, 65536, 65537, 700_000] {
            let (_server, mut client) = connect(one_export());
            client.go(style);
            let data: Vec<u8> = (0..len).map(|index| u8::try_from(index % 13 + 1).unwrap()).collect();
            let flags = if style == HeaderStyle::Extended { command_flags::PAYLOAD_LEN } else { 0 };
            client.request(command::WRITE, flags, 1, 77, len);
            client.send(&data);
            match style {
                HeaderStyle::Extended => assert_eq!(client.chunks(), [(chunk::NONE, vec![])]),
                _ => assert_eq!(client.simple(0), (Errno::OK, 1, vec![])),
            }
            client.request(command::READ, 0, 2, 77, len);
            if style == HeaderStyle::Simple {
                assert_eq!(client.simple(data.len()), (Errno::OK, 2, data));
                continue;
            }
            let mut read = vec![0; data.len()];
            for (kind, payload) in client.chunks() {
                assert_eq!(kind, chunk::OFFSET_DATA);
                let offset = u64::from_be_bytes(payload[..8].try_into().unwrap()) - 77;
                let offset = block::num::to_usize(offset);
                read[offset..offset + payload.len() - 8].copy_from_slice(&payload[8..]);
            }
            assert_eq!(read, data, "{style:?} {len}");
        }
    }
}

#[test]
fn refused_requests_leave_the_connection_in_step() {
    let mut export = Export::new("", disk(), ExportOptions::default());
    export.options.read_only = true;
    let (_server, mut client) = connect(config(vec![export]));
    client.go(HeaderStyle::Simple);
    client.request(command::WRITE, 0, 1, 0, 200_000);
    client.send(&vec![0; 200_000]);
    assert_eq!(client.simple(0).0, Errno::EPERM);
    client.request(command::WRITE, 0, 1, 0, 100 << 20);
    for _ in 0..100 {
        client.send(&vec![0; 1 << 20]);
    }
    assert_eq!(client.simple(0).0, Errno::EPERM);
    client.request(99, 0, 2, 0, 0);
    assert_eq!(client.simple(0), (Errno::EINVAL, 2, vec![]));
    client.request(command::READ, 0, 3, SIZE, 1);
    assert_eq!(client.simple(0), (Errno::EINVAL, 3, vec![]));
    client.request(command::READ, 0, 4, 0, 0);
    assert_eq!(client.simple(0), (Errno::OK, 4, vec![]));
    client.request(command::FLUSH, 0, 5, 1, 0);
    assert_eq!(client.simple(0), (Errno::EINVAL, 5, vec![]));
    client.request(command::FLUSH, 0, 6, 0, 0);
    assert_eq!(client.simple(0), (Errno::OK, 6, vec![]));
    client.request(command::DISC, 0xffff, 7, 8, 9);
    assert!(client.is_over());
}

#[test]
fn garbage_ends_only_its_own_connection() {
    let (server, mut client) = connect(one_export());
    client.go(HeaderStyle::Simple);
    for garbage in [&b"GET / HTTP/1.0\r\n\r\n           "[..], b"\0\0\0\x03", b"\0\0\0\xff"] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        server.serve(Channel::unix(theirs, "garbage")).unwrap();
        let other = Channel::unix(ours, "server");
        other.send(&[garbage, &[0xaa; 4096]]).unwrap();
    }
    client.send(&[0x25; 28]);
    assert!(client.is_over());
    let (ours, theirs) = UnixStream::pair().unwrap();
    server.serve(Channel::unix(theirs, "another")).unwrap();
    let mut greeting = [0; 18];
    Channel::unix(ours, "server").receive_exact(&mut greeting).unwrap();
}

/// A disk whose reads at offset 0 wait until they are let go, and fail at 512 KiB.
#[derive(Debug)]
struct Slow {
    disk: Arc<Raw>,
    gate: parking_lot::Mutex<mpsc::Receiver<()>>,
}

impl BlockDevice for Slow {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset == 0 {
            self.gate.lock().recv().unwrap();
        }
        let bad = 512 << 10;
        if (offset..offset + buf.len() as u64).contains(&bad) {
            return Err(Error::new(block::ErrorKind::Io, "a bad sector"));
        }
        self.disk.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.disk.write_at(buf, offset)
    }
    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.disk.write_zeroes_at(offset, len, mode)
    }
    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard_at(offset, len)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        self.disk.layer_extent(offset, max_len)
    }
}

fn slow() -> (Config, mpsc::Sender<()>) {
    let (open, gate) = mpsc::channel();
    let slow = Slow { disk: disk(), gate: parking_lot::Mutex::new(gate) };
    (config(vec![Export::new("", Arc::new(slow), ExportOptions::default())]), open)
}

#[test]
fn a_slow_request_is_overtaken() {
    let (config, open) = slow();
    let (_server, mut client) = connect(config);
    client.go(HeaderStyle::Simple);
    client.request(command::READ, 0, 1, 0, 16);
    for cookie in 2..40 {
        client.request(command::READ, 0, cookie, 4096, 16);
        assert_eq!(client.simple(16).1, cookie);
    }
    open.send(()).unwrap();
    assert_eq!(client.simple(16).1, 1);
}

#[test]
fn a_bad_sector_is_an_error_chunk_and_the_connection_goes_on() {
    for (style, flags) in [
        (HeaderStyle::Simple, 0),
        (HeaderStyle::Structured, 0),
        (HeaderStyle::Extended, 0),
        (HeaderStyle::Structured, command_flags::DF),
    ] {
        let (config, _open) = slow();
        let (_server, mut client) = connect(config);
        client.go(style);
        client.request(command::READ, flags, 1, 4096, 900_000);
        if style == HeaderStyle::Simple {
            assert_eq!(client.simple(0), (Errno::EIO, 1, vec![]));
        } else {
            let chunks = client.chunks();
            let (kind, payload) = chunks.last().unwrap();
            assert_eq!(payload[..4], Errno::EIO.0.to_be_bytes());
            assert!(payload.windows(12).any(|text| text == b"a bad sector"), "{payload:?}");
            assert_eq!(*kind, if flags == 0 { chunk::ERROR_OFFSET } else { chunk::ERROR });
        }
        client.request(command::READ, 0, 2, 4096, 16);
        if style == HeaderStyle::Simple {
            assert_eq!(client.simple(16).0, Errno::OK);
        } else {
            assert_eq!(client.chunks().len(), 1);
        }
    }
}

#[test]
fn stopping_finishes_what_was_asked_for() {
    let (config, open) = slow();
    let (server, mut client) = connect(config);
    let handle = server.handle();
    client.go(HeaderStyle::Simple);
    client.request(command::READ, 0, 1, 0, 16);
    let running = std::thread::spawn(move || server.run().unwrap());
    std::thread::sleep(Duration::from_millis(50));
    handle.stop();
    std::thread::sleep(Duration::from_millis(50));
    open.send(()).unwrap();
    assert_eq!(client.simple(16).1, 1);
    assert!(client.is_over());
    let counts = running.join().unwrap();
    assert_eq!((counts.total(), counts.read_bytes), (1, 16));
}

#[test]
fn a_handshake_that_takes_too_long_is_ended() {
    let mut config = one_export();
    config.limits.handshake_timeout = Some(Duration::from_millis(100));
    let (server, client) = connect(config);
    let running = std::thread::spawn(move || server.run().unwrap());
    assert!(client.is_over());
    // Without listeners the server ends with its last client.
    running.join().unwrap();
}

#[test]
fn holes_are_not_sent() {
    let overlay = block::overlay::Overlay::new(raw(vec![9; 1 << 20]), Arc::new(MemStorage::new()), 65536);
    let overlay = overlay.unwrap();
    overlay.write_zeroes_at(0, 1 << 20, ZeroMode::UNMAP).unwrap();
    overlay.write_at(&[5; 65536], 131_072).unwrap();
    let (_server, mut client) =
        connect(config(vec![Export::new("", Arc::new(overlay), ExportOptions::default())]));
    client.go(HeaderStyle::Structured);
    client.request(command::READ, 0, 1, 0, 1 << 20);
    let chunks = client.chunks();
    let data: usize =
        chunks.iter().filter(|(kind, _)| *kind == chunk::OFFSET_DATA).map(|(_, bytes)| bytes.len() - 8).sum();
    assert_eq!(data, 65536, "{:?}", chunks.iter().map(|(kind, _)| kind).collect::<Vec<_>>());
    client.request(command::BLOCK_STATUS, 0, 2, 0, 1 << 20);
    let chunks = client.chunks();
    let mut wanted = Writer::new();
    wanted.be_u32(1).be_u32(131_072).be_u32(3).be_u32(65536).be_u32(0).be_u32((1 << 20) - 196_608).be_u32(3);
    assert_eq!(chunks, [(chunk::BLOCK_STATUS, wanted.into_bytes())]);
}

#[test]
fn files_are_sent_from_the_page_cache() {
    let bytes: Vec<u8> = (0..3_000_000_u64).map(|index| u8::try_from(index % 249).unwrap()).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
        let options = block::file::FileOptions::read_write();
        let storage = Arc::new(block::file::HostFile::open(file.path(), &options).unwrap());
        let device = Arc::new(Raw::open(storage, Default::default()).unwrap());
        let options = ExportOptions { in_place: true, ..ExportOptions::default() };
        let (_server, mut client) = connect(config(vec![Export::new("", device, options)]));
        client.go(style);
        for (offset, len) in [(0, 100_000), (4097, 262_144), (77, 2_500_001), (2_999_000, 1000), (1, 131_072)]
        {
            client.request(command::READ, 0, 2, offset as u64, len as u64);
            let wanted = &bytes[offset..offset + len];
            if style == HeaderStyle::Simple {
                assert!(client.simple(len).2 == wanted, "{style:?} {offset} {len}");
                continue;
            }
            let mut read = vec![0; len];
            for (kind, payload) in client.chunks() {
                assert_eq!(kind, chunk::OFFSET_DATA);
                let at = u64::from_be_bytes(payload[..8].try_into().unwrap());
                let at = block::num::to_usize(at) - offset;
                read[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
            }
            assert!(read == wanted, "{style:?} {offset} {len}");
        }
    }
}

#[test]
fn a_file_that_has_become_shorter_ends_no_connection() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![7; 1 << 20]).unwrap();
    let options = block::file::FileOptions::read_write();
    let storage = Arc::new(block::file::HostFile::open(file.path(), &options).unwrap());
    let device = Arc::new(Raw::open(storage, Default::default()).unwrap());
    let options = ExportOptions { in_place: true, ..ExportOptions::default() };
    let (_server, mut client) = connect(config(vec![Export::new("", device, options)]));
    client.go(HeaderStyle::Structured);
    file.as_file().set_len(100_000).unwrap();
    client.request(command::READ, 0, 2, 65536, 131_072);
    let chunks = client.chunks();
    let is_data = |kind: u16| kind == chunk::OFFSET_DATA || kind == chunk::OFFSET_HOLE;
    assert!(
        chunks.iter().all(|(kind, _)| is_data(*kind)) || chunks.last().unwrap().0 & chunk::ERROR_BIT != 0
    );
    client.request(command::READ, 0, 3, 0, 16);
    assert_eq!(client.chunks()[0].1[8..], [7; 16]);
}

//! Every way in which a server can be wrong, and what is said about it.

use block::BlockDevice as _;
use block::codec::Writer;
use block::num::to_usize;

use super::fake::{Export, FLAGS, Fake, connect, with_export};
use crate::proto::{
    Errno, HeaderStyle, IHAVEOPT, NBDMAGIC, OLDSTYLE_MAGIC, OptionReply, Request, chunk, info, option, reply,
};

const DONE: u16 = chunk::FLAG_DONE;

/// What reading 8 bytes at 16 says, when the server answers by `script`. Whatever it is, the connection is given up.
fn read(style: HeaderStyle, script: impl FnOnce(&Fake, &Request) + Send + 'static) -> String {
    let device = with_export(Export { style, ..Export::default() }, move |fake| {
        let (request, _) = fake.request().unwrap();
        script(&fake, &request);
        // The client must not be saved by the end of the connection.
        fake.request();
    });
    let error = device.read_at(&mut [0; 8], 16).unwrap_err().to_string();
    assert!(
        device.read_at(&mut [0; 8], 16).unwrap_err().to_string().contains("breaks the NBD protocol"),
        "{error}"
    );
    error
}

/// A wrong answer to a read.
type Wrong = (&'static str, fn(&Fake, &Request));

#[test]
fn wrong_answers_to_a_read() {
    let wrong: [Wrong; 19] = [
        ("invalid magic 0x1020304 where", |fake, _| fake.send(&[1, 2, 3, 4, 5, 6, 7, 8])),
        ("a simple reply where a structured one", |fake, request| fake.simple(request, Errno::EIO)),
        ("never made (cookie 0x63)", |fake, request| {
            fake.data(&Request { cookie: 99, ..*request }, DONE, 16, &[1; 8]);
        }),
        ("8 bytes at 0xf in the answer", |fake, request| fake.data(request, DONE, 15, &[1; 8])),
        ("9 bytes at 0x10 in the answer", |fake, request| fake.data(request, DONE, 16, &[1; 9])),
        ("8 bytes at 0xffffffffffffffff", |fake, request| fake.data(request, DONE, u64::MAX, &[1; 8])),
        ("a data chunk of 8 bytes", |fake, request| fake.data(request, DONE, 16, &[])),
        ("a data chunk of 3 bytes", |fake, request| fake.chunk(request, DONE, chunk::OFFSET_DATA, &[0; 3])),
        ("which overlap what came before", |fake, request| {
            fake.data(request, 0, 16, &[1; 4]);
            fake.data(request, DONE, 19, &[1; 5]);
        }),
        ("although bytes are missing", |fake, request| fake.data(request, DONE, 16, &[1; 7])),
        ("although bytes are missing", |fake, request| fake.chunk(request, DONE, chunk::NONE, &[])),
        ("a chunk of type 0x0 with 0 bytes", |fake, request| fake.chunk(request, 0, chunk::NONE, &[])),
        ("a chunk of type 0x0 with 1 bytes", |fake, request| fake.chunk(request, DONE, chunk::NONE, &[0])),
        ("a hole chunk of 11 bytes", |fake, request| fake.chunk(request, DONE, chunk::OFFSET_HOLE, &[0; 11])),
        ("0 bytes at 0x10", |fake, request| {
            fake.chunk(request, DONE, chunk::OFFSET_HOLE, &[0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0]);
        }),
        ("a chunk of type 0x7 with 2 bytes", |fake, request| fake.chunk(request, DONE, 7, &[0; 2])),
        ("unknown flags 0x2", |fake, request| fake.data(request, 2, 16, &[1; 8])),
        ("a status that nobody has asked for", |fake, request| {
            fake.chunk(request, DONE, chunk::BLOCK_STATUS, &[0; 12]);
        }),
        ("has not been agreed on", |fake, request| {
            let mut bytes = crate::proto::EXTENDED_REPLY_MAGIC.to_be_bytes().to_vec();
            bytes.extend_from_slice(&[0, 1, 0, 0]);
            bytes.extend_from_slice(&request.cookie.to_be_bytes());
            bytes.extend_from_slice(&[0; 16]);
            fake.send(&bytes);
        }),
    ];
    for (words, script) in wrong {
        let error = read(HeaderStyle::Structured, script);
        assert!(error.contains(words), "{words}: {error}");
    }
    let offset =
        |fake: &Fake, request: &Request| fake.data(&Request { offset: 17, ..*request }, DONE, 16, &[1; 8]);
    let error = read(HeaderStyle::Extended, offset);
    assert!(error.contains("a chunk for the offset 0x11"), "{error}");
    let error = read(HeaderStyle::Simple, |fake, request| fake.data(request, DONE, 16, &[1; 8]));
    assert!(error.contains("has not been agreed on"), "{error}");
}

#[test]
fn wrong_error_chunks() {
    let long = [&[0, 0, 0, 5, 0x10, 1][..], &[b'x'; 4097]].concat();
    for (kind, payload) in [
        (chunk::ERROR, vec![0; 5]),
        (chunk::ERROR, vec![0, 0, 0, 0, 0, 0]),
        (chunk::ERROR, vec![0, 0, 0, 5, 0, 1]),
        (chunk::ERROR, vec![0, 0, 0, 5, 0, 0, 1]),
        (chunk::ERROR, long),
        (chunk::ERROR_OFFSET, vec![0, 0, 0, 5, 0, 0]),
        (chunk::ERROR_OFFSET, vec![0, 0, 0, 5, 0, 0, 0, 0]),
        (chunk::ERROR_BIT + 99, vec![0; 70_000]),
    ] {
        let error =
            read(HeaderStyle::Structured, move |fake, request| fake.chunk(request, DONE, kind, &payload));
        assert!(error.contains("error chunk"), "{error}");
    }
    // There is no end of it.
    let error = read(HeaderStyle::Structured, |fake, request| {
        (0..100).for_each(|_| fake.chunk(request, 0, chunk::ERROR, &[0, 0, 0, 5, 0, 0]));
    });
    assert!(error.contains("error chunk"), "{error}");
}

#[test]
fn errors_that_are_right_are_told_and_survived() {
    let device = with_export(Export::default(), |fake| {
        let (request, _) = fake.request().unwrap();
        fake.data(&request, 0, 16, &[7; 4]);
        let mut payload = vec![0, 0, 0, 5, 0, 6];
        payload.extend_from_slice(b"sector\0\0\0\0\0\0\0\x14");
        fake.chunk(&request, DONE, chunk::ERROR_OFFSET, &payload);
        let (request, _) = fake.request().unwrap();
        // A kind of error that is yet to be invented.
        fake.chunk(&request, 0, chunk::ERROR_BIT + 9, &[0, 0, 0, 28, 0, 0, 1, 2, 3]);
        fake.chunk(&request, DONE, chunk::NONE, &[]);
        let (request, _) = fake.request().unwrap();
        fake.chunk(&request, 0, chunk::OFFSET_HOLE, &[0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 4]);
        fake.data(&request, 0, 16, &[9; 4]);
        fake.chunk(&request, DONE, chunk::NONE, &[]);
        let (request, _) = fake.request().unwrap();
        fake.simple(&request, Errno::EPERM);
        fake.request();
    });
    let mut buf = [1; 8];
    let words = "nbd+unix:///disk?socket=fake: reading 8 bytes at 0x10: Input/output error at 0x14 (the server says: sector)";
    assert_eq!(device.read_at(&mut buf, 16).unwrap_err().to_string(), words);
    let error = device.read_at(&mut buf, 16).unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::NoSpace, "{error}");
    device.read_at(&mut buf, 16).unwrap();
    assert_eq!(buf, [9, 9, 9, 9, 0, 0, 0, 0]);
    assert_eq!(device.write_at(&buf, 0).unwrap_err().kind(), block::ErrorKind::Permission);
}

/// What asking for the extents says, when the server answers with this chunk.
fn status(style: HeaderStyle, chunks: Vec<Vec<u8>>) -> Result<block::LayerExtent, String> {
    let device = with_export(Export { style, ..Export::default() }, move |fake| {
        let (request, _) = fake.request().unwrap();
        let kind = if style == HeaderStyle::Extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        chunks.iter().for_each(|payload| fake.chunk(&request, 0, kind, payload));
        fake.chunk(&request, DONE, chunk::NONE, &[]);
        fake.request();
    });
    device.layer_extent(4096, 8192).map_err(|error| error.to_string())
}

fn extents(id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.be_u32(id);
    for (len, flags) in extents {
        writer.be_u32(*len).be_u32(*flags);
    }
    writer.into_bytes()
}

#[test]
fn wrong_statuses() {
    let all = 1 << 20;
    for (words, chunks) in [
        ("although no status", vec![]),
        ("a status chunk of 4 bytes", vec![extents(42, &[])]),
        ("a status chunk of 11 bytes", vec![extents(42, &[(4096, 0)])[..11].to_vec()]),
        ("of no length", vec![extents(42, &[(0, 0)])]),
        ("past the end", vec![extents(42, &[(all, 0), (4096, 0)])]),
        ("has not been chosen", vec![extents(41, &[(4096, 0)])]),
        ("answered already", vec![extents(42, &[(4096, 0)]), extents(42, &[(4096, 0)])]),
    ] {
        let error = status(HeaderStyle::Structured, chunks).unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
    }
    let mut wrong_count = Writer::new();
    wrong_count.be_u32(42).be_u32(2).be_u64(4096).be_u64(0);
    let error = status(HeaderStyle::Extended, vec![wrong_count.into_bytes()]).unwrap_err();
    assert!(error.contains("whose count"), "{error}");
}

#[test]
fn right_statuses_are_cut_to_what_was_asked_for() {
    let zero = |len| block::LayerExtent::new(block::Stored::Zero, len);
    let long = status(HeaderStyle::Structured, vec![extents(42, &[(u32::MAX, 3)])]).unwrap();
    assert_eq!(long, zero(8192));
    let short = status(HeaderStyle::Structured, vec![extents(42, &[(512, 3), (512, 3), (8, 0)])]).unwrap();
    assert_eq!(short, zero(1024));
    let mut extended = Writer::new();
    extended.be_u32(42).be_u32(1).be_u64(u64::MAX).be_u64(2);
    assert_eq!(status(HeaderStyle::Extended, vec![extended.into_bytes()]).unwrap(), zero(8192));
}

/// What connecting says to a server that sends these bytes and no more.
fn greeted_with(bytes: Vec<u8>) -> String {
    let result = connect(move |fake| {
        fake.send(&bytes);
    });
    result.unwrap_err().to_string()
}

#[test]
fn wrong_greetings() {
    let greeting = |first: u64, second: u64, rest: &[u8]| {
        let mut writer = Writer::new();
        writer.be_u64(first).be_u64(second).bytes(rest);
        writer.into_bytes()
    };
    for (words, bytes) in [
        ("closed the connection", vec![]),
        ("closed the connection", b"NBDMAG".to_vec()),
        ("Bad initial magic received: 0x5353482d322e302d", b"SSH-2.0-OpenSSH_9.2".to_vec()),
        ("Bad server magic received: 0x0000000000000007", greeting(NBDMAGIC, 7, &[])),
        ("closed the connection", greeting(NBDMAGIC, IHAVEOPT, &[0])),
        ("non-empty export names", greeting(NBDMAGIC, OLDSTYLE_MAGIC, &[0; 8 + 4 + 124])),
    ] {
        let error = greeted_with(bytes);
        assert!(error.contains(words), "{words}: {error}");
    }
}

/// What connecting says when `NBD_OPT_GO` is answered by `script`.
fn going(script: impl FnOnce(&Fake, u32) + Send + 'static) -> String {
    let result = connect(move |fake| {
        fake.greet();
        loop {
            let (asked, _) = fake.option();
            if asked == option::GO {
                script(&fake, asked);
                fake.receive(1);
                return;
            }
            fake.answer(asked, reply::ERR_UNSUP, &[]);
        }
    });
    result.unwrap_err().to_string()
}

#[test]
fn wrong_descriptions_of_the_export() {
    let told = |size, blocks| {
        going(move |fake, option| {
            fake.tell(option, &Export { size, blocks, ..Export::default() });
            fake.answer(option, reply::ACK, &[]);
        })
    };
    for (words, size, blocks) in [
        ("export length 9223372036854775808 is too large", 1 << 63, None),
        ("minimum block size 3 is not", 1 << 20, Some((3, 4096, 1 << 20))),
        ("minimum block size 0 is not", 1 << 20, Some((0, 4096, 1 << 20))),
        ("minimum block size 131072 is not", 1 << 20, Some((1 << 17, 1 << 17, 1 << 20))),
        ("preferred block size 5000 is not", 1 << 20, Some((1, 5000, 1 << 20))),
        ("preferred block size 256 is not", 1 << 20, Some((512, 256, 1 << 20))),
        ("maximum block size 256 is less", 1 << 20, Some((512, 512, 256))),
        ("is not a multiple of minimum block size 512", 1000, Some((512, 512, 1 << 20))),
    ] {
        let error = told(size, blocks);
        assert!(error.contains(words), "{words}: {error}");
    }
    let acknowledged = going(|fake, option| fake.answer(option, reply::ACK, &[]));
    assert!(acknowledged.contains("acknowledged without"), "{acknowledged}");
    for data in
        [vec![], vec![0], vec![0, 0, 1], vec![0; 13], [&info::BLOCK_SIZE.to_be_bytes()[..], &[0; 5]].concat()]
    {
        let error = going(move |fake, option| fake.answer(option, reply::INFO, &data));
        assert!(error.contains("as an answer to NBD_OPT_GO"), "{error}");
    }
    let endless = going(|fake, option| (0..200).for_each(|_| fake.answer(option, reply::INFO, &[0, 9])));
    assert!(endless.contains("more than 100 answers"), "{endless}");
}

#[test]
fn wrong_answers_to_options() {
    let other = going(|fake, _| fake.answer(option::LIST, reply::ACK, &[]));
    assert!(other.contains("an answer to NBD_OPT_LIST where one to NBD_OPT_GO is due"), "{other}");
    let magic = going(|fake, _| fake.send(&[9; OptionReply::LEN]));
    assert!(magic.contains("Unexpected option reply magic"), "{magic}");
    let long = going(|fake, option| {
        fake.send(&OptionReply { option, kind: reply::INFO, length: u32::MAX }.encode());
    });
    assert!(long.contains("an answer of 4294967295 bytes"), "{long}");
    let kind = going(|fake, option| fake.answer(option, 77, &[]));
    assert!(kind.contains("reply type 0x4d"), "{kind}");
}

#[test]
fn refusals_have_qemus_words_and_the_servers() {
    for (kind, words) in [
        (reply::ERR_UNKNOWN, "Requested export not available\nserver reported: because"),
        (reply::ERR_TLS_REQD, "TLS negotiation required before option 7"),
        (reply::ERR_POLICY, "Denied by server for option 7"),
        (reply::ERR_SHUTDOWN, "Server shutting down before option 7"),
        (reply::ERROR + 99, "for option 7"),
    ] {
        let error = going(move |fake, option| fake.answer(option, kind, b"because"));
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn contexts_that_nobody_has_asked_for() {
    let result = connect(|fake| {
        fake.greet();
        loop {
            let (asked, _) = fake.option();
            match asked {
                option::SET_META_CONTEXT => {
                    fake.answer(asked, reply::META_CONTEXT, b"\0\0\0\x01qemu:foo");
                    fake.receive(1);
                    return;
                }
                _ => fake.answer(asked, reply::ACK, &[]),
            }
        }
    });
    let error = result.unwrap_err().to_string();
    assert!(error.contains("the context 'qemu:foo'"), "{error}");
}

#[test]
fn a_server_that_leaves_is_noticed() {
    for sent in [0, 10, 20, 24] {
        let device = with_export(Export { flags: FLAGS, ..Export::default() }, move |fake| {
            let (request, _) = fake.request().unwrap();
            let mut bytes = vec![];
            crate::proto::ReplyHeader::Chunk {
                flags: DONE,
                kind: chunk::OFFSET_DATA,
                cookie: request.cookie,
                offset: 0,
                length: 16,
            }
            .encode(false, &mut bytes);
            bytes.extend_from_slice(&[0; 8]);
            fake.send(&bytes[..to_usize(sent)]);
        });
        let error = device.read_at(&mut [0; 8], 0).unwrap_err().to_string();
        assert!(error.contains("the server has closed the connection"), "{error}");
        device.flush().unwrap_err();
    }
}

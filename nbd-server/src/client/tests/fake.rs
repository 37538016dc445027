//! A server in a thread, which follows a script.

use std::os::unix::net::UnixStream;
use std::thread;

use block::Result;
use block::codec::Writer;

use super::super::{NbdDevice, over};
use crate::channel::Channel;
use crate::proto::{
    Errno, HeaderStyle, IHAVEOPT, NBDMAGIC, OptionHeader, OptionReply, ReplyHeader, Request, chunk,
    client_flags, handshake, info, option, reply, transmission,
};
use crate::uri::{Address, ExportName};

/// What the export can do, where a test does not care.
pub(super) const FLAGS: u16 = transmission::HAS_FLAGS
    | transmission::SEND_FLUSH
    | transmission::SEND_TRIM
    | transmission::SEND_WRITE_ZEROES
    | transmission::SEND_FAST_ZERO
    | transmission::SEND_DF;

/// How the handshake goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Export {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) style: HeaderStyle,
    pub(super) blocks: Option<(u32, u32, u32)>,
    /// `NBD_OPT_GO` is known.
    pub(super) go: bool,
}

impl Default for Export {
    fn default() -> Self {
        Self { size: 1 << 20, flags: FLAGS, style: HeaderStyle::Structured, blocks: None, go: true }
    }
}

/// The server's side.
#[derive(Debug)]
pub(super) struct Fake {
    pub(super) channel: Channel,
    pub(super) style: HeaderStyle,
}

/// Runs `script` as a server and connects to it.
pub(super) fn connect(script: impl FnOnce(Fake) + Send + 'static) -> Result<NbdDevice> {
    let (client, server) = UnixStream::pair().unwrap();
    let fake = Fake { channel: Channel::unix(server, "client"), style: HeaderStyle::Simple };
    thread::spawn(move || script(fake));
    let name = ExportName::new(Address::Unix("fake".into()), "disk");
    over(Channel::unix(client, "server"), &name, None, true)
}

/// The same, after a handshake as it should be.
pub(super) fn with_export(export: Export, script: impl FnOnce(Fake) + Send + 'static) -> NbdDevice {
    connect(move |mut fake| {
        fake.handshake(&export);
        script(fake);
    })
    .unwrap()
}

impl Fake {
    pub(super) fn send(&self, bytes: &[u8]) {
        // A client that has heard enough hangs up.
        let _ = self.channel.send(&[bytes]);
    }

    pub(super) fn receive(&self, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.channel.receive_exact(&mut bytes).ok().map(|()| bytes)
    }

    pub(super) fn greet(&self) {
        let mut writer = Writer::new();
        writer.be_u64(NBDMAGIC).be_u64(IHAVEOPT).be_u16(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.send(&writer.into_bytes());
        let flags = client_flags::FIXED_NEWSTYLE | client_flags::NO_ZEROES;
        assert_eq!(self.receive(4).unwrap(), flags.to_be_bytes());
    }

    pub(super) fn option(&self) -> (u32, Vec<u8>) {
        let header = self.receive(OptionHeader::LEN).unwrap();
        let header = OptionHeader::parse(&header).unwrap();
        (header.option, self.receive(header.length.try_into().unwrap()).unwrap())
    }

    pub(super) fn answer(&self, option: u32, kind: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        self.send(&OptionReply { option, kind, length }.encode());
        self.send(data);
    }

    /// Plays the handshake through to the transmission phase.
    pub(super) fn handshake(&mut self, export: &Export) {
        self.greet();
        loop {
            let (asked, _) = self.option();
            match asked {
                option::EXTENDED_HEADERS if export.style == HeaderStyle::Extended => {
                    self.answer(asked, reply::ACK, &[]);
                }
                option::STRUCTURED_REPLY if export.style == HeaderStyle::Structured => {
                    self.answer(asked, reply::ACK, &[]);
                }
                option::SET_META_CONTEXT => {
                    self.answer(asked, reply::META_CONTEXT, b"\0\0\0\x2abase:allocation");
                    self.answer(asked, reply::ACK, &[]);
                }
                option::GO if export.go => {
                    self.tell(asked, export);
                    self.answer(asked, reply::ACK, &[]);
                    break;
                }
                option::EXPORT_NAME => {
                    self.send(&export.size.to_be_bytes());
                    self.send(&export.flags.to_be_bytes());
                    break;
                }
                _ => self.answer(asked, reply::ERR_UNSUP, b"no"),
            }
        }
        self.style = export.style;
    }

    pub(super) fn tell(&self, option: u32, export: &Export) {
        let mut data = Writer::new();
        data.be_u16(info::EXPORT).be_u64(export.size).be_u16(export.flags);
        self.answer(option, reply::INFO, &data.into_bytes());
        if let Some((min, preferred, max)) = export.blocks {
            let mut data = Writer::new();
            data.be_u16(info::BLOCK_SIZE).be_u32(min).be_u32(preferred).be_u32(max);
            self.answer(option, reply::INFO, &data.into_bytes());
        }
    }

    /// The next request with its payload; `None` when the client is gone.
    pub(super) fn request(&self) -> Option<(Request, Vec<u8>)> {
        let header = self.receive(self.style.request_len())?;
        let request = Request::parse(&header, self.style).unwrap();
        let payload = match request.command {
            crate::proto::command::WRITE => self.receive(request.length.try_into().unwrap())?,
            _ => vec![],
        };
        Some((request, payload))
    }

    pub(super) fn simple(&self, request: &Request, error: Errno) {
        let mut bytes = vec![];
        ReplyHeader::Simple { error, cookie: request.cookie }.encode(false, &mut bytes);
        self.send(&bytes);
    }

    pub(super) fn chunk(&self, request: &Request, flags: u16, kind: u16, payload: &[u8]) {
        let mut bytes = vec![];
        let Request { cookie, offset, .. } = *request;
        ReplyHeader::Chunk { flags, kind, cookie, offset, length: payload.len() as u64 }
            .encode(self.style == HeaderStyle::Extended, &mut bytes);
        bytes.extend_from_slice(payload);
        self.send(&bytes);
    }

    pub(super) fn data(&self, request: &Request, flags: u16, offset: u64, data: &[u8]) {
        self.chunk(request, flags, chunk::OFFSET_DATA, &[&offset.to_be_bytes()[..], data].concat());
    }

    /// Success, of whatever the request is but a read.
    pub(super) fn done(&self, request: &Request) {
        match self.style {
            HeaderStyle::Extended => self.chunk(request, chunk::FLAG_DONE, chunk::NONE, &[]),
            _ => self.simple(request, Errno::OK),
        }
    }
}

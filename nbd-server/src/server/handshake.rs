//! The handshake, as a server: fixed newstyle (section "Fixed newstyle negotiation" and "Option types").
//!
//! Every option is read completely before it is looked at, so that whatever it holds the connection stays in step. Reads
//! never go beyond an option: what follows `STARTTLS` must not be taken from the clear.

use std::io;
use std::sync::Arc;

use block::codec::{Reader, Writer};

use super::Shared;
use super::export::{Context, Export};
use super::reply::cut;
use crate::channel::Channel;
use crate::proto::{
    HeaderStyle, IHAVEOPT, MAX_STRING, NBDMAGIC, OptionHeader, OptionReply, client_flags, handshake, info,
    option, reply,
};
use crate::tls::Policy;

/// The longest option that is looked at, in bytes: room for some hundred queries of the longest kind.
const MAX_OPTION: u32 = 1 << 20;
/// The longest option that is read over, in bytes. After a longer one the connection ends.
const MAX_DRAINED: u32 = 32 << 20;

/// What client and server have agreed on.
#[derive(Debug)]
pub(super) struct Agreement {
    pub(super) export: Arc<Export>,
    pub(super) style: HeaderStyle,
    /// The chosen contexts and their numbers.
    pub(super) contexts: Vec<(u32, Context)>,
}

/// Why there is no agreement.
#[derive(Debug)]
pub(super) enum Failure {
    /// The client has left before it said anything: somebody looked whether the port is open.
    Probe,
    /// The client has taken its leave.
    Left,
    /// It broke the rules, or was too late.
    Broken(String),
    /// The connection failed.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn broken(text: impl Into<String>) -> Failure {
    Failure::Broken(text.into())
}

/// Carries out the handshake.
pub(super) fn negotiate(channel: &mut Channel, shared: &Shared, id: u64) -> Result<Agreement, Failure> {
    let mut session = Session {
        channel,
        shared,
        id,
        fixed: false,
        zeroes: true,
        style: HeaderStyle::Simple,
        chosen: None,
        refusals: 0,
    };
    session.greet()?;
    loop {
        if let Some(agreement) = session.option()? {
            return Ok(agreement);
        }
    }
}

/// What a `SET_META_CONTEXT` has chosen, for which export.
struct Chosen {
    export: Arc<Export>,
    contexts: Vec<(u32, Context)>,
}

struct Session<'a> {
    channel: &'a mut Channel,
    shared: &'a Shared,
    id: u64,
    /// The client speaks fixed newstyle.
    fixed: bool,
    /// The client wants the zeros after `EXPORT_NAME`.
    zeroes: bool,
    style: HeaderStyle,
    chosen: Option<Chosen>,
    /// Options that were refused until now.
    refusals: u64,
}

/// How an option is answered.
struct Refused {
    kind: u32,
    text: String,
}

fn refused(kind: u32, text: impl Into<String>) -> Refused {
    Refused { kind, text: text.into() }
}

fn invalid(text: impl Into<String>) -> Refused {
    refused(reply::ERR_INVALID, text)
}

impl Session<'_> {
    fn greet(&mut self) -> Result<(), Failure> {
        let mut greeting = Writer::new();
        greeting.be_u64(NBDMAGIC).be_u64(IHAVEOPT).be_u16(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        let mut flags = [0; 4];
        let sent = self.channel.send(&[&greeting.into_bytes()]);
        if sent.and_then(|()| self.channel.receive_exact(&mut flags)).is_err() {
            return Err(Failure::Probe);
        }
        let flags = u32::from_be_bytes(flags);
        let known = client_flags::FIXED_NEWSTYLE | client_flags::NO_ZEROES;
        if flags & !known != 0 {
            return Err(broken(format!("unknown client flags {:#x}", flags & !known)));
        }
        self.fixed = flags & client_flags::FIXED_NEWSTYLE != 0;
        self.zeroes = flags & client_flags::NO_ZEROES == 0;
        Ok(())
    }

    /// Receives one option and answers it. The agreement, if it was the last one.
    fn option(&mut self) -> Result<Option<Agreement>, Failure> {
        let mut header = [0; OptionHeader::LEN];
        match self.channel.receive_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Failure::Left),
            result => result?,
        }
        let header =
            OptionHeader::parse(&header).ok_or_else(|| broken("an option has another magic number"))?;
        let option = header.option;
        if !self.fixed && option != option::EXPORT_NAME {
            return Err(broken(format!("{} without fixed newstyle", option::name(option))));
        }
        let Some(data) = self.data(header)? else {
            if option == option::EXPORT_NAME {
                return Err(broken("an export's name is too long"));
            }
            self.refuse(option, &refused(reply::ERR_TOO_BIG, "the option is too long"))?;
            return Ok(None);
        };
        if self.needs_tls_first(option) {
            if option == option::EXPORT_NAME {
                return Err(broken("the client asked for an export before TLS, which this server requires"));
            }
            self.refuse(option, &refused(reply::ERR_TLS_REQD, "this server requires TLS"))?;
            return Ok(None);
        }
        self.answer(option, &data)
    }

    fn answer(&mut self, option: u32, data: &[u8]) -> Result<Option<Agreement>, Failure> {
        let answered = match option {
            option::EXPORT_NAME => return self.export_name(data).map(Some),
            option::ABORT => {
                // The client may be gone already.
                let _ = self.reply(option, reply::ACK, &[]);
                return Err(Failure::Left);
            }
            option::STARTTLS => return self.start_tls(data).map(|()| None),
            option::GO => match self.info(option, data) {
                Ok(export) => {
                    let export = export?;
                    self.reply(option, reply::ACK, &[])?;
                    return Ok(Some(self.agree(export)));
                }
                Err(refused) => Err(refused),
            },
            option::INFO => match self.info(option, data) {
                Ok(export) => {
                    export?;
                    self.reply(option, reply::ACK, &[])?;
                    Ok(())
                }
                Err(refused) => Err(refused),
            },
            option::LIST => match nothing(data) {
                Ok(()) => {
                    self.list()?;
                    Ok(())
                }
                Err(refused) => Err(refused),
            },
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => match self.headers(option, data) {
                Ok(()) => {
                    self.reply(option, reply::ACK, &[])?;
                    Ok(())
                }
                Err(refused) => Err(refused),
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => match self.contexts(option, data) {
                Ok(replied) => {
                    replied?;
                    Ok(())
                }
                Err(refused) => Err(refused),
            },
            other => Err(refused(reply::ERR_UNSUP, format!("{} is not known here", option::name(other)))),
        };
        if let Err(refused) = answered {
            self.refuse(option, &refused)?;
        }
        Ok(None)
    }

    /// The data of an option; `None` if there are too many, which are read all the same. Memory grows with what arrives,
    /// not with what was announced.
    fn data(&mut self, header: OptionHeader) -> Result<Option<Vec<u8>>, Failure> {
        let OptionHeader { option, length } = header;
        if length > MAX_DRAINED {
            return Err(broken(format!("{} with {length} bytes", option::name(option))));
        }
        let keep = length <= MAX_OPTION;
        let mut data = vec![];
        let mut piece = [0; 4096];
        let mut left = block::num::to_usize(u64::from(length));
        while left > 0 {
            let now = left.min(piece.len());
            self.channel.receive_exact(&mut piece[..now])?;
            if keep {
                data.extend_from_slice(&piece[..now]);
            }
            left -= now;
        }
        Ok(keep.then_some(data))
    }

    fn needs_tls_first(&self, option: u32) -> bool {
        self.shared.tls_policy() == Policy::Required
            && !self.channel.is_tls()
            && ![option::STARTTLS, option::ABORT].contains(&option)
    }

    fn reply(&self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.channel.send(&[&OptionReply { option, kind, length }.encode(), data])
    }

    fn refuse(&mut self, option: u32, refused: &Refused) -> io::Result<()> {
        let (what, text) = (option::name(option), cut(&refused.text, MAX_STRING));
        self.refusals += 1;
        self.shared.failed(self.id, self.refusals, &what, &format!("{}: {text}", reply::name(refused.kind)));
        self.reply(option, refused.kind, text.as_bytes())
    }

    fn list(&self) -> io::Result<()> {
        for export in self.shared.exports() {
            let mut data = Writer::new();
            data.be_u32(u32::try_from(export.name.len()).unwrap_or(0))
                .bytes(export.name.as_bytes())
                .bytes(export.description.as_bytes());
            self.reply(option::LIST, reply::SERVER, &data.into_bytes())?;
        }
        self.reply(option::LIST, reply::ACK, &[])
    }

    fn start_tls(&mut self, data: &[u8]) -> Result<(), Failure> {
        let option = option::STARTTLS;
        let refusal = match self.shared.tls() {
            None => Some(refused(reply::ERR_POLICY, "TLS is not configured here")),
            Some(_) if !data.is_empty() => Some(invalid("STARTTLS with data")),
            Some(_) if self.channel.is_tls() => Some(invalid("TLS is in use already")),
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            self.refuse(option, &refusal)?;
            return Ok(());
        }
        let Some(tls) = self.shared.tls() else { return Ok(()) };
        let session = tls.session()?;
        self.reply(option, reply::ACK, &[])?;
        // What was agreed on in the clear may have come from somebody in between.
        self.style = HeaderStyle::Simple;
        self.chosen = None;
        self.channel.start_tls(session).map_err(|error| broken(error.to_string()))
    }

    fn headers(&mut self, option: u32, data: &[u8]) -> Result<(), Refused> {
        nothing(data)?;
        match (option, self.style) {
            (option::EXTENDED_HEADERS, HeaderStyle::Extended) => Err(invalid("agreed on already")),
            (option::EXTENDED_HEADERS, _) => {
                self.style = HeaderStyle::Extended;
                Ok(())
            }
            (_, HeaderStyle::Extended) => {
                Err(refused(reply::ERR_EXT_HEADER_REQD, "extended headers include structured replies"))
            }
            (_, HeaderStyle::Structured) => Err(invalid("agreed on already")),
            (_, HeaderStyle::Simple) => {
                self.style = HeaderStyle::Structured;
                Ok(())
            }
        }
    }

    /// `EXPORT_NAME`: size, flags and zeros, or the end.
    fn export_name(&mut self, data: &[u8]) -> Result<Agreement, Failure> {
        if self.style == HeaderStyle::Extended {
            return Err(broken("NBD_OPT_EXPORT_NAME after extended headers were agreed on"));
        }
        let name = text(data).map_err(|refused| broken(refused.text))?;
        let export =
            self.shared.export(name).ok_or_else(|| broken(format!("there is no export '{name}'")))?;
        let mut answer = Writer::new();
        answer.be_u64(export.device.size()).be_u16(export.flags(self.style));
        if self.zeroes {
            answer.bytes(&[0; 124]);
        }
        self.channel.send(&[&answer.into_bytes()])?;
        Ok(self.agree(export))
    }

    /// `INFO` and `GO`: all but the final acknowledgement. The outer error is an answer, the inner one the connection's.
    fn info(&mut self, option: u32, data: &[u8]) -> Result<io::Result<Arc<Export>>, Refused> {
        let mut reader = Reader::new(data);
        let name = string(&mut reader)?;
        let count = reader.be_u16().ok_or_else(|| invalid("the option is too short"))?;
        let mut wanted = vec![];
        for _ in 0..count {
            wanted.push(reader.be_u16().ok_or_else(|| invalid("the option is too short"))?);
        }
        end(&reader)?;
        let export = self
            .shared
            .export(name)
            .ok_or_else(|| refused(reply::ERR_UNKNOWN, format!("there is no export '{name}'")))?;
        let sent = self.describe(option, &export, &wanted);
        Ok(sent.map(|()| export))
    }

    fn describe(&self, option: u32, export: &Export, wanted: &[u16]) -> io::Result<()> {
        let mut data = Writer::new();
        data.be_u16(info::EXPORT).be_u64(export.device.size()).be_u16(export.flags(self.style));
        self.reply(option, reply::INFO, &data.into_bytes())?;
        for (kind, value) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if wanted.contains(&kind) && (kind == info::NAME || !value.is_empty()) {
                let mut data = Writer::new();
                data.be_u16(kind).bytes(value.as_bytes());
                self.reply(option, reply::INFO, &data.into_bytes())?;
            }
        }
        let (minimum, preferred, maximum) = export.block_sizes(self.shared.max_payload());
        let mut data = Writer::new();
        data.be_u16(info::BLOCK_SIZE).be_u32(minimum).be_u32(preferred).be_u32(maximum);
        self.reply(option, reply::INFO, &data.into_bytes())
    }

    /// `LIST_META_CONTEXT` and `SET_META_CONTEXT`. A selection is gone once another is begun, even if that fails.
    fn contexts(&mut self, option: u32, data: &[u8]) -> Result<io::Result<()>, Refused> {
        let list = option == option::LIST_META_CONTEXT;
        if !list {
            self.chosen = None;
            if self.style == HeaderStyle::Simple {
                return Err(invalid("structured replies or extended headers have to be agreed on first"));
            }
        }
        let mut reader = Reader::new(data);
        let name = string(&mut reader)?;
        let count = reader.be_u32().ok_or_else(|| invalid("the option is too short"))?;
        let mut queries = vec![];
        for _ in 0..count {
            queries.push(string(&mut reader)?);
        }
        end(&reader)?;
        let export = self
            .shared
            .export(name)
            .ok_or_else(|| refused(reply::ERR_UNKNOWN, format!("there is no export '{name}'")))?;
        let contexts: Vec<_> = export
            .contexts()
            .filter(|(_, context)| {
                (list && queries.is_empty())
                    || queries.iter().any(|query| export.matches(query, *context, list))
            })
            .collect();
        let sent = self.name_contexts(option, &export, &contexts);
        if !list {
            self.chosen = Some(Chosen { export, contexts });
        }
        Ok(sent)
    }

    fn name_contexts(&self, option: u32, export: &Export, contexts: &[(u32, Context)]) -> io::Result<()> {
        for &(id, context) in contexts {
            let mut data = Writer::new();
            let id = if option == option::LIST_META_CONTEXT { 0 } else { id };
            data.be_u32(id).bytes(export.context_name(context).as_bytes());
            self.reply(option, reply::META_CONTEXT, &data.into_bytes())?;
        }
        self.reply(option, reply::ACK, &[])
    }

    /// The chosen contexts count only for the export that they were chosen for.
    fn agree(&mut self, export: Arc<Export>) -> Agreement {
        let chosen = self.chosen.take().filter(|chosen| Arc::ptr_eq(&chosen.export, &export));
        let contexts = chosen.map(|chosen| chosen.contexts).unwrap_or_default();
        Agreement { export, style: self.style, contexts }
    }
}

fn nothing(data: &[u8]) -> Result<(), Refused> {
    if data.is_empty() { Ok(()) } else { Err(invalid("the option has no data")) }
}

fn end(reader: &Reader<'_>) -> Result<(), Refused> {
    if reader.remaining() == 0 { Ok(()) } else { Err(invalid("the option is too long")) }
}

/// A string with its length before it.
fn string<'a>(reader: &mut Reader<'a>) -> Result<&'a str, Refused> {
    let len = reader.be_u32().ok_or_else(|| invalid("the option is too short"))?;
    let bytes = reader
        .take(block::num::to_usize(u64::from(len)))
        .ok_or_else(|| invalid("a string is longer than the option"))?;
    text(bytes)
}

fn text(bytes: &[u8]) -> Result<&str, Refused> {
    if bytes.len() > MAX_STRING {
        return Err(refused(reply::ERR_TOO_BIG, format!("a string of more than {MAX_STRING} bytes")));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| invalid("a string is not UTF-8"))?;
    if text.contains('\0') { Err(invalid("a string has a NUL in it")) } else { Ok(text) }
}

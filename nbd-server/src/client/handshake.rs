//! The handshake: from the server's greeting to the first request, and what the two sides have agreed on by then.
//!
//! The newest way is tried first, and every step back is one that an older server forces: extended headers, structured
//! replies, simple ones; `NBD_OPT_GO`, `NBD_OPT_EXPORT_NAME`; fixed newstyle, newstyle, oldstyle.

use std::io;
use std::time::{Duration, Instant};

use block::codec::{Reader, Writer};
use block::num::to_usize;
use block::{Error, ErrorKind};

use crate::channel::{Channel, Session};
use crate::proto::{
    DEFAULT_MAX_PAYLOAD, HeaderStyle, IHAVEOPT, MAX_STRING, NBDMAGIC, OLDSTYLE_MAGIC, OptionHeader,
    OptionReply, allocation, client_flags, handshake, info, option, reply, transmission,
};

use super::failure::{Failure, Outcome, printable};

/// The longest data of a reply to an option.
const MAX_REPLY: u32 = 64 << 10;
/// Replies to one option that say one thing.
const MAX_REPLIES: usize = 100;
/// The largest minimum block size that makes sense (section "Block size constraints").
const MAX_MINIMUM: u32 = 64 << 10;
/// Zeros after the answer to `NBD_OPT_EXPORT_NAME`, and in an oldstyle greeting.
const ZEROES: usize = 124;

/// Begins TLS sessions.
pub trait StartTls: std::fmt::Debug + Send + Sync {
    /// A session with the server that the user calls `hostname` (empty for a Unix socket).
    ///
    /// # Errors
    /// It cannot be begun.
    fn session(&self, hostname: &str) -> io::Result<Box<dyn Session>>;
}

/// What a server says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// In bytes.
    pub size: u64,
    /// [`transmission`] flags.
    pub flags: u16,
    /// Requests are multiples of so many bytes; a power of two.
    pub min_block: u32,
    /// Requests of so many bytes are best.
    pub preferred_block: u32,
    /// The longest payload in bytes.
    pub max_block: u32,
    /// Whether the server has said so.
    pub blocks_told: bool,
    /// Its canonical name, if the server has told it.
    pub name: Option<String>,
    /// A description for people.
    pub description: Option<String>,
}

impl ExportInfo {
    fn new(size: u64, flags: u16) -> Self {
        let flags = if flags & transmission::HAS_FLAGS == 0 { 0 } else { flags };
        Self {
            size,
            flags,
            min_block: 1,
            preferred_block: 4096,
            max_block: DEFAULT_MAX_PAYLOAD,
            blocks_told: false,
            name: None,
            description: None,
        }
    }

    /// Whether all these transmission flags are set.
    pub fn can(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// What makes an export unusable: as qemu's client sees it.
    fn check(&self) -> Outcome<()> {
        let (min, preferred, max) = (self.min_block, self.preferred_block, self.max_block);
        let wrong = if i64::try_from(self.size).is_err() {
            Some(format!("export length {} is too large", self.size))
        } else if !min.is_power_of_two() || min > MAX_MINIMUM {
            Some(format!("server's minimum block size {min} is not a power of two up to {MAX_MINIMUM}"))
        } else if !preferred.is_power_of_two() || preferred < min {
            Some(format!("server's preferred block size {preferred} is not a power of two of at least {min}"))
        } else if max < min {
            Some(format!("server's maximum block size {max} is less than the minimum of {min}"))
        } else if !self.size.is_multiple_of(min.into()) {
            Some(format!("export size {} is not a multiple of minimum block size {min}", self.size))
        } else {
            None
        };
        wrong.map_or(Ok(()), |wrong| Err(Failure::nonsense(wrong)))
    }
}

/// A connection whose handshake is over.
#[derive(Debug)]
pub(super) struct Negotiated {
    pub(super) channel: Channel,
    pub(super) style: HeaderStyle,
    pub(super) export: ExportInfo,
    /// The id of `base:allocation`, if the server has it.
    pub(super) allocation: Option<u32>,
}

/// How a handshake is to go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) export: &'a str,
    pub(super) tls: Option<&'a dyn StartTls>,
    pub(super) host: &'a str,
    /// What it may take in all.
    pub(super) patience: Duration,
}

/// Carries out the handshake up to the transmission phase.
///
/// # Errors
/// The connection, the server's refusal in qemu's words, or its nonsense.
pub(super) fn negotiate(channel: Channel, wanted: &Wanted<'_>) -> Outcome<Negotiated> {
    negotiate_style(channel, wanted, true)
}

/// The same, but with the oldest style of replies, which every client understands.
///
/// # Errors
/// As [`negotiate`].
pub(super) fn negotiate_simple(channel: Channel, wanted: &Wanted<'_>) -> Outcome<Negotiated> {
    negotiate_style(channel, wanted, false)
}

fn negotiate_style(channel: Channel, wanted: &Wanted<'_>, newest: bool) -> Outcome<Negotiated> {
    let mut talk = Talk::new(channel, wanted.patience);
    match talk.greeting()? {
        Greeting::Old(export) => talk.oldstyle(export, wanted),
        Greeting::New { flags } => {
            talk.begin(flags, wanted)?;
            if !talk.fixed {
                return talk.by_name(wanted.export);
            }
            if newest {
                talk.choose_style()?;
            }
            talk.go(wanted.export)
        }
    }
}

/// The first thing that a server says.
#[derive(Debug)]
enum Greeting {
    Old(ExportInfo),
    New { flags: u16 },
}

/// A reply to an option.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

impl Said {
    fn is_error(&self) -> bool {
        self.kind & reply::ERROR != 0
    }
}

/// A handshake under way.
#[derive(Debug)]
pub(super) struct Talk {
    channel: Channel,
    deadline: Instant,
    fixed: bool,
    no_zeroes: bool,
    pub(super) style: HeaderStyle,
}

impl Talk {
    pub(super) fn new(channel: Channel, patience: Duration) -> Self {
        let deadline = Instant::now() + patience;
        Self { channel, deadline, fixed: false, no_zeroes: false, style: HeaderStyle::Simple }
    }

    /// A session in which questions can be asked: greeting, flags, TLS, and the newest style.
    ///
    /// # Errors
    /// As [`negotiate`]; a server that is too old to be asked.
    pub(super) fn for_questions(channel: Channel, wanted: &Wanted<'_>) -> Outcome<Self> {
        let mut talk = Self::new(channel, wanted.patience);
        match talk.greeting()? {
            Greeting::Old(_) => return Err(refused("Server too old to list its exports")),
            Greeting::New { flags } => talk.begin(flags, wanted)?,
        }
        if !talk.fixed {
            return Err(refused("Server too old to list its exports"));
        }
        talk.choose_style()?;
        Ok(talk)
    }

    fn receive(&self, buf: &mut [u8]) -> Outcome<()> {
        self.channel.receive_exact(buf)?;
        if Instant::now() > self.deadline {
            return Err(Failure::lost("the server does not finish the handshake in time"));
        }
        Ok(())
    }

    fn number<const LEN: usize>(&self) -> Outcome<[u8; LEN]> {
        let mut bytes = [0; LEN];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }

    fn greeting(&self) -> Outcome<Greeting> {
        let magic = u64::from_be_bytes(self.number()?);
        if magic != NBDMAGIC {
            return Err(Failure::nonsense(format!("Bad initial magic received: {magic:#018x}")));
        }
        match u64::from_be_bytes(self.number()?) {
            IHAVEOPT => Ok(Greeting::New { flags: u16::from_be_bytes(self.number()?) }),
            OLDSTYLE_MAGIC => {
                let size = u64::from_be_bytes(self.number()?);
                // The upper half are handshake flags, of which there are none here.
                let [_, _, high, low] = self.number()?;
                self.receive(&mut [0; ZEROES])?;
                Ok(Greeting::Old(ExportInfo::new(size, u16::from_be_bytes([high, low]))))
            }
            other => Err(Failure::nonsense(format!("Bad server magic received: {other:#018x}"))),
        }
    }

    fn oldstyle(self, export: ExportInfo, wanted: &Wanted<'_>) -> Outcome<Negotiated> {
        if wanted.tls.is_some() {
            return Err(refused("Server does not support STARTTLS"));
        }
        if !wanted.export.is_empty() {
            return Err(refused("Server does not support non-empty export names"));
        }
        self.agreed(export, None)
    }

    /// Answers the greeting, and begins TLS where it is wanted.
    fn begin(&mut self, flags: u16, wanted: &Wanted<'_>) -> Outcome<()> {
        self.fixed = flags & handshake::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & handshake::NO_ZEROES != 0;
        let mut own = 0;
        own |= if self.fixed { client_flags::FIXED_NEWSTYLE } else { 0 };
        own |= if self.no_zeroes { client_flags::NO_ZEROES } else { 0 };
        self.channel.send(&[&own.to_be_bytes()])?;
        let Some(tls) = wanted.tls else { return Ok(()) };
        if !self.fixed {
            return Err(refused("Server does not support STARTTLS"));
        }
        let said = self.ask(option::STARTTLS, &[])?;
        if said.is_error() {
            return Err(self.refusal(option::STARTTLS, &said));
        }
        let session = tls.session(wanted.host)?;
        self.channel.start_tls(session)?;
        Ok(())
    }

    /// Extended headers, or else structured replies, or else simple ones.
    fn choose_style(&mut self) -> Outcome<()> {
        for (option, style) in [
            (option::EXTENDED_HEADERS, HeaderStyle::Extended),
            (option::STRUCTURED_REPLY, HeaderStyle::Structured),
        ] {
            let said = self.ask(option, &[])?;
            if said.kind == reply::ACK {
                self.style = style;
                return Ok(());
            }
            if !said.is_error() {
                return Err(self.unexpected(option, &said));
            }
        }
        Ok(())
    }

    /// Sends an option.
    pub(super) fn tell(&self, option: u32, data: &[u8]) -> Outcome<()> {
        let length = u32::try_from(data.len()).map_err(|_| refused("an option that is too long"))?;
        Ok(self.channel.send(&[&OptionHeader { option, length }.encode(), data])?)
    }

    /// One reply to an option.
    pub(super) fn hear(&self, option: u32) -> Outcome<Said> {
        let header: [u8; OptionReply::LEN] = self.number()?;
        let header =
            OptionReply::parse(&header).ok_or_else(|| Failure::nonsense("Unexpected option reply magic"))?;
        if header.option != option {
            let asked = option::name(option);
            let told = option::name(header.option);
            return Err(Failure::nonsense(format!("an answer to {told} where one to {asked} is due")));
        }
        if header.length > MAX_REPLY {
            return Err(Failure::nonsense(format!(
                "an answer of {} bytes to {}",
                header.length,
                option::name(option)
            )));
        }
        let mut data = vec![0; to_usize(header.length.into())];
        self.receive(&mut data)?;
        Ok(Said { kind: header.kind, data })
    }

    /// Sends an option that has one reply.
    pub(super) fn ask(&self, option: u32, data: &[u8]) -> Outcome<Said> {
        self.tell(option, data)?;
        self.hear(option)
    }

    /// Sends an option, and gives every reply but the last to `take`, at most `most`. The last: an ACK, or an error.
    pub(super) fn ask_many(
        &self,
        option: u32,
        data: &[u8],
        most: usize,
        mut take: impl FnMut(&Said) -> Outcome<()>,
    ) -> Outcome<Said> {
        self.tell(option, data)?;
        for _ in 0..=most {
            let said = self.hear(option)?;
            if said.kind == reply::ACK || said.is_error() {
                return Ok(said);
            }
            take(&said)?;
        }
        Err(Failure::nonsense(format!("more than {most} answers to {}", option::name(option))))
    }

    /// Chooses `base:allocation` for an export; its id.
    fn set_context(&self, export: &str) -> Outcome<Option<u32>> {
        if self.style == HeaderStyle::Simple {
            return Ok(None);
        }
        let mut id = None;
        let data = context_query(export, &[allocation::CONTEXT]);
        let last = self.ask_many(option::SET_META_CONTEXT, &data, MAX_REPLIES, |said| {
            let (number, name) =
                context(said).ok_or_else(|| self.unexpected(option::SET_META_CONTEXT, said))?;
            if name != allocation::CONTEXT || id.is_some() {
                let name = printable(name.as_bytes());
                return Err(Failure::nonsense(format!("the context '{name}', which nobody has asked for")));
            }
            id = Some(number);
            Ok(())
        })?;
        Ok(id.filter(|_| !last.is_error()))
    }

    /// `NBD_OPT_GO`, or what there was before it.
    fn go(self, export: &str) -> Outcome<Negotiated> {
        let allocation = self.set_context(export)?;
        let (found, last) = self.describe(option::GO, export)?;
        match (last.kind, found) {
            (reply::ACK, Some(found)) => self.agreed(found, allocation),
            (reply::ACK, None) => {
                Err(Failure::nonsense("NBD_OPT_GO is acknowledged without NBD_INFO_EXPORT"))
            }
            (reply::ERR_UNSUP, _) if self.style != HeaderStyle::Extended => {
                let negotiated = self.by_name(export)?;
                Ok(Negotiated { allocation, ..negotiated })
            }
            _ => Err(self.refusal(option::GO, &last)),
        }
    }

    /// `NBD_OPT_INFO` or `NBD_OPT_GO`: what the server says of an export, and its last reply.
    pub(super) fn describe(&self, option: u32, export: &str) -> Outcome<(Option<ExportInfo>, Said)> {
        let wanted = [info::BLOCK_SIZE, info::NAME, info::DESCRIPTION];
        let mut data = string(export);
        data.be_u16(u16::try_from(wanted.len()).unwrap_or(0));
        for kind in wanted {
            data.be_u16(kind);
        }
        let mut found = Found::default();
        let last = self.ask_many(option, &data.into_bytes(), MAX_REPLIES, |said| {
            let understood = (said.kind == reply::INFO).then(|| found.add(&said.data)).flatten();
            understood.ok_or_else(|| self.unexpected(option, said))
        })?;
        let export = found.export();
        if let (Some(export), false) = (&export, last.is_error()) {
            export.check()?;
        }
        Ok((export, last))
    }

    /// `NBD_OPT_EXPORT_NAME`, whose refusal is the end of the connection.
    fn by_name(self, export: &str) -> Outcome<Negotiated> {
        self.tell(option::EXPORT_NAME, export.as_bytes())?;
        let size = match self.number() {
            Ok(bytes) => u64::from_be_bytes(bytes),
            Err(Failure::Lost(..)) => return Err(refused("Requested export not available")),
            Err(other) => return Err(other),
        };
        let flags = u16::from_be_bytes(self.number()?);
        if !self.no_zeroes {
            self.receive(&mut [0; ZEROES])?;
        }
        self.agreed(ExportInfo::new(size, flags), None)
    }

    fn agreed(self, export: ExportInfo, allocation: Option<u32>) -> Outcome<Negotiated> {
        export.check()?;
        Ok(Negotiated { channel: self.channel, style: self.style, export, allocation })
    }

    /// Ends the session politely.
    pub(super) fn abort(self) {
        // The answer makes no difference.
        let _ = self.ask(option::ABORT, &[]);
        self.channel.close();
    }

    pub(super) fn unexpected(&self, option: u32, said: &Said) -> Failure {
        let (kind, len) = (reply::name(said.kind), said.data.len());
        Failure::nonsense(format!("{kind} with {len} bytes as an answer to {}", option::name(option)))
    }

    /// A server's error, in qemu's words.
    pub(super) fn refusal(&self, option: u32, said: &Said) -> Failure {
        let name = option::name(option);
        let words = match said.kind {
            reply::ERR_UNKNOWN => "Requested export not available".to_owned(),
            reply::ERR_UNSUP => format!("Unsupported option type {option} ({name})"),
            reply::ERR_POLICY => format!("Denied by server for option {option} ({name})"),
            reply::ERR_INVALID => format!("Invalid parameters for option {option} ({name})"),
            reply::ERR_PLATFORM => format!("Server lacks support for option {option} ({name})"),
            reply::ERR_TLS_REQD => format!(
                "TLS negotiation required before option {option} ({name})\n\
                 Did you forget a valid tls-creds?"
            ),
            reply::ERR_SHUTDOWN => format!("Server shutting down before option {option} ({name})"),
            reply::ERR_BLOCK_SIZE_REQD => {
                format!("Server requires INFO_BLOCK_SIZE for option {option} ({name})")
            }
            kind => format!("{} for option {option} ({name})", reply::name(kind)),
        };
        let text = printable(said.data.get(..said.data.len().min(MAX_STRING)).unwrap_or_default());
        refused(if text.is_empty() { words } else { format!("{words}\nserver reported: {text}") })
    }
}

/// A refusal that a second attempt will not change.
fn refused(message: impl Into<String>) -> Failure {
    Failure::Lost(ErrorKind::Unsupported, message.into())
}

/// Whether trying again could help.
pub(super) fn is_final(failure: &Failure) -> bool {
    match failure {
        Failure::Lost(kind, _) => {
            matches!(kind, ErrorKind::Unsupported | ErrorKind::Permission | ErrorKind::Usage)
        }
        Failure::Nonsense(_) => true,
        Failure::Refused { .. } => false,
    }
}

/// A length and a string.
fn string(text: &str) -> Writer {
    let mut writer = Writer::new();
    writer.be_u32(u32::try_from(text.len()).unwrap_or(u32::MAX)).bytes(text.as_bytes());
    writer
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
pub(super) fn context_query(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(export);
    data.be_u32(u32::try_from(queries.len()).unwrap_or(0));
    for query in queries {
        data.be_u32(u32::try_from(query.len()).unwrap_or(0)).bytes(query.as_bytes());
    }
    data.into_bytes()
}

/// A context as the server names it.
pub(super) fn context(said: &Said) -> Option<(u32, String)> {
    let mut reader = Reader::new(&said.data);
    let id = reader.be_u32().filter(|_| said.kind == reply::META_CONTEXT)?;
    let name = reader.take(reader.remaining()).filter(|name| name.len() <= MAX_STRING)?;
    Some((id, String::from_utf8_lossy(name).into_owned()))
}

/// Pieces of information about an export.
#[derive(Debug, Default)]
struct Found {
    export: Option<(u64, u16)>,
    blocks: Option<(u32, u32, u32)>,
    name: Option<String>,
    description: Option<String>,
}

impl Found {
    /// Adds one; `None` if it is malformed. What is unknown is skipped.
    fn add(&mut self, data: &[u8]) -> Option<()> {
        let mut reader = Reader::new(data);
        let kind = reader.be_u16()?;
        match kind {
            info::EXPORT => self.export = Some((reader.be_u64()?, reader.be_u16()?)),
            info::BLOCK_SIZE => self.blocks = Some((reader.be_u32()?, reader.be_u32()?, reader.be_u32()?)),
            info::NAME => self.name = Some(printable(reader.take(reader.remaining())?)),
            info::DESCRIPTION => self.description = Some(printable(reader.take(reader.remaining())?)),
            _ => return Some(()),
        }
        (reader.remaining() == 0).then_some(())
    }

    fn export(self) -> Option<ExportInfo> {
        let (size, flags) = self.export?;
        let mut export = ExportInfo::new(size, flags);
        if let Some((min, preferred, max)) = self.blocks {
            (export.min_block, export.preferred_block, export.max_block) = (min, preferred, max);
            export.blocks_told = true;
        }
        (export.name, export.description) = (self.name, self.description);
        Some(export)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.into_error()
    }
}

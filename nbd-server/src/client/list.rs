//! What a server has to offer.

use std::sync::Arc;
use std::time::Duration;

use block::codec::Reader;
use block::{Error, Result};

use crate::proto::{HeaderStyle, MAX_STRING, option, reply, transmission};
use crate::uri::ExportName;

use super::dial::dial;
use super::failure::{Outcome, printable};
use super::handshake::{ExportInfo, Said, StartTls, Talk, Wanted, context, context_query};

/// How long the server may take for all of it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Exports that are listed at most.
const MAX_EXPORTS: usize = 10_000;
/// Contexts of one export.
const MAX_CONTEXTS: usize = 1000;

/// One export of a server.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// What the server says of it in its list.
    pub description: Option<String>,
    /// What it says when asked for it; `None` if it says nothing.
    pub info: Option<ExportInfo>,
    /// Its metadata contexts.
    pub contexts: Vec<String>,
    /// How large a transaction can be.
    pub style: HeaderStyle,
}

/// Everything that a server offers.
///
/// # Errors
/// It cannot be reached, does not tell (`NBD_REP_ERR_POLICY`), or is too old.
pub fn list(name: &ExportName, tls: Option<&Arc<dyn StartTls>>) -> Result<Vec<Listed>> {
    let dialled = dial(name, PATIENCE).map_err(Error::from)?;
    let wanted = Wanted { export: "", tls: tls.map(|tls| &**tls), host: name.host(), patience: PATIENCE };
    let talk = Talk::for_questions(dialled.channel, &wanted).map_err(Error::from)?;
    let mut exports = names(&talk).map_err(Error::from)?;
    for export in &mut exports {
        describe(&talk, export).map_err(Error::from)?;
    }
    talk.abort();
    Ok(exports)
}

fn names(talk: &Talk) -> Outcome<Vec<Listed>> {
    let mut exports = vec![];
    let last = talk.ask_many(option::LIST, &[], MAX_EXPORTS, |said| {
        let (name, description) = server(said).ok_or_else(|| talk.unexpected(option::LIST, said))?;
        exports.push(Listed { name, description, info: None, contexts: vec![], style: talk.style });
        Ok(())
    })?;
    if last.kind == reply::ACK { Ok(exports) } else { Err(talk.refusal(option::LIST, &last)) }
}

/// `NBD_REP_SERVER`.
fn server(said: &Said) -> Option<(String, Option<String>)> {
    let mut reader = Reader::new(&said.data);
    let len = reader.be_u32().filter(|_| said.kind == reply::SERVER)?;
    let name = reader.take(usize::try_from(len).ok()?).filter(|name| name.len() <= MAX_STRING)?;
    let name = String::from_utf8_lossy(name).into_owned();
    let rest = reader.take(reader.remaining())?;
    Some((name, (!rest.is_empty()).then(|| printable(rest))))
}

fn describe(talk: &Talk, export: &mut Listed) -> Outcome<()> {
    let (info, last) = talk.describe(option::INFO, &export.name)?;
    if last.kind != reply::ACK {
        // An old server, or the export has gone meanwhile.
        return Ok(());
    }
    if let Some(description) = info.as_ref().and_then(|info| info.description.clone()) {
        export.description = Some(description);
    }
    export.info = info;
    if talk.style == HeaderStyle::Simple {
        return Ok(());
    }
    let data = context_query(&export.name, &[]);
    talk.ask_many(option::LIST_META_CONTEXT, &data, MAX_CONTEXTS, |said| {
        let found = context(said).ok_or_else(|| talk.unexpected(option::LIST_META_CONTEXT, said))?;
        export.contexts.push(printable(found.1.as_bytes()));
        Ok(())
    })?;
    Ok(())
}

/// The list as `qemu-nbd -L` prints it.
pub fn render(exports: &[Listed]) -> String {
    use std::fmt::Write as _;
    let mut text = format!("exports available: {}\n", exports.len());
    for export in exports {
        // Writing to a string cannot fail.
        let _ = writeln!(text, " export: '{}'", printable(export.name.as_bytes()));
        if let Some(description) = &export.description {
            let _ = writeln!(text, "  description: {description}");
        }
        if let Some(info) = &export.info {
            text += &render_info(info);
        }
        let transaction = match export.style {
            HeaderStyle::Extended => "64-bit",
            _ => "32-bit",
        };
        let _ = writeln!(text, "  transaction size: {transaction}");
        if !export.contexts.is_empty() {
            let _ = writeln!(text, "  available meta contexts: {}", export.contexts.len());
            for context in &export.contexts {
                let _ = writeln!(text, "   {context}");
            }
        }
    }
    text
}

/// The transmission flags in qemu-nbd's words.
pub const FLAG_NAMES: [(u16, &str); 12] = [
    (transmission::READ_ONLY, "readonly"),
    (transmission::SEND_FLUSH, "flush"),
    (transmission::SEND_FUA, "fua"),
    (transmission::ROTATIONAL, "rotational"),
    (transmission::SEND_TRIM, "trim"),
    (transmission::SEND_WRITE_ZEROES, "zeroes"),
    (transmission::SEND_DF, "df"),
    (transmission::CAN_MULTI_CONN, "multi"),
    (transmission::SEND_RESIZE, "resize"),
    (transmission::SEND_CACHE, "cache"),
    (transmission::SEND_FAST_ZERO, "fast-zero"),
    (transmission::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
];

fn render_info(info: &ExportInfo) -> String {
    let names: Vec<_> =
        FLAG_NAMES.iter().filter(|(flag, _)| info.flags & flag != 0).map(|(_, name)| *name).collect();
    let flags = if names.is_empty() { String::new() } else { format!(" ( {} )", names.join(" ")) };
    let mut text = format!("  size:  {}\n  flags: {:#x}{flags}\n", info.size, info.flags);
    if info.blocks_told {
        text += &format!(
            "  min block: {}\n  opt block: {}\n  max block: {}\n",
            info.min_block, info.preferred_block, info.max_block
        );
    }
    text
}

//! Names and options of network block devices, as far as they can be judged without a network.
//!
//! ```text
//! nbd:HOST:PORT[:exportname=NAME]        nbd:unix:PATH[:exportname=NAME]
//! nbd://HOST[:PORT][/NAME]               nbd+tcp://...
//! nbd+unix:///[NAME]?socket=PATH         driver=nbd,host=,port=,path=,server.*,export=
//! ```

use serde_json::{Map, Value};

use block::{Error, Result};

use super::protocol::ProtocolRequest;

/// Checks what a request names.
///
/// # Errors
/// In qemu's words, without `Could not open`.
pub(super) fn validate(request: &ProtocolRequest) -> Result<()> {
    match &request.name {
        Some(name) => match name.strip_prefix("nbd:").filter(|rest| !rest.starts_with("//")) {
            Some(address) => legacy(address),
            None => url(name),
        },
        None => options(&request.options),
    }
}

/// `HOST:PORT`, `[V6]:PORT` or `unix:PATH`, and an export's name.
fn legacy(address: &str) -> Result<()> {
    let address = address.split_once(":exportname=").map_or(address, |(address, _)| address);
    if address.is_empty() {
        return Err(Error::usage("NBD server address missing"));
    }
    if address.starts_with("unix:") {
        return Ok(());
    }
    match address.rsplit_once(':') {
        Some(_) => Ok(()),
        None => Err(Error::usage(format!("error parsing address '{address}'"))),
    }
}

fn url(name: &str) -> Result<()> {
    let invalid = || Error::usage("No valid URL specified");
    let (scheme, rest) = name.split_once("://").ok_or_else(invalid)?;
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let host = rest.split('/').next().unwrap_or_default();
    if scheme.ends_with("unix") {
        let socket = query.and_then(|query| query.strip_prefix("socket="));
        let good = host.is_empty() && socket.is_some_and(|path| !path.is_empty() && !path.contains('&'));
        return if good { Ok(()) } else { Err(invalid()) };
    }
    let port = match host.rsplit_once(':') {
        Some((_, port)) if !host.ends_with(']') => port.is_empty() || port.parse::<u16>().is_ok(),
        _ => true,
    };
    if host.is_empty() || host.starts_with(':') || query.is_some() || !port { Err(invalid()) } else { Ok(()) }
}

fn options(options: &Map<String, Value>) -> Result<()> {
    let has = |key: &str| options.contains_key(key);
    if has("path") && has("host") {
        return Err(Error::usage("path and host may not be used at the same time"));
    }
    if has("path") || has("host") {
        return Ok(());
    }
    let Some(Value::Object(server)) = options.get("server") else {
        return Err(Error::usage("NBD server address missing"));
    };
    let missing = |key: &str| Error::usage(format!("Parameter '{key}' is missing"));
    let needed: &[&str] = match server.get("type").and_then(Value::as_str) {
        Some("inet") => &["host", "port"],
        Some("unix") => &["path"],
        Some("vsock") => &["cid", "port"],
        Some("fd") => &["str"],
        Some(other) => {
            return Err(Error::usage(format!("Parameter 'type' does not accept value '{other}'")));
        }
        None => &["type"],
    };
    match needed.iter().find(|key| !server.contains_key(**key)) {
        Some(key) => Err(missing(&format!("server.{key}"))),
        None => Ok(()),
    }
}

//! Names of exports: which server, which export, and how to get there.
//!
//! ```text
//! nbd://HOST[:PORT][/EXPORT]            nbds://...                 TCP; the s asks for TLS
//! nbd+unix:///[EXPORT]?socket=PATH      nbds+unix://...            a Unix socket
//! nbd+vsock://CID[:PORT][/EXPORT]       nbds+vsock://...           a virtual machine's host
//! nbd:HOST:PORT[:exportname=EXPORT]     nbd:unix:PATH[:...]        qemu's older form
//! server.type=inet,server.host=,server.port=,export=,...           qemu's options
//! ```
//!
//! Parameters after `?`, from the URI document (`doc/uri.md`) and from libnbd: `socket`, `tls-type` (`x509` or `psk`),
//! `tls-hostname`, `tls-certificates` (a folder), `tls-psk-file`, `tls-username`, `tls-verify-peer`; and ours: `reconnect-delay` and
//! `open-timeout` (seconds, as qemu's options of these names), `connections`. Text is percent-encoded.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use block::{Error, Result};

use crate::proto::{DEFAULT_PORT, MAX_STRING};

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// TCP.
    Tcp {
        /// A name, or an address of either version without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket; one whose path begins with a NUL has no file ("abstract").
    Unix(PathBuf),
    /// A socket between a virtual machine and its host.
    Vsock {
        /// The context id.
        cid: u32,
        /// The port.
        port: u32,
    },
}

/// Which kind of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsKind {
    /// Certificates.
    X509,
    /// A key that both sides know.
    Psk,
}

/// How TLS is to be spoken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsParameters {
    /// The kind; `None`: by a key if there is a file of keys, else by certificates.
    pub kind: Option<TlsKind>,
    /// The name that the server's certificate must have; `None`: the host that is connected to.
    pub hostname: Option<String>,
    /// The folder of certificates.
    pub certificates: Option<PathBuf>,
    /// The file of keys.
    pub psk_file: Option<PathBuf>,
    /// Whose key it is.
    pub username: Option<String>,
    /// Whether the server's certificate is checked.
    pub verify_peer: bool,
}

impl Default for TlsParameters {
    fn default() -> Self {
        Self {
            kind: None,
            hostname: None,
            certificates: None,
            psk_file: None,
            username: None,
            verify_peer: true,
        }
    }
}

impl TlsParameters {
    /// Whether a key is used rather than certificates.
    pub fn is_psk(&self) -> bool {
        match self.kind {
            Some(kind) => kind == TlsKind::Psk,
            None => self.psk_file.is_some(),
        }
    }
}

/// An export, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportName {
    /// The server.
    pub address: Address,
    /// The export's name; empty: the server's default.
    pub export: String,
    /// TLS, if it is wanted.
    pub tls: Option<TlsParameters>,
    /// The id of the object that says how TLS is spoken (qemu's `tls-creds`).
    pub tls_creds: Option<String>,
    /// For how long requests wait for a server that is gone to come back; zero: they fail at once.
    pub reconnect_delay: Duration,
    /// For how long connecting is tried again when the disk is opened; zero: once.
    pub open_timeout: Duration,
    /// At most so many connections; `None`: as many as seem useful.
    pub connections: Option<usize>,
}

impl ExportName {
    /// The export of this name at `address`, without TLS.
    pub fn new(address: Address, export: impl Into<String>) -> Self {
        Self {
            address,
            export: export.into(),
            tls: None,
            tls_creds: None,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
            connections: None,
        }
    }

    /// Understands a URI or an older name.
    ///
    /// # Errors
    /// `Usage`, in qemu's words where it has some.
    pub fn parse(name: &str) -> Result<Self> {
        match name.strip_prefix("nbd:").filter(|rest| !rest.starts_with("//")) {
            Some(rest) => legacy(rest),
            None => uri(name),
        }
    }

    /// Understands qemu's options, given as dotted keys and texts.
    ///
    /// # Errors
    /// `Usage`, in qemu's words.
    pub fn from_options<'a>(options: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        Options(options.into_iter().collect()).understand()
    }

    /// The name that a certificate of the server has to have, where nothing else is said; empty for a Unix socket.
    pub fn host(&self) -> &str {
        match &self.address {
            Address::Tcp { host, .. } => host,
            _ => "",
        }
    }

    /// Where the server is, as qemu's messages call it.
    pub fn place(&self) -> String {
        match &self.address {
            Address::Tcp { host, port } => format!("{host}:{port}"),
            Address::Unix(path) => path.display().to_string().replace('\0', "@"),
            Address::Vsock { cid, port } => format!("vsock:{cid}:{port}"),
        }
    }
}

/// As a URI.
impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.tls.is_some() || self.tls_creds.is_some() { "s" } else { "" };
        match &self.address {
            Address::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                write!(f, "nbd{s}://{host}:{port}")?;
            }
            Address::Unix(_) => write!(f, "nbd{s}+unix://")?,
            Address::Vsock { cid, port } => write!(f, "nbd{s}+vsock://{cid}:{port}")?,
        }
        if !self.export.is_empty() {
            write!(f, "/{}", encode(&self.export))?;
        }
        match &self.address {
            Address::Unix(path) => write!(f, "?socket={}", encode(&path.to_string_lossy())),
            _ => Ok(()),
        }
    }
}

/// qemu's words for everything that is wrong with a URI.
fn invalid() -> Error {
    Error::usage("No valid URL specified")
}

fn uri(name: &str) -> Result<ExportName> {
    let (scheme, rest) = name.split_once("://").ok_or_else(invalid)?;
    let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user, authority) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (transport, tls) = split_scheme(scheme).ok_or_else(|| {
        invalid()
            .hint("names of exports begin with nbd://, nbds://, nbd+unix://, nbds+unix:// or nbd+vsock://")
    })?;
    let query = Query::parse(query)?;
    let address = match transport {
        Transport::Tcp => tcp_address(authority)?,
        Transport::Unix => unix_address(authority, &query)?,
        Transport::Vsock => vsock_address(authority)?,
    };
    if !matches!(address, Address::Unix(_)) && query.get("socket").is_some() {
        return Err(invalid().hint("?socket= goes with nbd+unix://"));
    }
    let mut target = ExportName::new(address, export_name(decode(path)?)?);
    target.tls = tls.then(|| query.tls()).transpose()?;
    if let Some(tls) = target.tls.as_mut().filter(|tls| tls.username.is_none() && !user.is_empty()) {
        tls.username = Some(decode(user)?);
    }
    if let (false, Some(parameter)) = (tls, query.tls_parameter()) {
        return Err(invalid().hint(format!("'{parameter}' is for TLS: the name begins with nbds then")));
    }
    (target.reconnect_delay, target.open_timeout) =
        (query.seconds("reconnect-delay")?, query.seconds("open-timeout")?);
    target.connections = query.number("connections")?;
    Ok(target)
}

/// What carries the bytes.
#[derive(Debug, Clone, Copy)]
enum Transport {
    Tcp,
    Unix,
    Vsock,
}

fn split_scheme(scheme: &str) -> Option<(Transport, bool)> {
    let (base, transport) = scheme.split_once('+').unwrap_or((scheme, "tcp"));
    let tls = match base {
        "nbd" => false,
        "nbds" => true,
        _ => return None,
    };
    let transport = match transport {
        "tcp" => Transport::Tcp,
        "unix" => Transport::Unix,
        "vsock" => Transport::Vsock,
        _ => return None,
    };
    Some((transport, tls))
}

/// `HOST`, `HOST:PORT`, `[V6]:PORT`.
fn tcp_address(place: &str) -> Result<Address> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(invalid)?;
            match port {
                "" => (host, ""),
                port => (host, port.strip_prefix(':').ok_or_else(invalid)?),
            }
        }
        None => place.rsplit_once(':').unwrap_or((place, "")),
    };
    let host = decode(host)?;
    if host.is_empty() || host.contains('\0') {
        return Err(invalid());
    }
    let port = if port.is_empty() { DEFAULT_PORT } else { port.parse().map_err(|_| invalid())? };
    Ok(Address::Tcp { host, port })
}

fn unix_address(authority: &str, query: &Query) -> Result<Address> {
    match query.get("socket").filter(|path| authority.is_empty() && !path.is_empty()) {
        Some(path) => Ok(Address::Unix(PathBuf::from(path))),
        None => Err(invalid().hint("a Unix socket is named as nbd+unix:///EXPORT?socket=PATH")),
    }
}

fn vsock_address(authority: &str) -> Result<Address> {
    let (cid, port) = authority.split_once(':').unwrap_or((authority, ""));
    let port = if port.is_empty() { u32::from(DEFAULT_PORT) } else { port.parse().map_err(|_| invalid())? };
    Ok(Address::Vsock { cid: cid.parse().map_err(|_| invalid())?, port })
}

/// What a name says after its `?`, decoded.
struct Query(Vec<(String, String)>);

/// Every parameter there is, those of TLS first.
const PARAMETERS: &[&str] = &[
    "tls-type",
    "tls-hostname",
    "tls-certificates",
    "tls-psk-file",
    "tls-username",
    "tls-verify-peer",
    "socket",
    "reconnect-delay",
    "open-timeout",
    "connections",
];
/// How many of them are of TLS.
const TLS_PARAMETERS: usize = 6;

impl Query {
    fn parse(query: &str) -> Result<Self> {
        let mut pairs: Vec<(String, String)> = vec![];
        for part in query.split(['&', ';']).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let (key, value) = (decode(key)?, decode(value)?);
            if !PARAMETERS.contains(&key.as_str()) {
                return Err(invalid().hint(format!("the parameter '{key}' of the name is not known")));
            }
            if pairs.iter().any(|(known, _)| *known == key) {
                return Err(invalid().hint(format!("the parameter '{key}' is given twice")));
            }
            pairs.push((key, value));
        }
        Ok(Self(pairs))
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key).map(str::to_owned)
    }

    fn tls_parameter(&self) -> Option<&'static str> {
        PARAMETERS.iter().take(TLS_PARAMETERS).copied().find(|key| self.get(key).is_some())
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        let wrong = |value: &str| invalid().hint(format!("'{key}={value}' is not a number"));
        self.get(key).map(|value| value.parse().map_err(|_| wrong(value))).transpose()
    }

    fn seconds(&self, key: &str) -> Result<Duration> {
        Ok(self.number::<u32>(key)?.map_or(Duration::ZERO, |seconds| Duration::from_secs(seconds.into())))
    }

    fn tls(&self) -> Result<TlsParameters> {
        let kind = match self.get("tls-type") {
            None => None,
            Some("x509") => Some(TlsKind::X509),
            Some("psk") => Some(TlsKind::Psk),
            Some(other) => return Err(invalid().hint(format!("'tls-type' is x509 or psk, not '{other}'"))),
        };
        let verify_peer = match self.get("tls-verify-peer") {
            None | Some("true" | "1" | "on" | "yes" | "y" | "t") => true,
            Some("false" | "0" | "off" | "no" | "n" | "f") => false,
            Some(other) => {
                return Err(invalid().hint(format!("'tls-verify-peer' is true or false, not '{other}'")));
            }
        };
        Ok(TlsParameters {
            kind,
            hostname: self.text("tls-hostname"),
            certificates: self.get("tls-certificates").map(PathBuf::from),
            psk_file: self.get("tls-psk-file").map(PathBuf::from),
            username: self.text("tls-username"),
            verify_peer,
        })
    }
}

/// `HOST:PORT` or `unix:PATH`, and an export's name. Nothing is encoded here.
fn legacy(rest: &str) -> Result<ExportName> {
    let (address, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    if address.is_empty() {
        return Err(Error::usage("NBD server address missing"));
    }
    let wrong = || Error::usage(format!("error parsing address '{address}'"));
    let address = match address.strip_prefix("unix:") {
        Some(path) => Address::Unix(PathBuf::from(path)),
        None => {
            let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            let port = port.split_once(',').map_or(port, |(port, _)| port);
            Address::Tcp { host: host.to_owned(), port: port.parse().map_err(|_| wrong())? }
        }
    };
    Ok(ExportName::new(address, export_name(export.to_owned())?))
}

/// qemu's options.
struct Options<'a>(Vec<(&'a str, &'a str)>);

/// Options that every node takes and that make no difference here.
const COMMON: &[&str] =
    &["driver", "node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "force-share"];

impl<'a> Options<'a> {
    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.iter().rev().find(|(known, _)| *known == key).map(|(_, value)| *value)
    }

    fn required(&self, key: &str) -> Result<&'a str> {
        self.get(key).ok_or_else(|| Error::usage(format!("Parameter '{key}' is missing")))
    }

    fn understand(&self) -> Result<ExportName> {
        self.refuse_unknown()?;
        if self.get("path").is_some() && self.get("host").is_some() {
            return Err(Error::usage("path and host may not be used at the same time"));
        }
        let mut target =
            ExportName::new(self.address()?, export_name(self.get("export").unwrap_or("").to_owned())?);
        target.tls_creds = self.get("tls-creds").map(str::to_owned);
        if let Some(hostname) = self.get("tls-hostname") {
            if target.tls_creds.is_none() {
                return Err(Error::usage("'tls-hostname' is only valid with 'tls-creds'"));
            }
            target.tls =
                Some(TlsParameters { hostname: Some(hostname.to_owned()), ..TlsParameters::default() });
        }
        target.reconnect_delay = self.seconds("reconnect-delay")?;
        target.open_timeout = self.seconds("open-timeout")?;
        Ok(target)
    }

    fn refuse_unknown(&self) -> Result<()> {
        const KNOWN: &[&str] = &[
            "host",
            "port",
            "path",
            "export",
            "tls-creds",
            "tls-hostname",
            "reconnect-delay",
            "open-timeout",
        ];
        let known = |key: &str| {
            KNOWN.contains(&key)
                || COMMON.contains(&key)
                || key.starts_with("server.")
                || key.starts_with("cache.")
        };
        match self.0.iter().find(|(key, _)| !known(key)) {
            Some((key, _)) => {
                Err(Error::usage(format!("Block protocol 'nbd' doesn't support the option '{key}'")))
            }
            None => Ok(()),
        }
    }

    fn address(&self) -> Result<Address> {
        if let Some(path) = self.get("path") {
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        if let Some(host) = self.get("host") {
            return self.tcp(host, self.get("port"));
        }
        match self.get("server.type") {
            Some("inet") => self.tcp(self.required("server.host")?, Some(self.required("server.port")?)),
            Some("unix") => {
                let path = self.required("server.path")?;
                let hidden =
                    self.get("server.abstract").is_some_and(|text| matches!(text, "on" | "true" | "yes"));
                Ok(Address::Unix(PathBuf::from(if hidden { format!("\0{path}") } else { path.to_owned() })))
            }
            Some("vsock") => {
                Ok(Address::Vsock { cid: self.parsed("server.cid")?, port: self.parsed("server.port")? })
            }
            Some("fd") => {
                Err(Error::unsupported("connections that are open already are not taken over here"))
            }
            Some(other) => Err(Error::usage(format!("Parameter 'type' does not accept value '{other}'"))),
            None if self.0.iter().any(|(key, _)| key.starts_with("server.")) => {
                Err(Error::usage("Parameter 'server.type' is missing"))
            }
            None => Err(Error::usage("NBD server address missing")),
        }
    }

    fn tcp(&self, host: &str, port: Option<&str>) -> Result<Address> {
        let port = match port {
            None => DEFAULT_PORT,
            Some(text) => text.parse().map_err(|_| {
                Error::usage(format!(
                    "address resolution failed for {host}:{text}: Servname not supported for ai_socktype"
                ))
            })?,
        };
        Ok(Address::Tcp { host: host.to_owned(), port })
    }

    fn parsed<T: std::str::FromStr>(&self, key: &str) -> Result<T> {
        let text = self.required(key)?;
        text.parse().map_err(|_| Error::usage(format!("Parameter '{key}' expects a number, not '{text}'")))
    }

    fn seconds(&self, key: &str) -> Result<Duration> {
        let Some(text) = self.get(key) else { return Ok(Duration::ZERO) };
        let wrong = || Error::usage(format!("Parameter '{key}' expects uint32_t"));
        text.parse::<u32>().map(|seconds| Duration::from_secs(seconds.into())).map_err(|_| wrong())
    }
}

/// A name as the protocol takes it (section "Values": strings).
fn export_name(name: String) -> Result<String> {
    if name.len() > MAX_STRING {
        return Err(Error::usage("export name too long to send to server"));
    }
    if name.contains('\0') {
        return Err(Error::usage("the name of an export has no NUL in it"));
    }
    Ok(name)
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Result<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digit = |at: usize| tail.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err(invalid().hint(format!("'{text}' has a % that two hexadecimal digits do not follow")));
        };
        bytes.push(u8::try_from(high << 4 | low).map_err(|_| invalid())?);
        rest = tail.get(2..).unwrap_or_default();
    }
    String::from_utf8(bytes).map_err(|_| invalid().hint("names are in UTF-8"))
}

/// Percent-encodes what has a meaning in a URI; slashes stay.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z'
            | b'A'..=b'Z'
            | b'0'..=b'9'
            | b'-'
            | b'.'
            | b'_'
            | b'~'
            | b'/'
            | b':'
            | b'@'
            | b',' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    fn unix(path: &str) -> Address {
        Address::Unix(PathBuf::from(path))
    }

    #[test]
    fn uris_name_server_and_export() {
        for (name, address, export) in [
            ("nbd://host", tcp("host", 10809), ""),
            ("nbd://host/", tcp("host", 10809), ""),
            ("nbd://host:1/a/b", tcp("host", 1), "a/b"),
            ("nbd+tcp://host:/a%20b", tcp("host", 10809), "a b"),
            ("nbd://host//x", tcp("host", 10809), "/x"),
            ("nbd://[::1]:2/x", tcp("::1", 2), "x"),
            ("nbd://[fe80::1%25eth0]", tcp("fe80::1%eth0", 10809), ""),
            ("nbd://user@host/x", tcp("host", 10809), "x"),
            ("nbd+unix:///?socket=/a/b", unix("/a/b"), ""),
            ("nbd+unix:///e?socket=%00hidden", unix("\0hidden"), "e"),
            ("nbd+vsock://2:7/e", Address::Vsock { cid: 2, port: 7 }, "e"),
            ("nbd:host:10809", tcp("host", 10809), ""),
            ("nbd:[::1]:1:exportname=a:b", tcp("::1", 1), "a:b"),
            ("nbd:unix:/a%20b:exportname=c", unix("/a%20b"), "c"),
        ] {
            let parsed = ExportName::parse(name).unwrap();
            assert_eq!(
                (parsed.address, parsed.export.as_str(), parsed.tls),
                (address, export, None),
                "{name}"
            );
        }
    }

    #[test]
    fn what_is_wrong_with_a_name_is_said_in_qemus_words() {
        for name in [
            "nbd://",
            "nbd:///x",
            "nbd://h:x",
            "nbd://h:70000",
            "nbd://h?socket=/x",
            "nbd+unix:///x",
            "nbd+unix://h/?socket=/x",
            "nbd+unix:///?socket=",
            "nbd://h/%",
            "nbd://h/%zz",
            "nbd://h/%ff",
            "nbd+udp://h",
            "http://h",
            "nbd://[::1",
            "nbd://[::1]x",
            "nbd://h?foo=1",
            "nbd://h?tls-hostname=x",
            "nbds://h?tls-type=x",
            "nbds://h?tls-verify-peer=maybe",
            "nbd+unix:///?socket=/a&socket=/b",
            "nbd://h?reconnect-delay=x",
            "nbd+vsock://x",
        ] {
            assert_eq!(ExportName::parse(name).unwrap_err().message(), "No valid URL specified", "{name}");
        }
        for (name, message) in [
            ("nbd:", "NBD server address missing"),
            ("nbd:host", "error parsing address 'host'"),
            ("nbd://h/%00", "the name of an export has no NUL in it"),
        ] {
            assert_eq!(ExportName::parse(name).unwrap_err().message(), message, "{name}");
        }
        let long = format!("nbd://h/{}", "x".repeat(4097));
        ExportName::parse(&long).unwrap_err();
    }

    #[test]
    fn parameters_say_how() {
        let name = "nbds://h/e?tls-type=x509&tls-certificates=/c&tls-hostname=n&tls-verify-peer=false&reconnect-delay=5&\
                    open-timeout=6&connections=3";
        let parsed = ExportName::parse(name).unwrap();
        let tls = parsed.tls.unwrap();
        assert_eq!(
            (tls.kind, tls.hostname.as_deref(), tls.verify_peer),
            (Some(TlsKind::X509), Some("n"), false)
        );
        assert_eq!(tls.certificates, Some(PathBuf::from("/c")));
        assert!(!tls.is_psk());
        assert_eq!((parsed.reconnect_delay.as_secs(), parsed.open_timeout.as_secs()), (5, 6));
        assert_eq!(parsed.connections, Some(3));
        let psk =
            ExportName::parse("nbds+unix:///?tls-psk-file=/k&socket=/s&tls-username=u").unwrap().tls.unwrap();
        assert!(psk.is_psk());
        assert_eq!(psk.username.as_deref(), Some("u"));
        // The user whose key it is, as libnbd has it in its URIs.
        for name in ["nbds://a%20b@h:1/e?tls-psk-file=/k", "nbds+unix://a%20b@/?tls-psk-file=/k&socket=/s"] {
            let psk = ExportName::parse(name).unwrap().tls.unwrap();
            assert_eq!(psk.username.as_deref(), Some("a b"), "{name}");
        }
        assert_eq!(ExportName::parse("nbd://user@h").unwrap().tls, None);
    }

    #[test]
    fn options_are_those_of_qemu() {
        let parse = |text: &str| {
            ExportName::from_options(
                text.split(',').filter_map(|pair| pair.split_once('=')).collect::<Vec<_>>(),
            )
        };
        let inet = parse("driver=nbd,server.type=inet,server.host=h,server.port=7,export=e").unwrap();
        assert_eq!(inet, ExportName::new(tcp("h", 7), "e"));
        assert_eq!(parse("path=/x").unwrap().address, unix("/x"));
        assert_eq!(parse("host=h").unwrap().address, tcp("h", 10809));
        assert_eq!(
            parse("server.type=vsock,server.cid=2,server.port=3").unwrap().address,
            Address::Vsock { cid: 2, port: 3 }
        );
        let more = parse("path=/x,tls-creds=t,tls-hostname=n,reconnect-delay=3,open-timeout=4").unwrap();
        assert_eq!((more.tls_creds.as_deref(), more.reconnect_delay.as_secs()), (Some("t"), 3));
        assert_eq!(more.tls.unwrap().hostname.as_deref(), Some("n"));
        for (text, message) in [
            ("host=h,path=/x", "path and host may not be used at the same time"),
            ("export=e", "NBD server address missing"),
            ("server.host=h", "Parameter 'server.type' is missing"),
            ("server.type=inet,server.host=h", "Parameter 'server.port' is missing"),
            ("server.type=foo", "Parameter 'type' does not accept value 'foo'"),
            ("path=/x,foo=1", "Block protocol 'nbd' doesn't support the option 'foo'"),
            ("path=/x,tls-hostname=n", "'tls-hostname' is only valid with 'tls-creds'"),
            ("path=/x,open-timeout=-1", "Parameter 'open-timeout' expects uint32_t"),
        ] {
            assert_eq!(parse(text).unwrap_err().message(), message, "{text}");
        }
    }

    proptest! {
        #[test]
        fn names_survive_a_round_trip(host in "[a-z0-9.]{1,8}|::[0-9a-f]{1,4}", port: u16, export: String, path: String) {
            let export = export.replace('\0', "");
            for address in [tcp(&host, port), unix(&format!("/{path}")), Address::Vsock { cid: 3, port: port.into() }] {
                let name = ExportName::new(address, export.clone());
                prop_assert_eq!(ExportName::parse(&name.to_string()).unwrap(), name);
            }
        }

        #[test]
        fn no_name_is_too_strange(name: String, rest in "[a-z%:/?=&\\[\\]@0-9+;]{0,40}") {
            let _ = (ExportName::parse(&name), ExportName::parse(&format!("nbd{rest}")));
        }
    }
}

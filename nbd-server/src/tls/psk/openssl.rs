//! A session of OpenSSL over memory as a [`Session`].

use std::io::{self, Read, Write};
use std::sync::{Arc, OnceLock};

use block::{Error, ErrorKind, Result};
use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::ssl::{
    self, ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions, SslRef, SslSessionCacheMode,
    SslStream, SslVerifyMode, SslVersion,
};
use parking_lot::RwLock;

use super::keys::{Key, Keys};
use crate::channel::Session;

/// TLS 1.3. With a shared key that was given from outside OpenSSL's callbacks know SHA-256 only.
const SUITES: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
/// TLS 1.2: fresh keys always (the DHE ones serve our client; the server would need parameters for them).
const CIPHERS: &str = "ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384:\
    DHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES128-CBC-SHA256:ECDHE-PSK-AES256-CBC-SHA384";

/// What the sessions of one configuration share.
#[derive(Clone)]
pub(super) struct Context {
    context: SslContext,
    server: bool,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("server", &self.server).finish_non_exhaustive()
    }
}

/// Who a client says it is, and whether its key is known.
struct Claim {
    identity: String,
    known: bool,
}

/// Where a session keeps its [`Claim`].
fn claim() -> std::result::Result<Index<Ssl, Claim>, ErrorStack> {
    static INDEX: OnceLock<Index<Ssl, Claim>> = OnceLock::new();
    match INDEX.get() {
        Some(index) => Ok(*index),
        None => {
            let index = Ssl::new_ex_index()?;
            Ok(*INDEX.get_or_init(|| index))
        }
    }
}

impl Context {
    /// For a server whose clients have these keys (now, or when they come).
    pub(super) fn server(keys: Arc<RwLock<Keys>>) -> Result<Self> {
        let index = claim().map_err(failed)?;
        let mut builder = builder(SslMethod::tls_server()).map_err(failed)?;
        builder.set_psk_server_callback(move |session, identity, room| {
            let identity = identity.unwrap_or_default();
            let keys = keys.read();
            let key = keys.get(identity);
            let claim =
                Claim { identity: String::from_utf8_lossy(identity).into_owned(), known: key.is_some() };
            session.set_ex_data(index, claim);
            // No bytes: nobody of that name.
            Ok(key.and_then(|key| put(key, room)).unwrap_or(0))
        });
        Ok(Self { context: builder.build(), server: true })
    }

    /// For a client that is called `username`.
    pub(super) fn client(username: &str, key: &Key) -> Result<Self> {
        let mut builder = builder(SslMethod::tls_client()).map_err(failed)?;
        // A server that shows a certificate instead is refused, for no authority is trusted.
        builder.set_verify(SslVerifyMode::PEER);
        let mut name = username.as_bytes().to_vec();
        name.push(0);
        let key = key.clone();
        builder.set_psk_client_callback(move |_session, _hint, name_room, room| {
            Ok(put(&name, name_room).and_then(|_| put(&key, room)).unwrap_or(0))
        });
        Ok(Self { context: builder.build(), server: false })
    }

    /// One connection's session.
    pub(super) fn session(&self) -> io::Result<Box<dyn Session>> {
        let mut ssl = Ssl::new(&self.context)?;
        if self.server {
            ssl.set_accept_state();
        } else {
            ssl.set_connect_state();
        }
        let mut session = OpensslSession {
            stream: SslStream::new(ssl, Memory::default())?,
            server: self.server,
            over: false,
            failed: false,
        };
        // A client speaks first.
        session.go_on()?;
        Ok(Box::new(session))
    }
}

fn builder(method: SslMethod) -> std::result::Result<SslContextBuilder, ErrorStack> {
    let mut builder = SslContext::builder(method)?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_ciphersuites(SUITES)?;
    builder.set_cipher_list(CIPHERS)?;
    // Nobody resumes an NBD connection.
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_num_tickets(0)?;
    builder.set_options(SslOptions::NO_TICKET | SslOptions::NO_COMPRESSION | SslOptions::NO_RENEGOTIATION);
    Ok(builder)
}

/// Copies all of `bytes` to the start of `room`.
fn put(bytes: &[u8], room: &mut [u8]) -> Option<usize> {
    room.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(bytes.len())
}

fn failed(error: ErrorStack) -> Error {
    Error::from_source(ErrorKind::Io, error).context("OpenSSL")
}

/// The network as OpenSSL sees it.
#[derive(Debug, Default)]
struct Memory {
    incoming: Vec<u8>,
    /// How much of `incoming` has been read.
    read: usize,
    outgoing: Vec<u8>,
}

impl Read for Memory {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut rest = &self.incoming[self.read..];
        if rest.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let read = rest.read(buf)?;
        self.read += read;
        if self.read == self.incoming.len() {
            self.incoming.clear();
            self.read = 0;
        }
        Ok(read)
    }
}

impl Write for Memory {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.outgoing.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection of either side.
struct OpensslSession {
    stream: SslStream<Memory>,
    server: bool,
    /// Whether nothing more will come: the peer has said so, or we have.
    over: bool,
    failed: bool,
}

impl std::fmt::Debug for OpensslSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpensslSession")
            .field("state", &self.stream.ssl().state_string_long())
            .finish_non_exhaustive()
    }
}

impl OpensslSession {
    /// Carries the handshake as far as it goes.
    fn go_on(&mut self) -> io::Result<()> {
        if !self.handshaking() {
            return Ok(());
        }
        let result = self.stream.do_handshake();
        self.check(result).map(|_| ())
    }

    /// `None`: more has to come first.
    fn check<T>(&mut self, result: std::result::Result<T, ssl::Error>) -> io::Result<Option<T>> {
        let error = match result {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error,
        };
        match error.code() {
            ErrorCode::WANT_READ | ErrorCode::WANT_WRITE => Ok(None),
            ErrorCode::ZERO_RETURN => {
                self.over = true;
                Ok(None)
            }
            _ => {
                self.failed = true;
                Err(self.explain(&error))
            }
        }
    }

    fn explain(&self, error: &ssl::Error) -> io::Error {
        let ssl = self.stream.ssl();
        let who = claimed(ssl);
        let reason =
            error.ssl_error().and_then(|stack| stack.errors().first()?.reason()).unwrap_or("no reason given");
        let key_differs =
            ["binder does not verify", "decryption failed or bad record mac", "digest check failed"];
        let message = match who {
            Some(Claim { identity, known: false }) => format!("there is no key of user '{identity}'"),
            Some(Claim { identity, .. }) if key_differs.contains(&reason) => {
                format!("the client says it is '{identity}', but has another key")
            }
            None if self.server && self.handshaking() => {
                format!("the client has not shown a key (does it want certificates?): {reason}")
            }
            _ if self.handshaking() => {
                format!(
                    "the server does not accept the key (another key, no such user, or certificates only): {reason}"
                )
            }
            _ => reason.to_owned(),
        };
        io::Error::new(io::ErrorKind::PermissionDenied, format!("TLS: {message}"))
    }
}

/// Who the peer says it is.
fn claimed(ssl: &SslRef) -> Option<&Claim> {
    ssl.ex_data(claim().ok()?)
}

impl Session for OpensslSession {
    fn handshaking(&self) -> bool {
        !self.stream.ssl().is_init_finished()
    }

    fn feed(&mut self, ciphertext: &[u8]) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "TLS: the session has failed before"));
        }
        if self.over {
            return Ok(());
        }
        let memory = self.stream.get_mut();
        memory.incoming.drain(..std::mem::take(&mut memory.read));
        memory.incoming.extend_from_slice(ciphertext);
        self.go_on()
    }

    fn plaintext(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.over || self.failed || buf.is_empty() || self.handshaking() {
            return Ok(0);
        }
        let result = self.stream.ssl_read(buf);
        Ok(self.check(result)?.unwrap_or(0))
    }

    fn ended(&self) -> bool {
        self.over
    }

    fn has_to_send(&self) -> bool {
        !self.stream.get_ref().outgoing.is_empty()
    }

    fn seal(&mut self, mut plaintext: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        while !plaintext.is_empty() {
            if self.failed || self.handshaking() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "TLS: the session is not ready to send",
                ));
            }
            let result = self.stream.ssl_write(plaintext);
            match self.check(result)? {
                Some(sent) => plaintext = &plaintext[sent..],
                None => return Err(io::Error::new(io::ErrorKind::InvalidData, "TLS: the session is over")),
            }
        }
        let outgoing = &mut self.stream.get_mut().outgoing;
        if out.is_empty() {
            std::mem::swap(out, outgoing);
        } else {
            out.append(outgoing);
        }
        Ok(())
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if !self.failed && !self.handshaking() {
            // Whoever is gone need not be told.
            let _ = self.stream.shutdown();
        }
        self.over = true;
        out.append(&mut self.stream.get_mut().outgoing);
    }

    fn peer(&self) -> Option<String> {
        let claim = claimed(self.stream.ssl()).filter(|claim| claim.known)?;
        Some(claim.identity.clone())
    }
}

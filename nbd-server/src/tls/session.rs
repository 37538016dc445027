//! A session of rustls as a [`Session`].

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};

use rustls::Connection;

use super::explain::explain;
use super::identity;
use crate::channel::Session;

/// Plaintext that may wait to be read before more is deciphered; rustls' own limit, which is an error there.
const PLAINTEXT_BYTES_MAX: usize = 16 << 10;

/// A connection of either side.
pub(super) struct RustlsSession {
    connection: Connection,
    /// Ciphertext that rustls does not take yet, because plaintext waits to be read.
    waiting: VecDeque<u8>,
    /// Bytes of plaintext that wait to be read.
    plaintext_bytes: usize,
    /// Whether nothing more will come: the peer has said so, or we have. (Nobody in NBD listens after the end of
    /// what he says himself, and rustls does not like to find mistakes in what comes then.)
    over: bool,
    /// What has ended the session. Nothing but the alert about it is sent after that.
    failure: Option<rustls::Error>,
}

impl std::fmt::Debug for RustlsSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RustlsSession")
            .field("version", &self.connection.protocol_version())
            .finish_non_exhaustive()
    }
}

impl RustlsSession {
    pub(super) fn new(connection: impl Into<Connection>) -> Self {
        let mut connection = connection.into();
        // The caller decides how much is sealed at once, and takes it away at once.
        connection.set_buffer_limit(None);
        Self { connection, waiting: VecDeque::new(), plaintext_bytes: 0, over: false, failure: None }
    }

    /// Gives rustls as much of `ciphertext` as it takes, which is all unless plaintext piles up.
    fn take(&mut self, ciphertext: &mut &[u8]) -> io::Result<()> {
        if let Some(failure) = &self.failure {
            return Err(explain(failure));
        }
        while !ciphertext.is_empty() && self.plaintext_bytes < PLAINTEXT_BYTES_MAX {
            if self.over {
                // What comes after the end does not count.
                *ciphertext = &[];
                break;
            }
            self.connection.read_tls(ciphertext)?;
            let state = self.connection.process_new_packets().map_err(|error| {
                let explained = explain(&error);
                self.failure = Some(error);
                explained
            })?;
            self.plaintext_bytes = state.plaintext_bytes_to_read();
            self.over = state.peer_has_closed();
        }
        Ok(())
    }

    fn take_waiting(&mut self) -> io::Result<()> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let mut ciphertext: &[u8] = waiting.make_contiguous();
        let result = self.take(&mut ciphertext);
        let rest = ciphertext.len();
        waiting.drain(..waiting.len() - rest);
        self.waiting = waiting;
        result
    }
}

impl Session for RustlsSession {
    fn handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    fn feed(&mut self, mut ciphertext: &[u8]) -> io::Result<()> {
        if self.waiting.is_empty() {
            self.take(&mut ciphertext)?;
        }
        self.waiting.extend(ciphertext);
        Ok(())
    }

    fn plaintext(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.plaintext_bytes == 0 && !self.waiting.is_empty() {
            self.take_waiting()?;
        }
        if self.plaintext_bytes == 0 {
            return Ok(0);
        }
        let read = self.connection.reader().read(buf)?;
        self.plaintext_bytes = self.plaintext_bytes.saturating_sub(read);
        Ok(read)
    }

    fn ended(&self) -> bool {
        self.over && self.plaintext_bytes == 0
    }

    fn has_to_send(&self) -> bool {
        self.connection.wants_write()
    }

    fn seal(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        // Without plaintext there is an alert to be had even after a failure.
        if !plaintext.is_empty() {
            self.connection.writer().write_all(plaintext)?;
        }
        while self.connection.wants_write() {
            self.connection.write_tls(out)?;
        }
        Ok(())
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if self.failure.is_none() {
            self.connection.send_close_notify();
        }
        self.over = true;
        self.waiting.clear();
        // Appending to memory does not fail.
        let _ = self.seal(&[], out);
    }

    fn peer(&self) -> Option<String> {
        let certificate = self.connection.peer_certificates()?.first()?;
        identity::distinguished_name(certificate)
    }
}

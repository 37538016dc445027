//! Numbers on a local socket, for Prometheus and for curious people:
//! `curl --unix-socket PATH http://localhost/metrics`.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::{Result, ResultExt as _};
use nbd_server::server::{Handle, listen};

/// The socket's file, removed in the end.
#[derive(Debug)]
pub(super) struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Answers on this socket for as long as the process lives.
pub(super) fn serve(path: &Path, handle: Handle) -> Result<Socket> {
    let what = || format!("cannot listen on '{}'", path.display());
    let listener = listen::bind(path)?;
    let socket = Socket(std::path::absolute(path).context(what)?);
    let answering = move || {
        for stream in listener.incoming().flatten() {
            // Whoever does not listen gets nothing.
            let _ = answer(stream, &handle);
        }
    };
    std::thread::Builder::new().name("metrics".to_owned()).spawn(answering).context(what)?;
    Ok(socket)
}

fn answer(mut stream: UnixStream, handle: &Handle) -> std::io::Result<()> {
    let patience = Some(Duration::from_secs(2));
    stream.set_read_timeout(patience)?;
    stream.set_write_timeout(patience)?;
    let mut request = [0; 4096];
    let len = stream.read(&mut request)?;
    let body = handle.snapshot().prometheus();
    if request[..len].starts_with(b"GET ") {
        write!(
            stream,
            "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    } else {
        stream.write_all(body.as_bytes())
    }
}

//! `p2v --receive`: the receiving end, as a server of network block devices.
//!
//! A sender asks for an export whose name begins with `vimg-p2v/`, its desk, and says through it what it has; the disks'
//! exports are there once the machine is accepted (`v2v::p2v::offer`, `v2v::p2v::receive`).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use block::device::check_range;
use block::mem::MemStorage;
use block::num::to_usize;
use block::{BlockDevice, Error, LayerExtent, Result, ResultExt as _, Storage as _, ZeroMode};
use image::Format;
use nbd_server::server::export::{Export, ExportOptions};
use nbd_server::server::listen::Listener;
use nbd_server::server::{Catalogue, Config, Handle, Limits, Server};
use nbd_server::tls::{Policy, ServerTls};
use parking_lot::Mutex;
use serde_json::{Value, json};
use v2v::p2v::gate::Gate;
use v2v::p2v::offer::{self, DESK, DESK_BYTES, Request};
use v2v::p2v::receive::Receiver;

use super::Args;
use crate::app::App;
use crate::cmd::serve::plan::Authentication;
use crate::cmd::serve::{listeners, plan, server_tls, watch_signals};
use crate::exit::{Exit, Failure, Outcome};
use crate::output::Output;

pub(super) fn run(args: &Args, root: &Path, app: &App) -> Outcome {
    if app.global.untrusted {
        return Err(Failure::usage(
            "--receive makes files as senders ask for them: it cannot be had with --untrusted",
        ));
    }
    std::fs::create_dir_all(root)
        .map_err(Error::from)
        .context(|| format!("Could not make '{}'", root.display()))?;
    let format = Format::from_name(&args.format).ok_or_else(|| Error::usage("unknown format"))?;
    let receiver = Arc::new(Receiver::new(root.to_owned(), format, Box::new(free)));
    let authentication = match (&args.tls_dir, &args.tls_psk) {
        (Some(dir), _) => Authentication::X509 { dir: dir.clone(), verify_peer: true },
        (None, Some(file)) => Authentication::Psk { file: file.clone() },
        (None, None) => Authentication::None,
    };
    let tls = server_tls(&authentication)?;
    let (reloads, secure) = (tls.is_some(), tls.is_some());
    let mut server = Server::new(config(tls))?;
    let stop = Arc::new(OnceLock::new());
    let _ = stop.set(server.handle());
    let counter = Arc::new(Counter {
        receiver: Arc::clone(&receiver),
        once: args.once,
        complete: AtomicBool::new(false),
        stop: Arc::clone(&stop),
        program: app.program,
        quiet: args.quiet,
    });
    server.consult(Arc::new(Exports { counter, disks: Mutex::default() }));
    let places = args.listen.iter().map(|text| plan::address(text)).collect::<Outcome<Vec<_>>>()?;
    let place = match (&args.socket, places.is_empty()) {
        (Some(path), _) => plan::Where::Unix { path: path.clone(), mode: None },
        (None, true) => plan::Where::Default,
        (None, false) => plan::Where::Tcp(places),
    };
    let listeners = listeners(&place)?;
    let uris: String = listeners.iter().map(|listener| shown(listener, secure)).collect();
    for listener in listeners {
        server.listen(listener);
    }
    watch_signals(server.handle(), reloads, app)?;
    app.note(&uris);
    let served = server.run().map(drop);
    served.and(receiver.close())?;
    Ok(Exit::OK)
}

fn shown(listener: &Listener, secure: bool) -> String {
    let uri = listener.uri();
    if secure { format!("{}\n", uri.replacen("nbd", "nbds", 1)) } else { format!("{uri}\n") }
}

fn config(tls: Option<ServerTls>) -> Config {
    let tls_policy = if tls.is_some() { Policy::Required } else { Policy::Off };
    let log = Arc::new(nbd_server::server::event::Silent);
    Config { exports: vec![], tls, tls_policy, limits: Limits::default(), once: false, log }
}

/// Bytes that may still be written to a folder.
fn free(path: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    Some(stat.fragment_size().saturating_mul(stat.blocks_available()))
}

/// Who answers what is asked at desks.
#[derive(Debug)]
struct Counter {
    receiver: Arc<Receiver>,
    /// End when a machine is complete, and the sender knows.
    once: bool,
    complete: AtomicBool,
    stop: Arc<OnceLock<Handle>>,
    program: &'static str,
    quiet: bool,
}

impl Counter {
    fn answer(&self, request: &[u8]) -> Value {
        match Request::parse(request).and_then(|request| self.carry_out(request)) {
            Ok(answer) => answer,
            Err(error) => {
                Output::new(false).complain(self.program, &format!("refused: {error}"));
                offer::refusal(&error)
            }
        }
    }

    fn carry_out(&self, request: Request) -> Result<Value> {
        match request {
            Request::Offer(machine) => {
                let accepted = self.receiver.offer(&machine)?;
                let name = machine.machine["name"].as_str().unwrap_or_default().escape_debug().to_string();
                let again = if accepted.disks.iter().any(|disk| disk.begun) { " goes on" } else { "" };
                self.say(&format!("machine {name}: {} disk(s) coming{again}\n", accepted.disks.len()));
                Ok(offer::acceptance(&accepted))
            }
            Request::Complete { folder, id, machine } => {
                let folder = self.receiver.complete(&folder, &id, &machine)?;
                self.say(&format!("complete: {}\n", folder.display()));
                self.complete.store(self.once, Ordering::Release);
                Ok(json!({"folder": folder.to_string_lossy()}))
            }
        }
    }

    /// An answer is being read: what has been asked for is still answered after a stop.
    fn read(&self) {
        if let Some(handle) = self.stop.get().filter(|_| self.complete.swap(false, Ordering::AcqRel)) {
            handle.stop();
        }
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            drop(Output::new(false).print(text));
        }
    }
}

/// A disk that is coming, and its export.
type Shown = (Arc<Gate>, Arc<Export>);

/// Desks, one for each connection that asks for one and gone with it, and disks by name.
#[derive(Debug)]
struct Exports {
    counter: Arc<Counter>,
    disks: Mutex<BTreeMap<String, Shown>>,
}

impl Catalogue for Exports {
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        if name.starts_with(DESK) {
            return Some(self.desk(name));
        }
        let mut disks = self.disks.lock();
        let Some(gate) = self.counter.receiver.device(name) else {
            disks.remove(name);
            return None;
        };
        if let Some((known, export)) = disks.get(name)
            && Arc::ptr_eq(known, &gate)
        {
            return Some(Arc::clone(export));
        }
        let export = Arc::new(Export::new(name, Arc::clone(&gate) as _, ExportOptions::default()));
        disks.insert(name.to_owned(), (gate, Arc::clone(&export)));
        Some(export)
    }
}

impl Exports {
    fn desk(&self, name: &str) -> Arc<Export> {
        let desk = Desk::new(Arc::clone(&self.counter));
        // One connection each: a request and its flush have to come in their order.
        let options = ExportOptions { multi_conn: false, ..ExportOptions::default() };
        Arc::new(Export::new(name, Arc::new(desk), options))
    }
}

/// An export that takes requests.
#[derive(Debug)]
struct Desk {
    counter: Arc<Counter>,
    /// Grows with what is written.
    memory: MemStorage,
    /// Something was written that has not been answered.
    asked: AtomicBool,
}

impl Desk {
    fn new(counter: Arc<Counter>) -> Self {
        Self { counter, memory: MemStorage::from_bytes(vec![]), asked: AtomicBool::new(false) }
    }

    fn answer(&self) -> Result<()> {
        let mut len = [0; 4];
        self.memory.read_at(&mut len, 0)?;
        let len = u64::from(u32::from_be_bytes(len));
        check_range(4, len, DESK_BYTES / 2)?;
        let mut request = vec![0; to_usize(len)];
        self.memory.read_at(&mut request, 4)?;
        let answer = self.counter.answer(&request).to_string().into_bytes();
        let len = u32::try_from(answer.len()).unwrap_or(0);
        self.memory.write_at(&[&len.to_be_bytes()[..], &answer].concat(), DESK_BYTES / 2)
    }
}

impl BlockDevice for Desk {
    fn size(&self) -> u64 {
        DESK_BYTES
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, DESK_BYTES)?;
        // The length comes first, then the text.
        if offset > DESK_BYTES / 2 {
            self.counter.read();
        }
        self.memory.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, DESK_BYTES / 2)?;
        self.memory.write_at(buf, offset)?;
        self.asked.store(true, Ordering::Release);
        Ok(())
    }

    fn write_zeroes_at(&self, _offset: u64, _len: u64, _mode: ZeroMode) -> Result<()> {
        Err(Error::unsupported("a desk takes requests, and nothing else"))
    }

    fn discard_at(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if self.asked.swap(false, Ordering::AcqRel) { self.answer() } else { Ok(()) }
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        Ok(block::extent::all_data(offset, max_len, DESK_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_desk_is_gone_with_its_connection() {
        let dir = tempfile::tempdir().unwrap();
        let format = Format::from_name("raw").unwrap();
        let counter = Arc::new(Counter {
            receiver: Arc::new(Receiver::new(dir.path().to_owned(), format, Box::new(|_| None))),
            once: false,
            complete: AtomicBool::new(false),
            stop: Arc::default(),
            program: "vimg",
            quiet: true,
        });
        let exports = Exports { counter, disks: Mutex::default() };
        let name = format!("{DESK}1-2");
        let desk = exports.find(&name).unwrap();
        let seen = Arc::downgrade(&desk);
        drop(desk);
        assert!(seen.upgrade().is_none());
        assert!(exports.find("web1/sda").is_none());
    }
}

//! The engine that runs the guests.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use block::{BlockDevice, Error, Result};
use bootcheck::engine::Engine;
use bootcheck::kvm::{KvmEngine, KvmState, probe};
use bootcheck::qemu::{Accelerator, QemuEngine, ServeDisks};
use nbd_server::server::event::Silent;
use nbd_server::server::export::{Export, ExportOptions};
use nbd_server::server::listen::Listener;
use nbd_server::server::{Config, Handle, Limits, Server};
use nbd_server::tls::Policy;

use crate::app::App;
use crate::exit::{Failure, Outcome};
use crate::programs::find;
use crate::sandbox;

/// The program that is used where our own machine cannot be.
pub(crate) const QEMU: &str = "qemu-system-x86_64";
/// A guest that runs on the processor.
const TIME_LIMIT: Duration = Duration::from_secs(300);
/// A guest whose instructions are translated. On a busy machine its timer may be late when it is tested, which Linux
/// takes for a broken one and panics; on KVM it does not test.
const SLOW_TIME_LIMIT: Duration = Duration::from_secs(900);

/// The engine, and what follows from it.
pub(in crate::cmd) struct Chosen {
    pub(in crate::cmd) engine: Arc<dyn Engine>,
    /// Why it is not the first choice.
    pub(super) remark: Option<String>,
    /// How long a guest may take.
    pub(super) time_limit: Duration,
    /// What guests have to be told on their command lines.
    pub(in crate::cmd) append: &'static str,
    /// What a program that is started needs; `None`: none is.
    program: Option<PathBuf>,
}

impl Chosen {
    /// Gives up what is not needed any more. Images that do not lie in files may still need the network.
    pub(super) fn confine(&self, only_files: bool, app: &App) {
        let applied = match &self.program {
            None if only_files || app.global.untrusted => sandbox::enter_for_machine(),
            Some(program) if app.global.untrusted => {
                sandbox::enter_for_program(program, &std::env::temp_dir())
            }
            _ => return,
        };
        app.tell(&format!("sandbox: {applied}"));
    }
}

/// Chooses the engine that `name` asks for.
pub(in crate::cmd) fn choose(name: &str, app: &App) -> Outcome<Chosen> {
    match name {
        "auto" => automatic(app),
        "kvm" => our_own(app),
        "qemu" => Ok(qemu(probe() == KvmState::Real)?),
        other => Err(Failure::usage(format!("--engine expects 'auto', 'kvm' or 'qemu' not '{other}'"))),
    }
}

fn automatic(app: &App) -> Outcome<Chosen> {
    let state = probe();
    if state == KvmState::Real {
        return our_own(app);
    }
    let why = why_not(&state);
    match qemu(false) {
        Ok(chosen) => {
            app.tell(&format!("engine: {why}; {QEMU} runs the guest"));
            Ok(Chosen {
                remark: Some(format!("{why}; {QEMU} ran the guest by translating its instructions")),
                ..chosen
            })
        }
        Err(_) => {
            let error =
                Error::unsupported(format!("no engine can run a guest here: {why}, and there is no {QEMU}"));
            Err(error.hint(remedy(&state)).hint(QEMU_REMEDY).into())
        }
    }
}

fn our_own(app: &App) -> Outcome<Chosen> {
    let state = probe();
    match &state {
        KvmState::Real => {}
        KvmState::Emulated { .. } => app.warn(&format!("{}; most guests will not get far", why_not(&state))),
        _ => return Err(Error::unsupported(why_not(&state)).hint(remedy(&state)).hint(QEMU_REMEDY).into()),
    }
    Ok(Chosen {
        engine: Arc::new(KvmEngine),
        remark: None,
        time_limit: TIME_LIMIT,
        append: "",
        program: None,
    })
}

/// The state of KVM in words.
pub(crate) fn why_not(state: &KvmState) -> String {
    match state {
        KvmState::Real => "KVM works".to_owned(),
        KvmState::Missing => "there is no /dev/kvm".to_owned(),
        KvmState::NoPermission => "/dev/kvm may not be opened".to_owned(),
        KvmState::Emulated { reason } => format!("KVM is not real here ({reason})"),
    }
}

/// What to do about it.
pub(crate) fn remedy(state: &KvmState) -> &'static str {
    match state {
        KvmState::Real => "",
        KvmState::Missing => {
            "load the module kvm_intel or kvm_amd, enable virtualisation in the firmware, or give the container the device (--device /dev/kvm)"
        }
        KvmState::NoPermission => "add the user to the group 'kvm', and log in again",
        KvmState::Emulated { .. } => {
            "run this on a host whose processor (or whose hypervisor, by nested virtualisation) offers VMX or SVM"
        }
    }
}

/// What to do if qemu is missing.
pub(crate) const QEMU_REMEDY: &str = "or install qemu (Debian: qemu-system-x86), which needs no KVM";

fn qemu(kvm: bool) -> Result<Chosen> {
    let Some(program) = find(QEMU) else {
        return Err(Error::unsupported(format!("there is no {QEMU} in the search path")).hint(QEMU_REMEDY));
    };
    let accelerator = if kvm { Accelerator::Kvm } else { Accelerator::Tcg };
    let engine = QemuEngine {
        program: program.clone(),
        wrapper: dies_with_us(),
        accelerator,
        directory: std::env::temp_dir(),
        server: Arc::new(ByNbd),
    };
    let (time_limit, append) = if kvm { (TIME_LIMIT, "") } else { (SLOW_TIME_LIMIT, "no_timer_check") };
    Ok(Chosen { engine: Arc::new(engine), remark: None, time_limit, append, program: Some(program) })
}

/// The words that let a program end with this one, where there is a setpriv(1) for that.
fn dies_with_us() -> Vec<OsString> {
    match find("setpriv") {
        Some(setpriv) => vec![setpriv.into(), "--pdeathsig".into(), "KILL".into()],
        None => vec![],
    }
}

/// Serves disks with our NBD server.
#[derive(Debug)]
struct ByNbd;

impl ServeDisks for ByNbd {
    fn serve(&self, disks: Vec<(Arc<dyn BlockDevice>, bool)>, socket: &Path) -> Result<Box<dyn Send>> {
        let export = |(index, (device, read_only)): (usize, (Arc<dyn BlockDevice>, bool))| {
            let options = ExportOptions { read_only, ..ExportOptions::default() };
            Arc::new(Export::new(format!("disk{index}"), device, options))
        };
        let limits = Limits { drain: Duration::from_secs(1), ..Limits::default() };
        let mut server = Server::new(Config {
            exports: disks.into_iter().enumerate().map(export).collect(),
            tls: None,
            tls_policy: Policy::Off,
            limits,
            once: false,
            log: Arc::new(Silent),
        })?;
        server.listen(Listener::unix(socket, Some(0o600))?);
        let handle = server.handle();
        let thread = std::thread::Builder::new().name("nbd".to_owned()).spawn(move || {
            // An overlay that vanishes has nothing to flush.
            drop(server.run());
        })?;
        Ok(Box::new(Serving { handle, thread: Some(thread) }))
    }
}

/// A server that stops when this is dropped.
struct Serving {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

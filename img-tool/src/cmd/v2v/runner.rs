//! What runs the appliance: our own machine where KVM is real, else a User-Mode Linux that is installed and knows the
//! file systems, else qemu.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use appliance::{Kernel, UmlEngine};
use block::{Error, Result};
use bootcheck::engine::Engine;
use bootcheck::kvm::{KvmState, probe};

use super::Args;
use crate::app::App;
use crate::cmd::bootcheck::choose::choose;
use crate::exit::{Failure, Outcome};
use crate::programs::find;

/// Names under which a User-Mode Linux is installed.
const PROGRAMS: [&str; 2] = ["linux.uml", "linux"];
/// Where Debian has folders of its modules, by release.
const MODULES: &str = "/usr/lib/uml/modules";
/// Memory of a User-Mode Linux; it lies in a file.
const UML_MEMORY: u64 = 256 << 20;

/// What runs the appliance, and what follows from it.
pub(super) struct Runner {
    pub(super) engine: Arc<dyn Engine>,
    /// The modules of the User-Mode Linux, if that is what runs it.
    pub(super) uml: Option<PathBuf>,
    /// Words for the kernel's command line.
    pub(super) append: &'static str,
    /// Memory, if not as much as usual.
    pub(super) memory_bytes: Option<u64>,
}

/// Chooses what runs an appliance that is to mount `file_systems` (Linux's names).
///
/// # Errors
/// Nothing here can.
pub(super) fn runner(args: &Args, file_systems: &[&str], app: &App) -> Outcome<Runner> {
    let own_kernel = args.appliance_kernel.is_some();
    match args.engine.as_str() {
        "uml" if own_kernel => {
            Err(Failure::usage("--engine uml brings its own kernel: no --appliance-kernel"))
        }
        "uml" => Ok(user_mode(file_systems)?),
        "auto" if !own_kernel && probe() != KvmState::Real => match user_mode(file_systems) {
            Ok(runner) => Ok(runner),
            Err(error) => {
                app.tell(&format!("appliance: {error}"));
                other("auto", app)
            }
        },
        name => other(name, app),
    }
}

fn other(name: &str, app: &App) -> Outcome<Runner> {
    let chosen = choose(name, app)?;
    Ok(Runner { engine: chosen.engine, uml: None, append: chosen.append, memory_bytes: None })
}

/// An installed User-Mode Linux that knows these file systems.
fn user_mode(file_systems: &[&str]) -> Result<Runner> {
    let program = PROGRAMS.iter().find_map(|name| find(name)).ok_or_else(|| {
        Error::unsupported("no User-Mode Linux is installed").hint("Debian: user-mode-linux")
    })?;
    // A tmpfs with room is preferred, wherever it stands in this list.
    let directories = vec![std::env::temp_dir(), PathBuf::from("/dev/shm"), PathBuf::from("/tmp")];
    let engine = UmlEngine { program, directories };
    let modules = Path::new(MODULES).join(engine.release()?);
    let kernel = Kernel::from_uml(&modules, file_systems)?;
    if !kernel.missing.is_empty() {
        return Err(Error::unsupported(format!("{} has no {}", kernel.name, kernel.missing.join(", "))));
    }
    engine.check_room(UML_MEMORY)?;
    Ok(Runner { engine: Arc::new(engine), uml: Some(modules), append: "", memory_bytes: Some(UML_MEMORY) })
}

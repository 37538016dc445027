//! Threads that are inside KVM most of the time, and how to get them out.
//!
//! A signal makes `KVM_RUN` return. One that arrives in the moment before is lost, so it is sent until the thread has
//! ended; the thread looks at the power switch each time KVM returns.

use std::sync::Arc;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use block::{Error, Result};
use nix::libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::engine::Ending;
use crate::power::Power;

/// Enough for our code; the guest does not use it.
const STACK_BYTES: usize = 512 << 10;
const RETRY: Duration = Duration::from_millis(2);

extern "C" fn handler(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

fn signal() -> c_int {
    SIGRTMIN() + 1
}

/// Makes the signal harmless, once for the process.
fn install() -> Result<()> {
    static DONE: OnceLock<std::result::Result<(), c_int>> = OnceLock::new();
    DONE.get_or_init(|| register_signal_handler(signal(), handler).map_err(|e| e.errno())).map_err(|errno| {
        Error::from(std::io::Error::from_raw_os_error(errno)).context("cannot handle a signal")
    })
}

/// Starts a thread that can be kicked. Should it panic, the machine ends.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    power: Arc<Power>,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    install()?;
    let guard = EndOnPanic(power);
    Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let _guard = guard;
            body()
        })
        .map_err(|e| Error::from(e).context("cannot start a thread"))
}

struct EndOnPanic(Arc<Power>);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Ending::Stuck { reason: "a thread of the monitor panicked".into() });
        }
    }
}

/// Makes KVM return in a thread, once.
pub(crate) fn interrupt<T>(thread: &JoinHandle<T>) {
    if !thread.is_finished() {
        // Fails only for a thread that has just ended.
        let _ = thread.kill(signal());
    }
}

/// Gets a thread out of KVM and waits for its end; `None` if it panicked.
pub(crate) fn join<T>(thread: JoinHandle<T>, power: &Power) -> Option<T> {
    power.end(Ending::Stopped);
    while !thread.is_finished() {
        interrupt(&thread);
        std::thread::park_timeout(RETRY);
    }
    thread.join().ok()
}

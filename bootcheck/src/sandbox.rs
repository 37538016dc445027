//! What the threads that meet the guest may ask of the host.

/// What a thread does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Role {
    /// Runs a virtual processor.
    Processor,
    /// Serves a queue.
    Device,
}

/// Confines the calling thread.
pub(crate) fn enter(_role: Role) {}

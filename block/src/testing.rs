//! Fakes for tests: containers that fail, that lose power, disks that record what they are asked, and a disk
//! that is obviously right.

mod crash;
mod fault;
mod model;
mod random;
mod trace;

pub use crash::{CrashImage, CrashImages, CrashStorage};
pub use fault::{Fault, FaultStorage, Operation};
pub use model::{Model, Op};
pub use random::Random;
pub use trace::{Trace, TraceDevice};

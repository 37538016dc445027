//! Disk images of any format: opening them with their backing chains, creating, describing, measuring,
//! comparing and converting them.
//!
//! This crate holds what needs several formats at once and no terminal. A file name or option string
//! becomes a [`Spec`]; [`open()`] turns it into a chain of [`Layer`]s under a [`Policy`] that decides which
//! of the names found *inside* images may be followed; everything else works on layers.
//!
//! ```text
//!   "disk.qcow2", "json:{...}", "driver=raw,..."      Spec
//!                |  open (probe, lock, follow)
//!                v
//!   Layer qcow2 -> Layer qcow2 -> Layer raw           the chain, top first
//!                |
//!        info  map  check  measure  compare  convert
//! ```
//!
//! Nothing here prints, reads the environment, or looks at a terminal: warnings are values, progress goes
//! through [`progress::Progress`].

pub mod amend;
pub mod bench;
pub mod check;
pub mod checksum;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod create;
pub mod format;
pub(crate) mod formats;
pub mod info;
pub mod json;
pub mod map;
pub mod measure;
pub mod open;
pub mod options;
pub mod policy;
pub mod progress;
mod rate;
pub mod rebase;
pub mod secret;
pub mod spec;
pub mod suggest;
pub mod target;

pub use create::{CreateRequest, Created, PreparedCreate, create, prepare_create};
pub use format::Format;
pub use open::{BackingMode, Layer, OpenOptions, Share, open};
pub use policy::Policy;
pub use secret::Secrets;
pub use spec::Spec;

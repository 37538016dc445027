//! Registry hives of Windows (`regf`, versions 1.3 to 1.6): keys and values are found, set and made.
//!
//! ```text
//!   Hive        base block, bins, cells: what is allocated where         log    the transaction logs of a hive in use
//!     keys      nk with its lists of subkeys (lf, lh, li, ri)
//!     values    vk with its data, in itself, in a cell or in segments (db)
//! ```
//!
//! A hive is one piece of memory that is changed where it is: new cells go into new bins at its end, everything that is not
//! understood stays. Hives come from strangers' disks: every offset is checked, lists and depths are bounded by what the
//! hive's length allows.
//!
//! The format is not specified by Microsoft; this follows the public descriptions of it (M. Suhanov, "Windows registry file
//! format specification", CC BY 4.0).
#![forbid(unsafe_code)]

mod cells;
mod edit;
mod keys;
mod log;
mod names;
#[cfg(test)]
mod tests;
mod value;

pub use cells::Hive;
pub use keys::Key;
pub use value::Value;

//! One binary for the whole integration suite: it links once, and `cargo test -p tests NAME` picks from it.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod amend;
mod archive;
mod bench;
mod bitmap;
mod chains;
mod check;
mod checksum;
mod cli;
mod commit;
mod compare;
mod convert;
mod crash;
mod create;
mod dd;
mod devices;
mod encrypt;
mod faults;
mod foreign;
mod hostile;
mod info;
mod locks;
mod luks;
mod map;
mod measure;
mod node_options;
mod random_ops;
mod rebase;
mod replay;
mod resize;
mod snapshot;
mod stories;
mod table;
mod vhdx;
mod vmdk_stream;
mod vpc;

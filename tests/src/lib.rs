//! The harness of the integration suite.
//!
//! The suite (`suite/main.rs`) judges vimg by someone else's opinion wherever there is one: the same
//! command line is given to vimg and to the real qemu-img and everything they say is compared; images
//! made by the one are read, written and checked by the other. Where nobody else can judge, a plain
//! `Vec<u8>` does, which is a perfect disk.
//!
//! This library holds what the tests share:
//!
//! * [`command`] runs the tools, with time and memory limits, and keeps all they say.
//! * [`skip`] skips a test loudly when the machine lacks something (`requires!`).
//! * [`dir`] is a folder that a test works in, with both tools at hand.
//! * [`ops`] is a list of disk operations that can be given to qemu-io, to our own devices and to the model.
//! * [`shape`] is the matrix of qcow2 variants.
//! * [`forge`] writes qcow2 images that nobody should write.
//! * [`foreign`] writes images of formats that are only read, and archives.
//! * [`lab`] runs a script in a Linux of our own, with root, loop, nbd and KVM.
//! * [`fuzz`] has the bodies of the fuzz targets.
//! * [`server`] runs `vimg serve`, and scripts of libnbd's Python against it.
//! * [`edit`] changes file systems, and has a model of what should be in them.
//! * [`guest`] fills file systems and compares what is read back; [`guest_image`] puts whole disks together.
//!
//! A harness may panic and print: a failure here is the failure of the test that called it.
#![expect(clippy::unwrap_used, reason = "a panic in the harness is the failure of the test that called it")]

pub mod bits;
pub mod command;
pub mod dir;
pub mod edit;
pub mod foreign;
pub mod forge;
pub mod fuzz;
pub mod guest;
pub mod guest_image;
pub mod guests;
pub mod lab;
pub mod ops;
pub mod server;
pub mod shape;
pub mod skip;

pub use command::{Cmd, Ran, open_here};
pub use dir::Dir;
pub use ops::{Op, Ops};
pub use shape::Shape;

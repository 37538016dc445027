//! What is on the disks of a guest, read-only: systems, kernels and their drivers, boot loaders, names in use.

mod types;

pub use types::{
    DeviceName, Driver, DriverPlace, Init, Initramfs, InitramfsFile, Inspection, Interface, Kernel,
    LoaderConfig, Mount, Obstacle, System, SystemKind, Tools,
};

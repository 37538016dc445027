//! From another hypervisor's virtual machine to a KVM guest that boots.
//!
//! ```text
//!   VMX, OVF/OVA, .vbox, xl.cfg, libvirt XML, plain disks, a physical machine
//!        |  source                      what the other product wrote about the machine
//!        v
//!      Guest                            guest     the one description that all stages share
//!        |  inspect                     what is on its disks: system, kernels, drivers, boot loader
//!        v
//!    Inspection
//!        |  plan                        every change, with its reason and how to undo it; convert/ has the knowledge
//!        v
//!      Plan  --apply-->  overlay disks  through guestedit
//!        |
//!        v  target                      libvirt XML, a qemu command, OVF, KubeVirt, Proxmox
//! ```
//!
//! Nothing here prints, asks, or looks at the environment.
#![forbid(unsafe_code)]

pub mod apply;
pub mod convert;
pub mod guest;
pub mod initramfs;
pub mod inspect;
pub mod names;
pub mod p2v;
pub mod plan;
pub mod report;
pub mod source;
pub mod target;
pub mod view;

//! The few places where KVM's interface cannot be used safely through its crates, and descriptors that come by a
//! socket. All `unsafe` of the crate is here.
#![expect(unsafe_code, reason = "KVM maps guest memory by host address and answers in a union")]

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, FromRawFd as _, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use kvm_bindings::{KVM_EXIT_IO_OUT, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::memory::GuestRam;

/// A piece of guest memory that the guest cannot write.
#[derive(Debug)]
pub(crate) struct Rom(pub(crate) GuestMemoryMmap<()>);

/// The host's large pages, as which KVM can map guest memory that is aligned to them.
const LARGE_PAGE: usize = 2 << 20;

/// Guest memory and the mapping that it lies in, which has to live longer.
#[derive(Debug)]
pub(crate) struct LargePages {
    pub(crate) map: GuestMemoryMmap<()>,
    _reserved: Vec<MmapRegion<()>>,
}

impl LargePages {
    /// Anonymous memory at these addresses (start and length, in their order), zeroed, in large pages where the host
    /// has them: a guest that starts touches most of its memory for the first time, and each page then costs an exit.
    ///
    /// # Errors
    /// The host does not give that much address space.
    pub(crate) fn new(ranges: &[(u64, usize)]) -> io::Result<Self> {
        let (mut regions, mut reserved) = (vec![], vec![]);
        for (start, len) in ranges {
            let whole = len.checked_add(LARGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
            let whole = MmapRegion::<()>::new(whole).map_err(io::Error::other)?;
            let region = aligned(&whole, *len)?;
            let region =
                GuestRegionMmap::new(region, GuestAddress(*start)).ok_or(io::ErrorKind::InvalidInput)?;
            regions.push(region);
            reserved.push(whole);
        }
        let map = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self { map, _reserved: reserved })
    }
}

/// The first `len` bytes of `whole` that begin with a large page; `whole` is longer than that by one.
fn aligned(whole: &MmapRegion<()>, len: usize) -> io::Result<MmapRegion<()>> {
    let address = whole.as_ptr();
    let skipped = address.align_offset(LARGE_PAGE);
    if skipped.checked_add(len).is_none_or(|end| end > whole.size()) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    // SAFETY: `skipped` bytes, and `len` after them, have just been checked to lie within the mapping.
    let start = unsafe { address.add(skipped) };
    // SAFETY: advice for a range of our own mapping, which it does not change the contents of. Where it is not taken,
    // pages are small.
    unsafe { nix::libc::madvise(start.cast(), len, nix::libc::MADV_HUGEPAGE) };
    // SAFETY: the range lies within a live private mapping with these properties, which `LargePages` keeps until after
    // the region (its fields are dropped in order, and the region does not leave it); nobody accesses it by another way.
    unsafe { MmapRegion::build_raw(start, len, whole.prot(), whole.flags()) }.map_err(io::Error::other)
}

/// Gives all of `ram` and of `roms` to the machine, in as many slots from 0 as are returned. Both must be kept for as
/// long as the machine lives.
///
/// # Errors
/// KVM refuses.
pub(crate) fn map_memory(vm: &VmFd, ram: &GuestRam, roms: &[Rom], read_only: u32) -> io::Result<u32> {
    let regions = ram.map().iter().map(|r| (r, 0));
    let roms = roms.iter().flat_map(|rom| rom.0.iter().map(|r| (r, read_only)));
    let mut next = 0;
    for (slot, (region, flags)) in (0..).zip(regions.chain(roms)) {
        map_region(vm, slot, region, flags, true)?;
        next = slot + 1;
    }
    Ok(next)
}

/// Gives the one piece of `memory` to the machine as slot `slot` with `flags`, or takes it out again. It must be kept
/// for as long as the machine lives.
///
/// # Errors
/// KVM refuses.
pub(crate) fn show_memory(
    vm: &VmFd,
    slot: u32,
    memory: &GuestMemoryMmap<()>,
    flags: u32,
    shown: bool,
) -> io::Result<()> {
    memory.iter().take(1).try_for_each(|region| map_region(vm, slot, region, flags, shown))
}

fn map_region(vm: &VmFd, slot: u32, region: &GuestRegionMmap<()>, flags: u32, shown: bool) -> io::Result<()> {
    let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start_addr().0,
        // Nothing: the slot is taken out.
        memory_size: if shown { region.len() } else { 0 },
        userspace_addr: host as u64,
    };
    // SAFETY: the region describes a live private mapping of exactly this length (or nothing of it), made by
    // vm-memory, which nobody else unmaps: the callers keep it (`KvmVm` in `_ram`, `_roms` and `flash`, the probe in a
    // local variable) until after the machine's descriptor is closed. Guest and host access it only through
    // vm-memory's volatile accessors.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}

/// An access of the guest to a port: a string instruction makes `data` hold several of `size` bytes.
#[derive(Debug)]
pub(crate) struct PortExit<'a> {
    pub(crate) port: u16,
    pub(crate) size: usize,
    pub(crate) out: bool,
    pub(crate) data: &'a mut [u8],
}

/// What the processor wants of a port. To be called only after [`VcpuFd::run`] has returned a port access, and
/// before it is called again.
pub(crate) fn port_exit(vcpu: &mut VcpuFd, mapped_bytes: usize) -> Option<PortExit<'_>> {
    let run = vcpu.get_kvm_run();
    // SAFETY: the caller has seen KVM_EXIT_IO, for which the kernel has filled in this member; all members are
    // integers, so that any bytes are a value.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let len = size.checked_mul(usize::try_from(io.count).ok()?)?;
    let offset = usize::try_from(io.data_offset).ok()?;
    if size == 0 || offset.checked_add(len)? > mapped_bytes {
        return None;
    }
    let base = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: `run` is the beginning of a mapping of `mapped_bytes` (KVM_GET_VCPU_MMAP_SIZE), and the range has
    // just been checked to lie in it. The kernel does not touch it until the next KVM_RUN, for which the
    // processor has to be borrowed mutably again.
    let data = unsafe { std::slice::from_raw_parts_mut(base.add(offset), len) };
    Some(PortExit { port: io.port, size, out: u32::from(io.direction) == KVM_EXIT_IO_OUT, data })
}

/// Answers a read of memory that is none. To be called only after [`VcpuFd::run`] has returned one, and before it is
/// called again.
pub(crate) fn answer_read(vcpu: &mut VcpuFd, data: [u8; 8]) {
    // Writing to a member of the union is safe, whatever it holds.
    vcpu.get_kvm_run().__bindgen_anon_1.mmio.data = data;
}

/// The numbers of an internal error: suberror and data. To be called only after [`VcpuFd::run`] has returned one.
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    let run = vcpu.get_kvm_run();
    // SAFETY: the caller has seen KVM_EXIT_INTERNAL_ERROR, for which the kernel has filled in this member; all of
    // it are integers, so that any bytes are a value.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
    (internal.suberror, internal.data[..count].to_vec())
}

/// The most descriptors that may come with one read.
pub(crate) const MOST_FILES: usize = 8;

/// Reads from a socket, and what descriptors came with the bytes. 0 bytes: the other end is closed.
///
/// # Errors
/// As recvmsg(2); more than [`MOST_FILES`] descriptors.
pub(crate) fn receive(stream: &UnixStream, buf: &mut [u8]) -> io::Result<(usize, Vec<File>)> {
    let mut space = nix::cmsg_space!([RawFd; MOST_FILES]);
    let mut slices = [IoSliceMut::new(buf)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut files = vec![];
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            // SAFETY: the kernel has just opened these descriptors for this process, nobody else knows their numbers,
            // and each is in the list once.
            files.extend(descriptors.into_iter().map(|fd| unsafe { File::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, files))
}

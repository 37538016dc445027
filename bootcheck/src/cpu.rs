//! What a virtual processor is and in which state it begins.

use block::Result;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_msr_entry, kvm_segment, kvm_sregs};
use kvm_bindings::{kvm_cpuid_entry2, kvm_regs};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::boot::Entry;
use crate::kvm::refused;
use crate::memory::GuestRam;

/// Where the descriptor table of the entry state lies: null, null, code, data, task.
const GDT: u64 = 0x1000;
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Page tables that map the first 4 GiB to themselves in pages of 2 MiB: level 4, level 3, four of level 2.
const PAGE_TABLES: u64 = 0x9000;
const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 2 << 20;
/// A stack for an entry that might want one.
const STACK: u64 = 0x8ff0;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION: u64 = 0x10;
const CR0_NUMERIC: u64 = 0x20;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 0x20;
const EFER_LONG: u64 = 0x500;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
const MISC_FAST_STRING: u64 = 1;
/// MTRRs enabled, memory is write-back unless one says otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 0x400;
const DELIVERY_EXTINT: u32 = 0x700;

/// What processors can do: what KVM supports, and who they are among `count`.
pub(crate) struct Model {
    supported: CpuId,
    tsc_deadline: bool,
    count: u8,
}

impl Model {
    /// The model of this host for a machine of `count` processors.
    ///
    /// # Errors
    /// KVM does not say what it supports.
    pub(crate) fn new(kvm: &Kvm, count: u8) -> Result<Self> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("say what it supports"))?;
        Ok(Self { supported, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer), count })
    }

    /// Bits of the APIC id that number processors in their package.
    fn core_bits(&self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }

    fn cpuid(&self, index: u8) -> CpuId {
        let mut cpuid = self.supported.clone();
        for entry in cpuid.as_mut_slice() {
            self.adjust(entry, index);
        }
        cpuid
    }

    /// Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.
    fn adjust(&self, entry: &mut kvm_cpuid_entry2, index: u8) {
        let (id, count) = (u32::from(index), u32::from(self.count));
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xff | 8 << 8 | count << 16 | id << 24;
                entry.ecx |= 1 << 31 | u32::from(self.tsc_deadline) << 24;
                if count > 1 {
                    entry.edx |= 1 << 28;
                }
            }
            // Caches: the last level is shared by all, the others are each processor's own.
            4 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | shared.min(0xfff) << 14 | (count - 1).min(0x3f) << 26;
            }
            // No performance counters.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0xb | 0x1f => self.topology(entry, id),
            0x8000_0008 => entry.ecx = (count - 1) & 0xff | self.core_bits() << 12,
            // No encrypted memory: firmware that sees it reads registers that KVM does not have for every guest.
            0x8000_001f => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }

    /// One thread per core, all cores in one package.
    fn topology(&self, entry: &mut kvm_cpuid_entry2, id: u32) {
        let (eax, ebx, kind) = match entry.index {
            0 => (0, 1, 1),
            1 => (self.core_bits(), u32::from(self.count), 2),
            _ => (0, 0, 0),
        };
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (eax, ebx, entry.index & 0xff | kind << 8, id);
    }

    /// Tells processor `index` what it is.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn identify(&self, vcpu: &VcpuFd, index: u8) -> Result<()> {
        vcpu.set_cpuid2(&self.cpuid(index)).map_err(refused("take the processor's identity"))
    }

    /// Prepares processor `index`: identity, model-specific registers, and, unless it begins like a real one at the
    /// reset vector, the interrupt lines of its APIC.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn prepare(&self, vcpu: &VcpuFd, index: u8, entry: &Entry) -> Result<()> {
        self.identify(vcpu, index)?;
        set_msr(vcpu, MSR_MISC_ENABLE, MISC_FAST_STRING);
        if matches!(entry, Entry::Reset) {
            return Ok(());
        }
        set_msr(vcpu, MSR_MTRR_DEFAULT, MTRR_WRITE_BACK);
        set_lapic(vcpu)
    }
}

/// Registers that not every host's KVM has; the guest finds the reset value then.
fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) {
    if let Ok(msrs) = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]) {
        let _ = vcpu.set_msrs(&msrs);
    }
}

/// The PIC's interrupts come in at LINT0, NMIs at LINT1 (Intel MultiProcessor Specification 1.4, section 3.6.1).
fn set_lapic(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic().map_err(refused("show the local APIC"))?;
    for (at, delivery) in [(LAPIC_LVT_LINT0, DELIVERY_EXTINT), (LAPIC_LVT_LINT1, DELIVERY_NMI)] {
        for (slot, byte) in lapic.regs.iter_mut().skip(at).zip(delivery.to_le_bytes()) {
            *slot = byte.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(refused("take the local APIC"))
}

/// Puts the boot processor into the state in which `entry` begins, with the tables that it needs in `ram`.
///
/// # Errors
/// KVM refuses, or there is no memory for the tables.
pub(crate) fn set_entry(vcpu: &VcpuFd, ram: &GuestRam, entry: &Entry) -> Result<()> {
    let (rip, rbx, rsi, long) = match *entry {
        Entry::Reset => return Ok(()),
        Entry::Long { rip, rsi } => (rip, 0, rsi, true),
        Entry::Protected { rip, rbx, rsi } => (rip, rbx, rsi, false),
    };
    let mut sregs = vcpu.get_sregs().map_err(refused("show the segments"))?;
    set_segments(&mut sregs, ram, long)?;
    if long {
        set_paging(&mut sregs, ram)?;
    }
    vcpu.set_sregs(&sregs).map_err(refused("take the segments"))?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(refused("take the floating-point state"))?;
    let mut regs = kvm_regs { rip, rbx, rsi, rflags: 2, ..Default::default() };
    if long {
        (regs.rsp, regs.rbp) = (STACK, STACK);
    }
    vcpu.set_regs(&regs).map_err(refused("take the registers"))
}

/// Lets a guest use SSE without setting it up.
///
/// # Errors
/// KVM refuses.
pub(crate) fn allow_sse(vcpu: &VcpuFd) -> Result<()> {
    const CR4_FXSR: u64 = 0x200;
    let mut sregs = vcpu.get_sregs().map_err(refused("show the segments"))?;
    sregs.cr4 |= CR4_FXSR;
    vcpu.set_sregs(&sregs).map_err(refused("take the segments"))
}

fn set_segments(sregs: &mut kvm_sregs, ram: &GuestRam, long: bool) -> Result<()> {
    let flat = kvm_segment { base: 0, limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    let code = kvm_segment { selector: CODE, type_: 0xb, db: u8::from(!long), l: u8::from(long), ..flat };
    let data = kvm_segment { selector: DATA, type_: 3, db: 1, ..flat };
    let task = kvm_segment { selector: TASK, type_: 0xb, limit: 0x67, present: 1, ..Default::default() };
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (address, entry) in (GDT..).step_by(8).zip(table) {
        ram.write(address, &entry.to_le_bytes())?;
    }
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 5 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION | CR0_NUMERIC;
    sregs.cr4 = 0;
    sregs.efer = 0;
    Ok(())
}

/// A segment as a descriptor of the table (Intel SDM volume 3A, section 3.4.5).
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let access = u64::from(s.type_) | u64::from(s.s) << 4 | u64::from(s.dpl) << 5 | u64::from(s.present) << 7;
    let flags = u64::from(s.l) << 1 | u64::from(s.db) << 2 | u64::from(s.g) << 3;
    limit & 0xffff
        | (s.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (s.base >> 24 & 0xff) << 56
}

fn set_paging(sregs: &mut kvm_sregs, ram: &GuestRam) -> Result<()> {
    let (level3, level2) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    ram.write(PAGE_TABLES, &(level3 | PRESENT_WRITABLE).to_le_bytes())?;
    for i in 0..4 {
        ram.write(level3 + 8 * i, &((level2 + PAGE * i) | PRESENT_WRITABLE).to_le_bytes())?;
    }
    let mut pages = Vec::with_capacity(4 * 512 * 8);
    for i in 0..4 * 512 {
        pages.extend(((i * LARGE_PAGE) | LARGE | PRESENT_WRITABLE).to_le_bytes());
    }
    ram.write(level2, &pages)?;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PAGING;
    sregs.efer |= EFER_LONG;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_manuals_show() {
        let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
        let code64 = kvm_segment { type_: 0xb, l: 1, ..flat };
        let data = kvm_segment { type_: 3, db: 1, ..flat };
        assert_eq!(descriptor(&code64), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn processors_know_their_number_and_their_neighbours() {
        let entries: Vec<_> = [(1, 0), (0xb, 0), (0xb, 1), (0xb, 2), (4, 3), (0x8000_001f, 0)]
            .map(|(function, index)| kvm_cpuid_entry2 { function, index, eax: 0x63, ..Default::default() })
            .to_vec();
        let model = Model { supported: CpuId::from_entries(&entries).unwrap(), tsc_deadline: true, count: 3 };
        let cpuid = model.cpuid(2);
        let [leaf1, smt, core, end, cache, encryption] = cpuid.as_slice() else { panic!() };
        assert_eq!(
            (leaf1.ebx, leaf1.ecx, leaf1.edx),
            (2 << 24 | 3 << 16 | 8 << 8, 1 << 31 | 1 << 24, 1 << 28)
        );
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (0, 1, 0x100, 2));
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert_eq!((end.ebx, end.ecx), (0, 2));
        assert_eq!(cache.eax, 0x63 | 2 << 14 | 2 << 26);
        assert_eq!(encryption.eax, 0);
    }
}

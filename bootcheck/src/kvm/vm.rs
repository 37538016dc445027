//! The virtual machine as KVM has it: memory, interrupt controllers, message routing, doorbells.

use std::collections::BTreeMap;
use std::io;

use block::{Error, ErrorKind, Result, ResultExt as _};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_pit_config,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::DEVICE;
use crate::firmware::FlashMemory;
use crate::memory::{GuestRam, HIGH_START, IDENTITY_MAP, TSS_ADDRESS};
use crate::sys::{self, Rom};
use crate::vm::{Msi, Vm};

/// Pins of the IOAPIC.
const PINS: u32 = 24;
/// What KVM_CREATE_VM answers and every KVM since 2007 speaks.
const API_VERSION: i32 = 12;

/// The machine. The descriptor is closed before the memory that KVM knows goes away (fields are dropped in order).
#[derive(Debug)]
pub(crate) struct KvmVm {
    fd: VmFd,
    coalesces: bool,
    routes: Mutex<BTreeMap<u32, Msi>>,
    /// The flash for variables and the slot that it is.
    flash: Option<(FlashMemory, u32)>,
    _roms: Vec<Rom>,
    _ram: GuestRam,
}

/// An error of KVM, with what was to be done.
pub(crate) fn refused(what: &str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    let what = what.to_owned();
    move |error| Error::from(io::Error::from(error)).context(format!("KVM does not {what}"))
}

/// Opens KVM.
///
/// # Errors
/// It is not there, or not for us.
pub(crate) fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(io::Error::from).context(|| format!("cannot open '{DEVICE}'")).map_err(
        |e| match e.kind() {
            ErrorKind::Permission => e.hint("give the user access to it, usually by the group 'kvm'"),
            _ => e.hint(
                "this host offers no KVM here: load kvm_intel or kvm_amd, or give the container the device",
            ),
        },
    )?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(Error::unsupported(format!("'{DEVICE}' speaks version {other}, not {API_VERSION}"))),
    }
}

impl KvmVm {
    /// A machine with `ram`, interrupt controllers and timer, `firmware` (bytes, a multiple of 4 KiB) ending at 4 GiB,
    /// and `flash` where it says.
    ///
    /// # Errors
    /// KVM refuses something.
    pub(crate) fn new(
        kvm: &Kvm,
        ram: &GuestRam,
        firmware: Option<&[u8]>,
        flash: Option<FlashMemory>,
    ) -> Result<Self> {
        let fd = kvm.create_vm().map_err(refused("create a virtual machine"))?;
        fd.set_identity_map_address(IDENTITY_MAP).map_err(refused("take its identity map"))?;
        fd.set_tss_address(block::num::to_usize(TSS_ADDRESS)).map_err(refused("take its task segment"))?;
        fd.create_irq_chip().map_err(refused("create interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(refused("create a timer"))?;
        let roms = firmware.map(rom).transpose()?.into_iter().collect::<Vec<_>>();
        let not_taken = |e| Error::from(e).context("KVM does not take the guest's memory");
        let slot = sys::map_memory(&fd, ram, &roms, KVM_MEM_READONLY).map_err(not_taken)?;
        let flash = flash.map(|memory| (memory, slot));
        let coalesces = fd.check_extension(Cap::CoalescedPio);
        let vm = Self { fd, coalesces, routes: Mutex::default(), flash, _roms: roms, _ram: ram.clone() };
        vm.place_flash(true).map_err(not_taken)?;
        vm.set_routing(&BTreeMap::new())?;
        Ok(vm)
    }

    /// Whether [`coalesce`](Vm::coalesce) does anything.
    pub(crate) fn can_coalesce(&self) -> bool {
        self.coalesces
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    fn place_flash(&self, shown: bool) -> io::Result<()> {
        match &self.flash {
            Some((memory, slot)) => sys::show_memory(&self.fd, *slot, memory.map(), KVM_MEM_READONLY, shown),
            None => Ok(()),
        }
    }

    /// The whole table of interrupts: the legacy pins as a PC has them wired, and the messages.
    fn set_routing(&self, messages: &BTreeMap<u32, Msi>) -> Result<()> {
        let entries: Vec<_> =
            legacy_routes().chain(messages.iter().map(|(&gsi, &msi)| message_route(gsi, msi))).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::unsupported(format!("{} interrupt routes", entries.len())))?;
        self.fd.set_gsi_routing(&table).map_err(refused("take the interrupt routes"))
    }
}

fn rom(firmware: &[u8]) -> Result<Rom> {
    let len = firmware.len();
    if len == 0 || len > 16 << 20 || !len.is_multiple_of(4096) {
        return Err(Error::invalid(format!(
            "firmware of {len} bytes is not a multiple of 4 KiB up to 16 MiB"
        )));
    }
    let start = GuestAddress(HIGH_START - len as u64);
    let fail = |e: String| Error::new(ErrorKind::NoSpace, format!("no memory for the firmware: {e}"));
    let map = GuestMemoryMmap::from_ranges(&[(start, len)]).map_err(|e| fail(e.to_string()))?;
    map.write_slice(firmware, start).map_err(|e| fail(e.to_string()))?;
    Ok(Rom(map))
}

fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..kvm_irq_routing_entry::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

/// Interrupts 0 to 15 reach the PICs (but 2, which is their cascade) and the IOAPIC, the rest the IOAPIC alone; the
/// timer's comes in at pin 2 there, as the MADT says.
fn legacy_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pics = (0..16).filter(|&gsi| gsi != 2).map(|gsi| {
        let chip = if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        chip_route(gsi, chip, gsi % 8)
    });
    let ioapic = (0..PINS)
        .filter(|&gsi| gsi != 2)
        .map(|gsi| chip_route(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
    pics.chain(ioapic)
}

fn message_route(gsi: u32, message: Msi) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..kvm_irq_routing_entry::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: block::num::low_u32(message.address & 0xffff_ffff),
        address_hi: block::num::low_u32(message.address >> 32),
        data: message.data,
        ..kvm_irq_routing_msi::default()
    };
    entry
}

impl Vm for KvmVm {
    fn set_line(&self, gsi: u32, high: bool) {
        // Fails only for pins that do not exist.
        let _ = self.fd.set_irq_line(gsi, high);
    }

    fn route(&self, gsi: u32, message: Msi, fd: &EventFd) -> Result<()> {
        let mut routes = self.routes.lock();
        let mut wanted = routes.clone();
        let before = wanted.insert(gsi, message);
        self.set_routing(&wanted)?;
        if before.is_none() {
            self.fd.register_irqfd(fd, gsi).map_err(refused("connect an event with an interrupt"))?;
        }
        *routes = wanted;
        Ok(())
    }

    fn attach_doorbell(&self, address: u64, value: Option<u32>, fd: &EventFd) -> Result<()> {
        let address = IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.fd.register_ioevent(fd, &address, value),
            None => self.fd.register_ioevent(fd, &address, NoDatamatch),
        }
        .map_err(refused("connect an address with an event"))
    }

    fn detach_doorbell(&self, address: u64, value: Option<u32>, fd: &EventFd) {
        let address = IoEventAddress::Mmio(address);
        // Nothing to undo where nothing was attached.
        let _ = match value {
            Some(value) => self.fd.unregister_ioevent(fd, &address, value),
            None => self.fd.unregister_ioevent(fd, &address, NoDatamatch),
        };
    }

    fn show_flash(&self, shown: bool) {
        // Where it fails the guest reads the array although it wants the status, and sees that the flash is none.
        let _ = self.place_flash(shown);
    }

    fn coalesce(&self, port: u16, len: u8, on: bool) {
        if !self.coalesces {
            return;
        }
        let (address, len) = (IoEventAddress::Pio(u64::from(port)), u32::from(len));
        // Where it fails, every write is an exit.
        let _ = if on {
            self.fd.register_coalesced_mmio(address, len)
        } else {
            self.fd.unregister_coalesced_mmio(address, len)
        };
    }
}

//! The bodies of the fuzz targets: plain functions of bytes that may not panic, whatever the bytes are.

pub use crate::machine::fuzz::fuzz_platform;
pub use crate::pci::fuzz::fuzz_pci;
pub use crate::virtio::fuzz::{fuzz_virtio_queue, fuzz_virtio_registers};

use std::time::Duration;

use crate::boot::linux;
use crate::memory::GuestRam;
use crate::watch::{Expectations, Through, Watcher};

/// A kernel file of any kind, with and without an initramfs.
pub fn fuzz_kernel(data: &[u8]) {
    let Ok(ram) = GuestRam::new(32 << 20) else { return };
    let rsdp = crate::boot::layout::ACPI_START;
    let _ = linux::load(&ram, data, None, "console=ttyS0", rsdp);
    let _ = linux::load(&ram, data, Some(data), "", rsdp);
}

/// What a guest prints, in pieces: the input is a list of them, each with one byte for its length (7 bits) and for where
/// it goes (the console or the firmware's log), and now and then time passes. However much there is, what is kept of it
/// is not.
pub fn fuzz_console(data: &[u8]) {
    const MOST_KEPT: usize = 1 << 20;
    let through = data.len().is_multiple_of(2).then(Through::default);
    let expectations = Expectations::parse(&["login: $".to_owned(), "a+b".to_owned()], &[], false);
    let Ok(Ok(mut watcher)) = expectations.map(|expected| Watcher::new(expected, through)) else { return };
    let (mut rest, mut at) = (data, Duration::ZERO);
    while let Some((&head, more)) = rest.split_first() {
        let (piece, more) = more.split_at(more.len().min(usize::from(head & 0x7f)));
        rest = more;
        at += Duration::from_millis(u64::from(head));
        if head & 0x80 == 0 {
            watcher.feed(piece, at);
        } else {
            watcher.firmware_log(piece, at);
        }
        if head % 5 == 0 {
            watcher.tick(at);
            watcher.screen(&[String::from_utf8_lossy(piece).into_owned()], at);
        }
        let _ = (watcher.decision(), watcher.last_line(), watcher.silent_since());
    }
    let watched = format!("{:?}", watcher.finish(at));
    assert!(watched.len() <= MOST_KEPT, "{} bytes are kept", watched.len());
}

//! Bodies of the fuzz targets for descriptions of machines.

use block::testing::Random;
use v2v::guest::Guest;
use v2v::source::{Kind, read_bytes};

/// A VMX file.
pub fn source_vmx(bytes: &[u8]) {
    understood(Kind::Vmx, bytes);
}

/// An OVF description.
pub fn source_ovf(bytes: &[u8]) {
    let _ = v2v::source::systems(bytes);
    understood(Kind::Ovf, bytes);
}

/// A `.vbox` file.
pub fn source_vbox(bytes: &[u8]) {
    understood(Kind::VirtualBox, bytes);
}

/// A configuration of Xen's.
pub fn source_xl(bytes: &[u8]) {
    understood(Kind::Xen, bytes);
}

/// A domain of libvirt's, and what Hyper-V writes.
pub fn source_libvirt(bytes: &[u8]) {
    understood(Kind::Libvirt, bytes);
    understood(Kind::HyperV, bytes);
}

/// What is understood is no larger than what was said, and has the forms that its users rely on.
fn understood(kind: Kind, bytes: &[u8]) {
    let Ok(guest) = read_bytes(kind, bytes) else { return };
    let said = bytes.len();
    assert!(guest.disks.len() + guest.removables.len() + guest.nics.len() <= said, "more devices than bytes");
    assert!(notes_len(&guest) <= 4096 + 300 * said, "endless notes");
    for mac in guest.nics.iter().filter_map(|nic| nic.mac.as_deref()) {
        assert!(mac.len() == 17 && !mac.contains(|c: char| c.is_ascii_uppercase()), "{mac}");
    }
    for uuid in [&guest.uuid, &guest.genid].into_iter().flatten() {
        assert_eq!(uuid.len(), 36, "{uuid}");
    }
    if let (Some(count), Some((sockets, cores, threads))) = (guest.cpus.count, guest.cpus.topology) {
        assert_eq!(u64::from(sockets) * u64::from(cores) * u64::from(threads), u64::from(count));
    }
}

fn notes_len(guest: &Guest) -> usize {
    guest.notes.iter().map(String::len).sum()
}

/// A description with pieces taken out, doubled, or replaced by what parsers stumble over.
pub fn damaged(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    const PIECES: &[&[u8]] = &[
        b"18446744073709551615",
        b"-1",
        b"\"",
        b"'",
        b"=",
        b"<",
        b"/>",
        b"]]>",
        b"&#0;",
        b"${x}",
        b"|22",
        b"|C3",
        b"\\x",
        b"[",
        b",",
        b"\n",
        b"\0",
        b"\xff",
        b"../..",
        b"json:{}",
        b"byte * 2^63",
        b"ovf:/disk/",
        b":",
        b"xmlns:a='b' ",
        b"\xef\xbb\xbf",
    ];
    let mut out = bytes.to_vec();
    for _ in 0..=random.below(4) {
        let place = |random: &mut Random, len: usize| usize::try_from(random.below(len as u64 + 1)).unwrap();
        let at = place(random, out.len());
        let end = (at + place(random, 40)).min(out.len());
        match random.below(3) {
            0 => drop(out.drain(at..end)),
            1 => {
                let piece = out[at..end].to_vec();
                let to = place(random, out.len());
                out.splice(to..to, piece);
            }
            _ => {
                let piece = PIECES[place(random, PIECES.len() - 1)];
                out.splice(at..at, piece.iter().copied());
            }
        }
    }
    out
}

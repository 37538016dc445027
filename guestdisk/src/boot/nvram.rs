//! The boot entries in the NVRAM of a UEFI machine, as OVMF keeps it in a file.
//!
//! The file is a firmware volume (UEFI PI 1.8, volume 3, 3.2.1) with a store of authenticated variables behind its header:
//!
//! ```text
//!   zeros, GUID, length, "_FVH", attributes, header length ..      the volume
//!   GUID, size, format 0x5a, state 0xfe                            the store
//!   0x55aa, state, attributes, .. name size, data size, GUID,      a variable, from a multiple of 4 bytes on;
//!   name (UCS-2), data                                             as many as there are
//! ```
//!
//! `BootOrder` holds the numbers of the entries `Boot0000` .. that are tried, in their order; what an entry holds is
//! described in UEFI 2.10, 3.1.3 (load options) and 10.3 (device paths).

use std::collections::BTreeMap;
use std::fmt;

use block::{Error, Result};

use crate::bytes::{byte, le16, le32, le64, part, utf16};
use crate::guid::Guid;

/// The store of authenticated variables.
const STORE: &str = "aaf32c78-947b-439a-a180-2e144ec37792";
/// The vendor of the variables that UEFI itself defines.
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// Lengths of the headers of a store and of a variable.
const STORE_HEADER: usize = 28;
const VARIABLE_HEADER: usize = 60;
/// A variable that counts is in this state, or is about to be replaced by one that is not there yet.
const ADDED: u8 = 0x3f;
const IN_DELETION: u8 = 0x3e;
/// The most variables, and the most nodes of a device path, that are looked at.
const MOST_VARIABLES: usize = 4096;
const MOST_NODES: usize = 32;

/// A boot entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvramEntry {
    /// Its number: `Boot0001` has 1.
    pub number: u16,
    /// What the menu shows.
    pub description: String,
    /// It is tried (`LOAD_OPTION_ACTIVE`).
    pub active: bool,
    /// The GUID of the GPT partition that it names, if it names one.
    pub partition: Option<Guid>,
    /// The program, if it names one: `\EFI\debian\shimx64.efi`.
    pub path: Option<String>,
}

/// `Boot0003 "debian" \EFI\debian\shimx64.efi`
impl fmt::Display for NvramEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Boot{:04X} \"{}\"", self.number, self.description)?;
        if let Some(path) = &self.path {
            write!(f, " {path}")?;
        }
        if self.active { Ok(()) } else { f.write_str(" (inactive)") }
    }
}

/// The boot entries that a variable store holds, in the order in which they are tried; those that the order does not name
/// are not tried, and left out.
///
/// # Errors
/// `Invalid` if it is no variable store of OVMF's.
pub fn boot_entries(store: &[u8]) -> Result<Vec<NvramEntry>> {
    let variables = variables(store)?;
    let order = variables.get("BootOrder").copied().unwrap_or_default();
    let entry = |number: u16| load_option(number, variables.get(&*format!("Boot{number:04X}"))?);
    Ok(order.chunks_exact(2).filter_map(|number| entry(le16(number, 0))).collect())
}

/// UEFI's own variables, by name.
fn variables(store: &[u8]) -> Result<BTreeMap<String, &[u8]>> {
    if part(store, 0x28, 4) != b"_FVH" {
        return Err(Error::invalid(
            "this is no variable store of a UEFI firmware (it does not begin as a firmware volume)",
        ));
    }
    let mut at = usize::from(le16(store, 0x30));
    if Some(crate::bytes::guid(store, at).mixed_endian()) != Guid::parse(STORE) {
        return Err(Error::invalid("the firmware volume holds no store of authenticated variables"));
    }
    let size = block::num::to_usize(le32(store, at + 16).into());
    let end = at.saturating_add(size).min(store.len());
    at += STORE_HEADER;
    let mut found = BTreeMap::new();
    for _ in 0..MOST_VARIABLES {
        at = at.next_multiple_of(4);
        if at.saturating_add(VARIABLE_HEADER) > end || le16(store, at) != 0x55aa {
            break;
        }
        let state = byte(store, at + 2);
        let (name_len, data_len) = (size_of_field(store, at + 36), size_of_field(store, at + 40));
        let vendor = crate::bytes::guid(store, at + 44).mixed_endian();
        let name_at = at + VARIABLE_HEADER;
        let Some(next) = name_at.checked_add(name_len).and_then(|at| at.checked_add(data_len)) else { break };
        if next > end {
            break;
        }
        let name = utf16(part(store, name_at, name_len));
        let counts = state == ADDED || state == IN_DELETION && !found.contains_key(&name);
        if counts && Some(vendor) == Guid::parse(GLOBAL) {
            found.insert(name, part(store, name_at + name_len, data_len));
        }
        at = next;
    }
    Ok(found)
}

fn size_of_field(store: &[u8], at: usize) -> usize {
    block::num::to_usize(le32(store, at).into())
}

/// A load option: attributes, the length of the device path, a description, the device path.
fn load_option(number: u16, data: &[u8]) -> Option<NvramEntry> {
    if data.len() < 6 {
        return None;
    }
    let description = utf16(&data[6..]);
    let text_len = 2 * (description.encode_utf16().count() + 1);
    let path = part(data, 6 + text_len, usize::from(le16(data, 4)));
    let mut entry =
        NvramEntry { number, description, active: le32(data, 0) & 1 != 0, partition: None, path: None };
    let mut at = 0;
    for _ in 0..MOST_NODES {
        let node_len = usize::from(le16(path, at + 2));
        if node_len < 4 || at + node_len > path.len() {
            break;
        }
        let node = &path[at..at + node_len];
        match (node[0], node[1]) {
            // Media: hard drive, of a GPT.
            (4, 1) if byte(node, 41) == 2 => {
                entry.partition = Some(crate::bytes::guid(node, 24).mixed_endian());
            }
            // Media: file path.
            (4, 4) => entry.path = Some(utf16(&node[4..])),
            (0x7f, _) => break,
            _ => {}
        }
        at += node_len;
    }
    Some(entry)
}

/// How many bytes the volume says that it has; for callers that compare it with its file.
pub fn volume_len(store: &[u8]) -> Option<u64> {
    (part(store, 0x28, 4) == b"_FVH").then(|| le64(store, 0x20))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(state: u8, name: &str, data: &[u8]) -> Vec<u8> {
        let name: Vec<u8> = name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
        let mut bytes = vec![0xaa, 0x55, state, 0];
        bytes[..2].copy_from_slice(&0x55aa_u16.to_le_bytes());
        bytes.extend([7, 0, 0, 0]);
        bytes.extend([0; 28]);
        bytes.extend(u32::try_from(name.len()).unwrap().to_le_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        bytes.extend(Guid::parse(GLOBAL).unwrap().mixed_endian().as_bytes());
        bytes.extend(name);
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0xff);
        bytes
    }

    fn option(active: u32, description: &str, path: &[u8]) -> Vec<u8> {
        let mut bytes = active.to_le_bytes().to_vec();
        bytes.extend(u16::try_from(path.len()).unwrap().to_le_bytes());
        bytes.extend(description.encode_utf16().chain([0]).flat_map(u16::to_le_bytes));
        bytes.extend(path);
        bytes
    }

    fn file_path(text: &str) -> Vec<u8> {
        let text: Vec<u8> = text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
        let mut node = vec![4, 4];
        node.extend(u16::try_from(text.len() + 4).unwrap().to_le_bytes());
        node.extend(text);
        node
    }

    fn store(variables: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = vec![0; 0x48];
        bytes[0x20..0x28].copy_from_slice(&0x1_0000_u64.to_le_bytes());
        bytes[0x28..0x2c].copy_from_slice(b"_FVH");
        bytes[0x30] = 0x48;
        bytes.extend(Guid::parse(STORE).unwrap().mixed_endian().as_bytes());
        bytes.extend(0xffb8_u32.to_le_bytes());
        bytes.extend([0x5a, 0xfe, 0, 0, 0, 0, 0, 0]);
        bytes.extend(variables.iter().flatten());
        bytes.resize(0x1_0000, 0xff);
        bytes
    }

    #[test]
    fn entries_in_their_order() {
        let mut path = vec![4, 1, 42, 0];
        path.extend([0; 20]);
        let partition = Guid::parse("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        path.extend(partition.mixed_endian().as_bytes());
        path.extend([2, 2]);
        path.extend(file_path(r"\EFI\debian\shimx64.efi"));
        path.extend([0x7f, 0xff, 4, 0]);
        let store = store(&[
            variable(0x3c, "BootOrder", &[9, 0]),
            variable(ADDED, "Boot0001", &option(1, "debian", &path)),
            variable(ADDED, "Boot000A", &option(0, "old", &[])),
            variable(ADDED, "Boot0007", &option(1, "not in the order", &[])),
            variable(IN_DELETION, "BootOrder", &[7, 0]),
            variable(ADDED, "BootOrder", &[10, 0, 1, 0, 5, 0]),
        ]);
        let entries = boot_entries(&store).unwrap();
        let texts: Vec<_> = entries.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["Boot000A \"old\" (inactive)", r#"Boot0001 "debian" \EFI\debian\shimx64.efi"#]);
        assert_eq!(entries[1].partition, Some(partition));
        assert_eq!(volume_len(&store), Some(0x1_0000));
        // Cut off anywhere, or with any byte changed, it is no reason to panic.
        for at in 0..0x300 {
            let _ = boot_entries(&store[..at]);
            let mut bad = store.clone();
            bad[at] ^= 0xff;
            let _ = boot_entries(&bad);
        }
    }

    #[test]
    fn what_is_no_store() {
        boot_entries(&[0; 100]).unwrap_err();
        let mut other = store(&[]);
        assert_eq!(boot_entries(&other).unwrap(), []);
        other[0x48] ^= 1;
        assert!(boot_entries(&other).unwrap_err().to_string().contains("authenticated"));
    }
}

//! How large a file an image will be, before it is made.

use block::num::align_up;

use crate::create::refcount_clusters;
use crate::geometry::{Geometry, MAX_L1_BYTES};

/// Bytes that an image takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// With the data there is now.
    pub required: u64,
    /// When every byte of the disk has been written.
    pub fully_allocated: u64,
}

/// Measures an image of a disk of `size` bytes of which `allocated` bytes (counted in whole clusters of the
/// new image) are to be stored, without snapshots, bitmaps or encryption, as `qemu-img measure` does.
///
/// # Errors
/// `Usage`: a disk of that size needs larger clusters.
pub fn measure(geometry: &Geometry, size: u64, allocated: u64) -> block::Result<Measure> {
    let too_large = || block::Error::usage("The image size is too large (try using a larger cluster size)");
    let data = align_up(size, geometry.cluster_size()).ok_or_else(too_large)?;
    let data_clusters = geometry.cluster_of(data);
    let l2_clusters = data_clusters.div_ceil(geometry.l2_entries());
    if l2_clusters * 8 > MAX_L1_BYTES {
        return Err(too_large());
    }
    let tables = 1 + l2_clusters + geometry.clusters_for(l2_clusters * 8);
    let (table, blocks) = refcount_clusters(geometry, tables + data_clusters);
    let metadata = geometry.offset_of(tables + table + blocks);
    let fully_allocated = metadata.checked_add(data).ok_or_else(too_large)?;
    let stored = align_up(allocated, geometry.cluster_size()).unwrap_or(data).min(data);
    Ok(Measure { required: metadata + stored, fully_allocated })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// What qemu-img says, `None` if there is none.
    fn qemus(geometry: &Geometry, size: u64) -> Option<String> {
        let options = format!(
            "cluster_size={},refcount_bits={},extended_l2={}",
            geometry.cluster_size(),
            1u64 << geometry.refcount_order,
            if geometry.extended_l2 { "on" } else { "off" }
        );
        let arguments = ["measure", "-O", "qcow2", "-o", &options, "--size", &size.to_string()];
        let Ok(output) = Command::new("qemu-img").args(arguments).output() else {
            eprintln!("SKIPPED: no qemu-img to compare with");
            return None;
        };
        let text = [output.stdout, output.stderr].concat();
        Some(String::from_utf8_lossy(&text).replace("qemu-img: ", ""))
    }

    fn ours(geometry: &Geometry, size: u64) -> String {
        match measure(geometry, size, 0) {
            Ok(Measure { required, fully_allocated }) => {
                format!("required size: {required}\nfully allocated size: {fully_allocated}\n")
            }
            Err(error) => format!("{error}\n"),
        }
    }

    #[test]
    fn sizes_are_what_qemu_img_says() {
        let sizes =
            [0, 1, 1_000_000, 100 << 20, (1 << 30) + 1, 3 << 40, 200 << 40, 5 << 50, i64::MAX as u64 & !511];
        for cluster_bits in [9, 12, 14, 16, 21] {
            for (refcount_order, extended_l2) in [(0, false), (4, false), (6, false), (4, true)] {
                let geometry = Geometry { cluster_bits, refcount_order, extended_l2 };
                if extended_l2 && cluster_bits < 14 {
                    continue;
                }
                for size in sizes {
                    let Some(theirs) = qemus(&geometry, size) else { return };
                    assert_eq!(ours(&geometry, size), theirs, "{geometry:?} {size}");
                }
            }
        }
    }

    #[test]
    fn stored_data_is_counted_in_clusters_up_to_the_whole_disk() {
        let geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false };
        let empty = measure(&geometry, 1 << 30, 0).unwrap();
        assert_eq!(measure(&geometry, 1 << 30, 1).unwrap().required, empty.required + 0x10000);
        let full = measure(&geometry, 1 << 30, u64::MAX).unwrap();
        assert_eq!(full.required, full.fully_allocated);
    }
}

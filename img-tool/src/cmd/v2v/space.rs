//! Whether what is going to be written has room, told before it is written.
//!
//! What is certain (disks as they are, space that is reserved) has to fit. Of what is compressed (`-c`, OVF and OVA) only
//! the most that it can take is known: where that does not fit, it is said.

use block::{Error, ErrorKind, Stored};
use image::Format;

use super::stages::Opened;
use super::{Args, describe, place};
use crate::exit::Outcome;

/// Kept free in the output's file system, for metadata.
const MARGIN: u64 = 16 << 20;
/// Of qcow2's metadata, what a table of the second level maps: clusters of 64 KiB, 8 bytes each.
const TABLE: u64 = 64 << 10;
const MAPPED: u64 = 512 << 20;

/// What a disk takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Content {
    /// As the guest sees it.
    size: u64,
    /// Of that, what is stored.
    data: u64,
    /// How many parts of [`MAPPED`] bytes hold data.
    parts: u64,
}

/// What the outputs take together, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Need {
    /// That is certain.
    certain: u64,
    /// The most that it can be.
    most: u64,
}

/// Which outputs there are.
#[derive(Debug, Clone, Copy)]
struct Outputs {
    format: Format,
    /// Disks of their own, beside those of packages.
    disks: bool,
    compress: bool,
    preallocation: Preallocation,
    /// OVF folders and OVA files, which are compressed.
    packages: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Preallocation {
    Off,
    Metadata,
    Everything,
}

impl Content {
    fn of(disk: &Opened) -> block::Result<Self> {
        let device = disk.device();
        let mut content = Self { size: device.size(), ..Self::default() };
        let mut counted = None;
        for extent in block::extent::extents(device, 0, device.size()) {
            let extent = extent?;
            if matches!(extent.stored, Stored::Data | Stored::Compressed) && extent.len > 0 {
                content.data = content.data.saturating_add(extent.len);
                let (first, last) = (extent.offset / MAPPED, (extent.offset + extent.len - 1) / MAPPED);
                content.parts += last - first + u64::from(counted != Some(first));
                counted = Some(last);
            }
        }
        Ok(content)
    }

    /// As a disk of this format, without compression.
    fn stored(&self, outputs: &Outputs) -> u64 {
        let everything = outputs.preallocation == Preallocation::Everything;
        let data = if everything { self.size } else { self.data };
        if outputs.format != Format::Qcow2 {
            return data;
        }
        let all = self.size.div_ceil(MAPPED);
        let tables = if outputs.preallocation == Preallocation::Off { self.parts } else { all };
        // Two bytes of every cluster's references, and the tables above.
        data.saturating_add(tables.saturating_mul(TABLE)).saturating_add(data >> 15).saturating_add(4 * TABLE)
    }

    /// The most that it takes when it is compressed: what does not get smaller is kept, with its head.
    fn packed(&self) -> u64 {
        self.data.saturating_add(self.data >> 7)
    }
}

impl Outputs {
    fn of(args: &Args, format: Format) -> Self {
        let packages = args.target.iter().filter(|target| matches!(target.as_str(), "ovf" | "ova")).count();
        Self {
            format,
            disks: describe::wants_disks(&args.target),
            compress: args.compress,
            preallocation: match args.preallocation.as_str() {
                "off" => Preallocation::Off,
                "metadata" => Preallocation::Metadata,
                _ => Preallocation::Everything,
            },
            packages: u64::try_from(packages).unwrap_or(u64::MAX),
        }
    }

    fn need(&self, contents: &[Content]) -> Need {
        let mut need = Need { certain: MARGIN, most: MARGIN };
        for content in contents {
            let packages = content.packed().saturating_mul(self.packages);
            need.most = need.most.saturating_add(packages);
            if !self.disks {
                continue;
            }
            let stored = content.stored(self);
            need.most = need.most.saturating_add(stored);
            // Space that is reserved is taken whatever comes into it.
            if !self.compress || self.preallocation == Preallocation::Everything {
                need.certain = need.certain.saturating_add(stored);
            }
        }
        need
    }
}

/// Refuses what cannot fit; what may not is said in the answer.
pub(super) fn check(
    opened: &[Opened],
    place: &place::Place,
    args: &Args,
    format: Format,
) -> Outcome<Option<String>> {
    let Ok(stat) = nix::sys::statvfs::statvfs(place.directory()) else { return Ok(None) };
    let free = stat.fragment_size().saturating_mul(stat.blocks_available());
    let contents = opened.iter().map(Content::of).collect::<block::Result<Vec<_>>>()?;
    let need = Outputs::of(args, format).need(&contents);
    let (human, folder) = (block::size::human, place.directory().display());
    if need.certain > free && !args.force {
        let message = format!(
            "what is to be written takes up to {}, but only {} are free in '{folder}'",
            human(need.certain),
            human(free)
        );
        return Err(Error::new(ErrorKind::NoSpace, message)
            .hint("choose another --output-dir, or try in spite of it: --force")
            .into());
    }
    Ok((need.most > free).then(|| {
        format!(
            "What is written takes up to {} where nothing gets smaller by compression; {} were free in '{folder}'.",
            human(need.most),
            human(free)
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn outputs() -> Outputs {
        Outputs {
            format: Format::Raw,
            disks: true,
            compress: false,
            preallocation: Preallocation::Off,
            packages: 0,
        }
    }

    fn contents() -> [Content; 2] {
        [Content { size: 10 * GIB, data: GIB, parts: 3 }, Content { size: 4 * GIB, data: 2 * GIB, parts: 4 }]
    }

    #[test]
    fn every_output_is_counted() {
        let need = |outputs: Outputs| outputs.need(&contents());
        let plain = 3 * GIB + MARGIN;
        assert_eq!(need(outputs()), Need { certain: plain, most: plain });
        let packed = 3 * GIB + ((3 * GIB) >> 7);
        // Packages are written beside the disks, and each of them has all.
        let both = need(Outputs { packages: 2, ..outputs() });
        assert_eq!(both, Need { certain: plain, most: plain + 2 * packed });
        let alone = need(Outputs { packages: 1, disks: false, ..outputs() });
        assert_eq!(alone, Need { certain: MARGIN, most: packed + MARGIN });
        let compressed = need(Outputs { compress: true, format: Format::Qcow2, ..outputs() });
        assert!(compressed.certain == MARGIN && compressed.most > plain, "{compressed:?}");
        let full = need(Outputs { preallocation: Preallocation::Everything, ..outputs() });
        assert_eq!(full.certain, 14 * GIB + MARGIN);
    }

    #[test]
    fn metadata_of_qcow2_is_counted() {
        let need = |preallocation| {
            Outputs { format: Format::Qcow2, preallocation, ..outputs() }.need(&contents()).certain - MARGIN
        };
        let fixed = ((3 * GIB) >> 15) + 8 * TABLE;
        assert_eq!(need(Preallocation::Off), 3 * GIB + 7 * TABLE + fixed);
        assert_eq!(need(Preallocation::Metadata), 3 * GIB + 28 * TABLE + fixed);
        assert!(need(Preallocation::Everything) > 14 * GIB);
    }
}

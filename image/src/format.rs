//! The formats that can be opened and created: one place to add another.

/// A disk image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// A LUKS container, version 1: the encrypted bytes of the disk behind a header.
    Luks,
    /// VHD, the format of Virtual PC, Hyper-V and Azure.
    Vpc,
    /// VirtualBox's disks.
    Vdi,
    /// QEMU's copy on write, version 1 (read only).
    Qcow,
    /// QEMU's enhanced disk (read only).
    Qed,
    /// Parallels' expandable images (read only).
    Parallels,
    /// Compressed loop images (read only).
    Cloop,
    /// Growing images of Bochs (read only).
    Bochs,
    /// Apple's disk images (read only).
    Dmg,
    /// VMware's disks: a descriptor and its extents.
    Vmdk,
    /// Hyper-V's VHDX.
    Vhdx,
}

impl Format {
    /// Every format.
    pub const ALL: &'static [Self] = &[
        Self::Raw,
        Self::Qcow2,
        Self::Luks,
        Self::Vmdk,
        Self::Vhdx,
        Self::Vdi,
        Self::Qcow,
        Self::Qed,
        Self::Parallels,
        Self::Cloop,
        Self::Bochs,
        // Known by their ends: asked when nothing else is recognised.
        Self::Vpc,
        Self::Dmg,
    ];

    /// qemu's name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Luks => "luks",
            Self::Vpc => "vpc",
            Self::Vdi => "vdi",
            Self::Qcow => "qcow",
            Self::Qed => "qed",
            Self::Parallels => "parallels",
            Self::Cloop => "cloop",
            Self::Bochs => "bochs",
            Self::Dmg => "dmg",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|format| format.name() == name)
    }

    /// How many bytes from the start of a file `probe` wants to see.
    pub const PROBE_LEN: usize = 2048;

    /// The format that `first_bytes` of a file announce, of those without a driver. `None`: none of these.
    pub(crate) fn probe(first_bytes: &[u8]) -> Option<Self> {
        if first_bytes.starts_with(crypt::luks::MAGIC) {
            return Some(Self::Luks);
        }
        qcow2::Header::probe(first_bytes).then_some(Self::Qcow2)
    }

    /// What can be done with its images, if it has a driver.
    fn abilities(self) -> Option<crate::formats::Abilities> {
        crate::formats::driver(self).map(crate::formats::Driver::abilities)
    }

    /// Whether new images of this format can be made.
    pub fn can_create(self) -> bool {
        self.abilities().is_none_or(|abilities| abilities.create)
    }

    /// Whether images of this format can store compressed clusters.
    pub fn can_compress(self) -> bool {
        self.abilities().map_or(matches!(self, Self::Qcow2), |abilities| abilities.compress)
    }

    /// Whether every byte of the disk has its place in the file from the start, whatever the order of writes.
    pub fn has_fixed_places(self) -> bool {
        self.abilities().map_or(matches!(self, Self::Raw | Self::Luks), |abilities| abilities.fixed_places)
    }

    /// Whether a new image reads as zeros (an encrypted one reads as noise).
    pub const fn starts_as_zeros(self) -> bool {
        !matches!(self, Self::Luks)
    }

    /// Whether images of this format can name a backing file.
    pub fn has_backing(self) -> bool {
        self.abilities().map_or(matches!(self, Self::Qcow2), |abilities| abilities.backing)
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Formats of qemu that are not read here, by their first bytes: offset, bytes, name.
const FOREIGN: &[(usize, &[u8], &str)] = &[(0, b"LUKS\xba\xbe", "luks version 2")];

/// The name of the format that qemu would recognise and that is not read here. Taking such a file for raw would
/// give the guest the container instead of the disk.
pub(crate) fn foreign(first_bytes: &[u8]) -> Option<&'static str> {
    let found =
        |offset: usize, magic: &[u8]| first_bytes.get(offset..).is_some_and(|bytes| bytes.starts_with(magic));
    FOREIGN.iter().find(|(offset, magic, _)| found(*offset, magic)).map(|(_, _, name)| *name)
}

/// The error for an image of such a format.
pub(crate) fn not_readable(name: &str) -> block::Error {
    block::Error::unsupported(format!(
        "the file looks like a {name} image, a format that this version of vimg does not read"
    ))
    .hint("if its bytes as they are are the disk, say so with -f raw")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_other_formats_are_not_taken_for_raw() {
        assert_eq!(foreign(b"LUKS\xba\xbe\0\x02"), Some("luks version 2"));
        assert_eq!(foreign(&[0; 512]), None);
        assert_eq!(foreign(b""), None);
    }

    #[test]
    fn names_round_trip() {
        for &format in Format::ALL {
            assert_eq!(Format::from_name(format.name()), Some(format));
        }
        assert_eq!(Format::from_name("qcow9"), None);
    }

    #[test]
    fn probing_goes_by_content() {
        assert_eq!(Format::probe(b"QFI\xfb\0\0\0\x03"), Some(Format::Qcow2));
        assert_eq!(Format::probe(b"QFI\xfb\0\0\0\x01"), None, "version 1 is another format");
        assert_eq!(Format::probe(b"LUKS\xba\xbe\0\x01"), Some(Format::Luks));
        assert_eq!(Format::probe(b"LUKS\xba\xbe\0\x02"), None, "version 2 is another format");
        assert_eq!(Format::probe(b""), None);
    }
}

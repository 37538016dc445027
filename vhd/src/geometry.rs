//! Cylinders, heads and sectors per track, which some programs take for the size of the disk.
//!
//! Virtual PC's disks are ATA disks that are addressed by cylinder, head and sector, and it gives the guest exactly
//! as many sectors as that can address. A disk whose size is not such a product is seen with different sizes by
//! different programs, unless it is rounded up, as qemu-img does and this crate does too.

/// The three numbers of an ATA disk (specification, "Hard Disk Footer Format", field Disk Geometry).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads per cylinder.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}

impl Geometry {
    /// The largest that there is: what every disk above 127.5 GiB has.
    pub const MAX: Self = Self { cylinders: 65535, heads: 16, sectors: 255 };

    /// How many sectors it addresses.
    pub const fn sectors(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors as u64
    }

    /// The geometry of a disk of so many sectors; it addresses at most so many. Specification, "Appendix: CHS
    /// Calculation".
    pub fn below(sectors: u64) -> Self {
        let total = sectors.min(Self::MAX.sectors());
        let (per_track, heads) = shape(total);
        let cylinders = total / per_track / heads;
        Self {
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
            heads: u8::try_from(heads).unwrap_or(u8::MAX),
            sectors: u8::try_from(per_track).unwrap_or(u8::MAX),
        }
    }

    /// The smallest geometry of that kind that addresses at least so many sectors; [`MAX`](Self::MAX) where none does.
    pub fn covering(sectors: u64) -> Self {
        if sectors == 0 {
            return Self::default();
        }
        // The product falls short of the total by less than one cylinder, so this ends soon.
        (sectors..=Self::MAX.sectors()).map(Self::below).find(|g| g.sectors() >= sectors).unwrap_or(Self::MAX)
    }
}

/// Sectors per track and heads for a disk of `total` sectors.
fn shape(total: u64) -> (u64, u64) {
    if total >= 65535 * 16 * 63 {
        return (255, 16);
    }
    let tracks = total / 17;
    let heads = tracks.div_ceil(1024).max(4);
    if tracks < heads * 1024 && heads <= 16 {
        return (17, heads);
    }
    if total / 31 < 16 * 1024 { (31, 16) } else { (63, 16) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(g: Geometry) -> (u16, u8, u8) {
        (g.cylinders, g.heads, g.sectors)
    }

    /// Sectors asked for, and what qemu-img 10.0.2 made of them.
    #[test]
    fn sizes_are_rounded_as_qemu_img_rounds_them() {
        let measured = [
            (1, (1, 4, 17)),
            (69, (2, 4, 17)),
            (1000, (15, 4, 17)),
            (69632, (820, 5, 17)),
            (87040, (854, 6, 17)),
            (180_556, (966, 11, 17)),
            (278_527, (562, 16, 31)),
            (278_533, (562, 16, 31)),
            (507_901, (504, 16, 63)),
            (1_032_192, (1024, 16, 63)),
            (66_058_272, (65534, 16, 63)),
            (66_059_279, (16191, 16, 255)),
            (66_059_281, (16192, 16, 255)),
            (267_378_720, (65534, 16, 255)),
            (267_378_721, (65535, 16, 255)),
            (267_382_800, (65535, 16, 255)),
            (267_382_801, (65535, 16, 255)),
            (4_278_190_080, (65535, 16, 255)),
        ];
        for (sectors, expected) in measured {
            assert_eq!(numbers(Geometry::covering(sectors)), expected, "{sectors}");
        }
    }

    #[test]
    fn a_geometry_covers_what_it_was_made_for() {
        for sectors in (1..3_000_000).step_by(997).chain(65535 * 16 * 63 - 5..65535 * 16 * 63 + 5) {
            let g = Geometry::covering(sectors);
            assert!(g.sectors() >= sectors && Geometry::below(sectors).sectors() <= sectors, "{sectors}");
        }
        assert_eq!(Geometry::covering(u64::MAX), Geometry::MAX);
        assert_eq!(Geometry::below(0).sectors(), 0);
    }
}

//! What reads of a disk tell: which part of the boot the guest has come to, also if it says nothing.
//!
//! Before the run somebody who can read the disk marks what matters on it ([`Landmark`]); during the run each read is
//! compared with the marks. A firmware reads the first sector, or the EFI system partition; a boot loader its own second
//! stage, then a kernel; and nobody but a kernel reads megabytes of the root file system besides.

use std::time::Duration;

use crate::pattern::Milestone;

/// So much of the root file system, besides kernel and initramfs, is read by nobody but a kernel that has mounted it:
/// boot loaders read directories, modules, fonts.
pub const ROOT_BYTES: u64 = 6 << 20;
/// Bytes of a sector.
const SECTOR: u64 = 512;
/// The most ranges of a landmark that are kept.
const MOST_RANGES: usize = 4096;

/// What lies at a place of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// The first sector.
    BootSector,
    /// What the boot sector goes on with: the gap behind it, a BIOS boot partition, the first sector of the active one.
    SecondStage,
    /// The EFI system partition.
    EfiPartition,
    /// The kernel that would be started.
    Kernel,
    /// An initramfs that would be loaded.
    Initrd,
    /// The root file system.
    Root,
}

impl Part {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BootSector => "boot-sector",
            Self::SecondStage => "second-stage",
            Self::EfiPartition => "efi-partition",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Root => "root",
        }
    }

    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::BootSector => "the boot sector",
            Self::SecondStage => "the boot loader's second stage",
            Self::EfiPartition => "the EFI system partition",
            Self::Kernel => "the kernel",
            Self::Initrd => "the initramfs",
            Self::Root => "the root file system",
        }
    }

    /// The station that a first read proves.
    const fn proves(self, by_firmware: bool) -> Milestone {
        match self {
            _ if by_firmware => Milestone::DiskSeen,
            Self::BootSector | Self::EfiPartition | Self::Root => Milestone::DiskSeen,
            Self::SecondStage | Self::Kernel | Self::Initrd => Milestone::BootLoader,
        }
    }
}

/// A part of a disk that tells something when it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Landmark {
    /// What it is.
    pub part: Part,
    /// Its name for people: a file, a partition.
    pub name: String,
    /// The disk, by its place in the machine.
    pub disk: usize,
    /// Where it lies: first sector and number of sectors, of 512 bytes.
    pub sectors: Vec<(u64, u64)>,
    /// The firmware itself reads it: a kernel that is its own boot loader.
    pub by_firmware: bool,
}

impl Landmark {
    /// Its length in bytes.
    fn len(&self) -> u64 {
        self.sectors
            .iter()
            .take(MOST_RANGES)
            .fold(0, |sum: u64, (_, len)| sum.saturating_add(len.saturating_mul(SECTOR)))
    }

    /// Bytes that the read and this have in common.
    fn common(&self, disk: usize, sector: u64, sectors: u64) -> u64 {
        if disk != self.disk {
            return 0;
        }
        let end = sector.saturating_add(sectors);
        let of = |&(first, len): &(u64, u64)| {
            end.min(first.saturating_add(len)).saturating_sub(sector.max(first)).saturating_mul(SECTOR)
        };
        self.sectors.iter().take(MOST_RANGES).map(of).sum()
    }
}

/// What has been read of a landmark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// What it is.
    pub part: Part,
    /// Its name for people.
    pub name: String,
    /// When it was first read, from the start of the run.
    pub first: Duration,
    /// Bytes that were read, again and again included.
    pub bytes: u64,
    /// How many it has.
    pub len: u64,
}

impl Reading {
    /// Whether as many bytes were read as it has.
    pub fn is_whole(&self) -> bool {
        self.bytes >= self.len
    }

    /// `the kernel (/boot/vmlinuz)`
    pub fn words(&self) -> String {
        format!("{} ({})", self.part.words(), self.name)
    }
}

/// Compares reads with landmarks.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    landmarks: Vec<Landmark>,
    readings: Vec<Option<Reading>>,
    /// The root file system has been told of.
    root_told: bool,
}

/// What a read proves: a station, and why.
pub(crate) type Proof = (Milestone, String);

impl Trace {
    /// Begins with these landmarks.
    pub fn new(landmarks: Vec<Landmark>) -> Self {
        let readings = vec![None; landmarks.len()];
        Self { landmarks, readings, root_told: false }
    }

    /// A read of a disk; what it proves, if that is new.
    pub(crate) fn read(&mut self, disk: usize, sector: u64, sectors: u64, at: Duration) -> Option<Proof> {
        let mut proof: Option<Proof> = None;
        // What belongs to a file does not count for the file system in which it lies.
        let mut file_bytes: u64 = 0;
        let in_order = |part| matches!(part, Part::Kernel | Part::Initrd);
        for files in [true, false] {
            for (landmark, reading) in self.landmarks.iter().zip(&mut self.readings) {
                if in_order(landmark.part) != files {
                    continue;
                }
                let mut bytes = landmark.common(disk, sector, sectors);
                if files {
                    file_bytes = file_bytes.saturating_add(bytes);
                } else if landmark.part == Part::Root {
                    bytes = bytes.saturating_sub(file_bytes);
                }
                if bytes == 0 {
                    continue;
                }
                let is_new = reading.is_none();
                let reading = reading.get_or_insert_with(|| Reading {
                    part: landmark.part,
                    name: landmark.name.clone(),
                    first: at,
                    bytes: 0,
                    len: landmark.len(),
                });
                reading.bytes = reading.bytes.saturating_add(bytes);
                let proves = landmark.part.proves(landmark.by_firmware);
                if is_new && proof.as_ref().is_none_or(|(known, _)| *known < proves) {
                    proof = Some((proves, format!("{} is read", reading.words())));
                }
                if landmark.part == Part::Root && reading.bytes >= ROOT_BYTES && !self.root_told {
                    self.root_told = true;
                    let why = format!("more than {} MiB of {} are read", ROOT_BYTES >> 20, reading.words());
                    proof = Some((Milestone::RootMounted, why));
                }
            }
        }
        proof
    }

    /// Whether all of a kernel has been read.
    pub fn has_loaded_kernel(&self) -> bool {
        self.readings.iter().flatten().any(|reading| reading.part == Part::Kernel && reading.is_whole())
    }

    /// What has been read, in the order of time.
    pub fn readings(&self) -> Vec<Reading> {
        let mut readings: Vec<_> = self.readings.iter().flatten().cloned().collect();
        readings.sort_by_key(|reading| reading.first);
        readings
    }

    /// Whether something lies at this place of a disk that is part of the root file system.
    pub fn root_holds(&self, disk: usize, sector: u64) -> bool {
        self.landmarks.iter().any(|mark| mark.part == Part::Root && mark.common(disk, sector, 1) > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(part: Part, sectors: &[(u64, u64)]) -> Landmark {
        Landmark { part, name: "x".to_owned(), disk: 0, sectors: sectors.to_vec(), by_firmware: false }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn trace() -> Trace {
        Trace::new(vec![
            mark(Part::BootSector, &[(0, 1)]),
            mark(Part::SecondStage, &[(1, 2047)]),
            mark(Part::Kernel, &[(10_000, 8), (12_000, 20_000)]),
            mark(Part::Root, &[(2048, 100_000)]),
        ])
    }

    #[test]
    fn a_boot_by_its_reads() {
        let mut trace = trace();
        assert_eq!(trace.read(0, 0, 1, at(1)).unwrap().0, Milestone::DiskSeen);
        assert_eq!(trace.read(0, 0, 1, at(1)), None, "once is enough");
        assert_eq!(trace.read(1, 1, 9, at(1)), None, "another disk");
        let (milestone, why) = trace.read(0, 1, 63, at(2)).unwrap();
        assert_eq!((milestone, &*why), (Milestone::BootLoader, "the boot loader's second stage (x) is read"));
        assert_eq!(trace.read(0, 2050, 2, at(3)).unwrap().0, Milestone::DiskSeen);
        // The kernel's bytes are not the root's.
        assert_eq!(trace.read(0, 12_000, 20_000, at(4)).unwrap().0, Milestone::BootLoader);
        assert_eq!(trace.read(0, 40_000, 12_000, at(5)), None);
        let (milestone, why) = trace.read(0, 60_000, 400, at(6)).unwrap();
        assert_eq!(
            (milestone, &*why),
            (Milestone::RootMounted, "more than 6 MiB of the root file system (x) are read")
        );
        assert_eq!(trace.read(0, 70_000, 4000, at(7)), None);
        let readings = trace.readings();
        let bytes: Vec<_> = readings.iter().map(|reading| (reading.part, reading.bytes >> 9)).collect();
        assert_eq!(
            bytes,
            [(Part::BootSector, 2), (Part::SecondStage, 63), (Part::Root, 16_402), (Part::Kernel, 20_000)]
        );
        assert!(trace.root_holds(0, 2048) && !trace.root_holds(0, 2047) && !trace.root_holds(1, 2048));
    }

    #[test]
    fn numbers_at_the_end_of_the_world() {
        let mut trace = Trace::new(vec![mark(Part::Root, &[(u64::MAX, u64::MAX)])]);
        assert_eq!(trace.read(0, u64::MAX - 1, u64::MAX, at(0)), None);
        assert_eq!(trace.read(0, 0, u64::MAX, at(0)), None);
    }
}

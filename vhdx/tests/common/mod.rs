//! Images for tests: created ones, and differencing ones put together byte by byte.

use std::sync::Arc;

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::testing::Random;
use block::{BlockDevice, Storage};
use vhdx::create::{CreateOptions, create};
use vhdx::{OpenOptions, Source, Vhdx};

pub(crate) fn open(
    storage: &Arc<dyn Storage>,
    writable: bool,
    parent: Option<&Arc<dyn BlockDevice>>,
) -> Arc<Vhdx> {
    let source = Source::read(storage).unwrap();
    Vhdx::open(source, OpenOptions { writable, parent: parent.cloned() }).unwrap()
}

/// What an image under test looks like at first.
#[derive(Debug, Clone)]
pub(crate) enum Shape {
    /// As it is created.
    Plain(CreateOptions),
    /// Over a parent.
    Differencing(Differencing),
}

/// An image of six blocks, one in each state, over a parent of noise that is a little shorter.
#[derive(Debug, Clone)]
pub(crate) struct Differencing {
    pub(crate) sector_size: u32,
    pub(crate) seed: u64,
}

type Made = (Arc<dyn Storage>, Option<Arc<dyn BlockDevice>>, Vec<u8>);

impl Shape {
    /// The file, the parent, and the bytes of the disk.
    pub(crate) fn make(&self) -> Made {
        match self {
            Self::Plain(options) => {
                let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
                create(&*storage, options).unwrap();
                (storage, None, vec![0; usize::try_from(options.size).unwrap()])
            }
            Self::Differencing(shape) => shape.make(),
        }
    }
}

const BLOCK: usize = 1 << 20;
/// States of the blocks, as in the file.
const STATES: [u64; 7] = [0, 1, 2, 3, 6, 7, 7];

impl Differencing {
    fn make(&self) -> Made {
        let size = STATES.len() * BLOCK - 4096;
        let mut random = Random::new(self.seed);
        let mut below = vec![0; size - 2 * 4096];
        random.fill(&mut below);
        let raw = Raw::open(Arc::new(MemStorage::from_bytes(below.clone())), RawOptions::default());
        let parent: Arc<dyn BlockDevice> = Arc::new(raw.unwrap());
        below.resize(size, 0);
        let (storage, bytes) = self.file(&below, &mut random);
        (storage, Some(parent), bytes)
    }

    /// The file, and what the disk shows over `below`.
    fn file(&self, below: &[u8], random: &mut Random) -> (Arc<dyn Storage>, Vec<u8>) {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
        let options = CreateOptions {
            block_size: Some(BLOCK as u64),
            logical_sector_size: self.sector_size,
            block_state_zero: false,
            ..CreateOptions::new(below.len() as u64)
        };
        create(&*storage, &options).unwrap();
        set_parent(&*storage, r".\parent.vhdx");
        let mut shown = below.to_vec();
        let mut end = storage.len().unwrap();
        let bitmap_at = end;
        end += BLOCK as u64;
        let mut bits = vec![0u8; BLOCK];
        let sector = self.sector_size as usize;
        for (block, state) in STATES.into_iter().enumerate() {
            let range = block * BLOCK..((block + 1) * BLOCK).min(shown.len());
            let mut entry = state;
            match state {
                0 => {}
                1..=3 => shown[range].fill(0),
                _ => {
                    let mut data = vec![0; BLOCK];
                    random.fill(&mut data);
                    storage.write_at(&data, end).unwrap();
                    entry |= end;
                    end += BLOCK as u64;
                    for (nth, bytes) in shown[range].chunks_mut(sector).enumerate() {
                        // Runs of both kinds, some of them long.
                        let own = state == 6 || (nth / 37) % 3 == 1 || (nth < 20 && random.once_in(2));
                        if own {
                            bytes.copy_from_slice(&data[nth * sector..][..bytes.len()]);
                        }
                        if own && state == 7 {
                            let bit = block * BLOCK / sector + nth;
                            bits[bit / 8] |= 1 << (bit % 8);
                        }
                    }
                }
            }
            storage.write_at(&entry.to_le_bytes(), (2 << 20) + block as u64 * 8).unwrap();
        }
        storage.write_at(&bits, bitmap_at).unwrap();
        let ratio = (1u64 << 23) * u64::from(self.sector_size) / BLOCK as u64;
        storage.write_at(&(bitmap_at | 6).to_le_bytes(), (2 << 20) + ratio * 8).unwrap();
        (storage, shown)
    }
}

/// Gives a created image a parent locator. The BAT has to be at 2 MiB, the metadata at 3 MiB.
pub(crate) fn set_parent(storage: &dyn Storage, path: &str) {
    let metadata = 3u64 << 20;
    let locator = locator(path, "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}");
    let mut entry =
        vec![0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c];
    entry.extend(0x11000u32.to_le_bytes());
    entry.extend(u32::try_from(locator.len()).unwrap().to_le_bytes());
    entry.extend([4, 0, 0, 0, 0, 0, 0, 0]);
    storage.write_at(&entry, metadata + 6 * 32).unwrap();
    storage.write_at(&[6], metadata + 10).unwrap();
    storage.write_at(&locator, metadata + 0x11000).unwrap();
    storage.write_at(&[2], metadata + 0x10004).unwrap();
}

fn locator(path: &str, linkage: &str) -> Vec<u8> {
    let pairs = [("parent_linkage", linkage), ("relative_path", path)];
    let mut head = vec![
        0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13, 0, 0,
        2, 0,
    ];
    let mut strings: Vec<u8> = vec![];
    for (key, value) in pairs {
        let mut add = |text: &str| {
            let at = u32::try_from(20 + 24 + strings.len()).unwrap();
            strings.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            (at, u16::try_from(text.len() * 2).unwrap())
        };
        let ((key_at, key_len), (value_at, value_len)) = (add(key), add(value));
        head.extend(key_at.to_le_bytes());
        head.extend(value_at.to_le_bytes());
        head.extend(key_len.to_le_bytes());
        head.extend(value_len.to_le_bytes());
    }
    [head, strings].concat()
}

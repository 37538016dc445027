//! Writes images of the formats that are only read here, and archives: small generators, from the specifications.
//!
//! What a generator makes is given to qemu-img as well, so that both are judged.

use std::io::Write as _;

const SECTOR: usize = 512;

fn zlib(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn bzip2(data: &[u8]) -> Vec<u8> {
    let mut encoder = ::bzip2::write::BzEncoder::new(vec![], ::bzip2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Data as gzip.
pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A disk with text, noise and zeros in it, `len` bytes long.
pub fn disk(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut random = block::testing::Random::new(len as u64);
    for (index, chunk) in bytes.chunks_mut(40_960).enumerate() {
        match index % 4 {
            0 => random.fill(chunk),
            1 => chunk
                .iter_mut()
                .enumerate()
                .for_each(|(at, byte)| *byte = u8::try_from(at / 100 % 251).unwrap()),
            2 => {}
            _ => chunk.fill(u8::try_from(index % 256).unwrap()),
        }
    }
    bytes
}

/// A cloop image, version 2, with blocks of `block` bytes.
pub fn cloop(data: &[u8], block: usize) -> Vec<u8> {
    let mut image =
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n".to_vec();
    image.resize(128, 0);
    let blocks: Vec<_> = data
        .chunks(block)
        .map(|chunk| {
            let mut whole = chunk.to_vec();
            whole.resize(block, 0);
            zlib(&whole)
        })
        .collect();
    image.extend(u32::try_from(block).unwrap().to_be_bytes());
    image.extend(u32::try_from(blocks.len()).unwrap().to_be_bytes());
    let mut offset = (136 + 8 * (blocks.len() + 1)) as u64;
    for block in &blocks {
        image.extend(offset.to_be_bytes());
        offset += block.len() as u64;
    }
    image.extend(offset.to_be_bytes());
    image.extend(blocks.concat());
    image
}

/// A growing image of Bochs, `version` 1 or 2, with extents of `extent` bytes. Extents are laid out from the last to
/// the first; sectors of zeros are not written.
pub fn bochs(data: &[u8], extent: usize, version: u32) -> Vec<u8> {
    let catalog = data.len().div_ceil(extent) + 3;
    let bitmap = (extent / SECTOR).div_ceil(8);
    let word = |value: usize| u32::try_from(value).unwrap().to_le_bytes();
    let mut image = b"Bochs Virtual HD Image".to_vec();
    image.resize(32, 0);
    image.extend(b"Redolog\0\0\0\0\0\0\0\0\0Growing\0\0\0\0\0\0\0\0\0");
    image.extend((version << 16).to_le_bytes());
    for value in [512, catalog, bitmap, extent] {
        image.extend(word(value));
    }
    if version == 2 {
        image.extend([0; 4]);
    }
    image.extend((data.len() as u64).to_le_bytes());
    image.resize(512, 0);
    let mut entries = vec![u32::MAX; catalog];
    let mut extents = vec![];
    for (index, chunk) in data.chunks(extent).enumerate().collect::<Vec<_>>().into_iter().rev() {
        if chunk.iter().all(|byte| *byte == 0) {
            continue;
        }
        entries[index] = u32::try_from(extents.len()).unwrap();
        let mut bits = vec![0_u8; bitmap.next_multiple_of(SECTOR)];
        for (sector, bytes) in chunk.chunks(SECTOR).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                bits[sector / 8] |= 1 << (sector % 8);
            }
        }
        let mut whole = chunk.to_vec();
        whole.resize(extent, 0);
        extents.push([bits, whole].concat());
    }
    image.extend(entries.into_iter().flat_map(u32::to_le_bytes));
    image.extend(extents.concat());
    image
}

/// A Parallels image with the old magic: clusters of 63 sectors, which begin anywhere.
pub fn old_parallels(data: &[u8]) -> Vec<u8> {
    const TRACKS: usize = 63;
    let entries = data.len().div_ceil(TRACKS * SECTOR);
    let mut image = b"WithoutFreeSpace".to_vec();
    for value in [2, 16, 100, TRACKS, entries, data.len() / SECTOR, 0, 0, 0, 0, 0, 0] {
        image.extend(u32::try_from(value).unwrap().to_le_bytes());
    }
    let mut place = (64 + 4 * entries).div_ceil(SECTOR);
    let mut clusters = vec![];
    for chunk in data.chunks(TRACKS * SECTOR) {
        let stored = chunk.iter().any(|byte| *byte != 0);
        image.extend(u32::try_from(if stored { place } else { 0 }).unwrap().to_le_bytes());
        if stored {
            let mut whole = chunk.to_vec();
            whole.resize(TRACKS * SECTOR, 0);
            place += TRACKS;
            clusters.push(whole);
        }
    }
    image.resize(image.len().next_multiple_of(SECTOR), 0);
    image.extend(clusters.concat());
    image
}

/// How a chunk of a [`dmg`] is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    Raw,
    /// zlib.
    Zlib,
    /// bzip2.
    Bzip2,
    /// Apple Data Compression, literals only.
    Adc,
}

impl Packing {
    fn pack(self, chunk: &[u8]) -> (u32, Vec<u8>) {
        match self {
            Self::Raw => (1, chunk.to_vec()),
            Self::Zlib => (0x8000_0005, zlib(chunk)),
            Self::Bzip2 => (0x8000_0006, bzip2(chunk)),
            Self::Adc => {
                let run = |bytes: &[u8]| [&[0x80 | u8::try_from(bytes.len() - 1).unwrap()], bytes].concat();
                (0x8000_0004, chunk.chunks(128).flat_map(run).collect())
            }
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for (index, group) in bytes.chunks(3).enumerate() {
        let bits =
            group.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= group.len() { char::from(letter) } else { '=' });
        }
        if index % 16 == 15 {
            text.push_str("\n\t\t\t\t");
        }
    }
    text
}

/// An Apple disk image with two partitions, chunks of 64 KiB, packed in turn as `packings` say; chunks of zeros are not
/// stored. With `fork`, the tables are in a resource fork instead of a property list.
pub fn dmg(data: &[u8], packings: &[Packing], fork: bool) -> Vec<u8> {
    const CHUNK: usize = 64 << 10;
    let mut image = vec![];
    let half = data.len() / 2 / SECTOR * SECTOR;
    let mut tables = vec![];
    for (first, part) in [(0, &data[..half]), (half, &data[half..])] {
        let mut chunks = vec![];
        for (index, chunk) in part.chunks(CHUNK).enumerate() {
            let (kind, packed) = if chunk.iter().all(|byte| *byte == 0) {
                (if index % 2 == 0 { 0 } else { 2 }, vec![])
            } else {
                packings[index % packings.len()].pack(chunk)
            };
            chunks.extend([kind, 0].into_iter().flat_map(u32::to_be_bytes));
            let place = [index * CHUNK / SECTOR, chunk.len() / SECTOR, image.len(), packed.len()];
            chunks.extend(place.into_iter().flat_map(|value| (value as u64).to_be_bytes()));
            image.extend(packed);
        }
        let count = chunks.len() / 40 + 2;
        for kind in [0x7fff_fffe_u32, 0xffff_ffff] {
            let end = [part.len() / SECTOR, 0, image.len(), 0];
            chunks.extend([kind, 0].into_iter().flat_map(u32::to_be_bytes));
            chunks.extend(end.into_iter().flat_map(|value| (value as u64).to_be_bytes()));
        }
        let mut table = b"mish\0\0\0\x01".to_vec();
        let head = [first / SECTOR, part.len() / SECTOR, 0];
        table.extend(head.into_iter().flat_map(|value| (value as u64).to_be_bytes()));
        table.resize(200, 0);
        table.extend(u32::try_from(count).unwrap().to_be_bytes());
        table.extend(chunks);
        tables.push(table);
    }
    let offset = image.len();
    image.extend(if fork { resource_fork(&tables) } else { property_list(&tables) });
    let len = image.len() - offset;
    let mut koly = b"koly\0\0\0\x04\0\0\x02\0\0\0\0\x01".to_vec();
    koly.resize(512, 0);
    let mut put = |at: usize, value: usize| koly[at..at + 8].copy_from_slice(&(value as u64).to_be_bytes());
    put(32, offset);
    if fork {
        put(40, offset);
        put(48, len);
    } else {
        put(216, offset);
        put(224, len);
    }
    put(492, data.len() / SECTOR);
    image.extend(koly);
    image
}

fn property_list(tables: &[Vec<u8>]) -> Vec<u8> {
    let entry = |table: &Vec<u8>| {
        format!(
            "\t\t\t<dict>\n\t\t\t\t<key>Attributes</key>\n\t\t\t\t<string>0x0050</string>\n\t\t\t\t<key>Data</key>\n\t\t\t\t<data>\n\t\t\t\t{}\n\t\t\t\t</data>\n\t\t\t\t<key>ID</key>\n\t\t\t\t<string>0</string>\n\t\t\t</dict>\n",
            base64(table)
        )
    };
    let entries: String = tables.iter().map(entry).collect();
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE plist PUBLIC \"-//Apple Computer//DTD PLIST 1.0//EN\" \
         \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n<plist version=\"1.0\">\n<dict>\n\t<key>resource-fork</key>\n\t<dict>\n\
         \t\t<key>blkx</key>\n\t\t<array>\n{entries}\t\t</array>\n\t</dict>\n</dict>\n</plist>\n"
    )
    .into_bytes()
}

fn resource_fork(tables: &[Vec<u8>]) -> Vec<u8> {
    let word = |value: usize| u32::try_from(value).unwrap().to_be_bytes();
    let data: Vec<u8> = tables.iter().flat_map(|table| [&word(table.len())[..], table].concat()).collect();
    let mut fork = [word(256), word(256 + data.len()), word(data.len()), word(0)].concat();
    fork.resize(256, 0);
    fork.extend(data);
    fork
}

/// A tar archive (ustar) of these members.
pub fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = vec![];
    for (name, contents) in members {
        let mut header = vec![0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", contents.len()).as_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte: &u8| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        archive.extend(header);
        archive.extend(*contents);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

//! Volumes of the test builder: what must be true of any. What cryptsetup makes is read in the integration suite.

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};

use super::*;
use crate::luks2::testing::{DATA_OFFSET, PASSPHRASE, header, volume};
use crate::luks2::{Kdf, Metadata};

fn argon(time: u32, memory: u32) -> Kdf {
    Kdf::Argon2 { id: true, time, memory, lanes: 1, salt: vec![3; 32] }
}

fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    let storage = Arc::new(MemStorage::from_bytes(bytes));
    Arc::new(Raw::open(storage, RawOptions::default()).unwrap())
}

fn open(disk: &Arc<dyn BlockDevice>) -> Result<Decrypted> {
    let container = Container::read(disk)?;
    let key = container.unlock(disk, PASSPHRASE, &mut Effort::default())?;
    container.open(disk, &key)
}

fn metadata(bytes: Vec<u8>) -> Result<Box<Metadata>> {
    match Container::read(&disk(bytes))? {
        Container::Two(metadata) => Ok(metadata),
        Container::One(_) => panic!("it is LUKS2"),
    }
}

#[test]
fn what_is_written_is_read_at_any_offset() {
    for sector in [512, 4096] {
        let (bytes, _) = volume(&argon(1, 32), sector, 40 << 10);
        let disk = disk(bytes);
        let inner = open(&disk).unwrap();
        let mut expected = vec![0; 40 << 10];
        inner.read_at(&mut expected, 0).unwrap();
        let mut random = block::testing::Random::new(5);
        for _ in 0..60 {
            let mut at = [0; 3];
            random.fill(&mut at);
            let at_usize = usize::from(u16::from_le_bytes([at[0], at[1]])) % expected.len();
            let len = (usize::from(at[2]) * 41).min(expected.len() - at_usize);
            let mut data = vec![0; len];
            random.fill(&mut data);
            inner.write_at(&data, at_usize as u64).unwrap();
            expected[at_usize..at_usize + len].copy_from_slice(&data);
            let mut part = vec![0; len];
            inner.read_at(&mut part, at_usize as u64).unwrap();
            assert_eq!(part, data);
        }
        inner.write_zeroes_at(777, 9000, ZeroMode::ALLOCATE).unwrap();
        expected[777..9777].fill(0);
        let mut all = vec![0; expected.len()];
        open(&disk).unwrap().read_at(&mut all, 0).unwrap();
        assert!(all == expected);
        inner.read_at(&mut [0; 2], (40 << 10) - 1).unwrap_err();
    }
}

#[test]
fn the_newer_whole_copy_counts() {
    let (good, json) = volume(&argon(1, 32), 512, 512);
    assert_eq!(metadata(good.clone()).unwrap().sequence, 5);
    let mut newer = good.clone();
    newer[16 << 10..32 << 10].copy_from_slice(&header(json.as_bytes(), 9)[16 << 10..]);
    assert_eq!(metadata(newer.clone()).unwrap().sequence, 9);
    // Damage in the newer one.
    newer[(20 << 10) + 3] ^= 1;
    assert_eq!(metadata(newer).unwrap().sequence, 5);
    // The first is gone altogether, but for what tells that it is LUKS.
    let mut second = good.clone();
    second[8..4096].fill(0);
    assert_eq!(metadata(second.clone()).unwrap().uuid, "01234567-89ab-4def-8123-456789abcdef");
    second[(16 << 10) + 20] ^= 1;
    metadata(second).unwrap_err();
    let mut neither = good;
    neither[30] ^= 1;
    neither[(16 << 10) + 30] ^= 1;
    assert_eq!(metadata(neither).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn what_is_not_opened_is_named() {
    let (good, json) = volume(&argon(1, 32), 512, 512);
    let with = |from: &str, to: &str| {
        assert!(json.contains(from), "{from}");
        let mut bytes = good.clone();
        bytes[..32 << 10].copy_from_slice(&header(json.replace(from, to).as_bytes(), 6));
        open(&disk(bytes)).unwrap_err()
    };
    for (from, to, says) in [
        (
            "\"config\":{",
            "\"config\":{\"requirements\":{\"mandatory\":[\"online-reencrypt-v2\"]},",
            "re-encrypted",
        ),
        ("\"config\":{", "\"config\":{\"requirements\":{\"mandatory\":[\"moon\"]},", "'moon'"),
        ("\"iv_tweak\"", "\"integrity\":{\"type\":\"aead\"},\"iv_tweak\"", "dm-integrity"),
        ("\"iv_tweak\"", "\"flags\":[\"in-reencryption\"],\"iv_tweak\"", "re-encrypted"),
        ("\"type\":\"crypt\"", "\"type\":\"hw-opal-crypt\"", "OPAL"),
        ("\"sector_size\":512", "\"sector_size\":1000", "1000 bytes"),
        ("\"sector_size\":512", "\"sector_size\":8192", "8192 bytes"),
        ("\"offset\":\"524288\"", "\"offset\":\"524289\"", "sectors"),
        ("\"offset\":\"524288\"", "\"offset\":\"18446744073709551104\"", "does not fit"),
        ("\"segments\":[\"0\"]", "\"segments\":[\"1\"]", "no digest"),
        ("dynamic", "1024", "does not fit"),
        ("xts-plain64\",\"sector", "xts-moon\",\"sector", "'moon'"),
        ("{\"keyslots", "[{\"keyslots", "JSON"),
    ] {
        let error = with(from, to);
        assert!(error.to_string().contains(says), "{to}: {error:?}");
    }
    // A slot that is not understood is left out; the hint says so.
    let error = with("argon2id", "argon3");
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(error.hints()[0].contains("argon3"), "{error:?}");
    assert_eq!(with("\"offset\":\"32768\"", "\"offset\":\"4096\"").kind(), ErrorKind::Permission);
    let wrong = Container::read(&disk(good.clone())).unwrap();
    let error = wrong.unlock(&disk(good), b"wrong", &mut Effort::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission);
}

/// Terabytes of memory, or hours, for whoever opened such a volume.
#[test]
fn hostile_costs_are_refused_at_once() {
    let (good, json) = volume(&argon(1, 32), 512, 512);
    for (from, to) in [
        ("\"memory\":32", "\"memory\":4294967295"),
        ("\"memory\":32", "\"memory\":1048577"),
        ("\"time\":1", "\"time\":4294967295"),
        ("\"iterations\":1000", "\"iterations\":4294967295"),
    ] {
        let mut bytes = good.clone();
        bytes[..32 << 10].copy_from_slice(&header(json.replace(from, to).as_bytes(), 6));
        let error = open(&disk(bytes)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{to}: {error}");
    }
    let mut bytes = good;
    let lanes = json.replace("\"cpus\":1", "\"cpus\":4000000000");
    bytes[..32 << 10].copy_from_slice(&header(lanes.as_bytes(), 6));
    assert_eq!(open(&disk(bytes)).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_disk_that_cannot_be_written_is_not() {
    let (bytes, _) = volume(&argon(1, 32), 512, 1024);
    let inner =
        open(&(Arc::new(block::readonly::ReadOnly::new(disk(bytes))) as Arc<dyn BlockDevice>)).unwrap();
    assert!(inner.read_only());
    inner.write_at(&[0; 512], 0).unwrap_err();
    inner.write_zeroes_at(0, 512, ZeroMode::ALLOCATE).unwrap_err();
    assert_eq!(inner.size(), 1024);
    assert_eq!(DATA_OFFSET % 4096, 0);
}

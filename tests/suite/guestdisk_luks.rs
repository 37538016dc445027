//! Encrypted volumes as cryptsetup makes them. It encrypts a file in place, without device-mapper and without privileges, so
//! that what is read through us can be compared with what was there before.

use std::sync::Arc;

use block::{BlockDevice, ErrorKind};
use crypt::Secret;
use crypt::luks::Effort;
use guestdisk::keys::{Key, Selector};
use guestdisk::{Disks, Keys, Location};
use tests::command::Cmd;
use tests::guest;
use tests::skip::tool;
use tests::{Dir, requires};

/// What makes a key slot cheap.
const PBKDF2: &str = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";
const ARGON2ID: &str = "--pbkdf argon2id --pbkdf-memory 64 --pbkdf-force-iterations 4 --pbkdf-parallel 2";
const ARGON2I: &str = "--pbkdf argon2i --pbkdf-memory 64 --pbkdf-force-iterations 4 --pbkdf-parallel 1";

/// A small header, and room for it at the end of the file.
const SMALL: &str = "--reduce-device-size 4M --luks2-metadata-size 16k --luks2-keyslots-size 1m";

fn cryptsetup(dir: &Dir, words: &str) {
    Cmd::new("cryptsetup").words("-q").words(words).dir(dir.path()).ok();
}

fn keys(selector: &str, passphrases: &[&str]) -> Keys {
    let passphrases = passphrases.iter().map(|text| Secret::from(*text)).collect();
    Keys::new(vec![Key { selector: Selector::parse(selector), passphrases }], Effort::DEFAULT)
}

/// Bytes that tell where they are, of `len` bytes.
fn pattern(len: usize) -> Vec<u8> {
    let words = (0u32..).take(len / 4).map(|word| word.wrapping_mul(2_654_435_761));
    words.flat_map(u32::to_le_bytes).collect()
}

fn all(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(device.size()).unwrap()];
    device.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What is within the only volume of the file `disk`.
fn inside(dir: &Dir, keys: &Keys) -> Arc<dyn BlockDevice> {
    let disks = Disks::open_with(vec![guest::open(&dir.file("disk"))], keys).unwrap();
    let [outer, inner] = disks.volumes() else { panic!("{disks:?}") };
    assert_eq!(inner.location, Location::Decrypted { outer: Box::new(outer.location.clone()) });
    assert!(!disks.is_locked(outer));
    Arc::clone(&inner.device)
}

/// A file of 1 MiB, encrypted in place.
fn encrypted(dir: &Dir, format: &str) -> Vec<u8> {
    const LEN: usize = 1 << 20;
    let data = pattern(LEN);
    std::fs::write(dir.file("pw"), "first").unwrap();
    std::fs::write(dir.file("pw2"), "second").unwrap();
    let mut bytes = data.clone();
    bytes.resize(LEN + (4 << 20), 0);
    std::fs::write(dir.file("disk"), bytes).unwrap();
    cryptsetup(dir, &format!("reencrypt --encrypt {SMALL} --key-file pw {format} disk"));
    data
}

#[test]
fn what_cryptsetup_encrypts_is_read_and_written() {
    requires!(tool("cryptsetup"));
    for format in [
        format!("--type luks2 {PBKDF2}"),
        format!("--type luks2 {ARGON2ID} --sector-size 4096"),
        format!("--type luks2 {ARGON2I} --cipher aes-cbc-essiv:sha256 --key-size 128"),
    ] {
        let dir = Dir::new();
        let data = encrypted(&dir, &format);
        cryptsetup(&dir, &format!("luksAddKey --key-file pw {PBKDF2} disk pw2"));
        let inner = inside(&dir, &keys("all", &["second"]));
        assert!(all(&*inner)[..data.len()] == data, "{format}");
        assert!(all(&*inside(&dir, &keys("all", &["wrong", "first"])))[..data.len()] == data, "{format}");
        // What we write, cryptsetup decrypts.
        let writable = guest::open_writable(&dir.file("disk"));
        let disks = Disks::open_with(vec![writable], &keys("all", &["first"])).unwrap();
        let inner = &disks.volumes()[1].device;
        inner.write_at(b"ours", 70_001).unwrap();
        inner.flush().unwrap();
        drop(disks);
        cryptsetup(&dir, "reencrypt --decrypt --force-offline-reencrypt --header header --key-file pw disk");
        let mut expected = data;
        expected[70_001..70_005].copy_from_slice(b"ours");
        let decrypted = std::fs::read(dir.file("disk")).unwrap();
        assert!(decrypted[..expected.len()] == expected, "{format}");
    }
}

/// LUKS1, the volume key of which cryptsetup shows: a container that we make with it decrypts to the same.
#[test]
fn luks1_of_cryptsetup_opens() {
    requires!(tool("cryptsetup"));
    let dir = Dir::new();
    dir.sparse("disk", 4 << 20);
    for (file, text) in [("pw", "first"), ("pw2", "second")] {
        std::fs::write(dir.file(file), text).unwrap();
    }
    cryptsetup(&dir, &format!("luksFormat --type luks1 {PBKDF2} disk pw"));
    cryptsetup(&dir, &format!("luksAddKey --key-file pw {PBKDF2} disk pw2"));
    let ours = all(&*inside(&dir, &keys("all", &["second"])));
    assert!(ours == all(&*inside(&dir, &keys("all", &["first"]))));
    cryptsetup(&dir, "luksDump --dump-volume-key --volume-key-file vk --key-file pw disk");
    let volume =
        crypt::Volume::new(crypt::CipherSpec::DEFAULT, &std::fs::read(dir.file("vk")).unwrap()).unwrap();
    let mut theirs = std::fs::read(dir.file("disk")).unwrap().split_off((4 << 20) - ours.len());
    volume.decrypt(0, &mut theirs);
    assert!(ours == theirs);
}

/// The whole way of a guest: a partition, LUKS, a group of LVM with a file system, and the names of crypttab.
#[test]
fn names_and_keys_of_volumes() {
    requires!(tool("cryptsetup"), tool("mke2fs"), tool("sfdisk"));
    let dir = Dir::new();
    std::fs::create_dir_all(dir.file("root/etc")).unwrap();
    std::fs::write(dir.file("root/etc/crypttab"), "# none\nvault /dev/sda1 none luks\n").unwrap();
    dir.sparse("disk", 8 << 20);
    Cmd::new("mke2fs").words("-q -F -t ext4 -d root disk").dir(dir.path()).ok();
    std::fs::write(dir.file("pw"), "first").unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(dir.file("disk")).unwrap();
    file.set_len(12 << 20).unwrap();
    cryptsetup(&dir, &format!("reencrypt --encrypt {SMALL} --key-file pw --type luks2 {ARGON2ID} disk"));
    std::fs::rename(dir.file("disk"), dir.file("part")).unwrap();
    dir.sparse("disk", 14 << 20);
    let table = "label: dos\nstart=2048, size=12MiB, type=83";
    Cmd::new("sfdisk").words("-q disk").dir(dir.path()).stdin(table).ok();
    Cmd::new("dd").words("if=part of=disk bs=1M seek=1 conv=notrunc status=none").dir(dir.path()).ok();
    let device = || vec![guest::open(&dir.file("disk"))];
    let locked = Disks::open_all(device()).unwrap();
    let uuid = locked.volumes()[0].uuid().to_owned();
    assert!(locked.is_locked(&locked.volumes()[0]));
    for selector in ["all", "/dev/sda1", "/dev/vda1", &uuid, &uuid.to_uppercase(), &format!("UUID={uuid}")] {
        let keys = keys(selector, &["first"]);
        let disks = Disks::open_with(device(), &keys).unwrap();
        for name in ["/dev/mapper/vault", &format!("/dev/mapper/luks-{uuid}")] {
            let found = disks.find(name).unwrap();
            assert_eq!(found.location.to_string(), "disk 1 partition 1 (decrypted)");
            assert!(found.file_system().unwrap().exists("/etc/crypttab"));
            assert_eq!(disks.place(found), None);
        }
        disks.find("/dev/mapper/other").unwrap_err();
        assert_eq!(keys.passphrases_to_type(), [Secret::from("first")]);
    }
    let wrong = Disks::open_with(device(), &keys("all", &["no", "neither"])).unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::Permission);
    assert!(wrong.to_string().contains(&uuid), "{wrong}");
    let none = Disks::open_with(device(), &keys("/dev/sda2", &["first"])).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::NotFound);
    assert!(none.hints()[0].contains("disk 1 partition 1"), "{none:?}");

    // The same by the program, with every way to give a key.
    std::fs::write(dir.file("key"), "first\n").unwrap();
    for key in
        ["--key all:key:first", "--key /dev/sda1:file:key", "--object secret,id=s,file=pw --key all:secret:s"]
    {
        let table = dir.vimg_ok(&format!("cat {key} disk --volume /dev/mapper/vault /etc/crypttab"));
        assert!(table.stdout.contains("vault /dev/sda1"), "{table:?}");
    }
    let document = dir.vimg_ok("inspect --output=json --key all:key:first disk").json();
    assert_eq!(document["volumes"][0]["inside"], 1);
    assert_eq!(document["volumes"][1]["content"], "ext4");
    let without = dir.vimg_ok("inspect disk");
    assert!(without.stdout.contains("no key was given"), "{without:?}");
    let wrong = dir.vimg("inspect --key all:key:hush disk");
    assert_eq!(wrong.code, Some(1));
    assert!(wrong.stderr.contains("none of the keys") && !wrong.stderr.contains("hush"), "{wrong:?}");
}

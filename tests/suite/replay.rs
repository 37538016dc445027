//! The bodies of the fuzz targets on their corpus, so that what fuzzing once found stays found on stable.

use std::path::Path;

use tests::fuzz;

/// Calls `body` with every file of `corpus/NAME`. There has to be at least one.
fn replay(name: &str, body: impl Fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut count = 0;
    for entry in std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
        body(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "no corpus for {name}");
}

/// The names of the files of a folder, without their endings.
fn names(folder: &Path) -> std::collections::BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let path = entries.map(|entry| entry.unwrap().path());
    path.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect()
}

/// `make fuzz` begins every target with its folder.
#[test]
fn every_target_has_a_corpus() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let targets = names(&here.join("../fuzz/fuzz_targets"));
    assert_eq!(targets, names(&here.join("corpus")));
    let manifest = std::fs::read_to_string(here.join("../fuzz/Cargo.toml")).unwrap();
    for target in &targets {
        assert!(manifest.contains(&format!("name = \"{target}\"")), "{target} is not built");
        replay(target, |_| ());
    }
}

/// What a guest does to its machine, prints, or is started from; and each of it with changes.
#[test]
fn machines() {
    type Body = fn(&[u8]);
    let bodies: [(&str, Body); 7] = [
        ("boot_virtio_queue", bootcheck::fuzz::fuzz_virtio_queue),
        ("boot_virtio_registers", bootcheck::fuzz::fuzz_virtio_registers),
        ("boot_pci", bootcheck::fuzz::fuzz_pci),
        ("boot_platform", bootcheck::fuzz::fuzz_platform),
        ("boot_console", bootcheck::fuzz::fuzz_console),
        ("boot_kernel", bootcheck::fuzz::fuzz_kernel),
        ("appliance_wire", fuzz::appliance_wire),
    ];
    for (name, body) in bodies {
        replay(name, |seed| {
            body(seed);
            let mut random = block::testing::Random::new(seed.len() as u64);
            for _ in 0..inputs(20) {
                body(&changed(seed, &mut random));
            }
        });
    }
}

#[test]
fn qcow2_open_read() {
    replay("qcow2_open_read", fuzz::qcow2_open_read);
    fuzz::seeds().iter().for_each(|(_, bytes)| fuzz::qcow2_open_read(bytes));
}

#[test]
fn qcow2_check() {
    replay("qcow2_check", fuzz::qcow2_check);
    fuzz::seeds().iter().for_each(|(_, bytes)| fuzz::qcow2_check(bytes));
}

/// The corpus of the check is one of damaged images: they are repaired, too.
#[test]
fn qcow2_repair() {
    replay("qcow2_check", fuzz::qcow2_repair);
    replay("qcow2_repair", fuzz::qcow2_repair);
    fuzz::seeds().iter().for_each(|(_, bytes)| fuzz::qcow2_repair(bytes));
}

#[test]
fn qcow2_ops() {
    replay("qcow2_ops", fuzz::qcow2_ops);
}

/// The corpus, and as many random inputs as a second or two allow (or as `VIMG_FUZZ_INPUTS` says).
#[test]
fn qcow2_snapshot() {
    replay("qcow2_snapshot", fuzz::qcow2_snapshot);
    let wanted = std::env::var("VIMG_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok());
    let mut random = block::testing::Random::new(77);
    for _ in 0..wanted.unwrap_or(1500) {
        let mut input = [0; 2 + 3 * 7 + 8 * 8];
        random.fill(&mut input);
        fuzz::qcow2_snapshot(&input);
    }
}

#[test]
fn qcow2_bitmaps() {
    replay("qcow2_bitmaps", fuzz::qcow2_bitmaps);
}

#[test]
fn image_spec() {
    replay("image_spec", fuzz::image_spec);
}

/// The corpus, good images, and as many damaged ones as a second or two allow.
#[test]
fn foreign_open_read() {
    use tests::foreign::{Packing, bochs, cloop, disk, dmg, old_parallels};
    replay("foreign_open_read", fuzz::foreign_open_read);
    let data = disk(200 * 1024);
    let packings = [Packing::Zlib, Packing::Raw, Packing::Bzip2, Packing::Adc];
    let seeds = [
        cloop(&data, 32 << 10),
        bochs(&data, 16 << 10, 2),
        old_parallels(&data),
        dmg(&data, &packings, false),
        dmg(&data, &packings, true),
    ];
    seeds.iter().for_each(|seed| fuzz::foreign_open_read(seed));
    let stored = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/foreign_open_read"));
    let stored = stored.unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap());
    let seeds: Vec<_> = seeds.into_iter().chain(stored).collect();
    let mut random = block::testing::Random::new(4);
    for round in 0..inputs(600) {
        fuzz::foreign_open_read(&damaged(&seeds[round % seeds.len()], &mut random));
    }
}

#[test]
fn archive_open() {
    use tests::foreign::{disk, gzip, tar};
    replay("archive_open", fuzz::archive_open);
    let data = disk(100 * 1024);
    let plain = tar(&[("a", b"1"), ("d", &data), ("e", b"2")]);
    let seeds = [gzip(&plain), tar(&[("d", &gzip(&data))]), plain];
    seeds.iter().for_each(|seed| fuzz::archive_open(seed));
    let mut random = block::testing::Random::new(5);
    for round in 0..inputs(300) {
        fuzz::archive_open(&damaged(&seeds[round % seeds.len()], &mut random));
    }
}

/// As many inputs as `VIMG_FUZZ_INPUTS` says, or so many.
fn inputs(usual: usize) -> usize {
    std::env::var("VIMG_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// A copy with a few bytes changed, most of them where structures are: at the beginning and the end.
fn damaged(seed: &[u8], random: &mut block::testing::Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let mut dice = [0; 6 * 4];
    random.fill(&mut dice);
    for roll in dice.chunks(6).take(1 + usize::from(dice[0] % 4)) {
        let far = usize::from(roll[1]) << 8 | usize::from(roll[2]);
        let at = match roll[3] % 4 {
            0 => far % 160,
            1 => bytes.len().saturating_sub(1 + far % 700),
            2 => far % 4096,
            _ => (far << 8 | usize::from(roll[4])) % bytes.len().max(1),
        };
        match (roll[5] % 8, bytes.get_mut(at)) {
            (0, _) => bytes.truncate(at),
            (1, Some(byte)) => *byte = 0xff,
            (2, Some(byte)) => *byte = 0,
            (_, Some(byte)) => *byte = roll[0],
            (_, None) => {}
        }
    }
    bytes
}

/// The corpus, and as many changed images as a second or two allow (or as `VIMG_FUZZ_INPUTS` says).
#[test]
fn vhd_and_vdi_images() {
    replay("vhd_image", fuzz::vhd_image);
    replay("vdi_image", fuzz::vdi_image);
    let wanted = std::env::var("VIMG_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok());
    let mut random = block::testing::Random::new(77);
    let seeds = fuzz::block_seeds();
    for turn in 0..wanted.unwrap_or(6000) {
        let bytes = fuzz::mutated(&seeds[turn % seeds.len()], &mut random);
        fuzz::vhd_image(&bytes);
        fuzz::vdi_image(&bytes);
    }
}

#[test]
fn luks_header() {
    replay("luks_header", fuzz::luks_header);
}

/// The corpus, and a good header with one byte after the other changed.
#[test]
fn luks2_metadata() {
    replay("luks2_metadata", fuzz::luks2_metadata);
    let salt = vec![3; 32];
    let kdf = crypt::luks2::Kdf::Argon2 { id: true, time: 1, memory: 32, lanes: 1, salt };
    let (_, json) = crypt::luks2::testing::volume(&kdf, 4096, 0);
    let json = json.as_bytes();
    fuzz::luks2_metadata(json);
    let mut random = block::testing::Random::new(91);
    for _ in 0..300 {
        let mut changed = json.to_vec();
        let mut bytes = [0; 4];
        random.fill(&mut bytes);
        let at = usize::from(u16::from_le_bytes([bytes[0], bytes[1]])) % changed.len();
        changed[at] = bytes[2];
        if bytes[3] < 64 {
            changed.truncate(at);
        }
        fuzz::luks2_metadata(&changed);
    }
}

/// The corpus, and random edits of all structures (or as many as `VIMG_FUZZ_INPUTS` says).
#[test]
fn vhdx() {
    replay("vhdx", fuzz::vhdx);
    let wanted = std::env::var("VIMG_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok());
    let mut random = block::testing::Random::new(78);
    for _ in 0..wanted.unwrap_or(150) {
        let mut input = [0; 24];
        random.fill(&mut input);
        fuzz::vhdx(&input);
    }
}

/// The corpus, and damaged neighbours of each of its members.
#[test]
fn vmdk_streams() {
    let damaged = |body: fn(&[u8])| {
        move |bytes: &[u8]| {
            body(bytes);
            let mut random = block::testing::Random::new(bytes.len() as u64);
            let mut spot = [0; 3];
            for _ in 0..200 {
                let mut bad = bytes.to_vec();
                random.fill(&mut spot);
                let len = bad.len();
                let at = usize::from(spot[0]) * (1 + usize::from(spot[1]) * len.div_ceil(65536)) % len;
                bad[at] = spot[2];
                body(&bad);
                body(&bad[..at]);
            }
        }
    };
    replay("vmdk_sequential", damaged(fuzz::vmdk_sequential));
    replay("vmdk_extent", damaged(fuzz::vmdk_extent));
}

#[test]
fn vmdk() {
    replay("vmdk", fuzz::vmdk);
}

#[test]
fn vmdk_edited() {
    replay("vmdk_edited", fuzz::vmdk_edited);
    let wanted = std::env::var("VIMG_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok());
    let mut random = block::testing::Random::new(79);
    for round in 0..wanted.unwrap_or(300_usize) {
        let mut input = vec![0; 6 * (1 + round % 4)];
        random.fill(&mut input);
        // Few numbers of 32 bits mean anything: half of the values are small.
        input.chunks_mut(6).filter(|edit| edit[0] & 1 == 0).for_each(|edit| edit[3..].fill(0));
        fuzz::vmdk_edited(&input);
    }
}

/// Disks of guests: the corpus, and each of its members with changes.
#[test]
fn guest_disks() {
    type Body = fn(&[u8]);
    let bodies: [(&str, Body); 13] = [
        ("guest_convert", fuzz::guest_convert),
        ("guest_nvram", fuzz::guest_nvram),
        ("guest_partition", fuzz::partition_table),
        ("guest_lvm", fuzz::guest_disk),
        ("guest_md", fuzz::software_raid),
        ("guest_ext", fuzz::file_system),
        ("guest_fat", fuzz::file_system),
        ("guest_xfs", fuzz::file_system),
        ("guest_btrfs", fuzz::file_system),
        ("guest_ntfs", fuzz::file_system),
        ("guest_inspect", fuzz::guest_inspect),
        ("guest_text", fuzz::guest_text),
        ("initramfs", fuzz::initramfs),
    ];
    for (name, body) in bodies {
        replay(name, |seed| {
            body(seed);
            let mut random = block::testing::Random::new(seed.len() as u64);
            for _ in 0..inputs(150) {
                body(&changed(seed, &mut random));
            }
        });
    }
}

/// File systems of guests that are changed: the corpus, and each of its members with changes.
#[test]
fn guest_edit() {
    for name in ["guest_ext", "guest_fat", "guest_xfs", "guest_btrfs", "guest_edit"] {
        replay(name, |seed| {
            fuzz::file_system_edit(seed);
            let mut random = block::testing::Random::new(seed.len() as u64 + 1);
            for _ in 0..inputs(40) {
                fuzz::file_system_edit(&changed(seed, &mut random));
            }
        });
    }
}

/// A copy with some bytes changed, anywhere: a packed disk has no empty places.
fn changed(seed: &[u8], random: &mut block::testing::Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let mut dice = [0; 6 * 8];
    random.fill(&mut dice);
    for roll in dice.chunks(6).take(1 + usize::from(dice[0] % 8)) {
        let at = usize::from(roll[1]) << 16 | usize::from(roll[2]) << 8 | usize::from(roll[3]);
        let at = at % bytes.len();
        bytes[at] = match roll[5] % 4 {
            0 => 0xff,
            1 => 0,
            2 => bytes[at] ^ 1 << (roll[4] % 8),
            _ => roll[4],
        };
    }
    bytes
}

/// The corpus, and scripts with lines and words in another order.
#[test]
fn grub_cfg() {
    replay("grub_cfg", |seed| {
        fuzz::grub_cfg(seed);
        let mut random = block::testing::Random::new(seed.len() as u64);
        let words: Vec<_> = seed.split_inclusive(|byte| byte.is_ascii_whitespace()).collect();
        let mut dice = vec![0; words.len() * 2];
        for _ in 0..inputs(150) {
            random.fill(&mut dice);
            let place = |pair: &[u8]| (usize::from(pair[0]) << 8 | usize::from(pair[1])) % words.len();
            let mixed =
                dice.chunks(2).enumerate().map(|(at, pair)| if pair[0] < 230 { at } else { place(pair) });
            fuzz::grub_cfg(&mixed.map(|at| words[at]).collect::<Vec<_>>().concat());
            fuzz::grub_cfg(&damaged(seed, &mut random));
        }
    });
}

/// The seeds themselves are good images: a corpus that is refused at the first byte tests nothing.
#[test]
fn the_seeds_are_clean() {
    for (name, bytes) in fuzz::seeds() {
        fuzz::expect_clean(name, &bytes);
    }
}

/// The corpus, and damaged copies of it.
#[test]
fn nbd_client() {
    replay("nbd_client", fuzz::nbd_client);
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/nbd_client");
    let seeds: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect();
    let mut random = block::testing::Random::new(5);
    for round in 0..600 {
        fuzz::nbd_client(&damaged(&seeds[round % seeds.len()], &mut random));
    }
    // The handshake itself, damaged.
    for round in 0..600 {
        let seed = [vec![0], fuzz::nbd_handshake(u8::try_from(1 + round % 3).unwrap())].concat();
        fuzz::nbd_client(&damaged(&seed, &mut random));
    }
}

/// The corpus, every option and command, and mutations of those.
#[test]
fn nbd_server() {
    let (handshakes, transmissions) = fuzz::nbd_seeds();
    replay("nbd_server_handshake", fuzz::nbd_server_handshake);
    replay("nbd_server_transmission", fuzz::nbd_server_transmission);
    let mut random = block::testing::Random::new(3);
    for (seeds, body) in [
        (handshakes, fuzz::nbd_server_handshake as fn(&[u8])),
        (transmissions, fuzz::nbd_server_transmission),
    ] {
        for (_, bytes) in seeds {
            body(&bytes);
            for _ in 0..10 {
                body(&fuzz::mutated(&bytes, &mut random));
            }
        }
    }
}

/// Descriptions of machines: the corpus, and each of its files damaged in many places.
#[test]
fn descriptions_of_machines() {
    type Body = fn(&[u8]);
    let bodies: [(&str, Body); 5] = [
        ("source_vmx", fuzz::source_vmx),
        ("source_ovf", fuzz::source_ovf),
        ("source_vbox", fuzz::source_vbox),
        ("source_xl", fuzz::source_xl),
        ("source_libvirt", fuzz::source_libvirt),
    ];
    for (name, body) in bodies {
        replay(name, |bytes| {
            body(bytes);
            let mut random = block::testing::Random::new(bytes.len() as u64);
            for _ in 0..400 {
                body(&fuzz::damaged(bytes, &mut random));
            }
            for end in (0..bytes.len()).step_by(97) {
                body(&bytes[..end]);
            }
        });
    }
}

/// Registry hives, and each of them with changes that keep its checksum sound or not.
#[test]
fn hive() {
    replay("hive", fuzz::registry_hive);
    for seed in fuzz::hive_seeds() {
        fuzz::registry_hive(&seed);
        let mut random = block::testing::Random::new(seed.len() as u64);
        for _ in 0..inputs(600) {
            fuzz::registry_hive(&changed(&seed, &mut random));
        }
    }
}

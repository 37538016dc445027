//! VHDX: made by the one, read and written by the other; logs that were left behind by either; chains, which qemu
//! does not read; and images that break the rules.

use std::sync::Arc;
use std::time::Duration;

use block::mem::MemStorage;
use block::testing::{CrashStorage, Random};
use block::{BlockDevice as _, Storage};
use tests::skip::{qemu, qemu10, tool};
use tests::{Cmd, Dir, requires};
use vhdx::create::{CreateOptions, create};
use vhdx::{OpenOptions, Source, Vhdx};

const MIB: u64 = 1 << 20;

/// Noise and zeros in turn, `size` bytes.
fn contents(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut random = Random::new(seed);
    for chunk in bytes.chunks_mut(300_000).step_by(2) {
        random.fill(chunk);
    }
    bytes
}

const KINDS: &[&str] = &[
    "subformat=dynamic",
    "subformat=fixed",
    "block_size=1M",
    "block_size=2M,log_size=3M",
    "block_size=32M,subformat=fixed",
    "block_state_zero=off,block_size=1M",
    "block_size=256M",
];

#[test]
fn each_reads_what_the_other_makes() {
    requires!(qemu10());
    for (seed, kind) in (0..).zip(KINDS) {
        let dir = Dir::new();
        dir.write("a.raw", &contents(seed, 5 * 1024 * 1024 + 512));
        dir.vimg_ok(&format!("convert -f raw -O vhdx -o {kind} a.raw v.vhdx"));
        dir.qemu_ok(&format!("convert -f raw -O vhdx -o {kind} a.raw q.vhdx"));
        for name in ["v.vhdx", "q.vhdx"] {
            dir.same_json(&format!("info --output=json {name}"));
            dir.same(&format!("info {name}"));
            dir.same(&format!("check {name}"));
            dir.same(&format!("check --output=json {name}"));
            assert!(dir.qemu_reads(name) == dir.read("a.raw"), "{kind}: qemu reads {name}");
            assert!(dir.vimg_reads(name) == dir.read("a.raw"), "{kind}: vimg reads {name}");
        }
    }
}

#[test]
fn creating_says_and_refuses_what_qemu_img_does() {
    requires!(qemu10());
    let dir = Dir::new();
    for words in [
        "create -f vhdx a.vhdx 100M",
        "create -f vhdx -o subformat=fixed,block_size=1M a.vhdx 10M",
        "create -f vhdx -o log_size=2M,block_state_zero=off a.vhdx 1000001",
        "create -f vhdx -o block_size=512M a.vhdx 3G",
        "create -f vhdx -o subformat=x b.vhdx 1M",
        "create -f vhdx -o block_size=3M b.vhdx 1M",
        "create -f vhdx -o log_size=0 b.vhdx 1M",
        "create -f vhdx -o log_size=4G b.vhdx 1M",
        "create -f vhdx -o block_state_zero=2 b.vhdx 1M",
        "create -f vhdx b.vhdx 65T",
        "create -f vhdx -b a.vhdx -F vhdx b.vhdx",
        "create -f vhdx -o help",
    ] {
        dir.same(words);
        if dir.exists("a.vhdx") && words.contains("a.vhdx ") {
            dir.linked(words);
            let info = dir.same_json("info --output=json a.vhdx");
            assert!(info["cluster-size"].as_u64().is_some_and(|size| size >= MIB));
        }
    }
    dir.vimg_ok("create -f vhdx a.vhdx 10M");
    dir.same("resize -f vhdx a.vhdx 20M");
    dir.same("measure -O vhdx --size 1M");
    dir.same("snapshot -l a.vhdx");
}

/// Both write to the same image in turn, each reading what the other wrote.
#[test]
fn both_write_in_turn() {
    requires!(qemu());
    for (seed, kind) in (0..).zip(KINDS) {
        let dir = Dir::new();
        let mut model = vec![0; 9 << 20];
        dir.vimg_ok(&format!("create -f vhdx -o {kind} a.vhdx 9M"));
        let mut random = Random::new(seed);
        for turn in 0..3u8 {
            let mut words: Vec<(usize, usize, u8)> = vec![];
            for _ in 0..8 {
                let at = usize::try_from(random.below(17_000)).unwrap() * 512;
                let len = (usize::try_from(random.below(600)).unwrap() + 1) * 512;
                words.push((
                    at,
                    len.min(model.len() - at),
                    turn * 50 + u8::try_from(random.below(50)).unwrap(),
                ));
            }
            for &(at, len, byte) in &words {
                model[at..at + len].fill(byte);
            }
            if turn == 1 {
                let mut io = Cmd::new("qemu-io").dir(dir.path()).words("-f vhdx");
                for (at, len, byte) in &words {
                    io = io.arg("-c").arg(format!("write -P {byte} {at} {len}"));
                }
                io.arg("a.vhdx").ok();
            } else {
                let storage = host_file(&dir, "a.vhdx");
                let image = open(&storage, true);
                words
                    .iter()
                    .for_each(|&(at, len, byte)| image.write_at(&vec![byte; len], at as u64).unwrap());
                image.close().unwrap();
            }
            assert!(dir.qemu_reads("a.vhdx") == model, "{kind}, turn {turn}: qemu");
            assert!(dir.vimg_reads("a.vhdx") == model, "{kind}, turn {turn}: vimg");
            dir.same("check a.vhdx");
        }
    }
}

fn host_file(dir: &Dir, name: &str) -> Arc<dyn Storage> {
    let _open = tests::open_here();
    let options = block::file::FileOptions::read_write();
    Arc::new(block::file::HostFile::open(&dir.file(name), &options).unwrap())
}

fn open(storage: &Arc<dyn Storage>, writable: bool) -> Arc<Vhdx> {
    let source = Source::read(storage).unwrap();
    Vhdx::open(source, OpenOptions { writable, parent: None }).unwrap()
}

/// Files as a loss of power leaves them, with changes that are in the log only.
fn files_with_a_log() -> Vec<Vec<u8>> {
    let memory = MemStorage::new();
    create(&memory, &CreateOptions { block_size: Some(MIB), ..CreateOptions::new(6 << 20) }).unwrap();
    let recorder = Arc::new(CrashStorage::new(memory.to_bytes()));
    let image = open(&(Arc::clone(&recorder) as Arc<dyn Storage>), true);
    for block in [4, 1, 3] {
        image.write_at(&contents(block, 700_000), block * MIB + 512 * block).unwrap();
        image.flush().unwrap();
    }
    drop(image);
    let images = recorder.images(200, 3);
    let files = images.map(|image| image.storage.to_bytes()).filter(|bytes| {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(bytes.clone()));
        Source::read(&storage).is_ok_and(|source| source.has_pending_log())
    });
    files.take(12).collect()
}

/// What our crash leaves, qemu repairs and reads as we do; and reading changes nothing in the file.
#[test]
fn a_log_of_ours_is_replayed_by_qemu_and_by_us() {
    requires!(qemu10());
    let files = files_with_a_log();
    assert!(files.len() > 5, "{}", files.len());
    for file in files {
        let dir = Dir::new();
        dir.write("a.vhdx", &file);
        dir.vimg_ok("check a.vhdx").expect_stdout("No errors");
        let ours = dir.vimg_reads("a.vhdx");
        assert!(dir.read("a.vhdx") == file, "reading has changed the file");
        dir.copy("a.vhdx", "b.vhdx");
        dir.qemu("check a.vhdx").expect_code(1).expect_stderr("contains a log that needs to be replayed");
        dir.qemu_ok("check -r all a.vhdx");
        assert!(dir.qemu_reads("a.vhdx") == ours, "qemu reads something else after its replay");
        dir.vimg_ok("check -r all b.vhdx").expect_stdout("corruptions");
        dir.same("check b.vhdx");
        assert!(dir.qemu_reads("b.vhdx") == ours, "qemu reads something else after our replay");
        // Writing replays, too.
        dir.write("c.vhdx", &file);
        let image = open(&host_file(&dir, "c.vhdx"), true);
        image.write_at(&[7; 512], 0).unwrap();
        image.close().unwrap();
        drop(image);
        assert!(dir.qemu_reads("c.vhdx")[512..] == ours[512..]);
    }
}

/// qemu empties its log after each entry; here the header is put back to where it named it, and the BAT to what it
/// was.
#[test]
fn a_log_of_qemu_is_replayed() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f vhdx -o block_size=1M a.vhdx 8M");
    let before = dir.read("a.vhdx")[2 << 20..][..4096].to_vec();
    Cmd::new("qemu-io").words("-f vhdx -c").arg("write -P 7 3M 64k").arg("a.vhdx").dir(dir.path()).ok();
    let written = dir.vimg_reads("a.vhdx");
    let guid = vhdx::Guid(dir.read("a.vhdx")[(1 << 20) + 32..][..16].try_into().unwrap());
    let storage = host_file(&dir, "a.vhdx");
    let mut headers = vhdx::header::Headers::read(&*storage).unwrap();
    headers.replace(&*storage, |header| header.log_guid = guid).unwrap();
    storage.write_at(&before, 2 << 20).unwrap();
    drop(storage);
    let left = dir.read("a.vhdx");
    assert!(dir.vimg_reads("a.vhdx") == written);
    assert!(dir.read("a.vhdx") == left, "reading has changed the file");
    dir.vimg_ok("check -r all a.vhdx");
    assert!(dir.vimg_reads("a.vhdx") == written && dir.qemu_reads("a.vhdx") == written);
}

/// Gives an image (with its metadata at 3 MiB) a parent.
fn make_child(dir: &Dir, name: &str, parent: vhdx::Guid, path: &str) {
    let pairs = [("parent_linkage", format!("{{{parent}}}")), ("relative_path", path.to_owned())];
    let mut locator = vhdx::Guid::parse("b04aefb7-d19e-4a81-b789-25b8e9445913").unwrap().0.to_vec();
    locator.extend([0, 0, 2, 0]);
    let mut strings: Vec<u8> = vec![];
    for (key, value) in &pairs {
        let place = |text: &str, strings: &mut Vec<u8>| {
            let at = u32::try_from(44 + strings.len()).unwrap();
            strings.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            (at.to_le_bytes(), u16::try_from(text.len() * 2).unwrap().to_le_bytes())
        };
        let (key, value) = (place(key, &mut strings), place(value, &mut strings));
        locator.extend([&key.0[..], &value.0, &key.1, &value.1].concat());
    }
    locator.extend(strings);
    let metadata = 3 << 20;
    let mut entry = vhdx::Guid::parse("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").unwrap().0.to_vec();
    entry.extend(0x11000u32.to_le_bytes());
    entry.extend(u32::try_from(locator.len()).unwrap().to_le_bytes());
    entry.extend([4, 0, 0, 0, 0, 0, 0, 0]);
    dir.poke(name, metadata + 6 * 32, &entry);
    dir.poke(name, metadata + 10, &[6]);
    dir.poke(name, metadata + 0x11000, &locator);
    dir.poke(name, metadata + 0x10004, &[2]);
}

fn identity(dir: &Dir, name: &str) -> vhdx::Guid {
    Source::read(&host_file(dir, name)).unwrap().data_write_guid()
}

/// A parent of noise, and an empty child of it.
fn parent_and_child(path: &str) -> Dir {
    let dir = Dir::new();
    dir.write("p.raw", &contents(1, 4 << 20));
    dir.vimg_ok("convert -f raw -O vhdx -o block_size=1M p.raw p.vhdx");
    dir.vimg_ok("create -f vhdx -o block_size=1M,block_state_zero=off c.vhdx 4M");
    make_child(&dir, "c.vhdx", identity(&dir, "p.vhdx"), path);
    dir
}

#[test]
fn a_child_shows_its_parent_and_what_it_has_itself() {
    let dir = parent_and_child(r".\p.vhdx");
    assert!(dir.vimg_reads("c.vhdx") == dir.read("p.raw"));
    dir.vimg_ok("info --backing-chain c.vhdx").expect_stdout("backing file: p.vhdx");
    // A write into the middle of a block completes it from the parent.
    dir.write("patch.raw", &[9; 1024]);
    dir.vimg_ok("dd -f raw -O raw bs=512 count=2 if=patch.raw of=patch2.raw");
    {
        let _open = tests::open_here();
        let spec = image::Spec::from_filename(dir.file("c.vhdx").to_str().unwrap()).unwrap();
        let options = image::OpenOptions { writable: true, ..image::OpenOptions::default() };
        let layer = image::open(&spec, &options).unwrap();
        layer.device().write_at(&[9; 1024], 1_500_000).unwrap();
        layer.device().close().unwrap();
    }
    let mut model = dir.read("p.raw");
    model[1_500_000..1_501_024].fill(9);
    assert!(dir.vimg_reads("c.vhdx") == model);
    dir.vimg_ok("check c.vhdx");
    let map = dir.vimg_ok("map --output=json c.vhdx").json();
    let depths: Vec<_> =
        map.as_array().unwrap().iter().filter_map(|extent| extent["depth"].as_u64()).collect();
    assert!(depths.contains(&0) && depths.contains(&1), "{map}");
}

/// The blocks of a child and those of a parent that has changed since make no disk.
#[test]
fn a_parent_that_has_changed_is_refused() {
    let dir = parent_and_child("p.vhdx");
    let image = open(&host_file(&dir, "p.vhdx"), true);
    image.write_at(&[1], 0).unwrap();
    image.close().unwrap();
    drop(image);
    dir.vimg("convert -O raw c.vhdx x.raw").expect_clean_failure().expect_stderr("was made on");
    assert!(!dir.exists("x.raw"));
    dir.vimg_ok("info c.vhdx");
    let any = "driver=vhdx,file.filename=c.vhdx,ignore-parent-id";
    dir.vimg_ok(&format!("convert --image-opts -O raw {any}=on y.raw"));
    dir.vimg(&format!("convert --image-opts -O raw {any}=off x.raw")).expect_clean_failure();
    make_child(&dir, "c.vhdx", identity(&dir, "p.vhdx"), "p.vhdx");
    dir.vimg_ok("convert -O raw c.vhdx x.raw");
}

#[test]
fn a_parent_elsewhere_is_not_followed_unless_allowed() {
    let dir = parent_and_child(r"..\above.vhdx");
    std::fs::create_dir(dir.file("sub")).unwrap();
    std::fs::rename(dir.file("c.vhdx"), dir.file("sub/c.vhdx")).unwrap();
    std::fs::rename(dir.file("p.vhdx"), dir.file("above.vhdx")).unwrap();
    dir.vimg("convert -O raw sub/c.vhdx x.raw").expect_clean_failure().expect_stderr("--allow");
    dir.vimg_ok(&format!("convert --allow {} -O raw sub/c.vhdx x.raw", dir.path().display()));
    assert!(dir.read("x.raw") == dir.read("p.raw"));
}

/// Another reader's opinion of what we make.
#[test]
fn libvhdi_reads_what_we_make() {
    requires!(tool("vhdiinfo"));
    let dir = Dir::new();
    for (subformat, kind) in [("dynamic", "Dynamic"), ("fixed", "Fixed")] {
        dir.vimg_ok(&format!("create -f vhdx -o subformat={subformat},block_size=1M a.vhdx 5M"));
        let said = Cmd::new("vhdiinfo").arg("a.vhdx").dir(dir.path()).ok();
        let said = said.expect_stdout("VHDX (version 2)").expect_stdout("5.0 MiB (5242880 bytes)");
        said.expect_stdout(kind);
        std::fs::remove_file(dir.file("a.vhdx")).unwrap();
    }
}

/// A good image whose disk has all kinds of blocks.
fn good() -> Dir {
    let dir = Dir::new();
    dir.write("a.raw", &contents(3, 4 << 20));
    dir.vimg_ok("convert -f raw -O vhdx -o block_size=1M a.raw a.vhdx");
    dir
}

/// Puts the checksum of a structure right again.
fn seal(dir: &Dir, offset: usize, len: usize) {
    dir.poke32("a.vhdx", offset as u64 + 4, 0);
    let sum = crc32c::crc32c(&dir.read("a.vhdx")[offset..][..len]);
    dir.poke("a.vhdx", offset as u64 + 4, &sum.to_le_bytes());
}

type Damage = (&'static str, fn(&Dir));

const DAMAGES: &[Damage] = &[
    ("both headers", |dir| {
        dir.poke("a.vhdx", 65600, &[1]);
        dir.poke("a.vhdx", 131_136, &[1]);
    }),
    ("both region tables", |dir| {
        dir.poke("a.vhdx", 192 << 10, b"x");
        dir.poke("a.vhdx", 256 << 10, b"x");
    }),
    ("the metadata", |dir| dir.poke("a.vhdx", 3 << 20, b"x")),
    ("an unknown required item", |dir| dir.poke("a.vhdx", (3 << 20) + 32, &[1])),
    ("the size of blocks", |dir| dir.poke("a.vhdx", (3 << 20) + 0x10000, &[1])),
    ("blocks of nothing", |dir| dir.poke("a.vhdx", (3 << 20) + 0x10000, &[0; 4])),
    ("a disk larger than its BAT", |dir| {
        dir.poke("a.vhdx", (3 << 20) + 0x10008, &(60u64 << 40).to_le_bytes());
    }),
    ("a disk of 2^63 bytes", |dir| dir.poke("a.vhdx", (3 << 20) + 0x10008, &(1u64 << 63).to_le_bytes())),
    ("a required region that is unknown", |dir| {
        for table in [192 << 10, 256 << 10] {
            dir.poke("a.vhdx", table + 8, &[3]);
            dir.poke("a.vhdx", table + 80, &[7; 16]);
            dir.poke("a.vhdx", table + 96, &[0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 1, 0, 0, 0]);
            seal(dir, usize::try_from(table).unwrap(), 64 << 10);
        }
    }),
    ("a file that is cut off", |dir| {
        let file = std::fs::OpenOptions::new().write(true).open(dir.file("a.vhdx")).unwrap();
        file.set_len(3 << 20).unwrap();
    }),
    ("a block outside the file", |dir| dir.poke("a.vhdx", 2 << 20, &((1u64 << 50) | 6).to_le_bytes())),
    ("a block in the BAT", |dir| dir.poke("a.vhdx", 2 << 20, &((2u64 << 20) | 6).to_le_bytes())),
    ("a block in the header", |dir| dir.poke("a.vhdx", 2 << 20, &6u64.to_le_bytes())),
    ("a block in a state that there is not", |dir| dir.poke("a.vhdx", 2 << 20, &[4])),
    ("a block that is partly present without a parent", |dir| dir.poke("a.vhdx", 2 << 20, &[7])),
    ("blocks that are cut off", |dir| {
        let file = std::fs::OpenOptions::new().write(true).open(dir.file("a.vhdx")).unwrap();
        file.set_len(6 << 20).unwrap();
    }),
];

/// Nothing of this is ever read as data; a conversion fails, leaves no target, and takes little of anything.
#[test]
fn damaged_images_are_refused() {
    for (name, damage) in DAMAGES {
        let dir = good();
        damage(&dir);
        let limited = |words: &str| {
            let cmd = dir.vimg_cmd(words).memory_mib(512).limit("--cpu=10").timeout(20);
            let ran = cmd.run().expect_no_panic();
            assert!(ran.elapsed < Duration::from_secs(10), "{name}: {}", ran.story());
            ran
        };
        let converted = limited("convert -f vhdx -O raw a.vhdx out.raw");
        assert!(converted.code == Some(1), "{name}: {}", converted.story());
        assert!(!dir.exists("out.raw"), "{name}");
        for words in ["info -f vhdx a.vhdx", "map -f vhdx a.vhdx"] {
            limited(words);
        }
        let checked = limited("check -f vhdx a.vhdx");
        assert!(matches!(checked.code, Some(1 | 2)), "{name}: {}", checked.story());
        limited("check -f vhdx -r all a.vhdx");
    }
}

/// What there are two of is restored, and overlaps are found.
#[test]
fn check_finds_and_repairs_what_it_can() {
    let dir = good();
    dir.poke("a.vhdx", 65600, &[1]);
    dir.poke("a.vhdx", 192 << 10, b"x");
    dir.vimg("check a.vhdx").expect_code(2).expect_stdout("2 errors");
    dir.vimg_ok("convert -O raw a.vhdx b.raw");
    assert!(dir.read("b.raw") == dir.read("a.raw"));
    dir.vimg_ok("check -r all a.vhdx").expect_stdout("2 corruptions");
    dir.vimg_ok("check a.vhdx");
    let entry = dir.read("a.vhdx")[2 << 20..][..8].to_vec();
    dir.poke("a.vhdx", (2 << 20) + 8, &entry);
    dir.vimg("check a.vhdx").expect_code(2).expect_stderr("overlaps another block");
}

/// A header that names a log none of whose entries is complete: the writer stopped before its first one was, and has
/// changed nothing through it.
#[test]
fn a_log_without_a_complete_entry_is_empty() {
    for file in files_with_a_log().into_iter().take(3) {
        let dir = Dir::new();
        dir.write("a.vhdx", &file);
        for entry in 0..4 {
            dir.poke("a.vhdx", MIB + entry * 8192 + 5000, &[0xaa, 0x55]);
        }
        let torn = dir.read("a.vhdx");
        dir.vimg_ok("check a.vhdx");
        dir.vimg_ok("convert -O raw a.vhdx b.raw");
        assert!(dir.read("a.vhdx") == torn);
        // A writer puts it away.
        let image = open(&host_file(&dir, "a.vhdx"), true);
        image.write_at(&[7; 512], 0).unwrap();
        image.close().unwrap();
        drop(image);
        let mut model = dir.read("b.raw");
        model[..512].fill(7);
        assert!(dir.vimg_reads("a.vhdx") == model);
    }
}

/// A commit changes what the child knows its parent by, and the child learns of it.
#[test]
fn a_child_is_committed_to_its_parent() {
    let dir = parent_and_child("p.vhdx");
    let mut model = dir.read("p.raw");
    {
        let _open = tests::open_here();
        let spec = image::Spec::from_filename(dir.file("c.vhdx").to_str().unwrap()).unwrap();
        let options = image::OpenOptions { writable: true, ..image::OpenOptions::default() };
        let layer = image::open(&spec, &options).unwrap();
        layer.device().write_at(&[9; 1024], 1_500_000).unwrap();
        layer.device().close().unwrap();
    }
    model[1_500_000..1_501_024].fill(9);
    dir.vimg_ok("commit c.vhdx");
    assert!(dir.vimg_reads("p.vhdx") == model);
    assert!(dir.vimg_reads("c.vhdx") == model, "the child still knows its parent");
    dir.vimg_ok("check p.vhdx");
    dir.vimg_ok("check c.vhdx");
}

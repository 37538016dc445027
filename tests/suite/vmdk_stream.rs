//! Stream-optimized VMDK: ours is walked as a reader does that cannot seek and believes nothing but the published
//! format, and read by qemu-img and libvmdk; theirs is read by us; both through files and pipes. COWD and seSparse
//! extents, which nothing here can write, are forged and read by both tools.

use block::testing::Random;
use tests::command::{self, Cmd};
use tests::skip::{qemu10, tool};
use tests::{Dir, requires};

const STREAM: &str = "-O vmdk -o subformat=streamOptimized";
const GRAIN: usize = 65536;

/// A disk of `sectors` with data of several sorts where `places` (grain numbers) say, zeros elsewhere.
fn disk(sectors: usize, places: &[usize]) -> Vec<u8> {
    let mut bytes = vec![0; sectors * 512];
    let mut random = Random::new(sectors as u64);
    for (place, sort) in places.iter().zip(0..) {
        let range = place * GRAIN..((place + 1) * GRAIN).min(bytes.len());
        match sort % 3 {
            0 => random.fill(&mut bytes[range]),
            1 => bytes[range].iter_mut().zip(0u32..).for_each(|(b, i)| *b = (i / 100).to_le_bytes()[0]),
            _ => bytes[range.start..range.start + 10].fill(9),
        }
    }
    bytes
}

/// Every shape that the format distinguishes.
fn shapes() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("empty", disk(128 * 40, &[])),
        ("one-sector", disk(1, &[0])),
        ("part-of-a-grain", disk(200, &[0, 1])),
        ("dense", disk(128 * 20, &(0..20).collect::<Vec<_>>())),
        ("borders-of-tables", disk(128 * 1600 + 8, &[0, 5, 511, 512, 1023, 1599, 1600])),
        ("a-table-without-grains", disk(128 * 1540, &[3, 1536])),
    ]
}

fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Goes through a stream as ovftool does, from the first byte to the last, and returns the disk in it.
fn walk(file: &[u8]) -> Vec<u8> {
    assert_eq!(file.len() % 512, 0, "whole sectors");
    let header = &file[..512];
    assert_eq!((&header[..4], le32(header, 4), le32(header, 8)), (&b"KDMV"[..], 3, 0x30001));
    let capacity = usize::try_from(le64(header, 12)).unwrap();
    assert_eq!((le64(header, 20), le64(header, 28), le32(header, 44)), (128, 1, 512));
    assert_eq!(
        (le64(header, 48), le64(header, 56)),
        (0, u64::MAX),
        "no redundant directory; directory at end"
    );
    assert_eq!((header[72], &header[73..77], header[77], header[78]), (0, &b"\n \r\n"[..], 1, 0));
    let descriptor = &file[512..512 * (1 + usize::try_from(le64(header, 36)).unwrap())];
    let text = std::str::from_utf8(descriptor).unwrap().trim_end_matches('\0');
    assert!(
        text.starts_with("# Disk DescriptorFile\n") && text.contains("createType=\"streamOptimized\"\n"),
        "{text}"
    );
    assert!(text.contains(&format!("\nRW {capacity} SPARSE \"")), "{text}");
    let overhead = usize::try_from(le64(header, 64)).unwrap();
    assert!(file[512 + descriptor.len()..overhead * 512].iter().all(|byte| *byte == 0));

    let mut disk = vec![0; capacity * 512];
    let (mut at, mut table, mut tables) = (overhead, vec![0; 512], vec![0; capacity.div_ceil(128 * 512)]);
    let (mut next, mut directory) = (0, None);
    loop {
        let sector = &file[at * 512..];
        let (value, size, kind) =
            (usize::try_from(le64(sector, 0)).unwrap(), le32(sector, 8), le32(sector, 12));
        if size > 0 {
            let grain = value / 128;
            assert!(
                value % 128 == 0 && value >= next && directory.is_none(),
                "grains in order, before the directory"
            );
            assert!(table.iter().all(|e| *e == 0) || (value / 65536 == (next - 1) / 65536), "table {grain}");
            let mut out = vec![0; GRAIN];
            let mut inflate = flate2::Decompress::new(true);
            let status = inflate
                .decompress(&sector[12..12 + size], &mut out, flate2::FlushDecompress::Finish)
                .unwrap();
            assert_eq!(
                (status, inflate.total_in(), inflate.total_out()),
                (flate2::Status::StreamEnd, size as u64, GRAIN as u64)
            );
            let end = ((grain + 1) * GRAIN).min(disk.len());
            disk[grain * GRAIN..end].copy_from_slice(&out[..end - grain * GRAIN]);
            table[grain % 512] = at;
            next = value + 128;
            at += (12 + size).div_ceil(512);
            continue;
        }
        assert!(sector[16..512].iter().all(|byte| *byte == 0), "padding of markers");
        match kind {
            0 => break assert!(directory.is_none() && at * 512 + 512 == file.len(), "end of stream at {at}"),
            1 => {
                let found: Vec<_> = (0..512).map(|index| le32(sector, 512 + index * 4)).collect();
                assert_eq!((value, &found), (4, &table));
                tables[(next - 1) / 65536] = at + 1;
                table.fill(0);
                at += 5;
            }
            2 => {
                let found: Vec<_> = (0..tables.len()).map(|index| le32(sector, 512 + index * 4)).collect();
                assert_eq!((value, &found), ((tables.len() * 4).div_ceil(512), &tables));
                directory = Some(at + 1);
                at += 1 + value;
            }
            3 => {
                let footer = &sector[512..1024];
                assert_eq!((value, le64(footer, 56)), (1, directory.take().unwrap() as u64));
                assert_eq!((&footer[..56], &footer[64..]), (&header[..56], &header[64..]));
                at += 2;
            }
            other => panic!("marker {other} at sector {at}"),
        }
    }
    assert!(table.iter().all(|entry| *entry == 0), "every grain is in a table");
    disk
}

#[test]
fn ours_is_to_the_letter_and_read_by_others() {
    requires!(qemu10());
    let libvmdk = tool("vmdkinfo").is_ok();
    let dir = Dir::new();
    for (name, bytes) in shapes() {
        dir.write("a.raw", &bytes);
        dir.vimg_ok(&format!("convert -f raw {STREAM} a.raw a.vmdk"));
        assert!(walk(&dir.read("a.vmdk")) == bytes, "{name}");
        dir.qemu_ok("compare -f raw -F vmdk a.raw a.vmdk");
        dir.vimg_ok("compare -f raw -F vmdk a.raw a.vmdk");
        dir.same_json("info --output=json a.vmdk");
        dir.same_json("map --output=json a.vmdk");
        dir.same("check a.vmdk");
        if libvmdk {
            let said = Cmd::new("vmdkinfo").arg("a.vmdk").dir(dir.path()).ok().stdout;
            assert!(
                said.contains("Stream optimized") && said.contains(&format!("({} bytes)", bytes.len())),
                "{said}"
            );
        }
        std::fs::remove_file(dir.file("a.vmdk")).unwrap();
    }
    if let Err(reason) = tool("vmdkinfo") {
        tests::skip::note(&reason);
    }
}

#[test]
fn theirs_is_read_by_us() {
    requires!(qemu10());
    let dir = Dir::new();
    for (name, bytes) in shapes() {
        dir.write("a.raw", &bytes);
        dir.qemu_ok(&format!("convert -f raw {STREAM} a.raw a.vmdk"));
        assert!(dir.vimg_reads("a.vmdk") == bytes, "{name}");
        dir.same("info a.vmdk");
        dir.same_json("map --output=json a.vmdk");
        dir.same_json("check --output=json a.vmdk");
        dir.vimg_ok("convert -O qcow2 a.vmdk a.qcow2");
        dir.qemu_ok("compare -f raw -F qcow2 a.raw a.qcow2");
    }
}

#[test]
fn levels_threads_and_order_change_nothing_but_the_size() {
    let dir = Dir::new();
    let (_, bytes) = shapes().remove(4);
    dir.write("a.raw", &bytes);
    let mut sizes = vec![];
    for more in ["--compression-level 1", "--compression-level 12", "-W --threads 7", "-c -m 1", "-S 0"] {
        dir.vimg_ok(&format!("convert {more} -f raw {STREAM} a.raw a.vmdk"));
        let file = dir.read("a.vmdk");
        assert!(walk(&file) == bytes, "{more}");
        sizes.push(file.len());
        std::fs::remove_file(dir.file("a.vmdk")).unwrap();
    }
    assert!(sizes[1] <= sizes[0] && sizes[2] == sizes[3] && sizes[4] > sizes[3], "{sizes:?}");
    dir.vimg(&format!("convert --compression-level 13 -f raw {STREAM} a.raw a.vmdk")).expect_code(1);
    assert!(!dir.exists("a.vmdk"));
}

/// Runs `vimg WORDS` with both ends in files.
fn piped(dir: &Dir, words: &str, from: &str, to: &str) -> Option<i32> {
    use std::process::{Command, Stdio};
    let input =
        if from.is_empty() { Stdio::null() } else { std::fs::File::open(dir.file(from)).unwrap().into() };
    let output = std::fs::File::create(dir.file(to)).unwrap();
    let mut command = Command::new(command::vimg_path());
    command.args(words.split_whitespace()).current_dir(dir.path()).stdin(input).stdout(output);
    command.stderr(std::fs::File::create(dir.file("stderr")).unwrap());
    command.status().unwrap().code()
}

#[test]
fn a_stream_goes_through_pipes() {
    let dir = Dir::new();
    for (name, bytes) in shapes() {
        dir.write("a.raw", &bytes);
        assert_eq!(
            piped(&dir, &format!("convert -p -f raw {STREAM} a.raw -"), "", "a.vmdk"),
            Some(0),
            "{name}"
        );
        assert!(walk(&dir.read("a.vmdk")) == bytes, "{name}");
        assert!(String::from_utf8_lossy(&dir.read("stderr")).contains("(100.00/100%)"));
        for target in
            ["convert -O raw - b.raw", "convert -p -O raw - b.raw", "convert -f vmdk -O raw -m 1 - b.raw"]
        {
            assert_eq!(piped(&dir, target, "a.vmdk", "out"), Some(0), "{name}");
            assert!(dir.read("b.raw") == bytes, "{name}");
            std::fs::remove_file(dir.file("b.raw")).unwrap();
        }
        assert_eq!(
            piped(&dir, "convert -c -O qcow2 -o cluster_size=512k - b.qcow2", "a.vmdk", "out"),
            Some(0)
        );
        dir.vimg_ok("compare -f raw -F qcow2 a.raw b.qcow2");
        std::fs::remove_file(dir.file("b.qcow2")).unwrap();
        assert_eq!(piped(&dir, &format!("convert {STREAM} - -"), "a.vmdk", "b.vmdk"), Some(0));
        assert!(walk(&dir.read("b.vmdk")) == bytes, "{name}");
    }
}

#[test]
fn what_does_not_go_through_a_pipe_is_refused() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.write("a.raw", &disk(128 * 8, &[0, 3, 7]));
    dir.vimg_ok(&format!("convert -f raw {STREAM} a.raw a.vmdk"));
    dir.qemu_ok(&format!("convert -f raw {STREAM} a.raw theirs.vmdk"));
    let whole = dir.read("a.vmdk");
    for len in [0, 100, 512, 30_000, 65536, 100_000, whole.len() - 1536, whole.len() - 512] {
        dir.write("cut.vmdk", &whole[..len]);
        assert_eq!(piped(&dir, "convert -O raw - b.raw", "cut.vmdk", "out"), Some(1), "{len}");
        assert!(!dir.exists("b.raw"), "{len}");
        if len > 0 {
            dir.vimg("convert -f vmdk -O raw cut.vmdk b.raw").expect_code(1).expect_no_panic();
            assert!(!dir.exists("b.raw"), "{len}");
        }
    }
    for (words, from) in [
        ("convert -O raw - b.raw", "theirs.vmdk"),
        ("convert -O raw - b.raw", "a.raw"),
        ("convert --salvage -O raw - b.raw", "a.vmdk"),
        ("convert -O raw - a.raw b.raw", "a.vmdk"),
        ("convert -f qcow2 -O raw - b.raw", "a.vmdk"),
    ] {
        assert_eq!(piped(&dir, words, from, "out"), Some(1), "{words}");
        assert!(!dir.exists("b.raw"), "{words}");
    }
    let backed = format!("convert -f raw {STREAM} -B a.vmdk -F vmdk a.raw -");
    assert_eq!(piped(&dir, &backed, "", "out"), Some(1));
    assert!(dir.read("out").is_empty());
}

#[test]
fn an_existing_stream_is_filled_but_not_rewritten() {
    requires!(qemu10());
    let dir = Dir::new();
    let bytes = disk(128 * 600, &[0, 3, 512, 599]);
    dir.write("a.raw", &bytes);
    dir.vimg_ok("create -q -f vmdk -o subformat=streamOptimized a.vmdk 39321600");
    assert!(walk(&dir.read("a.vmdk")) == vec![0; bytes.len()]);
    dir.qemu_ok("info a.vmdk");
    dir.vimg_ok("convert -n -f raw -O vmdk a.raw a.vmdk");
    assert!(walk(&dir.read("a.vmdk")) == bytes);
    dir.qemu_ok("compare -f raw -F vmdk a.raw a.vmdk");
    let ran = dir.vimg("convert -n -f raw -O vmdk a.raw a.vmdk").expect_code(1);
    assert!(
        ran.stderr.contains("Could not write to allocated cluster for streamOptimized"),
        "{}",
        ran.story()
    );
    assert!(dir.vimg_reads("a.vmdk") == bytes, "and is what it was");
    // Theirs has no place for more.
    dir.qemu_ok("create -q -f vmdk -o subformat=streamOptimized q.vmdk 39321600");
    let before = dir.read("q.vmdk");
    dir.vimg_ok("check q.vmdk");
    let ran = dir.vimg("convert -n -f raw -O vmdk a.raw q.vmdk").expect_code(1);
    assert!(ran.stderr.contains("read-only") && dir.read("q.vmdk") == before, "{}", ran.story());
}

#[test]
fn damage_is_an_error_and_never_zeros() {
    let dir = Dir::new();
    dir.write("a.raw", &disk(128 * 8, &[0, 3, 7]));
    dir.vimg_ok(&format!("convert -f raw {STREAM} a.raw a.vmdk"));
    let good = dir.read("a.vmdk");
    let directory = usize::try_from(le64(&good, good.len() - 1024 + 56)).unwrap();
    let table = le32(&good, directory * 512) * 512;
    let grain = le32(&good, table) * 512;
    let entry = |value: u32| value.to_le_bytes().to_vec();
    let damages = [
        ("directory into the header", directory * 512, entry(1)),
        ("directory past the end", directory * 512, entry(1 << 30)),
        ("entry into the descriptor", table, entry(5)),
        ("entry past the end", table, entry(u32::MAX)),
        ("entry to another grain", table, good[table + 12..table + 16].to_vec()),
        ("entry to a table", table, entry(u32::try_from(table / 512 - 1).unwrap())),
        ("size of nothing", grain + 8, entry(0)),
        ("size beyond reason", grain + 8, entry(u32::MAX)),
        ("cut data", grain + 8, entry(1000)),
        ("garbage", grain + 500, vec![0x55; 300]),
        ("footer with another size", good.len() - 1024 + 12, entry(77)),
        ("footer without directory", good.len() - 1024 + 56, vec![0; 8]),
        ("footer pointing to itself", good.len() - 1024 + 56, vec![0xff; 8]),
        ("no footer", good.len() - 1536, vec![0; 16]),
    ];
    for (what, at, bytes) in damages {
        dir.write("bad.vmdk", &good);
        dir.poke("bad.vmdk", at as u64, &bytes);
        let cmd = dir.vimg_cmd("convert -f vmdk -O raw bad.vmdk b.raw").memory_mib(400).timeout(20);
        let ran = cmd.run().expect_code(1).expect_no_panic();
        assert!(!dir.exists("b.raw") && !ran.timed_out, "{what}: {}", ran.story());
        let checked = dir.vimg("check bad.vmdk").expect_no_panic();
        assert_ne!(checked.code, Some(0), "{what}: {}", checked.story());
    }
}

/// A descriptor with one extent.
fn descriptor(kind: &str, word: &str, sectors: usize, file: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n# Extent \
         description\nRW {sectors} {word} \"{file}\"\n\n#DDB\nddb.adapterType = \"lsilogic\"\n"
    )
}

fn put(bytes: &mut Vec<u8>, at: usize, value: &[u8]) {
    if bytes.len() < at + value.len() {
        bytes.resize(at + value.len(), 0);
    }
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A COWD extent that holds those grains of `disk` that are not zero.
fn cowd(disk: &[u8], grain_sectors: usize) -> Vec<u8> {
    let (sectors, grain) = (disk.len() / 512, grain_sectors * 512);
    let tables = sectors.div_ceil(grain_sectors * 4096);
    let mut file = vec![];
    let fields =
        [1, 3, sectors, grain_sectors, 4, tables, 0].map(|n| u32::try_from(n).unwrap().to_le_bytes());
    put(&mut file, 0, b"COWD");
    put(&mut file, 4, &fields.concat());
    let mut next = 4 + (tables * 4).div_ceil(512);
    put(&mut file, 0, &[]);
    file.resize(next * 512, 0);
    for (bytes, index) in disk.chunks(grain).zip(0..) {
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        let slot = 4 * 512 + index / 4096 * 4;
        if le32(&file, slot) == 0 {
            put(&mut file, slot, &u32::try_from(next).unwrap().to_le_bytes());
            put(&mut file, next * 512, &[0; 16384]);
            next += 32;
        }
        let entry = le32(&file, slot) * 512 + index % 4096 * 4;
        put(&mut file, entry, &u32::try_from(next).unwrap().to_le_bytes());
        put(&mut file, next * 512, bytes);
        next += grain_sectors;
        file.resize(next * 512, 0);
    }
    file
}

/// An SESparse extent of `disk`, its tables and grains in reverse order.
fn sesparse(disk: &[u8]) -> Vec<u8> {
    let (sectors, grains) = (disk.len() / 512, disk.len().div_ceil(4096));
    let tables = grains.div_ceil(4096);
    let (gd, gts, data) = (16, 32, 32 + tables * 64);
    let mut file = vec![];
    let words =
        |words: &[usize]| words.iter().flat_map(|word| (*word as u64).to_le_bytes()).collect::<Vec<_>>();
    put(&mut file, 0, &words(&[0xcafe_babe, 0x2_0000_0001, sectors, 8, 64, 0, 0, 0, 0, 0]));
    let areas = [1, 1, 2, 1, 3, 1, gd, 16, gts, tables * 64, data - 1, 1, data - 1, 1, data, grains * 8];
    put(&mut file, 80, &words(&areas));
    put(&mut file, 512, &words(&[0xcafe_cafe, 0, 0, 0]));
    file.resize((data + grains * 8) * 512, 0);
    for (bytes, index) in disk.chunks(4096).zip(0..) {
        let (table, place) = (tables - 1 - index / 4096, grains - 1 - index);
        put(&mut file, gd * 512 + index / 4096 * 8, &(0x1000_0000_0000_0000 | table as u64).to_le_bytes());
        let entry = match bytes.iter().all(|byte| *byte == 0) {
            true => ((index % 3) as u64) << 60,
            false => 3 << 60 | (place as u64 & 0xfff) << 48 | place as u64 >> 12,
        };
        put(&mut file, gts * 512 + table * 32768 + index % 4096 * 8, &entry.to_le_bytes());
        if entry >> 60 == 3 {
            put(&mut file, (data + place * 8) * 512, bytes);
        }
    }
    file
}

#[test]
fn extents_of_esx_hosts_are_read_as_qemu_reads_them() {
    requires!(qemu10());
    let dir = Dir::new();
    let bytes = disk(128 * 700, &[0, 1, 2, 40, 512, 699]);
    dir.write("a.raw", &bytes);
    for grain in [1, 8, 128] {
        dir.write("d-delta.vmdk", &cowd(&bytes, grain));
        dir.write(
            "d.vmdk",
            descriptor("vmfsSparse", "VMFSSPARSE", bytes.len() / 512, "d-delta.vmdk").as_bytes(),
        );
        dir.qemu_ok("compare -f raw -F vmdk a.raw d.vmdk");
        // The extent alone is a disk here; qemu wants a descriptor.
        for name in ["d.vmdk", "d-delta.vmdk"] {
            dir.vimg_ok(&format!("compare -f raw -F vmdk a.raw {name}"));
        }
        dir.same_json("map --output=json d.vmdk");
        dir.same("check d.vmdk");
        dir.same("info d.vmdk");
    }
    dir.write("s-sesparse.vmdk", &sesparse(&bytes));
    dir.write("s.vmdk", descriptor("seSparse", "SESPARSE", bytes.len() / 512, "s-sesparse.vmdk").as_bytes());
    dir.qemu_ok("compare -f raw -F vmdk a.raw s.vmdk");
    dir.vimg_ok("compare -f raw -F vmdk a.raw s.vmdk");
    dir.same_json("map --output=json s.vmdk");
    dir.same("info s.vmdk");
    dir.same("check s.vmdk");
    dir.poke("s-sesparse.vmdk", 512 + 24, &[1]);
    let ran = dir.vimg("convert -O raw s.vmdk b.raw").expect_code(1);
    assert!(ran.stderr.contains("Replaying journal not supported"), "{}", ran.story());
}

#[test]
fn a_child_hides_its_parent_with_zeros() {
    requires!(qemu10());
    let dir = Dir::new();
    let base = disk(128 * 20, &[0, 1, 5, 19]);
    let mut top = base.clone();
    top[GRAIN..2 * GRAIN].fill(0);
    top[7 * GRAIN..7 * GRAIN + 100].fill(3);
    dir.write("base.raw", &base);
    dir.write("top.raw", &top);
    dir.vimg_ok("convert -f raw -O vmdk base.raw base.vmdk");
    for zeroed in ["", ",zeroed_grain=on"] {
        dir.vimg_ok(&format!("convert -f raw {STREAM}{zeroed} -B base.vmdk -F vmdk top.raw top.vmdk"));
        dir.qemu_ok("compare -f raw -F vmdk top.raw top.vmdk");
        dir.vimg_ok("compare -f raw -F vmdk top.raw top.vmdk");
        dir.vimg_ok("check top.vmdk");
        std::fs::remove_file(dir.file("top.vmdk")).unwrap();
    }
    dir.qemu_ok(&format!("convert -f raw {STREAM} -B base.vmdk -F vmdk top.raw top.vmdk"));
    assert!(dir.vimg_reads("top.vmdk") == top);
}

#[test]
fn plain_subformats_are_not_compressed() {
    requires!(qemu10());
    let dir = Dir::new();
    let bytes = disk(128 * 20, &[1, 2, 19]);
    dir.write("a.raw", &bytes);
    dir.same("convert -c -f raw -O vmdk a.raw a.vmdk");
    dir.qemu_ok("compare -f raw -F vmdk a.raw a.vmdk");
    assert!(dir.read("a.vmdk").len() >= 3 * GRAIN);
    dir.same("convert -c -f raw -O vpc a.raw a.vpc");
}

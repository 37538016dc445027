//! VDI against qemu-img: images in both directions, what the tools say of them, and what vimg does where qemu-img gives up or
//! gives the wrong bytes.

use tests::skip::qemu10;
use tests::{Dir, Ops, requires};
use vdi::{Header, ImageType, Uuid};

const SIZE: u64 = 21 << 20;

/// A raw disk with something everywhere.
fn source(dir: &Dir) -> Vec<u8> {
    dir.sparse("src.raw", SIZE);
    dir.qemu_io("raw", "src.raw", &Ops::tour(SIZE, 1 << 20, 3, false, false));
    dir.read("src.raw")
}

fn source_without_qemu(dir: &Dir) -> Vec<u8> {
    dir.sparse("src.raw", SIZE);
    dir.poke("src.raw", 5 << 20, &[5; 3 << 20]);
    dir.poke("src.raw", SIZE - 100, &[6; 100]);
    dir.read("src.raw")
}

#[test]
fn what_qemu_makes_is_read_and_written() {
    requires!(qemu10());
    for options in ["static=off", "static=on"] {
        let dir = Dir::new();
        let bytes = source(&dir);
        dir.qemu_ok(&format!("convert -O vdi -o {options} src.raw a.vdi"));
        assert!(dir.vimg_reads("a.vdi") == bytes, "{options}");
        // Written to by us, read and checked by qemu.
        dir.sparse("other.raw", SIZE);
        dir.poke("other.raw", (11 << 20) + 77, &[0xab; 3 << 20]);
        dir.vimg_ok("convert -n -f raw -O vdi other.raw a.vdi");
        assert!(dir.qemu_reads("a.vdi") == dir.read("other.raw"), "{options}");
        dir.qemu_ok("check a.vdi");
        dir.same("check --output=json a.vdi");
    }
}

#[test]
fn what_vimg_makes_qemu_reads_and_writes() {
    requires!(qemu10());
    for options in ["static=off", "static=on", "static=on,preallocation=full", "preallocation=falloc"] {
        let dir = Dir::new();
        let bytes = source(&dir);
        dir.vimg_ok(&format!("convert -O vdi -o {options} src.raw a.vdi"));
        assert!(dir.qemu_reads("a.vdi") == bytes, "{options}");
        dir.qemu_ok("check a.vdi");
        dir.qemu_io("vdi", "a.vdi", &Ops::tour(SIZE, 1 << 20, 9, false, false));
        assert!(dir.vimg_reads("a.vdi") == dir.qemu_reads("a.vdi"), "{options}");
        dir.vimg("check a.vdi").expect_code(0);
    }
}

#[test]
fn the_tools_say_the_same() {
    requires!(qemu10());
    let dir = Dir::new();
    source(&dir);
    for (name, options) in [("d.vdi", "static=off"), ("s.vdi", "static=on")] {
        dir.qemu_ok(&format!("convert -O vdi -o {options} src.raw {name}"));
        for words in [
            "info --output=json NAME",
            "info NAME",
            "map --output=json NAME",
            "map NAME",
            "check NAME",
            "check --output=json NAME",
            "compare src.raw NAME",
            "resize NAME 40M",
            "snapshot -c x NAME",
            "rebase -u -b x -F raw NAME",
        ] {
            dir.same(&words.replace("NAME", name));
        }
    }
    dir.same("create -f vdi x.vdi 3M");
    dir.same("create -f vdi -o static=on x.vdi 3M");
    dir.same("create -f vdi -o static=maybe x.vdi 3M");
    dir.same("create -f vdi -o preallocation=metadata x.vdi 3M");
    dir.same("create -f vdi x.vdi 600T");
    dir.same("create -f vdi -b d.vdi -F vdi x.vdi");
    dir.same("create -f vdi -o help");
    dir.same("create -f vdi -o help x.vdi");
    dir.same("convert -c -O vdi src.raw x.vdi");
    dir.same("measure -O vdi src.raw");
    dir.write("z.bin", &[0; 4096]);
    dir.same("info -f vdi z.bin");
    for size in [0u64, 1, 1000, 512, 1 << 20, (1 << 20) + 1, 2 << 40] {
        dir.qemu_ok(&format!("create -f vdi q.vdi {size}"));
        dir.vimg_ok(&format!("create -f vdi v.vdi {size}"));
        let shown =
            |name: &str| dir.qemu_ok(&format!("info --output=json {name}")).json()["virtual-size"].clone();
        assert_eq!(shown("q.vdi"), shown("v.vdi"));
    }
}

/// One thing changed in the header: the same answer as qemu-img's, or a refusal where qemu-img reads on.
#[test]
fn headers_are_judged_as_qemu_judges_them() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f vdi good.vdi 64M");
    let alike: [(u64, u32); 13] = [
        (0x44, 1),
        (0x44, 0x20000),
        (0x48, 0),
        (0x48, 0x1000),
        (0x50, 0xff),
        (0x154, 0x201),
        (0x158, 0x401),
        (0x168, 4096),
        (0x170, 65 << 20),
        (0x174, 0x8000_0000),
        (0x180, 63),
        (0x1a8, 7),
        (0x1b8, 7),
    ];
    for (at, value) in alike {
        dir.copy("good.vdi", "a.vdi");
        dir.poke("a.vdi", at, &value.to_le_bytes());
        dir.same("info --output=json a.vdi");
    }
    // The map in the header or behind the end, the data in the map, longer blocks, unknown kinds.
    for (at, value) in
        [(0x154, 0), (0x154, 0x1000_0000), (0x158, 0), (0x17c, 512), (0x4c, 0), (0x4c, 3), (0x4c, 5)]
    {
        dir.copy("good.vdi", "a.vdi");
        dir.poke("a.vdi", at, &u32::to_le_bytes(value));
        dir.vimg("info a.vdi").expect_clean_failure();
        dir.vimg("convert -O raw a.vdi x.raw").expect_clean_failure();
    }
}

/// The map, entry by entry: qemu-img's words for what it finds, and an error for what it reads as zeros.
#[test]
fn the_map_is_checked_as_by_qemu_and_then_some() {
    requires!(qemu10());
    let dir = Dir::new();
    source(&dir);
    dir.qemu_ok("convert -O vdi src.raw good.vdi");
    let entry = |index: u64| 0x200 + 4 * index;
    let poke = |at: u64, value: u32| {
        dir.copy("good.vdi", "a.vdi");
        dir.poke("a.vdi", at, &value.to_le_bytes());
    };
    // Two blocks in one place, a count that is wrong, a number that no block has; discarded blocks are fine.
    for (at, value) in [(entry(3), 0), (0x184, 99), (entry(3), 1000), (entry(3), 0xffff_fffd)] {
        poke(at, value);
        dir.same("check a.vdi");
        dir.same_json("check --output=json a.vdi");
    }
    poke(entry(0), 0xffff_fffe);
    dir.vimg("check a.vdi").expect_code(0);
    assert!(dir.vimg_reads("a.vdi") == dir.qemu_reads("a.vdi"), "discarded blocks are zeros");
    poke(entry(3), 0);
    dir.vimg("convert -n -f raw -O vdi src.raw a.vdi").expect_clean_failure().expect_stderr("same place");
    poke(entry(3), 20);
    dir.vimg("check a.vdi").expect_code(2).expect_stderr("lies past the end of the file");
    dir.vimg("convert -O raw a.vdi x.raw")
        .expect_clean_failure()
        .expect_stderr("lies past the end of the file");
    // An interrupted download.
    let good = dir.read("good.vdi");
    for len in [good.len() - 4096, good.len() / 2, 0x210] {
        dir.write("a.vdi", &good[..len]);
        dir.vimg("convert -O raw a.vdi x.raw").expect_clean_failure().expect_stderr("cut off");
    }
    // A count that is wrong can be put right, and does no harm before: no block is given out twice.
    poke(0x184, 1);
    dir.copy("a.vdi", "b.vdi");
    dir.vimg("check -r all a.vdi").expect_code(0);
    dir.qemu_ok("check a.vdi");
    dir.sparse("other.raw", SIZE);
    dir.poke("other.raw", 18 << 20, &[0xab; 2 << 20]);
    dir.vimg_ok("convert -n -f raw -O vdi other.raw b.vdi");
    assert!(dir.qemu_reads("b.vdi") == dir.read("other.raw"));
    dir.qemu_ok("check b.vdi");
}

/// A disk size that is smaller than the map says: no disk without its end, and no repair that hides it.
#[test]
fn a_size_that_is_not_that_of_the_map_is_refused() {
    let dir = Dir::new();
    dir.vimg_ok("create -f vdi good.vdi 9M");
    for size in [2u64 << 20, 8 << 20, 0] {
        dir.copy("good.vdi", "a.vdi");
        dir.poke("a.vdi", 0x170, &size.to_le_bytes());
        let before = dir.read("a.vdi");
        for words in
            ["info a.vdi", "convert -O raw a.vdi x.raw", "check a.vdi", "check -r all a.vdi", "map a.vdi"]
        {
            let refused = dir.vimg(words).expect_clean_failure();
            refused.expect_stderr(&format!("the disk has {size} bytes")).expect_stderr("has 9:");
        }
        assert!(dir.read("a.vdi") == before, "{size}");
    }
    // A part of a block is a block.
    dir.copy("good.vdi", "a.vdi");
    dir.poke("a.vdi", 0x170, &((8u64 << 20) + 512).to_le_bytes());
    dir.vimg("check a.vdi").expect_code(0);
}

/// A disk of nine blocks that are all stored, the one in `hole` freed.
fn with_hole(dir: &Dir, hole: u64) -> Vec<u8> {
    dir.write("src.raw", &[0x11; 9 << 20]);
    dir.vimg_ok("convert -f raw -O vdi src.raw a.vdi");
    dir.poke("a.vdi", (1 << 20) + 4 * hole, &u32::MAX.to_le_bytes());
    dir.vimg_reads("a.vdi")
}

/// A freed block leaves a hole: nothing to repair for ever, and no new block ever lies on another.
#[test]
fn a_freed_block_is_no_damage() {
    let allocated = |dir: &Dir| Header::parse(&dir.read("a.vdi")[..512]).unwrap().allocated;
    for hole in [0, 4, 8] {
        let dir = Dir::new();
        let mut bytes = with_hole(&dir, hole);
        dir.vimg("check -r all a.vdi").expect_code(0);
        dir.vimg("check a.vdi").expect_code(0);
        assert_eq!(allocated(&dir), if hole == 8 { 8 } else { 9 });
        assert!(dir.vimg_reads("a.vdi") == bytes, "{hole}");
        // A part of the block is written: its number is one of the nine, and nobody else's.
        let at = usize::try_from(hole << 20).unwrap() + 512;
        dir.vimg_ok(&format!("bench -f vdi -w -c 1 -d 1 --pattern=34 -s 512 -o {at} a.vdi"));
        bytes[at..at + 512].fill(34);
        assert!(dir.vimg_reads("a.vdi") == bytes, "{hole}");
        dir.vimg("check a.vdi").expect_code(0);
        assert_eq!((allocated(&dir), dir.read("a.vdi").len()), (9, 11 << 20));
    }
    // A count that is that of the blocks, but less than the highest number, would give that one out again.
    let dir = Dir::new();
    let bytes = with_hole(&dir, 4);
    dir.poke("a.vdi", 0x184, &8u32.to_le_bytes());
    dir.vimg("check a.vdi").expect_code(2).expect_stderr("is 9, should be 8");
    dir.vimg("check -r all a.vdi").expect_code(0);
    assert_eq!(allocated(&dir), 9);
    dir.vimg("check a.vdi").expect_code(0);
    assert!(dir.vimg_reads("a.vdi") == bytes);
}

/// Sizes without bounds: little time, little memory.
#[test]
fn headers_without_bounds_cost_nothing() {
    let dir = Dir::new();
    dir.vimg_ok("create -f vdi a.vdi 1M");
    let limited = |words: &str| dir.vimg_cmd(words).memory_mib(512).timeout(20).run().expect_no_panic();
    let header = Header::parse(&dir.read("a.vdi")[..512]).unwrap();
    let huge = Header {
        disk_size: 0x1fff_ff80 << 20,
        blocks: 0x1fff_ff80,
        allocated: u32::MAX,
        data_offset: 0x8010_0000,
        ..header
    };
    dir.poke("a.vdi", 0, &huge.encode());
    limited("info a.vdi").expect_clean_failure();
    // The map is there, as a hole: all blocks are block 0.
    dir.sparse("a.vdi", 3 << 30);
    dir.poke("a.vdi", 0, &huge.encode());
    limited("info a.vdi").expect_code(0);
    limited("convert -n -f raw -O vdi a.vdi a.vdi").expect_clean_failure();
    limited("bench -f vdi -w -c 1 -s 512 a.vdi").expect_clean_failure().expect_stderr("same place");
}

/// VirtualBox's snapshots know their parents by UUID only.
#[test]
fn a_difference_is_read_on_the_parent_that_the_user_names() {
    let dir = Dir::new();
    let mut bytes = source_without_qemu(&dir);
    dir.vimg_ok("convert -f raw -O vdi src.raw base.vdi");
    dir.vimg_ok("convert -f raw -O vdi src.raw twin.vdi");
    let base = Header::parse(&dir.read("base.vdi")[..512]).unwrap();
    let child = Header {
        image_type: ImageType::Differencing,
        parent: base.uuid,
        parent_modified: base.modified,
        uuid: Uuid([0x77; 16]),
        allocated: 0,
        ..base.clone()
    };
    dir.vimg_ok(&format!("create -f vdi child.vdi {SIZE}"));
    dir.poke("child.vdi", 0, &child.encode());
    // Block 5 is known to be zeros.
    dir.poke("child.vdi", u64::from(child.map_offset) + 20, &0xffff_fffe_u32.to_le_bytes());
    bytes[5 << 20..6 << 20].fill(0);
    let refused = dir.vimg("convert -O raw child.vdi x.raw").expect_clean_failure();
    refused.expect_stderr(&format!("{{{}}}", base.uuid)).expect_stderr("--image-opts");
    dir.vimg("info child.vdi").expect_code(0);
    dir.vimg("check child.vdi").expect_code(0);
    let on = |parent: &str| {
        format!("driver=vdi,file.filename=child.vdi,backing.driver=vdi,backing.file.filename={parent}")
    };
    dir.vimg_ok(&format!("convert --image-opts -O raw {} x.raw", on("base.vdi")));
    assert!(dir.read("x.raw") == bytes);
    let refused = dir.vimg(&format!("convert --image-opts -O raw {} x.raw", on("twin.vdi")));
    refused.expect_clean_failure().expect_stderr("the parent is not the disk");
    let refused = dir.vimg(&format!(
        "convert --image-opts -O raw {} x.raw",
        "driver=vdi,file.filename=child.vdi,backing.driver=raw,backing.file.filename=src.raw"
    ));
    refused.expect_clean_failure().expect_stderr("the parent is not a VDI");
    // Parts of blocks, over data, over nothing and over zeros: the rest comes from below.
    for (number, offset) in [(1u8, (6 << 20) + 100), (2, (2 << 20) + 7), (3, (5 << 20) + 512)] {
        dir.vimg_ok(&format!(
            "bench -w -c 1 -d 1 --pattern={number} -s 3000 -o {offset} --image-opts {}",
            on("base.vdi")
        ));
        bytes[offset..offset + 3000].fill(number);
    }
    dir.vimg_ok(&format!("convert --image-opts -O raw {} x.raw", on("base.vdi")));
    assert!(dir.read("x.raw") == bytes);
    dir.vimg("check child.vdi").expect_code(0);
}

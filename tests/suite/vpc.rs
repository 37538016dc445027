//! VHD against qemu-img, which calls it vpc, and against libvhdi: images in both directions, what the tools say of them,
//! and what vimg does where qemu-img gives up or gives the wrong bytes.

use tests::skip::{qemu10, tool};
use tests::{Cmd, Dir, Ops, requires};
use vhd::{DiskType, DynamicHeader, Footer, Locator};

/// Creation options: their words for `-o`, and whether the disk keeps the size that was asked for.
const KINDS: &[(&str, bool)] = &[
    ("subformat=dynamic", false),
    ("force_size=on", true),
    ("subformat=fixed", false),
    ("subformat=fixed,force_size=on", true),
];

const SIZE: u64 = 21 << 20;

/// The disk that qemu-img sees (which takes a fixed VHD for a raw file unless it is told).
fn qemu_reads(dir: &Dir, image: &str) -> Vec<u8> {
    dir.qemu_ok(&format!("convert -f vpc -O raw {image} qemu-reads.raw"));
    let bytes = dir.read("qemu-reads.raw");
    std::fs::remove_file(dir.file("qemu-reads.raw")).unwrap();
    bytes
}

/// A raw disk with something everywhere.
fn source(dir: &Dir) -> Vec<u8> {
    dir.sparse("src.raw", SIZE);
    dir.qemu_io("raw", "src.raw", &Ops::tour(SIZE, 2 << 20, 3, false, false));
    dir.read("src.raw")
}

/// What is read begins with what was written; rounding up adds zeros.
#[track_caller]
fn begins_with(read: &[u8], written: &[u8]) {
    let (head, tail) = read.split_at(written.len());
    assert!(head == written, "other bytes");
    assert!(tail.iter().all(|byte| *byte == 0), "no zeros behind the end");
}

#[test]
fn what_qemu_makes_is_read_and_written() {
    requires!(qemu10());
    for (options, _) in KINDS {
        let dir = Dir::new();
        let bytes = source(&dir);
        dir.qemu_ok(&format!("convert -O vpc -o {options} src.raw a.vhd"));
        begins_with(&dir.vimg_reads("a.vhd"), &bytes);
        // Written to by us, read by qemu.
        dir.vimg_ok("create -f raw other.raw 9M");
        dir.poke("other.raw", (5 << 20) + 77, &[0xab; 3 << 20]);
        dir.vimg_ok("convert -n -f raw -O vpc other.raw a.vhd");
        let other = dir.read("other.raw");
        assert!(qemu_reads(&dir, "a.vhd")[..other.len()] == other[..], "{options}");
        assert!(dir.vimg_reads("a.vhd") == qemu_reads(&dir, "a.vhd"), "{options}");
    }
}

#[test]
fn what_vimg_makes_qemu_and_libvhdi_read() {
    requires!(qemu10());
    let judge = tool("vhdiinfo");
    for (options, exact) in KINDS {
        let dir = Dir::new();
        let bytes = source(&dir);
        dir.vimg_ok(&format!("convert -O vpc -o {options} src.raw a.vhd"));
        let read = qemu_reads(&dir, "a.vhd");
        begins_with(&read, &bytes);
        assert_eq!(read.len() as u64 == SIZE, *exact, "{options}");
        dir.qemu_io("vpc", "a.vhd", &Ops::tour(SIZE, 2 << 20, 9, false, false));
        assert!(dir.vimg_reads("a.vhd") == qemu_reads(&dir, "a.vhd"), "{options}");
        match &judge {
            Ok(()) => {
                let shown = Cmd::new("vhdiinfo").arg("a.vhd").dir(dir.path()).ok().stdout;
                let kind = if options.contains("fixed") { "Fixed" } else { "Dynamic" };
                assert!(
                    shown.contains(&format!("({} bytes)", read.len())) && shown.contains(kind),
                    "{shown}"
                );
            }
            Err(reason) => tests::skip::note(reason),
        }
    }
}

/// Every size gets the same geometry and virtual size as with qemu-img; both tools' footers agree but for who made it,
/// when, and the unique id.
#[test]
fn sizes_and_footers_are_qemus() {
    requires!(qemu10());
    let dir = Dir::new();
    let sizes =
        [0u64, 1, 512, 35_000, 1 << 20, 64 << 20, 504 << 20, 33_822_351_360, 127 << 30, 136_899_993_600];
    for (options, _) in KINDS {
        for size in sizes.into_iter().chain([136_899_994_112, 200 << 30, 2040 << 30]) {
            dir.qemu_ok(&format!("create -f vpc -o {options} q.vhd {size}"));
            dir.vimg_ok(&format!("create -f vpc -o {options} v.vhd {size}"));
            let footer = |name: &str| {
                let bytes = tail(&dir, name);
                Footer::parse(&bytes).unwrap_or_else(|error| panic!("{name} of {size}: {error}"))
            };
            let (theirs, ours) = (footer("q.vhd"), footer("v.vhd"));
            let of = |f: &Footer| {
                (f.features, f.data_offset, f.current_size, f.original_size, f.geometry, f.disk_type)
            };
            assert_eq!(of(&theirs), of(&ours), "{options} {size}");
            let shown = |name: &str| dir.qemu_ok(&format!("info -f vpc --output=json {name}")).json();
            // qemu-img cannot open a fixed disk of no sectors.
            if size > 0 {
                assert_eq!(
                    shown("q.vhd")["virtual-size"],
                    shown("v.vhd")["virtual-size"],
                    "{options} {size}"
                );
            }
        }
        let refused = dir.same(&format!("create -f vpc -o {options} x.vhd 2041G"));
        assert_eq!(refused.code, Some(1));
    }
}

/// The last 512 bytes of a file that may be 2 TiB long.
fn tail(dir: &Dir, name: &str) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::open(dir.file(name)).unwrap();
    let mut bytes = vec![0; 512];
    file.read_exact_at(&mut bytes, file.metadata().unwrap().len() - 512).unwrap();
    bytes
}

#[test]
fn the_tools_say_the_same() {
    requires!(qemu10());
    let dir = Dir::new();
    source(&dir);
    for (name, options) in [("d.vhd", "subformat=dynamic"), ("f.vhd", "subformat=fixed,force_size=on")] {
        dir.qemu_ok(&format!("convert -O vpc -o {options} src.raw {name}"));
        dir.same_json(&format!("info -f vpc --output=json {name}"));
        dir.same(&format!("info -f vpc {name}"));
        dir.same_json(&format!("map -f vpc --output=json {name}"));
        dir.same(&format!("map -f vpc {name}"));
        for words in ["resize -f vpc NAME 40M", "rebase -u -f vpc -b x -F raw NAME"] {
            dir.same(&words.replace("NAME", name));
        }
    }
    dir.same("snapshot -c x d.vhd");
    dir.same("compare src.raw d.vhd");
    dir.same_json("info --output=json d.vhd");
    dir.same("check -f vpc f.vhd");
    dir.same("create -f vpc -o subformat=thin x.vhd 1M");
    dir.same("create -f vpc -o force_size=3 x.vhd 1M");
    dir.same("create -f vpc -b d.vhd -F vpc x.vhd");
    dir.same("create -f vpc x.vhd 3M");
    dir.same("create -f vpc -o force_size=on,subformat=fixed x.vhd 3M");
    dir.same("create -f vpc -o help");
    dir.same("create -f vpc -o help x.vhd");
    dir.same("convert -c -O vpc src.raw x.vhd");
    dir.same("convert -O vpc -B d.vhd -F vpc src.raw x.vhd");
    dir.same("measure -O vpc src.raw");
    dir.same("info --image-opts driver=vpc,file.filename=d.vhd,force_size_calc=sectors");
    for mode in ["chs", "current_size"] {
        let words =
            format!("info --output=json --image-opts driver=vpc,file.filename=d.vhd,force_size_calc={mode}");
        assert_eq!(dir.qemu_ok(&words).json()["virtual-size"], dir.vimg_ok(&words).json()["virtual-size"]);
    }
}

/// qemu-img takes a fixed VHD for a raw file and gives the guest its footer; vimg looks at the end.
#[test]
fn a_fixed_disk_is_recognised_by_its_footer() {
    let dir = Dir::new();
    dir.vimg_ok("create -f vpc -o subformat=fixed,force_size=on a.vhd 3M");
    assert_eq!(dir.vimg_ok("info --output=json a.vhd").json()["format"], "vpc");
    assert_eq!(dir.vimg_reads("a.vhd").len(), 3 << 20);
    // Another size: a part of it is missing, or there is too much.
    let mut longer = vec![0; 512];
    longer.extend(dir.read("a.vhd"));
    dir.write("b.raw", &longer);
    for words in ["info b.raw", "info -f vpc b.raw", "convert -O raw b.raw x.raw"] {
        let refused = dir.vimg(words).expect_clean_failure();
        refused.expect_stderr("ends like a VHD, but its size is another").expect_stderr("-f raw");
    }
    dir.write("cut.vhd", &longer[1024..]);
    dir.vimg("info cut.vhd").expect_clean_failure().expect_stderr("its size is another");
    dir.vimg("info -f vpc cut.vhd").expect_clean_failure().expect_stderr("holds only");
    // And raw is what it is called by whoever knows better.
    assert_eq!(dir.vimg_ok("info -f raw --output=json a.vhd").json()["virtual-size"], (3 << 20) + 512);
    let mut broken = dir.read("a.vhd");
    broken[(3 << 20) + 70] ^= 1;
    dir.write("c.raw", &broken);
    let refused = dir.vimg("info c.raw").expect_clean_failure();
    refused.expect_stderr("ends like a VHD, but its footer is damaged").expect_stderr("-f raw");
    assert!(dir.vimg_ok("info -f raw c.raw").stderr.is_empty());
    dir.vimg("info -f vpc c.raw").expect_clean_failure().expect_stderr("Incorrect header checksum");
    // An old footer has 511 bytes.
    let old = dir.read("a.vhd");
    dir.write("d.vhd", &old[..old.len() - 1]);
    dir.vimg("compare -f vpc -F vpc a.vhd d.vhd").expect_code(0);
}

/// Nothing but the name is left of a fixed disk that was cut off.
#[test]
fn a_raw_disk_that_is_named_like_a_vhd_is_mentioned() {
    let dir = Dir::new();
    dir.vimg_ok("create -f vpc -o subformat=fixed,force_size=on a.vhd 3M");
    let good = dir.read("a.vhd");
    for name in ["cut.vhd", "cut.VHD"] {
        dir.write(name, &good[..2 << 20]);
        let shown = dir.vimg_ok(&format!("info --output=json {name}"));
        assert_eq!(shown.json()["format"], "raw");
        assert!(shown.stderr.contains("is named like a VHD"), "{}", shown.stderr);
        assert!(dir.vimg_ok(&format!("info -f raw {name}")).stderr.is_empty());
    }
    dir.write("cut.img", &good[..2 << 20]);
    assert!(dir.vimg_ok("info cut.img").stderr.is_empty());
}

/// One of the two footers is enough, and `check -r all` restores the other.
#[test]
fn a_damaged_footer_is_recovered_from_the_other() {
    let dir = Dir::new();
    let bytes = source_without_qemu(&dir);
    dir.vimg_ok("convert -f raw -O vpc -o force_size=on src.raw a.vhd");
    let good = dir.read("a.vhd");
    let start_lost = [&[0; 512][..], &good[512..]].concat();
    let end_lost = good[..good.len() - 512].to_vec();
    let end_torn = good[..good.len() - 100].to_vec();
    for (name, image) in [("start", start_lost), ("end", end_lost), ("torn", end_torn)] {
        dir.write("b.vhd", &image);
        let shown = dir.vimg_ok("info --output=json b.vhd");
        assert!(shown.stderr.contains("footer"), "{name}: {}", shown.stderr);
        assert_eq!(shown.json()["format"], "vpc", "{name}");
        assert!(dir.vimg_reads("b.vhd") == bytes, "{name}");
        dir.vimg("check b.vhd").expect_code(2).expect_stdout("1 errors were found");
        dir.vimg("check -r all b.vhd").expect_code(0);
        dir.vimg("check b.vhd").expect_code(0);
        assert!(dir.vimg_ok("info b.vhd").stderr.is_empty(), "{name}");
        assert!(dir.vimg_reads("b.vhd") == bytes, "{name}");
    }
    dir.write("b.vhd", &[&[0; 512][..], &good[512..good.len() - 512]].concat());
    dir.vimg("info -f vpc b.vhd").expect_clean_failure().expect_stderr("invalid VPC image");
}

fn source_without_qemu(dir: &Dir) -> Vec<u8> {
    dir.sparse("src.raw", SIZE);
    dir.poke("src.raw", 5 << 20, &[5; 3 << 20]);
    dir.poke("src.raw", SIZE - 100, &[6; 100]);
    dir.read("src.raw")
}

/// Makes a differencing disk on `parent`, known as `name` there: what Hyper-V's New-VHD -Differencing makes.
pub(crate) fn difference(dir: &Dir, child: &str, parent: &str, names: &[(&[u8; 4], Vec<u8>)]) {
    let parent = Footer::parse(&tail(dir, parent)).unwrap();
    let mut footer = Footer::new(parent.current_size, parent.geometry, DiskType::Differencing).unwrap();
    footer.creator = *b"win ";
    let footer = footer.encode();
    let entries = u32::try_from(parent.current_size.div_ceil(2 << 20)).unwrap();
    let mut header = DynamicHeader::new(8192, entries, 2 << 20);
    header.parent_id = parent.unique_id;
    let mut bytes = vec![0; 8192];
    for (index, (platform, name)) in names.iter().enumerate() {
        let offset = 2048 + 512 * index;
        bytes[offset..offset + name.len()].copy_from_slice(name);
        let len = u32::try_from(name.len()).unwrap();
        header.locators[index] = Locator { platform: **platform, space: 1, len, offset: offset as u64 };
    }
    bytes[..512].copy_from_slice(&footer);
    bytes[512..1536].copy_from_slice(&header.encode());
    bytes.extend(vec![0xff; usize::try_from(header.table_bytes()).unwrap()]);
    bytes.extend(footer);
    dir.write(child, &bytes);
}

pub(crate) fn wide(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[test]
fn a_difference_is_read_through_to_its_parent() {
    let dir = Dir::new();
    let mut bytes = source_without_qemu(&dir);
    dir.vimg_ok("convert -f raw -O vpc -o force_size=on src.raw base.vhd");
    std::fs::create_dir(dir.file("sub")).unwrap();
    difference(
        &dir,
        "child.vhd",
        "base.vhd",
        &[(b"W2ku", wide("C:\\vm\\gone.vhd")), (b"W2ru", wide(".\\base.vhd"))],
    );
    assert!(dir.vimg_reads("child.vhd") == bytes);
    assert_eq!(dir.vimg_ok("info --output=json child.vhd").json()["full-backing-filename"], "base.vhd");
    // Parts of sectors, over data and over nothing: the rest of a sector comes from the parent.
    let changes: [(usize, usize); 4] =
        [((5 << 20) + 100, 10), ((5 << 20) + 4000, 3000), (7, 1), (11 << 20, 512)];
    for (number, (offset, len)) in (0x71u8..).zip(changes) {
        dir.vimg_ok(&format!("bench -f vpc -w -c 1 -d 1 --pattern={number} -s {len} -o {offset} child.vhd"));
        bytes[offset..offset + len].fill(number);
    }
    assert!(dir.vimg_reads("child.vhd") == bytes);
    dir.vimg("check child.vhd").expect_code(0);
    dir.vimg("map --output=json child.vhd").expect_code(0);
    // A third generation, whose parent is named as a Macintosh names it.
    difference(&dir, "sub/top.vhd", "child.vhd", &[(b"MacX", b"file://./../child.vhd".to_vec())]);
    dir.vimg("info --backing-chain sub/top.vhd").expect_clean_failure();
    let outside = format!("--allow {} ", dir.path().display());
    let raw = dir.vimg(&format!("convert {outside} -O raw sub/top.vhd top.raw"));
    assert_eq!(raw.code, Some(0), "{}", raw.story());
    assert!(dir.read("top.raw") == bytes);
}

#[test]
fn another_parent_or_none_is_refused() {
    let dir = Dir::new();
    source_without_qemu(&dir);
    dir.vimg_ok("convert -f raw -O vpc -o force_size=on src.raw base.vhd");
    dir.vimg_ok("convert -f raw -O vpc -o force_size=on src.raw twin.vhd");
    difference(&dir, "child.vhd", "base.vhd", &[(b"W2ru", wide("twin.vhd"))]);
    let refused = dir.vimg("convert -O raw child.vhd x.raw").expect_clean_failure();
    refused.expect_stderr("the parent is not the disk that this image was made on");
    difference(&dir, "child.vhd", "base.vhd", &[(b"W2ru", wide("gone.vhd"))]);
    dir.vimg("convert -O raw child.vhd x.raw").expect_clean_failure().expect_stderr("gone.vhd");
    difference(&dir, "child.vhd", "base.vhd", &[(b"W2ru", wide("child.vhd"))]);
    dir.vimg("convert -O raw child.vhd x.raw").expect_clean_failure().expect_stderr("infinite loop");
    difference(&dir, "child.vhd", "base.vhd", &[(b"MacX", b"file:///etc/passwd".to_vec())]);
    dir.vimg("convert -O raw child.vhd x.raw").expect_clean_failure();
    // It can be described all the same, and opened on a parent that is named.
    dir.vimg("info child.vhd").expect_code(0);
    let on_base = "driver=vpc,file.filename=child.vhd,backing.driver=vpc,backing.file.filename=base.vhd";
    dir.vimg_ok(&format!("convert --image-opts -O raw {on_base} x.raw"));
    assert!(dir.read("x.raw") == dir.read("src.raw"));
}

/// Images that lie about where things are: an error that says so, in little time and memory, where qemu-img gives zeros,
/// the image's own structures, or the same bytes twice.
#[test]
fn images_that_lie_are_refused() {
    let dir = Dir::new();
    source_without_qemu(&dir);
    dir.vimg_ok("convert -f raw -O vpc -o force_size=on src.raw a.vhd");
    let good = dir.read("a.vhd");
    let entry = |index: usize| 1536 + 4 * index;
    let first: [u8; 4] = good[entry(2)..entry(3)].try_into().unwrap();
    let limited = |words: &str| dir.vimg_cmd(words).memory_mib(512).timeout(20).run().expect_no_panic();
    let lies: [(&str, usize, &[u8], &str); 5] = [
        ("past the end", entry(2), &[0x7f, 0, 0, 0], "lies past the end of the file"),
        ("partly past the end", entry(2), &0x5000u32.to_be_bytes(), "lies past the end of the file"),
        ("on the header", entry(2), &[0, 0, 0, 1], "overlaps the dynamic disk header"),
        ("on the table", entry(0), &[0, 0, 0, 3], "overlaps the block allocation table"),
        ("on the footer", entry(0), &[0, 0, 0, 0], "overlaps the copy of the footer"),
    ];
    for (name, at, bytes, message) in lies {
        dir.write("b.vhd", &good);
        dir.poke("b.vhd", at as u64, bytes);
        let refused = limited("convert -O raw b.vhd x.raw").expect_clean_failure();
        assert!(refused.stderr.contains(message), "{name}: {}", refused.stderr);
        limited("check b.vhd").expect_code(2).expect_stderr(message);
        limited("check -r all b.vhd").expect_code(2);
        limited("convert -n -f raw -O vpc src.raw b.vhd").expect_clean_failure();
    }
    // Two blocks in one place may be read, but not written to.
    dir.write("b.vhd", &good);
    dir.poke("b.vhd", entry(0) as u64, &first);
    limited("check b.vhd").expect_code(2).expect_stderr("overlaps block");
    limited("convert -n -f raw -O vpc src.raw b.vhd").expect_clean_failure().expect_stderr("overlaps block");
    // A download that was interrupted.
    dir.write("b.vhd", &good[..good.len() / 2]);
    limited("convert -O raw b.vhd x.raw").expect_clean_failure().expect_stderr("cut off");
    let fixed = "convert -f raw -O vpc -o subformat=fixed,force_size=on src.raw f.vhd";
    dir.vimg_ok(fixed);
    let mut short = dir.read("f.vhd");
    short.drain(1 << 20..2 << 20);
    dir.write("f.vhd", &short);
    limited("convert -f vpc -O raw f.vhd x.raw").expect_clean_failure().expect_stderr("holds only");
    // Tables without end, over a disk of 2040 GiB in blocks of a sector.
    let huge = Footer { current_size: 2040 << 30, ..Footer::parse(&good[..512]).unwrap() };
    let header = DynamicHeader::new(1536, u32::MAX, 512);
    let bytes = [huge.encode(), header.encode(), huge.encode()].concat();
    dir.write("h.vhd", &bytes);
    limited("info h.vhd").expect_clean_failure();
    dir.sparse("h.vhd", 20 << 30);
    dir.poke("h.vhd", 0, &bytes);
    dir.poke("h.vhd", (20 << 30) - 512, &huge.encode());
    limited("info h.vhd").expect_code(0);
    limited("check h.vhd").expect_code(1);
    limited("map h.vhd").expect_clean_failure();
    limited("convert -O qcow2 h.vhd x.qcow2").expect_clean_failure();
}

/// A guest that writes a VHD's front into the first sectors of its fixed disk must not become the author of its image.
#[test]
fn a_guest_cannot_make_its_fixed_disk_a_dynamic_one() {
    let dir = Dir::new();
    dir.vimg_ok("create -f vpc -o subformat=fixed,force_size=on a.vhd 4M");
    dir.vimg_ok("create -f vpc guest.vhd 4M");
    dir.poke("a.vhd", 0, &dir.read("guest.vhd"));
    dir.vimg("info a.vhd").expect_clean_failure().expect_stderr("contradict each other");
    dir.vimg("info -f raw a.vhd").expect_code(0);
}

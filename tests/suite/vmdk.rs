//! VMDK against qemu-img: images in both directions, what the tools say of them, and what vimg does where qemu-img gives
//! up, aborts, or gives the wrong bytes.

use std::time::Duration;

use tests::skip::{qemu10, tool};
use tests::{Cmd, Dir, Ops, Ran, requires};

const SIZE: u64 = 21 << 20;

/// Creation options of what can be written in place.
const KINDS: &[&str] = &[
    "subformat=monolithicSparse",
    "subformat=monolithicSparse,zeroed_grain=on",
    "subformat=monolithicFlat",
    "subformat=twoGbMaxExtentSparse",
    "subformat=twoGbMaxExtentFlat",
];

/// A raw disk with something everywhere.
fn source(dir: &Dir) -> Vec<u8> {
    dir.sparse("src.raw", SIZE);
    dir.qemu_io("raw", "src.raw", &Ops::tour(SIZE, 2 << 20, 3, false, false));
    dir.read("src.raw")
}

#[test]
fn what_qemu_makes_is_read_and_written() {
    requires!(qemu10());
    for options in KINDS {
        let dir = Dir::new();
        let bytes = source(&dir);
        dir.qemu_ok(&format!("convert -O vmdk -o {options} src.raw a.vmdk"));
        assert!(dir.vimg_reads("a.vmdk") == bytes, "{options}");
        // Written to by us, read by qemu.
        dir.sparse("other.raw", SIZE);
        dir.poke("other.raw", (5 << 20) + 77, &[0xab; 3 << 20]);
        dir.vimg_ok("convert -n -f raw -O vmdk other.raw a.vmdk");
        assert!(dir.qemu_reads("a.vmdk") == dir.read("other.raw"), "{options}");
        dir.qemu_ok("check a.vmdk");
        dir.vimg_ok("check a.vmdk");
    }
}

#[test]
fn what_vimg_makes_qemu_and_libvmdk_read() {
    requires!(qemu10());
    let judge = tool("vmdkinfo");
    for options in KINDS {
        let dir = Dir::new();
        let bytes = source(&dir);
        dir.vimg_ok(&format!("convert -O vmdk -o {options} src.raw a.vmdk"));
        assert!(dir.qemu_reads("a.vmdk") == bytes, "{options}");
        dir.qemu_io("vmdk", "a.vmdk", &Ops::tour(SIZE, 2 << 20, 9, false, false));
        assert!(dir.vimg_reads("a.vmdk") == dir.qemu_reads("a.vmdk"), "{options}");
        dir.same("check a.vmdk");
        match &judge {
            Ok(()) => {
                let shown = Cmd::new("vmdkinfo").arg("a.vmdk").dir(dir.path()).ok().stdout;
                assert!(shown.contains(&format!("({SIZE} bytes)")), "{shown}");
            }
            Err(reason) => tests::skip::note(reason),
        }
    }
}

/// Both tools say the same of images that either has made.
#[test]
fn info_map_check_and_compare_are_qemus() {
    requires!(qemu10());
    for options in KINDS {
        let dir = Dir::new();
        source(&dir);
        dir.qemu_ok(&format!("convert -O vmdk -o {options} src.raw theirs.vmdk"));
        dir.vimg_ok(&format!("convert -O vmdk -o {options} src.raw ours.vmdk"));
        for name in ["theirs.vmdk", "ours.vmdk"] {
            dir.same_json(&format!("info --output=json {name}"));
            dir.same(&format!("info {name}"));
            dir.same_json(&format!("map --output=json {name}"));
            dir.same_outcome(&format!("map {name}"));
            dir.same(&format!("check {name}"));
            dir.same_json(&format!("check --output=json {name}"));
            dir.same_outcome(&format!("resize {name} +1M"));
        }
        dir.same("compare theirs.vmdk ours.vmdk");
        dir.same("compare src.raw ours.vmdk");
    }
}

/// The text around the content ID, which is random; qemu does not pad it.
fn without_cid(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().filter(|line| !line.starts_with("CID="));
    lines.collect::<Vec<_>>().join("\n").trim_end_matches('\0').to_owned()
}

/// Every subformat of a new disk is what qemu-img makes, byte for byte, but for its content ID.
#[test]
fn create_makes_what_qemu_makes() {
    requires!(qemu10());
    let sizes = ["0", "512", "1000", "100M", "4294967808", "3T"];
    for options in KINDS.iter().copied().chain([
        "adapter_type=lsilogic,hwversion=14",
        "adapter_type=buslogic,toolsversion=7",
        "adapter_type=legacyESX,compat6=on",
        "hwversion=abc,subformat=twoGbMaxExtentSparse,zeroed_grain=on",
    ]) {
        for size in sizes {
            // qemu-img's disks of several files have no extent then, and cannot be opened by anybody.
            let in_one_file = !options.contains("twoGb") && !options.contains("Flat");
            if !in_one_file && (size == "3T" || size == "0") {
                continue;
            }
            let (theirs, ours) = (Dir::new(), Dir::new());
            let words = format!("create -f vmdk -o {options} a.vmdk {size}");
            let (said, we_said) = (theirs.qemu(&words), ours.linked(&words));
            assert_eq!(
                (said.code, &said.stdout, &said.stderr),
                (we_said.code, &we_said.stdout, &we_said.stderr)
            );
            for entry in std::fs::read_dir(theirs.path()).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let len = |dir: &Dir| std::fs::metadata(dir.file(&name)).map(|m| m.len()).unwrap_or(u64::MAX);
                let head = |dir: &Dir| {
                    use std::io::Read as _;
                    let mut bytes = vec![];
                    std::fs::File::open(dir.file(&name))
                        .unwrap()
                        .take(2 << 20)
                        .read_to_end(&mut bytes)
                        .unwrap();
                    bytes
                };
                if head(&theirs).starts_with(b"KDMV") {
                    assert_eq!(len(&theirs), len(&ours), "{options} {size} {name}");
                    let (a, b) = (head(&theirs), head(&ours));
                    assert!(
                        a[..512] == b[..512] && a[21 * 512..] == b[21 * 512..],
                        "{options} {size} {name}"
                    );
                    assert_eq!(without_cid(&a[512..21 * 512]), without_cid(&b[512..21 * 512]));
                } else if name == "a.vmdk" {
                    assert_eq!(without_cid(&head(&theirs)), without_cid(&head(&ours)));
                } else {
                    assert_eq!(len(&theirs), len(&ours), "{options} {size} {name}");
                }
            }
        }
    }
}

#[test]
fn options_that_make_no_sense_are_refused_in_qemus_words() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f vmdk base.vmdk 1M");
    for options in [
        "compat6=on,hwversion=8",
        "adapter_type=foo",
        "subformat=foo",
        "subformat=vmfs",
        "subformat=monolithicFlat,zeroed_grain=on",
        "subformat=monolithicFlat,backing_file=base.vmdk,backing_fmt=vmdk",
        "backing_file=base.vmdk,backing_fmt=raw",
        "backing_file=missing.vmdk,backing_fmt=vmdk",
        "preallocation=metadata",
        "compat6=maybe",
    ] {
        let refused = dir.same(&format!("create -f vmdk -o {options} a.vmdk 1M"));
        assert_eq!(refused.code, Some(1), "{options}");
        let _ = std::fs::remove_file(dir.file("a.vmdk"));
        dir.vimg(&format!("create -f vmdk -o {options} a.vmdk 1M")).expect_clean_failure();
        assert!(!dir.exists("a.vmdk") && !dir.exists("a-flat.vmdk"), "{options}");
    }
    dir.same("create -f vmdk -o help");
}

/// A clone names its parent; a change of the parent is noticed, and said.
#[test]
fn parents_are_read_and_recognised_by_their_content() {
    requires!(qemu10());
    let dir = Dir::new();
    let bytes = source(&dir);
    dir.vimg_ok("convert -O vmdk src.raw base.vmdk");
    for (maker, name) in [("qemu", "q.vmdk"), ("vimg", "v.vmdk")] {
        let words = format!("create -f vmdk -b base.vmdk -F vmdk {name}");
        if maker == "qemu" {
            dir.qemu_ok(&words)
        } else {
            dir.vimg_ok(&words)
        };
        dir.same_json(&format!("info --output=json --backing-chain {name}"));
        dir.same_json(&format!("map --output=json {name}"));
        assert!(dir.vimg_reads(name) == bytes && dir.qemu_reads(name) == bytes, "{maker}");
        dir.qemu_io("vmdk", name, &Ops::tour(SIZE, 2 << 20, 5, false, false));
        assert!(dir.vimg_reads(name) == dir.qemu_reads(name), "{maker}");
    }
    dir.vimg_ok(
        "create -f vmdk -o subformat=twoGbMaxExtentSparse,zeroed_grain=on -b q.vmdk -F vmdk top.vmdk",
    );
    assert!(dir.vimg_reads("top.vmdk") == dir.qemu_reads("q.vmdk"));
    assert!(dir.qemu_reads("top.vmdk") == dir.qemu_reads("q.vmdk"));
    // The parent changes.
    dir.qemu_io("vmdk", "base.vmdk", &Ops::tour(SIZE, 2 << 20, 7, false, false));
    let refused = dir.vimg("convert -O raw v.vmdk x.raw").expect_clean_failure();
    assert!(
        refused.stderr.contains("content ID") && refused.stderr.contains("base.vmdk"),
        "{}",
        refused.story()
    );
    dir.vimg_ok("info v.vmdk");
    let any = "driver=vmdk,file.filename=v.vmdk,ignore-parent-id";
    dir.vimg_ok(&format!("convert --image-opts -O raw {any}=on x.raw"));
    dir.vimg(&format!("convert --image-opts -O raw {any}=off y.raw")).expect_clean_failure();
}

#[test]
fn a_commit_leaves_a_chain_that_still_fits_together() {
    requires!(qemu10());
    let dir = Dir::new();
    source(&dir);
    dir.vimg_ok("convert -O vmdk src.raw base.vmdk");
    dir.vimg_ok("create -f vmdk -b base.vmdk -F vmdk top.vmdk");
    dir.qemu_io("vmdk", "top.vmdk", &Ops::tour(SIZE, 2 << 20, 5, false, false));
    let shown = dir.vimg_reads("top.vmdk");
    dir.vimg_ok("commit top.vmdk");
    assert!(dir.vimg_reads("top.vmdk") == shown && dir.qemu_reads("top.vmdk") == shown);
    assert!(dir.vimg_reads("base.vmdk") == shown && dir.qemu_reads("base.vmdk") == shown);
}

/// A parent that was changed before its child could be told, as by a commit that was cut off, is recorded on request.
#[test]
fn a_changed_parent_is_recorded_by_a_rebase_to_its_own_name() {
    requires!(qemu10());
    let dir = Dir::new();
    source(&dir);
    dir.vimg_ok("convert -O vmdk src.raw base.vmdk");
    dir.vimg_ok("create -f vmdk -b base.vmdk -F vmdk top.vmdk");
    dir.qemu_io("vmdk", "top.vmdk", &Ops::tour(SIZE, 2 << 20, 5, false, false));
    let shown = dir.vimg_reads("top.vmdk");
    dir.qemu_io("vmdk", "base.vmdk", &Ops::tour(SIZE, 2 << 20, 5, false, false));
    dir.vimg("convert -O raw top.vmdk x.raw").expect_code(1).expect_stderr("rebase -u");
    dir.vimg("rebase -u -b src.raw -F raw top.vmdk").expect_code(1).expect_stderr("Operation not supported");
    dir.vimg_ok("rebase -u -b base.vmdk -F vmdk top.vmdk");
    assert!(dir.vimg_reads("top.vmdk") == shown && dir.qemu_reads("top.vmdk") == shown);
    dir.vimg_ok("commit top.vmdk");
}

/// A descriptor with these extent lines.
fn descriptor(kind: &str, lines: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{kind}\"\n{lines}\n"
    )
}

/// Within the limits of a careful service.
fn limited(dir: &Dir, words: &str) -> Ran {
    let ran = dir.vimg_cmd(words).memory_mib(1024).limit("--cpu=20").timeout(30).run().expect_no_panic();
    assert!(ran.elapsed < Duration::from_secs(20), "it took {:?}\n{}", ran.elapsed, ran.story());
    ran
}

/// hostile-images.md 8.3: qemu-img drops such extents, and shifts what follows.
#[test]
fn zero_noaccess_and_rdonly_extents_keep_their_place() {
    let dir = Dir::new();
    dir.write("a.bin", &[1; 1024]);
    dir.write("b.bin", &[2; 1024]);
    let lines = "RW 2 FLAT \"a.bin\" 0\nRW 3 ZERO\nRDONLY 1 FLAT \"b.bin\" 1\nNOACCESS 2 FLAT \"c.bin\" 0\n\
                 RW 1 FLAT \"b.bin\" 0";
    dir.write("d.vmdk", descriptor("custom", lines).as_bytes());
    let ran = dir.vimg_ok("convert -O raw d.vmdk d.raw");
    assert!(ran.stderr.contains("NOACCESS"), "{}", ran.story());
    let sectors: Vec<u8> = dir.read("d.raw").chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [1, 1, 0, 0, 0, 2, 0, 0, 2]);
    let info = dir.vimg_ok("info --output=json d.vmdk").json();
    assert_eq!(info["virtual-size"], 9 * 512);
    dir.write("e.raw", &[7; 9 * 512]);
    dir.vimg("convert -n -f raw -O vmdk e.raw d.vmdk").expect_clean_failure();
    dir.write("e.vmdk", descriptor("custom", "RDONLY 1 FLAT \"b.bin\" 1\nRW 1 FLAT \"a.bin\" 0").as_bytes());
    dir.write("e.raw", &[7; 1024]);
    let refused = dir.vimg("convert -n -f raw -O vmdk e.raw e.vmdk").expect_clean_failure();
    assert!(refused.stderr.contains("'b.bin' is marked RDONLY"), "{}", refused.story());
    assert_eq!(dir.read("b.bin")[512..], [2; 512], "a read-only extent is not written to");
}

/// 8.2: qemu-img aborts.
#[test]
fn a_disk_without_a_usable_extent_is_an_error_and_no_abort() {
    let dir = Dir::new();
    dir.write("none.vmdk", descriptor("monolithicFlat", "").as_bytes());
    for words in ["info none.vmdk", "check none.vmdk", "map none.vmdk", "convert -O raw none.vmdk x.raw"] {
        limited(&dir, words).expect_clean_failure();
    }
    dir.write("a.bin", &[1; 512]);
    dir.write("ro.vmdk", descriptor("monolithicFlat", "RDONLY 1 FLAT \"a.bin\" 0").as_bytes());
    dir.vimg_ok("convert -O raw ro.vmdk x.raw");
    assert_eq!(dir.read("x.raw"), [1; 512]);
}

/// 8.2: qemu-img needs more than quadratic time.
#[test]
fn thousands_of_extents_take_no_time_and_a_million_are_refused() {
    let dir = Dir::new();
    dir.sparse("a.bin", 8192 * 512);
    let lines = |count: usize| (0..count).map(|i| format!("RW 1 FLAT \"a.bin\" {i}\n")).collect::<String>();
    dir.write("many.vmdk", descriptor("custom", &lines(8192)).as_bytes());
    let ran = limited(&dir, "info --output=json many.vmdk").expect_code(0);
    assert_eq!(ran.json()["virtual-size"], 8192 * 512);
    limited(&dir, "convert -O raw many.vmdk x.raw").expect_code(0);
    dir.write("more.vmdk", descriptor("custom", &lines(8193)).as_bytes());
    limited(&dir, "info more.vmdk").expect_clean_failure().expect_stderr("8192 extents");
    dir.write("million.vmdk", descriptor("custom", &"RW 1 ZERO\n".repeat(1_000_000)).as_bytes());
    limited(&dir, "info million.vmdk").expect_clean_failure();
}

/// 8.2: qemu-img opens the chain over and over.
#[test]
fn a_parent_that_is_the_disk_itself_is_an_endless_chain() {
    let dir = Dir::new();
    let text = descriptor("custom", "RW 8 ZERO");
    let text = text.replace("parentCID=ffffffff", "parentCID=12345678\nparentFileNameHint=\"a.vmdk\"");
    dir.write("a.vmdk", text.as_bytes());
    for words in ["check a.vmdk", "map a.vmdk", "convert -O raw a.vmdk x.raw", "info --backing-chain a.vmdk"]
    {
        limited(&dir, words).expect_clean_failure();
    }
}

/// 8.4: qemu-img reads any file of the host that a descriptor names, for info already.
#[test]
fn files_outside_the_folder_are_not_read_unless_they_are_allowed() {
    let (dir, outside) = (Dir::new(), Dir::new());
    outside.write("secret", &[3; 512]);
    let path = outside.file("secret");
    let up = format!("../{}/secret", outside.path().file_name().unwrap().to_str().unwrap());
    for name in [path.to_str().unwrap(), &up] {
        dir.write("a.vmdk", descriptor("custom", &format!("RW 1 FLAT \"{name}\" 0")).as_bytes());
        for words in ["info a.vmdk", "check a.vmdk", "convert -O raw a.vmdk x.raw"] {
            limited(&dir, words).expect_clean_failure().expect_stderr("--allow");
        }
        let allow = outside.path().display();
        dir.vimg_ok(&format!("convert --allow {allow} -O raw a.vmdk x.raw"));
        assert_eq!(dir.read("x.raw"), [3; 512]);
        let parent = descriptor("custom", "RW 1 ZERO")
            .replace("parentCID=ffffffff", &format!("parentCID=1\nparentFileNameHint=\"{name}\""));
        dir.write("b.vmdk", parent.as_bytes());
        limited(&dir, "convert -O raw b.vmdk x.raw").expect_clean_failure();
    }
    dir.write("a.bin", &[1; 1024]);
    std::fs::hard_link(dir.file("a.bin"), dir.file("b.bin")).unwrap();
    let lines = "RW 2 FLAT \"a.bin\" 0\nRW 1 FLAT \"b.bin\" 1";
    dir.write("twice.vmdk", descriptor("custom", lines).as_bytes());
    limited(&dir, "convert -O raw twice.vmdk x.raw").expect_clean_failure().expect_stderr("overlap");
    dir.write("self.vmdk", descriptor("custom", "RW 1 FLAT \"self.vmdk\" 0").as_bytes());
    limited(&dir, "convert -O raw self.vmdk x.raw").expect_clean_failure();
    for kind in ["fullDevice", "partitionedDevice", "vmfsRawDeviceMap"] {
        dir.write("raw.vmdk", descriptor(kind, "RW 1 FLAT \"/dev/sda\" 0").as_bytes());
        limited(&dir, "info raw.vmdk").expect_clean_failure().expect_stderr("Unsupported image type");
    }
}

/// The places of an image that qemu has made: (GD, redundant GD), in bytes.
fn directories(dir: &Dir, name: &str) -> (u64, u64) {
    let bytes = dir.read(name);
    let at = |offset: usize| u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap()) * 512;
    (at(56), at(48))
}

fn entry(dir: &Dir, name: &str, at: u64) -> u64 {
    let bytes = dir.read(name);
    let at = usize::try_from(at).unwrap();
    u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())) * 512
}

/// 8.3: where qemu-img gives zeros with exit code 0.
#[test]
fn what_is_damaged_is_an_error_and_no_zeros() {
    requires!(qemu10());
    let dir = Dir::new();
    source(&dir);
    dir.qemu_ok("convert -O vmdk src.raw good.vmdk");
    let (main, copy) = directories(&dir, "good.vmdk");
    let tables = [entry(&dir, "good.vmdk", main), entry(&dir, "good.vmdk", copy)];
    let refused = |name: &str, change: &dyn Fn()| {
        dir.copy("good.vmdk", "a.vmdk");
        change();
        let _ = std::fs::remove_file(dir.file("x.raw"));
        limited(&dir, "convert -O raw a.vmdk x.raw").expect_clean_failure();
        assert!(!dir.exists("x.raw"), "{name}");
        let check = limited(&dir, "check a.vmdk");
        assert!(check.code != Some(0), "{name}\n{}", check.story());
        limited(&dir, "check -r all a.vmdk");
        limited(&dir, "info a.vmdk");
    };
    let cut = |len: u64| {
        std::fs::OpenOptions::new().write(true).open(dir.file("a.vmdk")).unwrap().set_len(len).unwrap();
    };
    let len = dir.read("good.vmdk").len() as u64;
    refused("cut off", &|| cut(len / 2));
    refused("cut off by a sector", &|| cut(len - 512));
    refused("cut off in the metadata", &|| cut(20 << 10));
    let both = |values: [u64; 2]| {
        dir.poke("a.vmdk", 56, &values[0].to_le_bytes());
        dir.poke("a.vmdk", 48, &values[1].to_le_bytes());
    };
    refused("directories beyond the end", &|| both([1 << 30, 1 << 31]));
    refused("directories at the end of the numbers", &|| both([u64::MAX - 1, u64::MAX / 512]));
    let entries = |places: [u64; 2], value: u32| {
        places.iter().for_each(|at| dir.poke("a.vmdk", *at, &value.to_le_bytes()));
    };
    refused("tables beyond the end", &|| entries([main, copy], 0x7fff_ffff));
    refused("a grain in the header", &|| entries(tables, 1));
    refused("a grain in the tables", &|| entries(tables, 30));
    refused("an unaligned grain", &|| entries(tables, 129));
    refused("a grain beyond the end", &|| entries(tables, 0xffff_ff80));
    dir.vimg_ok("convert -O vmdk -o subformat=monolithicFlat src.raw flat.vmdk");
    dir.poke("flat-flat.vmdk", 0, b"x");
    std::fs::OpenOptions::new()
        .write(true)
        .open(dir.file("flat-flat.vmdk"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    limited(&dir, "convert -O raw flat.vmdk x.raw").expect_clean_failure().expect_stderr("past the end");
    assert_ne!(limited(&dir, "check flat.vmdk").code, Some(0));
}

/// What no other tool offers: one copy of the tables mends the other.
#[test]
fn a_repair_restores_one_copy_of_the_tables_from_the_other() {
    requires!(qemu10());
    let dir = Dir::new();
    let bytes = source(&dir);
    dir.qemu_ok("convert -O vmdk src.raw good.vmdk");
    let (main, copy) = directories(&dir, "good.vmdk");
    let table = entry(&dir, "good.vmdk", main);
    for (name, place, junk) in [
        ("directory", main, vec![0xee; 4]),
        ("redundant directory", copy, vec![0xee; 4]),
        ("lost directory", main, vec![0; 4]),
        ("lost table", table, vec![0; 2048]),
        ("damaged table", table, vec![0xee; 512]),
    ] {
        dir.copy("good.vmdk", "a.vmdk");
        dir.poke("a.vmdk", place, &junk);
        dir.vimg("check a.vmdk").expect_code(2);
        let repaired = dir.vimg("check -r all a.vmdk").expect_code(0);
        assert!(repaired.stdout.contains("No errors were found"), "{name}\n{}", repaired.story());
        dir.vimg_ok("check a.vmdk");
        assert!(dir.vimg_reads("a.vmdk") == bytes && dir.qemu_reads("a.vmdk") == bytes, "{name}");
    }
}

/// A monolithicSparse disk with a separate descriptor, and a mixture, which qemu-img refuses.
#[test]
fn sparse_files_serve_any_descriptor() {
    requires!(qemu10());
    let dir = Dir::new();
    let bytes = source(&dir);
    dir.qemu_ok("convert -O vmdk src.raw part.vmdk");
    let sectors = SIZE / 512;
    let lines = format!("RW {sectors} SPARSE \"part.vmdk\"\nRW {sectors} FLAT \"src.raw\" 0");
    dir.write("d.vmdk", descriptor("monolithicSparse", &lines).as_bytes());
    let shown = dir.vimg_reads("d.vmdk");
    assert!(shown[..bytes.len()] == bytes && shown[bytes.len()..] == bytes);
    dir.vimg_ok("check d.vmdk");
    // A header that contradicts its line.
    dir.write("e.vmdk", descriptor("monolithicSparse", "RW 4096 SPARSE \"part.vmdk\"").as_bytes());
    limited(&dir, "convert -O raw e.vmdk x.raw").expect_clean_failure().expect_stderr("4096 sectors");
}

/// Files that were made on Windows: CRLF, windows-1252, every key kept when the content ID changes.
#[test]
fn what_others_have_written_into_a_descriptor_stays() {
    let dir = Dir::new();
    dir.write("Größe.bin", &[0; 65536]);
    let text = b"# Disk DescriptorFile\r\nversion=1\r\nencoding=\"windows-1252\"\r\nCID=fb183c20\r\n\
        parentCID=ffffffff\r\nisNativeSnapshot=\"no\"\r\ncreateType=\"monolithicFlat\"\r\n\r\n\
        RW 128 FLAT \"Gr\xf6\xdfe.bin\" 0\r\n\r\n#DDB\r\n\r\nddb.uuid = \"60 00 C2 9c\"\r\nddb.x-mine = \"1\"\r\n";
    dir.write("w.vmdk", text);
    dir.write("new.raw", &[9; 65536]);
    dir.vimg_ok("convert -n -f raw -O vmdk new.raw w.vmdk");
    assert!(dir.read("Größe.bin") == [9; 65536]);
    let now = dir.read("w.vmdk");
    let changed = text.iter().zip(&now).filter(|(a, b)| a != b).count();
    assert!(now.len() == text.len() && (1..=8).contains(&changed), "{changed} bytes differ");
}

/// A raw disk whose guest has written a descriptor into it stays raw when the user says so.
#[test]
fn a_guest_cannot_make_its_disk_a_descriptor() {
    let dir = Dir::new();
    dir.write("secret", &[3; 512]);
    let mut disk = descriptor("custom", "RW 1 FLAT \"secret\" 0").into_bytes();
    disk.resize(65536, 0);
    dir.write("guest.raw", &disk);
    dir.vimg_ok("convert -f raw -O raw guest.raw x.raw");
    assert!(dir.read("x.raw") == disk);
}

/// A sector of the first grain table that is zeros reads as zeros with qemu-img, while the copy of the table is intact.
#[test]
fn a_table_that_was_zeroed_is_read_by_its_copy() {
    let dir = Dir::new();
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251 + 1).to_le_bytes()[0]).collect();
    dir.write("s.raw", &bytes);
    dir.vimg_ok("convert -O vmdk s.raw a.vmdk");
    let (gd, _) = directories(&dir, "a.vmdk");
    dir.poke("a.vmdk", entry(&dir, "a.vmdk", gd), &[0; 512]);
    dir.vimg("check a.vmdk").expect_code(2);
    assert!(dir.vimg_reads("a.vmdk") == bytes);
    dir.vimg("check -r all a.vmdk").expect_code(0);
    assert!(dir.vimg_reads("a.vmdk") == bytes);
}

#[test]
fn a_capacity_that_is_not_the_descriptors_is_refused() {
    for options in ["subformat=monolithicSparse", "subformat=streamOptimized"] {
        let dir = Dir::new();
        dir.sparse("s.raw", SIZE);
        dir.vimg_ok(&format!("convert -O vmdk -o {options} s.raw a.vmdk"));
        for capacity in [SIZE / 1024, SIZE / 256] {
            dir.poke("a.vmdk", 12, &capacity.to_le_bytes());
            let refused = dir.vimg("convert -O raw a.vmdk x.raw").expect_clean_failure();
            refused.expect_stderr(&capacity.to_string()).expect_stderr(&(SIZE / 512).to_string());
            dir.vimg("check a.vmdk").expect_clean_failure();
        }
    }
}

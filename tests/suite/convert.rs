//! `convert`: whatever goes in comes out, through every variant, both tools reading each other's results.

use tests::shape::{SHAPES, Shape};
use tests::skip::{qemu, qemu10};
use tests::{Dir, Op, Ops, requires};

/// A raw disk with data, written zeros, holes and noise, its length not a multiple of anything.
fn mixed_raw(dir: &Dir, name: &str, len: u64) -> Vec<u8> {
    let mut bytes = vec![0u8; usize::try_from(len).unwrap()];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for (at, chunk) in bytes.chunks_mut(48 << 10).enumerate() {
        match at % 5 {
            0 => chunk.iter_mut().enumerate().for_each(|(n, byte)| *byte = b"vimg disk image "[n % 16]),
            1 => chunk.iter_mut().for_each(|byte| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            }),
            3 => chunk.iter_mut().skip(24 << 10).for_each(|byte| *byte = 0x33),
            _ => {}
        }
    }
    dir.write(name, &bytes);
    bytes
}

/// Where an image of this shape can be a target of convert.
fn target_options(shape: &Shape, name: &str) -> String {
    shape.o(name)
}

#[test]
fn raw_to_every_shape_and_back() {
    requires!(qemu());
    for shape in SHAPES.iter().filter(|shape| shape.backing == 0) {
        let dir = Dir::new();
        let bytes = mixed_raw(&dir, "in.raw", shape.size().max(3 << 20));
        let options = target_options(shape, "a.qcow2");
        dir.vimg_ok(&format!("convert -f raw -O qcow2 -o {options} in.raw a.qcow2"));
        dir.qemu_checks("a.qcow2");
        dir.vimg_checks("a.qcow2");
        assert!(dir.qemu_reads("a.qcow2") == bytes, "{}: qemu reads something else", shape.name);
        assert!(dir.vimg_reads("a.qcow2") == bytes, "{}: vimg reads something else", shape.name);
    }
}

#[test]
fn compressed_into_every_shape_and_back() {
    requires!(qemu());
    let shapes =
        SHAPES.iter().filter(|s| s.backing == 0 && s.compressible() && !s.options.contains("preallocation"));
    for shape in shapes {
        let dir = Dir::new();
        let bytes = mixed_raw(&dir, "in.raw", shape.size().max(3 << 20));
        let options = target_options(shape, "a.qcow2");
        dir.vimg_ok(&format!("convert -c -f raw -O qcow2 -o {options} in.raw a.qcow2"));
        dir.qemu_ok(&format!("convert -c -f raw -O qcow2 -o {options} in.raw q.qcow2"));
        dir.qemu_checks("a.qcow2");
        dir.vimg_checks("a.qcow2");
        assert!(dir.qemu_reads("a.qcow2") == bytes, "{}: qemu reads something else", shape.name);
        assert!(dir.vimg_reads("a.qcow2") == bytes, "{}: vimg reads something else", shape.name);
        assert!(dir.vimg_reads("q.qcow2") == bytes, "{}: vimg misreads qemu's image", shape.name);
    }
}

#[test]
fn every_shape_as_a_source() {
    requires!(qemu());
    for shape in SHAPES {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", true);
        let bytes = dir.qemu_reads("a.qcow2");
        assert!(dir.vimg_reads("a.qcow2") == bytes, "{}", shape.name);
        for target in ["qcow2", "qcow2 -c", "qcow2 -W -m 4", "qcow2 -o compat=0.10,cluster_size=4k"] {
            dir.vimg_ok(&format!("convert -O {target} a.qcow2 b.qcow2"));
            dir.qemu_checks("b.qcow2");
            assert!(dir.qemu_reads("b.qcow2") == bytes, "{} -> {target}", shape.name);
        }
    }
}

/// The copy is as sparse as the one qemu makes: same map, apart from where in the file things lie.
#[test]
fn what_is_sparse_stays_sparse() {
    requires!(qemu10());
    let flags = |dir: &Dir, image: &str| -> Vec<(u64, u64, bool)> {
        let map = dir.qemu_ok(&format!("map --output=json {image}")).json();
        let mut runs: Vec<(u64, u64, bool)> = vec![];
        for extent in map.as_array().unwrap() {
            let (start, length) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
            let zero = extent["zero"].as_bool().unwrap();
            match runs.last_mut() {
                Some(last) if last.2 == zero => last.1 += length,
                _ => runs.push((start, length, zero)),
            }
        }
        runs
    };
    for name in ["default", "v2", "512", "2m", "extended", "backing-2", "data-file"] {
        let shape = SHAPES.iter().find(|shape| shape.name == name).unwrap();
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", true);
        for target in ["qcow2", "raw", "qcow2 -S 64k", "qcow2 -o cluster_size=4k"] {
            dir.vimg_ok(&format!("convert -O {target} a.qcow2 ours"));
            dir.qemu_ok(&format!("convert -O {target} a.qcow2 theirs"));
            assert_eq!(flags(&dir, "ours"), flags(&dir, "theirs"), "{name} -> {target}");
        }
    }
}

#[test]
fn options_that_change_what_is_written() {
    requires!(qemu10());
    let dir = Dir::new();
    let bytes = mixed_raw(&dir, "in.raw", (6 << 20) + 512);
    dir.qemu_ok("create -f qcow2 base.qcow2 8M");
    dir.qemu_ok("convert -f raw -O qcow2 in.raw full.qcow2");
    for words in [
        "-f raw -O raw in.raw out",
        "-f raw -O raw -S 0 in.raw out",
        "-f raw -O raw -S 512 in.raw out",
        "-f raw -O qcow2 -S 0 in.raw out",
        "-f raw -O qcow2 -S 16M in.raw out",
        "-f raw -O qcow2 -m 1 in.raw out",
        "-f raw -O qcow2 -m 16 -W in.raw out",
        "-f raw -O qcow2 -t none -T none in.raw out",
        "-f raw -O qcow2 -t directsync in.raw out",
        "-f raw -O qcow2 -t writethrough -T writethrough in.raw out",
        "-f raw -O raw -C in.raw out",
        "-f raw -O raw -t none -T none in.raw out",
        "-O qcow2 -C full.qcow2 out",
        "-f raw -O qcow2 -r 1G in.raw out",
        "-q -f raw -O qcow2 in.raw out",
        "-f raw -O qcow2 -o preallocation=falloc in.raw out",
        "-f raw -O raw -o preallocation=full in.raw out",
        "-O qcow2 -B base.qcow2 -F qcow2 full.qcow2 out",
        "-O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 full.qcow2 out",
        "--image-opts -O qcow2 driver=raw,file.filename=in.raw out",
    ] {
        let ran = dir.linked(&format!("convert {words}")).expect_code(0);
        assert_eq!(ran.stdout, "", "{words}");
        let theirs = dir.qemu_reads("out");
        assert!(theirs[..bytes.len()] == bytes[..], "{words}: qemu reads something else");
        if words.contains("-O qcow2") {
            dir.qemu_checks("out");
        }
        std::fs::remove_file(dir.file("out")).unwrap();
    }
}

#[test]
fn several_sources_are_joined() {
    requires!(qemu());
    let dir = Dir::new();
    let mut bytes = mixed_raw(&dir, "a.raw", 1 << 20);
    bytes.extend(mixed_raw(&dir, "b.raw", (2 << 20) + 512));
    bytes.extend(mixed_raw(&dir, "c.raw", 65536 + 1024));
    dir.vimg_ok("convert -f raw -O qcow2 a.raw b.raw c.raw joined.qcow2");
    dir.qemu_checks("joined.qcow2");
    assert!(dir.qemu_reads("joined.qcow2") == bytes);
    dir.vimg_ok("convert -f raw -O raw a.raw b.raw c.raw joined.raw");
    assert!(dir.read("joined.raw") == bytes);
    dir.vimg_ok("convert -c -f raw -O qcow2 a.raw b.raw c.raw small.qcow2");
    assert!(dir.qemu_reads("small.qcow2") == bytes);
}

#[test]
fn into_an_image_that_is_there() {
    requires!(qemu());
    let dir = Dir::new();
    let bytes = mixed_raw(&dir, "in.raw", 4 << 20);
    for target_is_zero in ["", "--target-is-zero"] {
        dir.qemu_ok("create -f qcow2 -o cluster_size=8k out.qcow2 6M");
        dir.vimg_ok(&format!("convert -n {target_is_zero} -f raw -O qcow2 in.raw out.qcow2"));
        dir.qemu_checks("out.qcow2");
        let found = dir.qemu_reads("out.qcow2");
        assert!(
            found.len() == 6 << 20
                && found[..bytes.len()] == bytes[..]
                && found[bytes.len()..].iter().all(|&b| b == 0)
        );
    }
    // Old contents have to give way, zeros included.
    dir.qemu_ok("create -f qcow2 old.qcow2 4M");
    dir.qemu_io("qcow2", "old.qcow2", &Ops(vec![Op::Write { offset: 0, len: 4 << 20, byte: 0xdd }]));
    dir.vimg_ok("convert -n -f raw -O qcow2 in.raw old.qcow2");
    dir.qemu_checks("old.qcow2");
    assert!(dir.qemu_reads("old.qcow2") == bytes);
    dir.write("old.raw", &vec![0xcc; 4 << 20]);
    dir.vimg_ok("convert -n -f raw -O raw in.raw old.raw");
    assert!(dir.read("old.raw") == bytes);
    dir.vimg_ok("convert -n -f raw --target-image-opts in.raw driver=qcow2,file.filename=old.qcow2");
    dir.qemu_checks("old.qcow2");
}

#[test]
fn an_overlay_holds_only_the_difference() {
    requires!(qemu());
    let dir = Dir::new();
    mixed_raw(&dir, "in.raw", 8 << 20);
    dir.qemu_ok("convert -f raw -O qcow2 in.raw base.qcow2");
    dir.qemu_ok("create -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    dir.qemu_io("qcow2", "top.qcow2", &Ops(vec![Op::Write { offset: 1 << 20, len: 65536, byte: 1 }]));
    dir.vimg_ok("convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 copy.qcow2");
    dir.qemu_checks("copy.qcow2");
    assert!(dir.qemu_reads("copy.qcow2") == dir.qemu_reads("top.qcow2"));
    let len = std::fs::metadata(dir.file("copy.qcow2")).unwrap().len();
    assert!(len < 1 << 20, "the copy holds {len} bytes: more than the one cluster that differs");
}

#[test]
fn progress_in_qemus_form_and_as_json() {
    requires!(qemu());
    let dir = Dir::new();
    mixed_raw(&dir, "in.raw", 8 << 20);
    let ran = dir.linked("convert -p -f raw -O qcow2 in.raw out.qcow2").expect_code(0);
    assert!(ran.stdout.ends_with("    (100.00/100%)\r\n"), "{:?}", ran.stdout);
    assert!(ran.stdout.starts_with("    (0.00/100%)\r"), "{:?}", ran.stdout);
    // Threads used to overtake each other on their way to the terminal.
    let figures = ran
        .stdout
        .split('\r')
        .filter_map(|part| part.trim().strip_prefix('(')?.split('/').next()?.parse().ok());
    assert!(figures.collect::<Vec<f64>>().is_sorted(), "{:?}", ran.stdout);
    assert_eq!(dir.linked("convert -p -q -f raw -O qcow2 in.raw out.qcow2").expect_code(0).stdout, "");
    let ran = dir.vimg_ok("convert --progress=json -f raw -O qcow2 in.raw out.qcow2");
    let lines: Vec<&str> = ran.stdout.lines().chain(ran.stderr.lines()).collect();
    assert!(!lines.is_empty(), "no progress was reported");
    for line in lines {
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(line);
        assert!(parsed.is_ok_and(|value| value.is_object()), "not a JSON object: {line}");
    }
}

/// What qemu-img refuses, vimg refuses with the same code and, for what a run-time error says, the same words.
#[test]
fn refusals() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 4M");
    dir.qemu_ok("create -f qcow2 small.qcow2 1M");
    for words in [
        "convert missing.qcow2 out.raw",
        "convert -f nonsense a.qcow2 out.raw",
        "convert -O nonsense a.qcow2 out.raw",
        "convert -c -O raw a.qcow2 out.raw",
        "convert -n -O qcow2 a.qcow2 missing.qcow2",
        "convert -n -O qcow2 a.qcow2 small.qcow2",
        "convert -n -O qcow2 -o cluster_size=4k a.qcow2 small.qcow2",
        "convert --target-is-zero -O qcow2 a.qcow2 out.qcow2",
        "convert -O qcow2 -B a.qcow2 a.qcow2 out.qcow2",
        "convert -O qcow2 -S 3 a.qcow2 out.qcow2",
        "convert -O qcow2 -S 32M a.qcow2 out.qcow2",
        "convert -O qcow2 -m 0 a.qcow2 out.qcow2",
        "convert -O qcow2 -m 17 a.qcow2 out.qcow2",
        "convert -O qcow2 -t nonsense a.qcow2 out.qcow2",
        "convert -O qcow2 -T nonsense a.qcow2 out.qcow2",
        "convert -O qcow2 -o nonsense=1 a.qcow2 out.qcow2",
        "convert -O qcow2 -c -o preallocation=metadata a.qcow2 out.qcow2",
        "convert -O qcow2 -r nonsense a.qcow2 out.qcow2",
        "convert -O qcow2 -l nosuch a.qcow2 out.qcow2",
        "convert -O qcow2 a.qcow2 missing-dir/out.qcow2",
        "convert -O qcow2 -B missing.qcow2 -F qcow2 a.qcow2 out.qcow2",
    ] {
        let (theirs, ours) = (dir.qemu(words), dir.linked(words).expect_clean_failure());
        assert!(
            theirs.code == ours.code && theirs.stderr == ours.stderr,
            "--- qemu-img\n{}--- vimg\n{}",
            theirs.story(),
            ours.story()
        );
        let left = ["out.raw", "out.qcow2", "d.raw"]
            .into_iter()
            .find(|name| ours.code != Some(0) && dir.exists(name));
        // qemu itself leaves some of these behind; what counts is that vimg does not.
        if let Some(left) = left {
            std::fs::remove_file(dir.file(left)).unwrap();
            dir.linked(words).expect_clean_failure();
            assert!(!dir.exists(left), "{words}: left {left} behind");
        }
    }
    // qemu-img says nothing at all here.
    dir.linked("convert -c -O qcow2 -o data_file=d.raw a.qcow2 out.qcow2").expect_clean_failure();
    for words in ["convert", "convert a.qcow2", "convert --nonsense a.qcow2 out.raw"] {
        assert_eq!(dir.qemu(words).code, dir.linked(words).expect_clean_failure().code, "{words}");
    }
}

/// A truncated image: qemu-img fills in zeros and says nothing. vimg refuses, unless told to save what can
/// be saved, and then says what was lost.
#[test]
fn truncated_sources_are_refused_or_salvaged() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 8M");
    dir.qemu_io("qcow2", "a.qcow2", &Ops(vec![Op::Write { offset: 0, len: 8 << 20, byte: 0x61 }]));
    let file = std::fs::OpenOptions::new().write(true).open(dir.file("a.qcow2")).unwrap();
    file.set_len(5 << 20).unwrap();
    dir.vimg("convert -O raw a.qcow2 out.raw").expect_clean_failure();
    assert!(!dir.exists("out.raw"), "a half-written file was left under the target's name");
    let ran = dir.vimg_ok("convert --salvage -O raw a.qcow2 out.raw");
    assert!(!ran.stderr.is_empty(), "nothing was said about what was lost");
    let bytes = dir.read("out.raw");
    assert!(
        bytes.len() == 8 << 20 && bytes[0] == 0x61 && bytes[8 << 19] == 0x61,
        "what was there was not saved"
    );
    assert!(bytes[(8 << 20) - 1] == 0);
}

#[test]
fn huge_and_nearly_empty_is_quick() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 huge.qcow2 1T");
    let ops = [0u64, 300 << 30, 700 << 30, (1 << 40) - 65536];
    dir.qemu_io(
        "qcow2",
        "huge.qcow2",
        &Ops(ops.map(|offset| Op::Write { offset, len: 65536, byte: 3 }).to_vec()),
    );
    for words in [
        "convert -O qcow2 huge.qcow2 copy.qcow2",
        "convert -c -O qcow2 huge.qcow2 copy.qcow2",
        "compare huge.qcow2 copy.qcow2",
        "map --output=json huge.qcow2",
        "check huge.qcow2",
        "measure -O qcow2 huge.qcow2",
    ] {
        let ran = dir.vimg_cmd(words).timeout(30).run().expect_code(0);
        assert!(ran.elapsed.as_secs() < 10, "{words} took {:?}", ran.elapsed);
    }
    dir.qemu_checks("copy.qcow2");
    dir.qemu_ok("compare huge.qcow2 copy.qcow2");
}

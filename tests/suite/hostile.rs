//! Images from strangers: every class of bad image gets a clear error in little time and memory, and never
//! wrong data with exit status 0.

use std::time::Duration;

use tests::forge::{COMPRESSED, COPIED, Forge, at};
use tests::skip::{qemu, tool};
use tests::{Cmd, Dir, Ran, fuzz, requires};

const C: u64 = 65536;

/// What vimg may take for any of these: cloud services give qemu-img one GiB and thirty seconds.
fn limited(dir: &Dir, words: &str) -> Ran {
    let ran = dir.vimg_cmd(words).memory_mib(1024).limit("--cpu=20").timeout(30).run().expect_no_panic();
    assert!(ran.elapsed < Duration::from_secs(20), "it took {:?}\n{}", ran.elapsed, ran.story());
    assert!(ran.stderr.len() < 1 << 20, "{} bytes of messages: {words}", ran.stderr.len());
    ran
}

/// All that can be asked of an image that is only read.
fn ask_everything(dir: &Dir, name: &str) -> Vec<Ran> {
    let asked = [
        "info a.qcow2",
        "info --backing-chain --output=json a.qcow2",
        "check a.qcow2",
        "map --output=json a.qcow2",
        "measure -O qcow2 a.qcow2",
        "compare a.qcow2 a.qcow2",
        "convert -O qcow2 a.qcow2 out.qcow2",
    ];
    let ran = asked.map(|words| limited(dir, words));
    let _ = std::fs::remove_file(dir.file("out.qcow2"));
    for ran in &ran {
        assert!(
            ran.code == Some(0) || !ran.stderr.is_empty() || ran.stdout.len() > 1,
            "{name}: no message\n{}",
            ran.story()
        );
    }
    ran.into()
}

/// Headers that break one rule each (qcow2.md 6.1): nothing may be opened.
fn bad_headers() -> Vec<(&'static str, Forge)> {
    let mut cases = vec![];
    let mut add = |name, change: &dyn Fn(&mut Forge)| {
        let mut forge = Forge::new();
        change(&mut forge);
        cases.push((name, forge));
    };
    macro_rules! set32 {
        ($($name:literal: $offset:literal = $value:expr),* $(,)?) => { $(add($name, &|f| { f.set32($offset, $value); });)* };
    }
    macro_rules! set64 {
        ($($name:literal: $offset:literal = $value:expr),* $(,)?) => { $(add($name, &|f| { f.set64($offset, $value); });)* };
    }
    set32!(
        "version 0": 4 = 0, "version 4": 4 = 4, "version -1": 4 = u32::MAX,
        "cluster_bits 0": 20 = 0, "cluster_bits 8": 20 = 8, "cluster_bits 22": 20 = 22, "cluster_bits 63": 20 = 63,
        "cluster_bits 64": 20 = 64, "cluster_bits -1": 20 = u32::MAX,
        "crypt_method 3": 32 = 3, "crypt_method -1": 32 = u32::MAX, "LUKS without its header": 32 = 2,
        "L1 too small": 36 = 0, "L1 too large": 36 = (4 << 20) + 1, "L1 entries -1": 36 = u32::MAX,
        "no refcount table": 56 = 0, "refcount table too large": 56 = 129, "refcount table clusters -1": 56 = u32::MAX,
        "snapshots 65537": 60 = 65537, "snapshots -1": 60 = u32::MAX,
        "refcount_order 7": 96 = 7, "refcount_order 64": 96 = 64, "refcount_order -1": 96 = u32::MAX,
        "header_length 0": 100 = 0, "header_length 96": 100 = 96, "header_length 103": 100 = 103,
        "header longer than the cluster": 100 = 65544, "header_length -1": 100 = u32::MAX,
    );
    set64!(
        "size 2^63": 24 = 1 << 63, "size -1": 24 = u64::MAX, "size larger than L1 can map": 24 = 1 << 40,
        "size with more L1 entries than fit": 24 = 1 << 62,
        "L1 unaligned": 40 = 3 * C + 512, "L1 beyond 2^56": 40 = 1 << 56, "L1 at -1": 40 = !0xffff,
        "refcount table unaligned": 48 = C + 8, "refcount table at -1": 48 = !0xffff,
        "backing file name beyond the header": 8 = 65537, "backing file name at -1": 8 = u64::MAX,
        "unknown feature": 72 = 1 << 40, "compression bit without type": 72 = 8,
    );
    add("compression type 2", &|f| {
        f.set64(72, 8).set32(100, 112).set(104, &[2]);
    });
    add("compression type without its bit", &|f| {
        f.set32(100, 112).set(104, &[1]);
    });
    add("subclusters below 512 bytes", &|f| {
        *f = Forge::with_clusters(13, 8192);
        f.set64(72, 16);
    });
    add("backing file name too long", &|f| {
        f.set64(8, 112).set32(16, 1024);
    });
    add("backing file name of 4 GiB", &|f| {
        f.set64(8, 112).set32(16, u32::MAX);
    });
    add("snapshot table unaligned", &|f| {
        f.set32(60, 1).set64(64, 5 * C + 1);
    });
    add("extension longer than the header", &|f| {
        f.set32(104, 0x1234_5678).set32(108, 0xffff_fff0);
    });
    add("extension just over the cluster", &|f| {
        f.set32(104, 0x1234_5678).set32(108, 65536 - 104 - 8 + 1);
    });
    add("bitmaps extension of the wrong length", &|f| {
        f.set64(88, 1).extension(0x2385_2875, &[0; 8]);
    });
    add("bitmaps extension with no bitmaps", &|f| {
        f.set64(88, 1).extension(0x2385_2875, &[0; 24]);
    });
    add("backing format longer than any", &|f| {
        f.backing(b"x").extension(0xe279_2aca, &[b'a'; 200]);
    });
    add("data file bit without a name", &|f| {
        f.set64(72, 4);
    });
    add("no L1 in a file that ends behind the header", &|f| {
        f.cut(512);
    });
    cases
}

#[test]
fn headers_that_break_a_rule_are_refused() {
    for (name, forge) in bad_headers() {
        let dir = Dir::new();
        dir.write("a.qcow2", &forge.bytes());
        let ran = limited(&dir, "convert -f qcow2 -O raw a.qcow2 out.raw");
        assert!(ran.code == Some(1) && !ran.stderr.is_empty(), "{name} was not refused\n{}", ran.story());
        assert!(!dir.exists("out.raw"), "{name}: a target was left behind");
        ask_everything(&dir, name);
    }
}

/// Structures that lie: data that is read through them would be wrong. qemu-img converts most of these with
/// exit status 0.
fn lies() -> Vec<(&'static str, Forge)> {
    let mut cases = vec![];
    let mut add = |name, change: &dyn Fn(&mut Forge)| {
        let mut forge = Forge::new();
        change(&mut forge);
        cases.push((name, forge));
    };
    let data = at::DATA as u64 * C;
    add("data beyond the end of the file", &|f| {
        f.l2(1, (1000 * C) | COPIED);
    });
    add("data beyond 2^55", &|f| {
        f.l2(1, (1 << 55) | COPIED);
    });
    add("data cut off in the middle", &|f| {
        f.cut(5 * 65536 + 10_000);
    });
    add("data just behind the end", &|f| {
        f.cut(5 * 65536);
    });
    add("L2 table beyond the end of the file", &|f| {
        f.l1(0, (1000 * C) | COPIED);
    });
    add("L2 table cut off", &|f| {
        f.cut(4 * 65536 + 4);
    });
    add("L1 table beyond the end of the file", &|f| {
        f.set64(40, 1000 * C);
    });
    add("L2 table unaligned", &|f| {
        f.l1(0, (4 * C + 512) | COPIED);
    });
    add("data unaligned", &|f| {
        f.l2(0, (data + 512) | COPIED);
    });
    add("reserved bits of an L2 entry", &|f| {
        f.l2(0, data | COPIED | 0x10);
    });
    add("high reserved bits of an L2 entry", &|f| {
        f.l2(0, data | COPIED | (1 << 60));
    });
    add("reserved bits of an L1 entry", &|f| {
        f.l1(0, (4 * C) | COPIED | 2);
    });
    add("data in the header", &|f| {
        f.l2(0, COPIED);
        f.l2(1, COPIED | 0x1_0000_0000_0000);
    });
    add("data in the refcount table", &|f| {
        f.l2(1, C | COPIED);
    });
    add("data in the L1 table", &|f| {
        f.l2(1, (3 * C) | COPIED);
    });
    add("data in the L2 table", &|f| {
        f.l2(1, (4 * C) | COPIED);
    });
    add("L2 table in the header", &|f| {
        f.set64(40, 0).l1(0, 0);
    });
    add("L2 table is the L1 table", &|f| {
        f.l1(0, (3 * C) | COPIED);
    });
    add("compressed data beyond the end", &|f| {
        f.l2(1, COMPRESSED | (1000 * C));
    });
    add("compressed data that is garbage", &|f| {
        f.l2(1, COMPRESSED | (data + 64)).l2(0, data).refcount(5, 2).set(6 * 65536 - 65472, &[0xff; 65472]);
    });
    add("compressed data cut off", &|f| {
        // A fixed-code deflate stream of a lot of 0x5a: whatever zeros behind the cut would decode to is wrong.
        f.l2(1, COMPRESSED | (1 << 54) | (6 * C - 512)).l2(0, data).refcount(5, 2);
        f.set(6 * 65536 - 512, &[0x4b; 512]).cut(6 * 65536 - 256);
    });
    add("zero flag in version 2", &|f| {
        f.set32(4, 2).set64(72, 0).l2(1, 1);
    });
    cases
}

#[test]
fn lies_are_never_converted_with_exit_status_0() {
    let mut believed = vec![];
    for (name, forge) in lies() {
        let dir = Dir::new();
        dir.write("a.qcow2", &forge.bytes());
        for words in
            ["convert -O raw a.qcow2 out", "convert -O qcow2 a.qcow2 out", "convert -O qcow2 -c a.qcow2 out"]
        {
            let ran = limited(&dir, words);
            if ran.code == Some(0) {
                believed.push(format!("{name}: {words}"));
            }
            let left = dir.exists("out");
            let _ = std::fs::remove_file(dir.file("out"));
            assert!(ran.code == Some(0) || !left, "{name}: a target was left behind\n{}", ran.story());
        }
        ask_everything(&dir, name);
        // With --salvage it goes on and says what it could not read.
        let ran = limited(&dir, "convert --salvage -O raw a.qcow2 out");
        if ran.code == Some(0) && !ran.stderr.is_empty() {
            assert_eq!(std::fs::metadata(dir.file("out")).unwrap().len(), 16 * C, "{name}");
        }
    }
    assert!(believed.is_empty(), "wrong data with exit status 0:\n{}", believed.join("\n"));
}

/// Images that look harmless and make a reader work for ever.
#[test]
fn endless_chains_are_noticed() {
    let dir = Dir::new();
    let refused = |words: &str| {
        let ran = dir
            .vimg_cmd(words)
            .memory_mib(1024)
            .limit("--nofile=1024")
            .timeout(30)
            .run()
            .expect_clean_failure();
        assert!(ran.elapsed < Duration::from_secs(5), "{:?}\n{}", ran.elapsed, ran.story());
        assert!(ran.stderr.len() < 8192, "{} bytes of message\n{}", ran.stderr.len(), ran.story());
    };
    let chain = |name: &str, backing: &str| {
        let mut forge = Forge::new();
        forge.backing(backing.as_bytes());
        dir.write(name, &forge.bytes());
    };
    chain("self.qcow2", "self.qcow2");
    chain("dotted.qcow2", "././dotted.qcow2");
    chain("ping.qcow2", "pong.qcow2");
    chain("pong.qcow2", "ping.qcow2");
    chain("link.qcow2", "link-to-it.qcow2");
    std::os::unix::fs::symlink("link.qcow2", dir.file("link-to-it.qcow2")).unwrap();
    for name in ["self", "dotted", "ping", "link"] {
        refused(&format!("convert -O raw {name}.qcow2 out.raw"));
        refused(&format!("map {name}.qcow2"));
        refused(&format!("info --backing-chain {name}.qcow2"));
        refused(&format!("compare {name}.qcow2 {name}.qcow2"));
        dir.vimg_ok(&format!("info {name}.qcow2"));
    }
    assert!(!dir.exists("out.raw"));
}

#[test]
fn long_chains_work() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 0.qcow2 1M");
    for n in 1..40 {
        dir.qemu_ok(&format!("create -f qcow2 -b {}.qcow2 -F qcow2 {n}.qcow2", n - 1));
    }
    dir.vimg_ok("convert -O raw 39.qcow2 out.raw");
    dir.vimg_ok("map 39.qcow2");
    let chain = dir.vimg_ok("info --backing-chain --output=json 39.qcow2").json();
    assert_eq!(chain.as_array().unwrap().len(), 40);
}

/// A snapshot table of garbage is not shown as snapshots.
#[test]
fn snapshot_tables_of_garbage() {
    let dir = Dir::new();
    for count in [1, 100, 65536] {
        let mut forge = Forge::new();
        forge.set32(60, count).set64(64, 6 * C).set(6 * 65536, &[0xff; 65536]);
        dir.write("a.qcow2", &forge.bytes());
        limited(&dir, "info a.qcow2").expect_clean_failure();
        ask_everything(&dir, "garbage");
        let mut forge = Forge::new();
        forge.set32(60, count).set64(64, 1000 * C);
        dir.write("a.qcow2", &forge.bytes());
        ask_everything(&dir, "beyond the end");
    }
}

/// One small compressed cluster that all of a huge disk points to: legal, and a bomb for whoever is careless.
#[test]
fn compression_bombs_cost_no_memory() {
    let bits = 21;
    let size = 64u64 << 30;
    let mut forge = Forge::with_clusters(bits, size);
    let entries = usize::try_from(size >> bits).unwrap();
    // A deflate stream of zeros, in whatever form: garbage is refused, which is just as well.
    for index in 0..entries {
        forge.l2(index, COMPRESSED | (5 << bits));
    }
    forge.refcount(5, u16::MAX).set(5 << bits, &[0; 512]);
    let dir = Dir::new();
    dir.write("a.qcow2", &forge.bytes());
    limited(&dir, "info a.qcow2").expect_code(0);
    limited(&dir, "map a.qcow2");
    limited(&dir, "convert -O raw a.qcow2 out.raw");
}

/// Tables as large as the format allows, in a sparse file: work and memory follow what the file holds.
#[test]
fn huge_tables_in_sparse_files() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 1P");
    ask_everything(&dir, "1 PiB, empty");
    dir.qemu_ok("create -f qcow2 -o cluster_size=512 a.qcow2 128G");
    ask_everything(&dir, "128 GiB in 512-byte clusters, empty");
    // A refcount table of 8 MiB that is all hole.
    let mut forge = Forge::new();
    forge.set64(48, 64 << 20).set32(56, 128);
    dir.write("a.qcow2", &forge.bytes());
    std::fs::OpenOptions::new().write(true).open(dir.file("a.qcow2")).unwrap().set_len(200 << 30).unwrap();
    ask_everything(&dir, "a file of 200 GiB of holes");
}

/// What is not qcow2 at all.
#[test]
fn garbage_is_refused_as_qcow2_and_accepted_as_raw() {
    let dir = Dir::new();
    for (name, bytes) in [("empty", vec![]), ("short", b"QFI\xfb".to_vec()), ("noise", vec![0xa5; 100_000])] {
        dir.write("a.img", &bytes);
        limited(&dir, "info -f qcow2 a.img").expect_clean_failure();
        limited(&dir, "check -f qcow2 a.img").expect_clean_failure();
        limited(&dir, "convert -f qcow2 -O raw a.img out.raw").expect_clean_failure();
        limited(&dir, "convert -f raw -O raw a.img out.raw").expect_code(0);
        // A disk has whole sectors.
        let found = dir.read("out.raw");
        assert!(found.starts_with(&bytes) && found.len() == bytes.len().next_multiple_of(512), "{name}");
    }
}

/// Clean images work within the limits that services set around qemu-img.
#[test]
fn clean_images_work_within_the_limits() {
    requires!(qemu(), tool("prlimit"));
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 1G");
    dir.qemu_io("qcow2", "a.qcow2", &tests::Ops::tour(1 << 30, 65536, 1, true, true));
    for words in [
        "info a.qcow2",
        "check a.qcow2",
        "convert -O raw a.qcow2 out",
        "convert -c -O qcow2 a.qcow2 out",
        "map a.qcow2",
    ] {
        let ran = limited(&dir, words);
        assert!(ran.code == Some(0) || words.starts_with("map"), "{}", ran.story());
    }
    dir.qemu_checks("out");
}

/// Ten thousand images, each a good one with a few bytes changed where it hurts most: no panic, no hang, no
/// memory beyond what the file justifies. (Through the library: the binary would take too long.)
#[test]
fn ten_thousand_mutated_images() {
    // In a process of its own, so that the peak of memory is that of this test alone.
    if std::env::var_os("VIMG_TESTS_CHILD").is_none() {
        let me = Cmd::new(std::env::current_exe().unwrap()).env("VIMG_TESTS_CHILD", "1");
        let _ = me.words("--exact hostile::ten_thousand_mutated_images --nocapture").timeout(300).ok();
        return;
    }
    let before = peak_memory_kib();
    let seeds = fuzz::seeds();
    let mut random = 0x853c_49e6_748f_ea9bu64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for round in 0..10_000usize {
        let (_, seed) = &seeds[round % seeds.len()];
        let mut bytes = seed.clone();
        for _ in 0..=next() % 4 {
            mutate(&mut bytes, &mut next);
        }
        fuzz::qcow2_open_read(&bytes);
        fuzz::qcow2_check(&bytes);
    }
    let grown = peak_memory_kib().saturating_sub(before);
    assert!(grown < 256 << 10, "the peak of memory grew by {} MiB", grown >> 10);
}

/// Changes a few bytes, most often in the header and the tables.
fn mutate(bytes: &mut Vec<u8>, next: &mut impl FnMut() -> u64) {
    let len = bytes.len() as u64;
    let metadata = match next() % 4 {
        0 => 112,
        1 | 2 => len.min(24 * 512),
        _ => len,
    };
    let index = |value: u64| usize::try_from(value).unwrap();
    let at = index(next() % metadata.max(1)).min(bytes.len().saturating_sub(9));
    match next() % 6 {
        0 => bytes[at] ^= 1 << (next() % 8),
        1 => bytes[at] = next().to_le_bytes()[0],
        2 => bytes[at & !7..][..8].copy_from_slice(&next().to_be_bytes()),
        3 => bytes[at & !7..][..8].copy_from_slice(&(next() % (2 * len)).to_be_bytes()),
        4 => {
            bytes[at & !3..][..4]
                .copy_from_slice(&[u32::MAX, 0, 1, 1 << 31][index(next() % 4)].to_be_bytes());
        }
        _ => bytes.truncate(index(next() % len).max(16)),
    }
}

/// The most memory this process ever had, in KiB.
fn peak_memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

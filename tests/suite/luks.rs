//! LUKS containers: made by the one, read and written by the other, with qemu-img's words all the way; and
//! cryptsetup finds in them what it expects.
//!
//! qemu-img measures the machine for seconds whenever it makes a key, so most containers here are ours.

use tests::command::Cmd;
use tests::skip::{qemu10, tool};
use tests::{Dir, requires};

const SECRET: &str = "--object secret,id=s,data=hush";
const QUICK: &str = "key-secret=s,iter-time=10";

/// `--image-opts` for the container of that name.
fn opts(name: &str) -> String {
    format!("driver=luks,key-secret=s,file.filename={name}")
}

/// Ciphers, modes, IVs and hashes in each of their values at least once.
const KINDS: &[&str] = &[
    "cipher-alg=aes-256",
    "cipher-alg=aes-192,hash-alg=sha1",
    "cipher-alg=aes-128,hash-alg=sha512",
    "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=ripemd160",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=plain,hash-alg=sha224",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-mode=ecb,hash-alg=sha384",
    "cipher-mode=ctr,hash-alg=sm3",
    "ivgen-alg=essiv,hash-alg=md5",
    "ivgen-alg=plain,ivgen-hash-alg=sha1",
    "cipher-alg=serpent-256",
    "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-alg=serpent-192",
    "cipher-alg=twofish-256,cipher-mode=cbc,ivgen-alg=essiv",
    "cipher-alg=twofish-192",
    "cipher-alg=twofish-128",
];

/// Noise of whole sectors, with zeros in between.
fn contents(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 300 << 10];
    let mut random = block::testing::Random::new(seed);
    random.fill(&mut bytes[..100_000]);
    random.fill(&mut bytes[200_000..]);
    bytes
}

#[test]
fn ours_are_read_and_written_by_qemu_in_every_kind() {
    requires!(qemu10());
    let dir = Dir::new();
    for (seed, kind) in (0..).zip(KINDS) {
        dir.write("a.raw", &contents(seed));
        dir.write("b.raw", &contents(seed + 100));
        dir.vimg_ok(&format!("convert -f raw -O luks {SECRET} -o {QUICK},{kind} a.raw a.luks"));
        let luks = opts("a.luks");
        dir.qemu_ok(&format!("compare {SECRET} --image-opts driver=raw,file.filename=a.raw {luks}"));
        dir.vimg_ok(&format!("compare {SECRET} --image-opts driver=raw,file.filename=a.raw {luks}"));
        dir.qemu_ok(&format!("convert {SECRET} -n -f raw --target-image-opts b.raw {luks}"));
        dir.vimg_ok(&format!("convert {SECRET} --image-opts -O raw {luks} c.raw"));
        assert!(dir.read("c.raw") == dir.read("b.raw"), "{kind}");
        dir.same_json("info --output=json a.luks");
        std::fs::remove_file(dir.file("a.luks")).unwrap();
    }
}

#[test]
fn theirs_are_read_and_written_by_us() {
    requires!(qemu10());
    for kind in ["cipher-alg=aes-256", "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1"] {
        let dir = Dir::new();
        dir.write("a.raw", &contents(1));
        dir.write("b.raw", &contents(2));
        dir.qemu_ok(&format!("convert -f raw -O luks {SECRET} -o {QUICK},{kind} a.raw a.luks"));
        let luks = opts("a.luks");
        dir.vimg_ok(&format!("convert {SECRET} --image-opts -O raw {luks} c.raw"));
        assert!(dir.read("c.raw") == dir.read("a.raw"), "{kind}");
        dir.vimg_ok(&format!("convert {SECRET} -n -f raw --target-image-opts b.raw {luks}"));
        dir.qemu_ok(&format!("compare {SECRET} --image-opts driver=raw,file.filename=b.raw {luks}"));
        dir.same("info a.luks");
        dir.same_json(&format!("info --output=json --image-opts {luks}"));
        dir.same(&format!("map {SECRET} --output=json --image-opts {luks}"));
        dir.same(&format!("map {SECRET} --image-opts {luks}"));
    }
}

/// Ours, with the words of both tools.
fn container(len: &str) -> Dir {
    let dir = Dir::new();
    dir.vimg_ok(&format!("create -q -f luks {SECRET} -o {QUICK} a.luks {len}"));
    dir
}

#[test]
fn what_is_wrong_is_said_alike() {
    requires!(qemu10());
    let dir = container("1M");
    dir.sparse("plain.raw", 1 << 20);
    let luks = opts("a.luks");
    for words in [
        "map a.luks",
        "map -f luks plain.raw",
        "map --object secret,id=s,data=x -f luks plain.raw",
        "check a.luks",
        "convert -O raw a.luks b.raw",
        "map --image-opts driver=luks,key-secret=q,file.filename=a.luks",
        "map --object secret,id=s,data=wrong --image-opts driver=luks,key-secret=s,file.filename=a.luks",
        "map --object secret,id=s,format=base64,data=//8= --image-opts driver=luks,key-secret=s,file.filename=a.luks",
        "info --image-opts driver=luks,nonsense=1,file.filename=a.luks",
        "info -f luks plain.raw",
        "create -f luks -o help",
        "create -f luks -o help b.luks",
        "create -f luks -o iter-time=10 b.luks 1M",
        "create -f luks -o key-secret=q b.luks 1M",
        "measure -O luks --size 1G",
        "measure -O luks -o cipher-alg=nonsense --size 1M",
        "amend -f luks -o help",
        "amend a.luks -o state=active",
    ] {
        dir.same(words);
    }
    for options in [
        "preallocation=nonsense",
        "cipher-alg=nonsense",
        "cipher-alg=3des",
        "cipher-mode=nonsense",
        "ivgen-alg=nonsense",
        "hash-alg=nonsense",
        "ivgen-alg=essiv,ivgen-hash-alg=sha1",
        "detached-header=on",
        "iter-time=x",
        "backing_file=a.luks",
    ] {
        dir.same(&format!("create -f luks {SECRET} -o key-secret=s,{options} b.luks 1M"));
        assert!(!dir.exists("b.luks"), "{options}");
    }
    for words in ["check", "resize", "snapshot -l", "commit"] {
        dir.same(&format!("{words} {SECRET} --image-opts {luks}"));
    }
    dir.same(&format!("compare {SECRET} --image-opts {luks} {luks}"));
    dir.same(&format!("measure -O luks --size 1000 {SECRET} -o key-secret=s,iter-time=10"));
    dir.same(&format!(
        "measure -O luks --output=json {SECRET} -o {QUICK},cipher-alg=aes-128 -f raw plain.raw"
    ));
    dir.same(&format!("measure -O qcow2 {SECRET} --image-opts {luks}"));
    dir.same(&format!("rebase -u -b x -F raw {SECRET} --image-opts {luks}"));
}

#[test]
fn objects_are_understood_alike() {
    requires!(qemu10());
    let dir = container("64k");
    dir.write("pw", b"hush");
    let zeros = "A".repeat(43);
    for object in [
        "secret,id=s,data=hush",
        "qom-type=secret,id=s,file=pw",
        "secret,id=s,format=base64,data=aHVzaA==",
        "{\"qom-type\":\"secret\",\"id\":\"s\",\"data\":\"hush\"}",
        "{\"qom-type\":\"secret\",\"id\":\"s\",\"data\":\"hush\",\"more\":1}",
        "secret,id=s,format=base64,data=aHVzaA",
        "secret,id=s,format=base64,data=a*b=",
        "secret,id=s,format=nonsense,data=x",
        "secret,id=s",
        "secret,data=x",
        "secret,id=1,data=x",
        "secret,id=s,data=x,file=pw",
        "secret,id=s,data=x,keyid=k",
        "secret,id=s,data",
        "secret,id=s,data=hush,nonsense=1",
        "nonsense,id=s",
        "iothread,id=s",
        "secret,id=s,data=a --object secret,id=s,data=b",
        "secret,id=k,data=short --object secret,id=s,keyid=k,data=x,iv=AAAA",
    ] {
        dir.same(&format!("map --output=json --object {object} --image-opts {}", opts("a.luks")));
    }
    let key = format!("--object secret,id=k,format=base64,data={zeros}=");
    for rest in ["data=AAAA", "data=AAAA,iv=AAAA", "data=AAAA,format=base64,iv=AAAAAAAAAAAAAAAAAAAAAA=="] {
        dir.same(&format!("map {key} --object secret,id=s,keyid=k,{rest} --image-opts {}", opts("a.luks")));
    }
}

#[test]
fn objects_are_taken_by_every_command() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    dir.qemu_ok("create -q -f qcow2 -b a.raw -F raw a.qcow2");
    for words in [
        "check -f qcow2 a.qcow2",
        "commit -f qcow2 a.qcow2",
        "compare -f raw -F raw a.raw a.raw",
        "convert -f raw -O raw a.raw b.raw",
        "create -f raw b.raw 1M",
        "dd -f raw -O raw if=a.raw of=b.raw",
        "info -f raw a.raw",
        "map -f raw a.raw",
        "measure -f raw -O qcow2 a.raw",
        "rebase -u -f qcow2 -b a.raw -F raw a.qcow2",
        "resize -f raw a.raw 1M",
        "snapshot -l a.qcow2",
        "bitmap --add a.qcow2 b",
        "amend -f qcow2 -o lazy_refcounts=on a.qcow2",
    ] {
        let (command, rest) = words.split_once(' ').unwrap();
        dir.same(&format!("{command} --object secret,id=s {rest}"));
        assert!(!dir.exists("b.raw"), "{words}");
        dir.linked(&format!("{command} {SECRET} {rest}")).expect_code(0);
        let _ = std::fs::remove_file(dir.file("b.raw"));
    }
}

/// Every field of the header, out of its bounds.
#[test]
fn headers_are_refused_alike() {
    requires!(qemu10());
    let good = container("64k").read("a.luks");
    let dir = Dir::new();
    let long = [b'x'; 40];
    let number = |n: u32| n.to_be_bytes();
    let changes: Vec<(usize, Vec<u8>)> = vec![
        (6, vec![0, 2]),
        (8, long[..32].to_vec()),
        (8, b"foo\0".to_vec()),
        (8, b"cast5\0".to_vec()),
        (40, long[..32].to_vec()),
        (40, b"xts\0\0\0\0\0\0\0\0\0\0".to_vec()),
        (40, b"foo-plain64\0".to_vec()),
        (40, b"xts-foo\0".to_vec()),
        (40, b"xts-essiv\0\0\0".to_vec()),
        (40, b"xts-essiv:foo\0".to_vec()),
        (40, b"xts-essiv:sha1\0".to_vec()),
        (40, b"xts-plain:foo\0".to_vec()),
        (72, long[..32].to_vec()),
        (72, b"whirlpool\0".to_vec()),
        (104, number(0).to_vec()),
        (104, number(8).to_vec()),
        (104, number(4039).to_vec()),
        (104, number(u32::MAX).to_vec()),
        (108, number(0).to_vec()),
        (108, number(63).to_vec()),
        (108, number(u32::MAX).to_vec()),
        (164, number(0).to_vec()),
        (168, long.to_vec()),
        (208, number(5).to_vec()),
        (212, number(0).to_vec()),
        (248, number(7).to_vec()),
        (248, number(512).to_vec()),
        (252, number(3999).to_vec()),
        (260, number(0).to_vec()),
        (300, number(1).to_vec()),
    ];
    for (at, with) in changes {
        let mut bytes = good.clone();
        bytes[at..at + with.len()].copy_from_slice(&with);
        dir.write("a.luks", &bytes);
        dir.same("info -f luks a.luks");
    }
    for len in [0, 6, 100, 591, 592, 4096, 2_068_479, 2_068_480, 2_068_481] {
        dir.write("a.luks", &good[..len]);
        dir.same("info -f luks a.luks");
    }
}

#[test]
fn resizing_goes_alike() {
    requires!(qemu10());
    let (ours, theirs) = {
        let dir = container("1M");
        (dir.duplicate(), dir)
    };
    for words in [
        "2M",
        "--preallocation=full +512k",
        "--preallocation=falloc +512k",
        "--preallocation=metadata 4M",
        "1M",
        "--shrink 1M",
        "--shrink 1000",
    ] {
        let words = format!("resize {SECRET} --image-opts {} {words}", opts("a.luks"));
        let (a, b) = (theirs.qemu(&words), ours.linked(&words));
        assert_eq!((a.code, &a.stdout, &a.stderr), (b.code, &b.stdout, &b.stderr), "{words}");
        assert_eq!(theirs.read("a.luks").len(), ours.read("a.luks").len(), "{words}");
    }
    assert!(theirs.read("a.luks") == ours.read("a.luks"));
}

fn active(dir: &Dir) -> Vec<bool> {
    let info = dir.vimg_ok("info --output=json a.luks").json();
    let slots = info["format-specific"]["data"]["slots"].as_array().unwrap().clone();
    slots.iter().map(|slot| slot["active"].as_bool().unwrap()).collect()
}

/// Who opens the container: with the secrets `s`, `n` and `o`.
fn openers(dir: &Dir, by_qemu: bool) -> Vec<&'static str> {
    let opens = |id: &&str| {
        let words =
            format!("map {KEYS} --output=json --image-opts driver=luks,key-secret={id},file.filename=a.luks");
        let ran = if by_qemu { dir.qemu(&words) } else { dir.vimg(&words) };
        ran.code == Some(0)
    };
    ["s", "n", "o"].into_iter().filter(opens).collect()
}

const KEYS: &str =
    "--object secret,id=s,data=hush --object secret,id=n,data=new --object secret,id=o,data=other";

#[test]
fn keys_come_and_go_alike() {
    requires!(qemu10());
    let (ours, theirs) = {
        let dir = container("64k");
        (dir.duplicate(), dir)
    };
    for (key, words) in [
        ("s", "-o nonsense=1"),
        ("s", "-o new-secret=n"),
        ("s", "-o state=nonsense"),
        ("s", "-o state=active"),
        ("s", "-o state=active,new-secret=q"),
        ("s", "-o state=active,new-secret=n,old-secret=s"),
        ("s", "-o state=active,new-secret=n,keyslot=8"),
        ("s", "-o state=active,new-secret=n,keyslot=0"),
        ("s", "-o state=inactive"),
        ("s", "-o state=inactive,keyslot=9"),
        ("s", "-o state=inactive,keyslot=3"),
        ("s", "-o state=inactive,keyslot=3 --force"),
        ("s", "-o state=inactive,keyslot=0"),
        ("s", "-o state=inactive,old-secret=s"),
        ("s", "-o state=inactive,old-secret=o"),
        ("s", "-o state=inactive,keyslot=0,old-secret=o"),
        ("s", "-o state=inactive,old-secret=s,new-secret=n"),
        ("s", "-o state=inactive,old-secret=s,iter-time=5"),
        ("s", "-o state=active,new-secret=n,iter-time=10,keyslot=6"),
        ("n", "-o state=active,new-secret=o,iter-time=10"),
        ("o", "-o state=inactive,old-secret=s"),
        ("s", "-o state=inactive,old-secret=n"),
        ("n", "-o state=inactive,keyslot=1"),
        ("n", "--force -o state=inactive,keyslot=6"),
    ] {
        let words =
            format!("amend {KEYS} --image-opts driver=luks,key-secret={key},file.filename=a.luks {words}");
        let (a, b) = (theirs.qemu(&words), ours.linked(&words).expect_no_panic());
        let same = (a.code, &a.stdout, &a.stderr) == (b.code, &b.stdout, &b.stderr);
        assert!(same, "--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
        assert_eq!(active(&theirs), active(&ours), "{words}");
        if a.code == Some(0) {
            assert_eq!(openers(&ours, true), openers(&theirs, false), "{words}");
        }
    }
    assert!(active(&ours).iter().all(|active| !active));
}

#[test]
fn cryptsetup_opens_ours() {
    requires!(tool("cryptsetup"));
    let dir = Dir::new();
    dir.write("pw", b"hush");
    dir.write("new", b"new");
    let kinds = [
        "cipher-alg=aes-256",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1",
        "hash-alg=sha512",
        "cipher-alg=aes-192,cipher-mode=cbc",
    ];
    for kind in kinds {
        dir.vimg_ok(&format!("create -q -f luks {SECRET} -o {QUICK},{kind} a.luks 1M"));
        let setup = |words: &str| Cmd::new("cryptsetup").words(words).dir(dir.path());
        let dump = setup("luksDump a.luks").ok();
        for expected in
            ["Version:       \t1", "Cipher name:   \taes", "Key Slot 0: ENABLED", "Key Slot 1: DISABLED"]
        {
            assert!(dump.stdout.contains(expected), "{kind}: {}", dump.story());
        }
        let opens = |key: &str| {
            setup(&format!("open --test-passphrase --type luks1 --key-file {key} a.luks")).run().code
        };
        assert_eq!((opens("pw"), opens("new")), (Some(0), Some(2)), "{kind}");
        let amend =
            format!("amend {KEYS} --image-opts {} -o state=active,new-secret=n,iter-time=10", opts("a.luks"));
        dir.vimg_ok(&amend);
        assert_eq!((opens("pw"), opens("new")), (Some(0), Some(0)), "{kind}");
    }
}

/// A header may ask for more rounds than anybody waits for: that is said at once, with the way out.
#[test]
fn a_header_that_asks_for_hours_is_refused_at_once() {
    let dir = Dir::new();
    dir.vimg_ok(&format!("create -f luks {SECRET} -o {QUICK} a.luks 1M"));
    dir.vimg_ok(&format!(
        "create -f qcow2 {SECRET} -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 a.qcow2 1M"
    ));
    let encrypted = "driver=qcow2,encrypt.key-secret=s,file.filename=a.qcow2";
    let commands = [
        format!("convert {SECRET} --image-opts -O raw {} out.raw", opts("a.luks")),
        format!("convert {SECRET} --image-opts -O raw {encrypted} out.raw"),
        format!(
            "amend {SECRET} --object secret,id=t,data=new --image-opts -o state=active,new-secret=t,iter-time=10 {}",
            opts("a.luks")
        ),
    ];
    for words in &commands {
        dir.vimg_ok(words);
    }
    for name in ["a.luks", "a.qcow2"] {
        let mut bytes = dir.read(name);
        let header = bytes.windows(6).position(|window| window == b"LUKS\xba\xbe").unwrap();
        bytes[header + 208 + 4..][..4].copy_from_slice(&u32::MAX.to_be_bytes());
        dir.write(name, &bytes);
    }
    for words in &commands {
        let start = std::time::Instant::now();
        let ran = dir.vimg(words);
        assert_eq!(ran.code, Some(1), "{}", ran.story());
        assert!(
            ran.stderr.contains("4294967295 rounds") && ran.stderr.contains("--slow-keys"),
            "{}",
            ran.story()
        );
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "{}", ran.story());
    }
    // What needs no key needs no effort.
    dir.vimg_ok("info a.luks");
    dir.vimg_ok("check a.qcow2");
    // What real tools make needs no leave; leave does no harm.
    dir.vimg_ok(&format!("create -f luks {SECRET} -o key-secret=s,iter-time=300 b.luks 1M"));
    dir.vimg_ok(&format!("convert --slow-keys {SECRET} --image-opts -O raw {} out.raw", opts("b.luks")));
}

/// A convert to a new container made its key, which takes as long as was asked for, and then did all of that again to
/// open it.
#[test]
fn a_convert_makes_its_key_once() {
    let dir = Dir::new();
    dir.write("a.raw", &[1; 4096]);
    let seconds = |words: &str| {
        let script =
            format!("TIMEFORMAT=%U; time '{}' {words} >/dev/null", tests::command::vimg_path().display());
        let ran = Cmd::new("bash").arg("-c").arg(script).dir(dir.path()).ok();
        ran.stderr.trim().parse::<f64>().unwrap_or_else(|_| panic!("{}", ran.story()))
    };
    for (format, prefix) in [("luks", ""), ("qcow2", "encrypt.")] {
        let more = if prefix.is_empty() { "" } else { "encrypt.format=luks," };
        let options = format!("{SECRET} -o {more}{prefix}key-secret=s,{prefix}iter-time=1000");
        let made = seconds(&format!("create -f {format} {options} made 4096"));
        let converted = seconds(&format!("convert -f raw -O {format} {options} a.raw converted"));
        assert!(made > 0.5, "{format}: {made} s are not what was asked for");
        assert!(converted < 1.6 * made, "{format}: {converted} s for a convert, {made} s for one key");
    }
}

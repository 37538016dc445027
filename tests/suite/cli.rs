//! The command line itself: help, wrong words, names, pipes, trust.

use tests::forge::Forge;
use tests::skip::qemu;
use tests::{Dir, Op, Ops, command, requires};

const COMMANDS: &[&str] = &[
    "amend", "bench", "bitmap", "check", "checksum", "commit", "compare", "convert", "copy", "create", "dd",
    "info", "map", "measure", "rebase", "resize", "snapshot",
];

#[test]
fn help_and_version() {
    let dir = Dir::new();
    let help = dir.vimg_ok("--help");
    for name in COMMANDS {
        assert!(help.stdout.contains(name), "--help does not know {name}");
        let page = dir.vimg_ok(&format!("{name} --help"));
        assert!(page.stdout.contains("Usage") && page.stderr.is_empty(), "{}", page.story());
        let short = dir.vimg_ok(&format!("{name} -h"));
        assert!(short.stdout.contains("Usage"), "{}", short.story());
    }
    let version = dir.vimg_ok("--version");
    assert!(version.stdout.starts_with("vimg "), "{}", version.story());
    assert_eq!(dir.vimg_ok("-V").stdout, version.stdout);
}

#[test]
fn wrong_words_fail_with_1_and_say_what_was_meant() {
    let dir = Dir::new();
    dir.vimg("").expect_clean_failure().expect_code(1);
    dir.vimg("convrt a b").expect_code(1).expect_stderr("convert");
    dir.vimg("info --ouput=json a").expect_code(1).expect_stderr("--output");
    dir.sparse("a.raw", 4096);
    dir.vimg("convert -f raw -O qcow a.raw b").expect_code(1).expect_stderr("qcow2");
    dir.vimg("create -f qcow2 -o cluster_sise=4k a 1M").expect_code(1).expect_stderr("'cluster_size'");
    dir.vimg("create -f qcoww2 a 1M").expect_code(1).expect_stderr("qcow2");
    dir.vimg("info --output=jsn a").expect_code(1);
    dir.vimg("info").expect_code(1);
}

/// A machine whose qemu-img is a link to vimg keeps working: messages carry that name.
#[test]
fn under_the_name_qemu_img_it_is_qemu_img() {
    let dir = Dir::new();
    dir.linked("info missing").expect_code(1).expect_stderr("qemu-img: Could not open 'missing'");
    dir.vimg("info missing").expect_code(1).expect_stderr("vimg: Could not open 'missing'");
    // Programs that ask for the version look for a number behind these words.
    dir.linked("--version").expect_code(0).expect_stdout("qemu-img version ");
}

#[test]
fn completions_and_man_pages() {
    let dir = Dir::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = dir.vimg_ok(&format!("completions {shell}"));
        assert!(script.stdout.contains("convert") && script.stdout.contains("vimg"), "{}", script.story());
    }
    std::fs::create_dir(dir.file("man")).unwrap();
    dir.vimg_ok("man man");
    for name in COMMANDS {
        let page = String::from_utf8(dir.read(&format!("man/vimg-{name}.1"))).unwrap();
        assert!(page.contains(".SH NAME"), "the page of {name} has no name");
    }
    assert!(dir.exists("man/vimg.1"));
}

/// `vimg ... | head` is no error.
#[test]
fn a_broken_pipe_is_quiet() {
    let dir = Dir::new();
    dir.vimg_ok("create -f qcow2 -o cluster_size=4k a.qcow2 64M");
    let script = format!(
        "'{0}' map --output=json a.qcow2 | true; '{0}' --help | head -n 1 >/dev/null; '{0}' info a.qcow2 | true",
        command::vimg_path().display()
    );
    let ran = tests::Cmd::new("sh").arg("-c").arg(script).dir(dir.path()).ok();
    assert_eq!(ran.stderr, "", "{}", ran.story());
}

/// A standard output that cannot take what is written is an error.
#[test]
fn a_full_standard_output_is_an_error() {
    let dir = Dir::new();
    dir.vimg_ok("create -f qcow2 a.qcow2 64M");
    for words in ["info a.qcow2", "map --output=json a.qcow2", "check a.qcow2"] {
        let script = format!("'{}' {words} >/dev/full", command::vimg_path().display());
        tests::Cmd::new("sh").arg("-c").arg(script).dir(dir.path()).run().expect_clean_failure();
    }
}

/// Nothing coloured, no terminal tricks, when the output is not a terminal.
#[test]
fn no_escape_sequences_in_pipes() {
    let dir = Dir::new();
    for words in ["--help", "convert --help", "convrt", "info missing", "info --nonsense"] {
        let ran = dir.vimg(words);
        assert!(!ran.stdout.contains('\x1b') && !ran.stderr.contains('\x1b'), "{}", ran.story());
    }
}

/// With --untrusted nothing is opened that the command line did not name.
#[test]
fn untrusted_images_open_no_files() {
    requires!(qemu());
    let dir = Dir::new();
    dir.write("secret.raw", &vec![0x53; 1 << 20]);
    dir.qemu_ok("create -f qcow2 base.qcow2 1M");
    dir.qemu_ok("create -f qcow2 -b secret.raw -F raw backing.qcow2");
    dir.qemu_ok("create -f qcow2 -b base.qcow2 -F qcow2 chain.qcow2");
    dir.qemu_ok("create -f qcow2 -o data_file=secret.raw data.qcow2 1M");
    dir.write("secret.raw", &vec![0x53; 1 << 20]);
    dir.qemu_ok("create -f qcow2 plain.qcow2 1M");
    dir.qemu_io("qcow2", "plain.qcow2", &Ops(vec![Op::Write { offset: 0, len: 65536, byte: 1 }]));
    for image in ["backing.qcow2", "chain.qcow2", "data.qcow2"] {
        dir.vimg_ok(&format!("convert -O raw {image} out.raw"));
        std::fs::remove_file(dir.file("out.raw")).unwrap();
        for command in ["convert --untrusted -O raw", "convert -O raw --untrusted"] {
            dir.vimg(&format!("{command} {image} out.raw")).expect_clean_failure();
            assert!(!dir.exists("out.raw"), "{command} {image}");
        }
        dir.vimg(&format!("--untrusted compare {image} plain.qcow2")).expect_clean_failure();
        dir.vimg(&format!("--untrusted map {image}")).expect_clean_failure();
        // The description opens nothing, so it may be asked for.
        dir.vimg_ok(&format!("--untrusted info {image}"));
    }
    dir.vimg("--untrusted info --backing-chain chain.qcow2").expect_clean_failure();
    dir.vimg_ok("--untrusted --allow base.qcow2 convert -O raw chain.qcow2 out.raw");
    dir.vimg_ok("--untrusted --allow . convert -O raw backing.qcow2 out.raw");
    dir.vimg_ok("convert --untrusted --allow secret.raw -O raw data.qcow2 out.raw");
    for words in [
        "convert -O qcow2 plain.qcow2 out.qcow2",
        "convert -c -O qcow2 plain.qcow2 out.qcow2",
        "check plain.qcow2",
        "map plain.qcow2",
        "compare plain.qcow2 plain.qcow2",
        "measure plain.qcow2",
    ] {
        dir.vimg_ok(&format!("--untrusted {words}"));
    }
    dir.qemu_checks("out.qcow2");
}

/// `json:` and protocol names inside images are followed for backing files, as in qemu, unless the image is
/// not trusted; for data files never.
#[test]
fn names_with_protocols_inside_images() {
    requires!(qemu());
    let dir = Dir::new();
    dir.write("secret.raw", &vec![0x53; 1 << 20]);
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"secret.raw"}}"#;
    let mut forge = Forge::new();
    forge.backing(json.as_bytes()).l2(0, 0).refcount(5, 0).cut(5 * 65536);
    dir.write("json.qcow2", &forge.bytes());
    let bytes = dir.vimg_reads("json.qcow2");
    assert!(bytes.iter().all(|&byte| byte == 0x53), "the json: backing file was not followed");
    dir.vimg("--untrusted convert -O raw json.qcow2 out.raw").expect_clean_failure();
    dir.vimg("--untrusted --allow . convert -O raw json.qcow2 out.raw").expect_clean_failure();
    assert!(!dir.exists("out.raw"));

    let mut forge = Forge::new();
    forge.set64(72, 4).extension(0x4441_5441, json.as_bytes());
    dir.write("data.qcow2", &forge.bytes());
    dir.vimg("convert -O raw data.qcow2 out.raw").expect_clean_failure();
    assert!(!dir.exists("out.raw"), "a json: name was followed for a data file");
}

/// A verdict that could not be printed must not look like the verdict "different"; a reader who went away may still
/// look at the exit code.
#[test]
fn compare_never_answers_wrongly_because_of_its_output() {
    let dir = Dir::new();
    dir.write("a.raw", &[1; 4096]);
    dir.write("b.raw", &[2; 4096]);
    let vimg = command::vimg_path();
    let shell = |script: &str| {
        let script = script.replace("VIMG", &format!("{} compare -f raw -F raw", vimg.display()));
        tests::Cmd::new("bash").arg("-c").arg(script).dir(dir.path()).run().code
    };
    assert_eq!(shell("VIMG a.raw a.raw >/dev/full"), Some(2));
    assert_eq!(shell("VIMG a.raw b.raw >/dev/full"), Some(2));
    assert_eq!(shell("VIMG a.raw b.raw | true; exit ${PIPESTATUS[0]}"), Some(1));
    assert_eq!(shell("VIMG a.raw a.raw | true; exit ${PIPESTATUS[0]}"), Some(0));
}

/// Work that is done is done, whether anybody hears of it or not; and what has failed has failed.
#[test]
fn progress_that_cannot_be_written_changes_nothing() {
    let dir = Dir::new();
    dir.write("a.raw", &[1; 70_000]);
    let vimg = command::vimg_path();
    let shell = |words: &str, to: &str| {
        // A reader, if there is one, is gone before the first byte comes.
        let script = format!("(sleep 0.05; exec '{}' {words}) {to}; exit ${{PIPESTATUS[0]}}", vimg.display());
        tests::Cmd::new("bash").arg("-c").arg(script).dir(dir.path()).run().code
    };
    for to in [">/dev/full", "| true"] {
        let commands = [
            ("create -f qcow2 b.qcow2 1M", 0),
            ("create -f qcow2 -b b.qcow2 -F qcow2 o.qcow2", 0),
            ("convert -p -O qcow2 a.raw c.qcow2", 0),
            ("convert --progress=json -O qcow2 a.raw c.qcow2", 0),
            ("convert -p -O qcow2 missing.raw d.qcow2", 1),
            ("rebase -p -b '' o.qcow2", 0),
            ("rebase -u -b b.qcow2 -F qcow2 o.qcow2", 0),
            ("commit -p o.qcow2", 0),
            ("resize b.qcow2 2M", 0),
            ("amend -p -o compat=0.10 b.qcow2", 0),
            ("compare -q -p a.raw b.qcow2", 1),
        ];
        for (words, code) in commands {
            assert_eq!(shell(words, to), Some(code), "{words} {to}");
        }
        for name in ["b.qcow2", "o.qcow2", "c.qcow2"] {
            assert!(dir.exists(name), "{name} {to}");
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
    }
}

/// nohup, and the background jobs of a script, have signals ignored: then they are.
#[test]
fn signals_that_are_to_be_ignored_are_ignored() {
    let dir = Dir::new();
    dir.write("a.raw", &vec![7; 4 << 20]);
    let vimg = command::vimg_path();
    let script = format!(
        "trap '' HUP; {} convert -r 2M -f raw -O raw a.raw b.raw & sleep 0.5; kill -HUP $!; wait $!",
        vimg.display()
    );
    let ran = tests::Cmd::new("bash").arg("-c").arg(script).dir(dir.path()).run();
    assert_eq!(ran.code, Some(0), "{}", ran.story());
    assert_eq!(dir.read("b.raw"), dir.read("a.raw"));
}

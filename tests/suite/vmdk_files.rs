//! Disks of several files: which names appear when, and which files are never overwritten.

use std::time::Duration;

use tests::Dir;

/// Names in the folder, sorted.
fn names(dir: &Dir) -> Vec<String> {
    let entries = std::fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A disk of noise, which takes its time.
fn noise(dir: &Dir, name: &str, mib: usize) {
    let mut bytes = vec![0; mib << 20];
    block::testing::Random::new(7).fill(&mut bytes);
    dir.write(name, &bytes);
}

/// Nobody finds a half-filled extent under the name of a whole one.
#[test]
fn extents_get_their_names_when_they_are_complete() {
    for (subformat, extent) in
        [("monolithicFlat", "out-flat.vmdk"), ("twoGbMaxExtentSparse", "out-s001.vmdk")]
    {
        let dir = Dir::new();
        noise(&dir, "in.raw", 24);
        let convert = format!("convert -f raw -O vmdk -o subformat={subformat} in.raw out.vmdk");
        let mut child = dir.vimg_cmd(&format!("{convert} -r 8M")).spawn();
        std::thread::sleep(Duration::from_millis(700));
        child.kill().unwrap();
        child.wait().unwrap();
        let left = names(&dir);
        let hidden = |name: &String| name.starts_with('.') && name.ends_with(".vimg-partial");
        assert!(left.iter().filter(|name| hidden(name)).count() == 2, "{left:?}");
        assert!(!left.iter().any(|name| name == extent || name == "out.vmdk"), "{left:?}");
        // The next one takes over, and leaves nothing else.
        dir.vimg_ok(&convert);
        assert_eq!(names(&dir), ["in.raw", extent, "out.vmdk"]);
        dir.vimg_ok("compare -f raw -F vmdk in.raw out.vmdk");
    }
}

/// What is interrupted in good order leaves nothing at all.
#[test]
fn an_interrupted_convert_leaves_no_extents() {
    let dir = Dir::new();
    noise(&dir, "in.raw", 24);
    let child =
        dir.vimg_cmd("convert -r 8M -f raw -O vmdk -o subformat=twoGbMaxExtentFlat in.raw out.vmdk").spawn();
    std::thread::sleep(Duration::from_millis(700));
    tests::command::Cmd::new("kill").arg("-INT").arg(child.id().to_string()).ok();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(names(&dir), ["in.raw"]);
}

/// An interrupted convert over an existing disk empties all of its files, as it says.
#[test]
fn an_interrupted_overwrite_empties_every_file() {
    let dir = Dir::new();
    noise(&dir, "in.raw", 24);
    let convert = "convert -f raw -O vmdk -o subformat=monolithicFlat in.raw out.vmdk";
    dir.vimg_ok(convert);
    let child = dir.vimg_cmd(&format!("{convert} -r 8M")).spawn();
    std::thread::sleep(Duration::from_millis(700));
    tests::command::Cmd::new("kill").arg("-INT").arg(child.id().to_string()).ok();
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(130) && said.contains("is empty now"), "{said}");
    assert!(dir.read("out.vmdk").is_empty() && dir.read("out-flat.vmdk").is_empty());
    dir.vimg_ok(convert);
}

/// The new image, or one of its extents, would lie where its parent lies.
#[test]
fn a_parent_is_not_overwritten_by_its_child() {
    let dir = Dir::new();
    noise(&dir, "in.raw", 1);
    for (kind, name) in [
        ("monolithicFlat", "A"),
        ("twoGbMaxExtentSparse", "S"),
        ("monolithicSparse", "E-s001"),
        ("monolithicSparse", "B"),
    ] {
        dir.vimg_ok(&format!("convert -f raw -O vmdk -o subformat={kind} in.raw {name}.vmdk"));
    }
    dir.sparse("link-target", 0);
    std::os::unix::fs::symlink("B.vmdk", dir.file("link.vmdk")).unwrap();
    for words in [
        "create -f vmdk -o subformat=twoGbMaxExtentSparse -b E-s001.vmdk -F vmdk E.vmdk",
        "create -f vmdk -b S.vmdk -F vmdk S-s001.vmdk",
        "create -f vmdk -b A.vmdk -F vmdk A-flat.vmdk",
        "create -f qcow2 -b A.vmdk -F vmdk A-flat.vmdk",
        "create -f vmdk -b B.vmdk -F vmdk link.vmdk",
        "create -f vmdk -u -b B.vmdk -F vmdk link.vmdk 1M",
        "convert -f raw -B E-s001.vmdk -F vmdk -O vmdk -o subformat=twoGbMaxExtentSparse in.raw E.vmdk",
    ] {
        dir.vimg(words).expect_code(1).expect_stderr("overwritten");
    }
    for name in ["A", "S", "E-s001", "B"] {
        dir.vimg_ok(&format!("compare -f raw -F vmdk in.raw {name}.vmdk"));
    }
}

/// An extent without its descriptor may be all that is left of a server.
#[test]
fn extents_of_nobody_are_not_overwritten() {
    let dir = Dir::new();
    noise(&dir, "in.raw", 1);
    noise(&dir, "data-flat.vmdk", 2);
    let before = dir.read("data-flat.vmdk");
    for words in [
        "create -f vmdk -o subformat=monolithicFlat data.vmdk 48M",
        "convert -f raw -O vmdk -o subformat=monolithicFlat in.raw data.vmdk",
    ] {
        dir.vimg(words).expect_code(1).expect_stderr("data-flat.vmdk");
        assert!(dir.read("data-flat.vmdk") == before);
        assert_eq!(names(&dir), ["data-flat.vmdk", "in.raw"]);
    }
    // An empty one is in nobody's way.
    dir.write("data-flat.vmdk", b"");
    dir.vimg_ok("convert -f raw -O vmdk -o subformat=monolithicFlat in.raw data.vmdk");
    dir.vimg_ok("compare -f raw -F vmdk in.raw data.vmdk");
}

/// A clone whose parent lies elsewhere is made, and its maker told what it takes to read it.
#[test]
fn a_parent_elsewhere_is_announced() {
    let dir = Dir::new();
    std::fs::create_dir(dir.file("clones")).unwrap();
    dir.vimg_ok("create -q -f vmdk base.vmdk 1M");
    let made = dir.vimg_ok("create -f vmdk -b ../base.vmdk -F vmdk clones/c.vmdk");
    assert!(made.stderr.contains("--allow"), "{}", made.story());
    dir.vimg("convert -O raw clones/c.vmdk c.raw").expect_code(1).expect_stderr("--allow");
    dir.vimg_ok("convert -O raw --allow base.vmdk clones/c.vmdk c.raw");
}

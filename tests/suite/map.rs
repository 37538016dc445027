//! `map`: where the bytes are, as qemu-img sees it.

use serde_json::Value;
use tests::shape::SHAPES;
use tests::skip::qemu10;
use tests::{Dir, Ran, requires};

/// Both tools print the same map. One thing is left out: where a cluster has space but this part of it was
/// never written (subclusters), qemu-img gives an offset for bytes that it says are not there.
#[track_caller]
fn same_map(dir: &Dir, words: &str) {
    let (theirs, ours) = (dir.qemu(words), dir.linked(words).expect_no_panic());
    let equal =
        theirs.code == ours.code && (theirs.stdout == ours.stdout || merged(&theirs) == merged(&ours));
    assert!(equal, "the tools differ\n--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
}

/// The rows of a map without the offsets of absent bytes, neighbours that are then alike merged.
fn merged(ran: &Ran) -> Vec<Value> {
    let mut rows: Vec<Value> = vec![];
    for mut row in ran.json().as_array().unwrap().clone() {
        if row["present"] == false {
            row.as_object_mut().unwrap().shift_remove("offset");
        }
        match rows.last_mut().filter(|last| last["present"] == false && row["present"] == false) {
            Some(last) if last["depth"] == row["depth"] && last["zero"] == row["zero"] => {
                let len = last["length"].as_u64().unwrap() + row["length"].as_u64().unwrap();
                last["length"] = len.into();
            }
            _ => rows.push(row),
        }
    }
    rows
}

#[test]
fn every_shape_is_mapped_alike() {
    requires!(qemu10());
    for shape in SHAPES {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", true);
        same_map(&dir, "map --output=json a.qcow2");
        dir.same_outcome("map a.qcow2");
        let c = shape.cluster;
        for (start, len) in [(c, 3 * c), (c / 2, c), (shape.size() - 512, 4096), (0, 1), (shape.size(), 512)]
        {
            same_map(&dir, &format!("map --output=json -s {start} -l {len} a.qcow2"));
        }
    }
}

/// No compressed clusters, so that the human form has something to say.
#[test]
fn the_human_form_of_a_chain() {
    requires!(qemu10());
    let dir = Dir::new();
    let shape = SHAPES.iter().find(|shape| shape.name == "backing-2").unwrap();
    shape.build(
        "a.qcow2",
        |words| {
            dir.qemu_ok(words);
        },
        |layer, seed| {
            dir.qemu_io(
                "qcow2",
                layer,
                &tests::Ops::tour(shape.size(), shape.cluster * u64::from(seed), seed, false, true),
            );
        },
    );
    dir.same("map a.qcow2");
    dir.same("map --output=human a.qcow2");
}

#[test]
fn backings_shorter_and_longer() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 short.qcow2 1M");
    dir.qemu_ok("create -f qcow2 -b short.qcow2 -F qcow2 mid.qcow2 4M");
    dir.qemu_ok("create -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 2M");
    dir.qemu_ok("create -f qcow2 -b top.qcow2 -F qcow2 long.qcow2 16M");
    let ops = |size| tests::Ops::tour(size, 4096, 1, false, false);
    for (image, size) in [("short", 1 << 20), ("mid", 4 << 20), ("top", 2 << 20), ("long", 16 << 20)] {
        dir.qemu_io("qcow2", &format!("{image}.qcow2"), &ops(size));
        dir.same_json(&format!("map --output=json {image}.qcow2"));
        dir.same(&format!("map {image}.qcow2"));
    }
    assert!(dir.vimg_reads("long.qcow2") == dir.qemu_reads("long.qcow2"));
    assert!(dir.vimg_reads("top.qcow2") == dir.qemu_reads("top.qcow2"));
}

#[test]
fn raw_files_with_holes() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", (8 << 20) + 1000);
    dir.same_json("map -f raw --output=json a.raw");
    dir.poke("a.raw", 1 << 20, &[1; 65536]);
    dir.poke("a.raw", 8 << 20, &[1; 10]);
    dir.same_json("map -f raw --output=json a.raw");
    dir.same("map -f raw a.raw");
    dir.same_json("map --output=json --image-opts driver=raw,offset=1M,size=1M,file.filename=a.raw");
}

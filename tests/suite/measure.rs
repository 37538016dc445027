//! `measure`: how large the result of a conversion will be.

use tests::shape::SHAPES;
use tests::skip::qemu10;
use tests::{Dir, requires};

#[test]
fn every_shape_as_source_and_target() {
    requires!(qemu10());
    for shape in SHAPES {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", true);
        for target in ["-O raw", "-O qcow2", "-O qcow2 -o cluster_size=4k", "-O qcow2 -o compat=0.10"] {
            dir.same_json(&format!("measure --output=json {target} a.qcow2"));
        }
        dir.same("measure -O qcow2 a.qcow2");
        for size in ["0", "1", "1M", "1G", "10T"] {
            // Only create knows the newer names of the versions in qemu-img; vimg knows them everywhere.
            let options =
                shape.options.replace("compat=v2", "compat=0.10").replace("compat=v3", "compat=1.1");
            dir.same_json(&format!("measure --output=json --size {size} -O qcow2 -o {options}"));
        }
    }
}

/// The promise behind the figure: an image of the data really fits, and converting it takes no more.
#[test]
fn a_conversion_fits_into_what_was_measured() {
    let dir = Dir::new();
    dir.sparse("a.raw", 64 << 20);
    for n in 0..40 {
        dir.poke("a.raw", n * 1_600_000, &vec![7; 70_000]);
    }
    for options in
        ["cluster_size=64k", "cluster_size=4k", "cluster_size=512", "cluster_size=64k,extended_l2=on"]
    {
        let measured =
            dir.vimg_ok(&format!("measure --output=json -O qcow2 -o {options} -f raw a.raw")).json();
        dir.vimg_ok(&format!("convert -f raw -O qcow2 -o {options} a.raw a.qcow2"));
        let len = std::fs::metadata(dir.file("a.qcow2")).unwrap().len();
        let required = measured["required"].as_u64().unwrap();
        assert!(len <= required, "{options}: {len} bytes were needed, {required} promised");
        assert!(required <= measured["fully-allocated"].as_u64().unwrap());
    }
}

#[test]
fn raw_sources_and_wrong_words() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 8 << 20);
    dir.poke("a.raw", 3 << 20, &[1; 100_000]);
    for words in [
        "measure -f raw -O qcow2 a.raw",
        "measure -f raw -O raw a.raw",
        "measure -f raw -O qcow2 -o preallocation=metadata a.raw",
        "measure -f raw -O qcow2 -o preallocation=full a.raw",
        "measure --size 3G",
        "measure --size 3G -O raw",
        "measure --size 4P -O qcow2",
        "measure -O vmdk --size 1G",
        "measure -O nonsense --size 1G",
        "measure -O qcow2 --size 1G -o cluster_size=3",
        "measure -O qcow2 missing.raw",
    ] {
        dir.same(words);
    }
    for words in ["measure -O qcow2", "measure -O qcow2 --size 1G a.raw", "measure --size"] {
        assert_eq!(dir.qemu(words).code, dir.linked(words).expect_clean_failure().code);
    }
}

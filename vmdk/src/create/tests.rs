use block::mem::MemStorage;

use super::*;
use crate::{Descriptor, Layout};

pub(crate) fn options(size: u64, subformat: Subformat) -> CreateOptions {
    CreateOptions {
        size,
        subformat,
        adapter: "ide".to_owned(),
        hardware: "4".to_owned(),
        tools: "2147483647".to_owned(),
        zero_grains: false,
        parent: None,
        preallocation: Preallocation::Off,
    }
}

/// What qemu-img 10.0.2 writes.
#[test]
fn the_descriptor_is_qemus() {
    let options = options(5 << 30, Subformat::TwoGbMaxExtentFlat);
    let text = options.descriptor("t.vmdk").unwrap();
    let cid = format!("{:08x}", Descriptor::parse(text.as_bytes()).unwrap().cid());
    let expected = "# Disk DescriptorFile\nversion=1\nCID=\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n\n\
        # Extent description\nRW 4194304 FLAT \"t-f001.vmdk\" 0\nRW 4194304 FLAT \"t-f002.vmdk\" 0\n\
        RW 2097152 FLAT \"t-f003.vmdk\" 0\n\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\n\
        ddb.geometry.cylinders = \"10402\"\nddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\n\
        ddb.adapterType = \"ide\"\nddb.toolsVersion = \"2147483647\"\n";
    assert_eq!(text.replace(&format!("CID={cid}"), "CID="), expected);
}

#[test]
fn a_parent_and_a_name_beyond_ascii_are_named() {
    let mut options = options(1 << 20, Subformat::MonolithicSparse);
    options.parent = Some(("../p.vmdk".to_owned(), 0xab));
    let text = options.descriptor("größe.vmdk").unwrap();
    assert!(text.contains("encoding=\"UTF-8\"\n") && text.contains("parentCID=000000ab\n"), "{text}");
    assert!(text.contains("\"\nparentFileNameHint=\"../p.vmdk\"\n\n# Extent"), "{text}");
    options.descriptor("a\"b").unwrap_err();
}

#[test]
fn the_places_are_qemus() {
    let header = options(100_000_000, Subformat::MonolithicSparse).header(195_313);
    assert_eq!(header, crate::header::tests::sample());
    let header = options(3 << 40, Subformat::MonolithicSparse).header((3 << 40) / SECTOR);
    assert_eq!((header.gd_offset, header.overhead), (0x60315, 0xc0680));
}

#[test]
fn files_are_named_after_the_main_one() {
    let names = |subformat, named| {
        let extents = options((4 << 30) + 512, subformat).extents(named);
        extents.into_iter().map(|extent| (extent.file, extent.sectors)).collect::<Vec<_>>()
    };
    assert_eq!(names(Subformat::MonolithicFlat, "a.b.c"), [("a.b-flat.c".to_owned(), 8_388_609)]);
    assert_eq!(names(Subformat::MonolithicFlat, "tt")[0].0, "tt-flat");
    let split = names(Subformat::TwoGbMaxExtentSparse, "x.vmdk");
    assert_eq!(split[2], ("x-s003.vmdk".to_owned(), 1));
    assert_eq!(split[0], ("x-s001.vmdk".to_owned(), 4_194_304));
    assert!(names(Subformat::MonolithicSparse, "x").is_empty());
}

#[test]
fn what_does_not_go_together_is_refused_in_qemus_words() {
    let refused = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = options(1 << 20, Subformat::MonolithicFlat);
        change(&mut options);
        options.validate().unwrap_err().to_string()
    };
    assert_eq!(refused(&|o| o.zero_grains = true), "Flat image can't enable zeroed grain");
    assert_eq!(refused(&|o| o.parent = Some(("p".to_owned(), 1))), "Flat image can't have backing file");
    refused(&|o| o.adapter = "foo".to_owned());
    refused(&|o| o.tools = "1\"\nCID=0".to_owned());
    let huge = CreateOptions { size: 2 << 50, ..options(0, Subformat::MonolithicSparse) };
    assert_eq!(huge.validate().unwrap_err().to_string(), "L1 size too big");
    let split = CreateOptions { size: 17 << 40, ..options(0, Subformat::TwoGbMaxExtentSparse) };
    split.validate().unwrap_err();
}

#[test]
fn what_is_made_can_be_read_even_if_it_is_empty() {
    for size in [0, 512, 100 << 20] {
        for subformat in [Subformat::MonolithicSparse, Subformat::StreamOptimized] {
            let options = options(size, subformat);
            options.validate().unwrap();
            let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
            options.make_one_file(&storage, &options.descriptor("x").unwrap()).unwrap();
            let layout = Layout::read(&storage).unwrap();
            assert_eq!(layout.descriptor().unwrap().create_type(), subformat.name());
        }
    }
}

use block::ErrorKind;
use proptest::prelude::*;

use super::*;

const WORKSTATION: &str = "# Disk DescriptorFile\r\nversion=1\r\nencoding=\"windows-1252\"\r\nCID=fb183c20\r\n\
    parentCID=ffffffff\r\nisNativeSnapshot=\"no\"\r\ncreateType=\"twoGbMaxExtentFlat\"\r\n\r\n\
    # Extent description\r\nRW 4192256 FLAT \"Windows XP-f001.vmdk\" 0\r\nRDONLY 2048 FLAT \"b.vmdk\" 63\r\n\
    NOACCESS 10 ZERO\r\n\r\n# The Disk Data Base \r\n#DDB\r\n\r\nddb.adapterType = \"buslogic\"\r\n\
    ddb.uuid = \"60 00 C2 9c\"\r\n";

fn parse(text: &str) -> Result<Descriptor> {
    Descriptor::parse(text.as_bytes())
}

fn with_lines(lines: &str) -> Result<Descriptor> {
    parse(&format!("version=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n{lines}"))
}

fn refused(lines: &str) -> String {
    let error = with_lines(lines).unwrap_err();
    format!("{error:?}")
}

#[test]
fn every_extent_keeps_its_place() {
    let parsed = parse(WORKSTATION).unwrap();
    assert_eq!((parsed.cid(), parsed.has_parent()), (0xfb18_3c20, false));
    assert_eq!(parsed.create_type(), "twoGbMaxExtentFlat");
    let [first, second, third] = parsed.extents() else { panic!("{:?}", parsed.extents()) };
    assert_eq!(first.file.as_deref(), Some("Windows XP-f001.vmdk"));
    assert_eq!((second.access, second.offset), (Access::ReadOnly, 63));
    assert_eq!((third.access, third.kind, third.sectors), (Access::None, Kind::Zero, 10));
    assert_eq!(parsed.get("encoding").as_deref(), Some("windows-1252"));
    let database: Vec<_> = parsed.database().collect();
    assert_eq!(database[1], ("ddb.uuid".to_owned(), "60 00 C2 9c".to_owned()));
}

#[test]
fn a_changed_value_changes_its_line_and_nothing_else() {
    let mut parsed = parse(WORKSTATION).unwrap();
    parsed.set_cid(0x0000_beef);
    let expected = WORKSTATION.replace("CID=fb183c20", "CID=0000beef");
    assert_eq!(String::from_utf8(parsed.encode()).unwrap(), expected);
    parsed.set_parent(Some("base.vmdk"), 0x1234);
    let expected = expected
        .replace("parentCID=ffffffff", "parentCID=00001234")
        .replace("Flat\"\r\n\r\n", "Flat\"\r\nparentFileNameHint=\"base.vmdk\"\r\n\r\n");
    assert_eq!(String::from_utf8(parsed.encode()).unwrap(), expected);
    assert_eq!(Descriptor::parse(&parsed.encode()).unwrap(), parsed);
    parsed.set_parent(None, NO_PARENT);
    assert!(!String::from_utf8(parsed.encode()).unwrap().contains("parentFileNameHint"));
}

#[test]
fn probing_looks_for_the_version() {
    for text in ["# Disk DescriptorFile\nversion=1\n", "\r\n \n# x\r\nversion=3\r\n", "version = 2"] {
        assert!(Descriptor::probe(text.as_bytes()), "{text:?}");
    }
    for text in ["", "# Disk DescriptorFile\n", "version=4\n", "CID=1\nversion=1\n", "version=10"] {
        assert!(!Descriptor::probe(text.as_bytes()), "{text:?}");
    }
}

#[test]
fn what_is_missing_is_named() {
    for (text, key) in [
        ("CID=1\ncreateType=\"x\"", "version"),
        ("version=1\ncreateType=\"x\"", "CID"),
        ("version=1\nCID=1", "createType"),
    ] {
        let error = parse(text).unwrap_err();
        assert_eq!(error.to_string(), "invalid VMDK image descriptor");
        assert!(error.hints()[0].contains(&format!("'{key}'")), "{error:?}");
    }
    assert_eq!(parse("version=4\nCID=1").unwrap_err().kind(), ErrorKind::Unsupported);
    parse("version=1\nCID=123456789\ncreateType=\"x\"").unwrap_err();
}

#[test]
fn extents_that_make_no_sense_are_refused_with_their_line() {
    let text = refused("RW 10 FLAT \"a\"");
    assert!(text.contains("line 5 of the descriptor: Invalid extent line: RW 10 FLAT \"a\""), "{text}");
    for line in [
        "RW -1 ZERO",
        "RW 36028797018963968 ZERO",
        "RW 99999999999999999999 ZERO",
        "RW 10 NONSENSE \"a\" 0",
        "RW 10 SPARSE",
        "RW 10 SPARSE \"\"",
        "RW 10 SPARSE \"a",
        "RW 10 SPARSE \"a\" 7",
        "RW 10 FLAT \"a\" x",
        "RW",
    ] {
        assert!(refused(line).contains("Invalid extent line"), "{line}");
    }
    assert!(refused(&format!("RW 10 SPARSE \"{}\"", "x".repeat(512))).contains("511"));
    with_lines(&format!("RW 10 SPARSE \"{}\"", "x".repeat(511))).unwrap();
    with_lines("RW 10 VMFS \"a\"").unwrap();
}

#[test]
fn sums_that_overflow_are_refused() {
    let lines = "RW 18014398509481983 ZERO\n".repeat(2);
    assert!(refused(&lines).contains("larger than a disk can be"));
    with_lines("RW 18014398509481983 ZERO").unwrap();
}

#[test]
fn overlapping_extents_are_refused() {
    for lines in [
        "RW 10 FLAT \"a\" 0\nRW 10 FLAT \"./a\" 9",
        "RW 10 SPARSE \"a\"\nRW 10 SPARSE \"a\"",
        "RW 10 SPARSE \"a\"\nRW 10 FLAT \"a\" 100000",
    ] {
        assert!(refused(lines).contains("overlap in the file 'a'"), "{lines}");
    }
    with_lines("RW 10 FLAT \"a\" 0\nRW 10 FLAT \"a\" 10\nRW 5 FLAT \"b\" 3").unwrap();
}

#[test]
fn a_million_extents_are_refused_at_once() {
    let start = std::time::Instant::now();
    assert!(refused(&"RW 1 ZERO\n".repeat(100_000)).contains("more than 8192 extents"));
    let lines: String = (0..MAX_EXTENTS).map(|i| format!("RW 1 FLAT \"a\" {i}\n")).collect();
    assert_eq!(with_lines(&lines).unwrap().extents().len(), MAX_EXTENTS);
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn names_that_are_not_utf8_are_those_of_windows() {
    let text = b"version=1\nCID=1\ncreateType=\"x\"\nRW 1 FLAT \"Gr\xf6\xdfe \x80.vmdk\" 0";
    let parsed = Descriptor::parse(text).unwrap();
    assert_eq!(parsed.extents()[0].file.as_deref(), Some("Größe €.vmdk"));
    assert_eq!(parsed.encode(), text);
}

proptest! {
    #[test]
    fn no_text_panics_and_what_is_accepted_is_kept(
        lines in prop::collection::vec("(RW|RDONLY|CID=|ddb\\.a *= |createType=|version=1|[ -~]{0,4})[ -~]{0,24}\r?", 0..12)
    ) {
        let text = lines.join("\n");
        let _ = Descriptor::probe(text.as_bytes());
        let with_head = format!("version=1\nCID=7\ncreateType=\"x\"\n{text}");
        for text in [text, with_head] {
            if let Ok(parsed) = parse(&text) {
                prop_assert_eq!(parsed.encode(), text.as_bytes());
            }
        }
    }
}

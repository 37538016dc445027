//! Names and options as the real tool understands them (tried with qemu-img 10.0.2).

use super::*;
use crate::Format;

fn name(text: &str) -> Node {
    Spec::from_filename(text).unwrap().node
}

fn opts(text: &str) -> Node {
    Spec::from_image_opts(text).unwrap().node
}

fn name_error(text: &str) -> String {
    Spec::from_filename(text).unwrap_err().to_string()
}

fn opts_error(text: &str) -> String {
    let error = Spec::from_image_opts(text).unwrap_err().to_string();
    error.strip_prefix(&format!("Could not open '{text}': ")).unwrap().to_owned()
}

#[test]
fn plain_names_are_paths() {
    assert_eq!(name("a/b:c").plain_path(), Some("a/b:c"));
    assert_eq!(name("./foo:bar").plain_path(), Some("./foo:bar"));
    assert_eq!(name("file:x y").plain_path(), Some("x y"));
    assert!(matches!(name("host_device:/dev/sdx").source, Source::File { device: true, .. }));
}

#[test]
fn unknown_protocols_are_named() {
    assert_eq!(name_error("foo:bar"), "Could not open 'foo:bar': Unknown protocol 'foo'");
    assert_eq!(name_error(":x"), "Could not open ':x': Unknown protocol ''");
    assert_eq!(name_error(""), "Could not open '': The 'file' block driver requires a file name");
}

#[test]
fn nbd_names_reach_the_opener_whole() {
    for text in ["nbd:unix:/tmp/x", "nbd://host/export", "nbd+unix:///n?socket=/p"] {
        match name(text).source {
            Source::Protocol(request) => {
                assert_eq!((request.driver.as_str(), request.name.as_deref()), ("nbd", Some(text)));
                let secrets = crate::Secrets::default();
                let how = Opening { secrets: &secrets, no_flush: false };
                let error = open_protocol(&request, &how).unwrap_err();
                assert_eq!(error.kind(), block::ErrorKind::Unsupported);
                assert!(!error.hints().is_empty());
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn json_names_nested_and_dotted_are_the_same() {
    let nested = name(r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}"#);
    let dotted = name(r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"a"}"#);
    let quoted = name("json:{'driver':'qcow2','file.filename':'a'}");
    assert_eq!(nested, dotted);
    assert_eq!(nested, quoted);
    assert_eq!(nested.driver, Some(Format::Qcow2));
    assert_eq!(nested.plain_path(), Some("a"));
    assert_eq!(nested, opts("driver=qcow2,file.filename=a"));
}

#[test]
fn what_a_name_cannot_say_is_shown_as_json() {
    let node = opts("driver=raw,offset=512,size=1k,file.filename=a");
    assert_eq!(
        node.shown_name(Format::Raw),
        r#"json:{"offset": "512", "driver": "raw", "size": "1k", "file": {"driver": "file", "filename": "a"}}"#
    );
    let nested = opts("driver=qcow2,file.driver=raw,file.file.filename=a");
    assert_eq!(
        nested.shown_name(Format::Qcow2),
        r#"json:{"driver": "qcow2", "file": {"driver": "raw", "file": {"driver": "file", "filename": "a"}}}"#
    );
}

#[test]
fn file_names_in_options_are_never_parsed() {
    assert_eq!(opts("driver=raw,file.filename=nbd://x").plain_path(), Some("nbd://x"));
    assert_eq!(opts("driver=raw,file.filename=a,,b").plain_path(), Some("a,b"));
}

#[test]
fn backing_files_can_be_chosen() {
    assert_eq!(name("json:{'driver':'qcow2','file.filename':'a','backing':null}").backing, Backing::None);
    let chosen = opts("driver=qcow2,file.filename=a,backing.driver=raw,backing.file.filename=b");
    match chosen.backing {
        Backing::Node(node) => assert_eq!((node.driver, node.plain_path()), (Some(Format::Raw), Some("b"))),
        other => panic!("{other:?}"),
    }
    let spec = Spec::from_image_opts("driver=qcow2,file.filename=a,backing=").unwrap();
    assert_eq!(spec.node.backing, Backing::None);
    assert_eq!(spec.warnings.len(), 1);
}

#[test]
fn errors_use_the_words_of_the_real_tool() {
    for (text, message) in [
        ("x.qcow2", "Cannot find device='x.qcow2' nor node-name='x.qcow2'"),
        ("filename=x", "Must specify either driver or file"),
        ("", "Must specify either driver or file"),
        ("driver=qcow2", "A block device must be specified for \"file\""),
        ("driver=foo,file.filename=x", "Unknown driver 'foo'"),
        ("driver=qcow2,file.driver=file", "The 'file' block driver requires a file name"),
        ("driver=qcow2,file.filename=x,file.foo=1", "Block protocol 'file' doesn't support the option 'foo'"),
        ("driver=qcow2,file.filename=x,file.locking=maybe", "invalid parameter value: maybe"),
        ("driver=qcow2,file.filename=x,read-only=maybe", "Parameter 'read-only' expects 'on' or 'off'"),
    ] {
        assert_eq!(opts_error(text), message, "{text}");
    }
}

#[test]
fn a_protocol_may_stand_for_a_format() {
    let node = opts("driver=file,filename=x");
    assert_eq!((node.protocol_only, node.driver), (Some("file"), Some(Format::Raw)));
}

proptest::proptest! {
    #[test]
    fn no_name_or_option_string_makes_the_parsers_panic(text in ".{0,80}", tail in "[-a-z.,=:'\"{}\\[\\]0-9]{0,60}") {
        for text in [text.clone(), format!("json:{tail}"), format!("driver=raw,{tail}"), tail.clone()] {
            let _ = Spec::from_filename(&text);
            let _ = Spec::from_image_opts(&text);
            let _ = crate::options::parse(&[text]);
        }
    }

    #[test]
    fn file_names_survive_being_shown_as_json(name in "[^\u{0}]{1,40}") {
        let node = Node {
            options: vec![("offset".into(), 512.into())],
            ..Node::of(Source::file(name.clone()))
        };
        let again = Spec::from_filename(&node.shown_name(Format::Raw)).unwrap();
        proptest::prop_assert_eq!(again.node.source, Source::file(name));
    }
}

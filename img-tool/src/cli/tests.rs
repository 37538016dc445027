//! Command lines that scripts for qemu-img contain, and mistakes.

use super::*;

fn parsed(line: &str) -> Command {
    let args = line.split_whitespace().map(OsString::from).collect();
    match parse(args, "vimg") {
        Ok(cli) => cli.command,
        Err(refused) => panic!("{line}: {refused:?}"),
    }
}

fn wrong(line: &str) -> (String, Option<String>) {
    let args = line.split_whitespace().map(OsString::from).collect();
    match parse(args, "vimg") {
        Err(Refused::Wrong { message, hint, .. }) => (message, hint),
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn negative_sizes_are_sizes() {
    for line in
        ["vimg resize disk -10G", "vimg resize -q disk --shrink -10G", "vimg resize disk -10G --shrink"]
    {
        match parsed(line) {
            Command::Resize(args) => {
                assert_eq!((args.filename.as_str(), args.size.as_str()), ("disk", "-10G"), "{line}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn short_options_bundle_and_the_last_of_two_counts() {
    match parsed("vimg create -qfqcow2 -f raw disk 1M") {
        Command::Create(args) => {
            assert!(args.quiet);
            assert_eq!(args.format, "raw");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn long_options_may_be_cut_short() {
    match parsed("vimg info --outp json --image-o driver=raw") {
        Command::Info(args) => {
            assert_eq!(args.output.as_deref(), Some("json"));
            assert!(args.source.image_opts);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn mistakes_are_answered_in_getopts_words() {
    assert_eq!(wrong("vimg info"), ("Expecting one image file name".into(), None));
    assert_eq!(wrong("vimg info a b").0, "Expecting one image file name");
    assert_eq!(wrong("vimg create x 1M 2M").0, "Unexpected argument: 2M");
    assert_eq!(wrong("vimg").0, "Not enough arguments");
    assert_eq!(wrong("vimg info a -f").0, "option requires an argument -- 'f'");
    assert_eq!(wrong("vimg info -z a").0, "invalid option -- 'z'");
}

#[test]
fn near_misses_are_guessed() {
    assert_eq!(
        wrong("vimg convrt a b"),
        ("Command not found: convrt".into(), Some("did you mean 'vimg convert'?".into()))
    );
    let (message, hint) = wrong("vimg info --fromat raw a");
    assert_eq!(message, "unrecognized option '--fromat'");
    assert_eq!(hint.as_deref(), Some("did you mean '--format'?"));
}

#[test]
fn secrets_are_read_once_and_not_shown() {
    let objects = ObjectArgs { object: vec!["secret,id=s0,data=hush".into()], ..ObjectArgs::default() };
    assert_eq!(&**objects.secrets().unwrap().get("s0").unwrap(), b"hush");
    objects.secrets().unwrap().get("s0").unwrap();
    assert!(!format!("{objects:?}").contains("hush"));
    ObjectArgs { object: vec!["foo".into()], ..ObjectArgs::default() }.secrets().unwrap_err();
}

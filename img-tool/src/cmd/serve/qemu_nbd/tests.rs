//! Command lines that scripts for qemu-nbd contain.

use super::*;

fn words(line: &str) -> Words {
    let app = App::new("qemu-nbd");
    let args: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
    let mut words = Words::default();
    let files =
        getopt::parse(&OPTIONS, &args, |(name, value)| words.take(name, value.unwrap_or_default(), &app));
    match files {
        Ok(files) => Words { files, ..words },
        Err(End::Mistake(Mistake(text)) | End::Text(text)) => panic!("{line}: {text}"),
        Err(End::Failure(failure)) => panic!("{line}: {failure:?}"),
    }
}

fn plan(line: &str) -> Plan {
    let words = words(line);
    words.check().unwrap();
    let [file] = &words.files[..] else { panic!("{line}: {:?}", words.files) };
    words.plan(file).unwrap()
}

fn failure(line: &str) -> String {
    let app = App::new("qemu-nbd");
    let args: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
    let mut words = Words::default();
    let read =
        getopt::parse(&OPTIONS, &args, |(name, value)| words.take(name, value.unwrap_or_default(), &app));
    let failure = match read {
        Err(End::Failure(failure)) => failure,
        Err(End::Mistake(Mistake(text)) | End::Text(text)) => return text,
        Ok(files) => {
            words.files = files;
            words.check().and_then(|()| words.plan("a").map(drop)).unwrap_err()
        }
    };
    match failure {
        Failure::Error { error, .. } => error.to_string(),
        other => format!("{other:?}"),
    }
}

#[test]
fn the_defaults_are_qemu_nbds() {
    let plan = plan("a.raw");
    assert!(matches!(&plan.place, Where::Tcp(at) if at[..] == [("0.0.0.0".to_owned(), 10809)]));
    assert!(plan.once && !plan.io.discard && !plan.served.multi_conn && !plan.served.read_only);
    assert_eq!((plan.max_clients, plan.handshake_timeout), (1, Some(Duration::from_secs(10))));
}

#[test]
fn options_end_up_in_the_plan() {
    let plan =
        plan("-tre0 a.raw -x n -Dd -o 0x10 -A -B b1 -B b2 -k /s --discard=unmap --handshake-limit=0 -s");
    assert!(!plan.once && plan.served.read_only && plan.served.overlay && plan.served.multi_conn);
    assert!(plan.served.allocation_depth && plan.io.discard);
    assert_eq!(plan.served.bitmaps, ["b1", "b2"]);
    assert_eq!((plan.max_clients, plan.handshake_timeout), (usize::MAX, None));
    assert_eq!(plan.images, [Image { export: "n".to_owned(), filename: "a.raw".to_owned() }]);
    assert_eq!((plan.window, &*plan.description), (Window::Part { offset: 16, len: None }, "d"));
}

#[test]
fn what_is_wrong_is_said_in_qemu_nbds_words() {
    for (line, words) in [
        ("-k s a", "socket path must be absolute"),
        ("-e x a", "Invalid shared device number 'x'"),
        ("-e -1 a", "Invalid shared device number '-1'"),
        ("--handshake-limit=-1 a", "Invalid handshake limit '-1'"),
        ("-n --cache=none a", "-n and --cache can only be specified once"),
        ("--cache=foo a", "Invalid cache mode `foo'"),
        ("--aio=foo a", "Invalid aio mode 'foo'"),
        ("--discard=foo a", "Invalid discard mode `foo'"),
        ("-o 2M a", "Invalid offset '2M'"),
        ("-o -1 a", "Value '-1' is out of range for parameter 'offset'"),
        ("-L a", "List mode is incompatible with a file name"),
        ("-L -x n", "List mode is incompatible with per-device settings"),
        ("-L --fork", "List mode is incompatible with forking"),
        ("--tls-creds=x a", "Failed to get TLS creds: No TLS credentials with id 'x'"),
        ("--tls-authz=x a", "--tls-authz is not permitted without --tls-creds"),
        ("--selinux-label=x a", "--selinux-label is not permitted without --socket"),
        (
            "--object tls-creds-psk,id=t,dir=/d,endpoint=client --tls-creds t a",
            "Failed to get TLS creds: Expected TLS credentials for a server endpoint",
        ),
        ("--image-opts -f raw a", "--image-opts and -f are mutually exclusive"),
    ] {
        assert_eq!(failure(line), words, "{line}");
    }
}

#[test]
fn credentials_of_objects() {
    let plan = plan("--object tls-creds-x509,id=t,dir=/d,endpoint=server,verify-peer=no --tls-creds t a");
    assert!(
        matches!(&plan.authentication, Authentication::X509 { dir, verify_peer: false } if dir.as_os_str() == "/d")
    );
}

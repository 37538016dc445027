//! Every message here was said by qemu-img 10.0.2.

use super::*;

fn parse(definitions: &[&str]) -> Result<Secrets> {
    Secrets::parse(&definitions.iter().map(|&text| text.to_owned()).collect::<Vec<_>>())
}

fn said(definitions: &[&str]) -> String {
    parse(definitions).unwrap_err().to_string()
}

fn bytes(definition: &str) -> Vec<u8> {
    parse(&[definition]).unwrap().get("s").unwrap().to_vec()
}

#[test]
fn secrets_are_given_in_many_ways() {
    assert_eq!(bytes("secret,id=s,data=pw"), b"pw");
    assert_eq!(bytes("qom-type=secret,id=s,data=a,,b"), b"a,b");
    assert_eq!(bytes(r#"{"qom-type": "secret", "id": "s", "data": "pw"}"#), b"pw");
    assert_eq!(bytes("secret,id=s,data=,iv=AAAA"), b"");
    assert_eq!(bytes("secret,id=s,format=base64,data=cGFzcw=="), b"pass");
    assert_eq!(bytes("secret,id=s,format=base64,data=cG\nFz\ncw==\n"), b"pass");
    assert_eq!(bytes("secret,id=s,format=base64,data=cGFzc"), b"pas");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    std::fs::write(&path, b"in a file\n").unwrap();
    assert_eq!(bytes(&format!("secret,id=s,file={}", path.display())), b"in a file\n");
}

#[test]
fn what_is_wrong_is_said_in_qemus_words() {
    for (definition, words) in [
        (r#"{"qom-type":"secret","id":"s","data":"pw","foo":1}"#, "Parameter 'foo' is unexpected"),
        (r#"{"id":"s","data":"pw"}"#, "Parameter 'qom-type' is missing"),
        ("secret,data=pw", "Parameter 'id' is missing"),
        ("secret,id=s", "Either 'file' or 'data' must be provided"),
        ("secret,id=s,data=pw,file=x", "'file' and 'data' are mutually exclusive"),
        ("secret,id=s,data=pw,format=foo", "Parameter 'format' does not accept value 'foo'"),
        ("secret,id=s,data=c*c=,format=base64", "Base64 data contains invalid characters"),
        ("secret,id=s,data=pw,keyid=k", "No secret with id 'k'"),
        ("secret,id=s,data=pw,foo=bar", "Parameter 'foo' is unexpected"),
        ("secret,id=s,data", "Expected '=' after parameter 'data'"),
        ("", "Parameter 'qom-type' is missing"),
        ("foo,id=s", "Parameter 'qom-type' does not accept value 'foo'"),
        ("iothread,id=s", "invalid object type: iothread"),
        (
            "secret,id=s,file=/nowhere",
            "Unable to read /nowhere: Failed to open file “/nowhere”: No such file or directory",
        ),
    ] {
        assert_eq!(said(&[definition]), words);
    }
    assert!(said(&["secret,id=1s,data=pw"]).starts_with("Parameter 'id' expects an identifier\n"));
    let twice = said(&["secret,id=s,data=pw", "secret,id=s,data=pw"]);
    assert_eq!(twice, "attempt to add duplicate property 's' to object (type 'container')");
}

/// AES-256 with a key and an IV of zeros; the ciphertexts were made with OpenSSL.
#[test]
fn secrets_are_encrypted_with_others() {
    let key = format!("secret,id=k,format=base64,data={}=", "A".repeat(43));
    let iv = format!("iv={}==", "A".repeat(22));
    let encrypted = |rest: &str| [key.clone(), format!("secret,id=s,keyid=k,{rest}")];
    let good = encrypted(&format!("{iv},format=base64,data=FsPAuJFTDI7kctmbzf+hJA=="));
    assert_eq!(Secrets::parse(&good).unwrap().get("s").unwrap().to_vec(), b"pw");
    let wrong = |rest: &str| Secrets::parse(&encrypted(rest)).unwrap_err().to_string();
    assert_eq!(
        wrong(&format!("{iv},format=base64,data=7iHtvN3hHloWXc+am4brkA==")),
        "Incorrect number of padding bytes (255) found on decrypted data"
    );
    assert_eq!(wrong("format=base64,iv=AAAA,data=AAAA"), "IV should be 16 bytes in length not 3");
    assert_eq!(wrong("data=AAAA"), "IV is required to decrypt secret");
    assert_eq!(wrong(&format!("{iv},data=AAAA")), "Length 4 must be a multiple of block size 16");
    assert_eq!(
        wrong(&format!("{iv},format=base64,data=AAAA")),
        "Length 3 must be a multiple of block size 16"
    );
    let short = said(&["secret,id=k,data=x", "secret,id=s,keyid=k,data=AAAA"]);
    assert_eq!(short, "Key should be 32 bytes in length");
}

#[test]
fn passphrases_are_text_and_required() {
    let secrets = parse(&["secret,id=s,data=pw", "secret,id=b,format=base64,data=//8="]).unwrap();
    assert_eq!(&**secrets.required("key-secret", Some("s")).unwrap(), b"pw");
    let said = |id: Option<&str>| secrets.required("key-secret", id).unwrap_err().to_string();
    assert_eq!(said(None), "Parameter 'key-secret' is required for cipher");
    assert_eq!(said(Some("x")), "No secret with id 'x'");
    assert_eq!(said(Some("b")), "Data from secret b is not valid UTF-8");
    assert!(!format!("{secrets:?}").contains("pw"));
}

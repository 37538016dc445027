//! Hives that we write, read by hivex, and the other way round.

use hive::{Hive, Value};
use tests::command::Cmd;
use tests::skip::tool;
use tests::{Dir, requires};

fn hive() -> Hive {
    let mut hive = Hive::empty();
    for index in 0..700 {
        hive.create(&format!("ControlSet001\\Services\\service {}", index * 37 % 700)).unwrap();
    }
    let key = hive.create("ControlSet001\\Services\\viostor").unwrap();
    for (name, value) in [
        ("Start", Value::number(0)),
        ("Group", Value::text("SCSI miniport")),
        ("ImagePath", Value::expand("system32\\drivers\\viostor.sys")),
        ("Owners", Value::list(["oem1.inf", "oem2.inf"])),
        ("Bytes", Value::binary([1, 2, 3, 4, 5])),
    ] {
        hive.set(key, name, &value).unwrap();
    }
    hive
}

#[test]
fn hivex_reads_what_we_write() {
    requires!(tool("hivexregedit"), tool("hivexml"));
    let dir = Dir::new();
    std::fs::write(dir.file("one"), hive().into_bytes()).unwrap();
    let text = Cmd::new("hivexregedit")
        .words("--export --unsafe-printable-strings one")
        .arg("\\ControlSet001\\Services\\viostor")
        .dir(dir.path())
        .ok()
        .stdout;
    let text = String::from_utf8_lossy(text.as_ref()).into_owned();
    for line in
        ["\"Start\"=dword:00000000", "\"Group\"=str(1):\"SCSI miniport\"", "\"Bytes\"=hex(3):01,02,03,04,05"]
    {
        assert!(text.contains(line), "{line} not in {text}");
    }
    let xml = Cmd::new("hivexml").words("one").dir(dir.path()).ok().stdout;
    let xml = String::from_utf8_lossy(xml.as_ref()).into_owned();
    assert_eq!(xml.matches("<node name=\"service ").count(), 700);
}

#[test]
fn we_read_and_change_what_hivex_writes() {
    requires!(tool("hivexregedit"), tool("hivexsh"));
    let dir = Dir::new();
    std::fs::write(dir.file("one"), hive().into_bytes()).unwrap();
    let edits = "Windows Registry Editor Version 5.00\n\n\
        [\\ControlSet001\\Services\\disk]\n\"Start\"=dword:00000003\n\"Name\"=str(1):\"green\"\n\n\
        [-\\ControlSet001\\Services\\service 5]\n";
    std::fs::write(dir.file("edits.reg"), edits).unwrap();
    Cmd::new("hivexregedit").words("--merge --encoding UTF-8 one edits.reg").dir(dir.path()).ok();
    let mut hive = Hive::parse(std::fs::read(dir.file("one")).unwrap()).unwrap();
    assert!(hive.is_clean());
    let disk = hive.find("controlset001\\services\\DISK").unwrap().unwrap();
    assert_eq!(hive.value(disk, "name").unwrap().unwrap().as_text().unwrap(), "green");
    assert!(hive.find("ControlSet001\\Services\\service 5").unwrap().is_none());
    // And back: what we change in it, hivex sees.
    hive.set(disk, "Start", &Value::number(0)).unwrap();
    hive.create("ControlSet001\\Services\\after").unwrap();
    std::fs::write(dir.file("two"), hive.into_bytes()).unwrap();
    let script = "cd \\ControlSet001\\Services\\disk\nlsval Start\ncd \\ControlSet001\\Services\\after\nls\n";
    std::fs::write(dir.file("script"), script).unwrap();
    let said = Cmd::new("hivexsh").words("-f script two").dir(dir.path()).ok().stdout;
    let said = String::from_utf8_lossy(said.as_ref()).into_owned();
    assert!(said.trim() == "0", "{said}");
}

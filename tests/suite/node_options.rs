//! Node options and names of protocols: understood, checked or refused as qemu-img does.

use tests::skip::qemu10;
use tests::{Dir, requires};

fn images() -> Dir {
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 1M");
    dir.sparse("a.raw", 1 << 20);
    dir.poke("a.raw", 5000, b"data");
    dir
}

#[test]
fn options_of_every_node() {
    requires!(qemu10());
    let dir = images();
    for words in [
        "driver=qcow2,node-name=foo,discard=unmap,detect-zeroes=unmap,file.filename=a.qcow2",
        "driver=qcow2,read-only=on,auto-read-only=on,cache.direct=on,cache.no-flush=on,file.filename=a.qcow2",
        "driver=qcow2,discard=ignore,detect-zeroes=on,file.discard=on,file.driver=file,file.filename=a.qcow2",
        "driver=qcow2,discard=foo,file.filename=a.qcow2",
        "driver=qcow2,detect-zeroes=foo,file.filename=a.qcow2",
        "driver=qcow2,detect-zeroes=unmap,file.filename=a.qcow2",
        "driver=qcow2,detect-zeroes=unmap,discard=ignore,file.filename=a.qcow2",
        "driver=qcow2,node-name=1foo,file.filename=a.qcow2",
        "driver=qcow2,node-name=a-name-that-is-much-longer-than-31-characters,file.filename=a.qcow2",
        "driver=qcow2,read-only=maybe,file.filename=a.qcow2",
        "driver=qcow2,auto-read-only=maybe,file.filename=a.qcow2",
        "driver=qcow2,cache.direct=maybe,file.filename=a.qcow2",
        "driver=qcow2,cache.foo=on,file.filename=a.qcow2",
        "driver=raw,offset=4096,size=4096,file.driver=file,file.filename=a.raw",
        "driver=raw,offset=4096,size=2M,file.filename=a.raw",
        "driver=raw,offset=2M,file.filename=a.raw",
    ] {
        dir.same(&format!("info --image-opts {words}"));
    }
    dir.same("info --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.qcow2");
    dir.same("convert --image-opts -O raw driver=raw,offset=4096,size=4096,file.filename=a.raw out.raw");
    assert_eq!(&dir.read("out.raw")[904..908], b"data");
    dir.same("info json:{'driver':'qcow2','discard':'unmap','detect-zeroes':'unmap','file':{'driver':'file','filename':'a.qcow2'}}");
}

#[test]
fn disks_of_nothing() {
    requires!(qemu10());
    let dir = images();
    for words in [
        "info --image-opts driver=null-co,size=1G",
        "info --output=json --image-opts driver=null-co,size=1G,read-zeroes=on",
        "info --image-opts driver=null-aio,size=1G,latency-ns=10",
        "info --image-opts driver=raw,file.driver=null-co,file.size=1M",
        "info --output=json --image-opts driver=raw,file.driver=null-co,file.size=1M",
        "info --image-opts driver=null-co",
        "info null-co://",
        "info -f raw null-aio://",
        "info null-co:foo",
        "info --image-opts driver=null-co,size=1M,foo=1",
        "compare --image-opts driver=null-co,size=8M,read-zeroes=on driver=null-aio,size=8M,read-zeroes=on",
        "convert --image-opts -O qcow2 driver=null-co,size=8M,read-zeroes=on out.qcow2",
    ] {
        dir.same(words);
    }
    dir.qemu_checks("out.qcow2");
    assert!(dir.qemu_reads("out.qcow2") == vec![0; 8 << 20]);
    // What is written goes nowhere, which is what they are for.
    dir.vimg_ok("convert -n --target-image-opts -f raw a.raw driver=null-co,size=1M");
    dir.vimg_ok("bench -c 100 -w --image-opts driver=null-co,size=1M");
    // qemu-img aborts.
    for words in ["driver=null-co,size=x", "driver=null-co,read-zeroes=maybe"] {
        dir.vimg(&format!("info --image-opts {words}")).expect_clean_failure();
    }
}

/// Names are judged before anything is connected to.
#[test]
fn names_of_network_disks() {
    requires!(qemu10());
    let dir = images();
    for name in [
        "nbd:",
        "nbd://",
        "nbd:localhost",
        "nbd:foo",
        "nbd+unix:///foo?sock=/x",
        "nbd://localhost:1?a=b",
        "nbd://localhost:99999",
        "nbd+foo://x",
    ] {
        dir.same(&format!("info {name}"));
    }
    for options in
        ["driver=nbd", "driver=nbd,port=1", "driver=nbd,host=localhost,path=/x", "driver=nbd,server.type=foo"]
    {
        dir.same(&format!("info --image-opts {options}"));
    }
    for words in [
        "info nbd:localhost:10809",
        "info nbd:localhost:10809:exportname=foo",
        "info nbd:unix:/nonexistent:exportname=x",
        "info nbd://localhost:1/foo",
        "info nbd+tcp://localhost",
        "info nbd://[::1]:1/foo",
        "info nbd+unix:///foo?socket=/nonexistent",
        "info --image-opts driver=nbd,host=localhost,port=1",
        "info --image-opts driver=nbd,server.type=unix,server.path=/nonexistent,export=e",
        "info --image-opts driver=nbd,server.type=inet,server.host=localhost,server.port=1",
        "info --image-opts driver=qcow2,file.driver=nbd,file.path=/nonexistent",
    ] {
        assert_eq!(dir.qemu(words).code, Some(1), "{words}");
        dir.vimg(words).expect_clean_failure().expect_stderr("nbd");
    }
}

/// What is a part of a running qemu, or would change an image that is only read, is refused with the reason.
#[test]
fn drivers_that_are_refused_say_why() {
    requires!(qemu10());
    let dir = images();
    let file = "file.driver=qcow2,file.file.filename=a.qcow2";
    dir.same(&format!("info --image-opts driver=throttle,{file}"));
    for driver in [
        "throttle,throttle-group=t",
        "compress",
        "preallocate",
        "copy-on-read",
        "snapshot-access",
        "blkdebug",
    ] {
        let group = "--object throttle-group,id=t,limits.iops-total=1000";
        let ran =
            dir.vimg(&format!("info {group} --image-opts driver={driver},{file}")).expect_clean_failure();
        assert!(ran.stderr.contains("is not in this version of vimg\nhint: "), "{}", ran.story());
    }
    dir.same(&format!("info --image-opts driver=nonsense,{file}"));
}

#[test]
fn objects_of_every_kind() {
    requires!(qemu10());
    let dir = images();
    for object in [
        "throttle-group,id=x",
        "throttle-group,id=x,limits.iops-total=100,limits.bps-read=1048576",
        "iothread,id=x",
        "foo,id=x",
        "throttle-group",
        "throttle-group,id=1x",
        "throttle-group,id=x,foo=1",
        "id=x",
        "secret,id=x,data=foo",
        "secret,id=x",
        "{\"qom-type\":\"iothread\",\"id\":\"x\"}",
    ] {
        dir.same(&format!("info --object {object} a.qcow2"));
    }
    dir.vimg("info --object tls-creds-x509,id=t,dir=/nonexistent,endpoint=client a.qcow2")
        .expect_clean_failure();
}

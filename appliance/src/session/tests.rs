//! Appliances that are not: an engine that answers by a script, honestly and otherwise.

use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};

use bootcheck::engine::Observer;
use guestedit::{Attributes, GuestFs as _};

use super::*;
use crate::wire::{Listing, Scanner, WireStat};

/// What comes back for a request: bytes on the line, after whatever is put into the mailbox.
type Script = fn(Request, u32) -> Reaction;

/// What an appliance does.
enum Reaction {
    /// Answers with this status and payload.
    Answer(u32, Vec<u8>),
    /// Rings with this bell, and puts nothing into the mailbox.
    Bell(Bell),
    /// Nothing.
    Silence,
    /// Ends.
    Die,
}

#[derive(Debug)]
struct Fake(Script);

impl Engine for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn build(&self, spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>> {
        let (typed, keyboard) = mpsc::channel();
        let mailbox = Arc::clone(&spec.disks.last().unwrap().device);
        assert_eq!(spec.disks.last().unwrap().serial, MAILBOX_SERIAL);
        Ok(Box::new(Machine { script: self.0, mailbox, observer, keyboard, remote: Arc::new(Remote(typed)) }))
    }
}

#[derive(Debug)]
struct Remote(Sender<Vec<u8>>);

impl Control for Remote {
    fn stop(&self) {
        drop(self.0.send(vec![]));
    }

    fn type_bytes(&self, bytes: &[u8]) {
        drop(self.0.send(bytes.to_vec()));
    }
}

struct Machine {
    script: Script,
    mailbox: Arc<dyn BlockDevice>,
    observer: Arc<dyn Observer>,
    keyboard: Receiver<Vec<u8>>,
    remote: Arc<Remote>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Machine")
    }
}

impl Runnable for Machine {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.remote) as _
    }

    fn run(self: Box<Self>) -> Result<Outcome> {
        let say = |bytes: &[u8]| self.observer.console(bytes, Instant::now());
        let ended = |ending| Outcome {
            ending,
            cpus: vec![],
            disks: vec![],
            startup: Duration::ZERO,
            screen: vec![],
            vars: None,
        };
        say(b"Linux version 0\r\n");
        say(&Bell { id: 0, status: 0, len: 0, crc: 0 }.encode());
        let mut scanner = Scanner::default();
        for typed in &self.keyboard {
            if typed.is_empty() {
                return Ok(ended(Ending::Stopped));
            }
            let mut bells = vec![];
            scanner.push(&typed, |bell| bells.push(bell), |_| panic!("the host makes noise"));
            for bell in bells {
                let mut payload = vec![0; bell.len as usize];
                self.mailbox.read_at(&mut payload, 0).unwrap();
                assert_eq!(wire::crc32(&payload), bell.crc);
                let request = Request::decode(&payload).unwrap();
                let is_last = request == Request::PowerOff;
                match (self.script)(request, bell.id) {
                    Reaction::Answer(status, payload) => {
                        self.mailbox.write_at(&payload, u64::from(WINDOW)).unwrap();
                        let (len, crc) = (u32::try_from(payload.len()).unwrap(), wire::crc32(&payload));
                        say(&Bell { id: bell.id, status, len, crc }.encode());
                    }
                    Reaction::Bell(bell) => say(&bell.encode()),
                    Reaction::Silence => {}
                    Reaction::Die => {
                        say(b"Kernel panic - not syncing: Attempted to kill init!\r\n");
                        return Ok(ended(Ending::Reset { how: "test" }));
                    }
                }
                if is_last {
                    return Ok(ended(Ending::PowerOff));
                }
            }
        }
        Ok(ended(Ending::Stopped))
    }
}

fn kernel() -> Kernel {
    Kernel { name: "none".to_owned(), image: Arc::from([]), modules: vec![], missing: vec![] }
}

fn start(script: Script) -> Result<Appliance> {
    let options = Options { answer_limit: Duration::from_secs(1), ..Options::default() };
    Appliance::start(vec![], &kernel(), &Fake(script), options)
}

fn hello() -> Reaction {
    let file_systems = vec!["xfs".to_owned()];
    let hello =
        Hello { version: VERSION, release: "0".to_owned(), disks: vec![], file_systems, notes: vec![] };
    Reaction::Answer(0, hello.encode())
}

/// A mounted file system of an appliance that answers `script` to what is done in it.
fn mounted(script: Script) -> (Appliance, Mounted) {
    let appliance = start(script).unwrap();
    let mounted = appliance.mount(&Mount::whole(0, Kind::Xfs)).unwrap();
    (appliance, mounted)
}

/// The answers up to a mounted file system.
fn polite(request: &Request) -> Option<Reaction> {
    match request {
        Request::Hello => Some(hello()),
        Request::Mount(_) => Some(Reaction::Answer(0, Number(3).encode())),
        Request::PowerOff | Request::Unmount { .. } => Some(Reaction::Answer(0, vec![])),
        _ => None,
    }
}

fn stat(size: u64) -> WireStat {
    WireStat { mode: 0o100_644, uid: 0, gid: 0, size, mtime: 0, links: 1, inode: 1 }
}

#[test]
fn an_honest_appliance_is_understood() {
    let (appliance, mut fs) = mounted(|request, _| {
        polite(&request).unwrap_or_else(|| match request {
            Request::Act { mount: 3, action: Action::Stat { .. }, .. } => {
                Reaction::Answer(1, Failure { errno: 2, message: "No such file".to_owned() }.encode())
            }
            _ => Reaction::Answer(1, Failure { errno: 28, message: "full\x1b[2J".to_owned() }.encode()),
        })
    });
    assert_eq!(fs.stat(Path::new("/x")).unwrap(), None);
    let error = fs.create(Path::new("/x"), b"1", &Attributes::mode(0o644)).unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::NoSpace, "/x: full[2J".to_owned()));
    appliance.shutdown().unwrap();
    // What is left of it is of no use.
    fs.sync().unwrap_err();
}

#[test]
fn what_the_kernel_does_not_know_is_said() {
    let appliance = start(|request, _| match request {
        Request::Mount(_) => {
            Reaction::Answer(1, Failure { errno: 19, message: "No such device".to_owned() }.encode())
        }
        request => polite(&request).unwrap(),
    });
    let error = appliance.unwrap().mount(&Mount::whole(0, Kind::Btrfs)).unwrap_err();
    assert!(error.to_string().contains("the kernel 0 does not know btrfs"), "{error}");
}

#[test]
fn a_dead_appliance_tells_its_last_words() {
    let error = start(|_, _| Reaction::Die).unwrap_err();
    assert!(error.to_string().contains("it has ended: its kernel has panicked"), "{error}");
    assert!(error.hints()[0].contains("Attempted to kill init"), "{error:?}");
}

#[test]
fn a_silent_appliance_is_given_up_for_good() {
    let (_appliance, mut fs) = mounted(|request, _| polite(&request).unwrap_or(Reaction::Silence));
    let error = fs.sync().unwrap_err();
    assert!(error.to_string().contains("it did not answer within 1 s"), "{error}");
    let begin = Instant::now();
    let again = fs.sync().unwrap_err();
    assert!(again.to_string().contains("of no use any more") && begin.elapsed() < Duration::from_secs(1));
}

#[test]
fn an_appliance_can_be_cancelled() {
    let cancel = Arc::new(AtomicBool::new(true));
    let options = Options { cancel, ..Options::default() };
    let error = Appliance::start(vec![], &kernel(), &Fake(|_, _| Reaction::Silence), options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[test]
fn answers_that_are_wrong_are_errors() {
    let liars: [Script; 5] = [
        // Not what was put into the mailbox.
        |_, id| Reaction::Bell(Bell { id, status: 0, len: 100, crc: 1 }),
        // No message.
        |_, _| Reaction::Answer(0, vec![9; 40]),
        // A failure that is none.
        |_, _| Reaction::Answer(1, vec![]),
        // Another request's answer.
        |_, id| Reaction::Bell(Bell { id: id + 1, status: 0, len: 0, crc: 0 }),
        // Another version.
        |_, _| {
            let hello = Hello {
                version: VERSION + 1,
                release: String::new(),
                disks: vec![],
                file_systems: vec![],
                notes: vec![],
            };
            Reaction::Answer(0, hello.encode())
        },
    ];
    for (number, liar) in liars.into_iter().enumerate() {
        start(liar).expect_err(&number.to_string());
    }
}

#[test]
fn files_that_change_their_size_and_names_that_are_paths_are_lies() {
    let (_appliance, mut fs) = mounted(|request, _| {
        polite(&request).unwrap_or_else(|| match request {
            Request::Act { action: Action::Stat { .. }, .. } => Reaction::Answer(0, stat(10).encode()),
            Request::Act { action: Action::Read { offset, .. }, .. } => {
                Reaction::Answer(0, vec![0; if offset == 0 { 8 } else { 8000 }])
            }
            _ => {
                let entries = vec![(b"../../etc/passwd".to_vec(), 0)];
                Reaction::Answer(0, Listing { entries, more: false }.encode())
            }
        })
    });
    let error = fs.read(Path::new("/x"), 100).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(fs.read(Path::new("/x"), 9).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(fs.list(Path::new("/")).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_directory_without_end_ends() {
    let (_appliance, mut fs) = mounted(|request, _| {
        polite(&request).unwrap_or_else(|| {
            let entries = vec![(vec![b'a'; 200], 0); 30_000];
            Reaction::Answer(0, Listing { entries, more: true }.encode())
        })
    });
    assert_eq!(fs.list(Path::new("/")).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn what_a_dropped_file_system_has_lost_is_told_in_the_end() {
    let (appliance, fs) = mounted(|request, _| match request {
        Request::Unmount { mount: 3 } => {
            Reaction::Answer(1, Failure { errno: 5, message: "Input/output error".to_owned() }.encode())
        }
        request => polite(&request).unwrap(),
    });
    drop(fs);
    let error = appliance.shutdown().unwrap_err();
    assert_eq!(error.to_string(), "the appliance: Input/output error");
}

#[test]
fn the_first_kernel_that_knows_the_file_system_is_run() {
    let bytes = {
        let mut bytes = vec![0; 1 << 20];
        bytes[..4].copy_from_slice(b"XFSB");
        bytes
    };
    let device = Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap();
    let disks = guestdisk::Disks::open(Arc::new(device)).unwrap();
    let engine = Arc::new(Fake(|request, _| polite(&request).unwrap()));
    let named = |name: &'static str, missing: &'static [&'static str]| {
        move |names: &[&str]| {
            assert_eq!(names, ["xfs"]);
            let missing = missing.iter().map(|name| (*name).to_owned()).collect();
            Ok(Kernel { name: name.to_owned(), missing, ..kernel() })
        }
    };
    let lazy = || crate::Lazy::new(&disks, &[0, 7], engine.clone(), Options::default());
    let mut none = lazy().or_kernel(|_| Err(Error::usage("no such file"))).or_kernel(named("old", &["xfs"]));
    let error = none.open(0).unwrap_err();
    assert_eq!(error.to_string(), "no kernel for an appliance: no such file; old does not know xfs");
    let mut some = lazy().or_kernel(named("old", &["xfs"])).or_kernel(named("new", &["nls_utf8"]));
    assert_eq!(some.open(7).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!some.is_running());
    drop((some.open(0).unwrap(), some.open(0).unwrap()));
    assert!(some.is_running());
    some.finish().unwrap();
}

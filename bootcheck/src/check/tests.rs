//! Checks with an engine that plays a script instead of running a guest.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::engine::{DiskActivity, Ending, Transport};

/// What the guest does next.
#[derive(Debug, Clone)]
enum Step {
    Print(&'static str),
    Wait(u64),
    /// Waits until a line has been typed, and prints it.
    Echo,
    End(Ending),
    /// The monitor fails.
    Fail,
    /// It does nothing more, and does not even stop.
    Hang,
}

#[derive(Debug)]
struct Script(Vec<Step>);

#[derive(Debug, Default)]
struct Remote {
    stopped: AtomicBool,
    typed: Mutex<Vec<u8>>,
}

impl Control for Remote {
    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
    }

    fn type_bytes(&self, bytes: &[u8]) {
        self.typed.lock().extend(bytes);
    }
}

struct Guest {
    steps: Vec<Step>,
    observer: Arc<dyn Observer>,
    remote: Arc<Remote>,
    started: Instant,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guest({:?})", self.steps)
    }
}

impl Engine for Script {
    fn name(&self) -> &'static str {
        "script"
    }

    fn build(&self, _spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>> {
        if self.0.is_empty() {
            return Err(Error::unsupported("no KVM").hint("get some"));
        }
        let (steps, remote) = (self.0.clone(), Arc::default());
        Ok(Box::new(Guest { steps, observer, remote, started: Instant::now() }))
    }
}

impl Runnable for Guest {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.remote) as _
    }

    fn run(self: Box<Self>) -> Result<Outcome> {
        let outcome = |ending| Outcome {
            ending,
            cpus: vec![],
            disks: vec![DiskActivity { reads: 1, read_bytes: 4096, ..DiskActivity::default() }],
            startup: self.started.elapsed(),
            screen: vec![],
            vars: None,
        };
        for step in &self.steps {
            if self.remote.stopped.load(Ordering::SeqCst) {
                return Ok(outcome(Ending::Stopped));
            }
            match step {
                Print(text) => self.observer.console(text.as_bytes(), Instant::now()),
                Echo => {
                    while !self.remote.typed.lock().ends_with(b"\r")
                        && !self.remote.stopped.load(Ordering::SeqCst)
                    {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    let typed = std::mem::take(&mut *self.remote.typed.lock());
                    self.observer.console(&typed, Instant::now());
                    self.observer.console(b"\n", Instant::now());
                }
                Wait(millis) => std::thread::sleep(Duration::from_millis(*millis)),
                End(ending) => return Ok(outcome(ending.clone())),
                Fail => return Err(Error::unsupported("the monitor broke")),
                Hang => std::thread::sleep(Duration::from_secs(3600)),
            }
        }
        while !self.remote.stopped.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(outcome(Ending::Stopped))
    }
}

fn kernel() -> Arc<[u8]> {
    let mut kernel = vec![0; 5 * 512];
    kernel[0x1f1] = 4;
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel.into()
}

fn a_check() -> Check {
    Check {
        image: "disk.raw".to_owned(),
        machine: MachineSpec {
            cpus: 1,
            memory_bytes: 64 << 20,
            disks: vec![],
            transport: Transport::Pci,
            boot: Boot::Linux { kernel: kernel(), initrd: None, cmdline: String::new() },
        },
        source: Some(Source {
            origin: Origin::Disk,
            entry: None,
            kernel: "/vmlinuz".to_owned(),
            initrd: vec![],
            cmdline: String::new(),
        }),
        firmware: None,
        expectations: Expectations::default(),
        passphrases: vec![],
        time_limit: Some(Duration::from_secs(20)),
        until_end: false,
    }
}

fn silent() -> Arc<dyn Listener> {
    Arc::new(Silent)
}

fn play(steps: &[Step]) -> Report {
    run(a_check(), &Script(steps.to_vec()), &silent())
}

#[track_caller]
fn expect_reason(report: &Report, expected: Reason) {
    match &report.verdict {
        Verdict::NotBooted { reason, .. } => assert_eq!(*reason, expected, "{report:?}"),
        other => panic!("{other:?}"),
    }
}

use Step::{Echo, End, Fail, Hang, Print, Wait};

#[test]
fn a_prompt_ends_the_check_at_once() {
    let report = play(&[Print("Linux version 6.1\r\n"), Wait(20), Print("vm login: ")]);
    assert_eq!(report.verdict, Verdict::Booted);
    assert!(report.elapsed < Duration::from_secs(5), "{report:?}");
    assert_eq!(report.outcome.unwrap().ending, Ending::Stopped);
    assert_eq!(report.watched.tail, ["Linux version 6.1", "vm login: "]);
}

const PROMPT: Step = Print("Begin: x ... Please unlock disk sda5_crypt: ");
const AGAIN: Step = Print("bad password\r\nPlease unlock disk sda5_crypt: ");

fn with_passphrases(passphrases: &[&str], steps: &[Step]) -> (Report, String) {
    let passphrases = passphrases.iter().map(|text| Secret::from(*text)).collect();
    let typist = Arc::new(Typist { silent: true, ..Typist::default() });
    let listener: Arc<dyn Listener> = Arc::clone(&typist) as _;
    let report = run(Check { passphrases, ..a_check() }, &Script(steps.to_vec()), &listener);
    let printed = String::from_utf8(typist.printed.lock().clone()).unwrap();
    (report, printed)
}

#[test]
fn an_encrypted_disk_without_its_passphrase_is_as_far_as_it_goes() {
    let report = play(&[PROMPT]);
    expect_reason(&report, Reason::Passphrase);
    assert!(report.to_text(true).contains("--key"), "{}", report.to_text(true));
}

#[test]
fn a_passphrase_is_typed_once_and_never_shown() {
    let (report, printed) = with_passphrases(&["hush"], &[PROMPT, Echo, Print("vm login: ")]);
    assert_eq!(report.verdict, Verdict::Booted);
    assert_eq!(report.watched.passphrases_typed, 1);
    assert!(printed.contains("sda5_crypt: ****\r\nvm login: "), "{printed}");
    assert!(!format!("{report:?}{}", report.to_text(true)).contains("hush"), "{report:?}");
    assert!(report.remarks[0].ends_with("typed once"), "{report:?}");
}

#[test]
fn passphrases_are_typed_one_after_the_other() {
    let steps = [PROMPT, Echo, AGAIN, Echo, Print("vm login: ")];
    let (report, printed) = with_passphrases(&["wrong", "right"], &steps);
    assert_eq!(report.verdict, Verdict::Booted);
    assert!(!printed.contains("wrong") && !printed.contains("right"), "{printed}");
    let (report, _) = with_passphrases(&["wrong"], &[PROMPT, Echo, AGAIN]);
    expect_reason(&report, Reason::Passphrase);
    assert!(report.to_text(true).contains("asks again"), "{}", report.to_text(true));
}

#[test]
fn a_failing_guest_may_finish_its_sentence() {
    let report = play(&[
        Print("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\n"),
        Wait(50),
        Print("CPU: 0 PID: 1\n"),
        End(Ending::Reset { how: "ACPI" }),
    ]);
    expect_reason(&report, Reason::RootNotFound);
    assert_eq!(report.watched.tail.last().unwrap(), "CPU: 0 PID: 1");
    assert_eq!(report.outcome.unwrap().ending, Ending::Reset { how: "ACPI" });
    // But only for a moment.
    let report = play(&[Print("(initramfs) "), Wait(50), Print("\n")]);
    expect_reason(&report, Reason::InitramfsShell);
    assert!(report.elapsed < Duration::from_secs(10));
}

#[test]
fn the_ending_counts_if_the_console_tells_nothing() {
    expect_reason(&play(&[Print("hello\n"), End(Ending::TripleFault)]), Reason::TripleFault);
    expect_reason(&play(&[End(Ending::PowerOff)]), Reason::PowerOff);
    // The prompt was the last thing before the end, and its line never ended.
    assert_eq!(play(&[Print("vm login: "), End(Ending::PowerOff)]).verdict, Verdict::Booted);
}

#[test]
fn time_is_limited() {
    let limited = |steps: &[Step]| {
        let check = Check { time_limit: Some(Duration::from_millis(150)), ..a_check() };
        run(check, &Script(steps.to_vec()), &silent())
    };
    expect_reason(&limited(&[Wait(1)]), Reason::NoOutput);
    let report = limited(&[Print("Linux version 6.1\n")]);
    expect_reason(&report, Reason::Timeout);
    assert!(report.headline().contains("after 0 s; the last station was: kernel"), "{}", report.headline());
}

#[test]
fn a_check_that_cannot_be_made_is_no_verdict() {
    for steps in [&[][..], &[Fail], &[Print("x"), End(Ending::EngineDied { reason: "killed".to_owned() })]] {
        let report = play(steps);
        assert_eq!(report.verdict.exit_code(), 2, "{report:?}");
    }
    let report = play(&[]);
    assert!(matches!(report.verdict, Verdict::NotChecked { hints, .. } if hints == ["get some"]));
}

#[test]
fn an_engine_that_hangs_is_left_behind() {
    let report = play(&[Print("vm login: "), Hang]);
    assert_eq!(report.verdict, Verdict::Booted, "the console has told enough");
    assert!(report.outcome.is_none());
}

struct Impatient;

impl Listener for Impatient {
    fn cancelled(&self) -> bool {
        true
    }
}

#[test]
fn the_user_may_give_up() {
    let listener: Arc<dyn Listener> = Arc::new(Impatient);
    let report = run(a_check(), &Script(vec![Print("x\n")]), &listener);
    assert!(matches!(report.verdict, Verdict::NotChecked { cancelled: true, .. }), "{report:?}");
}

#[derive(Default)]
struct Typist {
    printed: Mutex<Vec<u8>>,
    silent: bool,
    told: AtomicBool,
}

impl Listener for Typist {
    fn ready(&self, control: &Arc<dyn Control>) {
        if !self.silent {
            control.type_bytes(b"root\n");
        }
    }

    fn console(&self, bytes: &[u8]) {
        self.printed.lock().extend(bytes);
    }

    fn running(&self, _elapsed: Duration, station: Option<Milestone>, line: &str) {
        self.told.store(station == Some(Milestone::Login) && line == "vm login: ", Ordering::SeqCst);
    }
}

#[test]
fn a_person_at_the_console_sees_everything_until_the_end() {
    let typist = Arc::new(Typist::default());
    let listener: Arc<dyn Listener> = Arc::clone(&typist) as _;
    let check = Check { until_end: true, ..a_check() };
    let steps = vec![Print("vm login: "), Wait(500), Print("root\r\n# "), End(Ending::PowerOff)];
    let report = run(check, &Script(steps), &listener);
    assert_eq!(report.verdict, Verdict::Booted);
    assert_eq!(*typist.printed.lock(), b"vm login: root\r\n# ");
    assert!(typist.told.load(Ordering::SeqCst), "where the guest is was told meanwhile");
}

#[test]
fn a_cut_kernel_is_the_images_fault_only_if_it_comes_from_there() {
    let mut check = a_check();
    check.machine.boot =
        Boot::Linux { kernel: kernel()[..2000].into(), initrd: None, cmdline: String::new() };
    let report = run(check, &Script(vec![Hang]), &silent());
    expect_reason(&report, Reason::KernelDamaged);
    assert!(report.headline().contains("'/vmlinuz': the kernel is cut off"), "{}", report.headline());
    let mut check = a_check();
    check.machine.boot = Boot::Linux { kernel: (*b"nothing").into(), initrd: None, cmdline: String::new() };
    check.source.as_mut().unwrap().origin = Origin::Given;
    assert_eq!(run(check, &Script(vec![Hang]), &silent()).verdict.exit_code(), 2);
}

/// Writes into its variables and resets the machine, as shim's fallback does; comes up when it finds what it wrote.
#[derive(Debug)]
struct Fallback;

struct FallbackGuest {
    vars: Vec<u8>,
    observer: Arc<dyn Observer>,
    remote: Arc<Remote>,
}

impl std::fmt::Debug for FallbackGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FallbackGuest({:?})", self.vars)
    }
}

impl Engine for Fallback {
    fn name(&self) -> &'static str {
        "fallback"
    }

    fn build(&self, spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>> {
        let Boot::Firmware { vars: Some(vars), .. } = spec.boot else { panic!("{spec:?}") };
        Ok(Box::new(FallbackGuest { vars: vars.to_vec(), observer, remote: Arc::default() }))
    }
}

impl Runnable for FallbackGuest {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.remote) as _
    }

    fn run(self: Box<Self>) -> Result<Outcome> {
        let mut vars = self.vars.clone();
        self.observer.console(b"BdsDxe: starting Boot0001 \"UEFI Misc Device\" from Pci\r\n", Instant::now());
        let ending = if vars[0] < 2 {
            vars[0] += 1;
            Ending::Reset { how: "port 0xcf9" }
        } else {
            self.observer.console(b"vm login: ", Instant::now());
            while !self.remote.stopped.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ending::Stopped
        };
        Ok(Outcome {
            ending,
            cpus: vec![],
            disks: vec![],
            startup: Duration::ZERO,
            screen: vec![],
            vars: Some(vars),
        })
    }
}

fn through_uefi(vars: &[u8]) -> Check {
    let mut check = a_check();
    check.source = None;
    check.machine.boot = Boot::Firmware { code: [].into(), vars: Some(vars.into()) };
    check.firmware = Some(FirmwareUse {
        firmware: guestdisk::boot::firmware::Firmware::Uefi,
        code: "code.fd".to_owned(),
        vars: Some("vars.fd".to_owned()),
        reason: "asked for".to_owned(),
        both: false,
        facts: guestdisk::boot::firmware::Facts::default(),
        nvram: vec![],
        landmarks: vec![],
        stall_limit: Duration::from_secs(10),
        changes: vec![],
    });
    check
}

#[test]
fn a_loader_that_writes_its_entries_may_reset_the_machine() {
    let report = run(through_uefi(&[0]), &Fallback, &silent());
    assert_eq!(report.verdict, Verdict::Booted);
    assert_eq!(report.remarks.len(), 2, "{:?}", report.remarks);
    assert_eq!(report.outcome.unwrap().vars, Some(vec![2]));
    // Not for ever.
    let mut check = through_uefi(&[0]);
    check.machine.boot = Boot::Firmware { code: [].into(), vars: Some([0, 0].into()) };
    #[derive(Debug)]
    struct Endless;
    impl Engine for Endless {
        fn name(&self) -> &'static str {
            "endless"
        }

        fn build(&self, mut spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>> {
            spec.boot = Boot::Firmware { code: [].into(), vars: Some([0].into()) };
            Fallback.build(spec, observer)
        }
    }
    let report = run(check, &Endless, &silent());
    expect_reason(&report, Reason::BootLoader);
    assert!(report.headline().contains("the last level was: boot loader"), "{}", report.headline());
}

//! Long random stories of one image: writes, snapshots, resizes, rebases, commits, amendments, bitmaps and repairs in
//! any order, each step by vimg or by qemu-img as chance has it, since both understand the same words. After every
//! step both find the image clean, and the disk, every snapshot and every base hold what a `Vec<u8>` says.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tests::ops::{Model, any_op};
use tests::skip::qemu;
use tests::{Dir, Op, Ops, open_here, requires};

const NAME: &str = "a.qcow2";
/// Bases of different sizes and formats. The image starts on the first.
const BASES: [(&str, &str, u64); 2] = [("base0.raw", "raw", 300 << 10), ("base1.qcow2", "qcow2", 700 << 10)];
const LARGEST: u64 = 1 << 20;

/// One step. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Step {
    Io(Vec<Op>),
    Snapshot,
    Apply(usize),
    Delete(usize),
    Resize(u64),
    Rebase { base: usize, compress: bool },
    Commit { keep: bool },
    RefcountBits(u32),
    Lazy(bool),
    Compat(bool),
    AddBitmap { granularity: u32, disabled: bool },
    Bitmap { nth: usize, what: usize },
    Repair,
}

fn any_step(cluster: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => proptest::collection::vec(any_op(LARGEST, cluster, true), 1..12).prop_map(Step::Io),
        3 => Just(Step::Snapshot),
        2 => any::<usize>().prop_map(Step::Apply),
        2 => any::<usize>().prop_map(Step::Delete),
        2 => (512..=LARGEST / 512).prop_map(|sectors| Step::Resize(sectors * 512)),
        2 => (0..3usize, any::<bool>()).prop_map(|(base, compress)| Step::Rebase { base, compress }),
        2 => any::<bool>().prop_map(|keep| Step::Commit { keep }),
        1 => (3..=6u32).prop_map(|order| Step::RefcountBits(1 << order)),
        1 => any::<bool>().prop_map(Step::Lazy),
        1 => any::<bool>().prop_map(Step::Compat),
        2 => (9..=20u32, any::<bool>()).prop_map(|(bits, disabled)| Step::AddBitmap { granularity: 1 << bits, disabled }),
        2 => (any::<usize>(), 0..4usize).prop_map(|(nth, what)| Step::Bitmap { nth, what }),
        1 => Just(Step::Repair),
    ]
}

/// The image as it should be.
struct Story<'a> {
    dir: &'a Dir,
    disk: Model,
    snapshots: Vec<(String, Model)>,
    /// Contents of the bases.
    bases: [Vec<u8>; 2],
    /// Which of them is the backing file.
    base: Option<usize>,
    bitmaps: Vec<String>,
    version3: bool,
    extended: bool,
    named: u32,
    told: Vec<String>,
}

impl<'a> Story<'a> {
    fn new(dir: &'a Dir, options: &str, cluster: u64) -> Self {
        let mut bases = [vec![], vec![]];
        for (n, (name, format, size)) in BASES.iter().enumerate() {
            dir.qemu_ok(&format!("create -q -f {format} {name} {size}"));
            let ops = Ops::tour(*size, cluster.min(16 << 10), u8::try_from(n + 3).unwrap(), false, false);
            dir.qemu_io(format, name, &ops);
            let mut model = Model::new(*size);
            ops.model(&mut model);
            bases[n] = model.bytes().to_vec();
        }
        dir.qemu_ok(&format!(
            "create -q -f qcow2 -b {} -F raw -o {options} {NAME} {}",
            BASES[0].0,
            500 << 10
        ));
        let mut disk = bases[0].clone();
        disk.resize(500 << 10, 0);
        Self {
            dir,
            disk: Model::from_bytes(disk),
            snapshots: vec![],
            bases,
            base: Some(0),
            bitmaps: vec![],
            version3: !options.contains("compat=0.10"),
            extended: options.contains("extended_l2"),
            named: 0,
            told: vec![],
        }
    }

    /// Runs a command with one of the tools, which has to succeed.
    fn tool(&mut self, ours: bool, words: &str) -> Result<(), TestCaseError> {
        let ran = if ours { self.dir.vimg(words) } else { self.dir.qemu(words) };
        self.told.push(ran.shown.clone());
        prop_assert!(ran.code == Some(0), "{}after\n  {}", ran.story(), self.told.join("\n  "));
        Ok(())
    }

    fn fresh_name(&mut self, kind: &str) -> String {
        self.named += 1;
        format!("{kind}{}", self.named)
    }

    /// Snapshots show whatever the backing file is now, so they go before it changes.
    fn without_snapshots(&mut self, ours: bool) -> Result<(), TestCaseError> {
        while let Some((name, _)) = self.snapshots.pop() {
            self.tool(ours, &format!("snapshot -d {name} {NAME}"))?;
        }
        Ok(())
    }

    fn without_bitmaps(&mut self, ours: bool) -> Result<(), TestCaseError> {
        while let Some(name) = self.bitmaps.pop() {
            self.tool(ours, &format!("bitmap --remove {NAME} {name}"))?;
        }
        Ok(())
    }

    fn io(&mut self, ours: bool, ops: &[Op]) -> Result<(), TestCaseError> {
        let size = self.disk.bytes().len() as u64;
        let inside = |op: &&Op| op.range().0 + op.range().1 <= size;
        let ops = Ops(ops.iter().filter(inside).copied().collect());
        self.told.push(format!("{} {ops:?}", if ours { "vimg" } else { "qemu-io" }));
        let ops = if ours { ops } else { ops.uncompressed() };
        if ours {
            let _open = open_here();
            let layer = super::random_ops::open(self.dir, NAME);
            let disk = layer.device();
            let done = ops.device(&*disk).and_then(|()| disk.close());
            done.map_err(|error| {
                TestCaseError::fail(format!("{error}\nafter\n  {}", self.told.join("\n  ")))
            })?;
        } else {
            self.dir.qemu_io("qcow2", NAME, &ops);
        }
        ops.model(&mut self.disk);
        Ok(())
    }

    fn step(&mut self, ours: bool, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Io(ops) => self.io(ours, ops),
            Step::Snapshot if self.snapshots.len() < 4 => {
                let name = self.fresh_name("snap");
                self.snapshots.push((name.clone(), self.disk.clone()));
                self.tool(ours, &format!("snapshot -c {name} {NAME}"))
            }
            Step::Apply(n) if !self.snapshots.is_empty() => {
                let (name, disk) = self.snapshots[n % self.snapshots.len()].clone();
                // "Device has active dirty bitmaps", says qemu-img otherwise.
                self.without_bitmaps(ours)?;
                self.disk = disk;
                self.tool(ours, &format!("snapshot -a {name} {NAME}"))
            }
            Step::Delete(n) if !self.snapshots.is_empty() => {
                let (name, _) = self.snapshots.remove(n % self.snapshots.len());
                self.tool(ours, &format!("snapshot -d {name} {NAME}"))
            }
            Step::Resize(size) if self.version3 || self.snapshots.is_empty() => {
                // qemu-img does not grow a version 2 image over a longer base.
                let ours = ours || !self.version3;
                self.disk.resize(*size);
                self.tool(ours, &format!("resize -q --shrink -f qcow2 {NAME} {size}"))
            }
            Step::Rebase { base, compress } => self.rebase(ours, *base, *compress),
            Step::Commit { keep } if self.base.is_some() => self.commit(ours, *keep),
            Step::RefcountBits(bits) if self.version3 => {
                self.tool(ours, &format!("amend -f qcow2 -o refcount_bits={bits} {NAME}"))
            }
            Step::Lazy(on) if self.version3 => {
                let on = if *on { "on" } else { "off" };
                self.tool(ours, &format!("amend -f qcow2 -o lazy_refcounts={on} {NAME}"))
            }
            Step::Compat(v3) if !self.extended && *v3 != self.version3 => {
                if !v3 {
                    self.without_bitmaps(ours)?;
                    self.without_snapshots(ours)?;
                    self.tool(ours, &format!("amend -f qcow2 -o refcount_bits=16 {NAME}"))?;
                }
                self.version3 = *v3;
                let compat = if *v3 { "1.1" } else { "0.10" };
                self.tool(ours, &format!("amend -f qcow2 -o compat={compat} {NAME}"))
            }
            Step::AddBitmap { granularity, disabled } if self.version3 && self.bitmaps.len() < 3 => {
                let name = self.fresh_name("bitmap");
                self.bitmaps.push(name.clone());
                let disabled = if *disabled { "--disable " } else { "" };
                self.tool(ours, &format!("bitmap --add -g {granularity} {disabled}{NAME} {name}"))
            }
            Step::Bitmap { nth, what } if !self.bitmaps.is_empty() => {
                let nth = nth % self.bitmaps.len();
                let option = ["--remove", "--clear", "--enable", "--disable"][*what];
                let name = if *what == 0 { self.bitmaps.remove(nth) } else { self.bitmaps[nth].clone() };
                self.tool(ours, &format!("bitmap {option} {NAME} {name}"))
            }
            Step::Repair => {
                // qemu-img 10.0.2 loses all snapshots when it repairs an image that has both kinds.
                let ours = ours || !(self.bitmaps.is_empty() || self.snapshots.is_empty());
                self.tool(ours, &format!("check -q -r all -f qcow2 {NAME}"))
            }
            _ => Ok(()),
        }
    }

    fn rebase(&mut self, ours: bool, base: usize, compress: bool) -> Result<(), TestCaseError> {
        self.without_snapshots(ours)?;
        // qemu-img 10.0.2 dies of an assertion where subclusters are to be compressed.
        let ours = ours || (compress && self.extended);
        self.base = (base < 2).then_some(base);
        let compress = if compress { "-c " } else { "" };
        match self.base {
            None => self.tool(ours, &format!("rebase {compress}-f qcow2 --backing= {NAME}")),
            Some(n) => {
                let (file, format, _) = BASES[n];
                self.tool(ours, &format!("rebase {compress}-f qcow2 -b {file} -F {format} {NAME}"))
            }
        }
    }

    fn commit(&mut self, ours: bool, keep: bool) -> Result<(), TestCaseError> {
        let Some(base) = self.base else { return Ok(()) };
        self.without_snapshots(ours)?;
        let content = &mut self.bases[base];
        if content.len() < self.disk.bytes().len() {
            content.resize(self.disk.bytes().len(), 0);
        }
        content[..self.disk.bytes().len()].copy_from_slice(self.disk.bytes());
        let keep = if keep { "-d " } else { "" };
        self.tool(ours, &format!("commit -q {keep}-f qcow2 {NAME}"))
    }

    /// What both tools say to the image now.
    fn judge(&mut self) -> Result<(), TestCaseError> {
        let told = self.told.join("\n  ");
        for verdict in [
            self.dir.qemu(&format!("check -f qcow2 {NAME}")),
            self.dir.vimg(&format!("check -f qcow2 {NAME}")),
        ] {
            prop_assert!(verdict.code == Some(0), "{}after\n  {told}", verdict.story());
        }
        let wrong = |who: &str| {
            let told = told.clone();
            let who = who.to_owned();
            move |text: String| TestCaseError::fail(format!("{who}: {text}\nafter\n  {told}"))
        };
        self.disk.agree(&self.dir.qemu_reads(NAME)).map_err(wrong("qemu reads"))?;
        self.disk.agree(&self.dir.vimg_reads(NAME)).map_err(wrong("vimg reads"))?;
        for (n, (name, disk)) in self.snapshots.iter_mut().enumerate() {
            let words = format!("convert -l snapshot.name={name} -O raw {NAME} snap.raw");
            let theirs = n % 2 == 0;
            if theirs {
                self.dir.qemu_ok(&words)
            } else {
                self.dir.vimg_ok(&words)
            };
            let mut read = self.dir.read("snap.raw");
            if theirs {
                // qemu-img gives as many bytes as the disk has now.
                read.truncate(disk.bytes().len());
                read.extend_from_slice(&disk.bytes()[read.len()..]);
            }
            disk.agree(&read).map_err(wrong(name))?;
        }
        if let Some(base) = self.base {
            let read = self.dir.vimg_reads(BASES[base].0);
            prop_assert!(read == self.bases[base], "{} holds something else\nafter\n  {told}", BASES[base].0);
        }
        Ok(())
    }
}

fn tell(options: &str, cluster: u64, steps: &[(bool, Step)]) -> Result<(), TestCaseError> {
    let dir = Dir::new();
    let mut story = Story::new(&dir, options, cluster);
    for (ours, step) in steps {
        story.step(*ours, step)?;
        story.judge()?;
    }
    Ok(())
}

fn try_stories(options: &str, cluster: u64) {
    requires!(qemu());
    let config = Config {
        cases: super::random_ops::cases(4),
        max_shrink_iters: 60,
        failure_persistence: None,
        ..Config::default()
    };
    let steps = proptest::collection::vec((any::<bool>(), any_step(cluster)), 4..14);
    TestRunner::new(config)
        .run(&steps, |steps| tell(options, cluster, &steps))
        .unwrap_or_else(|error| panic!("{options}: {error}"));
}

#[test]
fn stories_of_a_usual_image() {
    try_stories("cluster_size=64k", 64 << 10);
}

#[test]
fn stories_of_small_clusters() {
    try_stories("cluster_size=1k,refcount_bits=8", 1 << 10);
}

#[test]
fn stories_of_subclusters() {
    try_stories("cluster_size=16k,extended_l2=on,compression_type=zstd", 16 << 10);
}

#[test]
fn stories_of_version_2() {
    try_stories("cluster_size=4k,compat=0.10", 4 << 10);
}

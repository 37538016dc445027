//! docs/qemu-img.md against the tools: no option is forgotten, and none is claimed without a test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use tests::skip::qemu10;
use tests::{Dir, requires};

/// One row of a table.
#[derive(Debug)]
struct Row {
    /// Every spelling in the first cell: `-f`, `--format`, `if=`.
    spellings: BTreeSet<String>,
    /// What vimg does.
    vimg: String,
    /// The tests, as `file::function`.
    tests: Vec<String>,
}

impl Row {
    fn is_later(&self) -> bool {
        self.vimg.starts_with("not yet")
    }

    fn is_refused(&self) -> bool {
        self.vimg.starts_with("refused: ")
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The rows of each section of the document.
fn table() -> BTreeMap<String, Vec<Row>> {
    let text = fs::read_to_string(repository().join("docs/qemu-img.md")).unwrap();
    let mut sections: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    let mut section = String::new();
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            heading.clone_into(&mut section);
        } else if line.starts_with("| `") {
            sections.entry(section.clone()).or_default().push(row(line));
        }
    }
    sections
}

fn row(line: &str) -> Row {
    let masked = line.replace("\\|", "\u{0}");
    let cells: Vec<String> =
        masked.trim_matches('|').split('|').map(|cell| cell.trim().replace('\0', "|")).collect();
    let [options, vimg, tests] = &cells[..] else { panic!("a row has three cells: {line}") };
    let spellings = options.split('`').skip(1).step_by(2).filter_map(|code| {
        let word = code.split_whitespace().next()?;
        Some(word.find('=').map_or(word, |at| &word[..=at]).to_owned())
    });
    let tests = tests.split([',', ' ', '`']).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    Row { spellings: spellings.collect(), vimg: vimg.clone(), tests }
}

/// Every option that a help text mentions, and (as `word=`) every operand in the manner of dd.
fn options_in(help: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let mut found = BTreeSet::new();
    for line in help.lines() {
        let mut before = ' ';
        let mut rest = line;
        while let Some(c) = rest.chars().next() {
            let len = rest.find(|c| !word(c)).unwrap_or(rest.len()).max(c.len_utf8());
            let (token, tail) = rest.split_at(len);
            let name = token.trim_start_matches('-');
            let dashes = token.len() - name.len();
            let plausible =
                name.starts_with(|c: char| c.is_ascii_alphabetic()) && (dashes == 2 || name.len() == 1);
            if (1..=2).contains(&dashes) && plausible && !word(before) {
                found.insert(token.to_owned());
            }
            if dashes == 0
                && tail.starts_with('=')
                && token.chars().all(|c| c.is_ascii_lowercase())
                && before != '-'
            {
                found.insert(format!("{token}="));
            }
            before = token.chars().last().unwrap_or(' ');
            rest = tail;
        }
    }
    found
}

fn commands_in(help: &str) -> Vec<String> {
    let lines = help.lines().filter_map(|line| line.strip_prefix("  ")?.split_once(" - "));
    lines.map(|(name, _)| name.trim().to_owned()).collect()
}

#[test]
fn every_option_of_qemu_img_is_in_the_table() {
    requires!(qemu10());
    let (dir, table) = (Dir::new(), table());
    let commands = commands_in(&dir.qemu("--help").stdout);
    assert!(commands.len() >= 15, "{commands:?}");
    let mut missing = vec![];
    for command in &commands {
        let rows = table.get(command).unwrap_or_else(|| panic!("no section '{command}' in docs/qemu-img.md"));
        let known: BTreeSet<&String> = rows.iter().flat_map(|row| &row.spellings).collect();
        for option in options_in(&dir.qemu(&format!("{command} --help")).stdout) {
            // getopt takes abbreviations, and upstream's help has some.
            let abbreviated = option.starts_with("--") && known.iter().any(|name| name.starts_with(&option));
            if !known.contains(&option) && !abbreviated {
                missing.push(format!("{command} {option}"));
            }
        }
    }
    assert!(missing.is_empty(), "qemu-img has these and docs/qemu-img.md does not: {missing:#?}");
}

#[test]
fn every_row_names_a_test_that_exists_or_a_reason() {
    let suite = repository().join("tests/suite");
    let mut wrong = vec![];
    for (section, rows) in table() {
        for row in rows {
            let shown = format!("{section} {:?}", row.spellings);
            if row.tests.is_empty() && !row.is_later() && !row.is_refused() {
                wrong.push(format!("{shown}: neither a test nor a reason"));
            }
            for test in &row.tests {
                let found = test.split_once("::").is_some_and(|(file, function)| {
                    let text = fs::read_to_string(suite.join(file).with_extension("rs")).unwrap_or_default();
                    text.contains(&format!("fn {function}("))
                });
                if !found {
                    wrong.push(format!("{shown}: no test {test}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_the_table_promises_is_in_the_help() {
    requires!(qemu10());
    let dir = Dir::new();
    let real = commands_in(&dir.qemu("--help").stdout);
    let mut missing = vec![];
    for (section, rows) in table() {
        if !real.contains(&section) || rows.iter().all(|row| row.is_later()) {
            continue;
        }
        let help = options_in(&dir.vimg_ok(&format!("{section} --help")).stdout);
        for row in rows.iter().filter(|row| !row.is_later() && !row.is_refused()) {
            let options = row.spellings.iter().filter(|name| name.starts_with('-') || name.ends_with('='));
            missing
                .extend(options.filter(|name| !help.contains(*name)).map(|name| format!("{section} {name}")));
        }
    }
    assert!(missing.is_empty(), "docs/qemu-img.md has these and vimg's help does not: {missing:#?}");
}

/// Every long form of qemu-img 10.0.2 works, and means what the short one means.
#[test]
fn long_and_short_forms_mean_the_same() {
    requires!(qemu10());
    let fresh = || {
        let dir = Dir::new();
        dir.qemu_ok("create -f qcow2 a.qcow2 1M");
        dir.qemu_ok("create -f qcow2 b.qcow2 1M");
        dir.qemu_ok("create -f qcow2 -b a.qcow2 -F qcow2 top.qcow2");
        dir.sparse("there.raw", 1 << 20);
        dir
    };
    let top = "driver=qcow2,file.filename=top.qcow2";
    let opts = "driver=qcow2,file.filename=a.qcow2";
    for words in [
        "check -q -f qcow2 a.qcow2",
        "check --quiet --format=qcow2 --cache=none --force-share --output=json a.qcow2",
        "check -T directsync -U a.qcow2",
        &format!("check --image-opts {opts}"),
        "compare -q --a-format=qcow2 --b-format=qcow2 --strict --cache=none --force-share a.qcow2 b.qcow2",
        "compare --quiet a.qcow2 b.qcow2",
        &format!("compare --image-opts {opts} driver=qcow2,file.filename=b.qcow2"),
        "create --quiet --format=qcow2 --options=cluster_size=4k c.qcow2 1M",
        "create -q --format=qcow2 --backing=a.qcow2 --backing-format=qcow2 --backing-unsafe d.qcow2 1M",
        "info --format=qcow2 --force-share --backing-chain --output=human a.qcow2",
        "map --format=qcow2 --force-share --start-offset=64k --max-length=64k --output=json a.qcow2",
        "measure --format=qcow2 --target-format=raw --force-share --output=json a.qcow2",
        "measure --size=1G --target-format=qcow2 --output=human",
        "measure -f qcow2 -U -O raw a.qcow2",
        &format!("measure -O qcow2 --image-opts {opts}"),
        "resize --quiet --format=qcow2 --preallocation=metadata a.qcow2 2M",
        "resize -q --shrink a.qcow2 1M",
        &format!("resize --image-opts {opts} 3M"),
        "convert --quiet --source-format=qcow2 --output-format=qcow2 --options=cluster_size=4k a.qcow2 out",
        "convert -q --source-cache=none --parallel=2 --oob-writes --sparse-size=8k --rate=1G a.qcow2 out",
        &format!(
            "convert --source-image-opts -n --target-is-zero --target-image-opts {opts} \
         driver=raw,file.filename=there.raw"
        ),
        "convert --salvage --copy-range-offloading a.qcow2 out",
        "convert --salvage --force-share a.qcow2 out",
        "convert --backing=b.qcow2 --backing-format=qcow2 -O qcow2 a.qcow2 out",
        "commit --quiet --format=qcow2 --cache=none --rate=1G top.qcow2",
        "commit -q --drop --base=a.qcow2 top.qcow2",
        "commit -q --progress top.qcow2",
        &format!("commit --image-opts {top}"),
        "rebase --quiet --format=qcow2 --cache=none --backing-cache=none --backing=b.qcow2 --backing-format=qcow2 top.qcow2",
        "rebase --force-share -q --compress -b b.qcow2 -F qcow2 top.qcow2",
        "rebase -q --progress -b b.qcow2 -F qcow2 top.qcow2",
        "rebase --backing-unsafe -b b.qcow2 -F qcow2 top.qcow2",
        &format!("rebase -b b.qcow2 -F qcow2 --image-opts {top}"),
        "snapshot --quiet -f qcow2 -c s1 a.qcow2",
        "snapshot --list --force-share a.qcow2",
        "amend --quiet --format=qcow2 --cache=none -o lazy_refcounts=on a.qcow2",
        "amend --force -q --progress -o lazy_refcounts=on a.qcow2",
        "bitmap --add --granularity=64k a.qcow2 b0",
    ] {
        let (theirs, ours) = (fresh().qemu(words), fresh().linked(words).expect_no_panic());
        let same = (theirs.code, &theirs.stdout, &theirs.stderr) == (ours.code, &ours.stdout, &ours.stderr);
        assert!(same, "--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
        let refused = words.contains("--salvage --copy");
        assert_eq!(theirs.code, Some(refused.into()), "{}", theirs.story());
    }
    let dir = fresh();
    // Not in qemu-img, so that only the outcome can be looked at.
    dir.vimg_ok("compare --threads 3 a.qcow2 a.qcow2").expect_stdout("Images are identical.");
    // qemu-img's help has these, qemu-img itself does not: no harm in meaning what it says.
    dir.vimg_ok("convert --target-format=raw --target-cache=none -f qcow2 a.qcow2 out");
    dir.vimg_ok("convert --no-create --target-format=raw -f qcow2 a.qcow2 there.raw");
    dir.vimg_ok("convert --target-format=qcow2 --target-options=cluster_size=4k --compress a.qcow2 out");
}

#[test]
fn every_command_takes_objects() {
    requires!(qemu10());
    for words in [
        "check OBJECT a.qcow2",
        "commit OBJECT top.qcow2",
        "compare OBJECT a.qcow2 a.qcow2",
        "convert OBJECT a.qcow2 out",
        "create OBJECT -f qcow2 new.qcow2 1M",
        "dd OBJECT if=a.qcow2 of=out",
        "info OBJECT a.qcow2",
        "map OBJECT a.qcow2",
        "measure OBJECT -O qcow2 a.qcow2",
        "rebase OBJECT -u -b a.qcow2 -F qcow2 top.qcow2",
        "resize OBJECT a.qcow2 2M",
        "snapshot OBJECT -c x a.qcow2",
        "amend OBJECT -o lazy_refcounts=on a.qcow2",
        "bitmap OBJECT --add a.qcow2 b0",
    ] {
        let fresh = || {
            let dir = Dir::new();
            dir.qemu_ok("create -f qcow2 a.qcow2 1M");
            dir.qemu_ok("create -f qcow2 -b a.qcow2 -F qcow2 top.qcow2");
            dir
        };
        for (object, good) in [("--object secret,id=s,data=abc", true), ("--object nonsense,id=s", false)] {
            let words = words.replace("OBJECT", object);
            let (theirs, ours) = (fresh().qemu(&words), fresh().linked(&words).expect_no_panic());
            let same =
                (theirs.code, &theirs.stdout, &theirs.stderr) == (ours.code, &ours.stdout, &ours.stderr);
            assert!(same, "--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
            assert_eq!(theirs.code == Some(0), good, "{}", theirs.story());
        }
    }
}

#[test]
fn global_options_are_accepted() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 1M");
    for words in ["--trace enable=nothing info a.qcow2", "-T enable=nothing info a.qcow2"] {
        assert_eq!(dir.qemu(words).code, dir.linked(words).expect_no_panic().code, "{words}");
    }
}

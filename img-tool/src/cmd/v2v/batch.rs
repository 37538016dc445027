//! `--batch plan.yaml`: many machines, each in a process of its own, so many at once.
//!
//! ```yaml
//! jobs: 2
//! defaults:              # options of `vimg v2v`, for all
//!   output-dir: /srv/kvm
//!   bootcheck: true
//! guests:
//!   - source: /vmfs/web/web.vmx
//!   - source: [root.vhdx, data.vhdx]
//!     name: db
//!     network: [VM Network:default, backup:br1]
//! ```

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use block::{Error, Result, ResultExt as _};
use image::json;
use serde_json::{Value, json};
use yaml_rust2::{Yaml, YamlLoader};

use crate::app::App;
use crate::exit::{Exit, Outcome};

/// A plan is not larger than this.
const MOST_BYTES: u64 = 16 << 20;
/// How often the processes are looked at.
const ASK: Duration = Duration::from_millis(50);

/// One machine: the words after `vimg v2v`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Task {
    /// For messages.
    source: String,
    words: Vec<String>,
}

/// What became of a machine.
#[derive(Debug, Clone)]
struct Done {
    source: String,
    exit: u8,
    seconds: f64,
    document: Value,
    complaints: String,
}

/// Runs a plan.
pub(super) fn run(
    path: &Path,
    jobs: Option<u16>,
    passed_on: &[String],
    signal: &AtomicUsize,
    app: &App,
) -> Outcome {
    let (tasks, own_jobs) = read(path, passed_on)?;
    let jobs = jobs.map_or(own_jobs, usize::from).clamp(1, 256);
    let done = work(&tasks, jobs, signal, app);
    let document = summary(&done);
    app.print(&format!("{}\n", json::pretty(&document)))?;
    if signal.load(Ordering::Relaxed) != 0 {
        let signal = u8::try_from(signal.load(Ordering::Relaxed)).unwrap_or(0);
        return Ok(Exit(128_u8.saturating_add(signal)));
    }
    Ok(Exit(worst(&done)))
}

/// The exit code of all: a failure before a guest that does not boot, that before one that is known not to start, that
/// before one of which nothing is known.
fn worst(done: &[Done]) -> u8 {
    let has = |code: u8| done.iter().any(|done| done.exit == code);
    let other = done.iter().map(|done| done.exit).find(|code| !matches!(code, 0 | 3 | 4 | 5));
    other.or_else(|| [3, 5, 4].into_iter().find(|code| has(*code))).unwrap_or(0)
}

fn summary(done: &[Done]) -> Value {
    let count = |code: u8| done.iter().filter(|done| done.exit == code).count();
    json!({
        "converted": count(0),
        "not-booted": count(3),
        "not-checked": count(4),
        "stopped": count(5),
        "failed": done.len() - count(0) - count(3) - count(4) - count(5),
        "guests": done.iter().map(|done| json!({
            "source": done.source,
            "exit": done.exit,
            "seconds": done.seconds,
            "complaints": done.complaints,
            "report": done.document,
        })).collect::<Vec<_>>(),
    })
}

/// The tasks of a plan and how many are to run at once.
fn read(path: &Path, passed_on: &[String]) -> Result<(Vec<Task>, usize)> {
    let about = || format!("'{}'", path.display());
    let len = std::fs::metadata(path).context(about)?.len();
    if len > MOST_BYTES {
        return Err(Error::unsupported("the plan is larger than 16 MiB").context(about()));
    }
    let text = std::fs::read_to_string(path).context(about)?;
    parse(&text, passed_on).context(about)
}

fn parse(text: &str, passed_on: &[String]) -> Result<(Vec<Task>, usize)> {
    let documents =
        YamlLoader::load_from_str(text).map_err(|error| Error::invalid(format!("not YAML: {error}")))?;
    let [plan] = &documents[..] else { return Err(Error::invalid("the plan has to be one YAML document")) };
    let keys = plan.as_hash().ok_or_else(|| Error::invalid("the plan has to be a mapping with 'guests'"))?;
    for key in keys.keys() {
        if !matches!(key.as_str(), Some("jobs" | "defaults" | "guests")) {
            return Err(Error::invalid(format!("'{}' is not known", shown(key)))
                .hint("a plan has 'jobs', 'defaults' and 'guests'"));
        }
    }
    let jobs = match &plan["jobs"] {
        Yaml::BadValue => 1,
        value => value
            .as_i64()
            .and_then(|jobs| usize::try_from(jobs).ok())
            .filter(|jobs| *jobs > 0)
            .ok_or_else(|| Error::invalid("'jobs' has to be a number above 0"))?,
    };
    let guests = plan["guests"].as_vec().ok_or_else(|| Error::invalid("'guests' has to be a list"))?;
    if guests.is_empty() {
        return Err(Error::invalid("'guests' is empty"));
    }
    let task = |(number, guest): (usize, &Yaml)| {
        task(guest, &plan["defaults"], passed_on).context(|| format!("guest {}", number + 1))
    };
    let tasks = guests.iter().enumerate().map(task).collect::<Result<Vec<_>>>()?;
    Ok((tasks, jobs))
}

fn task(guest: &Yaml, defaults: &Yaml, passed_on: &[String]) -> Result<Task> {
    let own = guest.as_hash().ok_or_else(|| Error::invalid("a guest has to be a mapping with 'source'"))?;
    let sources = strings(&guest["source"])?;
    if sources.is_empty() {
        return Err(Error::invalid("it has no 'source'"));
    }
    let mut words = passed_on.to_vec();
    if let Some(defaults) = defaults.as_hash() {
        for (key, value) in defaults.iter().filter(|(key, _)| !own.contains_key(*key)) {
            option(&mut words, key, value)?;
        }
    } else if !matches!(defaults, Yaml::BadValue | Yaml::Null) {
        return Err(Error::invalid("'defaults' has to be a mapping"));
    }
    for (key, value) in own.iter().filter(|(key, _)| key.as_str() != Some("source")) {
        option(&mut words, key, value)?;
    }
    words.push("--".to_owned());
    words.extend(sources.iter().cloned());
    Ok(Task { source: sources.join(", "), words })
}

/// `key: value` is `--key=value`, a list that option several times, `true` the option alone.
fn option(words: &mut Vec<String>, key: &Yaml, value: &Yaml) -> Result<()> {
    let name = key.as_str().filter(|name| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    });
    let Some(name) = name else { return Err(Error::invalid(format!("'{}' is no option", shown(key)))) };
    if matches!(name, "batch" | "jobs") {
        return Err(Error::invalid(format!("'{name}' cannot stand here")));
    }
    match value {
        Yaml::Boolean(true) => words.push(format!("--{name}")),
        Yaml::Boolean(false) => {}
        value => words.extend(strings(value)?.iter().map(|value| format!("--{name}={value}"))),
    }
    Ok(())
}

/// A value, or a list of them, as text.
fn strings(value: &Yaml) -> Result<Vec<String>> {
    match value {
        Yaml::Array(values) => Ok(values.iter().map(strings).collect::<Result<Vec<_>>>()?.concat()),
        Yaml::String(text) | Yaml::Real(text) => Ok(vec![text.clone()]),
        Yaml::Integer(number) => Ok(vec![number.to_string()]),
        Yaml::BadValue => Ok(vec![]),
        other => Err(Error::invalid(format!("{} is neither text nor a number", shown(other)))),
    }
}

fn shown(value: &Yaml) -> String {
    match value {
        Yaml::String(text) | Yaml::Real(text) => text.clone(),
        Yaml::Integer(number) => number.to_string(),
        other => format!("{other:?}"),
    }
}

/// Runs the tasks, so many at once, in their order.
fn work(tasks: &[Task], jobs: usize, signal: &AtomicUsize, app: &App) -> Vec<Done> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<Done>>> = Mutex::new(tasks.iter().map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(tasks.len()) {
            scope.spawn(|| {
                while signal.load(Ordering::Relaxed) == 0 {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(task) = tasks.get(index) else { break };
                    let result = one(task, signal);
                    app.say(&format!("{}: {}\n", task.source, conclusion(&result)));
                    done.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(result);
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()
}

fn conclusion(done: &Done) -> String {
    match done.document.get("conclusion").and_then(Value::as_str) {
        Some(words) => words.to_owned(),
        None => done.complaints.lines().next().unwrap_or("no report").to_owned(),
    }
}

/// Converts one machine in a process of its own, which answers with its report.
fn one(task: &Task, signal: &AtomicUsize) -> Done {
    let started = Instant::now();
    let (exit, stdout, stderr) = match spawn(task, signal) {
        Ok(ended) => ended,
        Err(error) => (1, vec![], error.to_string()),
    };
    Done {
        source: task.source.clone(),
        exit,
        seconds: started.elapsed().as_secs_f64(),
        document: serde_json::from_slice(&stdout).unwrap_or(Value::Null),
        complaints: stderr,
    }
}

fn spawn(task: &Task, signal: &AtomicUsize) -> Result<(u8, Vec<u8>, String)> {
    let me = std::env::current_exe().context(|| "could not find this program itself".to_owned())?;
    let mut child = Command::new(me)
        .args(["v2v", "--output", "json"])
        .args(&task.words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(|| "could not start a conversion".to_owned())?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let answer = std::thread::spawn(move || super::boot::read_all(stdout));
    let complaints = std::thread::spawn(move || super::boot::read_all(stderr));
    let mut told = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if !told && signal.load(Ordering::Relaxed) != 0 {
            told = true;
            super::boot::terminate(&child);
        }
        std::thread::sleep(ASK);
    };
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    let complaints = String::from_utf8_lossy(&complaints.join().unwrap_or_default()).into_owned();
    Ok((code, answer.join().unwrap_or_default(), complaints))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_plan_become_words() {
        let text = "jobs: 3\ndefaults:\n  output-dir: /out\n  bootcheck: true\n  memory: 2G\nguests:\n  - source: a.vmx\n  \
                    - source: [x.vhd, y.vhd]\n    name: db\n    memory: 4G\n    bootcheck: false\n    network: [a:b, c:d]\n";
        let (tasks, jobs) = parse(text, &["--untrusted".to_owned()]).unwrap();
        assert_eq!(jobs, 3);
        assert_eq!(
            tasks[0].words,
            ["--untrusted", "--output-dir=/out", "--bootcheck", "--memory=2G", "--", "a.vmx"]
        );
        assert_eq!(
            tasks[1].words,
            [
                "--untrusted",
                "--output-dir=/out",
                "--name=db",
                "--memory=4G",
                "--network=a:b",
                "--network=c:d",
                "--",
                "x.vhd",
                "y.vhd"
            ]
        );
    }

    #[test]
    fn a_plan_with_mistakes_is_refused() {
        for (text, words) in [
            ("", "one YAML document"),
            ("- a", "mapping"),
            ("guests: 3", "list"),
            ("guests: [{name: x}]", "no 'source'"),
            ("guests: [a.vmx]", "mapping with 'source'"),
            ("guest: []", "'guest' is not known"),
            ("jobs: 0\nguests: []", "above 0"),
            ("guests: []", "is empty"),
            ("guests: [{source: a, batch: b}]", "cannot stand here"),
            ("guests: [{source: a, 'x y': b}]", "no option"),
            ("guests: [{source: a, nic: {a: b}}]", "neither text"),
            ("guests: [", "not YAML"),
        ] {
            let error = parse(text, &[]).unwrap_err().to_string();
            assert!(error.contains(words), "{text:?}: {error}");
        }
    }

    #[test]
    fn the_worst_exit_code_wins() {
        let done = |exit| Done {
            source: String::new(),
            exit,
            seconds: 0.0,
            document: Value::Null,
            complaints: String::new(),
        };
        for (codes, all) in [
            (vec![], 0),
            (vec![0, 4], 4),
            (vec![4, 3], 3),
            (vec![3, 1, 0], 1),
            (vec![0, 0], 0),
            (vec![4, 5], 5),
        ] {
            assert_eq!(worst(&codes.into_iter().map(done).collect::<Vec<_>>()), all);
        }
    }
}
